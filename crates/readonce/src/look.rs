//! Opening a file or URL to look at it, or to change its header: `info`, `map`, `check`, `create`, `amend`, `rebase`, `resize`.

use std::{path::Path, sync::Arc};

use readonce_disk::chain::{
    CHAIN_DEPTH_MAX, ChainOptions, Layer, Locks, OpenError, TopOnly, driver_of, open_layers,
};
use readonce_format::{Driver, driver::Description};
use readonce_origin::{Locator, OriginOptions, Reach};
use readonce_storage::{
    ImageLock, LocalFile, ReadAt, Rt, Storage,
    local::OpenMode,
    lock::{Access, LockError},
    runtime::TokioRuntime,
};

use crate::{
    chain_args::{OriginArgs, PolicyArgs},
    failure::Failure,
    report,
};

/// Flags of the commands that only look.
#[derive(Debug, Clone, clap::Args)]
pub struct LookArgs {
    /// Format of IMAGE (qed, qcow2, raw); told from its first bytes where absent
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub format: Option<String>,
    /// Look without a lock, also while another process writes the image
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    pub origin: OriginArgs,
}

/// Human or JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Human,
    /// For programs.
    Json,
}

/// `--output`, in QEMU's words. For clap it would be a value parser, whose sentence is another.
pub fn output(command: &str, text: &str) -> Result<Output, Failure> {
    match text {
        "human" => Ok(Output::Human),
        "json" => Ok(Output::Json),
        _ => Err(Failure::usage(command, format!("--output expects 'human' or 'json' not '{text}'"))),
    }
}

/// The one image that a command is about.
pub fn one_image<'a>(command: &str, images: &'a [String]) -> Result<&'a str, Failure> {
    match images {
        [image] => Ok(image),
        _ => Err(Failure::usage(command, "Expecting one image file name")),
    }
}

/// A name that the user typed.
pub fn locator(name: &str) -> Result<Locator, Failure> {
    Locator::parse(name, None).map_err(|error| Failure::new(format!("Could not open '{name}': {error}")))
}

/// Opens the chain from `image` down.
pub async fn layers(image: &str, args: &LookArgs, top_only: TopOnly, rt: &Rt) -> Result<Vec<Layer>, Failure> {
    let top = locator(image)?;
    if let Locator::File(path) = &top {
        can_be_opened(path)?;
    }
    let options = ChainOptions {
        format: args.format.clone(),
        read_only: true,
        allow_backing: args.policy.allow(),
        no_backing_files: args.policy.no_backing_files,
        // The map of what is local needs no more of a raw backing that is pinned than its length.
        origin: OriginOptions { reach: Reach::Preferred, ..args.origin.options(&[&top])? },
        locks: if args.force_share { Locks::Share } else { Locks::Take },
        ..ChainOptions::default()
    };
    let layers = open_layers(image, &options, top_only, rt).await.map_err(told)?;
    let named = layers.iter().filter_map(|layer| {
        let backing = layer.description.backing.as_ref()?;
        Locator::parse(&backing.name, Some(&layer.locator)).ok()
    });
    args.origin
        .warn_of_unused(&named.chain(layers.iter().map(|layer| layer.locator.clone())).collect::<Vec<_>>());
    for layer in &layers {
        for note in layer.origin.notes() {
            report::warn(format!("{}: {note}", layer.locator.printable()));
        }
    }
    Ok(layers)
}

/// The places that a chain goes through, from `image` down to the first that is not local, as far as they can be read.
pub async fn places(image: &str, format: Option<&str>) -> Vec<Locator> {
    let mut places: Vec<Locator> = Vec::new();
    let mut format = format.map(str::to_owned);
    let mut next = Locator::parse(image, None).ok();
    while let Some(place) = next.take().filter(|_| places.len() < CHAIN_DEPTH_MAX) {
        if let Locator::File(path) = &place
            && let Ok(file) = LocalFile::open(path, OpenMode::Read)
            && let Ok(driver) = driver_of(&file, format.as_deref()).await
            && let Ok(description) = driver.describe(&(Arc::new(file) as Arc<dyn ReadAt>)).await
            && let Some(backing) = description.backing
        {
            next = Locator::parse(&backing.name, Some(&place)).ok();
            format = backing.format;
        }
        places.push(place);
    }
    places
}

/// Warns where the name that an image keeps of a backing file is less than what was typed.
pub fn warn_of_what_is_cut(backing: &Locator) {
    let stored = backing.stored_name();
    if matches!(backing, Locator::Http(url) if url.as_str() != stored) {
        report::warn(format!(
            "what grants access to {stored} is not kept in the image: give the URL again when it is used (--url or \
             READONCE_URL)"
        ));
    }
}

