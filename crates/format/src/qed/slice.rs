//! Slice: 512 entries of a table, the piece in which tables are read, cached and written.
//!
//! - An entry is decoded and checked once, when its slice is read. What may not be there is remembered beside the slice
//!   and kept as it is; using it is `Corrupt`.
//! - Entries are atomic: `lookup` reads them without a lock.
//!
//! Not here: which slices are in memory (`cache`), and when one is written (`flush`).

use std::collections::BTreeMap;

use readonce_storage::sync::atomic::{AtomicU64, Ordering};

use super::layout::{ENTRY_BYTES, Layout, SLICE_BYTES, SLICE_ENTRIES};
use crate::{
    Extent, FormatError, Mapping, cache,
    number::{bytes, index},
};

const ENTRIES: usize = 512;

/// No table; cluster unallocated.
const ABSENT: u64 = 0;
/// L2 only: the cluster reads as zeros.
pub(super) const ZERO: u64 = 1;
/// In memory only: the file holds something that may not be there.
const BAD: u64 = 2;

/// One entry, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Absent,
    Zero,
    /// Byte offset of a cluster or of a table.
    At(u64),
    /// What the file holds may not be there.
    Bad,
}

impl Entry {
    fn from_memory(raw: u64) -> Self {
        match raw {
            ABSENT => Self::Absent,
            ZERO => Self::Zero,
            BAD => Self::Bad,
            offset => Self::At(offset),
        }
    }

    fn to_memory(self) -> u64 {
        match self {
            Self::Absent => ABSENT,
            Self::Zero => ZERO,
            Self::Bad => BAD,
            Self::At(offset) => offset,
        }
    }
}

/// A slice in memory.
#[derive(Debug)]
pub(super) struct Slice {
    /// Which: counted over the whole guest for L2, over the table for L1.
    pub(super) index: u64,
    entries: Box<[AtomicU64; ENTRIES]>,
    /// What the file holds where an entry is `Bad`.
    bad: BTreeMap<u64, u64>,
}

impl cache::Slice for Slice {
    fn index(&self) -> u64 {
        self.index
    }
}

impl Slice {
    /// Decodes the bytes of a slice; `valid` says whether entry so-and-so may hold an offset, `zero` whether
    /// the zero marker may be there.
    pub(super) fn decode(
        slice_index: u64,
        slice_bytes: &[u8],
        zero: bool,
        mut valid: impl FnMut(u64, u64) -> bool,
    ) -> Self {
        let entries = Box::new([const { AtomicU64::new(ABSENT) }; ENTRIES]);
        let mut bad = BTreeMap::new();
        for (at, (entry, raw)) in entries.iter().zip(raw_entries(slice_bytes)).enumerate() {
            let decoded = match raw {
                ABSENT => Entry::Absent,
                ZERO if zero => Entry::Zero,
                offset if offset != ZERO && valid(bytes(at), offset) => Entry::At(offset),
                _ => {
                    bad.insert(bytes(at), raw);
                    Entry::Bad
                }
            };
            entry.store(decoded.to_memory(), Ordering::Relaxed);
        }
        Self { index: slice_index, entries, bad }
    }

    /// Entry `at` of 512.
    pub(super) fn entry(&self, at: u64) -> Entry {
        let raw = self.entries.get(index(at)).map_or(BAD, |entry| entry.load(Ordering::Acquire));
        Entry::from_memory(raw)
    }

    /// Changes entry `at` of 512, at once visible to `lookup`.
    pub(super) fn set(&self, at: u64, entry: Entry) {
        let place = self.entries.get(index(at)).expect("an entry's index is taken modulo 512");
        place.store(entry.to_memory(), Ordering::Release);
    }

    /// What the file is to hold for entry `at`.
    pub(super) fn raw(&self, at: u64) -> u64 {
        match self.entry(at) {
            Entry::Bad => self.bad.get(&at).copied().unwrap_or(ABSENT),
            entry => entry.to_memory(),
        }
    }

    /// Which entries hold what may not be there.
    pub(super) fn bad_entries(&self) -> Box<[u64]> {
        self.bad.keys().copied().collect()
    }

    /// The error for the bad entry `at`, `field` saying of which table.
    pub(super) fn corrupt(&self, field: &str, at: u64) -> FormatError {
        let entry = self.index * SLICE_ENTRIES + at;
        let (field, limit) = match field {
            "L1" => (
                format!("L1 entry {entry}"),
                "must be 0, or the offset of a whole L2 table between the header and the end of the file",
            ),
            _ => (
                format!("L2 entry of guest cluster {entry}"),
                "must be 0, 1, or the offset of a cluster between the header and the end of the file that is no table",
            ),
        };
        FormatError::corrupt(field, format!("{:#x}", self.bad.get(&at).copied().unwrap_or(0)), limit)
    }

    /// The extent at guest byte `offset`, which this L2 slice maps, at most `len_max` bytes long and inside the slice.
    pub(super) fn extent(&self, layout: &Layout, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let cluster_size = layout.cluster_size;
        let in_cluster = offset % cluster_size;
        let first_at = layout.slice_entry(offset);
        let first = self.entry(first_at);
        let mapping = match first {
            Entry::Absent => Mapping::Absent,
            Entry::Zero => Mapping::Zero,
            Entry::At(cluster) => Mapping::Data(cluster + in_cluster),
            Entry::Bad => return Err(self.corrupt("L2", first_at)),
        };
        let mut len = cluster_size - in_cluster;
        let mut at = first_at + 1;
        let mut expect = first;
        while len < len_max && at < bytes(ENTRIES) {
            expect = match expect {
                // Offsets end below the file's end, which is below 2^63.
                Entry::At(cluster) => Entry::At(cluster + cluster_size),
                same => same,
            };
            if self.entry(at) != expect {
                break;
            }
            len += cluster_size;
            at += 1;
        }
        Ok(Extent { mapping, len: len.min(len_max) })
    }
}

/// The entries in the bytes of a table, as they are.
pub(super) fn raw_entries(table_bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (entries, _) = table_bytes.as_chunks::<{ ENTRY_BYTES_USIZE }>();
    entries.iter().map(|entry| u64::from_le_bytes(*entry))
}

const ENTRY_BYTES_USIZE: usize = size_of::<u64>();
const _: () = assert!(ENTRIES * ENTRY_BYTES_USIZE == 4096 && SLICE_BYTES == 4096 && ENTRY_BYTES == 8);
