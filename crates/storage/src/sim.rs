//! A simulated disk with power loss: bytes in memory, and a log of what no sync has covered.
//!
//! - Reads see every write at once. The *stable* bytes change only when a sync succeeds.
//! - After [`SimFile::crash`] each 512-byte sector holds its last synced contents or those after any later write to
//!   it, each sector for itself: writes are lost, torn and reordered. No sector is torn inside, so the log keeps
//!   whole sectors even of shorter writes.
//! - A sync covers what had been done when it began. One that fails loses what it should have covered: a later sync
//!   that succeeds does not bring it back (as the page cache of Linux does it), though reads still show it.
//! - A write whose caller goes away before it is done is under way in the kernel all the same: it is done with one of the operations that
//!   follow, at the latest with the next sync, or never, if the power goes before.
//! - The same calls and seeds give the same bytes. Memory grows with the bytes written, not with their offsets.
//!
//! Not here: time. A caller that wants interleavings sets [`SimFile::set_yields`].

use std::{
    fmt,
    future::poll_fn,
    io,
    ops::Range,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    BoxFuture, ReadAt, Storage,
    sparse::{Image, PAGE},
    sync::Mutex,
};

/// Bytes that a power loss never tears: the sector of every disk since 1981.
const SECTOR: u64 = 512;
/// The longest file, as Linux limits it (`loff_t`).
const LEN_MAX: u64 = i64::MAX as u64;
/// A torn zeroing of more sectors than this is cut once, not sector by sector.
const TORN_SECTORS_MAX: u64 = 4096;

const _: () = assert!(PAGE.is_multiple_of(SECTOR));

/// What an operation fails with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// EIO; hits every operation, reads and syncs too.
    Eio,
    /// ENOSPC; hits what may take space: write, allocate, write_zeroes, set_len.
    NoSpace,
    /// EIO; hits syncs, and what the sync should have covered is lost.
    SyncFails,
    /// The file ends too early: hits reads, with what a driver of files gives that met the end.
    Short,
}

const FAULTS: [Fault; 4] = [Fault::Eio, Fault::NoSpace, Fault::SyncFails, Fault::Short];

/// Of so many operations, one does what was left under way.
const LEFT_ONE_OF: u32 = 16;

/// How long a fault stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// It hits one operation.
    Once,
    /// It hits every later operation too, until [`SimFile::heal`]. `Eio` for good is a machine that died: what
    /// follows changes nothing, and [`SimFile::crash`] shows what is left.
    ForGood,
}

/// How `read_now` and `write_now` answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NowCalls {
    /// They do the work.
    Answer,
    /// Always `None`: the caller takes its waiting path.
    Refuse,
    /// One or the other by this seed.
    Random(u64),
}

/// A simulated file. See the module.
pub struct SimFile {
    inner: Mutex<Inner>,
}

struct Inner {
    /// What reads see.
    now: Image,
    /// What is on the disk for certain.
    stable: Image,
    /// Operations that no sync covered, in order.
    log: Vec<LoggedOp>,
    /// `log[0]`'s number among all logged operations.
    log_start: u64,
    now_calls: NowCalls,
    now_rng: SmallRng,
    yields: Option<Yields>,
    stalls: Option<Stalls>,
    faults: Vec<ArmedFault>,
    /// By fault.
    fault_hits: [u64; FAULTS.len()],
    read_fault_hits: u64,
    /// Writes whose callers went away: where, and what.
    left: Vec<(u64, Bytes)>,
    left_rng: SmallRng,
    op_count: u64,
    sync_count: u64,
}

struct Yields {
    rng: SmallRng,
    count_max: u32,
}

struct Stalls {
    rng: SmallRng,
    of: u32,
    count_max: u32,
}

impl Stalls {
    fn draw(&mut self) -> u32 {
        let stalls = self.rng.random_range(0..self.of) == 0;
        if stalls { self.rng.random_range(0..=self.count_max) } else { 0 }
    }
}

struct ArmedFault {
    fault: Fault,
    /// Operations that it can hit and lets pass.
    passes: u64,
    lasts: Lasts,
}

/// One operation, as sectors.
#[derive(Clone)]
struct LoggedOp {
    pieces: Vec<Piece>,
    resize: Resize,
    /// A sync that should have covered it failed.
    lost_by_sync: bool,
}

