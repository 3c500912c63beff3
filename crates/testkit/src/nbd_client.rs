//! An NBD client to test servers with: it does what it is told, and checks what it gets.
//!
//! - Clones share one connection; many requests may be in flight from them.
//! - It asks for the headers it was told to ask for and takes what the server agrees to.
//! - A reply that breaks the protocol (an unknown cookie, overlapping or missing data, a simple reply where a chunk must
//!   stand) ends the connection, and every request with [`NbdError::Protocol`].
//! - Memory follows what was asked for, not what a server says: an option's reply has at most `OPTION_REPLY_MAX`, a chunk what
//!   its request can need.
//! - `lean` is another client, for benchmarks only.

#![allow(clippy::disallowed_methods, reason = "a client of real servers: real tasks, real time")]

pub mod lean;

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
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpStream, UnixStream},
    sync::oneshot,
};

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

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

/// Bytes of the data of one option's reply, at most; and how many replies there may be before the last.
const OPTION_REPLY_MAX: u32 = 64 << 10;
const OPTION_REPLIES_MAX: usize = 1024;
/// Bytes of a chunk beside the data that was asked for, at most: extents, and the words of an error.
const CHUNK_EXTRA_MAX: u64 = 1 << 20;

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

/// A byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection whose options are still being haggled over.
pub struct Handshake {
    stream: Box<dyn Stream>,
}

impl Handshake {
    /// Connects, checks the server's greeting, and answers it.
    pub async fn unix(path: impl AsRef<Path>) -> Result<Self, NbdError> {
        Self::start(Box::new(UnixStream::connect(path).await?)).await
    }

    /// Connects, checks the server's greeting, and answers it.
    pub async fn tcp(address: SocketAddr) -> Result<Self, NbdError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Self::start(Box::new(stream)).await
    }

    /// Checks the greeting of a server that is connected already, and answers it.
    pub async fn start(mut stream: Box<dyn Stream>) -> Result<Self, NbdError> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" || greeting[17] & 1 == 0 {
            return Err(NbdError::Protocol(format!("greeting {greeting:x?}")));
        }
        // Fixed newstyle, no zeroes.
        stream.write_all(&3_u32.to_be_bytes()).await?;
        Ok(Self { stream })
    }

    /// Sends an option and gives the replies to it, the last one included.
    pub async fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, NbdError> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&(data.len() as u32).to_be_bytes());
        message.extend_from_slice(data);
        self.stream.write_all(&message).await?;
        let mut replies = Vec::new();
        loop {
            if self.stream.read_u64().await? != 0x0003_e889_0455_65a9 {
                return Err(NbdError::Protocol("option reply magic".into()));
            }
            let of = self.stream.read_u32().await?;
            if of != option {
                return Err(NbdError::Protocol(format!("a reply to option {of}, not {option}")));
            }
            let kind = self.stream.read_u32().await?;
            let len = self.stream.read_u32().await?;
            if len > OPTION_REPLY_MAX || replies.len() >= OPTION_REPLIES_MAX {
                return Err(NbdError::Protocol(format!(
                    "{len} bytes in reply {} to option {of}",
                    replies.len()
                )));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).await?;
            replies.push((kind, data));
            if kind == option_reply::ACK || kind >> 31 == 1 {
                return Ok(replies);
            }
        }
    }

    /// The stream, to do with as one likes.
    pub fn into_stream(self) -> Box<dyn Stream> {
        self.stream
    }

    /// Haggles as `options` say and enters the transmission phase.
    pub async fn go(mut self, options: &ConnectOptions) -> Result<NbdClient, NbdError> {
        let mut headers = Headers::Simple;
        for (wanted, option) in
            [(Headers::Extended, option::EXTENDED_HEADERS), (Headers::Structured, option::STRUCTURED_REPLY)]
        {
            if headers == Headers::Simple && wanted <= options.headers {
                let replies = self.option(option, &[]).await?;
                if replies[0].0 == option_reply::ACK {
                    headers = wanted;
                }
            }
        }
        let mut contexts = Vec::new();
        if headers > Headers::Simple && !options.contexts.is_empty() {
            let queries: Vec<&str> = options.contexts.iter().map(String::as_str).collect();
            for (kind, data) in
                self.option(option::SET_META_CONTEXT, &meta_query(&options.export, &queries)).await?
            {
                if kind == option_reply::META_CONTEXT {
                    let (id, name) = data
                        .split_at_checked(4)
                        .ok_or_else(|| NbdError::Protocol("a context's number".into()))?;
                    contexts.push((be32(id), String::from_utf8_lossy(name).into_owned()));
                }
            }
        }
        // NBD_INFO_BLOCK_SIZE is asked for: a server may insist that a client knows its limits.
        let replies = self.option(option::GO, &go_data(&options.export, &[3])).await?;
        let (mut size, mut flags) = (None, 0);
        for (kind, data) in &replies {
            if *kind == option_reply::INFO && data.starts_with(&[0, 0]) && data.len() == 12 {
                size = Some(be64(&data[2..10]));
                flags = u16::from_be_bytes([data[10], data[11]]);
            } else if kind >> 31 == 1 {
                return Err(NbdError::Server {
                    errno: *kind,
                    text: String::from_utf8_lossy(data).into_owned(),
                });
            }
        }
        let size = size.ok_or_else(|| NbdError::Protocol("no NBD_INFO_EXPORT".into()))?;
        Ok(NbdClient::start(self.stream, size, flags, headers, contexts))
    }
}

