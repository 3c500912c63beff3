//! Tables: where the words of an image's tables lie, by a walk of its own, not the driver's. For those who damage images.
//!
//! - Places are those before the damage. Of a table, those words come first that say something.
//! - Nothing that stands in the bytes can do harm: what lies outside of them reads as zeros, and lists have bounds.
//!
//! Not here: what a word becomes.

/// Words of one table, at most, that say something.
const WORDS_MAX: usize = 48;
/// Words of one table, beside those.
const OTHERS_MAX: usize = 4;
/// Tables of one level, at most.
const TABLES_MAX: usize = 8;
/// Where the offset stands in an entry of qcow2; those of QED have no bits elsewhere.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A format with tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Little-endian.
    Qed,
    /// Big-endian.
    Qcow2,
}

/// An image's bytes, with the byte order of its format.
pub struct Tables<'a> {
    /// The file.
    pub bytes: &'a mut Vec<u8>,
    /// Its format.
    pub format: Format,
}

impl Tables<'_> {
    /// The number in `len` bytes at a place, at most 8.
    pub fn get(&self, at: u64, len: usize) -> u64 {
        let place = usize::try_from(at).ok().and_then(|at| self.bytes.get(at..at.checked_add(len)?));
        let Some(bytes) = place else { return 0 };
        let put = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        match self.format {
            Format::Qed => bytes.iter().rev().fold(0, put),
            Format::Qcow2 => bytes.iter().fold(0, put),
        }
    }

    /// Sets it, where there is such a place.
    pub fn set(&mut self, at: u64, len: usize, value: u64) {
        let place = usize::try_from(at).ok().and_then(|at| self.bytes.get_mut(at..at.checked_add(len)?));
        let Some(to) = place else { return };
        let bytes = value.to_be_bytes();
        let bytes = &bytes[8 - len..];
        match self.format {
            Format::Qed => to.iter_mut().zip(bytes.iter().rev()).for_each(|(to, from)| *to = *from),
            Format::Qcow2 => to.copy_from_slice(bytes),
        }
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        match self.format {
            Format::Qed => self.get(4, 4),
            Format::Qcow2 => 1 << self.get(20, 4).min(63),
        }
    }

    /// Places of the words of a table.
    fn words(&self, at: u64, len: u64) -> Vec<u64> {
        let end = at.saturating_add(len).min(self.bytes.len() as u64);
        let all = || (at..end).step_by(8);
        let mut words: Vec<u64> = all().filter(|&at| self.get(at, 8) != 0).take(WORDS_MAX).collect();
        words.extend(all().take(OTHERS_MAX));
        words.extend(all().last());
        words
    }

    /// Places of the words of the tables that these words name.
    fn behind(&self, words: &[u64], len: u64) -> Vec<u64> {
        let named = words.iter().map(|&at| self.get(at, 8) & OFFSET).filter(|&at| at != 0).take(TABLES_MAX);
        named.flat_map(|at| self.words(at, len)).collect()
    }

    /// Places of words, level by level; a level may have none.
    pub fn levels(&self) -> Vec<Vec<u64>> {
        let cluster = self.cluster_size();
        match self.format {
            Format::Qed => {
                let table = self.get(8, 4).saturating_mul(cluster);
                let l1 = self.words(self.get(40, 8), table);
                let l2 = self.behind(&l1, table);
                vec![l1, l2]
            }
            Format::Qcow2 => {
                let l1 = self.words(self.get(40, 8), self.get(36, 4) * 8);
                let table = self.words(self.get(48, 8), self.get(56, 4).saturating_mul(cluster));
                let (l2, blocks) = (self.behind(&l1, cluster), self.behind(&table, cluster));
                let mut levels = vec![l1, l2, table, blocks];
                if self.get(60, 4) > 0 {
                    let snapshots = self.get(64, 8);
                    levels.push((snapshots..snapshots.saturating_add(160)).step_by(4).collect());
                    let snapshot_l1 = self.words(self.get(snapshots, 8), self.get(36, 4) * 8);
                    levels.push(self.behind(&snapshot_l1, cluster));
                    levels.push(snapshot_l1);
                }
                levels
            }
        }
    }
}
