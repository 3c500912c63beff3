//! Persistent bitmaps: which clusters their directory, their tables and their bits take.
//!
//! Not here: what the bits say, which nobody here reads.

use readonce_storage::ReadAt;

use super::{
    chunks::{Chunks, read_padded, words},
    entry::OFFSET_MASK,
    header::{AUTOCLEAR_BITMAPS, Header},
    layout::L1_ENTRY_BYTES,
    scan::{Observer, Scanned},
};
use crate::{
    Finding, FormatError,
    number::{bytes, index, round_up},
};

/// Bytes of a bitmap's entry in the directory before its name.
const BITMAP_ENTRY_BYTES: usize = 24;
/// Bytes of the longest table of a bitmap: what QEMU opens.
const BITMAP_TABLE_BYTES_MAX: u64 = 0x800_0000 * 8;

/// Counts the persistent bitmaps, where they are not stale.
pub(super) async fn count_bitmaps(
    file: &dyn ReadAt,
    header: &Header,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    let Some(found) = header.bitmaps.filter(|_| header.fields.autoclear_features & AUTOCLEAR_BITMAPS != 0)
    else {
        return Ok(());
    };
    scanned.walk(found.directory_bytes)?;
    if !scanned.refer(found.directory_offset, found.directory_bytes, 1, observer)? {
        scanned.bad_bitmaps = true;
        return Ok(());
    }
    scanned.note_table(found.directory_offset, found.directory_bytes);
    let directory = read_padded(file, found.directory_offset, found.directory_bytes).await?;
    let mut rest = directory.as_ref();
    for number in 0..u64::from(found.count) {
        let Some((table, entry_bytes)) = bitmap_entry(rest, header.layout.cluster_size()) else {
            observer.found(Finding::BitmapDirectory(number));
            scanned.wrong(1);
            scanned.bad_bitmaps = true;
            return Ok(());
        };
        rest = rest.get(entry_bytes..).unwrap_or_default();
        bitmap_table(file, table, header.layout.cluster_size(), scanned, observer).await?;
    }
    if !rest.is_empty() {
        observer.found(Finding::BitmapDirectory(found.count.into()));
        scanned.wrong(1);
        scanned.bad_bitmaps = true;
    }
    Ok(())
}

/// The first bitmap of a directory: its table's offset and entries, and the bytes of its entry in the directory. `None`: it is
/// broken.
fn bitmap_entry(directory: &[u8], cluster_size: u64) -> Option<((u64, u64), usize)> {
    let (fixed, _) = directory.split_at_checked(BITMAP_ENTRY_BYTES)?;
    let field = |at: usize, len: usize| {
        fixed.get(at..at + len).map(|field| field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    let (offset, entries, flags) = (field(0, 8)?, field(8, 4)?, field(12, 4)?);
    let (kind, granularity, name, extra) = (field(16, 1)?, field(17, 1)?, field(18, 2)?, field(20, 4)?);
    let good = offset != 0
        && offset.is_multiple_of(cluster_size)
        && entries * L1_ENTRY_BYTES <= BITMAP_TABLE_BYTES_MAX
        && flags & !0x3 == 0
        && kind == 1
        && (9..=31).contains(&granularity)
        && (1..=1023).contains(&name)
        && extra == 0;
    let len = index(round_up(bytes(BITMAP_ENTRY_BYTES) + name, 8)?);
    (good && len <= directory.len()).then_some(((offset, entries), len))
}

async fn bitmap_table(
    file: &dyn ReadAt,
    (offset, entries): (u64, u64),
    cluster_size: u64,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    let len = entries * L1_ENTRY_BYTES;
    scanned.walk(len)?;
    if !scanned.refer(offset, len, 1, observer)? {
        scanned.bad_bitmaps = true;
        return Ok(());
    }
    scanned.note_table(offset, len);
    let mut chunks = Chunks::new(file, offset, len);
    while let Some((at, chunk)) = chunks.next().await {
        for (_, raw) in words(at, &chunk?).filter(|&(_, raw)| raw != 0) {
            let offset = raw & OFFSET_MASK;
            // Bit 0 says "all ones", where there is no offset.
            let reserved = raw & !OFFSET_MASK & !u64::from(offset == 0);
            if reserved != 0 || !offset.is_multiple_of(cluster_size) {
                observer.found(Finding::BitmapEntry(raw));
                scanned.wrong(1);
                scanned.bad_bitmaps = true;
            } else if offset != 0 && !scanned.refer(offset, cluster_size, 1, observer)? {
                scanned.bad_bitmaps = true;
            }
        }
    }
    Ok(())
}
