//! The top of a chain, opened to be used.
//!
//! - An image is opened for writing if the guest may write or fills are wanted; if it cannot be, a read-only export goes on
//!   with a warning and reads pass through.
//! - Before anything is written, the image is pinned to the version of its backing (I6). A local image as a backing
//!   is not pinned: filling it changes its file, not what it shows.
//! - A backing far away whose version is pinned is asked behind the image, which is used meanwhile: what is local waits for nobody,
//!   and no byte of the backing counts before its version was compared.

use std::{io, pin::pin, sync::Arc};

use futures_util::future::{Either, select};
use readonce_format::{
    Driver, Mapping,
    driver::{Description, Repair},
};
use readonce_origin::Locator;
use readonce_storage::{
    OpenMode, ReadAt, Rt, Storage,
    lock::{self, Access, LockError},
    runtime::timeout,
};

use super::{
    Chain, ChainOptions, CopyOnRead, Lockable, Locks, OnChange, OpenError, Reporter, Shared,
    backing::{AtHand, Step, keep_pin, offline, refused},
    driver_of, files,
    layers::lock_for_reading,
    versions,
};
use crate::{Base, Disk, Image, ImageFiles, ImageOptions, Indexed, LayerError, Lazy, Source, Top};

/// Opens the chain whose top is at `name`.
///
/// # Errors
/// The top cannot be opened or locked; its backing is refused by policy; its backing cannot be reached and no version of it
/// is pinned.
pub async fn open(name: &str, options: ChainOptions, rt: Rt, report: Reporter) -> Result<Chain, OpenError> {
    let locator = Locator::parse(name, None).map_err(|error| OpenError::new(name, error))?;
    let read_only = options.read_only;
    let shared = Arc::new(Shared {
        options,
        rt,
        report,
        images: Default::default(),
        locks: Default::default(),
        origins: Default::default(),
        ended: tokio::sync::watch::Sender::new(false),
    });
    match (Opening { shared: Arc::clone(&shared), locator }).open().await {
        Ok(top) => Ok(Chain { disk: Arc::new(Disk::new(top, read_only)), shared }),
        Err(error) => {
            // What is tried behind the image may go on for a while, and must not keep others from it.
            shared.ended.send_replace(true);
            shared.locks.lock().clear();
            Err(error)
        }
    }
}

struct Opening {
    shared: Arc<Shared>,
    locator: Locator,
}

impl Opening {
    fn failed(&self, cause: impl ToString) -> OpenError {
        OpenError::new(self.locator.printable(), cause)
    }

    fn options(&self) -> &ChainOptions {
        &self.shared.options
    }

    async fn open(&self) -> Result<Top, OpenError> {
        let Locator::File(path) = &self.locator else {
            if !self.options().read_only {
                self.shared
                    .warn(format!("{} is not local: it is served read-only", self.locator.printable()));
            }
            return self.open_base().await;
        };
        let file = match self.options().places.file(path, OpenMode::ReadWrite) {
            Ok(file) => file,
            Err(error) if self.options().read_only && cannot_write(&error) => {
                if self.options().copy_on_read != CopyOnRead::Off {
                    self.shared.warn(format!("{error}: it is not filled, reads pass through"));
                }
                return self.open_base().await;
            }
            Err(error) => return Err(self.failed(error)),
        };
        let driver =
            driver_of(&*file, self.options().format.as_deref()).await.map_err(|error| self.failed(error))?;
        if driver.name() == "raw" && self.options().format.is_none() && !self.options().read_only {
            return Err(self.failed(
                "its format is not known, and a file is never guessed to be raw for writing: say -f raw",
            ));
        }
        let readable: Arc<dyn ReadAt> = file.clone();
        let description = driver.describe(&readable).await.map_err(|error| self.failed(error))?;
        let copy_on_read = self.copy_on_read(&description)?;
        if self.options().read_only && !copy_on_read {
            return self.open_base().await;
        }
        if files::is_marked_corrupt(&description) {
            let name = self.locator.printable();
            self.shared
                .warn(format!("{name} is marked corrupt: it is served read-only (check -r all mends it)"));
            return self.open_base().await;
        }
        self.open_image(file, driver, copy_on_read).await
    }

    fn copy_on_read(&self, description: &Description) -> Result<bool, OpenError> {
        match (self.options().copy_on_read, description.backing.is_some()) {
            (CopyOnRead::On, false) => {
                Err(self.failed("copy-on-read was asked for, but the image has no backing file"))
            }
            (CopyOnRead::On, true) => Ok(true),
            (CopyOnRead::Off, _) | (CopyOnRead::Auto, false) => Ok(false),
            (CopyOnRead::Auto, true) => Ok(description.copy_on_read),
        }
    }

