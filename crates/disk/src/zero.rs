//! Write-zeroes and trim.
//!
//! - Whole units that are not data become zero clusters; data is zeroed in place, and its cluster stays linked.
//! - Trim makes holes under whole units of data. Absent units stay absent: the backing goes on showing through.

use std::sync::Arc;

use bytes::Bytes;
use readonce_format::Mapping;

use crate::{LayerError, ZeroMode, image::Image, inflight::Write, write::Owned};

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
    Owned(std::ops::Range<u64>),
}

impl Image {
    /// Makes the range read as zeros.
    pub async fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<(), LayerError> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            self.check_latch()?;
            let extent = self.lookup(at, end - at).await?;
            at += match extent.mapping {
                Mapping::Data(from) => {
                    let zeroed = match mode.keep_space {
                        true => self.file.write_zeroes(from, extent.len).await,
                        false => self.file.punch_hole(from, extent.len).await,
                    };
                    zeroed.map_err(|error| self.failed(error))?;
                    extent.len
                }
                Mapping::Shared(_) | Mapping::Compressed(_) => return Err(LayerError::compressed()),
                Mapping::Zero | Mapping::Absent => {
                    let head = (self.unit - at % self.unit) % self.unit;
                    let part = if head > 0 { head.min(extent.len) } else { extent.len };
                    let ends_image = at + part == self.size();
                    if self.is_zero_now(at / self.unit) {
                        part.min(self.unit - at % self.unit)
                    } else if head > 0 || (part < self.unit && !ends_image) {
                        // The rest of it is the next round's: a unit may be 64 MiB, and many requests do this at once.
                        let part = part.min(PART_BYTES_MAX);
                        let zeros = Bytes::from(vec![0; part as usize]);
                        self.write(at, zeros).await?;
                        part
                    } else {
                        let units = if ends_image { part.div_ceil(self.unit) } else { part / self.unit };
                        let image = self.shared();
                        let done = self.detached(image.zero_absent(at / self.unit, units)).await?;
                        done.min(part)
                    }
                }
            };
        }
        Ok(())
    }

    /// The whole unit reads as zeros, and nothing in flight will change that.
    fn is_zero_now(&self, unit: u64) -> bool {
        let table = self.table();
        !table.is_busy(unit) && self.mapping_now(unit) == Some(Mapping::Zero)
    }

    /// Zeroes the first of `count` units that were not data a moment ago; returns the bytes done (0: look again).
    async fn zero_absent(self: Arc<Self>, unit: u64, count: u64) -> Result<u64, LayerError> {
        match self.claim_zero(unit, count) {
            Claim::Done => Ok(self.unit),
            Claim::LookAgain => Ok(0),
            Claim::Refused(error) => Err(error),
            Claim::WaitLocal(told) => {
                let _ = told.await;
                Ok(0)
            }
            Claim::Owned(units) => Owned { image: &self, units }.write_zeroes().await,
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
                    if let Some(store) = store {
                        self.start_store(store);
                    }
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

    /// Gives back the space of whole units of data.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), LayerError> {
        self.check_latch()?;
        let size = self.size();
        let mut at = offset.next_multiple_of(self.unit);
        let mut end = offset + len;
        if end < size {
            end -= end % self.unit;
        }
        while at < end {
            let extent = self.lookup(at, end - at).await?;
            if let Mapping::Data(from) = extent.mapping {
                self.file.punch_hole(from, extent.len).await.map_err(|error| self.failed(error))?;
            }
            at += extent.len;
        }
        Ok(())
    }
}
