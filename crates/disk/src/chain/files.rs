//! The files of one image: its own, and the one that holds its data where that is another.
//!
//! - The data file of a local image is local. That of an image that came over the network lies on the network too, where a backing of
//!   it might (I8), and its version is pinned beside the image's own (I6).
//! - A local one is locked as its image is.
//! - An image that lies far away is read in pieces that are kept.

use std::sync::Arc;

use readonce_format::driver::{Description, Detail};
use readonce_origin::{Locator, Origin, OriginOptions, Pinned, Reach, Version};
use readonce_storage::{
    OpenMode, Storage,
    lock::{Access, LockError},
};

use super::{ChainOptions, Held, Locks, OpenError, Shared, layers::lock_for_reading};
use crate::{BaseFiles, pieces::Pieces};

/// A data file open for writing, and the lock on it.
pub(super) type LockedData = (Arc<dyn Storage>, Option<Held>);

/// What an image at `locator` is read through.
pub(super) fn read_through(locator: &Locator, origin: Arc<dyn Origin>, shared: &Shared) -> Arc<dyn Origin> {
    match locator {
        Locator::File(_) => origin,
        Locator::Http(_) => Pieces::new(origin, Arc::clone(&shared.rt)),
    }
}

/// Where the data of the image at `locator` is, if that is not its own file.
pub(super) fn data_file(
    locator: &Locator,
    description: &Description,
    options: &ChainOptions,
) -> Result<Option<Locator>, OpenError> {
    let Some(data) = &description.data_file else { return Ok(None) };
    let failed = |cause: String| OpenError::new(locator.printable(), cause);
    if options.no_backing_files {
        return Err(failed("its data is in another file, which is not opened (--no-backing-files)".into()));
    }
    let place =
        Locator::parse(&data.name, Some(locator)).map_err(|error| OpenError::new(&data.name, error))?;
    if place.same_place(locator) {
        return Err(failed("it names itself as its data file".into()));
    }
    match (locator, &place) {
        (Locator::File(_), Locator::File(_)) => {}
        (Locator::File(_), Locator::Http(_)) => {
            return Err(failed(format!("its data file '{}' is not a local file", place.printable())));
        }
        // Not even if the user allows it as a backing.
        (Locator::Http(_), Locator::File(_)) => {
            return Err(failed(format!("its data file '{}' is a local file", place.printable())));
        }
        (Locator::Http(_), Locator::Http(_)) => options
            .allow_backing
            .check(locator, &place)
            .map_err(|error| OpenError::new(place.printable(), error))?,
    }
    Ok(Some(place))
}

/// The version of the data file that is to be found: what is pinned of the image, is pinned of its data file as well.
pub(super) fn expected_data(place: &Locator, pinned: Option<&Pinned>) -> Result<Option<Version>, OpenError> {
    match (place, pinned) {
        (Locator::File(_), _) | (_, None) => Ok(None),
        (Locator::Http(_), Some(Pinned { data: Some(data), .. })) => Ok(Some(data.clone())),
        (Locator::Http(_), Some(Pinned { data: None, .. })) => {
            let cause = "the image above pins no version of this data file (rebase -u pins anew)";
            Err(OpenError::new(place.printable(), cause))
        }
    }
}

/// The files of a layer that is only read, and the lock on its data file.
pub(super) async fn for_reading(
    shared: &Shared,
    locator: &Locator,
    origin: Arc<dyn Origin>,
    description: &Description,
    pinned: Option<&Pinned>,
) -> Result<(BaseFiles, Option<Held>), OpenError> {
    let Some(place) = data_file(locator, description, &shared.options)? else {
        return Ok((BaseFiles { own: origin.clone(), data: origin }, None));
    };
    let failed = |cause: String| OpenError::new(place.printable(), cause);
    let lock = lock_for_reading(&place, &shared.options, &shared.rt)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let expect = expected_data(&place, pinned)?;
    let options = OriginOptions { expect, reach: Reach::Preferred, ..shared.options.origin.clone() };
    let data = shared
        .options
        .places
        .origin(&place, &options, &shared.rt)
        .await
        .map_err(|error| failed(error.to_string()))?;
    for note in data.notes() {
        shared.warn(format!("{}: {note}", place.printable()));
    }
    shared.opened(place.printable(), "raw", false);
    shared.origins.lock().push(Arc::clone(&data));
    Ok((BaseFiles { own: origin, data }, lock))
}

/// The data file of an image that is written to.
pub(super) async fn for_writing(
    shared: &Shared,
    locator: &Locator,
    description: &Description,
) -> Result<Option<LockedData>, OpenError> {
    let Some(place) = data_file(locator, description, &shared.options)? else { return Ok(None) };
    let Locator::File(path) = &place else { return Ok(None) };
    let failed = |cause: String| OpenError::new(place.printable(), cause);
    let places = &shared.options.places;
    let file = places.file(path, OpenMode::ReadWrite).map_err(|error| failed(error.to_string()))?;
    let lock = match shared.options.locks {
        Locks::Share => None,
        Locks::Take => match file.lock(Access::Write, &shared.rt).await {
            Ok(lock) => Some(lock),
            Err(error @ LockError::Unsupported { .. }) => {
                shared.warn(error.to_string());
                None
            }
            Err(error) => return Err(failed(error.to_string())),
        },
    };
    shared.opened(place.printable(), "raw", true);
    Ok(Some((file, lock)))
}

/// Whether the image says of itself that it is broken: it is read, and not written before a repair.
pub(super) fn is_marked_corrupt(description: &Description) -> bool {
    description.details.iter().any(|(name, detail)| *name == "corrupt" && *detail == Detail::Flag(true))
}
