//! A request that has to wait: a task of its own, and how its result comes back to its connection.
//!
//! - A ticket always comes back, also when its task panics or is aborted: no slot and no bytes in flight are lost.
//! - The queue of results is the connection's own; no lock is shared between connections.
//! - Tasks that change nothing are aborted when their connection ends; writes run to their end.
//!
//! Not here: who may start one (`connection`), bytes on the wire.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use readonce_disk::{BlockDevice, DeviceError, ZeroMode};

use super::{
    errno::{Errno, device_errno},
    pool::Held,
    status::Query,
};

/// What a task has to do.
pub(super) enum Job {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Bytes, fua: bool },
    Flush,
    Trim { offset: u64, len: u64, fua: bool },
    Cache { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, mode: ZeroMode, fua: bool },
    BlockStatus(Query),
}

impl Job {
    /// Whether nothing is lost when it is aborted half-way.
    pub fn changes_nothing(&self) -> bool {
        matches!(self, Job::Read { .. } | Job::Cache { .. } | Job::BlockStatus(_))
    }

    /// Does it, and gives `ticket` back.
    pub async fn run(self, device: Arc<dyn BlockDevice>, ticket: Ticket) {
        let outcome = match self.outcome(&*device).await {
            Ok(outcome) => outcome,
            Err(error) => Outcome::failed(&error),
        };
        ticket.complete(outcome);
    }

    async fn outcome(self, device: &dyn BlockDevice) -> Result<Outcome, DeviceError> {
        let fua = match self {
            Job::Read { offset, len } => {
                let data = device.read(offset, len).await?;
                if data.len() != len {
                    return Err(DeviceError::Io(format!("the device gave {} bytes of {len}", data.len())));
                }
                return Ok(Outcome::Data(data));
            }
            Job::BlockStatus(query) => {
                let extents = device.status(query.offset, query.len, query.count_max()).await?;
                let nothing = || DeviceError::Io(format!("the device knows no status at {}", query.offset));
                return Ok(Outcome::Chunks(query.reply(&extents).ok_or_else(nothing)?.into()));
            }
            Job::Write { offset, data, fua } => {
                device.write(offset, data).await?;
                fua
            }
            Job::Trim { offset, len, fua } => {
                device.trim(offset, len).await?;
                fua
            }
            Job::WriteZeroes { offset, len, mode, fua } => {
                device.write_zeroes(offset, len, mode).await?;
                fua
            }
            Job::Cache { offset, len } => {
                device.cache(offset, len).await?;
                false
            }
            Job::Flush => true,
        };
        if fua {
            device.flush().await?;
        }
        Ok(Outcome::Done)
    }
}

/// How a request ended.
pub(super) enum Outcome {
    /// Without data.
    Done,
    /// A read's data.
    Data(Bytes),
    /// A reply whose chunks are already made.
    Chunks(Bytes),
    Failed {
        errno: Errno,
        text: String,
    },
    /// Nobody waits for it any more, or its task broke, which is told elsewhere.
    Abandoned,
}

impl Outcome {
    pub fn failed(error: &DeviceError) -> Self {
        Outcome::Failed { errno: device_errno(error), text: error.to_string() }
    }
}

/// The result of one task.
pub(super) struct Completion {
    pub cookie: u64,
    /// The request's, bytes.
    pub offset: u64,
    /// The request's, bytes.
    pub len: u64,
    /// The place in the connection's table of tasks.
    pub slot: usize,
    /// Bytes that were counted as in flight for it.
    pub charge: usize,
    /// Those of them that are of the pool.
    pub held: Held,
    pub outcome: Outcome,
}

/// What a connection shares with its tasks and with the server.
#[derive(Default)]
pub(super) struct Mailbox {
    completions: Mutex<Vec<Completion>>,
    has_completions: AtomicBool,
    stopping: AtomicBool,
    /// The connection's task.
    pub waker: AtomicWaker,
}

impl Mailbox {
    /// Tells the connection to end once its requests are answered.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.waker.wake();
    }

    #[inline]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    #[inline]
    pub fn has_completions(&self) -> bool {
        self.has_completions.load(Ordering::Acquire)
    }

    /// Swaps what has come with the empty `into`, so that both keep their memory.
    pub fn collect(&self, into: &mut Vec<Completion>) {
        let mut completions = self.completions.lock();
        self.has_completions.store(false, Ordering::Release);
        std::mem::swap(&mut *completions, into);
    }

    fn put(&self, completion: Completion) {
        let mut completions = self.completions.lock();
        completions.push(completion);
        self.has_completions.store(true, Ordering::Release);
        drop(completions);
        self.waker.wake();
    }
}

/// A task's right to be in flight.
pub(super) struct Ticket {
    pub mailbox: Arc<Mailbox>,
    pub cookie: u64,
    pub offset: u64,
    pub len: u64,
    pub slot: usize,
    pub charge: usize,
    pub held: Held,
    pub is_open: bool,
}

impl Ticket {
    fn complete(mut self, outcome: Outcome) {
        self.give_back(outcome);
    }

    fn give_back(&mut self, outcome: Outcome) {
        self.is_open = false;
        self.mailbox.put(Completion {
            cookie: self.cookie,
            offset: self.offset,
            len: self.len,
            slot: self.slot,
            charge: self.charge,
            held: std::mem::take(&mut self.held),
            outcome,
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_open {
            self.give_back(Outcome::Abandoned);
        }
    }
}
