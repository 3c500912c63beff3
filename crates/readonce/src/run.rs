//! `readonce run`: a command with an image at hand, as an NBD export on a private socket.
//!
//! - `run`: the flags, and the order of things. `run/image`: which image is served. `run/cache`: the images kept for URLs.
//!   `run/command`: the command itself.
//! - The command ends first, then the export, then the image is closed; the exit status is the command's.

mod cache;
mod command;
mod image;

use std::{process::ExitCode, sync::Arc};

use readonce_disk::chain::{CopyOnRead, Report, Reporter};
use readonce_export::nbd::Listener;

use crate::{
    chain_args::UseArgs,
    failure::{Failure, Outcome},
    folders,
    pid_file::PidFile,
    report::{self, ToldArgs},
    session::{self, EndArgs, ExportArgs, Session},
    signals::{Signals, end_at_the_next, until_signal},
};

/// Run a command that uses an image or URL, filling the image as it is read
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce run [OPTIONS] IMAGE|URL -- COMMAND [ARGUMENT]...",
    after_help = "In COMMAND and its arguments {uri} becomes the NBD URI and {socket} the path of its socket; READONCE_URI holds \
                  the URI too.\n\
                  With a URL and no --image, what is read is kept in the user's cache folder ($XDG_CACHE_HOME/readonce), and \
                  what the command writes is gone at the end. An image that is made is qcow2, or what -f says; one that is there is \
                  used as it is.\n\
                  Exit status: the command's; 128 + n if signal n ended it; 127 if it was not found.\n\
                  Example: readonce run http://host/Fedora.iso -- qemu-system-x86_64 -cdrom {uri} -boot d"
)]
pub struct Args {
    #[command(flatten)]
    chain: UseArgs,
    /// Format of the file behind the image that keeps what is read (qed, qcow2, raw); told from its first bytes where absent
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Keep everything, writes too, in this image; made first if it is not there
    #[arg(long, value_name = "FILE")]
    image: Option<std::path::PathBuf>,
    #[command(flatten)]
    export: ExportArgs,
    #[command(flatten)]
    end: EndArgs,
    #[command(flatten)]
    pub told: ToldArgs,
    /// File or URL
    #[arg(value_name = "IMAGE|URL")]
    name: Option<String>,
    /// What to run
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs it.
pub async fn run(mut args: Args) -> Outcome {
    let name = args.chain.take_drive("run", args.name.take())?;
    if args.command.is_empty() {
        return Err(Failure::usage("run", "Nothing to run: give the command after --"));
    }
    let mut pid_file = args.export.pid_file.as_deref().map(PidFile::open).transpose()?;
    if let Some(file) = &mut pid_file {
        file.write()?;
    }
    let mut signals = Signals::catch()?;
    let opening = async {
        let image = image::choose(&name, &args).await?;
        args.chain.warn_of_unused(&image.top, image.options.format.as_deref()).await;
        let (all, warned) = (args.told.reporter(), image.warned.clone());
        let reporter: Reporter = Arc::new(move |report| match &report {
            Report::Warning(text) if warned.contains(text) => {}
            _ => all(report),
        });
        let chain = session::open(&image.top, image.options.clone(), reporter).await?;
        Ok((image, chain))
    };
    let (mut image, chain) = until_signal(&mut signals, opening).await?;
    // Opened, it needs no name any more, and its room is given back however we end.
    drop(image.temporary.take());

    let folder = folders::private()?;
    let socket = folder.path().join("nbd");
    let listener =
        Listener::unix(&socket).map_err(|error| Failure::new(format!("Cannot listen: {error}")))?;
    let kept = image.kept.display().to_string();
    let session = Session::start(chain, listener, args.export.names(&kept), &args.end, args.told)?;
    if let Some(note) = &image.note {
        args.told.say(note);
    }
    let status = command::run(&args.command, session.uri(), &socket, &mut signals).await;
    end_at_the_next(signals);
    let ended = session.end(Some(image.kept.clone())).await;
    if image.writes_are_temporary {
        let kept = match args.chain.copy_on_read {
            CopyOnRead::Off => String::new(),
            CopyOnRead::On | CopyOnRead::Auto => {
                format!("; what it read is kept in {}", image.kept.display())
            }
        };
        args.told.say(format_args!("what the command wrote is gone{kept}"));
    }
    drop(image.claim);
    drop(pid_file);
    match (status, ended) {
        (Err(failure), _) => Err(failure),
        (Ok(0), Err(failure)) => {
            Err(Failure { text: format!("{}: {}", image.kept.display(), failure.text), ..failure })
        }
        (Ok(status), ended) => {
            if let Err(failure) = ended {
                report::tell(format_args!("{}: {}", image.kept.display(), failure.text));
            }
            Ok(ExitCode::from(status))
        }
    }
}
