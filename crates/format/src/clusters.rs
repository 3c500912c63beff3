//! Space in the file: which clusters are handed out next.
//!
//! - From holes that are known to be free, else appended at the end of the last whole cluster. A run is contiguous.
//! - Handing out is one short lock; the file system is asked for room ahead of need, [`WINDOW_BYTES`] at a time, so that a
//!   64 KiB cluster costs no call of its own. Where the disk is nearly full, exactly what is needed is asked for.
//! - A run that is dropped without [`Run::keep`] is free again.
//!
//! Not here: which clusters a table refers to.

use std::{collections::BTreeMap, sync::Arc};

use readonce_storage::{Storage, flat::is_no_space, sync::Mutex};

use crate::{
    FormatError,
    number::{bytes, index},
};

/// Bytes that are asked of the file system ahead of need.
pub(crate) const WINDOW_BYTES: u64 = 8 << 20;
/// Holes that are remembered; further ones are found again when the image is closed.
const HOLES_MAX: usize = 1 << 16;
/// Holes that a search looks at, so that it stays short under the lock.
const HOLES_SEARCHED_MAX: usize = 64;
/// A hole shorter than this is not taken for a longer wish: one write in many pieces costs more than the space.
const HOLE_CLUSTERS_MIN: u64 = 16;

/// The file's space.
pub(crate) struct Clusters {
    file: Arc<dyn Storage>,
    cluster_size: u64,
    state: Mutex<State>,
    grow: tokio::sync::Mutex<()>,
}

struct State {
    /// Where the next appended cluster goes, bytes.
    end: u64,
    /// From here on the file has never been handed out: it reads as zeros.
    touched_end: u64,
    /// From `grown_start` to here the file system holds room.
    grown_end: u64,
    /// Where appending began: what lies below was there before, perhaps without room of its own.
    grown_start: u64,
    /// Bytes to ask for ahead: 0 where the disk is nearly full.
    window: u64,
    /// Free runs: start to bytes. Neighbours are merged.
    holes: BTreeMap<u64, u64>,
    /// Whether a hole was dropped for want of memory.
    forgotten: bool,
}

/// How a run is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fit {
    /// All of it, or nothing.
    Whole,
    /// A shorter run will do.
    AtMost,
}

/// Clusters that were handed out. Dropped, they are free again.
pub(crate) struct Run {
    clusters: Arc<Clusters>,
    /// Byte offset.
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Whether the run reads as zeros, since nobody ever wrote it.
    pub(crate) fresh: bool,
}

impl Clusters {
    /// The space of a file whose first `end` bytes may be in use.
    pub(crate) fn new(file: Arc<dyn Storage>, cluster_size: u64, end: u64) -> Self {
        let file_len = file.len();
        let state = State {
            end,
            touched_end: file_len,
            grown_end: end,
            grown_start: end,
            window: WINDOW_BYTES,
            holes: BTreeMap::new(),
            forgotten: false,
        };
        Self { file, cluster_size, state: Mutex::new(state), grow: tokio::sync::Mutex::new(()) }
    }

    /// Hands out `len` bytes (a multiple of the cluster size, not 0), or fewer if `fit` allows.
    pub(crate) fn take(self: &Arc<Self>, len: u64, fit: Fit) -> Run {
        let mut state = self.state.lock();
        let enough = match fit {
            Fit::Whole => len,
            Fit::AtMost => len.min(HOLE_CLUSTERS_MIN * self.cluster_size),
        };
        let hole = state.holes.iter().take(HOLES_SEARCHED_MAX).find(|&(_, &hole)| hole >= enough);
        let (at, len, fresh) = match hole.map(|(&at, &hole)| (at, hole)) {
            Some((at, hole)) => {
                let len = len.min(hole);
                state.holes.remove(&at);
                if hole > len {
                    state.holes.insert(at + len, hole - len);
                }
                (at, len, false)
            }
            None => {
                let at = state.end;
                state.end += len;
                let fresh = at >= state.touched_end;
                state.touched_end = state.touched_end.max(state.end);
                (at, len, fresh)
            }
        };
        Run { clusters: self.clone(), at, len, fresh }
    }

