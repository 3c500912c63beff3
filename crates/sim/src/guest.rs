//! Guest: does what the plan says to a disk, one request after the other, and lets the model judge every answer.
//!
//! - A request may fail only if a fault that can do that was met before.
//!
//! Not here: what the answers may be (`model`).

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use readonce_disk::{BlockDevice, DeviceError, Disk, Image, ZeroMode};
use readonce_storage::{Rt, SimFile, runtime::timeout, sim::Fault};
use readonce_testkit::exec::Digest;

use crate::{
    model::{Ended, Model},
    plan::{Left, Op},
    server::Server,
    stamp,
};

/// What guests and the run share.
pub struct Shared {
    /// What must be true.
    pub model: Model,
    /// A mark of every answer.
    pub digest: Digest,
    /// Requests that ended.
    pub ops: u64,
}

/// What may go wrong in a session.
pub struct Faults {
    /// The origin.
    pub server: Arc<Server>,
    /// Files of the guests' image.
    pub own: Vec<Arc<SimFile>>,
    /// Files of what lies between it and the origin.
    pub below: Vec<Arc<SimFile>>,
    /// Memory for what is in flight is scarce: writes may have to wait for the origin.
    pub scarce: bool,
    /// What lies below the top is opened when it is needed: any fault of its disk may keep it from that.
    pub lazy: bool,
    /// A guest goes away in the midst of a change: it may be under way when the image is closed.
    pub going: bool,
    /// A write or a sync of the guests' image failed, and they were told.
    pub latched: AtomicBool,
    /// Time passes only where somebody waits for it: for the origin, mostly.
    pub punctual: bool,
}

/// A guest.
#[derive(Clone)]
pub struct Guest {
    /// Its disk.
    pub disk: Arc<Disk>,
    /// The image on top of it.
    pub image: Arc<Image>,
    /// Shared with the others.
    pub shared: Arc<Mutex<Shared>>,
    /// What may go wrong.
    pub faults: Arc<Faults>,
    /// Time.
    pub rt: Rt,
    /// Bytes of a cell.
    pub cell: u64,
}

impl Faults {
    /// What lies behind the guests' image met a fault that its readers may see.
    pub fn behind(&self) -> bool {
        self.server.fault_hits() > 0 || self.below()
    }

    /// The same, and asking again does not help.
    fn behind_for_good(&self) -> bool {
        self.server.hard_hits() > 0 || self.below()
    }

    fn below(&self) -> bool {
        let kinds = if self.lazy { &ALL[..] } else { &OF_READS[..] };
        hits(&self.below, kinds) > 0
    }

    /// Nothing went wrong so far that asking again does not mend, and there is memory for all.
    pub fn none_for_good(&self) -> bool {
        !self.scarce && !self.disk() && self.server.hard_hits() == 0
    }

    /// The guests' image met a fault of its disk.
    pub fn own(&self) -> bool {
        hits(&self.own, &ALL) > 0
    }

    /// All that can have failed so far is writes and syncs of the guests' image, by an I/O error.
    fn only_writes_failed(&self) -> bool {
        let reads = self.own.iter().map(|file| file.read_fault_hits()).sum::<u64>();
        reads + hits(&self.own, &[Fault::NoSpace]) + hits(&self.below, &ALL) + self.server.fault_hits() == 0
    }

    /// Any disk met a fault.
    pub fn disk(&self) -> bool {
        self.own() || hits(&self.below, &ALL) > 0
    }
}

const ALL: [Fault; 4] = [Fault::Eio, Fault::NoSpace, Fault::SyncFails, Fault::Short];
/// Those that a read may meet.
pub const OF_READS: [Fault; 2] = [Fault::Eio, Fault::Short];

/// How often these files met these faults.
pub fn hits(files: &[Arc<SimFile>], faults: &[Fault]) -> u64 {
    let of = |file: &Arc<SimFile>| faults.iter().map(|&fault| file.fault_hits_of(fault)).sum::<u64>();
    files.iter().map(of).sum()
}

