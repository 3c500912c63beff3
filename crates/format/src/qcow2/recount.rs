//! Recount: makes the stored refcounts say what a scan counted.
//!
//! - In this order: what is too low is raised, and blocks that are missing are written behind the end of the file; sync; the
//!   refcount table names them (a table that is broken or too short is written anew, and the header switched to it); sync. The caller
//!   changes what refers to clusters. Then what is too high is lowered. So a refcount is never below the references that the
//!   file shows at that moment, once it was not.
//! - A block that is broken, or that something else uses too, is left where it is and replaced. What a block held does not
//!   matter: every refcount is known.
//! - Power loss leaves the old state, or refcounts that are too high.
//! - Memory: the counts, and one block at a time.
//!
//! Not here: the scan, and COPIED flags (`flags`).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use readonce_storage::Storage;

use super::{
    chunks::read_padded,
    counts::Counts,
    header::Header,
    layout::SECTOR_BYTES,
    refcount::{Refcounts, TABLE_ENTRY_BYTES, TABLE_OFFSET_MASK},
    scan::{Scanned, refcounts},
};
use crate::{
    FormatError,
    number::{bytes, index, round_up},
};

/// Runs of clusters whose space is given back to the file system at once.
const PUNCHES_MAX: usize = 1 << 16;

/// What the refcounts of an image are to be, and where.
pub(super) struct Recount {
    refcounts: Refcounts,
    /// The refcount of every cluster, those of the table and of the blocks included.
    pub(super) counts: Counts,
    /// Every block by its index in the table: byte offset.
    blocks: BTreeMap<u64, u64>,
    /// Of those, the ones that are written anew.
    new_blocks: BTreeSet<u64>,
    /// Byte offset of the table, its clusters, and whether it is new.
    table_offset: u64,
    table_clusters: u64,
    new_table: bool,
}

impl Recount {
    /// Plans the refcounts for what `scanned` counted; it counted neither the refcount table nor its blocks. New blocks lie
    /// behind everything.
    ///
    /// # Errors
    /// `Unsupported` where the table would be longer than a table may be.
    pub(super) fn plan(header: &Header, mut scanned: Scanned) -> Result<Self, FormatError> {
        let refcounts = refcounts(&header.layout);
        let cluster_size = refcounts.cluster_size();
        let end = scanned.end();
        let table_offset = header.fields.refcount_table_offset;
        let table_clusters = u64::from(header.fields.refcount_table_clusters);
        let table_range = table_offset / cluster_size..table_offset / cluster_size + table_clusters;
        let good_table = table_offset > 0
            && table_clusters > 0
            && table_range.end <= scanned.clusters
            && table_range.clone().all(|cluster| scanned.counts.count(cluster) == 0);
        let table_range = if good_table { table_range } else { 0..0 };

        let mut recount = Self {
            refcounts,
            counts: Counts::new(refcounts.max()),
            blocks: BTreeMap::new(),
            new_blocks: BTreeSet::new(),
            table_offset,
            table_clusters,
            new_table: !good_table,
        };
        for (number, &raw) in (0..).zip(&scanned.table) {
            let cluster = (raw & TABLE_OFFSET_MASK) / cluster_size;
            let good = raw != 0
                && raw.is_multiple_of(cluster_size)
                && cluster < scanned.clusters
                && scanned.counts.count(cluster) == 0
                && !table_range.contains(&cluster);
            if good {
                // The first entry that names it keeps it.
                scanned.counts.set(cluster, 1)?;
                recount.blocks.insert(number, raw);
            }
        }
        for cluster in table_range {
            scanned.counts.set(cluster, 1)?;
        }
        recount.counts = scanned.counts;
        recount.place(end)?;
        Ok(recount)
    }

