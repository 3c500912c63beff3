//! An image layer: one image open for writing, above its backing. Copy-on-read and guest writes happen here.
//!
//! - The map is asked first, and `Data` is read and written in place. For anything else the in-flight table decides: the map is
//!   looked at again under the table's lock, because an entry leaves the table only after the map shows its bytes.
//! - The table's lock is held for memory operations alone, never across I/O.
//! - A failed write or sync (not "no space") latches: writes and flushes fail from then on, reads go on.
//!
//! Here: the layer's state and the hot path. The waiting paths are in `read`, `write`, `zero`, `fill` and `flush`.

use std::{
    ops::Range,
    sync::{Arc, OnceLock, Weak},
    task::{Context, Poll, Waker},
};

use readonce_format::{Abilities, Extent, Mapping, Reservation, WritableMapper};
use readonce_storage::{
    BoxFuture, Rt, Storage,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crate::{
    LayerError,
    compressed::Clusters,
    flush::Rounds,
    index::{Found, Place},
    inflight::{Budgets, InFlight},
    source::Source,
    uses::{Use, Uses, WriteInPlace},
};

/// How a layer behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct ImageOptions {
    /// Reads of absent units fill the image.
    pub copy_on_read: bool,
    /// Bounds of what is in flight.
    pub budgets: Budgets,
}

/// Clusters that are copied at the same time at most: each may be 2 MiB in memory.
const COPIES_MAX: usize = 16;

/// The files of an image.
pub struct ImageFiles {
    /// The one that the image is: compressed clusters are read from it. The mapper reads and writes the rest of what is
    /// not data there.
    pub own: Arc<dyn Storage>,
    /// The one that holds its data; the same, in most images.
    pub data: Arc<dyn Storage>,
}

impl From<Arc<dyn Storage>> for ImageFiles {
    /// One file for all.
    fn from(file: Arc<dyn Storage>) -> Self {
        Self { own: Arc::clone(&file), data: file }
    }
}

/// An image open for writing, and what it has behind it.
pub struct Image {
    pub(crate) mapper: Arc<dyn WritableMapper>,
    /// Where its data is.
    pub(crate) file: Arc<dyn Storage>,
    /// In its own file.
    pub(crate) clusters: Arc<Clusters>,
    pub(crate) backing: Option<Arc<dyn Source>>,
    pub(crate) rt: Rt,
    pub(crate) rounds: Rounds,
    /// Bytes.
    pub(crate) unit: u64,
    /// Bytes.
    pub(crate) cluster_size: u64,
    pub(crate) abilities: Abilities,
    /// Where nothing is ever unlinked, nobody needs to know who still reads it.
    pub(crate) uses: Option<Uses>,
    pub(crate) copies: tokio::sync::Semaphore,
    me: Weak<Image>,
    table: Mutex<InFlight<Reservation>>,
    /// Entries in the table, readable without its lock.
    busy: AtomicUsize,
    copy_on_read: AtomicBool,
    backing_end: OnceLock<u64>,
    latched: OnceLock<String>,
}

/// The table's lock; keeps the count of entries right.
pub(crate) struct Table<'a> {
    guard: MutexGuard<'a, InFlight<Reservation>>,
    busy: &'a AtomicUsize,
}

impl std::ops::Deref for Table<'_> {
    type Target = InFlight<Reservation>;
    fn deref(&self) -> &Self::Target {
        &self.guard
    }
}

impl std::ops::DerefMut for Table<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.guard
    }
}

impl Drop for Table<'_> {
    fn drop(&mut self) {
        self.busy.store(self.guard.count(), Ordering::Release);
    }
}

