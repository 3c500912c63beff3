//! A file of this machine, or a block device.
//!
//! - `read_now` asks the kernel for what is in the page cache (`RWF_NOWAIT`). On a file system that cannot say, it does
//!   not guess: `None`, and io_uring does it. tmpfs is all page cache, so a plain read never waits there.
//! - `write_now` is a plain write into the page cache, as long as this file keeps less than its dirty budget there
//!   that is not on the disk. The kernel stops a process that dirties too much, in the middle of its call; the budget keeps
//!   us far from that.
//! - While a sync is under way, `write_now` answers `None`: a write then waits for the journal's commit. Measured on ext4,
//!   2026-11: 390 000 writes of 4 KiB without a sync never blocked, with one always under way each sync blocked one of them,
//!   up to 11 ms, and a loaded machine's poll by 109 ms against 9 ms when such writes wait on the ring.
//! - `len` is what this process made of the file. A file open for reading only looks again before it says "past the
//!   end", because another process may make it longer.
//! - Never `O_DIRECT`: there `RWF_NOWAIT` waits all the same.
//!
//! Not here: locks (`lock`), and how a waiting operation is done (`engine`).

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::{
    fs::FallocateFlags,
    io::{Errno, ReadWriteFlags},
};

use crate::{
    BoxFuture, ReadAt, Storage,
    dirty::{DirtyBudget, SyncUnderWay},
    engine::{Engine, borrow_file, in_pool},
    flat::is_no_space,
};

/// Bytes of one inline copy: about 0.2 ms, which is as long as one poll may take.
const INLINE_BYTES_MAX: usize = 1 << 20;
/// Bytes of zeros written at a time where the file system cannot zero.
const ZEROS_BYTES: usize = 1 << 20;
static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// For reading. It must exist.
    Read,
    /// For reading and writing. It must exist.
    ReadWrite,
    /// For reading and writing. It must not exist, and is made with mode 0644 less the umask.
    CreateNew,
    /// For reading and writing. It is made if it does not exist; what is in it stays.
    Create,
}

/// Which file it is, and which state of it: what can be known without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    /// Number of the device that the file lies on; for a block device, its own.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Bytes.
    pub len: u64,
    /// Last change of the contents, seconds since 1970.
    pub mtime_s: i64,
    /// And the nanoseconds of that second, as fine as the file system keeps them.
    pub mtime_ns: u32,
}

/// A local file. See the module.
#[derive(Debug)]
pub struct LocalFile {
    file: Arc<OwnedFd>,
    path: PathBuf,
    mode: OpenMode,
    is_block_device: bool,
    len: AtomicU64,
    now_reads: NowReads,
    engine: Engine,
    dirty: Arc<DirtyBudget>,
    /// The directory that must be synced with the file, because its entry there is new. Absolute: the process may
    /// change its own directory before the first sync.
    new_entry: Mutex<Option<PathBuf>>,
    /// Whether the open file description has an image lock.
    locked: Arc<AtomicBool>,
}

/// How to read without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NowReads {
    Nowait,
    Plain,
    Never,
}

impl LocalFile {
    /// Opens a regular file or a block device. Operations that wait use io_uring, or a pool of threads where there is none.
    ///
    /// # Errors
    /// The system's, with a text that names the path: `Could not open 'PATH': …`. `InvalidInput` for a directory, a pipe or
    /// any other kind of file.
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> io::Result<Self> {
        Self::open_on(path.as_ref(), mode, Engine::best())
    }

