//! Check: compares what refers to clusters with the refcounts that the file stores, and counts in QEMU's terms.
//!
//! - A corruption is an entry that holds what may not be there, a refcount that is too low, or a COPIED flag that says other
//!   than the stored refcount. A leak is a refcount that is too high. Each is told as it is met.
//! - Beyond QEMU's terms: an L2 table that is something else too is a corruption where its refcount counts both.
//! - Memory beyond that of `scan`: the clusters whose refcount is wrong, at most [`WRONG_MAX`] of them; more are looked up in
//!   the file again.
//!
//! Not here: mending (`repair`).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use readonce_storage::ReadAt;

use super::{
    chunks::{Chunks, read_padded, words},
    entry::{COPIED, OFFSET_MASK},
    header::Header,
    judge::{Cluster, entries},
    layout::L1_ENTRY_BYTES,
    refcount::{Refcounts, TABLE_OFFSET_MASK},
    scan::{Observer, Scanned, refcounts, scan},
};
use crate::{Finding, FormatError, driver::CheckReport, finding::Tell};

/// Wrong refcounts that are kept in memory.
const WRONG_MAX: usize = 1 << 20;

/// Checks the image.
pub(super) async fn check(file: &Arc<dyn ReadAt>, tell: Tell<'_>) -> Result<CheckReport, FormatError> {
    let header = Header::read(file.as_ref()).await?;
    let (report, _, compared) = count(file.as_ref(), &header, tell).await?;
    if header.dirty() && compared.too_low > 0 {
        tell(Finding::NotWrittenYet);
    }
    Ok(report)
}

/// Tells what a scan finds, and nobody of what is right.
struct Teller<'a>(Tell<'a>);

impl Observer for Teller<'_> {
    fn found(&mut self, finding: Finding) {
        (self.0)(finding);
    }
}

/// Scans, compares and counts.
pub(super) async fn count(
    file: &dyn ReadAt,
    header: &Header,
    tell: Tell<'_>,
) -> Result<(CheckReport, Scanned, Compared), FormatError> {
    let scanned = scan(file, header, &mut Teller(tell)).await?;
    let compared = compare(file, header, &scanned, tell).await?;
    let mut stored = Stored::new(file, header, &scanned, &compared);
    let shared = shared_tables(&mut stored, &scanned, tell).await;
    let mut flags = 0;
    let wrong = |finding, times| {
        tell(finding);
        flags += times;
    };
    let unread = copied_flags(header, &mut stored, &scanned, wrong).await?;
    let report = CheckReport {
        check_errors: (scanned.check_errors + compared.unreadable).max(unread),
        corruptions: scanned.corruptions.saturating_add(compared.too_low + flags + shared),
        leaks: compared.too_high,
        corruptions_fixed: 0,
        leaks_fixed: 0,
        total_clusters: header.layout.image_size.div_ceil(header.layout.cluster_size()),
        allocated_clusters: scanned.allocated,
        fragmented_clusters: scanned.fragmented,
        compressed_clusters: scanned.compressed,
        image_end_offset: Some((compared.last + 1) * header.layout.cluster_size()),
    };
    Ok((report, scanned, compared))
}

/// Counts the L2 tables that are used for something else too, where the refcount says as much: QEMU's check finds nothing wrong there,
/// and a write into one of the two changes the other.
async fn shared_tables(stored: &mut Stored<'_>, scanned: &Scanned, tell: Tell<'_>) -> u64 {
    let mut shared = 0;
    for (&offset, named) in &scanned.tables {
        let cluster = scanned.cluster(offset);
        let (tables, counted) = (named.total, scanned.counts.count(cluster));
        let unaligned = cluster * stored.refcounts.cluster_size() != offset;
        // What is unaligned, or has another refcount, is told already.
        if counted > tables && !unaligned && stored.refcount(cluster).await == Some(counted) {
            tell(Finding::TableShared { offset, tables, counted });
            shared += 1;
        }
    }
    shared
}

/// How the stored refcounts differ from the references.
#[derive(Default)]
pub(super) struct Compared {
    /// Clusters with a stored refcount that is too high.
    pub(super) too_high: u64,
    /// Clusters with a stored refcount that is too low.
    pub(super) too_low: u64,
    /// Clusters whose refcount cannot be read.
    pub(super) unreadable: u64,
    /// The last cluster that is used, or seems to be.
    pub(super) last: u64,
    /// What is stored where that differs; `None` where there is more than fits in memory.
    wrong: Option<BTreeMap<u64, u64>>,
}

/// Reads every refcount block that counts a cluster of the file.
pub(super) async fn compare(
    file: &dyn ReadAt,
    header: &Header,
    scanned: &Scanned,
    tell: Tell<'_>,
) -> Result<Compared, FormatError> {
    let refcounts = refcounts(&header.layout);
    let clusters = scanned.end();
    let mut compared = Compared { wrong: Some(BTreeMap::new()), ..Compared::default() };
    let mut note = |cluster: u64, stored: u64, counted: u64, tell: Tell<'_>| {
        if stored > 0 || counted > 0 {
            compared.last = cluster;
        }
        if stored == counted {
            return;
        }
        tell(Finding::Refcount { cluster, stored, counted });
        if stored > counted {
            compared.too_high += 1;
        } else {
            compared.too_low += 1;
        }
        if let Some(wrong) = &mut compared.wrong {
            wrong.insert(cluster, stored);
            if wrong.len() > WRONG_MAX {
                compared.wrong = None;
            }
        }
    };
    let mut unreadable = 0;
    for number in 0..clusters.div_ceil(refcounts.per_block()) {
        let first = number * refcounts.per_block();
        let end = (first + refcounts.per_block()).min(clusters);
        let block = match read_block(file, &refcounts, &scanned.table, number).await {
            Some(Ok(block)) => block,
            Some(Err(())) => {
                tell(Finding::RefcountsUnread { cluster: first, count: end - first });
                unreadable += end - first;
                continue;
            }
            None => Bytes::new(),
        };
        if block.iter().all(|&byte| byte == 0) {
            let mut from = first;
            while let Some(cluster) = scanned.counts.next_used(from, end) {
                note(cluster, 0, scanned.counts.count(cluster), tell);
                from = cluster + 1;
            }
            continue;
        }
        let stored = (first..end).map(|cluster| refcounts.refcount(&block, cluster - first));
        for ((cluster, stored), counted) in (first..).zip(stored).zip(scanned.counts.from(first)) {
            note(cluster, stored, counted, tell);
        }
        tokio::task::yield_now().await;
    }
    compared.unreadable = unreadable;
    Ok(compared)
}

