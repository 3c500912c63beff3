//! Fill: the tasks that fetch units, and that put complete units into the image.
//!
//! - A fetch and a store belong to the layer, not to who asked: they go on when a client vanishes.
//! - A fill that cannot be stored hurts no read: its readers had their bytes before it was tried.
//! - A unit of zeros becomes a zero cluster, each by itself.

use std::sync::Arc;

use bytes::Bytes;
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
            if let Some(error) = &error {
                // Whoever waited for it gets EIO, which tells nothing.
                tracing::error!("{error}");
            }
            image.table().fetch_ended(&fetch, error);
        }));
    }

    async fn run_fetch(&self, fetch: &Fetch, class: Class) -> Result<(), LayerError> {
        let backing_end = self.backing_end().await?;
        let mut place = |offset: u64, bytes: Bytes| {
            let stores = self.table().fetched(fetch.id, offset, &bytes);
            for store in stores {
                self.start_store(store);
            }
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

    pub(crate) fn start_store(&self, store: Store<Reservation>) {
        let image = self.shared();
        self.rt.spawn(Box::pin(async move {
            let unit = store.unit;
            let outcome = match store.room {
                Some(room) => image.store_guest(room, store.bytes).await,
                None => image.store_fill(unit, store.bytes).await,
            };
            image.table().stored(unit, outcome);
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
                self.note_commit();
                Stored::Linked
            }
            Err(error) => Stored::Kept(error, Some(room)),
        }
    }

    async fn store_fill(self: &Arc<Self>, unit: u64, bytes: Bytes) -> Stored<Reservation> {
        match self.try_fill(unit, bytes).await {
            Ok(()) => Stored::Linked,
            Err(error) => {
                tracing::warn!("what was read is not kept: {error}");
                Stored::Dropped
            }
        }
    }

    async fn try_fill(self: &Arc<Self>, unit: u64, bytes: Bytes) -> Result<(), LayerError> {
        self.check_open()?;
        let room = if is_zero(&bytes) { Room::Zero } else { Room::Data };
        let reservation =
            self.mapper.prepare(unit * self.unit, self.unit, room).await.map_err(|e| self.failed(e))?;
        if let Some(at) = reservation.at {
            self.write_file(at, bytes).await?;
        }
        let linked = reservation.commit(CommitMode::IfAbsent);
        debug_assert_eq!(linked, self.unit, "the table lets nobody else link a unit that is being filled");
        self.note_commit();
        Ok(())
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
