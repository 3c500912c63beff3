//! Which layer holds a range, and what reads as zeros: block status, down the chain.

use std::ops::Range;

use readonce_format::{Mapper, Mapping};

use crate::{LayerError, StatusExtent, source::Source};

/// The first fill unit that touches a guest range and holds bytes that its map does not show yet.
pub(crate) type Hidden<'a> = &'a (dyn Fn(Range<u64>) -> Option<Range<u64>> + Sync);

/// The states of a range of a layer, its own depth counted as 1. Extents of one state are merged.
pub(crate) async fn of(
    mapper: &dyn Mapper,
    backing: Option<&dyn Source>,
    hidden: Option<Hidden<'_>>,
    offset: u64,
    len: u64,
    count_max: usize,
) -> Result<Vec<StatusExtent>, LayerError> {
    let end = offset + len;
    let mut extents = Extents { list: Vec::new(), count_max };
    let mut at = offset;
    while at < end && !extents.is_full() {
        // First the table, then the map: what left the table before we asked is in the map when we look.
        let mut len_max = end - at;
        if let Some(unit) = hidden.and_then(|hidden| hidden(at..end)) {
            if unit.start <= at {
                let len = unit.end.min(end) - at;
                extents.push(StatusExtent { len, zero: false, hole: false, depth: 1 });
                at += len;
                continue;
            }
            len_max = unit.start - at;
        }
        let extent = mapper.lookup(at, len_max).await?;
        match (extent.mapping, backing) {
            (Mapping::Data(_) | Mapping::Shared(_) | Mapping::Compressed(_), _) => {
                extents.push(StatusExtent { len: extent.len, zero: false, hole: false, depth: 1 });
            }
            (Mapping::Zero, _) => {
                extents.push(StatusExtent { len: extent.len, zero: true, hole: true, depth: 1 });
            }
            (Mapping::Absent, None) => {
                extents.push(StatusExtent { len: extent.len, zero: true, hole: true, depth: 0 });
            }
            (Mapping::Absent, Some(backing)) => {
                // A backing that cannot be opened now fails the read, which tells why; its state is that it may hold data.
                let unknown = [StatusExtent { len: extent.len, zero: false, hole: false, depth: 1 }];
                let backing_end = match backing.size().await {
                    Ok(end) => end.clamp(at, at + extent.len),
                    Err(_) => at + extent.len,
                };
                if at == backing_end {
                    extents.push(StatusExtent { len: extent.len, zero: true, hole: true, depth: 0 });
                } else {
                    let below = backing.status(at, backing_end - at, count_max).await;
                    for below in below.as_deref().unwrap_or(&unknown) {
                        let depth = if below.depth == 0 { 0 } else { below.depth + 1 };
                        at += below.len;
                        extents.push(StatusExtent { depth, ..*below });
                    }
                    continue;
                }
            }
        }
        at += extent.len;
    }
    extents.list.truncate(count_max);
    Ok(extents.list)
}

struct Extents {
    list: Vec<StatusExtent>,
    count_max: usize,
}

impl Extents {
    fn push(&mut self, extent: StatusExtent) {
        match self.list.last_mut() {
            Some(last) if (last.zero, last.hole, last.depth) == (extent.zero, extent.hole, extent.depth) => {
                last.len += extent.len;
            }
            _ => self.list.push(extent),
        }
    }

    /// One more than wanted is collected, so that the last wanted one is as long as it can be.
    fn is_full(&self) -> bool {
        self.list.len() > self.count_max
    }
}
