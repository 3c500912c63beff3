//! Tables in memory: the L1 table, cached L2 slices, and how a slice is read.
//!
//! - There is at most one copy of an L2 slice in memory that anyone can find. A slice is read, pinned and put into the cache
//!   under the load lock of its shard only, and whoever holds that lock looks for a pinned or cached copy first. So a slice
//!   that was read before a change can never replace the changed one.
//! - A pinned slice is found in `pinned` until its last pin goes. The writer pins a slice from `prepare` until its
//!   changes are in the file.
//! - Memory: the cache, the pinned slices (bounded by what is in flight and unlinked), and the part of the L1 table that
//!   the guest's size uses (at most 16 MiB), read in slices when first needed.
//!
//! Not here: which changes are on disk (`links`, `flush`).

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use readonce_storage::{
    ReadAt,
    sync::{Mutex, RwLock},
};

use super::{
    layout::{Layout, SLICE_BYTES, SLICE_ENTRIES},
    slice::{Entry, Slice},
};
use crate::{Extent, FormatError, Geometry, Mapping, cache::Cache, number::index};

const SHARDS: usize = 64;

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
    pub(super) layout: Layout,
    l1: Box<[OnceLock<Slice>]>,
    l1_load: tokio::sync::Mutex<()>,
    cache: Cache<Slice>,
    shards: Box<[Shard]>,
    known: RwLock<Known>,
}

/// What an image that is open for writing knows of itself; empty for one that is open for reading.
#[derive(Default)]
struct Known {
    /// Where L2 tables lie: offset to L1 index. A data cluster that lies in a table would let a guest write overwrite it.
    regions: BTreeMap<u64, u64>,
    /// The file's length when it was opened. An entry past it was wrong then, and does not become right because the
    /// file grows: it would show what is allocated there now.
    end: Option<u64>,
    /// Slices that were pinned since then, and their bad entries: others may lie past `end`. 16 bytes for each slice, and the
    /// image's size bounds them.
    touched: BTreeMap<u64, Box<[u64]>>,
}

impl Tables {
    pub(super) fn new(file: Arc<dyn ReadAt>, layout: Layout) -> Self {
        let l1_slices = layout.l1_entries_used().div_ceil(SLICE_ENTRIES);
        Self {
            file,
            layout,
            l1: std::iter::repeat_with(OnceLock::new).take(index(l1_slices)).collect(),
            l1_load: tokio::sync::Mutex::new(()),
            cache: Cache::new(layout.image_size.div_ceil(layout.slice_span())),
            shards: std::iter::repeat_with(Shard::default).take(SHARDS).collect(),
            known: RwLock::default(),
        }
    }

    pub(super) fn geometry(&self) -> Geometry {
        let Layout { image_size, cluster_size, .. } = self.layout;
        Geometry { size: image_size, cluster_size, fill_unit: cluster_size }
    }

    fn shard(&self, slice_index: u64) -> &Shard {
        self.shards.get(index(slice_index) % SHARDS).expect("there are SHARDS shards")
    }

