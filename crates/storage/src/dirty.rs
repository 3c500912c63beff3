//! Dirty budget: whether a write into the page cache would have to wait.
//!
//! - It would when too much of the file is dirty, because the kernel then stops the writer; and while a sync is under
//!   way, because it then waits for the journal.
//! - At most one writeback is under way.
//!
//! Not here: the file (`local`), and the figures for the second rule, which stand there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes of one file that may be in the page cache and not on the disk before `write_now` answers `None`. Linux begins
/// to stop writers at about 15 % of the free memory, 300 MB on a machine with 2 GB free.
pub(crate) const DIRTY_BYTES_MAX: u64 = 128 << 20;
/// Dirty bytes at which writeback is started.
const WRITEBACK_BYTES: u64 = DIRTY_BYTES_MAX / 4;

/// Counts bytes of a file that were written and are not known to be on the disk. A byte written twice counts twice.
#[derive(Debug, Default)]
pub(crate) struct DirtyBudget {
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
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    pub(crate) fn dirty(&self) -> u64 {
        self.written().saturating_sub(self.clean.load(Ordering::Acquire))
    }

    pub(crate) fn would_not_wait(&self, len: u64) -> bool {
        self.syncs.load(Ordering::Acquire) == 0 && self.dirty().saturating_add(len) <= DIRTY_BYTES_MAX
    }

    pub(crate) fn add(&self, len: u64) {
        self.written.fetch_add(len, Ordering::AcqRel);
    }

    pub(crate) fn clean_up_to(&self, round: u64) {
        self.clean.fetch_max(round, Ordering::AcqRel);
    }

    /// What the writeback will cover, if one is due. The caller starts it and calls `end_writeback`.
    pub(crate) fn begin_writeback(&self) -> Option<u64> {
        if self.dirty() < WRITEBACK_BYTES || self.writeback.swap(true, Ordering::AcqRel) {
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
        let budget = DirtyBudget::default();
        budget.add(WRITEBACK_BYTES - 1);
        assert_eq!(budget.begin_writeback(), None);
        budget.add(1);
        assert_eq!(budget.begin_writeback(), Some(WRITEBACK_BYTES));
        budget.add(WRITEBACK_BYTES);
        assert_eq!(budget.begin_writeback(), None);
        budget.end_writeback(Some(WRITEBACK_BYTES));
        assert_eq!(budget.dirty(), WRITEBACK_BYTES);
        assert_eq!(budget.begin_writeback(), Some(2 * WRITEBACK_BYTES));
        budget.end_writeback(None);
        assert_eq!(budget.dirty(), WRITEBACK_BYTES);
    }
}
