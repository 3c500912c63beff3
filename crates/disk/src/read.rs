//! The waiting read: local data, zeros, and bytes that come from the backing.
//!
//! Each round plans the whole range, starts what must be fetched, then collects. What was written meanwhile is read again in
//! the next round.

use std::{collections::VecDeque, ops::Range};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream::FuturesUnordered};
use readonce_format::{Compressed, Mapping};
use readonce_origin::{Class, Sink};
use tokio::sync::oneshot;

use crate::{
    LayerError,
    compressed::part_of,
    image::Image,
    inflight::{Budget, Delivery, Fetch, Leave, Queue, Read},
    source::sink_zeros,
    uses::Use,
};

/// Bytes that one fetch asks for; a longer want is cut, so that several connections work on it.
pub const FETCH_RUN_BYTES_MAX: u64 = 1 << 20;

/// What a round has to collect.
#[derive(Default)]
struct Plan {
    /// Guest offset, file offset, length.
    local: Vec<(u64, u64, u64)>,
    /// Guest range, and where its cluster is.
    compressed: Vec<(Range<u64>, Compressed)>,
    /// Straight from the backing, not kept.
    through: Vec<Range<u64>>,
    /// Guest range, and who will tell.
    waits: Vec<(Range<u64>, oneshot::Receiver<Delivery>)>,
    /// To look at again.
    again: VecDeque<Range<u64>>,
    /// Where the backing ends must be known for that.
    wants_backing_end: bool,
}

/// Why a pass under the table's lock ended early.
enum Stop {
    /// The table is full: where to wait.
    Full(Queue),
    /// Where the backing ends must be known first.
    BackingEnd,
}

