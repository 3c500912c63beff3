//! Scan: everything in the file that refers to clusters, and how often each cluster is referred to.
//!
//! - Header, active L1 table, snapshots' L1 tables, L2 tables, data and compressed clusters, snapshot table, bitmaps, refcount
//!   table, refcount blocks. What lies past the end of the file reads as zeros.
//! - Every L2 table is read once, however many L1 entries name it: what is found in it counts as often as it is named. L1
//!   tables that overlap are read once too. So the work stays below the length of the tables, and [`WALK_BYTES_MAX`].
//! - Memory: that of the counts; one entry for each L2 table (at most [`TABLES_MAX`]); one chunk of a table.
//!
//! Not here: what an entry says (`judge`), the counts themselves (`counts`), what the file says the refcounts are (`check`), and what to do about what is
//! found (`repair`).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use bytes::Bytes;
use readonce_storage::ReadAt;

use super::{
    bitmaps::count_bitmaps,
    chunks::{Chunks, read_padded, words},
    counts::Counts,
    header::Header,
    judge::{Cluster, Entry, WrongEntry, entries, l1_entry, l2_entry},
    layout::{L1_BYTES_MAX, L1_ENTRY_BYTES, Layout, SECTOR_BYTES},
    refcount::{Refcounts, TABLE_ENTRY_BYTES, TABLE_OFFSET_MASK},
    snapshots,
};
use crate::{
    Finding, FormatError,
    number::{bytes, round_down, round_up},
};

/// Clusters of the largest file that can be scanned: what QEMU checks.
pub(super) const CLUSTERS_MAX: u64 = 1 << 31;
/// L2 tables.
pub(super) const TABLES_MAX: usize = 1 << 22;
/// Bytes of tables that one scan reads; L2 tables of a 512 TiB guest with clusters of 64 KiB.
const WALK_BYTES_MAX: u64 = 64 << 30;

/// How often an L2 table is named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Named {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By all L1 tables.
    pub(super) total: u64,
}

/// What looks at a scan from outside.
pub(super) trait Observer: Send {
    /// Anything that is wrong, in the order in which it is met.
    fn found(&mut self, _finding: Finding) {}
    /// An L1 entry that is wrong.
    fn wrong_l1(&mut self, _wrong: WrongEntry) {}
    /// An L2 entry that is wrong.
    fn wrong_l2(&mut self, _wrong: WrongEntry) {}
    /// A good L1 entry whose table is named more often than the largest refcount says.
    fn over_l1(&mut self, _at: u64, _raw: u64) {}
    /// A good entry of the active L1 table whose table an earlier one names too.
    fn twice_l1(&mut self, _at: u64, _raw: u64) {}
    /// A good L2 entry that names room or compressed bytes inside the file, in a table that is named so often. `over`: more often
    /// than the largest refcount says.
    fn l2(&mut self, _entry: Entry, _cluster: Cluster, _named: Named, _over: bool, _scanned: &Scanned) {}
}

/// Looks at nothing.
pub(super) struct Nobody;

impl Observer for Nobody {}

/// What a scan saw.
pub(super) struct Scanned {
    /// References; from [`scan`], those of the refcount table and of its blocks included.
    pub(super) counts: Counts,
    /// The refcount table as it lies in the file.
    pub(super) table: Vec<u64>,
    /// L2 tables, by byte offset.
    pub(super) tables: BTreeMap<u64, Named>,
    /// Snapshots, as the file has them.
    pub(super) snapshots: snapshots::Table,
    /// Snapshots whose L1 table cannot be where the entry says; by index.
    pub(super) bad_snapshots: BTreeSet<usize>,
    /// Whether a snapshot's entry lacks what version 3 asks for.
    pub(super) short_snapshots: bool,
    /// Whether the bitmaps' directory or a table of theirs is wrong.
    pub(super) bad_bitmaps: bool,
    /// Whether something is wrong that may have meant clusters which seem to be leaked.
    pub(super) lost: bool,
    /// Entries that are wrong.
    pub(super) corruptions: u64,
    /// Reads that failed.
    pub(super) check_errors: u64,
    /// Data clusters of the active state.
    pub(super) allocated: u64,
    /// Of those, the ones not next to their predecessor.
    pub(super) fragmented: u64,
    /// Of those, the compressed ones.
    pub(super) compressed: u64,
    /// Clusters of the file.
    pub(super) clusters: u64,
    /// Runs of bytes, in whole clusters, that hold tables other than L2 tables, the refcount table and its blocks: start and end.
    metadata: BTreeMap<u64, u64>,
    /// Where refcount blocks may lie: byte offsets.
    block_offsets: BTreeSet<u64>,
    /// Bytes of the refcount table, as far as the file's length needs one. It may be said to be longer than it is.
    table_range: Range<u64>,
    /// Bytes, in whole sectors.
    pub(super) file_len: u64,
    cluster_bits: u32,
    /// What did not fit below the largest refcount, of the references counted last.
    pub(super) over: u64,
    /// Bytes of tables that were read.
    walked: u64,
    /// Bytes of unaligned tables that may still be read. They can overlap, so their number alone bounds no work.
    unaligned_left: u64,
}

