//! Refcounts of an image that is open for writing.
//!
//! - In memory a refcount is never below what is referenced: by tables in memory, by tables on the disk, and by room that is
//!   set aside. Taking a cluster raises it at once; it is lowered only when what it counted is gone for certain.
//! - Blocks are read and written in pieces of at most 4 KiB. Those that the file does not have yet stay in memory; of the
//!   others at most [`PIECES_MAX`].
//! - A new block or a longer table gets its room, and its own refcount, when it is found to be needed (`prepare`), so that no
//!   flush meets "no space". [`Refs::write`] says in which order they reach the file.
//!
//! Not here: which clusters are free (`space`), the table as an image had it that is opened (`refcount_table`), and which reference what.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    sync::Arc,
};

use bytes::{BufMut, Bytes, BytesMut};
use readonce_storage::{BoxFuture, Storage, sync::Mutex};

use super::{
    chunks::read_padded,
    layout::{Layout, SECTOR_BYTES, SLICE_BYTES_MAX},
    mark::Mark,
    refcount::{Refcounts, TABLE_BYTES_MAX, TABLE_ENTRY_BYTES},
    refcount_table::{BAD, Found, Stored, bad_entry},
    tables::Tables,
};
use crate::{
    FormatError,
    clusters::{Clusters, Fit},
    number::{bytes, index},
};

/// Pieces that are kept at most, but for those that the file does not have: 16 MiB.
const PIECES_MAX: usize = 4096;
/// Reads of different pieces wait for each other only by chance.
const LOAD_LOCKS: usize = 16;
/// Sectors' worth of table entries.
const SECTOR_ENTRIES: u64 = SECTOR_BYTES / TABLE_ENTRY_BYTES;

/// The refcounts.
pub(super) struct Refs {
    file: Arc<dyn Storage>,
    layout: Layout,
    numbers: Refcounts,
    clusters: Arc<Clusters>,
    state: Mutex<State>,
    loads: [tokio::sync::Mutex<()>; LOAD_LOCKS],
    /// Held while a block or a table is made.
    making: tokio::sync::Mutex<()>,
}

struct State {
    /// Offsets of blocks, [`BAD`], or 0 where there is none.
    table: Vec<u64>,
    /// What the file holds where an entry is bad.
    bad: BTreeMap<u64, u64>,
    /// Table entries that the file does not have.
    unwritten: BTreeSet<u64>,
    /// The table that the header names.
    stored: Stored,
    /// How often the table got another place.
    moves: u64,
    /// A longer one that is to take its place, and whether its own clusters are counted.
    planned: Option<(Stored, bool)>,
    pieces: BTreeMap<u64, Piece>,
    /// Clusters whose refcounts changed, while somebody wants to know: those below the first.
    tracked: Option<(u64, BTreeSet<u64>)>,
}

struct Piece {
    bytes: Box<[u8]>,
    /// Counts changes.
    version: u64,
    /// The version that the file has.
    written: u64,
}

/// What must be done before refcounts can change.
enum Step {
    Done,
    /// A piece must be read.
    Load(u64),
    /// There is no such block.
    Make(u64),
    /// The cluster is in use.
    Busy(u64),
}

impl Refs {
    pub(super) fn new(file: Arc<dyn Storage>, found: Found, clusters: Arc<Clusters>) -> Self {
        let state = State {
            table: found.table,
            bad: found.bad,
            unwritten: BTreeSet::new(),
            stored: found.stored,
            moves: 0,
            planned: None,
            pieces: BTreeMap::new(),
            tracked: None,
        };
        Self {
            file,
            numbers: Refcounts::new(found.layout.cluster_bits, found.layout.refcount_order),
            layout: found.layout,
            clusters,
            state: Mutex::new(state),
            loads: [const { tokio::sync::Mutex::const_new(()) }; LOAD_LOCKS],
            making: tokio::sync::Mutex::new(()),
        }
    }

    fn piece_bytes(&self) -> u64 {
        self.layout.cluster_size().min(SLICE_BYTES_MAX)
    }

    /// Refcounts in a piece.
    pub(super) fn per_piece(&self) -> u64 {
        self.piece_bytes() * 8 / u64::from(self.numbers.bits())
    }

    fn pieces_per_block(&self) -> u64 {
        self.layout.cluster_size() / self.piece_bytes()
    }

