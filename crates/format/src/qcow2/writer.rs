//! A qcow2 image that is open for writing.
//!
//! - `prepare` does everything that can fail: the marks, the L2 table and its space, the slice, the clusters, their refcounts
//!   and their space. `commit` changes memory only.
//! - Allocations run side by side. Waiting is only where two need the same: the first mark, a table of the same range, a
//!   refcount block, the file system's answer for the window that both lie in.
//! - An L2 table that a snapshot shares is copied before anything in it changes.
//! - A linked cluster is never moved.
//! - Whatever meets a wrong entry, a lookup for a read too, marks the image corrupt, as in QEMU: other entries may be as wrong, and the
//!   next to open it for writing is to be told before it builds on them. Reads, and writes in place, go on meanwhile.
//!
//! Not here: how an entry changes (`commit`), the order of writes (`flush`), what a crash left (`reclaim`).

use std::sync::Arc;

use readonce_storage::{BoxFuture, Rt, Storage, sync::Mutex};

use super::{
    chunks::read_padded,
    commit::Kind,
    entry::{ALL, COMPRESSED, COPIED, Entry, Place, Units},
    flush::{Flusher, Unlinked as UnlinkedInFile},
    header::Header,
    l1::L1Entry,
    layout::SUBCLUSTERS,
    links::{Joined, Links, Released, Span},
    mark::{Closing, Leaks, Mark, Ticket},
    refcount_table::{Found, bad_entry},
    refs::Refs,
    repair,
    slice::raw_entries,
    snapshots,
    space::{Space, Taken},
    tables::{Pin, Tables},
};
use crate::{
    Abilities, CommitMode, Durability, Extent, FormatError, Geometry, Mapper, Reservation, Room, Unlinked,
    WritableMapper,
    clusters::{Clusters, Fit},
    mapper::ReservationHolder,
    number::{index, round_up},
    reclaim::Reclaim,
    rounds::Rounds,
};

/// Bytes of a file whose leaks are looked for to the end when it is closed: no more tables than that can be read. Of a larger one they are
/// left to the next open.
const FINISHED_AT_CLOSE_BYTES_MAX: u64 = 1 << 30;
/// Tables of different ranges wait for each other only by chance.
const TABLE_LOCKS: usize = 16;

/// The image.
pub(super) struct Writer {
    core: Arc<Core>,
}

/// What reservations and background work share.
pub(super) struct Core {
    pub(super) file: Arc<dyn Storage>,
    data: Option<Arc<dyn Storage>>,
    pub(super) tables: Arc<Tables>,
    pub(super) space: Arc<Space>,
    pub(super) reclaim: Reclaim,
    mark: Arc<Mark>,
    flusher: Flusher,
    /// A refcount table entry that names no block and counts clusters of the file, and what it holds.
    bad_refcounts: Option<(u64, Option<u64>)>,
    abilities: Abilities,
    table_locks: [tokio::sync::Mutex<()>; TABLE_LOCKS],
    rt: Rt,
}

