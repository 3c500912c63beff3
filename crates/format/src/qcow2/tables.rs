//! Tables in memory: the L1 table, cached L2 slices, and how a slice is read.
//!
//! - There is at most one copy of an L2 slice in memory that anyone can find. A slice is read, pinned and put into the cache
//!   under the load lock of its shard only, and whoever holds that lock looks for a pinned or cached copy first, and asks the
//!   L1 table where to read. So a slice that was read before a change, or from a table that was replaced, can never stand
//!   for the changed one.
//! - A pinned slice is found in `pinned` until its last pin goes. The writer pins a slice from `prepare` until its
//!   changes are in the file.
//! - Memory: the cache, the pinned slices (bounded by what is in flight and unlinked), and the L1 table.
//!
//! Not here: which changes are on disk (`links`, `flush`).

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, OnceLock},
};

use readonce_storage::{
    ReadAt, Storage,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    chunks::read_padded,
    entry::{COPIED, OFFSET_MASK, Place, Rules},
    header::Header,
    known::Known,
    l1::{L1, L1Entry},
    layout::{Layout, SLICE_BYTES_MAX},
    slice::{Sharing, Slice},
};
use crate::{
    Extent, FormatError, Geometry, Mapping,
    cache::Cache,
    number::{index, round_down, round_up},
};

const SHARDS: usize = 64;
/// Slices of a table that belong to one shard, and that an image open for reading reads at once where it has to wait for
/// them: 64 KiB, so that tables that come over the network cost few requests.
const GROUP_SLICES: u64 = 16;

/// A part of the slices.
#[derive(Default)]
struct Shard {
    /// Held while a slice of this shard is read, pinned or put into the cache.
    load: tokio::sync::Mutex<()>,
    pinned: Mutex<BTreeMap<u64, Pinned>>,
}

struct Pinned {
    slice: Arc<Slice>,
    pins: u64,
}

/// The tables of an open image.
pub(super) struct Tables {
    file: Arc<dyn ReadAt>,
    pub(super) rules: Rules,
    pub(super) l1: L1,
    cache: Cache<Slice>,
    shards: Box<[Shard]>,
    /// For writing.
    writing: OnceLock<Writing>,
    /// Of the guest bytes that a slice maps, as a power of two.
    slice_span_bits: u32,
    /// Where the file's last cluster is not whole: from the file's end to the cluster's.
    partial: Range<u64>,
    /// A slice that was read names compressed clusters.
    compressed: AtomicBool,
}

/// What only an image that is open for writing has.
struct Writing {
    file: Arc<dyn Storage>,
    known: Known,
}

impl Tables {
    /// The tables of an image that is open for reading, or, until `load_l1`, for nothing yet.
    pub(super) fn new(file: Arc<dyn ReadAt>, header: &Header) -> Self {
        let layout = header.layout;
        let file_len = file.len();
        let clusters_end = round_up(file_len, layout.cluster_size()).unwrap_or(file_len);
        Self {
            rules: Rules { layout, codec: header.codec(), file_len },
            l1: L1::new(file.clone(), header),
            file,
            cache: Cache::new(layout.image_size.div_ceil(layout.slice_span())),
            shards: std::iter::repeat_with(Shard::default).take(SHARDS).collect(),
            writing: OnceLock::new(),
            slice_span_bits: layout.slice_span().trailing_zeros(),
            partial: if layout.external_data { 0..0 } else { file_len..clusters_end },
            compressed: AtomicBool::new(false),
        }
    }

    /// Whether a slice that was read, for reading alone, names compressed clusters.
    pub(super) fn names_compressed(&self) -> bool {
        self.compressed.load(Ordering::Relaxed)
    }

