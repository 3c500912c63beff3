//! Refcounts: how many things use each cluster, as the file stores it. Pure.
//!
//! - The refcount *table* names refcount *blocks*, each one cluster long. A block holds the refcounts of as many
//!   neighbouring clusters as fit, each 2^order bits wide (order 0 to 6); bits narrower than a byte count from the byte's
//!   lowest bit, wider ones are big-endian. Where the table names no block, or ends, every refcount is 0.
//! - Blocks and table are clusters with a refcount too: [`Refcounts::structure`] counts them in.
//!
//! Not here: I/O, and what references a cluster (`scan`).

use crate::number::index;

/// Bytes of an entry of the refcount table.
pub(super) const TABLE_ENTRY_BYTES: u64 = 8;
/// The bits of a table entry that hold the offset of its block.
pub(super) const TABLE_OFFSET_MASK: u64 = !0x1ff;
/// Bytes of the longest refcount table: what QEMU opens.
pub(super) const TABLE_BYTES_MAX: u64 = 8 << 20;
/// The widest refcount is 2^6 bits.
pub(super) const ORDER_MAX: u32 = 6;

/// The geometry of one image's refcounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refcounts {
    cluster_bits: u32,
    order: u32,
}

/// How large blocks and table are that count a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Structure {
    /// Refcount blocks, of one cluster each.
    pub(super) blocks: u64,
    /// Clusters of the refcount table; at least 1.
    pub(super) table_clusters: u64,
}

impl Structure {
    /// Clusters of both.
    pub(super) fn clusters(&self) -> u64 {
        self.blocks + self.table_clusters
    }
}

impl Refcounts {
    /// For clusters of `1 << cluster_bits` bytes (9 to 21) and refcounts of `1 << order` bits (`order` 0 to 6).
    pub(super) fn new(cluster_bits: u32, order: u32) -> Self {
        assert!((9..=21).contains(&cluster_bits));
        assert!(order <= ORDER_MAX);
        Self { cluster_bits, order }
    }

    /// Bytes of a cluster, and so of a block.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bits of a refcount: 1 to 64.
    pub(super) fn bits(&self) -> u32 {
        1 << self.order
    }

