//! `readonce resize`: makes an image larger.
//!
//! Where the backing is longer than the image was, the new part is made to read as zeros, as qemu-img does it: what the guest
//! never saw must not appear. A crash in between leaves it to be seen.

use std::{ffi::OsString, process::ExitCode, time::Duration};

use readonce_disk::{
    BlockDevice, ZeroMode,
    chain::{ChainOptions, CopyOnRead},
};
use readonce_format::driver::HeaderChange;
use readonce_origin::Locator;
use readonce_storage::{LocalFile, ReadAt, Storage, local::OpenMode, lock::Access};
use readonce_words::options;

use crate::{
    chain_args::{OriginArgs, PolicyArgs},
    failure::{Failure, Outcome},
    look::{self, Held},
    report::ToldArgs,
    session, stdout,
};

/// How long the end of hiding may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// What qemu-img says then.
const SHRINK_NOT_ASKED: &str = "Use the --shrink option to perform a shrink operation.\nreadonce: warning: Shrinking an image will delete all \
     data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there.";
/// What sizes of images are multiples of.
const SECTOR_BYTES: u64 = 512;
/// States that are looked at together.
const EXTENTS_MAX: usize = 256;

/// Make an image larger
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce resize [OPTIONS] IMAGE [+]SIZE",
    after_help = "SIZE is in bytes, suffixes k, M, G, T, P, E; +SIZE is added to the size now. Images cannot be made smaller."
)]
pub struct Args {
    /// Format of IMAGE (qed, qcow2, raw); told from its first bytes where absent, but never guessed to be raw
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    format: Option<String>,
    /// Asked for by qemu-img before it makes an image smaller; here images cannot be made smaller
    #[arg(long)]
    shrink: bool,
    /// off: space for the new part is taken when it is written; nothing else is supported
    #[arg(long, value_name = "PREALLOC", default_value = "off", hide_default_value = true)]
    preallocation: String,
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    origin: OriginArgs,
    /// File, and its new size
    #[arg(value_name = "IMAGE [+]SIZE", allow_negative_numbers = true)]
    words: Vec<String>,
}

/// The words of a command line, where the last one of `resize` may be `-1M`, which looks like an option.
pub fn with_size_apart(mut words: Vec<OsString>) -> Vec<OsString> {
    let is_less = |word: &OsString| {
        let bytes = word.as_encoded_bytes();
        bytes.first() == Some(&b'-') && bytes.get(1).is_some_and(u8::is_ascii_digit)
    };
    let is_resize = words.get(1).is_some_and(|word| word == "resize") && words.len() > 3;
    if is_resize && words.last().is_some_and(is_less) && !words.iter().any(|word| word == "--") {
        words.insert(words.len() - 1, "--".into());
    }
    words
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let [image, size] = args.words.as_slice() else {
        return Err(Failure::usage("resize", "Expecting image file name and size"));
    };
    check_preallocation(&args.preallocation)?;
    let relative = size.starts_with(['+', '-']);
    let amount = options::parameter_size("size", size.trim_start_matches(['+', '-']))?;
    let held = look::hold(image, args.format.as_deref()).await?;
    let now = held.description.virtual_size;
    let size = match (relative, size.starts_with('-')) {
        (true, true) => now.saturating_sub(amount),
        (true, false) => now
            .checked_add(amount)
            .ok_or_else(|| Failure::new(format!("New image size must be at most {} bytes", i64::MAX)))?,
        (false, _) => amount,
    };
    if size == 0 {
        return Err(Failure::new("New image size must be positive"));
    }
    if size < now && !args.shrink {
        return Err(Failure::new(SHRINK_NOT_ASKED));
    }
    let told = ToldArgs { quiet: args.quiet, verbose: 0 };
    grow(held, size, &Growing { image, policy: &args.policy, origin: &args.origin, told }).await?;
    if !args.quiet {
        stdout::line("Image resized.");
    }
    Ok(ExitCode::SUCCESS)
}