impl Image {
    /// Reads `len` bytes at `offset`.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, LayerError> {
        let inside = self.enter();
        if let Some(extent) = self.mapper.lookup_now(offset, len as u64) {
            let extent = extent?;
            match extent.mapping {
                _ if extent.len < len as u64 => {}
                Mapping::Data(at) | Mapping::Shared(at) => return Ok(self.file.read(at, len).await?),
                Mapping::Compressed(place) => return self.clusters.read(&place, len).await,
                Mapping::Zero | Mapping::Absent => {}
            }
        }
        drop(inside);
        let mut buf = BytesMut::zeroed(len);
        let mut place = |at: u64, bytes: Bytes| {
            let from = (at - offset) as usize;
            buf[from..from + bytes.len()].copy_from_slice(&bytes);
        };
        self.read_pieces(offset..offset + len as u64, Class::Demand, &mut place).await?;
        Ok(buf.freeze())
    }

    /// Reads `range`, handing out pieces in any order.
    pub(crate) async fn read_pieces(
        &self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'_>,
    ) -> Result<(), LayerError> {
        let mut todo = VecDeque::from([range]);
        while let Some(range) = todo.pop_front() {
            let mut plan = Plan::default();
            let inside = self.enter();
            let mut at = range.start;
            while at < range.end {
                let extent = self.lookup(at, range.end - at).await?;
                let part = at..at + extent.len;
                match extent.mapping {
                    Mapping::Compressed(place) => plan.compressed.push((part.clone(), place)),
                    Mapping::Data(from) | Mapping::Shared(from) => plan.local.push((at, from, extent.len)),
                    Mapping::Zero | Mapping::Absent => {
                        self.plan_absent(part.clone(), class, sink, &mut plan).await?;
                    }
                }
                at = part.end;
            }
            todo.append(&mut plan.again);
            let wants_backing_end = plan.wants_backing_end;
            self.collect(plan, inside, class, sink, &mut todo).await?;
            if wants_backing_end {
                self.backing_end().await?;
            }
        }
        Ok(())
    }

    async fn collect(
        &self,
        plan: Plan,
        inside: Option<Use<'_>>,
        class: Class,
        sink: Sink<'_>,
        todo: &mut VecDeque<Range<u64>>,
    ) -> Result<(), LayerError> {
        // All at once: they are decompressed side by side.
        let coming: Vec<_> = plan.compressed.iter().map(|(_, place)| self.clusters.start(place)).collect();
        let mut reads: FuturesUnordered<_> = plan
            .local
            .iter()
            .map(|&(at, from, len)| async move {
                let len = usize::try_from(len).expect("a request fits in memory");
                Ok::<_, LayerError>((at, self.file.read(from, len).await?))
            })
            .collect();
        while let Some(read) = reads.next().await {
            let (at, bytes) = read?;
            sink(at, bytes);
        }
        for ((range, place), coming) in plan.compressed.into_iter().zip(coming) {
            let len = usize::try_from(range.end - range.start).expect("at most a cluster");
            sink(range.start, part_of(&coming.bytes().await?, place.skip, len)?);
        }
        drop(inside);
        for range in plan.through {
            let backing = self.backing.as_ref().expect("only a backing is read through");
            backing.fetch(range, class, sink).await?;
        }
        for (range, told) in plan.waits {
            match told.await {
                Ok(Delivery::Bytes(bytes)) => sink(range.start, bytes),
                Ok(Delivery::Failed(error)) => return Err(error),
                Ok(Delivery::Retry) | Err(_) => todo.push_back(range),
            }
        }
        Ok(())
    }

    /// Plans a range that the map did not show as data a moment ago. Where the backing ends is asked only once it matters: what
    /// is local can be read without it.
    async fn plan_absent(
        &self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'_>,
        plan: &mut Plan,
    ) -> Result<(), LayerError> {
        let mut at = range.start;
        let mut leave = None;
        while at < range.end {
            let mut fetches = Vec::new();
            let backing_end = self.backing_end_known();
            let stop = self.claim(&mut at, &range, backing_end, &mut leave, sink, plan, &mut fetches);
            for fetch in fetches {
                self.start_fetch(fetch, class);
            }
            match stop {
                None => {}
                // It may be away, and who is inside keeps a close waiting.
                Some(Stop::BackingEnd) => {
                    plan.wants_backing_end = true;
                    plan.again.push_back(at..range.end);
                    return Ok(());
                }
                // What is on its way is collected first: it waits in memory.
                Some(Stop::Full(_)) if !plan.waits.is_empty() => {
                    plan.again.push_back(at..range.end);
                    return Ok(());
                }
                Some(Stop::Full(queue)) => leave = Some(queue.turn().await?),
            }
        }
        Ok(())
    }

    /// One pass under the table's lock over `at..range.end`; moves `at` on. `leave` is for the first unit that needs one.
    /// Returns why it stopped early.
    #[allow(clippy::too_many_arguments, reason = "the state of one pass")]
    fn claim(
        &self,
        at: &mut u64,
        range: &Range<u64>,
        backing_end: Option<u64>,
        leave: &mut Option<Leave>,
        sink: Sink<'_>,
        plan: &mut Plan,
        fetches: &mut Vec<Fetch>,
    ) -> Option<Stop> {
        let mut table = self.table();
        while *at < range.end {
            let unit = *at / self.unit;
            let part = *at..((unit + 1) * self.unit).min(range.end);
            let inside = part.start - unit * self.unit..part.end - unit * self.unit;
            match table.read(unit, inside.clone()) {
                Read::Known(bytes) => sink(part.start, bytes),
                Read::Wait(told, fetch) => {
                    fetches.extend(fetch);
                    plan.waits.push((part.clone(), told));
                }
                Read::Free => match (self.mapping_now(unit), backing_end) {
                    (Some(Mapping::Zero), _) => sink_zeros(part.clone(), sink),
                    (Some(Mapping::Absent), None) => return Some(Stop::BackingEnd),
                    (Some(Mapping::Absent), Some(backing_end)) if part.start >= backing_end => {
                        sink_zeros(part.clone(), sink);
                    }
                    (Some(Mapping::Absent), Some(backing_end)) if !self.copy_on_read() => {
                        let end = part.end.min(backing_end);
                        match plan.through.last_mut() {
                            Some(last) if last.end == part.start => last.end = end,
                            _ => plan.through.push(part.start..end),
                        }
                        sink_zeros(end..part.end, sink);
                    }
                    (Some(Mapping::Absent), Some(backing_end)) => {
                        let leave = match leave.take().map_or_else(|| table.admit(Budget::Fetch), Ok) {
                            Ok(leave) => leave,
                            Err(queue) => return Some(Stop::Full(queue)),
                        };
                        self.extend_or_begin(&mut table, unit, leave, backing_end, fetches);
                        let Read::Wait(told, None) = table.read(unit, inside) else {
                            panic!("a fetch that has just begun knows nothing yet")
                        };
                        plan.waits.push((part.clone(), told));
                    }
                    // Written meanwhile, or its table went out of memory.
                    (Some(Mapping::Data(_) | Mapping::Shared(_) | Mapping::Compressed(_)) | None, _) => {
                        plan.again.push_back(part.clone())
                    }
                },
            }
            *at = part.end;
        }
        None
    }

    /// Adds `unit` to the fetch begun just before it, or begins one.
    fn extend_or_begin(
        &self,
        table: &mut crate::image::Table<'_>,
        unit: u64,
        leave: Leave,
        backing_end: u64,
        fetches: &mut Vec<Fetch>,
    ) {
        let leave = match fetches.last_mut() {
            Some(last)
                if last.units.end == unit
                    && (last.units.end - last.units.start) * self.unit < FETCH_RUN_BYTES_MAX =>
            {
                table.extend_fetch(last, leave, backing_end)
            }
            _ => Err(leave),
        };
        if let Err(leave) = leave {
            fetches.push(table.begin_fetch(unit, leave, backing_end));
        }
    }
}
