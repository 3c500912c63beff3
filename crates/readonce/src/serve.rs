//! `readonce serve`: an image as an NBD export, until SIGTERM or SIGINT.

use std::{
    io::Write,
    net::{IpAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    process::ExitCode,
};

use readonce_export::nbd::Listener;
use readonce_origin::Locator;

use crate::{
    chain_args::UseArgs,
    failure::{Failure, Outcome},
    report::{self, ToldArgs},
    session::{self, EndArgs, Session},
    signals::{Signals, end_at_the_next, until_signal},
};

/// Serve an image over NBD, filling it as it is read
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce serve [OPTIONS] -k SOCKET IMAGE\n       readonce serve [OPTIONS] -p PORT [-b ADDRESS] IMAGE",
    after_help = "One line with the NBD URI goes to standard output once clients are accepted. SIGTERM, SIGINT or SIGHUP end it: \
                  clients are let go, the image is flushed and closed clean. Exit status 1 if bytes could not be saved."
)]
pub struct Args {
    #[command(flatten)]
    chain: UseArgs,
    /// Listen on this Unix socket, mode 0600
    #[arg(short = 'k', long, value_name = "PATH", conflicts_with_all = ["port", "bind"])]
    socket: Option<PathBuf>,
    /// Listen on this TCP port; 0 is any free one
    #[arg(short = 'p', long, value_name = "PORT")]
    port: Option<u16>,
    /// Listen at this address in place of the loopback
    #[arg(short = 'b', long, value_name = "ADDRESS", requires = "port")]
    bind: Option<String>,
    /// Name of the export
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    export_name: String,
    /// Write the process number to this file; it is removed at the end
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    #[command(flatten)]
    end: EndArgs,
    #[command(flatten)]
    pub told: ToldArgs,
    /// File or URL
    #[arg(value_name = "IMAGE")]
    image: Option<String>,
}

/// Runs it.
pub async fn run(mut args: Args) -> Outcome {
    let image = args.chain.take_drive("serve", args.image.take())?;
    if args.socket.is_none() && args.port.is_none() {
        return Err(Failure::usage("serve", "Nowhere to listen: give -k SOCKET or -p PORT"));
    }
    let mut signals = Signals::catch()?;
    // First, so that a socket in use is told before the image is touched.
    let listener = listen(&args).await?;
    let pid_file = match &args.pid_file {
        Some(path) => Some(PidFile::write(path)?),
        None => None,
    };
    let options = args.chain.chain_options(&image)?;
    args.chain.warn_of_unused(&image, args.chain.format.as_deref()).await;
    let chain = until_signal(&mut signals, session::open(&image, options, args.told.reporter())).await?;
    let session = Session::start(chain, listener, &args.export_name, &args.end, args.told)?;
    // Who started us may have gone; the clients have not.
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "{}", session.uri()).and_then(|()| stdout.flush());

    signals.next().await;
    args.told.say("ending");
    end_at_the_next(signals);
    let path = match Locator::parse(&image, None) {
        Ok(Locator::File(path)) => Some(path),
        _ => None,
    };
    let ended = session.end(path).await;
    drop(pid_file);
    ended.map_err(|failure| Failure { text: format!("{image}: {}", failure.text), ..failure })?;
    Ok(ExitCode::SUCCESS)
}

async fn listen(args: &Args) -> Result<Listener, Failure> {
    let failed = |error: readonce_export::nbd::BindError| Failure::new(format!("Cannot listen: {error}"));
    if let Some(path) = &args.socket {
        return Listener::unix(path).map_err(failed);
    }
    let address = match &args.bind {
        Some(name) => Some(resolve(name)?),
        None => None,
    };
    if address.is_some_and(|address| !address.is_loopback()) {
        report::warn(
            "everybody who reaches this address can use the image: NBD here has no password and no TLS",
        );
    }
    Listener::tcp(address, args.port.unwrap_or_default()).await.map_err(failed)
}

fn resolve(name: &str) -> Result<IpAddr, Failure> {
    let failed = |cause: String| Failure::new(format!("Cannot listen: {name}: {cause}"));
    let mut addresses = (name, 0).to_socket_addrs().map_err(|error| failed(error.to_string()))?;
    addresses.next().map(|address| address.ip()).ok_or_else(|| failed("no address".to_owned()))
}

/// A file that holds our process number for as long as this lives.
struct PidFile<'a>(&'a Path);

impl<'a> PidFile<'a> {
    fn write(path: &'a Path) -> Result<Self, Failure> {
        std::fs::write(path, format!("{}\n", std::process::id())).map_err(|error| {
            Failure::new(format!(
                "Could not write '{}': {}",
                path.display(),
                crate::look::without_number(&error)
            ))
        })?;
        Ok(Self(path))
    }
}

impl Drop for PidFile<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}