    /// The top as a read-only layer, by the same way as any lower one.
    async fn open_base(&self) -> Result<Top, OpenError> {
        let name = self.locator.printable();
        let lock = lock_for_reading(&self.locator, self.options(), &self.shared.rt)
            .await
            .map_err(|error| self.failed(error))?;
        self.shared.locks.lock().extend(lock);
        let options = self.options();
        let origin = options
            .places
            .origin(&self.locator, &options.origin, &self.shared.rt)
            .await
            .map_err(|error| self.failed(error))?;
        for note in origin.notes() {
            self.shared.warn(format!("{name}: {note}"));
        }
        self.shared.origins.lock().push(Arc::clone(&origin));
        let origin = files::read_through(&self.locator, origin, &self.shared);
        let file: Arc<dyn ReadAt> = origin.clone();
        let driver =
            driver_of(&*file, self.options().format.as_deref()).await.map_err(|error| self.failed(error))?;
        let description = driver.describe(&file).await.map_err(|error| self.failed(error))?;
        let mapper = driver.open(file).await.map_err(|error| self.failed(error))?;
        if self.options().on_change == OnChange::Repin && description.backing.is_some() {
            self.shared
                .warn(format!("{name}: --on-change=repin does nothing: the image is opened to read alone"));
        }
        let (files, data_lock) =
            files::for_reading(&self.shared, &self.locator, origin, &description, None).await?;
        self.shared.locks.lock().extend(data_lock);
        self.shared.opened(name, driver.name(), false);
        let size = mapper.geometry().size;
        let backing = self.backing(&description, None).await?;
        Ok(Top::Base(Arc::new(Base::new(mapper, files, backing, &self.shared.rt)), size))
    }

    async fn open_image(
        &self,
        file: Arc<dyn Lockable>,
        driver: &'static dyn Driver,
        copy_on_read: bool,
    ) -> Result<Top, OpenError> {
        if self.options().locks == Locks::Take {
            match file.lock(Access::Write, &self.shared.rt).await {
                Ok(lock) => self.shared.locks.lock().push(lock),
                Err(error @ LockError::Unsupported { .. }) => self.shared.warn(error.to_string()),
                Err(error) => return Err(self.failed(error)),
            }
        }
        // Again: who had the lock before may have pinned it since.
        let readable: Arc<dyn ReadAt> = file.clone();
        let mut description = driver.describe(&readable).await.map_err(|error| self.failed(error))?;
        let storage: Arc<dyn Storage> = file;
        if description.pin.is_some() && description.only_readonce_wrote == Some(false) {
            self.shared.warn(format!(
                "{}: another program wrote this image since its backing was pinned; whether it read the same version cannot \
                 be told",
                self.locator.printable()
            ));
        }
        if description.dirty && description.backing.is_none() && !driver.mends_itself() {
            self.repair_what_qemu_left(&storage, driver).await?;
        }
        let backing = self.pinned_backing(&storage, driver, &mut description).await?;
        let data = files::for_writing(&self.shared, &self.locator, &description).await?;
        let (data, data_lock) = data.map_or((None, None), |(data, lock)| (Some(data), lock));
        self.shared.locks.lock().extend(data_lock);
        let mapper = driver
            .open_writable(Arc::clone(&storage), data.clone(), Arc::clone(&self.shared.rt))
            .await
            .map_err(|error| self.failed(error))?;
        if let Some(lost) = description.bitmaps_lost() {
            self.shared.warn(format!("{}: {lost}", self.locator.printable()));
        }
        self.shared.opened(self.locator.printable(), driver.name(), true);
        let files = ImageFiles { own: Arc::clone(&storage), data: data.unwrap_or(storage) };
        let image = Image::new(
            mapper,
            files,
            backing,
            Arc::clone(&self.shared.rt),
            ImageOptions { copy_on_read, ..ImageOptions::default() },
        );
        image.start_reclaim();
        self.shared.images.lock().insert(0, Arc::clone(&image));
        Ok(Top::Image(image))
    }

    /// QEMU does not order data before links in an image without a backing: what it left dirty is checked before it is used.
    /// What we leave dirty needs no such check; it is done all the same, because the mark does not say whose it is.
    async fn repair_what_qemu_left(
        &self,
        storage: &Arc<dyn Storage>,
        driver: &dyn Driver,
    ) -> Result<(), OpenError> {
        let readable: Arc<dyn ReadAt> = storage.clone();
        let report = driver.check(&readable).await.map_err(|error| self.failed(error))?;
        if report.corruptions == 0 {
            return Ok(());
        }
        let name = self.locator.printable();
        self.shared
            .warn(format!("{name} was not closed clean and has {} errors: repairing", report.corruptions));
        let report = driver.repair(storage, Repair::All).await.map_err(|error| self.failed(error))?;
        match report.corruptions {
            0 => Ok(()),
            left => Err(self.failed(format!("{left} errors cannot be repaired"))),
        }
    }

