//! The flat model: what each sector may read as, given which writes overlapped in time and what was flushed.
//!
//! Every guest write stamps its sectors with its own number. A read of a stamp is right if that write had begun, and no other
//! write lay wholly between its end and the read's begin.

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
    sectors: Vec<Vec<Entry>>,
    tick: Tick,
    /// Begin of the newest flush that completed.
    flushed: Tick,
}

impl Model {
    pub fn new(size: u64, backing_len: u64) -> Self {
        let sectors = (0..size / SECTOR)
            .map(|at| {
                let stamp = if at * SECTOR < backing_len { backing_stamp(at) } else { 0 };
                vec![Entry { stamp, begin: 0, end: Some(0), maybe: false }]
            })
            .collect();
        Self { sectors, tick: 1, flushed: 0 }
    }

    pub fn tick(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    pub fn begin_write(&mut self, first: u64, count: u64, stamp: u64, maybe: bool) -> Tick {
        let begin = self.tick();
        for at in first..first + count {
            self.sectors[at as usize].push(Entry { stamp, begin, end: None, maybe });
        }
        begin
    }

    pub fn end_write(&mut self, first: u64, count: u64, begin: Tick) {
        let end = self.tick();
        for at in first..first + count {
            for entry in self.sectors[at as usize].iter_mut().filter(|entry| entry.begin == begin) {
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
        let history = &self.sectors[at as usize];
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
        self.sectors[at as usize] = vec![Entry { stamp, begin: tick, end: Some(tick), maybe: false }];
    }

    /// Forgets what can no longer be read, so that long runs stay small.
    pub fn prune(&mut self, horizon: Tick) {
        for history in &mut self.sectors {
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
        self.sectors.len() as u64
    }
}