impl Writer {
    pub(super) async fn open(
        file: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        rt: Rt,
    ) -> Result<Self, FormatError> {
        let mut header = Header::read(file.as_ref()).await?;
        if header.corrupt() {
            return Err(FormatError::Unsupported(
                "qcow2: Image is corrupt; cannot be opened read/write".into(),
            ));
        }
        if header.dirty() {
            // Refcounts are too low, perhaps: nothing may be handed out before they are right.
            repair::rebuild_refcounts(&file).await?;
            header = Header::read(file.as_ref()).await?;
        }
        let layout = header.layout;
        if layout.external_data && data.is_none() {
            return Err(FormatError::Invalid("'data-file' is required for this image".into()));
        }
        if let Some(data) = data.as_ref().filter(|data| data.len() < layout.image_size) {
            // Written in place, and read, wherever the tables say; what is not there reads as zeros.
            if let Err(error) = data.set_len(layout.image_size).await {
                tracing::warn!(%error, "the data file ends before the disk, and cannot be made as long");
            }
        }
        let found = Found::read(file.as_ref(), &header).await?;
        let cluster_size = layout.cluster_size();
        let file_end = round_up(file.len(), cluster_size)
            .ok_or_else(|| FormatError::corrupt("file length", file.len(), "must be below 2^63"))?;
        let open_end = found.free_from(file.as_ref(), file_end).await?;
        let mut metadata: Vec<_> = found.regions().collect();
        metadata.push(0..cluster_size);
        if header.fields.nb_snapshots > 0 {
            let at = header.fields.snapshots_offset;
            let table = snapshots::Table::read(file.as_ref(), at, header.fields.nb_snapshots).await?;
            metadata.push(at..at + table.bytes);
            for entry in &table.entries {
                let len = u64::from(entry.l1_entries) * 8;
                metadata.push(entry.l1_offset..entry.l1_offset.saturating_add(len));
            }
        }
        let tables = Arc::new(Tables::new(file.clone(), &header));
        tables.load_l1(file.clone(), metadata).await?;
        let raw_data = header.data_file.as_ref().is_some_and(|data| data.raw);
        let can_zero = (layout.version >= 3 || header.backing.is_none()) && !raw_data;
        let bad_refcounts = found.bad_before(open_end).map(|entry| (entry, found.bad.get(&entry).copied()));
        let clusters = Arc::new(Clusters::new(file.clone(), cluster_size, open_end));
        let refs = Arc::new(Refs::new(file.clone(), found, clusters.clone()));
        let reclaim = Reclaim::new(header.record.in_use, open_end);
        let mark = Arc::new(Mark::new(file.clone(), header));
        let space = Arc::new(Space::new(clusters, refs, tables.clone(), mark.clone(), rt.clone(), open_end));
        if reclaim.is_due() {
            space.refs.track(open_end);
        }
        // Now and durably: of what a guest writes in place nobody here is told, and any of it may reach the disk.
        if mark.clear_autoclear().await? {
            file.sync().await?;
        }
        let flusher = Flusher {
            file: file.clone(),
            data: data.clone(),
            tables: tables.clone(),
            space: space.clone(),
            mark: mark.clone(),
            links: Links::default(),
            rounds: Rounds::default(),
            unlinked: Mutex::new(UnlinkedInFile::default()),
        };
        let core = Core {
            file,
            data: data.filter(|_| layout.external_data),
            tables,
            space,
            reclaim,
            mark,
            flusher,
            bad_refcounts,
            abilities: Abilities { zero: can_zero, unlink: can_zero },
            table_locks: [const { tokio::sync::Mutex::const_new(()) }; TABLE_LOCKS],
            rt,
        };
        Ok(Self { core: Arc::new(core) })
    }
}

/// What is set aside for one reservation.
struct Plan {
    span: Span,
    room: Held,
    /// Guest bytes.
    len: u64,
    /// Where the data goes.
    at: Option<u64>,
}

/// The room of one reservation.
enum Held {
    /// New clusters.
    New(Taken),
    /// A cluster of which others may hold units as well.
    Room(u64),
    /// A new cluster for all that the old one holds.
    Copy(Taken),
    /// In the data file.
    External,
    Zero,
}

impl Core {
    /// Sees to an L2 table for `l1_index` that nothing else uses.
    async fn own_table(&self, l1_index: u64) -> Result<(), FormatError> {
        if let L1Entry::Own(_) = self.tables.l1.entry(l1_index).await? {
            return Ok(());
        }
        let lock = self.table_locks.get(index(l1_index) % TABLE_LOCKS).expect("there are TABLE_LOCKS locks");
        let _one_at_a_time = lock.lock().await;
        let old = self.tables.l1.entry(l1_index).await?;
        if let L1Entry::Own(_) = old {
            return Ok(());
        }
        // Space for the entry in the L1 table as well, so that no flush meets "no space".
        let (sector, entries) = self.tables.l1.sector(l1_index, |_| None);
        self.file.allocate(sector, crate::number::bytes(entries.len())).await?;
        let cluster_size = self.tables.rules.layout.cluster_size();
        let taken = self.space.take(cluster_size, Fit::Whole).await?;
        let table = taken.at();
        match old {
            L1Entry::Shared(old) => self.copy_table(old, table).await?,
            _ if !taken.is_fresh() => self.file.write_zeroes(table, cluster_size).await?,
            _ => {}
        }
        taken.keep();
        self.tables.known().made(table..table + cluster_size);
        if let L1Entry::Shared(old) = old {
            // Before a round can take it.
            self.space.refs.will_change(std::iter::once(old));
        }
        self.flusher.links.link_table(&self.tables.l1, l1_index, table, old);
        Ok(())
    }

