//! Dirty budget: whether a write into the page cache would have to wait.
//!
//! - It would when too much of the machine's memory is dirty, because the kernel then stops the writer; and while a sync is under way,
//!   because it then waits for the journal.
//! - How much is dirty, and may be, is asked of the kernel now and then: the further away the limit was, the later again. In between
//!   half of what was left is for this file, the other half for all others. The kernel writes out by itself, long before.
//! - Where nothing is left a writeback of this file is started, at most one at a time.
//!
//! - The same for the memory cgroups (version 2) that this process is in, where they have a limit as it starts: the smallest room counts.
//!
//! Not here: the file (`local`), and the figures for the second rule, which stand there; `cgroup` reads the limits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::cgroup;

/// Bytes that may be dirty where the kernel does not tell its limit. Linux begins to stop writers at about 15 % of the free memory,
/// 300 MB on a machine with 2 GB free.
const LEFT_BYTES_UNKNOWN: u64 = 128 << 20;
/// Bytes written between two questions, at least: one costs as much as ten writes.
const STEP_BYTES_MIN: u64 = 4 << 20;

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

/// What is dirty on this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    /// Bytes of all files that are dirty or on their way to a device: no single file has more.
    pub(crate) dirty: u64,
    /// Bytes that may become dirty before the kernel stops writers.
    pub(crate) left: u64,
}

impl Machine {
    fn look() -> Self {
        let stat = VmStat::read();
        let sum = |a, b| Some(u64::saturating_add(stat.bytes(a)?, stat.bytes(b)?));
        let dirty = sum("nr_dirty", "nr_writeback").unwrap_or(u64::MAX);
        // Half-way between the two thresholds (`dirty_freerun_ceiling`), which follow the free memory and `vm.dirty_*`. An eighth of it
        // is never used: the kernel's counts lag behind.
        let ceiling = sum("nr_dirty_threshold", "nr_dirty_background_threshold").map(|sum| sum / 2);
        let left = match ceiling {
            Some(ceiling) => (ceiling - ceiling / 8).saturating_sub(dirty),
            None => LEFT_BYTES_UNKNOWN,
        };
        let left = cgroup::of_this_process().left().map_or(left, |group| group.min(left));
        Self { dirty, left }
    }
}

