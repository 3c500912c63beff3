//! A guest that does random things to a disk, and checks every read against the flat model.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{Rng, rngs::SmallRng};
use readonce_disk::{BlockDevice, DeviceError, Disk, ZeroMode};

use super::{
    model::{Model, Tick},
    origin::{SECTOR, sector, stamp_of},
};

/// What a guest asks for.
#[derive(Debug, Clone, Copy)]
pub enum Request {
    Read,
    Write,
    Zero(ZeroMode),
    Trim,
    Flush,
}

pub struct Guest {
    pub disk: Arc<Disk>,
    pub model: Arc<Mutex<Model>>,
    pub stamps: Arc<Mutex<u64>>,
    pub rng: SmallRng,
    pub cluster_sectors: u64,
    /// Who waits for the memory of other writes may hear that the origin is away.
    pub writes_may_fail: bool,
}

impl Guest {
    fn range(&mut self) -> (u64, u64) {
        let sectors = self.model.lock().sector_count();
        let first = self.rng.random_range(0..sectors);
        // Whole clusters are as common as a few sectors.
        let (first, count) = match self.rng.random_range(0..3) {
            0 => (first, self.rng.random_range(1..4)),
            1 => (first / self.cluster_sectors * self.cluster_sectors, self.cluster_sectors),
            _ => (first, self.rng.random_range(1..self.cluster_sectors * 3)),
        };
        (first, count.min(sectors - first))
    }

    /// One drawn request, to its end.
    pub async fn op(&mut self) {
        let (first, count) = self.range();
        let request = match self.rng.random_range(0..10) {
            0..4 => Request::Read,
            4..7 => Request::Write,
            7 => Request::Zero(ZeroMode { keep_space: self.rng.random(), only_if_fast: false }),
            8 => Request::Trim,
            _ => Request::Flush,
        };
        self.run(request, first, count).await;
    }

    /// This request of these sectors, to its end.
    pub async fn run(&self, request: Request, first: u64, count: u64) {
        let (offset, len) = (first * SECTOR, count * SECTOR);
        match request {
            Request::Read => self.read(first, count).await,
            Request::Write => {
                let stamp = {
                    let mut stamps = self.stamps.lock();
                    *stamps += 1;
                    *stamps
                };
                let data: Vec<u8> = (0..count).flat_map(|_| sector(stamp)).collect();
                let begin = self.model.lock().begin_write(first, count, stamp, false);
                let written = match self.disk.write_now(offset, &data) {
                    Some(written) => written,
                    None => self.disk.write(offset, Bytes::from(data)).await,
                };
                self.wrote(written, first, count, begin);
            }
            Request::Zero(mode) => {
                let begin = self.model.lock().begin_write(first, count, 0, false);
                let written = self.disk.write_zeroes(offset, len, mode).await;
                self.wrote(written, first, count, begin);
            }
            Request::Trim => {
                let begin = self.model.lock().begin_write(first, count, 0, true);
                let written = self.disk.trim(offset, len).await;
                self.wrote(written, first, count, begin);
            }
            Request::Flush => {
                let begin = self.model.lock().tick();
                // An origin that is away fails a flush with units written in part, and nothing else.
                if self.disk.flush().await.is_ok() {
                    self.model.lock().end_flush(begin);
                }
            }
        }
    }

    fn wrote(&self, written: Result<(), DeviceError>, first: u64, count: u64, begin: Tick) {
        match written {
            Ok(()) => self.model.lock().end_write(first, count, begin),
            // It may have happened.
            Err(error) => assert!(self.writes_may_fail, "the disk has room and no faults: {error}"),
        }
    }

    async fn read(&self, first: u64, count: u64) {
        let begin = self.model.lock().tick();
        let mut buf = vec![0xee; (count * SECTOR) as usize];
        let read = match self.disk.read_now(first * SECTOR, &mut buf) {
            Some(read) => read,
            None => match self.disk.read(first * SECTOR, buf.len()).await {
                Ok(bytes) => {
                    buf.copy_from_slice(&bytes);
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        // The origin may be away.
        if read.is_err() {
            return;
        }
        let model = self.model.lock();
        for (index, bytes) in buf.chunks_exact(SECTOR as usize).enumerate() {
            model.check_read(first + index as u64, stamp_of(bytes), begin);
        }
    }
}
