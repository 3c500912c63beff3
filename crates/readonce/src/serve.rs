//! `readonce serve`: an image as an NBD export, until SIGTERM or SIGINT. In a sandbox, which is put on before there are threads.

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
    pid_file::PidFile,
    report::{self, ToldArgs},
    sandbox::{self, May, Place},
    session::{self, EndArgs, ExportArgs, Session},
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
    #[arg(short = 'p', long, value_name = "PORT", value_parser = port)]
    port: Option<u16>,
    /// Listen at this address in place of the loopback
    #[arg(short = 'b', long, value_name = "ADDRESS", requires = "port")]
    bind: Option<String>,
    #[command(flatten)]
    export: ExportArgs,
    /// Keep all rights of the user: without it, only files of the chain can be opened, and nothing can be run (see -v)
    #[arg(long)]
    no_sandbox: bool,
    #[command(flatten)]
    end: EndArgs,
    #[command(flatten)]
    pub told: ToldArgs,
    /// File or URL
    #[arg(value_name = "IMAGE")]
    image: Option<String>,
    #[arg(skip)]
    open_pid_file: Option<PidFile>,
}

impl Args {
    /// Gives up what is not needed from here on. Before any thread is started: the sandbox is of those that come after it.
    pub fn confine(&mut self) -> Result<(), Failure> {
        self.open_pid_file = self.export.pid_file.as_deref().map(PidFile::open).transpose()?;
        if self.no_sandbox {
            tracing::info!("no sandbox (--no-sandbox)");
            return Ok(());
        }
        let mut chain = self.chain.clone();
        // What is wrong with the arguments is told by `run`, and then nothing is served.
        let Ok(image) = chain.take_drive("serve", self.image.clone()) else { return Ok(()) };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .map_err(|error| Failure::new(format!("cannot start: {error}")))?;
        let walk = sandbox::of_chain(&image, chain.format.as_deref(), &chain.policy.allow_backing);
        let mut places = runtime.block_on(walk);
        // Its threads end with it.
        drop(runtime);
        places.extend(sandbox::of_system());
        places.extend(self.socket.as_deref().map(|path| Place::new(folder_of(path), May::KeepSocket)));
        places.extend(self.export.pid_file.as_deref().map(|path| Place::new(folder_of(path), May::Remove)));
        let in_force = sandbox::enter(&places);
        match in_force.all {
            true => tracing::info!("sandbox: {}", in_force.words),
            false => tracing::warn!("the sandbox is not whole: {}", in_force.words),
        }
        Ok(())
    }
}

/// The folder that holds what is at `path`.
fn folder_of(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.parent().unwrap_or(Path::new("/")).to_owned()
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
    let mut pid_file = args.open_pid_file.take();
    if let Some(file) = &mut pid_file {
        file.write()?;
    }
    let options = args.chain.chain_options(&image)?;
    args.chain.warn_of_unused(&image, args.chain.format.as_deref()).await;
    let chain = until_signal(&mut signals, session::open(&image, options, args.told.reporter())).await?;
    let session = Session::start(chain, listener, args.export.names(&image), &args.end, args.told)?;
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

fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| format!("expected a number from 0 to {}", u16::MAX))
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
