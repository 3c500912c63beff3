//! `readonce create`: a new image, as qemu-img makes it; with a backing file, pinned to the version that the backing has now.
//!
//! - Everything is checked before the image's file is touched: what is refused creates nothing, and changes no file that
//!   was there.
//! - The name that is stored has no user, password or signature in it.
//! - A data file lies where the image will look for it: beside the image, if its name is a relative one.
//!
//! `create/wanted`: the options. `create/rehearsal`: a file that takes everything, on which a driver shows that it would do.

mod rehearsal;
mod wanted;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use readonce_disk::chain::{ChainOptions, Layer, Locks, TopOnly, open_layers};
use readonce_format::{
    Driver,
    driver::{BackingRef, CreateSpec, Pin},
};
use readonce_origin::Locator;
use readonce_storage::{
    ImageLock, LocalFile, Rt, Storage, local::OpenMode, lock::Access, runtime::TokioRuntime,
};
use readonce_words::options;

pub use self::wanted::help_line;
use self::{
    rehearsal::Rehearsal,
    wanted::{Wanted, announcement, help},
};
use crate::{
    chain_args::{OriginArgs, PolicyArgs},
    failure::{Failure, Outcome},
    look, report, stdout,
};

/// Make a new image
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce create [OPTIONS] IMAGE [SIZE]",
    after_help = "SIZE is in bytes, suffixes k, M, G, T, P, E; without it the backing file's size is taken.\n\
                  Example: readonce create -f qcow2 -o copy_on_read -b http://host/Fedora.iso -F raw cached.img"
)]
pub struct Args {
    /// Format of the new image (qed, qcow2, raw)
    #[arg(short = 'f', long = "format", value_name = "FMT", default_value = "raw")]
    format: String,
    /// Format options: copy_on_read[=on|off], cluster_size=BYTES and more; -o help lists those of the format
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Backing file: a path relative to IMAGE, or a URL
    #[arg(short = 'b', long, value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not open the backing file; SIZE is needed, and no version is pinned
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    origin: OriginArgs,
    /// File to make, and its size in bytes
    #[arg(value_name = "IMAGE [SIZE]", allow_negative_numbers = true)]
    words: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    options::check_lists(args.options.iter().map(String::as_str))?;
    let pairs = options::pairs(args.options.iter().map(String::as_str));
    let driver = readonce_format::driver::driver(&args.format);
    if pairs.iter().any(|(name, _)| name == "help" || name == "?") {
        let driver = driver.ok_or_else(|| Failure::new(format!("Unknown file format '{}'", args.format)))?;
        stdout::print(help(driver, !args.words.is_empty()));
        return Ok(ExitCode::SUCCESS);
    }
    let (image, size) = match args.words.as_slice() {
        [] => return Err(Failure::usage("create", "Expecting image file name")),
        [image] => (image, None),
        [image, size] => (image, Some(options::image_size(size)?)),
        [_, _, extra, ..] => return Err(Failure::usage("create", format!("Unexpected argument: {extra}"))),
    };
    let of_image = |failure: Failure| Failure { text: format!("{image}: {}", failure.text), ..failure };
    let driver =
        driver.ok_or_else(|| of_image(Failure::new(format!("Unknown file format '{}'", args.format))))?;
    let mut wanted = Wanted::read(driver, pairs).map_err(of_image)?;
    if size.is_some() && wanted.size.is_some() {
        return Err(of_image(Failure::new("The image size must be specified only once")));
    }
    wanted.size = size.or(wanted.size);
    wanted.backing = args.backing.clone().or(wanted.backing);
    wanted.backing_format = args.backing_format.clone().or(wanted.backing_format);
    if wanted.backing.as_deref() == Some("") {
        return Err(of_image(Failure::new("Expected backing file name, got empty string")));
    }
    create(image, driver, wanted, &args).await.map_err(of_image)
}

