//! A file on a disk that fails when it is told to, and that loses what was not synced: a FUSE file system of one file, in memory.
//!
//! - It is mounted over the file itself, so there are no names and no folders in it.
//! - Each sector written since the last sync keeps all its versions. A power cut leaves any one of them. It can come just when a
//!   sync is asked for: then most is at stake, and a kill at some moment hardly ever meets that.
//! - A sync that fails is Linux's: it tells once, and what it could not write is clean from then on, and never written.
//!
//! Linux asks for what its page cache does not hold and hands every write through at once. Mounting needs root.
//! The protocol: `include/uapi/linux/fuse.h`.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rand::{Rng, SeedableRng, rngs::SmallRng};

const SECTOR_BYTES: usize = 512;
/// Bytes of a request: a write of `WRITE_BYTES_MAX` and its headers.
const REQUEST_BYTES_MAX: usize = WRITE_BYTES_MAX as usize + 4096;
const WRITE_BYTES_MAX: u32 = 1 << 20;

/// The mounted file. Dropped, it is unmounted.
pub struct FaultyDisk {
    path: PathBuf,
    shared: Arc<Shared>,
}

/// What fails, until it is told otherwise.
#[derive(Default)]
pub struct Faults {
    /// Reads: EIO.
    pub reads: AtomicBool,
    /// Writes and allocations: EIO.
    pub writes: AtomicBool,
    /// Writes past the end and allocations: ENOSPC.
    pub space: AtomicBool,
    /// Syncs: EIO.
    pub syncs: AtomicBool,
}

struct Shared {
    faults: Faults,
    /// Syncs that are still done before the power goes.
    syncs_left: AtomicU64,
    /// Syncs that were asked for.
    syncs: AtomicU64,
    bytes: Mutex<Bytes>,
}

struct Bytes {
    now: Vec<u8>,
    /// Sectors that were written since the last sync: what the disk has, then what was written, in order.
    unsynced: BTreeMap<usize, Vec<Vec<u8>>>,
    /// Sectors whose sync failed: what the disk has.
    lost: BTreeMap<usize, Vec<u8>>,
}

impl FaultyDisk {
    /// Mounts it over a file, with that file's bytes; `None` where that is not allowed.
    pub fn mount(path: &Path) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| without_root(&format!("/dev/fuse: {error}"))).ok()?;
        let now = std::fs::read(path).expect("a file");
        let options = CString::new(format!(
            "fd={},rootmode=100000,user_id=0,group_id=0,max_read={WRITE_BYTES_MAX}",
            device.as_raw_fd()
        ))
        .expect("no zero byte");
        let target = CString::new(path.as_os_str().as_bytes()).expect("no zero byte");
        let flags = libc::MS_NOSUID | libc::MS_NODEV;
        // SAFETY: all five are valid strings that outlive the call.
        let mounted = unsafe {
            libc::mount(
                c"readonce-faults".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                flags,
                options.as_ptr().cast(),
            )
        };
        if mounted != 0 {
            without_root(&format!("mounting FUSE: {}", std::io::Error::last_os_error()));
            return None;
        }
        let bytes = Mutex::new(Bytes { now, unsynced: BTreeMap::new(), lost: BTreeMap::new() });
        let shared = Arc::new(Shared {
            faults: Faults::default(),
            syncs_left: AtomicU64::new(u64::MAX),
            syncs: AtomicU64::new(0),
            bytes,
        });
        std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || serve(device, &shared)
        });
        Some(Self { path: path.to_owned(), shared })
    }

    /// What fails.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Syncs that were asked for so far.
    pub fn syncs(&self) -> u64 {
        self.shared.syncs.load(Ordering::Relaxed)
    }

    /// Does `count` more syncs. From then on no write and no sync reaches it, until [`FaultyDisk::cut`]; it still reads.
    pub fn lose_power_after_syncs(&self, count: u64) {
        self.shared.syncs_left.store(count, Ordering::Relaxed);
    }

    /// Cuts its power: of each sector that was not synced one version stays, drawn from `seed`. Nobody may have it open.
    pub fn cut(&self, seed: u64) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bytes = self.shared.bytes();
        self.shared.syncs_left.store(u64::MAX, Ordering::Relaxed);
        self.shared.faults.writes.store(false, Ordering::Relaxed);
        let Bytes { now, unsynced, lost } = &mut *bytes;
        // All kept, all lost, or a mix.
        let kept_percent = [0, 100, random.random_range(0..100)][random.random_range(0..3)];
        for (sector, mut versions) in std::mem::take(unsynced) {
            let at = if random.random_ratio(kept_percent, 100) {
                versions.len() - 1
            } else if kept_percent == 0 {
                0
            } else {
                random.random_range(0..versions.len())
            };
            put(now, sector, &versions.swap_remove(at));
        }
        for (sector, version) in std::mem::take(lost) {
            put(now, sector, &version);
        }
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        let target = CString::new(self.path.as_os_str().as_bytes()).expect("no zero byte");
        // SAFETY: a valid string.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// A test that needs root has none.
