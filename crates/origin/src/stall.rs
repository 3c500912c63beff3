//! Stall: the time limit on silence, not on work.
//!
//! - Only a time with no byte at all counts; a transfer that moves is never cut, however slow.
//! - One timer serves a whole response: a byte moves the deadline without touching the timer.
//!
//! Not here: what follows a stall (`retry`).

use std::{future::Future, pin::pin, task::Poll, time::Duration};

use readonce_storage::{BoxFuture, Moment, Rt};

/// Nothing arrived for the whole limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalled;

/// Watches one response.
pub struct StallWatch<'a> {
    rt: &'a Rt,
    limit: Duration,
    moved: Moment,
    timer: BoxFuture<'static, ()>,
}

impl<'a> StallWatch<'a> {
    /// A watch that begins now.
    pub fn new(rt: &'a Rt, limit: Duration) -> Self {
        Self { rt, limit, moved: rt.now(), timer: rt.sleep(limit) }
    }

    /// How long it may be silent.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Waits for `future`, whose end counts as a sign of life, unless the limit passes since the last one.
    ///
    /// # Errors
    /// The limit passed.
    pub async fn guard<T>(&mut self, future: impl Future<Output = T>) -> Result<T, Stalled> {
        let mut future = pin!(future);
        let value = std::future::poll_fn(|cx| {
            if let Poll::Ready(value) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(value));
            }
            while self.timer.as_mut().poll(cx).is_ready() {
                let silent = self.rt.now().saturating_sub(self.moved);
                let left = self.limit.saturating_sub(silent);
                if left.is_zero() {
                    return Poll::Ready(Err(Stalled));
                }
                self.timer = self.rt.sleep(left);
            }
            Poll::Pending
        })
        .await?;
        self.moved = self.rt.now();
        Ok(value)
    }
}
