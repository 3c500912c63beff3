//! Reclaim: clusters that a crash left without a link are free again.
//!
//! - What the scan reads of an entry for a cluster below the end at open cannot change under it: allocation appends above.
//! - A table in which anything is wrong ends it: then nothing is freed, and the mark stays.
//!
//! Not here: moving clusters (`repair`).

use super::{layout::Layout, scan, writer::Core};

/// Scans, and frees what nothing uses.
pub(super) async fn run(core: &Core) {
    let reclaim = &core.reclaim;
    let layout = &core.tables.layout;
    let scan =
        scan::scan(core.file.as_ref(), layout, scan::Beyond::New(reclaim.end), |_, _, _| {}, |_, _| {});
    let failed = match reclaim.run(scan).await {
        None => Some("the image is being closed".to_owned()),
        Some(Err(error)) => Some(error.to_string()),
        Some(Ok(scanned)) if scanned.check_errors > 0 => Some("a table could not be read".to_owned()),
        Some(Ok(scanned)) => match scanned.first_wrong.clone() {
            Some(wrong) => Some(wrong),
            None => {
                free_unused(core, layout, &scanned.used);
                None
            }
        },
    };
    match failed {
        None => reclaim.done(),
        Some(why) => reclaim.failed(&why),
    }
}

fn free_unused(core: &Core, layout: &Layout, used: &scan::Bitmap) {
    let cluster_size = layout.cluster_size;
    let end = core.reclaim.end / cluster_size;
    let mut at = layout.header_bytes / cluster_size;
    let mut clusters = 0;
    while let Some(first) = used.next_free(at).filter(|&first| first < end) {
        let last = used.next_set(first).unwrap_or(end).min(end);
        core.clusters.free(first * cluster_size, (last - first) * cluster_size);
        clusters += last - first;
        at = last;
    }
    tracing::info!(clusters, "reclaimed what a crash left unlinked");
}