    /// Makes sure that writing the `len` bytes at `at`, which were handed out, meets no "no space".
    pub(crate) async fn make_room(&self, at: u64, len: u64) -> Result<(), FormatError> {
        let run_end = at + len;
        if at < self.state.lock().grown_start {
            self.file.allocate(at, len).await?;
        }
        if run_end <= self.state.lock().grown_end {
            return Ok(());
        }
        let _one_at_a_time = self.grow.lock().await;
        let (grown_end, window) = {
            let state = self.state.lock();
            (state.grown_end, state.window)
        };
        let Some(need) = run_end.checked_sub(grown_end).filter(|&need| need > 0) else { return Ok(()) };
        let ahead = need.max(window - window % self.cluster_size);
        match self.file.allocate(grown_end, ahead).await {
            Ok(()) => self.grown(grown_end + ahead, (window * 2).max(self.cluster_size).min(WINDOW_BYTES)),
            Err(error) if is_no_space(&error) && ahead > need => {
                self.file.allocate(grown_end, need).await?;
                self.grown(run_end, 0);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn grown(&self, grown_end: u64, window: u64) {
        let mut state = self.state.lock();
        state.grown_end = state.grown_end.max(grown_end);
        state.window = window;
    }

    /// These bytes are free: nothing on disk or in memory refers to them.
    pub(crate) fn free(&self, at: u64, len: u64) {
        let mut state = self.state.lock();
        let mut start = at;
        let mut end = at + len;
        if let Some((&before, &before_len)) = state.holes.range(..at).next_back()
            && before + before_len == at
        {
            state.holes.remove(&before);
            start = before;
        }
        if let Some(after_len) = state.holes.remove(&end) {
            end += after_len;
        }
        if end == state.end {
            state.end = start;
        } else if state.holes.len() < HOLES_MAX {
            state.holes.insert(start, end - start);
        } else {
            state.forgotten = true;
        }
    }

    /// Whether there are free clusters below the end.
    pub(crate) fn has_holes(&self) -> bool {
        let state = self.state.lock();
        state.forgotten || !state.holes.is_empty()
    }

    /// Cuts the file where the last cluster in use ends. Nothing may be in flight.
    pub(crate) async fn cut(&self) -> Result<(), FormatError> {
        let _nobody_grows = self.grow.lock().await;
        let end = self.state.lock().end;
        if self.file.len() > end {
            self.file.set_len(end).await?;
        }
        let mut state = self.state.lock();
        state.touched_end = end;
        state.grown_end = end;
        state.grown_start = end;
        Ok(())
    }

    /// Begins anew with what the file is now: others have moved its clusters. Nothing may be in flight.
    pub(crate) fn reset(&self, end: u64) {
        let fresh = Self::new(self.file.clone(), self.cluster_size, end);
        *self.state.lock() = fresh.state.into_inner();
    }
}

impl Run {
    /// The first `len` bytes are in use from now on; the rest is given back.
    pub(crate) fn keep(mut self, len: u64) {
        let rest = self.len - len;
        if rest > 0 {
            self.clusters.free(self.at + len, rest);
        }
        self.len = 0;
    }

    /// The clusters that `used` names (by their number within the run) are in use from now on; the others are given
    /// back.
    pub(crate) fn keep_each(mut self, used: &[bool]) {
        let cluster_size = self.clusters.cluster_size;
        let count = self.len / cluster_size;
        let unused = (0..count).filter(|&at| !used.get(index(at)).copied().unwrap_or(false));
        let (clusters, start) = (self.clusters.clone(), self.at);
        assert!(bytes(used.len()) <= count, "a commit links no more than its reservation");
        self.len = 0;
        unused.for_each(|at| clusters.free(start + at * cluster_size, cluster_size));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.len > 0 {
            self.clusters.free(self.at, self.len);
        }
    }
}
