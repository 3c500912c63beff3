//! Changes of the header, on an image that nobody has open for writing.
//!
//! - The first sector, which a disk writes whole or not at all, says where the backing name and the pin's record lie. New ones are put
//!   where they touch neither the old name nor the old record, but for what of them lies in that sector itself; they are durable
//!   before it is written. A crash leaves the old name with the old pin or the new name with the new pin.
//! - Where there is no such place, nothing is changed.
//! - Autoclear bits that are not ours are cleared, since this is a write.
//!
//! Not here: a header area that grows. Where the name and the record do not fit, the error names the limit.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use readonce_storage::{ReadAt, Storage};
use zerocopy::IntoBytes;

use super::{
    create::{check_name, copy_on_read_needs_backing},
    header::{
        AUTOCLEAR_ONLY_READONCE, COMPAT_COPY_ON_READ, COMPAT_PIN, COMPAT_PIN_AT_NAME, FEATURE_BACKING_FILE,
        FEATURE_BACKING_NO_PROBE, HEADER_BYTES, Header, HeaderSector,
    },
    layout::{SECTOR_BYTES, image_size_max},
    record,
};
use crate::{
    FormatError,
    driver::{BackingRef, HeaderChange, Pin},
    number::{bytes, index, round_up},
};

/// Applies `change`; durable when this returns.
pub(super) async fn change(file: &Arc<dyn Storage>, change: &HeaderChange) -> Result<(), FormatError> {
    let reader: Arc<dyn ReadAt> = file.clone();
    let header = Header::read(reader.as_ref()).await?;
    match change {
        HeaderChange::CopyOnRead(on) => {
            if *on && header.backing.is_none() {
                return Err(copy_on_read_needs_backing());
            }
            let mut sector = header.sector;
            let compat = sector.fields.compat_features.get() & !COMPAT_COPY_ON_READ;
            let compat = compat | if *on { COMPAT_COPY_ON_READ } else { 0 };
            sector.fields.compat_features = compat.into();
            write_sector(file, sector).await
        }
        HeaderChange::Size(size) => {
            let mut sector = header.sector;
            sector.fields.image_size = grown_size(&header, *size)?.into();
            write_sector(file, sector).await
        }
        HeaderChange::Backing(backing, pin) => {
            rewrite_backing(file, header, backing.as_ref(), pin.as_ref()).await
        }
        HeaderChange::Pin(pin) => {
            let Some(backing) = header.backing.clone() else {
                return Err(FormatError::Invalid("a version can be pinned only with a backing file".into()));
            };
            rewrite_backing(file, header, Some(&backing), Some(pin)).await
        }
    }
}

fn grown_size(header: &Header, size: u64) -> Result<u64, FormatError> {
    let layout = &header.layout;
    let size_max = image_size_max(layout.cluster_size, layout.table_size);
    let Some(size) = round_up(size, SECTOR_BYTES).filter(|&size| size <= size_max) else {
        return Err(FormatError::Invalid(format!(
            "Invalid image size specified: {size}, this image can have at most {size_max} bytes"
        )));
    };
    if size < layout.image_size {
        return Err(FormatError::Unsupported("Shrinking images is currently not supported".into()));
    }
    Ok(size)
}

async fn write_sector(file: &Arc<dyn Storage>, mut sector: HeaderSector) -> Result<(), FormatError> {
    sector.fields.clear_foreign();
    file.write(0, Bytes::copy_from_slice(sector.as_bytes())).await?;
    Ok(file.sync().await?)
}

