//! Header extensions: what lies between the header's fields and the backing name.
//!
//! - They are kept in the order of the file with all their bytes, known or not, so that a rewrite loses nothing. Padding is not
//!   kept: it means nothing.
//! - A chain ends with an empty extension of type 0, or where the backing name or the first cluster does.
//!
//! Not here: what our own extension holds (`record`).

use bytes::{BufMut, Bytes, BytesMut};

use super::layout::BITMAPS_MAX;
use crate::{
    FormatError,
    number::{bytes, index, round_up},
};

/// The end of the chain.
const KIND_END: u32 = 0;
/// The backing's format, a string.
pub(super) const KIND_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub(super) const KIND_FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the directory of persistent bitmaps lies.
pub(super) const KIND_BITMAPS: u32 = 0x2385_2875;
/// The name of the file that holds the data, a string.
pub(super) const KIND_DATA_FILE: u32 = 0x4441_5441;
/// Ours: "ro" and "1C".
pub(super) const KIND_RECORD: u32 = 0x726f_3143;

/// Bytes before an extension's data: type and length.
pub(super) const PREFIX_BYTES: u64 = 8;
/// Extensions are padded to multiples of this.
pub(super) const ALIGN: u64 = 8;
/// Bytes of an entry of the feature name table: kind, bit, name.
pub(super) const FEATURE_NAME_BYTES: usize = 48;

/// One extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extension {
    /// Type; not 0.
    pub(super) kind: u32,
    /// Without padding.
    pub(super) data: Bytes,
    /// Byte offset of the data in the file it was read from.
    pub(super) at: u64,
}

/// The bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bitmaps {
    /// At least 1, at most 65535.
    pub(super) count: u32,
    /// Bytes of the directory.
    pub(super) directory_bytes: u64,
    /// Byte offset of the directory; a multiple of the cluster size.
    pub(super) directory_offset: u64,
}

/// What a walk of the chain found.
pub(super) enum Chain {
    /// Every extension, and where the chain ends: the offset behind its last byte.
    Whole(Vec<Extension>, u64),
    /// The chain goes on past the bytes given.
    Cut,
}

/// Walks the chain that begins at `start` and must end by `end_max`, in `head`, the first bytes of a file; bytes that are
/// past the end of a `complete` head are zeros.
///
/// # Errors
/// `Corrupt` where an extension is longer than the room it lies in, or one that may be there once is there twice.
pub(super) fn walk(head: &[u8], start: u64, end_max: u64, complete: bool) -> Result<Chain, FormatError> {
    let mut found: Vec<Extension> = Vec::new();
    let mut at = start;
    loop {
        let data_at = match at.checked_add(PREFIX_BYTES) {
            Some(data_at) if data_at <= end_max => data_at,
            _ => return Ok(Chain::Whole(found, at.min(end_max))),
        };
        let Some(prefix) = head.get(index(at)..index(data_at)) else {
            return Ok(if complete { Chain::Whole(found, at) } else { Chain::Cut });
        };
        let (kind, len) = prefix.split_at(4);
        let (kind, len) = (be_u32(kind), u64::from(be_u32(len)));
        let end = data_at + len;
        if end > end_max {
            return Err(FormatError::corrupt(
                format!("length of the header extension {kind:#010x} at {at}"),
                len,
                format!("must be at most {}", end_max - data_at),
            ));
        }
        // Its length means nothing, but QEMU opens no image where it is too long for an extension.
        if kind == KIND_END {
            return Ok(Chain::Whole(found, data_at));
        }
        let Some(data) = head.get(index(data_at)..index(end)) else {
            if complete {
                return Err(FormatError::corrupt(
                    format!("length of the header extension {kind:#010x} at {at}"),
                    len,
                    format!("must end inside the file, {} bytes", head.len()),
                ));
            }
            return Ok(Chain::Cut);
        };
        let once = [KIND_BACKING_FORMAT, KIND_BITMAPS, KIND_DATA_FILE, KIND_RECORD];
        if once.contains(&kind) && found.iter().any(|other| other.kind == kind) {
            return Err(FormatError::corrupt(
                format!("header extension {kind:#010x} at {at}"),
                "there a second time",
                "must be there at most once",
            ));
        }
        found.push(Extension { kind, data: Bytes::copy_from_slice(data), at: data_at });
        at = round_up(end, ALIGN).expect("the end of the first cluster, or before");
    }
}

/// The extension of that type.
pub(super) fn find(extensions: &[Extension], kind: u32) -> Option<&Extension> {
    extensions.iter().find(|extension| extension.kind == kind)
}