    fn cluster(&self, offset: u64) -> u64 {
        offset >> self.layout.cluster_bits
    }

    /// Sees to it that all pieces of the clusters are in memory, and does `work` with them under the lock.
    fn with_pieces<T>(
        &self,
        clusters: Range<u64>,
        work: impl FnOnce(&mut State) -> Result<T, u64>,
    ) -> Result<T, Step> {
        let mut state = self.state.lock();
        let mut piece = clusters.start / self.per_piece();
        while piece * self.per_piece() < clusters.end {
            if !state.pieces.contains_key(&piece) {
                let block = piece / self.pieces_per_block();
                let there = state.table.get(index(block)).is_some_and(|&at| at != 0);
                return Err(if there { Step::Load(piece) } else { Step::Make(block) });
            }
            piece += 1;
        }
        work(&mut state).map_err(Step::Busy)
    }

    /// Makes the refcounts of clusters that have none 1.
    fn try_raise(&self, clusters: Range<u64>) -> Step {
        let done = self.with_pieces(clusters.clone(), |state| {
            for cluster in clusters.clone() {
                if self.value(state, cluster) != 0 {
                    return Err(cluster);
                }
            }
            clusters.clone().for_each(|cluster| self.set(state, cluster, 1));
            Ok(())
        });
        done.err().unwrap_or(Step::Done)
    }

    /// Lowers a refcount by 1; the new one. `None`: it is not in memory, or 0 already.
    pub(super) fn lower_now(&self, offset: u64) -> Option<u64> {
        let cluster = self.cluster(offset);
        let lowered = self.with_pieces(cluster..cluster + 1, |state| {
            let value = self.value(state, cluster).checked_sub(1).ok_or(cluster)?;
            self.set(state, cluster, value);
            Ok(value)
        });
        lowered.ok()
    }

    fn value(&self, state: &State, cluster: u64) -> u64 {
        let piece = state.pieces.get(&(cluster / self.per_piece()));
        piece.map_or(0, |piece| self.numbers.refcount(&piece.bytes, cluster % self.per_piece()))
    }

    fn set(&self, state: &mut State, cluster: u64, value: u64) {
        let piece = state.pieces.get_mut(&(cluster / self.per_piece())).expect("its piece is in memory");
        self.numbers.set_refcount(&mut piece.bytes, cluster % self.per_piece(), value);
        piece.version += 1;
        if let Some((end, tracked)) = &mut state.tracked
            && cluster < *end
        {
            tracked.insert(cluster);
        }
    }

    /// Makes the refcounts of clusters that have none 1.
    ///
    /// # Errors
    /// `Corrupt` where one is in use.
    pub(super) async fn raise(&self, tables: &Tables, offset: u64, len: u64) -> Result<(), FormatError> {
        let clusters = self.cluster(offset)..self.cluster(offset + len);
        loop {
            match self.try_raise(clusters.clone()) {
                Step::Done => return Ok(()),
                Step::Load(piece) => self.load(piece).await?,
                Step::Make(block) => {
                    let _one_at_a_time = self.making.lock().await;
                    self.make_block(tables, block).await?;
                }
                Step::Busy(cluster) => return Err(self.in_use(cluster)),
            }
        }
    }

    fn in_use(&self, cluster: u64) -> FormatError {
        FormatError::corrupt(
            format!("refcount of cluster {cluster}"),
            "not 0",
            "must be 0 behind the end of the file, and where it was 0 before",
        )
    }

    /// Lowers a refcount by 1; the new one. `None`: it was 0 already.
    pub(super) async fn lower(&self, offset: u64) -> Result<Option<u64>, FormatError> {
        self.load_for(offset).await?;
        Ok(self.lower_now(offset))
    }

    /// Reads the piece that counts the cluster, if there is one.
    async fn load_for(&self, offset: u64) -> Result<(), FormatError> {
        let piece = self.cluster(offset) / self.per_piece();
        let block = piece / self.pieces_per_block();
        let there = self.state.lock().table.get(index(block)).is_some_and(|&at| at != 0);
        if there { self.load(piece).await } else { Ok(()) }
    }

