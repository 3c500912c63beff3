//! A whole chain opened to be looked at: what `info`, `map` and `create` need.

use std::sync::Arc;

use readonce_format::{Driver, Mapper, driver::Description};
use readonce_origin::{Locator, Origin, Version};
use readonce_storage::{ImageLock, LocalFile, ReadAt, Rt};

use super::{CHAIN_DEPTH_MAX, ChainOptions, Locks, OpenError, driver_of};
use readonce_storage::{local::OpenMode, lock::Access};

/// One file or URL of a chain, open for reading.
pub struct Layer {
    /// Where it is.
    pub locator: Locator,
    /// What it says of itself.
    pub description: Description,
    /// Its map.
    pub mapper: Arc<dyn Mapper>,
    /// Its bytes.
    pub origin: Arc<dyn Origin>,
    _lock: Option<ImageLock>,
}

/// Opens the chain from `name` down, top first; only the top where `top_only`. `format` is the top's.
///
/// # Errors
/// Any file that cannot be opened, a loop, a name that policy refuses.
pub async fn open_layers(
    name: &str,
    options: &ChainOptions,
    top_only: TopOnly,
    rt: &Rt,
) -> Result<Vec<Layer>, OpenError> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some((
        Locator::parse(name, None).map_err(|error| OpenError::new(name, error))?,
        options.format.clone(),
        None,
    ));
    while let Some((locator, format, expect)) = next.take() {
        if layers.iter().any(|layer| layer.locator.same_place(&locator)) {
            return Err(OpenError::new(locator.printable(), "the backing chain has a loop"));
        }
        if layers.len() == CHAIN_DEPTH_MAX {
            let cause = format!("the backing chain has more than {CHAIN_DEPTH_MAX} images");
            return Err(OpenError::new(locator.printable(), cause));
        }
        let layer = open_layer(locator, format.as_deref(), expect, options, rt).await?;
        if let (Some(backing), TopOnly::No, false) =
            (&layer.description.backing, top_only, options.no_backing_files)
        {
            let child = Locator::parse(&backing.name, Some(&layer.locator))
                .map_err(|error| OpenError::new(&backing.name, error))?;
            options
                .allow_backing
                .check(&layer.locator, &child)
                .map_err(|error| OpenError::new(child.printable(), error))?;
            let expect = layer.description.pin.as_ref().and_then(version_of);
            next = Some((child, backing.format.clone(), expect));
        }
        layers.push(layer);
    }
    Ok(layers)
}

/// How far down a chain is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopOnly {
    /// The top alone.
    Yes,
    /// All of it.
    No,
}

/// The version that a pin stands for; a pin that cannot be read stands for none.
pub(super) fn version_of(pin: &readonce_format::driver::Pin) -> Option<Version> {
    Version::decode(&pin.validator, pin.len).ok()
}

async fn open_layer(
    locator: Locator,
    format: Option<&str>,
    expect: Option<Version>,
    options: &ChainOptions,
    rt: &Rt,
) -> Result<Layer, OpenError> {
    let name = locator.printable();
    let failed = |cause: String| OpenError::new(&name, cause);
    let _lock = lock_for_reading(&locator, options).map_err(|error| failed(error.to_string()))?;
    let origin_options = readonce_origin::OriginOptions { expect, ..options.origin.clone() };
    let origin = readonce_origin::open(&locator, &origin_options, rt)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let file: Arc<dyn ReadAt> = origin.clone();
    let driver: &dyn Driver = driver_of(&*file, format).await.map_err(failed)?;
    let description = driver.describe(&file).await.map_err(|error| failed(error.to_string()))?;
    let mapper = driver.open(file).await.map_err(|error| failed(error.to_string()))?;
    Ok(Layer { locator, description, mapper, origin, _lock })
}

/// A reader's lock on a local file, as QEMU takes it on every file of a chain.
pub(super) fn lock_for_reading(
    locator: &Locator,
    options: &ChainOptions,
) -> Result<Option<ImageLock>, readonce_storage::lock::LockError> {
    use readonce_storage::lock::LockError;
    let (Locator::File(path), Locks::Take) = (locator, options.locks) else { return Ok(None) };
    // A file that cannot be opened is told by who opens it to read.
    let Ok(file) = LocalFile::open(path, OpenMode::Read) else { return Ok(None) };
    match ImageLock::take(&file, Access::Read) {
        Ok(lock) => Ok(Some(lock)),
        Err(LockError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