async fn create(image: &str, driver: &dyn Driver, wanted: Wanted, args: &Args) -> Outcome {
    let place = match Locator::parse(image, None) {
        Ok(Locator::File(path)) => path,
        Ok(Locator::Http(url)) => {
            return Err(Failure::new(format!(
                "Protocol driver '{}' does not support image creation",
                url.scheme()
            )));
        }
        Err(error) => return Err(Failure::new(error.to_string())),
    };
    let rt = TokioRuntime::current();
    let mut spec = CreateSpec { options: wanted.options, ..CreateSpec::default() };
    let mut size = wanted.size;
    let mut layers = Vec::new();
    if let Some(name) = &wanted.backing {
        let backing = Locator::parse(name, Some(&Locator::File(place.clone()))).map_err(|error| {
            Failure::new(format!("Could not open '{name}': {error}\nCould not open backing image."))
        })?;
        if is_same_file(&place, &backing) {
            return Err(Failure::new(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        if !args.backing_unsafe {
            layers = open_backing(&backing, &wanted.backing_format, args, &rt).await?;
            if layers.iter().any(|layer| is_same_file(&place, &layer.locator)) {
                return Err(Failure::new("Error: the backing chain holds the file that is to be made"));
            }
        }
        let Some(format) = wanted.backing_format.clone() else {
            let detected = match layers.first() {
                Some(layer) => format!("\nDetected format of {}.", layer.description.format),
                None => String::new(),
            };
            return Err(Failure::new(format!("Backing file specified without backing format{detected}")));
        };
        let stored = match &backing {
            // As typed: it is relative to the image.
            Locator::File(_) => name.clone(),
            Locator::Http(_) => backing.stored_name(),
        };
        look::warn_of_what_is_cut(&backing);
        if let Some(layer) = layers.first() {
            size = size.or(Some(layer.description.virtual_size.next_multiple_of(512)));
            spec.pin = pin(layer, &format)?;
        }
        spec.backing = Some(BackingRef { name: stored, format: Some(format) });
    }
    spec.data_file = wanted.data_file;
    spec.size = size.ok_or_else(|| Failure::new("Image creation needs a size parameter"))?;
    if !args.quiet {
        stdout::line(announcement(
            image,
            driver,
            &spec,
            wanted.backing_format.as_deref(),
            wanted.nocow.as_deref(),
        ));
    }
    // QED has no place for a backing's format, and QEMU's driver of it does not look.
    if spec.backing.is_none() && wanted.backing_format.is_some() && driver.name() == "qcow2" {
        return Err(Failure::new("Backing format cannot be used without backing file"));
    }
    let data = match &spec.data_file {
        Some(name) => Some(data_file(&place, name, &layers)?),
        None => None,
    };
    let rehearsal: Arc<dyn Storage> = Arc::new(Rehearsal);
    let rehearsed = data.as_ref().map(|_| &rehearsal);
    driver.create(&rehearsal, rehearsed, &spec).await.map_err(|error| Failure::new(error.to_string()))?;
    let no_cow = wanted.nocow.as_deref() == Some("on");
    write(&place, data.as_deref(), driver, &spec, no_cow).await?;
    if !args.quiet
        && let Some(words) = driver.refused_by_qemu(&spec)
    {
        report::warn(format!(
            "QEMU cannot open {image} (\"{words}\"), which the format allows: with other sizes of clusters or tables it can"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

async fn open_backing(
    backing: &Locator,
    format: &Option<String>,
    args: &Args,
    rt: &Rt,
) -> Result<Vec<Layer>, Failure> {
    let name = match backing {
        // A path with a colon would be read as a protocol.
        Locator::File(path) if path.is_relative() => format!("./{}", path.display()),
        Locator::File(path) => path.display().to_string(),
        Locator::Http(url) => url.to_string(),
    };
    let options = ChainOptions {
        format: format.clone(),
        read_only: true,
        allow_backing: args.policy.allow(),
        no_backing_files: args.policy.no_backing_files,
        origin: args.origin.options(&[backing])?,
        // As qemu-img: a backing that is in use can be named all the same. It is looked at alone.
        locks: Locks::Share,
        ..ChainOptions::default()
    };
    let layers = open_layers(&name, &options, TopOnly::No, rt).await.map_err(|error| {
        let cause = look::in_qemu_words(&error.cause);
        let told = match () {
            // QEMU does not name the file here.
            () if cause != error.cause || cause.starts_with("Unknown driver") => cause,
            () => look::told(error).text,
        };
        Failure::new(format!("{}\nCould not open backing image.", told.replace("'./", "'")))
    })?;
    for layer in &layers {
        for note in layer.origin.notes() {
            report::warn(format!("{}: {note}", layer.locator.printable()));
        }
    }
    Ok(layers)
}

/// A local image as a backing is not pinned: filling it changes its file, not what it shows.
fn pin(layer: &Layer, format: &str) -> Result<Option<Pin>, Failure> {
    let may_be_filled = matches!(layer.locator, Locator::File(_)) && format != "raw";
    (!may_be_filled).then(|| layer.pin().map_err(look::told)).transpose()
}

/// Whether both are one file, whatever links lead to it.
fn is_same_file(place: &Path, other: &Locator) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Locator::File(other) = other else { return false };
    // Neither needs to be there yet.
    let settled = |path: &Path| {
        let path = std::path::absolute(path).ok()?;
        Some(std::fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?))
    };
    if place == other || settled(place).is_some_and(|place| settled(other) == Some(place)) {
        return true;
    }
    match (std::fs::metadata(place), std::fs::metadata(other)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Where the data file of an image at `place` is to be.
fn data_file(place: &Path, name: &str, layers: &[Layer]) -> Result<PathBuf, Failure> {
    let image = Locator::File(place.to_owned());
    let found = match Locator::parse(name, Some(&image)) {
        _ if name.is_empty() => {
            return Err(Failure::new("Could not create '': No such file or directory"));
        }
        Ok(Locator::File(path)) => path,
        Ok(Locator::Http(url)) => {
            return Err(Failure::new(format!("Driver '{}' does not support image creation", url.scheme())));
        }
        Err(error) => return Err(Failure::new(error.to_string())),
    };
    if is_same_file(&found, &image) {
        return Err(Failure::new("Error: the data file and the image are the same file"));
    }
    if layers.iter().any(|layer| is_same_file(&found, &layer.locator)) {
        return Err(Failure::new("Error: the backing chain holds the file that is to hold the data"));
    }
    Ok(found)
}

/// A file that is being made. Dropped before it is kept, it goes, unless it was there before.
struct Draft<'a> {
    place: &'a Path,
    file: Arc<LocalFile>,
    _lock: Option<ImageLock>,
    was_there: bool,
    kept: bool,
}

impl<'a> Draft<'a> {
    async fn open(place: &'a Path) -> Result<Self, Failure> {
        let was_there = std::fs::symlink_metadata(place).is_ok();
        let mode = if was_there { OpenMode::Create } else { OpenMode::CreateNew };
        let file = LocalFile::open(place, mode).map_err(|error| not_created(place, &error.to_string()))?;
        let lock =
            look::locked(&file, Access::Write).await.map_err(|error| Failure::new(error.to_string()))?;
        Ok(Self { place, file: Arc::new(file), _lock: lock, was_there, kept: false })
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.was_there && !self.kept {
            let _ = std::fs::remove_file(self.place);
        }
    }
}

fn not_created(place: &Path, cause: &str) -> Failure {
    let cause = cause.strip_prefix(&format!("Could not open '{}': ", place.display())).unwrap_or(cause);
    Failure::new(format!("Could not create '{}': {cause}", place.display()))
}

async fn write(
    place: &Path,
    data: Option<&Path>,
    driver: &dyn Driver,
    spec: &CreateSpec,
    no_cow: bool,
) -> Result<(), Failure> {
    let mut image = Draft::open(place).await?;
    if no_cow {
        image.file.set_no_copy_on_write();
    }
    let mut data = match data {
        Some(data) => Some(Draft::open(data).await?),
        None => None,
    };
    let file: Arc<dyn Storage> = image.file.clone();
    let data_file = data.as_ref().map(|data| data.file.clone() as Arc<dyn Storage>);
    driver
        .create(&file, data_file.as_ref(), spec)
        .await
        .map_err(|error| not_created(place, &error.to_string()))?;
    image.kept = true;
    if let Some(data) = &mut data {
        data.kept = true;
    }
    Ok(())
}
