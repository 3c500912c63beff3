//! io_uring: reads and writes that may wait for the disk, without a thread for each.
//!
//! - One ring for the process, made at first use. Any task of any tokio runtime submits; one thread reaps. A reaper
//!   inside a runtime would end with it, and leave operations of other runtimes without an answer.
//! - The kernel's side of an operation owns its buffer and its descriptor until the completion is seen. A dropped
//!   future frees nothing; its operation still happens.
//! - At most `IN_FLIGHT_MAX` operations; more wait for a slot, and the completion queue cannot overflow.
//!
//! Not here: short reads and writes, which an [`Engine`](crate::engine::Engine) goes on with, and what is done where
//! there is no io_uring.
//!
//! A ring does not survive a fork: fork before the first waiting operation.

use std::{
    fmt,
    future::poll_fn,
    io, mem,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, OnceLock},
    task::{Poll, Waker},
};

use bytes::Bytes;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Operations in flight: deep enough for any disk, and as many as the completion queue has entries.
const IN_FLIGHT_MAX: u32 = 1024;
/// Entries of the submission queue. Each push is followed by a submit, so only concurrent pushes share it.
const SUBMISSIONS_MAX: u32 = 128;
/// Bytes of one read or write: an `u32` field, and Linux itself stops at 2 GiB less a page.
const TRANSFER_BYTES_MAX: usize = 1 << 30;

static RING: OnceLock<Option<Ring>> = OnceLock::new();

/// The process's ring.
pub(crate) struct Ring {
    uring: IoUring,
    /// Held while an entry is pushed.
    submissions: Mutex<()>,
    /// Held while entries are taken off.
    completions: Mutex<()>,
    slots: Semaphore,
}

/// One operation. The kernel's `user_data` is one of its two owners, the future the other.
struct Op {
    state: Mutex<OpState>,
}

enum OpState {
    InFlight { held: Held, waker: Option<Waker> },
    Done { buffer: Buffer, result: i32 },
    Taken,
}

/// What must live as long as the kernel may touch it.
struct Held {
    buffer: Buffer,
    _file: Arc<OwnedFd>,
    _slot: SemaphorePermit<'static>,
    on_done: Option<OnDone>,
}

type OnDone = Box<dyn FnOnce(io::Result<()>) + Send>;

enum Buffer {
    None,
    Read(Vec<u8>),
    Write(Bytes),
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("slots", &self.slots.available_permits()).finish_non_exhaustive()
    }
}

