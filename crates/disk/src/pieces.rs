//! Pieces: an origin far away, read in larger pieces than are asked for, which are kept for a while.
//!
//! - What a format reads (tables, compressed clusters) comes in aligned blocks of `BLOCK_BYTES`, more of them at a time where
//!   reads follow each other. So neighbours come along, and a table costs one round trip.
//! - A fetch of data asks for exactly its range, but for what is kept or on its way already: each byte is asked once while
//!   it is kept. Data among compressed clusters is read as they are.
//! - Readers of one block at the same time share a request. At most `KEPT_BLOCKS_MAX` blocks are kept.
//!
//! Not here: retries and versions (the origin), what the bytes mean.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{Arc, Weak},
};

use bytes::{Bytes, BytesMut};
use readonce_origin::{Class, FetchError, Origin, OriginNote, Sink, StatsSnapshot};
use readonce_storage::{BoxFuture, ReadAt, Rt, sync::Mutex};
use tokio::sync::oneshot;

/// Bytes of a block: 5 ms of a 100 Mbit/s link, less than its round trip.
const BLOCK_BYTES: u64 = 64 << 10;
/// Blocks that one request asks for at most: 1 MiB.
const RUN_BLOCKS_MAX: u64 = 16;
/// Blocks kept: 16 MiB.
const KEPT_BLOCKS_MAX: usize = 256;

/// An origin whose pieces are kept.
pub struct Pieces {
    me: Weak<Pieces>,
    origin: Arc<dyn Origin>,
    rt: Rt,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    blocks: BTreeMap<u64, Block>,
    kept_count: usize,
    /// Counts uses, so that the block that was not used for longest is known.
    clock: u64,
    /// The block after those that were asked for last, and how many they were.
    next: u64,
    run: u64,
}

enum Block {
    Coming(Vec<oneshot::Sender<Result<Bytes, FetchError>>>),
    Here { bytes: Bytes, used: u64 },
}

/// A block that somebody reads.
enum Part {
    Here(Bytes),
    Soon(oneshot::Receiver<Result<Bytes, FetchError>>),
}

impl Part {
    async fn bytes(self, name: &str) -> Result<Bytes, FetchError> {
        let gone = || FetchError::Permanent { origin: name.into(), cause: "abandoned at shutdown".into() };
        match self {
            Self::Here(bytes) => Ok(bytes),
            Self::Soon(told) => told.await.unwrap_or_else(|_| Err(gone())),
        }
    }
}

