//! `readonce resize`: makes an image larger.

use std::process::ExitCode;

use readonce_format::driver::HeaderChange;

use readonce_origin::Locator;
use readonce_storage::{LocalFile, ReadAt, Storage, local::OpenMode, lock::Access};

use crate::{
    failure::{Failure, Outcome},
    look::{self, Held},
    options, stdout,
};

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
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    /// File, and its new size
    #[arg(value_name = "IMAGE [+]SIZE", allow_negative_numbers = true)]
    words: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let [image, size] = args.words.as_slice() else {
        return Err(Failure::usage("resize", "Expecting image file name and size"));
    };
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
    if size < now {
        return Err(Failure::new("Shrinking images is currently not supported"));
    }
    grow_data_file(&held, size).await?;
    held.driver
        .change(&held.file, &HeaderChange::Size(size))
        .await
        .map_err(|error| Failure::new(error.to_string()))?;
    if !args.quiet {
        stdout::line("Image resized.");
    }
    Ok(ExitCode::SUCCESS)
}

/// A data file is to be as long as the disk. Before the header says so: a longer one does no harm.
async fn grow_data_file(held: &Held, size: u64) -> Result<(), Failure> {
    let Some(data) = &held.description.data_file else { return Ok(()) };
    let failed = |cause: String| look::cannot_open(&data.name, cause);
    let Ok(Locator::File(path)) = Locator::parse(&data.name, Some(&held.locator)) else {
        return Err(failed("what is not local cannot be changed".to_owned()));
    };
    let file = LocalFile::open(&path, OpenMode::ReadWrite).map_err(|error| failed(error.to_string()))?;
    let _lock = look::locked(&file, Access::Write).map_err(|error| failed(error.to_string()))?;
    if file.len() < size {
        file.set_len(size).await.map_err(|error| failed(look::without_number(&error)))?;
        file.sync().await.map_err(|error| failed(look::without_number(&error)))?;
    }
    Ok(())
}
