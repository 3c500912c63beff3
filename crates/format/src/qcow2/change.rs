//! Changes of the header, on an image that nobody has open for writing.
//!
//! - A change that fits into one sector is one write. A larger one goes in steps, with a sync after each: (1) the new head in its far
//!   form (`head`), behind everything that the header points to; (2) the first sector, which a disk writes whole or not at
//!   all, points there; (3) the new head in its usual form, but for the first sector; (4) the first sector of that; (5) the
//!   bytes that nothing points to any more are zeros. A crash leaves the old header or the new one.
//! - A header that a change which was cut off left in its far form needs (3) to (5) alone.
//! - Where the first cluster has no room for both, the sectors are written in place, the first one last, and a crash may tear
//!   what they hold. That takes a cluster of 4 KiB or less, or names of kilobytes.
//! - Unknown fields and extensions, snapshots and feature names stay. Autoclear bits that are not known are cleared, since this
//!   is a write.
//!
//! Not here: tables that grow (`grow`).

use std::sync::Arc;

use bytes::Bytes;
use readonce_storage::{ReadAt, Storage};

use super::{
    create::{copy_on_read_needs_backing, raw_data_with_backing, too_large},
    extensions::KIND_RECORD,
    grow,
    head::{Head, sectors},
    header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, AUTOCLEAR_ONLY_READONCE, Header, SectorWrite},
    layout::SECTOR_BYTES,
    record::{FIXED_BYTES, Record},
};
use crate::{
    FormatError,
    driver::HeaderChange,
    number::{bytes, index, round_up},
};

/// Applies `change`; durable when this returns.
///
/// # Errors
/// `Invalid` and `Unsupported`: nothing changed. `Corrupt`, `NoSpace`, `Io`.
pub(super) async fn change(file: &Arc<dyn Storage>, change: &HeaderChange) -> Result<(), FormatError> {
    let header = read(file).await?;
    if header.corrupt() {
        return Err(FormatError::Unsupported("qcow2: Image is corrupt; cannot be opened read/write".into()));
    }
    let mut head = Head::of(&header);
    match change {
        HeaderChange::Size(size) => return resize(file, header, *size).await,
        HeaderChange::CopyOnRead(on) => {
            if *on && header.backing.is_none() {
                return Err(copy_on_read_needs_backing());
            }
            let record = head.record.get_or_insert_with(Record::default);
            if record.copy_on_read == *on {
                return Ok(());
            }
            record.copy_on_read = *on;
        }
        HeaderChange::Backing(backing, pin) => {
            if backing.is_some() && header.data_file.as_ref().is_some_and(|data| data.raw) {
                return Err(raw_data_with_backing());
            }
            head.set_backing(backing.as_ref(), pin.as_ref())?;
        }
        HeaderChange::Pin(pin) => head.set_backing(header.backing.as_ref(), Some(pin))?,
    }
    replace(file, &header, &mut head).await
}

/// Gives an image of another program the extension that holds our record, and with it the in-use mark; answers the header as it is
/// then. The image must not be in use by anyone else. Where there is no room for it, the header stays as it is.
///
/// # Errors
/// `NoSpace`, `Io`.
pub(super) async fn adopt(file: &Arc<dyn Storage>, header: Header) -> Result<Header, FormatError> {
    if header.has_mark() {
        return Ok(header);
    }
    let mut head = Head::of(&header);
    head.record = Some(Record::default());
    if head.bytes().is_err() {
        return Ok(header);
    }
    replace(file, &header, &mut head).await?;
    read(file).await
}

async fn read(file: &Arc<dyn Storage>) -> Result<Header, FormatError> {
    let reader: Arc<dyn ReadAt> = file.clone();
    Header::read(reader.as_ref()).await
}

async fn resize(file: &Arc<dyn Storage>, mut header: Header, size: u64) -> Result<(), FormatError> {
    let size = round_up(size, SECTOR_BYTES)
        .filter(|&size| size <= header.layout.image_size_max())
        .ok_or_else(too_large)?;
    if size < header.layout.image_size {
        return Err(FormatError::Unsupported("Shrinking images is currently not supported".into()));
    }
    if header.layout.version == 2 && header.fields.nb_snapshots > 0 {
        return Err(FormatError::Unsupported("Can't resize a v2 image which has snapshots".into()));
    }
    // The bitmaps would be too short.
    let kept = AUTOCLEAR_DATA_FILE_RAW | AUTOCLEAR_ONLY_READONCE;
    header.fields.autoclear_features &= kept;
    grow::grow(file, &mut header, size).await
}

