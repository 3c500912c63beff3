//! All connections of one export: accepting, counting, ending.
//!
//! - A client that breaks the handshake, or takes too long for it, ends its own connection only.
//! - At most `connections_max` connections; more wait to be accepted.
//! - Connections share the device, a table that is touched when one comes or goes, and room for large payloads (`pool`).
//!
//! Not here: the protocol.

#![allow(clippy::disallowed_methods, reason = "an export stands outside the engine: real sockets, real time")]

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use readonce_disk::BlockDevice;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    task::AbortHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use super::{
    connection::{Connection, End, Setup},
    handshake::{Export, NoAgreement, haggle},
    inbox::Inbox,
    job::Mailbox,
    listener::Listener,
    pool::Pool,
    wire::STRING_LEN_MAX,
};

/// How long accepting rests when the system refuses (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long aborted tasks get to end.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes that a Unix socket is asked to hold for a client that is not reading just now: more than one large reply, so that the
/// next is read from the device meanwhile. The system gives twice its `net.core.wmem_max` at most.
const UNIX_SEND_BUFFER_LEN: usize = 1 << 20;

/// How an export is served.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The export's name, at most 4096 bytes; clients that give none get it too.
    pub export_name: String,
    /// Told to clients that list, at most 4096 bytes; may be empty.
    pub description: String,
    /// What the log calls the device; clients are not told.
    pub device_name: String,
    /// How long a client may take until it has chosen the export.
    pub handshake_timeout: Duration,
    /// How long an ending connection waits for its requests, and for its client to receive the replies.
    pub shutdown_timeout: Duration,
    /// Connections at the same time; at least 1.
    pub connections_max: usize,
    /// Bytes of payload that all connections hold at the same time, beside what little each has of its own; 32 MiB at least.
    pub held_bytes_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            export_name: String::new(),
            description: String::new(),
            device_name: String::new(),
            handshake_timeout: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(10),
            connections_max: 1024,
            held_bytes_max: 512 << 20,
        }
    }
}

/// A name or description that the protocol cannot carry.
#[derive(Debug, thiserror::Error)]
#[error("an export's {what} may have {STRING_LEN_MAX} bytes, not {len}")]
pub struct TextTooLong {
    what: &'static str,
    len: usize,
}

/// What did not end in time at shutdown.
#[derive(Debug, thiserror::Error)]
#[error("{tasks} requests and connections did not end in time")]
pub struct Unfinished {
    /// Connections and requests.
    pub tasks: usize,
}

/// Serves one block device to NBD clients. Clones serve the same.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    device: Arc<dyn BlockDevice>,
    options: ServerOptions,
    /// Connections and their requests.
    tasks: TaskTracker,
    stop: CancellationToken,
    places: Arc<Semaphore>,
    pool: Arc<Pool>,
    connections: Mutex<BTreeMap<u64, Entry>>,
    accepted: AtomicU64,
}

struct Entry {
    mailbox: Arc<Mailbox>,
    abort: Option<AbortHandle>,
}

impl Server {
    /// A server of `device`. Fails if a text is longer than the protocol can carry.
    pub fn new(device: Arc<dyn BlockDevice>, options: ServerOptions) -> Result<Self, TextTooLong> {
        for (what, text) in [("name", &options.export_name), ("description", &options.description)] {
            if text.len() > STRING_LEN_MAX {
                return Err(TextTooLong { what, len: text.len() });
            }
        }
        let places = Arc::new(Semaphore::new(options.connections_max.clamp(1, Semaphore::MAX_PERMITS)));
        let pool = Pool::new(options.held_bytes_max);
        Ok(Self(Arc::new(Shared {
            device,
            options,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            places,
            pool,
            connections: Mutex::default(),
            accepted: AtomicU64::new(0),
        })))
    }

    /// The URI under which clients of `listener` reach the export.
    pub fn uri(&self, listener: &Listener) -> String {
        listener.uri(&self.0.options.export_name)
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.0.connections.lock().len()
    }

    /// Connections ever accepted.
    pub fn connections_accepted(&self) -> u64 {
        self.0.accepted.load(Ordering::Relaxed)
    }

    /// Accepts clients until [`shutdown`](Self::shutdown). May run for several listeners at once.
    pub async fn serve(&self, listener: Listener) {
        tokio::select! {
            () = self.0.stop.cancelled() => {}
            () = self.accept(&listener) => {}
        }
    }

