//! Copy-on-write inside the image: what a snapshot shows too, and what is compressed, is given a place of its own before a
//! guest writes into a part of it.
//!
//! - The units that are copied are owned meanwhile: nobody else can unlink what is read here, and whoever wants to write there
//!   waits, then finds data and writes in place.
//! - The format gives no room for a part of a cluster of which another part is shared: then it is copied first. It waits for
//!   the owner of the shared units, who waits for nobody; so whoever owns absent units beside them may wait for it.
//! - Local I/O only: units of the cluster that are absent stay absent.

use std::ops::Range;

use bytes::Bytes;
use readonce_format::{CommitMode, FormatError, Mapping, Reservation, Room};

use crate::{
    LayerError,
    image::{Image, Table},
    inflight::Own,
    write::Owned,
};

/// Bytes of a shared cluster that are copied at a time.
const PIECE_BYTES_MAX: u64 = 256 << 10;
/// Bytes of whole clusters that one request claims at a time.
const CLAIM_BYTES_MAX: u64 = 4 << 20;

/// What a cluster's units are, taken together.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Holds {
    /// Some are data, written in place.
    pub(crate) data: bool,
    /// Some are shared or compressed.
    pub(crate) shared: bool,
}

/// What came of the wish to own whole clusters.
pub(crate) enum Claim {
    /// These units are the caller's.
    Owned(Range<u64>),
    /// The map changed, or is not in memory.
    LookAgain,
    /// A unit of the first one holds guest bytes that are not stored yet.
    Guest,
    /// Another owner does local I/O.
    WaitLocal(tokio::sync::oneshot::Receiver<()>),
    /// The image is closed, or writes are off.
    Refused(LayerError),
}

/// What came of the wish to own the shared units of a cluster.
enum ClaimParts<'a> {
    Owned(Vec<Owned<'a>>),
    LookAgain,
    WaitLocal(tokio::sync::oneshot::Receiver<()>),
    Refused(LayerError),
}

impl Image {
    /// Room for units that the caller owns. What must be copied for it is copied first.
    pub(crate) async fn prepare(&self, offset: u64, len: u64, room: Room) -> Result<Reservation, LayerError> {
        match self.mapper.prepare(offset, len, room).await {
            Err(FormatError::CopyFirst) => self.unshare(offset / self.cluster_size).await?,
            prepared => return prepared.map_err(|error| self.failed(error)),
        }
        self.mapper.prepare(offset, len, room).await.map_err(|error| self.failed(error))
    }

    /// Gives a cluster of which something is shared or compressed a place of its own.
    pub(crate) async fn unshare(&self, cluster: u64) -> Result<(), LayerError> {
        loop {
            let parts = self.shared_parts(cluster).await?;
            if parts.is_empty() {
                // Copied by another already, or its place is shared though nothing is there.
                return self.copy(cluster, parts).await;
            }
            let claim = self.claim_parts(&parts);
            match claim {
                ClaimParts::Owned(owned) => {
                    let copied = self.copy(cluster, parts).await;
                    drop(owned);
                    return copied;
                }
                ClaimParts::LookAgain => {}
                ClaimParts::WaitLocal(told) => drop(told.await),
                ClaimParts::Refused(error) => return Err(error),
            }
        }
    }

    async fn shared_parts(&self, cluster: u64) -> Result<Vec<(Range<u64>, Mapping)>, LayerError> {
        let mut parts = Vec::new();
        let range = self.bytes_of(cluster);
        let mut at = range.start;
        while at < range.end {
            let extent = self.lookup(at, range.end - at).await?;
            if matches!(extent.mapping, Mapping::Shared(_) | Mapping::Compressed(_)) {
                parts.push((at..at + extent.len, extent.mapping));
            }
            at += extent.len;
        }
        Ok(parts)
    }

