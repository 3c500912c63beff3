//! Reclaim: whether clusters that a crash left without a link are being looked for.
//!
//! - Once, beside the guest, on an image that was found dirty. It looks only at clusters below the file's end when the image
//!   was opened; allocation appends above it meanwhile.
//!
//! Not here: the scan (a format's `reclaim`).

use std::task::Poll;

use readonce_storage::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The image was clean, or its leaks are free.
const NOTHING_TO_DO: u8 = 0;
/// The image was found dirty; nobody looked yet.
const DUE: u8 = 1;
/// A scan is under way.
const RUNNING: u8 = 2;
/// The scan ended early, or found the tables wrong.
const FAILED: u8 = 3;

/// What became of the leaks of an image that was found dirty.
pub(crate) struct Reclaim {
    state: AtomicU8,
    stop: AtomicBool,
    /// Held while the scan runs.
    running: tokio::sync::Mutex<()>,
    /// Told when it has ended.
    ended: tokio::sync::Notify,
    /// End of the whole clusters when the image was opened, bytes.
    pub(crate) end: u64,
}

impl Reclaim {
    pub(crate) fn new(dirty: bool, end: u64) -> Self {
        let state = if dirty { DUE } else { NOTHING_TO_DO };
        Self {
            state: AtomicU8::new(state),
            stop: AtomicBool::new(false),
            running: tokio::sync::Mutex::new(()),
            ended: tokio::sync::Notify::new(),
            end,
        }
    }

    /// Whether leaks may be left.
    pub(crate) fn is_due(&self) -> bool {
        self.state.load(Ordering::Acquire) != NOTHING_TO_DO
    }

    /// Whether the caller is the one who runs it.
    pub(crate) fn begin(&self) -> bool {
        self.state.compare_exchange(DUE, RUNNING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Nothing is left to reclaim.
    pub(crate) fn done(&self) {
        self.state.store(NOTHING_TO_DO, Ordering::Release);
        self.ended.notify_waiters();
    }

    /// Runs the scan, until it is to end: then `None`. It is to yield now and then.
    pub(crate) async fn run<T>(&self, scan: impl Future<Output = T>) -> Option<T> {
        let _running = self.running.lock().await;
        tokio::select! {
            biased;
            () = self.stopped() => None,
            scanned = scan => Some(scanned),
        }
    }

    /// It ended early, or found the tables wrong: leaks stay for now.
    pub(crate) fn failed(&self, why: &str) {
        tracing::info!(why, "what a crash left unlinked stays in the image for now");
        self.state.store(FAILED, Ordering::Release);
        self.ended.notify_waiters();
    }

    /// Completes once the scan is to end. Each time that the scan yields this is looked at first.
    async fn stopped(&self) {
        std::future::poll_fn(|_| match self.stop.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Waits for a scan that has begun.
    pub(crate) async fn finish(&self) {
        let ended = self.ended.notified();
        tokio::pin!(ended);
        // From here on it is told, however soon it ends.
        ended.as_mut().enable();
        if self.state.load(Ordering::Acquire) == RUNNING {
            ended.await;
        }
    }

    /// Ends a scan that runs; it has ended when this returns.
    pub(crate) async fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        drop(self.running.lock().await);
    }
}
