//! One unit in flight: its state, what is known of its bytes, and who waits.
//!
//! Not here: which states follow each other (`inflight`).

use std::ops::Range;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Delivery, Fetch, FetchId, Leave, Store};
use crate::{error::LayerError, ranges::RangeSet};

/// A known stretch inside a unit up to this long is fetched again rather than cut a request in two: a request costs a
/// round trip's share, 64 KiB cost 5 ms at 100 Mbit/s.
pub const GAP_MERGE_BYTES_MAX: u64 = 64 << 10;

/// What is known of a unit in flight, and who waits for it.
pub(super) struct Entry<R> {
    pub(super) state: State,
    /// The unit's bytes; meaningful where `known` says so. Empty while `Storing` or `Writing`.
    pub(super) bytes: Vec<u8>,
    /// Offsets inside the unit.
    pub(super) known: RangeSet,
    /// Offsets inside the unit that are a guest's: with any, the entry must not end without being stored.
    pub(super) guest: RangeSet,
    /// Against which bound the unit's bytes count; a unit that is written whole holds none.
    pub(super) leave: Option<Leave>,
    pub(super) room: Option<R>,
    /// The owner of a guest's write is taking room for it.
    pub(super) preparing: bool,
    pub(super) readers: Vec<Reader>,
    pub(super) local_waiters: Vec<oneshot::Sender<()>>,
    pub(super) flush_waiters: Vec<oneshot::Sender<Result<(), LayerError>>>,
}

/// Who owns the unit.
pub(super) enum State {
    Fetching(FetchId),
    Held,
    Storing(Bytes),
    Writing,
}

/// A read that waits for its bytes.
pub(super) struct Reader {
    /// Offsets inside the unit.
    pub(super) range: Range<u64>,
    pub(super) tell: oneshot::Sender<Delivery>,
}

impl<R> Entry<R> {
    pub(super) fn new(state: State, bytes: Vec<u8>, leave: Option<Leave>) -> Self {
        Self {
            state,
            bytes,
            known: RangeSet::default(),
            guest: RangeSet::default(),
            leave,
            room: None,
            preparing: false,
            readers: Vec::new(),
            local_waiters: Vec::new(),
            flush_waiters: Vec::new(),
        }
    }

    pub(super) fn fetching(id: FetchId, unit: u64, unit_bytes: u64, backing_end: u64, leave: Leave) -> Self {
        let bytes = vec![0; usize::try_from(unit_bytes).expect("a fill unit is at most 64 MiB")];
        let mut entry = Self::new(State::Fetching(id), bytes, Some(leave));
        // Past the backing's end the guest reads zeros, and the buffer is zeros already.
        entry.known.insert(backing_end.saturating_sub(unit * unit_bytes).min(unit_bytes)..unit_bytes);
        entry
    }

    pub(super) fn refetch(&mut self, id: FetchId, unit: u64, unit_bytes: u64) -> Fetch {
        self.state = State::Fetching(id);
        let mut wanted: Vec<Range<u64>> = Vec::new();
        for gap in self.known.gaps(0..unit_bytes) {
            let gap = unit * unit_bytes + gap.start..unit * unit_bytes + gap.end;
            match wanted.last_mut() {
                Some(last) if gap.start - last.end <= GAP_MERGE_BYTES_MAX => last.end = gap.end,
                _ => wanted.push(gap),
            }
        }
        assert!(!wanted.is_empty(), "a complete unit is stored, not fetched");
        Fetch { id, units: unit..unit + 1, wanted }
    }

    pub(super) fn known_bytes(&self, range: &Range<u64>) -> Option<Bytes> {
        let (start, end) = offsets(range);
        match &self.state {
            State::Storing(bytes) => Some(bytes.slice(start..end)),
            State::Writing => None,
            _ if self.known.covers(range) => Some(Bytes::copy_from_slice(&self.bytes[start..end])),
            _ => None,
        }
    }

    pub(super) fn fill_gaps(&mut self, from: u64, piece: &[u8]) {
        let end = from + piece.len() as u64;
        for gap in self.known.gaps(from..end) {
            let (start, stop) = offsets(&gap);
            let (source, source_end) = offsets(&(gap.start - from..gap.end - from));
            self.bytes[start..stop].copy_from_slice(&piece[source..source_end]);
        }
        self.known.insert(from..end);
    }

    pub(super) fn overwrite(&mut self, from: u64, data: &[u8]) {
        let range = from..from + data.len() as u64;
        let (start, end) = offsets(&range);
        self.bytes[start..end].copy_from_slice(data);
        self.guest.insert(range.clone());
        self.known.insert(range);
    }

    pub(super) fn is_guest(&self) -> bool {
        !self.guest.is_empty()
    }

    /// Nothing would be lost if it went.
    pub(super) fn is_plain(&self) -> bool {
        !self.is_guest() && !self.preparing
    }

    pub(super) fn is_complete(&self, unit_bytes: u64) -> bool {
        self.known.covers(&(0..unit_bytes))
    }

    pub(super) fn take_over(&mut self) {
        assert!(self.is_plain() && self.room.is_none());
        self.state = State::Writing;
        self.leave = None;
        self.bytes = Vec::new();
    }

    pub(super) fn wait_local(&mut self) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        self.local_waiters.push(tell);
        told
    }

    pub(super) fn tell_local_waiters(&mut self) {
        for waiter in self.local_waiters.drain(..) {
            let _ = waiter.send(());
        }
    }

    pub(super) fn tell_readers(&mut self) {
        for reader in std::mem::take(&mut self.readers) {
            match self.known_bytes(&reader.range) {
                Some(bytes) => {
                    let _ = reader.tell.send(Delivery::Bytes(bytes));
                }
                None => self.readers.push(reader),
            }
        }
    }

    pub(super) fn store_if_complete(&mut self, unit: u64, unit_bytes: u64) -> Option<Store<R>> {
        // With guest bytes it goes into the room that is being taken for it.
        if self.preparing || !self.is_complete(unit_bytes) {
            return None;
        }
        let bytes = Bytes::from(std::mem::take(&mut self.bytes));
        self.state = State::Storing(bytes.clone());
        self.tell_readers();
        Some(Store { unit, bytes, room: self.room.take() })
    }
}

fn offsets(range: &Range<u64>) -> (usize, usize) {
    let fits = "an offset inside a fill unit fits in memory";
    (usize::try_from(range.start).expect(fits), usize::try_from(range.end).expect(fits))
}