/// The data of NBD_OPT_GO and NBD_OPT_INFO.
pub fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
pub fn meta_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
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

struct Receiver {
    reader: ReadHalf<Box<dyn Stream>>,
    headers: Headers,
    waiting: Arc<Mutex<Waiting>>,
}

impl Receiver {
    /// Takes one simple reply or one chunk.
    async fn receive(&mut self) -> Result<(), NbdError> {
        match (self.reader.read_u32().await?, self.headers) {
            (0x6744_6698, Headers::Simple | Headers::Structured) => self.simple().await,
            (0x668e_33ef, Headers::Structured) | (0x6e8a_278c, Headers::Extended) => self.chunk().await,
            (magic, headers) => Err(NbdError::Protocol(format!("reply magic {magic:#x} with {headers:?}"))),
        }
    }

    async fn simple(&mut self) -> Result<(), NbdError> {
        let errno = self.reader.read_u32().await?;
        let mut waiter = self.waiter().await?.1;
        if errno != 0 {
            waiter.error = Some(NbdError::Server { errno, text: String::new() });
        } else if waiter.request.command == command::READ {
            if self.headers != Headers::Simple {
                return Err(NbdError::Protocol("a simple reply to a read".into()));
            }
            waiter.reply.data.resize(waiter.request.len as usize, 0);
            self.reader.read_exact(&mut waiter.reply.data).await?;
            waiter.covered.push((0, waiter.reply.data.len()));
            waiter.reply.chunks = 1;
        }
        end(waiter)
    }

    /// The request that a reply is for, taken out of the table. Reads the cookie.
    async fn waiter(&mut self) -> Result<(u64, Waiter), NbdError> {
        let cookie = self.reader.read_u64().await?;
        let waiter = self.waiting.lock().requests.remove(&cookie);
        Ok((cookie, waiter.ok_or_else(|| NbdError::Protocol(format!("unknown cookie {cookie}")))?))
    }

    async fn chunk(&mut self) -> Result<(), NbdError> {
        let flags = self.reader.read_u16().await?;
        let kind = self.reader.read_u16().await?;
        let (cookie, mut waiter) = self.waiter().await?;
        let len = if self.headers == Headers::Extended {
            let offset = self.reader.read_u64().await?;
            if offset != waiter.request.offset {
                return Err(NbdError::Protocol(format!("a reply's offset {offset}")));
            }
            self.reader.read_u64().await?
        } else {
            u64::from(self.reader.read_u32().await?)
        };
        let data_len = if waiter.request.command == command::READ { waiter.request.len } else { 0 };
        if len > data_len.saturating_add(CHUNK_EXTRA_MAX) {
            return Err(NbdError::Protocol(format!("a chunk of {len} bytes for {:?}", waiter.request)));
        }
        let mut payload = vec![0; len as usize];
        self.reader.read_exact(&mut payload).await?;
        take_chunk(&mut waiter, kind, &payload, self.headers).ok_or_else(|| {
            NbdError::Protocol(format!("chunk {kind} of {len} bytes for {:?}", waiter.request))
        })?;
        if flags & 1 != 0 {
            return end(waiter);
        }
        if kind == 0 {
            return Err(NbdError::Protocol("NBD_REPLY_TYPE_NONE is not the last chunk".into()));
        }
        self.waiting.lock().requests.insert(cookie, waiter);
        Ok(())
    }
}

