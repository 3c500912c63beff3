//! Layout: sizes, which entry of which table maps a guest byte, and which offsets of the file are valid.
//!
//! - A table of the L2 level is one cluster of 8- or 16-byte entries. It is read and cached in *slices* of at most 4 KiB; a
//!   table of a smaller cluster is one slice.
//! - A valid offset of a cluster in the file is a multiple of the cluster size, not 0, and ends at or below 2^56.
//! - None of the arithmetic can overflow for a [`Layout`] that the header's parser made: a guest ends below 2^62.
//!
//! Not here: where the tables lie, which changes while an image is open; I/O.

/// Bytes that a disk writes whole or not at all.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Bytes of an L1 entry, and of an entry of the refcount table.
pub(super) const L1_ENTRY_BYTES: u64 = 8;
/// Bytes of the largest piece in which L2 tables are read and cached.
pub(super) const SLICE_BYTES_MAX: u64 = 4096;
/// Subclusters of a cluster in an image with extended L2 entries.
pub(super) const SUBCLUSTERS: u64 = 32;

/// Smallest cluster, as a power of two.
pub(super) const CLUSTER_BITS_MIN: u32 = 9;
/// Largest cluster, as a power of two.
pub(super) const CLUSTER_BITS_MAX: u32 = 21;
/// Smallest cluster with extended L2 entries, as a power of two.
pub(super) const CLUSTER_BITS_EXTENDED_MIN: u32 = 14;
/// Bytes of the largest L1 table.
pub(super) const L1_BYTES_MAX: u64 = 32 << 20;
/// Bytes of the largest refcount table.
pub(super) const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// The largest refcount order: refcounts of 64 bits.
pub(super) const REFCOUNT_ORDER_MAX: u32 = 6;
/// The refcount order of version 2: refcounts of 16 bits.
pub(super) const REFCOUNT_ORDER_V2: u32 = 4;
/// Internal snapshots.
pub(super) const SNAPSHOTS_MAX: u32 = 65536;
/// Persistent bitmaps.
pub(super) const BITMAPS_MAX: u32 = 65535;
/// Where offsets that table entries hold end.
pub(super) const HOST_OFFSET_END: u64 = 1 << 56;

/// The sizes of one image. Every field was checked by the header's parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// 2 or 3. Version 2 has no zero flag, no feature bits and no autoclear bits.
    pub(super) version: u32,
    /// Of the cluster size, as a power of two; 9 to 21.
    pub(super) cluster_bits: u32,
    /// Whether L2 entries have 16 bytes, with a bitmap of subclusters.
    pub(super) extended_l2: bool,
    /// Of the bits of a refcount, as a power of two; 0 to 6.
    pub(super) refcount_order: u32,
    /// Whether guest data lies in a file of its own, each cluster at its guest offset.
    pub(super) external_data: bool,
    /// Bytes that the guest sees; a multiple of 512.
    pub(super) image_size: u64,
}

impl Layout {
    /// Bytes.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the smallest piece that can change its mapping: a subcluster, or a cluster where there are none.
    pub(super) fn fill_unit(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// Bytes of an L2 entry: 8 or 16.
    pub(super) fn entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of an L2 table; at most 2^18.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.entry_bytes()
    }

    /// Guest bytes that one L2 table maps; at most 2^39.
    pub(super) fn table_span(&self) -> u64 {
        self.l2_entries() * self.cluster_size()
    }

    /// Bytes of a slice: 512 to 4096; divides a table.
    pub(super) fn slice_bytes(&self) -> u64 {
        self.cluster_size().min(SLICE_BYTES_MAX)
    }

    /// Entries of a slice: 64 to 512.
    pub(super) fn slice_entries(&self) -> u64 {
        self.slice_bytes() / self.entry_bytes()
    }

    /// Slices of an L2 table: 1 to 512.
    pub(super) fn slices_per_table(&self) -> u64 {
        self.cluster_size() / self.slice_bytes()
    }

    /// Guest bytes that one slice maps; at most 2^30.
    pub(super) fn slice_span(&self) -> u64 {
        self.slice_entries() * self.cluster_size()
    }