#[derive(Clone)]
enum Piece {
    /// Whole sectors from this offset, as they were after the operation.
    Data(u64, Arc<[u8]>),
    /// Whole sectors of zeros.
    Zeros(Range<u64>),
}

#[derive(Clone, Copy)]
enum Resize {
    Keep,
    AtLeast(u64),
    To(u64),
}

/// What kind of operation a fault looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OpKind {
    Read,
    TakesSpace,
    Punch,
    Sync,
}

impl SimFile {
    /// An empty file.
    pub fn new() -> Self {
        Self::from_image(Image::default())
    }

    /// A file of these bytes, all of them stable.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut image = Image::default();
        image.write(0, bytes);
        image.len = bytes.len() as u64;
        Self::from_image(image)
    }

    fn from_image(image: Image) -> Self {
        let inner = Inner {
            now: image.clone(),
            stable: image,
            log: Vec::new(),
            log_start: 0,
            now_calls: NowCalls::Answer,
            now_rng: SmallRng::seed_from_u64(0),
            yields: None,
            stalls: None,
            faults: Vec::new(),
            fault_hits: [0; FAULTS.len()],
            read_fault_hits: 0,
            left: Vec::new(),
            left_rng: SmallRng::seed_from_u64(0x1ef7),
            op_count: 0,
            sync_count: 0,
        };
        Self { inner: Mutex::new(inner) }
    }

    /// The file after a power loss now: the stable bytes, and what `seed` kept of the rest. Faults and modes are not
    /// taken over.
    pub fn crash(&self, seed: u64) -> SimFile {
        let inner = self.inner.lock();
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut image = inner.stable.clone();
        // Most seeds mix everything. The plain cases are where bugs are easiest to read, so they get their share.
        let style = rng.random_range(0..8);
        let count = inner.log.len();
        let prefix = rng.random_range(0..=count);
        for (index, op) in inner.log.iter().enumerate() {
            let fate = match style {
                0 => Fate::Lost,
                1 => Fate::Kept,
                2 if index < prefix => Fate::Kept,
                2 if index == prefix => Fate::Torn,
                2 => Fate::Lost,
                _ => match rng.random_range(0..3) {
                    0 => Fate::Lost,
                    1 => Fate::Kept,
                    _ => Fate::Torn,
                },
            };
            match fate {
                Fate::Lost => {}
                Fate::Kept => image.apply(op),
                Fate::Torn => image.apply_torn(op, &mut rng),
            }
        }
        image.forget_past_end();
        Self::from_image(image)
    }

    /// The file after a power loss that kept, of the unsynced operations in their order, those that `keep` says;
    /// operations are counted from 0, and each is kept or lost as a whole.
    pub fn crash_with(&self, mut keep: impl FnMut(usize) -> bool) -> SimFile {
        let inner = self.inner.lock();
        let mut image = inner.stable.clone();
        inner.log.iter().enumerate().filter(|(index, _)| keep(*index)).for_each(|(_, op)| image.apply(op));
        image.forget_past_end();
        Self::from_image(image)
    }

    /// The whole file as reads see it. For files that fit in memory.
    pub fn contents(&self) -> Vec<u8> {
        let inner = self.inner.lock();
        let mut bytes = vec![0; usize::try_from(inner.now.len).expect("the file fits in memory")];
        inner.now.read(0, &mut bytes);
        bytes
    }

    /// Bytes held in memory for what reads see: pages that were written and not zeroed or punched whole since.
    pub fn resident_bytes(&self) -> u64 {
        self.inner.lock().now.resident_bytes()
    }

    /// Operations that no sync covered.
    pub fn unsynced_count(&self) -> usize {
        self.inner.lock().log.len()
    }

    /// Operations so far, reads and syncs and those that failed included; a `_now` call that answered `None` is none.
    pub fn op_count(&self) -> u64 {
        self.inner.lock().op_count
    }

    /// Syncs so far, those that failed included.
    pub fn sync_count(&self) -> u64 {
        self.inner.lock().sync_count
    }

    /// Makes the `n`th operation from now fail, of those that `fault` can hit; 1 is the next one.
    pub fn fail_nth(&self, n: u64, fault: Fault, lasts: Lasts) {
        assert!(n >= 1, "operations are counted from 1");
        self.inner.lock().faults.push(ArmedFault { fault, passes: n - 1, lasts });
    }

    /// How many operations failed by a fault. None in a whole run: `n` is past its last operation.
    pub fn fault_hits(&self) -> u64 {
        self.inner.lock().fault_hits.iter().sum()
    }

    /// How many of them by this fault.
    pub fn fault_hits_of(&self, fault: Fault) -> u64 {
        let inner = self.inner.lock();
        FAULTS.iter().zip(inner.fault_hits).find(|(of, _)| **of == fault).map_or(0, |(_, hits)| hits)
    }

    /// How often a fault hit a read.
    pub fn read_fault_hits(&self) -> u64 {
        self.inner.lock().read_fault_hits
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.inner.lock().faults.clear();
    }

    /// How `read_now` and `write_now` answer from now on.
    pub fn set_now_calls(&self, now_calls: NowCalls) {
        let mut inner = self.inner.lock();
        inner.now_calls = now_calls;
        if let NowCalls::Random(seed) = now_calls {
            inner.now_rng = SmallRng::seed_from_u64(seed);
        }
    }

    /// From now on every waiting call lets other tasks run before and after its work, each time up to `count_max`
    /// times by this seed, so that tasks on one thread interleave in many ways.
    pub fn set_yields(&self, seed: u64, count_max: u32) {
        self.inner.lock().yields = Some(Yields { rng: SmallRng::seed_from_u64(seed), count_max });
    }

    /// From now on one of `of` waiting reads and writes lets other tasks run up to `count_max` times before its work, by this
    /// seed: what its caller had looked up may be long gone by then.
    pub fn set_stalls(&self, seed: u64, of: u32, count_max: u32) {
        self.inner.lock().stalls = Some(Stalls { rng: SmallRng::seed_from_u64(seed), of, count_max });
    }

    async fn stall(&self) {
        let left = self.inner.lock().stalls.as_mut().map_or(0, Stalls::draw);
        let_others_run(left).await;
    }

    async fn pause(&self) {
        let left = match &mut self.inner.lock().yields {
            None => 0,
            Some(yields) => yields.rng.random_range(0..=yields.count_max),
        };
        let_others_run(left).await;
    }

    async fn run<T>(&self, work: impl FnOnce(&mut Inner) -> io::Result<T>) -> io::Result<T> {
        self.pause().await;
        let result = work(&mut self.inner.lock());
        self.pause().await;
        result
    }
}