impl Scanned {
    /// Counts references to all clusters that `size` bytes at `offset` touch. `false`: they end a cluster or more past the file's
    /// end, which counts as a corruption for each time.
    pub(super) fn refer(
        &mut self,
        offset: u64,
        size: u64,
        times: u64,
        observer: &mut dyn Observer,
    ) -> Result<bool, FormatError> {
        self.over = 0;
        if size == 0 {
            return Ok(true);
        }
        let end_max = self.file_len.saturating_add(1 << self.cluster_bits);
        let Some(end) = offset.checked_add(size).filter(|&end| end < end_max) else {
            observer.found(Finding::PastEnd { offset, size });
            self.wrong(times);
            return Ok(false);
        };
        for cluster in offset >> self.cluster_bits..=(end - 1) >> self.cluster_bits {
            let over = self.counts.add(cluster, times)?;
            self.over = self.over.max(over);
            if over > 0 {
                observer.found(Finding::Overflow(cluster << self.cluster_bits));
            }
            self.wrong(over);
        }
        Ok(true)
    }

    pub(super) fn wrong(&mut self, times: u64) {
        self.corruptions = self.corruptions.saturating_add(times);
    }

    /// Notes a table: its clusters are metadata. Merges what touches.
    pub(super) fn note_table(&mut self, offset: u64, size: u64) {
        let cluster_size = 1 << self.cluster_bits;
        let mut start = round_down(offset, cluster_size);
        let mut end = round_up(offset.saturating_add(size), cluster_size).unwrap_or(u64::MAX);
        while let Some((&other, &other_end)) = self.metadata.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.metadata.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.metadata.insert(start, end);
    }