impl Image {
    /// A layer over an image that `mapper` maps onto `files`.
    pub fn new(
        mapper: Arc<dyn WritableMapper>,
        files: impl Into<ImageFiles>,
        backing: Option<Arc<dyn Source>>,
        rt: Rt,
        options: ImageOptions,
    ) -> Arc<Self> {
        let geometry = mapper.geometry();
        let (unit, files, mut abilities) = (geometry.fill_unit, files.into(), mapper.abilities());
        // In a file of its own, data has its place by its guest offset: what was unlinked could be written anew at once, under
        // a writer in place who is late.
        abilities.unlink &= Arc::ptr_eq(&files.own, &files.data);
        let clusters = Clusters::new(files.own, geometry.cluster_size, Arc::clone(&rt));
        Arc::new_cyclic(|me| Self {
            mapper,
            file: files.data,
            clusters,
            backing,
            rt,
            rounds: Rounds::default(),
            unit,
            cluster_size: geometry.cluster_size,
            abilities,
            uses: abilities.unlink.then(Uses::default),
            copies: tokio::sync::Semaphore::new(COPIES_MAX),
            me: me.clone(),
            table: Mutex::new(InFlight::new(unit, options.budgets)),
            busy: AtomicUsize::new(0),
            copy_on_read: AtomicBool::new(options.copy_on_read),
            backing_end: OnceLock::new(),
            latched: OnceLock::new(),
        })
    }

    /// Bytes that the guest sees.
    pub fn size(&self) -> u64 {
        self.mapper.geometry().size
    }

    /// Turns copy-on-read on or off from now on.
    pub fn set_copy_on_read(&self, on: bool) {
        self.copy_on_read.store(on, Ordering::Relaxed);
    }

    /// Whether a read of an absent unit fills it.
    pub fn copy_on_read(&self) -> bool {
        self.copy_on_read.load(Ordering::Relaxed) && self.check_open().is_ok()
    }

    pub(crate) fn shared(&self) -> Arc<Self> {
        self.me.upgrade().expect("an image that is used is alive")
    }

    pub(crate) fn table(&self) -> Table<'_> {
        Table { guard: self.table.lock(), busy: &self.busy }
    }

    /// Runs `task` to its end even if the caller stops waiting: what it claimed must be ended.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        task: impl Future<Output = Result<T, LayerError>> + Send + 'static,
    ) -> Result<T, LayerError> {
        let mut task = Box::pin(task);
        // Local I/O mostly ends at once, and then needs no task. What waits is polled again by its own.
        if let Poll::Ready(done) = task.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return done;
        }
        let (tell, told) = tokio::sync::oneshot::channel();
        self.rt.spawn(Box::pin(async move {
            let _ = tell.send(task.await);
        }));
        told.await.unwrap_or_else(|_| Err(LayerError::Io("the request was abandoned at shutdown".into())))
    }

    /// Where the backing ends, in guest bytes; 0 without a backing.
    pub(crate) async fn backing_end(&self) -> Result<u64, LayerError> {
        if let Some(&end) = self.backing_end.get() {
            return Ok(end);
        }
        let end = match &self.backing {
            Some(backing) => backing.size().await?,
            None => 0,
        };
        Ok(*self.backing_end.get_or_init(|| end))
    }

    /// The same from memory, if it is known.
    pub(crate) fn backing_end_known(&self) -> Option<u64> {
        match &self.backing {
            None => Some(0),
            Some(_) => self.backing_end.get().copied(),
        }
    }

    /// The same; unknown, all of it may be needed.
    pub(crate) fn backing_end_now(&self) -> u64 {
        self.backing_end_known().unwrap_or(u64::MAX)
    }

    pub(crate) async fn lookup(&self, offset: u64, len_max: u64) -> Result<Extent, LayerError> {
        match self.mapper.lookup_now(offset, len_max) {
            Some(extent) => Ok(extent?),
            None => Ok(self.mapper.lookup(offset, len_max).await?),
        }
    }

    /// Before a lookup whose place is then read: it stays what it is until this is dropped.
    pub(crate) fn enter(&self) -> Option<Use<'_>> {
        self.uses.as_ref().map(Uses::enter)
    }

    /// Before a lookup whose place is then written.
    pub(crate) fn enter_write(&self) -> WriteInPlace<'_> {
        WriteInPlace::begin(self.uses.as_ref())
    }

    /// The unit's mapping now, if that can be told without waiting.
    pub(crate) fn mapping_now(&self, unit: u64) -> Option<Mapping> {
        self.mapper.lookup_now(unit * self.unit, 1)?.ok().map(|extent| extent.mapping)
    }

    pub(crate) fn check_latch(&self) -> Result<(), LayerError> {
        match self.latched.get() {
            Some(cause) => Err(LayerError::Latched(cause.clone())),
            None => Ok(()),
        }
    }

    /// Turns the failure of a write or sync of the image into the caller's error. An I/O error latches; "no space" and a broken
    /// table concern this request alone.
    pub(crate) fn failed(&self, error: impl Into<LayerError>) -> LayerError {
        let error = error.into();
        if matches!(error, LayerError::Io(_)) && self.latched.set(error.to_string()).is_ok() {
            tracing::error!("writes are off until the image is opened again: {error}");
        }
        error
    }

    /// The hot path: local bytes, straight into the reply.
    pub(crate) fn read_local(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        // Asked before the map is: an entry that is gone by now is in the map.
        let quiet = self.busy.load(Ordering::Acquire) == 0;
        let _inside = self.enter();
        let mut done = 0usize;
        while done < buf.len() {
            let at = offset + done as u64;
            let extent = match self.mapper.lookup_now(at, (buf.len() - done) as u64)? {
                Ok(extent) => extent,
                Err(error) => return Some(Err(error.into())),
            };
            let part = &mut buf[done..done + extent.len as usize];
            match extent.mapping {
                Mapping::Data(from) | Mapping::Shared(from) => {
                    if let Err(error) = self.file.read_now(from, part)? {
                        return Some(Err(error.into()));
                    }
                }
                Mapping::Zero if quiet => part.fill(0),
                Mapping::Absent if quiet && self.backing.is_none() => part.fill(0),
                // Without copy-on-read nothing happens but the read itself.
                Mapping::Absent if quiet && !self.copy_on_read() => {
                    let backing = self.backing.as_ref()?;
                    if self.backing_end.get().is_none_or(|&end| at + extent.len > end) {
                        return None;
                    }
                    if let Err(error) = backing.read_now(at, part)? {
                        return Some(Err(error));
                    }
                }
                Mapping::Compressed(place) => {
                    if let Err(error) = self.clusters.read_now(&place, part)? {
                        return Some(Err(error));
                    }
                }
                Mapping::Zero | Mapping::Absent => return None,
            }
            done += extent.len as usize;
        }
        Some(Ok(()))
    }

    /// The hot path of writes: all of it allocated.
    pub(crate) fn write_local(&self, offset: u64, data: &[u8]) -> Option<Result<(), LayerError>> {
        if let Err(error) = self.check_latch() {
            return Some(Err(error));
        }
        let _inside = self.enter();
        let mut done = 0usize;
        while done < data.len() {
            let at = offset + done as u64;
            let extent = match self.mapper.lookup_now(at, (data.len() - done) as u64)? {
                Ok(extent) => extent,
                Err(error) => return Some(Err(error.into())),
            };
            let Mapping::Data(to) = extent.mapping else { return None };
            if let Err(error) = self.file.write_now(to, &data[done..done + extent.len as usize])? {
                return Some(Err(self.failed(error)));
            }
            done += extent.len as usize;
        }
        Some(Ok(()))
    }
}

