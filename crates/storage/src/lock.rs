//! QEMU's image locks: read locks on single bytes of the image file, which QEMU and readonce both take and probe.
//!
//! - A byte at `HELD_BASE + permission` says "I use this permission", one at `DENIED_BASE + permission` "I suffer no
//!   other who uses it". Read locks never refuse each other: after taking its own, each side looks whether another's
//!   contradict them, and gives up if so. Two that start at once may both give up; never do both go on.
//! - The locks are of the open file description (OFD): two files of one process exclude each other as well, and all is
//!   given back when the lock is dropped or the process ends.
//! - Locked bytes need not exist, and locking changes no byte.
//! - A process that was killed keeps its locks until the kernel has ended its io_uring: until then, what it had submitted
//!   may still be written. [`ImageLock::wait`] outlasts that.
//!
//! Not here: who may read without a lock (`-U`).

use std::{
    fmt, io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use crate::{LocalFile, Rt};

/// Where QEMU puts the bytes of permissions in use (`RAW_LOCK_PERM_BASE`).
const HELD_BASE: i64 = 100;
/// Where QEMU puts the bytes of permissions that are not shared (`RAW_LOCK_SHARED_BASE`).
const DENIED_BASE: i64 = 200;

/// How long a lock may be held by a process that is gone; up to 0.2 s was seen (2026-11), on a busy disk.
pub const GOING_MAX: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// QEMU's permissions that matter on a file; the number is the byte's place after the base.
#[derive(Clone, Copy)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    Resize = 3,
}

impl Permission {
    fn held_byte(self) -> i64 {
        HELD_BASE + self as i64
    }

    fn denied_byte(self) -> i64 {
        DENIED_BASE + self as i64
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::Resize => "resize",
        })
    }
}

/// What the holder of a lock does with the image. No two writers, and no reader beside a writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads it and relies on what it read.
    Read,
    /// Reads, writes and resizes it.
    Write,
}

impl Access {
    fn held(self) -> &'static [Permission] {
        match self {
            Self::Read => &[Permission::ConsistentRead],
            Self::Write => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
        }
    }

    fn denied(self) -> &'static [Permission] {
        &[Permission::Write, Permission::Resize]
    }
}

/// Why an image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process uses the image, or another part of this one. The text is QEMU's.
    #[error("{0}")]
    InUse(String),
    /// The file system has no such locks. Nobody else can have locked it; the caller may warn and go on.
    #[error("{path}: the file system has no locks: {source}")]
    Unsupported {
        /// The image.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else.
    #[error("{path}: cannot lock: {source}")]
    Io {
        /// The image.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A lock on an image's file; dropped, it is given back. Keeps the file open.
#[derive(Debug)]
pub struct ImageLock {
    file: Arc<OwnedFd>,
    /// Says to the [`LocalFile`] that the description has no lock any more.
    flag: Arc<std::sync::atomic::AtomicBool>,
}

impl ImageLock {
    /// As [`ImageLock::take`], but a lock that another holds is given a moment to go.
    ///
    /// # Errors
    /// As [`ImageLock::take`].
    pub async fn wait(file: &LocalFile, access: Access, rt: &Rt) -> Result<Self, LockError> {
        let until = rt.now() + GOING_MAX;
        loop {
            match Self::take(file, access) {
                Err(LockError::InUse(_)) if rt.now() < until => rt.sleep(LOOK_EVERY).await,
                taken => return taken,
            }
        }
    }

    /// Locks `file` as QEMU does.
    ///
    /// # Errors
    /// `InUse` in QEMU's words, without its `Could not open 'PATH': ` before them.
    ///
    /// # Panics
    /// If the same [`LocalFile`] is locked already: both would be one lock, and the first drop would end it.
    pub fn take(file: &LocalFile, access: Access) -> Result<Self, LockError> {
        let flag = Arc::clone(file.locked_flag());
        let was_locked = flag.swap(true, std::sync::atomic::Ordering::AcqRel);
        assert!(!was_locked, "a file is locked once");
        // From here on a return gives back what was taken.
        let lock = Self { file: Arc::clone(file.descriptor()), flag };
        let path = file.path().display();
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL) => {
                LockError::Unsupported { path: path.to_string(), source }
            }
            _ => LockError::Io { path: path.to_string(), source },
        };
        let in_use = |what: String| {
            LockError::InUse(format!(
                "Failed to get {what} lock\nIs another process using the image [{path}]?"
            ))
        };

        let held = access.held().iter().map(|permission| permission.held_byte());
        let denied = access.denied().iter().map(|permission| permission.denied_byte());
        for byte in held.chain(denied) {
            match lock.set(byte, libc::F_RDLCK) {
                Ok(()) => {}
                // Only a write lock can refuse ours. QEMU takes none, but another program may lock the whole file.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    return Err(LockError::InUse(format!(
                        "Failed to lock byte {byte}\nIs another process using the image [{path}]?"
                    )));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        for permission in access.held() {
            if lock.is_locked_by_other(permission.denied_byte()).map_err(failed)? {
                return Err(in_use(format!("\"{permission}\"")));
            }
        }
        for permission in access.denied() {
            if lock.is_locked_by_other(permission.held_byte()).map_err(failed)? {
                return Err(in_use(format!("shared \"{permission}\"")));
            }
        }
        Ok(lock)
    }

    fn set(&self, byte: i64, kind: libc::c_int) -> io::Result<()> {
        let mut range = one_byte(byte, kind);
        loop {
            // SAFETY: the descriptor is open and `range` is a valid `flock` for the call.
            if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &mut range) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn is_locked_by_other(&self, byte: i64) -> io::Result<bool> {
        // Asked as for a write lock, so that the others' read locks count.
        let mut range = one_byte(byte, libc::F_WRLCK);
        // SAFETY: as in `set`.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_GETLK, &mut range) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(libc::c_int::from(range.l_type) != libc::F_UNLCK)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // The description may live on in the `LocalFile`, so closing is not enough.
        for permission in [Permission::ConsistentRead, Permission::Write, Permission::Resize] {
            for byte in [permission.held_byte(), permission.denied_byte()] {
                if let Err(error) = self.set(byte, libc::F_UNLCK) {
                    tracing::warn!(byte, %error, "cannot unlock; the lock ends when the file is closed");
                }
            }
        }
        self.flag.store(false, std::sync::atomic::Ordering::Release);
    }
}

fn one_byte(byte: i64, kind: libc::c_int) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}