    /// The cluster that holds this byte.
    pub(super) fn cluster(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// Whether something other than guest data lies in the cluster at this byte offset.
    pub(super) fn is_metadata(&self, offset: u64) -> bool {
        self.tables.contains_key(&offset)
            || self.block_offsets.contains(&offset)
            || self.table_range.contains(&offset)
            || self.is_table(offset)
    }

    /// Whether something other than guest data lies in a cluster that these bytes touch.
    pub(super) fn meets_metadata(&self, offset: u64, len: u64) -> bool {
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.cluster_bits;
        (offset >> self.cluster_bits..=last).any(|cluster| self.is_metadata(cluster << self.cluster_bits))
    }

    /// Whether a table that can only lie there (no L2 table, and nothing of the refcounts) lies in the cluster at this byte offset.
    pub(super) fn is_table(&self, offset: u64) -> bool {
        self.metadata.range(..=offset).next_back().is_some_and(|(_, &end)| offset < end)
    }

    /// Behind the last cluster that is used, and the last of the file.
    pub(super) fn end(&self) -> u64 {
        self.clusters.max(self.counts.last_used().map_or(0, |last| last + 1))
    }

    /// The next chunk that can be read. Those that cannot are told and counted.
    async fn next_chunk(
        &mut self,
        chunks: &mut Chunks<'_>,
        observer: &mut dyn Observer,
    ) -> Option<(u64, Bytes)> {
        loop {
            let (at, chunk) = chunks.next().await?;
            match chunk {
                Ok(chunk) => return Some((at, chunk)),
                Err(error) => {
                    observer.found(Finding::Unreadable { offset: at, cause: error.to_string() });
                    self.check_errors += 1;
                    self.lost = true;
                }
            }
        }
    }

    /// Counts bytes of tables that are about to be read.
    pub(super) fn walk(&mut self, len: u64) -> Result<(), FormatError> {
        self.walked = self.walked.saturating_add(len);
        if self.walked > WALK_BYTES_MAX {
            return Err(FormatError::Unsupported(format!(
                "the tables are longer than the {WALK_BYTES_MAX} bytes that can be checked"
            )));
        }
        Ok(())
    }
}

/// Reads everything that refers to clusters.
///
/// # Errors
/// As [`references`].
pub(super) async fn scan(
    file: &dyn ReadAt,
    header: &Header,
    observer: &mut dyn Observer,
) -> Result<Scanned, FormatError> {
    let mut scanned = references(file, header, observer).await?;
    refcount_blocks(header, &mut scanned, observer)?;
    Ok(scanned)
}

/// Reads everything that refers to clusters but the refcount table and its blocks, which are not counted.
///
/// # Errors
/// `Corrupt` where the snapshot table cannot be read; `Unsupported` where the image is too large to be scanned; `Io` where
/// the snapshot table, the refcount table or the bitmaps cannot be read. L1 and L2 tables that cannot be read are counted.
pub(super) async fn references(
    file: &dyn ReadAt,
    header: &Header,
    observer: &mut dyn Observer,
) -> Result<Scanned, FormatError> {
    let layout = &header.layout;
    let cluster_size = layout.cluster_size();
    // As QEMU, which counts the file's length in sectors.
    let file_len = round_up(file.len(), SECTOR_BYTES).unwrap_or(u64::MAX);
    let clusters = file_len.div_ceil(cluster_size);
    if clusters > CLUSTERS_MAX {
        return Err(FormatError::Unsupported(format!(
            "the file has {clusters} clusters, at most {CLUSTERS_MAX} can be checked"
        )));
    }
    let mut scanned = Scanned {
        counts: Counts::new(refcounts(layout).max()),
        table: Vec::new(),
        tables: BTreeMap::new(),
        snapshots: snapshots::Table::default(),
        bad_snapshots: BTreeSet::new(),
        short_snapshots: false,
        bad_bitmaps: false,
        lost: false,
        corruptions: 0,
        check_errors: 0,
        allocated: 0,
        fragmented: 0,
        compressed: 0,
        clusters,
        metadata: BTreeMap::new(),
        block_offsets: BTreeSet::new(),
        table_range: 0..0,
        file_len,
        cluster_bits: layout.cluster_bits,
        over: 0,
        walked: 0,
        unaligned_left: file_len,
    };
    scanned.refer(0, cluster_size, 1, observer)?;
    scanned.note_table(0, cluster_size);
    let l1s = l1_tables(file, header, &mut scanned, observer).await?;
    count_bitmaps(file, header, &mut scanned, observer).await?;
    refcount_table(file, header, &mut scanned).await?;
    walk_l1(file, layout, &l1s, &mut scanned, observer).await?;
    walk_l2(file, layout, &mut scanned, observer).await?;
    Ok(scanned)
}

/// The geometry of an image's refcounts.
pub(super) fn refcounts(layout: &Layout) -> Refcounts {
    Refcounts::new(layout.cluster_bits, layout.refcount_order)
}

/// An L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct L1 {
    offset: u64,
    bytes: u64,
    /// Index of its snapshot; `None`: the active one.
    snapshot: Option<usize>,
}

