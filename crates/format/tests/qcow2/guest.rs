//! A small guest: sectors with numbers in them, moved through a mapper as the engine above would, and a model of what each
//! sector may hold after a power loss.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_format::{
    CommitMode, Driver, Durability, FormatError, Mapper, Mapping, Room, WritableMapper,
    driver::{BackingRef, CheckReport, CreateSpec, driver},
};
use readonce_storage::{ReadAt, SimFile, Storage, TokioRuntime};

pub const SECTOR: u64 = 512;

pub fn qcow2() -> &'static dyn Driver {
    driver("qcow2").unwrap()
}

/// What kind of image is under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub extended_l2: bool,
    pub refcount_bits: u32,
    pub lazy: bool,
    pub data: DataIn,
    pub size: u64,
    pub backing: bool,
}

/// Where data lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataIn {
    Own,
    File,
    RawFile,
}

/// 4 KiB clusters: an L2 table maps 2 MiB, so that three tables are in play.
pub const SMALL: Shape = Shape {
    version: 3,
    cluster_bits: 12,
    extended_l2: false,
    refcount_bits: 16,
    lazy: false,
    data: DataIn::Own,
    size: (5 << 20) + 1536,
    backing: true,
};

/// Subclusters of 512 bytes; an L2 table maps 16 MiB.
pub const UNITS: Shape = Shape { cluster_bits: 14, extended_l2: true, ..SMALL };

impl Shape {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn unit(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }

    pub fn spec(&self) -> CreateSpec {
        let on = |on: bool| Some(if on { "on" } else { "off" }.to_owned());
        let mut options = vec![
            ("compat".into(), Some(if self.version == 2 { "v2" } else { "v3" }.into())),
            ("cluster_size".into(), Some(self.cluster_size().to_string())),
        ];
        if self.version == 3 {
            options.push(("refcount_bits".into(), Some(self.refcount_bits.to_string())));
            options.push(("extended_l2".into(), on(self.extended_l2)));
            options.push(("lazy_refcounts".into(), on(self.lazy)));
        }
        if self.data == DataIn::RawFile {
            options.push(("data_file_raw".into(), on(true)));
        }
        CreateSpec {
            size: self.size,
            backing: self
                .backing
                .then(|| BackingRef { name: "backing.raw".into(), format: Some("raw".into()) }),
            options,
            pin: None,
            data_file: (self.data != DataIn::Own).then(|| "data.raw".into()),
        }
    }
}

/// The files of an image.
#[derive(Clone)]
pub struct Files {
    pub image: Arc<SimFile>,
    pub data: Option<Arc<SimFile>>,
}

impl Files {
    pub fn crash(&self, seed: u64) -> Self {
        let data = self.data.as_ref().map(|data| Arc::new(data.crash(seed ^ 0x5555)));
        Self { image: Arc::new(self.image.crash(seed)), data }
    }

    /// Where guest bytes lie.
    pub fn data(&self) -> &Arc<SimFile> {
        self.data.as_ref().unwrap_or(&self.image)
    }
}

pub async fn create(shape: &Shape) -> Files {
    let image = Arc::new(SimFile::new());
    let data = (shape.data != DataIn::Own).then(|| Arc::new(SimFile::new()));
    let storage: Arc<dyn Storage> = image.clone();
    let data_storage: Option<Arc<dyn Storage>> = data.clone().map(|data| data as Arc<dyn Storage>);
    qcow2().create(&storage, data_storage.as_ref(), &shape.spec()).await.unwrap();
    Files { image, data }
}

/// What a sector of the backing holds.
pub fn backing_tag(shape: &Shape, sector: u64) -> u32 {
    if shape.backing { 0xb000_0000 + u32::try_from(sector).unwrap() } else { 0 }
}

pub fn sector_of(tag: u32) -> Vec<u8> {
    tag.to_le_bytes().repeat(128)
}

pub fn backing_bytes(shape: &Shape) -> Vec<u8> {
    (0..shape.size / SECTOR).flat_map(|sector| sector_of(backing_tag(shape, sector))).collect()
}

