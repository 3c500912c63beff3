//! In-flight table: which fill unit is being changed, by whom, and what is known of its bytes so far.
//!
//! - A unit has at most one entry, and whoever owns the entry is the only one to change the unit's mapping.
//! - An entry is `Fetching` (bytes come from the backing), `Held` (a fetch failed and guest bytes must be kept),
//!   `Storing` (all bytes known, being put into the image) or `Writing` (a guest write of the whole unit; local I/O only).
//! - Guest bytes go over fetched bytes, never the reverse: a fetched piece fills only what is not known yet.
//! - A guest write of a whole unit takes over a fetch; the late bytes of that fetch find another owner and are dropped.
//! - A guest's write into a unit being fetched is *absorbed* and completes without the network. An entry with guest bytes
//!   holds room in the image, taken before the write completes, and ends only by being stored.
//! - Room for a unit is prepared by its owner alone: a `Writing` entry stands for it meanwhile, or the entry says so. What holds
//!   no entry is in nobody's reservation.
//! - A waiter is told in the order in which it came, at the moment its own bytes are known.
//! - Units in flight without, and units with guest bytes have a bound each ([`Budgets`], but always one unit); beyond, callers
//!   wait and are let in in the order in which they came.
//!
//! Deciding only: nothing here does I/O or knows the time. Not here: what owners do (`fill`, `write`), durability (`flush`).

mod admission;
mod entry;

use std::{collections::BTreeMap, ops::Range};

use bytes::Bytes;
use tokio::sync::oneshot;

use self::{
    admission::Gates,
    entry::{Entry, Reader, State},
};
pub use self::{
    admission::{Budget, Budgets, FETCH_BYTES_MAX, GUEST_BYTES_MAX, Leave, Queue},
    entry::GAP_MERGE_BYTES_MAX,
};
use crate::{error::LayerError, ranges::RangeSet};

/// One fetch; pieces and the end of a fetch name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchId(u64);

/// What a waiting reader is told.
#[derive(Debug)]
pub enum Delivery {
    /// The bytes that it asked for.
    Bytes(Bytes),
    /// Look again: the unit was written meanwhile.
    Retry,
    /// They cannot be had.
    Failed(LayerError),
}

/// A fetch that the caller must start.
#[derive(Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Its name.
    pub id: FetchId,
    /// Units that it serves.
    pub units: Range<u64>,
    /// Guest byte ranges to ask of the backing, in order.
    pub wanted: Vec<Range<u64>>,
}

/// A unit that the caller must put into the image, then report with [`InFlight::stored`].
#[derive(Debug)]
pub struct Store<R> {
    /// Which unit.
    pub unit: u64,
    /// All its bytes.
    pub bytes: Bytes,
    /// Room that was set aside when the first guest byte came; `None` for a plain fill.
    pub room: Option<R>,
}

/// Answer to a read.
pub enum Read {
    /// Nothing is in flight for the unit.
    Free,
    /// The bytes.
    Known(Bytes),
    /// They come; a fetch may have to be started.
    Wait(oneshot::Receiver<Delivery>, Option<Fetch>),
}

/// Answer to a write.
pub enum Write<R> {
    /// Nothing is in flight for the unit.
    Free,
    /// The bytes are in; the unit may be ready to be stored.
    Absorbed(Option<Store<R>>),
    /// The unit is being fetched and holds no room yet: prepare some, [`InFlight::attach`] it, write again.
    NeedsRoom,
    /// The fetch was taken over: the unit is `Writing` and the caller's until [`InFlight::end_write`].
    TakenOver,
    /// Another owner does local I/O, or takes room for it: wait, then look again.
    Wait(oneshot::Receiver<()>),
}

/// Answer to the wish to own units, all or none.
pub enum Own {
    /// They are `Writing` and the caller's until [`InFlight::end_write`].
    All,
    /// Another owner does local I/O in one of them: wait, then look again.
    Wait(oneshot::Receiver<()>),
    /// One of them holds guest bytes that are not stored yet.
    Guest,
}

/// What became of a store.
pub enum Stored<R> {
    /// It is in the image.
    Linked,
    /// A plain fill could not be stored; its bytes are let go.
    Dropped,
    /// Guest bytes could not be stored: they stay, with their room.
    Kept(LayerError, Option<R>),
}