    /// Makes the tables those of an image that is open for writing: reads the L1 table. `metadata` is where all other
    /// metadata lies, but for L2 tables.
    ///
    /// L1 entries that name a table in other metadata, or one that another entry calls its own, are bad.
    pub(super) async fn load_l1(
        &self,
        file: Arc<dyn Storage>,
        mut metadata: Vec<Range<u64>>,
    ) -> Result<(), FormatError> {
        let cluster_size = self.rules.layout.cluster_size();
        let (l1_start, l1_end) = self.l1.region();
        metadata.push(l1_start..l1_end);
        let others = Known::new(metadata.clone(), u64::MAX);
        let mut tables = BTreeMap::new();
        self.l1
            .load_all(|word| {
                let table = word & OFFSET_MASK;
                let first = tables.insert(table, word);
                let own_twice = first.is_some_and(|first| (first | word) & COPIED != 0);
                !own_twice && others.judge(0, cluster_size, |valid| valid(0, table))
            })
            .await?;
        metadata.extend(tables.keys().map(|&table| table..table + cluster_size));
        let end = round_up(self.rules.file_len, cluster_size).unwrap_or(u64::MAX);
        let known = Known::new(metadata, end);
        assert!(self.writing.set(Writing { file, known }).is_ok(), "an image is opened once");
        Ok(())
    }

    /// What is known of an image that is open for writing.
    pub(super) fn known(&self) -> &Known {
        &self.writing.get().expect("the image is open for writing").known
    }

    pub(super) fn geometry(&self) -> Geometry {
        let layout: &Layout = &self.rules.layout;
        Geometry {
            size: layout.image_size,
            cluster_size: layout.cluster_size(),
            fill_unit: layout.fill_unit(),
        }
    }

    fn shard(&self, slice_index: u64) -> &Shard {
        self.shards.get(index(slice_index / GROUP_SLICES) % SHARDS).expect("there are SHARDS shards")
    }

    /// The extent at `offset` without waiting; `None` where a table must be read and the file cannot do it at once.
    pub(super) fn extent_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        let len_max = match self.clamp(offset, len_max) {
            Ok(len_max) => len_max,
            Err(error) => return Some(Err(error)),
        };
        let slice_index = offset >> self.slice_span_bits;
        let cached = self.cache.find(slice_index);
        let extent = match cached.as_ref().and_then(|found| found.as_ref()) {
            Some(slice) => slice.extent(&self.rules, offset, len_max),
            None => match self.l1.entry_now(self.rules.layout.l1_index(offset))? {
                Ok(L1Entry::Absent) => Ok(self.without_table(offset, len_max)),
                Ok(_) => match self.load_now(slice_index)? {
                    Ok(slice) => slice.extent(&self.rules, offset, len_max),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            },
        };
        match extent {
            Ok(extent) if self.meets_partial(&extent) => self.cut(extent).map(Ok),
            extent => Some(extent),
        }
    }

    /// The extent at `offset`, reading what is needed.
    pub(super) async fn extent(&self, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let len_max = self.clamp(offset, len_max)?;
        let slice_index = offset >> self.slice_span_bits;
        let cached = self
            .cache
            .find(slice_index)
            .and_then(|found| found.as_ref().map(|slice| slice.extent(&self.rules, offset, len_max)));
        let extent = match cached {
            Some(extent) => extent?,
            None => match self.l1.entry(self.rules.layout.l1_index(offset)).await? {
                L1Entry::Absent => self.without_table(offset, len_max),
                L1Entry::Own(_) | L1Entry::Shared(_) => {
                    self.load(slice_index).await?.extent(&self.rules, offset, len_max)?
                }
            },
        };
        if !self.meets_partial(&extent) {
            return Ok(extent);
        }
        if let Some(writing) = self.writing.get()
            && writing.file.len() < self.partial.end
        {
            writing.file.set_len(self.partial.end).await?;
        }
        Ok(self.cut(extent).unwrap_or(extent))
    }

    /// The room that clusters from `offset` on have, whatever their units show, and for how many bytes.
    pub(super) async fn room(&self, offset: u64, len_max: u64) -> Result<(Option<u64>, u64), FormatError> {
        let len_max = self.clamp(offset, len_max)?;
        let layout = &self.rules.layout;
        if let L1Entry::Absent = self.l1.entry(layout.l1_index(offset)).await? {
            return Ok((None, self.without_table(offset, len_max).len));
        }
        let cluster_size = layout.cluster_size();
        let slice = self.load(offset >> self.slice_span_bits).await?;
        let (in_cluster, first) = (offset % cluster_size, offset / cluster_size % layout.slice_entries());
        let room = |at: u64| -> Result<Option<u64>, FormatError> {
            Ok(match slice.entry(at, &self.rules)?.place {
                Place::Own(place) | Place::Shared(place) => Some(place),
                Place::None | Place::Compressed(_) => None,
            })
        };
        let place = room(first)?;
        let mut len = cluster_size - in_cluster;
        for at in first + 1..layout.slice_entries() {
            let goes_on =
                room(at).is_ok_and(|next| next == place.map(|place| place + (at - first) * cluster_size));
            if len >= len_max || !goes_on {
                break;
            }
            len += cluster_size;
        }
        Ok((place.map(|place| place + in_cluster), len.min(len_max)))
    }

