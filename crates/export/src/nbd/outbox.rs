//! The replies to be sent.
//!
//! - Small replies and data that was read inline lie one after another in one buffer, initialised once and used again;
//!   data of waiting reads stays where it is and is sent from there by the same `writev`.
//! - The buffer takes no more once `BATCH_LEN` bytes stand in it, until all of them are sent: a slow reader holds
//!   at most that and one reply of `INLINE_LEN_MAX`. The data beside it is bounded by the connection's bytes in flight.
//!
//! Not here: what a reply looks like (`wire`).

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::AsyncWrite;

use super::pool::Held;

/// Bytes in the buffer from which on it must be sent first: as many as a Unix socket takes in one piece of memory. The client
/// works on them while the next are read; sent all at once, 32 replies of 4 KiB took twice as long.
const BATCH_LEN: usize = 32 << 10;
/// Parts of one `writev`.
const PARTS_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Outbox {
    /// Initialised as far as it is long.
    buf: Vec<u8>,
    /// Bytes of `buf` in use, and of these the ones already sent.
    len: usize,
    sent: usize,
    /// Data beside the buffer, in order.
    shared: VecDeque<Shared>,
    /// Bytes that `shared` holds.
    shared_len: usize,
}

struct Shared {
    /// It is sent after this many bytes of the buffer.
    at: usize,
    /// What is left to send of it.
    bytes: Bytes,
    /// Bytes that it holds until all of them are sent.
    len: usize,
    /// Those of them that are of the pool.
    _held: Held,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.sent == self.len && self.shared.is_empty()
    }

    /// Whether what is there must be sent before more is put in.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.len >= BATCH_LEN
    }

    /// Bytes held beside the buffer.
    pub fn shared_len(&self) -> usize {
        self.shared_len
    }

    /// Room for `len` more bytes, of which [`commit`](Self::commit) then says how many count. What it held before is there still.
    #[inline]
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.len + len;
        if end > self.buf.len() {
            self.buf.resize(end.next_power_of_two(), 0);
        }
        self.buf.get_mut(self.len..end).expect("grown to it")
    }

    /// Adds the first `len` bytes of the room to what is sent.
    #[inline]
    pub fn commit(&mut self, len: usize) {
        self.len += len;
        assert!(self.len <= self.buf.len());
    }

    /// Adds `bytes` by copying them.
    #[inline]
    pub fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    /// Adds `bytes` without copying them; `held` is let go once they are sent.
    pub fn push_shared(&mut self, bytes: Bytes, held: Held) {
        if !bytes.is_empty() {
            self.shared_len += bytes.len();
            self.shared.push_back(Shared { at: self.len, len: bytes.len(), bytes, _held: held });
        }
    }

    /// Sends until nothing is left.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let count = if self.shared.is_empty() {
                let bytes = self.buf.get(self.sent..self.len).expect("sent <= len <= buf.len()");
                ready!(Pin::new(&mut *stream).poll_write(cx, bytes))?
            } else {
                let mut parts = [IoSlice::new(&[]); PARTS_MAX];
                let count = self.parts(&mut parts);
                let parts = parts.get(..count).expect("parts gives at most all");
                ready!(Pin::new(&mut *stream).poll_write_vectored(cx, parts))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(count);
        }
        Poll::Ready(Ok(()))
    }

    /// The next parts to send, in order; how many of them are set.
    fn parts<'a>(&'a self, parts: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        let mut places = parts.iter_mut();
        let mut put = |bytes: &'a [u8]| {
            if bytes.is_empty() {
                return true;
            }
            let Some(place) = places.next() else { return false };
            *place = IoSlice::new(bytes);
            count += 1;
            true
        };
        let mut from = self.sent;
        for shared in &self.shared {
            let before = self.buf.get(from..shared.at).expect("parts stand in order of their place");
            if !put(before) || !put(&shared.bytes) {
                return count;
            }
            from = shared.at;
        }
        put(self.buf.get(from..self.len).expect("from <= len"));
        count
    }

    fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let until = self.shared.front().map_or(self.len, |shared| shared.at);
            let step = count.min(until - self.sent);
            self.sent += step;
            count -= step;
            if count == 0 {
                break;
            }
            let shared = self.shared.front_mut().expect("the socket takes no more than it was given");
            let step = count.min(shared.bytes.len());
            bytes::Buf::advance(&mut shared.bytes, step);
            count -= step;
            if shared.bytes.is_empty() {
                self.shared_len -= shared.len;
                self.shared.pop_front();
            }
        }
        if self.is_empty() {
            (self.sent, self.len) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time, then is full once.
    struct Trickle {
        taken: Vec<u8>,
        step: usize,
        rest: bool,
    }

    impl AsyncWrite for Trickle {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.rest = !self.rest;
            if self.rest {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let count = self.step.min(buf.len());
            self.taken.extend_from_slice(buf.get(..count).expect("count <= len"));
            Poll::Ready(Ok(count))
        }
        fn poll_write_vectored(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = bufs.iter().flat_map(|part| part.iter().copied()).collect();
            self.poll_write(cx, &all)
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn bytes_leave_in_the_order_they_came_whatever_the_socket_takes() {
        for step in 1..40 {
            let mut outbox = Outbox::default();
            let mut stream = Trickle { taken: Vec::new(), step, rest: false };
            let mut expected = Vec::new();
            for round in 0..100_u8 {
                let own = vec![round; usize::from(round) % 7];
                let shared = vec![round ^ 0x80; usize::from(round) % 11];
                outbox.push(&own);
                outbox.push_shared(Bytes::from(shared.clone()), Held::default());
                expected.extend(own.into_iter().chain(shared));
                // One step in between, so that some are sent in part when more is put in.
                let mut cx = Context::from_waker(std::task::Waker::noop());
                let _ = outbox.poll_send(&mut cx, &mut stream);
            }
            std::future::poll_fn(|cx| outbox.poll_send(cx, &mut stream)).await.expect("it only ever waits");
            assert_eq!(stream.taken, expected);
            assert_eq!(outbox.shared_len(), 0);
            assert!(outbox.is_empty());
        }
    }
}