    /// The largest refcount that can be stored.
    pub(super) fn max(&self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Refcounts in a block: 2^6 to 2^24.
    pub(super) fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// Bytes of the file that one block counts.
    pub(super) fn block_span(&self) -> u64 {
        self.per_block() << self.cluster_bits
    }

    /// Entries in one cluster of the table.
    pub(super) fn per_table_cluster(&self) -> u64 {
        self.cluster_size() / TABLE_ENTRY_BYTES
    }

    /// Index in the table of the block that counts `cluster`.
    pub(super) fn table_index(&self, cluster: u64) -> u64 {
        cluster / self.per_block()
    }

    /// Index of `cluster`'s refcount in its block.
    pub(super) fn block_index(&self, cluster: u64) -> u64 {
        cluster % self.per_block()
    }

    /// The byte of the block in which the refcount at `index` begins.
    pub(super) fn byte_in_block(&self, index: u64) -> u64 {
        // At most 2^24 * 2^6.
        index * u64::from(self.bits()) / 8
    }

    /// The refcount at `at` in a block's bytes; 0 past their end.
    pub(super) fn refcount(&self, block: &[u8], at: u64) -> u64 {
        let start = index(self.byte_in_block(at));
        if self.order < 3 {
            let shift = at * u64::from(self.bits()) % 8;
            return block.get(start).map_or(0, |&byte| u64::from(byte) >> shift & self.max());
        }
        let width = index(u64::from(self.bits() / 8));
        block
            .get(start..start + width)
            .map_or(0, |field| field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// Sets the refcount at `at` in a block's bytes, which hold it. `value` is at most [`Refcounts::max`].
    pub(super) fn set_refcount(&self, block: &mut [u8], at: u64, value: u64) {
        assert!(value <= self.max());
        let start = index(self.byte_in_block(at));
        if self.order < 3 {
            let shift = at * u64::from(self.bits()) % 8;
            let byte = block.get_mut(start).expect("a block holds its refcounts");
            let kept = u64::from(*byte) & !(self.max() << shift);
            [*byte] = u8::to_be_bytes(u8::try_from(kept | value << shift).expect("below a byte's width"));
            return;
        }
        let width = index(u64::from(self.bits() / 8));
        let field = block.get_mut(start..start + width).expect("a block holds its refcounts");
        let value = value.to_be_bytes();
        let from = value.len() - width;
        field.copy_from_slice(value.get(from..).expect("at most 8 bytes wide"));
    }

    /// Blocks and table that count `others` clusters and themselves, from the start of the file on without a gap. `None`
    /// where the table would be longer than [`TABLE_BYTES_MAX`].
    pub(super) fn structure(&self, others: u64) -> Option<Structure> {
        let mut found = Structure { blocks: 0, table_clusters: 1 };
        loop {
            let clusters = others.checked_add(found.clusters())?;
            let blocks = clusters.div_ceil(self.per_block());
            let table_clusters = blocks.div_ceil(self.per_table_cluster()).max(1);
            if table_clusters > self.table_clusters_max() {
                return None;
            }
            if (blocks, table_clusters) == (found.blocks, found.table_clusters) {
                return Some(found);
            }
            // Both only grow, and are bounded by the limit of the table.
            found = Structure { blocks, table_clusters };
        }
    }

    /// Clusters of the longest table.
    pub(super) fn table_clusters_max(&self) -> u64 {
        TABLE_BYTES_MAX >> self.cluster_bits
    }

    /// A block that holds these refcounts (index in the block, and value), and 0 elsewhere.
    pub(super) fn block(&self, values: impl Iterator<Item = (u64, u64)>) -> Vec<u8> {
        let mut block = vec![0; index(self.cluster_size())];
        values.for_each(|(at, value)| self.set_refcount(&mut block, at, value));
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = Refcounts> {
        (9..=21)
            .flat_map(|cluster_bits| (0..=ORDER_MAX).map(move |order| Refcounts::new(cluster_bits, order)))
    }

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=ORDER_MAX {
            let refcounts = Refcounts::new(9, order);
            assert_eq!(refcounts.per_block(), (512 * 8) >> order);
            let mut block = vec![0; 512];
            let mut model = vec![0_u64; refcounts.per_block() as usize];
            let mut random = 1_u64;
            for _ in 0..4000 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (random >> 33) % refcounts.per_block();
                let value = random.rotate_left(17) & refcounts.max();
                refcounts.set_refcount(&mut block, at, value);
                model[at as usize] = value;
            }
            let found: Vec<u64> =
                (0..refcounts.per_block()).map(|at| refcounts.refcount(&block, at)).collect();
            assert_eq!(found, model, "order {order}");
            assert_eq!(refcounts.refcount(&block, refcounts.per_block()), 0, "past the end");
        }
    }

    #[test]
    fn bytes_as_the_specification_draws_them() {
        let mut block = vec![0; 512];
        Refcounts::new(9, 0).set_refcount(&mut block, 9, 1);
        Refcounts::new(9, 1).set_refcount(&mut block, 9, 2);
        Refcounts::new(9, 2).set_refcount(&mut block, 9, 0xa);
        assert_eq!(block[..5], [0, 2, 2 << 2, 0, 0xa << 4]);
        Refcounts::new(9, 4).set_refcount(&mut block, 4, 0x1234);
        Refcounts::new(9, 6).set_refcount(&mut block, 2, 0x0102_0304_0506_0708);
        assert_eq!(block[8..10], [0x12, 0x34]);
        assert_eq!(block[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Refcounts::new(9, 6).max(), u64::MAX);
        assert_eq!(Refcounts::new(9, 0).max(), 1);
    }

    #[test]
    fn a_structure_counts_itself_and_no_more() {
        for refcounts in all() {
            let per_block = refcounts.per_block();
            for others in [0, 1, 3, per_block - 2, per_block - 1, per_block, per_block * 65, per_block * 1000]
            {
                let found = refcounts.structure(others).unwrap();
                assert!(found.blocks * per_block >= others + found.clusters());
                assert!(found.table_clusters * refcounts.per_table_cluster() >= found.blocks);
                // One block less would not do.
                assert!((found.blocks - 1) * per_block < others + found.clusters());
            }
            let entries_max = TABLE_BYTES_MAX / TABLE_ENTRY_BYTES;
            assert_eq!(refcounts.structure(entries_max * refcounts.per_block()), None);
            assert_eq!(refcounts.structure(u64::MAX), None);
        }
    }
}