    /// The same, but without io_uring: what [`LocalFile::open`] does where there is none.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_without_ring(path: impl AsRef<Path>, mode: OpenMode) -> io::Result<Self> {
        Self::open_on(path.as_ref(), mode, Engine::Pool)
    }

    fn open_on(path: &Path, mode: OpenMode, engine: Engine) -> io::Result<Self> {
        Self::try_open(path, mode, engine).map_err(|error| {
            let kind = error.kind();
            io::Error::new(kind, format!("Could not open '{}': {}", path.display(), without_number(&error)))
        })
    }

    fn try_open(path: &Path, mode: OpenMode, engine: Engine) -> io::Result<Self> {
        let entry_is_new = mode == OpenMode::CreateNew || (mode == OpenMode::Create && !path.exists());
        let new_entry =
            if entry_is_new { std::path::absolute(path)?.parent().map(Path::to_owned) } else { None };
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(mode != OpenMode::Read)
            .create(mode == OpenMode::Create)
            .create_new(mode == OpenMode::CreateNew)
            .mode(0o644)
            // A pipe must not hold us up before we see that it is one.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        let metadata = file.metadata()?;
        let is_block_device = metadata.file_type().is_block_device();
        if !is_block_device && !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a file nor a block device",
            ));
        }
        // io_uring takes O_NONBLOCK at its word, on a file too, and answers EAGAIN where it should wait.
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
        let len = if is_block_device { device_len(&file)? } else { metadata.len() };
        let now_reads = NowReads::probe(&file)?;
        Ok(Self {
            file: Arc::new(file.into()),
            path: path.to_owned(),
            mode,
            is_block_device,
            len: AtomicU64::new(len),
            now_reads,
            engine,
            dirty: Arc::new(DirtyBudget::new()),
            new_entry: Mutex::new(new_entry),
            locked: Arc::default(),
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device, which has a fixed length.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Whether it was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.mode == OpenMode::Read
    }

    /// Has the file system write in place what it would else copy on every write (btrfs), where it can do so. Of use while the file is empty.
    pub fn set_no_copy_on_write(&self) {
        let set = borrow_file(&self.file, |file| -> io::Result<()> {
            let flags = rustix::fs::ioctl_getflags(file)?;
            Ok(rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::NOCOW)?)
        });
        if let Err(error) = set {
            tracing::debug!(%error, "the file system has no such flag");
        }
    }

    /// Which file it is, and its state now.
    ///
    /// # Errors
    /// The system's.
    pub fn identity(&self) -> io::Result<FileIdentity> {
        let metadata = borrow_file(&self.file, std::fs::File::metadata)?;
        let (device, len) = if self.is_block_device {
            (metadata.rdev(), self.len())
        } else {
            (metadata.dev(), metadata.len())
        };
        Ok(FileIdentity {
            device,
            inode: metadata.ino(),
            len,
            mtime_s: metadata.mtime(),
            mtime_ns: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
        })
    }

    pub(crate) fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    pub(crate) fn locked_flag(&self) -> &Arc<AtomicBool> {
        &self.locked
    }

    /// The end of a range that may be read.
    fn check_inside(&self, offset: u64, len: usize) -> io::Result<()> {
        let end = offset.checked_add(len as u64);
        if end.is_some_and(|end| end <= self.len()) {
            return Ok(());
        }
        if self.is_read_only() && !self.is_block_device {
            let len_now = borrow_file(&self.file, std::fs::File::metadata)?.len();
            self.len.fetch_max(len_now, Ordering::AcqRel);
            if end.is_some_and(|end| end <= len_now) {
                return Ok(());
            }
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!(
                "{}: {len} bytes at {offset} end past the file's {} bytes",
                self.path.display(),
                self.len()
            ),
        ))
    }

    fn check_writable(&self, offset: u64, len: u64) -> io::Result<u64> {
        if self.is_read_only() {
            let text = format!("{}: opened for reading only", self.path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        offset
            .checked_add(len)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
    }

    fn grew_to(&self, end: u64) {
        if !self.is_block_device {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }

    fn write_inline(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let written = match borrow_file(&self.file, |file| file.write_at(data, offset)) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            offset += written as u64;
            data = &data[written..];
            self.grew_to(offset);
            self.dirty.add(written as u64);
        }
        self.start_writeback_if_due();
        Ok(())
    }

    /// Starts writeback when too much is dirty and none is under way. Without the ring nothing is started: the kernel
    /// began by itself, and the budget holds all the same.
    fn start_writeback_if_due(&self) {
        let Some(round) = self.dirty.begin_writeback() else { return };
        let Engine::Ring(ring) = self.engine else { return self.dirty.end_writeback(None) };
        let dirty = Arc::clone(&self.dirty);
        let on_done = Box::new(move |result: io::Result<()>| {
            // An error is not lost: it waits at the descriptor for the next sync.
            dirty.end_writeback(result.is_ok().then_some(round));
        });
        if ring.start_writeback(&self.file, on_done).is_err() {
            self.dirty.end_writeback(None);
        }
    }

    async fn write_waiting(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let len = data.len() as u64;
        let end = self.check_writable(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let result = self.engine.write(&self.file, offset, data).await;
        self.dirty.add(len);
        self.start_writeback_if_due();
        match &result {
            Ok(()) => self.grew_to(end),
            Err(_) if self.is_block_device => {}
            // Part of it may have been written.
            Err(_) => self.grew_to(borrow_file(&self.file, std::fs::File::metadata)?.len().min(end)),
        }
        result
    }

    /// `fallocate` of at least one byte; `Ok(false)` where it is not supported.
    async fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        match self.engine.fallocate(&self.file, mode, offset, len).await {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(false),
            // A block device refuses what is not whole sectors, and any plain allocation.
            Err(error)
                if self.is_block_device
                    && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn write_zeros_out(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let piece = usize::try_from(len - done).unwrap_or(ZEROS_BYTES).min(ZEROS_BYTES);
            self.write_waiting(offset + done, Bytes::from_static(&ZEROS[..piece])).await?;
            done += piece as u64;
        }
        Ok(())
    }

    async fn set_file_len(&self, len: u64) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        in_pool(move || borrow_file(&file, |file| file.set_len(len))).await
    }
}

impl ReadAt for LocalFile {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        if self.now_reads == NowReads::Never || buf.len() > INLINE_BYTES_MAX {
            return None;
        }
        if let Err(error) = self.check_inside(offset, buf.len()) {
            return Some(Err(error));
        }
        if buf.is_empty() {
            return Some(Ok(()));
        }
        let flags =
            if self.now_reads == NowReads::Nowait { ReadWriteFlags::NOWAIT } else { ReadWriteFlags::empty() };
        match rustix::io::preadv2(&self.file, &mut [io::IoSliceMut::new(buf)], offset, flags) {
            Ok(read) if read == buf.len() => Some(Ok(())),
            // Only a part is in the cache, or nothing.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP) => None,
            Err(error) => Some(Err(error.into())),
        }
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move {
            self.check_inside(offset, len)?;
            if self.now_reads == NowReads::Plain && len <= INLINE_BYTES_MAX {
                let mut buf = vec![0; len];
                if let Some(result) = self.read_now(offset, &mut buf) {
                    tokio::task::coop::consume_budget().await;
                    return result.map(|()| buf.into());
                }
            }
            self.engine.read(&self.file, offset, len).await
        })
    }
}

