//! Durability: flush rounds, groups of fills, settling, closing.
//!
//! - A flush first completes the units that were written in part, then lets the format order data and links, then syncs.
//! - Flushes at the same time share a round: one that arrives while a round runs is served by the next.
//! - What was committed without a flush is linked in groups: at [`GROUP_BYTES_MAX`] of fills, or [`GROUP_MS_MAX`] after the first.
//!   A guest asks for a flush itself where it wants one, and each sync holds up its writes: where there is no fill, a group is as large
//!   as [`GUEST_GROUP_BYTES_MAX`] and as old as [`GUEST_GROUP_MS_MAX`].
//! - What a round unlinked is used again once every read and write that may have looked it up has ended (`uses`).
//! - An image that was idle for [`SETTLE_MS`] loses its dirty mark.

use std::time::Duration;

use readonce_format::{Durability, Reservation, Unlinked};
use readonce_origin::Class;
use readonce_storage::{
    runtime::timeout,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::{
    LayerError,
    image::Image,
    inflight::{Fetch, Store},
};

/// Bytes of fills that one group links at most before it is closed.
pub const GROUP_BYTES_MAX: u64 = 32 << 20;
/// How long a group with a fill stays open, milliseconds: what a kill may cost in fills.
pub const GROUP_MS_MAX: u64 = 500;
/// Bytes that one group links at most, whoever brought them.
pub const GUEST_GROUP_BYTES_MAX: u64 = 1 << 30;
/// How long a group without a fill stays open, milliseconds: what a kill may cost a guest that does not flush. ext4 commits as often.
pub const GUEST_GROUP_MS_MAX: u64 = 5_000;
/// How long nothing must have been allocated before the dirty mark is taken off, milliseconds; QEMU's QED timer is as long.
pub const SETTLE_MS: u64 = 5_000;

/// The shared state of flushes and groups.
#[derive(Default)]
pub(crate) struct Rounds {
    running: tokio::sync::Mutex<()>,
    /// Tickets handed out, and the highest that a finished round has served.
    asked: AtomicU64,
    served: AtomicU64,
    /// A group with a fill is open and its timer runs; one without.
    group_open: [AtomicBool; 2],
    /// A full group is about to be closed.
    group_full: AtomicBool,
    /// Bytes of fills that were committed since the last group was closed.
    fill_bytes: AtomicU64,
    /// Held by who waits for the users of what was unlinked.
    reusing: tokio::sync::Mutex<()>,
    /// Commits so far, and how many of them an image had that was idle.
    commits: AtomicU64,
    settled: AtomicU64,
    closing: AtomicBool,
}

impl Image {
    /// Makes every write that completed before the call durable.
    pub async fn flush(&self) -> Result<(), LayerError> {
        self.check_latch()?;
        // Before the round: this may wait for the origin, and groups, a close and other flushes do not wait for that.
        let completed = self.complete_guest_units().await;
        let ticket = self.rounds.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let image = self.shared();
        // To its end: of a sync that nobody waits for any more, nobody would learn that it failed.
        self.detached(async move { image.serve_flush(ticket).await }).await?;
        // What is complete is durable even where something else could not be had.
        completed
    }

    /// Sees to a round that began after this ticket was taken.
    async fn serve_flush(&self, ticket: u64) -> Result<(), LayerError> {
        let _round = self.rounds.running.lock().await;
        if self.rounds.served.load(Ordering::Acquire) < ticket {
            let serves = self.rounds.asked.load(Ordering::Acquire);
            self.flush_round().await?;
            self.rounds.served.store(serves, Ordering::Release);
        }
        Ok(())
    }

    async fn flush_round(&self) -> Result<(), LayerError> {
        self.check_latch()?;
        self.mapper.flush(Durability::Durable).await.map_err(|error| self.failed(error))?;
        self.check_latch()?;
        self.start_reuse();
        Ok(())
    }

    /// Lets what was unlinked be used again, in the background.
    fn start_reuse(&self) {
        if self.uses.is_none() {
            return;
        }
        let mut unlinked = std::iter::from_fn(|| self.mapper.take_unlinked()).peekable();
        if unlinked.peek().is_none() {
            return;
        }
        let (image, unlinked): (_, Vec<_>) = (self.shared(), unlinked.collect());
        self.rt.spawn(Box::pin(async move { image.reuse(unlinked).await }));
    }

    async fn reuse(&self, unlinked: Vec<Unlinked>) {
        let Some(uses) = &self.uses else { return };
        let _in_order = self.rounds.reusing.lock().await;
        uses.quiesce().await;
        // A write whose caller went away may still be under way in the kernel, until a sync has passed: one of the format's, which
        // are in order.
        if uses.take_torn()
            && let Err(error) = self.mapper.flush(Durability::Durable).await
        {
            let error = self.failed(error);
            tracing::warn!("what was unlinked is not used again: {error}");
            return;
        }
        unlinked.into_iter().for_each(Unlinked::reuse);
    }

    /// The same at the end: no flush comes later that would try again. A fetch or a store that began before may end by what
    /// the origin or the disk was then, so that what it leaves gets one more.
    async fn complete_last(&self) -> Result<(), LayerError> {
        let began_before = self.table().is_guest_under_way();
        match self.complete_guest_units().await {
            Err(_) if began_before => self.complete_guest_units().await,
            done => done,
        }
    }

    /// Brings every unit that was written in part into the image.
    async fn complete_guest_units(&self) -> Result<(), LayerError> {
        let work = self.table().begin_flush();
        self.start_flush_work(work.fetches, work.stores);
        let mut failure = None;
        for told in work.waits {
            if let Ok(Err(error)) = told.await {
                failure = Some(error);
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub(crate) fn start_flush_work(&self, fetches: Vec<Fetch>, stores: Vec<Store<Reservation>>) {
        for fetch in fetches {
            self.start_fetch(fetch, Class::Demand);
        }
        self.start_stores(stores);
    }

    /// Told after each commit: opens a group, or closes a full one. `fill_bytes`: how many came from the backing.
    pub(crate) fn note_commit(&self, fill_bytes: u64) {
        let rounds = &self.rounds;
        rounds.commits.fetch_add(1, Ordering::AcqRel);
        let filled = rounds.fill_bytes.fetch_add(fill_bytes, Ordering::AcqRel) + fill_bytes;
        let full = filled >= GROUP_BYTES_MAX || self.mapper.unlinked_bytes() >= GUEST_GROUP_BYTES_MAX;
        let (kind, ms_max) = if fill_bytes > 0 { (0, GROUP_MS_MAX) } else { (1, GUEST_GROUP_MS_MAX) };
        let opened = !rounds.group_open[kind].swap(true, Ordering::AcqRel);
        if opened {
            let image = self.shared();
            self.rt.spawn(Box::pin(async move { image.group_timer(kind, ms_max).await }));
        }
        if full && !rounds.group_full.swap(true, Ordering::AcqRel) {
            let image = self.shared();
            self.rt.spawn(Box::pin(async move { image.close_group().await }));
        }
    }

    async fn group_timer(&self, kind: usize, ms_max: u64) {
        self.rt.sleep(Duration::from_millis(ms_max)).await;
        self.rounds.group_open[kind].store(false, Ordering::Release);
        let commits = self.rounds.commits.load(Ordering::Acquire);
        self.close_group().await;
        self.rt.sleep(Duration::from_millis(SETTLE_MS)).await;
        let idle = self.rounds.commits.load(Ordering::Acquire) == commits;
        // The other kind's timer may have been here.
        if idle && self.rounds.settled.swap(commits, Ordering::AcqRel) != commits {
            let _round = self.rounds.running.lock().await;
            if self.check_open().is_err() {
                return;
            }
            if let Err(error) = self.mapper.settle().await {
                let error = self.failed(error);
                tracing::warn!("the dirty mark stays: {error}");
            }
        }
    }

    async fn close_group(&self) {
        let _round = self.rounds.running.lock().await;
        if self.check_open().is_err() {
            return;
        }
        self.rounds.group_full.store(false, Ordering::Release);
        self.rounds.fill_bytes.store(0, Ordering::Release);
        if let Err(error) = self.mapper.flush(Durability::Linked).await {
            let error = self.failed(error);
            tracing::warn!("fills not linked: {error}");
            return;
        }
        self.start_reuse();
    }

    async fn wait_local(&self) {
        loop {
            let told = self.table().wait_local();
            let Some(told) = told else { break };
            let _ = told.await;
        }
    }

    /// Whether units may still be claimed and stored.
    pub(crate) fn check_open(&self) -> Result<(), LayerError> {
        self.check_latch()?;
        match self.rounds.closing.load(Ordering::Acquire) {
            true => Err(LayerError::NoBacking("the image is closed".into())),
            false => Ok(()),
        }
    }

    /// Looks in the background for what a crash left unlinked.
    pub fn start_reclaim(&self) {
        let image = self.shared();
        self.rt.spawn(Box::pin(async move {
            if let Err(error) = image.mapper.reclaim().await {
                tracing::warn!("what a crash left is not reclaimed: {error}");
            }
        }));
    }

    /// Ends all use: flushes, then closes the image clean. No guest request may be under way.
    ///
    /// # Errors
    /// `Unsaved` names the guest bytes that could not be saved; the image is closed clean without them. An error of the image names those that
    /// were in memory alone; what was written and not flushed may be lost with them.
    pub async fn close(&self, wait_max: Duration) -> Result<(), LayerError> {
        let gone = LayerError::NoBacking("the image is being closed".into());
        self.table().abandon_fetches(&gone);
        let completed = timeout(&self.rt, wait_max, self.complete_last()).await;
        self.wait_local().await;
        // From here on nobody claims a unit; who did before is waited for.
        self.rounds.closing.store(true, Ordering::Release);
        self.wait_local().await;
        let unsaved = self.table().guest_ranges();
        let _round = self.rounds.running.lock().await;
        self.check_latch().map_err(|error| error.losing(&unsaved))?;
        // What the last round unlinked is free before the format closes.
        self.reuse(std::iter::from_fn(|| self.mapper.take_unlinked()).collect()).await;
        self.check_latch().map_err(|error| error.losing(&unsaved))?;
        if unsaved.is_empty() {
            return self.mapper.close().await.map_err(|error| self.failed(error));
        }
        // They are lost with this process. Their room goes back, and the rest is closed clean.
        while !self.table().is_empty() {
            self.table().abandon();
            self.wait_local().await;
        }
        self.mapper.close().await.map_err(|error| self.failed(error).losing(&unsaved))?;
        let cause = match completed {
            Ok(Ok(())) => "written during shutdown".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("not done after {} s", wait_max.as_secs()),
        };
        Err(LayerError::Unsaved { ranges: unsaved, cause })
    }
}
