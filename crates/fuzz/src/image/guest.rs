//! A guest in miniature: whole units, written through a mapper as the engine would, and a model of what each holds.

use std::{
    hash::{DefaultHasher, Hasher},
    sync::Arc,
};

use bytes::Bytes;
use readonce_format::{CommitMode, FormatError, Geometry, Mapper, Mapping, Room, WritableMapper};
use readonce_storage::{ReadAt, Storage};

/// What a unit holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// The backing shows through.
    Absent,
    /// Zeros, by the map or in the file.
    Zero,
    /// Bytes with this hash.
    Bytes(u64),
    /// It cannot be read.
    Bad,
}

impl Unit {
    /// What a guest sees: without a backing what is absent is zeros.
    pub(crate) fn seen(self, has_backing: bool) -> Self {
        if self == Self::Absent && !has_backing { Self::Zero } else { self }
    }

    /// A unit of these bytes.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        if bytes.iter().all(|&byte| byte == 0) {
            return Self::Zero;
        }
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        Self::Bytes(hasher.finish())
    }
}

/// The bytes that a write numbered `tag` puts into a unit.
pub(crate) fn pattern(tag: u32, unit: u64, len: u64) -> Vec<u8> {
    let word = [tag.to_le_bytes(), (unit as u32).to_le_bytes()].concat();
    word.repeat(len as usize / 8)
}

/// The bytes of a unit that lie inside the guest.
pub(crate) fn unit_len(geometry: &Geometry, unit: u64) -> u64 {
    geometry.fill_unit.min(geometry.size - unit * geometry.fill_unit)
}

/// Bytes of a unit that are compared: a hostile one may be large.
const UNIT_BYTES_MAX: u64 = 128 << 10;

/// What the first `count_max` units of the first `size_max` bytes hold. `file` is the image's, `data` where its data lies.
pub(crate) async fn read_units(
    mapper: &(impl Mapper + ?Sized),
    file: &Arc<dyn ReadAt>,
    data: &Arc<dyn ReadAt>,
    count_max: u64,
    size_max: u64,
) -> Vec<Unit> {
    let geometry = mapper.geometry();
    let geometry = Geometry { size: geometry.size.min(size_max), ..geometry };
    assert!(geometry.fill_unit > 0 && geometry.cluster_size.is_multiple_of(geometry.fill_unit));
    let count = geometry.size.div_ceil(geometry.fill_unit);
    let mut units = Vec::new();
    for unit in 0..count.min(count_max) {
        units.push(read_unit(mapper, &geometry, file, data, unit).await);
    }
    // Far ends, and the longest that can be asked.
    for offset in [0, geometry.size / 2, geometry.size / 3 * 2, geometry.size.saturating_sub(1)] {
        if offset < geometry.size {
            look(mapper, &geometry, offset, geometry.size - offset).await.ok();
        }
    }
    units
}

/// An extent that is what an extent may be.
async fn look(
    mapper: &(impl Mapper + ?Sized),
    geometry: &Geometry,
    offset: u64,
    len_max: u64,
) -> Result<readonce_format::Extent, FormatError> {
    let extent = mapper.lookup(offset, len_max).await?;
    assert!(extent.len > 0 && extent.len <= len_max, "{extent:?} for {len_max} bytes at {offset}");
    if let Some(now) = mapper.lookup_now(offset, len_max) {
        let now = now?;
        assert_eq!(now.mapping, extent.mapping, "at {offset}");
        assert!(now.len > 0 && now.len <= len_max);
    }
    if let Mapping::Compressed(place) = extent.mapping {
        assert!(place.len <= 2 * geometry.cluster_size, "{place:?}");
        assert!(place.skip == offset % geometry.cluster_size);
        assert!(extent.len <= geometry.cluster_size - place.skip, "the extent ends with the cluster");
    }
    Ok(extent)
}

async fn read_unit(
    mapper: &(impl Mapper + ?Sized),
    geometry: &Geometry,
    file: &Arc<dyn ReadAt>,
    data: &Arc<dyn ReadAt>,
    unit: u64,
) -> Unit {
    let at = unit * geometry.fill_unit;
    let len = unit_len(geometry, unit).min(UNIT_BYTES_MAX);
    let Ok(extent) = look(mapper, geometry, at, len).await else { return Unit::Bad };
    if extent.len < len {
        // Only formats whose unit is no promise of theirs (raw) split one.
        return Unit::Bad;
    }
    match extent.mapping {
        Mapping::Absent => Unit::Absent,
        Mapping::Zero => Unit::Zero,
        Mapping::Data(from) | Mapping::Shared(from) => match data.read(from, len as usize).await {
            Ok(bytes) => Unit::read(&bytes),
            Err(_) => Unit::Bad,
        },
        Mapping::Compressed(place) => {
            assert!(place.at + place.len <= file.len(), "{place:?} in a file of {}", file.len());
            let mut cluster = vec![0; geometry.cluster_size as usize];
            let Ok(stream) = file.read(place.at, place.len as usize).await else { return Unit::Bad };
            match place.codec.decompress(&stream, &mut cluster) {
                Ok(()) => Unit::read(&cluster[place.skip as usize..][..len as usize]),
                Err(_) => Unit::Bad,
            }
        }
    }
}

/// An image that is open for writing, and where its bytes lie.
pub(crate) struct Guest {
    pub(crate) mapper: Arc<dyn WritableMapper>,
    pub(crate) file: Arc<dyn Storage>,
    pub(crate) data: Arc<dyn Storage>,
}

