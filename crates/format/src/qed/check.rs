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
    scan::{Beyond, Finding, Scanned, scan},
};
use crate::{FormatError, driver::CheckReport};

/// Checks the image.
pub(super) async fn check(file: &Arc<dyn ReadAt>) -> Result<CheckReport, FormatError> {
    let header = Header::read(file.as_ref()).await?;
    let (report, _) = count(file.as_ref(), &header.layout).await?;
    Ok(report)
}

/// Scans and counts.
pub(super) async fn count(file: &dyn ReadAt, layout: &Layout) -> Result<(CheckReport, Scanned), FormatError> {
    let mut corruptions = 0;
    let count_wrong = |_, _, finding| {
        corruptions += match finding {
            Finding::Invalid => 1,
            Finding::Double(clusters) => clusters,
        };
    };
    let scanned = scan(file, layout, Beyond::Wrong, count_wrong, |_, _| {}).await?;
    // Bytes behind the last whole cluster can hold nothing; QEMU counts them as a cluster.
    let cut_off = u64::from(!file.len().is_multiple_of(layout.cluster_size));
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