/// Counts the L1 tables and the snapshot table.
async fn l1_tables(
    file: &dyn ReadAt,
    header: &Header,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<Vec<L1>, FormatError> {
    let fields = &header.fields;
    let cluster_size = header.layout.cluster_size();
    let active_bytes = u64::from(fields.l1_size) * L1_ENTRY_BYTES;
    let mut l1s = vec![L1 { offset: fields.l1_table_offset, bytes: active_bytes, snapshot: None }];
    scanned.snapshots = snapshots::Table::read(file, fields.snapshots_offset, fields.nb_snapshots).await?;
    for (number, entry) in scanned.snapshots.entries.iter().enumerate() {
        let (offset, bytes) = (entry.l1_offset, u64::from(entry.l1_entries) * L1_ENTRY_BYTES);
        if fields.version >= 3 && !entry.complete {
            observer.found(Finding::SnapshotIncomplete(crate::number::bytes(number)));
            scanned.short_snapshots = true;
            scanned.corruptions += 1;
        }
        // The header lies at 0.
        let bad_offset = !offset.is_multiple_of(cluster_size) || offset == 0 && bytes > 0;
        if bad_offset || bytes > L1_BYTES_MAX {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let (id, name) = (text(&entry.id), text(&entry.name));
            observer.found(Finding::SnapshotTable { id, name, offset });
            scanned.corruptions += 1;
            scanned.bad_snapshots.insert(number);
        } else {
            l1s.push(L1 { offset, bytes, snapshot: Some(number) });
        }
    }
    for l1 in &l1s {
        scanned.walk(l1.bytes)?;
        if scanned.refer(l1.offset, l1.bytes, 1, observer)? {
            scanned.note_table(l1.offset, l1.bytes);
        } else {
            scanned.bad_snapshots.extend(l1.snapshot);
        }
    }
    scanned.lost |= !scanned.bad_snapshots.is_empty();
    let table_bytes = scanned.snapshots.bytes;
    scanned.note_table(fields.snapshots_offset, table_bytes);
    scanned.refer(fields.snapshots_offset, table_bytes, 1, observer)?;
    Ok(l1s)
}

/// Reads every entry of every L1 table once, and notes the L2 tables.
async fn walk_l1(
    file: &dyn ReadAt,
    layout: &Layout,
    l1s: &[L1],
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    // Where tables begin and end, and how many are there from then on.
    let mut edges: BTreeMap<u64, (i64, i64)> = BTreeMap::new();
    for l1 in l1s.iter().filter(|l1| l1.bytes > 0) {
        let active = i64::from(l1.snapshot.is_none());
        let start = edges.entry(l1.offset).or_default();
        *start = (start.0 + active, start.1 + 1);
        let end = edges.entry(l1.offset.saturating_add(l1.bytes)).or_default();
        *end = (end.0 - active, end.1 - 1);
    }
    let mut named = Named::default();
    let mut edges = edges.into_iter().peekable();
    while let Some((start, (active, total))) = edges.next() {
        named.active = named.active.saturating_add_signed(active);
        named.total = named.total.saturating_add_signed(total);
        let Some(&(end, _)) = edges.peek().filter(|_| named.total > 0) else { continue };
        let mut chunks = Chunks::new(file, start, end - start);
        while let Some((at, chunk)) = scanned.next_chunk(&mut chunks, observer).await {
            for (at, raw) in words(at, &chunk).filter(|&(_, raw)| raw != 0) {
                l1_entry(layout, at, raw, named, scanned, observer)?;
            }
        }
    }
    Ok(())
}

/// Reads every L2 table once.
async fn walk_l2(
    file: &dyn ReadAt,
    layout: &Layout,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    let cluster_size = layout.cluster_size();
    let mut from = 0;
    while let Some((&table, &named)) = scanned.tables.range(from..).next() {
        from = table + 1;
        if !table.is_multiple_of(cluster_size) {
            match scanned.unaligned_left.checked_sub(cluster_size) {
                Some(left) => scanned.unaligned_left = left,
                None => continue,
            }
        }
        scanned.walk(cluster_size)?;
        let mut next = None;
        let mut chunks = Chunks::new(file, table, cluster_size);
        while let Some((at, chunk)) = scanned.next_chunk(&mut chunks, observer).await {
            if chunk.iter().all(|&byte| byte == 0) {
                continue;
            }
            for entry in entries(layout, at, &chunk) {
                l2_entry(layout, entry, named, &mut next, scanned, observer)?;
            }
        }
    }
    Ok(())
}

/// Reads the refcount table, and notes where its blocks may lie.
async fn refcount_table(
    file: &dyn ReadAt,
    header: &Header,
    scanned: &mut Scanned,
) -> Result<(), FormatError> {
    let cluster_size = header.layout.cluster_size();
    let offset = header.fields.refcount_table_offset;
    let len = u64::from(header.fields.refcount_table_clusters) * cluster_size;
    let table = read_padded(file, offset, len).await?;
    scanned.table = words(0, &table).map(|(_, raw)| raw).collect();
    let entries = refcounts(&header.layout).table_index(scanned.clusters) + 1;
    scanned.table_range = offset..offset.saturating_add(len.min(entries * TABLE_ENTRY_BYTES));
    let blocks = scanned.table.iter().map(|raw| raw & TABLE_OFFSET_MASK).filter(|&offset| offset != 0);
    scanned.block_offsets = blocks.collect();
    Ok(())
}

/// Counts the refcount table and its blocks. Each block is to be named by one entry, and used for nothing else.
fn refcount_blocks(
    header: &Header,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    let cluster_size = header.layout.cluster_size();
    let table_bytes = bytes(scanned.table.len()) * TABLE_ENTRY_BYTES;
    scanned.refer(header.fields.refcount_table_offset, table_bytes, 1, observer)?;
    let clusters = scanned.end();
    let table = std::mem::take(&mut scanned.table);
    for (number, &raw) in (0..).zip(&table) {
        let offset = raw & TABLE_OFFSET_MASK;
        let mut wrong = match () {
            () if raw != offset => Some(Finding::BlockBits(number)),
            () if !offset.is_multiple_of(cluster_size) => Some(Finding::BlockUnaligned(number)),
            () if offset / cluster_size >= clusters => Some(Finding::BlockOutside(number)),
            () => None,
        };
        if wrong.is_none() && offset != 0 {
            scanned.refer(offset, cluster_size, 1, observer)?;
            let counted = scanned.counts.count(offset / cluster_size);
            wrong = (counted != 1).then_some(Finding::BlockShared { index: number, counted });
        }
        if let Some(wrong) = wrong {
            observer.found(wrong);
            scanned.wrong(1);
        }
    }
    scanned.table = table;
    Ok(())
}
