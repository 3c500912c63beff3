//! Fill: the tasks that fetch units, and that put complete units into the image.
//!
//! - A fetch and a store belong to the layer, not to who asked: they go on when a client vanishes.
//! - A fill that cannot be stored hurts no read: its readers had their bytes before it was tried.
//! - Neighbours that a piece of a fetch made complete are stored together. A unit of zeros becomes a zero cluster, each by
//!   itself.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use readonce_format::{CommitMode, Reservation, Room};
use readonce_origin::Class;

use crate::{
    LayerError,
    image::Image,
    inflight::{Fetch, Store, Stored},
    source::sink_zeros,
};

impl Image {
    pub(crate) fn start_fetch(&self, fetch: Fetch, class: Class) {
        let image = self.shared();
        self.rt.spawn(Box::pin(async move {
            let error = image.run_fetch(&fetch, class).await.err();
            image.table().fetch_ended(&fetch, error);
        }));
    }

    async fn run_fetch(&self, fetch: &Fetch, class: Class) -> Result<(), LayerError> {
        let backing_end = self.backing_end().await?;
        let mut place = |offset: u64, bytes: Bytes| {
            let stores = self.table().fetched(fetch.id, offset, &bytes);
            self.start_stores(stores);
        };
        for wanted in fetch.wanted.clone() {
            // The end may not have been known when the fetch was planned.
            let end = backing_end.clamp(wanted.start, wanted.end);
            sink_zeros(end..wanted.end, &mut place);
            if wanted.start < end {
                let backing = self.backing.as_ref().expect("a fetch has a backing to ask");
                backing.fetch(wanted.start..end, class, &mut place).await?;
            }
        }
        Ok(())
    }

    /// Stores complete units, which are in order: fills that lie next to each other by one task.
    pub(crate) fn start_stores(&self, stores: Vec<Store<Reservation>>) {
        let mut fills: Vec<Store<Reservation>> = Vec::new();
        for store in stores {
            let joins = store.room.is_none()
                && fills.last().is_some_and(|last| last.unit + 1 == store.unit && last.room.is_none());
            if !joins && !fills.is_empty() {
                self.start_run(std::mem::take(&mut fills));
            }
            fills.push(store);
        }
        if !fills.is_empty() {
            self.start_run(fills);
        }
    }

    /// One unit with guest bytes, or fills that lie next to each other.
    fn start_run(&self, run: Vec<Store<Reservation>>) {
        let image = self.shared();
        self.rt.spawn(Box::pin(async move {
            let mut fills = Vec::with_capacity(run.len());
            for store in run {
                match store.room {
                    Some(room) => {
                        let outcome = image.store_guest(room, store.bytes).await;
                        image.table().stored(store.unit, outcome);
                    }
                    None => fills.push((store.unit, store.bytes)),
                }
            }
            image.store_fills(&fills).await;
        }));
    }

    /// Stores a unit with guest bytes, in the room that was taken before the guest's write completed.
    async fn store_guest(self: &Arc<Self>, room: Reservation, bytes: Bytes) -> Stored<Reservation> {
        let at = room.at.expect("guest bytes have room for data");
        let written = match self.check_open() {
            Ok(()) => self.write_file(at, bytes).await,
            Err(error) => Err(error),
        };
        match written {
            Ok(()) => {
                room.commit(CommitMode::Overwrite);
                self.note_commit(0);
                Stored::Linked
            }
            Err(error) => Stored::Kept(error, Some(room)),
        }
    }

    async fn store_fills(self: &Arc<Self>, mut fills: &[(u64, Bytes)]) {
        while let Some((_, first)) = fills.first() {
            let zero = is_zero(first);
            let alike = fills.iter().take_while(|(_, bytes)| is_zero(bytes) == zero).count();
            let stored = match self.try_fill(&fills[..alike], zero).await {
                Ok(count) => (count, true),
                Err(error) => {
                    tracing::warn!("what was read is not kept: {error}");
                    (alike, false)
                }
            };
            let (done, rest) = fills.split_at(stored.0);
            let mut table = self.table();
            for &(unit, _) in done {
                table.stored(unit, if stored.1 { Stored::Linked } else { Stored::Dropped });
            }
            fills = rest;
        }
    }

    /// Puts the first of some units that lie next to each other, all zeros or none, into the image; returns how many.
    async fn try_fill(self: &Arc<Self>, fills: &[(u64, Bytes)], zero: bool) -> Result<usize, LayerError> {
        self.check_open()?;
        let start = fills[0].0 * self.unit;
        let end = start + fills.len() as u64 * self.unit;
        let room = if zero && self.abilities.zero { Room::Zero } else { Room::Data };
        let reservation = self.prepare(start, end - start, room).await?;
        let len = reservation.len;
        let count = usize::try_from(len / self.unit).expect("as many as are in memory");
        match (reservation.at, &fills[..count]) {
            (None, _) => {}
            (Some(at), [(_, bytes)]) => self.write_file(at, bytes.clone()).await?,
            (Some(at), fills) => {
                let mut joined = BytesMut::with_capacity(fills.len() * fills[0].1.len());
                fills.iter().for_each(|(_, bytes)| joined.extend_from_slice(bytes));
                self.write_file(at, joined.freeze()).await?;
            }
        }
        let linked = reservation.commit(CommitMode::IfAbsent);
        debug_assert_eq!(linked, len, "the table lets nobody else link a unit that is being filled");
        self.note_commit(len);
        Ok(count)
    }

    /// Writes to the image's file; latches when that fails.
    pub(crate) async fn write_file(&self, at: u64, bytes: Bytes) -> Result<(), LayerError> {
        let written = match self.file.write_now(at, &bytes) {
            Some(written) => written,
            None => self.file.write(at, bytes).await,
        };
        written.map_err(|error| self.failed(error))
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk == &[0; 64]) && rest.iter().all(|&byte| byte == 0)
}
