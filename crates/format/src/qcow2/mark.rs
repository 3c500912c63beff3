//! The header while an image is open for writing: its marks, and who may allocate.
//!
//! - The in-use mark, and with lazy refcounts the dirty bit, are written before the first cluster is handed out. The sync that
//!   precedes every link covers them, so no link can be on disk without them.
//! - A refcount that is raised on disk without the mark would be a leak that nobody looks for: so the mark is synced by itself before the
//!   first refcounts are written ([`Mark::make_durable`]). Taking it off is not: found without need, it costs the next open a
//!   comparison in the background.
//! - They go only while nothing holds a [`Ticket`]. Whoever wants one meanwhile waits.
//! - Autoclear bits that are not kept true are cleared with them, or at the first flush.
//! - Once corruption was met, nobody gets a ticket.
//!
//! Not here: whether the image deserves to lose the mark (`writer`).

use std::sync::Arc;

use readonce_storage::{Storage, sync::Mutex};

use super::{
    change,
    header::{Header, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, SectorWrite},
};
use crate::FormatError;

pub(super) struct Mark {
    file: Arc<dyn Storage>,
    /// Whether refcounts are written late.
    lazy: bool,
    state: Mutex<State>,
    /// What the file holds.
    header: tokio::sync::Mutex<Header>,
    /// Held while the mark is being taken off.
    closing: tokio::sync::Mutex<()>,
}

struct State {
    /// Whether the file has all marks that allocating needs.
    ready: bool,
    /// Whether the file has a mark, of ours or of whoever had it before.
    marked: bool,
    /// Whether autoclear bits that are to be cleared are in the file.
    autoclear: bool,
    /// Whether the mark is being taken off.
    closing: bool,
    /// Whether corruption was met.
    corrupt: bool,
    /// Whether an image without a place for the mark was to get one.
    adopted: bool,
    /// How often marks were written, and which of these a sync has covered.
    writes: u64,
    synced: u64,
    tickets: u64,
}

/// What a crash left counted and without a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaks {
    /// It is free again.
    None,
    /// Nobody looked to the end: the mark has the next open do it.
    Perhaps,
}

/// Leave to allocate; while it lives the mark stays.
pub(super) struct Ticket(Arc<Mark>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.state.lock().tickets -= 1;
    }
}

impl Mark {
    pub(super) fn new(file: Arc<dyn Storage>, header: Header) -> Self {
        let lazy = header.lazy_refcounts();
        let autoclear = header.clone().clear_autoclear().is_some();
        let ready = header.record.in_use && !autoclear && lazy == header.dirty();
        let state = State {
            ready,
            marked: header.record.in_use || header.dirty(),
            autoclear,
            closing: false,
            corrupt: header.corrupt(),
            adopted: false,
            // A mark that was found may be in memory only, if a process was killed.
            writes: u64::from(ready),
            synced: 0,
            tickets: 0,
        };
        Self {
            file,
            lazy,
            state: Mutex::new(state),
            header: tokio::sync::Mutex::new(header),
            closing: tokio::sync::Mutex::new(()),
        }
    }

    /// Whether refcounts are written late.
    pub(super) fn is_lazy(&self) -> bool {
        self.lazy
    }

    /// Leave to allocate; writes the marks if they are not there.
    pub(super) async fn begin(self: &Arc<Self>) -> Result<Ticket, FormatError> {
        loop {
            if let Some(ticket) = self.begin_now()? {
                return Ok(ticket);
            }
            // Whoever takes the mark off holds this.
            let _not_closing = self.closing.lock().await;
            let mut header = self.header.lock().await;
            if self.state.lock().ready {
                continue;
            }
            if !header.has_mark() && !std::mem::replace(&mut self.state.lock().adopted, true) {
                // Made by another program: it gets a place for the mark, where there is room for one.
                *header = change::adopt(&self.file, header.clone()).await?;
            }
            let before = header.clone();
            // From the first byte of the writes below on the file may have one.
            self.state.lock().marked = true;
            let mut writes: Vec<SectorWrite> = header.clear_autoclear().into_iter().collect();
            if self.lazy {
                writes
                    .push(header.change_fields(|fields| fields.incompatible_features |= INCOMPATIBLE_DIRTY));
            }
            writes.extend(header.set_in_use(true));
            let marked = !writes.is_empty();
            if let Err(error) = self.write(writes).await {
                *header = before;
                return Err(error);
            }
            let mut state = self.state.lock();
            state.writes += u64::from(marked);
            state.ready = true;
            state.autoclear = false;
        }
    }