/// The number in a sector; every part of the sector must be of one write.
pub fn tag_of(sector: &[u8]) -> u32 {
    let tag = u32::from_le_bytes(sector[..4].try_into().unwrap());
    assert!(sector.chunks(4).all(|part| part == tag.to_le_bytes()), "a sector is torn");
    tag
}

/// What each sector may hold after a power loss; the last is what it holds now.
#[derive(Clone)]
pub struct Model {
    pub shape: Shape,
    pub allowed: Vec<Vec<u32>>,
    /// Whether the image began with snapshots or compressed clusters.
    pub shared: bool,
}

impl Model {
    pub fn new(shape: Shape) -> Self {
        let allowed = (0..shape.size / SECTOR).map(|sector| vec![backing_tag(&shape, sector)]).collect();
        Self { shape, allowed, shared: false }
    }

    pub fn write(&mut self, sector: u64, tag: u32) {
        self.allowed[sector as usize].push(tag);
    }

    pub fn now(&self, sector: u64) -> u32 {
        *self.allowed[sector as usize].last().unwrap()
    }

    pub fn flushed(&mut self) {
        for tags in &mut self.allowed {
            tags.drain(..tags.len() - 1);
        }
    }

    /// What was read becomes what is there.
    pub fn settle(&mut self, found: &[u32]) {
        for (tags, found) in self.allowed.iter_mut().zip(found) {
            *tags = vec![*found];
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        (0..self.shape.size / SECTOR).flat_map(|sector| sector_of(self.now(sector))).collect()
    }
}

/// A guest on an image that is open for writing.
pub struct Guest {
    pub files: Files,
    pub mapper: Arc<dyn WritableMapper>,
    pub model: Model,
    pub next_tag: u32,
}

#[derive(Debug)]
pub enum Op {
    Write { sector: u64, sectors: u64 },
    Zero { unit: u64, units: u64 },
    ZeroClusters { cluster: u64, clusters: u64 },
    Fill { unit: u64, units: u64 },
    Drop { unit: u64, units: u64 },
    Reuse,
    Linked,
    Durable,
    Settle,
}

pub fn random_op(rng: &mut SmallRng, shape: &Shape) -> Op {
    let sectors = shape.size / SECTOR;
    let clusters = shape.size.div_ceil(shape.cluster_size());
    let units = shape.size.div_ceil(shape.unit());
    let per_cluster = shape.cluster_size() / shape.unit();
    // Neighbourhoods, so that operations meet; the middle one lies across two L2 tables of the small shape.
    let home = [0, 508.min(clusters - 1), clusters.saturating_sub(9)][rng.random_range(0..3)];
    let cluster = (home + rng.random_range(0..9)).min(clusters - 1);
    let len = rng.random_range(1..=6).min(clusters - cluster);
    let unit = (cluster * per_cluster + rng.random_range(0..per_cluster)).min(units - 1);
    let unit_len = rng.random_range(1..=6).min(units - unit);
    match rng.random_range(0..100) {
        0..30 => {
            let per_cluster = shape.cluster_size() / SECTOR;
            let sector = (cluster * per_cluster + rng.random_range(0..per_cluster)).min(sectors - 1);
            let most = if rng.random_bool(0.2) { per_cluster * 3 } else { 20 };
            Op::Write { sector, sectors: rng.random_range(1..=most).min(sectors - sector) }
        }
        30..37 => Op::Zero { unit, units: unit_len },
        37..44 => Op::ZeroClusters { cluster, clusters: len },
        44..65 => Op::Fill { unit, units: unit_len },
        65..72 => Op::Fill {
            unit: cluster * per_cluster,
            units: (len * per_cluster).min(units - cluster * per_cluster),
        },
        72..77 => Op::Drop { unit, units: unit_len },
        77..81 => Op::Reuse,
        81..90 => Op::Linked,
        90..98 => Op::Durable,
        _ => Op::Settle,
    }
}

impl Guest {
    pub async fn open(files: Files, model: Model) -> Result<Self, FormatError> {
        let data = files.data.clone().map(|data| data as Arc<dyn Storage>);
        let mapper = qcow2().open_writable(files.image.clone(), data, TokioRuntime::current()).await?;
        Ok(Self { files, mapper, model, next_tag: 1 })
    }

