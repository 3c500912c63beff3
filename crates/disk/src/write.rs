//! The waiting write: in place where the map shows data, else through the in-flight table.
//!
//! - A write of whole absent units takes room, writes, links: no byte of the backing is needed.
//! - A write into a part of an absent unit is absorbed by the unit's entry and completes; the fetch of the rest has begun.
//! - Room in the image is taken before a write completes, so "no space" is told to the write that meets it.
//! - What claims a unit runs detached from the caller, who may stop waiting at any moment.

use std::{ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use readonce_format::{CommitMode, Mapping, Reservation, Room};
use readonce_origin::Class;

use crate::{
    LayerError,
    image::Image,
    inflight::{Budget, Write},
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
    /// Room for the first unit is needed first.
    Prepare,
    /// Another owner does local I/O.
    WaitLocal(tokio::sync::oneshot::Receiver<()>),
    /// The table is full.
    WaitRoom(tokio::sync::oneshot::Receiver<Result<(), LayerError>>),
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
            let extent = self.lookup(at, end - at).await?;
            let part = data.slice((at - offset) as usize..(at - offset + extent.len) as usize);
            match extent.mapping {
                Mapping::Data(to) => {
                    self.write_file(to, part).await?;
                    at += extent.len;
                }
                Mapping::Shared(_) | Mapping::Compressed(_) => return Err(LayerError::compressed()),
                Mapping::Zero | Mapping::Absent => {
                    let image = self.shared();
                    at += self.detached(async move { image.write_absent(at, part).await }).await?;
                }
            }
        }
        Ok(())
    }

    /// Writes the first bytes of `data` to units that were not data a moment ago; returns how many (0: look again).
    async fn write_absent(self: Arc<Self>, at: u64, data: Bytes) -> Result<u64, LayerError> {
        let mut room = None;
        loop {
            // A temporary must not keep the table locked across the waits below.
            let step = self.claim_write(at, &data, &mut room);
            match step {
                Step::Done(len) => return Ok(len),
                Step::LookAgain => return Ok(0),
                Step::Refused(error) => return Err(error),
                Step::Prepare => {
                    let unit = at / self.unit;
                    let prepared = self.mapper.prepare(unit * self.unit, self.unit, Room::Data).await;
                    room = Some(prepared.map_err(|error| self.failed(error))?);
                }
                Step::WaitLocal(told) => {
                    let _ = told.await;
                    return Ok(0);
                }
                Step::WaitRoom(told) => {
                    drop(room.take());
                    told.await.unwrap_or(Ok(()))?;
                }
                Step::Owned(units) => {
                    let owned = Owned { image: &self, units };
                    return owned.write(at, &data, room.take()).await;
                }
            }
        }
    }

    fn claim_write(&self, at: u64, data: &Bytes, room: &mut Option<Reservation>) -> Step {
        let unit = at / self.unit;
        let from = at - unit * self.unit;
        let len = (self.unit - from).min(data.len() as u64);
        let piece = &data[..len as usize];
        let mut table = self.table();
        // Under the lock: `close` looks for owners after it has closed the door.
        if let Err(error) = self.check_open() {
            return Step::Refused(error);
        }
        match table.write(unit, from, piece) {
            Write::Absorbed(store) => {
                drop(table);
                if let Some(store) = store {
                    self.start_store(store);
                }
                Step::Done(len)
            }
            Write::TakenOver => Step::Owned(unit..unit + 1),
            Write::Wait(told) => Step::WaitLocal(told),
            Write::NeedsRoom => {
                // It counts as a fetch so far, and now becomes a unit with guest bytes.
                if let Err(told) = table.admit(Budget::Guest) {
                    return self.guest_bytes_full(table, told);
                }
                match room.take() {
                    None => Step::Prepare,
                    Some(prepared) => match table.attach(unit, prepared) {
                        Ok(()) => {
                            let Write::Absorbed(store) = table.write(unit, from, piece) else {
                                panic!("a unit with room absorbs")
                            };
                            drop(table);
                            if let Some(store) = store {
                                self.start_store(store);
                            }
                            Step::Done(len)
                        }
                        Err(prepared) => {
                            *room = Some(prepared);
                            Step::LookAgain
                        }
                    },
                }
            }
            Write::Free => match self.mapping_now(unit) {
                None | Some(Mapping::Data(_)) => Step::LookAgain,
                // Whole units, or ones whose other bytes are zeros for certain: local I/O alone.
                Some(mapping) if len == self.unit || self.rest_is_zero(unit, mapping) => {
                    let units = self.own_run(&mut table, unit, (from + data.len() as u64) / self.unit);
                    Step::Owned(units)
                }
                Some(_) => {
                    if let Err(told) = table.admit(Budget::Guest) {
                        return self.guest_bytes_full(table, told);
                    }
                    let Some(prepared) = room.take() else { return Step::Prepare };
                    let (fetch, store) =
                        table.begin_guest(unit, prepared, from, piece, self.backing_end_now());
                    drop(table);
                    if let Some(fetch) = fetch {
                        self.start_fetch(fetch, Class::Demand);
                    }
                    if let Some(store) = store {
                        self.start_store(store);
                    }
                    Step::Done(len)
                }
            },
        }
    }

    /// Bytes that wait for a dead origin hold the room: it is tried again, so that somebody is told.
    fn guest_bytes_full(
        &self,
        mut table: crate::image::Table<'_>,
        told: tokio::sync::oneshot::Receiver<Result<(), LayerError>>,
    ) -> Step {
        let (fetches, stores) = table.retry_held();
        drop(table);
        self.start_flush_work(fetches, stores);
        Step::WaitRoom(told)
    }

    /// Claims `unit`, and what follows of `whole` units while it is free and not data.
    pub(crate) fn own_run(&self, table: &mut crate::image::Table<'_>, unit: u64, whole: u64) -> Range<u64> {
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
    /// Writes data from guest offset `at` to the first of the units, in room that is prepared where not given. Returns the
    /// bytes of `data` that are in.
    async fn write(self, at: u64, data: &Bytes, room: Option<Reservation>) -> Result<u64, LayerError> {
        let image = self.image;
        let start = self.units.start * image.unit;
        let want = (self.units.end - self.units.start) * image.unit;
        let room = match room {
            Some(room) => room,
            None => {
                image.mapper.prepare(start, want, Room::Data).await.map_err(|error| image.failed(error))?
            }
        };
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
        image.note_commit();
        Ok(len)
    }

    /// Makes the units read as zeros.
    pub(crate) async fn write_zeroes(self) -> Result<u64, LayerError> {
        let image = self.image;
        let mut at = self.units.start * image.unit;
        let end = self.units.end * image.unit;
        while at < end {
            let room =
                image.mapper.prepare(at, end - at, Room::Zero).await.map_err(|error| image.failed(error))?;
            at += room.len;
            room.commit(CommitMode::Overwrite);
            image.note_commit();
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
