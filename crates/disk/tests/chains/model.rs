//! The flat model: what a disk must read as, and random use of the disk against it.

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::join_all;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::{BlockDevice, ZeroMode};

use super::place::{try_read, try_write};

/// Requests in flight at once, at most.
const BESIDE_MAX: usize = 4;
/// Bytes of one request, at most; some are whole clusters, most are not.
const REQUEST_BYTES_MAX: u64 = 40_000;

/// What a disk must read as.
pub struct Model {
    pub bytes: Vec<u8>,
    rng: SmallRng,
}

/// One request. Requests made at the same time do not overlap.
enum Request {
    Read(Range<u64>, Vec<u8>),
    Write(u64, Bytes),
    Zero(Range<u64>, ZeroMode),
    Trim(Range<u64>),
    Cache(Range<u64>),
    Flush,
}

impl Model {
    /// A disk of `size` bytes that shows `backing`, and zeros behind its end.
    pub fn over(seed: u64, backing: &[u8], size: u64) -> Self {
        let mut bytes = backing.to_vec();
        bytes.resize(size as usize, 0);
        Self { bytes, rng: SmallRng::seed_from_u64(seed) }
    }

    /// A random use of the disk, some requests beside each other; every read is checked.
    pub async fn use_disk(&mut self, disk: &dyn BlockDevice, rounds: usize) {
        assert_eq!(disk.size(), self.bytes.len() as u64);
        for _ in 0..rounds {
            let requests = self.draw();
            let trimmed: Vec<_> = requests.iter().filter_map(Request::trimmed).collect();
            join_all(requests.into_iter().map(|request| request.run(disk))).await;
            for range in trimmed {
                self.adopt_trimmed(disk, range).await;
            }
        }
    }

    /// Reads all of it, in pieces of a drawn length.
    pub async fn check_all(&mut self, disk: &dyn BlockDevice) {
        let size = self.bytes.len() as u64;
        let mut at = 0;
        while at < size {
            let end = (at + self.rng.random_range(1..=REQUEST_BYTES_MAX)).min(size);
            let expected = self.bytes[at as usize..end as usize].to_vec();
            Request::Read(at..end, expected).run(disk).await;
            at = end;
        }
    }

    /// Requests for ranges that do not overlap; the model shows their effect already.
    fn draw(&mut self) -> Vec<Request> {
        let size = self.bytes.len() as u64;
        let count = self.rng.random_range(1..=BESIDE_MAX);
        let share = size / count as u64;
        let first = self.rng.random_range(0..size);
        let mut requests = Vec::new();
        for index in 0..count as u64 {
            // Each request has a part of the disk to itself; the parts begin anywhere.
            let begin = first.wrapping_add(index * share) % size;
            let room = share.min(size - begin);
            if room == 0 {
                continue;
            }
            let start = begin + self.rng.random_range(0..room);
            let len = self.rng.random_range(1..=(begin + room - start).min(REQUEST_BYTES_MAX));
            requests.push(self.draw_request(start..start + len));
        }
        requests
    }

    fn draw_request(&mut self, range: Range<u64>) -> Request {
        let inside = range.start as usize..range.end as usize;
        match self.rng.random_range(0..100) {
            0..40 => Request::Read(range, self.bytes[inside].to_vec()),
            40..75 => {
                let stamp = self.rng.random_range(1..=255);
                self.bytes[inside.clone()].fill(stamp);
                Request::Write(range.start, Bytes::from(vec![stamp; inside.len()]))
            }
            75..85 => {
                self.bytes[inside].fill(0);
                Request::Zero(range, ZeroMode { keep_space: self.rng.random(), only_if_fast: false })
            }
            85..90 => Request::Trim(range),
            90..94 => Request::Cache(range),
            _ => Request::Flush,
        }
    }

    /// What is trimmed reads as before, or as zeros: whichever the disk chose is what it must read as from now on.
    async fn adopt_trimmed(&mut self, disk: &dyn BlockDevice, range: Range<u64>) {
        let read = try_read(disk, range.clone()).await.expect("a read after a trim");
        let model = &mut self.bytes[range.start as usize..range.end as usize];
        for (index, (known, read)) in model.iter_mut().zip(read).enumerate() {
            let at = range.start + index as u64;
            assert!(read == *known || read == 0, "byte {at} was {known:#x} before a trim and is {read:#x}");
            *known = read;
        }
    }
}

impl Request {
    fn trimmed(&self) -> Option<Range<u64>> {
        match self {
            Self::Trim(range) => Some(range.clone()),
            _ => None,
        }
    }

    async fn run(self, disk: &dyn BlockDevice) {
        let len = |range: &Range<u64>| range.end - range.start;
        let done = match &self {
            Self::Read(range, expected) => {
                try_read(disk, range.clone()).await.map(|read| assert_same_at(range.start, &read, expected))
            }
            Self::Write(offset, data) => try_write(disk, *offset, data.clone()).await,
            Self::Zero(range, mode) => disk.write_zeroes(range.start, len(range), *mode).await,
            Self::Trim(range) => disk.trim(range.start, len(range)).await,
            Self::Cache(range) => disk.cache(range.start, len(range)).await,
            Self::Flush => disk.flush().await,
        };
        done.unwrap_or_else(|error| panic!("a request failed: {error}"));
    }
}

/// The bytes of a whole disk are these.
#[track_caller]
pub fn assert_same(read: &[u8], expected: &[u8]) {
    assert_same_at(0, read, expected);
}

#[track_caller]
fn assert_same_at(offset: u64, read: &[u8], expected: &[u8]) {
    assert_eq!(read.len(), expected.len());
    if let Some(index) = read.iter().zip(expected).position(|(read, expected)| read != expected) {
        panic!("byte {} reads {:#x}, not {:#x}", offset + index as u64, read[index], expected[index]);
    }
}