    pub async fn new(shape: &Shape) -> Self {
        let files = create(shape).await;
        Self::open(files, Model::new(*shape)).await.unwrap()
    }

    fn shape(&self) -> Shape {
        self.model.shape
    }

    /// What the guest reads there, past its end zeros.
    fn old_bytes(&self, range: Range<u64>) -> Vec<u8> {
        let sectors = range.start / SECTOR..range.end / SECTOR;
        sectors
            .flat_map(|sector| {
                let inside = sector * SECTOR < self.shape().size;
                if inside { sector_of(self.model.now(sector)) } else { vec![0; 512] }
            })
            .collect()
    }

    pub async fn mapping(&self, offset: u64) -> Result<Mapping, FormatError> {
        Ok(self.mapper.lookup(offset, 1).await?.mapping)
    }

    /// Gives a shared or compressed cluster a place of its own.
    pub async fn copy(&mut self, cluster: u64) -> Result<(), FormatError> {
        let shape = self.shape();
        let guest = cluster * shape.cluster_size();
        let room = self.mapper.prepare(guest, shape.cluster_size(), Room::Copy).await?;
        for unit in (guest..(guest + shape.cluster_size()).min(shape.size)).step_by(shape.unit() as usize) {
            if matches!(self.mapping(unit).await?, Mapping::Shared(_) | Mapping::Compressed(_)) {
                let bytes = self.old_bytes(unit..unit + shape.unit());
                self.files.image.write(room.at.unwrap() + unit - guest, bytes.into()).await?;
            }
        }
        let len = room.len;
        assert_eq!(room.commit(CommitMode::Overwrite), len);
        Ok(())
    }

    /// Writes sectors: in place, or as whole units of their own.
    pub async fn write(&mut self, sector: u64, sectors: u64) -> Result<(), FormatError> {
        let shape = self.shape();
        let (unit_size, cluster_size) = (shape.unit(), shape.cluster_size());
        let mut at = sector;
        while at < sector + sectors {
            let mapping = self.mapping(at * SECTOR).await?;
            let whole_cluster = (at * SECTOR).is_multiple_of(cluster_size)
                && ((at * SECTOR + cluster_size).min(shape.size) <= (sector + sectors) * SECTOR);
            let piece =
                if whole_cluster && !matches!(mapping, Mapping::Data(_) | Mapping::Absent | Mapping::Zero) {
                    cluster_size
                } else {
                    unit_size
                };
            let unit = at * SECTOR / piece;
            let end = ((unit + 1) * piece / SECTOR).min(sector + sectors);
            let tag = self.next_tag;
            let data: Vec<u8> = (at..end).flat_map(|_| sector_of(tag)).collect();
            let before: Vec<u32> = (at..end).map(|sector| self.model.now(sector)).collect();
            match mapping {
                Mapping::Shared(_) | Mapping::Compressed(_)
                    if piece == unit_size && !(whole_cluster && piece == cluster_size) =>
                {
                    self.copy(at * SECTOR / cluster_size).await?;
                    continue;
                }
                Mapping::Data(offset) => {
                    // From here on, even where the write fails, the disk may hold it.
                    (at..end).for_each(|sector| self.model.write(sector, tag));
                    if let Err(error) = self.files.data().write(offset, data.into()).await {
                        (at..end).zip(before).for_each(|(sector, tag)| self.model.write(sector, tag));
                        return Err(error.into());
                    }
                }
                _ => {
                    let room = match self.mapper.prepare(unit * piece, piece, Room::Data).await {
                        Err(FormatError::CopyFirst) => {
                            self.copy(at * SECTOR / cluster_size).await?;
                            continue;
                        }
                        room => room?,
                    };
                    let mut whole = self.old_bytes(unit * piece..unit * piece + room.len);
                    let start = (at * SECTOR - unit * piece) as usize;
                    whole[start..start + data.len()].copy_from_slice(&data);
                    // Units that were data before they became zeros may still be shown by the disk where they were.
                    (at..end).for_each(|sector| self.model.write(sector, tag));
                    if let Err(error) = self.files.data().write(room.at.unwrap(), whole.into()).await {
                        (at..end).zip(before).for_each(|(sector, tag)| self.model.write(sector, tag));
                        return Err(error.into());
                    }
                    let len = room.len;
                    assert_eq!(room.commit(CommitMode::Overwrite), len);
                }
            }
            self.next_tag += 1;
            at = end;
        }
        Ok(())
    }

