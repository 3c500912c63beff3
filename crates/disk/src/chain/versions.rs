//! Versions: what an image pins of its backing (I6).
//!
//! - The backing's own file, and the file that holds its data where that is another: each could change without the other.
//! - What lies behind the backing is pinned by the backing, if that is an image of ours.
//!
//! Not here: when an image is pinned (`top`, `backing`), what names a version (`readonce_origin::validator`).

use std::sync::Arc;

use readonce_format::{
    Driver,
    driver::{Description, Pin},
};
use readonce_origin::{FetchError, Locator, Origin, OriginOptions, Pinned, Version};
use readonce_storage::{ReadAt, Rt};

use super::{ChainOptions, OpenError, driver_of, files};

/// What a pin stands for; nothing, if it cannot be read.
pub(super) fn pinned(pin: &Pin) -> Option<Pinned> {
    Pinned::decode(&pin.validator, pin.len).ok()
}

/// The pin of a backing whose own file and data file these are.
pub(super) fn pin(own: &dyn Origin, data: Option<&dyn Origin>) -> Result<Pin, OpenError> {
    let Some(data) = data else { return Ok(Pin { validator: own.validator(), len: own.len() }) };
    let version = |origin: &dyn Origin| {
        Version::decode(&origin.validator(), origin.len())
            .map_err(|error| OpenError::new(origin.name(), error))
    };
    let pinned = Pinned { own: version(own)?, data: Some(version(data)?) };
    Ok(Pin { validator: pinned.encode(), len: own.len() })
}

/// A backing, looked at.
pub struct Looked {
    /// Its format.
    pub driver: &'static dyn Driver,
    /// What it says of itself.
    pub description: Description,
    /// What an image above it pins.
    pub pin: Pin,
}

/// Looks at the backing at `locator`, whose own file is `origin`. With `expect`, its data file must be of that version.
///
/// # Errors
/// It is no such image; its data file cannot be opened, or policy refuses it.
pub async fn look_at_backing(
    locator: &Locator,
    format: Option<&str>,
    origin: &Arc<dyn Origin>,
    expect: Option<&Pinned>,
    options: &ChainOptions,
    rt: &Rt,
) -> Result<Looked, FetchError> {
    let refused = |cause: String| FetchError::Permanent { origin: locator.printable(), cause };
    let file: Arc<dyn ReadAt> = origin.clone();
    let driver = driver_of(&*file, format).await.map_err(refused)?;
    let description = driver.describe(&file).await.map_err(|error| refused(error.to_string()))?;
    let data = match locator {
        Locator::Http(_) if !options.no_backing_files => files::data_file(locator, &description, options),
        // A local image is not pinned, and of one that is to be read alone nothing will be read.
        _ => Ok(None),
    };
    let data = match data.map_err(|error| refused(error.to_string()))? {
        Some(place) => {
            let expect = match expect {
                Some(_) => {
                    files::expected_data(&place, expect).map_err(|error| refused(error.to_string()))?
                }
                None => None,
            };
            let places = &options.places;
            let options = OriginOptions { expect, ..options.origin.clone() };
            Some(places.origin(&place, &options, rt).await?)
        }
        None => None,
    };
    let pin = pin(&**origin, data.as_deref()).map_err(|error| refused(error.to_string()))?;
    Ok(Looked { driver, description, pin })
}
