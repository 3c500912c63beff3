//! Which image `readonce run` serves.
//!
//! | named | `--image` | served | writes |
//! |---|---|---|---|
//! | a file | no | the file | stay in it |
//! | a URL | FILE | FILE, made first if it is not there | stay in it |
//! | a URL | no | a temporary image over the cache's image of the URL | gone at the end |

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use readonce_disk::chain::{ChainOptions, CopyOnRead, Looked, driver_of, look_at_backing};
use readonce_format::driver::{BackingRef, CreateSpec};
use readonce_origin::Locator;
use readonce_storage::{LocalFile, ReadAt, local::OpenMode, runtime::TokioRuntime};

use super::{Args, cache};
use crate::{failure::Failure, folders, look, new_image::Keeper};

/// What to open.
pub struct Chosen {
    /// The top of the chain.
    pub top: String,
    /// How to open it.
    pub options: ChainOptions,
    /// The image that keeps what was read.
    pub kept: PathBuf,
    /// Whether what the command writes is gone at the end.
    pub writes_are_temporary: bool,
    /// Warnings that were told already, which the chain may find again.
    pub warned: Vec<String>,
    /// What to tell before the command runs.
    pub note: Option<&'static str>,
    /// Keeps others away from the cache's image.
    pub claim: Option<cache::Claim>,
    /// The folder of the temporary image; needed until it is open.
    pub temporary: Option<tempfile::TempDir>,
}

/// Finds it, or makes it.
pub async fn choose(name: &str, args: &Args) -> Result<Chosen, Failure> {
    let mut options = args.chain.chain_options(name)?;
    match (look::locator(name)?, &args.image) {
        (Locator::File(path), None) => Ok(Chosen { top: name.to_owned(), ..Chosen::kept_in(&path, options) }),
        (place, image) => {
            // -f is said of the image that keeps what is read. One that is there has its own.
            let keeper = Keeper::named(options.format.take().as_deref())?;
            match image {
                Some(image) => in_image(place, image, keeper, options, args).await,
                None => in_cache(place, keeper, options, args).await,
            }
        }
    }
}

impl Chosen {
    /// All stays in `image`.
    fn kept_in(image: &Path, options: ChainOptions) -> Self {
        Self {
            top: image.display().to_string(),
            options,
            kept: image.to_owned(),
            writes_are_temporary: false,
            warned: Vec::new(),
            note: None,
            claim: None,
            temporary: None,
        }
    }
}

async fn in_image(
    place: Locator,
    image: &Path,
    keeper: Keeper,
    options: ChainOptions,
    args: &Args,
) -> Result<Chosen, Failure> {
    if std::fs::symlink_metadata(image).is_ok() {
        check_backing(image, &place).await?;
        return Ok(Chosen::kept_in(image, options));
    }
    let place = match place {
        // The image may be in another folder.
        Locator::File(path) => Locator::File(
            std::path::absolute(path).map_err(|error| Failure::new(look::without_number(&error)))?,
        ),
        url => url,
    };
    let rt = TokioRuntime::current();
    let name = place.printable();
    let origin = readonce_origin::open(&place, &options.origin, &rt)
        .await
        .map_err(|error| look::cannot_open(&name, error))?;
    let looked = look_at_backing(&place, args.backing_format.as_deref(), &origin, None, &options, &rt)
        .await
        .map_err(|error| look::cannot_open(&name, error))?;
    make(image, keeper, &place, looked).await?;
    args.told.say(format_args!("made {} ({})", image.display(), keeper.name()));
    Ok(Chosen::kept_in(image, options))
}

/// An image over `place` with copy-on-read, pinned to what is there now.
async fn make(image: &Path, keeper: Keeper, place: &Locator, below: Looked) -> Result<(), Failure> {
    let format = below.driver.name();
    let may_be_filled = matches!(place, Locator::File(_)) && format != "raw";
    let spec = CreateSpec {
        size: below.description.virtual_size.next_multiple_of(512),
        backing: Some(BackingRef { name: place.stored_name(), format: Some(format.to_owned()) }),
        options: vec![("copy_on_read".to_owned(), None)],
        pin: (!may_be_filled).then_some(below.pin),
        data_file: None,
    };
    keeper.create(image, spec).await
}