/// Counts bytes of a file that were written and are not known to be on the disk.
#[derive(Debug)]
pub(crate) struct DirtyBudget {
    look: fn() -> Machine,
    /// Dirty bytes from which on a write has to wait.
    bytes_max: AtomicU64,
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
        Self::of(Machine::look)
    }

    /// A budget for the machine that `look` shows.
    pub(crate) fn of(look: fn() -> Machine) -> Self {
        let budget = Self {
            look,
            bytes_max: AtomicU64::new(0),
            look_at: AtomicU64::new(0),
            written: AtomicU64::new(0),
            clean: AtomicU64::new(0),
            writeback: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
        };
        budget.learn(look());
        budget
    }

    /// Takes in what the machine had before this file's last writes. Whether nothing is left.
    fn learn(&self, machine: Machine) -> bool {
        let dirty = self.dirty();
        let ours = machine.left / 2;
        self.bytes_max.store(dirty + ours, Ordering::Release);
        self.look_at.store(dirty + (ours / 2).max(STEP_BYTES_MIN), Ordering::Release);
        ours < STEP_BYTES_MIN
    }

    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    pub(crate) fn dirty(&self) -> u64 {
        self.written().saturating_sub(self.clean.load(Ordering::Acquire))
    }

    pub(crate) fn would_not_wait(&self, len: u64) -> bool {
        self.syncs.load(Ordering::Acquire) == 0
            && self.dirty().saturating_add(len) <= self.bytes_max.load(Ordering::Acquire)
    }

    pub(crate) fn add(&self, len: u64) {
        self.written.fetch_add(len, Ordering::AcqRel);
    }

    pub(crate) fn clean_up_to(&self, round: u64) {
        self.clean.fetch_max(round, Ordering::AcqRel);
    }

    /// Asks the kernel, if it is time. What a writeback will cover, if one is due: the caller starts it and calls `end_writeback`.
    pub(crate) fn begin_writeback(&self) -> Option<u64> {
        self.begin_writeback_knowing(self.look)
    }

    fn begin_writeback_knowing(&self, look: impl FnOnce() -> Machine) -> Option<u64> {
        if self.dirty() < self.look_at.load(Ordering::Acquire) || self.writeback.swap(true, Ordering::AcqRel)
        {
            return None;
        }
        // Read first: what is written from here on may not be in the kernel's count.
        let written = self.written();
        let machine = look();
        self.clean_up_to(written.saturating_sub(machine.dirty));
        if !self.learn(machine) {
            self.writeback.store(false, Ordering::Release);
            return None;
        }
        Some(written)
    }

    /// `covered`: what is on the disk now, or `None` where nothing was written out.
    pub(crate) fn end_writeback(&self, covered: Option<u64>) {
        if let Some(round) = covered {
            self.clean_up_to(round);
            // There is room again, as the next write will learn.
            self.look_at.store(0, Ordering::Release);
        }
        self.writeback.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn budget(left: u64) -> DirtyBudget {
        let budget = DirtyBudget::of(|| Machine { dirty: 0, left: 0 });
        budget.learn(Machine { dirty: 0, left });
        budget
    }

    #[test]
    fn half_of_what_is_left_is_for_one_file() {
        let budget = budget(800 * MIB);
        assert!(budget.would_not_wait(400 * MIB));
        assert!(!budget.would_not_wait(400 * MIB + 1));
        budget.add(200 * MIB - 1);
        assert_eq!(budget.begin_writeback_knowing(|| panic!("far from the limit")), None);
        budget.add(1);
        // Others wrote as much, so of the 400 that are left 200 are ours.
        let now = Machine { dirty: 400 * MIB, left: 400 * MIB };
        assert_eq!(budget.begin_writeback_knowing(|| now), None);
        assert!(budget.would_not_wait(200 * MIB));
        assert!(!budget.would_not_wait(200 * MIB + 1));
    }

    #[test]
    fn one_writeback_at_a_time_and_only_when_nothing_is_left() {
        let budget = budget(80 * MIB);
        let full = |dirty| move || Machine { dirty, left: MIB };
        budget.add(20 * MIB);
        assert_eq!(budget.begin_writeback_knowing(full(20 * MIB)), Some(20 * MIB));
        assert!(!budget.would_not_wait(MIB));
        budget.add(20 * MIB);
        assert_eq!(budget.begin_writeback_knowing(full(40 * MIB)), None);
        budget.end_writeback(Some(20 * MIB));
        assert_eq!(budget.dirty(), 20 * MIB);
        assert_eq!(budget.begin_writeback_knowing(full(20 * MIB)), Some(40 * MIB));
        // It failed: nothing is clean, and the kernel is not asked at each write.
        budget.end_writeback(None);
        assert_eq!(budget.dirty(), 20 * MIB);
        assert_eq!(budget.begin_writeback_knowing(|| panic!("asked at once again")), None);
        budget.add(STEP_BYTES_MIN);
        let now = Machine { dirty: 20 * MIB, left: 80 * MIB };
        assert_eq!(budget.begin_writeback_knowing(|| now), None);
        assert!(budget.would_not_wait(40 * MIB));
    }

    #[test]
    fn what_the_kernel_knows_to_be_clean_does_not_count() {
        let budget = budget(800 * MIB);
        // The same bytes again and again: little is dirty.
        for _ in 0..10 {
            budget.add(200 * MIB);
            let now = Machine { dirty: 4096, left: 800 * MIB };
            assert_eq!(budget.begin_writeback_knowing(|| now), None);
            assert_eq!(budget.dirty(), 4096);
            assert!(budget.would_not_wait(400 * MIB));
        }
    }
}
