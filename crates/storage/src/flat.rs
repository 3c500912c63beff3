//! The byte traits: a run of bytes that can be read, and one that can be written too.
//!
//! - Offsets and lengths are bytes; there is no block size, and any alignment is allowed.
//! - The `_now` calls never wait: they do the work in the caller's poll, or answer `None`.
//! - A completed write is visible to every later read. It is durable only after a later `sync`.
//!
//! Not here: retries, caching, classes of urgency. An origin adds those above [`ReadAt`].

use std::{future::Future, io, pin::Pin};

use bytes::Bytes;

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Bytes that can be read at any offset.
pub trait ReadAt: Send + Sync + 'static {
    /// Length in bytes now. A file may grow; an origin never does.
    fn len(&self) -> u64;

    /// Whether there is no byte at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset` if that needs no waiting. `None`: it would block, or only a part could be
    /// had, and what `buf` holds is undefined. Past the end is [`io::ErrorKind::UnexpectedEof`].
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>>;

    /// Reads exactly `len` bytes from `offset`. Past the end is [`io::ErrorKind::UnexpectedEof`].
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>>;
}

/// Bytes that can be written as well: an image's file, or a simulated disk.
///
/// An operation of no bytes does nothing; it does not grow the file. A future that is dropped before its end leaves its
/// operation done, half done, not done or *still under way*: its range may change until a later `sync` has completed.
///
/// "No space" comes back as [`io::ErrorKind::StorageFull`] (or `QuotaExceeded`, `FileTooLarge`), and only such
/// an error may be tried again; any other failed write or sync latches in the room above.
pub trait Storage: ReadAt {
    /// Writes all of `data` at `offset`, growing the file where needed, if that needs no waiting. `None`: it would
    /// block (the dirty budget is used up, or the file cannot do it); nothing may be assumed written.
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>>;

    /// Writes all of `data` at `offset`, growing the file where needed.
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>>;

    /// Makes sure that later writes to the range meet no "no space". Contents do not change; the file grows to hold
    /// the range. Where the file system cannot promise this, it answers `Ok` and promises nothing.
    fn allocate(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>>;

    /// Makes the range read as zeros and keeps its space where the file system can. Grows the file where needed.
    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>>;

    /// Makes the range read as zeros and gives its space back where the file system can. The length stays.
    fn punch_hole(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>>;

    /// Cuts or grows the file to `len` bytes; new bytes read as zeros.
    fn set_len(&self, len: u64) -> BoxFuture<'_, io::Result<()>>;

    /// Makes every write, cut and hole that completed before this call durable. Its error is never "no space": what it
    /// should have covered may be lost, and another sync does not bring it back. Of two at the same time one alone may fail:
    /// [`Synced`](crate::Synced) is for who has several.
    fn sync(&self) -> BoxFuture<'_, io::Result<()>>;
}

/// Whether an error says that there is no room, which passes and never latches.
pub fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
