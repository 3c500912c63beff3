//! Links that are visible in memory and not yet in the file, and rooms that reservations share.
//!
//! - For every changed entry the value that the file has is remembered. A sector that is written for one entry's sake carries
//!   the file's value for entries that were linked after the round began: their data is not synced.
//! - Entries change under one short lock, so that a sector is put together from one moment's state.
//! - A batch that was taken and not finished is put back when it is dropped, also where its future is cancelled.
//! - What an entry names no more is handed on with its batch; it is in use until the batch is on the disk for certain.
//! - A *room* is a cluster of which reservations hold units, by its guest cluster: one that no entry names yet, or one that
//!   an entry names whose other units are held. It stays where it is until the last of them is gone, also where the entry lets go of
//!   it meanwhile.
//!
//! Not here: I/O and its order (`flush`).

use std::collections::{BTreeMap, btree_map::Entry as MapEntry};

use bytes::{BufMut, Bytes, BytesMut};
use readonce_storage::sync::Mutex;

use super::{
    commit::{Kind, Wish},
    entry::{Place, Raw, Rules, Units, clusters_of},
    l1::{L1, L1Entry},
    layout::SECTOR_BYTES,
    slice::Slice,
    space::Taken,
    tables::Pin,
};
use crate::{CommitMode, FormatError, number::index};

/// Clusters of the file of which one user less is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Released {
    /// Data, at this offset.
    Data(u64),
    /// An L2 table, at this offset.
    Table(u64),
    /// Compressed bytes: where, and how many. One user of each cluster that they touch.
    Compressed(u64, u64),
}

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
    /// What the links above unlink.
    released: Vec<Released>,
    /// By guest cluster.
    rooms: BTreeMap<u64, Room>,
    /// Bytes of data that the links above and those of the batch under way show.
    data_bytes: u64,
    /// Of these, those of the batch under way.
    batch_bytes: u64,
}

/// The links of one slice.
pub(super) struct SliceLinks {
    pub(super) pin: Pin,
    /// What the file has, for every changed entry.
    pub(super) stable: BTreeMap<u64, Raw>,
}

/// A new L2 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct TableLink {
    /// The L1 entry that the file has.
    stable: L1Entry,
    /// Whether the new one was written, or may have been: then the table's sectors may be written only after their data is
    /// synced.
    pub(super) exposed: bool,
}

struct Room {
    at: u64,
    holders: u64,
    /// Until an entry names it.
    taken: Option<Taken>,
    /// The entry named it, and does not any more.
    released: Option<Released>,
}

/// Where a reservation for units of one cluster may go.
pub(super) enum Joined {
    /// The cluster at this offset is theirs too.
    Room(u64),
    /// None is there: a cluster is to be offered.
    NeedsCluster,
    /// Some of the units hold data, or the cluster is not the image's own.
    Unfit,
}

/// What one reservation covers, within one slice.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// Guest cluster that the first entry maps.
    pub(super) cluster: u64,
    /// Index in the slice of the first entry.
    pub(super) first: u64,
    /// Entries.
    pub(super) count: u64,
    /// Units of the first cluster, and of the last; the same where there is one.
    pub(super) head: Units,
    pub(super) tail: Units,
    /// Whether these are all that the guest has of the clusters.
    pub(super) whole: bool,
}

impl Span {
    /// The units of the cluster that is `number` clusters after the first.
    pub(super) fn units(&self, number: u64) -> Units {
        match number {
            0 => self.head,
            last if last + 1 == self.count => self.tail,
            _ => super::entry::ALL,
        }
    }
}

/// What one round links.
pub(super) struct Batch<'a> {
    links: &'a Links,
    pub(super) slices: BTreeMap<u64, SliceLinks>,
    pub(super) tables: BTreeMap<u64, TableLink>,
    pub(super) released: Vec<Released>,
}

