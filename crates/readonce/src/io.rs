//! `readonce io`: single reads and writes, in qemu-io's words.
//!
//! - `io`: the flags, and the loop over commands. `commands`: what they do, `device`: the image that they work on; their words are those of `readonce_words::command`.

mod commands;
mod device;

use std::{io::BufRead, process::ExitCode};

use readonce_disk::chain::CopyOnRead;

use crate::{
    chain_args::UseArgs,
    failure::Outcome,
    io::{
        commands::{Done, Machine},
        device::Device,
    },
    look,
    report::ToldArgs,
    stdout,
};

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
    args.chain.warn_of_unused(&image, args.chain.format.as_deref()).await;
    let mut device = Device::new(args.chain, args.force_share, args.told);
    device.open(&image).await?;
    let mut machine = Machine { device };
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
    machine.device.end().await?;
    Ok(ExitCode::from(u8::from(failed)))
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
