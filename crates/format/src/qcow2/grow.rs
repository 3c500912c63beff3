//! Growth of the guest's size, offline.
//!
//! - Where the L1 table is too short, a longer one is made behind the end of the file, with refcount blocks and a refcount
//!   table where those there do not reach that far.
//! - Order: (1) the new tables and blocks, and the refcounts of all of them; sync; (2) entries of the old refcount table that show
//!   new blocks; sync; (3) the header's first sector, which shows the size and the new tables at once; sync; (4) the
//!   refcounts of the old tables go down; sync. A crash leaves leaks at most.
//! - L1 entries between the old end of the disk and the new one named machine state of a snapshot; the guest shall not see it.
//!   They are cleared, and what they named leaks, for `check` to free.
//!
//! Not here: an image that is open.

use std::sync::Arc;

use bytes::Bytes;
use readonce_storage::Storage;

use super::{
    change::write_sector,
    header::Header,
    layout::{HOST_OFFSET_END, L1_ENTRY_BYTES, REFCOUNT_TABLE_BYTES_MAX, SECTOR_BYTES},
    refcount::{Refcounts, TABLE_OFFSET_MASK},
};
use crate::{
    FormatError,
    number::{bytes, index, round_down, round_up},
};

/// Rounds of looking for room for refcounts of refcounts; each covers what the one before it needed.
const ROUNDS_MAX: u32 = 64;

/// Refcount blocks that count only clusters behind the end of the file and are still looked through.
const BLOCKS_BEHIND_MAX: u32 = 1024;

/// Sets the guest's size, in bytes; not smaller than it is, a multiple of 512 and within the format's limit. Durable when this
/// returns. Other fields that the caller changed are written with it.
///
/// # Errors
/// `Unsupported` where refcounts must be repaired first; `Corrupt`; `NoSpace`; `Io`.
pub(super) async fn grow(file: &Arc<dyn Storage>, header: &mut Header, size: u64) -> Result<(), FormatError> {
    let layout = header.layout;
    let (old_used, new_used) = (layout.l1_entries_used(), layout.l1_entries_for(size));
    let stored = u64::from(header.fields.l1_size);
    if new_used > old_used {
        let old_l1 = file.read(header.fields.l1_table_offset, index(stored * L1_ENTRY_BYTES)).await?;
        let between = index(old_used * L1_ENTRY_BYTES)..index(new_used.min(stored) * L1_ENTRY_BYTES);
        let hidden = old_l1.get(between.clone()).unwrap_or_default().iter().any(|&byte| byte != 0);
        if new_used > stored || hidden {
            let mut new_l1 = old_l1.to_vec();
            new_l1.resize(index(new_used.max(stored) * L1_ENTRY_BYTES), 0);
            new_l1.get_mut(between).unwrap_or_default().fill(0);
            return move_l1(file, header, size, new_l1).await;
        }
    }
    let sector = header.change_fields(|fields| fields.size = size);
    write_sector(file, sector).await
}

/// The refcount structures of a file, as far as they are needed.
struct Space<'a> {
    file: &'a Arc<dyn Storage>,
    refcounts: Refcounts,
    cluster_size: u64,
    /// Offset of the table, and its entries: offsets of blocks, or 0.
    table_at: u64,
    table: Vec<u64>,
}

impl<'a> Space<'a> {
    async fn read(file: &'a Arc<dyn Storage>, header: &Header) -> Result<Self, FormatError> {
        let cluster_size = header.layout.cluster_size();
        let fields = &header.fields;
        let table_bytes = u64::from(fields.refcount_table_clusters) * cluster_size;
        let end = fields.refcount_table_offset.checked_add(table_bytes);
        if table_bytes == 0 || fields.refcount_table_offset == 0 || end.is_none_or(|end| end > file.len()) {
            return Err(broken("refcount_table_offset", fields.refcount_table_offset));
        }
        let raw = file.read(fields.refcount_table_offset, index(table_bytes)).await?;
        let table = raw.chunks_exact(8).map(super::extensions::be_u64).collect();
        Ok(Self {
            file,
            refcounts: Refcounts::new(header.layout.cluster_bits, header.layout.refcount_order),
            cluster_size,
            table_at: fields.refcount_table_offset,
            table,
        })
    }