impl Links {
    /// Links the entries of `span`, each as `kind` says of its number. Returns, for each, whether it names the reserved cluster
    /// now, and the count of units that are as wished.
    pub(super) fn commit(
        &self,
        pin: &Pin,
        rules: &Rules,
        span: &Span,
        kind: impl Fn(u64) -> Kind,
        mode: CommitMode,
        unlinks: impl Fn(Released),
    ) -> (Vec<bool>, u64) {
        let slice = pin.slice();
        let layout = &rules.layout;
        let unit_bytes = layout.cluster_size() / u64::from(Units::BITS);
        let mut state = self.state.lock();
        let mut used = Vec::new();
        let mut linked = 0;
        for number in 0..span.count {
            let at = span.first + number;
            let old = slice.entry(at, rules).expect("bad entries are not reserved, and none becomes bad");
            let wish = Wish {
                kind: kind(number),
                units: span.units(number),
                whole: span.whole,
                mode,
                zero_marks: layout.version >= 3,
            };
            let change = wish.apply(old);
            linked += u64::from(change.linked.count_ones());
            used.push(change.used);
            if change.entry != old {
                let links = state
                    .slices
                    .entry(slice.index)
                    .or_insert_with(|| SliceLinks { pin: pin.clone(), stable: BTreeMap::new() });
                links.stable.entry(at).or_insert_with(|| slice.raw(at, layout.extended_l2));
                slice.set(at, change.entry, rules);
                state.data_bytes += u64::from(change.data.count_ones()) * unit_bytes;
            }
            let room = state.rooms.get_mut(&(span.cluster + number));
            if let Some(unlinked) = change.unlinked.and_then(|place| released(place, rules)) {
                // Before a round can take it.
                unlinks(unlinked);
                match room {
                    Some(room) if unlinked == Released::Data(room.at) => room.released = Some(unlinked),
                    _ => state.released.push(unlinked),
                }
            } else if let (Kind::Room(at), true, Some(room)) = (wish.kind, change.used, room)
                && room.at == at
            {
                room.released = None;
                if let Some(taken) = room.taken.take() {
                    taken.keep();
                }
            }
        }
        (used, linked)
    }

    /// Joins the holders of the room of units of one cluster: the one that is there, the cluster that the entry names, or
    /// `offer`. The span is one cluster.
    ///
    /// # Errors
    /// `Corrupt` where the entry holds what may not be there.
    pub(super) fn join(
        &self,
        slice: &Slice,
        rules: &Rules,
        span: &Span,
        offer: Option<Taken>,
    ) -> Result<Joined, FormatError> {
        let (cluster, units) = (span.cluster, span.head);
        let mut state = self.state.lock();
        let entry = slice.entry(span.first, rules)?;
        let at = match entry.place {
            Place::Own(at) if entry.data & units == 0 => Some(at),
            Place::None => None,
            _ => return Ok(Joined::Unfit),
        };
        Ok(match (state.rooms.entry(cluster), at) {
            (MapEntry::Occupied(mut room), at) => {
                let room = room.get_mut();
                if at.is_some_and(|at| at != room.at) {
                    return Ok(Joined::Unfit);
                }
                room.holders += 1;
                Joined::Room(room.at)
            }
            (MapEntry::Vacant(place), Some(at)) => {
                place.insert(Room { at, holders: 1, taken: None, released: None });
                Joined::Room(at)
            }
            (MapEntry::Vacant(place), None) => match offer {
                Some(taken) => {
                    let at = taken.at();
                    place.insert(Room { at, holders: 1, taken: Some(taken), released: None });
                    Joined::Room(at)
                }
                None => Joined::NeedsCluster,
            },
        })
    }

    /// Whether reservations hold units of a cluster.
    pub(super) fn has_room(&self, cluster: u64) -> bool {
        self.state.lock().rooms.contains_key(&cluster)
    }

    /// A reservation lets go of its room.
    pub(super) fn leave(&self, cluster: u64) {
        let mut state = self.state.lock();
        let MapEntry::Occupied(mut place) = state.rooms.entry(cluster) else { return };
        place.get_mut().holders -= 1;
        if place.get().holders > 0 {
            return;
        }
        let room = place.remove();
        state.released.extend(room.released);
        drop(state);
        // Gives back what no entry names.
        drop(room.taken);
    }

