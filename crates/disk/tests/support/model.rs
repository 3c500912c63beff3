//! The flat model: what each sector may read as, given which writes overlapped in time and what was flushed.
//!
//! Every guest write stamps its sectors with its own number. A read of a stamp is right if that write had begun, and no other
//! write lay wholly between its end and the read's begin.

use std::{borrow::Cow, collections::BTreeMap};

use super::origin::{SECTOR, backing_stamp};

/// A moment of the test: counts events.
pub type Tick = u64;

#[derive(Debug, Clone)]
struct Entry {
    stamp: u64,
    begin: Tick,
    /// `None`: not completed (in flight, or failed: it may have happened).
    end: Option<Tick>,
    /// A discard: may have happened or not even when it completed.
    maybe: bool,
}

#[derive(Clone)]
pub struct Model {
    sector_count: u64,
    backing_len: u64,
    /// Of sectors that were written.
    histories: BTreeMap<u64, Vec<Entry>>,
    tick: Tick,
    /// Begin of the newest flush that completed.
    flushed: Tick,
}

impl Model {
    pub fn new(size: u64, backing_len: u64) -> Self {
        Self { sector_count: size / SECTOR, backing_len, histories: BTreeMap::new(), tick: 1, flushed: 0 }
    }

    /// What a sector was before all writes.
    fn unwritten(&self, at: u64) -> Entry {
        let stamp = if at * SECTOR < self.backing_len { backing_stamp(at) } else { 0 };
        Entry { stamp, begin: 0, end: Some(0), maybe: false }
    }

    fn history(&self, at: u64) -> Cow<'_, [Entry]> {
        match self.histories.get(&at) {
            Some(history) => Cow::Borrowed(history),
            None => Cow::Owned(vec![self.unwritten(at)]),
        }
    }

    pub fn tick(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    pub fn begin_write(&mut self, first: u64, count: u64, stamp: u64, maybe: bool) -> Tick {
        let begin = self.tick();
        for at in first..first + count {
            let unwritten = self.unwritten(at);
            let history = self.histories.entry(at).or_insert_with(|| vec![unwritten]);
            history.push(Entry { stamp, begin, end: None, maybe });
        }
        begin
    }

    pub fn end_write(&mut self, first: u64, count: u64, begin: Tick) {
        let end = self.tick();
        for at in first..first + count {
            let history = self.histories.get_mut(&at).expect("its write began");
            for entry in history.iter_mut().filter(|entry| entry.begin == begin) {
                entry.end = Some(end);
            }
        }
    }

    pub fn end_flush(&mut self, begin: Tick) {
        self.flushed = self.flushed.max(begin);
    }

    /// Checks a sector that a read which began at `begin` returned just now.
    pub fn check_read(&self, at: u64, stamp: u64, begin: Tick) {
        self.check(at, stamp, begin, "read");
    }

    /// Checks a sector after a power loss: only flushed writes must have survived.
    pub fn check_after_crash(&self, at: u64, stamp: u64) {
        self.check(at, stamp, self.flushed, "after the crash");
    }

    fn check(&self, at: u64, stamp: u64, horizon: Tick, what: &str) {
        let history = self.history(at);
        let possible = history.iter().filter(|entry| entry.stamp == stamp).any(|entry| {
            !history.iter().any(|other| {
                !other.maybe
                    && entry.end.is_some_and(|end| other.begin > end)
                    && other.end.is_some_and(|end| end < horizon)
            })
        });
        assert!(possible, "{what}: sector {at} is {stamp:#x}, horizon {horizon}, history {history:?}");
    }

    /// After a crash: what was read is what there is.
    pub fn restart(&mut self, at: u64, stamp: u64) {
        let tick = self.tick;
        self.histories.insert(at, vec![Entry { stamp, begin: tick, end: Some(tick), maybe: false }]);
    }

    /// Forgets what can no longer be read, so that long runs stay small.
    pub fn prune(&mut self, horizon: Tick) {
        for history in self.histories.values_mut() {
            let newest = history
                .iter()
                .filter(|entry| !entry.maybe && entry.end.is_some_and(|end| end < horizon))
                .map(|entry| entry.begin)
                .max();
            if let Some(newest) = newest {
                history.retain(|entry| entry.end.is_none_or(|end| end >= newest));
            }
        }
    }

    pub fn sector_count(&self) -> u64 {
        self.sector_count
    }
}
