//! A chain that is served: opened, exported, and ended so that nothing is lost.
//!
//! The end, in order: no new clients, those that are there get answers for what they sent and are let go, the images are
//! flushed and closed. All of it within one time.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use readonce_disk::{
    BlockDevice,
    chain::{self, Chain, ChainOptions, Reporter},
};
use readonce_export::nbd::{Listener, Server, ServerOptions};
use readonce_storage::runtime::TokioRuntime;
use tokio::task::JoinHandle;

use crate::{
    failure::Failure,
    look,
    progress::{Fetched, Progress, summary},
    report::{self, ToldArgs},
};

/// Flags about ending.
#[derive(Debug, Clone, clap::Args)]
pub struct EndArgs {
    /// How long the end may take in which bytes are still saved (500ms, 30s, 10m, 1h)
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = readonce_words::options::time)]
    pub shutdown_timeout: Duration,
}

/// Flags about how an export is found, and its server.
#[derive(Debug, Clone, clap::Args)]
pub struct ExportArgs {
    /// Name of the export
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    pub export_name: String,
    /// Write the process number to this file; it is removed at the end
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
}

impl ExportArgs {
    /// With the name of the image.
    pub fn names<'a>(&'a self, image: &'a str) -> Names<'a> {
        Names { export: &self.export_name, image }
    }
}

/// What clients and the log call an export.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// For clients.
    pub export: &'a str,
    /// For the log.
    pub image: &'a str,
}

/// A chain and its server.
pub struct Session {
    chain: Arc<Chain>,
    server: Server,
    accepting: JoinHandle<()>,
    uri: String,
    started: Instant,
    shutdown_timeout: Duration,
    told: ToldArgs,
    progress: Option<Progress>,
}

/// Opens a chain to use it.
pub async fn open(image: &str, options: ChainOptions, reporter: Reporter) -> Result<Chain, Failure> {
    chain::open(image, options, TokioRuntime::current(), reporter).await.map_err(look::told)
}

impl Session {
    /// Serves `chain` at `listener`.
    pub fn start(
        chain: Chain,
        listener: Listener,
        names: Names<'_>,
        end: &EndArgs,
        told: ToldArgs,
    ) -> Result<Self, Failure> {
        let chain = Arc::new(chain);
        let device: Arc<dyn BlockDevice> = Arc::clone(&chain.disk) as _;
        let options = ServerOptions {
            export_name: names.export.to_owned(),
            device_name: names.image.to_owned(),
            // Most of the time is for saving bytes: that may need the origin.
            shutdown_timeout: (end.shutdown_timeout / 3).min(Duration::from_secs(5)),
            ..ServerOptions::default()
        };
        let server = Server::new(device, options).map_err(|error| Failure::new(error.to_string()))?;
        let uri = server.uri(&listener);
        let accepting = tokio::spawn({
            let server = server.clone();
            async move { server.serve(listener).await }
        });
        let progress = told.for_a_person().then(|| Progress::start(Arc::clone(&chain)));
        let started = Instant::now();
        Ok(Self {
            chain,
            server,
            accepting,
            uri,
            started,
            shutdown_timeout: end.shutdown_timeout,
            told,
            progress,
        })
    }

    /// Where clients find it.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Ends it. `image` is the file whose clusters the summary counts.
    ///
    /// # Errors
    /// Bytes of the guest that could not be saved, with their ranges.
    pub async fn end(mut self, image: Option<PathBuf>) -> Result<(), Failure> {
        let began = Instant::now();
        self.progress = None;
        if let Err(error) = self.server.shutdown().await {
            report::warn(error);
        }
        // The socket's file goes with the listener.
        let _ = self.accepting.await;
        let rest = self.shutdown_timeout.saturating_sub(began.elapsed());
        let closed = self.chain.close(rest).await;
        if self.told.for_a_person() {
            let fetched = Fetched::by(&self.chain);
            report::tell(summary(image.as_deref(), fetched, self.started.elapsed()).await);
        }
        closed.map_err(|error| Failure::new(error.to_string()))
    }
}
