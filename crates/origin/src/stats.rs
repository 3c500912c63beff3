//! Counters of an origin, for progress, summaries and tests.
//!
//! - They only grow, and are read without a lock: two of them read together may differ by a request.
//!
//! Not here: rates and times.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters that an origin keeps while it works.
#[derive(Debug, Default)]
pub struct OriginStats {
    bytes: AtomicU64,
    requests: AtomicU64,
    retries: AtomicU64,
    redirects: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    /// Body bytes that were handed out.
    pub bytes: u64,
    /// Requests that were sent, each hop of a redirect and the probe included. Zero for files.
    pub requests: u64,
    /// Requests that repeat a failed one, or ask for the rest of a broken one.
    pub retries: u64,
    /// Redirects that were followed.
    pub redirects: u64,
}

impl OriginStats {
    /// The counters now.
    pub fn snapshot(&self) -> StatsSnapshot {
        StatsSnapshot {
            bytes: self.bytes.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
            redirects: self.redirects.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn add_bytes(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_redirect(&self) {
        self.redirects.fetch_add(1, Ordering::Relaxed);
    }
}
