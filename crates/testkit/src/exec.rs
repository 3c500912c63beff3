//! Executor: one thread, one seed. Which task runs next and when a timer fires are drawn, never measured.
//!
//! - The same seed and the same tasks give the same schedule; [`Exec::digest`] is a mark of it.
//! - Time jumps to the next timer when nothing can run, and now and then while something could (not in a punctual one).
//! - Nothing can run and no timer is set: a waiter was lost, and the run panics.
//!
//! Not here: what the tasks do, and threads.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_storage::{BoxFuture, Moment, Rt, Runtime};

/// Polls after which a run is called stuck.
const POLLS_MAX: u64 = 50_000_000;
/// Of so many steps, one lets a timer fire though a task could run.
const TIMER_FIRST: u32 = 64;

/// A seeded executor with invented time.
pub struct Exec {
    inner: Mutex<Inner>,
    ready: Arc<Mutex<Vec<Arc<Task>>>>,
}

struct Inner {
    now: Moment,
    task_next: u64,
    tasks: BTreeMap<u64, (Arc<Task>, BoxFuture<'static, ()>)>,
    timers: BinaryHeap<Reverse<(Moment, u64)>>,
    timer_wakers: BTreeMap<u64, Waker>,
    timer_next: u64,
    rng: SmallRng,
    timers_fire: TimersFire,
    digest: Digest,
    polls: u64,
}

/// When a timer fires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TimersFire {
    /// Now and then while something could run.
    Early,
    /// When nothing can run.
    Last,
}

/// A task's waker.
struct Task {
    id: u64,
    queued: AtomicBool,
    ready: Arc<Mutex<Vec<Arc<Task>>>>,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            let ready = Arc::clone(&self.ready);
            ready.lock().push(self);
        }
    }
}

/// A hash that is the same everywhere and in every version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    /// Takes a number in.
    pub fn add(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Takes bytes in.
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.add(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word));
        }
    }

    /// The value so far.
    pub fn value(self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
}

struct Sleep {
    exec: Arc<Exec>,
    until: Moment,
    timer: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let exec = Arc::clone(&self.exec);
        let mut inner = exec.inner.lock();
        if inner.now >= self.until {
            return Poll::Ready(());
        }
        let timer = match self.timer {
            Some(timer) => timer,
            None => {
                inner.timer_next += 1;
                let timer = inner.timer_next;
                inner.timers.push(Reverse((self.until, timer)));
                self.timer = Some(timer);
                timer
            }
        };
        inner.timer_wakers.insert(timer, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // A limit that was not reached: nobody is to be woken, and time need not pass for it.
        if let Some(timer) = self.timer {
            self.exec.inner.lock().timer_wakers.remove(&timer);
        }
    }
}

struct ExecRuntime(Arc<Exec>);

impl Runtime for ExecRuntime {
    fn now(&self) -> Moment {
        self.0.inner.lock().now
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let until = self.now() + duration;
        Box::pin(Sleep { exec: Arc::clone(&self.0), until, timer: None })
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.0.spawn(task);
    }
    fn random(&self) -> u64 {
        self.0.inner.lock().rng.random()
    }
}

impl Exec {
    /// An executor whose schedule is drawn from `seed`.
    pub fn new(seed: u64) -> Arc<Self> {
        Self::with(seed, TimersFire::Early)
    }

    /// One in which work takes no time: for who counts what happens between two timers.
    pub fn punctual(seed: u64) -> Arc<Self> {
        Self::with(seed, TimersFire::Last)
    }

