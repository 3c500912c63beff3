//! Fixed newstyle option haggling.
//!
//! - What the client sends is bounded: `OPTION_LEN_MAX` bytes an option (longer ones are refused, and thrown away up to
//!   `OPTION_DISCARD_LEN_MAX`), `OPTIONS_MAX` options. The time is bounded by the caller.
//! - Every option is answered; only a wrong magic, wrong client flags, or a limit ends the connection.
//! - Metadata contexts count only if the name they were selected for is the name of the final GO.
//!
//! Not here: TLS. `STARTTLS` is refused, and the client goes on without or leaves.

use std::{future::poll_fn, io};

use readonce_disk::BlockDevice;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::{
    contexts::{Context, Contexts},
    inbox::Inbox,
    wire::{
        BLOCK_LEN_MIN, BLOCK_LEN_PREFERRED, Cursor, Headers, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
        PAYLOAD_LEN_MAX, STRING_LEN_MAX, flag, handshake_flag, info, option, option_reply as reply,
    },
};

/// Bytes of an option's data: a name and a good many queries.
const OPTION_LEN_MAX: usize = 64 << 10;
/// Bytes of a refused option's data that are read and thrown away.
const OPTION_DISCARD_LEN_MAX: usize = 1 << 20;
/// Options of one handshake. Known clients send fewer than ten.
const OPTIONS_MAX: usize = 256;
/// Queries of one metadata context option.
const QUERIES_MAX: usize = 256;

/// What the client agreed to.
#[derive(Debug)]
pub(super) struct Agreement {
    pub headers: Headers,
    pub contexts: Contexts,
}

/// Why no transmission phase follows.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAgreement {
    #[error("the client aborted the handshake")]
    Aborted,
    #[error("the client broke the handshake: {0}")]
    Broken(String),
    #[error("the client asked for the export {0:?}, which is not here")]
    UnknownExport(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The one export that there is.
#[derive(Clone, Copy)]
pub(super) struct Export<'a> {
    pub name: &'a str,
    pub description: &'a str,
    pub device: &'a dyn BlockDevice,
}