    /// The extent at `offset` without waiting; `None` where a table must be read and the file cannot do it at once.
    pub(super) fn extent_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        let len_max = match self.clamp(offset, len_max) {
            Ok(len_max) => len_max,
            Err(error) => return Some(Err(error)),
        };
        let slice_index = self.layout.slice_index(offset);
        if let Some(found) = self.cache.find(slice_index)
            && let Some(slice) = found.as_ref()
        {
            return Some(slice.extent(&self.layout, offset, len_max));
        }
        let l1_index = self.layout.l1_index(offset);
        let l1_slice = self.l1.get(index(l1_index / SLICE_ENTRIES))?.get()?;
        match l1_slice.entry(l1_index % SLICE_ENTRIES) {
            Entry::At(table) => match self.load_now(slice_index, table)? {
                Ok(slice) => Some(slice.extent(&self.layout, offset, len_max)),
                Err(error) => Some(Err(error)),
            },
            _ => Some(self.without_table(l1_slice, offset, len_max)),
        }
    }

    /// The extent at `offset`, reading what is needed.
    pub(super) async fn extent(&self, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let len_max = self.clamp(offset, len_max)?;
        let slice_index = self.layout.slice_index(offset);
        if let Some(found) = self.cache.find(slice_index)
            && let Some(slice) = found.as_ref()
        {
            return slice.extent(&self.layout, offset, len_max);
        }
        let l1_index = self.layout.l1_index(offset);
        let l1_slice = self.l1_slice(l1_index).await?;
        match l1_slice.entry(l1_index % SLICE_ENTRIES) {
            Entry::At(table) => {
                let slice = self.load(slice_index, table).await?;
                slice.extent(&self.layout, offset, len_max)
            }
            _ => self.without_table(l1_slice, offset, len_max),
        }
    }

    fn clamp(&self, offset: u64, len_max: u64) -> Result<u64, FormatError> {
        match self.layout.image_size.checked_sub(offset) {
            Some(left) if left > 0 => Ok(left.min(len_max).max(1)),
            _ => Err(FormatError::Invalid(format!(
                "offset {offset} lies past the end of the image, {} bytes",
                self.layout.image_size
            ))),
        }
    }

    /// The extent where the L1 table has no L2 table, over as many such entries as the L1 slice has in a row.
    fn without_table(&self, l1_slice: &Slice, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let span = self.layout.table_span();
        let mut at = self.layout.l1_index(offset) % SLICE_ENTRIES;
        if l1_slice.entry(at) == Entry::Bad {
            return Err(l1_slice.corrupt("L1", at));
        }
        let mut len = span - offset % span;
        while len < len_max && at + 1 < SLICE_ENTRIES && l1_slice.entry(at + 1) == Entry::Absent {
            len += span;
            at += 1;
        }
        Ok(Extent { mapping: Mapping::Absent, len: len.min(len_max) })
    }

    /// The L1 slice that holds `l1_index`.
    pub(super) async fn l1_slice(&self, l1_index: u64) -> Result<&Slice, FormatError> {
        let slice_index = l1_index / SLICE_ENTRIES;
        let place = self.l1.get(index(slice_index)).ok_or_else(|| {
            FormatError::corrupt("L1 index", l1_index, "must be below what the image's size uses")
        })?;
        if let Some(slice) = place.get() {
            return Ok(slice);
        }
        let _one_at_a_time = self.l1_load.lock().await;
        if let Some(slice) = place.get() {
            return Ok(slice);
        }
        let file_len = self.file.len();
        let at = self.layout.l1_offset + slice_index * SLICE_BYTES;
        let read = self.file.read(at, index(SLICE_BYTES)).await?;
        let slice =
            Slice::decode(slice_index, &read, false, |_, offset| self.layout.valid_l2(offset, file_len));
        Ok(place.get_or_init(|| slice))
    }

    /// The L2 table of `l1_index`, if there is one.
    pub(super) async fn table(&self, l1_index: u64) -> Result<Option<u64>, FormatError> {
        let slice = self.l1_slice(l1_index).await?;
        match slice.entry(l1_index % SLICE_ENTRIES) {
            Entry::At(table) => Ok(Some(table)),
            Entry::Absent | Entry::Zero => Ok(None),
            Entry::Bad => Err(slice.corrupt("L1", l1_index % SLICE_ENTRIES)),
        }
    }

    fn find_loaded(&self, slice_index: u64) -> Option<Arc<Slice>> {
        let pinned =
            self.shard(slice_index).pinned.lock().get(&slice_index).map(|pinned| pinned.slice.clone());
        pinned.or_else(|| self.cache.find(slice_index).and_then(|found| found.as_ref().cloned()))
    }

    fn load_now(&self, slice_index: u64, table: u64) -> Option<Result<Arc<Slice>, FormatError>> {
        // Another reader of this shard is at it: the caller comes back through `extent`, which waits.
        let _load = self.shard(slice_index).load.try_lock().ok()?;
        if let Some(slice) = self.find_loaded(slice_index) {
            self.cache.put(slice.clone());
            return Some(Ok(slice));
        }
        let mut read = [0; 4096];
        match self.file.read_now(table + self.layout.slice_in_table(slice_index), &mut read)? {
            Ok(()) => {}
            Err(error) => return Some(Err(error.into())),
        }
        let slice = Arc::new(self.decode_l2(slice_index, &read));
        self.cache.put(slice.clone());
        Some(Ok(slice))
    }

    async fn load(&self, slice_index: u64, table: u64) -> Result<Arc<Slice>, FormatError> {
        let _load = self.shard(slice_index).load.lock().await;
        self.load_locked(slice_index, table).await
    }

    async fn load_locked(&self, slice_index: u64, table: u64) -> Result<Arc<Slice>, FormatError> {
        if let Some(slice) = self.find_loaded(slice_index) {
            self.cache.put(slice.clone());
            return Ok(slice);
        }
        let at = table + self.layout.slice_in_table(slice_index);
        let read = self.file.read(at, index(SLICE_BYTES)).await?;
        let slice = Arc::new(self.decode_l2(slice_index, &read));
        self.cache.put(slice.clone());
        Ok(slice)
    }

    /// Reads the slice if need be, and keeps it findable until the pin goes. The L2 table must exist.
    pub(super) async fn pin(self: &Arc<Self>, slice_index: u64, table: u64) -> Result<Pin, FormatError> {
        let shard = self.shard(slice_index);
        let _load = shard.load.lock().await;
        let slice = self.load_locked(slice_index, table).await?;
        let mut pinned = shard.pinned.lock();
        let entry = pinned.entry(slice_index).or_insert_with(|| Pinned { slice: slice.clone(), pins: 0 });
        entry.pins += 1;
        let first = entry.pins == 1;
        if first {
            self.known.write().touched.entry(slice_index).or_insert_with(|| slice.bad_entries());
        }
        Ok(Pin { tables: self.clone(), slice, first })
    }

    /// Reads the part of the L1 table that the guest's size uses, again where it is in memory already, and learns where
    /// L2 tables lie. Cached L2 slices are forgotten; nothing may be pinned.
    ///
    /// # Errors
    /// `Corrupt` where an entry is not valid, or two tables share a cluster.
    pub(super) async fn load_l1(&self) -> Result<(), FormatError> {
        let file_len = self.file.len();
        let mut regions = BTreeMap::new();
        for (slice_index, place) in (0..).zip(&self.l1) {
            let at = self.layout.l1_offset + slice_index * SLICE_BYTES;
            let read = self.file.read(at, index(SLICE_BYTES)).await?;
            let slice =
                Slice::decode(slice_index, &read, false, |_, offset| self.layout.valid_l2(offset, file_len));
            for at in 0..SLICE_ENTRIES {
                match slice.entry(at) {
                    Entry::At(table) => {
                        self.add_region(&mut regions, table, slice_index * SLICE_ENTRIES + at)?
                    }
                    Entry::Bad => return Err(slice.corrupt("L1", at)),
                    Entry::Absent | Entry::Zero => {}
                }
            }
            if let Err(slice) = place.set(slice)
                && let Some(old) = place.get()
            {
                (0..SLICE_ENTRIES).for_each(|at| old.set(at, slice.entry(at)));
            }
        }
        *self.known.write() = Known { regions, end: Some(file_len), touched: BTreeMap::new() };
        self.cache.clear();
        Ok(())
    }

    fn add_region(
        &self,
        regions: &mut BTreeMap<u64, u64>,
        table: u64,
        l1_index: u64,
    ) -> Result<(), FormatError> {
        let table_bytes = self.layout.table_bytes();
        let before = regions.range(..=table).next_back();
        let after = regions.range(table..).next();
        let meets = before.filter(|&(&other, _)| other + table_bytes > table);
        let meets = meets.or(after.filter(|&(&other, _)| table + table_bytes > other));
        if let Some((&other, other_index)) = meets {
            return Err(FormatError::corrupt(
                format!("L1 entry {l1_index}"),
                format!("{table:#x}"),
                format!("must not share a cluster with the table at {other:#x} of L1 entry {other_index}"),
            ));
        }
        regions.insert(table, l1_index);
        Ok(())
    }

    /// A new L2 table lies at `table`.
    pub(super) fn table_made(&self, table: u64, l1_index: u64) {
        self.known.write().regions.insert(table, l1_index);
    }

    fn decode_l2(&self, slice_index: u64, read: &[u8]) -> Slice {
        let known = self.known.read();
        let regions = &known.regions;
        let touched = known.touched.get(&slice_index);
        let file_len = match (known.end, touched) {
            (Some(end), None) => end.min(self.file.len()),
            _ => self.file.len(),
        };
        let table_bytes = self.layout.table_bytes();
        // Runs of clusters are the rule: what follows a cluster known to lie before the next table needs no search.
        let mut clear = 0..0;
        Slice::decode(slice_index, read, true, |at, offset| {
            if touched.is_some_and(|bad| bad.contains(&at)) || !self.layout.valid_cluster(offset, file_len) {
                return false;
            }
            if clear.contains(&offset) {
                return true;
            }
            let before_end =
                regions.range(..=offset).next_back().map_or(0, |(&table, _)| table + table_bytes);
            let next = regions.range(offset..).next().map_or(u64::MAX, |(&table, _)| table);
            clear = before_end..next;
            clear.contains(&offset)
        })
    }
}

/// A slice that stays findable in memory: it holds, or will hold, what the file does not have yet.
pub(super) struct Pin {
    tables: Arc<Tables>,
    slice: Arc<Slice>,
    first: bool,
}

impl Pin {
    /// Whether nobody else held the slice when this pin was made.
    pub(super) fn is_first(&self) -> bool {
        self.first
    }

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
        Self { tables: self.tables.clone(), slice: self.slice.clone(), first: false }
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