    /// Copies a table that something else uses too: so all that it names is not the image's own.
    async fn copy_table(&self, from: u64, to: u64) -> Result<(), FormatError> {
        let layout = &self.tables.rules.layout;
        let read = read_padded(self.file.as_ref(), from, layout.cluster_size()).await?;
        let mut copy = Vec::with_capacity(read.len());
        for raw in raw_entries(&read, layout.extended_l2) {
            let shared = raw.word & COMPRESSED == 0 && !layout.external_data;
            let word = if shared { raw.word & !COPIED } else { raw.word };
            copy.extend_from_slice(&word.to_be_bytes());
            if layout.extended_l2 {
                copy.extend_from_slice(&raw.bitmap.to_be_bytes());
            }
        }
        Ok(self.file.write(to, copy.into()).await?)
    }

    async fn prepare(self: Arc<Self>, guest: u64, len: u64, room: Room) -> Result<Reservation, FormatError> {
        let span = self.span(guest, len, room)?;
        let ticket = self.mark.begin().await?;
        let prepared = self.set_aside(guest, span, room).await;
        let (plan, pin) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                if matches!(error, FormatError::Corrupt { .. }) {
                    self.mark.set_corrupt().await;
                }
                return Err(error);
            }
        };
        let (len, at) = (plan.len, plan.at);
        let held = Reserved { plan, pin, _ticket: ticket };
        let holder = Holder { core: self, guest, len, held: Mutex::new(Some(held)) };
        Ok(Reservation::new(guest, len, at, Arc::new(holder)))
    }

    /// What of the request lies in one slice, and, where it does not begin and end with whole clusters, in one cluster.
    fn span(&self, guest: u64, len: u64, room: Room) -> Result<Span, FormatError> {
        let layout = &self.tables.rules.layout;
        let (unit, cluster_size) = (layout.fill_unit(), layout.cluster_size());
        let guest_end = layout.image_size.next_multiple_of(unit);
        let aligned = guest.is_multiple_of(unit) && len.is_multiple_of(unit);
        if !aligned || len == 0 || guest >= guest_end {
            return Err(FormatError::Invalid(format!(
                "room for {len} bytes at {guest} is not whole units of {unit} bytes inside {guest_end}"
            )));
        }
        let end = guest.saturating_add(len).min(guest_end);
        let in_cluster = guest % cluster_size;
        let ends_whole = |at: u64| at.is_multiple_of(cluster_size) || at == guest_end;
        let first = layout.slice_entry(guest);
        let cluster = guest / cluster_size;
        let last = cluster + (layout.slice_entries() - first);
        let mut end = end.min(last * cluster_size);
        let mut whole = in_cluster == 0;
        if whole && !ends_whole(end) {
            // The whole clusters first, if there are any.
            let rounded = end - end % cluster_size;
            whole = rounded > guest;
            end = if whole { rounded } else { end };
        } else if !whole {
            end = end.min((cluster + 1) * cluster_size);
        }
        if room == Room::Copy {
            if !whole {
                return Err(FormatError::Invalid(format!(
                    "a copy of {len} bytes at {guest} is not of a whole cluster of {cluster_size} bytes"
                )));
            }
            end = end.min(guest + cluster_size);
        }
        let count = (end - guest).div_ceil(cluster_size);
        let tail_bytes = end - (guest - in_cluster) - (count - 1) * cluster_size;
        let (from, to) = (in_cluster / unit, tail_bytes / unit);
        let tail = if layout.extended_l2 { units(0, to) } else { ALL };
        let head = match (layout.extended_l2, count) {
            (false, _) => ALL,
            (true, 1) => units(from, to),
            (true, _) => units(from, SUBCLUSTERS),
        };
        Ok(Span { cluster, first, count, head, tail: if count == 1 { head } else { tail }, whole })
    }

    /// Everything of `prepare` that can fail.
    async fn set_aside(&self, guest: u64, mut span: Span, room: Room) -> Result<(Plan, Pin), FormatError> {
        if let Some((entry, raw)) = self.bad_refcounts {
            // Else it was met by a flush, which would then fail for good, with links that nobody can count.
            return Err(bad_entry(entry, raw));
        }
        let layout = &self.tables.rules.layout;
        self.own_table(layout.l1_index(guest)).await?;
        let slice_index = layout.slice_index(guest);
        let pin = self.tables.pin(slice_index).await?;
        let known = self.tables.known();
        if !known.has_room(slice_index)
            && let L1Entry::Own(table) = self.tables.l1.entry(layout.l1_index(guest)).await?
        {
            // A table that another program made may be a hole in the file.
            self.file.allocate(table + layout.slice_in_table(slice_index), layout.slice_bytes()).await?;
            known.room_made(slice_index);
        }
        let room = match room {
            Room::Zero => self.hold_zero(&pin, &mut span)?,
            Room::Copy => {
                pin.slice().entry(span.first, &self.tables.rules)?;
                Held::Copy(self.space.take(layout.cluster_size(), Fit::Whole).await?)
            }
            Room::Data => self.hold_data(&pin, &mut span).await?,
        };
        let cluster_size = layout.cluster_size();
        let in_cluster = guest % cluster_size;
        let at = match &room {
            Held::New(taken) | Held::Copy(taken) => Some(taken.at() + in_cluster),
            Held::Room(at) => Some(at + in_cluster),
            Held::External => Some(guest),
            Held::Zero => None,
        };
        let mut held = 0;
        for number in 0..span.count {
            held += u64::from(span.units(number).count_ones());
        }
        let len = held * (cluster_size / SUBCLUSTERS);
        let plan = Plan { span, room, len, at };
        if let (Held::External, Some(data)) = (&plan.room, &self.data)
            && let Err(error) = data.allocate(guest, len).await
        {
            return Err(error.into());
        }
        Ok((plan, pin))
    }

    fn hold_zero(&self, pin: &Pin, span: &mut Span) -> Result<Held, FormatError> {
        let rules = &self.tables.rules;
        let first = pin.slice().entry(span.first, rules)?;
        if !span.whole && matches!(first.place, Place::Compressed(_)) {
            return Err(FormatError::CopyFirst);
        }
        let good = (span.first..span.first + span.count)
            .take_while(|&at| pin.slice().entry(at, rules).is_ok())
            .count();
        shorten(span, crate::number::bytes(good));
        Ok(Held::Zero)
    }

    async fn hold_data(&self, pin: &Pin, span: &mut Span) -> Result<Held, FormatError> {
        let rules = &self.tables.rules;
        let links = &self.flusher.links;
        let cluster_size = rules.layout.cluster_size();
        let first = pin.slice().entry(span.first, rules)?;
        if rules.layout.external_data {
            let good = (span.first..span.first + span.count)
                .take_while(|&at| pin.slice().entry(at, rules).is_ok())
                .count();
            shorten(span, crate::number::bytes(good));
            return Ok(Held::External);
        }
        let shared = matches!(first.place, Place::Shared(_) | Place::Compressed(_));
        if shared && !span.whole {
            return Err(FormatError::CopyFirst);
        }
        // Units of one cluster may be held by several; whole clusters that no entry names are simply new.
        let apart = !span.whole || matches!(first.place, Place::Own(_)) || links.has_room(span.cluster);
        if apart && !shared {
            let mut one = *span;
            shorten(&mut one, 1);
            let free = free_run(first, one.head);
            if free != 0 {
                (one.head, one.tail) = (free, free);
                one.whole &= free == span.head;
                if let Some(at) = self.join(pin, &one).await? {
                    *span = one;
                    return Ok(Held::Room(at));
                }
            }
            *span = one;
        } else {
            let fresh = |number: u64, at: u64| {
                let new =
                    pin.slice().entry(at, rules).is_ok_and(|entry| !matches!(entry.place, Place::Own(_)));
                new && (number == 0 || !links.has_room(span.cluster + number))
            };
            let count = (0..span.count).take_while(|&number| fresh(number, span.first + number)).count();
            shorten(span, crate::number::bytes(count).max(1));
        }
        let fit = if span.count == 1 { Fit::Whole } else { Fit::AtMost };
        let taken = self.space.take(span.count * cluster_size, fit).await?;
        shorten(span, taken.len() / cluster_size);
        Ok(Held::New(taken))
    }

    /// Joins those who hold units of the cluster; `None` where there is no room for these units among them.
    async fn join(&self, pin: &Pin, span: &Span) -> Result<Option<u64>, FormatError> {
        let rules = &self.tables.rules;
        let links = &self.flusher.links;
        let mut offer = None;
        loop {
            match links.join(pin.slice(), rules, span, offer.take())? {
                Joined::Room(at) => return Ok(Some(at)),
                Joined::Unfit => return Ok(None),
                Joined::NeedsCluster => {
                    offer = Some(self.space.take(rules.layout.cluster_size(), Fit::Whole).await?);
                }
            }
        }
    }

    /// Takes the marks off if the image deserves it.
    async fn clean(&self) -> Result<(), FormatError> {
        let closing = self.mark.close_begin().await;
        if closing.as_ref().is_some_and(Closing::marked) {
            self.space.lower_late().await?;
            // Before the flush, whose sync covers it.
            self.space.clusters.cut().await?;
        }
        self.mark.clear_autoclear().await?;
        self.flusher.flush(Durability::Durable).await?;
        let Some(closing) = closing else { return Ok(()) };
        if !closing.marked() || !self.flusher.links.is_empty() {
            return Ok(());
        }
        self.flusher.settle_refcounts().await?;
        // The refcounts are right in any case: without its dirty bit nobody counts them anew before the image can be used.
        closing.clear(if self.reclaim.is_due() { Leaks::Perhaps } else { Leaks::None }).await
    }
}

