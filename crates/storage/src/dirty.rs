//! Dirty budget: whether a write into the page cache would have to wait.
//!
//! - It would when too much of the file is dirty, because the kernel then stops the writer; and while a sync is under
//!   way, because it then waits for the journal.
//! - At most one writeback is under way.
//!
//! Not here: the file (`local`), and the figures for the second rule, which stand there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes of one file that may be in the page cache and not on the disk before `write_now` answers `None`, on any machine.
/// Linux begins to stop writers at about 15 % of the free memory, 300 MB on a machine with 2 GB free.
const DIRTY_BYTES_MAX_MIN: u64 = 128 << 20;
/// The same on the largest machine: a sync has to write them.
const DIRTY_BYTES_MAX_MAX: u64 = 2 << 30;

/// Half of what Linux lets be dirty before it stops a writer: half-way between its two thresholds
/// (`dirty_freerun_ceiling`), which follow the memory and `vm.dirty_*`. The other half is for other files.
fn dirty_bytes_max() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let pages = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|count| count.parse().ok()).unwrap_or(0)
    };
    let ceiling = pages("nr_dirty_threshold").saturating_add(pages("nr_dirty_background_threshold")) / 2;
    let page_len = rustix::param::page_size() as u64;
    (ceiling.saturating_mul(page_len) / 2).clamp(DIRTY_BYTES_MAX_MIN, DIRTY_BYTES_MAX_MAX)
}

/// Counts bytes of a file that were written and are not known to be on the disk. A byte written twice counts twice.
#[derive(Debug)]
pub(crate) struct DirtyBudget {
    /// Dirty bytes from which on a write has to wait.
    bytes_max: u64,
    /// Bytes written since the file was opened.
    written: AtomicU64,
    /// How many of them, the first ones, are on the disk or handed to the device.
    clean: AtomicU64,
    /// Whether a writeback is under way.
    writeback: AtomicBool,
    /// Syncs under way.
    syncs: AtomicU64,
}

/// Counts a sync for as long as it lives.
pub(crate) struct SyncUnderWay<'a>(&'a DirtyBudget);

impl<'a> SyncUnderWay<'a> {
    pub(crate) fn begin(dirty: &'a DirtyBudget) -> Self {
        dirty.syncs.fetch_add(1, Ordering::AcqRel);
        Self(dirty)
    }
}

impl Drop for SyncUnderWay<'_> {
    fn drop(&mut self) {
        self.0.syncs.fetch_sub(1, Ordering::AcqRel);
    }
}

impl DirtyBudget {
    /// A budget that suits this machine.
    pub(crate) fn new() -> Self {
        Self {
            bytes_max: dirty_bytes_max(),
            written: AtomicU64::new(0),
            clean: AtomicU64::new(0),
            writeback: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
        }
    }

    #[cfg(test)]
    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Dirty bytes at which writeback is started: late enough that what is written again and again is not written out each
    /// time (the disk, and the CPU that the writeback takes), early enough that the budget does not run out meanwhile.
    fn writeback_bytes(&self) -> u64 {
        self.bytes_max / 4
    }

    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    pub(crate) fn dirty(&self) -> u64 {
        self.written().saturating_sub(self.clean.load(Ordering::Acquire))
    }

    pub(crate) fn would_not_wait(&self, len: u64) -> bool {
        self.syncs.load(Ordering::Acquire) == 0 && self.dirty().saturating_add(len) <= self.bytes_max
    }

    pub(crate) fn add(&self, len: u64) {
        self.written.fetch_add(len, Ordering::AcqRel);
    }

    pub(crate) fn clean_up_to(&self, round: u64) {
        self.clean.fetch_max(round, Ordering::AcqRel);
    }

    /// What the writeback will cover, if one is due. The caller starts it and calls `end_writeback`.
    pub(crate) fn begin_writeback(&self) -> Option<u64> {
        if self.dirty() < self.writeback_bytes() || self.writeback.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(self.written())
    }

    pub(crate) fn end_writeback(&self, covered: Option<u64>) {
        if let Some(round) = covered {
            self.clean_up_to(round);
        }
        self.writeback.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writeback_at_a_time_and_only_when_due() {
        let budget = DirtyBudget::new();
        let writeback_bytes = budget.writeback_bytes();
        budget.add(writeback_bytes - 1);
        assert_eq!(budget.begin_writeback(), None);
        budget.add(1);
        assert_eq!(budget.begin_writeback(), Some(writeback_bytes));
        budget.add(writeback_bytes);
        assert_eq!(budget.begin_writeback(), None);
        budget.end_writeback(Some(writeback_bytes));
        assert_eq!(budget.dirty(), writeback_bytes);
        assert_eq!(budget.begin_writeback(), Some(2 * writeback_bytes));
        budget.end_writeback(None);
        assert_eq!(budget.dirty(), writeback_bytes);
    }
}
