//! `readonce rebase -u`: the backing file moved.
//!
//! - With a pinned version the new place is asked. The same version: the pin is kept. Another, or one that cannot be told, while
//!   clusters of the old one are local: refused, or bytes of two versions would meet in the image (I6).
//! - A local file has no validator that survives a copy. One of the pinned length is taken, with a warning.
//!
//! Not here: the rebase that copies what differs.

use std::{process::ExitCode, sync::Arc};

use readonce_disk::chain::{ChainOptions, look_at_backing};
use readonce_format::{
    Mapping,
    driver::{BackingRef, HeaderChange, Pin},
};
use readonce_origin::{FetchError, Locator, Origin, OriginNote, OriginOptions, Pinned, Reach};
use readonce_storage::runtime::TokioRuntime;

use crate::{
    chain_args::OriginArgs,
    failure::{Failure, Outcome},
    look::{self, Held},
    report,
};

/// Tell an image that its backing file moved
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce rebase -u -b BACKING -F FMT [OPTIONS] IMAGE",
    after_help = "No data is copied. If the image has pinned a version of its backing file, the new place must have the same \
                  one, unless no cluster is local yet. -b '' (or no -b) takes the backing file away."
)]
pub struct Args {
    /// Format of IMAGE; told from its first bytes where absent
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    format: Option<String>,
    /// Change the name only; needed, as there is no other rebase here
    #[arg(short = 'u', long = "backing-unsafe")]
    name_only: bool,
    /// The new place: a path relative to IMAGE, or a URL
    #[arg(short = 'b', long, value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    #[command(flatten)]
    origin: OriginArgs,
    /// File
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let image = look::one_image("rebase", &args.images)?;
    if args.backing.is_none() && !args.name_only {
        return Err(Failure::usage("rebase", "Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    // As in qemu-img: no name takes the backing file away.
    let name = args.backing.as_deref().unwrap_or_default();
    if !args.name_only {
        return Err(Failure::usage(
            "rebase",
            "only rebase -u is supported: it changes the name and copies nothing",
        ));
    }
    let held = look::hold(image, args.format.as_deref()).await?;
    if let Some(format) = &args.backing_format
        && readonce_format::driver::driver(format).is_none()
    {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    let change = match name {
        "" => HeaderChange::Backing(None, None),
        name => to(&held, name, &args).await?,
    };
    held.driver.change(&held.file, &change).await.map_err(|error| not_changed(name, error))?;
    Ok(ExitCode::SUCCESS)
}

fn not_changed(name: &str, cause: impl std::fmt::Display) -> Failure {
    Failure::new(format!("Could not change the backing file to '{name}': {cause}"))
}

async fn to(held: &Held, name: &str, args: &Args) -> Result<HeaderChange, Failure> {
    let new = Locator::parse(name, Some(&held.locator)).map_err(|error| not_changed(name, error))?;
    let printable = match &new {
        Locator::File(_) => name.to_owned(),
        Locator::Http(_) => new.stored_name(),
    };
    let Some(format) = args.backing_format.clone() else {
        return Err(not_changed(&printable, "backing format must be specified"));
    };
    if new.same_place(&held.locator) {
        return Err(not_changed(&printable, "the backing chain would have a loop"));
    }
    look::warn_of_what_is_cut(&new);
    let pin = match &new {
        Locator::File(_) if format != "raw" => {
            if held.description.pin.is_some() && !is_empty(held).await? {
                report::warn("whether the new backing file shows the pinned version cannot be told");
            }
            None
        }
        new => version_at(held, new, &printable, args).await?,
    };
    let backing = BackingRef { name: printable, format: Some(format) };
    Ok(HeaderChange::Backing(Some(backing), pin))
}

/// The version at the new place, if it may be pinned.
async fn version_at(
    held: &Held,
    new: &Locator,
    printable: &str,
    args: &Args,
) -> Result<Option<Pin>, Failure> {
    let expect = match &held.description.pin {
        Some(pin) => Pinned::decode(&pin.validator, pin.len).ok(),
        None => None,
    };
    match ask(new, expect.clone(), args).await {
        Ok((origin, pin)) => {
            for note in origin.notes() {
                match note {
                    OriginNote::MayHaveChanged { expected, found } => report::warn(format!(
                        "{printable}: whether it is the pinned version cannot be told but by its length (was {expected}, is {found})"
                    )),
                    note => report::warn(format!("{printable}: {note}")),
                }
            }
            Ok(Some(pin))
        }
        Err(error) if expect.is_none() => {
            if !args.quiet {
                report::warn(format!("{error}; its version is pinned when the image is first written"));
            }
            Ok(None)
        }
        Err(error) => {
            if !is_empty(held).await? {
                return Err(not_changed(
                    printable,
                    format!(
                        "{error}\nClusters of the pinned version are in the image already, and versions must not be mixed."
                    ),
                ));
            }
            if !matches!(error, FetchError::Changed { .. }) {
                report::warn(format!("{error}; its version is pinned when the image is first written"));
                return Ok(None);
            }
            let (_, pin) = ask(new, None, args).await.map_err(|error| not_changed(printable, error))?;
            report::warn(format!("{error}; no cluster is local yet, so the new version is pinned"));
            Ok(Some(pin))
        }
    }
}

async fn ask(
    place: &Locator,
    expect: Option<Pinned>,
    args: &Args,
) -> Result<(Arc<dyn Origin>, Pin), FetchError> {
    let cause = |failure: Failure| FetchError::Permanent { origin: place.printable(), cause: failure.text };
    let options = args.origin.options(&[place]).map_err(cause)?;
    let own = expect.as_ref().map(|expect| expect.own.clone());
    let origin_options = OriginOptions { expect: own, reach: Reach::Required, ..options.clone() };
    let rt = TokioRuntime::current();
    let origin = readonce_origin::open(place, &origin_options, &rt).await?;
    let options = ChainOptions { origin: options, ..ChainOptions::default() };
    let format = args.backing_format.as_deref();
    let looked = look_at_backing(place, format, &origin, expect.as_ref(), &options, &rt).await?;
    Ok((origin, looked.pin))
}

/// Whether nothing is local. What a snapshot holds comes back when it is applied.
async fn is_empty(held: &Held) -> Result<bool, Failure> {
    if !held.description.snapshots.is_empty() {
        return Ok(false);
    }
    let failed = |error: readonce_format::FormatError| look::cannot_open(&held.locator.printable(), error);
    let mapper = held.driver.open(Arc::clone(&held.readable)).await.map_err(failed)?;
    let size = held.description.virtual_size;
    let mut at = 0;
    while at < size {
        let extent = mapper.lookup(at, size - at).await.map_err(failed)?;
        if extent.mapping != Mapping::Absent {
            return Ok(false);
        }
        at += extent.len;
    }
    Ok(true)
}
