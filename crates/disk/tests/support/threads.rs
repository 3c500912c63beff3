//! The runtime of tests under shuttle: its tasks are shuttle's, its time is turns.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use readonce_storage::{BoxFuture, Moment, Runtime};
use shuttle::{future, rand::Rng};

/// A sleep as long as this never ends before everything else has.
const FOREVER: Duration = Duration::from_secs(3600);
/// Turns that a sleep lasts at most: of less than a second, and of more.
const TURNS_MAX: [u64; 2] = [20, 100];

/// Runs the engine on shuttle's tasks.
#[derive(Default)]
pub struct ShuttleRuntime {
    /// Milliseconds.
    now: AtomicU64,
    /// Tasks that were spawned and have not ended.
    live: AtomicUsize,
}

impl ShuttleRuntime {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Waits until every task that was spawned has ended. One that hangs takes more steps than a schedule may have.
    pub async fn tasks_ended(&self) {
        while self.live.load(Ordering::SeqCst) > 0 {
            future::yield_now().await;
        }
    }
}

/// A number below `end` that the schedule draws.
pub fn drawn(end: u64) -> u64 {
    shuttle::rand::thread_rng().gen_range(0..end)
}

/// Lets others run so many times.
pub async fn turns(count: u64) {
    for _ in 0..count {
        future::yield_now().await;
    }
}

/// The runtime as the engine takes it.
pub struct Shared(pub Arc<ShuttleRuntime>);

impl Runtime for Shared {
    fn now(&self) -> Moment {
        Duration::from_millis(self.0.now.load(Ordering::SeqCst))
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let runtime = Arc::clone(&self.0);
        Box::pin(async move {
            if duration >= FOREVER {
                return std::future::pending().await;
            }
            let long = duration >= Duration::from_secs(1);
            turns(drawn(TURNS_MAX[usize::from(long)])).await;
            let millis = u64::try_from(duration.as_millis()).expect("less than an hour");
            runtime.now.fetch_add(millis, Ordering::SeqCst);
        })
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let runtime = Arc::clone(&self.0);
        runtime.live.fetch_add(1, Ordering::SeqCst);
        // Nobody joins it.
        drop(future::spawn(async move {
            task.await;
            runtime.live.fetch_sub(1, Ordering::SeqCst);
        }));
    }
    fn random(&self) -> u64 {
        drawn(u64::MAX)
    }
}
