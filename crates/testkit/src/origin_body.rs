//! The faulty origin's body: made while it is sent, counted, and broken off where the script says so.
//!
//! Not here: heads, and who decides (`origin`).

#![allow(clippy::disallowed_methods, reason = "a pause is made of real time")]

use std::{
    future::Future,
    io,
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::content::Content;

/// Bytes that are made at a time. Small, so that what is counted as sent is close to what was sent.
const PIECE_BYTES: u64 = 16 * 1024;

/// Where a body breaks off.
#[derive(Debug, Clone)]
pub(crate) enum Break {
    Stall,
    Pause(Duration),
    Cut,
    Reset,
    End,
    /// What was sent so far has left; now the connection ends.
    Flushed,
}

/// A body that is made as it is sent.
pub(crate) struct FaultyBody {
    pub content: Content,
    /// What is left to send.
    pub range: Range<u64>,
    /// Bytes after the range, of no meaning.
    pub extra: u64,
    /// After so many more bytes.
    pub breaks: Option<(u64, Break)>,
    /// Whether the length is told beforehand.
    pub sized: bool,
    /// Of all responses, and of this one.
    pub counts: [Arc<AtomicU64>; 2],
    /// Tells the connection to reset.
    pub reset: Arc<AtomicBool>,
    pub reset_at_end: bool,
    pub pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl FaultyBody {
    fn left(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn piece(&mut self, max: u64) -> Bytes {
        let len = self.left().min(PIECE_BYTES).min(max);
        let bytes = self.content.bytes(self.range.start..self.range.start + len);
        self.range.start += len;
        for count in &self.counts {
            count.fetch_add(len, Ordering::Relaxed);
        }
        bytes
    }
}

impl Body for FaultyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        if let Some(pause) = &mut this.pause {
            std::task::ready!(pause.as_mut().poll(cx));
            this.pause = None;
        }
        let mut max = u64::MAX;
        match &mut this.breaks {
            Some((0, at)) => match at.clone() {
                Break::Stall => return Poll::Pending,
                Break::Pause(duration) => {
                    this.breaks = None;
                    this.pause = Some(Box::pin(tokio::time::sleep(duration)));
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                // An error at once would take along what the connection has not written yet: one turn later it has.
                Break::Cut => {
                    this.breaks = Some((0, Break::Flushed));
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Break::Reset => {
                    this.reset_at_end = true;
                    this.breaks = Some((0, Break::Flushed));
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Break::Flushed => {
                    this.reset.store(this.reset_at_end, Ordering::Relaxed);
                    return Poll::Ready(Some(Err(io::Error::other("broken off by the script"))));
                }
                Break::End => return Poll::Ready(None),
            },
            Some((left, _)) => max = *left,
            None => {}
        }
        if this.left() == 0 {
            if this.extra > 0 {
                let extra = vec![0xee; std::mem::take(&mut this.extra) as usize];
                return Poll::Ready(Some(Ok(Frame::data(extra.into()))));
            }
            return Poll::Ready(None);
        }
        let piece = this.piece(max);
        if let Some((left, _)) = &mut this.breaks {
            *left -= piece.len() as u64;
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        if self.sized { SizeHint::with_exact(self.left()) } else { SizeHint::default() }
    }

    fn is_end_stream(&self) -> bool {
        self.left() == 0 && self.extra == 0 && self.breaks.is_none()
    }
}
