//! A whole chain opened to be looked at: what `info`, `map` and `create` need.

use std::sync::Arc;

use readonce_format::{
    Driver, Mapper,
    driver::{Description, Pin},
};
use readonce_origin::{Locator, Origin, OriginOptions, Pinned, Reach};
use readonce_storage::{OpenMode, ReadAt, Rt, lock::Access};

use super::{CHAIN_DEPTH_MAX, ChainOptions, Held, Locks, OpenError, driver_of, files, versions};

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
    /// Where its data is, if that is another file and lies far away.
    pub data: Option<Arc<dyn Origin>>,
    _lock: Option<Held>,
}

impl Layer {
    /// What an image above it pins.
    ///
    /// # Errors
    /// What it shows cannot be told apart from other versions.
    pub fn pin(&self) -> Result<Pin, OpenError> {
        versions::pin(&*self.origin, self.data.as_deref())
    }
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
        let layer = open_layer(locator, format.as_deref(), expect, options, top_only, rt).await?;
        if let (Some(backing), TopOnly::No, false) =
            (&layer.description.backing, top_only, options.no_backing_files)
        {
            let child = Locator::parse(&backing.name, Some(&layer.locator))
                .map_err(|error| OpenError::new(&backing.name, error))?;
            options
                .allow_backing
                .check(&layer.locator, &child)
                .map_err(|error| OpenError::new(child.printable(), error))?;
            let expect = layer.description.pin.as_ref().and_then(versions::pinned);
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

async fn open_layer(
    locator: Locator,
    format: Option<&str>,
    expect: Option<Pinned>,
    options: &ChainOptions,
    top_only: TopOnly,
    rt: &Rt,
) -> Result<Layer, OpenError> {
    let name = locator.printable();
    let failed = |cause: String| OpenError::new(&name, cause);
    let _lock = lock_for_reading(&locator, options, rt).await.map_err(|error| failed(error.to_string()))?;
    let own = expect.as_ref().map(|expect| expect.own.clone());
    // Of a raw file no more than its length is needed, which the pin tells. What else must be read is there, or the chain cannot be told.
    let reach = if format == Some("raw") { options.origin.reach } else { Reach::Required };
    let origin_options = OriginOptions { expect: own, reach, ..options.origin.clone() };
    let origin = options
        .places
        .origin(&locator, &origin_options, rt)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let file: Arc<dyn ReadAt> = origin.clone();
    let driver: &dyn Driver = driver_of(&*file, format).await.map_err(failed)?;
    let description = driver.describe(&file).await.map_err(|error| failed(error.to_string()))?;
    let mapper = driver.open(file).await.map_err(|error| failed(error.to_string()))?;
    let mut data = None;
    if let (Locator::Http(_), TopOnly::No, false) = (&locator, top_only, options.no_backing_files)
        && let Some(place) = files::data_file(&locator, &description, options)?
    {
        let expect = files::expected_data(&place, expect.as_ref())?;
        let origin_options = OriginOptions { expect, ..options.origin.clone() };
        let opened = options.places.origin(&place, &origin_options, rt).await;
        data = Some(opened.map_err(|error| OpenError::new(place.printable(), error))?);
    }
    Ok(Layer { locator, description, mapper, origin, data, _lock })
}

/// A reader's lock on a local file, as QEMU takes it on every file of a chain.
pub(super) async fn lock_for_reading(
    locator: &Locator,
    options: &ChainOptions,
    rt: &Rt,
) -> Result<Option<Held>, readonce_storage::lock::LockError> {
    use readonce_storage::lock::LockError;
    let (Locator::File(path), Locks::Take) = (locator, options.locks) else { return Ok(None) };
    // A file that cannot be opened is told by who opens it to read.
    let Ok(file) = options.places.file(path, OpenMode::Read) else { return Ok(None) };
    match file.lock(Access::Read, rt).await {
        Ok(lock) => Ok(Some(lock)),
        Err(LockError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
