//! A base: a read-only layer of a chain, in any format, over any origin.
//!
//! Nothing is ever written here, and nothing is kept: the image above keeps what it wants.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, OnceLock},
};

use readonce_format::{Extent, Mapper, Mapping};
use readonce_origin::{Class, Origin, Sink};
use readonce_storage::{BoxFuture, ReadAt, Rt};

use crate::{
    LayerError, StatusExtent,
    compressed::{Clusters, Coming, part_of},
    index::{Found, Place},
    source::{Source, sink_zeros},
};

/// Compressed clusters of one request that are decompressed ahead of the one that is handed out.
pub(crate) const AHEAD_MAX: usize = 64;

/// A read-only layer.
pub struct Base {
    mapper: Arc<dyn Mapper>,
    leaf: Arc<Leaf>,
    /// Where a file ended that holds the data alone, when it was opened: it may be shorter than what the tables name, and reads as zeros
    /// from there on.
    data_end: Option<u64>,
    backing: Option<Arc<dyn Source>>,
    /// Where the backing ends, once known.
    backing_end: OnceLock<u64>,
}

/// The bytes of one layer that does not change.
pub struct Leaf {
    data: Arc<dyn Origin>,
    mapper: Arc<dyn Mapper>,
    pub(crate) clusters: Arc<Clusters>,
}

/// Where a base's bytes are.
pub struct BaseFiles {
    /// The layer's own file: compressed clusters.
    pub own: Arc<dyn ReadAt>,
    /// The file that holds its data; the same, in most images.
    pub data: Arc<dyn Origin>,
}

impl Base {
    /// A layer that `mapper` maps onto `files`, above `backing`.
    pub fn new(mapper: Arc<dyn Mapper>, files: BaseFiles, backing: Option<Arc<dyn Source>>, rt: &Rt) -> Self {
        let apart = !std::ptr::addr_eq(Arc::as_ptr(&files.own), Arc::as_ptr(&files.data));
        let data_end = apart.then(|| files.data.len());
        let clusters = Clusters::new(files.own, mapper.geometry().cluster_size, Arc::clone(rt));
        let leaf = Arc::new(Leaf { data: files.data, mapper: Arc::clone(&mapper), clusters });
        Self { mapper, leaf, data_end, backing, backing_end: OnceLock::new() }
    }

    async fn backing_end(&self, backing: &Arc<dyn Source>) -> Result<u64, LayerError> {
        if let Some(&end) = self.backing_end.get() {
            return Ok(end);
        }
        let end = backing.size().await?;
        Ok(*self.backing_end.get_or_init(|| end))
    }

    async fn lookup(&self, offset: u64, len_max: u64) -> Result<Extent, LayerError> {
        let extent = match self.mapper.lookup_now(offset, len_max) {
            Some(extent) => extent?,
            None => self.mapper.lookup(offset, len_max).await?,
        };
        Ok(self.inside_data(extent))
    }

    /// The extent as far as the file has it that holds the data, or zeros past its end.
    fn inside_data(&self, extent: Extent) -> Extent {
        let (Mapping::Data(at) | Mapping::Shared(at), Some(end)) = (extent.mapping, self.data_end) else {
            return extent;
        };
        match end.saturating_sub(at) {
            0 => Extent { mapping: Mapping::Zero, ..extent },
            left => Extent { len: extent.len.min(left), ..extent },
        }
    }

    async fn find_place(&self, offset: u64, len_max: u64) -> Result<Option<Found>, LayerError> {
        let Extent { mapping, mut len } = self.lookup(offset, len_max).await?;
        let place = match (mapping, &self.backing) {
            (Mapping::Data(at) | Mapping::Shared(at), _) => Place::Data(Arc::clone(&self.leaf), at),
            (Mapping::Compressed(place), _) => Place::Compressed(Arc::clone(&self.leaf), place),
            (Mapping::Absent, Some(backing)) => {
                let end = self.backing_end(backing).await?;
                if offset < end {
                    len = len.min(end - offset);
                    return backing.find(offset, len).await;
                }
                Place::Zero
            }
            (Mapping::Zero | Mapping::Absent, _) => Place::Zero,
        };
        Ok(Some(Found { place, len }))
    }