/// Guests, each a task of its own; done when all of them are.
pub async fn all(guests: Vec<(Guest, Vec<Op>)>, rt: Rt) {
    let mut ends = Vec::new();
    for (guest, ops) in guests {
        let (tell, told) = tokio::sync::oneshot::channel();
        ends.push(told);
        rt.spawn(Box::pin(async move {
            for op in ops {
                guest.op(op).await;
            }
            let _ = tell.send(());
        }));
    }
    for end in ends {
        end.await.expect("a guest ends before it goes");
    }
}

impl Guest {
    /// One request, to its end.
    pub async fn op(&self, op: Op) {
        match op {
            Op::Read(at, count) => self.read(at, count).await,
            Op::Abandon(left, at, count) => self.abandon(left, at, count).await,
            Op::Write(at, count) => {
                self.write(at, count).await;
            }
            Op::WriteThrough(at, count) => {
                if self.write(at, count).await {
                    self.flush().await;
                }
            }
            Op::Zero(at, count, mode) => self.zero(at, count, mode).await,
            Op::Trim(at, count) => {
                let begin = self.shared.lock().model.begin_write(at, count, |_| stamp::ZERO);
                let trimmed = self.at_once(self.disk.trim(at * self.cell, count * self.cell)).await;
                self.wrote("trim", trimmed, (at, count), begin, Ended::Maybe);
            }
            Op::Flush => self.flush().await,
            Op::Cache(at, count) => {
                let cached = self.disk.cache(at * self.cell, count * self.cell).await;
                self.may_fail("cache", cached.err(), self.reads_may_fail());
            }
            Op::Status(at, count) => self.status(at * self.cell, count * self.cell).await,
            Op::Pause(ms) => self.rt.sleep(Duration::from_millis(ms)).await,
            Op::CopyOnRead(on) => self.image.set_copy_on_read(on),
        }
        self.shared.lock().ops += 1;
    }

    /// I5: what fills an image may fail by "no space" as it likes, the read does not.
    fn reads_may_fail(&self) -> bool {
        self.faults.behind_for_good() || hits(&self.faults.own, &OF_READS) > 0
    }

    /// I7: what a guest writes never waits for the origin, but for memory.
    async fn at_once<T>(&self, work: impl Future<Output = T>) -> T {
        let begin = self.rt.now();
        let done = work.await;
        let waited = self.rt.now() - begin;
        assert!(
            !self.faults.punctual || self.faults.scarce || waited.is_zero(),
            "a write waited for {waited:?}"
        );
        done
    }

    fn may_fail(&self, what: &str, error: Option<DeviceError>, may: bool) {
        if let Some(error) = error {
            assert!(may, "{what} failed, and nothing was wrong: {error}");
        }
    }

    async fn read(&self, first: u64, count: u64) {
        let begin = self.shared.lock().model.begin_read();
        let (offset, len) = (first * self.cell, (count * self.cell) as usize);
        let mut buf = vec![0xee; len];
        let read = match self.disk.read_now(offset, &mut buf) {
            Some(read) => read.map(|()| Bytes::from(buf)),
            None => self.disk.read(offset, len).await,
        };
        let mut shared = self.shared.lock();
        match read {
            Ok(bytes) => {
                assert_eq!(bytes.len(), len);
                shared.digest.add_bytes(&bytes);
                shared.model.end_read(first, &bytes, begin);
            }
            Err(error) => {
                shared.model.drop_read(begin);
                drop(shared);
                self.may_fail("read", Some(error), self.reads_may_fail());
            }
        }
    }

    /// Begins, and goes away soon. What is written so may be there at any time from now on.
    async fn abandon(&self, left: Left, first: u64, count: u64) {
        let (offset, len) = (first * self.cell, count * self.cell);
        let patience = self.rt.random();
        let turns = (patience >> 8) % if patience.is_multiple_of(4) { TURNS_MAX } else { FEW_TURNS };
        match left {
            Left::Read => {
                let read = self.disk.read(offset, len as usize);
                let _ = timeout(&self.rt, Duration::from_millis(patience % 20), read).await;
            }
            Left::Write => {
                let (data, _) = self.begin_write(first, count);
                for_turns(turns, self.disk.write(offset, data)).await;
            }
            Left::Zero => {
                self.shared.lock().model.begin_write(first, count, |_| stamp::ZERO);
                for_turns(turns, self.disk.write_zeroes(offset, len, ZeroMode::default())).await;
            }
            Left::Trim => {
                self.shared.lock().model.begin_write(first, count, |_| stamp::ZERO);
                for_turns(turns, self.disk.trim(offset, len)).await;
            }
            Left::Flush => for_turns(turns, self.disk.flush()).await,
        }
    }

