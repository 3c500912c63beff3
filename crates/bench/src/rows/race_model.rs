//! What each sector may read as, given which writes overlapped in time.
//!
//! Every write stamps its sectors with a number of its own. A read of a stamp is right if that write had begun, and no
//! other write lay wholly between its end and the read's begin. A discard may have happened or not.

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A moment of the run: counts events.
pub type Tick = u64;

#[derive(Debug, Clone)]
struct Entry {
    stamp: u64,
    begin: Tick,
    /// `None`: not completed.
    end: Option<Tick>,
    maybe: bool,
}

/// The model of a disk.
pub struct Model {
    sectors: Vec<Vec<Entry>>,
    tick: Tick,
    /// When each read that is under way began: what ended before the first of them and was written over is forgotten.
    reads: std::collections::BTreeSet<Tick>,
    stamp: u64,
    first_wrong: Option<String>,
}

/// What a sector of the backing holds.
pub fn backing_stamp(sector: u64) -> u64 {
    1 << 63 | sector
}

impl Model {
    /// A disk of `sectors`, all of it in the backing.
    pub fn new(sectors: u64) -> Self {
        let sectors = (0..sectors)
            .map(|at| vec![Entry { stamp: backing_stamp(at), begin: 0, end: Some(0), maybe: false }])
            .collect();
        Self { sectors, tick: 1, reads: Default::default(), stamp: 0, first_wrong: None }
    }

    fn tick(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    /// A stamp that no sector ever had.
    pub fn new_stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// A write of `stamp` begins; 0 is a write of zeros. `maybe`: it need not happen.
    pub fn begin_write(&mut self, first: u64, count: u64, stamp: u64, maybe: bool) -> Tick {
        let begin = self.tick();
        for history in &mut self.sectors[first as usize..(first + count) as usize] {
            history.push(Entry { stamp, begin, end: None, maybe });
        }
        begin
    }

    /// The write that began at `begin` has completed.
    pub fn end_write(&mut self, first: u64, count: u64, begin: Tick) {
        let end = self.tick();
        let horizon = self.reads.first().copied().unwrap_or(end).min(end);
        for history in &mut self.sectors[first as usize..(first + count) as usize] {
            for entry in history.iter_mut().filter(|entry| entry.begin == begin) {
                entry.end = Some(end);
            }
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

    /// A read begins.
    pub fn begin_read(&mut self) -> Tick {
        let begin = self.tick();
        self.reads.insert(begin);
        begin
    }

    /// The read that began at `begin` gave `data`, sectors from `first`; counts those that are wrong.
    pub fn end_read(&mut self, first: u64, data: &[u8], begin: Tick) -> u64 {
        self.reads.remove(&begin);
        let mut wrong = 0;
        for (sector, at) in data.chunks_exact(SECTOR as usize).zip(first..) {
            if !self.is_possible(at, sector, begin) {
                wrong += 1;
                let stamp = |word: &[u8]| u64::from_le_bytes(word.try_into().expect("eight bytes"));
                let (head, tail) = (stamp(&sector[..8]), stamp(&sector[sector.len() - 8..]));
                let history = &self.sectors[at as usize];
                self.first_wrong.get_or_insert_with(|| {
                    format!("sector {at}, read since {begin}, has {head:#x}..{tail:#x}; {history:?}")
                });
            }
        }
        wrong
    }

    /// The first wrong sector of all, in words.
    pub fn first_wrong(&self) -> Option<&str> {
        self.first_wrong.as_deref()
    }

    fn is_possible(&self, at: u64, sector: &[u8], horizon: Tick) -> bool {
        let history = &self.sectors[at as usize];
        // Sectors are not promised to be whole under a write that is still going on: each word is judged alone.
        [&sector[..8], &sector[sector.len() - 8..]].into_iter().all(|word| {
            let stamp = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            history.iter().filter(|entry| entry.stamp == stamp).any(|entry| {
                !history.iter().any(|other| {
                    !other.maybe
                        && entry.end.is_some_and(|end| other.begin > end)
                        && other.end.is_some_and(|end| end < horizon)
                })
            })
        })
    }
}

/// The bytes of `count` sectors that all hold `stamp`.
pub fn stamped(stamp: u64, count: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat((count * SECTOR / 8) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buried_write_is_seen_and_a_race_is_allowed() {
        let mut model = Model::new(1);
        let (one, two) = (model.new_stamp(), model.new_stamp());
        let write = model.begin_write(0, 1, one, false);
        let racing = model.begin_read();
        model.end_write(0, 1, write);
        assert_eq!(
            model.end_read(0, &stamped(backing_stamp(0), 1), racing),
            0,
            "the read began before the write ended"
        );
        let read = model.begin_read();
        assert_eq!(model.end_read(0, &stamped(backing_stamp(0), 1), read), 1, "the write is lost");
        let read = model.begin_read();
        assert_eq!(model.end_read(0, &stamped(one, 1), read), 0);
        let trim = model.begin_write(0, 1, 0, true);
        model.end_write(0, 1, trim);
        for allowed in [0, one] {
            let read = model.begin_read();
            assert_eq!(
                model.end_read(0, &stamped(allowed, 1), read),
                0,
                "a discard may have happened or not"
            );
        }
        let read = model.begin_read();
        assert_eq!(model.end_read(0, &stamped(two, 1), read), 1, "nobody wrote this");
    }
}
