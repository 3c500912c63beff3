//! Cache of slices of L2 tables, looked up without a lock. Every format with such tables uses it.
//!
//! - Set-associative and bounded: [`SLICES_MAX`] slices, about 52 MiB, whatever the image's size; a small image gets a small one.
//! - A slice that is put in takes the place of its set's oldest. Losing a slice is always safe: one that holds what the
//!   file does not have yet is kept elsewhere (the format's pinned slices).
//! - Only a format's tables put slices in, under the lock of the slice's shard, so that there is at most one copy of a slice.
//!
//! Not here: reading slices.

use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};
use readonce_storage::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::number::index;

/// What is cached: a piece of an L2 table.
pub(crate) trait Slice {
    /// Which: counted over the whole guest.
    fn index(&self) -> u64;
}

const WAYS: usize = 6;
const SETS_MAX: u64 = 2048;
/// Slices in the cache at most; each takes 4 KiB and about 150 bytes.
pub(crate) const SLICES_MAX: u64 = SETS_MAX * 6;
const _: () = assert!(WAYS == 6);

struct Set<S> {
    /// Index of the slice in each way, plus 1; 0 for none. A hint that saves looking into the other ways.
    tags: [AtomicU64; WAYS],
    ways: [ArcSwapOption<S>; WAYS],
    /// The way that was filled longest ago.
    oldest: AtomicUsize,
}

/// The cache.
pub(crate) struct Cache<S> {
    sets: Box<[Set<S>]>,
}

impl<S: Slice> Cache<S> {
    /// A cache for an image of `slices` slices.
    pub(crate) fn new(slices: u64) -> Self {
        let sets = slices.div_ceil(SLICES_MAX / SETS_MAX).clamp(1, SETS_MAX).next_power_of_two();
        let set = || Set {
            tags: [const { AtomicU64::new(0) }; WAYS],
            ways: [const { ArcSwapOption::const_empty() }; WAYS],
            oldest: AtomicUsize::new(0),
        };
        Self { sets: std::iter::repeat_with(set).take(index(sets)).collect() }
    }

    fn set(&self, slice_index: u64) -> &Set<S> {
        let at = index(slice_index) & (self.sets.len() - 1);
        self.sets.get(at).expect("the count of sets is a power of two")
    }

    /// The slice, if it is here.
    pub(crate) fn find(&self, slice_index: u64) -> Option<Guard<Option<Arc<S>>>> {
        let set = self.set(slice_index);
        let tag = slice_index + 1;
        for (found, way) in set.tags.iter().zip(&set.ways) {
            if found.load(Ordering::Acquire) == tag {
                let slice = way.load();
                if slice.as_ref().is_some_and(|slice| slice.index() == slice_index) {
                    return Some(slice);
                }
            }
        }
        None
    }

    /// Puts the slice in, unless it is here.
    pub(crate) fn put(&self, slice: Arc<S>) {
        if self.find(slice.index()).is_some() {
            return;
        }
        let set = self.set(slice.index());
        let way = set.oldest.fetch_add(1, Ordering::Relaxed) % WAYS;
        if let (Some(tag), Some(place)) = (set.tags.get(way), set.ways.get(way)) {
            let new = slice.index() + 1;
            // Between the two stores the tag is a miss or names the old slice's place: `find` looks at the slice itself.
            place.store(Some(slice));
            tag.store(new, Ordering::Release);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        for set in &self.sets {
            for (tag, way) in set.tags.iter().zip(&set.ways) {
                tag.store(0, Ordering::Release);
                way.store(None);
            }
        }
    }
}
