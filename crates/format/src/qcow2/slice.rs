//! Slice: a piece of an L2 table in memory, in which tables are read, cached and written.
//!
//! - An entry is checked once, when its slice is read. What may not be there is remembered beside the slice and kept as it
//!   is; using it is `Corrupt`.
//! - Entries are atomic: `lookup` reads them without a lock. One of 16 bytes is read again while it changes, which a counter
//!   for each slice tells. One writer at a time changes a slice (`links`).
//! - "In use by nothing else" (COPIED) counts only where the table itself is used by nothing else; an image that is open for
//!   reading does not ask. Both are settled when the slice is read.
//!
//! Not here: which slices are in memory (`tables`), and when one is written (`flush`).

use std::collections::BTreeMap;

use readonce_storage::sync::{
    atomic::{AtomicU64, Ordering, fence},
    yield_now,
};

use super::{
    entry::{COMPRESSED, COPIED, Entry, OFFSET_MASK, Raw, Rules, Units, ZERO, split},
    layout::Layout,
};
use crate::{
    Extent, FormatError, Mapping, cache,
    number::{bytes, index},
};

/// In memory only: the file holds something that may not be there. Has a reserved bit, so that no valid entry is equal.
const BAD: u64 = 1 << 1;
/// Times that a reader spins on an entry that changes before it lets others run.
const SPINS_MAX: u32 = 100;

/// How bits that say "used by nothing else" are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Opened for reading: everything counts as the image's own.
    Ignored,
    /// As the entries say.
    AsSaid,
    /// The table is shared, and so is all that it names.
    Everything,
}

/// A slice in memory.
#[derive(Debug)]
pub(super) struct Slice {
    /// Which: counted over the whole guest.
    pub(super) index: u64,
    /// A word for each entry, or two: descriptor and bitmap.
    words: Box<[AtomicU64]>,
    /// Odd while an entry of two words changes.
    version: AtomicU64,
    /// What the file holds where an entry is bad.
    bad: BTreeMap<u64, Raw>,
}

impl cache::Slice for Slice {
    fn index(&self) -> u64 {
        self.index
    }
}

impl Slice {
    /// Takes the bytes of a slice in; `valid` says of entry so-and-so whether a cluster of the image's own file may hold
    /// its data.
    pub(super) fn decode(
        slice_index: u64,
        slice_bytes: &[u8],
        rules: &Rules,
        sharing: Sharing,
        mut valid: impl FnMut(u64, u64) -> bool,
    ) -> Self {
        let layout = &rules.layout;
        let guest = layout.slice_guest(slice_index);
        let cluster_size = layout.cluster_size();
        let mut words = Vec::with_capacity(slice_bytes.len() / 8);
        let mut bad = BTreeMap::new();
        for (at, raw) in (0..).zip(raw_entries(slice_bytes, layout.extended_l2)) {
            let mut kept = raw;
            if raw != Raw::default() {
                if rules.check(raw, guest.saturating_add(at * cluster_size), |offset| valid(at, offset)) {
                    kept.word = with_sharing(raw.word, sharing, layout.external_data);
                } else {
                    bad.insert(at, raw);
                    kept = Raw { word: BAD, bitmap: 0 };
                }
            }
            words.push(AtomicU64::new(kept.word));
            if layout.extended_l2 {
                words.push(AtomicU64::new(kept.bitmap));
            }
        }
        Self { index: slice_index, words: words.into(), version: AtomicU64::new(0), bad }
    }

    /// Whether an entry describes a compressed cluster.
    pub(super) fn names_compressed(&self, layout: &Layout) -> bool {
        let words_each = if layout.extended_l2 { 2 } else { 1 };
        self.words.iter().step_by(words_each).any(|word| word.load(Ordering::Relaxed) & COMPRESSED != 0)
    }

    fn word(&self, at: usize) -> u64 {
        self.words.get(at).map_or(BAD, |word| word.load(Ordering::Acquire))
    }