    fn begin_now(self: &Arc<Self>) -> Result<Option<Ticket>, FormatError> {
        let mut state = self.state.lock();
        if state.corrupt {
            return Err(FormatError::corrupt(
                "incompatible_features",
                "with the corrupt bit",
                "must not have it where the image is written: check and repair it",
            ));
        }
        Ok((state.ready && !state.closing).then(|| {
            state.tickets += 1;
            Ticket(self.clone())
        }))
    }

    /// Syncs the file, unless a sync has covered the marks.
    pub(super) async fn make_durable(&self) -> Result<(), FormatError> {
        let covered = {
            let state = self.state.lock();
            state.synced == state.writes
        };
        if covered { Ok(()) } else { self.sync().await }
    }

    /// Syncs the file.
    pub(super) async fn sync(&self) -> Result<(), FormatError> {
        let writes = self.state.lock().writes;
        self.file.sync().await?;
        let mut state = self.state.lock();
        state.synced = state.synced.max(writes);
        Ok(())
    }

    /// Writes sectors, each once: the last of those for one place.
    async fn write(&self, mut writes: Vec<SectorWrite>) -> Result<(), FormatError> {
        while let Some(write) = writes.pop() {
            writes.retain(|other| other.at != write.at);
            self.file.write(write.at, write.data).await?;
        }
        Ok(())
    }

    /// Clears autoclear bits that are not kept true.
    /// Says whether there was something to clear.
    pub(super) async fn clear_autoclear(&self) -> Result<bool, FormatError> {
        if !self.state.lock().autoclear {
            return Ok(false);
        }
        let mut header = self.header.lock().await;
        let before = header.clone();
        if let Some(write) = header.clear_autoclear()
            && let Err(error) = self.write(vec![write]).await
        {
            *header = before;
            return Err(error);
        }
        self.state.lock().autoclear = false;
        Ok(true)
    }

    /// Makes the header name another refcount table.
    pub(super) async fn move_refcount_table(&self, at: u64, clusters: u64) -> Result<(), FormatError> {
        let clusters = u32::try_from(clusters).expect("a refcount table has at most 8 MiB");
        let mut header = self.header.lock().await;
        let before = header.clone();
        let write = header.change_fields(|fields| {
            fields.refcount_table_offset = at;
            fields.refcount_table_clusters = clusters;
        });
        if let Err(error) = self.write(vec![write]).await {
            *header = before;
            return Err(error);
        }
        Ok(())
    }

    /// Corruption was met: nobody allocates any more, and the file says so (version 3). Best effort: the
    /// caller has an error to tell already.
    pub(super) async fn set_corrupt(&self) {
        self.state.lock().corrupt = true;
        let mut header = self.header.lock().await;
        if header.fields.version < 3 || header.corrupt() {
            return;
        }
        let write = header.change_fields(|fields| fields.incompatible_features |= INCOMPATIBLE_CORRUPT);
        if let Err(error) = self.write(vec![write]).await {
            tracing::warn!(%error, "the image could not be marked corrupt");
        }
    }

    /// Holds up everyone who wants to allocate; `None` where somebody has a ticket.
    pub(super) async fn close_begin(&self) -> Option<Closing<'_>> {
        let closing = self.closing.lock().await;
        let mut state = self.state.lock();
        if state.tickets > 0 {
            return None;
        }
        state.closing = true;
        Some(Closing { mark: self, _closing: closing })
    }
}

/// Nobody allocates while this lives.
pub(super) struct Closing<'a> {
    mark: &'a Mark,
    _closing: tokio::sync::MutexGuard<'a, ()>,
}

impl Closing<'_> {
    /// Whether the file has a mark.
    pub(super) fn marked(&self) -> bool {
        self.mark.state.lock().marked
    }

    /// Takes off the dirty bit, and the in-use mark unless leaks are left; the dirty bit is off durably when this returns.
    /// Everything else must be durable already.
    pub(super) async fn clear(self, leaks: Leaks) -> Result<(), FormatError> {
        let mut header = self.mark.header.lock().await;
        let dirty = header.dirty();
        if leaks == Leaks::Perhaps && !dirty {
            return Ok(());
        }
        let mut writes = Vec::new();
        if dirty {
            writes.push(header.change_fields(|fields| fields.incompatible_features &= !INCOMPATIBLE_DIRTY));
        }
        if leaks == Leaks::None {
            writes.extend(header.set_in_use(false));
        }
        // From the first byte of this write on the file may be without the mark.
        self.mark.state.lock().ready = false;
        self.mark.write(writes).await?;
        if dirty {
            self.mark.sync().await?;
        }
        self.mark.state.lock().marked = leaks == Leaks::Perhaps;
        Ok(())
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.mark.state.lock().closing = false;
    }
}
