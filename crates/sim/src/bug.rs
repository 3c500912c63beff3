//! Bugs made by hand: what the simulator must find. They live in what surrounds the engine, so that the engine has no hooks.
//!
//! - A storage that forgets a sync, a map that lies, a server that answers wrongly: each does what the engine would do if it had
//!   the bug.
//! - Bugs that cannot be made from outside are patches: `script/mutants`.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use readonce_format::{
    Abilities, Durability, Extent, FormatError, Geometry, Mapper, Mapping, Reservation, Room, Unlinked,
    WritableMapper,
};
use readonce_storage::{BoxFuture, ReadAt, Storage};

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Bug {
    /// One sync of five is forgotten.
    DroppedSync,
    /// Links are written before the data that they name is synced.
    L2BeforeData,
    /// A cluster's place is told one cluster too far.
    OffByOneCluster,
    /// A lookup is answered from what was true before.
    StaleL2Cache,
    /// The version of an answer is not looked at.
    VersionMixed,
    /// A body that broke off is resumed too early in the file.
    ResumeWrongOffset,
    /// A freed cluster is used again while somebody still reads there.
    FreedTooEarly,
}

/// The image's file, with a bug of storage.
pub fn storage(bug: Option<Bug>, file: Arc<dyn Storage>) -> Arc<dyn Storage> {
    match bug {
        Some(bug @ (Bug::DroppedSync | Bug::L2BeforeData)) => {
            Arc::new(Forgetful { file, bug, syncs: AtomicU64::new(0) })
        }
        _ => file,
    }
}

/// The image's map, with a bug of the map.
pub fn mapper(bug: Option<Bug>, mapper: Arc<dyn WritableMapper>) -> Arc<dyn WritableMapper> {
    match bug {
        Some(bug @ (Bug::OffByOneCluster | Bug::StaleL2Cache | Bug::FreedTooEarly)) => {
            Arc::new(Liar { mapper, bug, seen: Mutex::default(), calls: AtomicU64::new(0) })
        }
        _ => mapper,
    }
}

/// Forgets syncs.
struct Forgetful {
    file: Arc<dyn Storage>,
    bug: Bug,
    syncs: AtomicU64,
}

impl ReadAt for Forgetful {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.file.read_now(offset, buf)
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        self.file.read(offset, len)
    }
}

impl Storage for Forgetful {
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        self.file.write_now(offset, data)
    }
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.file.write(offset, data)
    }
    fn allocate(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.file.allocate(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.file.write_zeroes(offset, len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.file.punch_hole(offset, len)
    }
    fn set_len(&self, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.file.set_len(len)
    }
    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        let number = self.syncs.fetch_add(1, Ordering::Relaxed);
        let forgotten = match self.bug {
            Bug::DroppedSync => number % 5 == 4,
            // A round has two: before the links, and after them.
            _ => number.is_multiple_of(2),
        };
        if forgotten { Box::pin(std::future::ready(Ok(()))) } else { self.file.sync() }
    }
}

/// Tells what is not so.
struct Liar {
    mapper: Arc<dyn WritableMapper>,
    bug: Bug,
    seen: Mutex<BTreeMap<u64, Extent>>,
    calls: AtomicU64,
}

impl Liar {
    fn tell(&self, offset: u64, len_max: u64, mut extent: Extent) -> Extent {
        let cluster = self.mapper.geometry().cluster_size;
        match (self.bug, extent.mapping) {
            (Bug::OffByOneCluster, Mapping::Data(at)) if offset / cluster % 8 == 7 => {
                extent.mapping = Mapping::Data(at + cluster);
            }
            (Bug::StaleL2Cache, _) => {
                let mut seen = self.seen.lock();
                if self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(16)
                    && let Some(old) = seen.get(&offset)
                {
                    return Extent { len: old.len.min(len_max), ..*old };
                }
                seen.insert(offset, extent);
            }
            _ => {}
        }
        extent
    }
}

impl Mapper for Liar {
    fn geometry(&self) -> Geometry {
        self.mapper.geometry()
    }
    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        let found = self.mapper.lookup_now(offset, len_max)?;
        Some(found.map(|extent| self.tell(offset, len_max, extent)))
    }
    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>> {
        Box::pin(async move { Ok(self.tell(offset, len_max, self.mapper.lookup(offset, len_max).await?)) })
    }
}

impl WritableMapper for Liar {
    fn abilities(&self) -> Abilities {
        self.mapper.abilities()
    }
    fn prepare(&self, offset: u64, len: u64, room: Room) -> BoxFuture<'_, Result<Reservation, FormatError>> {
        self.mapper.prepare(offset, len, room)
    }
    fn flush(&self, durability: Durability) -> BoxFuture<'_, Result<(), FormatError>> {
        self.mapper.flush(durability)
    }
    fn unlinked_bytes(&self) -> u64 {
        self.mapper.unlinked_bytes()
    }
    fn take_unlinked(&self) -> Option<Unlinked> {
        let unlinked = self.mapper.take_unlinked()?;
        if self.bug == Bug::FreedTooEarly {
            unlinked.reuse();
            return Some(Unlinked::new(|| ()));
        }
        Some(unlinked)
    }
    fn settle(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        self.mapper.settle()
    }
    fn close(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        self.mapper.close()
    }
    fn reclaim(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        self.mapper.reclaim()
    }
}
