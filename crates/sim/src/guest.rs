//! Guest: does what the plan says to a disk, one request after the other, and lets the model judge every answer.
//!
//! - A request may fail only if a fault that can do that was met before.
//!
//! Not here: what the answers may be (`model`).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use readonce_disk::{BlockDevice, DeviceError, Disk, Image, ZeroMode};
use readonce_storage::{Rt, SimFile, runtime::timeout, sim::Fault};
use readonce_testkit::exec::Digest;

use crate::{
    model::{Ended, Model},
    plan::Op,
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
        let kinds = if self.lazy { &ALL[..] } else { &[Fault::Eio] };
        self.server.fault_hits() > 0 || hits(&self.below, kinds) > 0
    }

    /// The guests' image met a fault of its disk.
    pub fn own(&self) -> bool {
        hits(&self.own, &ALL) > 0
    }

    /// Any disk met a fault.
    pub fn disk(&self) -> bool {
        self.own() || hits(&self.below, &ALL) > 0
    }
}

const ALL: [Fault; 3] = [Fault::Eio, Fault::NoSpace, Fault::SyncFails];

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
            Op::Abandon(at, count) => self.abandon(at, count).await,
            Op::Write(at, count) => {
                self.write(at, count).await;
            }
            Op::WriteThrough(at, count) => {
                if self.write(at, count).await {
                    self.flush().await;
                }
            }
            Op::Zero(at, count, keep_space) => {
                let begin = self.shared.lock().model.begin_write(at, count, |_| stamp::ZERO);
                let mode = ZeroMode { keep_space, only_if_fast: false };
                let zeroed = self.disk.write_zeroes(at * self.cell, count * self.cell, mode).await;
                self.wrote("zeroes", zeroed, (at, count), begin, Ended::Done);
            }
            Op::Trim(at, count) => {
                let begin = self.shared.lock().model.begin_write(at, count, |_| stamp::ZERO);
                let trimmed = self.disk.trim(at * self.cell, count * self.cell).await;
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
        self.faults.behind() || hits(&self.faults.own, &[Fault::Eio]) > 0
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

    async fn abandon(&self, first: u64, count: u64) {
        let read = self.disk.read(first * self.cell, (count * self.cell) as usize);
        let patience = Duration::from_millis(self.rt.random() % 20);
        let _ = timeout(&self.rt, patience, read).await;
    }

    async fn write(&self, first: u64, count: u64) -> bool {
        let mut data = vec![0; (count * self.cell) as usize];
        let begin = {
            let mut shared = self.shared.lock();
            let write = shared.model.next_write();
            stamp::fill(&mut data, self.cell, first, |at| stamp::of_write(write, at));
            shared.model.begin_write(first, count, |at| stamp::of_write(write, at))
        };
        let written = match self.disk.write_now(first * self.cell, &data) {
            Some(written) => written,
            None => self.disk.write(first * self.cell, Bytes::from(data)).await,
        };
        self.wrote("write", written, (first, count), begin, Ended::Done)
    }

    fn wrote(
        &self,
        what: &str,
        result: Result<(), DeviceError>,
        (first, count): (u64, u64),
        begin: u64,
        done: Ended,
    ) -> bool {
        let ended = if result.is_ok() { done } else { Ended::Maybe };
        self.shared.lock().model.end_write(first, count, begin, ended);
        let ok = result.is_ok();
        let may = self.faults.own() || (self.faults.scarce && self.faults.behind());
        self.may_fail(what, result.err(), may);
        ok
    }

    async fn flush(&self) {
        let begin = self.shared.lock().model.tick();
        match self.disk.flush().await {
            Ok(()) => self.shared.lock().model.end_flush(begin),
            Err(error) => self.may_fail("flush", Some(error), self.faults.own() || self.faults.behind()),
        }
    }

    async fn status(&self, offset: u64, len: u64) {
        match self.disk.status(offset, len, 64).await {
            Ok(extents) => {
                assert!(!extents.is_empty(), "status tells of at least one byte");
                assert!(extents.iter().all(|extent| extent.len > 0), "an extent has a byte");
                assert!(extents.iter().map(|extent| extent.len).sum::<u64>() <= len, "status tells too much");
            }
            Err(error) => self.may_fail("status", Some(error), self.reads_may_fail()),
        }
    }
}