///
/// # Panics
/// Unless it was said that such tests are left out: one that did nothing is not to be called good.
pub fn without_root(why: &str) {
    let known = std::env::var_os("READONCE_UNPRIVILEGED").is_some();
    assert!(known, "it needs root ({why}); READONCE_UNPRIVILEGED=1 leaves such tests out");
}

impl Shared {
    fn bytes(&self) -> MutexGuard<'_, Bytes> {
        self.bytes.lock().expect("no thread panicked with it")
    }
}

impl Bytes {
    fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        let sectors = offset / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES);
        for sector in sectors.clone() {
            let old = self.sector(sector);
            self.unsynced.entry(sector).or_insert_with(|| vec![old]);
        }
        if self.now.len() < end {
            self.now.resize(end, 0);
        }
        self.now[offset..end].copy_from_slice(data);
        for sector in sectors {
            let new = self.sector(sector);
            self.unsynced.get_mut(&sector).expect("put there above").push(new);
        }
    }

    fn sector(&self, sector: usize) -> Vec<u8> {
        let len = self.now.len();
        self.now[(sector * SECTOR_BYTES).min(len)..((sector + 1) * SECTOR_BYTES).min(len)].to_vec()
    }

    fn set_len(&mut self, len: usize) {
        self.now.resize(len, 0);
        let sectors = len.div_ceil(SECTOR_BYTES);
        self.unsynced.split_off(&sectors);
        self.lost.split_off(&sectors);
    }

    fn sync_fails(&mut self) {
        for (sector, mut versions) in std::mem::take(&mut self.unsynced) {
            self.lost.entry(sector).or_insert_with(|| versions.swap_remove(0));
        }
    }
}

/// A sector's bytes as the disk has them; what it lacks at the end of the file are zeros.
fn put(now: &mut [u8], sector: usize, version: &[u8]) {
    let len = now.len();
    let place = &mut now[(sector * SECTOR_BYTES).min(len)..((sector + 1) * SECTOR_BYTES).min(len)];
    place.fill(0);
    let common = place.len().min(version.len());
    place[..common].copy_from_slice(&version[..common]);
}

/// Numbers of the requests.
mod opcode {
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const FALLOCATE: u32 = 43;
    pub const FORGET: u32 = 2;
    pub const INTERRUPT: u32 = 36;
}

