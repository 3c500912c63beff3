//! The dirty mark (NEED_CHECK), and who may allocate.
//!
//! - The mark is written before the first cluster is handed out, with a backing file too. The sync that precedes every link covers
//!   it, so no link can be on disk without it.
//! - A power loss before that sync may keep the file's growth and not the mark. So the sector that has no mark says where the file
//!   ended (`set_clean_end`), and the next open sees that it grew. Where that is not known, since another program wrote, the
//!   mark is synced by itself.
//! - It goes only while nothing holds a [`Ticket`]. Whoever wants one meanwhile waits.
//! - Autoclear bits that are not ours are cleared in the same write, or at the first flush.
//!
//! Not here: whether the image deserves to lose the mark (`writer`).

use std::sync::Arc;

use bytes::Bytes;
use readonce_storage::{Storage, sync::Mutex};
use zerocopy::IntoBytes;

use super::header::{FEATURE_NEED_CHECK, HeaderSector};
use crate::FormatError;

pub(super) struct Mark {
    file: Arc<dyn Storage>,
    state: Mutex<State>,
    /// What the file holds. Locked while it is written, and while the mark is being taken off.
    sector: tokio::sync::Mutex<HeaderSector>,
}

struct State {
    /// Whether the file has the mark and no foreign autoclear bit.
    ready: bool,
    /// Whether foreign autoclear bits are in the file.
    foreign: bool,
    /// Whether the mark is being taken off.
    closing: bool,
    tickets: u64,
}

/// Leave to allocate; while it lives the mark stays.
pub(super) struct Ticket(Arc<Mark>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.state.lock().tickets -= 1;
    }
}

impl Mark {
    pub(super) fn new(file: Arc<dyn Storage>, sector: HeaderSector) -> Self {
        let foreign = sector.fields.foreign_autoclear() != 0;
        let marked = sector.fields.need_check();
        let state = State { ready: marked && !foreign, foreign, closing: false, tickets: 0 };
        Self { file, state: Mutex::new(state), sector: tokio::sync::Mutex::new(sector) }
    }

    /// Leave to allocate; writes the mark if it is not there.
    pub(super) async fn begin(self: &Arc<Self>) -> Result<Ticket, FormatError> {
        if let Some(ticket) = self.begin_now() {
            return Ok(ticket);
        }
        let mut sector = self.sector.lock().await;
        if let Some(ticket) = self.begin_now() {
            return Ok(ticket);
        }
        // A file that is shorter was cut by another program.
        let end_known = sector.fields.clean_end().is_some_and(|end| end <= self.file.len());
        let marks_durably = !sector.fields.need_check() && !end_known;
        let mut marked = *sector;
        marked.fields.features = (marked.fields.features.get() | FEATURE_NEED_CHECK).into();
        marked.fields.set_clean_end(None);
        let marked = self.write(marked).await?;
        if marks_durably {
            self.file.sync().await?;
        }
        *sector = marked;
        let mut state = self.state.lock();
        state.ready = true;
        state.tickets += 1;
        Ok(Ticket(self.clone()))
    }

    fn begin_now(self: &Arc<Self>) -> Option<Ticket> {
        let mut state = self.state.lock();
        (state.ready && !state.closing).then(|| {
            state.tickets += 1;
            Ticket(self.clone())
        })
    }

    /// Writes it without foreign autoclear bits; answers what the file holds then.
    async fn write(&self, mut new: HeaderSector) -> Result<HeaderSector, FormatError> {
        new.fields.clear_foreign();
        self.file.write(0, Bytes::copy_from_slice(new.as_bytes())).await?;
        self.state.lock().foreign = false;
        Ok(new)
    }

    /// Clears foreign autoclear bits. Data that the guest wrote in place is not known here, but it is flushed.
    pub(super) async fn clear_foreign(&self) -> Result<(), FormatError> {
        if !self.state.lock().foreign {
            return Ok(());
        }
        let mut sector = self.sector.lock().await;
        *sector = self.write(*sector).await?;
        Ok(())
    }

    /// Holds up everyone who wants to allocate; `None` where somebody has a ticket.
    pub(super) async fn close_begin(&self) -> Option<Closing<'_>> {
        let sector = self.sector.lock().await;
        let mut state = self.state.lock();
        if state.tickets > 0 {
            return None;
        }
        state.closing = true;
        Some(Closing { mark: self, sector })
    }
}

/// Nobody allocates while this lives.
pub(super) struct Closing<'a> {
    mark: &'a Mark,
    sector: tokio::sync::MutexGuard<'a, HeaderSector>,
}

impl Closing<'_> {
    /// Whether the file carries the mark.
    pub(super) fn marked(&self) -> bool {
        self.sector.fields.need_check()
    }

    /// Takes the mark off, durable when this returns. Everything else must be durable already, and the file cut.
    pub(super) async fn clear(mut self) -> Result<(), FormatError> {
        let mut clean = *self.sector;
        clean.fields.features = (clean.fields.features.get() & !FEATURE_NEED_CHECK).into();
        // From the first byte of this write on the file may be without the mark.
        self.mark.state.lock().ready = false;
        clean.fields.set_clean_end(Some(self.mark.file.len()));
        *self.sector = self.mark.write(clean).await?;
        Ok(self.mark.file.sync().await?)
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.mark.state.lock().closing = false;
    }
}