/// Nothing but `off` is supported; other words are told from modes.
pub fn check_preallocation(mode: &str) -> Result<(), Failure> {
    match mode {
        "off" => Ok(()),
        "metadata" | "falloc" | "full" => {
            Err(Failure::new(format!("Unsupported preallocation mode '{mode}'")))
        }
        _ => Err(Failure::new(format!("Invalid preallocation mode '{mode}'"))),
    }
}

/// An image that grows, and how its backing is asked what it would show there.
pub struct Growing<'a> {
    /// Its name.
    pub image: &'a str,
    /// What it may name.
    pub policy: &'a PolicyArgs,
    /// How origins are asked.
    pub origin: &'a OriginArgs,
    /// What is told meanwhile.
    pub told: ToldArgs,
}

/// Makes an image `size` bytes long.
pub async fn grow(held: Held, size: u64, growing: &Growing<'_>) -> Result<(), Failure> {
    let now = held.description.virtual_size;
    if !size.is_multiple_of(SECTOR_BYTES) {
        match held.driver.name() {
            "qed" => return Err(Failure::new("Invalid image size specified")),
            "qcow2" => return Err(Failure::new("The new size must be a multiple of 512")),
            _ => {}
        }
    }
    if size < now {
        return Err(Failure::new("Shrinking images is currently not supported"));
    }
    grow_data_file(&held, size).await?;
    held.driver
        .change(&held.file, &HeaderChange::Size(size))
        .await
        .map_err(|error| Failure::new(error.to_string()))?;
    if let Some(lost) = held.description.bitmaps_lost().filter(|_| !growing.told.quiet && size > now) {
        crate::report::warn(format!("{}: {lost}", growing.image));
    }
    if held.description.backing.is_some() && size > now {
        let format = held.driver.name();
        drop(held);
        hide_backing(format, now, growing).await?;
    }
    Ok(())
}

/// Makes what the backing would show from `old_size` on read as zeros.
async fn hide_backing(format: &str, old_size: u64, growing: &Growing<'_>) -> Result<(), Failure> {
    let Growing { image, policy, origin, told } = growing;
    let failed = |cause: String| {
        Failure::new(format!("the image was resized, but from {old_size} on its backing may show: {cause}"))
    };
    let locator = Locator::parse(image, None).map_err(|error| failed(error.to_string()))?;
    let options = ChainOptions {
        format: Some(format.to_owned()),
        copy_on_read: CopyOnRead::Off,
        allow_backing: policy.allow(),
        no_backing_files: policy.no_backing_files,
        origin: origin.options(&[&locator])?,
        ..ChainOptions::default()
    };
    let chain =
        session::open(image, options, told.warnings()).await.map_err(|failure| failed(failure.text))?;
    let disk = chain.disk.clone();
    let hidden = async {
        // The backing, if it is needed at all, must be there to tell where it ends.
        disk.read(old_size, 1).await?;
        let mut at = old_size;
        while at < disk.size() {
            for extent in disk.status(at, disk.size() - at, EXTENTS_MAX).await? {
                if extent.depth > 1 {
                    disk.write_zeroes(at, extent.len, ZeroMode::default()).await?;
                }
                at += extent.len;
            }
        }
        disk.flush().await
    };
    hidden.await.map_err(|error| failed(error.to_string()))?;
    drop(disk);
    chain.close(CLOSE_TIMEOUT).await.map_err(|error| failed(error.to_string()))
}

/// A data file is to be as long as the disk. Before the header says so: a longer one does no harm.
async fn grow_data_file(held: &Held, size: u64) -> Result<(), Failure> {
    let Some(data) = &held.description.data_file else { return Ok(()) };
    let failed = |cause: String| look::cannot_open(&data.name, cause);
    let Ok(Locator::File(path)) = Locator::parse(&data.name, Some(&held.locator)) else {
        return Err(failed("what is not local cannot be changed".to_owned()));
    };
    let file = LocalFile::open(&path, OpenMode::ReadWrite).map_err(|error| failed(error.to_string()))?;
    let _lock = look::locked(&file, Access::Write).await.map_err(|error| failed(error.to_string()))?;
    if file.len() < size {
        file.set_len(size).await.map_err(|error| failed(look::without_number(&error)))?;
        file.sync().await.map_err(|error| failed(look::without_number(&error)))?;
    }
    Ok(())
}