    fn claim_parts(&self, parts: &[(Range<u64>, Mapping)]) -> ClaimParts<'_> {
        let mut table = self.table();
        if let Err(error) = self.check_open() {
            return ClaimParts::Refused(error);
        }
        let units = |range: &Range<u64>| range.start / self.unit..range.end.div_ceil(self.unit);
        for (range, _) in parts {
            if let Some(told) = table.wait_any(units(range)) {
                return ClaimParts::WaitLocal(told);
            }
            for unit in units(range) {
                match self.mapping_now(unit) {
                    Some(Mapping::Shared(_) | Mapping::Compressed(_)) => {}
                    _ => return ClaimParts::LookAgain,
                }
            }
        }
        let own = |units: Range<u64>| {
            units.clone().for_each(|unit| table.begin_write(unit));
            Owned { image: self, units }
        };
        ClaimParts::Owned(parts.iter().map(|(range, _)| units(range)).map(own).collect())
    }

    async fn copy(&self, cluster: u64, parts: Vec<(Range<u64>, Mapping)>) -> Result<(), LayerError> {
        let _few = self.copies.acquire().await.expect("nobody closes it");
        let start = cluster * self.cluster_size;
        let room = self.mapper.prepare(start, self.cluster_size, Room::Copy).await;
        let room = room.map_err(|error| self.failed(error))?;
        let to = room.at.expect("room for a copy has a place");
        for (range, mapping) in parts {
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(PIECE_BYTES_MAX);
                let bytes = match mapping {
                    Mapping::Shared(from) => self.file.read(from + (at - range.start), size_of(len)).await?,
                    Mapping::Compressed(mut place) => {
                        place.skip += at - range.start;
                        self.clusters.read(&place, size_of(len)).await?
                    }
                    _ => unreachable!("only such parts are listed"),
                };
                self.write_file(to + (at - start), bytes).await?;
                at += len;
            }
            // Behind the image's end: should it grow, that reads as zeros.
            let rest = at.next_multiple_of(self.unit) - at;
            if rest > 0 {
                self.write_file(to + (at - start), Bytes::from(vec![0; size_of(rest)])).await?;
            }
        }
        room.commit(CommitMode::Overwrite);
        self.note_commit(0);
        Ok(())
    }

    /// Claims `count` whole clusters from `cluster` on, or the first of them, as long as each holds what `wanted` says. For a
    /// cluster that is to be linked anew as a whole.
    pub(crate) fn claim_clusters(&self, cluster: u64, count: u64, wanted: impl Fn(Holds) -> bool) -> Claim {
        let mut table = self.table();
        // Under the lock: `close` looks for owners after it has closed the door.
        if let Err(error) = self.check_open() {
            return Claim::Refused(error);
        }
        let first = self.units_of(cluster).start;
        let mut end = first;
        for cluster in cluster..cluster + count.min(CLAIM_BYTES_MAX / self.cluster_size).max(1) {
            let stop = match self.own_cluster(&mut table, cluster, &wanted) {
                Claim::Owned(units) => {
                    end = units.end;
                    continue;
                }
                stop => stop,
            };
            if end == first {
                return stop;
            }
            break;
        }
        Claim::Owned(first..end)
    }

    fn own_cluster(&self, table: &mut Table<'_>, cluster: u64, wanted: impl Fn(Holds) -> bool) -> Claim {
        // Looked at before it is owned: what changes it owns it, and ends under the lock that is held here.
        if !self.holds_now(cluster).is_some_and(wanted) {
            return Claim::LookAgain;
        }
        let units = self.units_of(cluster);
        match table.own(units.clone()) {
            Own::All => Claim::Owned(units),
            Own::Wait(told) => Claim::WaitLocal(told),
            Own::Guest => Claim::Guest,
        }
    }

    /// What the cluster holds now, if that can be told without waiting.
    pub(crate) fn holds_now(&self, cluster: u64) -> Option<Holds> {
        let range = self.bytes_of(cluster);
        let mut holds = Holds::default();
        let mut at = range.start;
        while at < range.end {
            let extent = self.mapper.lookup_now(at, range.end - at)?.ok()?;
            match extent.mapping {
                Mapping::Data(_) => holds.data = true,
                Mapping::Shared(_) | Mapping::Compressed(_) => holds.shared = true,
                Mapping::Absent | Mapping::Zero => {}
            }
            at += extent.len;
        }
        Some(holds)
    }

    /// Whole clusters at the start of a range, counting one that the image ends in.
    pub(crate) fn whole_clusters(&self, range: &Range<u64>) -> u64 {
        if !range.start.is_multiple_of(self.cluster_size) {
            return 0;
        }
        let len = range.end - range.start;
        if range.end == self.size() { len.div_ceil(self.cluster_size) } else { len / self.cluster_size }
    }

    fn bytes_of(&self, cluster: u64) -> Range<u64> {
        let start = cluster * self.cluster_size;
        start..(start + self.cluster_size).min(self.size())
    }

    fn units_of(&self, cluster: u64) -> Range<u64> {
        let range = self.bytes_of(cluster);
        range.start / self.unit..range.end.div_ceil(self.unit)
    }
}

fn size_of(len: u64) -> usize {
    usize::try_from(len).expect("a part of a cluster fits in memory")
}
