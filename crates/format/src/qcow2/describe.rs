//! Describe: what an image says of itself, in qemu-img's names and order.
//!
//! Not here: how it is printed.

use readonce_storage::ReadAt;

use super::{
    extensions::{be_u32, be_u64},
    header::{AUTOCLEAR_BITMAPS, Header},
    snapshots::Table,
};
use crate::{
    FormatError,
    codec::Codec,
    driver::{Description, Detail},
    number::{index, round_up},
};

/// Bytes of an entry of the bitmap directory before its extra data.
const BITMAP_FIXED_BYTES: usize = 24;
const BITMAP_IN_USE: u32 = 0x01;
const BITMAP_AUTO: u32 = 0x02;
/// Granularities are 2^0 to 2^31 bytes.
const GRANULARITY_BITS_MAX: u8 = 31;

/// Reads all that `info` shows.
///
/// # Errors
/// `Corrupt` names the field of the header, of the snapshot table or of the bitmap directory; `Unsupported`; `Io`.
pub(super) async fn describe(file: &dyn ReadAt) -> Result<Description, FormatError> {
    let header = Header::read(file).await?;
    let (size, fields) = (header.layout.image_size, &header.fields);
    let snapshots = Table::read(file, fields.snapshots_offset, fields.nb_snapshots).await?.snapshots(size);
    let details = details(file, &header).await?;
    Ok(Description {
        format: "qcow2",
        virtual_size: size,
        cluster_size: Some(header.layout.cluster_size()),
        copy_on_read: header.record.copy_on_read,
        pin: header.record.pin.clone(),
        only_readonce_wrote: header.only_readonce_wrote(),
        dirty: header.dirty(),
        in_use: header.record.in_use,
        header_bytes_max: header.bytes_free(),
        backing: header.backing,
        data_file: header.data_file,
        details,
        snapshots,
    })
}

async fn details(file: &dyn ReadAt, header: &Header) -> Result<Vec<(&'static str, Detail)>, FormatError> {
    let compression = match header.codec() {
        Codec::Deflate => "zlib",
        Codec::Zstd => "zstd",
    };
    let compression = ("compression-type", Detail::Text(compression.into()));
    let refcount_bits = ("refcount-bits", Detail::Number(header.layout.refcount_bits()));
    if header.layout.version == 2 {
        return Ok(vec![("compat", Detail::Text("0.10".into())), compression, refcount_bits]);
    }
    let mut details = vec![
        ("compat", Detail::Text("1.1".into())),
        compression,
        ("lazy-refcounts", Detail::Flag(header.lazy_refcounts())),
    ];
    let bitmaps = bitmaps(file, header).await?;
    if !bitmaps.is_empty() {
        details.push(("bitmaps", Detail::List(bitmaps)));
    }
    details.push(refcount_bits);
    if let Some(data_file) = &header.data_file {
        details.push(("data-file", Detail::Text(data_file.name.clone())));
        details.push(("data-file-raw", Detail::Flag(data_file.raw)));
    }
    details.push(("corrupt", Detail::Flag(header.corrupt())));
    details.push(("extended-l2", Detail::Flag(header.layout.extended_l2)));
    Ok(details)
}

/// The persistent bitmaps; none where another program's writes made them stale.
async fn bitmaps(file: &dyn ReadAt, header: &Header) -> Result<Vec<Detail>, FormatError> {
    let Some(found) = header.bitmaps else { return Ok(Vec::new()) };
    if header.fields.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
        return Ok(Vec::new());
    }
    let inside =
        found.directory_offset.checked_add(found.directory_bytes).is_some_and(|end| end <= file.len());
    if !inside {
        return Err(FormatError::corrupt(
            "bitmap_directory_offset",
            found.directory_offset,
            format!("must leave room for {} bytes in the file, {} bytes", found.directory_bytes, file.len()),
        ));
    }
    let directory = file.read(found.directory_offset, index(found.directory_bytes)).await?;
    let mut rest = directory.as_ref();
    let mut bitmaps = Vec::new();
    for number in 0..found.count {
        let (bitmap, after) = bitmap(rest).ok_or_else(|| {
            FormatError::corrupt(
                format!("bitmap {number}"),
                "broken",
                "must have a granularity of at most 2^31 bytes, a name in UTF-8, and end inside the directory",
            )
        })?;
        bitmaps.push(bitmap);
        rest = after;
    }
    Ok(bitmaps)
}

/// The first bitmap of a directory, and what follows it.
fn bitmap(directory: &[u8]) -> Option<(Detail, &[u8])> {
    let (fixed, _) = directory.split_at_checked(BITMAP_FIXED_BYTES)?;
    // Table offset and entries (12 bytes), flags, type, granularity, length of the name, length of the extra data.
    let flags = be_u32(fixed.get(12..16)?);
    let granularity_bits = *fixed.get(17)?;
    let name_bytes = usize::try_from(be_u64(fixed.get(18..20)?)).ok()?;
    let extra_bytes = usize::try_from(be_u32(fixed.get(20..24)?)).ok()?;
    let name_at = BITMAP_FIXED_BYTES.checked_add(extra_bytes)?;
    let name_end = name_at.checked_add(name_bytes)?;
    let name = std::str::from_utf8(directory.get(name_at..name_end)?).ok()?;
    if granularity_bits > GRANULARITY_BITS_MAX {
        return None;
    }
    let named = [(BITMAP_IN_USE, "in-use"), (BITMAP_AUTO, "auto")];
    let flags = named.iter().filter(|(bit, _)| flags & bit != 0);
    let bitmap = Detail::Group(vec![
        ("flags", Detail::List(flags.map(|&(_, name)| Detail::Text(name.into())).collect())),
        ("name", Detail::Text(name.to_owned())),
        ("granularity", Detail::Number(1 << granularity_bits)),
    ]);
    // The last entry may lack its padding.
    let end = index(round_up(u64::try_from(name_end).ok()?, 8)?).min(directory.len());
    Some((bitmap, directory.get(end..)?))
}