    /// Whether the extent's bytes lie, in part, where the file ended in the middle of a cluster.
    fn meets_partial(&self, extent: &Extent) -> bool {
        let (Mapping::Data(at) | Mapping::Shared(at)) = extent.mapping else { return false };
        at < self.partial.end && at + extent.len > self.partial.start
    }

    /// The extent as far as the file has it. `None`: the file is to grow first, since what is data may be written.
    fn cut(&self, extent: Extent) -> Option<Extent> {
        let (Mapping::Data(at) | Mapping::Shared(at)) = extent.mapping else { return Some(extent) };
        if let Some(writing) = self.writing.get() {
            return (writing.file.len() >= self.partial.end).then_some(extent);
        }
        Some(match self.partial.start.checked_sub(at) {
            Some(len) if len > 0 => Extent { len: len.min(extent.len), ..extent },
            _ => Extent { mapping: Mapping::Zero, len: extent.len.min(self.partial.end - at) },
        })
    }

    fn clamp(&self, offset: u64, len_max: u64) -> Result<u64, FormatError> {
        let image_size = self.rules.layout.image_size;
        match image_size.checked_sub(offset) {
            Some(left) if left > 0 => Ok(left.min(len_max).max(1)),
            _ => Err(FormatError::Invalid(format!(
                "offset {offset} lies past the end of the image, {image_size} bytes"
            ))),
        }
    }

    /// The extent where the L1 table has no L2 table, over as many such entries as there are in a row.
    fn without_table(&self, offset: u64, len_max: u64) -> Extent {
        let span = self.rules.layout.table_span();
        let first = span - offset % span;
        let more = len_max.saturating_sub(first).div_ceil(span);
        let run = self.l1.absent_run(offset / span, more.saturating_add(1)).max(1);
        Extent { mapping: Mapping::Absent, len: first.saturating_add((run - 1) * span).min(len_max) }
    }

    fn find_loaded(&self, slice_index: u64) -> Option<Arc<Slice>> {
        let pinned =
            self.shard(slice_index).pinned.lock().get(&slice_index).map(|pinned| pinned.slice.clone());
        pinned.or_else(|| self.cache.find(slice_index).and_then(|found| found.as_ref().cloned()))
    }

    fn load_now(&self, slice_index: u64) -> Option<Result<Arc<Slice>, FormatError>> {
        // Another reader of this shard is at it: the caller comes back through `extent`, which waits.
        let _load = self.shard(slice_index).load.try_lock().ok()?;
        if let Some(slice) = self.find_loaded(slice_index) {
            self.cache.put(slice.clone());
            return Some(Ok(slice));
        }
        let layout = &self.rules.layout;
        let entry = match self.l1.entry_now(layout.slice_l1_index(slice_index))? {
            Ok(entry) => entry,
            Err(error) => return Some(Err(error)),
        };
        let (table, sharing) = self.table_of(entry)?;
        if table + layout.cluster_size() > self.file.len() {
            return None;
        }
        let mut read = [0; SLICE_BYTES];
        let read = read.get_mut(..index(layout.slice_bytes()))?;
        match self.file.read_now(table + layout.slice_in_table(slice_index), read)? {
            Ok(()) => {}
            Err(error) => return Some(Err(error.into())),
        }
        let slice = Arc::new(self.decode(slice_index, read, sharing));
        self.cache.put(slice.clone());
        Some(Ok(slice))
    }

    fn table_of(&self, entry: L1Entry) -> Option<(u64, Sharing)> {
        match (entry, self.writing.get()) {
            (L1Entry::Absent, _) => None,
            (L1Entry::Own(table) | L1Entry::Shared(table), None) => Some((table, Sharing::Ignored)),
            (L1Entry::Own(table), Some(_)) => Some((table, Sharing::AsSaid)),
            (L1Entry::Shared(table), Some(_)) => Some((table, Sharing::Everything)),
        }
    }

