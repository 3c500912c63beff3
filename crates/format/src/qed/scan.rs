//! Scan: every entry of every table, read from the file, and a bitmap of the clusters that they use.
//!
//! - Tables are marked before data, so that a data entry that points into a table is the one that is wrong.
//! - An L2 table that shares a cluster with what is marked already is not walked: the work stays below the file's length
//!   however often the L1 table names it.
//! - Memory: the bitmap, one bit for each cluster of the file (at most [`CLUSTERS_MAX`]), and one chunk of a table. Memory
//!   of the bitmap is touched only where clusters are used.
//!
//! Not here: what to do about what is found (`check`, `repair`, `reclaim`).

use readonce_storage::ReadAt;

use super::{
    layout::{ENTRY_BYTES, Layout},
    slice::{ZERO, raw_entries},
};
use crate::{
    FormatError,
    number::{bytes, index},
};

/// Clusters of the largest file that can be scanned: its bitmap takes 512 MiB.
pub(super) const CLUSTERS_MAX: u64 = 1 << 32;
/// Bytes of a table that are read at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// One bit for each cluster of the file.
pub(super) struct Bitmap {
    words: Vec<u64>,
    clusters: u64,
}

impl Bitmap {
    pub(super) fn new(clusters: u64) -> Result<Self, FormatError> {
        if clusters > CLUSTERS_MAX {
            return Err(FormatError::Unsupported(format!(
                "the file has {clusters} clusters, at most {CLUSTERS_MAX} can be checked"
            )));
        }
        Ok(Self { words: vec![0; index(clusters.div_ceil(64))], clusters })
    }

    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    pub(super) fn is_set(&self, cluster: u64) -> bool {
        self.words.get(index(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// Marks a cluster; says whether it was free.
    pub(super) fn set(&mut self, cluster: u64) -> bool {
        let mask = 1 << (cluster % 64);
        match self.words.get_mut(index(cluster / 64)) {
            Some(word) => {
                let free = *word & mask == 0;
                *word |= mask;
                free
            }
            None => false,
        }
    }

    pub(super) fn clear(&mut self, cluster: u64) {
        if let Some(word) = self.words.get_mut(index(cluster / 64)) {
            *word &= !(1 << (cluster % 64));
        }
    }

    /// Makes the map longer.
    pub(super) fn grow(&mut self, clusters: u64) {
        self.clusters = self.clusters.max(clusters);
        self.words.resize(index(self.clusters.div_ceil(64)), 0);
    }

    /// Clusters from `start` on that are marked.
    pub(super) fn count_set(&self, start: u64) -> u64 {
        let mut count = 0;
        for (at, word) in (0..).zip(&self.words) {
            let first = at * 64;
            let word = match start.saturating_sub(first) {
                skip @ 0..64 => word >> skip,
                _ => 0,
            };
            count += u64::from(word.count_ones());
        }
        count
    }

    /// The first free cluster at or after `start`.
    pub(super) fn next_free(&self, start: u64) -> Option<u64> {
        let mut at = start;
        while at < self.clusters {
            let word = self.words.get(index(at / 64)).copied()?;
            let free = !word >> (at % 64);
            if free != 0 {
                let found = at + u64::from(free.trailing_zeros());
                return (found < self.clusters).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The first marked cluster at or after `start`.
    pub(super) fn next_set(&self, start: u64) -> Option<u64> {
        let mut at = start;
        while at < self.clusters {
            let word = self.words.get(index(at / 64)).copied()? >> (at % 64);
            if word != 0 {
                return Some(at + u64::from(word.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The last marked cluster below `end`.
    pub(super) fn last_set(&self, end: u64) -> Option<u64> {
        let mut end = end.min(self.clusters);
        while end > 0 {
            let at = end - 1;
            let word = self.words.get(index(at / 64)).copied()? << (63 - at % 64);
            if word != 0 {
                return Some(at - u64::from(word.leading_zeros()));
            }
            end = at / 64 * 64;
        }
        None
    }
}

/// Where an entry lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Entry of the L1 table.
    L1(u64),
    /// Entry of the L2 table that an L1 entry names.
    L2 {
        /// Index of the L1 entry.
        l1_index: u64,
        /// Byte offset of the table.
        table: u64,
        /// Index in the L2 table.
        l2_index: u64,
    },
}

impl Place {
    /// Byte offset of the entry in the file.
    pub(super) fn offset(&self, layout: &Layout) -> u64 {
        match *self {
            Self::L1(l1_index) => layout.l1_offset + l1_index * ENTRY_BYTES,
            Self::L2 { table, l2_index, .. } => table + l2_index * ENTRY_BYTES,
        }
    }
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It holds what may not be there.
    Invalid,
    /// It refers to clusters that something else uses; so many of them.
    Double(u64),
}

/// What an offset past the end of the file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beyond {
    /// Wrong, as everywhere.
    Wrong,
    /// New: the image is in use, and only clusters below this end (bytes) are looked at.
    New(u64),
}

/// What a scan saw.
pub(super) struct Scanned {
    pub(super) used: Bitmap,
    /// Data clusters, once for each entry.
    pub(super) allocated: u64,
    /// Data entries that do not lie behind their predecessor in the table.
    pub(super) fragmented: u64,
    /// Reads that failed.
    pub(super) check_errors: u64,
    /// The first that is wrong, in words.
    pub(super) first_wrong: Option<String>,
}

impl Scanned {
    /// Clusters that nothing uses.
    pub(super) fn leaks(&self, layout: &Layout) -> u64 {
        let first = layout.header_bytes / layout.cluster_size;
        self.used.clusters().saturating_sub(first) - self.used.count_set(first)
    }
}

/// Every entry of a table, in chunks: `entries` is called with the index of the first, and the entries as they are.
struct Chunks<'a> {
    file: &'a dyn ReadAt,
    table: u64,
    table_bytes: u64,
    at: u64,
}

impl<'a> Chunks<'a> {
    fn new(file: &'a dyn ReadAt, layout: &Layout, table: u64) -> Self {
        Self { file, table, table_bytes: layout.table_bytes(), at: 0 }
    }

    /// Goes on with the chunk that holds this entry, if it lies ahead.
    fn skip_to(&mut self, index: u64) {
        let chunk = index.saturating_mul(ENTRY_BYTES) / CHUNK_BYTES * CHUNK_BYTES;
        self.at = self.at.max(chunk);
    }

    /// Index of the first entry of the next chunk.
    fn index(&self) -> u64 {
        self.at / ENTRY_BYTES
    }

    /// The next chunk: index of its first entry, and the entries that are not 0 with their index.
    async fn next(&mut self) -> Option<Result<Vec<(u64, u64)>, std::io::Error>> {
        let left = self.table_bytes.checked_sub(self.at).filter(|&left| left > 0)?;
        let len = left.min(CHUNK_BYTES);
        let first = self.at / ENTRY_BYTES;
        let read = self.file.read(self.table + self.at, index(len)).await;
        self.at += len;
        Some(read.map(|read| (first..).zip(raw_entries(&read)).filter(|&(_, raw)| raw != 0).collect()))
    }
}

/// Marks the clusters of a run; says how many were marked already.
fn mark(used: &mut Bitmap, layout: &Layout, offset: u64, clusters: u64) -> u64 {
    let first = offset / layout.cluster_size;
    bytes((first..first + clusters).filter(|&cluster| !used.set(cluster)).count())
}

/// Reads all tables. `wrong` is told of each wrong entry, `seen` of each good one (its place and what it holds).
pub(super) async fn scan(
    file: &dyn ReadAt,
    layout: &Layout,
    beyond: Beyond,
    mut wrong: impl FnMut(Place, u64, Wrong),
    mut seen: impl FnMut(Place, u64),
) -> Result<Scanned, FormatError> {
    let file_len = match beyond {
        Beyond::Wrong => file.len(),
        Beyond::New(end) => end,
    };
    let is_new = |offset: u64| beyond != Beyond::Wrong && offset >= layout.whole_clusters_end(file_len);
    let used = Bitmap::new(layout.whole_clusters_end(file_len) / layout.cluster_size)?;
    let mut scanned = Scanned { used, allocated: 0, fragmented: 0, check_errors: 0, first_wrong: None };
    let mut note = |first: &mut Option<String>, place: Place, raw: u64, finding: Wrong| {
        first.get_or_insert_with(|| format!("{place:?} holds {raw:#x}: {finding:?}"));
        wrong(place, raw, finding);
    };
    mark(&mut scanned.used, layout, layout.l1_offset, layout.table_size);

    // Tables that are whole and nobody else's: one bit for each L1 entry that names one.
    let mut good = Bitmap::new(layout.table_entries())?;
    let mut l1 = Chunks::new(file, layout, layout.l1_offset);
    while let Some(chunk) = l1.next().await {
        let Ok(chunk) = chunk else {
            scanned.check_errors += 1;
            continue;
        };
        for (l1_index, table) in chunk {
            let place = Place::L1(l1_index);
            if is_new(table) {
                // Its data is below the end nowhere: room is handed out after the table.
                continue;
            }
            if !layout.valid_l2(table, file_len) {
                // An L2 table that would lie on the L1 table is one of these.
                note(&mut scanned.first_wrong, place, table, Wrong::Invalid);
                continue;
            }
            let shared = mark(&mut scanned.used, layout, table, layout.table_size);
            if shared > 0 {
                note(&mut scanned.first_wrong, place, table, Wrong::Double(shared));
                continue;
            }
            good.set(l1_index);
            seen(place, table);
        }
        tokio::task::yield_now().await;
    }

    // Only the parts that name a table: an L1 table may be 1 GiB of nothing.
    let mut l1 = Chunks::new(file, layout, layout.l1_offset);
    while let Some(next) = good.next_set(l1.index()) {
        l1.skip_to(next);
        let Some(chunk) = l1.next().await else { break };
        let Ok(chunk) = chunk else {
            // Counted in the first walk already, unless this read alone failed.
            scanned.check_errors = scanned.check_errors.max(1);
            continue;
        };
        for (l1_index, table) in chunk.into_iter().filter(|&(l1_index, _)| good.is_set(l1_index)) {
            // The file may be in use: what changed since the first walk is not walked.
            if !layout.valid_l2(table, file_len) {
                continue;
            }
            let mut last = None;
            let mut l2 = Chunks::new(file, layout, table);
            while let Some(chunk) = l2.next().await {
                let Ok(chunk) = chunk else {
                    scanned.check_errors += 1;
                    continue;
                };
                for (l2_index, offset) in chunk {
                    if offset == ZERO {
                        continue;
                    }
                    let place = Place::L2 { l1_index, table, l2_index };
                    scanned.allocated += 1;
                    if last.is_some_and(|last: u64| last.checked_add(layout.cluster_size) != Some(offset)) {
                        scanned.fragmented += 1;
                    }
                    last = Some(offset);
                    if is_new(offset) {
                        continue;
                    }
                    if !layout.valid_cluster(offset, file_len) {
                        note(&mut scanned.first_wrong, place, offset, Wrong::Invalid);
                    } else if mark(&mut scanned.used, layout, offset, 1) > 0 {
                        note(&mut scanned.first_wrong, place, offset, Wrong::Double(1));
                    } else {
                        seen(place, offset);
                    }
                }
                tokio::task::yield_now().await;
            }
        }
    }
    Ok(scanned)
}