impl Export<'_> {
    /// The empty name is the default export, by the protocol.
    fn is_named(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn flags(&self, headers: Headers) -> u16 {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_FAST_ZERO
            // One device serves all connections: what one has flushed, all have.
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE;
        if self.device.read_only() {
            flags |= flag::READ_ONLY;
        }
        if headers != Headers::Simple {
            flags |= flag::SEND_DF;
        }
        if headers == Headers::Extended {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}

/// Haggles until the client enters the transmission phase or leaves. What it sent behind that stays in `inbox`.
pub(super) async fn haggle(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    inbox: &mut Inbox,
    export: Export<'_>,
) -> Result<Agreement, NoAgreement> {
    let mut haggle = Haggle {
        stream,
        inbox,
        export,
        out: Vec::new(),
        headers: Headers::Simple,
        contexts: Contexts::default(),
        contexts_name: Vec::new(),
    };
    haggle.run().await
}

struct Haggle<'a, S> {
    stream: &'a mut S,
    inbox: &'a mut Inbox,
    export: Export<'a>,
    /// Answers, sent together once an option is dealt with.
    out: Vec<u8>,
    headers: Headers,
    contexts: Contexts,
    /// The export's name that `contexts` were selected for.
    contexts_name: Vec<u8>,
}

/// What an option came to.
enum Next {
    Option,
    Transmission,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Haggle<'_, S> {
    async fn run(&mut self) -> Result<Agreement, NoAgreement> {
        self.out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        self.out
            .extend_from_slice(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        self.send().await?;
        let flags = self.receive(4).await?;
        let flags = Cursor(&flags).u32().expect("received 4 bytes");
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return Err(NoAgreement::Broken(format!("client flags {flags:#x}")));
        }
        let is_fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        let no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        for _ in 0..OPTIONS_MAX {
            let header = self.receive(16).await?;
            let mut cursor = Cursor(&header);
            let (Some(magic), Some(option), Some(len)) = (cursor.u64(), cursor.u32(), cursor.u32()) else {
                unreachable!("received 16 bytes");
            };
            if magic != OPTION_MAGIC {
                return Err(NoAgreement::Broken(format!("option magic {magic:#x}")));
            }
            if !is_fixed && option != option::EXPORT_NAME {
                return Err(NoAgreement::Broken(format!(
                    "option {option} without NBD_FLAG_C_FIXED_NEWSTYLE"
                )));
            }
            let len = usize::try_from(len).map_err(|_| NoAgreement::Broken("option length".into()))?;
            if len > OPTION_LEN_MAX {
                if len > OPTION_DISCARD_LEN_MAX || option == option::EXPORT_NAME {
                    return Err(NoAgreement::Broken(format!("option {option} of {len} bytes")));
                }
                self.discard(len).await?;
                self.refuse(option, reply::ERR_TOO_BIG, "the option is too long");
                self.send().await?;
                continue;
            }
            let data = self.receive(len).await?;
            tracing::trace!(option, len, "option");
            let next = match option {
                option::EXPORT_NAME => {
                    self.export_name(&data, no_zeroes)?;
                    Next::Transmission
                }
                option::ABORT => {
                    self.reply(option, reply::ACK, &[]);
                    // The client may be gone already; either is a good end.
                    let _ = self.send().await;
                    return Err(NoAgreement::Aborted);
                }
                _ => self.answer(option, &data),
            };
            self.send().await?;
            if matches!(next, Next::Transmission) {
                return Ok(Agreement { headers: self.headers, contexts: self.contexts });
            }
        }
        Err(NoAgreement::Broken(format!("more than {OPTIONS_MAX} options")))
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> Next {
        let takes_data =
            [option::INFO, option::GO, option::LIST_META_CONTEXT, option::SET_META_CONTEXT].contains(&option);
        let is_known = takes_data
            || [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS]
                .contains(&option);
        if !is_known {
            self.refuse(option, reply::ERR_UNSUP, "unknown option");
        } else if !takes_data && !data.is_empty() {
            self.refuse(option, reply::ERR_INVALID, "the option takes no data");
        } else {
            match option {
                option::LIST => self.list(),
                option::STARTTLS => self.refuse(option, reply::ERR_POLICY, "TLS is not set up here"),
                option::STRUCTURED_REPLY if self.headers == Headers::Extended => {
                    self.refuse(option, reply::ERR_EXT_HEADER_REQD, "extended headers are agreed on already");
                }
                option::STRUCTURED_REPLY => {
                    self.headers = Headers::Structured;
                    self.reply(option, reply::ACK, &[]);
                }
                option::EXTENDED_HEADERS if self.headers == Headers::Extended => {
                    self.refuse(option, reply::ERR_INVALID, "extended headers are agreed on already");
                }
                option::EXTENDED_HEADERS => {
                    self.headers = Headers::Extended;
                    self.reply(option, reply::ACK, &[]);
                }
                option::INFO | option::GO => return self.go(option, data),
                _ => self.meta_context(option, data),
            }
        }
        Next::Option
    }

    fn export_name(&mut self, name: &[u8], no_zeroes: bool) -> Result<(), NoAgreement> {
        if self.headers == Headers::Extended {
            return Err(NoAgreement::Broken("NBD_OPT_EXPORT_NAME with extended headers".into()));
        }
        if !self.export.is_named(name) {
            return Err(NoAgreement::UnknownExport(String::from_utf8_lossy(name).into_owned()));
        }
        self.forget_contexts_unless(name);
        self.out.extend_from_slice(&self.export.device.size().to_be_bytes());
        self.out.extend_from_slice(&self.export.flags(self.headers).to_be_bytes());
        if !no_zeroes {
            self.out.extend_from_slice(&[0; 124]);
        }
        Ok(())
    }

    fn list(&mut self) {
        let mut data = string(self.export.name);
        data.extend_from_slice(self.export.description.as_bytes());
        self.reply(option::LIST, reply::SERVER, &data);
        self.reply(option::LIST, reply::ACK, &[]);
    }

    fn go(&mut self, option: u32, data: &[u8]) -> Next {
        let mut cursor = Cursor(data);
        let parsed = (|| {
            let name = cursor.string()?;
            let count = usize::from(cursor.u16()?);
            (cursor.0.len() == count * 2).then_some(name)
        })();
        let Some(name) = parsed.filter(|name| name.len() <= STRING_LEN_MAX) else {
            self.refuse(option, reply::ERR_INVALID, "the option's lengths do not fit");
            return Next::Option;
        };
        if !self.export.is_named(name) {
            self.refuse(option, reply::ERR_UNKNOWN, "no export of this name is here");
            return Next::Option;
        }
        let mut wanted = Vec::new();
        while let Some(kind) = cursor.u16() {
            wanted.push(kind);
        }
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&self.export.device.size().to_be_bytes());
        export.extend_from_slice(&self.export.flags(self.headers).to_be_bytes());
        self.reply(option, reply::INFO, &export);
        // Told in any case: clients that did not ask must ignore it, and ours is the default.
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [BLOCK_LEN_MIN, BLOCK_LEN_PREFERRED, PAYLOAD_LEN_MAX] {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        self.reply(option, reply::INFO, &sizes);
        for (kind, text) in [(info::NAME, self.export.name), (info::DESCRIPTION, self.export.description)] {
            if wanted.contains(&kind) && !text.is_empty() {
                let mut data = kind.to_be_bytes().to_vec();
                data.extend_from_slice(text.as_bytes());
                self.reply(option, reply::INFO, &data);
            }
        }
        self.reply(option, reply::ACK, &[]);
        if option == option::INFO {
            return Next::Option;
        }
        self.forget_contexts_unless(name);
        Next::Transmission
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            // Also when it fails: the protocol says so.
            self.contexts = Contexts::default();
        }
        if self.headers == Headers::Simple {
            return self.refuse(option, reply::ERR_INVALID, "structured replies come first");
        }
        let mut cursor = Cursor(data);
        let (Some(name), Some(count)) = (cursor.string(), cursor.u32()) else {
            return self.refuse(option, reply::ERR_INVALID, "the option's lengths do not fit");
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > QUERIES_MAX {
            return self.refuse(option, reply::ERR_TOO_BIG, "too many queries");
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            let Some(query) = cursor.string().filter(|query| query.len() <= STRING_LEN_MAX) else {
                return self.refuse(option, reply::ERR_INVALID, "a query's length does not fit");
            };
            queries.push(query);
        }
        if !cursor.0.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "bytes behind the last query");
        }
        if !self.export.is_named(name) {
            return self.refuse(option, reply::ERR_UNKNOWN, "no export of this name is here");
        }
        for context in Context::ALL {
            let is_wanted = if is_set {
                queries.iter().any(|query| context.is_selected_by(query))
            } else {
                queries.is_empty() || queries.iter().any(|query| context.is_listed_by(query))
            };
            if !is_wanted {
                continue;
            }
            if is_set {
                self.contexts.insert(context);
            }
            let mut data = if is_set { context.id() } else { 0 }.to_be_bytes().to_vec();
            data.extend_from_slice(context.name().as_bytes());
            self.reply(option, reply::META_CONTEXT, &data);
        }
        if is_set {
            self.contexts_name = name.to_vec();
        }
        self.reply(option, reply::ACK, &[]);
    }

    fn forget_contexts_unless(&mut self, name: &[u8]) {
        if self.contexts_name != name {
            self.contexts = Contexts::default();
        }
    }

    fn refuse(&mut self, option: u32, error: u32, text: &str) {
        tracing::debug!(option, text, "option refused");
        self.reply(option, error, text.as_bytes());
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("names and texts of ours are short");
        self.out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        for number in [option, kind, len] {
            self.out.extend_from_slice(&number.to_be_bytes());
        }
        self.out.extend_from_slice(data);
    }

    async fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out).await?;
        self.out.clear();
        Ok(())
    }

    async fn receive(&mut self, len: usize) -> io::Result<Vec<u8>> {
        while self.inbox.filled().len() < len {
            self.fill(len).await?;
        }
        let bytes = self.inbox.filled().get(..len).expect("filled that far").to_vec();
        self.inbox.consume(len);
        Ok(bytes)
    }

    async fn discard(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            if self.inbox.filled().is_empty() {
                self.fill(1).await?;
            }
            let count = self.inbox.filled().len().min(len);
            self.inbox.consume(count);
            len -= count;
        }
        Ok(())
    }

    async fn fill(&mut self, want: usize) -> io::Result<()> {
        match poll_fn(|cx| self.inbox.poll_fill(cx, self.stream, want)).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("names of ours are at most STRING_LEN_MAX");
    let mut data = len.to_be_bytes().to_vec();
    data.extend_from_slice(text.as_bytes());
    data
}