    /// The offset of the block that a table's entry names; `None` where there is none yet.
    fn block(&self, table_index: u64) -> Result<Option<u64>, FormatError> {
        let entry = self.table.get(index(table_index)).copied().unwrap_or(0);
        if entry == 0 {
            return Ok(None);
        }
        let inside = entry.checked_add(self.cluster_size).is_some_and(|end| end <= self.file.len());
        if entry & !TABLE_OFFSET_MASK != 0 || !entry.is_multiple_of(self.cluster_size) || !inside {
            return Err(broken(&format!("refcount table entry {table_index}"), entry));
        }
        Ok(Some(entry))
    }

    async fn read_block(&self, at: u64) -> Result<Vec<u8>, FormatError> {
        Ok(self.file.read(at, index(self.cluster_size)).await?.to_vec())
    }

    /// The first cluster at or after `start` from which on every refcount is 0.
    async fn free_from(&self, start: u64) -> Result<u64, FormatError> {
        let per_block = self.refcounts.per_block();
        let last = self.table.iter().rposition(|&entry| entry != 0).map_or(0, bytes);
        let mut blocks_read = 0;
        for table_index in (self.refcounts.table_index(start)..=last).rev() {
            let Some(at) = self.block(table_index)? else { continue };
            blocks_read += 1;
            if blocks_read > BLOCKS_BEHIND_MAX {
                return Err(broken("refcount_table_offset", self.table_at));
            }
            let block = self.read_block(at).await?;
            let used = (0..per_block).rev().find(|&at| self.refcounts.refcount(&block, at) != 0);
            if let Some(used) = used {
                return Ok(start.max(table_index * per_block + used + 1));
            }
        }
        Ok(start)
    }

    /// Adds to or takes from the refcounts of `count` clusters from `first`, whose blocks are there.
    async fn change(&self, first: u64, count: u64, more: bool) -> Result<(), FormatError> {
        let end = first + count;
        let mut cluster = first;
        while cluster < end {
            let table_index = self.refcounts.table_index(cluster);
            let block_end = ((table_index + 1) * self.refcounts.per_block()).min(end);
            if let Some(at) = self.block(table_index)? {
                let mut block = self.read_block(at).await?;
                for cluster in cluster..block_end {
                    let place = self.refcounts.block_index(cluster);
                    let now = self.refcounts.refcount(&block, place);
                    let then = if more { now.saturating_add(1) } else { now.saturating_sub(1) };
                    self.refcounts.set_refcount(&mut block, place, then);
                }
                // Whole sectors from the first refcount to the last.
                let byte = |cluster| self.refcounts.byte_in_block(self.refcounts.block_index(cluster));
                let from = round_down(byte(cluster), SECTOR_BYTES);
                let to = round_down(byte(block_end - 1), SECTOR_BYTES) + SECTOR_BYTES;
                let data = block.get(index(from)..index(to)).unwrap_or_default();
                self.file.write(at + from, Bytes::copy_from_slice(data)).await?;
            }
            cluster = block_end;
        }
        Ok(())
    }
}

fn broken(field: &str, value: u64) -> FormatError {
    FormatError::corrupt(
        field,
        format!("{value:#x}"),
        "must be the offset of clusters inside the file; check the image with repair first",
    )
}

/// Where everything new goes. Cluster numbers.
struct Plan {
    first: u64,
    end: u64,
    /// Entries of the refcount table, with the new blocks.
    table: Vec<u64>,
    /// Indexes in the table of the new blocks, which follow the L1 table in this order.
    new_blocks: Vec<u64>,
    /// The cluster of the new refcount table, behind the blocks; `None`: the old one is long enough.
    table_at: Option<u64>,
}