    async fn zero(&self, first: u64, count: u64, mode: ZeroMode) {
        let begin = self.shared.lock().model.begin_write(first, count, |_| stamp::ZERO);
        let work = self.disk.write_zeroes(first * self.cell, count * self.cell, mode);
        let zeroed = self.at_once(work).await;
        if mode.only_if_fast && matches!(zeroed, Err(DeviceError::NotFast)) {
            self.shared.lock().model.end_write(first, count, begin, Ended::Maybe);
            return;
        }
        self.wrote("zeroes", zeroed, (first, count), begin, Ended::Done);
    }

    /// The bytes of a write that begins, and its begin.
    fn begin_write(&self, first: u64, count: u64) -> (Bytes, u64) {
        let mut data = vec![0; (count * self.cell) as usize];
        let mut shared = self.shared.lock();
        let write = shared.model.next_write();
        stamp::fill(&mut data, self.cell, first, |at| stamp::of_write(write, at));
        (data.into(), shared.model.begin_write(first, count, |at| stamp::of_write(write, at)))
    }

    async fn write(&self, first: u64, count: u64) -> bool {
        let (data, begin) = self.begin_write(first, count);
        let written = match self.disk.write_now(first * self.cell, &data) {
            Some(written) => written,
            None => self.at_once(self.disk.write(first * self.cell, data)).await,
        };
        self.wrote("write", written, (first, count), begin, Ended::Done)
    }

    /// Who was told of a failed write, or of a failed sync, is told so from now on.
    fn latch(&self, result: &Result<(), DeviceError>) {
        if matches!(result, Err(DeviceError::Io(_))) && self.faults.only_writes_failed() {
            self.faults.latched.store(true, Ordering::Relaxed);
        }
    }

    fn wrote(
        &self,
        what: &str,
        result: Result<(), DeviceError>,
        (first, count): (u64, u64),
        begin: u64,
        done: Ended,
    ) -> bool {
        self.latch(&result);
        let ended = if result.is_ok() { done } else { Ended::Maybe };
        self.shared.lock().model.end_write(first, count, begin, ended);
        let ok = result.is_ok();
        let may = self.faults.own() || (self.faults.scarce && self.faults.behind());
        self.may_fail(what, result.err(), may);
        ok
    }

    async fn flush(&self) {
        let (begin, latched) = (self.shared.lock().model.tick(), self.faults.latched.load(Ordering::Relaxed));
        let result = self.disk.flush().await;
        // I5: once a write or a sync failed, no flush says that all is well.
        assert!(!latched || result.is_err(), "a flush went well though a write had failed for good");
        self.latch(&result);
        match result {
            Ok(()) => self.shared.lock().model.end_flush(begin),
            Err(error) => self.may_fail("flush", Some(error), self.faults.own() || self.faults.behind()),
        }
    }

    async fn status(&self, offset: u64, len: u64) {
        let begin = self.shared.lock().model.begin_read();
        let status = self.disk.status(offset, len, 64).await;
        let mut shared = self.shared.lock();
        shared.model.drop_read(begin);
        match status {
            Ok(extents) => {
                assert!(!extents.is_empty(), "status tells of at least one byte");
                let mut at = offset;
                for extent in extents {
                    assert!(extent.len > 0, "an extent has a byte");
                    if extent.zero {
                        shared.model.are_zeros(at..at + extent.len, begin);
                    }
                    at += extent.len;
                }
                assert!(at <= offset + len, "status tells too much");
            }
            Err(error) => self.may_fail("status", Some(error), self.reads_may_fail()),
        }
    }
}

/// Turns that a guest which goes away waits, at most; and mostly.
const TURNS_MAX: u64 = 400;
const FEW_TURNS: u64 = 6;

/// Polls `work` so many times, and once more, and lets it go.
async fn for_turns<T>(turns: u64, work: impl Future<Output = T>) {
    let mut work = pin!(work);
    let mut left = turns;
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Pending if left > 0 => {
            left -= 1;
            Poll::Pending
        }
        _ => Poll::Ready(()),
    })
    .await;
}
