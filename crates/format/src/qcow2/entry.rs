//! L2 entry: what one guest cluster is, packed into 8 or 16 bytes.
//!
//! - An [`Entry`] holds a place in the file and two sets of units (subclusters): those whose bytes lie there, and those that
//!   read as zeros. A unit is in at most one set. In an image without subclusters all 32 go together.
//! - [`Rules::check`] says whether what the file holds may be there; only what passed it is decoded.
//!
//! Not here: slices of entries in memory (`slice`), and which entries may change how (`commit`).

use super::layout::{HOST_OFFSET_END, Layout, SECTOR_BYTES, SUBCLUSTERS};
use crate::{Compressed, codec::Codec};

/// The cluster (or table) has a refcount of exactly 1: it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
/// The entry describes a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Offset of a cluster.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster reads as zeros (version 3, entries of 8 bytes).
pub(super) const ZERO: u64 = 1;

/// A set of a cluster's units: bit `n` is unit `n`.
pub(super) type Units = u32;
/// Every unit.
pub(super) const ALL: Units = Units::MAX;
const _: () = assert!(Units::BITS == 32 && SUBCLUSTERS == 32);

/// An entry as the file holds it, in the machine's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Raw {
    /// The cluster descriptor.
    pub(super) word: u64,
    /// The subclusters' bitmaps; 0 in entries of 8 bytes.
    pub(super) bitmap: u64,
}

/// Where a cluster lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere.
    None,
    /// At this offset of the data's file, used by nothing else.
    Own(u64),
    /// At this offset; something else shows it too.
    Shared(u64),
    /// Compressed: the descriptor.
    Compressed(u64),
}

/// An entry, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) place: Place,
    /// Units whose bytes lie there; all of them in a compressed cluster.
    pub(super) data: Units,
    /// Units that read as zeros.
    pub(super) zero: Units,
}

impl Entry {
    /// Decodes what passed [`Rules::check`].
    pub(super) fn decode(raw: Raw, layout: &Layout) -> Self {
        let Raw { word, bitmap } = raw;
        if word & COMPRESSED != 0 {
            return Self { place: Place::Compressed(word), data: ALL, zero: 0 };
        }
        let offset = word & OFFSET_MASK;
        let copied = word & COPIED != 0;
        let place = match (offset, copied) {
            // Only in a data file is there a cluster 0.
            (0, false) => Place::None,
            (0, true) if !layout.external_data => Place::None,
            (offset, true) => Place::Own(offset),
            (offset, false) => Place::Shared(offset),
        };
        if layout.extended_l2 {
            let (data, zero) = split(bitmap);
            return Self { place, data, zero };
        }
        let zero = if word & ZERO != 0 { ALL } else { 0 };
        let data = if place == Place::None { 0 } else { !zero };
        Self { place, data, zero }
    }

    /// What the file is to hold. Without subclusters both sets are empty or whole.
    pub(super) fn encode(self, layout: &Layout) -> Raw {
        let word = match self.place {
            Place::None => 0,
            Place::Own(offset) => offset | COPIED,
            Place::Shared(offset) => offset,
            Place::Compressed(word) => return Raw { word, bitmap: 0 },
        };
        if layout.extended_l2 {
            return Raw { word, bitmap: u64::from(self.data) | u64::from(self.zero) << 32 };
        }
        assert!(self.zero == 0 || self.zero == ALL, "a cluster without subclusters is zero as a whole");
        Raw { word: word | if self.zero == ALL { ZERO } else { 0 }, bitmap: 0 }
    }

    /// Units that show the backing.
    pub(super) fn absent(self) -> Units {
        !(self.data | self.zero)
    }
}

/// The units with data, and those of zeros.
pub(super) fn split(bitmap: u64) -> (Units, Units) {
    let low = |bits: u64| Units::try_from(bits & u64::from(ALL)).expect("32 bits");
    (low(bitmap), low(bitmap >> 32))
}

