//! Index over a chain: where the bytes of a range lie, however deep, once that was looked up.
//!
//! - It stands above layers that do not change: what it holds stays true. A lower image that is being filled is not looked
//!   into: the index leads to it, and ends there.
//! - Bounded: `SHARDS` parts of `EXTENTS_MAX` extents; a part that is full begins anew.
//! - Readers of different regions share no lock.
//!
//! Not here: the bytes.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::Arc,
};

use readonce_format::Compressed;
use readonce_origin::{Class, Sink};
use readonce_storage::{BoxFuture, sync::RwLock};

use crate::{
    LayerError, StatusExtent,
    base::{AHEAD_MAX, Leaf, hand_out},
    source::{Source, sink_zeros},
};

/// Parts, each with a lock of its own.
const SHARDS: usize = 64;
/// Guest bytes of a region; regions take turns among the parts, and no extent goes over a region's end.
const REGION_BYTES: u64 = 16 << 20;
/// Extents of a part: some 100 bytes each, 13 MiB in all.
const EXTENTS_MAX: usize = 2048;

/// Where a run of a chain's bytes lies.
#[derive(Clone)]
pub enum Place {
    /// Nowhere: it reads as zeros.
    Zero,
    /// From this byte offset of a layer's data on.
    Data(Arc<Leaf>, u64),
    /// In a compressed cluster of a layer.
    Compressed(Arc<Leaf>, Compressed),
    /// Behind a layer that changes: at the same guest offset there.
    Behind(Arc<dyn Source>),
}

/// A run of a chain's bytes, and where it lies.
pub struct Found {
    /// Of the first byte asked.
    pub place: Place,
    /// Bytes.
    pub len: u64,
}

/// A source whose layers are looked through once.
pub struct Indexed {
    source: Arc<dyn Source>,
    shards: Box<[RwLock<BTreeMap<u64, Found>>]>,
}

impl Indexed {
    /// Remembers where the bytes of `source` lie.
    pub fn new(source: Arc<dyn Source>) -> Arc<Self> {
        Arc::new(Self { source, shards: (0..SHARDS).map(|_| RwLock::default()).collect() })
    }

    fn shard(&self, offset: u64) -> &RwLock<BTreeMap<u64, Found>> {
        let count = self.shards.len() as u64;
        &self.shards[(offset / REGION_BYTES % count) as usize]
    }

    /// What is known of the first bytes of a range.
    fn known(&self, range: &Range<u64>) -> Option<Found> {
        let shard = self.shard(range.start).read();
        let (&start, found) = shard.range(..=range.start).next_back()?;
        let skip = range.start - start;
        let left = found.len.checked_sub(skip).filter(|&left| left > 0)?;
        Some(Found { place: found.place.behind(skip), len: left.min(range.end - range.start) })
    }

    fn remember(&self, start: u64, found: &Found) {
        let mut at = start;
        let end = start + found.len;
        while at < end {
            let next = end.min((at / REGION_BYTES + 1) * REGION_BYTES);
            let mut shard = self.shard(at).write();
            if shard.len() >= EXTENTS_MAX {
                shard.clear();
            }
            let part = Found { place: found.place.behind(at - start), len: next - at };
            // What is known of a part of it says the same.
            match shard.range_mut(..at).next_back() {
                Some((&before, last))
                    if before + last.len >= at
                        && before / REGION_BYTES == at / REGION_BYTES
                        && last.place.goes_on(at - before, &part.place) =>
                {
                    last.len = last.len.max(next - before);
                }
                _ => drop(shard.insert(at, part)),
            }
            at = next;
        }
    }

    async fn fetch_range(&self, range: Range<u64>, class: Class, sink: Sink<'_>) -> Result<(), LayerError> {
        let mut ahead = VecDeque::new();
        let mut at = range.start;
        while at < range.end {
            let found = match self.known(&(at..range.end)) {
                Some(found) => found,
                None => match self.source.find(at, range.end - at).await? {
                    Some(found) => {
                        self.remember(at, &found);
                        found
                    }
                    None => {
                        self.source.fetch(at..range.end, class, sink).await?;
                        break;
                    }
                },
            };
            let part = at..at + found.len;
            match found.place {
                Place::Zero => sink_zeros(part.clone(), sink),
                Place::Data(leaf, from) => leaf.fetch(from, part.clone(), class, sink).await?,
                Place::Behind(source) => source.fetch(part.clone(), class, sink).await?,
                Place::Compressed(leaf, place) => {
                    if ahead.len() == AHEAD_MAX
                        && let Some(first) = ahead.pop_front()
                    {
                        hand_out(first, sink).await?;
                    }
                    ahead.push_back((part.clone(), place.skip, leaf.clusters.start(&place)));
                }
            }
            at = part.end;
        }
        for cluster in ahead {
            hand_out(cluster, sink).await?;
        }
        Ok(())
    }
}

impl Place {
    /// The place so many bytes further.
    fn behind(&self, skip: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data(leaf, at) => Self::Data(Arc::clone(leaf), at + skip),
            Self::Compressed(leaf, place) => {
                Self::Compressed(Arc::clone(leaf), Compressed { skip: place.skip + skip, ..*place })
            }
            Self::Behind(source) => Self::Behind(Arc::clone(source)),
        }
    }

    /// Whether `next` is what lies `len` bytes further.
    fn goes_on(&self, len: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Data(leaf, at), Self::Data(next, next_at)) => {
                Arc::ptr_eq(leaf, next) && at + len == *next_at
            }
            (Self::Behind(source), Self::Behind(next)) => Arc::ptr_eq(source, next),
            // It ends with its cluster.
            _ => false,
        }
    }
}

impl Source for Indexed {
    fn size(&self) -> BoxFuture<'_, Result<u64, LayerError>> {
        self.source.size()
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let Some(found) = self.known(&(at..end)) else {
                let rest = (at - offset) as usize;
                return self.source.read_now(at, &mut buf[rest..]);
            };
            let part = &mut buf[(at - offset) as usize..][..found.len as usize];
            let read = match found.place {
                Place::Zero => {
                    part.fill(0);
                    Ok(())
                }
                Place::Data(leaf, from) => leaf.read_now(from, part)?,
                Place::Compressed(leaf, place) => leaf.clusters.read_now(&place, part)?,
                Place::Behind(source) => source.read_now(at, part)?,
            };
            if let Err(error) = read {
                return Some(Err(error));
            }
            at += found.len;
        }
        Some(Ok(()))
    }

    fn may_read_now(&self, offset: u64) -> bool {
        let Some(found) = self.known(&(offset..offset + 1)) else { return self.source.may_read_now(offset) };
        match found.place {
            Place::Zero | Place::Compressed(..) => true,
            Place::Data(leaf, from) => leaf.may_read_now(from),
            Place::Behind(source) => source.may_read_now(offset),
        }
    }

    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), LayerError>> {
        Box::pin(self.fetch_range(range, class, sink))
    }

    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, LayerError>> {
        self.source.status(offset, len, count_max)
    }
}