    /// Both words of entry `at` as of one moment.
    fn pair(&self, at: u64) -> Raw {
        let at = index(at) * 2;
        let mut spins = 0;
        loop {
            let before = self.version.load(Ordering::Acquire);
            let raw = Raw { word: self.word(at), bitmap: self.word(at + 1) };
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return raw;
            }
            spins += 1;
            if spins < SPINS_MAX {
                std::hint::spin_loop();
            } else {
                // The writer was stopped in the middle of its few instructions.
                yield_now();
            }
        }
    }

    fn in_memory(&self, at: u64, extended: bool) -> Raw {
        if extended { self.pair(at) } else { Raw { word: self.word(index(at)), bitmap: 0 } }
    }

    /// Entry `at`.
    ///
    /// # Errors
    /// `Corrupt` where it holds what may not be there.
    pub(super) fn entry(&self, at: u64, rules: &Rules) -> Result<Entry, FormatError> {
        let raw = self.in_memory(at, rules.layout.extended_l2);
        if raw.word == BAD {
            return Err(self.corrupt(at, rules));
        }
        Ok(Entry::decode(raw, &rules.layout))
    }

    /// Changes entry `at`, at once visible to `lookup`. One caller at a time.
    pub(super) fn set(&self, at: u64, entry: Entry, rules: &Rules) {
        let raw = entry.encode(&rules.layout);
        let place = |at: usize| self.words.get(at).expect("an entry's index is taken modulo the slice's");
        if rules.layout.extended_l2 {
            let version = self.version.load(Ordering::Relaxed);
            self.version.store(version.wrapping_add(1), Ordering::Relaxed);
            fence(Ordering::Release);
            place(index(at) * 2).store(raw.word, Ordering::Release);
            place(index(at) * 2 + 1).store(raw.bitmap, Ordering::Release);
            self.version.store(version.wrapping_add(2), Ordering::Release);
        } else {
            place(index(at)).store(raw.word, Ordering::Release);
        }
    }

    /// What the file is to hold for entry `at`.
    pub(super) fn raw(&self, at: u64, extended: bool) -> Raw {
        let raw = self.in_memory(at, extended);
        if raw.word == BAD { self.bad.get(&at).copied().unwrap_or_default() } else { raw }
    }

    /// Which entries hold what may not be there.
    pub(super) fn bad_entries(&self) -> Box<[u64]> {
        self.bad.keys().copied().collect()
    }

    fn corrupt(&self, at: u64, rules: &Rules) -> FormatError {
        let raw = self.bad.get(&at).copied().unwrap_or_default();
        let cluster = self.index * rules.layout.slice_entries() + at;
        let value = match rules.layout.extended_l2 {
            true => format!("{:#x} with the bitmap {:#x}", raw.word, raw.bitmap),
            false => format!("{:#x}", raw.word),
        };
        FormatError::corrupt(
            format!("L2 entry of guest cluster {cluster}"),
            value,
            "must name a cluster or compressed bytes inside the file that are no table, and have only bits that go together",
        )
    }

    /// The extent at guest byte `offset`, which this slice maps, at most `len_max` bytes long and inside the slice.
    pub(super) fn extent(&self, rules: &Rules, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        if rules.layout.extended_l2 {
            self.extent_of_units(rules, offset, len_max)
        } else {
            self.extent_of_clusters(rules, offset, len_max)
        }
    }

    fn extent_of_clusters(&self, rules: &Rules, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let cluster_bits = rules.layout.cluster_bits;
        let cluster_size = 1 << cluster_bits;
        let in_cluster = offset & (cluster_size - 1);
        // The count of entries is a power of two.
        let first_at = index(offset >> cluster_bits) & (self.words.len() - 1);
        let first = self.word(first_at);
        let mut len = cluster_size - in_cluster;
        let mut following = self.words.get(first_at + 1..).unwrap_or_default().iter();
        let mapping = match first {
            BAD => return Err(self.corrupt(bytes(first_at), rules)),
            0 => {
                while len < len_max && following.next().is_some_and(|word| word.load(Ordering::Acquire) == 0)
                {
                    len += cluster_size;
                }
                Mapping::Absent
            }
            word if word & COMPRESSED != 0 => Mapping::Compressed(rules.describe(word, in_cluster)),
            word if word & ZERO != 0 => {
                let is_zero = |word: u64| word & (COMPRESSED | ZERO) == ZERO;
                while len < len_max
                    && following.next().is_some_and(|word| is_zero(word.load(Ordering::Acquire)))
                {
                    len += cluster_size;
                }
                Mapping::Zero
            }
            word => {
                let mut expect = word;
                while len < len_max
                    && following.next().is_some_and(|word| {
                        // Offsets end below 2^56.
                        expect += cluster_size;
                        word.load(Ordering::Acquire) == expect
                    })
                {
                    len += cluster_size;
                }
                let at = (word & OFFSET_MASK) + in_cluster;
                if word & COPIED != 0 { Mapping::Data(at) } else { Mapping::Shared(at) }
            }
        };
        Ok(Extent { mapping, len: len.min(len_max) })
    }

    fn extent_of_units(&self, rules: &Rules, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let cluster_bits = rules.layout.cluster_bits;
        let cluster_size = 1 << cluster_bits;
        let unit_bits = cluster_bits - Units::BITS.trailing_zeros();
        let in_cluster = offset & (cluster_size - 1);
        let in_unit = offset & ((1 << unit_bits) - 1);
        let entries = bytes(self.words.len() / 2);
        let mut at = (offset >> cluster_bits) & (entries - 1);
        let first = self.pair(at);
        if first.word == BAD {
            return Err(self.corrupt(at, rules));
        }
        if first.word & COMPRESSED != 0 {
            let mapping = Mapping::Compressed(rules.describe(first.word, in_cluster));
            return Ok(Extent { mapping, len: (cluster_size - in_cluster).min(len_max) });
        }
        let unit = u32::try_from(in_cluster >> unit_bits).expect("below 32");
        let state = State::of(first, unit);
        let mut expect = first.word;
        let mut units = u64::from(state.run(first, unit));
        let mut whole = units == u64::from(Units::BITS - unit);
        let len_of = |units: u64| (units << unit_bits) - in_unit;
        while whole && len_of(units) < len_max && at + 1 < entries {
            at += 1;
            let next = self.pair(at);
            // Offsets end below 2^56.
            expect += cluster_size;
            let fits = state != State::Data || next.word == expect;
            if next.word == BAD || next.word & COMPRESSED != 0 || !fits || State::of(next, 0) != state {
                break;
            }
            let run = state.run(next, 0);
            units += u64::from(run);
            whole = run == Units::BITS;
        }
        let place = (first.word & OFFSET_MASK) + in_cluster;
        let mapping = match state {
            State::Absent => Mapping::Absent,
            State::Zero => Mapping::Zero,
            State::Data if first.word & COPIED != 0 => Mapping::Data(place),
            State::Data => Mapping::Shared(place),
        };
        Ok(Extent { mapping, len: len_of(units).min(len_max) })
    }
}