/// A write that was begun. Dropped before it was done, it is left to the kernel.
struct UnderWay<'a> {
    file: &'a SimFile,
    offset: u64,
    data: Bytes,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if !self.data.is_empty() && checked_range(self.offset, self.data.len() as u64).is_ok() {
            self.file.inner.lock().left.push((self.offset, std::mem::take(&mut self.data)));
        }
    }
}

/// Returns after other tasks had so many turns.
async fn let_others_run(mut left: u32) {
    poll_fn(|cx: &mut Context<'_>| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        f.debug_struct("SimFile")
            .field("len", &inner.now.len)
            .field("unsynced", &inner.log.len())
            .field("op_count", &inner.op_count)
            .finish_non_exhaustive()
    }
}

impl Default for SimFile {
    fn default() -> Self {
        Self::new()
    }
}

impl ReadAt for SimFile {
    fn len(&self) -> u64 {
        self.inner.lock().now.len
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        let mut inner = self.inner.lock();
        inner.answers_now().then(|| inner.read(offset, buf))
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move {
            self.stall().await;
            let work = move |inner: &mut Inner| {
                // The check comes first: a huge length past the end is an error, not a huge buffer.
                inner.check_inside(offset, len as u64)?;
                let mut buf = vec![0; len];
                inner.read(offset, &mut buf)?;
                Ok(buf.into())
            };
            self.run(work).await
        })
    }
}

