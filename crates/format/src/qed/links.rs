//! Links that are visible in memory and not yet in the file.
//!
//! - For every changed entry the value that the file has is remembered. A sector that is written for one entry's sake carries
//!   the file's value for entries that were linked after the round began: their data is not synced.
//! - Entries change under one short lock, so that a sector is put together from one moment's state.
//! - A batch that was taken and not finished is put back when it is dropped, also where its future is cancelled.
//!
//! Not here: I/O and its order (`flush`).

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use readonce_storage::sync::Mutex;

use super::{
    layout::{ENTRY_BYTES, SECTOR_BYTES, SLICE_ENTRIES},
    slice::{Entry, Slice},
    tables::Pin,
};
use crate::{CommitMode, number::index};

/// Entries of a sector.
pub(super) const SECTOR_ENTRIES: u64 = SECTOR_BYTES / ENTRY_BYTES;

#[derive(Default)]
pub(super) struct Links {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By slice.
    slices: BTreeMap<u64, SliceLinks>,
    /// New L2 tables, by L1 index.
    tables: BTreeMap<u64, TableLink>,
    /// Bytes of data that the links above and those of the batch under way show.
    data_bytes: u64,
    /// Of these, those of the batch under way.
    batch_bytes: u64,
}

/// The links of one slice.
pub(super) struct SliceLinks {
    pub(super) pin: Pin,
    /// What the file has, for every changed entry.
    pub(super) stable: BTreeMap<u64, u64>,
}

/// A new L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TableLink {
    /// The file does not refer to it.
    Hidden,
    /// Its L1 entry was written, or may have been: its sectors may be written only after their data is synced.
    Exposed,
}

/// What one round links.
pub(super) struct Batch<'a> {
    links: &'a Links,
    pub(super) slices: BTreeMap<u64, SliceLinks>,
    pub(super) tables: BTreeMap<u64, TableLink>,
}

impl Links {
    /// Links the entries from `first` on, one for each of `values`; says which were changed.
    ///
    /// # Panics
    /// Where [`CommitMode::Overwrite`] meets data: two owners of a cluster would lose one's bytes.
    pub(super) fn commit(
        &self,
        pin: &Pin,
        first: u64,
        values: impl Iterator<Item = Entry>,
        mode: CommitMode,
        cluster_size: u64,
    ) -> Vec<bool> {
        let slice = pin.slice();
        let mut state = self.state.lock();
        let mut linked = Vec::new();
        for (at, value) in (first..SLICE_ENTRIES).zip(values) {
            let old = slice.entry(at);
            let free = match (mode, old) {
                (_, Entry::Absent) | (CommitMode::Overwrite, Entry::Zero) => true,
                (CommitMode::IfAbsent, _) => false,
                (CommitMode::Overwrite, Entry::At(_) | Entry::Bad) => {
                    panic!("a write links over data: data is written in place")
                }
            };
            linked.push(free);
            if free && old != value {
                let links = state
                    .slices
                    .entry(slice.index)
                    .or_insert_with(|| SliceLinks { pin: pin.clone(), stable: BTreeMap::new() });
                links.stable.entry(at).or_insert(slice.raw(at));
                slice.set(at, value);
                if matches!(value, Entry::At(_)) {
                    state.data_bytes += cluster_size;
                }
            }
        }
        linked
    }

    /// Shows a new L2 table in `l1_slice`.
    pub(super) fn link_table(&self, l1_slice: &Slice, l1_index: u64, table: u64) {
        let mut state = self.state.lock();
        state.tables.insert(l1_index, TableLink::Hidden);
        l1_slice.set(l1_index % SLICE_ENTRIES, Entry::At(table));
    }

    /// Bytes of data whose links are not in the file.
    pub(super) fn data_bytes(&self) -> u64 {
        self.state.lock().data_bytes
    }

    /// Whether every link is in the file.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.slices.is_empty() && state.tables.is_empty()
    }

    /// Takes all links so far. One batch at a time.
    pub(super) fn take(&self) -> Batch<'_> {
        let mut state = self.state.lock();
        state.batch_bytes = state.data_bytes;
        let slices = std::mem::take(&mut state.slices);
        let tables = std::mem::take(&mut state.tables);
        Batch { links: self, slices, tables }
    }

    /// What the file is to hold for `sectors` sectors of an L2 slice from sector `first` on: entries linked after the batch
    /// was taken stay as they are in the file.
    pub(super) fn l2_sectors(&self, slice: &Slice, first: u64, sectors: u64) -> Bytes {
        let state = self.state.lock();
        let later = state.slices.get(&slice.index);
        compose(slice, first, sectors, |at| later.and_then(|later| later.stable.get(&at).copied()))
    }

    /// The same for an L1 slice.
    pub(super) fn l1_sector(&self, l1_slice: &Slice, sector: u64) -> Bytes {
        let state = self.state.lock();
        let base = l1_slice.index * SLICE_ENTRIES;
        compose(l1_slice, sector, 1, |at| state.tables.contains_key(&(base + at)).then_some(0))
    }
}

fn compose(slice: &Slice, first: u64, sectors: u64, later: impl Fn(u64) -> Option<u64>) -> Bytes {
    let mut out = BytesMut::with_capacity(index(sectors * SECTOR_BYTES));
    for at in first * SECTOR_ENTRIES..(first + sectors) * SECTOR_ENTRIES {
        out.put_u64_le(later(at).unwrap_or_else(|| slice.raw(at)));
    }
    out.freeze()
}

impl Batch<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.slices.is_empty() && self.tables.is_empty()
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let mut state = self.links.state.lock();
        if self.is_empty() {
            state.data_bytes -= state.batch_bytes;
        }
        state.batch_bytes = 0;
        for (slice_index, links) in std::mem::take(&mut self.slices) {
            match state.slices.entry(slice_index) {
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(links);
                }
                // The value from before the batch is the one that the file has for certain.
                std::collections::btree_map::Entry::Occupied(mut later) => {
                    later.get_mut().stable.extend(links.stable);
                }
            }
        }
        state.tables.append(&mut self.tables);
    }
}