    /// Reads a piece of a block that is there, and sees to its room in the file.
    async fn load(&self, piece: u64) -> Result<(), FormatError> {
        let lock = self.loads.get(index(piece) % LOAD_LOCKS).expect("there are LOAD_LOCKS locks");
        let _one_at_a_time = lock.lock().await;
        let at = {
            let state = self.state.lock();
            if state.pieces.contains_key(&piece) {
                return Ok(());
            }
            self.place(&state, piece)?
        };
        // Another program may have made the block, with a hole in the file.
        self.file.allocate(at, self.piece_bytes()).await?;
        let read = read_padded(self.file.as_ref(), at, self.piece_bytes()).await?;
        let mut state = self.state.lock();
        if state.pieces.len() >= PIECES_MAX {
            state.pieces.retain(|_, piece| piece.version != piece.written);
        }
        state.pieces.insert(piece, Piece { bytes: read[..].into(), version: 0, written: 0 });
        Ok(())
    }

    /// Where a piece lies in the file.
    fn place(&self, state: &State, piece: u64) -> Result<u64, FormatError> {
        let block = piece / self.pieces_per_block();
        match state.table.get(index(block)) {
            Some(&at) if at > BAD => Ok(at + piece % self.pieces_per_block() * self.piece_bytes()),
            _ => Err(bad_entry(block, state.bad.get(&block).copied())),
        }
    }

