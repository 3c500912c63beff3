//! The waiting write: in place where the map shows data, else through the in-flight table.
//!
//! - A write of whole absent units takes room, writes, links: no byte of the backing is needed.
//! - A write into a part of an absent unit is put together with the rest where that can be read without waiting. Else it is absorbed
//!   by the unit's entry and completes; the fetch of the rest has begun.
//! - Room in the image is taken before a write completes, so "no space" is told to the write that meets it.
//! - What is shared or compressed is linked anew where whole clusters of it are written, else copied first (`copy`).
//! - What claims a unit runs detached from the caller, who may stop waiting at any moment.

use std::{ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use readonce_format::{CommitMode, Mapping, Room};
use readonce_origin::Class;

use crate::{
    LayerError,
    copy::Claim,
    image::{Image, Table},
    inflight::{Budget, Leave, Queue, Write},
};

/// Bytes of whole units that one write claims at a time.
const CLAIM_BYTES_MAX: u64 = 4 << 20;
/// A new unit that is written in part is put together in memory up to this size; a larger one is zeroed in the file first.
const MERGE_BYTES_MAX: u64 = 256 << 10;

/// What to do with the first unit of an absent range.
enum Step {
    /// Done with these bytes.
    Done(u64),
    /// The map changed: look it up again.
    LookAgain,
    /// The caller owns these units now, and `Writing` entries stand for them.
    Owned(Range<u64>),
    /// The same for the first unit, of which a part is written: it needs room first.
    Begin(Leave),
    /// The first unit is being fetched, and the caller alone takes room for it now.
    Attach,
    /// Another owner does local I/O.
    WaitLocal(tokio::sync::oneshot::Receiver<()>),
    /// The table is full.
    WaitTurn(Queue),
    /// The image is closed, or writes are off.
    Refused(LayerError),
}

impl Image {
    /// Writes `data` at `offset`.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), LayerError> {
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            self.check_latch()?;
            let in_place = self.enter_write();
            let extent = self.lookup(at, end - at).await?;
            let part = data.slice((at - offset) as usize..(at - offset + extent.len) as usize);
            if let Mapping::Data(to) = extent.mapping {
                self.write_file(to, part).await?;
                at += extent.len;
                in_place.ended();
                continue;
            }
            in_place.ended();
            let image = self.shared();
            at += match (extent.mapping, self.whole_clusters(&(at..end))) {
                (Mapping::Shared(_) | Mapping::Compressed(_), 0) => {
                    let cluster = at / self.cluster_size;
                    self.detached(async move { image.unshare(cluster).await }).await?;
                    0
                }
                (Mapping::Shared(_) | Mapping::Compressed(_), count) => {
                    let data = data.slice((at - offset) as usize..);
                    self.detached(async move { image.write_clusters(at, count, data).await }).await?
                }
                _ => self.detached(async move { image.write_absent(at, part).await }).await?,
            };
        }
        Ok(())
    }

    /// Writes the first of `count` whole clusters that were shared or compressed a moment ago; returns the bytes (0: look
    /// again).
    async fn write_clusters(self: Arc<Self>, at: u64, count: u64, data: Bytes) -> Result<u64, LayerError> {
        let claim = self.claim_clusters(at / self.cluster_size, count, |holds| holds.shared && !holds.data);
        match claim {
            Claim::Owned(units) => Owned { image: &self, units }.write(at, &data).await,
            Claim::LookAgain => Ok(0),
            Claim::WaitLocal(told) => {
                let _ = told.await;
                Ok(0)
            }
            Claim::Refused(error) => Err(error),
            Claim::Guest => panic!("guest bytes have room, and there is none beside what is shared"),
        }
    }

    /// Writes the first bytes of `data` to units that were not data a moment ago; returns how many (0: look again).
    async fn write_absent(self: Arc<Self>, at: u64, data: Bytes) -> Result<u64, LayerError> {
        let mut leave = None;
        loop {
            // A temporary must not keep the table locked across the waits below.
            let step = self.claim_write(at, &data, &mut leave);
            match step {
                Step::Done(len) => return Ok(len),
                Step::LookAgain => return Ok(0),
                Step::Refused(error) => return Err(error),
                Step::WaitLocal(told) => {
                    let _ = told.await;
                    return Ok(0);
                }
                Step::WaitTurn(queue) => leave = Some(queue.turn().await?),
                Step::Owned(units) => return Owned { image: &self, units }.write(at, &data).await,
                Step::Begin(leave) => return self.begin_guest(at, &data, leave).await,
                Step::Attach => return self.attach(at, &data).await,
            }
        }
    }

    fn claim_write(&self, at: u64, data: &Bytes, leave: &mut Option<Leave>) -> Step {
        let unit = at / self.unit;
        let from = at - unit * self.unit;
        let piece = self.first_piece(at, data);
        let len = piece.len() as u64;
        let mut table = self.table();
        // Under the lock: `close` looks for owners after it has closed the door.
        if let Err(error) = self.check_open() {
            return Step::Refused(error);
        }
        match table.write(unit, from, piece) {
            Write::Absorbed(store) => {
                drop(table);
                self.start_stores(store.into_iter().collect());
                Step::Done(len)
            }
            Write::TakenOver => Step::Owned(unit..unit + 1),
            Write::Wait(told) => Step::WaitLocal(told),
            // It counts as a fetch so far, and now becomes a unit with guest bytes.
            Write::NeedsRoom => match leave.take().map_or_else(|| table.admit(Budget::Guest), Ok) {
                Ok(leave) => {
                    table.begin_prepare(unit, leave);
                    Step::Attach
                }
                Err(queue) => self.guest_bytes_full(table, queue),
            },
            Write::Free => match self.mapping_now(unit) {
                None | Some(Mapping::Data(_) | Mapping::Shared(_) | Mapping::Compressed(_)) => {
                    Step::LookAgain
                }
                // Whole units, or ones whose other bytes are zeros for certain: local I/O alone.
                Some(mapping) if len == self.unit || self.rest_is_zero(unit, mapping) => {
                    let units = self.own_run(&mut table, unit, (from + data.len() as u64) / self.unit);
                    Step::Owned(units)
                }
                Some(_) => match leave.take().map_or_else(|| table.admit(Budget::Guest), Ok) {
                    Ok(leave) => {
                        table.begin_write(unit);
                        Step::Begin(leave)
                    }
                    Err(queue) => self.guest_bytes_full(table, queue),
                },
            },
        }
    }

    /// What of `data`, which begins at guest offset `at`, lies in the first unit.
    fn first_piece<'a>(&self, at: u64, data: &'a Bytes) -> &'a [u8] {
        let len = (self.unit - at % self.unit).min(data.len() as u64);
        &data[..len as usize]
    }

    /// Takes room for a unit that the caller owns, and begins its entry.
    async fn begin_guest(self: &Arc<Self>, at: u64, data: &Bytes, leave: Leave) -> Result<u64, LayerError> {
        let unit = at / self.unit;
        let mut owned = Owned { image: self, units: unit..unit + 1 };
        let room = self.prepare(unit * self.unit, self.unit, Room::Data).await?;
        let (from, piece) = (at - unit * self.unit, self.first_piece(at, data));
        if let Some(merged) = self.merge_now(unit, from, piece) {
            self.write_file(room.at.expect("room for data has a place"), merged).await?;
            room.commit(CommitMode::Overwrite);
            self.note_commit(0);
            return Ok(piece.len() as u64);
        }
        let (fetch, store) = {
            let mut table = self.table();
            owned.units.end = unit;
            table.begin_guest(unit, (room, leave), from, piece, self.backing_end_now())
        };
        if let Some(fetch) = fetch {
            self.start_fetch(fetch, Class::Demand);
        }
        self.start_stores(store.into_iter().collect());
        Ok(piece.len() as u64)
    }

    /// The whole unit with `piece` at `from`, if what is behind it can be read without waiting.
    fn merge_now(&self, unit: u64, from: u64, piece: &[u8]) -> Option<Bytes> {
        let start = unit * self.unit;
        let (backing, end) = (self.backing.as_ref()?, self.backing_end_known()?);
        // Over a network a whole unit would be zeroed for nothing, at each write into a part of one.
        if self.unit > MERGE_BYTES_MAX || (start < end && !backing.may_read_now(start)) {
            return None;
        }
        let mut merged = BytesMut::zeroed(self.unit as usize);
        let behind = end.saturating_sub(start).min(self.unit) as usize;
        // A failure is told by the fetch, which tries again.
        backing.read_now(start, &mut merged[..behind])?.ok()?;
        merged[from as usize..][..piece.len()].copy_from_slice(piece);
        Some(merged.freeze())
    }

    /// Takes room for a unit that is being fetched, and gives it the guest's bytes.
    async fn attach(self: &Arc<Self>, at: u64, data: &Bytes) -> Result<u64, LayerError> {
        let unit = at / self.unit;
        let (from, piece) = (at - unit * self.unit, self.first_piece(at, data));
        let room = self.prepare(unit * self.unit, self.unit, Room::Data).await;
        let (store, done) = match room {
            Ok(room) => (self.table().attach(unit, room, from, piece), Ok(piece.len() as u64)),
            Err(error) => (self.table().end_prepare(unit), Err(error)),
        };
        self.start_stores(store.into_iter().collect());
        done
    }

    /// Bytes that wait for a dead origin hold the room: it is tried again, so that somebody is told.
    fn guest_bytes_full(&self, mut table: Table<'_>, queue: Queue) -> Step {
        let (fetches, stores) = table.retry_held();
        drop(table);
        self.start_flush_work(fetches, stores);
        Step::WaitTurn(queue)
    }

    /// Claims `unit`, and what follows of `whole` units while it is free and not data.
    pub(crate) fn own_run(&self, table: &mut Table<'_>, unit: u64, whole: u64) -> Range<u64> {
        let max = whole.min(CLAIM_BYTES_MAX / self.unit).max(1);
        let mut units = unit..unit;
        while units.end - unit < max {
            let next = units.end;
            let free = !table.is_busy(next)
                && matches!(self.mapping_now(next), Some(Mapping::Zero | Mapping::Absent));
            if next != unit && !free {
                break;
            }
            table.begin_write(next);
            units.end += 1;
        }
        units
    }

    pub(crate) fn rest_is_zero(&self, unit: u64, mapping: Mapping) -> bool {
        mapping == Mapping::Zero || unit * self.unit >= self.backing_end_now()
    }
}