/// What a unit of a cluster that is not compressed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    Zero,
    Data,
}

impl State {
    fn of(raw: Raw, unit: u32) -> Self {
        let (data, zero) = split(raw.bitmap);
        match (data >> unit & 1, zero >> unit & 1) {
            (1, _) => Self::Data,
            (_, 1) => Self::Zero,
            _ => Self::Absent,
        }
    }

    /// Units in this state from `unit` on, which is.
    fn run(self, raw: Raw, unit: u32) -> u32 {
        let (data, zero) = split(raw.bitmap);
        let same = match self {
            Self::Data => data,
            Self::Zero => zero,
            Self::Absent => !(data | zero),
        };
        (same >> unit).trailing_ones().min(Units::BITS - unit)
    }
}

/// A descriptor as it is kept in memory.
fn with_sharing(word: u64, sharing: Sharing, external_data: bool) -> u64 {
    if word & COMPRESSED != 0 {
        return word & !COPIED;
    }
    if external_data {
        // Each cluster of a data file belongs to one guest cluster; the bit should be there.
        return if word & (OFFSET_MASK | COPIED) == 0 { word } else { word | COPIED };
    }
    match sharing {
        _ if word & OFFSET_MASK == 0 => word & !COPIED,
        Sharing::Ignored => word | COPIED,
        Sharing::AsSaid => word,
        Sharing::Everything => word & !COPIED,
    }
}

/// The entries in the bytes of a table, as they are.
pub(super) fn raw_entries(table_bytes: &[u8], extended: bool) -> impl Iterator<Item = Raw> {
    let (words, _) = table_bytes.as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_be_bytes(*word));
    std::iter::from_fn(move || {
        let word = words.next()?;
        let bitmap = if extended { words.next()? } else { 0 };
        Some(Raw { word, bitmap })
    })
}
