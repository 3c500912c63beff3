//! Flush: the order in which links reach the file.
//!
//! One round, for all links committed before it began:
//!
//! 1. once after the mark was set, a sync; refcounts that were changed, and, where refcount blocks or a longer refcount table are new, a sync and then what shows
//!    them; sectors of new L2 tables, which nothing on disk refers to yet;
//! 2. one sync: it covers data (a data file is synced first), the marks in the header, refcounts, new tables, and what earlier
//!    rounds wrote. What those unlinked is released;
//! 3. touched sectors of L2 tables that the file refers to, and L1 sectors for new tables;
//! 4. for a durable flush, one sync. What 3 unlinked is released.
//!
//! In the file a refcount is never below what the file's tables reference: it was raised before the table could show the
//! cluster, and it is lowered only after a sync of the table that does not show it any more. So a crash at any moment leaves
//! clusters that are counted and not referenced, at most. With lazy refcounts 1 leaves out the refcounts: the dirty bit, covered by
//! 2, says that they are not to be trusted.
//!
//! - No link pending: `Linked` does nothing, `Durable` syncs once, since the guest's writes in place are not known here.
//! - Space for everything written here was allocated in `prepare`.
//!
//! Not here: data.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use readonce_storage::{Storage, sync::Mutex};

use super::{
    entry::Raw,
    l1::{L1Entry, SECTOR_ENTRIES},
    layout::SECTOR_BYTES,
    links::{Links, Released, SliceLinks},
    mark::Mark,
    space::Space,
    tables::Tables,
};
use crate::{Durability, FormatError, rounds::Rounds};

/// Pieces of refcounts that an image with lazy refcounts keeps in memory before it writes them all the same: 16 MiB.
const LAZY_PIECES_MAX: usize = 4096;

/// What a round works on.
pub(super) struct Flusher {
    pub(super) file: Arc<dyn Storage>,
    /// The file that holds the data, where that is not the image's own.
    pub(super) data: Option<Arc<dyn Storage>>,
    pub(super) tables: Arc<Tables>,
    pub(super) space: Arc<Space>,
    pub(super) mark: Arc<Mark>,
    pub(super) links: Links,
    pub(super) rounds: Rounds,
    pub(super) unlinked: Mutex<Unlinked>,
}

/// What the file does not show any more, though perhaps the disk does, until the next sync.
#[derive(Default)]
pub(super) struct Unlinked {
    released: Vec<Released>,
    /// Where refcount tables lay.
    refcount_tables: Vec<Range<u64>>,
}

/// What is being released; what is left of it when this is dropped is put back.
struct Releasing<'a> {
    flusher: &'a Flusher,
    unlinked: Unlinked,
}

impl Drop for Releasing<'_> {
    fn drop(&mut self) {
        let mut unlinked = self.flusher.unlinked.lock();
        unlinked.released.append(&mut self.unlinked.released);
        unlinked.refcount_tables.append(&mut self.unlinked.refcount_tables);
    }
}

impl Flusher {
    /// Runs a round, or shares one that begins after this call.
    pub(super) async fn flush(&self, durability: Durability) -> Result<(), FormatError> {
        self.rounds.run(durability, |durability| self.round(durability)).await
    }

    async fn round(&self, durability: Durability) -> Result<(), FormatError> {
        let mut batch = self.links.take();
        if batch.is_empty() {
            return if durability == Durability::Durable { self.sync().await } else { Ok(()) };
        }

        let layout = &self.tables.rules.layout;
        if !self.mark.is_lazy() || self.space.refs.dirty_count() > LAZY_PIECES_MAX {
            self.mark.make_durable().await?;
            self.write_refcounts().await?;
        }
        let hidden: Vec<u64> = batch
            .slices
            .keys()
            .copied()
            .filter(|&slice| {
                let table = batch.tables.get(&layout.slice_l1_index(slice));
                table.is_some_and(|table| !table.exposed)
            })
            .collect();
        for slice_index in &hidden {
            if let Some(links) = batch.slices.get(slice_index) {
                self.write_slice(links).await?;
            }
        }
        self.sync().await?;
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
                link.exposed = true;
            }
            let (at, sector) = self.links.l1_sector(&self.tables.l1, l1_index);
            self.file.write(at, sector).await?;
            batch.tables.retain(|at, _| !same_sector.contains(at));
        }
        self.unlinked.lock().released.append(&mut batch.released);
        drop(batch);
        if durability == Durability::Durable {
            self.sync().await?;
        }
        Ok(())
    }

    /// Syncs the data's file and the image's own, and releases what had been unlinked in the file before.
    async fn sync(&self) -> Result<(), FormatError> {
        let unlinked = std::mem::take(&mut *self.unlinked.lock());
        let mut releasing = Releasing { flusher: self, unlinked };
        if let Some(data) = &self.data {
            data.sync().await?;
        }
        self.mark.sync().await?;
        self.space.release(&mut releasing.unlinked.released).await?;
        while let Some(table) = releasing.unlinked.refcount_tables.pop() {
            self.space.release_table(table).await?;
        }
        Ok(())
    }

    /// Writes refcounts, and what shows new ones; not synced.
    async fn write_refcounts(&self) -> Result<(), FormatError> {
        if let Some(old_table) = self.space.refs.write(&self.tables, &self.mark).await? {
            self.unlinked.lock().refcount_tables.push(old_table);
        }
        Ok(())
    }

    /// Writes all refcounts, durable when this returns. Nothing may be in flight.
    pub(super) async fn settle_refcounts(&self) -> Result<(), FormatError> {
        self.space.lower_late().await?;
        // Releasing the old table changes refcounts again, once.
        while !self.space.refs.is_written() {
            self.write_refcounts().await?;
            self.sync().await?;
        }
        Ok(())
    }

    /// Writes the touched sectors of a slice, neighbours in one write.
    async fn write_slice(&self, links: &SliceLinks) -> Result<(), FormatError> {
        let slice = links.pin.slice();
        let layout = &self.tables.rules.layout;
        let l1_index = layout.slice_l1_index(slice.index);
        let L1Entry::Own(table) = self.tables.l1.entry(l1_index).await? else {
            return Err(FormatError::corrupt(
                format!("L1 entry {l1_index}"),
                "no table of the image's own",
                "must name the table of a linked cluster",
            ));
        };
        let at = table + layout.slice_in_table(slice.index);
        for sectors in touched(&links.stable, SECTOR_BYTES / layout.entry_bytes()) {
            let count = sectors.end - sectors.start;
            let write = self.links.l2_sectors(slice, layout.extended_l2, sectors.start, count);
            self.file.write(at + sectors.start * SECTOR_BYTES, write).await?;
        }
        Ok(())
    }
}

/// The sectors that changed entries lie in, neighbours together.
fn touched(entries: &BTreeMap<u64, Raw>, sector_entries: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for sector in entries.keys().map(|entry| entry / sector_entries) {
        match runs.last_mut() {
            Some(run) if sector <= run.end => run.end = sector + 1,
            _ => runs.push(sector..sector + 1),
        }
    }
    runs
}
