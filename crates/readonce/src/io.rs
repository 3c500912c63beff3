//! `readonce io`: single reads and writes, in qemu-io's words.
//!
//! - `io`: the flags, and the loop over commands. `commands`: what they do; their words are those of `readonce_words::command`.

mod commands;

use std::{io::BufRead, process::ExitCode, time::Duration};

use readonce_disk::chain::{self, ChainOptions, CopyOnRead, Locks, OpenError};
use readonce_origin::Locator;
use readonce_storage::{LocalFile, local::OpenMode, runtime::TokioRuntime};

use crate::{
    chain_args::UseArgs,
    failure::{Failure, Outcome},
    io::commands::{Done, Machine},
    look,
    report::ToldArgs,
    stdout,
};

/// How long the end may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Read and write single ranges of an image
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce io [OPTIONS] [-c COMMAND]... IMAGE",
    after_help = "Without -c, commands are read from standard input. `readonce io -c help IMAGE` lists them.\n\
                  Exit status 1 if any command failed."
)]
pub struct Args {
    #[command(flatten)]
    chain: UseArgs,
    /// Copy-on-read, as --copy-on-read=on
    #[arg(short = 'C')]
    fill: bool,
    /// Open an image that is in use; goes with -r alone, and what is written meanwhile may be read torn
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Run this command; may be given again
    #[arg(short = 'c', long = "cmd", value_name = "COMMAND")]
    commands: Vec<String>,
    #[command(flatten)]
    pub told: ToldArgs,
    /// File or URL
    #[arg(value_name = "IMAGE")]
    image: Option<String>,
}

/// Runs it.
pub async fn run(mut args: Args) -> Outcome {
    let image = args.chain.take_drive("io", args.image.take())?;
    // As in qemu-io, it says nothing of an image that has nothing to copy.
    if args.fill && look::places(&image, args.chain.format.as_deref()).await.len() != 1 {
        args.chain.copy_on_read = CopyOnRead::On;
    }
    // As qemu-io: which files are opened is not told, unless it is asked for.
    let reporter = if args.told.verbose > 0 { args.told.reporter() } else { args.told.warnings() };
    args.chain.warn_of_unused(&image, args.chain.format.as_deref()).await;
    let mut options = args.chain.chain_options(&image)?;
    if args.force_share {
        share(&image, &mut options)?;
    }
    let chain = chain::open(&image, options, TokioRuntime::current(), reporter)
        .await
        .map_err(|error| not_opened(&image, args.chain.read_only, error))?;
    let machine = Machine { disk: chain.disk.clone(), image: (image.clone(), args.chain.format.clone()) };
    let mut failed = false;
    let mut lines: Box<dyn Iterator<Item = String>> = match args.commands.is_empty() {
        true => Box::new(typed()),
        false => Box::new(args.commands.into_iter()),
    };
    // With nobody to tell it to, what is left is not done; the image is closed clean all the same.
    while let Some(line) = lines.next().filter(|_| !stdout::is_gone()) {
        match machine.run(&line).await {
            Done::Well => {}
            Done::Badly => failed = true,
            Done::Quit => break,
        }
    }
    drop(machine);
    chain.close(CLOSE_TIMEOUT).await.map_err(|error| Failure::new(format!("{image}: {error}")))?;
    Ok(ExitCode::from(u8::from(failed)))
}

/// Has an image opened that another program may write: without a lock, and so without a write of ours, copy-on-read included.
fn share(image: &str, options: &mut ChainOptions) -> Result<(), Failure> {
    if !options.read_only || options.copy_on_read == CopyOnRead::On {
        let cause = "force-share=on can only be used with read-only images";
        return Err(Failure::new(format!("can't open device {image}: {cause}")));
    }
    options.locks = Locks::Share;
    options.copy_on_read = CopyOnRead::Off;
    Ok(())
}

/// In qemu-io's words: the file is named twice only where it is the file that cannot be opened.
fn not_opened(image: &str, read_only: bool, error: OpenError) -> Failure {
    let mode = if read_only { OpenMode::Read } else { OpenMode::ReadWrite };
    let told = match Locator::parse(image, None) {
        Ok(place @ Locator::File(_)) if place.printable() != error.name => look::told(error).text,
        Ok(Locator::File(path)) if LocalFile::open(&path, mode).is_ok() => look::in_qemu_words(&error.cause),
        _ => look::told(error).text,
    };
    Failure::new(format!("can't open device {image}: {told}"))
}

/// Lines of standard input, each asked for.
fn typed() -> impl Iterator<Item = String> {
    let mut lines = std::io::stdin().lock().lines();
    std::iter::from_fn(move || {
        stdout::print("readonce> ");
        stdout::flush();
        lines.next()?.ok()
    })
}