    /// The backing of an image that will be written, pinned if it was not.
    async fn pinned_backing(
        &self,
        storage: &Arc<dyn Storage>,
        driver: &dyn Driver,
        description: &mut Description,
    ) -> Result<Option<Arc<dyn Source>>, OpenError> {
        let mut at_hand = None;
        if let (false, Some(backing)) = (self.options().no_backing_files, &description.backing) {
            let repin = self.options().on_change == OnChange::Repin;
            let mut step = Step::down(&self.shared, &self.locator, description, backing, &[])?
                .probed(&self.shared)
                .await;
            let may_ask = step.can_be_pinned() && !step.is_refused(&self.shared);
            if may_ask && (description.pin.is_none() || repin) {
                let pinned = step.expect.take();
                let pin = match step.version(&self.shared).await {
                    Ok(pin) => pin,
                    // What is pinned stays; `backing` says what that means.
                    Err(_) if pinned.is_some() => return self.backing(description, None).await,
                    Err(error) => return Err(error),
                };
                let found = versions::pinned(&pin);
                if pinned.is_some() && pinned != found {
                    self.check_nothing_is_local(storage, driver, description).await?;
                }
                if pinned.is_none() || pinned != found {
                    keep_pin(&self.locator, storage, driver, pin, description).await?;
                }
                at_hand = step.at_hand;
            }
        }
        self.backing(description, at_hand).await
    }

    async fn check_nothing_is_local(
        &self,
        storage: &Arc<dyn Storage>,
        driver: &dyn Driver,
        description: &Description,
    ) -> Result<(), OpenError> {
        let held = || {
            self.failed(
                "the backing changed, and the image holds clusters of the old version already: --on-change=repin is \
                 only for an image that holds none",
            )
        };
        // What a snapshot holds comes back when it is applied.
        if !description.snapshots.is_empty() {
            return Err(held());
        }
        let mapper = driver.open(storage.clone()).await.map_err(|error| self.failed(error))?;
        let mut at = 0;
        while at < description.virtual_size {
            let extent =
                mapper.lookup(at, description.virtual_size - at).await.map_err(|error| self.failed(error))?;
            if extent.mapping != Mapping::Absent {
                return Err(held());
            }
            at += extent.len;
        }
        Ok(())
    }

    /// What the image has behind it. Tried now; an image that knows its backing's version goes on without, and waits for no network.
    async fn backing(
        &self,
        description: &Description,
        at_hand: Option<AtHand>,
    ) -> Result<Option<Arc<dyn Source>>, OpenError> {
        let Some(backing) = &description.backing else { return Ok(None) };
        let name = self.locator.printable();
        if self.options().no_backing_files {
            return Ok(Some(refused(format!("{name}: backing files are off (--no-backing-files)"))));
        }
        let down =
            Step::down(&self.shared, &self.locator, description, backing, &[])?.probed(&self.shared).await;
        let step = Step { at_hand, ..down };
        if step.is_refused(&self.shared) {
            return Ok(Some(offline(&self.locator)));
        }
        // Asked behind an image that knows the version; a file is there at once, and what is at hand was asked already.
        let waits = matches!(step.locator, Locator::Http(_)) && step.at_hand.is_none();
        let lazy = step.lazy(&self.shared);
        if waits && description.pin.is_some() {
            self.try_behind(Arc::clone(&lazy));
        } else if let Err(error) = tried(&lazy, &name, self.options(), &self.shared.rt).await {
            if description.pin.is_none() {
                let cause = error.to_string();
                return Err(self.failed(format!("Could not open backing file: {cause}")));
            }
            self.shared.warn_of_what_is_away(&error);
        }
        Ok(Some(Indexed::new(lazy)))
    }

    /// Tries the backing while the image is used already, so that a person hears of trouble early. Ends with the chain.
    fn try_behind(&self, lazy: Arc<Lazy>) {
        let (name, options) = (self.locator.printable(), self.options().clone());
        let (rt, shared) = (Arc::clone(&self.shared.rt), Arc::downgrade(&self.shared));
        let mut ended = self.shared.ended.subscribe();
        self.shared.rt.spawn(Box::pin(async move {
            let tried = pin!(tried(&lazy, &name, &options, &rt));
            let ended = pin!(ended.wait_for(|ended| *ended));
            if let Either::Left((Err(error), _)) = select(tried, ended).await
                && let Some(shared) = shared.upgrade()
            {
                shared.warn_of_what_is_away(&error);
            }
        }));
    }
}

/// Opens what is behind the image `name`. The probe has its own limit; a format that must be read from an origin that is away would
/// be tried for as long as a guest's read. A lock on the way may be on its own way out.
async fn tried(lazy: &Lazy, name: &str, options: &ChainOptions, rt: &Rt) -> Result<(), LayerError> {
    let limit = options.origin.probe_for.saturating_mul(2).saturating_add(lock::GOING_MAX);
    match timeout(rt, limit, lazy.source()).await {
        Ok(tried) => tried.map(|_| ()),
        Err(_) => Err(LayerError::NoBacking(format!("{name}: its backing does not answer"))),
    }
}

fn cannot_write(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}
