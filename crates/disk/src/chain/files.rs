//! The files of one image: its own, and the one that holds its data where that is another.
//!
//! - A data file is local, and so is the image that names it (I8): nothing that comes over the network opens a local path, and
//!   no version of a remote data file could be pinned.
//! - It is locked as the image is.
//! - An image that lies far away is read in pieces that are kept.

use std::sync::Arc;

use readonce_format::driver::{Description, Detail};
use readonce_origin::{Locator, Origin};
use readonce_storage::{
    ImageLock, LocalFile, Storage,
    local::OpenMode,
    lock::{Access, LockError},
};

use super::{Locks, OpenError, Shared, layers::lock_for_reading};
use crate::{BaseFiles, pieces::Pieces};

/// A data file open for writing, and the lock on it.
pub(super) type LockedData = (Arc<dyn Storage>, Option<ImageLock>);

/// What an image at `locator` is read through.
pub(super) fn read_through(locator: &Locator, origin: Arc<dyn Origin>, shared: &Shared) -> Arc<dyn Origin> {
    match locator {
        Locator::File(_) => origin,
        Locator::Http(_) => Pieces::new(origin, Arc::clone(&shared.rt)),
    }
}

/// Where the data of the image at `locator` is, if that is not its own file.
fn data_file(locator: &Locator, description: &Description) -> Result<Option<Locator>, OpenError> {
    let Some(data) = &description.data_file else { return Ok(None) };
    let failed = |cause: String| OpenError::new(locator.printable(), cause);
    let Locator::File(_) = locator else {
        return Err(failed("its data is in another file, which is only read for local images".into()));
    };
    let place =
        Locator::parse(&data.name, Some(locator)).map_err(|error| OpenError::new(&data.name, error))?;
    match place {
        Locator::File(_) if place.same_place(locator) => {
            Err(failed("it names itself as its data file".into()))
        }
        Locator::File(_) => Ok(Some(place)),
        Locator::Http(_) => Err(failed(format!("its data file '{}' is not a local file", place.printable()))),
    }
}

/// The files of a layer that is only read, and the lock on its data file.
pub(super) async fn for_reading(
    shared: &Shared,
    locator: &Locator,
    origin: Arc<dyn Origin>,
    description: &Description,
) -> Result<(BaseFiles, Option<ImageLock>), OpenError> {
    let Some(place) = data_file(locator, description)? else {
        return Ok((BaseFiles { own: origin.clone(), data: origin }, None));
    };
    let failed = |cause: String| OpenError::new(place.printable(), cause);
    let lock = lock_for_reading(&place, &shared.options).map_err(|error| failed(error.to_string()))?;
    let options = readonce_origin::OriginOptions { expect: None, ..shared.options.origin.clone() };
    let data = readonce_origin::open(&place, &options, &shared.rt)
        .await
        .map_err(|error| failed(error.to_string()))?;
    shared.opened(place.printable(), "raw", false);
    Ok((BaseFiles { own: origin, data }, lock))
}

/// The data file of an image that is written to.
pub(super) fn for_writing(
    shared: &Shared,
    locator: &Locator,
    description: &Description,
) -> Result<Option<LockedData>, OpenError> {
    let Some(place) = data_file(locator, description)? else { return Ok(None) };
    let Locator::File(path) = &place else { return Ok(None) };
    let failed = |cause: String| OpenError::new(place.printable(), cause);
    let file =
        Arc::new(LocalFile::open(path, OpenMode::ReadWrite).map_err(|error| failed(error.to_string()))?);
    let lock = match shared.options.locks {
        Locks::Share => None,
        Locks::Take => match ImageLock::take(&file, Access::Write) {
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
