//! A guest that knows what it must read: a load over NBD with a flat model of the disk beside it.
//!
//! - Each sector's content tells which write it is of. The model keeps for each sector the writes that it may show: the last one
//!   that completed and those under way or failed since; after a crash also those since the last flush.
//! - Workers own pieces of the disk that are smaller than a cluster, so they meet in clusters and in flushes, yet each knows to
//!   the byte what its own sectors hold. Reads go over all, and the owned sectors in them are compared.
//!
//! Not here: power (tests kill the server, or cut its disk), and writes that are not whole sectors.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    Content,
    nbd_client::{NbdClient, NbdError, command_flag},
};

/// Bytes of a sector, the unit of the model.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a piece, which one worker owns: 20 KiB, so that no cluster begins where a piece does.
const PIECE_SECTORS: u64 = 40;
/// Sectors of the longest read.
const READ_SECTORS_MAX: u64 = 256;
/// Bytes of a read when all is compared.
const COMPARE_BYTES: u64 = 256 << 10;

/// NBD_ENOSPC, the same number as Linux's.
const NO_SPACE: u32 = 28;

/// Content of a sector: of the backing, zeros, or of a write.
type Stamp = u64;
const BACKING: Stamp = 0;
const ZEROS: Stamp = 1;

/// The disk as the guest knows it.
pub struct Guest {
    backing: Content,
    sectors: Mutex<Vec<Sector>>,
    stamps: AtomicU64,
}

/// What a sector may hold, in the order of the writes.
struct Sector {
    /// The first was flushed, or has been seen since the crash.
    stamps: Vec<Stamp>,
    /// Index of the last write that completed.
    completed: usize,
}

/// One worker's part.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Which worker, from 0.
    pub worker: u64,
    /// Of how many.
    pub workers: u64,
    /// What it does follows from it.
    pub seed: u64,
    /// Requests, at most.
    pub requests_max: u64,
    /// Of 100 requests, those that write.
    pub writes_percent: u32,
}

/// What a worker did, and which refusals it met: numbers of requests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Reads that gave data, all of it right.
    pub reads: u64,
    /// Writes that completed.
    pub writes: u64,
    /// Flushes that completed.
    pub flushes: u64,
    /// Reads with an error.
    pub reads_failed: u64,
    /// Writes without FUA, with an error that is not "no space".
    pub writes_failed: u64,
    /// Writes without space.
    pub writes_no_space: u64,
    /// Flushes with an error, and writes with FUA, which hold one: of these nobody knows which part failed.
    pub flushes_failed: u64,
    /// Whether the server went away.
    pub is_cut: bool,
}

impl Tally {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            flushes: self.flushes + other.flushes,
            reads_failed: self.reads_failed + other.reads_failed,
            writes_failed: self.writes_failed + other.writes_failed,
            writes_no_space: self.writes_no_space + other.writes_no_space,
            flushes_failed: self.flushes_failed + other.flushes_failed,
            is_cut: self.is_cut || other.is_cut,
        }
    }
}

/// Whether the server answered at all.
enum Answer<T> {
    Given(T),
    Refused(u32),
    Gone,
}

/// A wrong byte, or a broken protocol, in words.
pub type Wrong = String;

impl Guest {
    /// A disk that shows `backing`, whole sectors of it.
    pub fn new(backing: Content) -> Self {
        let count = backing.len() / SECTOR_BYTES;
        let sectors = (0..count).map(|_| Sector { stamps: vec![BACKING], completed: 0 }).collect();
        Self { backing, sectors: Mutex::new(sectors), stamps: AtomicU64::new(ZEROS + 1) }
    }

    /// Sends requests until `part` is done, `stop` is set, or the server is gone.
    ///
    /// # Errors
    /// The first wrong byte.
    pub async fn work(&self, client: &NbdClient, part: Part, stop: &AtomicBool) -> Result<Tally, Wrong> {
        let mut random = SmallRng::seed_from_u64(part.seed ^ (part.worker << 32));
        let mut tally = Tally::default();
        let mut requests = 0;
        while requests < part.requests_max && !tally.is_cut && !stop.load(Ordering::Relaxed) {
            requests += 1;
            if random.random_ratio(part.writes_percent, 100) {
                self.change(client, &mut random, part, &mut tally).await?;
            } else if random.random_ratio(10, 100) {
                self.flush(client, part, &mut tally).await?;
            } else {
                let first = random.random_range(0..self.sector_count());
                let last = first + random.random_range(1..=READ_SECTORS_MAX);
                self.read(client, first..last.min(self.sector_count()), part, &mut tally).await?;
            }
        }
        Ok(tally)
    }