impl Source for Image {
    fn size(&self) -> BoxFuture<'_, Result<u64, LayerError>> {
        Box::pin(std::future::ready(Ok(Image::size(self))))
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        self.read_local(offset, buf)
    }

    fn may_read_now(&self, offset: u64) -> bool {
        let Some(extent) = self.mapper.lookup_now(offset, 1) else { return false };
        match (extent.map(|extent| extent.mapping), &self.backing) {
            (Ok(Mapping::Absent), Some(backing)) => !self.copy_on_read() && backing.may_read_now(offset),
            _ => true,
        }
    }

    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: readonce_origin::Class,
        sink: readonce_origin::Sink<'a>,
    ) -> BoxFuture<'a, Result<(), LayerError>> {
        Box::pin(self.read_pieces(range, class, sink))
    }

    fn find(&self, _: u64, len_max: u64) -> BoxFuture<'_, Result<Option<Found>, LayerError>> {
        // What it holds changes: an index above leads here.
        let found = Found { place: Place::Behind(self.shared()), len: len_max };
        Box::pin(std::future::ready(Ok(Some(found))))
    }

    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<crate::StatusExtent>, LayerError>> {
        Box::pin(async move {
            let hidden = |range: Range<u64>| self.table().guest_unit_in(range);
            crate::status::of(&*self.mapper, self.backing.as_deref(), Some(&hidden), offset, len, count_max)
                .await
        })
    }
}