    /// Makes a block, and what that needs. `making` is held.
    fn make_block<'a>(&'a self, tables: &'a Tables, block: u64) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(async move {
            if self.has_block(block) {
                return Ok(());
            }
            self.make_capacity(tables, block).await?;
            if self.has_block(block) {
                return Ok(());
            }
            let cluster_size = self.layout.cluster_size();
            let run = self.clusters.take(cluster_size, Fit::Whole);
            self.clusters.make_room(run.at, run.len).await?;
            if !run.fresh {
                self.file.write_zeroes(run.at, run.len).await?;
            }
            let at = run.at;
            let own = self.cluster(at);
            let home = self.numbers.table_index(own);
            if home == block {
                let zeros = vec![0; index(self.piece_bytes())];
                let mut state = self.state.lock();
                Self::show_block(&mut state, block, at);
                let piece = Piece { bytes: zeros.into(), version: 0, written: 0 };
                state.pieces.insert(own / self.per_piece(), piece);
                self.set(&mut state, own, 1);
            } else {
                self.make_block(tables, home).await?;
                self.raise_counted(own..own + 1).await?;
                Self::show_block(&mut self.state.lock(), block, at);
            }
            run.keep(cluster_size);
            tables.known().made(at..at + cluster_size);
            Ok(())
        })
    }

    /// Raises where the blocks are there.
    async fn raise_counted(&self, clusters: Range<u64>) -> Result<(), FormatError> {
        loop {
            match self.try_raise(clusters.clone()) {
                Step::Done => return Ok(()),
                Step::Load(piece) => self.load(piece).await?,
                Step::Make(block) => {
                    return Err(FormatError::corrupt(
                        format!("refcount table entry {block}"),
                        0,
                        "must not be 0 here",
                    ));
                }
                Step::Busy(cluster) => return Err(self.in_use(cluster)),
            }
        }
    }

    fn has_block(&self, block: u64) -> bool {
        self.state.lock().table.get(index(block)).is_some_and(|&at| at != 0)
    }

    fn show_block(state: &mut State, block: u64, at: u64) {
        if bytes(state.table.len()) <= block {
            state.table.resize(index(block) + 1, 0);
        }
        if let Some(entry) = state.table.get_mut(index(block)) {
            *entry = at;
        }
        state.unwritten.insert(block);
    }

    /// Sees to a table that is long enough for the entry of `block`. `making` is held.
    async fn make_capacity(&self, tables: &Tables, block: u64) -> Result<(), FormatError> {
        let cluster_size = self.layout.cluster_size();
        let per_cluster = cluster_size / TABLE_ENTRY_BYTES;
        let (old, counted) = {
            let state = self.state.lock();
            state.planned.unwrap_or((state.stored, true))
        };
        if block < old.clusters * per_cluster {
            return Ok(());
        }
        if !counted {
            self.count_planned(tables).await?;
        }
        let clusters_max = TABLE_BYTES_MAX / cluster_size;
        if block >= clusters_max * per_cluster {
            return Err(FormatError::NoSpace(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("the refcount table would be longer than {TABLE_BYTES_MAX} bytes"),
            )));
        }
        // Twice what is needed: enough also for the blocks that count the new table.
        let clusters = ((block + 1) * 2).div_ceil(per_cluster).min(clusters_max);
        let run = self.clusters.take(clusters * cluster_size, Fit::Whole);
        self.clusters.make_room(run.at, run.len).await?;
        let at = run.at;
        run.keep(clusters * cluster_size);
        tables.known().made(at..at + clusters * cluster_size);
        let replaced = {
            let mut state = self.state.lock();
            state.planned.replace((Stored { at, clusters }, false))
        };
        self.count_planned(tables).await?;
        if let Some((planned, _)) = replaced {
            // No header ever named it.
            let len = planned.clusters * cluster_size;
            for cluster in self.cluster(planned.at)..self.cluster(planned.at + len) {
                self.lower(cluster << self.layout.cluster_bits).await?;
            }
            tables.known().gone(planned.at..planned.at + len);
            self.clusters.free(planned.at, len);
        }
        Ok(())
    }

    /// Counts the clusters of a planned table. `making` is held, or nobody else makes anything.
    async fn count_planned(&self, tables: &Tables) -> Result<(), FormatError> {
        let Some((planned, false)) = self.state.lock().planned else { return Ok(()) };
        let clusters = self.cluster(planned.at)..self.cluster(planned.at) + planned.clusters;
        for block in self.numbers.table_index(clusters.start)..=self.numbers.table_index(clusters.end - 1) {
            self.make_block(tables, block).await?;
        }
        self.raise_counted(clusters).await?;
        if let Some((_, counted)) = &mut self.state.lock().planned {
            *counted = true;
        }
        Ok(())
    }

    /// Whether the file has everything.
    pub(super) fn is_written(&self) -> bool {
        let state = self.state.lock();
        state.unwritten.is_empty()
            && state.planned.is_none()
            && state.pieces.values().all(|piece| piece.version == piece.written)
    }

    /// Pieces that the file does not have.
    pub(super) fn dirty_count(&self) -> usize {
        self.state.lock().pieces.values().filter(|piece| piece.version != piece.written).count()
    }

    /// Writes all refcounts that were changed before the call. A sync is to follow before anything on the disk relies on
    /// them. Returns where a table lay that is free after that sync.
    ///
    /// Refcounts, of new blocks too, and a longer table in its own room come first. Only after a sync are they shown: new blocks
    /// in the table, or the new table in the header.
    pub(super) async fn write(
        &self,
        tables: &Tables,
        mark: &Mark,
    ) -> Result<Option<Range<u64>>, FormatError> {
        if self.state.lock().planned.is_some_and(|(_, counted)| !counted) {
            let _one_at_a_time = self.making.lock().await;
            self.count_planned(tables).await?;
        }
        let (unwritten, planned, dirty) = {
            let state = self.state.lock();
            let dirty: Vec<u64> = state
                .pieces
                .iter()
                .filter(|(_, piece)| piece.version != piece.written)
                .map(|(&at, _)| at)
                .collect();
            (state.unwritten.clone(), state.planned, dirty)
        };
        for piece in dirty {
            self.write_piece(piece).await?;
        }
        if unwritten.is_empty() && planned.is_none() {
            return Ok(None);
        }
        let Some((planned, _)) = planned else {
            self.file.sync().await?;
            let mut rest = unwritten.iter().copied().peekable();
            while let Some(first) = rest.peek().map(|&entry| entry - entry % SECTOR_ENTRIES) {
                while rest.next_if(|&entry| entry < first + SECTOR_ENTRIES).is_some() {}
                let (at, sector) = {
                    let state = self.state.lock();
                    let sector = self.table_bytes(&state, &unwritten, first..first + SECTOR_ENTRIES);
                    (state.stored.at + first * TABLE_ENTRY_BYTES, sector)
                };
                self.file.write(at, sector).await?;
            }
            self.state.lock().unwritten.retain(|entry| !unwritten.contains(entry));
            return Ok(None);
        };
        let entries = planned.clusters * self.layout.cluster_size() / TABLE_ENTRY_BYTES;
        let whole = self.table_bytes(&self.state.lock(), &unwritten, 0..entries);
        self.file.write(planned.at, whole).await?;
        self.file.sync().await?;
        let old = self.state.lock().stored;
        let old = old.at..old.at + old.clusters * self.layout.cluster_size();
        self.will_change(old.step_by(index(self.layout.cluster_size())));
        mark.move_refcount_table(planned.at, planned.clusters).await?;
        let mut state = self.state.lock();
        let old = std::mem::replace(&mut state.stored, planned);
        state.moves += 1;
        if state.planned.is_some_and(|(now, _)| now.at == planned.at) {
            state.planned = None;
        }
        state.unwritten.retain(|entry| !unwritten.contains(entry));
        Ok(Some(old.at..old.at + old.clusters * self.layout.cluster_size()))
    }

    /// Entries of the table as the file is to have them: blocks that are not in `shown` are not.
    fn table_bytes(&self, state: &State, shown: &BTreeSet<u64>, entries: Range<u64>) -> Bytes {
        let mut out = BytesMut::new();
        for entry in entries {
            let hidden = state.unwritten.contains(&entry) && !shown.contains(&entry);
            out.put_u64(match state.table.get(index(entry)).copied() {
                _ if hidden => 0,
                None => 0,
                Some(BAD) => state.bad.get(&entry).copied().unwrap_or_default(),
                Some(at) => at,
            });
        }
        out.freeze()
    }

    async fn write_piece(&self, piece: u64) -> Result<(), FormatError> {
        let (at, data, version) = {
            let state = self.state.lock();
            let Some(found) = state.pieces.get(&piece) else { return Ok(()) };
            (self.place(&state, piece)?, Bytes::copy_from_slice(&found.bytes), found.version)
        };
        self.file.write(at, data).await?;
        if let Some(found) = self.state.lock().pieces.get_mut(&piece) {
            found.written = version;
        }
        Ok(())
    }

    /// Reads the piece that counts the cluster. `false`: there is none, and the refcount is 0.
    pub(super) async fn load_piece_of(&self, cluster: u64) -> Result<bool, FormatError> {
        let piece = cluster / self.per_piece();
        if !self.has_block(piece / self.pieces_per_block()) {
            return Ok(false);
        }
        self.load(piece).await?;
        Ok(true)
    }

    /// The clusters among `clusters`, all of one piece, whose refcount is 0, by runs. `None`: the piece is not in memory.
    pub(super) fn unused(&self, clusters: Range<u64>) -> Option<Vec<Range<u64>>> {
        let state = self.state.lock();
        let piece = clusters.start / self.per_piece();
        let block = piece / self.pieces_per_block();
        if state.table.get(index(block)).is_none_or(|&at| at == 0) {
            return Some(vec![clusters]);
        }
        let found = state.pieces.get(&piece)?;
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in clusters {
            if self.numbers.refcount(&found.bytes, cluster % self.per_piece()) != 0 {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                _ => runs.push(cluster..cluster + 1),
            }
        }
        Some(runs)
    }

    /// Begins to remember whose refcounts change, of clusters before byte offset `end`. Nothing was handed out yet: what is linked
    /// in memory alone must be among them.
    pub(super) fn track(&self, end: u64) {
        self.state.lock().tracked = Some((self.cluster(end), BTreeSet::new()));
    }

    /// The refcounts of these clusters will change: no entry in memory names them any more. The file's entries may say the same
    /// before the refcounts do, so a scan of it would find them counted without a reference.
    pub(super) fn will_change(&self, offsets: impl Iterator<Item = u64>) {
        if let Some((end, tracked)) = &mut self.state.lock().tracked {
            tracked.extend(offsets.map(|offset| self.cluster(offset)).filter(|cluster| *cluster < *end));
        }
    }

    /// How often the table got another place: what lay in the one before may be anything since.
    pub(super) fn table_moves(&self) -> u64 {
        self.state.lock().moves
    }

    /// Ends that.
    pub(super) fn end_tracking(&self) {
        self.state.lock().tracked = None;
    }

    /// Lowers the refcount of a cluster that nothing changed since `track`, if it is above `referenced`; the new one.
    pub(super) fn lower_to(&self, offset: u64, referenced: u64) -> Option<u64> {
        let cluster = self.cluster(offset);
        let lowered = self.with_pieces(cluster..cluster + 1, |state| {
            let changed = state.tracked.as_ref().is_none_or(|(_, tracked)| tracked.contains(&cluster));
            if changed || self.value(state, cluster) <= referenced {
                return Err(cluster);
            }
            self.set(state, cluster, referenced);
            Ok(referenced)
        });
        lowered.ok()
    }
}
