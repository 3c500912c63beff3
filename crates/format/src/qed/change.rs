//! Changes of the header, on an image that nobody has open for writing.
//!
//! - What a header points to is durable before the header that points to it: name outside the first sector and record are
//!   written and synced, then the first sector, which a disk writes whole or not at all. A short name lies in that
//!   sector itself.
//! - A crash in between leaves the old header. If the record already carries the new name's hash, the image then has no pin;
//!   it never has a wrong one.
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
        AUTOCLEAR_ONLY_READONCE, COMPAT_COPY_ON_READ, COMPAT_PIN, FEATURE_BACKING_FILE,
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
    let autoclear = sector.fields.autoclear_features.get() & AUTOCLEAR_ONLY_READONCE;
    sector.fields.autoclear_features = autoclear.into();
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
    let mut compat = fields.compat_features.get() & !COMPAT_PIN;
    let Some(backing) = backing else {
        if pin.is_some() {
            return Err(FormatError::Invalid("a version can be pinned only with a backing file".into()));
        }
        // Without a backing there is nothing to copy.
        compat &= !COMPAT_COPY_ON_READ;
        fields.features = features.into();
        fields.compat_features = compat.into();
        fields.autoclear_features = 0.into();
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
    let name_at = place_name(&header, &backing.name, bytes(record.len()));

    features |= FEATURE_BACKING_FILE;
    if backing.format.as_deref() == Some("raw") {
        features |= FEATURE_BACKING_NO_PROBE;
    }
    let mut autoclear = 0;
    if pin.is_some() {
        compat |= COMPAT_PIN;
        autoclear |= AUTOCLEAR_ONLY_READONCE;
    }
    fields.features = features.into();
    fields.compat_features = compat.into();
    fields.autoclear_features = autoclear.into();
    fields.backing_filename_offset = u32::try_from(name_at).expect("an old offset, or below 8 KiB").into();
    fields.backing_filename_size = u32::try_from(name.len()).expect("at most 4095").into();

    let mut outside = false;
    if name_at + bytes(name.len()) <= SECTOR_BYTES {
        let start = index(name_at - HEADER_BYTES);
        if let Some(place) = sector.rest.get_mut(start..start + name.len()) {
            place.copy_from_slice(&name);
        }
    } else {
        file.write(name_at, name).await?;
        outside = true;
    }
    if !record.is_empty() {
        file.write(header.layout.header_bytes - bytes(record.len()), record).await?;
        outside = true;
    }
    if outside {
        file.sync().await?;
    }
    if (HEADER_BYTES..SECTOR_BYTES).contains(&name_at) && name_at + bytes(backing.name.len()) > SECTOR_BYTES {
        // The name's beginning was written into the first sector: it is to stay there.
        let beginning = file.read(HEADER_BYTES, sector.rest.len()).await?;
        sector.rest.copy_from_slice(&beginning);
    }
    write_sector(file, sector).await
}

/// Where a name goes, beside a record of `record_bytes`. In the first sector where it fits; where it lies already, if it is the same;
/// else where it leaves the old name whole until the header points to the new one. Where there is no such place, behind
/// the fields, and a crash may tear it.
fn place_name(header: &Header, name: &str, record_bytes: u64) -> u64 {
    let len = bytes(name.len());
    if HEADER_BYTES + len <= SECTOR_BYTES {
        return HEADER_BYTES;
    }
    let end_max = header.layout.header_bytes - record_bytes;
    let old_start = u64::from(header.sector.fields.backing_filename_offset.get());
    let old = match &header.backing {
        Some(old) if old.name == name && old_start + len <= end_max => return old_start,
        Some(old) => old_start..old_start + bytes(old.name.len()),
        None => 0..0,
    };
    let free = |at: u64| {
        let new: Range<u64> = at..at + len;
        new.end <= end_max && (new.end <= old.start || old.end <= new.start)
    };
    [SECTOR_BYTES, old.end.max(SECTOR_BYTES)].into_iter().find(|&at| free(at)).unwrap_or(HEADER_BYTES)
}