async fn rewrite_backing(
    file: &Arc<dyn Storage>,
    header: Header,
    backing: Option<&BackingRef>,
    pin: Option<&Pin>,
) -> Result<(), FormatError> {
    let mut sector = header.sector;
    let fields = &mut sector.fields;
    let mut features = fields.features.get() & !(FEATURE_BACKING_FILE | FEATURE_BACKING_NO_PROBE);
    let mut compat = fields.compat_features.get() & !(COMPAT_PIN | COMPAT_PIN_AT_NAME);
    let mut autoclear = fields.autoclear_features.get() & !AUTOCLEAR_ONLY_READONCE;
    let Some(backing) = backing else {
        if pin.is_some() {
            return Err(FormatError::Invalid("a version can be pinned only with a backing file".into()));
        }
        // Without a backing there is nothing to copy.
        compat &= !COMPAT_COPY_ON_READ;
        fields.features = features.into();
        fields.compat_features = compat.into();
        fields.autoclear_features = autoclear.into();
        fields.backing_filename_offset = 0.into();
        fields.backing_filename_size = 0.into();
        return write_sector(file, sector).await;
    };

    check_name(&backing.name)?;
    let name = Bytes::copy_from_slice(backing.name.as_bytes());
    let record = pin.map_or(Ok(Bytes::new()), |pin| record::encode(pin, &backing.name))?;
    let needed = HEADER_BYTES + bytes(name.len()) + bytes(record.len());
    if needed > header.layout.header_bytes {
        return Err(FormatError::Invalid(format!(
            "the header, the backing file name and the pinned version need {needed} bytes, this image's header area has {}",
            header.layout.header_bytes
        )));
    }
    let place = place(&header, &backing.name, bytes(record.len())).ok_or_else(|| {
        FormatError::Invalid(format!(
            "this image's header area of {} bytes has no room for the new backing file name and pinned version beside the \
             present ones, which a power loss must find whole",
            header.layout.header_bytes
        ))
    })?;

    features |= FEATURE_BACKING_FILE;
    if backing.format.as_deref() == Some("raw") {
        features |= FEATURE_BACKING_NO_PROBE;
    }
    if pin.is_some() {
        compat |= place.compat;
        autoclear |= AUTOCLEAR_ONLY_READONCE;
    }
    fields.features = features.into();
    fields.compat_features = compat.into();
    fields.autoclear_features = autoclear.into();
    fields.backing_filename_offset = narrow(place.name_at).into();
    fields.backing_filename_size = narrow(bytes(name.len())).into();

    let mut outside = false;
    for (at, data) in [(place.record_at, record), (place.name_at, name)] {
        let inside = index(SECTOR_BYTES.saturating_sub(at)).min(data.len());
        if inside > 0 {
            let start = index(at - HEADER_BYTES);
            let room = sector.rest.get_mut(start..start + inside).expect("it lies in the first sector");
            room.copy_from_slice(&data.slice(..inside));
        }
        if inside < data.len() {
            file.write(at + bytes(inside), data.slice(inside..)).await?;
            outside = true;
        }
    }
    if outside {
        file.sync().await?;
    }
    write_sector(file, sector).await
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).expect("an old offset, or one beside what has at most 8 KiB")
}

/// Where a name and its record go.
struct Place {
    /// Byte offset.
    name_at: u64,
    /// Byte offset.
    record_at: u64,
    /// What announces a record that lies there.
    compat: u64,
}

/// A place for `name` and a record of `record_bytes` (0: none) that leaves the present ones whole outside of the first sector.
fn place(header: &Header, name: &str, record_bytes: u64) -> Option<Place> {
    let header_bytes = header.layout.header_bytes;
    let name_bytes = bytes(name.len());
    let old_name_at = u64::from(header.sector.fields.backing_filename_offset.get());
    let old_name = match &header.backing {
        Some(old) => old_name_at..old_name_at + bytes(old.name.len()),
        None => 0..0,
    };
    let outside = |range: &Range<u64>| range.start.max(SECTOR_BYTES)..range.end;
    let present = [outside(&old_name), outside(&header.record)];
    let free = |at: u64, len: u64| {
        let new = outside(&(at..at + len));
        let beside = |old: &Range<u64>| {
            new.is_empty() || old.is_empty() || new.end <= old.start || old.end <= new.start
        };
        at + len <= header_bytes && present.iter().all(beside)
    };
    let keeps_name =
        |at: u64| at == old_name_at && header.backing.as_ref().is_some_and(|old| old.name == name);
    let starts = [HEADER_BYTES, old_name.end, header.record.end];
    let starts = || starts.into_iter().filter(|&start| start >= HEADER_BYTES);

    let near = |at: u64| Place { name_at: at + record_bytes, record_at: at, compat: COMPAT_PIN_AT_NAME };
    let far_at = header_bytes.saturating_sub(record_bytes);
    let far = |at: u64| Place { name_at: at, record_at: far_at, compat: COMPAT_PIN };
    // The header's field for it has 32 bits.
    let name_may_end = |end: u64| u32::try_from(end).is_ok();
    let near_fits = |at: u64| {
        let end = at + record_bytes + name_bytes;
        name_may_end(end) && free(at, record_bytes + name_bytes)
    };
    let far_fits = |at: u64| {
        let end = at + name_bytes;
        name_may_end(end)
            && end <= far_at
            && free(far_at, record_bytes)
            && (keeps_name(at) || free(at, name_bytes))
    };
    // In one sector it takes one write.
    if HEADER_BYTES + record_bytes + name_bytes <= SECTOR_BYTES {
        return Some(near(HEADER_BYTES));
    }
    std::iter::once(old_name_at)
        .filter(|&at| keeps_name(at))
        .chain(starts())
        .find(|&at| far_fits(at))
        .map(far)
        .or_else(|| starts().find(|&at| near_fits(at)).map(near))
}
