//! The refcount table of an image that is opened for writing: which blocks it names, where it lies, and where the image's space
//! ends.
//!
//! - An entry is bad that names no block: unaligned, reserved bits, past the end of the file, in the table or the L1 table, or a block
//!   that an earlier entry names. What it counts is not known.
//! - A bad entry that counts clusters of the file has the image marked corrupt at the first change ([`Found::bad_before`]). One that
//!   counts nothing but room behind the file does so when the file grows to there.
//!
//! Not here: refcounts (`refs`).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use readonce_storage::ReadAt;

use super::{
    chunks::read_padded,
    header::Header,
    layout::{L1_ENTRY_BYTES, Layout},
    refcount::{Refcounts, TABLE_OFFSET_MASK},
    slice::raw_entries,
};
use crate::{
    FormatError,
    number::{bytes, index},
};

/// Bytes of the table that are read at once.
const TABLE_READ_BYTES: u64 = 1 << 20;
/// Blocks past the end of the file that are read to see whether they count anything.
const FAR_BLOCKS_MAX: usize = 64;
/// In memory only: the table holds something that may not be there.
pub(super) const BAD: u64 = 1;

/// A refcount table in the file.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    /// Byte offset.
    pub(super) at: u64,
    pub(super) clusters: u64,
}

/// The refcounts of an image before it is known where its space ends.
pub(super) struct Found {
    /// Offsets of blocks, [`BAD`], or 0 where there is none.
    pub(super) table: Vec<u64>,
    /// What the file holds where an entry is bad.
    pub(super) bad: BTreeMap<u64, u64>,
    pub(super) stored: Stored,
    pub(super) layout: Layout,
}

impl Found {
    /// Reads the refcount table.
    pub(super) async fn read(file: &dyn ReadAt, header: &Header) -> Result<Self, FormatError> {
        let stored = Stored {
            at: header.fields.refcount_table_offset,
            clusters: header.fields.refcount_table_clusters.into(),
        };
        if stored.at == 0 || stored.clusters == 0 {
            return Err(FormatError::corrupt(
                "refcount_table_offset",
                stored.at,
                "must name a refcount table, of at least one cluster",
            ));
        }
        let (table, bad) = read_table(file, header).await?;
        Ok(Self { table, bad, stored, layout: header.layout })
    }

    /// Where table and blocks lie.
    pub(super) fn regions(&self) -> impl Iterator<Item = Range<u64>> {
        let cluster_size = self.layout.cluster_size();
        let table = self.stored.at..self.stored.at + self.stored.clusters * cluster_size;
        let blocks = self.table.iter().filter(|&&block| block > BAD);
        std::iter::once(table).chain(blocks.map(move |&block| block..block + cluster_size))
    }

    fn table_entry(&self, block: u64) -> u64 {
        self.table.get(index(block)).copied().unwrap_or_default()
    }

    /// The offset from which on no cluster has a refcount, and nothing lies: at least `end`, where the file's clusters end.
    pub(super) async fn free_from(&self, file: &dyn ReadAt, end: u64) -> Result<u64, FormatError> {
        let numbers = Refcounts::new(self.layout.cluster_bits, self.layout.refcount_order);
        let cluster_size = self.layout.cluster_size();
        let first = end / cluster_size;
        let block = numbers.table_index(first);
        // Blocks past the end: a crash, a repair, or a hostile image. Those that count nothing are no reason to begin far behind it.
        // Bad entries are none either: whoever grows to what they count is stopped there.
        let far = (block + 1..bytes(self.table.len())).rev().map(|index| (index, self.table_entry(index)));
        for (looked, (index, at)) in far.filter(|(_, at)| *at > BAD).enumerate() {
            let is_empty = looked < FAR_BLOCKS_MAX
                && read_padded(file, at, cluster_size).await?.iter().all(|&byte| byte == 0);
            if !is_empty {
                return Ok((index + 1) * numbers.block_span());
            }
        }
        let Some(&at) = self.table.get(index(block)).filter(|&&at| at > BAD) else { return Ok(end) };
        let from = numbers.byte_in_block(numbers.block_index(first));
        let skipped = from * 8 / u64::from(numbers.bits());
        let rest = read_padded(file, at + from, cluster_size - from).await?;
        let counted = (numbers.block_index(first) - skipped..numbers.per_block() - skipped)
            .rev()
            .find(|&at| numbers.refcount(&rest, at) != 0);
        let counted = counted.map(|at| (block * numbers.per_block() + skipped + at + 1) * cluster_size);
        Ok(counted.unwrap_or(end).max(end))
    }

    /// The first bad entry, if it counts a cluster before byte offset `end` or the one that begins there.
    pub(super) fn bad_before(&self, end: u64) -> Option<u64> {
        let numbers = Refcounts::new(self.layout.cluster_bits, self.layout.refcount_order);
        let last = numbers.table_index(end / self.layout.cluster_size());
        self.bad.keys().next().copied().filter(|&first| first <= last)
    }
}

/// What is said of entry `number`, which holds `raw`, where it is bad.
pub(super) fn bad_entry(number: u64, raw: Option<u64>) -> FormatError {
    FormatError::corrupt(
        format!("refcount table entry {number}"),
        raw.map_or_else(|| "missing".into(), |raw| format!("{raw:#x}")),
        "must be the offset of a refcount block inside the file that no other entry names",
    )
}

/// Reads the refcount table: the offsets of blocks, [`BAD`] where one may not be there, and what the file holds in those places.
async fn read_table(
    file: &dyn ReadAt,
    header: &Header,
) -> Result<(Vec<u64>, BTreeMap<u64, u64>), FormatError> {
    let layout = &header.layout;
    let l1 = header.fields.l1_table_offset;
    let l1 = l1..l1 + u64::from(header.fields.l1_size) * L1_ENTRY_BYTES;
    let len = u64::from(header.fields.refcount_table_clusters) * layout.cluster_size();
    let start = header.fields.refcount_table_offset;
    // What lies past the end of the file is zeros.
    let there = file.len().saturating_sub(start).min(len);
    let mut table = Vec::new();
    let mut bad = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut at = 0;
    while at < there {
        let part = (there - at).min(TABLE_READ_BYTES);
        let read = file.read(start + at, index(part)).await?;
        for raw in raw_entries(&read, false) {
            let block = raw.word & TABLE_OFFSET_MASK;
            // What the end of the file cuts off of its last cluster is zeros.
            let inside = block < file.len();
            // Writing a block there would destroy the other table.
            let meets = |table: &Range<u64>| {
                block < table.end && table.start < block.saturating_add(layout.cluster_size())
            };
            let alone = !meets(&l1) && !meets(&(start..start + len));
            let valid = raw.word == block && layout.valid_cluster(block) && inside && alone;
            table.push(match block {
                0 if raw.word == 0 => 0,
                block if valid && seen.insert(block) => block,
                _ => {
                    bad.insert(bytes(table.len()), raw.word);
                    BAD
                }
            });
        }
        at += part;
    }
    while table.last() == Some(&0) {
        table.pop();
    }
    Ok((table, bad))
}
