//! Space in the file: clusters that are handed out, counted, and taken back.
//!
//! - A cluster that is handed out has a refcount of 1 in memory from then on.
//! - Clusters that were free when the image was opened are found by a scan of the refcounts, a step at a time beside the
//!   guest, as new room is needed; the scan passes each cluster once. Behind it, and past the old end, holes are known
//!   here; before it, a cluster that becomes free is left for the scan.
//! - A cluster that nothing names any more is handed out again only after [`Unlinked::reuse`].
//!
//! Not here: refcounts as such (`refs`), and the choice of a hole (`clusters`).

use std::{collections::BTreeSet, ops::Range, sync::Arc};

use readonce_storage::{
    Rt,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{links::Released, mark::Mark, refs::Refs, tables::Tables};
use crate::{
    FormatError, Unlinked,
    clusters::{Clusters, Fit},
};

/// Pieces of refcounts that a step of the scan reads: 1 MiB.
const SCAN_PIECES: u64 = 256;
/// Bytes that are appended between steps of the scan.
const SCAN_EVERY_BYTES: u64 = 8 << 20;

/// The space of an image that is open for writing.
pub(super) struct Space {
    pub(super) clusters: Arc<Clusters>,
    pub(super) refs: Arc<Refs>,
    tables: Arc<Tables>,
    mark: Arc<Mark>,
    rt: Rt,
    cluster_size: u64,
    /// Where appending began, bytes: below, the scan looks for holes.
    open_end: u64,
    state: Mutex<State>,
    /// Bytes to append before the scan goes on.
    scan_due: AtomicU64,
    scanning: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// The scan has passed everything below, bytes.
    cursor: u64,
    /// Free, but somebody may still read there.
    unlinked: BTreeSet<u64>,
    /// Of these, those that were not handed out yet.
    fresh_unlinked: Vec<u64>,
    /// Clusters to be lowered once their refcounts are in memory: nobody names them.
    to_lower: Vec<u64>,
}

impl Space {
    pub(super) fn new(
        clusters: Arc<Clusters>,
        refs: Arc<Refs>,
        tables: Arc<Tables>,
        mark: Arc<Mark>,
        rt: Rt,
        open_end: u64,
    ) -> Self {
        Self {
            cluster_size: tables.rules.layout.cluster_size(),
            clusters,
            refs,
            tables,
            mark,
            rt,
            open_end,
            state: Mutex::default(),
            scan_due: AtomicU64::new(0),
            scanning: tokio::sync::Mutex::new(()),
        }
    }

    /// Hands out `len` bytes (whole clusters), or fewer if `fit` allows, counted and with room in the file system.
    pub(super) async fn take(self: &Arc<Self>, len: u64, fit: Fit) -> Result<Taken, FormatError> {
        let run = self.clusters.take(len, fit);
        let (at, len) = (run.at, run.len);
        if at >= self.open_end {
            self.appended(len);
        }
        self.refs.raise(&self.tables, at, len).await?;
        // From here on the refcounts are to be lowered where the run is given back.
        let taken = Taken { space: self.clone(), at, len, fresh: run.fresh };
        run.keep(len);
        self.clusters.make_room(at, len).await?;
        Ok(taken)
    }

    /// Nobody names these clusters, which were taken: no entry ever did.
    fn give_back(&self, at: u64, len: u64) {
        for cluster in (at..at + len).step_by(crate::number::index(self.cluster_size)) {
            match self.refs.lower_now(cluster) {
                Some(0) => self.clusters.free(cluster, self.cluster_size),
                Some(_) => {}
                None => self.state.lock().to_lower.push(cluster),
            }
        }
    }

    /// Lowers what could not be lowered at once.
    pub(super) async fn lower_late(&self) -> Result<(), FormatError> {
        loop {
            let Some(cluster) = self.state.lock().to_lower.pop() else { return Ok(()) };
            match self.refs.lower(cluster).await {
                Ok(Some(0)) => self.clusters.free(cluster, self.cluster_size),
                Ok(_) => {}
                Err(error) => {
                    self.state.lock().to_lower.push(cluster);
                    return Err(error);
                }
            }
        }
    }

    /// The disk shows these no more: takes each out of `released` and lowers its refcounts. Clusters that nothing else uses are
    /// free once nobody reads there.
    pub(super) async fn release(&self, released: &mut Vec<Released>) -> Result<(), FormatError> {
        let mut tables_gone = false;
        while let Some(&last) = released.last() {
            let table = matches!(last, Released::Table(_));
            if table && !tables_gone {
                self.tables.readers_gone().await;
                tables_gone = true;
            }
            // All pieces first: from the first that is lowered on, the rest must not fail.
            for cluster in last.clusters(self.cluster_size) {
                self.refs.load_piece_of(cluster / self.cluster_size).await?;
            }
            released.pop();
            for cluster in last.clusters(self.cluster_size) {
                if table {
                    self.tables.known().gone(cluster..cluster + self.cluster_size);
                }
                self.lower_released(cluster, table).await?;
            }
        }
        Ok(())
    }

    /// Lowers a refcount. A cluster that becomes free is handed out again at once (`table`: nobody reads there), or when that is
    /// said.
    async fn lower_released(&self, cluster: u64, table: bool) -> Result<(), FormatError> {
        // Before the scan can see that it is free.
        self.state.lock().unlinked.insert(cluster);
        let left = self.refs.lower(cluster).await;
        let mut state = self.state.lock();
        match left {
            Ok(Some(0)) if table => {
                drop(state);
                self.reuse(cluster);
                return Ok(());
            }
            Ok(Some(0)) => {
                state.fresh_unlinked.push(cluster);
                return Ok(());
            }
            Ok(Some(_)) | Err(_) => {}
            Ok(None) => tracing::warn!(cluster, "a cluster that was in use had a refcount of 0"),
        }
        state.unlinked.remove(&cluster);
        left.map(drop)
    }

    /// The cluster is free and nobody reads there.
    fn reuse(&self, cluster: u64) {
        let mut state = self.state.lock();
        state.unlinked.remove(&cluster);
        if cluster < self.open_end && cluster >= state.cursor {
            // The scan will find it.
            return;
        }
        drop(state);
        self.clusters.free(cluster, self.cluster_size);
    }

    /// Where a table lay that no header names any more.
    pub(super) async fn release_table(&self, range: Range<u64>) -> Result<(), FormatError> {
        self.tables.known().gone(range.clone());
        for cluster in range.step_by(crate::number::index(self.cluster_size)) {
            self.lower_released(cluster, true).await?;
        }
        Ok(())
    }

    /// Nothing referred to the cluster when the image was opened: if it is counted all the same, and nothing changed that
    /// since, it is free. Its refcount is in memory, or it stays what it is.
    pub(super) fn reclaim(&self, cluster: u64) -> bool {
        let state = self.state.lock();
        if self.refs.lower_to(cluster, 0) != Some(0) {
            return false;
        }
        if cluster < state.cursor {
            self.clusters.free(cluster, self.cluster_size);
        }
        true
    }

    /// Clusters that became free and were not handed out yet.
    pub(super) fn take_unlinked(self: &Arc<Self>) -> Option<Unlinked> {
        let clusters = std::mem::take(&mut self.state.lock().fresh_unlinked);
        if clusters.is_empty() {
            return None;
        }
        let space = self.clone();
        Some(Unlinked::new(move || clusters.into_iter().for_each(|cluster| space.reuse(cluster))))
    }

    /// Room was appended: time for the scan to go on.
    fn appended(self: &Arc<Self>, len: u64) {
        if self.state.lock().cursor >= self.open_end {
            return;
        }
        let due = self.scan_due.load(Ordering::Relaxed);
        if due > len {
            self.scan_due.store(due - len, Ordering::Relaxed);
            return;
        }
        self.scan_due.store(SCAN_EVERY_BYTES, Ordering::Relaxed);
        let space = self.clone();
        self.rt.spawn(Box::pin(async move {
            if let Err(error) = space.scan_step().await {
                tracing::debug!(%error, "free clusters were not looked for further");
            }
        }));
    }

    /// Looks at all refcounts for free clusters.
    pub(super) async fn scan_all(&self) -> Result<(), FormatError> {
        while self.state.lock().cursor < self.open_end {
            self.scan_step().await?;
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Looks at the next refcounts for free clusters. Where they are wrong the image is marked corrupt: nothing that they call free
    /// is handed out.
    async fn scan_step(&self) -> Result<(), FormatError> {
        let _one_at_a_time = self.scanning.lock().await;
        let looked = self.scan_pieces().await;
        if let Err(error @ FormatError::Corrupt { .. }) = &looked {
            tracing::error!("the image is marked corrupt: {error}");
            self.mark.set_corrupt().await;
        }
        looked
    }

    /// The step. `scanning` is held.
    async fn scan_pieces(&self) -> Result<(), FormatError> {
        for _ in 0..SCAN_PIECES {
            let cursor = self.state.lock().cursor;
            if cursor >= self.open_end {
                return Ok(());
            }
            let first = cursor / self.cluster_size;
            let per_piece = self.refs.per_piece();
            let end = (first - first % per_piece + per_piece).min(self.open_end / self.cluster_size);
            self.refs.load_piece_of(first).await?;
            let found = {
                // Under this lock no cluster goes from unlinked to free.
                let mut state = self.state.lock();
                let Some(found) = self.refs.unused(first..end) else { continue };
                let holes = self.holes(&state, found)?;
                state.cursor = end * self.cluster_size;
                holes
            };
            found.into_iter().for_each(|hole| self.clusters.free(hole.start, hole.end - hole.start));
        }
        Ok(())
    }

    /// Of unused clusters, those that may be handed out; as byte ranges.
    ///
    /// # Errors
    /// `Corrupt` where metadata lies in one: what else has no refcount may be in use as well.
    fn holes(&self, state: &State, found: Vec<Range<u64>>) -> Result<Vec<Range<u64>>, FormatError> {
        let cluster_size = self.cluster_size;
        let known = self.tables.known();
        let end = known.end();
        let mut holes: Vec<Range<u64>> = Vec::new();
        for at in found.into_iter().flatten().map(|cluster| cluster * cluster_size) {
            if at + cluster_size > end || state.unlinked.contains(&at) {
                continue;
            }
            if known.is_metadata(at) {
                return Err(FormatError::corrupt(
                    format!("refcount of cluster {}", at / cluster_size),
                    0,
                    "must not be 0 where metadata lies: check and repair the image",
                ));
            }
            match holes.last_mut() {
                Some(hole) if hole.end == at => hole.end += cluster_size,
                _ => holes.push(at..at + cluster_size),
            }
        }
        Ok(holes)
    }

    /// Waits until no scan runs.
    pub(super) async fn scan_ended(&self) {
        drop(self.scanning.lock().await);
    }
}

/// Clusters that were handed out. Dropped, they are free again.
pub(super) struct Taken {
    space: Arc<Space>,
    at: u64,
    len: u64,
    fresh: bool,
}

impl Taken {
    /// Byte offset.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether they read as zeros, since nobody ever wrote them.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// All are in use from now on.
    pub(super) fn keep(mut self) {
        self.len = 0;
    }

    /// The clusters that `used` names (by their number) are in use from now on; the others are given back.
    pub(super) fn keep_each(mut self, used: &[bool]) {
        let cluster_size = self.space.cluster_size;
        let count = self.len / cluster_size;
        self.len = 0;
        for number in 0..count {
            if !used.get(crate::number::index(number)).copied().unwrap_or(false) {
                self.space.give_back(self.at + number * cluster_size, cluster_size);
            }
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.len > 0 {
            self.space.give_back(self.at, self.len);
        }
    }
}