    async fn load(&self, slice_index: u64) -> Result<Arc<Slice>, FormatError> {
        let _load = self.shard(slice_index).load.lock().await;
        self.load_locked(slice_index).await
    }

    async fn load_locked(&self, slice_index: u64) -> Result<Arc<Slice>, FormatError> {
        if let Some(slice) = self.find_loaded(slice_index) {
            self.cache.put(slice.clone());
            return Ok(slice);
        }
        let layout = &self.rules.layout;
        let l1_index = layout.slice_l1_index(slice_index);
        let entry = self.l1.entry(l1_index).await?;
        let (table, sharing) = self.table_of(entry).ok_or_else(|| {
            FormatError::corrupt(format!("L1 entry {l1_index}"), 0, "must name the table of a cluster")
        })?;
        // One who writes has the page cache, and wants what it changes; one who reads may be far away.
        let group = if self.writing.get().is_some() { 1 } else { GROUP_SLICES };
        let first = round_down(slice_index, group.min(layout.slices_per_table()));
        let count = group.min(layout.slices_per_table());
        let read_len = count * layout.slice_bytes();
        // The end of the file may cut a table.
        let read = read_padded(self.file.as_ref(), table + layout.slice_in_table(first), read_len).await?;
        let mut wanted = None;
        for (at, piece) in (first..).zip(read.chunks(index(layout.slice_bytes()))) {
            if at == slice_index {
                let slice = Arc::new(self.decode(at, piece, sharing));
                self.cache.put(slice.clone());
                wanted = Some(slice);
            } else if self.find_loaded(at).is_none() {
                self.cache.put(Arc::new(self.decode(at, piece, sharing)));
            }
        }
        Ok(wanted.expect("the group holds the slice"))
    }

    fn decode(&self, slice_index: u64, read: &[u8], sharing: Sharing) -> Slice {
        let cluster_size = self.rules.layout.cluster_size();
        match self.writing.get() {
            Some(writing) => writing.known.judge(slice_index, cluster_size, |valid| {
                Slice::decode(slice_index, read, &self.rules, sharing, valid)
            }),
            None => {
                let end = self.partial.end.max(self.rules.file_len);
                let slice = Slice::decode(slice_index, read, &self.rules, sharing, |_, offset| {
                    offset.saturating_add(cluster_size) <= end
                });
                if slice.names_compressed(&self.rules.layout) {
                    self.compressed.store(true, Ordering::Relaxed);
                }
                slice
            }
        }
    }

    /// Reads the slice if need be, and keeps it findable until the pin goes. The L2 table must exist, and be the image's own.
    pub(super) async fn pin(self: &Arc<Self>, slice_index: u64) -> Result<Pin, FormatError> {
        let shard = self.shard(slice_index);
        let _load = shard.load.lock().await;
        let slice = self.load_locked(slice_index).await?;
        let mut pinned = shard.pinned.lock();
        let entry = pinned.entry(slice_index).or_insert_with(|| Pinned { slice: slice.clone(), pins: 0 });
        entry.pins += 1;
        if entry.pins == 1 {
            self.known().touch(slice_index, || slice.bad_entries());
        }
        Ok(Pin { tables: self.clone(), slice })
    }

    /// Waits until nobody reads a table that was in the L1 table before this call.
    pub(super) async fn readers_gone(&self) {
        for shard in &self.shards {
            drop(shard.load.lock().await);
        }
    }
}

const SLICE_BYTES: usize = 4096;
const _: () = assert!(SLICE_BYTES_MAX == 4096);

/// A slice that stays findable in memory: it holds, or will hold, what the file does not have yet.
pub(super) struct Pin {
    tables: Arc<Tables>,
    slice: Arc<Slice>,
}

impl Pin {
    pub(super) fn slice(&self) -> &Slice {
        &self.slice
    }
}

impl Clone for Pin {
    fn clone(&self) -> Self {
        let slice_index = self.slice.index;
        if let Some(pinned) = self.tables.shard(slice_index).pinned.lock().get_mut(&slice_index) {
            pinned.pins += 1;
        }
        Self { tables: self.tables.clone(), slice: self.slice.clone() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pinned = self.tables.shard(self.slice.index).pinned.lock();
        if let Some(entry) = pinned.get_mut(&self.slice.index) {
            entry.pins -= 1;
            if entry.pins == 0 {
                pinned.remove(&self.slice.index);
            }
        }
    }
}