    /// Finds the blocks that are missing, and places them and a new table, where one is needed, from cluster `end` on.
    fn place(&mut self, end: u64) -> Result<(), FormatError> {
        let per_block = self.refcounts.per_block();
        let mut missing = BTreeSet::new();
        let mut from = 0;
        while let Some(cluster) = self.counts.next_used(from, u64::MAX) {
            let number = self.refcounts.table_index(cluster);
            if !self.blocks.contains_key(&number) {
                missing.insert(number);
            }
            from = (number + 1) * per_block;
        }
        let mut table_clusters = if self.new_table { self.table_clusters.max(1) } else { 0 };
        let placed = loop {
            let placed: Range<u64> = end..end + bytes(missing.len()) + table_clusters;
            let before = (missing.len(), table_clusters);
            if !placed.is_empty() {
                let numbers =
                    self.refcounts.table_index(placed.start)..=self.refcounts.table_index(placed.end - 1);
                missing.extend(numbers.filter(|number| !self.blocks.contains_key(number)));
            }
            let last = missing.last().max(self.blocks.keys().last());
            let needed = last.map_or(1, |last| (last + 1).div_ceil(self.refcounts.per_table_cluster()));
            if needed > self.refcounts.table_clusters_max() {
                return Err(FormatError::Unsupported(format!(
                    "a refcount table of {needed} clusters would be needed, at most {} are possible",
                    self.refcounts.table_clusters_max()
                )));
            }
            if !self.new_table && needed > self.table_clusters {
                // The old table is given up.
                let old = self.table_offset / self.refcounts.cluster_size();
                for cluster in old..old + self.table_clusters {
                    self.counts.set(cluster, 0)?;
                }
                self.new_table = true;
            }
            if self.new_table {
                table_clusters = needed.max(table_clusters.min(self.refcounts.table_clusters_max()));
            }
            // Both only grow, and the table's longest length bounds them.
            if before == (missing.len(), table_clusters) {
                break placed;
            }
        };
        for cluster in placed.clone() {
            self.counts.set(cluster, 1)?;
        }
        let mut free = placed;
        for number in missing {
            let cluster = free.next().expect("as many as are missing");
            self.blocks.insert(number, cluster * self.refcounts.cluster_size());
            self.new_blocks.insert(number);
        }
        if self.new_table {
            self.table_offset = free.start * self.refcounts.cluster_size();
            self.table_clusters = table_clusters;
        }
        Ok(())
    }

    /// Raises what is too low, and shows the blocks that are new. Ends synced. `header` names the table afterwards.
    pub(super) async fn raise(
        &self,
        file: &Arc<dyn Storage>,
        header: &mut Header,
    ) -> Result<(), FormatError> {
        for (&number, &offset) in &self.blocks {
            if self.new_blocks.contains(&number) {
                file.write(offset, self.block(number).into()).await?;
            } else {
                self.update(file, number, offset, |_, stored, counted| stored.max(counted)).await?;
            }
        }
        let table_bytes = self.table_clusters * self.refcounts.cluster_size();
        let mut table = vec![0; index(table_bytes)];
        for (&number, offset) in &self.blocks {
            let at = index(number * TABLE_ENTRY_BYTES);
            let entry = table.get_mut(at..at + 8).expect("the table is long enough for its blocks");
            entry.copy_from_slice(&offset.to_be_bytes());
        }
        if self.new_table {
            file.write(self.table_offset, table.into()).await?;
            file.sync().await?;
            let clusters = u32::try_from(self.table_clusters).expect("at most 2^14");
            let switch = header.change_fields(|fields| {
                fields.refcount_table_offset = self.table_offset;
                fields.refcount_table_clusters = clusters;
            });
            file.write(switch.at, switch.data).await?;
        } else {
            file.sync().await?;
            let old = read_padded(file.as_ref(), self.table_offset, table_bytes).await?;
            write_changes(file, self.table_offset, &old, &table).await?;
        }
        file.sync().await?;
        Ok(())
    }

    /// Lowers what is too high, and gives the space of what is free now back to the file system. Ends synced.
    pub(super) async fn lower(&self, file: &Arc<dyn Storage>) -> Result<(), FormatError> {
        let mut freed = Vec::new();
        for (&number, &offset) in &self.blocks {
            let choose = |cluster, stored, counted| {
                if stored > 0 && counted == 0 {
                    note_freed(&mut freed, cluster);
                }
                counted
            };
            self.update(file, number, offset, choose).await?;
        }
        file.sync().await?;
        self.punch(file, &freed).await
    }