/// Writes `head` in the place of `header`.
async fn replace(file: &Arc<dyn Storage>, header: &Header, head: &mut Head) -> Result<(), FormatError> {
    head.fields.autoclear_features &= AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW | AUTOCLEAR_ONLY_READONCE;
    let cluster_size = header.layout.cluster_size();
    let mut new = head.bytes()?;
    new.resize(index(sectors(bytes(new.len()))), 0);
    let new_end = bytes(new.len());
    let used_end = bytes(header.head().len().max(new.len()));
    let mut old = file.read(0, index(used_end.min(file.len()))).await?.to_vec();
    old.resize(index(used_end), 0);
    new.resize(index(used_end), 0);

    let sector = index(SECTOR_BYTES);
    let changed: Vec<usize> = old
        .chunks(sector)
        .zip(new.chunks(sector))
        .enumerate()
        .filter_map(|(number, (old, new))| (old != new).then_some(number))
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    if let [only] = changed.as_slice() {
        write(file, &new, only * sector, (only + 1) * sector).await?;
        return Ok(file.sync().await?);
    }

    if far_begin(header).is_some_and(|begin| new_end <= begin) {
        write(file, &new, sector, index(new_end)).await?;
        file.sync().await?;
        write(file, &new, 0, sector).await?;
        file.sync().await?;
        file.write_zeroes(new_end, used_end - new_end).await?;
        return Ok(file.sync().await?);
    }
    let Some(mut far) = head.far_bytes(used_end)?.filter(|far| sectors(bytes(far.len())) <= cluster_size)
    else {
        write(file, &new, sector, new.len()).await?;
        file.sync().await?;
        write(file, &new, 0, sector).await?;
        return Ok(file.sync().await?);
    };
    far.resize(index(sectors(bytes(far.len()))), 0);
    write(file, &far, index(used_end), far.len()).await?;
    file.sync().await?;
    write(file, &far, 0, sector).await?;
    file.sync().await?;
    write(file, &new, sector, new.len()).await?;
    file.sync().await?;
    write(file, &new, 0, sector).await?;
    file.sync().await?;
    file.write_zeroes(used_end, bytes(far.len()) - used_end).await?;
    Ok(file.sync().await?)
}

/// Where the rest of a header in its far form begins: between the first sector and there nothing has a meaning.
fn far_begin(header: &Header) -> Option<u64> {
    let first = header.extensions.first().filter(|first| first.kind == KIND_RECORD)?;
    let fixed_end = first.at + FIXED_BYTES;
    let begin = first.at + Record::payload_at(&first.data)?;
    (fixed_end <= SECTOR_BYTES && begin > fixed_end).then_some(begin)
}

async fn write(file: &Arc<dyn Storage>, head: &[u8], from: usize, to: usize) -> Result<(), FormatError> {
    let data = head.get(from..to).unwrap_or_default();
    Ok(file.write(bytes(from), Bytes::copy_from_slice(data)).await?)
}

/// Writes a sector of the header; durable when this returns.
pub(super) async fn write_sector(file: &Arc<dyn Storage>, sector: SectorWrite) -> Result<(), FormatError> {
    file.write(sector.at, sector.data).await?;
    Ok(file.sync().await?)
}

#[cfg(test)]
mod tests {
    use readonce_storage::SimFile;

    use super::*;
    use crate::{
        driver::{BackingRef, CreateSpec},
        qcow2::create::create,
    };

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    /// An image as another program makes it: with an extension that is not ours in the place of ours.
    async fn foreign(options: &[(&str, &str)], name: &str) -> Arc<SimFile> {
        let file = Arc::new(SimFile::new());
        let storage: Arc<dyn Storage> = file.clone();
        let spec = CreateSpec {
            size: 1 << 20,
            backing: Some(BackingRef { name: name.to_owned(), format: Some("raw".into()) }),
            options: options
                .iter()
                .map(|(name, value)| (name.to_string(), Some(value.to_string())))
                .collect(),
            ..CreateSpec::default()
        };
        create(&storage, None, &spec).await.unwrap();
        let at = read(&storage).await.unwrap().fields.header_length.into();
        storage.write(at, Bytes::from_static(&[1, 2, 3, 4])).await.unwrap();
        storage.sync().await.unwrap();
        file
    }

    #[test]
    fn an_adopted_image_has_the_mark_and_says_the_same() {
        block_on(async {
            for options in [&[][..], &[("compat", "v2")], &[("cluster_size", "1k")]] {
                let file = foreign(options, "backing").await;
                let storage: Arc<dyn Storage> = file.clone();
                let before = read(&storage).await.unwrap();
                assert!(!before.has_mark());
                let mut adopted = adopt(&storage, before.clone()).await.unwrap();
                assert!(adopted.has_mark());
                assert_eq!(adopted.backing, before.backing);
                assert_eq!(adopted.fields.size, before.fields.size);
                let kept = |header: &Header| header.extensions.iter().any(|found| found.kind == 0x0102_0304);
                assert!(kept(&before) && kept(&adopted));

                let mark = adopted.set_in_use(true).unwrap();
                write_sector(&storage, mark).await.unwrap();
                assert!(read(&storage).await.unwrap().record.in_use);
                let writes = file.op_count();
                let again = read(&storage).await.unwrap();
                assert!(adopt(&storage, again).await.unwrap().record.in_use);
                assert_eq!(file.unsynced_count(), 0);
                assert!(file.op_count() <= writes + 2, "an image that has the mark is only read");
            }
        });
    }

    #[test]
    fn an_image_without_room_for_the_mark_stays_as_it_is() {
        block_on(async {
            let file = foreign(&[("cluster_size", "512")], &"n".repeat(320)).await;
            let storage: Arc<dyn Storage> = file.clone();
            let before = file.contents();
            let header = read(&storage).await.unwrap();
            assert!(!adopt(&storage, header).await.unwrap().has_mark());
            assert!(file.contents() == before);
        });
    }
}
