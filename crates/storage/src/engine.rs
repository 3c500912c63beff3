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

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        io::Write,
        sync::Weak,
        task::{Context, Poll, Waker},
    };

    use super::*;

    fn pipe() -> (Arc<OwnedFd>, std::fs::File) {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        (Arc::new(read), write.into())
    }

    fn ring() -> Option<Engine> {
        let ring = Ring::shared();
        if ring.is_none() {
            eprintln!("no io_uring here: only the pool is tested");
        }
        ring.map(Engine::Ring)
    }

    fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[tokio::test]
    async fn short_reads_are_gone_on_with() {
        let Some(engine) = ring() else { return };
        // A pipe gives what is in it, and the rest when it comes.
        let (read_end, mut write_end) = pipe();
        write_end.write_all(b"abc").expect("room in the pipe");
        let mut read = Box::pin(engine.read(&read_end, 0, 8));
        assert!(poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await.is_pending());
        write_end.write_all(b"defgh").expect("room in the pipe");
        assert_eq!(read.await.expect("all came"), &b"abcdefgh"[..]);
    }

    #[tokio::test]
    async fn an_end_inside_a_read_is_an_error() {
        let Some(engine) = ring() else { return };
        let (read_end, mut write_end) = pipe();
        write_end.write_all(b"abc").expect("room in the pipe");
        drop(write_end);
        let error = engine.read(&read_end, 0, 8).await.expect_err("five bytes are missing");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_dropped_read_keeps_its_descriptor_and_buffer_until_the_kernel_is_done() {
        let Some(engine) = ring() else { return };
        let (read_end, mut write_end) = pipe();
        let watch: Weak<OwnedFd> = Arc::downgrade(&read_end);
        let mut read = Box::pin(async move { engine.read(&read_end, 0, 4096).await });
        assert!(poll_once(&mut read).is_pending());
        drop(read);
        assert!(watch.upgrade().is_some(), "the kernel still reads from it");
        // Now the kernel writes to a buffer that nobody waits for; an address sanitizer would see if it were freed.
        write_end.write_all(&[7; 4096]).expect("room in the pipe");
        while watch.upgrade().is_some() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn slots_come_back_from_dropped_operations() {
        let Some(engine) = ring() else { return };
        let file: Arc<OwnedFd> = Arc::new(tempfile::tempfile().expect("a file").into());
        // More than there are slots: if a drop lost one, the last would wait for ever.
        for round in 0..3000_u64 {
            let data = Bytes::from(vec![round as u8; 512]);
            let mut write = Box::pin(engine.write(&file, round * 512, data));
            let _ = poll_once(&mut write);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            engine.write(&file, 0, Bytes::from_static(b"last")).await.expect("written");
            engine.fdatasync(&file).await.expect("synced");
        });
    }

    #[test]
    fn an_operation_outlives_the_thread_that_began_it() {
        let Some(engine) = ring() else { return };
        for _ in 0..50 {
            let (read_end, mut write_end) = pipe();
            let begin = std::thread::Builder::new().spawn(move || {
                let mut read = Box::pin(async move { engine.read(&read_end, 0, 4).await });
                assert!(poll_once(&mut read).is_pending());
                read
            });
            let read = begin.expect("a thread").join().expect("it only polled");
            write_end.write_all(b"abcd").expect("room in the pipe");
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            assert_eq!(runtime.block_on(read).expect("read"), &b"abcd"[..]);
        }
    }

    #[test]
    fn the_pool_works_without_a_runtime_and_within_one() {
        let file: Arc<OwnedFd> = Arc::new(tempfile::tempfile().expect("a file").into());
        let mut write = Box::pin(Engine::Pool.write(&file, 2, Bytes::from_static(b"abc")));
        assert!(matches!(poll_once(&mut write), Poll::Ready(Ok(()))));
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let read = runtime.block_on(Engine::Pool.read(&file, 0, 5)).expect("inside");
        assert_eq!(read, &b"\0\0abc"[..]);
        runtime.block_on(Engine::Pool.fdatasync(&file)).expect("synced");
        let error = runtime.block_on(Engine::Pool.read(&file, 3, 5)).expect_err("past the end");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn errors_of_the_kernel_come_back() {
        let read_only = tempfile::NamedTempFile::new().expect("a file");
        let file: Arc<OwnedFd> = Arc::new(std::fs::File::open(read_only.path()).expect("there").into());
        for engine in [Engine::best(), Engine::Pool] {
            let error = engine.write(&file, 0, Bytes::from_static(b"x")).await.expect_err("read-only");
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
            let mode = FallocateFlags::empty();
            let error = engine.fallocate(&file, mode, 0, 1).await.expect_err("read-only");
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        }
    }
}