    fn zeroed(&mut self, range: Range<u64>) {
        let end = range.end.min(self.shape().size);
        (range.start / SECTOR..end / SECTOR).for_each(|sector| self.model.write(sector, 0));
    }

    /// Zeroes units: in place where they are data.
    pub async fn zero(&mut self, unit: u64, units: u64) -> Result<(), FormatError> {
        let shape = self.shape();
        for unit in unit..unit + units {
            let guest = unit * shape.unit();
            let mapping = self.mapping(guest).await?;
            if self.mapper.abilities().zero && matches!(mapping, Mapping::Absent | Mapping::Zero) {
                let room = self.mapper.prepare(guest, shape.unit(), Room::Zero).await?;
                assert_eq!(room.commit(CommitMode::Overwrite), shape.unit());
                self.zeroed(guest..guest + shape.unit());
                continue;
            }
            let sectors = (shape.unit() / SECTOR).min((shape.size - guest) / SECTOR);
            let tag = std::mem::replace(&mut self.next_tag, 0);
            let written = Box::pin(self.write(guest / SECTOR, sectors)).await;
            self.next_tag = tag;
            written?;
        }
        Ok(())
    }

    /// Zeroes whole clusters, whatever they are.
    pub async fn zero_clusters(&mut self, cluster: u64, clusters: u64) -> Result<(), FormatError> {
        let shape = self.shape();
        if !self.mapper.abilities().unlink {
            let per_cluster = shape.cluster_size() / shape.unit();
            let units = shape.size.div_ceil(shape.unit());
            let last = ((cluster + clusters) * per_cluster).min(units);
            return self.zero(cluster * per_cluster, last - cluster * per_cluster).await;
        }
        let guest_end = shape.size.next_multiple_of(shape.unit());
        let mut at = cluster * shape.cluster_size();
        let end = ((cluster + clusters) * shape.cluster_size()).min(guest_end);
        while at < end {
            let room = self.mapper.prepare(at, end - at, Room::Zero).await?;
            assert_eq!(room.at, None);
            let (guest, len) = (room.guest, room.len);
            assert_eq!(room.commit(CommitMode::Overwrite), len);
            self.zeroed(guest..guest + len);
            at += len;
        }
        Ok(())
    }

    /// Absent units from `at` on, at most up to `end`: where they begin and end.
    async fn absent_run(&self, mut at: u64, end: u64) -> Result<Option<Range<u64>>, FormatError> {
        while at < end {
            let extent = self.mapper.lookup(at, end - at).await?;
            let len = extent.len.next_multiple_of(self.shape().unit());
            if extent.mapping == Mapping::Absent {
                return Ok(Some(at..(at + len).min(end)));
            }
            at += len;
        }
        Ok(None)
    }

    /// A copy-on-read fill of what is absent in a run of units; returns the bytes linked.
    pub async fn fill(&mut self, unit: u64, units: u64) -> Result<u64, FormatError> {
        let shape = self.shape();
        let mut linked = 0;
        let (mut at, end) = (unit * shape.unit(), (unit + units) * shape.unit());
        let end = end.min(shape.size.next_multiple_of(shape.unit()));
        while let Some(run) = self.absent_run(at, end).await? {
            let room = match self.mapper.prepare(run.start, run.end - run.start, Room::Data).await {
                Err(FormatError::CopyFirst) => {
                    self.copy(run.start / shape.cluster_size()).await?;
                    continue;
                }
                room => room?,
            };
            at = run.start + room.len;
            let mut bytes = Vec::new();
            for sector in room.guest / SECTOR..(room.guest + room.len) / SECTOR {
                let inside = sector * SECTOR < shape.size;
                bytes.extend(if inside { sector_of(backing_tag(&shape, sector)) } else { vec![0; 512] });
            }
            self.files.data().write(room.at.unwrap(), bytes.into()).await?;
            linked += room.commit(CommitMode::IfAbsent);
        }
        Ok(linked)
    }