impl Storage for LocalFile {
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        if data.len() > INLINE_BYTES_MAX {
            return None;
        }
        if let Err(error) = self.check_writable(offset, data.len() as u64) {
            return Some(Err(error));
        }
        self.dirty.would_not_wait(data.len() as u64).then(|| self.write_inline(offset, data))
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            if let Some(result) = self.write_now(offset, &data) {
                // It never waits, so a loop of writes would keep this thread from all other tasks.
                tokio::task::coop::consume_budget().await;
                return result;
            }
            self.write_waiting(offset, data).await
        })
    }

    fn allocate(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let end = self.check_writable(offset, len)?;
            if len == 0 {
                return Ok(());
            }
            if self.is_block_device {
                return if end <= self.len() { Ok(()) } else { Err(no_space()) };
            }
            if !self.fallocate(FallocateFlags::empty(), offset, len).await? && end > self.len() {
                // Nothing is promised, but the file grows. A byte does it: `ftruncate` could cut what another task
                // wrote past `end` meanwhile. The byte is the caller's, and is past the end: nobody wrote it.
                self.write_waiting(end - 1, Bytes::from_static(&ZEROS[..1])).await?;
            }
            self.grew_to(end);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let end = self.check_writable(offset, len)?;
            if len == 0 {
                return Ok(());
            }
            if self.is_block_device && end > self.len() {
                return Err(no_space());
            }
            // tmpfs cannot zero, but it can take the space away and give new.
            let zeroed = self.fallocate(FallocateFlags::ZERO_RANGE, offset, len).await?
                || (!self.is_block_device
                    && self
                        .fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
                        .await?
                    && self.fallocate(FallocateFlags::empty(), offset, len).await?);
            if !zeroed {
                self.write_zeros_out(offset, len).await?;
            }
            self.grew_to(end);
            Ok(())
        })
    }

    fn punch_hole(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let end = self.check_writable(offset, len)?.min(self.len());
            let len = end.saturating_sub(offset);
            if len == 0 {
                return Ok(());
            }
            if !self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len).await? {
                self.write_zeros_out(offset, len).await?;
            }
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.check_writable(0, len)?;
            if self.is_block_device {
                // It has the length that it has. Cutting is allowed, so that an image can be made on it.
                return if len <= self.len() { Ok(()) } else { Err(no_space()) };
            }
            self.set_file_len(len).await?;
            self.len.store(len, Ordering::Release);
            Ok(())
        })
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let round = self.dirty.written();
            let sync = SyncUnderWay::begin(&self.dirty);
            self.engine.fdatasync(&self.file).await.map_err(sync_failed)?;
            drop(sync);
            self.dirty.clean_up_to(round);
            // A new file that is durable without its name is lost all the same.
            let directory = self.new_entry.lock().clone();
            if let Some(directory) = directory {
                in_pool(move || sync_directory(&directory)).await.map_err(sync_failed)?;
                *self.new_entry.lock() = None;
            }
            Ok(())
        })
    }
}