/// The units from `from` up to `to`, which is at most 32.
fn units(from: u64, to: u64) -> Units {
    let below =
        |end: u64| u32::try_from(end).ok().and_then(|end| 1_u64.checked_shl(end)).map_or(0, |bit| bit - 1);
    Units::try_from(below(to) & !below(from)).expect("32 bits")
}

/// Keeps the first `count` clusters of a span, at least one.
fn shorten(span: &mut Span, count: u64) {
    if count >= span.count {
        return;
    }
    span.tail = span.units(count.max(1) - 1);
    span.count = count.max(1);
}

fn is_corrupt<T>(result: &Result<T, FormatError>) -> bool {
    matches!(result, Err(FormatError::Corrupt { .. }))
}

/// Of `wanted`, the first units in a row that hold no data: all absent or all zero. A fill of absent units must not write
/// where units lie that became zeros: the disk may still show there what they were.
fn free_run(entry: Entry, wanted: Units) -> Units {
    let first = wanted.trailing_zeros();
    let is_first = |set: Units| set.checked_shr(first).is_some_and(|set| set & 1 == 1);
    let same = match entry {
        _ if is_first(entry.absent()) => entry.absent(),
        Entry { zero, .. } if is_first(zero) => zero,
        _ => return 0,
    };
    let run = (wanted & same).checked_shr(first).map_or(0, Units::trailing_ones);
    units(first.into(), u64::from(first + run))
}

