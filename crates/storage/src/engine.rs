//! Engine: how an operation on a file that may wait is done, on the ring or in a pool of threads.
//!
//! - Reads and writes are whole: short ones are gone on with.
//! - An operation owns its buffer and descriptor. A dropped future frees nothing that the kernel uses; the piece of a
//!   write that was under way still happens, and nothing after it is begun.
//!
//! Not here: what to do without waiting, and fallbacks between kinds of operation (`local`).

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::Arc,
};

use bytes::{Buf, Bytes};
use rustix::fs::FallocateFlags;

use crate::ring::Ring;

/// How often an operation may come back undone before a thread does it.
const UNDONE_MAX: u32 = 8;

/// The ring, or the pool.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Engine {
    Ring(&'static Ring),
    Pool,
}

impl Engine {
    /// The ring where there is one.
    pub(crate) fn best() -> Self {
        Ring::shared().map_or(Self::Pool, Self::Ring)
    }

    /// Reads exactly `len` bytes.
    pub(crate) async fn read(self, file: &Arc<OwnedFd>, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut buf = Vec::new();
        buf.try_reserve_exact(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut undone = 0;
        while buf.len() < len {
            let at = offset + buf.len() as u64;
            let result = match self {
                Self::Ring(ring) if undone < UNDONE_MAX => {
                    let (result, back) = ring.read(file, at, buf, len).await;
                    buf = back;
                    result
                }
                _ => {
                    let file = Arc::clone(file);
                    let (result, back) = in_pool(move || {
                        let start = buf.len();
                        buf.resize(len, 0);
                        let result = borrow_file(&file, |file| file.read_at(&mut buf[start..], at));
                        buf.truncate(start + result.as_ref().copied().unwrap_or(0));
                        (result, buf)
                    })
                    .await;
                    buf = back;
                    result
                }
            };
            match result {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("the file ends at {at}, inside {len} bytes at {offset}"),
                    ));
                }
                Ok(_) => {}
                Err(error) if is_undone(&error) => undone += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(buf.into())
    }

    /// Writes all of `data`.
    pub(crate) async fn write(self, file: &Arc<OwnedFd>, mut offset: u64, mut data: Bytes) -> io::Result<()> {
        let mut undone = 0;
        while !data.is_empty() {
            let result = match self {
                Self::Ring(ring) if undone < UNDONE_MAX => ring.write(file, offset, data.clone()).await,
                _ => {
                    let (file, data) = (Arc::clone(file), data.clone());
                    in_pool(move || borrow_file(&file, |file| file.write_at(&data, offset))).await
                }
            };
            match result {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(written) => {
                    data.advance(written);
                    offset += written as u64;
                }
                Err(error) if is_undone(&error) => undone += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// fdatasync. One that failed is never done again: the kernel has forgotten the pages that it could not write.
    pub(crate) async fn fdatasync(self, file: &Arc<OwnedFd>) -> io::Result<()> {
        if let Self::Ring(ring) = self {
            match ring.fdatasync(file).await {
                // Canceled before it began, because the thread that submitted it ended.
                Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
                result => return result,
            }
        }
        let file = Arc::clone(file);
        in_pool(move || rustix::fs::fdatasync(&*file).map_err(Into::into)).await
    }

    /// fallocate; `EOPNOTSUPP` comes back as it is.
    pub(crate) async fn fallocate(
        self,
        file: &Arc<OwnedFd>,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let mut undone = 0;
        loop {
            let result = match self {
                Self::Ring(ring) if undone < UNDONE_MAX => {
                    ring.fallocate(file, mode.bits() as i32, offset, len).await
                }
                _ => {
                    let file = Arc::clone(file);
                    in_pool(move || rustix::fs::fallocate(&*file, mode, offset, len).map_err(Into::into))
                        .await
                }
            };
            match result {
                Err(error) if is_undone(&error) => undone += 1,
                result => return result,
            }
        }
    }
}

/// Runs `work` on tokio's pool of blocking threads; in place outside a tokio runtime.
#[allow(clippy::disallowed_methods, reason = "this is where real files are waited for")]
pub(crate) async fn in_pool<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::runtime::Handle::try_current() {
        Err(_) => work(),
        Ok(handle) => match handle.spawn_blocking(work).await {
            Ok(value) => value,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime shuts down: whoever polls this is about to be dropped with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Uses a shared descriptor as a `File`, which has the positioned calls.
pub(crate) fn borrow_file<T>(file: &OwnedFd, work: impl FnOnce(&std::fs::File) -> T) -> T {
    use std::os::fd::{AsRawFd, FromRawFd};
    // SAFETY: `file` is open for as long as this runs, and `ManuallyDrop` keeps it open.
    let borrowed = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(file.as_raw_fd()) });
    work(&borrowed)
}

/// Whether nothing was done, and the same may be asked again: interrupted, or canceled because the thread that submitted
/// the operation ended (io_uring's workers belong to the submitting thread).
fn is_undone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED))
}
