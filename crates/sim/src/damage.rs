//! Damage: words of an image's tables become something else, at drawn places; the file is cut, or grows.
//!
//! - Places are where tables lie before the damage, by a walk of its own, not the driver's. The header stays, but for the marks that
//!   say that the image may be wrong.
//!
//! Not here: what is done with the image then (`run::mending`).

use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};

/// Words of one table that may be hit, and tables of one level.
const WORDS_MAX: usize = 64;
const TABLES_MAX: usize = 8;
/// An entry of qcow2 that describes a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Where the offset stands in an entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

struct Words<'a> {
    bytes: &'a mut Vec<u8>,
    qcow2: bool,
}

impl Words<'_> {
    fn get(&self, at: u64, len: usize) -> u64 {
        let word = self.bytes.get(at as usize..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        let put = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        if self.qcow2 { word.iter().fold(0, put) } else { word.iter().rev().fold(0, put) }
    }

    fn set(&mut self, at: u64, value: u64) {
        let word = if self.qcow2 { value.to_be_bytes() } else { value.to_le_bytes() };
        if let Some(place) = self.bytes.get_mut(at as usize..).and_then(|rest| rest.get_mut(..8)) {
            place.copy_from_slice(&word);
        }
    }

    /// Places of words of a table: those that say something, and some that say nothing.
    fn table(&self, at: u64, len: u64) -> Vec<u64> {
        let end = at.saturating_add(len).min(self.bytes.len() as u64);
        let all = || (at..end).step_by(8);
        let said = all().filter(|&at| self.get(at, 8) != 0).take(WORDS_MAX);
        said.chain(all().take(2)).chain(all().last()).collect()
    }

    /// Places of words in the tables that these words name.
    fn behind(&self, words: &[u64], len: u64) -> Vec<u64> {
        let named = words.iter().map(|&at| self.get(at, 8) & OFFSET).filter(|&at| at != 0).take(TABLES_MAX);
        named.flat_map(|at| self.table(at, len)).collect()
    }

    /// Bytes of a cluster, and the places of words, level by level.
    fn levels(&self) -> (u64, Vec<Vec<u64>>) {
        if !self.qcow2 {
            let cluster = self.get(4, 4);
            let table = self.get(8, 4) * cluster;
            let l1 = self.table(self.get(40, 8), table);
            let l2 = self.behind(&l1, table);
            return (cluster, vec![l1, l2.clone(), l2]);
        }
        let cluster = 1 << self.get(20, 4);
        let l1 = self.table(self.get(40, 8), self.get(36, 4) * 8);
        let refcounts = self.table(self.get(48, 8), self.get(56, 4) * cluster);
        let mut levels = vec![self.behind(&l1, cluster), self.behind(&refcounts, cluster), l1, refcounts];
        if self.get(60, 4) > 0 {
            let snapshots = self.get(64, 8);
            let snapshot_l1 = self.table(self.get(snapshots, 8), self.get(snapshots + 8, 4) * 8);
            levels.push((snapshots..snapshots + 64).step_by(8).collect());
            levels.push(self.behind(&snapshot_l1, cluster));
            levels.push(snapshot_l1);
        }
        (cluster, levels)
    }
}

/// Damages an image.
pub fn damage(format: &str, bytes: &mut Vec<u8>, rng: &mut SmallRng) {
    let mut words = Words { bytes, qcow2: format == "qcow2" };
    let (cluster, mut levels) = words.levels();
    levels.retain(|level| !level.is_empty());
    for _ in 0..rng.random_range(1..6) {
        let len = words.bytes.len() as u64;
        match rng.random_range(0..16) {
            0 => {
                // Between clusters: what is cut inside of one that is a table is refused by readers, and no check tells.
                let kept = rng.random_range(1..=(len / cluster).max(1)) * cluster;
                words.bytes.truncate(kept as usize);
            }
            1 => {
                let more = rng.random_range(1..3 * cluster);
                words.bytes.extend((0..more).map(|at| (at >> 3) as u8));
            }
            2 if words.qcow2 && words.get(4, 4) == 3 => {
                // Dirty, or corrupt.
                let features = words.get(72, 8) | 1 << rng.random_range(0..2);
                words.set(72, features);
            }
            2 if !words.qcow2 => {
                let features = words.get(16, 8) | 2;
                words.set(16, features);
            }
            _ => {
                let Some(level) = levels.choose(rng) else { continue };
                let at = *level.choose(rng).expect("none is empty");
                let value = value(&words, &levels, at, cluster, rng);
                words.set(at, value);
            }
        }
    }
}

/// What a word may become: near what could be there, or far from it.
fn value(words: &Words<'_>, levels: &[Vec<u64>], at: u64, cluster: u64, rng: &mut SmallRng) -> u64 {
    let was = words.get(at, 8);
    let clusters = words.bytes.len() as u64 / cluster + 3;
    let near = rng.random_range(0..clusters) * cluster;
    match rng.random_range(0..12) {
        0..3 => near | [0, 1 << 63, 1, 1 << 62].choose(rng).expect("some"),
        3..5 => {
            let level = levels.choose(rng).expect("the word is of one");
            words.get(*level.choose(rng).expect("none is empty"), 8)
        }
        5 => 0,
        6 => was ^ 1 << rng.random_range(0..64),
        7 => was.wrapping_add([1, u64::MAX, cluster, cluster.wrapping_neg(), 512][rng.random_range(0..5)]),
        8 => rng.random_range(0..256),
        9 => near + [1, 8, 511, 512, cluster / 2][rng.random_range(0..5)],
        10 => COMPRESSED | near | rng.random_range(0..256) << [53, 54, 60, 61][rng.random_range(0..4)],
        _ => rng.random(),
    }
}
