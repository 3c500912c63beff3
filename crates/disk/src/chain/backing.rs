//! What lies behind an image: opened once, when first needed, as a source.

use std::sync::Arc;

use readonce_format::{
    Driver,
    driver::{BackingRef, Description, HeaderChange, Pin},
};
use readonce_origin::{Locator, Origin, OriginNote, OriginOptions, Pinned, open::Reach};
use readonce_storage::{BoxFuture, OpenMode, ReadAt, Storage, lock::Access};

use super::{
    CHAIN_DEPTH_MAX, CopyOnRead, Locks, OnChange, OpenError, Shared, driver_of, files,
    layers::lock_for_reading,
    versions::{self, look_at_backing},
};
use crate::{Base, Image, ImageFiles, ImageOptions, Indexed, LayerError, Lazy, Source};

/// One step down a chain.
#[derive(Clone)]
pub(super) struct Step {
    pub locator: Locator,
    pub format: Option<String>,
    pub expect: Option<Pinned>,
    /// Above it, top first.
    pub above: Vec<Locator>,
    /// Its file, if that was opened to be pinned.
    pub at_hand: Option<AtHand>,
}

/// The file of a step, open.
#[derive(Clone)]
pub(super) struct AtHand {
    /// As it is asked.
    asked: Arc<dyn Origin>,
    /// As it is read.
    file: Arc<dyn Origin>,
}

impl Step {
    /// The step from an image to what it names, if policy allows it.
    pub(super) fn down(
        shared: &Shared,
        from: &Locator,
        description: &Description,
        backing: &BackingRef,
        above: &[Locator],
    ) -> Result<Self, OpenError> {
        let locator = Locator::parse(&backing.name, Some(from))
            .map_err(|error| OpenError::new(&backing.name, error))?;
        let name = locator.printable();
        shared.options.allow_backing.check(from, &locator).map_err(|error| OpenError::new(&name, error))?;
        let mut above = above.to_vec();
        above.push(from.clone());
        if above.iter().any(|other| other.same_place(&locator)) {
            return Err(OpenError::new(name, "the backing chain has a loop"));
        }
        if above.len() >= CHAIN_DEPTH_MAX {
            let cause = format!("the backing chain has more than {CHAIN_DEPTH_MAX} images");
            return Err(OpenError::new(name, cause));
        }
        let expect = match &description.pin {
            Some(pin) => Some(versions::pinned(pin).ok_or_else(|| {
                let cause =
                    "its image pins a version of it that this readonce cannot read (rebase -u pins anew)";
                OpenError::new(&name, cause)
            })?),
            None => None,
        };
        Ok(Self { locator, format: backing.format.clone(), expect, above, at_hand: None })
    }

    /// Asks the origin of this step; with a pinned version it may be away.
    async fn open_file(&self, shared: &Shared) -> Result<AtHand, OpenError> {
        if let Some(at_hand) = &self.at_hand {
            return Ok(at_hand.clone());
        }
        let options = OriginOptions {
            expect: self.expect.as_ref().map(|expect| expect.own.clone()),
            reach: Reach::Preferred,
            ..shared.options.origin.clone()
        };
        let asked = shared
            .options
            .places
            .origin(&self.locator, &options, &shared.rt)
            .await
            .map_err(|error| OpenError::new(self.locator.printable(), error))?;
        for note in asked.notes() {
            shared.warn(format!("{}: {note}", self.locator.printable()));
        }
        let file = files::read_through(&self.locator, Arc::clone(&asked), shared);
        Ok(AtHand { asked, file })
    }

    /// The source, opened at its first use.
    pub(super) fn lazy(self, shared: &Arc<Shared>) -> Arc<Lazy> {
        // The chain owns its images, and an image what lies behind it: a circle, were this not weak.
        let shared = Arc::downgrade(shared);
        Arc::new(Lazy::new(Box::new(move || {
            let (step, shared) = (self.clone(), shared.upgrade());
            Box::pin(async move {
                let shared = shared.ok_or_else(|| LayerError::NoBacking("the chain is closed".into()))?;
                Ok(step.open(&shared).await?)
            })
        })))
    }

