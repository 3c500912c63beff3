//! The flat model: what each cell may read as, given which writes overlapped in time and what was flushed.
//!
//! - A read of a write's stamp is right if that write had begun, and no other write lay wholly between its end and the
//!   read's begin. Once a write was seen, nothing that ended before it began is seen again.
//! - After a power loss the same holds with the begin of the newest completed flush as the horizon.
//! - A discard may have happened or not; so may a write that failed.
//!
//! Not here: who reads and writes (`guest`).

use std::{collections::BTreeMap, ops::Range};

use crate::stamp;

/// A moment: counts events.
pub type Tick = u64;

/// Entries of a cell before those that nobody can read any more are forgotten.
const HISTORY_MAX: usize = 6;

#[derive(Debug, Clone, Copy)]
struct Entry {
    stamp: u64,
    begin: Tick,
    /// `None`: in flight.
    end: Option<Tick>,
    /// May have happened or not even when it ended.
    maybe: bool,
}

#[derive(Debug, Clone, Default)]
struct Cell {
    history: Vec<Entry>,
    /// Begin of the newest write that was seen, and when it had been seen.
    seen: (Tick, Tick),
}

/// What must be there.
#[derive(Clone)]
pub struct Model {
    cell_size: u64,
    cells: Vec<Cell>,
    tick: Tick,
    /// Begin of the newest flush that completed.
    flushed: Tick,
    /// Begins of the reads under way.
    reads: BTreeMap<Tick, ()>,
    writes: u64,
    /// Cells that a close named as lost, and the flush that they fall back to.
    unsaved: (Vec<Range<u64>>, Tick),
}

/// Whether an ended write must be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It completed.
    Done,
    /// It failed, or only hinted: it may be seen.
    Maybe,
}

impl Model {
    /// A disk whose cells of `cell_size` bytes are now what `stamps` says.
    pub fn new(cell_size: u64, stamps: impl IntoIterator<Item = u64>) -> Self {
        let mut model = Self {
            cell_size,
            cells: Vec::new(),
            tick: 1,
            flushed: 0,
            reads: BTreeMap::new(),
            writes: 0,
            unsaved: (Vec::new(), 0),
        };
        model.cells = stamps.into_iter().map(|stamp| model.settled(stamp)).collect();
        model
    }

    fn settled(&self, stamp: u64) -> Cell {
        let entry = Entry { stamp, begin: self.tick, end: Some(self.tick), maybe: false };
        Cell { history: vec![entry], seen: (0, 0) }
    }

    /// Cells in all.
    pub fn cell_count(&self) -> u64 {
        self.cells.len() as u64
    }

    /// Bytes of a cell.
    pub fn cell_size(&self) -> u64 {
        self.cell_size
    }

    /// A number that no write had yet.
    pub fn next_write(&mut self) -> u64 {
        self.writes += 1;
        self.writes
    }

