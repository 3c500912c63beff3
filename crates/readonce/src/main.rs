//! `readonce`: a local image above a slow remote backing, filled as it is read, served over NBD.
//!
//! - One module for each command: its flags, its sentences, its exit status.
//! - Shared: `failure` (how a command ends badly), `chain_args` (flags that open a chain), `look`
//!   (opening one to look at it), `session` (opening one to use it), `sandbox`, `pid_file`, `new_image`, `human`, `json`, `stdout`, `report`, `progress`.
//!
//! Flags, sentences, JSON fields and exit codes are those of qemu-img, qemu-io and qemu-nbd where they have the thing. Not
//! here: what the commands do, which is in the rooms below.

#![allow(
    clippy::disallowed_methods,
    reason = "the binary stands outside the engine: real time, real signals, real files"
)]

mod amend;
mod chain_args;
mod check;
mod create;
mod demo;
mod failure;
mod folders;
mod human;
mod info;
mod io;
mod json;
mod look;
mod map;
mod new_image;
mod pid_file;
mod progress;
mod rebase;
mod report;
mod resize;
mod run;
mod sandbox;
mod serve;
mod session;
mod signals;
mod snapshot;
mod stdout;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::{Failure, Outcome};

/// Use a remote disk image now; fetch every block of it at most once; end with a standard local image.
#[derive(Parser)]
#[command(
    name = "readonce",
    version,
    disable_help_subcommand = true,
    after_help = "Sizes are in bytes; the suffixes k, M, G, T, P and E multiply by powers of 1024.\n\
                  Credentials come from the environment, never from the command line: READONCE_HTTP_USER and \
                  READONCE_HTTP_PASSWORD, READONCE_HTTP_TOKEN, or READONCE_HTTP_HEADERS_FILE, for the URL that you name or \
                  for READONCE_HTTP_HOST.\n\
                  RUST_LOG=debug logs to standard error."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Create(create::Args),
    Info(info::Args),
    Check(check::Args),
    Map(map::Args),
    Amend(amend::Args),
    Rebase(rebase::Args),
    Resize(resize::Args),
    Snapshot(snapshot::Args),
    Serve(serve::Args),
    Run(run::Args),
    Io(io::Args),
    Demo(demo::Args),
}

impl Command {
    /// Starts the log, and says what a closed standard output means.
    fn prepare(&self) {
        match self {
            Self::Serve(args) => args.told.start_log(),
            Self::Run(args) => args.told.start_log(),
            Self::Io(args) => args.told.start_log(),
            // It shuts its own origin: what is logged about that is no news.
            Self::Demo(_) => report::start_log("error"),
            _ => report::start_log("warn"),
        }
        if !matches!(self, Self::Serve(_) | Self::Run(_) | Self::Io(_) | Self::Demo(_)) {
            // As of every small tool: `readonce map IMAGE | head` ends in silence. The others have an image to close.
            // SAFETY: no other thread runs yet, and the default action is a valid disposition.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        }
    }

    async fn run(self) -> Outcome {
        match self {
            Self::Create(args) => create::run(args).await,
            Self::Info(args) => info::run(args).await,
            Self::Check(args) => check::run(args).await,
            Self::Map(args) => map::run(args).await,
            Self::Amend(args) => amend::run(args).await,
            Self::Rebase(args) => rebase::run(args).await,
            Self::Resize(args) => resize::run(args).await,
            Self::Snapshot(args) => snapshot::run(args).await,
            Self::Serve(args) => serve::run(args).await,
            Self::Run(args) => run::run(args).await,
            Self::Io(args) => io::run(args).await,
            Self::Demo(args) => demo::run(args).await,
        }
    }
}

/// Freed memory that is kept for the next request, bytes.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 16 << 20;

/// Keeps the buffers of ended requests for the next ones. glibc would give each of some hundred KiB back to the kernel, which hands out
/// the next one page by page: a fifth of the time of a write that copies a cluster.
#[cfg(target_env = "gnu")]
fn keep_freed_memory() {
    // SAFETY: it takes numbers alone, and no thread was started yet.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
    }
}

fn main() -> ExitCode {
    #[cfg(target_env = "gnu")]
    keep_freed_memory();
    let mut cli = match Cli::try_parse_from(resize::with_size_apart(std::env::args_os().collect())) {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    cli.command.prepare();
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    // Asked now: in the sandbox not all that tells it can be read.
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none()
        && let Ok(count) = std::thread::available_parallelism()
    {
        builder.worker_threads(count.get());
    }
    if let Command::Serve(args) = &mut cli.command
        && let Err(failure) = args.confine()
    {
        return failure.tell();
    }
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::new(format!("cannot start: {error}")).tell(),
    };
    let outcome = stdout::end(runtime.block_on(cli.command.run()));
    // What still runs (a stalled request, a probe) has nothing to say to the person any more.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => failure.tell(),
    }
}