    async fn accept(&self, listener: &Listener) {
        loop {
            let place = self.0.places.clone().acquire_owned().await.expect("it is never closed");
            let accepted = match listener {
                Listener::Unix(socket) => socket.listener.accept().await.map(|(stream, _)| {
                    if let Err(error) =
                        rustix::net::sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER_LEN)
                    {
                        tracing::debug!(%error, "SO_SNDBUF");
                    }
                    self.start(stream, "unix".into(), place);
                }),
                Listener::Tcp(listener) => listener.accept().await.map(|(stream, peer)| {
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%peer, %error, "TCP_NODELAY");
                    }
                    self.start(stream, peer.to_string(), place);
                }),
            };
            if let Err(error) = accepted {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }

    fn start<S>(&self, stream: S, peer: String, place: tokio::sync::OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static,
    {
        let id = self.0.accepted.fetch_add(1, Ordering::Relaxed);
        let mailbox = Arc::new(Mailbox::default());
        self.0.connections.lock().insert(id, Entry { mailbox: mailbox.clone(), abort: None });
        if self.0.stop.is_cancelled() {
            mailbox.stop();
        }
        let registered = Registered { shared: self.0.clone(), id };
        let span = tracing::info_span!("nbd", connection = id, peer);
        let task = async move {
            let _held = (place, &registered);
            tracing::debug!("accepted");
            serve_one(&registered.shared, stream, mailbox).await;
        };
        let task = self.0.tasks.spawn(task.instrument(span));
        if let Some(entry) = self.0.connections.lock().get_mut(&id) {
            entry.abort = Some(task.abort_handle());
        }
    }

    /// Stops accepting, lets connections answer what they have taken, and ends them; those that do not end within
    /// `shutdown_timeout` are cut. Fails if writes to the device are still running then.
    pub async fn shutdown(&self) -> Result<(), Unfinished> {
        self.0.stop.cancel();
        for entry in self.0.connections.lock().values() {
            entry.mailbox.stop();
        }
        self.0.tasks.close();
        if tokio::time::timeout(self.0.options.shutdown_timeout, self.0.tasks.wait()).await.is_ok() {
            return Ok(());
        }
        for entry in self.0.connections.lock().values() {
            if let Some(abort) = &entry.abort {
                abort.abort();
            }
        }
        if tokio::time::timeout(ABORT_TIMEOUT, self.0.tasks.wait()).await.is_ok() {
            return Ok(());
        }
        Err(Unfinished { tasks: self.0.tasks.len() })
    }
}

/// A connection's entry in the table; goes with it however it ends.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.connections.lock().remove(&self.id);
    }
}

/// Whether a client went away, whatever it had sent or not read by then.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof)
}

async fn serve_one<S>(shared: &Arc<Shared>, mut stream: S, mailbox: Arc<Mailbox>)
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin,
{
    let mut inbox = Inbox::new();
    let export = Export {
        name: &shared.options.export_name,
        description: &shared.options.description,
        device: &*shared.device,
    };
    let handshake =
        tokio::time::timeout(shared.options.handshake_timeout, haggle(&mut stream, &mut inbox, export));
    let agreement = tokio::select! {
        () = shared.stop.cancelled() => return,
        handshake = handshake => match handshake {
            Err(_) => return tracing::warn!("the client took too long for the handshake"),
            Ok(Err(NoAgreement::Aborted)) => return tracing::debug!("the client aborted the handshake"),
            // Port scanners, and clients that only look whether someone is there.
            Ok(Err(NoAgreement::Io(error))) if is_gone(&error) => {
                return tracing::debug!("the client left during the handshake");
            }
            Ok(Err(NoAgreement::Io(error))) => return tracing::warn!("the handshake failed: {error}"),
            Ok(Err(error)) => return tracing::warn!("{error}"),
            Ok(Ok(agreement)) => agreement,
        },
    };
    tracing::debug!(headers = ?agreement.headers, contexts = ?agreement.contexts, "transmission");
    let setup = Setup {
        device: shared.device.clone(),
        device_name: shared.options.device_name.clone(),
        headers: agreement.headers,
        contexts: agreement.contexts,
        mailbox,
        pool: shared.pool.clone(),
        tasks: shared.tasks.clone(),
        drain_timeout: shared.options.shutdown_timeout,
    };
    match Connection::new(stream, inbox, setup).run().await {
        end @ (End::Broken(_) | End::TooSlow) => tracing::warn!("ended: {end}"),
        end => tracing::debug!("ended: {end}"),
    }
}
