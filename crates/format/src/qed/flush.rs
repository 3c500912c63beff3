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

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

use parking_lot::Mutex;
use readonce_storage::Storage;

use super::{
    layout::{SECTOR_BYTES, SLICE_BYTES, SLICE_ENTRIES},
    links::{Links, SECTOR_ENTRIES, SliceLinks, TableLink},
    tables::Tables,
};
use crate::{Durability, FormatError};

/// Results of rounds that are kept for callers that have not looked yet.
const RESULTS_MAX: usize = 64;

/// The rounds of one image.
#[derive(Default)]
pub(super) struct Rounds {
    state: Mutex<State>,
    /// Held by the round that runs.
    run: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Rounds begun.
    begun: u64,
    /// The last round that somebody wants durable.
    durable: u64,
    /// Rounds done, and how they ended.
    results: BTreeMap<u64, Option<FormatError>>,
}

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
        let wanted = {
            let mut state = self.rounds.state.lock();
            let wanted = state.begun + 1;
            if durability == Durability::Durable {
                state.durable = wanted;
            }
            wanted
        };
        let _run = self.rounds.run.lock().await;
        let (round, durability) = {
            let mut state = self.rounds.state.lock();
            if let Some(result) = state.results.get(&wanted) {
                return result.as_ref().map_or(Ok(()), |error| Err(copy(error)));
            }
            state.begun += 1;
            // A round whose future was cancelled left no result; this one does its work.
            let durable = state.durable >= wanted;
            (state.begun, if durable { Durability::Durable } else { Durability::Linked })
        };
        let result = self.round(durability).await;
        let mut state = self.rounds.state.lock();
        for done in wanted..=round {
            state.results.insert(done, result.as_ref().err().map(copy));
        }
        while state.results.len() > RESULTS_MAX {
            state.results.pop_first();
        }
        result
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

/// The same error for another caller of the round.
fn copy(error: &FormatError) -> FormatError {
    let again = |error: &io::Error| io::Error::new(error.kind(), error.to_string());
    match error {
        FormatError::NoSpace(error) => FormatError::NoSpace(again(error)),
        FormatError::Io(error) => FormatError::Io(again(error)),
        FormatError::Corrupt { field, value, limit } => FormatError::corrupt(field, value, limit),
        FormatError::Unsupported(message) => FormatError::Unsupported(message.clone()),
        FormatError::Invalid(message) => FormatError::Invalid(message.clone()),
    }
}
