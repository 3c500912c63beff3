//! Write-zeroes and trim.
//!
//! - Whole clusters become zero clusters: absent ones always, others where the format can unlink what they hold.
//! - Parts, and what a format cannot unlink, are zeroed in place; what is shared or compressed is copied first.
//! - A format without zero clusters has zeros written as data.
//! - Trim gives space back. Where the format can unlink, what was trimmed reads as zeros; else absent units stay absent, and
//!   the backing goes on showing through.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use readonce_format::{Mapping, Room};

use crate::{LayerError, ZeroMode, copy, image::Image, inflight::Write, write::Owned};

/// Bytes of zeros that are written to a part of a unit at a time.
const PART_BYTES_MAX: u64 = 1 << 20;

/// What to do with the first unit of a run to be zeroed.
enum Claim {
    /// It reads as zeros.
    Done,
    /// The map changed.
    LookAgain,
    /// The image is closed, or writes are off.
    Refused(LayerError),
    /// Another owner does local I/O.
    WaitLocal(tokio::sync::oneshot::Receiver<()>),
    /// The caller owns these units now.
    Owned(Range<u64>),
}

impl Image {
    /// Makes the range read as zeros.
    pub async fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<(), LayerError> {
        if mode.only_if_fast {
            self.check_zeroes_are_fast(offset..offset + len, mode).await?;
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            self.check_latch()?;
            at += self.zero_first(at..end, mode).await?;
        }
        Ok(())
    }

    /// Zeroes the first bytes of a range; returns how many (0: look again).
    async fn zero_first(&self, range: Range<u64>, mode: ZeroMode) -> Result<u64, LayerError> {
        let at = range.start;
        let in_place = self.enter_write();
        let extent = self.lookup(at, range.end - at).await?;
        let whole = self.whole_clusters(&range);
        match extent.mapping {
            _ if whole > 0 && !mode.keep_space && self.can_unlink(at) => {
                in_place.ended();
                if let Some(done) = self.unlink(at, whole).await? {
                    return Ok(done.min(range.end - at));
                }
                // Guest bytes beside it are not stored yet: what is data is zeroed in place, what is absent by its owner.
                let cluster_end = (at + self.cluster_size).min(range.end);
                let keep = ZeroMode { keep_space: true, ..mode };
                return Box::pin(self.zero_first(at..cluster_end, keep)).await;
            }
            Mapping::Data(from) => {
                let zeroed = match mode.keep_space {
                    true => self.file.write_zeroes(from, extent.len).await,
                    false => self.file.punch_hole(from, extent.len).await,
                };
                zeroed.map_err(|error| self.failed(error))?;
                in_place.ended();
                return Ok(extent.len);
            }
            _ => in_place.ended(),
        };
        let image = self.shared();
        match extent.mapping {
            Mapping::Shared(_) | Mapping::Compressed(_) if whole > 0 => {
                let done = self.detached(async move { image.zero_shared(at, whole).await }).await?;
                Ok(done.min(range.end - at))
            }
            Mapping::Shared(_) | Mapping::Compressed(_) => {
                let cluster = at / self.cluster_size;
                self.detached(async move { image.unshare(cluster).await }).await?;
                Ok(0)
            }
            _ => self.zero_not_data(at..at + extent.len).await,
        }
    }

    /// Zeroes the first bytes of a range that was not data a moment ago.
    async fn zero_not_data(&self, range: Range<u64>) -> Result<u64, LayerError> {
        let (at, part) = (range.start, range.end - range.start);
        let zeros = self.zeros_now(range.clone());
        if zeros > 0 {
            return Ok(zeros);
        }
        let head = (self.unit - at % self.unit) % self.unit;
        let part = if head > 0 { head.min(part) } else { part };
        let ends_image = at + part == self.size();
        if head > 0 || (part < self.unit && !ends_image) {
            // The rest of it is the next round's: a unit may be 64 MiB, and many requests do this at once.
            let part = part.min(PART_BYTES_MAX);
            self.write(at, Bytes::from(vec![0; part as usize])).await?;
            return Ok(part);
        }
        let units = if ends_image { part.div_ceil(self.unit) } else { part / self.unit };
        let image = self.shared();
        let done = self.detached(image.zero_absent(at / self.unit, units)).await?;
        Ok(done.min(part))
    }

    /// Bytes at the start of the range that the map shows as zeros, and nothing in flight will change that.
    fn zeros_now(&self, range: Range<u64>) -> u64 {
        let table = self.table();
        let units = range.start / self.unit..range.end.div_ceil(self.unit);
        let quiet_end = table.first_busy(units).map_or(range.end, |unit| unit * self.unit);
        if quiet_end <= range.start {
            return 0;
        }
        match self.mapper.lookup_now(range.start, quiet_end.min(range.end) - range.start) {
            Some(Ok(extent)) if extent.mapping == Mapping::Zero => extent.len,
            _ => 0,
        }
    }

    /// Zeroes the first of `count` units that were not data a moment ago; returns the bytes done (0: look again).
    async fn zero_absent(self: Arc<Self>, unit: u64, count: u64) -> Result<u64, LayerError> {
        let room = if self.abilities.zero { Room::Zero } else { Room::Data };
        let claim = self.claim_zero(unit, count);
        match claim {
            Claim::Done => Ok(self.unit),
            Claim::LookAgain => Ok(0),
            Claim::Refused(error) => Err(error),
            Claim::WaitLocal(told) => {
                let _ = told.await;
                Ok(0)
            }
            Claim::Owned(units) => Owned { image: &self, units }.write_zeroes(room).await,
        }
    }