/// Units that the holder owns: their entries are `Writing` and end with it.
pub(crate) struct Owned<'a> {
    pub(crate) image: &'a Image,
    pub(crate) units: Range<u64>,
}

impl Owned<'_> {
    /// Writes data from guest offset `at` to the first of the units. Returns the bytes of `data` that are in.
    async fn write(self, at: u64, data: &Bytes) -> Result<u64, LayerError> {
        let image = self.image;
        let start = self.units.start * image.unit;
        let want = (self.units.end - self.units.start) * image.unit;
        let room = image.prepare(start, want, Room::Data).await?;
        let to = room.at.expect("room for data has a place");
        let end = (start + room.len.min(want)).min(at + data.len() as u64);
        let data = data.slice(..(end - at) as usize);
        let len = data.len() as u64;
        if len == room.len {
            image.write_file(to, data).await?;
        } else if room.len <= MERGE_BYTES_MAX {
            let mut merged = BytesMut::zeroed(room.len as usize);
            merged[(at - start) as usize..][..data.len()].copy_from_slice(&data);
            image.write_file(to, merged.freeze()).await?;
        } else {
            image.file.write_zeroes(to, room.len).await.map_err(|error| image.failed(error))?;
            image.write_file(to + (at - start), data).await?;
        }
        room.commit(CommitMode::Overwrite);
        image.note_commit(0);
        Ok(len)
    }

    /// Makes the units read as zeros: by a link where that can be had and space need not be kept, else by zeros in new room.
    pub(crate) async fn write_zeroes(self, room: Room) -> Result<u64, LayerError> {
        let image = self.image;
        let mut at = self.units.start * image.unit;
        let end = self.units.end * image.unit;
        while at < end {
            let room = image.prepare(at, end - at, room).await?;
            if let Some(to) = room.at {
                image.file.write_zeroes(to, room.len).await.map_err(|error| image.failed(error))?;
            }
            at += room.len;
            room.commit(CommitMode::Overwrite);
            image.note_commit(0);
        }
        Ok(end - self.units.start * image.unit)
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        let mut table = self.image.table();
        for unit in self.units.clone() {
            table.end_write(unit);
        }
    }
}
