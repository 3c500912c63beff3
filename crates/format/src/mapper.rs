//! The mapper traits: where a guest range lies, room for it, and the link that shows it.
//!
//! - Offsets and lengths are bytes. A *fill unit* is the smallest piece that can change its mapping: a cluster, or a
//!   subcluster where the format has them.
//! - A reservation that is dropped gives its room back. One that is committed with [`CommitMode::IfAbsent`] changes only
//!   units that are still absent: a late fill cannot bury newer bytes.
//! - A committed link is visible to `lookup` at once, and on disk only after a flush. The driver never lets the disk show
//!   a link before the data that it points to is synced. The caller has written the data (completed, not synced) before
//!   it commits.
//! - No lock is held while data or a backing is read: the driver does neither.
//! - Bytes that a snapshot shows too, and compressed bytes, are read and never written in place: a guest write there takes
//!   new room first ([`Room::Copy`]).
//! - What a commit unlinked is used again only after the caller said that nobody who looked it up still reads or writes
//!   there ([`Unlinked`]).
//!
//! Not here: data I/O, copy-on-read, and who may change a unit when (`readonce-disk`).

use std::sync::Arc;

use readonce_storage::BoxFuture;

use crate::{FormatError, codec::Codec};

/// Sizes that do not change while an image is open, apart from `size`, which grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes that the guest sees; a multiple of 512.
    pub size: u64,
    /// Bytes.
    pub cluster_size: u64,
    /// Bytes of the smallest piece that can change its mapping; divides `cluster_size`.
    pub fill_unit: u64,
}

/// Where a run of guest bytes lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Not in this image: the backing shows through.
    Absent,
    /// Reads as zeros and hides the backing.
    Zero,
    /// At this byte offset of the image's data file (its own file where it has no other), and on from there.
    Data(u64),
    /// As `Data`, and something else shows these bytes as well (an internal snapshot): read there, never written there.
    Shared(u64),
    /// Inside a compressed cluster: read by decompressing it, never written there. The extent ends with the cluster.
    Compressed(Compressed),
}

/// Where a compressed cluster lies in the image's own file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compressed {
    /// Byte offset of the first byte of the stream; any alignment.
    pub at: u64,
    /// Bytes from there that hold all of the stream; others' bytes may follow in them. Inside the file, and at most twice a
    /// cluster.
    pub len: u64,
    /// How it is compressed.
    pub codec: Codec,
    /// Bytes from the start of the guest cluster to the first byte asked.
    pub skip: u64,
}

/// A run of guest bytes in one mapping state; `Data` and `Shared` runs are contiguous in the file too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Of the first byte asked.
    pub mapping: Mapping,
    /// Bytes; at least 1, at most what was asked. The next extent may have the same mapping.
    pub len: u64,
}

/// What room a reservation holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// File space for data; its space is also allocated in the file system where that can be had, so that writing the
    /// data cannot meet "no space".
    Data,
    /// None: the units will read as zeros.
    Zero,
    /// A new place for one whole cluster whose units are `Shared` or `Compressed` (or absent, or zero). The caller writes there
    /// what the `Shared` and `Compressed` ones hold, each at its offset inside the cluster; the others stay what they are.
    Copy,
}

/// What a format can do beyond linking absent units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// [`Room::Zero`] can be had; else zeros are written out as data.
    pub zero: bool,
    /// [`Room::Zero`] may be committed over data, by whole clusters, which frees them; else data is zeroed in place.
    pub unlink: bool,
}

/// Which units a commit may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitMode {
    /// Units still absent (a fill).
    IfAbsent,
    /// Absent and zero units (a guest write); whole clusters that are shared or compressed; with [`Room::Zero`], whole clusters of
    /// data where the format can unlink. Linking data over data is a bug of the caller: data is written in place.
    Overwrite,
}

/// How far a flush goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Data synced, links written but not synced: closes a group of fills.
    Linked,
    /// Links synced as well: what a guest's flush promises.
    Durable,
}

/// Reads the map of an image, whatever its format.
pub trait Mapper: Send + Sync + 'static {
    /// The sizes.
    fn geometry(&self) -> Geometry;

    /// The extent at `offset` from cached tables alone, at most `len_max` bytes long (at least 1). `None`: a table must be
    /// read first. Takes no lock that another connection could hold for long, and allocates nothing. `offset` lies inside
    /// the image.
    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>>;

    /// The extent at `offset`, reading tables where needed.
    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>>;

    /// Whether tables that were read so far name compressed clusters: data may then share sectors' neighbourhoods with them.
    fn names_compressed(&self) -> bool {
        false
    }

    /// The room in the data's file that units from `offset` on have, though they may be absent or read as zeros: the byte
    /// offset (`None` without room), and for how many bytes that is so, at least 1 and at most `len_max`. For those who tell
    /// a person; nobody may write there.
    fn room(&self, _offset: u64, len_max: u64) -> BoxFuture<'_, Result<(Option<u64>, u64), FormatError>> {
        Box::pin(std::future::ready(Ok((None, len_max))))
    }

    /// Whether data may lie in holes of its file, and so read as zeros, because the image's own file, of which `allocated_bytes`
    /// have room in the file system, has fewer clusters than its tables name. For those who tell a person.
    fn names_holes(&self, _allocated_bytes: u64) -> BoxFuture<'_, Result<bool, FormatError>> {
        Box::pin(std::future::ready(Ok(false)))
    }
}

