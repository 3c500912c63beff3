//! An NBD client to test servers with: it does what it is told, and checks what it gets.
//!
//! - Clones share one connection; many requests may be in flight from them.
//! - It asks for the headers it was told to ask for and takes what the server agrees to.
//! - A reply that breaks the protocol (an unknown cookie, overlapping or missing data, a simple reply where a chunk must
//!   stand) ends the connection, and every request with [`NbdError::Protocol`].
//! - Memory follows what was asked for, not what a server says: an option's reply has at most `OPTION_REPLY_MAX`, a chunk what
//!   its request can need.
//! - `lean` is another client, for benchmarks only.
//!
//! Here: what is asked for, and the requests. `handshake`: up to the transmission phase. `replies`: what comes back.

#![allow(clippy::disallowed_methods, reason = "a client of real servers: real tasks, real time")]

mod handshake;
pub mod lean;
mod replies;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncWriteExt, WriteHalf},
    sync::oneshot,
};

pub use self::handshake::{Handshake, Stream, go_data, meta_query};
use self::replies::Receiver;

/// Commands of the protocol.
pub mod command {
    #![allow(missing_docs, reason = "named as in the protocol")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod command_flag {
    #![allow(missing_docs, reason = "named as in the protocol")]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
    pub const PAYLOAD_LEN: u16 = 32;
}

/// Options of the handshake.
pub mod option {
    #![allow(missing_docs, reason = "named as in the protocol")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Answers to options.
pub mod option_reply {
    #![allow(missing_docs, reason = "named as in the protocol")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Which headers to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Headers {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers.
    Extended,
}

/// What to ask of the server.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The export's name.
    pub export: String,
    /// The best headers to ask for; less is taken.
    pub headers: Headers,
    /// Metadata contexts to select.
    pub contexts: Vec<String>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            headers: Headers::Extended,
            contexts: vec!["base:allocation".into(), "qemu:allocation-depth".into()],
        }
    }
}

/// Why a request, or a connection, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NbdError {
    /// The server's answer.
    #[error("errno {errno}: {text}")]
    Server {
        /// As the protocol numbers them.
        errno: u32,
        /// Empty with simple replies.
        text: String,
    },
    /// The connection is gone.
    #[error("the connection is closed: {0}")]
    Closed(String),
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

