//! A QED image that is open for writing.
//!
//! - `prepare` does everything that can fail: the dirty mark, the L2 table and its space, the slice, the clusters and
//!   their space. `commit` changes memory only.
//! - Allocations run side by side. Waiting is only where two need the same: the first mark, a new table of the same range,
//!   the file system's answer for the window that both lie in.
//! - A linked cluster is never moved while the image is in use, only in `close`.
//!
//! Not here: the order of writes (`flush`), what a crash left (`reclaim`).

use std::sync::Arc;

use readonce_storage::{BoxFuture, Rt, Storage, sync::Mutex};

use super::{
    flush::Flusher,
    header::Header,
    layout::{SLICE_BYTES, SLICE_ENTRIES},
    links::Links,
    mark::{Closing, Mark, Ticket},
    repair,
    slice::Entry,
    tables::{Pin, Tables},
};
use crate::{
    Abilities, CommitMode, Durability, Extent, FormatError, Geometry, Mapper, Reservation, Room, Unlinked,
    WritableMapper,
    clusters::{Clusters, Fit, Run},
    mapper::ReservationHolder,
    number::index,
    reclaim::Reclaim,
    rounds::Rounds,
};

/// New tables of different ranges wait for each other only by chance.
const TABLE_LOCKS: usize = 16;

/// The image.
pub(super) struct Writer {
    core: Arc<Core>,
}

/// What reservations and background work share.
pub(super) struct Core {
    pub(super) file: Arc<dyn Storage>,
    pub(super) tables: Arc<Tables>,
    pub(super) clusters: Arc<Clusters>,
    pub(super) reclaim: Reclaim,
    mark: Arc<Mark>,
    flusher: Flusher,
    table_locks: [tokio::sync::Mutex<()>; TABLE_LOCKS],
    rt: Rt,
}

impl Writer {
    pub(super) async fn open(file: Arc<dyn Storage>, rt: Rt) -> Result<Self, FormatError> {
        let header = Header::read(file.as_ref()).await?;
        let tables = Arc::new(Tables::new(file.clone(), header.layout));
        // A table that another shares, or that lies where it may not, would let a write destroy what it does not own.
        tables.load_l1().await?;
        let flusher = Flusher {
            file: file.clone(),
            tables: tables.clone(),
            links: Links::default(),
            rounds: Rounds::default(),
        };
        let mark = Arc::new(Mark::new(file.clone(), header.sector));
        if header.grew_unmarked(file.len()) {
            // As if the mark had been found: what lies behind the clean end is looked for.
            mark.begin().await?;
        }
        let unclean = header.need_check() || header.grew_unmarked(file.len());
        let core = Core {
            clusters: Arc::new(Clusters::new(
                file.clone(),
                header.layout.cluster_size,
                header.layout.whole_clusters_end(file.len()),
            )),
            mark,
            reclaim: Reclaim::new(unclean, header.layout.whole_clusters_end(file.len())),
            table_locks: [const { tokio::sync::Mutex::const_new(()) }; TABLE_LOCKS],
            flusher,
            tables,
            file,
            rt,
        };
        Ok(Self { core: Arc::new(core) })
    }
}

impl Core {
    /// The L2 table of `l1_index`, made where there is none.
    async fn ensure_table(&self, l1_index: u64) -> Result<u64, FormatError> {
        if let Some(table) = self.tables.table(l1_index).await? {
            return Ok(table);
        }
        let lock = self.table_locks.get(index(l1_index) % TABLE_LOCKS).expect("there are TABLE_LOCKS locks");
        let _one_at_a_time = lock.lock().await;
        if let Some(table) = self.tables.table(l1_index).await? {
            return Ok(table);
        }
        let layout = &self.tables.layout;
        // Space for the entry in the L1 table as well, so that no flush meets "no space".
        let l1_slice = self.tables.l1_slice(l1_index).await?;
        self.file.allocate(layout.l1_offset + l1_slice.index * SLICE_BYTES, SLICE_BYTES).await?;
        let run = self.clusters.take(layout.table_bytes(), Fit::Whole);
        self.clusters.make_room(run.at, run.len).await?;
        if !run.fresh {
            self.file.write_zeroes(run.at, run.len).await?;
        }
        let (table, len) = (run.at, run.len);
        run.keep(len);
        self.tables.table_made(table, l1_index);
        self.flusher.links.link_table(l1_slice, l1_index, table);
        Ok(table)
    }

    async fn prepare(self: Arc<Self>, guest: u64, len: u64, room: Room) -> Result<Reservation, FormatError> {
        let layout = self.tables.layout;
        let cluster_size = layout.cluster_size;
        let guest_end = layout.image_size.div_ceil(cluster_size) * cluster_size;
        let aligned = guest.is_multiple_of(cluster_size) && len.is_multiple_of(cluster_size);
        if !aligned || len == 0 || guest >= guest_end {
            return Err(FormatError::Invalid(format!(
                "room for {len} bytes at {guest} is not whole clusters of {cluster_size} bytes inside {guest_end}"
            )));
        }

        let ticket = self.mark.begin().await?;
        let table = self.ensure_table(layout.l1_index(guest)).await?;
        let slice_index = layout.slice_index(guest);
        let pin = self.tables.pin(slice_index, table).await?;
        let first = layout.slice_entry(guest);
        let wanted = (len / cluster_size).min(SLICE_ENTRIES - first).min((guest_end - guest) / cluster_size);
        let good = (first..first + wanted).take_while(|&at| pin.slice().entry(at) != Entry::Bad).count();
        if good == 0 {
            return Err(pin.slice().corrupt("L2", first));
        }
        if pin.is_first() {
            // A table that another program made may be a hole in the file.
            self.file.allocate(table + layout.slice_in_table(slice_index), SLICE_BYTES).await?;
        }
        let mut len = crate::number::bytes(good) * cluster_size;
        let mut run = None;
        if room == Room::Copy {
            return Err(FormatError::Invalid("a QED cluster is never shared".into()));
        }
        if room == Room::Data {
            let taken = self.clusters.take(len, Fit::AtMost);
            self.clusters.make_room(taken.at, taken.len).await?;
            len = taken.len;
            run = Some(taken);
        }
        let at = run.as_ref().map(|run| run.at);
        let held = Held { run, _ticket: ticket, pin };
        let holder = Holder { core: self, guest, len, held: Mutex::new(Some(held)) };
        Ok(Reservation::new(guest, len, at, Arc::new(holder)))
    }

