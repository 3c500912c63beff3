//! Tests under shuttle: schedules that switch at I/O, at waits and at short locks, and the runtime of their tasks, whose time is turns.
//!
//! Behind the feature `schedules`, which makes `readonce_storage::sync` tell where a task may be switched.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use readonce_storage::{
    BoxFuture, Moment, Runtime,
    sync::{Switch, at_switches},
};
use shuttle::{Config, MaxSteps, Runner, current, future, rand::Rng, scheduler::Scheduler, thread};

/// A sleep as long as this never ends before everything else has.
const FOREVER: Duration = Duration::from_secs(3600);
/// Turns that a sleep lasts at most: of less than a second, and of more.
const TURNS_MAX: [u64; 2] = [20, 100];

/// Of how many short locks one is a switch; 0: none, so that much happens between two of them. A schedule draws which.
const SWITCH_ONE_OF: [u64; 4] = [0, 1, 3, 12];
/// A debug build's frames need more than shuttle's 60 KiB.
const STACK_BYTES: usize = 256 << 10;

thread_local! {
    static ONE_OF: Cell<u64> = const { Cell::new(0) };
}

/// Runs `work` under each schedule; one of more than `steps_max` steps is called stuck.
pub fn schedules<F: Future<Output = ()> + 'static>(
    scheduler: impl Scheduler + 'static,
    steps_max: usize,
    work: impl Fn() -> F + Send + Sync + 'static,
) {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = MaxSteps::FailAfter(steps_max);
    // shuttle runs its tasks as coroutines on this thread.
    let _switches = at_switches(at_switch);
    Runner::new(scheduler, config).run(move || {
        ONE_OF.set(SWITCH_ONE_OF[drawn(SWITCH_ONE_OF.len() as u64) as usize]);
        future::block_on(work());
    });
}

fn at_switch(switch: Switch) {
    // Between two schedules there are no tasks.
    if current::try_get_current_task().is_none() {
        return;
    }
    let one_of = ONE_OF.get();
    match switch {
        Switch::Waits => thread::yield_now(),
        Switch::May if one_of > 0 && drawn(one_of) == 0 => {
            // shuttle switches before each access of its atomics, and takes it for no sign that the task waits.
            shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
        }
        Switch::May => {}
    }
}

/// Runs the engine on shuttle's tasks.
#[derive(Default)]
pub struct ShuttleRuntime {
    /// Milliseconds.
    now: AtomicU64,
    /// Tasks that were spawned and have not ended.
    live: AtomicUsize,
}

impl ShuttleRuntime {
    /// At the beginning of time.
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
pub struct Shared(
    /// Whose tasks and time.
    pub Arc<ShuttleRuntime>,
);

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