/// `None` if the chunk is not what the protocol allows here.
fn take_chunk(waiter: &mut Waiter, kind: u16, payload: &[u8], headers: Headers) -> Option<()> {
    let is_read = waiter.request.command == command::READ;
    match kind {
        0 => payload.is_empty().then_some(()),
        1 | 2 if is_read => {
            let at = be64(payload.get(..8)?);
            let data = if kind == 1 {
                payload.get(8..).filter(|data| !data.is_empty())?.to_vec()
            } else {
                let hole = u64::from(be32(payload.get(8..12)?));
                vec![0; usize::try_from(hole).ok().filter(|_| hole <= waiter.request.len)?]
            };
            let from = usize::try_from(at.checked_sub(waiter.request.offset)?).ok()?;
            let until = from.checked_add(data.len())?;
            let is_inside = until as u64 <= waiter.request.len;
            let is_new = waiter.covered.iter().all(|&(start, end)| until <= start || end <= from);
            let may_split = waiter.request.flags & command_flag::DF == 0 || waiter.reply.chunks == 0;
            if !is_inside || !is_new || !may_split {
                return None;
            }
            waiter.reply.data.resize(waiter.reply.data.len().max(until), 0);
            waiter.reply.data[from..until].copy_from_slice(&data);
            waiter.covered.push((from, until));
            waiter.reply.chunks += 1;
            Some(())
        }
        5 | 6 if waiter.request.command == command::BLOCK_STATUS => {
            let is_extended = headers == Headers::Extended;
            if (kind == 6) != is_extended {
                return None;
            }
            let id = be32(payload.get(..4)?);
            let extents: Vec<(u64, u64)> = if is_extended {
                let extents = payload.get(8..)?;
                if extents.len() as u64 != u64::from(be32(&payload[4..8])) * 16 {
                    return None;
                }
                extents.chunks(16).map(|extent| (be64(&extent[..8]), be64(&extent[8..]))).collect()
            } else {
                let extents = payload.get(4..).filter(|extents| extents.len() % 8 == 0)?;
                extents
                    .chunks(8)
                    .map(|extent| (u64::from(be32(&extent[..4])), u64::from(be32(&extent[4..]))))
                    .collect()
            };
            let is_new = waiter.reply.status.iter().all(|(other, _)| *other != id);
            if extents.is_empty() || extents.iter().any(|extent| extent.0 == 0) || !is_new {
                return None;
            }
            if waiter.request.flags & command_flag::REQ_ONE != 0 && extents.len() != 1 {
                return None;
            }
            waiter.reply.status.push((id, extents));
            Some(())
        }
        _ if kind >> 15 == 1 => {
            let errno = be32(payload.get(..4)?);
            let text_len = usize::from(u16::from_be_bytes([*payload.get(4)?, *payload.get(5)?]));
            let text = String::from_utf8(payload.get(6..)?.get(..text_len)?.to_vec()).ok()?;
            waiter.error = Some(NbdError::Server { errno, text });
            (errno != 0).then_some(())
        }
        _ => None,
    }
}

fn end(waiter: Waiter) -> Result<(), NbdError> {
    let covered: usize = waiter.covered.iter().map(|(from, until)| until - from).sum();
    let is_whole = waiter.request.command != command::READ || covered as u64 == waiter.request.len;
    let result = match waiter.error {
        Some(error) => Err(error),
        None if !is_whole => return Err(NbdError::Protocol("a read ended before all data came".into())),
        None => Ok(waiter.reply),
    };
    // A caller that went away does not want it.
    let _ = waiter.sender.send(result);
    Ok(())
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}
