//! What an image that is open for writing knows of its file: where metadata lies, and which entries were wrong from the start.
//!
//! - Data must not lie in metadata: a guest's write would destroy it. Offsets are looked at when a slice is read.
//! - An entry past the end that the file had when it was opened was wrong then, and does not become right because the file
//!   grows: it would show what is allocated there now.
//!
//! Not here: tables of internal snapshots below their L1 tables.

use std::{collections::BTreeMap, ops::Range};

use readonce_storage::sync::RwLock;

/// What is known.
pub(super) struct Known {
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    /// Metadata when the image was opened: runs, sorted, not touching.
    fixed: Box<[Range<u64>]>,
    /// Of these, clusters that are not metadata any more: offset to end.
    gone: BTreeMap<u64, u64>,
    /// Metadata that was made since: offset to end.
    made: BTreeMap<u64, u64>,
    /// Where the file's clusters ended when it was opened, bytes.
    end: u64,
    /// Slices that were pinned since then, and their bad entries: the others may lie past `end`. 24 bytes for each slice, and
    /// the image's size bounds them.
    touched: BTreeMap<u64, Touched>,
}

/// A slice that was pinned.
struct Touched {
    bad: Box<[u64]>,
    /// Whether the file system holds room for it.
    has_room: bool,
}

impl Known {
    /// `metadata` in any order; ranges may touch and overlap.
    pub(super) fn new(mut metadata: Vec<Range<u64>>, end: u64) -> Self {
        metadata.retain(|range| !range.is_empty());
        metadata.sort_unstable_by_key(|range| range.start);
        let mut fixed: Vec<Range<u64>> = Vec::new();
        for range in metadata {
            match fixed.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => fixed.push(range),
            }
        }
        let state = State { fixed: fixed.into(), end, ..State::default() };
        Self { state: RwLock::new(state) }
    }

    /// New metadata.
    pub(super) fn made(&self, range: Range<u64>) {
        self.state.write().made.insert(range.start, range.end);
    }

    /// A cluster, or clusters in a row, that are not metadata any more.
    pub(super) fn gone(&self, range: Range<u64>) {
        let mut state = self.state.write();
        if state.made.remove(&range.start).is_none() {
            state.gone.insert(range.start, range.end);
        }
    }

    /// Where the file's clusters ended when it was opened, bytes.
    pub(super) fn end(&self) -> u64 {
        self.state.read().end
    }

    /// Whether metadata lies in the cluster at `offset`.
    pub(super) fn is_metadata(&self, offset: u64) -> bool {
        self.state.read().clear_around(offset, 1).is_none()
    }

    /// A slice is about to be changed; these are its bad entries.
    pub(super) fn touch(&self, slice_index: u64, bad: impl FnOnce() -> Box<[u64]>) {
        let touched = || Touched { bad: bad(), has_room: false };
        self.state.write().touched.entry(slice_index).or_insert_with(touched);
    }

    /// Whether the file system holds room for a slice that was touched.
    pub(super) fn has_room(&self, slice_index: u64) -> bool {
        self.state.read().touched.get(&slice_index).is_some_and(|touched| touched.has_room)
    }

    /// From now on it does.
    pub(super) fn room_made(&self, slice_index: u64) {
        if let Some(touched) = self.state.write().touched.get_mut(&slice_index) {
            touched.has_room = true;
        }
    }

    /// Calls `work` with a function that says whether entry so-and-so of the slice may have its data in the cluster at
    /// so-and-so.
    pub(super) fn judge<T>(
        &self,
        slice_index: u64,
        cluster_size: u64,
        work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> T,
    ) -> T {
        let state = self.state.read();
        let touched = state.touched.get(&slice_index);
        let end = if touched.is_none() { state.end } else { u64::MAX };
        // Runs of clusters are the rule: what follows a cluster known to lie before the next table needs no search.
        let mut clear = 0..0;
        work(&mut |at, offset| {
            if offset.saturating_add(cluster_size) > end
                || touched.is_some_and(|touched| touched.bad.contains(&at))
            {
                return false;
            }
            if !clear.contains(&offset) {
                match state.clear_around(offset, cluster_size) {
                    Some(around) => clear = around,
                    None => return false,
                }
            }
            true
        })
    }
}

impl State {
    /// The range around `offset` that no metadata lies in.
    fn clear_around(&self, offset: u64, cluster_size: u64) -> Option<Range<u64>> {
        let before = self.made.range(..=offset).next_back().map_or(0, |(_, &end)| end);
        let after = self.made.range(offset..).next().map_or(u64::MAX, |(&start, _)| start);
        if before > offset {
            return None;
        }
        let next = self.fixed.partition_point(|range| range.start <= offset);
        let last = next.checked_sub(1).and_then(|at| self.fixed.get(at));
        if last.is_some_and(|last| last.end > offset) {
            let gone = self.gone.range(..=offset).next_back().is_some_and(|(_, &end)| end > offset);
            return gone.then(|| offset..offset + cluster_size);
        }
        let before = before.max(last.map_or(0, |last| last.end));
        let after = after.min(self.fixed.get(next).map_or(u64::MAX, |range| range.start));
        Some(before..after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(known: &Known, slice_index: u64) -> String {
        known.judge(slice_index, 1, |valid| {
            (0..10).map(|offset| if valid(offset, offset) { '.' } else { 'X' }).collect()
        })
    }

    #[test]
    fn metadata_and_the_end() {
        let known = Known::new(vec![4..6, 0..2, 1..2, 6..6], 9);
        assert_eq!(drawn(&known, 0), "XX..XX...X");
        known.made(7..8);
        assert_eq!(drawn(&known, 0), "XX..XX.X.X");
        known.gone(5..6);
        assert_eq!(drawn(&known, 0), "XX..X..X.X");
        known.gone(7..8);
        assert_eq!(drawn(&known, 0), "XX..X....X");
        known.made(5..6);
        assert_eq!(drawn(&known, 0), "XX..XX...X");
    }

    #[test]
    fn entries_of_a_slice_that_was_changed_may_lie_past_the_end_unless_they_were_bad() {
        let known = Known::new(vec![], 4);
        assert_eq!(drawn(&known, 3), "....XXXXXX");
        known.touch(3, || [5, 7].into());
        assert_eq!(drawn(&known, 3), ".....X.X..");
        assert_eq!(drawn(&known, 2), "....XXXXXX");
    }
}