impl NbdError {
    /// The server's errno, if it answered.
    pub fn errno(&self) -> Option<u32> {
        match self {
            NbdError::Server { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        NbdError::Closed(error.to_string())
    }
}

/// A request as it goes on the wire; nothing in it is checked.
#[derive(Debug, Clone, Default)]
pub struct RawRequest {
    /// Flags of the command.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// Bytes.
    pub offset: u64,
    /// Bytes, whatever `payload` holds.
    pub len: u64,
    /// What follows the header.
    pub payload: Vec<u8>,
}

/// The extents of one metadata context: its number, then bytes and flags of each.
pub type ContextStatus = (u32, Vec<(u64, u64)>);

/// What came for a request.
#[derive(Debug, Default)]
pub struct Reply {
    /// A read's data.
    pub data: Vec<u8>,
    /// Content chunks that it came in; 1 with simple replies.
    pub chunks: usize,
    /// Block status, a context each.
    pub status: Vec<ContextStatus>,
}

/// A client in the transmission phase.
#[derive(Clone)]
pub struct NbdClient(Arc<Inner>);

struct Inner {
    size: u64,
    flags: u16,
    headers: Headers,
    contexts: Vec<(u32, String)>,
    cookie: AtomicU64,
    writer: tokio::sync::Mutex<Option<WriteHalf<Box<dyn Stream>>>>,
    waiting: Arc<Mutex<Waiting>>,
    reader: tokio::task::AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[derive(Default)]
struct Waiting {
    requests: BTreeMap<u64, Waiter>,
    ended: Option<NbdError>,
}

impl Waiting {
    fn end(&mut self, error: &NbdError) {
        self.ended = Some(error.clone());
        for waiter in std::mem::take(&mut self.requests).into_values() {
            // A caller that went away does not want it.
            let _ = waiter.sender.send(Err(error.clone()));
        }
    }
}

struct Waiter {
    request: RawRequest,
    reply: Reply,
    /// Bytes of `reply.data` that have come, by their place in it.
    covered: Vec<(usize, usize)>,
    error: Option<NbdError>,
    sender: oneshot::Sender<Result<Reply, NbdError>>,
}

impl NbdClient {
    /// Connects to the Unix socket `path`.
    pub async fn connect_unix(path: impl AsRef<Path>, options: &ConnectOptions) -> Result<Self, NbdError> {
        Handshake::unix(path).await?.go(options).await
    }

    /// Connects to a TCP port.
    pub async fn connect_tcp(address: SocketAddr, options: &ConnectOptions) -> Result<Self, NbdError> {
        Handshake::tcp(address).await?.go(options).await
    }

    fn start(
        stream: Box<dyn Stream>,
        size: u64,
        flags: u16,
        headers: Headers,
        contexts: Vec<(u32, String)>,
    ) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let shared = waiting.clone();
        let task = tokio::spawn(async move {
            let mut receiver = Receiver { reader, headers, waiting: shared };
            let error = loop {
                if let Err(error) = receiver.receive().await {
                    break error;
                }
            };
            receiver.waiting.lock().end(&error);
        });
        Self(Arc::new(Inner {
            size,
            flags,
            headers,
            contexts,
            cookie: AtomicU64::new(1),
            writer: tokio::sync::Mutex::new(Some(writer)),
            waiting,
            reader: task.abort_handle(),
        }))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Transmission flags.
    pub fn flags(&self) -> u16 {
        self.0.flags
    }

    /// The headers agreed on.
    pub fn headers(&self) -> Headers {
        self.0.headers
    }

    /// The contexts selected: their numbers and names.
    pub fn contexts(&self) -> &[(u32, String)] {
        &self.0.contexts
    }

    /// Sends `request` and waits for its reply.
    pub async fn request(&self, request: RawRequest) -> Result<Reply, NbdError> {
        self.send(request).await?.await.map_err(|_| NbdError::Closed("the client ended".into()))?
    }

    /// Sends `request`; the reply comes through what is given back.
    pub async fn send(
        &self,
        request: RawRequest,
    ) -> Result<oneshot::Receiver<Result<Reply, NbdError>>, NbdError> {
        let cookie = self.0.cookie.fetch_add(1, Ordering::Relaxed);
        let message = self.encode(&request, cookie);
        let (sender, receiver) = oneshot::channel();
        let data_len = if request.command == command::READ { request.len as usize } else { 0 };
        {
            let mut waiting = self.0.waiting.lock();
            if let Some(error) = &waiting.ended {
                return Err(error.clone());
            }
            // A read that the server will refuse may name any length: memory comes with its data.
            let reply = Reply { data: Vec::with_capacity(data_len.min(64 << 20)), ..Reply::default() };
            let payload = Vec::new();
            let request = RawRequest { payload, ..request };
            waiting
                .requests
                .insert(cookie, Waiter { request, reply, covered: Vec::new(), error: None, sender });
        }
        self.send_bytes(&message).await?;
        Ok(receiver)
    }

    fn encode(&self, request: &RawRequest, cookie: u64) -> Vec<u8> {
        let extended = self.0.headers == Headers::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let mut message = magic.to_be_bytes().to_vec();
        message.extend_from_slice(&request.flags.to_be_bytes());
        message.extend_from_slice(&request.command.to_be_bytes());
        message.extend_from_slice(&cookie.to_be_bytes());
        message.extend_from_slice(&request.offset.to_be_bytes());
        if extended {
            message.extend_from_slice(&request.len.to_be_bytes());
        } else {
            message.extend_from_slice(&(request.len as u32).to_be_bytes());
        }
        message.extend_from_slice(&request.payload);
        message
    }

    /// Sends bytes as they are.
    pub async fn send_bytes(&self, bytes: &[u8]) -> Result<(), NbdError> {
        match &mut *self.0.writer.lock().await {
            Some(writer) => Ok(writer.write_all(bytes).await?),
            None => Err(NbdError::Closed("abandoned".into())),
        }
    }

    /// Closes the connection without a word, whatever clones there are.
    pub async fn abandon(&self) {
        self.0.reader.abort();
        self.0.writer.lock().await.take();
        self.0.waiting.lock().end(&NbdError::Closed("abandoned".into()));
    }

    /// Waits until the server has ended the connection; gives the reason.
    pub async fn ended(&self) -> NbdError {
        // The cookie of a request that is never sent: it ends with the connection.
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.0.waiting.lock();
            if let Some(error) = &waiting.ended {
                return error.clone();
            }
            let request = RawRequest::default();
            let waiter =
                Waiter { request, reply: Reply::default(), covered: Vec::new(), error: None, sender };
            let cookie = self.0.cookie.fetch_add(1, Ordering::Relaxed);
            waiting.requests.insert(cookie, waiter);
        }
        match receiver.await {
            Ok(Err(error)) => error,
            Ok(Ok(_)) => NbdError::Protocol("a reply to a request that was not sent".into()),
            Err(_) => NbdError::Closed("the client ended".into()),
        }
    }

    /// Reads `len` bytes.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, NbdError> {
        let request = RawRequest { command: command::READ, offset, len: len as u64, ..RawRequest::default() };
        Ok(self.request(request).await?.data)
    }

    /// Writes `data`; `flags` of the command, [`PAYLOAD_LEN`](command_flag::PAYLOAD_LEN) is added.
    pub async fn write(&self, offset: u64, data: &[u8], flags: u16) -> Result<(), NbdError> {
        let flags = flags | if self.0.headers == Headers::Extended { command_flag::PAYLOAD_LEN } else { 0 };
        let payload = data.to_vec();
        let request = RawRequest { flags, command: command::WRITE, offset, len: data.len() as u64, payload };
        self.request(request).await.map(drop)
    }

    /// Flushes.
    pub async fn flush(&self) -> Result<(), NbdError> {
        self.plain(command::FLUSH, 0, 0, 0).await
    }

    /// Trims.
    pub async fn trim(&self, offset: u64, len: u64, flags: u16) -> Result<(), NbdError> {
        self.plain(command::TRIM, offset, len, flags).await
    }

    /// Writes zeros.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: u16) -> Result<(), NbdError> {
        self.plain(command::WRITE_ZEROES, offset, len, flags).await
    }

    /// Asks for the range to be cached.
    pub async fn cache(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        self.plain(command::CACHE, offset, len, 0).await
    }

    /// The status of a range, for every context selected, in the order of the server's chunks.
    pub async fn block_status(
        &self,
        offset: u64,
        len: u64,
        flags: u16,
    ) -> Result<Vec<ContextStatus>, NbdError> {
        let command = command::BLOCK_STATUS;
        Ok(self.request(RawRequest { flags, command, offset, len, payload: Vec::new() }).await?.status)
    }

    async fn plain(&self, command: u16, offset: u64, len: u64, flags: u16) -> Result<(), NbdError> {
        self.request(RawRequest { flags, command, offset, len, payload: Vec::new() }).await.map(drop)
    }

    /// Tells the server that this is the end; no reply follows.
    pub async fn disconnect(&self) -> Result<(), NbdError> {
        let request = RawRequest { command: command::DISC, ..RawRequest::default() };
        let message = self.encode(&request, 0);
        self.send_bytes(&message).await
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}
