//! Flush: the order in which links reach the file, and rounds that many callers share.
//!
//! One round, for all links committed before it began:
//!
//! 1. sectors of new L2 tables, which nothing on disk refers to yet;
//! 2. one sync: it covers data, the dirty mark, new tables, and what earlier rounds wrote;
//! 3. touched sectors of L2 tables that the file refers to, and L1 sectors for new tables;
//! 4. for a durable flush, one sync.
//!
//! A crash before 2 ends leaves the old links; after it each sector has its old links or its new ones, and both point to
//! bytes that are there. A flush that arrives while a round runs waits for the next round, with all others that do.
//!
//! - No link pending: `Linked` does nothing, `Durable` syncs once, since the guest's writes in place are not known here.
//! - Space for everything written here was allocated in `prepare`.
//!
//! Not here: data.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use readonce_storage::Storage;

use super::{
    layout::{SECTOR_BYTES, SLICE_BYTES, SLICE_ENTRIES},
    links::{Links, SECTOR_ENTRIES, SliceLinks, TableLink},
    tables::Tables,
};
use crate::{Durability, FormatError, rounds::Rounds};

/// What a round works on.
pub(super) struct Flusher {
    pub(super) file: Arc<dyn Storage>,
    pub(super) tables: Arc<Tables>,
    pub(super) links: Links,
    pub(super) rounds: Rounds,
}

impl Flusher {
    /// Runs a round, or shares one that begins after this call.
    pub(super) async fn flush(&self, durability: Durability) -> Result<(), FormatError> {
        self.rounds.run(durability, |durability| self.round(durability)).await
    }

    async fn round(&self, durability: Durability) -> Result<(), FormatError> {
        let mut batch = self.links.take();
        if batch.is_empty() {
            if durability == Durability::Durable {
                self.file.sync().await?;
            }
            return Ok(());
        }

        let layout = &self.tables.layout;
        let hidden: Vec<u64> = batch
            .slices
            .keys()
            .copied()
            .filter(|&slice| batch.tables.get(&layout.slice_l1_index(slice)) == Some(&TableLink::Hidden))
            .collect();
        for slice_index in &hidden {
            if let Some(links) = batch.slices.get(slice_index) {
                self.write_slice(links).await?;
            }
        }
        self.file.sync().await?;
        // Only now: had the sync failed, what the file has would not be known.
        for slice_index in &hidden {
            batch.slices.remove(slice_index);
        }

        while let Some(links) = batch.slices.first_entry() {
            self.write_slice(links.get()).await?;
            links.remove();
        }
        while let Some((&l1_index, _)) = batch.tables.first_key_value() {
            let first = l1_index - l1_index % SECTOR_ENTRIES;
            let same_sector = first..first + SECTOR_ENTRIES;
            for (_, link) in batch.tables.range_mut(same_sector.clone()) {
                *link = TableLink::Exposed;
            }
            self.write_l1_sector(l1_index).await?;
            batch.tables.retain(|at, _| !same_sector.contains(at));
        }
        if durability == Durability::Durable {
            self.file.sync().await?;
        }
        Ok(())
    }

    /// Writes the touched sectors of a slice, neighbours in one write.
    async fn write_slice(&self, links: &SliceLinks) -> Result<(), FormatError> {
        let slice = links.pin.slice();
        let layout = &self.tables.layout;
        let Some(table) = self.tables.table(layout.slice_l1_index(slice.index)).await? else {
            return Err(FormatError::corrupt("L1 entry", 0, "must name the table of a linked cluster"));
        };
        let at = table + layout.slice_in_table(slice.index);
        for sectors in touched(&links.stable) {
            let write_at = at + sectors.start * SECTOR_BYTES;
            let write = self.links.l2_sectors(slice, sectors.start, sectors.end - sectors.start);
            self.file.write(write_at, write).await?;
        }
        Ok(())
    }

    async fn write_l1_sector(&self, l1_index: u64) -> Result<(), FormatError> {
        let slice = self.tables.l1_slice(l1_index).await?;
        let sector = l1_index % SLICE_ENTRIES / SECTOR_ENTRIES;
        let at = self.tables.layout.l1_offset + slice.index * SLICE_BYTES + sector * SECTOR_BYTES;
        Ok(self.file.write(at, self.links.l1_sector(slice, sector)).await?)
    }
}

/// The sectors that changed entries lie in, neighbours together.
fn touched(entries: &BTreeMap<u64, u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for sector in entries.keys().map(|entry| entry / SECTOR_ENTRIES) {
        match runs.last_mut() {
            Some(run) if sector <= run.end => run.end = sector + 1,
            _ => runs.push(sector..sector + 1),
        }
    }
    runs
}