/// The driver's side of one reservation.
struct Holder {
    core: Arc<Core>,
    guest: u64,
    len: u64,
    held: Mutex<Option<Reserved>>,
}

struct Reserved {
    plan: Plan,
    pin: Pin,
    _ticket: Ticket,
}

impl Holder {
    fn give_back(&self, reserved: Reserved) {
        // New clusters go back when they are dropped.
        if let Held::Room(_) = reserved.plan.room {
            self.core.flusher.links.leave(reserved.plan.span.cluster);
        }
    }
}

impl ReservationHolder for Holder {
    fn commit(&self, guest: u64, len: u64, at: Option<u64>, mode: CommitMode) -> u64 {
        // The fields of a reservation are open; what was set aside is what counts.
        assert!(guest == self.guest && len == self.len, "a reservation is committed as it was prepared");
        let Some(reserved) = self.held.lock().take() else { return 0 };
        let Reserved { plan: Plan { span, room, at: planned_at, .. }, pin, _ticket } = reserved;
        assert!(at == planned_at, "a reservation is committed with its own room");
        let rules = &self.core.tables.rules;
        let cluster_size = rules.layout.cluster_size();
        let kind = |number: u64| match &room {
            Held::New(taken) => Kind::New(taken.at() + number * cluster_size),
            Held::Copy(taken) => Kind::Copy(taken.at()),
            Held::Room(at) => Kind::Room(*at),
            Held::External => Kind::Room((span.cluster + number) * cluster_size),
            Held::Zero => Kind::Zero,
        };
        let links = &self.core.flusher.links;
        let unlinks = |released: Released| self.core.space.refs.will_change(released.clusters(cluster_size));
        let (used, linked) = links.commit(&pin, rules, &span, kind, mode, unlinks);
        match room {
            Held::New(taken) | Held::Copy(taken) => taken.keep_each(&used),
            Held::Room(_) => links.leave(span.cluster),
            Held::External | Held::Zero => {}
        }
        linked * (cluster_size / SUBCLUSTERS)
    }

