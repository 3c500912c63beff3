//! The trait of an origin: a [`ReadAt`] that also fetches ranges piece by piece, in one of four classes.
//!
//! - Every byte handed out belongs to the validator that the origin was opened with (I6).
//! - A fetch hands out each byte of its range exactly once; a cut-off response is resumed where it broke (I4).
//! - Passing failures are retried inside, up to the limit that the origin was opened with.

use std::{ops::Range, time::Duration};

use bytes::Bytes;
use readonce_storage::{BoxFuture, ReadAt};

use crate::StatsSnapshot;

/// How urgent a fetch is. Demand never queues behind the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A guest waits for it.
    Demand,
    /// The guest will probably want it next.
    ReadAhead,
    /// A recorded profile says that the guest will want it.
    Profile,
    /// Everything else, in the background.
    Stream,
}

/// Takes the pieces of a fetch as they arrive: byte offset in the origin, and the bytes. Must not block.
pub type Sink<'a> = &'a mut (dyn FnMut(u64, Bytes) + Send);

/// Why a fetch failed. A variant is what the caller can do next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// Retries are spent; the next request tries again.
    #[error("{origin}: given up after {} s, {}; last: {cause}", waited.as_secs(), counted(u64::from(*attempts), "attempt"))]
    Away {
        /// The origin's printable name.
        origin: String,
        /// How long it was tried.
        waited: Duration,
        /// How often.
        attempts: u32,
        /// The last failure in words.
        cause: String,
    },
    /// The origin holds another version now. Never tried again.
    #[error("{origin}: the file changed since this image was made: {cause}")]
    Changed {
        /// The origin's printable name.
        origin: String,
        /// What was expected and what was found.
        cause: String,
    },
    /// Will not pass by itself (404, 403, ranges not supported).
    #[error("{origin}: {cause}")]
    Permanent {
        /// The origin's printable name.
        origin: String,
        /// The cause in words.
        cause: String,
    },
}

/// `1 attempt`, `2 attempts`.
pub(crate) fn counted(count: u64, of: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {of}{plural}")
}

/// A read-only source of bytes at one version.
///
/// [`ReadAt::read`] is a fetch at [`Class::Demand`]; its [`std::io::Error`] carries a [`FetchError`].
pub trait Origin: ReadAt {
    /// Fetches `range` (inside `0..len`), handing pieces to `sink` as they arrive.
    ///
    /// # Errors
    /// The pieces handed out before the error are good.
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>>;

    /// The same, where what lies around the range will be wanted as well: an origin that keeps what it read may ask for more.
    ///
    /// # Errors
    /// As [`Origin::fetch`].
    fn fetch_around<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        self.fetch(range, class, sink)
    }

    /// Whether [`ReadAt::read_now`] from `offset` on may give bytes: asked, without I/O, before a large buffer is made for it.
    fn may_read_now(&self, _offset: u64) -> bool {
        true
    }

    /// Name to print: no user, password or signature in it.
    fn name(&self) -> String;

    /// Validator to pin, as `validator` encodes it.
    fn validator(&self) -> Vec<u8>;

    /// What a person should be told about it, in the order found.
    fn notes(&self) -> Vec<OriginNote> {
        Vec::new()
    }

    /// The counters now.
    fn stats(&self) -> StatsSnapshot {
        StatsSnapshot::default()
    }
}

/// Something about an origin that works, but that a person should know. `Display` is a warning's sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OriginNote {
    /// A file is not the same inode, or has another mtime, than when it was pinned.
    #[error("the backing file may have changed since it was pinned: was {expected}, is {found}")]
    MayHaveChanged {
        /// The pinned validator.
        expected: String,
        /// The one found.
        found: String,
    },
    /// Nothing but the length tells versions apart.
    #[error(
        "the server sends neither ETag nor Last-Modified: a changed file of the same length would go unseen"
    )]
    LengthOnly,
    /// It could not be reached at open; every fetch tries again.
    #[error("the backing cannot be reached now ({cause}): what is local can be read, the rest waits")]
    NotReached {
        /// The last failure in words.
        cause: String,
    },
}