    /// L1 entries that a guest of `size` bytes needs.
    pub(super) fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.table_span())
    }

    /// L1 entries that the guest's size uses; at most 2^22.
    pub(super) fn l1_entries_used(&self) -> u64 {
        self.l1_entries_for(self.image_size)
    }

    /// Index of the L1 entry whose table maps `guest`.
    pub(super) fn l1_index(&self, guest: u64) -> u64 {
        guest / self.table_span()
    }

    /// Number of the slice that maps `guest`, counted over the whole guest.
    pub(super) fn slice_index(&self, guest: u64) -> u64 {
        guest / self.slice_span()
    }

    /// First guest byte that a slice maps.
    pub(super) fn slice_guest(&self, slice_index: u64) -> u64 {
        slice_index.saturating_mul(self.slice_span())
    }

    /// Index within its slice of the entry that maps `guest`.
    pub(super) fn slice_entry(&self, guest: u64) -> u64 {
        guest / self.cluster_size() % self.slice_entries()
    }

    /// Byte offset of a slice within its L2 table.
    pub(super) fn slice_in_table(&self, slice_index: u64) -> u64 {
        slice_index % self.slices_per_table() * self.slice_bytes()
    }

    /// Index of the L1 entry whose table holds a slice.
    pub(super) fn slice_l1_index(&self, slice_index: u64) -> u64 {
        slice_index / self.slices_per_table()
    }

    /// Bits of a refcount: 1 to 64.
    pub(super) fn refcount_bits(&self) -> u64 {
        1 << self.refcount_order
    }

    /// Whether a table entry may point to a whole cluster of the image's own file at `offset`.
    pub(super) fn valid_cluster(&self, offset: u64) -> bool {
        self.valid_run(offset, 1)
    }

    /// Whether `clusters` clusters from `offset` may hold a table or data.
    pub(super) fn valid_run(&self, offset: u64, clusters: u64) -> bool {
        let end = clusters.checked_mul(self.cluster_size()).and_then(|len| offset.checked_add(len));
        offset != 0
            && offset.is_multiple_of(self.cluster_size())
            && end.is_some_and(|end| end <= HOST_OFFSET_END)
    }

    /// The largest guest that an L1 table of the largest size can map, in bytes; at most 2^61.
    pub(super) fn image_size_max(&self) -> u64 {
        L1_BYTES_MAX / L1_ENTRY_BYTES * self.table_span()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layouts() -> impl Iterator<Item = Layout> {
        let plain = (CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).map(|bits| (bits, false));
        let extended = (CLUSTER_BITS_EXTENDED_MIN..=CLUSTER_BITS_MAX).map(|bits| (bits, true));
        plain.chain(extended).map(|(cluster_bits, extended_l2)| {
            let mut layout = Layout {
                version: 3,
                cluster_bits,
                extended_l2,
                refcount_order: 4,
                external_data: false,
                image_size: 0,
            };
            layout.image_size = layout.image_size_max();
            layout
        })
    }

    #[test]
    fn a_slice_divides_its_table_and_an_entry_its_slice() {
        for layout in layouts() {
            assert_eq!(layout.slice_bytes() * layout.slices_per_table(), layout.cluster_size());
            assert_eq!(layout.slice_span() * layout.slices_per_table(), layout.table_span());
            assert!((64..=512).contains(&layout.slice_entries()), "{layout:?}");
            assert!(layout.fill_unit() >= SECTOR_BYTES, "{layout:?}");
        }
    }

    #[test]
    fn the_last_byte_of_the_largest_guest_is_in_the_last_entry() {
        for layout in layouts() {
            let last = layout.image_size - 1;
            assert_eq!(layout.l1_index(last), L1_BYTES_MAX / L1_ENTRY_BYTES - 1);
            assert_eq!(layout.slice_l1_index(layout.slice_index(last)), layout.l1_index(last));
            let in_table = layout.slice_in_table(layout.slice_index(last));
            let entry = layout.slice_entry(last) * layout.entry_bytes();
            assert_eq!(in_table + entry, layout.cluster_size() - layout.entry_bytes());
            assert!(layout.image_size <= 1 << 61);
        }
    }

    #[test]
    fn a_small_cluster_by_hand() {
        let layout = Layout {
            version: 3,
            cluster_bits: 9,
            extended_l2: false,
            refcount_order: 0,
            external_data: false,
            image_size: 1 << 20,
        };
        assert_eq!(layout.l2_entries(), 64);
        assert_eq!(layout.table_span(), 32768);
        assert_eq!(layout.l1_entries_used(), 32);
        assert_eq!((layout.l1_index(40000), layout.slice_entry(40000)), (1, 14));
        assert_eq!(layout.image_size_max(), 128 << 30);
    }

    #[test]
    fn valid_offsets() {
        let layout = layouts().find(|layout| layout.cluster_bits == 16).unwrap();
        for (offset, clusters, valid) in [
            (0, 1, false),
            (65536, 1, true),
            (65537, 1, false),
            (HOST_OFFSET_END - 65536, 1, true),
            (HOST_OFFSET_END - 65536, 2, false),
            (HOST_OFFSET_END, 1, false),
            (65536, u64::MAX, false),
            (u64::MAX - 65535, 1, false),
        ] {
            assert_eq!(layout.valid_run(offset, clusters), valid, "{offset:#x} {clusters}");
        }
    }
}