    /// Takes the mark off if the image deserves it. `Relocation::Never` leaves holes, and then the mark, where they are.
    async fn clean(&self, relocation: Relocation) -> Result<(), FormatError> {
        let closing = self.mark.close_begin().await;
        let has_holes = self.reclaim.is_due() || self.clusters.has_holes();
        if !has_holes && closing.as_ref().is_some_and(Closing::marked) {
            // Before the flush, whose sync covers it: without the mark nobody would look for what lies past the end.
            self.clusters.cut().await?;
        }
        self.flusher.flush(Durability::Durable).await?;
        let Some(closing) = closing else { return Ok(()) };
        if !closing.marked() || !self.flusher.links.is_empty() {
            return Ok(());
        }
        if has_holes {
            if relocation == Relocation::Never || !self.compact().await? {
                return Ok(());
            }
            self.reclaim.done();
            self.clusters.cut().await?;
            self.file.sync().await?;
        }
        closing.clear().await
    }

    /// Moves clusters so that no hole is left; `false` where that cannot be, and the mark is to stay.
    async fn compact(&self) -> Result<bool, FormatError> {
        let layout = &self.tables.layout;
        let compacted = match repair::compact(&self.file, layout).await {
            Ok(compacted) => compacted,
            Err(FormatError::NoSpace(error)) => {
                tracing::warn!(%error, "no space to close holes in the image; it stays marked for a check");
                false
            }
            Err(FormatError::Unsupported(message)) => {
                tracing::warn!(message, "holes in the image stay; it stays marked for a check");
                false
            }
            Err(error) => return Err(error),
        };
        self.tables.load_l1().await?;
        self.clusters.reset(layout.whole_clusters_end(self.file.len()));
        Ok(compacted)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relocation {
    Allowed,
    Never,
}

/// The driver's side of one reservation.
struct Holder {
    core: Arc<Core>,
    guest: u64,
    len: u64,
    held: Mutex<Option<Held>>,
}

struct Held {
    run: Option<Run>,
    pin: Pin,
    _ticket: Ticket,
}

impl ReservationHolder for Holder {
    fn commit(&self, guest: u64, len: u64, at: Option<u64>, mode: CommitMode) -> u64 {
        // The fields of a reservation are open; what was set aside is what counts.
        assert!(guest == self.guest && len <= self.len, "a reservation is committed where it was prepared");
        let Some(held) = self.held.lock().take() else { return 0 };
        assert!(at == held.run.as_ref().map(|run| run.at), "a reservation is committed with its own room");
        let layout = &self.core.tables.layout;
        let cluster_size = layout.cluster_size;
        let values = (0..len / cluster_size).map(|unit| match at {
            Some(start) => Entry::At(start + unit * cluster_size),
            None => Entry::Zero,
        });
        let links = &self.core.flusher.links;
        let linked = links.commit(&held.pin, layout.slice_entry(guest), values, mode, cluster_size);
        let count = linked.iter().filter(|&&linked| linked).count();
        if let Some(run) = held.run {
            run.keep_each(&linked);
        }
        crate::number::bytes(count) * cluster_size
    }

    fn release(&self, _: u64, _: u64, _: Option<u64>) {
        // Dropping gives everything back.
        drop(self.held.lock().take());
    }
}

impl Mapper for Writer {
    fn geometry(&self) -> Geometry {
        self.core.tables.geometry()
    }

    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        self.core.tables.extent_now(offset, len_max)
    }

    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>> {
        Box::pin(self.core.tables.extent(offset, len_max))
    }
}

impl WritableMapper for Writer {
    fn abilities(&self) -> Abilities {
        // An entry never goes back from data to the zero marker: QEMU's own rule.
        Abilities { zero: true, unlink: false }
    }

    fn prepare(&self, offset: u64, len: u64, room: Room) -> BoxFuture<'_, Result<Reservation, FormatError>> {
        Box::pin(self.core.clone().prepare(offset, len, room))
    }

    fn flush(&self, durability: Durability) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            self.core.mark.clear_foreign().await?;
            self.core.flusher.flush(durability).await
        })
    }

    fn unlinked_bytes(&self) -> u64 {
        self.core.flusher.links.data_bytes()
    }

    fn take_unlinked(&self) -> Option<Unlinked> {
        None
    }

    fn settle(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(self.core.clean(Relocation::Never))
    }

    fn close(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            self.core.reclaim.stop().await;
            self.core.clean(Relocation::Allowed).await
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