/// What entries of one image may hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) layout: Layout,
    pub(super) codec: Codec,
    /// Bytes of the file when it was opened. Compressed clusters, which are never made here, lie below.
    pub(super) file_len: u64,
}

impl Rules {
    /// Whether the entry of the guest cluster at `guest` may hold `raw`. `valid` says whether a cluster of the image's own
    /// file may hold data.
    pub(super) fn check(&self, raw: Raw, guest: u64, mut valid: impl FnMut(u64) -> bool) -> bool {
        let Raw { word, bitmap } = raw;
        let layout = &self.layout;
        if word & COMPRESSED != 0 {
            return bitmap == 0 && !layout.external_data && self.check_compressed(word, valid);
        }
        // Beside subclusters it says nothing. QEMU does not look at it there, nor does a check.
        let zero_flag = if layout.version >= 3 { ZERO } else { 0 };
        if word & !(COPIED | OFFSET_MASK | zero_flag) != 0 {
            return false;
        }
        let offset = word & OFFSET_MASK;
        let allocated = offset != 0 || (layout.external_data && word & COPIED != 0);
        if layout.extended_l2 {
            let (data, zero) = split(bitmap);
            if data & zero != 0 || (data != 0 && !allocated) {
                return false;
            }
        } else if bitmap != 0 {
            return false;
        }
        match (allocated, layout.external_data) {
            (false, _) => true,
            (true, true) => offset == guest,
            (true, false) => layout.valid_cluster(offset) && valid(offset),
        }
    }

    fn check_compressed(&self, word: u64, mut valid: impl FnMut(u64) -> bool) -> bool {
        let (at, len) = self.compressed(word);
        let cluster_size = self.layout.cluster_size();
        at < self.file_len
            && at < HOST_OFFSET_END
            && at >= cluster_size
            && clusters_of(at, len, cluster_size).all(|cluster| cluster >= self.file_len || valid(cluster))
    }

    /// First byte of a compressed cluster, and the bytes that may belong to it. Neither can overflow.
    pub(super) fn compressed(&self, word: u64) -> (u64, u64) {
        // 8 bits fewer than a cluster has, for what follows the first sector: 1 to 13 bits below bit 62.
        let offset_bits = 62 - (self.layout.cluster_bits - 8);
        let at = word & ((1 << offset_bits) - 1);
        let sectors = (word & (COMPRESSED - 1)) >> offset_bits;
        (at, (sectors + 1) * SECTOR_BYTES - at % SECTOR_BYTES)
    }

    /// What `lookup` says of a compressed cluster; `skip` bytes into it.
    pub(super) fn describe(&self, word: u64, skip: u64) -> Compressed {
        let (at, len) = self.compressed(word);
        Compressed { at, len: len.min(self.file_len.saturating_sub(at)), codec: self.codec, skip }
    }
}

