//! A storm of random racing requests on one server, judged by the model.
//!
//! - It moves through the disk: at every moment all workers are in a window of a few clusters, most of which are being
//!   fetched just now.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_testkit::nbd_client::{NbdClient, NbdError};

use super::race_model::{Model, SECTOR, backing_stamp, stamped};
use super::{SEND_TRIM, SEND_WRITE_ZEROES};
use crate::image::CLUSTER;

const CONNECTIONS: usize = 4;
const WORKERS: usize = 16;
/// Clusters that the workers are in at a time.
const WINDOW: u64 = 24;
const CLUSTER_SECTORS: u64 = CLUSTER / SECTOR;

/// A disk under a storm.
pub struct Storm {
    sectors: u64,
    requests: u64,
    model: Mutex<Model>,
    done: AtomicU64,
    wrong: AtomicU64,
}

impl Storm {
    /// `requests` on a disk of `size` bytes.
    pub fn new(size: u64, requests: u64) -> Arc<Self> {
        let sectors = size / SECTOR;
        Arc::new(Self {
            sectors,
            requests,
            model: Mutex::new(Model::new(sectors)),
            done: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
        })
    }

    /// The bytes of the backing.
    pub fn backing(size: u64) -> Vec<u8> {
        (0..size / SECTOR).flat_map(|sector| stamped(backing_stamp(sector), 1)).collect()
    }

    /// Requests that were answered so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed).min(self.requests)
    }

    /// Sectors that read as what they cannot be.
    pub fn wrong(&self) -> u64 {
        self.wrong.load(Ordering::Relaxed)
    }

    /// The first of them, in words.
    pub fn first_wrong(&self) -> Option<String> {
        self.model.lock().first_wrong().map(str::to_owned)
    }

    /// Runs it over `clients`, and reads everything at the end.
    ///
    /// # Errors
    /// The first request that failed.
    pub async fn rage(self: &Arc<Self>, clients: &[NbdClient], seed: u64) -> Result<(), NbdError> {
        let workers = clients.iter().flat_map(|client| std::iter::repeat_n(client.clone(), WORKERS)).zip(0..);
        let workers = workers.map(|(client, worker)| {
            let storm = Arc::clone(self);
            tokio::spawn(async move {
                let mut rng = SmallRng::seed_from_u64(seed << 16 | worker);
                while storm.done.fetch_add(1, Ordering::Relaxed) < storm.requests {
                    storm.request(&client, &mut rng).await?;
                }
                Ok::<(), NbdError>(())
            })
        });
        for ended in join_all(workers).await {
            ended.map_err(|error| NbdError::Closed(error.to_string()))??;
        }
        clients[0].flush().await?;
        self.read_all(&clients[0]).await
    }

    /// Reads and judges the whole disk.
    pub async fn read_all(&self, client: &NbdClient) -> Result<(), NbdError> {
        let step = 16 * CLUSTER_SECTORS;
        for first in (0..self.sectors).step_by(step as usize) {
            self.read(client, first, step.min(self.sectors - first)).await?;
        }
        Ok(())
    }

    async fn read(&self, client: &NbdClient, first: u64, count: u64) -> Result<(), NbdError> {
        let begin = self.model.lock().begin_read();
        let data = client.read(first * SECTOR, (count * SECTOR) as usize).await?;
        let wrong = self.model.lock().end_read(first, &data, begin);
        self.wrong.fetch_add(wrong, Ordering::Relaxed);
        Ok(())
    }

    async fn request(&self, client: &NbdClient, rng: &mut SmallRng) -> Result<(), NbdError> {
        let (first, count) = self.place(rng);
        let (offset, len) = (first * SECTOR, count * SECTOR);
        let mut kind = rng.random_range(0..100);
        // A server that cannot do it is not asked to.
        if (80..90).contains(&kind) && client.flags() & SEND_WRITE_ZEROES == 0
            || kind >= 90 && client.flags() & SEND_TRIM == 0
        {
            kind -= 40;
        }
        if kind < 45 {
            return self.read(client, first, count).await;
        }
        if kind < 48 {
            return client.flush().await;
        }
        let (stamp, begin) = {
            let mut model = self.model.lock();
            let stamp = if kind < 80 { model.new_stamp() } else { 0 };
            (stamp, model.begin_write(first, count, stamp, kind >= 90))
        };
        match kind {
            ..80 => client.write(offset, &stamped(stamp, count), 0).await?,
            80..90 => client.write_zeroes(offset, len, 0).await?,
            _ => client.trim(offset, len, 0).await?,
        }
        self.model.lock().end_write(first, count, begin);
        Ok(())
    }

    /// First sector and count: mostly a few sectors, sometimes whole clusters, within the window.
    fn place(&self, rng: &mut SmallRng) -> (u64, u64) {
        let clusters = self.sectors / CLUSTER_SECTORS;
        let window = (clusters - WINDOW) * self.done() / self.requests;
        let cluster = window + rng.random_range(0..WINDOW);
        if rng.random_range(0..10) == 0 {
            let count = rng.random_range(1..=2).min(clusters - cluster);
            return (cluster * CLUSTER_SECTORS, count * CLUSTER_SECTORS);
        }
        let first = cluster * CLUSTER_SECTORS + rng.random_range(0..CLUSTER_SECTORS);
        let count_max = if rng.random() { 8 } else { CLUSTER_SECTORS };
        let count = rng.random_range(1..=count_max);
        (first, count.min(self.sectors - first))
    }
}

/// Connections of a storm.
pub async fn clients(server: &crate::server::Server) -> Result<Vec<NbdClient>, NbdError> {
    futures_util::future::try_join_all((0..CONNECTIONS).map(|_| server.connect())).await
}
