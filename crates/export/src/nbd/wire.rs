//! Numbers and layouts of the NBD protocol.
//!
//! - Integers are big-endian. Parsing never panics and never reads past what it was given.
//! - Headers of replies are written into a place that the caller has made, so that payload can stand right behind.
//!
//! Not here: which request is allowed (`request`), what an option means (`handshake`).

/// Bytes of payload that one request or reply may carry (NBD_INFO_BLOCK_SIZE): 32 MiB, which every client may assume.
pub const PAYLOAD_LEN_MAX: u32 = 32 << 20;
/// Bytes: the preferred block size. Smaller requests work, down to [`BLOCK_LEN_MIN`].
pub(super) const BLOCK_LEN_PREFERRED: u32 = 4096;
/// Bytes: any offset and length is allowed.
pub(super) const BLOCK_LEN_MIN: u32 = 1;
/// Bytes of a name or another string, by the protocol.
pub(super) const STRING_LEN_MAX: usize = 4096;

pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags; the client's have the same bits.
pub(super) mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub(super) mod option {
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
pub(super) mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of NBD_REP_INFO.
pub(super) mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub(super) mod flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Commands.
pub(super) mod command {
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
pub(super) mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

const CHUNK_DONE: u16 = 1 << 0;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
const CHUNK_ERROR: u16 = (1 << 15) + 1;

/// Bytes of the longest header of a reply, the offset of a data chunk included.
pub(super) const REPLY_HEADER_LEN_MAX: usize = 40;
/// Bytes of text in an error chunk.
const ERROR_TEXT_LEN_MAX: usize = 1024;

/// Which headers the transmission phase uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Headers {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

/// A request's header. Nothing in it is checked but the magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes, of payload or of effect.
    pub len: u64,
}

impl Request {
    /// Bytes that follow the header. With extended headers a write must say so by a flag, but QEMU's client (10.0)
    /// does not, and sends its payload all the same.
    pub fn payload_len(&self, headers: Headers) -> u64 {
        let is_flagged = headers == Headers::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        if self.command == command::WRITE || is_flagged { self.len } else { 0 }
    }
}

/// The magic of a request was wrong: the client and we no longer agree where requests begin.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadMagic(pub u32);

impl Headers {
    /// Bytes of a request's header.
    pub fn request_len(self) -> usize {
        match self {
            Headers::Simple | Headers::Structured => 28,
            Headers::Extended => 32,
        }
    }

    /// The request at the start of `bytes`; `None` while its header is not complete.
    #[inline]
    pub fn parse(self, bytes: &[u8]) -> Result<Option<Request>, BadMagic> {
        let mut cursor = Cursor(bytes);
        let Some(magic) = cursor.u32() else { return Ok(None) };
        let expected = match self {
            Headers::Simple | Headers::Structured => REQUEST_MAGIC,
            Headers::Extended => EXTENDED_REQUEST_MAGIC,
        };
        if magic != expected {
            return Err(BadMagic(magic));
        }
        let mut rest = || {
            Some(Request {
                flags: cursor.u16()?,
                command: cursor.u16()?,
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                len: match self {
                    Headers::Simple | Headers::Structured => u64::from(cursor.u32()?),
                    Headers::Extended => cursor.u64()?,
                },
            })
        };
        Ok(rest())
    }

    /// Bytes of the header in front of a read's data.
    #[inline]
    pub fn data_header_len(self) -> usize {
        match self {
            Headers::Simple => 16,
            Headers::Structured => 28,
            Headers::Extended => 40,
        }
    }

    /// The header in front of a read's `len` bytes of data, the only chunk of its reply.
    #[inline]
    pub fn data_header(self, cookie: u64, offset: u64, len: u32) -> ReplyHeader {
        match self {
            Headers::Simple => simple(0, cookie),
            Headers::Structured | Headers::Extended => {
                let mut header =
                    self.chunk(CHUNK_DONE, CHUNK_OFFSET_DATA, cookie, offset, u64::from(len) + 8);
                header.put(&offset.to_be_bytes());
                header
            }
        }
    }

    /// The whole reply of a request that succeeded without data.
    #[inline]
    pub fn done(self, cookie: u64, offset: u64, kind: Done) -> ReplyHeader {
        match (self, kind) {
            // A read is never answered by a simple reply once structured replies are agreed on; a read of nothing has no data.
            (Headers::Structured, Done::Read) | (Headers::Extended, _) => {
                self.chunk(CHUNK_DONE, CHUNK_NONE, cookie, offset, 0)
            }
            (Headers::Simple, _) | (Headers::Structured, Done::Other) => simple(0, cookie),
        }
    }

    /// Appends the whole reply of a request that failed.
    pub fn error(self, cookie: u64, offset: u64, errno: u32, text: &str, into: &mut impl FnMut(&[u8])) {
        if self == Headers::Simple {
            into(simple(errno, cookie).bytes());
            return;
        }
        let text = &text.as_bytes().get(..text.floor_char_boundary(ERROR_TEXT_LEN_MAX)).unwrap_or_default();
        let text_len = u16::try_from(text.len()).expect("an error text is cut to ERROR_TEXT_LEN_MAX bytes");
        into(self.chunk(CHUNK_DONE, CHUNK_ERROR, cookie, offset, 6 + u64::from(text_len)).bytes());
        into(&errno.to_be_bytes());
        into(&text_len.to_be_bytes());
        into(text);
    }

    /// Appends one block status chunk. `extents` are pairs of bytes and status flags; lengths fit 32 bits with
    /// structured replies.
    pub fn status_chunk(
        self,
        cookie: u64,
        offset: u64,
        last: bool,
        id: u32,
        extents: &[(u64, u32)],
        out: &mut Vec<u8>,
    ) {
        let flags = if last { CHUNK_DONE } else { 0 };
        let count =
            u32::try_from(extents.len()).expect("extents of a reply are bounded by STATUS_EXTENTS_MAX");
        if self == Headers::Extended {
            let len = 8 + 16 * u64::from(count);
            out.extend_from_slice(self.chunk(flags, CHUNK_BLOCK_STATUS_EXT, cookie, offset, len).bytes());
            out.extend_from_slice(&id.to_be_bytes());
            out.extend_from_slice(&count.to_be_bytes());
            for &(len, state) in extents {
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&u64::from(state).to_be_bytes());
            }
        } else {
            let len = 4 + 8 * u64::from(count);
            out.extend_from_slice(self.chunk(flags, CHUNK_BLOCK_STATUS, cookie, offset, len).bytes());
            out.extend_from_slice(&id.to_be_bytes());
            for &(len, state) in extents {
                let len = u32::try_from(len).expect("status cuts extents to 32 bits for structured replies");
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&state.to_be_bytes());
            }
        }
    }

    fn chunk(self, flags: u16, kind: u16, cookie: u64, offset: u64, payload_len: u64) -> ReplyHeader {
        let mut header = ReplyHeader::default();
        if self == Headers::Extended {
            header.put(&EXTENDED_REPLY_MAGIC.to_be_bytes());
        } else {
            header.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        }
        header.put(&flags.to_be_bytes());
        header.put(&kind.to_be_bytes());
        header.put(&cookie.to_be_bytes());
        if self == Headers::Extended {
            header.put(&offset.to_be_bytes());
            header.put(&payload_len.to_be_bytes());
        } else {
            let payload_len =
                u32::try_from(payload_len).expect("a payload is at most PAYLOAD_LEN_MAX and its prefix");
            header.put(&payload_len.to_be_bytes());
        }
        header
    }
}

/// What succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    Read,
    Other,
}

fn simple(errno: u32, cookie: u64) -> ReplyHeader {
    let mut header = ReplyHeader::default();
    header.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    header.put(&errno.to_be_bytes());
    header.put(&cookie.to_be_bytes());
    header
}

/// A reply's header on the stack.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReplyHeader {
    buf: [u8; REPLY_HEADER_LEN_MAX],
    len: usize,
}

impl Default for ReplyHeader {
    fn default() -> Self {
        Self { buf: [0; REPLY_HEADER_LEN_MAX], len: 0 }
    }
}

impl ReplyHeader {
    /// The header.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        self.buf.get(..self.len).expect("put keeps len inside buf")
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        self.buf
            .get_mut(self.len..end)
            .expect("no header is longer than REPLY_HEADER_LEN_MAX")
            .copy_from_slice(bytes);
        self.len = end;
    }
}

/// Reads big-endian integers from the front of bytes; `None` where they end.
#[derive(Debug)]
pub(super) struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    #[inline]
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }
    #[inline]
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }
    #[inline]
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }
    /// A 32-bit length and that many bytes.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.take(len)
    }
    #[inline]
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
}