    fn claim_zero(&self, unit: u64, count: u64) -> Claim {
        let mut table = self.table();
        if let Err(error) = self.check_open() {
            return Claim::Refused(error);
        }
        if table.is_busy(unit) {
            let zeros = vec![0; self.unit as usize];
            return match table.write(unit, 0, &zeros) {
                Write::Absorbed(store) => {
                    drop(table);
                    self.start_stores(store.into_iter().collect());
                    Claim::Done
                }
                Write::TakenOver => Claim::Owned(unit..unit + 1),
                Write::Wait(told) => Claim::WaitLocal(told),
                Write::NeedsRoom | Write::Free => {
                    panic!("a whole write of a unit in flight takes over or is absorbed")
                }
            };
        }
        match self.mapping_now(unit) {
            None | Some(Mapping::Data(_) | Mapping::Shared(_) | Mapping::Compressed(_)) => Claim::LookAgain,
            // It reads as zeros already, and goes on to do so.
            Some(Mapping::Zero) => Claim::Done,
            Some(Mapping::Absent) => Claim::Owned(self.own_run(&mut table, unit, count)),
        }
    }

    /// Whether whole clusters of data can become zero clusters.
    fn unlinks(&self) -> bool {
        self.abilities.zero && self.abilities.unlink
    }

    /// The cluster at `at` holds something that can be unlinked.
    fn can_unlink(&self, at: u64) -> bool {
        self.unlinks()
            && self.holds_now(at / self.cluster_size).is_some_and(|holds| holds.data || holds.shared)
    }

    /// Makes the first of `count` whole clusters zero clusters, whatever they hold; returns the bytes done (0: look again), or
    /// `None` where that cannot be.
    async fn unlink(&self, at: u64, count: u64) -> Result<Option<u64>, LayerError> {
        let image = self.shared();
        self.detached(async move {
            let cluster = at / image.cluster_size;
            let claim = image.claim_clusters(cluster, count, |holds| holds.data || holds.shared);
            match claim {
                copy::Claim::Owned(units) => {
                    Ok(Some(Owned { image: &image, units }.write_zeroes(Room::Zero).await?))
                }
                copy::Claim::LookAgain => Ok(Some(0)),
                copy::Claim::Guest => Ok(None),
                copy::Claim::WaitLocal(told) => {
                    let _ = told.await;
                    Ok(Some(0))
                }
                copy::Claim::Refused(error) => Err(error),
            }
        })
        .await
    }

    /// Writes zeros in new room for the first of `count` whole clusters that were shared or compressed a moment ago.
    async fn zero_shared(self: Arc<Self>, at: u64, count: u64) -> Result<u64, LayerError> {
        let claim = self.claim_clusters(at / self.cluster_size, count, |holds| holds.shared && !holds.data);
        match claim {
            copy::Claim::Owned(units) => Owned { image: &self, units }.write_zeroes(Room::Data).await,
            copy::Claim::LookAgain => Ok(0),
            copy::Claim::WaitLocal(told) => {
                let _ = told.await;
                Ok(0)
            }
            copy::Claim::Refused(error) => Err(error),
            copy::Claim::Guest => panic!("guest bytes have room, and there is none beside what is shared"),
        }
    }

    /// Zeros are fast where none is written out: in place, or by a link. Tells before anything is changed.
    async fn check_zeroes_are_fast(&self, range: Range<u64>, mode: ZeroMode) -> Result<(), LayerError> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.lookup(at, range.end - at).await?;
            let whole = |size: u64| {
                let end = at + extent.len;
                at.is_multiple_of(size) && (end.is_multiple_of(size) || end == self.size())
            };
            let fast = match extent.mapping {
                Mapping::Data(_) | Mapping::Zero => true,
                // An extent may end inside a cluster; what is asked may go on.
                Mapping::Shared(_) | Mapping::Compressed(_) => {
                    let start = at - at % self.cluster_size;
                    let covered = start >= range.start && self.whole_clusters(&(start..range.end)) > 0;
                    self.unlinks() && !mode.keep_space && covered
                }
                Mapping::Absent => self.abilities.zero && whole(self.unit),
            };
            if !fast {
                return Err(LayerError::NotFast);
            }
            at += extent.len;
        }
        Ok(())
    }

    /// Gives back the space of what lies in the range.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), LayerError> {
        let size = self.size();
        let mut at = offset.next_multiple_of(self.unit);
        let mut end = offset + len;
        if end < size {
            end -= end % self.unit;
        }
        while at < end {
            self.check_latch()?;
            at += self.trim_first(at..end).await?;
        }
        Ok(())
    }

    /// Trims the first units of a range; returns how many bytes (0: look again).
    async fn trim_first(&self, range: Range<u64>) -> Result<u64, LayerError> {
        let at = range.start;
        let in_place = self.enter_write();
        let extent = self.lookup(at, range.end - at).await?;
        let whole = self.whole_clusters(&range);
        match extent.mapping {
            _ if whole > 0 && self.can_unlink(at) => {
                in_place.ended();
                let done = self.unlink(at, whole).await?;
                // Guest bytes beside it, newer than this, are on their way: what is there stays.
                Ok(done.unwrap_or(self.cluster_size).min(range.end - at))
            }
            Mapping::Data(from) => {
                self.file.punch_hole(from, extent.len).await.map_err(|error| self.failed(error))?;
                in_place.ended();
                Ok(extent.len)
            }
            Mapping::Absent if self.unlinks() && at < self.backing_end_now() => {
                in_place.ended();
                let whole_bytes = (whole * self.cluster_size).min(extent.len);
                let whole_units = whole_bytes - whole_bytes % self.unit;
                match whole_units {
                    0 => Ok(extent.len.min(self.cluster_size - at % self.cluster_size)),
                    bytes => self.zero_not_data(at..at + bytes).await,
                }
            }
            _ => {
                in_place.ended();
                Ok(extent.len)
            }
        }
    }
}
