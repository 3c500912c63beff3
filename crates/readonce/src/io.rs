//! `readonce io`: single reads and writes, in qemu-io's words.
//!
//! - `io`: the flags, and the loop over commands. `words`: a command line of it, taken apart. `commands`: what they do.

mod commands;
mod words;

use std::{
    io::{BufRead, Write},
    process::ExitCode,
    time::Duration,
};

use readonce_disk::chain::CopyOnRead;

use crate::{
    chain_args::UseArgs,
    failure::{Failure, Outcome},
    io::commands::{Done, Machine},
    report::ToldArgs,
    session,
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
    if args.fill {
        args.chain.copy_on_read = CopyOnRead::On;
    }
    // As qemu-io: which files are opened is not told, unless it is asked for.
    let reporter = if args.told.verbose > 0 { args.told.reporter() } else { args.told.warnings() };
    let chain = session::open(&image, args.chain.chain_options(&image)?, reporter)
        .await
        .map_err(|failure| Failure::new(format!("can't open device {image}: {}", failure.text)))?;
    let machine = Machine { disk: chain.disk.clone() };
    let mut failed = false;
    if args.commands.is_empty() {
        let mut lines = std::io::stdin().lock().lines();
        loop {
            print!("readonce> ");
            let _ = std::io::stdout().flush();
            let Some(Ok(line)) = lines.next() else { break };
            match machine.run(&line).await {
                Done::Well => {}
                Done::Badly => failed = true,
                Done::Quit => break,
            }
        }
    }
    for command in &args.commands {
        match machine.run(command).await {
            Done::Well => {}
            Done::Badly => failed = true,
            Done::Quit => break,
        }
    }
    drop(machine);
    chain.close(CLOSE_TIMEOUT).await.map_err(|error| Failure::new(format!("{image}: {error}")))?;
    Ok(ExitCode::from(u8::from(failed)))
}