/// Changes the map of an image that is open for writing.
pub trait WritableMapper: Mapper {
    /// What the format can do. Does not change while the image is open.
    fn abilities(&self) -> Abilities;

    /// Sets room aside for the units from `offset`, `len` bytes in all (both multiples of the fill unit, but for a `len` that
    /// ends at the end of the image rounded up). The reservation may be shorter than asked: it is contiguous in
    /// the file, and at least one unit. Tables that a commit will touch are read and held, so that commit cannot fail.
    ///
    /// Where units of a cluster can change their mapping apart (subclusters), reservations for different units of one
    /// cluster may be held at once. Over shared and compressed units, and over data, `offset` and `len` are whole
    /// clusters (but for the end of the image); a reservation never mixes them with units that are written by parts.
    ///
    /// Reservations for the same unit may name the same room: only the unit's owner writes there, and lets go of what the
    /// others hold.
    ///
    /// # Errors
    /// `NoSpace` (nothing changed); `CopyFirst`, where units that are absent or zero share their cluster with units that are
    /// `Shared` (the whole cluster is to be copied before); `Corrupt`, `Io`.
    fn prepare(&self, offset: u64, len: u64, room: Room) -> BoxFuture<'_, Result<Reservation, FormatError>>;

    /// Orders and writes what was committed before the call. Concurrent calls share rounds where they can.
    ///
    /// # Errors
    /// `NoSpace`: links stay pending and nothing is lost. Any other error: the caller latches.
    fn flush(&self, durability: Durability) -> BoxFuture<'_, Result<(), FormatError>>;

    /// Bytes of data whose links are committed but not yet written to the file.
    fn unlinked_bytes(&self) -> u64;

    /// Clusters that no link names any more, neither in memory nor on the disk after power loss. Each is handed out once;
    /// asked after a flush.
    fn take_unlinked(&self) -> Option<Unlinked>;

    /// Takes the dirty mark off where nothing is in flight or left to reclaim (after a durable flush of its own). Called
    /// when the image was idle for a while; the next allocation sets the mark again. Guest reads and in-place writes
    /// go on meanwhile, so no linked cluster is moved here: where only moving would free a hole, the mark stays.
    fn settle(&self) -> BoxFuture<'_, Result<(), FormatError>>;

    /// Flushes, gives back what is not used, takes the dirty mark off. Nothing may be in flight.
    fn close(&self) -> BoxFuture<'_, Result<(), FormatError>>;

    /// Begins to reclaim in the background what a crash left unlinked, if the image was found dirty; allocation appends
    /// meanwhile. Returns at once when there is nothing to do.
    fn reclaim(&self) -> BoxFuture<'_, Result<(), FormatError>>;
}

/// Clusters that nothing links any more. Dropped, they stay out of use until the image is opened again.
pub struct Unlinked(Box<dyn FnOnce() + Send>);

impl Unlinked {
    /// Clusters that `reuse` makes free.
    pub fn new(reuse: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(reuse))
    }

    /// They may be used again: every read, and every write in place, that had looked one of them up before
    /// [`WritableMapper::take_unlinked`] answered has ended.
    pub fn reuse(self) {
        (self.0)();
    }
}

/// Room that is set aside and not yet linked. Dropped, it is given back.
pub struct Reservation {
    /// First guest byte; a multiple of the fill unit.
    pub guest: u64,
    /// Guest bytes; a multiple of the fill unit.
    pub len: u64,
    /// Where the data goes in the file; `None` for [`Room::Zero`].
    pub at: Option<u64>,
    holder: Option<Arc<dyn ReservationHolder>>,
}

/// The driver's side of a [`Reservation`].
pub trait ReservationHolder: Send + Sync {
    /// Links the units; returns the bytes that were linked. The room of units that were not linked is given back.
    fn commit(&self, guest: u64, len: u64, at: Option<u64>, mode: CommitMode) -> u64;
    /// Takes the room back and lets go of the tables.
    fn release(&self, guest: u64, len: u64, at: Option<u64>);
}

impl Reservation {
    /// A reservation that `holder` will commit or take back.
    pub fn new(guest: u64, len: u64, at: Option<u64>, holder: Arc<dyn ReservationHolder>) -> Self {
        Self { guest, len, at, holder: Some(holder) }
    }

    /// Links the units: visible to `lookup` when this returns. Returns the bytes linked (fewer than `len` only with
    /// [`CommitMode::IfAbsent`]).
    pub fn commit(mut self, mode: CommitMode) -> u64 {
        let holder = self.holder.take().expect("a reservation is committed once");
        holder.commit(self.guest, self.len, self.at, mode)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(holder) = self.holder.take() {
            holder.release(self.guest, self.len, self.at);
        }
    }
}
