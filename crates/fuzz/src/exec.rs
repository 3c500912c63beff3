//! Exec: a runtime of one thread with invented time.
//!
//! - Tasks run in the order in which they were woken; when none can run, time goes to the next timer.
//! - A run that neither ends nor waits for a timer, or polls too often, is a hang: it panics.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use readonce_storage::{BoxFuture, Moment, Rt, Runtime};

/// Polls after which a run is called a hang.
const POLLS_MAX: u64 = 2_000_000;

/// Runs `main` to its end, with a runtime of its own.
pub fn run<F: Future>(main: impl FnOnce(Rt) -> F) -> F::Output {
    let exec = Arc::new(Exec::default());
    let mut main = pin!(main(Arc::new(ExecRuntime(exec.clone()))));
    let result = exec.drive(main.as_mut());
    // Tasks may own the runtime that holds them.
    let left = std::mem::take(&mut exec.inner.lock().tasks);
    drop(left);
    result
}

#[derive(Default)]
struct Exec {
    inner: Mutex<Inner>,
    ready: Arc<Mutex<VecDeque<u64>>>,
}

#[derive(Default)]
struct Inner {
    now: Moment,
    task_last: u64,
    tasks: BTreeMap<u64, BoxFuture<'static, ()>>,
    timers: BinaryHeap<Reverse<(Moment, u64)>>,
    wakers: BTreeMap<u64, Waker>,
    timer_last: u64,
    random: u64,
}

/// The number of the main future among the tasks.
const MAIN: u64 = 0;

impl Exec {
    fn drive<T>(&self, mut main: Pin<&mut impl Future<Output = T>>) -> T {
        self.ready.lock().push_back(MAIN);
        for _ in 0..POLLS_MAX {
            let Some(id) = self.next() else { continue };
            let waker = Waker::from(Arc::new(TaskWaker { id, ready: self.ready.clone() }));
            let mut cx = Context::from_waker(&waker);
            if id == MAIN {
                if let Poll::Ready(value) = main.as_mut().poll(&mut cx) {
                    return value;
                }
                continue;
            }
            let Some(mut task) = self.inner.lock().tasks.remove(&id) else { continue };
            if task.as_mut().poll(&mut cx).is_pending() {
                self.inner.lock().tasks.insert(id, task);
            }
        }
        panic!("the run does not end");
    }

    /// The next task that can run, or else moves time to the next timer.
    fn next(&self) -> Option<u64> {
        if let Some(id) = self.ready.lock().pop_front() {
            return Some(id);
        }
        let waker = {
            let mut inner = self.inner.lock();
            let Reverse((at, timer)) =
                inner.timers.pop().expect("nothing can run and no timer is set: a hang");
            inner.now = inner.now.max(at);
            inner.wakers.remove(&timer)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        None
    }
}

struct TaskWaker {
    id: u64,
    ready: Arc<Mutex<VecDeque<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.lock();
        if !ready.contains(&self.id) {
            ready.push_back(self.id);
        }
    }
}

struct ExecRuntime(Arc<Exec>);

impl Runtime for ExecRuntime {
    fn now(&self) -> Moment {
        self.0.inner.lock().now
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(Sleep { exec: self.0.clone(), until: self.now().saturating_add(duration), timer: None })
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let mut inner = self.0.inner.lock();
        inner.task_last += 1;
        let id = inner.task_last;
        inner.tasks.insert(id, task);
        self.0.ready.lock().push_back(id);
    }

    fn random(&self) -> u64 {
        let mut inner = self.0.inner.lock();
        inner.random =
            inner.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        inner.random
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
        let exec = self.exec.clone();
        let mut inner = exec.inner.lock();
        if inner.now >= self.until {
            return Poll::Ready(());
        }
        let timer = match self.timer {
            Some(timer) => timer,
            None => {
                inner.timer_last += 1;
                let timer = inner.timer_last;
                inner.timers.push(Reverse((self.until, timer)));
                self.timer = Some(timer);
                timer
            }
        };
        inner.wakers.insert(timer, cx.waker().clone());
        Poll::Pending
    }
}