impl Storage for SimFile {
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        let mut inner = self.inner.lock();
        inner.answers_now().then(|| inner.write(offset, data))
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let mut under_way = UnderWay { file: self, offset, data };
            self.stall().await;
            self.pause().await;
            let written = self.inner.lock().write(offset, &std::mem::take(&mut under_way.data));
            self.pause().await;
            written
        })
    }

    fn allocate(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(self.run(move |inner| {
            inner.begin(OpKind::TakesSpace)?;
            let range = checked_range(offset, len)?;
            if !range.is_empty() {
                inner.log(Vec::new(), Resize::AtLeast(range.end));
            }
            Ok(())
        }))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(self.run(move |inner| {
            inner.begin(OpKind::TakesSpace)?;
            let range = checked_range(offset, len)?;
            if !range.is_empty() {
                let end = range.end;
                inner.zero(range, Resize::AtLeast(end));
            }
            Ok(())
        }))
    }

    fn punch_hole(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(self.run(move |inner| {
            inner.begin(OpKind::Punch)?;
            let range = checked_range(offset, len)?;
            let end = range.end.min(inner.now.len);
            inner.zero(range.start.min(end)..end, Resize::Keep);
            Ok(())
        }))
    }

    fn set_len(&self, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(self.run(move |inner| {
            inner.begin(OpKind::TakesSpace)?;
            let range = checked_range(0, len)?;
            let cut = range.end.min(inner.now.len)..inner.now.len;
            inner.zero(cut, Resize::To(range.end));
            Ok(())
        }))
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.pause().await;
            let covered = {
                let inner = self.inner.lock();
                inner.log_start + inner.log.len() as u64
            };
            self.run(move |inner| inner.sync(covered)).await
        })
    }
}

enum Fate {
    Lost,
    Kept,
    Torn,
}

impl Inner {
    fn answers_now(&mut self) -> bool {
        match self.now_calls {
            NowCalls::Answer => true,
            NowCalls::Refuse => false,
            NowCalls::Random(_) => self.now_rng.random(),
        }
    }

    /// Counts an operation, and fails it if a fault hits.
    fn begin(&mut self, kind: OpKind) -> io::Result<()> {
        self.op_count += 1;
        let done = |rng: &mut SmallRng| kind == OpKind::Sync || rng.random_range(0..LEFT_ONE_OF) == 0;
        if !self.left.is_empty() && done(&mut self.left_rng) {
            self.do_what_was_left();
        }
        let mut hit = None;
        self.faults.retain_mut(|armed| {
            let can_hit = match armed.fault {
                Fault::Eio => true,
                Fault::NoSpace => kind == OpKind::TakesSpace,
                Fault::SyncFails => kind == OpKind::Sync,
                Fault::Short => kind == OpKind::Read,
            };
            if !can_hit || hit.is_some() {
                return true;
            }
            if armed.passes > 0 {
                armed.passes -= 1;
                return true;
            }
            hit = Some(armed.fault);
            armed.lasts == Lasts::ForGood
        });
        let Some(fault) = hit else { return Ok(()) };
        let of = FAULTS.iter().zip(&mut self.fault_hits).find(|(of, _)| **of == fault);
        of.into_iter().for_each(|(_, hits)| *hits += 1);
        self.read_fault_hits += u64::from(kind == OpKind::Read);
        Err(match fault {
            Fault::NoSpace => io::Error::from_raw_os_error(libc::ENOSPC),
            Fault::Short => io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends too early"),
            Fault::Eio | Fault::SyncFails => io::Error::from_raw_os_error(libc::EIO),
        })
    }

    /// What the kernel still had in hand.
    fn do_what_was_left(&mut self) {
        for (offset, data) in std::mem::take(&mut self.left) {
            self.put(offset, &data);
        }
    }

