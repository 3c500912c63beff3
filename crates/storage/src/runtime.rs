//! The runtime parameter: time, randomness and spawning.
//!
//! - Code of `disk`, `format` and `origin` takes an [`Rt`] and never asks the machine itself (clippy refuses), so
//!   that a seeded simulator can run it unchanged.
//! - Wakers and locks of `tokio::sync` decide nothing by themselves and may be used freely.
//!
//! Not here: sockets and files. They come in through the byte traits and the origin's transport.

use std::{future::Future, pin::pin, sync::Arc, task::Poll, time::Duration};

use crate::BoxFuture;

/// A moment: time since the runtime's start.
pub type Moment = Duration;

/// A shared runtime.
pub type Rt = Arc<dyn Runtime>;

/// What the engine may ask of the world beside bytes.
pub trait Runtime: Send + Sync + 'static {
    /// Monotonic time since the runtime's start.
    fn now(&self) -> Moment;
    /// Completes once `duration` has passed.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;
    /// Runs `task` to its end beside the caller.
    fn spawn(&self, task: BoxFuture<'static, ()>);
    /// The next random number.
    fn random(&self) -> u64;
}

/// The time given to [`timeout`] was over first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

/// Runs `future`, but no longer than `duration`.
pub async fn timeout<T>(rt: &Rt, duration: Duration, future: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut future = pin!(future);
    let mut sleep = rt.sleep(duration);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        sleep.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}

/// The real runtime: tokio's clock and tasks.
pub struct TokioRuntime {
    handle: tokio::runtime::Handle,
    start: tokio::time::Instant,
    random: parking_lot::Mutex<rand::rngs::SmallRng>,
}

#[allow(clippy::disallowed_methods, reason = "this is where the real clock comes in")]
impl TokioRuntime {
    /// A runtime on the current tokio runtime, with a random seed.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn current() -> Rt {
        Arc::new(Self {
            handle: tokio::runtime::Handle::current(),
            start: tokio::time::Instant::now(),
            random: parking_lot::Mutex::new(rand::SeedableRng::from_rng(&mut rand::rng())),
        })
    }
}

#[allow(clippy::disallowed_methods, reason = "this is where the real clock comes in")]
impl Runtime for TokioRuntime {
    fn now(&self) -> Moment {
        self.start.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.handle.spawn(task);
    }
    fn random(&self) -> u64 {
        use rand::Rng;
        self.random.lock().random()
    }
}