    fn open<'a>(self, shared: &'a Arc<Shared>) -> BoxFuture<'a, Result<Arc<dyn Source>, OpenError>> {
        Box::pin(async move {
            if let Some(image) = self.open_to_fill(shared).await? {
                return Ok(image as Arc<dyn Source>);
            }
            let name = self.locator.printable();
            let failed = |cause: String| OpenError::new(&name, cause);
            // Kept only once all is open: what fails, or is dropped half-way, is tried again and must find nothing in its way.
            let lock = lock_for_reading(&self.locator, &shared.options, &shared.rt)
                .await
                .map_err(|error| failed(error.to_string()))?;
            let AtHand { asked, file: origin } = self.open_file(shared).await?;
            let file: Arc<dyn ReadAt> = origin.clone();
            let driver = driver_of(&*file, self.format.as_deref()).await.map_err(failed)?;
            let description = driver.describe(&file).await.map_err(|error| failed(error.to_string()))?;
            let mapper = driver.open(file).await.map_err(|error| failed(error.to_string()))?;
            let backing = self.next(shared, &description, None).await?;
            let (files, data_lock) =
                files::for_reading(shared, &self.locator, origin, &description, self.expect.as_ref()).await?;
            // The note said already that it could not be.
            if !asked.notes().iter().any(|note| matches!(note, OriginNote::NotReached { .. })) {
                shared.opened(name.clone(), driver.name(), false);
            }
            shared.locks.lock().extend(lock.into_iter().chain(data_lock));
            shared.origins.lock().push(asked);
            Ok(Arc::new(Base::new(mapper, files, backing, &shared.rt)) as Arc<dyn Source>)
        })
    }

    /// A lower local image with copy-on-read of its own is filled, if it can be had for that.
    async fn open_to_fill(&self, shared: &Arc<Shared>) -> Result<Option<Arc<Image>>, OpenError> {
        let Locator::File(path) = &self.locator else { return Ok(None) };
        if shared.options.copy_on_read == CopyOnRead::Off || shared.options.locks == Locks::Share {
            return Ok(None);
        }
        let Ok(file) = shared.options.places.file(path, OpenMode::ReadWrite) else { return Ok(None) };
        let name = self.locator.printable();
        let failed = |cause: String| OpenError::new(&name, cause);
        let driver = driver_of(&*file, self.format.as_deref()).await.map_err(failed)?;
        let readable: Arc<dyn ReadAt> = file.clone();
        let description = driver.describe(&readable).await.map_err(|error| failed(error.to_string()))?;
        if !description.copy_on_read || description.backing.is_none() {
            return Ok(None);
        }
        if files::is_marked_corrupt(&description) {
            shared.warn(format!("{name} is not filled: it is marked corrupt"));
            return Ok(None);
        }
        let lock = match file.lock(Access::Write, &shared.rt).await {
            Ok(lock) => lock,
            Err(error) => {
                shared.warn(format!("{name} is not filled: {error}"));
                return Ok(None);
            }
        };
        // Again: who had the lock before may have changed it since.
        let mut description = driver.describe(&readable).await.map_err(|error| failed(error.to_string()))?;
        let storage: Arc<dyn Storage> = file;
        let at_hand = self.pin_what_it_fills_from(shared, &storage, driver, &mut description).await?;
        let data = files::for_writing(shared, &self.locator, &description).await?;
        let (data, data_lock) = data.map_or((None, None), |(data, lock)| (Some(data), lock));
        let mapper = driver
            .open_writable(Arc::clone(&storage), data.clone(), Arc::clone(&shared.rt))
            .await
            .map_err(|error| failed(error.to_string()))?;
        let backing = self.next(shared, &description, at_hand).await?;
        shared.opened(name.clone(), driver.name(), true);
        shared.locks.lock().extend(std::iter::once(lock).chain(data_lock));
        let options = ImageOptions { copy_on_read: true, ..ImageOptions::default() };
        let backing = backing.map(|backing| Indexed::new(backing) as Arc<dyn Source>);
        let files = ImageFiles { own: Arc::clone(&storage), data: data.unwrap_or(storage) };
        let image = Image::new(mapper, files, backing, Arc::clone(&shared.rt), options);
        image.start_reclaim();
        shared.images.lock().push(Arc::clone(&image));
        Ok(Some(image))
    }

    /// Pins the image at `self` to what it fills from: a version that nobody remembers would let two of them meet (I6).
    async fn pin_what_it_fills_from(
        &self,
        shared: &Arc<Shared>,
        storage: &Arc<dyn Storage>,
        driver: &dyn Driver,
        description: &mut Description,
    ) -> Result<Option<AtHand>, OpenError> {
        let Some(backing) = description.backing.clone().filter(|_| description.pin.is_none()) else {
            return Ok(None);
        };
        let mut step =
            Step::down(shared, &self.locator, description, &backing, &self.above)?.probed(shared).await;
        if !step.can_be_pinned() || step.is_refused(shared) {
            return Ok(None);
        }
        let pin = step.version(shared).await?;
        keep_pin(&self.locator, storage, driver, pin, description).await?;
        Ok(step.at_hand)
    }

    /// The version that is there now. What was opened to tell it stays at hand.
    pub(super) async fn version(&mut self, shared: &Shared) -> Result<Pin, OpenError> {
        let at_hand = self.open_file(shared).await?;
        let (format, expect, options) = (self.format.as_deref(), self.expect.as_ref(), &shared.options);
        let looked = look_at_backing(&self.locator, format, &at_hand.file, expect, options, &shared.rt).await;
        let pin = looked.map_err(|error| OpenError::new(self.locator.printable(), error))?.pin;
        self.at_hand = Some(at_hand);
        Ok(pin)
    }

    /// Finds out the format of a local file whose name in the image above has none: a raw one is pinned. What cannot be read is told by
    /// who opens it.
    pub(super) async fn probed(mut self, shared: &Shared) -> Self {
        if let (Locator::File(path), None) = (&self.locator, &self.format)
            && let Ok(file) = shared.options.places.file(path, OpenMode::Read)
            && let Ok(driver) = driver_of(&*file, None).await
        {
            self.format = Some(driver.name().to_owned());
        }
        self
    }

    /// Offline, what could have changed is not asked; a local image shows what it holds.
    pub(super) fn is_refused(&self, shared: &Shared) -> bool {
        shared.options.on_change == OnChange::Offline && self.can_be_pinned()
    }

    /// Whether its version is to be kept in the image above it: a local image shows the same whatever its file becomes.
    pub(super) fn can_be_pinned(&self) -> bool {
        match &self.locator {
            Locator::Http(_) => true,
            Locator::File(_) => self.format.as_deref() == Some("raw"),
        }
    }

    async fn next(
        &self,
        shared: &Arc<Shared>,
        description: &Description,
        at_hand: Option<AtHand>,
    ) -> Result<Option<Arc<dyn Source>>, OpenError> {
        let Some(backing) = &description.backing else { return Ok(None) };
        let down = Step::down(shared, &self.locator, description, backing, &self.above)?.probed(shared).await;
        let step = Step { at_hand, ..down };
        if step.is_refused(shared) {
            return Ok(Some(offline(&self.locator)));
        }
        if let (Locator::Http(_), Locator::File(path), None) =
            (&step.locator, &self.locator, &description.pin)
        {
            shared.warn(format!(
                "{0} pins no version of {1}: bytes of two may meet above it if that file changes while nobody uses it (readonce io -c quit \
                 {0} pins it)",
                path.display(),
                step.locator.printable()
            ));
        }
        Ok(Some(step.lazy(shared) as Arc<dyn Source>))
    }
}

/// Keeps `pin` in the image at `image`. One that cannot keep it must not be filled: the next open would not know of it.
pub(super) async fn keep_pin(
    image: &Locator,
    storage: &Arc<dyn Storage>,
    driver: &dyn Driver,
    pin: Pin,
    description: &mut Description,
) -> Result<(), OpenError> {
    let change = HeaderChange::Pin(pin.clone());
    driver.change(storage, &change).await.map_err(|error| {
        OpenError::new(image.printable(), format!("the version of its backing cannot be kept in it: {error}"))
    })?;
    description.pin = Some(pin);
    Ok(())
}

/// What stands behind the image at `above` while it is offline.
pub(super) fn offline(above: &Locator) -> Arc<dyn Source> {
    refused(format!("{}: its backing is not asked (--on-change=offline)", above.printable()))
}

/// A backing that is not to be asked, and why.
pub(super) fn refused(cause: String) -> Arc<dyn Source> {
    Arc::new(Lazy::new(Box::new(move || {
        let error = LayerError::NoBacking(cause.clone());
        Box::pin(std::future::ready(Err(error)))
    })))
}