    pub async fn flush(&mut self) -> Result<(), FormatError> {
        self.mapper.flush(Durability::Durable).await?;
        self.model.flushed();
        Ok(())
    }

    pub async fn run(&mut self, op: &Op) -> Result<(), FormatError> {
        match *op {
            Op::Write { sector, sectors } => self.write(sector, sectors).await,
            Op::Zero { unit, units } => self.zero(unit, units).await,
            Op::ZeroClusters { cluster, clusters } => self.zero_clusters(cluster, clusters).await,
            Op::Fill { unit, units } => self.fill(unit, units).await.map(drop),
            Op::Drop { unit, units } => {
                let (at, end) = (unit * self.shape().unit(), (unit + units) * self.shape().unit());
                let end = end.min(self.shape().size.next_multiple_of(self.shape().unit()));
                let Some(run) = self.absent_run(at, end).await? else { return Ok(()) };
                match self.mapper.prepare(run.start, run.end - run.start, Room::Data).await {
                    Err(FormatError::CopyFirst) => Ok(()),
                    Err(error) => Err(error),
                    // Written and given up: these bytes must never be seen.
                    Ok(room) => {
                        let junk = Bytes::from(vec![0xee; room.len as usize]);
                        Ok(self.files.data().write(room.at.unwrap(), junk).await?)
                    }
                }
            }
            Op::Reuse => {
                if let Some(unlinked) = self.mapper.take_unlinked() {
                    unlinked.reuse();
                }
                Ok(())
            }
            Op::Linked => self.mapper.flush(Durability::Linked).await,
            Op::Durable => self.flush().await,
            Op::Settle => {
                self.mapper.settle().await?;
                self.model.flushed();
                Ok(())
            }
        }
    }

    pub async fn check_reads(&self) {
        let found = read_all(self.mapper.as_ref(), &self.files, &self.shape()).await.unwrap();
        for (sector, found) in (0..).zip(found) {
            assert_eq!(found, self.model.now(sector), "sector {sector}");
        }
    }
}

/// The number in each sector, through any mapper.
pub async fn read_all<M: Mapper + ?Sized>(
    mapper: &M,
    files: &Files,
    shape: &Shape,
) -> Result<Vec<u32>, FormatError> {
    let mut tags = Vec::new();
    let mut offset = 0;
    while offset < shape.size {
        let extent = match mapper.lookup_now(offset, shape.size - offset) {
            Some(extent) => extent?,
            None => mapper.lookup(offset, shape.size - offset).await?,
        };
        assert!(extent.len >= 1 && extent.len <= shape.size - offset);
        let sectors = offset / SECTOR..(offset + extent.len) / SECTOR;
        match extent.mapping {
            Mapping::Absent => tags.extend(sectors.map(|sector| backing_tag(shape, sector))),
            Mapping::Zero => tags.extend(sectors.map(|_| 0)),
            Mapping::Data(at) | Mapping::Shared(at) => {
                let bytes = files.data().read(at, extent.len as usize).await?;
                tags.extend(bytes.chunks(512).map(tag_of));
            }
            Mapping::Compressed(compressed) => {
                let stream = files.image.read(compressed.at, compressed.len as usize).await?;
                let mut cluster = vec![0; shape.cluster_size() as usize];
                compressed.codec.decompress(&stream, &mut cluster)?;
                let from = compressed.skip as usize;
                tags.extend(cluster[from..from + extent.len as usize].chunks(512).map(tag_of));
            }
        }
        offset += extent.len;
    }
    Ok(tags)
}

pub async fn check(file: &Arc<SimFile>) -> CheckReport {
    let reader: Arc<dyn ReadAt> = file.clone();
    qcow2().check(&reader).await.unwrap()
}

/// Broken entries and leaks.
pub async fn wrong(file: &Arc<SimFile>) -> (u64, u64) {
    let report = check(file).await;
    (report.corruptions + report.check_errors, report.leaks)
}

pub fn rng(seed: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed)
}

/// Runs `test` on a runtime of one thread.
pub fn block_on<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}
