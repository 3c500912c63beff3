//! The guest of the demo: an NBD client that reads like a machine that starts, writes beside it, then reads everything.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_testkit::nbd_client::{ConnectOptions, NbdClient};
use tokio::task::JoinSet;

use super::{
    failed,
    model::{BLOCK_BYTES, Model},
};
use crate::failure::Failure;

/// Requests at once while it starts.
const BOOT_DEPTH: u64 = 8;
/// Requests of each of these.
const BOOT_STEPS: u64 = 60;
/// Bytes of a cluster.
const CLUSTER_BYTES: u64 = 64 << 10;
/// Bytes of one request when everything is read.
const READ_BYTES: u64 = 512 << 10;
/// Such requests at once: more than the link holds in a round trip, so that it is never idle.
const READ_DEPTH: u64 = 16;

/// What came of the start.
pub struct Booted {
    /// Reads that were compared.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// The longest that a write took.
    pub slowest_write: Duration,
}

/// The client.
pub struct Guest {
    client: NbdClient,
    model: Arc<Model>,
    seed: u64,
}

impl Guest {
    /// Connects.
    pub async fn connect(socket: &Path, model: Arc<Model>, seed: u64) -> Result<Self, Failure> {
        let client = NbdClient::connect_unix(socket, &ConnectOptions::default())
            .await
            .map_err(|error| failed("connect", error))?;
        if client.size() != model.len() {
            return Err(failed(
                "connect",
                format!("the disk has {} bytes, not {}", client.size(), model.len()),
            ));
        }
        Ok(Self { client, model, seed })
    }

    /// Short runs of reads all over the disk; beside some, a write into the cluster that is being fetched.
    pub async fn boot(&self) -> Result<Booted, Failure> {
        let mut tasks = JoinSet::new();
        for task in 0..BOOT_DEPTH {
            let (client, model) = (self.client.clone(), Arc::clone(&self.model));
            let mut random = SmallRng::seed_from_u64(self.seed.wrapping_mul(BOOT_DEPTH).wrapping_add(task));
            tasks.spawn(async move {
                let mut booted = Booted { reads: 0, writes: 0, slowest_write: Duration::ZERO };
                for _ in 0..BOOT_STEPS {
                    let clusters = model.len() / CLUSTER_BYTES;
                    // Half of it near the start, as of a disk with a system on it.
                    let bound = if random.random_bool(0.5) { clusters / 8 } else { clusters };
                    let cluster = random.random_range(0..bound) * CLUSTER_BYTES;
                    let start = cluster + random.random_range(0..16) * BLOCK_BYTES;
                    let len = random.random_range(1..=16) * BLOCK_BYTES;
                    let read = start..(start + len).min(model.len());
                    let written = match random.random_range(0..4) {
                        0 => Some(cluster..cluster + CLUSTER_BYTES),
                        1 | 2 => {
                            let at = cluster + random.random_range(0..14) * BLOCK_BYTES;
                            Some(at..at + random.random_range(1..=2) * BLOCK_BYTES)
                        }
                        _ => None,
                    };
                    let (done, wrote) = tokio::join!(read_one(&client, &model, read), async {
                        match written {
                            Some(range) => write_one(&client, &model, range).await,
                            None => Ok(None),
                        }
                    });
                    done?;
                    booted.reads += 1;
                    if let Some(took) = wrote? {
                        booted.writes += 1;
                        booted.slowest_write = booted.slowest_write.max(took);
                    }
                }
                Ok::<_, Failure>(booted)
            });
        }
        let mut all = Booted { reads: 0, writes: 0, slowest_write: Duration::ZERO };
        while let Some(task) = tasks.join_next().await {
            let booted = task.map_err(|error| failed("the guest", error))??;
            all.reads += booted.reads;
            all.writes += booted.writes;
            all.slowest_write = all.slowest_write.max(booted.slowest_write);
        }
        Ok(all)
    }

    /// Reads and compares every byte; gives their number.
    pub async fn read_everything(&self) -> Result<u64, Failure> {
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..READ_DEPTH {
            let (client, model, next) = (self.client.clone(), Arc::clone(&self.model), Arc::clone(&next));
            tasks.spawn(async move {
                let mut read = 0;
                loop {
                    let start = next.fetch_add(READ_BYTES, Ordering::Relaxed);
                    if start >= model.len() {
                        return Ok::<u64, Failure>(read);
                    }
                    let range = start..(start + READ_BYTES).min(model.len());
                    read += range.end - range.start;
                    read_one(&client, &model, range).await?;
                }
            });
        }
        let mut all = 0;
        while let Some(task) = tasks.join_next().await {
            all += task.map_err(|error| failed("the guest", error))??;
        }
        match all == self.model.len() {
            true => Ok(all),
            false => Err(failed("the guest", format!("{all} bytes were read of {}", self.model.len()))),
        }
    }

    /// Flushes.
    pub async fn flush(&self) -> Result<(), Failure> {
        self.client.flush().await.map_err(|error| failed("flush", error))
    }

    /// Says goodbye.
    pub async fn leave(self) {
        // The server ends the connection; that it is gone already is as well.
        let _ = self.client.disconnect().await;
    }
}

async fn read_one(client: &NbdClient, model: &Model, range: Range<u64>) -> Result<(), Failure> {
    let before = model.before_read(&range);
    let data = client
        .read(range.start, (range.end - range.start) as usize)
        .await
        .map_err(|error| failed(&format!("read at {:#x}", range.start), error))?;
    model.check(range.start, &data, &before).map_err(|error| failed("read", error))
}

/// Writes, unless some of it was written before; gives the time it took.
async fn write_one(
    client: &NbdClient,
    model: &Model,
    range: Range<u64>,
) -> Result<Option<Duration>, Failure> {
    let Some(data) = model.begin_write(range.clone()) else { return Ok(None) };
    let began = Instant::now();
    client
        .write(range.start, &data, 0)
        .await
        .map_err(|error| failed(&format!("write at {:#x}", range.start), error))?;
    let took = began.elapsed();
    model.end_write(range);
    Ok(Some(took))
}