    /// Reads everything, compares it with what may be there after a crash, and takes what is there for certain from now on.
    ///
    /// # Errors
    /// The first wrong byte, or a read that failed.
    pub async fn compare_all(&self, client: &NbdClient) -> Result<(), Wrong> {
        let end = self.sector_count() * SECTOR_BYTES;
        let mut offset = 0;
        while offset < end {
            let len = COMPARE_BYTES.min(end - offset);
            let data = client.read(offset, len as usize).await;
            let data = data.map_err(|error| format!("reading {len} bytes at {offset}: {error}"))?;
            let first = offset / SECTOR_BYTES;
            let mut sectors = self.sectors.lock();
            for (index, data) in (first..).zip(data.chunks_exact(SECTOR_BYTES as usize)) {
                let sector = &mut sectors[index as usize];
                let stamp = self.matching(index, data, &sector.stamps)?;
                *sector = Sector { stamps: vec![stamp], completed: 0 };
            }
            offset += len;
        }
        Ok(())
    }

    /// Writes all sectors of all pieces of `part`, the whole of each piece at once.
    ///
    /// # Errors
    /// A write that failed.
    pub async fn write_all(&self, client: &NbdClient, part: Part) -> Result<(), Wrong> {
        let mut tally = Tally::default();
        for piece in self.pieces(part) {
            self.write(client, piece, 0, &mut tally).await?;
        }
        let failed = tally.writes_failed + tally.writes_no_space;
        if failed > 0 || tally.is_cut { Err(format!("writing all: {tally:?}")) } else { Ok(()) }
    }

    fn sector_count(&self) -> u64 {
        self.backing.len() / SECTOR_BYTES
    }

    fn pieces(&self, part: Part) -> impl Iterator<Item = Range<u64>> {
        let count = self.sector_count();
        (0..count.div_ceil(PIECE_SECTORS))
            .filter(move |piece| is_of(*piece, part))
            .map(move |piece| piece * PIECE_SECTORS..((piece + 1) * PIECE_SECTORS).min(count))
    }

    /// A write or a zero-write somewhere in a piece of its own.
    async fn change(
        &self,
        client: &NbdClient,
        random: &mut SmallRng,
        part: Part,
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        let mine = self.pieces(part).count() as u64;
        let piece = random.random_range(0..mine) * part.workers + part.worker;
        let start = piece * PIECE_SECTORS;
        let end = (start + PIECE_SECTORS).min(self.sector_count());
        let first = random.random_range(start..end);
        let range = first..random.random_range(first + 1..=end);
        let fua = if random.random_ratio(5, 100) { command_flag::FUA } else { 0 };
        if random.random_ratio(15, 100) {
            let no_hole = if random.random_ratio(50, 100) { command_flag::NO_HOLE } else { 0 };
            self.write_zeroes(client, range, fua | no_hole, tally).await
        } else {
            self.write(client, range, fua, tally).await
        }
    }

    async fn write(
        &self,
        client: &NbdClient,
        range: Range<u64>,
        flags: u16,
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        let stamp = self.stamps.fetch_add(1, Ordering::Relaxed);
        self.begin(&range, stamp);
        let mut data = Vec::with_capacity(((range.end - range.start) * SECTOR_BYTES) as usize);
        for index in range.clone() {
            data.extend_from_slice(&self.sector_bytes(index, stamp));
        }
        let answer = answer(client.write(range.start * SECTOR_BYTES, &data, flags).await)?;
        self.written(&range, flags, answer, tally);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        client: &NbdClient,
        range: Range<u64>,
        flags: u16,
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        self.begin(&range, ZEROS);
        let len = (range.end - range.start) * SECTOR_BYTES;
        let answer = answer(client.write_zeroes(range.start * SECTOR_BYTES, len, flags).await)?;
        self.written(&range, flags, answer, tally);
        Ok(())
    }

    fn begin(&self, range: &Range<u64>, stamp: Stamp) {
        for sector in &mut self.sectors.lock()[range.start as usize..range.end as usize] {
            sector.stamps.push(stamp);
        }
    }

