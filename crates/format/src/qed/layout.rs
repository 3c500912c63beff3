//! Layout: where clusters, tables and entries lie, and which offsets are valid.
//!
//! - `N = table_size * cluster_size / 8` entries in every table, L1 and L2 alike. `N` is a multiple of 512, so that a
//!   4 KiB *slice* of 512 entries never straddles two tables.
//! - A valid data offset is a multiple of the cluster size, at or after the header area, and its whole cluster lies below
//!   the end of the file rounded **down** to a cluster. A valid table offset has every cluster valid.
//!
//! Not here: I/O.

use crate::number::round_down;

/// Bytes of a table entry.
pub(super) const ENTRY_BYTES: u64 = 8;
/// Entries of a slice, the piece in which tables are read and cached: 4 KiB.
pub(super) const SLICE_ENTRIES: u64 = 512;
/// Bytes of a slice.
pub(super) const SLICE_BYTES: u64 = SLICE_ENTRIES * ENTRY_BYTES;
/// Bytes that a disk writes whole or not at all; a multiple of the guest's and of every table's.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Smallest cluster, bytes.
pub(super) const CLUSTER_SIZE_MIN: u64 = 4096;
/// Largest cluster, bytes.
pub(super) const CLUSTER_SIZE_MAX: u64 = 64 << 20;
/// Largest table, clusters.
pub(super) const TABLE_SIZE_MAX: u64 = 16;
/// Largest guest, bytes, whatever the tables could hold: offsets of files are signed 64-bit numbers.
const IMAGE_SIZE_MAX: u64 = (1 << 63) - SECTOR_BYTES;

const _: () = assert!(CLUSTER_SIZE_MIN.is_multiple_of(SLICE_BYTES));

/// The sizes of one image. Every field was checked by the header's parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes; a power of two.
    pub(super) cluster_size: u64,
    /// Clusters of a table; a power of two.
    pub(super) table_size: u64,
    /// Bytes before the first regular cluster.
    pub(super) header_bytes: u64,
    /// Bytes from the start of the file.
    pub(super) l1_offset: u64,
    /// Bytes that the guest sees.
    pub(super) image_size: u64,
}

impl Layout {
    pub(super) fn table_bytes(&self) -> u64 {
        self.table_size * self.cluster_size
    }

    /// Entries of a table; at most 2^27.
    pub(super) fn table_entries(&self) -> u64 {
        self.table_bytes() / ENTRY_BYTES
    }

    /// Guest bytes that one L2 table maps; at most 2^53.
    pub(super) fn table_span(&self) -> u64 {
        self.table_entries() * self.cluster_size
    }

    /// Guest bytes that one L2 slice maps; at most 2^35.
    pub(super) fn slice_span(&self) -> u64 {
        SLICE_ENTRIES * self.cluster_size
    }

    /// L1 entries that the guest's size uses. At most 2^21: the guest ends below 2^63, and where tables are small the
    /// tables' own limit is lower.
    pub(super) fn l1_entries_used(&self) -> u64 {
        self.image_size.div_ceil(self.table_span())
    }

    pub(super) fn l1_index(&self, guest: u64) -> u64 {
        guest / self.table_span()
    }

    /// Number of the slice, counted over the whole guest.
    pub(super) fn slice_index(&self, guest: u64) -> u64 {
        guest / self.slice_span()
    }

    /// Index within its slice of the entry that maps `guest`.
    pub(super) fn slice_entry(&self, guest: u64) -> u64 {
        guest / self.cluster_size % SLICE_ENTRIES
    }

    /// Byte offset of a slice within its L2 table.
    pub(super) fn slice_in_table(&self, slice_index: u64) -> u64 {
        slice_index % (self.table_entries() / SLICE_ENTRIES) * SLICE_BYTES
    }

    /// L1 index of the table that holds a slice.
    pub(super) fn slice_l1_index(&self, slice_index: u64) -> u64 {
        slice_index / (self.table_entries() / SLICE_ENTRIES)
    }

    /// End of the last whole cluster of a file of `file_len` bytes.
    pub(super) fn whole_clusters_end(&self, file_len: u64) -> u64 {
        round_down(file_len, self.cluster_size)
    }

    /// Whether `clusters` clusters from `offset` may be used in a file of `file_len` bytes.
    fn valid_run(&self, offset: u64, clusters: u64, file_len: u64) -> bool {
        let Some(end) = clusters.checked_mul(self.cluster_size).and_then(|len| offset.checked_add(len))
        else {
            return false;
        };
        offset.is_multiple_of(self.cluster_size)
            && offset >= self.header_bytes
            && end <= self.whole_clusters_end(file_len)
    }

    /// Whether a data cluster may lie at `offset`. The L1 table is never data.
    pub(super) fn valid_cluster(&self, offset: u64, file_len: u64) -> bool {
        self.valid_run(offset, 1, file_len) && !self.meets_l1(offset, self.cluster_size)
    }

    /// Whether an L2 table may lie at `offset`.
    pub(super) fn valid_l2(&self, offset: u64, file_len: u64) -> bool {
        self.valid_run(offset, self.table_size, file_len) && !self.meets_l1(offset, self.table_bytes())
    }

    /// Whether the L1 table may lie where the header says.
    pub(super) fn valid_l1(&self, file_len: u64) -> bool {
        self.valid_run(self.l1_offset, self.table_size, file_len)
    }

    fn meets_l1(&self, offset: u64, len: u64) -> bool {
        offset < self.l1_offset.saturating_add(self.table_bytes())
            && self.l1_offset < offset.saturating_add(len)
    }
}

/// The largest guest that tables of `table_size` clusters of `cluster_size` bytes can map, in bytes. The product needs 128 bits:
/// at 16 MiB and 16 clusters it is 2^80.
pub(super) fn image_size_max(cluster_size: u64, table_size: u64) -> u64 {
    let entries = u128::from(table_size) * u128::from(cluster_size) / u128::from(ENTRY_BYTES);
    let max = entries * entries * u128::from(cluster_size);
    u64::try_from(max).map_or(IMAGE_SIZE_MAX, |max| max.min(IMAGE_SIZE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_guest() {
        assert_eq!(image_size_max(65536, 4), 64 << 40);
        assert_eq!(image_size_max(4096, 1), 1 << 30);
        assert_eq!(image_size_max(16 << 20, 16), IMAGE_SIZE_MAX);
        assert_eq!(image_size_max(CLUSTER_SIZE_MAX, TABLE_SIZE_MAX), IMAGE_SIZE_MAX);
    }

    #[test]
    fn l1_memory_is_bounded() {
        let mut most = 0;
        for cluster_bits in 12..=26 {
            for table_bits in 0..=4 {
                let layout = Layout {
                    cluster_size: 1 << cluster_bits,
                    table_size: 1 << table_bits,
                    header_bytes: 1 << cluster_bits,
                    l1_offset: 1 << cluster_bits,
                    image_size: image_size_max(1 << cluster_bits, 1 << table_bits),
                };
                most = most.max(layout.l1_entries_used());
            }
        }
        assert_eq!(most, 1 << 21);
    }
}