    /// Shows a new L2 table; what the L1 entry named before is `old`.
    pub(super) fn link_table(&self, l1: &L1, l1_index: u64, table: u64, old: L1Entry) {
        let mut state = self.state.lock();
        state.tables.insert(l1_index, TableLink { stable: old, exposed: false });
        if let L1Entry::Shared(old) | L1Entry::Own(old) = old {
            state.released.push(Released::Table(old));
        }
        l1.set(l1_index, L1Entry::Own(table));
    }

    /// Bytes of data whose links are not in the file.
    pub(super) fn data_bytes(&self) -> u64 {
        self.state.lock().data_bytes
    }

    /// Whether every link is in the file, and what they unlinked was handed on.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.slices.is_empty() && state.tables.is_empty() && state.released.is_empty()
    }

    /// Takes all links so far. One batch at a time.
    pub(super) fn take(&self) -> Batch<'_> {
        let mut state = self.state.lock();
        state.batch_bytes = state.data_bytes;
        let slices = std::mem::take(&mut state.slices);
        let tables = std::mem::take(&mut state.tables);
        let released = std::mem::take(&mut state.released);
        Batch { links: self, slices, tables, released }
    }

    /// What the file is to hold for `sectors` sectors of an L2 slice from sector `first` on: entries linked after the batch
    /// was taken stay as they are in the file.
    pub(super) fn l2_sectors(&self, slice: &Slice, extended: bool, first: u64, sectors: u64) -> Bytes {
        let state = self.state.lock();
        let later = state.slices.get(&slice.index);
        let sector_entries = SECTOR_BYTES / if extended { 16 } else { 8 };
        let mut out = BytesMut::with_capacity(index(sectors * SECTOR_BYTES));
        for at in first * sector_entries..(first + sectors) * sector_entries {
            let stable = later.and_then(|later| later.stable.get(&at).copied());
            let raw = stable.unwrap_or_else(|| slice.raw(at, extended));
            out.put_u64(raw.word);
            if extended {
                out.put_u64(raw.bitmap);
            }
        }
        out.freeze()
    }

    /// The same for the L1 sector that holds an entry: where it lies, and what it is to hold.
    pub(super) fn l1_sector(&self, l1: &L1, l1_index: u64) -> (u64, Bytes) {
        let state = self.state.lock();
        l1.sector(l1_index, |at| state.tables.get(&at).map(|link| link.stable.word()))
    }
}

/// What a place is when its entry lets go of it. A data file's clusters are counted by nobody.
fn released(place: Place, rules: &Rules) -> Option<Released> {
    match place {
        _ if rules.layout.external_data => None,
        Place::None => None,
        Place::Own(at) | Place::Shared(at) => Some(Released::Data(at)),
        Place::Compressed(word) => {
            let (at, len) = rules.compressed(word);
            Some(Released::Compressed(at, len))
        }
    }
}

impl Released {
    /// The clusters that it names: their offsets.
    pub(super) fn clusters(self, cluster_size: u64) -> impl Iterator<Item = u64> {
        let (at, len) = match self {
            Self::Data(at) | Self::Table(at) => (at, cluster_size),
            Self::Compressed(at, len) => (at, len),
        };
        clusters_of(at, len, cluster_size)
    }
}

impl Batch<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.slices.is_empty() && self.tables.is_empty() && self.released.is_empty()
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let mut state = self.links.state.lock();
        if self.slices.is_empty() && self.tables.is_empty() {
            state.data_bytes -= state.batch_bytes;
        }
        state.batch_bytes = 0;
        for (slice_index, links) in std::mem::take(&mut self.slices) {
            match state.slices.entry(slice_index) {
                MapEntry::Vacant(place) => {
                    place.insert(links);
                }
                // The value from before the batch is the one that the file has for certain.
                MapEntry::Occupied(mut later) => later.get_mut().stable.extend(links.stable),
            }
        }
        state.tables.append(&mut self.tables);
        state.released.append(&mut self.released);
    }
}