    /// Lowers what is too high, and raises nothing; the clusters whose refcount is too low have a count in what it returns. Ends
    /// synced.
    pub(super) async fn lower_only(&self, file: &Arc<dyn Storage>) -> Result<Counts, FormatError> {
        let mut too_low = Counts::new(1);
        let mut freed = Vec::new();
        for (&number, &offset) in &self.blocks {
            let choose = |cluster, stored: u64, counted: u64| {
                if stored < counted {
                    too_low
                        .set(cluster, 1)
                        .expect("it has a page among the counts, which have as many as can be");
                }
                if stored > 0 && counted == 0 {
                    note_freed(&mut freed, cluster);
                }
                stored.min(counted)
            };
            self.update(file, number, offset, choose).await?;
        }
        file.sync().await?;
        self.punch(file, &freed).await?;
        Ok(too_low)
    }

    /// Gives space back to the file system. After a sync of the refcounts that say it is free.
    async fn punch(&self, file: &Arc<dyn Storage>, freed: &[Range<u64>]) -> Result<(), FormatError> {
        let cluster_size = self.refcounts.cluster_size();
        for run in freed {
            // A block may count clusters that no file can have.
            let start = run.start.saturating_mul(cluster_size);
            let end = run.end.saturating_mul(cluster_size).min(file.len());
            if let Some(len) = end.checked_sub(start) {
                file.punch_hole(start, len).await?;
            }
        }
        Ok(())
    }

    /// Whether blocks and table can stay where they are, as `table` names them.
    pub(super) fn is_as_stored(&self, table: &[u64]) -> bool {
        let stored = (0..).zip(table.iter().copied()).filter(|&(_, raw)| raw != 0);
        !self.new_table && self.blocks.iter().map(|(&number, &offset)| (number, offset)).eq(stored)
    }

    /// The block as it is to be.
    fn block(&self, number: u64) -> Vec<u8> {
        let mut block = vec![0; index(self.refcounts.cluster_size())];
        self.fill(number, &mut block, |_, _, counted| counted);
        block
    }

    /// Sets every refcount of a block to what `choose` makes of the cluster, the one that is stored and the one that was counted.
    fn fill(&self, number: u64, block: &mut [u8], mut choose: impl FnMut(u64, u64, u64) -> u64) {
        let per_block = self.refcounts.per_block();
        let first = number.saturating_mul(per_block);
        for (at, counted) in (0..per_block).zip(self.counts.from(first)) {
            let stored = self.refcounts.refcount(block, at);
            let chosen = choose(first.saturating_add(at), stored, counted);
            if chosen != stored {
                self.refcounts.set_refcount(block, at, chosen);
            }
        }
    }

    async fn update(
        &self,
        file: &Arc<dyn Storage>,
        number: u64,
        offset: u64,
        choose: impl FnMut(u64, u64, u64) -> u64,
    ) -> Result<(), FormatError> {
        let old = read_padded(file.as_ref(), offset, self.refcounts.cluster_size()).await?;
        let mut new = old.to_vec();
        self.fill(number, &mut new, choose);
        write_changes(file, offset, &old, &new).await
    }
}

/// Adds a cluster to the runs whose space is given back; one that does not continue the last run only while there are few.
fn note_freed(freed: &mut Vec<Range<u64>>, cluster: u64) {
    if let Some(run) = freed.last_mut().filter(|run| run.end == cluster) {
        run.end += 1;
    } else if freed.len() < PUNCHES_MAX {
        freed.push(cluster..cluster + 1);
    }
}

/// Writes the sectors that differ, neighbours together. Both have the same length, and begin at `offset`, a multiple of a
/// sector.
pub(super) async fn write_changes(
    file: &Arc<dyn Storage>,
    offset: u64,
    old: &[u8],
    new: &[u8],
) -> Result<(), FormatError> {
    let sector = index(SECTOR_BYTES);
    let differs: Vec<bool> =
        old.chunks(sector).zip(new.chunks(sector)).map(|(old, new)| old != new).collect();
    let mut at = 0;
    for run in differs.chunk_by(|one, next| one == next) {
        let len = run.len() * sector;
        if run.first() == Some(&true) {
            let piece = new.get(at..new.len().min(at + len)).unwrap_or_default();
            file.write(offset + bytes(at), Bytes::copy_from_slice(piece)).await?;
        }
        at += len;
    }
    Ok(())
}

/// The first cluster behind the file's end.
pub(super) fn end_of_file(file: &Arc<dyn Storage>, cluster_size: u64) -> u64 {
    round_up(file.len(), cluster_size).unwrap_or(u64::MAX)
}