/// What a flush waits for, and what it must start.
pub struct FlushWork<R> {
    /// Told when each unit with guest bytes has ended.
    pub waits: Vec<oneshot::Receiver<Result<(), LayerError>>>,
    /// Fetches to start again.
    pub fetches: Vec<Fetch>,
    /// Stores to start again.
    pub stores: Vec<Store<R>>,
}

/// The table. `R` is the room that the image sets aside for a unit.
pub struct InFlight<R> {
    unit_bytes: u64,
    entries: BTreeMap<u64, Entry<R>>,
    fetch_next: u64,
    gates: Gates,
}

impl<R> InFlight<R> {
    /// An empty table for units of `unit_bytes`.
    pub fn new(unit_bytes: u64, budgets: Budgets) -> Self {
        Self { unit_bytes, entries: BTreeMap::new(), fetch_next: 0, gates: Gates::new(unit_bytes, budgets) }
    }

    /// Whether nothing is in flight at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Units in flight.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Lets go of every fetch without guest bytes, at shutdown; its readers fail with `error`. Late bytes find nobody.
    pub fn abandon_fetches(&mut self, error: &LayerError) {
        let plain = |entry: &Entry<R>| matches!(entry.state, State::Fetching(_)) && entry.is_plain();
        let units: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| plain(entry)).map(|(&unit, _)| unit).collect();
        for unit in units {
            if let Some(entry) = self.entries.get_mut(&unit) {
                for reader in entry.readers.drain(..) {
                    let _ = reader.tell.send(Delivery::Failed(error.clone()));
                }
            }
            self.remove(unit);
        }
    }

    /// Lets go of all that is not stored, at shutdown after unsaved guest bytes were named. Late bytes find nobody. Units under
    /// local I/O stay: their owners report back.
    pub fn abandon(&mut self) {
        let lost =
            |entry: &Entry<R>| matches!(entry.state, State::Fetching(_) | State::Held) && !entry.preparing;
        let units: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| lost(entry)).map(|(&unit, _)| unit).collect();
        for unit in units {
            self.remove(unit);
        }
    }

    /// Told when some unit with local I/O under way has ended; `None` if there is none.
    pub fn wait_local(&mut self) -> Option<oneshot::Receiver<()>> {
        let entry = self
            .entries
            .values_mut()
            .find(|entry| entry.preparing || matches!(entry.state, State::Storing(_) | State::Writing))?;
        Some(entry.wait_local())
    }

    /// Whether an entry exists for `unit`.
    pub fn is_busy(&self, unit: u64) -> bool {
        self.entries.contains_key(&unit)
    }

    /// The first unit that touches the guest range and holds guest bytes that the map does not show yet.
    pub fn guest_unit_in(&self, range: Range<u64>) -> Option<Range<u64>> {
        let units = range.start / self.unit_bytes..range.end.div_ceil(self.unit_bytes);
        let (&unit, _) = self.entries.range(units).find(|(_, entry)| entry.is_guest())?;
        Some(unit * self.unit_bytes..(unit + 1) * self.unit_bytes)
    }

    /// Guest ranges that the guest wrote and the map does not show yet: what a shutdown could not save.
    pub fn guest_ranges(&self) -> Vec<Range<u64>> {
        let unit = self.unit_bytes;
        let mut set = RangeSet::default();
        for (&index, entry) in &self.entries {
            for range in entry.guest.iter() {
                set.insert(index * unit + range.start..index * unit + range.end);
            }
        }
        set.iter().collect()
    }

    /// Leave for another unit to come in flight; else the queue to wait in.
    pub fn admit(&mut self, budget: Budget) -> Result<Leave, Queue> {
        self.gates.admit(budget)
    }

    /// The first unit of `units` that is in flight.
    pub fn first_busy(&self, units: Range<u64>) -> Option<u64> {
        self.entries.range(units).next().map(|(&unit, _)| unit)
    }

    /// Bytes `range` (inside the unit) of `unit`.
    pub fn read(&mut self, unit: u64, range: Range<u64>) -> Read {
        let unit_bytes = self.unit_bytes;
        let id = FetchId(self.fetch_next);
        let Some(entry) = self.entries.get_mut(&unit) else { return Read::Free };
        if let Some(bytes) = entry.known_bytes(&range) {
            return Read::Known(bytes);
        }
        let fetch = matches!(entry.state, State::Held).then(|| entry.refetch(id, unit, unit_bytes));
        if fetch.is_some() {
            self.fetch_next += 1;
        }
        let (tell, told) = oneshot::channel();
        entry.readers.push(Reader { range, tell });
        Read::Wait(told, fetch)
    }

    /// Begins to fetch `unit`, which is not in flight. Bytes from guest offset `backing_end` on are zeros that need no
    /// fetch.
    pub fn begin_fetch(&mut self, unit: u64, leave: Leave, backing_end: u64) -> Fetch {
        let id = FetchId(self.fetch_next);
        self.fetch_next += 1;
        let entry = Entry::fetching(id, unit, self.unit_bytes, backing_end, leave);
        self.insert(unit, entry);
        let start = unit * self.unit_bytes;
        let end = (start + self.unit_bytes).min(backing_end);
        assert!(start < end, "a fetch past the backing's end");
        Fetch { id, units: unit..unit + 1, wanted: vec![start..end] }
    }

    /// Adds the next unit, which is not in flight, to a fetch that was begun under this same lock. The leave comes back where
    /// the fetch cannot take it.
    pub fn extend_fetch(&mut self, fetch: &mut Fetch, leave: Leave, backing_end: u64) -> Result<(), Leave> {
        let unit = fetch.units.end;
        let start = unit * self.unit_bytes;
        let joins = fetch.wanted.last().is_some_and(|last| last.end == start);
        if !joins || start >= backing_end {
            return Err(leave);
        }
        let entry = Entry::fetching(fetch.id, unit, self.unit_bytes, backing_end, leave);
        self.insert(unit, entry);
        fetch.units.end += 1;
        if let Some(last) = fetch.wanted.last_mut() {
            last.end = (start + self.unit_bytes).min(backing_end);
        }
        Ok(())
    }

    /// A piece of a fetch: `data` for guest offset `offset`. Returns the units that are complete now, in order.
    pub fn fetched(&mut self, id: FetchId, offset: u64, data: &[u8]) -> Vec<Store<R>> {
        let mut ready = Vec::new();
        let mut done = 0usize;
        while done < data.len() {
            let at = offset + done as u64;
            let (unit, from) = (at / self.unit_bytes, at % self.unit_bytes);
            let count = usize::try_from(self.unit_bytes - from).unwrap_or(usize::MAX).min(data.len() - done);
            let piece = &data[done..done + count];
            done += count;
            let Some(entry) = self.entries.get_mut(&unit) else { continue };
            // Another owner, or another fetch: these bytes are late.
            if !matches!(entry.state, State::Fetching(owner) if owner == id) {
                continue;
            }
            entry.fill_gaps(from, piece);
            entry.tell_readers();
            ready.extend(entry.store_if_complete(unit, self.unit_bytes));
        }
        ready
    }

    /// A fetch has ended: units that it left incomplete fail, but guest bytes are kept, and so is what room is being taken for.
    pub fn fetch_ended(&mut self, fetch: &Fetch, error: Option<LayerError>) {
        for unit in fetch.units.clone() {
            let Some(entry) = self.entries.get_mut(&unit) else { continue };
            if !matches!(entry.state, State::Fetching(owner) if owner == fetch.id) {
                continue;
            }
            if entry.preparing && entry.is_complete(self.unit_bytes) {
                entry.state = State::Held;
                continue;
            }
            let error =
                error.clone().expect("a fetch that succeeds completes each unit that is still its own");
            for reader in entry.readers.drain(..) {
                let _ = reader.tell.send(Delivery::Failed(error.clone()));
            }
            if !entry.is_plain() {
                entry.state = State::Held;
                for waiter in entry.flush_waiters.drain(..) {
                    let _ = waiter.send(Err(error.clone()));
                }
                self.gates.fail_guests(&error);
            } else {
                self.remove(unit);
            }
        }
    }

    /// Writes `data` at `from` inside `unit`.
    pub fn write(&mut self, unit: u64, from: u64, data: &[u8]) -> Write<R> {
        let unit_bytes = self.unit_bytes;
        let whole = data.len() as u64 == unit_bytes;
        let Some(entry) = self.entries.get_mut(&unit) else { return Write::Free };
        match entry.state {
            _ if entry.preparing => Write::Wait(entry.wait_local()),
            State::Storing(_) | State::Writing => Write::Wait(entry.wait_local()),
            // Without guest bytes there is nothing to lose should the write fail.
            State::Fetching(_) if whole && entry.is_plain() => {
                entry.take_over();
                Write::TakenOver
            }
            State::Fetching(_) | State::Held if entry.room.is_none() => Write::NeedsRoom,
            State::Fetching(_) | State::Held => {
                entry.overwrite(from, data);
                entry.tell_readers();
                let store = entry.store_if_complete(unit, unit_bytes);
                Write::Absorbed(store)
            }
        }
    }

    /// The caller takes room for a unit that [`Write::NeedsRoom`] was said of, and then says [`InFlight::attach`] or
    /// [`InFlight::end_prepare`]. From now on it counts as a unit with guest bytes.
    pub fn begin_prepare(&mut self, unit: u64, leave: Leave) {
        let entry = self.entries.get_mut(&unit).expect("its state was just asked");
        assert!(matches!(entry.state, State::Fetching(_) | State::Held));
        assert!(!entry.preparing && entry.room.is_none());
        entry.preparing = true;
        entry.leave = Some(leave);
    }

    /// Gives a unit its room, and the first bytes of a guest with it. Returns the store if all is known.
    pub fn attach(&mut self, unit: u64, room: R, from: u64, data: &[u8]) -> Option<Store<R>> {
        let entry = self.entries.get_mut(&unit).expect("an entry stays while room is taken for it");
        assert!(entry.preparing && entry.room.is_none());
        entry.preparing = false;
        entry.room = Some(room);
        entry.overwrite(from, data);
        entry.tell_readers();
        entry.tell_local_waiters();
        entry.store_if_complete(unit, self.unit_bytes)
    }

    /// No room could be taken. The unit may be complete by now, and is then stored as a fill.
    pub fn end_prepare(&mut self, unit: u64) -> Option<Store<R>> {
        let entry = self.entries.get_mut(&unit).expect("an entry stays while room is taken for it");
        assert!(entry.preparing && !entry.is_guest());
        entry.preparing = false;
        entry.tell_local_waiters();
        let store = entry.store_if_complete(unit, self.unit_bytes);
        if store.is_none() && matches!(entry.state, State::Held) {
            self.remove(unit);
        }
        store
    }

    /// Turns a `Writing` entry of the caller's into that of a guest's write into a part of the unit, which is absent. Returns the
    /// fetch of the other bytes, or the store where no byte of the backing is needed.
    pub fn begin_guest(
        &mut self,
        unit: u64,
        (room, leave): (R, Leave),
        from: u64,
        data: &[u8],
        backing_end: u64,
    ) -> (Option<Fetch>, Option<Store<R>>) {
        let id = FetchId(self.fetch_next);
        self.fetch_next += 1;
        let mut entry = Entry::fetching(id, unit, self.unit_bytes, backing_end, leave);
        entry.room = Some(room);
        entry.overwrite(from, data);
        let mut before = self.entries.remove(&unit).expect("an owner turns what it began");
        assert!(matches!(before.state, State::Writing), "only the writer turns its write");
        before.tell_local_waiters();
        entry.readers = before.readers;
        entry.flush_waiters = before.flush_waiters;
        entry.tell_readers();
        let store = entry.store_if_complete(unit, self.unit_bytes);
        let fetch = store.is_none().then(|| entry.refetch(id, unit, self.unit_bytes));
        self.insert(unit, entry);
        (fetch, store)
    }

    /// Makes the caller the owner of `unit`, which is not in flight, for local I/O.
    pub fn begin_write(&mut self, unit: u64) {
        self.insert(unit, Entry::new(State::Writing, Vec::new(), None));
    }

    /// Told when the first unit of `units` that is in flight may have ended.
    pub fn wait_any(&mut self, units: Range<u64>) -> Option<oneshot::Receiver<()>> {
        let (_, entry) = self.entries.range_mut(units).next()?;
        Some(entry.wait_local())
    }

    /// Makes the caller the owner of all of `units`, or of none. Plain fetches are taken over.
    pub fn own(&mut self, units: Range<u64>) -> Own {
        for entry in self.entries.range_mut(units.clone()).map(|(_, entry)| entry) {
            match entry.state {
                _ if entry.preparing => return Own::Wait(entry.wait_local()),
                State::Storing(_) | State::Writing => return Own::Wait(entry.wait_local()),
                State::Fetching(_) | State::Held if !entry.is_plain() => return Own::Guest,
                State::Fetching(_) | State::Held => {}
            }
        }
        for unit in units {
            match self.entries.get_mut(&unit) {
                Some(entry) => entry.take_over(),
                None => self.begin_write(unit),
            }
        }
        Own::All
    }

    /// Ends what `begin_write` or a take-over began.
    pub fn end_write(&mut self, unit: u64) {
        let entry = self.entries.get(&unit).expect("an owner ends what it began");
        assert!(matches!(entry.state, State::Writing), "only the writer ends its write");
        self.remove(unit);
    }

    /// A store has ended.
    pub fn stored(&mut self, unit: u64, outcome: Stored<R>) {
        let entry = self.entries.get_mut(&unit).expect("a storing unit stays until it is stored");
        let State::Storing(bytes) = &entry.state else { panic!("unit {unit} is stored once") };
        match outcome {
            Stored::Linked => self.remove(unit),
            Stored::Dropped => {
                assert!(!entry.is_guest(), "guest bytes are never dropped");
                self.remove(unit);
            }
            Stored::Kept(error, room) => {
                assert!(entry.is_guest());
                entry.bytes = bytes.to_vec();
                entry.state = State::Held;
                entry.room = room;
                for waiter in entry.flush_waiters.drain(..) {
                    let _ = waiter.send(Err(error.clone()));
                }
                entry.tell_local_waiters();
                self.gates.fail_guests(&error);
            }
        }
    }

    /// Whether a unit with guest bytes is being fetched or stored.
    pub fn is_guest_under_way(&self) -> bool {
        self.entries.values().any(|entry| entry.is_guest() && !matches!(entry.state, State::Held))
    }

    /// What a flush must wait for: every unit with guest bytes. What had failed is started again.
    pub fn begin_flush(&mut self) -> FlushWork<R> {
        let mut waits = Vec::new();
        for entry in self.entries.values_mut().filter(|entry| entry.is_guest()) {
            let (tell, told) = oneshot::channel();
            entry.flush_waiters.push(tell);
            waits.push(told);
        }
        let (fetches, stores) = self.retry_held();
        FlushWork { waits, fetches, stores }
    }

    /// What had failed, to be started again. Nobody is told when it ends.
    pub fn retry_held(&mut self) -> (Vec<Fetch>, Vec<Store<R>>) {
        let (mut fetches, mut stores) = (Vec::new(), Vec::new());
        let is_held = |entry: &Entry<R>| matches!(entry.state, State::Held) && !entry.preparing;
        let held = self.entries.iter_mut().filter(|(_, entry)| is_held(entry));
        for (&unit, entry) in held {
            if let Some(store) = entry.store_if_complete(unit, self.unit_bytes) {
                stores.push(store);
            } else {
                fetches.push(entry.refetch(FetchId(self.fetch_next), unit, self.unit_bytes));
                self.fetch_next += 1;
            }
        }
        (fetches, stores)
    }

    fn insert(&mut self, unit: u64, entry: Entry<R>) {
        let before = self.entries.insert(unit, entry);
        assert!(before.is_none(), "unit {unit} has an owner already");
    }

    fn remove(&mut self, unit: u64) {
        let Some(mut entry) = self.entries.remove(&unit) else { return };
        entry.tell_local_waiters();
        for reader in entry.readers {
            let _ = reader.tell.send(Delivery::Retry);
        }
        for waiter in entry.flush_waiters {
            let _ = waiter.send(Ok(()));
        }
    }
}

#[cfg(test)]
mod tests;