    async fn fetch_range(&self, range: Range<u64>, class: Class, sink: Sink<'_>) -> Result<(), LayerError> {
        let mut ahead = VecDeque::new();
        let mut at = range.start;
        while at < range.end {
            let extent = self.lookup(at, range.end - at).await?;
            let part = at..at + extent.len;
            match (extent.mapping, &self.backing) {
                (Mapping::Compressed(place), _) => {
                    if ahead.len() == AHEAD_MAX
                        && let Some(first) = ahead.pop_front()
                    {
                        hand_out(first, sink).await?;
                    }
                    ahead.push_back((part.clone(), place.skip, self.leaf.clusters.start(&place)));
                }
                (Mapping::Data(offset) | Mapping::Shared(offset), _) => {
                    self.leaf.fetch(offset, part.clone(), class, sink).await?;
                }
                (Mapping::Absent, Some(backing)) => {
                    let end = self.backing_end(backing).await?.clamp(part.start, part.end);
                    if part.start < end {
                        backing.fetch(part.start..end, class, sink).await?;
                    }
                    sink_zeros(end..part.end, sink);
                }
                (Mapping::Zero | Mapping::Absent, _) => sink_zeros(part.clone(), sink),
            }
            at = part.end;
        }
        for cluster in ahead {
            hand_out(cluster, sink).await?;
        }
        Ok(())
    }
}

impl Leaf {
    /// Fetches data from byte offset `from` on for a guest range.
    pub(crate) async fn fetch(
        &self,
        from: u64,
        range: Range<u64>,
        class: Class,
        sink: Sink<'_>,
    ) -> Result<(), LayerError> {
        let mut shift = |at: u64, bytes| sink(at - from + range.start, bytes);
        let from = from..from + (range.end - range.start);
        // Clusters that do not compress lie among those that do, which are read with their neighbours: each would come twice.
        match self.mapper.names_compressed() {
            true => self.data.fetch_around(from, class, &mut shift).await?,
            false => self.data.fetch(from, class, &mut shift).await?,
        }
        Ok(())
    }

    pub(crate) fn may_read_now(&self, from: u64) -> bool {
        self.data.may_read_now(from)
    }

    pub(crate) fn read_now(&self, from: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        Some(self.data.read_now(from, buf)?.map_err(LayerError::from))
    }
}

/// Hands out a guest range that lies inside a compressed cluster, from so far inside it.
pub(crate) async fn hand_out(
    (range, skip, coming): (Range<u64>, u64, Coming),
    sink: Sink<'_>,
) -> Result<(), LayerError> {
    let len = usize::try_from(range.end - range.start).expect("at most a cluster");
    sink(range.start, part_of(&coming.bytes().await?, skip, len)?);
    Ok(())
}

impl Source for Base {
    fn size(&self) -> BoxFuture<'_, Result<u64, LayerError>> {
        Box::pin(std::future::ready(Ok(self.mapper.geometry().size)))
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        let mut done = 0usize;
        while done < buf.len() {
            let at = offset + done as u64;
            let extent = match self.mapper.lookup_now(at, (buf.len() - done) as u64)? {
                Ok(extent) => self.inside_data(extent),
                Err(error) => return Some(Err(error.into())),
            };
            let part = &mut buf[done..done + extent.len as usize];
            match (extent.mapping, &self.backing) {
                (Mapping::Compressed(place), _) => {
                    if let Err(error) = self.leaf.clusters.read_now(&place, part)? {
                        return Some(Err(error));
                    }
                }
                (Mapping::Data(from) | Mapping::Shared(from), _) => {
                    if let Err(error) = self.leaf.read_now(from, part)? {
                        return Some(Err(error));
                    }
                }
                // A backing that ends inside is left to the waiting call.
                (Mapping::Absent, Some(backing)) => {
                    if self.backing_end.get().is_none_or(|&end| at + extent.len > end) {
                        return None;
                    }
                    if let Err(error) = backing.read_now(at, part)? {
                        return Some(Err(error));
                    }
                }
                (Mapping::Zero | Mapping::Absent, _) => part.fill(0),
            }
            done += extent.len as usize;
        }
        Some(Ok(()))
    }

    fn may_read_now(&self, offset: u64) -> bool {
        let Some(extent) = self.mapper.lookup_now(offset, 1) else { return false };
        match (extent.map(|extent| extent.mapping), &self.backing) {
            (Ok(Mapping::Data(from) | Mapping::Shared(from)), _) => self.leaf.may_read_now(from),
            (Ok(Mapping::Absent), Some(backing)) => backing.may_read_now(offset),
            _ => true,
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

    fn find(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Option<Found>, LayerError>> {
        Box::pin(self.find_place(offset, len_max))
    }

    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, LayerError>> {
        Box::pin(crate::status::of(&*self.mapper, self.backing.as_deref(), None, offset, len, count_max))
    }
}