/// The clusters of the file that a range touches: their offsets.
pub(super) fn clusters_of(at: u64, len: u64, cluster_size: u64) -> impl Iterator<Item = u64> {
    let first = at - at % cluster_size;
    (first..at.saturating_add(len)).step_by(crate::number::index(cluster_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(version: u32, cluster_bits: u32, extended_l2: bool, external_data: bool) -> Layout {
        Layout { version, cluster_bits, extended_l2, refcount_order: 4, external_data, image_size: 1 << 30 }
    }

    fn rules(layout: Layout) -> Rules {
        Rules { layout, codec: Codec::Deflate, file_len: 1 << 20 }
    }

    fn ok(layout: Layout, word: u64, bitmap: u64) -> bool {
        rules(layout).check(Raw { word, bitmap }, 1 << 16, |offset| offset < 1 << 20)
    }

    #[test]
    fn what_may_be_there() {
        let plain = layout(3, 16, false, false);
        for (word, good) in [
            (0, true),
            (COPIED, true),
            (1 << 16 | COPIED, true),
            (1 << 16, true),
            (1 << 16 | ZERO, true),
            (ZERO, true),
            (1 << 16 | 1 << 9, false),
            (1 << 20, false),
            (2, false),
            (1 << 56, false),
            (COMPRESSED, false),
            (COMPRESSED | 0x12345, true),
            (COMPRESSED | 1 << 20, false),
        ] {
            assert_eq!(ok(plain, word, 0), good, "{word:#x}");
        }
        assert!(!ok(plain, 1 << 16, 1));
        assert!(!ok(layout(2, 16, false, false), ZERO, 0), "version 2 has no zero flag");
    }

    #[test]
    fn bitmaps_that_may_be_there() {
        let extended = layout(3, 16, true, false);
        for (word, bitmap, good) in [
            (0, 0, true),
            (0, 0xff << 32, true),
            (0, 1, false),
            (1 << 16, 0xf0_0000_000f, true),
            (1 << 16, 0x1_0000_0001, false),
            (ZERO, 0, true),
            (1 << 16 | ZERO, 0xf0_0000_000f, true),
            (1 << 16 | 2, 0xf0_0000_000f, false),
            (COMPRESSED | 0x12345, 0, true),
            (COMPRESSED | 0x12345, 1, false),
        ] {
            assert_eq!(ok(extended, word, bitmap), good, "{word:#x} {bitmap:#x}");
        }
        // What QEMU reads as data was refused, and since then the image marked corrupt, with nothing for a check to mend.
        let entry = Entry::decode(Raw { word: 1 << 16 | COPIED | ZERO, bitmap: 3 << 32 | 4 }, &extended);
        assert_eq!(entry, Entry { place: Place::Own(1 << 16), data: 4, zero: 3 });
    }

    #[test]
    fn a_data_file_has_every_cluster_at_its_guest_offset() {
        let external = layout(3, 16, false, true);
        assert!(ok(external, 1 << 16 | COPIED, 0));
        assert!(!ok(external, 2 << 16 | COPIED, 0));
        assert!(!ok(external, COPIED, 0), "that is cluster 0");
        assert!(rules(external).check(Raw { word: COPIED, bitmap: 0 }, 0, |_| false));
        assert!(!ok(external, COMPRESSED | 0x12345, 0));
        let first = Entry::decode(Raw { word: COPIED, bitmap: 0 }, &external);
        assert_eq!(first, Entry { place: Place::Own(0), data: ALL, zero: 0 });
    }

    #[test]
    fn compressed_descriptors() {
        // x = 62 - (16 - 8) = 54.
        let rules = rules(layout(3, 16, false, false));
        let word = COMPRESSED | 3 << 54 | 0x50123;
        assert_eq!(rules.compressed(word), (0x50123, 4 * 512 - 0x123));
        let near_end = COMPRESSED | 100 << 54 | ((1 << 20) - 700);
        assert_eq!(rules.describe(near_end, 5).len, 700);
        assert_eq!(rules.describe(near_end, 5).skip, 5);
        let small = Rules { layout: layout(3, 9, false, false), ..rules };
        assert_eq!(small.compressed(COMPRESSED | 1 << 61 | 0x401), (0x401, 1023));
        let large = Rules { layout: layout(3, 21, false, false), ..rules };
        assert_eq!(large.compressed(COMPRESSED | 0x1fff << 49 | 0x401), (0x401, 0x2000 * 512 - 1));
        assert_eq!(clusters_of(0x50123, 0x20000, 0x10000).collect::<Vec<_>>(), [0x50000, 0x60000, 0x70000]);
    }

    #[test]
    fn what_is_decoded_is_encoded_again() {
        for (extended, words) in [(false, vec![0, ZERO, 1 << 16, 1 << 16 | COPIED, 1 << 16 | COPIED | ZERO])]
            .into_iter()
            .chain([(true, vec![0, 1 << 16, 1 << 16 | COPIED])])
        {
            let layout = layout(3, 16, extended, false);
            for word in words {
                let bitmap = if extended && word != 0 { 0xff00_0000_00ff } else { 0 };
                let raw = Raw { word, bitmap };
                assert_eq!(Entry::decode(raw, &layout).encode(&layout), raw, "{raw:x?}");
            }
        }
    }
}