/// An image that is there must be one of the same place.
async fn check_backing(image: &Path, place: &Locator) -> Result<(), Failure> {
    let name = image.display().to_string();
    let file: Arc<dyn ReadAt> =
        Arc::new(LocalFile::open(image, OpenMode::Read).map_err(|error| look::cannot_open(&name, error))?);
    let found = driver_of(&*file, None).await.map_err(|cause| look::cannot_open(&name, cause))?;
    let description = found.describe(&file).await.map_err(|error| look::cannot_open(&name, error))?;
    let backing = description.backing.map(|backing| backing.name);
    let parent = Locator::File(std::path::absolute(image).unwrap_or_else(|_| image.to_owned()));
    let same = backing
        .as_deref()
        .and_then(|backing| Locator::parse(backing, Some(&parent)).ok())
        .is_some_and(|backing| match (&backing, place) {
            (Locator::File(a), Locator::File(b)) => {
                std::fs::canonicalize(a).ok().is_some_and(|a| std::fs::canonicalize(b).ok() == Some(a))
            }
            (backing, place) => backing.same_place(place),
        });
    match (same, backing) {
        (true, _) => Ok(()),
        (false, Some(backing)) => {
            Err(Failure::new(format!("{name} is an image over {backing}, not over {}", place.printable())))
        }
        (false, None) => Err(Failure::new(format!(
            "{name} is an image without a backing file, not over {}",
            place.printable()
        ))),
    }
}

async fn in_cache(
    place: Locator,
    keeper: Keeper,
    mut options: ChainOptions,
    args: &Args,
) -> Result<Chosen, Failure> {
    let found = cache::find(&place, keeper.name(), args.backing_format.as_deref(), &options).await?;
    for warning in &found.warnings {
        crate::report::warn(warning);
    }
    let claim = cache::Claim::take(&found.image, &place)?;
    if let Some(looked) = found.looked
        && std::fs::symlink_metadata(&found.image).is_err()
    {
        // Under another name first: a kill in between leaves no half image under the right one.
        let draft = found.image.with_extension("new");
        let _ = std::fs::remove_file(&draft);
        make(&draft, keeper, &place, looked).await?;
        std::fs::rename(&draft, &found.image).map_err(|error| {
            Failure::new(format!("Could not create '{}': {error}", found.image.display()))
        })?;
    }
    check_backing(&found.image, &place).await?;
    let format = cache::format(&found.image);
    options.format = Some(format.to_owned());
    if options.read_only {
        let warned = found.warnings;
        return Ok(Chosen { claim: Some(claim), warned, ..Chosen::kept_in(&found.image, options) });
    }
    let temporary = folders::roomy()?;
    let top = temporary.path().join("guest");
    options.format = Some(over(&found.image, format, &top).await?);
    let keeps = options.copy_on_read != CopyOnRead::Off;
    if keeps {
        // The fills go into the cache's image, which says so itself; the guest's image takes writes only.
        options.copy_on_read = CopyOnRead::Auto;
    }
    Ok(Chosen {
        top: top.display().to_string(),
        options,
        kept: found.image,
        writes_are_temporary: true,
        warned: found.warnings,
        note: Some(match keeps {
            true => {
                "what is read is kept in the user's cache; what the command writes is temporary (--image FILE keeps it)"
            }
            false => "what the command writes is temporary (--image FILE keeps it)",
        }),
        claim: Some(claim),
        temporary: Some(temporary),
    })
}

/// A temporary image over the cache's. A write into a part of a cluster would fetch the rest of it: subclusters leave that to whole
/// pages, which guests write.
async fn over(below: &Path, format: &str, top: &Path) -> Result<String, Failure> {
    let name = below.display().to_string();
    let file: Arc<dyn ReadAt> =
        Arc::new(LocalFile::open(below, OpenMode::Read).map_err(|error| look::cannot_open(&name, error))?);
    let driver = driver_of(&*file, Some(format)).await.map_err(|cause| look::cannot_open(&name, cause))?;
    let description = driver.describe(&file).await.map_err(|error| look::cannot_open(&name, error))?;
    let spec = CreateSpec {
        size: description.virtual_size,
        backing: Some(BackingRef { name, format: Some(format.to_owned()) }),
        ..CreateSpec::default()
    };
    let keeper = Keeper::named(None)?;
    keeper.create(top, spec).await?;
    Ok(keeper.name().to_owned())
}