impl Guest {
    fn geometry(&self) -> Geometry {
        self.mapper.geometry()
    }

    /// The bytes at an extent that is data or compressed, `len` of them.
    async fn bytes(&self, mapping: Mapping, len: u64) -> Result<Bytes, FormatError> {
        match mapping {
            Mapping::Absent | Mapping::Zero => Ok(vec![0; len as usize].into()),
            Mapping::Data(from) | Mapping::Shared(from) => Ok(self.data.read(from, len as usize).await?),
            Mapping::Compressed(place) => {
                let mut cluster = vec![0; self.geometry().cluster_size as usize];
                let stream = self.file.read(place.at, place.len as usize).await?;
                place.codec.decompress(&stream, &mut cluster)?;
                Ok(Bytes::from(cluster).slice(place.skip as usize..(place.skip + len) as usize))
            }
        }
    }

    /// Writes units `first..end`. What was written before an error stays.
    pub(crate) async fn write(
        &self,
        first: u64,
        end: u64,
        mode: CommitMode,
        content: impl Fn(u64, u64) -> Vec<u8>,
    ) -> Result<(), FormatError> {
        let geometry = self.geometry();
        let unit = geometry.fill_unit;
        let bytes_of = |from: u64, len: u64| -> Bytes {
            let units = from / unit..(from + len).div_ceil(unit);
            let mut bytes: Vec<u8> = units.flat_map(|index| content(index, unit)).collect();
            bytes.truncate(len as usize);
            bytes.into()
        };
        let (mut at, end) = (first * unit, (end * unit).min(geometry.size));
        let mut copies = 0;
        while at < end {
            let extent = look(&*self.mapper, &geometry, at, end - at).await?;
            match extent.mapping {
                Mapping::Data(to) => {
                    self.data.write(to, bytes_of(at, extent.len)).await?;
                    at += extent.len;
                }
                Mapping::Absent | Mapping::Zero => {
                    match self.mapper.prepare(at, extent.len.next_multiple_of(unit), Room::Data).await {
                        Err(FormatError::CopyFirst) if copies < 100 => {
                            copies += 1;
                            self.copy(at / geometry.cluster_size).await?;
                        }
                        Err(error) => return Err(error),
                        Ok(room) => {
                            assert!(room.guest == at && room.len > 0 && room.len.is_multiple_of(unit));
                            let len = room.len.min(end - at);
                            let to = room.at.expect("room for data");
                            let mut bytes = bytes_of(at, len).to_vec();
                            bytes.resize(room.len as usize, 0);
                            self.data.write(to, bytes.into()).await?;
                            let linked = room.commit(mode);
                            assert!(linked > 0 || extent.mapping == Mapping::Zero);
                            at += len;
                        }
                    }
                }
                Mapping::Shared(_) | Mapping::Compressed(_) => {
                    copies += 1;
                    if copies > 100 {
                        return Err(FormatError::CopyFirst);
                    }
                    self.copy(at / geometry.cluster_size).await?;
                    let now = look(&*self.mapper, &geometry, at, end - at).await?;
                    assert!(matches!(now.mapping, Mapping::Data(_)), "copied, it is {now:?}");
                }
            }
        }
        Ok(())
    }

    /// Gives a cluster a place of its own.
    async fn copy(&self, cluster: u64) -> Result<(), FormatError> {
        let geometry = self.geometry();
        let start = cluster * geometry.cluster_size;
        let end = (start + geometry.cluster_size).min(geometry.size);
        let mut parts = Vec::new();
        let mut at = start;
        while at < end {
            let extent = look(&*self.mapper, &geometry, at, end - at).await?;
            if matches!(extent.mapping, Mapping::Shared(_) | Mapping::Compressed(_)) {
                parts.push((at - start, self.bytes(extent.mapping, extent.len).await?));
            }
            at += extent.len;
        }
        let len = (end - start).next_multiple_of(geometry.fill_unit);
        let room = self.mapper.prepare(start, len, Room::Copy).await?;
        assert_eq!((room.guest, room.len), (start, len));
        let to = room.at.expect("room for data");
        for (offset, bytes) in parts {
            self.data.write(to + offset, bytes).await?;
        }
        room.commit(CommitMode::Overwrite);
        Ok(())
    }

    /// Makes whole clusters read as zeros where the format can; says whether they do.
    pub(crate) async fn zero(&self, cluster: u64, count: u64) -> Result<bool, FormatError> {
        let geometry = self.geometry();
        let abilities = self.mapper.abilities();
        let start = cluster * geometry.cluster_size;
        let end = (start + count * geometry.cluster_size).min(geometry.size);
        let extent = look(&*self.mapper, &geometry, start, end - start).await?;
        let all_absent = extent.mapping == Mapping::Absent && extent.len == end - start;
        if !abilities.zero || !(abilities.unlink || all_absent) {
            return Ok(false);
        }
        let mut at = start;
        while at < end {
            let len = (end - at).next_multiple_of(geometry.fill_unit);
            let room = match self.mapper.prepare(at, len, Room::Zero).await {
                Err(FormatError::CopyFirst) => return Ok(false),
                room => room?,
            };
            assert!(room.guest == at && room.len > 0 && room.at.is_none());
            at += room.len;
            room.commit(CommitMode::Overwrite);
        }
        Ok(true)
    }

    /// Lets what is unlinked be used again.
    pub(crate) fn reuse(&self) {
        while let Some(unlinked) = self.mapper.take_unlinked() {
            unlinked.reuse();
        }
    }
}
