//! Places: the files and the server of a run, as a chain opens them.
//!
//! - Locks are QEMU's: no two writers of a file, and no reader beside a writer. Whoever holds one is counted, so that a run can tell
//!   whether all were given back.
//! - What was opened to be read is never written.
//!
//! Not here: what is in the files (`world`).

use std::{collections::BTreeMap, io, ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use readonce_disk::chain::{Held, Lockable, Opener};
use readonce_origin::{Class, FetchError, HttpOrigin, Locator, Origin, OriginOptions, Sink, Validator};
use readonce_storage::{Access, BoxFuture, LockError, OpenMode, ReadAt, Rt, SimFile, Storage};

use crate::{server::Server, world::Disks};

/// Where the top lies; the others lie beside it.
pub const TOP: &str = "/sim/top.img";
/// The image below it, as it is named there.
pub const MIDDLE: &str = "middle.img";
/// Its data file, as it is named there.
pub const DATA: &str = "data.raw";

/// What a chain opens in a run.
pub struct RunPlaces {
    /// The images' disks.
    pub disks: Disks,
    /// What the origin serves.
    pub server: Arc<Server>,
    /// Who holds which file.
    pub holders: Arc<Holders>,
}

/// Readers and writers of each file, by its name.
#[derive(Debug, Default)]
pub struct Holders(Mutex<BTreeMap<String, Vec<Access>>>);

impl Holders {
    /// Whether nobody holds anything.
    pub fn are_gone(&self) -> bool {
        self.0.lock().values().all(Vec::is_empty)
    }
}

impl RunPlaces {
    fn disk(&self, path: &Path) -> Option<Arc<SimFile>> {
        let beside = |name| Path::new(TOP).with_file_name(name);
        match path {
            path if path == Path::new(TOP) => Some(Arc::clone(&self.disks.top)),
            path if path == beside(MIDDLE) => self.disks.middle.clone(),
            path if path == beside(DATA) => self.disks.data.clone(),
            _ => None,
        }
    }
}

impl Opener for RunPlaces {
    fn file(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn Lockable>> {
        let file = self.disk(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(OpenFile {
            name: path.display().to_string(),
            file,
            mode,
            holders: Arc::clone(&self.holders),
        }))
    }

    fn origin<'a>(
        &'a self,
        locator: &'a Locator,
        options: &'a OriginOptions,
        rt: &'a Rt,
    ) -> BoxFuture<'a, Result<Arc<dyn Origin>, FetchError>> {
        Box::pin(async move {
            match locator {
                Locator::File(path) => match self.disk(path) {
                    Some(disk) => Ok(Local::new(disk) as Arc<dyn Origin>),
                    None => Err(FetchError::Permanent {
                        origin: locator.printable(),
                        cause: "there is no such file".into(),
                    }),
                },
                Locator::Http(url) => {
                    let origin = HttpOrigin::open_with(self.server.clone(), url, options, rt).await?;
                    Ok(origin as Arc<dyn Origin>)
                }
            }
        })
    }
}

/// A file that was opened.
struct OpenFile {
    name: String,
    file: Arc<SimFile>,
    mode: OpenMode,
    holders: Arc<Holders>,
}

impl OpenFile {
    /// The file to write to.
    fn writable(&self) -> &dyn Storage {
        assert_ne!(self.mode, OpenMode::Read, "{} was opened to be read", self.name);
        &*self.file
    }
}

impl ReadAt for OpenFile {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.file.read_now(offset, buf)
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        self.file.read(offset, len)
    }
}

impl Storage for OpenFile {
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        self.writable().write_now(offset, data)
    }
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.writable().write(offset, data)
    }
    fn allocate(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.writable().allocate(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.writable().write_zeroes(offset, len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.writable().punch_hole(offset, len)
    }
    fn set_len(&self, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.writable().set_len(len)
    }
    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        self.writable().sync()
    }
}

impl Lockable for OpenFile {
    fn lock<'a>(&'a self, access: Access, _: &'a Rt) -> BoxFuture<'a, Result<Held, LockError>> {
        Box::pin(async move {
            let mut holders = self.holders.0.lock();
            let of_file = holders.entry(self.name.clone()).or_default();
            if access == Access::Write && !of_file.is_empty() || of_file.contains(&Access::Write) {
                return Err(LockError::InUse(format!("{} is in use", self.name)));
            }
            of_file.push(access);
            let (name, holders) = (self.name.clone(), Arc::clone(&self.holders));
            Ok(Box::new(Holder { name, access, holders }) as Held)
        })
    }
}

/// Holds a file until it is dropped.
struct Holder {
    name: String,
    access: Access,
    holders: Arc<Holders>,
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut holders = self.holders.0.lock();
        let of_file = holders.get_mut(&self.name).expect("it was held");
        let at = of_file.iter().position(|access| *access == self.access).expect("it was held");
        of_file.swap_remove(at);
    }
}

/// A file of this machine as an origin.
pub struct Local {
    file: Arc<SimFile>,
    len: u64,
}

impl Local {
    /// At the length that it has now.
    pub fn new(file: Arc<SimFile>) -> Arc<Self> {
        Arc::new(Self { len: file.len(), file })
    }
}

impl ReadAt for Local {
    fn len(&self) -> u64 {
        self.len
    }
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.file.read_now(offset, buf)
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        self.file.read(offset, len)
    }
}

impl Origin for Local {
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        _: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async move {
            let len = usize::try_from(range.end - range.start).expect("it fits in memory");
            let permanent =
                |error: io::Error| FetchError::Permanent { origin: self.name(), cause: error.to_string() };
            let bytes = self.file.read(range.start, len).await.map_err(permanent)?;
            sink(range.start, bytes);
            Ok(())
        })
    }
    fn name(&self) -> String {
        "a local file".into()
    }
    fn validator(&self) -> Vec<u8> {
        // Its inode, as it were: nobody replaces it.
        Validator::File { device: 1, inode: 1, size: self.len, mtime_ns: 0 }.encode()
    }
}