    fn with(seed: u64, timers_fire: TimersFire) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                now: Duration::ZERO,
                task_next: 0,
                tasks: BTreeMap::new(),
                timers: BinaryHeap::new(),
                timer_wakers: BTreeMap::new(),
                timer_next: 0,
                rng: SmallRng::seed_from_u64(seed),
                timers_fire,
                digest: Digest::default(),
                polls: 0,
            }),
            ready: Arc::default(),
        })
    }

    /// Its runtime parameter.
    pub fn rt(self: &Arc<Self>) -> Rt {
        Arc::new(ExecRuntime(Arc::clone(self)))
    }

    /// Adds a task.
    pub fn spawn(&self, future: BoxFuture<'static, ()>) {
        let mut inner = self.inner.lock();
        inner.task_next += 1;
        let id = inner.task_next;
        let task = Arc::new(Task { id, queued: AtomicBool::new(true), ready: Arc::clone(&self.ready) });
        inner.tasks.insert(id, (Arc::clone(&task), future));
        self.ready.lock().push(task);
    }

    /// Drops every task: the machine is off.
    pub fn power_off(&self) {
        // What a task drops may add tasks.
        loop {
            let tasks = std::mem::take(&mut self.inner.lock().tasks);
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        let wakers = std::mem::take(&mut self.inner.lock().timer_wakers);
        drop(wakers);
        self.inner.lock().timers.clear();
        self.ready.lock().clear();
    }

    /// Runs until `main` is done, or until `polls_max` steps were made (`None`).
    pub fn run_for<T: Send + 'static>(
        self: &Arc<Self>,
        main: impl Future<Output = T> + Send + 'static,
        polls_max: u64,
    ) -> Option<T> {
        let slot = Arc::new(Mutex::new(None));
        let out = Arc::clone(&slot);
        self.spawn(Box::pin(async move {
            let value = main.await;
            *out.lock() = Some(value);
        }));
        for _ in 0..polls_max {
            if let Some(value) = slot.lock().take() {
                return Some(value);
            }
            self.step();
        }
        slot.lock().take()
    }

    /// Runs until `main` is done.
    ///
    /// # Panics
    /// When it is never done.
    pub fn run<T: Send + 'static>(self: &Arc<Self>, main: impl Future<Output = T> + Send + 'static) -> T {
        self.run_for(main, POLLS_MAX).expect("the run is stuck in a loop")
    }

    /// A mark of the schedule so far.
    pub fn digest(&self) -> u64 {
        self.inner.lock().digest.value()
    }

    /// Steps so far.
    pub fn polls(&self) -> u64 {
        self.inner.lock().polls
    }

    /// Lets one task run, or one timer fire.
    fn step(&self) {
        let mut inner = self.inner.lock();
        inner.polls += 1;
        let mut ready = self.ready.lock();
        let may_be_early = !ready.is_empty() && inner.timers_fire == TimersFire::Early;
        let early = may_be_early && inner.rng.random_range(0..TIMER_FIRST) == 0;
        if ready.is_empty() || early {
            drop(ready);
            let fired = inner.fire(early);
            drop(inner);
            assert!(fired.is_some() || early, "deadlock: no task is ready and no timer runs");
            if let Some(waker) = fired {
                waker.wake();
            }
            return;
        }
        let index = if ready.len() == 1 { 0 } else { inner.rng.random_range(0..ready.len()) };
        let task = ready.swap_remove(index);
        drop(ready);
        let Some((_, mut future)) = inner.tasks.remove(&task.id) else { return };
        inner.digest.add(task.id);
        drop(inner);
        task.queued.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&task));
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.inner.lock().tasks.insert(task.id, (task, future));
        }
    }
}

impl Inner {
    /// Moves time to the next timer that somebody waits for; `early`: one that is not far away.
    fn fire(&mut self, early: bool) -> Option<Waker> {
        while let Some(&Reverse((at, timer))) = self.timers.peek() {
            let wanted = self.timer_wakers.contains_key(&timer);
            if wanted && early && at > self.now + Duration::from_secs(1) {
                return None;
            }
            self.timers.pop();
            if let Some(waker) = self.timer_wakers.remove(&timer) {
                self.now = self.now.max(at);
                self.digest.add(timer << 32);
                return Some(waker);
            }
        }
        None
    }
}
