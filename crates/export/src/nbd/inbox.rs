//! The bytes received and not yet used.
//!
//! - One read takes as many requests as the socket has; they are parsed where they lie, in one contiguous run.
//! - The buffer is initialised once and used again. It grows while the client fills it, up to `INBOX_LEN_MAX`, or to hold one
//!   whole request with its payload; the longest is bounded by [`PAYLOAD_LEN_MAX`](super::wire::PAYLOAD_LEN_MAX).
//! - A long payload is read to its end and no further, so that nothing behind it has to be moved.
//!
//! Not here: what the bytes mean.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes of the buffer of a quiet connection.
const INBOX_LEN_MIN: usize = 16 << 10;
/// Bytes up to which the buffer grows when reads fill it: 32 writes of 4 KiB are received by one read.
const INBOX_LEN_MAX: usize = 256 << 10;
/// Bytes from which on a payload is received for itself, and handed over without a copy.
const LARGE_LEN: usize = 64 << 10;

pub(super) struct Inbox {
    buf: Vec<u8>,
    start: usize,
    end: usize,
    /// The last read filled all the room it had.
    was_filled: bool,
}

impl Inbox {
    pub fn new() -> Self {
        Self { buf: vec![0; INBOX_LEN_MIN], start: 0, end: 0, was_filled: false }
    }

    /// What was received and not yet consumed.
    #[inline]
    pub fn filled(&self) -> &[u8] {
        self.buf.get(self.start..self.end).expect("start <= end <= len")
    }

    /// Marks the first `count` bytes as used.
    #[inline]
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end);
    }

    /// Takes the first `len` bytes out; without a copy if they are many.
    pub fn take(&mut self, len: usize) -> Bytes {
        let bytes = if len < LARGE_LEN || self.buf.len() > len * 2 {
            Bytes::copy_from_slice(self.filled().get(..len).expect("the caller saw len bytes"))
        } else {
            let tail = self.filled().get(len..).expect("the caller saw len bytes");
            let mut buf = vec![0; tail.len().max(INBOX_LEN_MIN)];
            buf.get_mut(..tail.len()).expect("made that long").copy_from_slice(tail);
            let end = tail.len();
            let old = std::mem::replace(&mut self.buf, buf);
            let bytes = Bytes::from(old).slice(self.start..self.start + len);
            (self.start, self.end) = (0, end);
            return bytes;
        };
        self.consume(len);
        bytes
    }

    /// Reads once. `want` is how many bytes from the first unused one on are needed in one run. Gives the count of bytes
    /// read; 0 is the end of the stream.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut (impl AsyncRead + Unpin),
        want: usize,
    ) -> Poll<io::Result<usize>> {
        self.make_room(want);
        let window_end = if want >= LARGE_LEN { self.start + want } else { self.buf.len() };
        let window = self.buf.get_mut(self.end..window_end).expect("make_room made it");
        assert!(!window.is_empty());
        let mut read_buf = ReadBuf::new(window);
        ready!(Pin::new(stream).poll_read(cx, &mut read_buf))?;
        let count = read_buf.filled().len();
        self.was_filled = read_buf.remaining() == 0 && want < LARGE_LEN;
        self.end += count;
        Poll::Ready(Ok(count))
    }

    fn make_room(&mut self, want: usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        let filled_len = self.end - self.start;
        let mut len = self.buf.len();
        if self.was_filled && len < INBOX_LEN_MAX {
            len *= 2;
        }
        len = len.max(want).max(filled_len + 1);
        if len > self.buf.len() {
            let mut buf = vec![0; len];
            buf.get_mut(..filled_len).expect("made longer").copy_from_slice(self.filled());
            self.buf = buf;
            (self.start, self.end) = (0, filled_len);
        } else if self.start + want > len || len - self.end < INBOX_LEN_MIN / 4 {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, filled_len);
        }
    }
}
