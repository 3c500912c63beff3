//! `readonce create`: a new image, as qemu-img makes it; with a backing file, pinned to the version that the backing has now.
//!
//! - Everything is checked before the image's file is touched: what is refused creates nothing, and changes no file that
//!   was there.
//! - The name that is stored has no user, password or signature in it.

use std::{collections::BTreeMap, path::Path, process::ExitCode, sync::Arc};

use bytes::Bytes;
use readonce_disk::chain::{ChainOptions, Layer, TopOnly, open_layers};
use readonce_format::{
    Driver,
    driver::{BackingRef, CreateSpec, Pin},
};
use readonce_origin::Locator;
use readonce_storage::{
    BoxFuture, LocalFile, ReadAt, Rt, Storage, local::OpenMode, lock::Access, runtime::TokioRuntime,
};

use crate::{
    chain_args::{OriginArgs, PolicyArgs},
    failure::{Failure, Outcome},
    look,
    options::{self, Pair},
    report,
};

/// Make a new image
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce create [OPTIONS] IMAGE [SIZE]",
    after_help = "SIZE is in bytes, suffixes k, M, G, T, P, E; without it the backing file's size is taken.\n\
                  Example: readonce create -f qed -o copy_on_read -b http://host/Fedora.iso -F raw cached.img"
)]
pub struct Args {
    /// Format of the new image (qed, raw)
    #[arg(short = 'f', long = "format", value_name = "FMT", default_value = "raw")]
    format: String,
    /// Format options: cluster_size=BYTES, table_size=CLUSTERS, copy_on_read[=on|off]; -o help lists them
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

/// Options whose value is a size.
const SIZES: [&str; 3] = ["cluster_size", "table_size", "size"];
/// Options whose value is on or off.
const SWITCHES: [&str; 1] = ["copy_on_read"];
/// Options that every format with a backing file takes, and their help.
const COMMON: [(&str, &str); 3] = [
    ("backing_file", "File name of a base image"),
    ("backing_fmt", "Image format of the base image"),
    ("size", "Virtual disk size"),
];

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let pairs = options::pairs(args.options.iter().map(String::as_str));
    let driver = readonce_format::driver::driver(&args.format);
    if pairs.iter().any(|(name, _)| name == "help" || name == "?") {
        let driver = driver.ok_or_else(|| Failure::new(format!("Unknown file format '{}'", args.format)))?;
        print!("{}", help(driver));
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
    let mut wanted = Wanted::read(driver, pairs, &args).map_err(of_image)?;
    wanted.size = size.or(wanted.size);
    create(image, driver, wanted, &args).await.map_err(of_image)
}

/// What the command line asks for.
struct Wanted {
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<String>,
    /// The format's own options, sizes in bytes.
    options: Vec<Pair>,
}

impl Wanted {
    fn read(driver: &dyn Driver, pairs: Vec<Pair>, args: &Args) -> Result<Self, Failure> {
        let mut named: BTreeMap<String, Option<String>> = BTreeMap::new();
        for (name, value) in pairs {
            let known = driver.create_options().iter().any(|option| option.name == name)
                || COMMON.iter().any(|(common, _)| *common == name);
            if !known {
                return Err(Failure::new(format!("Invalid parameter '{name}'")));
            }
            let value = match value {
                value if SWITCHES.contains(&name.as_str()) => {
                    Some(if options::switch(&name, value.as_deref())? { "on" } else { "off" }.to_owned())
                }
                Some(value) if SIZES.contains(&name.as_str()) => {
                    Some(options::parameter_size(&name, &value)?.to_string())
                }
                None if SIZES.contains(&name.as_str()) => {
                    Some(options::parameter_size(&name, "on")?.to_string())
                }
                value => value,
            };
            named.insert(name, value);
        }
        let mut take = |name: &str| named.remove(name).flatten();
        let size = take("size").and_then(|text| text.parse().ok());
        let (backing, backing_format) = (take("backing_file"), take("backing_fmt"));
        let backing = args.backing.clone().or(backing);
        if backing.as_deref() == Some("") {
            return Err(Failure::new("Expected backing file name, got empty string"));
        }
        let mut own = Vec::new();
        for option in driver.create_options() {
            if let Some(value) = named.remove(option.name) {
                own.push((option.name.to_owned(), value));
            }
        }
        Ok(Self {
            size,
            backing,
            backing_format: args.backing_format.clone().or(backing_format),
            options: own,
        })
    }
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
    // Held until the end, so that nobody writes the backing meanwhile.
    let mut _layers = Vec::new();
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
            _layers = open_backing(&backing, &wanted.backing_format, args, &rt).await?;
            if _layers.iter().any(|layer| is_same_file(&place, &layer.locator)) {
                return Err(Failure::new("Error: the backing chain holds the file that is to be made"));
            }
        }
        let Some(format) = wanted.backing_format.clone() else {
            let detected = match _layers.first() {
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
        if matches!(&backing, Locator::Http(url) if url.as_str() != stored) {
            report::warn(format!(
                "what grants access to {stored} is not kept in the image: give the URL again when it is used (--url or \
                 READONCE_URL)"
            ));
        }
        if let Some(layer) = _layers.first() {
            size = size.or(Some(layer.description.virtual_size.next_multiple_of(512)));
            spec.pin = pin(layer, &format);
        }
        spec.backing = Some(BackingRef { name: stored, format: Some(format) });
    }
    spec.size = size.ok_or_else(|| Failure::new("Image creation needs a size parameter"))?;
    if !args.quiet {
        println!("{}", announcement(image, driver, &spec, wanted.backing_format.as_deref()));
    }
    let rehearsal: Arc<dyn Storage> = Arc::new(Rehearsal);
    driver.create(&rehearsal, None, &spec).await.map_err(|error| Failure::new(error.to_string()))?;
    write(&place, driver, &spec).await?;
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
fn pin(layer: &Layer, format: &str) -> Option<Pin> {
    let may_be_filled = matches!(layer.locator, Locator::File(_)) && format != "raw";
    (!may_be_filled).then(|| Pin { validator: layer.origin.validator(), len: layer.origin.len() })
}

/// Whether both are one file, whatever links lead to it.
fn is_same_file(place: &Path, other: &Locator) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Locator::File(other) = other else { return false };
    if place == other {
        return true;
    }
    match (std::fs::metadata(place), std::fs::metadata(other)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

async fn write(place: &Path, driver: &dyn Driver, spec: &CreateSpec) -> Result<(), Failure> {
    let failed = |cause: String| {
        let cause = cause
            .strip_prefix(&format!("Could not open '{}': ", place.display()))
            .map(str::to_owned)
            .unwrap_or(cause);
        Failure::new(format!("Could not create '{}': {cause}", place.display()))
    };
    let was_there = std::fs::symlink_metadata(place).is_ok();
    let mode = if was_there { OpenMode::Create } else { OpenMode::CreateNew };
    let file = LocalFile::open(place, mode).map_err(|error| failed(error.to_string()))?;
    let file = Arc::new(file);
    let _lock = look::locked(&file, Access::Write).map_err(|error| Failure::new(error.to_string()))?;
    let storage: Arc<dyn Storage> = file.clone();
    if let Err(error) = driver.create(&storage, None, spec).await {
        if !was_there {
            let _ = std::fs::remove_file(place);
        }
        return Err(failed(error.to_string()));
    }
    Ok(())
}

/// The line that QEMU's tool prints before it makes an image.
fn announcement(image: &str, driver: &dyn Driver, spec: &CreateSpec, backing_format: Option<&str>) -> String {
    let mut line = format!("Formatting '{image}', fmt={} size={}", driver.name(), spec.size);
    if let Some(backing) = &spec.backing {
        line += &format!(" backing_file={}", backing.name);
    }
    if let Some(format) = backing_format {
        line += &format!(" backing_fmt={format}");
    }
    for option in driver.create_options() {
        let given = spec.options.iter().find(|(name, _)| name == option.name);
        match given.map(|(_, value)| value.as_deref().unwrap_or("on")) {
            Some(value) => line += &format!(" {}={value}", option.name),
            None if option.name == "cluster_size" => line += " cluster_size=65536",
            None => {}
        }
    }
    line
}

fn help(driver: &dyn Driver) -> String {
    let own = driver.create_options().iter().map(|option| (option.name, option.help));
    let has_backing = driver.create_options().iter().any(|option| SWITCHES.contains(&option.name));
    let common = COMMON.into_iter().filter(|(name, _)| has_backing || *name == "size");
    let all: BTreeMap<&str, &str> = own.chain(common).collect();
    let mut text = format!("Supported {} options:\n", driver.name());
    for (name, help) in all {
        let kind = match name {
            name if SIZES.contains(&name) => "<size>",
            name if SWITCHES.contains(&name) => "<bool (on/off)>",
            _ => "<str>",
        };
        let left = format!("{name}={kind}");
        text += &format!("  {left:<22} - {help}\n");
    }
    text
}

/// Bytes that take everything: a driver that creates an image here has checked all that was asked, and no file was touched.
struct Rehearsal;

impl ReadAt for Rehearsal {
    fn len(&self) -> u64 {
        0
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Option<std::io::Result<()>> {
        None
    }

    fn read(&self, _: u64, _: usize) -> BoxFuture<'_, std::io::Result<Bytes>> {
        Box::pin(std::future::ready(Err(std::io::ErrorKind::UnexpectedEof.into())))
    }
}

impl Storage for Rehearsal {
    fn write_now(&self, _: u64, _: &[u8]) -> Option<std::io::Result<()>> {
        Some(Ok(()))
    }

    fn write(&self, _: u64, _: Bytes) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn allocate(&self, _: u64, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn punch_hole(&self, _: u64, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn set_len(&self, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn sync(&self) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
