//! Dirty budget: whether a write into the page cache would have to wait.
//!
//! - It would when too much of the file is dirty, because the kernel then stops the writer; and while a sync is under
//!   way, because it then waits for the journal.
//! - A byte written twice counts twice, and the kernel writes pages out by itself: so before a writeback is started the
//!   kernel is asked how much is dirty at all, which bounds the count.
//! - At most one writeback is under way.
//!
//! Not here: the file (`local`), and the figures for the second rule, which stand there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes of one file that may be in the page cache and not on the disk before `write_now` answers `None`, on any machine.
/// Linux begins to stop writers at about 15 % of the free memory, 300 MB on a machine with 2 GB free.
const DIRTY_BYTES_MAX_MIN: u64 = 128 << 20;
/// The same on the largest machine: a sync has to write them.
const DIRTY_BYTES_MAX_MAX: u64 = 2 << 30;

/// The kernel's counts of pages.
struct VmStat(String);

impl VmStat {
    fn read() -> Self {
        Self(std::fs::read_to_string("/proc/vmstat").unwrap_or_default())
    }

    /// Bytes of the pages counted as `name`; `None` where the kernel does not tell.
    fn bytes(&self, name: &str) -> Option<u64> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let pages: u64 = line?.parse().ok()?;
        Some(pages.saturating_mul(rustix::param::page_size() as u64))
    }
}

/// Half of what Linux lets be dirty before it stops a writer: half-way between its two thresholds
/// (`dirty_freerun_ceiling`), which follow the memory and `vm.dirty_*`. The other half is for other files.
fn dirty_bytes_max() -> u64 {
    let stat = VmStat::read();
    let bytes = |name| stat.bytes(name).unwrap_or(0);
    let ceiling = bytes("nr_dirty_threshold").saturating_add(bytes("nr_dirty_background_threshold")) / 2;
    (ceiling / 2).clamp(DIRTY_BYTES_MAX_MIN, DIRTY_BYTES_MAX_MAX)
}

/// Bytes of all files that are dirty or on their way to a device: no single file has more.
fn dirty_bytes_at_all() -> u64 {
    let stat = VmStat::read();
    let all = stat.bytes("nr_dirty").zip(stat.bytes("nr_writeback"));
    all.map_or(u64::MAX, |(dirty, writeback)| dirty.saturating_add(writeback))
}

/// Counts bytes of a file that were written and are not known to be on the disk.
#[derive(Debug)]
pub(crate) struct DirtyBudget {
    /// Dirty bytes from which on a write has to wait.
    bytes_max: u64,
    /// Bytes written since the file was opened.
    written: AtomicU64,
    /// How many of them, the first ones, are on the disk or handed to the device.
    clean: AtomicU64,
    /// Dirty bytes by our count at which the kernel is asked, and writeback started if it is due.
    look_at: AtomicU64,
    /// Whether a writeback is under way, or being considered.
    writeback: AtomicBool,
    /// Syncs under way.
    syncs: AtomicU64,
}

/// Dirty bytes at which writeback is started: late enough that what is written again and again is not written out each
/// time (the disk, and the CPU that the writeback takes), early enough that the budget does not run out meanwhile.
fn writeback_bytes(bytes_max: u64) -> u64 {
    bytes_max / 4 * 3
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
        let bytes_max = dirty_bytes_max();
        Self {
            bytes_max,
            look_at: AtomicU64::new(writeback_bytes(bytes_max)),
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
        self.begin_writeback_knowing(dirty_bytes_at_all)
    }

    fn begin_writeback_knowing(&self, dirty_at_all: impl Fn() -> u64) -> Option<u64> {
        let due = writeback_bytes(self.bytes_max);
        if self.dirty() < self.look_at.load(Ordering::Acquire) || self.writeback.swap(true, Ordering::AcqRel)
        {
            return None;
        }
        // Read first: what is written from here on may not be in the kernel's count.
        let written = self.written();
        self.clean_up_to(written.saturating_sub(dirty_at_all()));
        let dirty = self.dirty();
        // Asking costs as much as ten writes: not again before some more was written.
        self.look_at.store(due.max(dirty + (self.bytes_max - due) / 4), Ordering::Release);
        if dirty < due {
            self.writeback.store(false, Ordering::Release);
            return None;
        }
        Some(written)
    }

    pub(crate) fn end_writeback(&self, covered: Option<u64>) {
        if let Some(round) = covered {
            self.clean_up_to(round);
        }
        self.look_at.store(writeback_bytes(self.bytes_max), Ordering::Release);
        self.writeback.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writeback_at_a_time_and_only_when_due() {
        let budget = DirtyBudget::new();
        let begin = || budget.begin_writeback_knowing(|| u64::MAX);
        let due = writeback_bytes(budget.bytes_max);
        budget.add(due - 1);
        assert_eq!(begin(), None);
        budget.add(1);
        assert_eq!(begin(), Some(due));
        budget.add(due);
        assert_eq!(begin(), None);
        budget.end_writeback(Some(due));
        assert_eq!(budget.dirty(), due);
        assert_eq!(begin(), Some(2 * due));
        budget.end_writeback(None);
        assert_eq!(budget.dirty(), due);
        assert_eq!(begin(), Some(2 * due));
    }

    #[test]
    fn what_the_kernel_knows_to_be_clean_does_not_count() {
        let budget = DirtyBudget::new();
        let due = writeback_bytes(budget.bytes_max);
        // The same bytes again and again: little is dirty.
        for _ in 0..10 {
            budget.add(due);
            assert_eq!(budget.begin_writeback_knowing(|| 4096), None);
            assert_eq!(budget.dirty(), 4096);
            assert!(budget.would_not_wait(due));
        }
        // Nearly due: the kernel is asked again only after some more.
        budget.add(due);
        assert_eq!(budget.begin_writeback_knowing(|| due - 1), None);
        budget.add(1);
        assert_eq!(budget.begin_writeback_knowing(|| panic!("asked at once again")), None);
        budget.add(budget.bytes_max - due);
        assert_eq!(budget.begin_writeback_knowing(|| u64::MAX), Some(budget.written()));
    }
}