impl Ring {
    /// The ring, or `None` where the kernel has none for us: too old, or a container's filter refuses it.
    pub(crate) fn shared() -> Option<&'static Ring> {
        RING.get_or_init(|| match Self::new() {
            Ok(ring) => Some(ring),
            Err(error) => {
                tracing::info!(%error, "no io_uring: file operations that wait use a pool of threads");
                None
            }
        })
        .as_ref()
    }

    fn new() -> io::Result<Self> {
        let uring = IoUring::builder().setup_cqsize(IN_FLIGHT_MAX).build(SUBMISSIONS_MAX)?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::SyncFileRange::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) || !uring.params().is_feature_nodrop() {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        // The thread waits in `shared` until the ring that it serves is in its place.
        std::thread::Builder::new()
            .name("readonce-ring".to_owned())
            .spawn(|| Self::shared().map(Self::reap_forever))?;
        Ok(Self {
            uring,
            submissions: Mutex::new(()),
            completions: Mutex::new(()),
            slots: Semaphore::new(IN_FLIGHT_MAX as usize),
        })
    }

    /// Reads into the room between `buf`'s length and its capacity, at most to `len` bytes in all, and lengthens it by
    /// what came. Returns the bytes that came, 0 at the end of the file.
    pub(crate) async fn read(
        &'static self,
        file: &Arc<OwnedFd>,
        offset: u64,
        buf: Vec<u8>,
        len: usize,
    ) -> (io::Result<usize>, Vec<u8>) {
        let start = buf.len();
        let want = (len.min(buf.capacity()) - start).min(TRANSFER_BYTES_MAX);
        let (result, buffer) = self
            .run(file, Buffer::Read(buf), None, move |fd, buffer| {
                let Buffer::Read(buf) = buffer else { unreachable!("a read has a buffer to read to") };
                let room = buf.spare_capacity_mut().as_mut_ptr().cast();
                opcode::Read::new(fd, room, want as u32).offset(offset).build()
            })
            .await;
        let Buffer::Read(mut buf) = buffer else { unreachable!("a read gives its buffer back") };
        if let Ok(read) = result {
            assert!(read <= want);
            // SAFETY: `start + want` is within the capacity, and the kernel wrote `read <= want` bytes from `start`.
            unsafe { buf.set_len(start + read) };
        }
        (result, buf)
    }

    /// Writes `data` and returns how many bytes were written, which may be fewer.
    pub(crate) async fn write(
        &'static self,
        file: &Arc<OwnedFd>,
        offset: u64,
        data: Bytes,
    ) -> io::Result<usize> {
        let want = data.len().min(TRANSFER_BYTES_MAX);
        let (result, _) = self
            .run(file, Buffer::Write(data), None, move |fd, buffer| {
                let Buffer::Write(data) = buffer else { unreachable!("a write has data") };
                opcode::Write::new(fd, data.as_ptr(), want as u32).offset(offset).build()
            })
            .await;
        result
    }

    /// fdatasync.
    pub(crate) async fn fdatasync(&'static self, file: &Arc<OwnedFd>) -> io::Result<()> {
        let (result, _) = self
            .run(file, Buffer::None, None, |fd, _| {
                opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
            })
            .await;
        result.map(drop)
    }

    /// fallocate with a raw `mode`.
    pub(crate) async fn fallocate(
        &'static self,
        file: &Arc<OwnedFd>,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let (result, _) = self
            .run(file, Buffer::None, None, move |fd, _| {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            })
            .await;
        result.map(drop)
    }

    /// Has the kernel write the file's dirty pages out, and calls `on_done` when all are handed to the device. Waits for
    /// nothing; does nothing and gives `on_done` back when every slot is taken.
    pub(crate) fn start_writeback(&'static self, file: &Arc<OwnedFd>, on_done: OnDone) -> Result<(), OnDone> {
        let Ok(slot) = self.slots.try_acquire() else { return Err(on_done) };
        self.begin(file, Buffer::None, slot, Some(on_done), |fd, _| {
            // From 0, length 0: all of the file. Without the WAIT flags: they would take a writeback error off the
            // descriptor (`file_check_and_advance_wb_err`), and the next fdatasync would not see it and answer "durable".
            opcode::SyncFileRange::new(fd, 0).flags(libc::SYNC_FILE_RANGE_WRITE).build()
        });
        Ok(())
    }

    async fn run(
        &'static self,
        file: &Arc<OwnedFd>,
        buffer: Buffer,
        on_done: Option<OnDone>,
        entry: impl FnOnce(types::Fd, &mut Buffer) -> squeue::Entry,
    ) -> (io::Result<usize>, Buffer) {
        let slot = self.slots.acquire().await.expect("the semaphore is never closed");
        let op = self.begin(file, buffer, slot, on_done, entry);
        poll_fn(|cx| op.poll(cx.waker())).await
    }

    fn begin(
        &'static self,
        file: &Arc<OwnedFd>,
        mut buffer: Buffer,
        slot: SemaphorePermit<'static>,
        on_done: Option<OnDone>,
        entry: impl FnOnce(types::Fd, &mut Buffer) -> squeue::Entry,
    ) -> Arc<Op> {
        // The entry points into the heap, which stays where it is when the buffer moves into `held`.
        let entry = entry(types::Fd(file.as_raw_fd()), &mut buffer);
        let held = Held { buffer, _file: Arc::clone(file), _slot: slot, on_done };
        let op = Arc::new(Op { state: Mutex::new(OpState::InFlight { held, waker: None }) });
        let kernels = Arc::into_raw(Arc::clone(&op));
        self.submit(&entry.user_data(kernels as u64));
        op
    }

    fn submit(&self, entry: &squeue::Entry) {
        loop {
            let _guard = self.submissions.lock();
            // SAFETY: the lock makes this the only submission queue; the entry's buffer and descriptor live in its `Op`,
            // of which `user_data` owns a reference until the completion is seen.
            if unsafe { self.uring.submission_shared().push(entry) }.is_ok() {
                break;
            }
            drop(_guard);
            self.enter();
        }
        self.enter();
        // What was in the page cache is complete already: answer in the same poll, without the reaper.
        if let Some(guard) = self.completions.try_lock() {
            self.reap(guard);
        }
    }

    /// Hands all pushed entries to the kernel.
    fn enter(&self) {
        loop {
            match self.uring.submit() {
                Ok(_) => return,
                // Out of memory for a moment, or interrupted. The entry is in the queue and cannot be taken back.
                Err(error) if is_passing(&error) => std::thread::yield_now(),
                Err(error) => panic!("io_uring_enter fails only where the ring is misused: {error}"),
            }
        }
    }

    fn reap_forever(&'static self) {
        loop {
            // SAFETY: no argument is passed, and waiting touches neither queue.
            let waited = unsafe {
                const GETEVENTS: u32 = 1;
                self.uring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None)
            };
            match waited {
                Ok(_) => self.reap(self.completions.lock()),
                Err(error) if is_passing(&error) => std::thread::yield_now(),
                Err(error) => panic!("io_uring_enter fails only where the ring is misused: {error}"),
            }
        }
    }

    fn reap(&self, guard: parking_lot::MutexGuard<'_, ()>) {
        // SAFETY: the guard makes this the only completion queue.
        let done: Vec<(u64, i32)> = unsafe { self.uring.completion_shared() }
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        drop(guard);
        for (user_data, result) in done {
            // SAFETY: `begin` made it of `Arc::into_raw`, and each operation completes once.
            let op = unsafe { Arc::from_raw(user_data as *const Op) };
            op.complete(result);
        }
    }
}

impl Op {
    fn poll(&self, waker: &Waker) -> Poll<(io::Result<usize>, Buffer)> {
        let mut state = self.state.lock();
        match &mut *state {
            OpState::InFlight { waker: slot, .. } => {
                *slot = Some(waker.clone());
                Poll::Pending
            }
            OpState::Done { .. } => {
                let OpState::Done { buffer, result } = mem::replace(&mut *state, OpState::Taken) else {
                    unreachable!("the state was just seen")
                };
                Poll::Ready((outcome(result), buffer))
            }
            OpState::Taken => panic!("an operation is polled after its end"),
        }
    }

    fn complete(&self, result: i32) {
        let mut state = self.state.lock();
        let OpState::InFlight { held, waker } = mem::replace(&mut *state, OpState::Taken) else {
            panic!("an operation completes once");
        };
        let Held { buffer, on_done, .. } = held;
        *state = OpState::Done { buffer, result };
        drop(state);
        if let Some(on_done) = on_done {
            on_done(outcome(result).map(drop));
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()))
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}
