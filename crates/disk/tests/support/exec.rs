//! One thread, one seed: which task runs next and when a timer fires are drawn, never measured.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_storage::{BoxFuture, Moment, Rt, Runtime};

/// Polls after which a run is called stuck.
const POLLS_MAX: u64 = 50_000_000;

pub struct Exec {
    inner: Mutex<Inner>,
    ready: Arc<Mutex<Vec<u64>>>,
}

struct Inner {
    now: Moment,
    task_next: u64,
    tasks: BTreeMap<u64, BoxFuture<'static, ()>>,
    timers: BinaryHeap<Reverse<(Moment, u64)>>,
    timer_wakers: BTreeMap<u64, Waker>,
    timer_next: u64,
    rng: SmallRng,
}

struct TaskWaker {
    id: u64,
    ready: Arc<Mutex<Vec<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.lock();
        if !ready.contains(&self.id) {
            ready.push(self.id);
        }
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

pub struct ExecRuntime(Arc<Exec>);

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
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                now: Duration::ZERO,
                task_next: 0,
                tasks: BTreeMap::new(),
                timers: BinaryHeap::new(),
                timer_wakers: BTreeMap::new(),
                timer_next: 0,
                rng: SmallRng::seed_from_u64(seed),
            }),
            ready: Arc::default(),
        })
    }

    pub fn rt(self: &Arc<Self>) -> Rt {
        Arc::new(ExecRuntime(Arc::clone(self)))
    }

    pub fn spawn(&self, task: BoxFuture<'static, ()>) {
        let mut inner = self.inner.lock();
        inner.task_next += 1;
        let id = inner.task_next;
        inner.tasks.insert(id, task);
        self.ready.lock().push(id);
    }

    /// Drops every task: the machine is off.
    pub fn power_off(&self) {
        let tasks = {
            let mut inner = self.inner.lock();
            inner.timers.clear();
            inner.timer_wakers.clear();
            std::mem::take(&mut inner.tasks)
        };
        drop(tasks);
        self.ready.lock().clear();
    }

    /// Runs until `main` is done, or until `polls_max` polls were made (`None`).
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
        None
    }

    /// Runs until `main` is done.
    pub fn run<T: Send + 'static>(self: &Arc<Self>, main: impl Future<Output = T> + Send + 'static) -> T {
        self.run_for(main, POLLS_MAX).expect("the run is stuck in a loop")
    }

    fn step(self: &Arc<Self>) {
        let id = {
            let mut inner = self.inner.lock();
            let mut ready = self.ready.lock();
            if ready.is_empty() {
                drop(ready);
                let Some(Reverse((at, timer))) = inner.timers.pop() else {
                    panic!("deadlock: no task is ready and no timer runs")
                };
                inner.now = inner.now.max(at);
                let waker = inner.timer_wakers.remove(&timer);
                drop(inner);
                if let Some(waker) = waker {
                    waker.wake();
                }
                return;
            }
            let index = inner.rng.random_range(0..ready.len());
            ready.swap_remove(index)
        };
        let Some(mut task) = self.inner.lock().tasks.remove(&id) else { return };
        let waker = Waker::from(Arc::new(TaskWaker { id, ready: Arc::clone(&self.ready) }));
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.inner.lock().tasks.insert(id, task);
        }
    }
}
