//! Places: where a chain gets its files and origins from.
//!
//! - What a chain opens, it opens here alone: with another [`Opener`] it runs without files and sockets, and unchanged.
//! - A file that is opened twice is two files for locks, as with the system's.
//!
//! Not here: what may be opened, and in which order (`top`, `backing`, `files`).

use std::{any::Any, fmt, io, ops::Deref, path::Path, sync::Arc};

use readonce_origin::{FetchError, Locator, Origin, OriginOptions};
use readonce_storage::{BoxFuture, ImageLock, LocalFile, LockError, OpenMode, Rt, Storage, lock::Access};

/// Opens what a chain is made of.
pub trait Opener: Send + Sync {
    /// A file of this machine, or what stands for one.
    ///
    /// # Errors
    /// The system's.
    fn file(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn Lockable>>;

    /// Anything that is read alone.
    ///
    /// # Errors
    /// As [`readonce_origin::open()`].
    fn origin<'a>(
        &'a self,
        locator: &'a Locator,
        options: &'a OriginOptions,
        rt: &'a Rt,
    ) -> BoxFuture<'a, Result<Arc<dyn Origin>, FetchError>>;
}

/// A file with image locks.
pub trait Lockable: Storage {
    /// Locks it; a lock that another holds is given a moment to go.
    ///
    /// # Errors
    /// As [`ImageLock::take`].
    fn lock<'a>(&'a self, access: Access, rt: &'a Rt) -> BoxFuture<'a, Result<Held, LockError>>;
}

/// A lock; dropped, it is given back.
pub type Held = Box<dyn Any + Send + Sync>;

/// Where a chain opens things: this machine, if nothing else is said.
#[derive(Clone)]
pub struct Places(Arc<dyn Opener>);

impl Places {
    /// Other places.
    pub fn new(opener: Arc<dyn Opener>) -> Self {
        Self(opener)
    }
}

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Machine))
    }
}

impl Deref for Places {
    type Target = dyn Opener;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Places")
    }
}

/// Files and HTTP.
struct Machine;

impl Opener for Machine {
    fn file(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn Lockable>> {
        Ok(Arc::new(LocalFile::open(path, mode)?))
    }

    fn origin<'a>(
        &'a self,
        locator: &'a Locator,
        options: &'a OriginOptions,
        rt: &'a Rt,
    ) -> BoxFuture<'a, Result<Arc<dyn Origin>, FetchError>> {
        Box::pin(readonce_origin::open(locator, options, rt))
    }
}

impl Lockable for LocalFile {
    fn lock<'a>(&'a self, access: Access, rt: &'a Rt) -> BoxFuture<'a, Result<Held, LockError>> {
        Box::pin(async move { Ok(Box::new(ImageLock::wait(self, access, rt).await?) as Held) })
    }
}