    /// The moment after the last event.
    pub fn tick(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    /// A write of cells begins; `stamp` says what each will hold.
    pub fn begin_write(&mut self, first: u64, count: u64, stamp: impl Fn(u64) -> u64) -> Tick {
        let begin = self.tick();
        let horizon = self.reads.first_key_value().map_or(self.flushed, |(&read, ())| read.min(self.flushed));
        for at in first..first + count {
            let cell = &mut self.cells[at as usize];
            if cell.history.len() >= HISTORY_MAX {
                cell.prune(horizon);
            }
            cell.history.push(Entry { stamp: stamp(at), begin, end: None, maybe: false });
        }
        begin
    }

    /// The write that began then has ended.
    pub fn end_write(&mut self, first: u64, count: u64, begin: Tick, ended: Ended) {
        let end = self.tick();
        for cell in &mut self.cells[first as usize..(first + count) as usize] {
            if let Some(entry) = cell.history.iter_mut().rfind(|entry| entry.begin == begin) {
                entry.end = Some(end);
                entry.maybe = ended == Ended::Maybe;
            }
        }
    }

    /// A read begins.
    pub fn begin_read(&mut self) -> Tick {
        let begin = self.tick();
        self.reads.insert(begin, ());
        begin
    }

    /// The read that began then ended without bytes.
    pub fn drop_read(&mut self, begin: Tick) {
        self.reads.remove(&begin);
    }

    /// The read that began then has returned these bytes just now.
    ///
    /// # Panics
    /// When it may not.
    pub fn end_read(&mut self, first: u64, bytes: &[u8], begin: Tick) {
        self.reads.remove(&begin);
        let now = self.tick();
        for (at, bytes) in (first..).zip(bytes.chunks_exact(self.cell_size as usize)) {
            let cell = &mut self.cells[at as usize];
            match stamp::of_bytes(bytes) {
                Some(stamp) if cell.check(stamp, begin, begin) => cell.see(stamp, now),
                stamp => cell.wrong("read", at, stamp, begin),
            }
        }
    }

    /// Cells that begin and end between these bytes are zeros, says a status that began with `begin`.
    ///
    /// # Panics
    /// When one cannot be.
    pub fn are_zeros(&self, bytes: Range<u64>, begin: Tick) {
        for at in bytes.start.div_ceil(self.cell_size)..bytes.end / self.cell_size {
            let cell = &self.cells[at as usize];
            if !cell.check(stamp::ZERO, begin, begin) {
                cell.wrong("status", at, Some(stamp::ZERO), begin);
            }
        }
    }

    /// A flush that began then completed.
    pub fn end_flush(&mut self, begin: Tick) {
        self.flushed = self.flushed.max(begin);
    }

    /// A close that began then made all durable but what was written to these bytes since the last flush.
    ///
    /// # Panics
    /// When they are not cells that were written since.
    pub fn end_close(&mut self, begin: Tick, unsaved: &[Range<u64>]) {
        let cells = |range: &Range<u64>| range.start / self.cell_size..range.end.div_ceil(self.cell_size);
        let unsaved: Vec<_> = unsaved.iter().map(cells).collect();
        for at in unsaved.iter().cloned().flatten() {
            let history = &self.cells[at as usize].history;
            let unflushed = history.iter().any(|entry| entry.end.is_none_or(|end| end > self.flushed));
            assert!(unflushed, "cell {at} was named as not saved, and a flush had saved it: {history:x?}");
        }
        self.unsaved = (unsaved, self.flushed);
        self.end_flush(begin);
    }

    fn durable_since(&self, cell: u64) -> Tick {
        let (unsaved, before) = &self.unsaved;
        if unsaved.iter().any(|range| range.contains(&cell)) { *before } else { self.flushed }
    }

    /// Power was lost, and these bytes were found from `first` on: from now on that is what there is. To be told of every
    /// cell, then [`Model::end_restart`].
    ///
    /// # Panics
    /// When something is lost that must have survived.
    pub fn restart(&mut self, first: u64, bytes: &[u8]) {
        for (at, bytes) in (first..).zip(bytes.chunks_exact(self.cell_size as usize)) {
            let (cell, since) = (&self.cells[at as usize], self.durable_since(at));
            match stamp::of_bytes(bytes) {
                Some(stamp) if cell.check(stamp, since, 0) => {
                    self.cells[at as usize] = self.settled(stamp);
                }
                stamp => cell.wrong("after the crash", at, stamp, since),
            }
        }
    }

    /// All cells are known, and what they hold is durable.
    pub fn end_restart(&mut self) {
        self.reads.clear();
        self.unsaved.0.clear();
        self.flushed = self.tick();
        self.tick += 1;
    }

    /// The disk grew: new cells of zeros.
    pub fn grow(&mut self, cell_count: u64) {
        let cell = self.settled(stamp::ZERO);
        self.cells.resize(cell_count as usize, cell);
    }

    /// What every cell holds; all must have settled.
    pub fn stamps(&self) -> Vec<u64> {
        self.cells.iter().map(|cell| cell.history.last().expect("a cell has an entry").stamp).collect()
    }

    /// The disk becomes these cells, whatever it was (a snapshot is applied).
    pub fn replace(&mut self, stamps: &[u64]) {
        self.cells = stamps.iter().map(|&stamp| self.settled(stamp)).collect();
    }
}

impl Cell {
    fn check(&self, stamp: u64, horizon: Tick, read_begin: Tick) -> bool {
        if let [only] = self.history[..] {
            return only.stamp == stamp;
        }
        self.history.iter().rev().filter(|entry| entry.stamp == stamp).any(|entry| {
            let over = |begin: Tick| entry.end.is_some_and(|end| begin > end);
            let overwritten = self
                .history
                .iter()
                .any(|other| !other.maybe && over(other.begin) && other.end.is_some_and(|end| end < horizon));
            let gone_back = self.seen.1 < read_begin && over(self.seen.0);
            !overwritten && !gone_back
        })
    }

    fn see(&mut self, stamp: u64, now: Tick) {
        if self.history.len() == 1 {
            return;
        }
        // Zeros may be of several writes.
        let mut of = self.history.iter().filter(|entry| entry.stamp == stamp);
        if let (Some(entry), None) = (of.next(), of.next())
            && entry.begin > self.seen.0
        {
            self.seen = (entry.begin, now);
        }
    }

    fn prune(&mut self, horizon: Tick) {
        let ended_before = |entry: &Entry, then| entry.end.is_some_and(|end| end < then);
        let sure = self.history.iter().filter(|entry| !entry.maybe && ended_before(entry, horizon));
        if let Some(newest) = sure.map(|entry| entry.begin).max() {
            self.history.retain(|entry| !ended_before(entry, newest));
        }
    }

    fn wrong(&self, what: &str, at: u64, stamp: Option<u64>, horizon: Tick) -> ! {
        match stamp {
            Some(stamp) => {
                panic!("{what}: cell {at} is {stamp:#x}, horizon {horizon}, history {:x?}", self.history)
            }
            None => panic!("{what}: cell {at} holds bytes of two writes, history {:x?}", self.history),
        }
    }
}