    fn written(&self, range: &Range<u64>, flags: u16, answer: Answer<()>, tally: &mut Tally) {
        match answer {
            Answer::Given(()) => tally.writes += 1,
            Answer::Refused(errno) if errno == NO_SPACE => tally.writes_no_space += 1,
            Answer::Refused(_) if flags & command_flag::FUA != 0 => tally.flushes_failed += 1,
            Answer::Refused(_) => tally.writes_failed += 1,
            Answer::Gone => tally.is_cut = true,
        }
        if matches!(answer, Answer::Given(())) {
            for sector in &mut self.sectors.lock()[range.start as usize..range.end as usize] {
                sector.completed = sector.stamps.len() - 1;
                if flags & command_flag::FUA != 0 {
                    sector.flushed();
                }
            }
        }
    }

    async fn flush(&self, client: &NbdClient, part: Part, tally: &mut Tally) -> Result<(), Wrong> {
        match answer(client.flush().await)? {
            Answer::Given(()) => {
                tally.flushes += 1;
                // A worker does one thing at a time: its own writes completed before the flush began.
                let mut sectors = self.sectors.lock();
                for piece in self.pieces(part) {
                    sectors[piece.start as usize..piece.end as usize].iter_mut().for_each(Sector::flushed);
                }
            }
            Answer::Refused(_) => tally.flushes_failed += 1,
            Answer::Gone => tally.is_cut = true,
        }
        Ok(())
    }

    async fn read(
        &self,
        client: &NbdClient,
        range: Range<u64>,
        part: Part,
        tally: &mut Tally,
    ) -> Result<(), Wrong> {
        let len = (range.end - range.start) * SECTOR_BYTES;
        let data = match answer(client.read(range.start * SECTOR_BYTES, len as usize).await)? {
            Answer::Given(data) => data,
            Answer::Refused(_) => {
                tally.reads_failed += 1;
                return Ok(());
            }
            Answer::Gone => {
                tally.is_cut = true;
                return Ok(());
            }
        };
        tally.reads += 1;
        let sectors = self.sectors.lock();
        for (index, data) in range.zip(data.chunks_exact(SECTOR_BYTES as usize)) {
            if is_of(index / PIECE_SECTORS, part) {
                let sector = &sectors[index as usize];
                self.matching(index, data, &sector.stamps[sector.completed..])?;
            }
        }
        Ok(())
    }

    /// Which of `stamps` it is; the newest first, because it is the likeliest.
    fn matching(&self, index: u64, data: &[u8], stamps: &[Stamp]) -> Result<Stamp, Wrong> {
        let found = stamps.iter().rev().find(|stamp| self.sector_bytes(index, **stamp) == data);
        found.copied().ok_or_else(|| {
            let is = if data.iter().all(|byte| *byte == 0) {
                "zeros".to_owned()
            } else if self.sector_bytes(index, BACKING) == data {
                "the backing's".to_owned()
            } else {
                let first = u64::from_le_bytes(data[..8].try_into().expect("8 bytes"));
                format!("perhaps of write {}", first ^ mixed(index))
            };
            format!("sector {index} is {is}, and may be of writes {stamps:?} (0: the backing, 1: zeros)")
        })
    }

    fn sector_bytes(&self, index: u64, stamp: Stamp) -> [u8; SECTOR_BYTES as usize] {
        let mut bytes = [0; SECTOR_BYTES as usize];
        match stamp {
            BACKING => self.backing.fill(index * SECTOR_BYTES, &mut bytes),
            ZEROS => {}
            _ => {
                // The first word tells stamp and place, the others make each word of the sector differ.
                let mut word = stamp ^ mixed(index);
                for piece in bytes.chunks_exact_mut(8) {
                    piece.copy_from_slice(&word.to_le_bytes());
                    word = mixed(word);
                }
            }
        }
        bytes
    }
}

impl Sector {
    /// What was overwritten before the flush cannot come back.
    fn flushed(&mut self) {
        self.stamps.drain(..self.completed);
        self.completed = 0;
    }
}

fn is_of(piece: u64, part: Part) -> bool {
    piece % part.workers == part.worker
}

fn answer<T>(result: Result<T, NbdError>) -> Result<Answer<T>, Wrong> {
    match result {
        Ok(value) => Ok(Answer::Given(value)),
        Err(NbdError::Closed(_)) => Ok(Answer::Gone),
        Err(error) => error.errno().map(Answer::Refused).ok_or_else(|| error.to_string()),
    }
}

/// One step of splitmix64.
fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