impl NowReads {
    /// Asks for one byte without waiting: the flag is looked at before anything else, in an empty file too.
    fn probe(file: &std::fs::File) -> io::Result<Self> {
        let mut byte = [0];
        match rustix::io::preadv2(file, &mut [io::IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT) {
            Ok(_) | Err(Errno::AGAIN) => Ok(Self::Nowait),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                let kind = rustix::fs::fstatfs(file)?.f_type;
                Ok(if kind == libc::TMPFS_MAGIC { Self::Plain } else { Self::Never })
            }
            // A bad sector in the first page: the first real read will say so.
            Err(Errno::IO) => Ok(Self::Never),
            Err(error) => Err(error.into()),
        }
    }
}

fn device_len(file: &std::fs::File) -> io::Result<u64> {
    use std::io::Seek;
    let mut file = file;
    file.seek(io::SeekFrom::End(0))
}

fn sync_directory(path: &Path) -> io::Result<()> {
    match std::fs::File::open(path) {
        Ok(directory) => directory.sync_all(),
        // One may make files in a directory that one may not read. Nothing more can be done for the entry.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(path = %path.display(), %error, "cannot sync the directory of a new file");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// A sync's error, never as "no space": the kernel has dropped pages that it had no room for, so that, unlike a refused
/// write, nothing can be tried again.
fn sync_failed(error: io::Error) -> io::Error {
    if is_no_space(&error) {
        return io::Error::other(format!("sync failed, written data is lost: {}", without_number(&error)));
    }
    error
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

/// The system's words without "(os error 2)", as QEMU prints them.
fn without_number(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(end)) => text[..end].to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::Machine;

    fn new_file(directory: &tempfile::TempDir) -> LocalFile {
        LocalFile::open(directory.path().join("image"), OpenMode::CreateNew).expect("new")
    }

    #[tokio::test]
    async fn what_is_not_in_the_page_cache_is_not_read_now() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = new_file(&directory);
        file.write(0, Bytes::from(vec![7; 64 << 10])).await.expect("written");
        file.sync().await.expect("synced");
        let mut buf = vec![0; 4096];
        match file.now_reads {
            NowReads::Never => assert!(file.read_now(0, &mut buf).is_none()),
            NowReads::Plain => file.read_now(0, &mut buf).expect("in memory").expect("read"),
            NowReads::Nowait => {
                file.read_now(0, &mut buf).expect("just written").expect("read");
                assert_eq!(buf, [7; 4096]);
                rustix::fs::fadvise(&*file.file, 0, None, rustix::fs::Advice::DontNeed).expect("advised");
                assert!(file.read_now(0, &mut buf).is_none());
                assert_eq!(file.read(0, 4096).await.expect("inside"), &[7; 4096][..]);
                file.read_now(0, &mut buf).expect("just read").expect("read");
            }
        }
    }

    #[test]
    fn tmpfs_is_read_in_place() {
        let directory = tempfile::tempdir_in("/dev/shm").expect("Linux has a tmpfs at /dev/shm");
        let file = new_file(&directory);
        file.write_now(0, b"abc").expect("the budget is free").expect("written");
        let mut buf = [0; 3];
        file.read_now(0, &mut buf).expect("in memory").expect("read");
        assert_eq!(&buf, b"abc");
    }

    #[tokio::test]
    async fn where_the_machine_is_full_writes_wait_until_a_sync() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // Without the ring, so that no writeback makes room by itself.
        let path = directory.path().join("image");
        let mut file = LocalFile::open_without_ring(path, OpenMode::CreateNew).expect("new");
        file.dirty = Arc::new(DirtyBudget::of(|| Machine { dirty: u64::MAX, left: 6 }));
        file.write_now(0, b"abc").expect("just fits").expect("written");
        assert!(file.write_now(0, b"x").is_none());
        file.write(0, Bytes::from_static(b"x")).await.expect("waits, and is written");
        file.sync().await.expect("synced");
        assert_eq!(file.dirty.dirty(), 0);
        file.write_now(0, b"y").expect("there is room again").expect("written");
        assert_eq!(file.read(0, 3).await.expect("inside"), &b"ybc"[..]);
    }

    #[tokio::test]
    async fn writes_wait_while_a_sync_is_under_way() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = new_file(&directory);
        file.write_now(0, b"abc").expect("nothing is under way").expect("written");
        let under_way = SyncUnderWay::begin(&file.dirty);
        assert!(file.write_now(0, b"x").is_none());
        file.write(0, Bytes::from_static(b"x")).await.expect("waits, and is written");
        drop(under_way);
        file.write_now(1, b"y").expect("nothing is under way").expect("written");
        file.sync().await.expect("synced");
        file.write_now(2, b"z").expect("nothing is under way").expect("written");
        assert_eq!(file.read(0, 3).await.expect("inside"), &b"xyz"[..]);
        // A sync that nobody waits for any more is not counted.
        let mut sync = file.sync();
        let _ = std::future::poll_fn(|cx| std::task::Poll::Ready(sync.as_mut().poll(cx))).await;
        drop(sync);
        file.write_now(0, b"z").expect("nothing is waited for").expect("written");
    }

    #[tokio::test]
    async fn a_loop_of_writes_lets_other_tasks_run() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = new_file(&directory);
        let stop = AtomicBool::new(false);
        let writes = async {
            while !stop.load(Ordering::Acquire) {
                file.write(0, Bytes::from_static(b"abc")).await.expect("written");
            }
        };
        // Polled in turn within one task: it ends only if the loop gives way.
        tokio::join!(biased; writes, async { stop.store(true, Ordering::Release) });
    }

    #[tokio::test]
    async fn room_comes_back_without_a_sync() {
        static LEFT: AtomicU64 = AtomicU64::new(0);
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut file = new_file(&directory);
        if matches!(file.engine, Engine::Pool) {
            eprintln!("no io_uring here: nothing starts writeback");
            return;
        }
        file.dirty =
            Arc::new(DirtyBudget::of(|| Machine { dirty: u64::MAX, left: LEFT.load(Ordering::Acquire) }));
        assert!(file.write_now(0, b"x").is_none());
        // Starts a writeback; once that has ended, a write asks again.
        file.write(0, vec![1; 8 << 20].into()).await.expect("waits, and is written");
        LEFT.store(1 << 30, Ordering::Release);
        while file.write_now(0, b"x").is_none() {
            file.write(0, Bytes::from_static(b"x")).await.expect("waits, and is written");
        }
    }

    #[test]
    fn a_sync_without_space_is_not_tried_again() {
        for errno in [libc::ENOSPC, libc::EDQUOT] {
            let error = sync_failed(io::Error::from_raw_os_error(errno));
            assert!(!is_no_space(&error), "{error}");
            assert!(error.to_string().starts_with("sync failed, written data is lost: "));
        }
        assert_eq!(sync_failed(io::Error::from_raw_os_error(libc::EIO)).raw_os_error(), Some(libc::EIO));
    }
}