/// An error of a chain, in QEMU's words where it has them.
pub fn told(error: OpenError) -> Failure {
    Failure::new(OpenError { cause: in_qemu_words(&error.cause), ..error }.to_string())
}

/// A format's error, in QEMU's words where it has them.
pub fn in_qemu_words(cause: &str) -> String {
    match cause.strip_prefix("magic is ") {
        Some(rest) if rest.contains("must be QFI") => "Image is not in qcow2 format".to_owned(),
        Some(_) => "Image not in QED format".to_owned(),
        None => cause.to_owned(),
    }
}

/// QEMU names a top file that cannot be opened twice, once for the format and once for the file under it.
pub fn can_be_opened(path: &Path) -> Result<(), Failure> {
    let name = path.display();
    if path.is_dir() {
        return Err(Failure::new(format!(
            "Could not open '{name}': 'file' driver requires '{name}' to be a regular file"
        )));
    }
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(format!(
            "Could not open '{name}': Could not open '{name}': {}",
            without_number(&error)
        ))),
    }
}

/// The system's words without the number after them.
pub fn without_number(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// The bytes of a local file, under a reader's lock unless `force_share`, or of a URL.
pub async fn readable(
    image: &str,
    force_share: bool,
    origin: &OriginArgs,
) -> Result<(Arc<dyn ReadAt>, Option<ImageLock>), Failure> {
    let locator = locator(image)?;
    match &locator {
        Locator::File(path) => {
            can_be_opened(path)?;
            let file = LocalFile::open(path, OpenMode::Read).map_err(|error| cannot_open(image, error))?;
            let lock = match force_share {
                true => None,
                false => locked(&file, Access::Read).await.map_err(|error| cannot_open(image, error))?,
            };
            Ok((Arc::new(file), lock))
        }
        Locator::Http(_) => {
            let options = origin.options(&[&locator])?;
            origin.warn_of_unused(std::slice::from_ref(&locator));
            let origin = readonce_origin::open(&locator, &options, &TokioRuntime::current())
                .await
                .map_err(|error| cannot_open(image, error))?;
            for note in origin.notes() {
                report::warn(format!("{}: {note}", locator.printable()));
            }
            Ok((origin, None))
        }
    }
}

/// A local image that is about to be changed, under a writer's lock.
pub struct Held {
    /// Its bytes.
    pub file: Arc<dyn Storage>,
    /// The same, to read.
    pub readable: Arc<dyn ReadAt>,
    /// Its format.
    pub driver: &'static dyn Driver,
    /// What it says of itself.
    pub description: Description,
    /// Its place.
    pub locator: Locator,
    _lock: Option<ImageLock>,
}

/// Opens a local image to change its header.
pub async fn hold(image: &str, format: Option<&str>) -> Result<Held, Failure> {
    let (file, driver, _lock) = hold_file(image, format).await?;
    let readable: Arc<dyn ReadAt> = file.clone();
    let description = driver.describe(&readable).await.map_err(|error| cannot_open(image, error))?;
    Ok(Held { file, readable, driver, description, locator: locator(image)?, _lock })
}

/// A local file under a writer's lock, and its format; nothing of it is read but its first bytes.
pub async fn hold_file(
    image: &str,
    format: Option<&str>,
) -> Result<(Arc<dyn Storage>, &'static dyn Driver, Option<ImageLock>), Failure> {
    let Locator::File(path) = locator(image)? else {
        return Err(cannot_open(image, "what is not local cannot be changed"));
    };
    can_be_opened(&path)?;
    let file = LocalFile::open(&path, OpenMode::ReadWrite).map_err(|error| cannot_open(image, error))?;
    let lock = locked(&file, Access::Write).await.map_err(|error| cannot_open(image, error))?;
    let driver = driver_of(&file, format).await.map_err(|error| cannot_open(image, error))?;
    if driver.name() == "raw" && format.is_none() {
        let cause = "its format is not known, and a file is never guessed to be raw for writing: say -f raw";
        return Err(cannot_open(image, cause));
    }
    Ok((Arc::new(file), driver, lock))
}

/// QEMU's lock on a file; none where the file system has no locks, which is told.
pub async fn locked(file: &LocalFile, access: Access) -> Result<Option<ImageLock>, LockError> {
    match ImageLock::wait(file, access, &TokioRuntime::current()).await {
        Ok(lock) => Ok(Some(lock)),
        Err(error @ LockError::Unsupported { .. }) => {
            report::warn(error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// `Could not open 'IMAGE': ...`, the words not said twice.
pub fn cannot_open(image: &str, cause: impl ToString) -> Failure {
    told(OpenError::new(image, cause))
}