    fn check_inside(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.now.len => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{len} bytes at {offset} end past the file's {} bytes", self.now.len),
            )),
        }
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.begin(OpKind::Read)?;
        self.check_inside(offset, buf.len() as u64)?;
        self.now.read(offset, buf);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.begin(OpKind::TakesSpace)?;
        let range = checked_range(offset, data.len() as u64)?;
        if !range.is_empty() {
            self.put(offset, data);
        }
        Ok(())
    }

    /// Writes bytes that are inside of what a file can be.
    fn put(&mut self, offset: u64, data: &[u8]) {
        self.now.write(offset, data);
        let end = offset + data.len() as u64;
        let piece = self.now.sectors_around(offset..end);
        self.log(vec![piece], Resize::AtLeast(end));
    }

    /// Zeroes a range. Its edges, where sectors are not covered whole, are logged as data.
    fn zero(&mut self, range: Range<u64>, resize: Resize) {
        let mut pieces = Vec::new();
        if !range.is_empty() {
            self.now.zero(range.clone());
            let inner = range.start.next_multiple_of(SECTOR)..range.end / SECTOR * SECTOR;
            if inner.start < inner.end {
                if range.start < inner.start {
                    pieces.push(self.now.sectors_around(range.start..inner.start));
                }
                if inner.end < range.end {
                    pieces.push(self.now.sectors_around(inner.end..range.end));
                }
                pieces.push(Piece::Zeros(inner));
            } else {
                pieces.push(self.now.sectors_around(range));
            }
        }
        self.log(pieces, resize);
    }

    fn log(&mut self, pieces: Vec<Piece>, resize: Resize) {
        self.now.resize(resize);
        self.log.push(LoggedOp { pieces, resize, lost_by_sync: false });
    }

    fn sync(&mut self, covered: u64) -> io::Result<()> {
        self.sync_count += 1;
        let count = usize::try_from(covered.saturating_sub(self.log_start)).expect("the log is in memory");
        if let Err(error) = self.begin(OpKind::Sync) {
            self.log.iter_mut().take(count).for_each(|op| op.lost_by_sync = true);
            return Err(error);
        }
        for op in self.log.drain(..count) {
            if !op.lost_by_sync {
                self.stable.apply(&op);
            }
        }
        self.log_start += count as u64;
        self.stable.forget_past_end();
        Ok(())
    }
}

fn checked_range(offset: u64, len: u64) -> io::Result<Range<u64>> {
    match offset.checked_add(len) {
        Some(end) if end <= LEN_MAX => Ok(offset..end),
        _ => Err(io::Error::from_raw_os_error(libc::EFBIG)),
    }
}

impl Image {
    /// The whole sectors that `range` touches, as they are now.
    fn sectors_around(&self, range: Range<u64>) -> Piece {
        let start = range.start / SECTOR * SECTOR;
        let end = range.end.next_multiple_of(SECTOR);
        let mut data = vec![0; usize::try_from(end - start).expect("a write's data is in memory")];
        self.read(start, &mut data);
        Piece::Data(start, data.into())
    }

    fn resize(&mut self, resize: Resize) {
        match resize {
            Resize::Keep => {}
            Resize::AtLeast(len) => self.len = self.len.max(len),
            Resize::To(len) => self.len = len,
        }
    }

    fn apply(&mut self, op: &LoggedOp) {
        for piece in &op.pieces {
            match piece {
                Piece::Data(offset, data) => self.write(*offset, data),
                Piece::Zeros(range) => self.zero(range.clone()),
            }
        }
        self.resize(op.resize);
    }

    /// Applies some sectors of `op`. The length follows, or not, or follows only as far as the sectors that were kept.
    fn apply_torn(&mut self, op: &LoggedOp, rng: &mut SmallRng) {
        let mut kept_end = 0;
        for piece in &op.pieces {
            match piece {
                Piece::Data(offset, data) => {
                    for (at, sector) in (*offset..).step_by(SECTOR as usize).zip(data.chunks(SECTOR as usize))
                    {
                        if rng.random() {
                            self.write(at, sector);
                            kept_end = kept_end.max(at + SECTOR);
                        }
                    }
                }
                Piece::Zeros(range) if (range.end - range.start) / SECTOR <= TORN_SECTORS_MAX => {
                    for at in range.clone().step_by(SECTOR as usize).filter(|_| rng.random()) {
                        self.zero(at..at + SECTOR);
                        kept_end = kept_end.max(at + SECTOR);
                    }
                }
                Piece::Zeros(range) => {
                    let cut = rng.random_range(range.start / SECTOR..=range.end / SECTOR) * SECTOR;
                    let kept = if rng.random() { range.start..cut } else { cut..range.end };
                    if !kept.is_empty() {
                        kept_end = kept_end.max(kept.end);
                        self.zero(kept);
                    }
                }
            }
        }
        match op.resize {
            // Sectors that were kept are inside the file; the file may also have grown for sectors that were lost.
            Resize::AtLeast(len) if rng.random() => self.resize(Resize::AtLeast(kept_end.min(len))),
            Resize::To(_) if rng.random() => {}
            resize => self.resize(resize),
        }
    }
}