/// Room for `l1_clusters` from `first`, and for the refcounts of that room.
fn plan(space: &Space<'_>, first: u64, l1_clusters: u64) -> Result<Plan, FormatError> {
    let (mut new_blocks, mut table_clusters) = (Vec::new(), 0);
    for _ in 0..ROUNDS_MAX {
        let end = first + l1_clusters + bytes(new_blocks.len()) + table_clusters;
        let (from, to) = (space.refcounts.table_index(first), space.refcounts.table_index(end - 1));
        let mut missing = Vec::new();
        for table_index in from..=to {
            if space.block(table_index)?.is_none() {
                missing.push(table_index);
            }
        }
        let entries = bytes(space.table.len());
        let per_cluster = space.refcounts.per_table_cluster();
        let clusters = if to < entries { 0 } else { (to + 1 + per_cluster).div_ceil(per_cluster) };
        if clusters * space.cluster_size > REFCOUNT_TABLE_BYTES_MAX
            || end > HOST_OFFSET_END / space.cluster_size
        {
            return Err(super::create::too_large());
        }
        if missing.len() == new_blocks.len() && clusters == table_clusters {
            let blocks_at = first + l1_clusters;
            let mut table = space.table.clone();
            table.resize(index(entries.max(clusters * per_cluster)), 0);
            for (number, &table_index) in (0..).zip(&missing) {
                let entry = table.get_mut(index(table_index)).expect("the table is long enough");
                *entry = (blocks_at + number) * space.cluster_size;
            }
            let table_at = (clusters > 0).then(|| blocks_at + bytes(missing.len()));
            return Ok(Plan { first, end, table, new_blocks: missing, table_at });
        }
        (new_blocks, table_clusters) = (missing, clusters);
    }
    Err(super::create::too_large())
}

async fn move_l1(
    file: &Arc<dyn Storage>,
    header: &mut Header,
    size: u64,
    l1: Vec<u8>,
) -> Result<(), FormatError> {
    if header.dirty() {
        return Err(FormatError::Unsupported(
            "the image is marked dirty and its refcounts may be wrong: check it with repair first".into(),
        ));
    }
    let cluster_size = header.layout.cluster_size();
    let mut space = Space::read(file, header).await?;
    let l1_entries = bytes(l1.len()) / L1_ENTRY_BYTES;
    let l1_clusters = bytes(l1.len()).div_ceil(cluster_size);
    let first = space.free_from(file.len().div_ceil(cluster_size)).await?;
    let plan = plan(&space, first, l1_clusters)?;

    let (old_first, old_count) = (
        header.fields.l1_table_offset / cluster_size,
        (u64::from(header.fields.l1_size) * L1_ENTRY_BYTES).div_ceil(cluster_size),
    );
    let (old_table_first, old_table_count) =
        (space.table_at / cluster_size, u64::from(header.fields.refcount_table_clusters));

    file.set_len(plan.end * cluster_size).await?;
    file.write(plan.first * cluster_size, Bytes::from(l1)).await?;
    let old_table = std::mem::replace(&mut space.table, plan.table.clone());
    // New blocks are zeros where the file grew.
    space.change(plan.first, plan.end - plan.first, true).await?;
    if let Some(table_at) = plan.table_at {
        let raw: Vec<u8> = plan.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write(table_at * cluster_size, Bytes::from(raw)).await?;
    }
    file.sync().await?;
    if plan.table_at.is_none() && !plan.new_blocks.is_empty() {
        show_blocks(file, &space, &old_table).await?;
        file.sync().await?;
    }

    let sector = header.change_fields(|fields| {
        fields.size = size;
        fields.l1_table_offset = plan.first * cluster_size;
        fields.l1_size = u32::try_from(l1_entries).expect("within the limit of L1 tables");
        if let Some(table_at) = plan.table_at {
            fields.refcount_table_offset = table_at * cluster_size;
            let clusters = bytes(plan.table.len()) / space.refcounts.per_table_cluster();
            fields.refcount_table_clusters = u32::try_from(clusters).expect("within the limit of the table");
        }
    });
    write_sector(file, sector).await?;

    if old_count > 0 {
        space.change(old_first, old_count, false).await?;
    }
    if plan.table_at.is_some() {
        space.change(old_table_first, old_table_count, false).await?;
    }
    Ok(file.sync().await?)
}

/// Writes the sectors of the refcount table that changed.
async fn show_blocks(file: &Arc<dyn Storage>, space: &Space<'_>, old: &[u64]) -> Result<(), FormatError> {
    let per_sector = index(SECTOR_BYTES / L1_ENTRY_BYTES);
    let mut at = space.table_at;
    for (old, new) in old.chunks(per_sector).zip(space.table.chunks(per_sector)) {
        if old != new {
            let raw: Vec<u8> = new.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            file.write(at, Bytes::from(raw)).await?;
        }
        at = round_up(at + 1, SECTOR_BYTES).expect("inside of the file");
    }
    Ok(())
}
