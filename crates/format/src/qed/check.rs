//! Check: counts what is wrong, in QEMU's terms.
//!
//! - A corruption is an entry that holds what may not be there, or a cluster that is referred to once more. A leak is a
//!   cluster behind the header area that nothing refers to; leaks are counted only where every table could be read.
//!
//! Not here: mending (`repair`).

use std::sync::Arc;

use readonce_storage::ReadAt;

use super::{
    header::Header,
    layout::Layout,
    scan::{Beyond, Place, Scanned, Wrong, scan},
};
use crate::{Finding, FormatError, driver::CheckReport, finding::Tell};

/// Checks the image.
pub(super) async fn check(file: &Arc<dyn ReadAt>, tell: Tell<'_>) -> Result<CheckReport, FormatError> {
    let header = Header::read(file.as_ref()).await?;
    let (report, scanned) = count(file.as_ref(), &header.layout, tell).await?;
    if report.leaks > 0 {
        tell_leaks(file.len(), &header.layout, &scanned, tell);
    }
    Ok(report)
}

/// Scans and counts; tells of all that is wrong but leaks.
pub(super) async fn count(
    file: &dyn ReadAt,
    layout: &Layout,
    tell: Tell<'_>,
) -> Result<(CheckReport, Scanned), FormatError> {
    let mut corruptions = 0;
    let count_wrong = |place, entry, wrong| {
        let used = match wrong {
            Wrong::Invalid => 0,
            Wrong::Double(clusters) => clusters,
        };
        corruptions += used.max(1);
        tell(match place {
            Place::L1(index) => Finding::QedL1 { index, entry, used },
            Place::L2 { l1_index, table, l2_index: index } => {
                let cluster = l1_index.saturating_mul(layout.table_entries()).saturating_add(index);
                let guest = cluster.saturating_mul(layout.cluster_size);
                Finding::QedL2 { table, index, entry, guest, used: used > 0 }
            }
        });
    };
    let scanned = scan(file, layout, Beyond::Wrong, count_wrong, |_, _| {}).await?;
    if scanned.check_errors > 0 {
        tell(Finding::Unreadable {
            offset: layout.l1_offset,
            cause: "a read of it, or of a table that it names, failed".into(),
        });
    }
    // Bytes behind the last whole cluster can hold nothing; QEMU counts them as a cluster.
    let cut_off = u64::from(cut_off_bytes(file.len(), layout) > 0);
    let report = CheckReport {
        check_errors: scanned.check_errors,
        corruptions,
        leaks: if scanned.check_errors == 0 { scanned.leaks(layout) + cut_off } else { 0 },
        corruptions_fixed: 0,
        leaks_fixed: 0,
        total_clusters: layout.image_size.div_ceil(layout.cluster_size),
        allocated_clusters: scanned.allocated,
        fragmented_clusters: scanned.fragmented,
        image_end_offset: None,
        compressed_clusters: 0,
    };
    Ok((report, scanned))
}

fn cut_off_bytes(file_len: u64, layout: &Layout) -> u64 {
    file_len - layout.whole_clusters_end(file_len)
}

/// Tells of clusters that nothing uses, a run at a time.
pub(super) fn tell_leaks(file_len: u64, layout: &Layout, scanned: &Scanned, tell: Tell<'_>) {
    let used = &scanned.used;
    let mut from = layout.header_bytes / layout.cluster_size;
    while let Some(cluster) = used.next_free(from) {
        let end = used.next_set(cluster).unwrap_or(used.clusters());
        tell(Finding::Leaked { cluster, count: end - cluster });
        from = end;
    }
    match cut_off_bytes(file_len, layout) {
        0 => {}
        bytes => tell(Finding::CutOff { bytes }),
    }
}