/// A string extension. Zero bytes at its end, which some programs count in, are no part of it.
///
/// # Errors
/// `Corrupt` where it is no UTF-8 without zero bytes.
pub(super) fn string(extensions: &[Extension], kind: u32, name: &str) -> Result<Option<String>, FormatError> {
    let trimmed = |data: &[u8]| data.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    find(extensions, kind)
        .map(|extension| text(extension.data.get(..trimmed(&extension.data)).unwrap_or_default(), name))
        .transpose()
}

/// Bytes as a string.
pub(super) fn text(bytes: &[u8], name: &str) -> Result<String, FormatError> {
    std::str::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
        .map(str::to_owned)
        .ok_or_else(|| FormatError::corrupt(name, bytes.escape_ascii(), "must be UTF-8 without zero bytes"))
}

/// The bitmaps extension, checked.
///
/// # Errors
/// `Corrupt` names the field.
pub(super) fn bitmaps(extensions: &[Extension], cluster_size: u64) -> Result<Option<Bitmaps>, FormatError> {
    let Some(extension) = find(extensions, KIND_BITMAPS) else { return Ok(None) };
    let Some((count, rest)) = extension.data.split_at_checked(4).filter(|_| extension.data.len() == 24)
    else {
        return Err(FormatError::corrupt(
            "length of the bitmaps extension",
            extension.data.len(),
            "must be 24 bytes",
        ));
    };
    let (_, rest) = rest.split_at(4);
    let (directory_bytes, directory_offset) = rest.split_at(8);
    let found = Bitmaps {
        count: be_u32(count),
        directory_bytes: be_u64(directory_bytes),
        directory_offset: be_u64(directory_offset),
    };
    if !(1..=BITMAPS_MAX).contains(&found.count) {
        return Err(FormatError::corrupt(
            "nb_bitmaps",
            found.count,
            format!("must be within [1, {BITMAPS_MAX}]"),
        ));
    }
    // An entry of the directory has a fixed part of 24 bytes, a name of at most 1023 and extra data of which there is none today.
    let directory_bytes_max = u64::from(BITMAPS_MAX) * 1048;
    if found.directory_bytes > directory_bytes_max {
        return Err(FormatError::corrupt(
            "bitmap_directory_size",
            found.directory_bytes,
            format!("must be at most {directory_bytes_max}"),
        ));
    }
    if !found.directory_offset.is_multiple_of(cluster_size)
        || found.directory_offset.checked_add(found.directory_bytes).is_none()
    {
        return Err(FormatError::corrupt(
            "bitmap_directory_offset",
            found.directory_offset,
            format!("must be a multiple of {cluster_size}"),
        ));
    }
    Ok(Some(found))
}

/// What the feature name table calls the bits of `mask` of the incompatible features, and which bits it does not know.
pub(super) fn incompatible_names(extensions: &[Extension], mask: u64) -> (Vec<String>, u64) {
    let mut names = Vec::new();
    let mut rest = mask;
    let table = find(extensions, KIND_FEATURE_NAMES).map(|table| table.data.as_ref()).unwrap_or_default();
    for entry in table.chunks_exact(FEATURE_NAME_BYTES) {
        let [0, bit, name @ ..] = entry else { continue };
        let bit = 1u64.checked_shl(u32::from(*bit)).unwrap_or(0);
        if rest & bit != 0 {
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            names.push(name.escape_ascii().to_string());
            rest &= !bit;
        }
    }
    (names, rest)
}

/// The feature name table that a new image gets.
pub(super) fn feature_names(names: &[(u8, u8, &str)]) -> Bytes {
    let mut table = BytesMut::with_capacity(names.len() * FEATURE_NAME_BYTES);
    for &(kind, bit, name) in names {
        let end = table.len() + FEATURE_NAME_BYTES;
        table.put_u8(kind);
        table.put_u8(bit);
        table.put_slice(name.as_bytes());
        assert!(table.len() <= end, "a feature's name has at most 46 bytes");
        table.resize(end, 0);
    }
    table.freeze()
}

/// Appends an extension, padded.
pub(super) fn put(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("an extension fits into a cluster");
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
    let padded = round_up(bytes(out.len()), ALIGN).expect("a header fits into a cluster");
    out.resize(index(padded), 0);
}

/// Appends the end of the chain.
pub(super) fn put_end(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0; 8]);
}

/// The big-endian number that 4 bytes are.
pub(super) fn be_u32(four: &[u8]) -> u32 {
    four.iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// The big-endian number that 8 bytes are.
pub(super) fn be_u64(eight: &[u8]) -> u64 {
    eight.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