    fn release(&self, _: u64, _: u64, _: Option<u64>) {
        if let Some(reserved) = self.held.lock().take() {
            self.give_back(reserved);
        }
    }
}

impl Mapper for Writer {
    fn geometry(&self) -> Geometry {
        self.core.tables.geometry()
    }

    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        // Corruption is to be marked in the file: `lookup` can wait for that.
        self.core.tables.extent_now(offset, len_max).filter(|extent| !is_corrupt(extent))
    }

    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>> {
        Box::pin(async move {
            let extent = self.core.tables.extent(offset, len_max).await;
            if is_corrupt(&extent) {
                self.core.mark.set_corrupt().await;
            }
            extent
        })
    }

    fn room(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<(Option<u64>, u64), FormatError>> {
        Box::pin(self.core.tables.room(offset, len_max))
    }
}

impl WritableMapper for Writer {
    fn abilities(&self) -> Abilities {
        self.core.abilities
    }

    fn prepare(&self, offset: u64, len: u64, room: Room) -> BoxFuture<'_, Result<Reservation, FormatError>> {
        Box::pin(self.core.clone().prepare(offset, len, room))
    }

    fn flush(&self, durability: Durability) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            self.core.mark.clear_autoclear().await?;
            self.core.flusher.flush(durability).await
        })
    }

    fn unlinked_bytes(&self) -> u64 {
        self.core.flusher.links.data_bytes()
    }

    fn take_unlinked(&self) -> Option<Unlinked> {
        self.core.space.take_unlinked()
    }

    fn settle(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(self.core.clean())
    }

    fn close(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            if self.core.reclaim.end <= FINISHED_AT_CLOSE_BYTES_MAX {
                self.core.reclaim.finish().await;
            }
            self.core.reclaim.stop().await;
            self.core.space.scan_ended().await;
            self.core.clean().await
        })
    }

    fn reclaim(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            if self.core.reclaim.begin() {
                let core = self.core.clone();
                self.core.rt.spawn(Box::pin(async move { super::reclaim::run(&core).await }));
            }
            Ok(())
        })
    }
}
