//! Reclaim: clusters that a crash left without a link are free again.
//!
//! - Runs beside the guest, once, on an image that was found dirty. It looks only at clusters below the file's end when the
//!   image was opened; allocation appends above it meanwhile, so what the scan reads of an entry for a cluster below can
//!   not change under it.
//! - A table in which anything is wrong ends it: then nothing is freed, and the mark stays.
//!
//! Not here: moving clusters (`repair`).

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::{layout::Layout, scan, writer::Core};

/// The image was clean, or its leaks are free.
const NOTHING_TO_DO: u8 = 0;
/// The image was found dirty; nobody looked yet.
const DUE: u8 = 1;
/// A scan is under way.
const RUNNING: u8 = 2;
/// The scan ended early, or found the tables wrong.
const FAILED: u8 = 3;

/// What became of the leaks of an image that was found dirty.
pub(super) struct Reclaim {
    state: AtomicU8,
    stop: AtomicBool,
    /// Held while the scan runs.
    running: tokio::sync::Mutex<()>,
    /// End of the whole clusters when the image was opened, bytes.
    end: u64,
}

impl Reclaim {
    pub(super) fn new(dirty: bool, end: u64) -> Self {
        let state = if dirty { DUE } else { NOTHING_TO_DO };
        Self {
            state: AtomicU8::new(state),
            stop: AtomicBool::new(false),
            running: tokio::sync::Mutex::new(()),
            end,
        }
    }

    /// Whether leaks may be left.
    pub(super) fn is_due(&self) -> bool {
        self.state.load(Ordering::Acquire) != NOTHING_TO_DO
    }

    /// Whether the caller is the one who runs it.
    pub(super) fn begin(&self) -> bool {
        self.state.compare_exchange(DUE, RUNNING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Nothing is left to reclaim.
    pub(super) fn done(&self) {
        self.state.store(NOTHING_TO_DO, Ordering::Release);
    }

    /// Ends a scan that runs; it has ended when this returns.
    pub(super) async fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        drop(self.running.lock().await);
    }
}

/// Scans, and frees what nothing uses.
pub(super) async fn run(core: &Core) {
    let reclaim = &core.reclaim;
    let _running = reclaim.running.lock().await;
    let layout = &core.tables.layout;
    let scan =
        scan::scan(core.file.as_ref(), layout, scan::Beyond::New(reclaim.end), |_, _, _| {}, |_, _| {});
    let scanned = tokio::select! {
        biased;
        () = stopped(reclaim) => None,
        scanned = scan => Some(scanned),
    };
    let failed = match scanned {
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
        Some(why) => {
            tracing::info!(why, "what a crash left unlinked stays in the image for now");
            reclaim.state.store(FAILED, Ordering::Release);
        }
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

/// Completes once the scan is to end. The scan yields between chunks, and each time this is looked at first.
async fn stopped(reclaim: &Reclaim) {
    std::future::poll_fn(|_| match reclaim.stop.load(Ordering::Acquire) {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    })
    .await;
}