impl Pieces {
    /// Reads `origin` in pieces.
    pub fn new(origin: Arc<dyn Origin>, rt: Rt) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { me: me.clone(), origin, rt, state: Mutex::default() })
    }

    fn blocks_of(range: &Range<u64>) -> Range<u64> {
        range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
    }

    fn bytes_of(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(self.origin.len())
    }

    /// The blocks of a range that lies inside the origin; what is not on its way is asked for.
    fn ask(&self, range: &Range<u64>) -> Vec<Part> {
        let blocks = Self::blocks_of(range);
        let mut parts = Vec::new();
        let mut runs: Vec<Range<u64>> = Vec::new();
        {
            let mut state = self.state.lock();
            for index in blocks.clone() {
                parts.push(state.part(index).unwrap_or_else(|| {
                    match runs.last_mut() {
                        Some(run) if run.end == index => run.end += 1,
                        _ => runs.push(index..index + 1),
                    }
                    let (tell, told) = oneshot::channel();
                    state.blocks.insert(index, Block::Coming(vec![tell]));
                    Part::Soon(told)
                }));
            }
            if let Some(last) = runs.last_mut() {
                self.read_ahead(&mut state, last);
            }
        }
        for run in runs {
            let pieces = self.me.upgrade().expect("it is being read");
            self.rt.spawn(Box::pin(async move { pieces.fetch_blocks(run).await }));
        }
        parts
    }

    /// Makes a run longer where it goes on behind the one before.
    fn read_ahead(&self, state: &mut State, run: &mut Range<u64>) {
        let count = run.end - run.start;
        let goes_on = run.start == state.next;
        let wanted = if goes_on { (state.run * 2).min(RUN_BLOCKS_MAX) } else { 1 };
        let last = self.origin.len().div_ceil(BLOCK_BYTES);
        while run.end - run.start < wanted && run.end < last && !state.blocks.contains_key(&run.end) {
            state.blocks.insert(run.end, Block::Coming(Vec::new()));
            run.end += 1;
        }
        state.next = run.end;
        state.run = wanted.max(count);
    }

    async fn fetch_blocks(&self, blocks: Range<u64>) {
        let range = self.bytes_of(&blocks);
        let first = range.start;
        let mut run = vec![0; (range.end - range.start) as usize];
        // Bytes of each block that have arrived.
        let mut counts = vec![0; (blocks.end - blocks.start) as usize];
        let mut place = |offset: u64, piece: Bytes| {
            run[(offset - first) as usize..][..piece.len()].copy_from_slice(&piece);
            let arrived = offset..offset + piece.len() as u64;
            for index in Self::blocks_of(&arrived) {
                let block = self.bytes_of(&(index..index + 1));
                let count = &mut counts[(index - blocks.start) as usize];
                *count += block.end.min(arrived.end) - block.start.max(arrived.start);
                if *count == block.end - block.start {
                    let bytes = &run[(block.start - first) as usize..(block.end - first) as usize];
                    self.state.lock().arrived(index, Bytes::copy_from_slice(bytes));
                }
            }
        };
        let fetched = self.origin.fetch(range, Class::Demand, &mut place).await;
        let error = match fetched {
            Ok(()) => return,
            Err(error) => error,
        };
        // What arrived before stays.
        let missing = |&index: &u64| {
            let block = self.bytes_of(&(index..index + 1));
            counts[(index - blocks.start) as usize] < block.end - block.start
        };
        let missing: Vec<u64> = blocks.clone().filter(missing).collect();
        self.state.lock().failed(&missing, &error);
    }

    async fn fetch_range(&self, range: Range<u64>, class: Class, sink: Sink<'_>) -> Result<(), FetchError> {
        let name = self.origin.name();
        let mut at = range.start;
        while at < range.end {
            let (part, end) = {
                let mut state = self.state.lock();
                let index = at / BLOCK_BYTES;
                match state.part(index) {
                    Some(part) => (Some(part), (index + 1) * BLOCK_BYTES),
                    // Straight, up to the next block that is known.
                    None => {
                        let known = state.blocks.range(index..).next().map(|(&index, _)| index * BLOCK_BYTES);
                        (None, known.unwrap_or(u64::MAX))
                    }
                }
            };
            let end = end.min(range.end);
            match part {
                None => self.origin.fetch(at..end, class, sink).await?,
                Some(part) => {
                    let bytes = part.bytes(&name).await?;
                    let skip = at % BLOCK_BYTES;
                    sink(at, bytes.slice(skip as usize..(skip + (end - at)) as usize));
                }
            }
            at = end;
        }
        Ok(())
    }

    async fn fetch_blocks_of(&self, range: Range<u64>, sink: Sink<'_>) -> Result<(), FetchError> {
        let name = self.origin.name();
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / BLOCK_BYTES + RUN_BLOCKS_MAX) * BLOCK_BYTES);
            for part in self.ask(&(at..end)) {
                let bytes = part.bytes(&name).await?;
                let block_end = (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
                let (skip, len) = (at % BLOCK_BYTES, end.min(block_end) - at);
                sink(at, bytes.slice(skip as usize..(skip + len) as usize));
                at += len;
            }
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<Range<u64>> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.origin.len() => Ok(offset..end),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl State {
    /// A block that is kept or on its way.
    fn part(&mut self, index: u64) -> Option<Part> {
        self.clock += 1;
        match self.blocks.get_mut(&index)? {
            Block::Here { bytes, used } => {
                *used = self.clock;
                Some(Part::Here(bytes.clone()))
            }
            Block::Coming(waiting) => {
                let (tell, told) = oneshot::channel();
                waiting.push(tell);
                Some(Part::Soon(told))
            }
        }
    }

    fn arrived(&mut self, index: u64, bytes: Bytes) {
        self.clock += 1;
        let here = Block::Here { bytes: bytes.clone(), used: self.clock };
        if let Some(Block::Coming(waiting)) = self.blocks.insert(index, here) {
            for tell in waiting {
                let _ = tell.send(Ok(bytes.clone()));
            }
        }
        self.kept_count += 1;
        if self.kept_count > KEPT_BLOCKS_MAX {
            let used = |(&index, block): (&u64, &Block)| match block {
                Block::Here { used, .. } => Some((*used, index)),
                Block::Coming(_) => None,
            };
            if let Some((_, coldest)) = self.blocks.iter().filter_map(used).min() {
                self.blocks.remove(&coldest);
                self.kept_count -= 1;
            }
        }
    }

    fn failed(&mut self, blocks: &[u64], error: &FetchError) {
        for index in blocks {
            if let Some(Block::Coming(waiting)) = self.blocks.remove(index) {
                for tell in waiting {
                    let _ = tell.send(Err(error.clone()));
                }
            }
        }
    }
}

impl ReadAt for Pieces {
    fn len(&self) -> u64 {
        self.origin.len()
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        let range = match self.check(offset, buf.len()) {
            Ok(range) => range,
            Err(error) => return Some(Err(error)),
        };
        let mut state = self.state.lock();
        let mut done = 0;
        for index in Self::blocks_of(&range) {
            let Some(Block::Here { bytes, .. }) = state.blocks.get(&index) else { return None };
            let skip = (offset + done as u64 - index * BLOCK_BYTES) as usize;
            let count = (bytes.len() - skip).min(buf.len() - done);
            buf[done..done + count].copy_from_slice(&bytes[skip..skip + count]);
            done += count;
        }
        for index in Self::blocks_of(&range) {
            state.part(index);
        }
        Some(Ok(()))
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move {
            let range = self.check(offset, len)?;
            let mut parts = self.ask(&range);
            let name = self.origin.name();
            let skip = (offset % BLOCK_BYTES) as usize;
            if parts.len() == 1
                && let Some(part) = parts.pop()
            {
                return Ok(part.bytes(&name).await.map_err(io::Error::other)?.slice(skip..skip + len));
            }
            let mut read = BytesMut::with_capacity(len);
            for (number, part) in parts.into_iter().enumerate() {
                let bytes = part.bytes(&name).await.map_err(io::Error::other)?;
                let skip = if number == 0 { skip } else { 0 };
                let count = (bytes.len() - skip).min(len - read.len());
                read.extend_from_slice(&bytes[skip..skip + count]);
            }
            Ok(read.freeze())
        })
    }
}

impl Origin for Pieces {
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(self.fetch_range(range, class, sink))
    }

    fn fetch_around<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        // A range past the end is the origin's to refuse.
        match range.end <= self.origin.len() {
            true => Box::pin(self.fetch_blocks_of(range, sink)),
            false => self.fetch(range, class, sink),
        }
    }

    fn may_read_now(&self, offset: u64) -> bool {
        matches!(self.state.lock().blocks.get(&(offset / BLOCK_BYTES)), Some(Block::Here { .. }))
    }

    fn name(&self) -> String {
        self.origin.name()
    }

    fn validator(&self) -> Vec<u8> {
        self.origin.validator()
    }

    fn notes(&self) -> Vec<OriginNote> {
        self.origin.notes()
    }

    fn stats(&self) -> StatsSnapshot {
        self.origin.stats()
    }
}