/// Answers requests until it is unmounted.
fn serve(mut device: File, shared: &Shared) {
    let mut buf = vec![0; REQUEST_BYTES_MAX];
    while let Ok(len) = device.read(&mut buf) {
        let request = &buf[..len];
        let opcode = u32_at(request, 4);
        if matches!(opcode, opcode::FORGET | opcode::INTERRUPT) {
            continue;
        }
        let (error, body) = match answer(shared, opcode, &request[40..]) {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = u32::try_from(16 + body.len()).expect("small").to_le_bytes().to_vec();
        reply.extend_from_slice(&error.to_le_bytes());
        reply.extend_from_slice(&request[8..16]);
        reply.extend_from_slice(&body);
        // Whoever asked may be gone.
        let _ = device.write_all(&reply);
    }
}

fn answer(shared: &Shared, opcode: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
    let told = |fault: &AtomicBool, errno| if fault.load(Ordering::Relaxed) { Err(errno) } else { Ok(()) };
    let faults = &shared.faults;
    let mut bytes = shared.bytes();
    match opcode {
        opcode::INIT => Ok(init(body)),
        opcode::GETATTR => Ok(attributes(&bytes)),
        opcode::SETATTR => {
            // FATTR_SIZE; other attributes are not kept.
            if u32_at(body, 0) & 8 != 0 {
                told(&faults.writes, libc::EIO)?;
                bytes.set_len(usize_at(body, 16));
            }
            Ok(attributes(&bytes))
        }
        opcode::OPEN => Ok(vec![0; 16]),
        opcode::RELEASE | opcode::FLUSH => Ok(Vec::new()),
        opcode::STATFS => {
            let mut reply = vec![0; 80];
            reply[40..44].copy_from_slice(&4096_u32.to_le_bytes());
            Ok(reply)
        }
        opcode::READ => {
            told(&faults.reads, libc::EIO)?;
            let (offset, len) = (usize_at(body, 8), u32_at(body, 16) as usize);
            let end = (offset + len).min(bytes.now.len());
            Ok(bytes.now[offset.min(end)..end].to_vec())
        }
        opcode::WRITE => {
            told(&faults.writes, libc::EIO)?;
            let (offset, len) = (usize_at(body, 8), u32_at(body, 16) as usize);
            if offset + len > bytes.now.len() {
                told(&faults.space, libc::ENOSPC)?;
            }
            bytes.write(offset, &body[40..40 + len]);
            let mut reply = u32_at(body, 16).to_le_bytes().to_vec();
            reply.resize(8, 0);
            Ok(reply)
        }
        opcode::FSYNC => {
            shared.syncs.fetch_add(1, Ordering::Relaxed);
            let left = shared.syncs_left.load(Ordering::Relaxed);
            if left == 0 {
                // What was written before stays at stake, and nothing is added to it.
                faults.writes.store(true, Ordering::Relaxed);
                return Err(libc::EIO);
            }
            shared.syncs_left.store(left - 1, Ordering::Relaxed);
            if let Err(errno) = told(&faults.syncs, libc::EIO) {
                bytes.sync_fails();
                return Err(errno);
            }
            bytes.unsynced.clear();
            Ok(Vec::new())
        }
        opcode::FALLOCATE => {
            told(&faults.writes, libc::EIO)?;
            told(&faults.space, libc::ENOSPC)?;
            let (offset, len) = (usize_at(body, 8), usize_at(body, 16));
            let mode = i32::try_from(u32_at(body, 24)).unwrap_or(0);
            match mode {
                0 if offset + len > bytes.now.len() => bytes.set_len(offset + len),
                0 | libc::FALLOC_FL_KEEP_SIZE => {}
                _ if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 => {
                    let mut end = offset + len;
                    if mode & libc::FALLOC_FL_KEEP_SIZE != 0 {
                        end = end.min(bytes.now.len());
                    }
                    if offset < end {
                        bytes.write(offset, &vec![0; end - offset]);
                    }
                }
                _ => return Err(libc::EOPNOTSUPP),
            }
            Ok(Vec::new())
        }
        _ => Err(libc::ENOSYS),
    }
}

/// `fuse_init_out`, version 7.31.
fn init(body: &[u8]) -> Vec<u8> {
    const BIG_WRITES: u32 = 1 << 5;
    const MAX_PAGES: u32 = 1 << 22;
    let mut reply = Vec::with_capacity(64);
    for word in [7, 31, u32_at(body, 8), BIG_WRITES | MAX_PAGES, 0, WRITE_BYTES_MAX, 1] {
        reply.extend_from_slice(&word.to_le_bytes());
    }
    reply.extend_from_slice(&u16::try_from(WRITE_BYTES_MAX / 4096).expect("256").to_le_bytes());
    reply.resize(64, 0);
    reply
}

/// `fuse_attr_out`, not to be kept.
fn attributes(bytes: &Bytes) -> Vec<u8> {
    let len = bytes.now.len() as u64;
    let mut reply = vec![0; 16];
    for word in [1, len, len.div_ceil(512), 0, 0, 0] {
        reply.extend_from_slice(&word.to_le_bytes());
    }
    for word in [0, 0, 0, libc::S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0] {
        reply.extend_from_slice(&word.to_le_bytes());
    }
    reply
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn usize_at(bytes: &[u8], at: usize) -> usize {
    let word = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    usize::try_from(word).expect("at most 64 bits")
}
