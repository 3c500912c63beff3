//! Holes: whether an image's tables name clusters that its file has no room for, as preallocated tables do.
//!
//! Not here: where the holes are. The file system knows.

use bytes::Bytes;
use readonce_storage::ReadAt;

use super::{
    chunks::{read_padded, words},
    header::Header,
    refcount::{TABLE_ENTRY_BYTES, TABLE_OFFSET_MASK},
    scan::refcounts,
};
use crate::FormatError;

/// Whether many more clusters are counted than `allocated_bytes` of room hold; how many more is QEMU's choice.
///
/// # Errors
/// `Io`.
pub(super) async fn names_holes(
    file: &dyn ReadAt,
    header: &Header,
    allocated_bytes: u64,
) -> Result<bool, FormatError> {
    let refcounts = refcounts(&header.layout);
    let cluster_size = refcounts.cluster_size();
    let room = allocated_bytes / cluster_size;
    let enough = (room.saturating_mul(10) / 9).max(room + 2);
    let end = file.len().div_ceil(cluster_size);
    if end < enough {
        return Ok(false);
    }
    let table_bytes = u64::from(header.fields.refcount_table_clusters) * cluster_size;
    let needed = end.div_ceil(refcounts.per_block()) * TABLE_ENTRY_BYTES;
    let table: Bytes =
        read_padded(file, header.fields.refcount_table_offset, table_bytes.min(needed)).await?;
    let mut used = 0;
    for (number, (_, entry)) in (0..).zip(words(0, &table)) {
        let block = entry & TABLE_OFFSET_MASK;
        if block == 0 {
            continue;
        }
        let first: u64 = number * refcounts.per_block();
        let block = read_padded(file, block, cluster_size).await?;
        let counted = refcounts.per_block().min(end - first);
        used += (0..counted).map(|at| u64::from(refcounts.refcount(&block, at) > 0)).sum::<u64>();
        if used >= enough {
            return Ok(true);
        }
    }
    Ok(false)
}