/// The refcount block that the table's entry `number` names; `Err` where it cannot be read, `None` where there is none.
async fn read_block(
    file: &dyn ReadAt,
    refcounts: &Refcounts,
    table: &[u64],
    number: u64,
) -> Option<Result<Bytes, ()>> {
    let raw = usize::try_from(number).ok().and_then(|number| table.get(number))?;
    let offset = raw & TABLE_OFFSET_MASK;
    if offset == 0 {
        return None;
    }
    // As QEMU, which cannot read at an offset that a file cannot have, but takes what lies past the end for zeros.
    if !offset.is_multiple_of(refcounts.cluster_size()) || i64::try_from(offset).is_err() {
        return Some(Err(()));
    }
    Some(read_padded(file, offset, refcounts.cluster_size()).await.map_err(|_| ()))
}

/// Looks up stored refcounts.
pub(super) struct Stored<'a> {
    file: &'a dyn ReadAt,
    refcounts: Refcounts,
    scanned: &'a Scanned,
    compared: &'a Compared,
    clusters: u64,
    /// The block read last.
    block: Option<(u64, Option<Bytes>)>,
}

impl<'a> Stored<'a> {
    pub(super) fn new(
        file: &'a dyn ReadAt,
        header: &Header,
        scanned: &'a Scanned,
        compared: &'a Compared,
    ) -> Self {
        let clusters = scanned.end();
        Self { file, refcounts: refcounts(&header.layout), scanned, compared, clusters, block: None }
    }

    /// The stored refcount of a cluster; `None` where it cannot be read.
    async fn refcount(&mut self, cluster: u64) -> Option<u64> {
        let known =
            self.compared.wrong.as_ref().filter(|_| cluster < self.clusters && self.compared.unreadable == 0);
        if let Some(wrong) = known {
            let stored = wrong.get(&cluster).copied();
            return Some(stored.unwrap_or_else(|| self.scanned.counts.count(cluster)));
        }
        let number = self.refcounts.table_index(cluster);
        if self.block.as_ref().is_none_or(|(last, _)| *last != number) {
            let block = match read_block(self.file, &self.refcounts, &self.scanned.table, number).await {
                Some(block) => block.ok(),
                None => Some(Bytes::new()),
            };
            self.block = Some((number, block));
        }
        let (_, block) = self.block.as_ref()?;
        let at = self.refcounts.block_index(cluster);
        block.as_ref().map(|block| self.refcounts.refcount(block, at))
    }
}

/// Compares the COPIED flags of the active tables with the stored refcounts. `wrong` is told how often the entry is in use. Returns
/// how many pieces of tables could not be read: the scan read them too, but a disk may fail at the second time alone.
pub(super) async fn copied_flags(
    header: &Header,
    stored: &mut Stored<'_>,
    scanned: &Scanned,
    mut wrong: impl FnMut(Finding, u64),
) -> Result<u64, FormatError> {
    let mut unread = 0;
    let layout = &header.layout;
    let file = stored.file;
    let cluster_size = layout.cluster_size();
    let l1_bytes = u64::from(header.fields.l1_size) * L1_ENTRY_BYTES;
    let mut chunks = Chunks::new(file, header.fields.l1_table_offset, l1_bytes);
    while let Some((at, chunk)) = chunks.next().await {
        let Ok(chunk) = chunk else {
            unread += 1;
            continue;
        };
        for (at, raw) in words(at, &chunk) {
            let index = (at - header.fields.l1_table_offset) / L1_ENTRY_BYTES;
            let offset = raw & OFFSET_MASK;
            if offset != 0
                && let Some(refcount) = stored.refcount(offset / cluster_size).await
                && (refcount == 1) != (raw & COPIED != 0)
            {
                wrong(Finding::CopiedTable { index, entry: raw, refcount }, 1);
            }
        }
    }
    // An L1 entry with offset 0 names no table here.
    for (&table, named) in scanned.tables.iter().filter(|&(&table, named)| table > 0 && named.active > 0) {
        let mut chunks = Chunks::new(file, table, cluster_size);
        while let Some((at, chunk)) = chunks.next().await {
            let Ok(chunk) = chunk else {
                unread += 1;
                continue;
            };
            for entry in entries(layout, at, &chunk) {
                let Cluster::Room { at: offset, .. } = Cluster::of(layout, entry.raw, entry.bitmap) else {
                    continue;
                };
                let refcount =
                    if layout.external_data { Some(1) } else { stored.refcount(offset / cluster_size).await };
                if let Some(refcount) = refcount
                    && (refcount == 1) != (entry.raw & COPIED != 0)
                {
                    wrong(Finding::CopiedData { entry: entry.raw, refcount }, named.active);
                }
            }
        }
    }
    Ok(unread)
}
