//! A disk in memory, with switches: what it answers at once, what it holds back, what fails.
//!
//! - `durable` is what would survive power loss: the contents as of the last flush.
//! - Bytes handed out by waiting reads are counted until the server lets go of them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use bytes::Bytes;
use parking_lot::Mutex;
use readonce_disk::{BlockDevice, DeviceError, StatusExtent, ZeroMode};
use readonce_storage::BoxFuture;
use tokio::sync::watch;

pub const BLOCK: usize = 4096;

pub struct MemDevice {
    data: Mutex<Vec<u8>>,
    durable: Mutex<Vec<u8>>,
    pub read_only: AtomicBool,
    /// Whether the `_now` calls answer.
    pub is_instant: AtomicBool,
    /// The error that every request gets.
    pub failure: Mutex<Option<fn() -> DeviceError>>,
    /// Waiting calls wait while it is true.
    gate: watch::Sender<bool>,
    /// Cache requests wait while it is true, too.
    cache_gate: watch::Sender<bool>,
    pub gauge: Gauge,
    pub live: Arc<Gauge>,
    pub caches: Mutex<Vec<(u64, u64)>>,
    pub zero_modes: Mutex<Vec<ZeroMode>>,
    pub instant_calls: AtomicUsize,
}

/// A count, and the most that it ever was.
#[derive(Default)]
pub struct Gauge {
    now: AtomicUsize,
    max: AtomicUsize,
}

impl Gauge {
    pub fn add(&self, count: usize) {
        let now = self.now.fetch_add(count, SeqCst) + count;
        self.max.fetch_max(now, SeqCst);
    }
    pub fn sub(&self, count: usize) {
        self.now.fetch_sub(count, SeqCst);
    }
    pub fn now(&self) -> usize {
        self.now.load(SeqCst)
    }
    pub fn max(&self) -> usize {
        self.max.load(SeqCst)
    }
}

struct Counted<'a>(&'a Gauge, usize);
impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.sub(self.1);
    }
}

struct LiveBytes(Vec<u8>, Arc<Gauge>);
impl AsRef<[u8]> for LiveBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
impl Drop for LiveBytes {
    fn drop(&mut self) {
        self.1.sub(self.0.len());
    }
}

impl MemDevice {
    pub fn new(len: usize) -> Arc<Self> {
        Self::with(vec![0; len])
    }

    pub fn with(data: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            durable: Mutex::new(data.clone()),
            data: Mutex::new(data),
            read_only: AtomicBool::new(false),
            is_instant: AtomicBool::new(true),
            failure: Mutex::new(None),
            gate: watch::Sender::new(false),
            cache_gate: watch::Sender::new(false),
            gauge: Gauge::default(),
            live: Arc::default(),
            caches: Mutex::default(),
            zero_modes: Mutex::default(),
            instant_calls: AtomicUsize::new(0),
        })
    }

    pub fn waiting(self: Arc<Self>) -> Arc<Self> {
        self.is_instant.store(false, SeqCst);
        self
    }

    pub fn hold(&self) {
        self.gate.send_replace(true);
    }

    pub fn release(&self) {
        self.gate.send_replace(false);
    }

    pub fn hold_caches(&self) {
        self.cache_gate.send_replace(true);
    }

    pub fn release_caches(&self) {
        self.cache_gate.send_replace(false);
    }

    pub fn contents(&self) -> Vec<u8> {
        self.data.lock().clone()
    }

    pub fn durable(&self) -> Vec<u8> {
        self.durable.lock().clone()
    }

    fn fail(&self) -> Result<(), DeviceError> {
        self.failure.lock().map_or(Ok(()), |error| Err(error()))
    }

    /// Waits at the gate, and lets others run first even if it is open.
    async fn wait(&self) -> Result<Counted<'_>, DeviceError> {
        self.gauge.add(1);
        let counted = Counted(&self.gauge, 1);
        tokio::task::yield_now().await;
        let mut gate = self.gate.subscribe();
        gate.wait_for(|is_held| !is_held).await.expect("the sender is ours");
        self.fail()?;
        Ok(counted)
    }

    fn set(&self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap();
        self.data.lock()[offset..offset + data.len()].copy_from_slice(data);
    }
}

impl BlockDevice for MemDevice {
    fn size(&self) -> u64 {
        self.data.lock().len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only.load(SeqCst)
    }
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), DeviceError>> {
        if !self.is_instant.load(SeqCst) {
            // What a call that gives up leaves behind must never be seen.
            buf.fill(0xee);
            return None;
        }
        self.instant_calls.fetch_add(1, SeqCst);
        if let Err(error) = self.fail() {
            buf.fill(0xee);
            return Some(Err(error));
        }
        let offset = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.data.lock()[offset..offset + buf.len()]);
        Some(Ok(()))
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, DeviceError>> {
        Box::pin(async move {
            assert!(len > 0);
            let _counted = self.wait().await?;
            let offset = usize::try_from(offset).unwrap();
            let data = self.data.lock()[offset..offset + len].to_vec();
            self.live.add(len);
            Ok(Bytes::from_owner(LiveBytes(data, self.live.clone())))
        })
    }
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<Result<(), DeviceError>> {
        if !self.is_instant.load(SeqCst) {
            return None;
        }
        self.instant_calls.fetch_add(1, SeqCst);
        Some(self.fail().map(|()| self.set(offset, data)))
    }
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            assert!(!data.is_empty());
            let _counted = self.wait().await?;
            self.set(offset, &data);
            Ok(())
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            self.zero_modes.lock().push(mode);
            let _counted = self.wait().await?;
            // Fast where it is aligned, as an image with zero clusters would be.
            if mode.only_if_fast && !(offset | len).is_multiple_of(BLOCK as u64) {
                return Err(DeviceError::NotFast);
            }
            self.set(offset, &vec![0; usize::try_from(len).unwrap()]);
            Ok(())
        })
    }
    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            let _counted = self.wait().await?;
            self.set(offset, &vec![0; usize::try_from(len).unwrap()]);
            Ok(())
        })
    }
    fn flush(&self) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            let data = self.data.lock().clone();
            let _counted = self.wait().await?;
            *self.durable.lock() = data;
            Ok(())
        })
    }
    fn cache(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            let _counted = self.wait().await?;
            let mut gate = self.cache_gate.subscribe();
            gate.wait_for(|is_held| !is_held).await.expect("the sender is ours");
            self.caches.lock().push((offset, len));
            Ok(())
        })
    }
    /// A block of zeros is a hole of depth 0; one that begins with 2 is of the image below.
    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, DeviceError>> {
        Box::pin(async move {
            let _counted = self.wait().await?;
            let data = self.data.lock();
            let (mut at, end) = (usize::try_from(offset).unwrap(), usize::try_from(offset + len).unwrap());
            let mut extents = Vec::new();
            while at < end && extents.len() < count_max {
                let block = at / BLOCK * BLOCK;
                let until = (block + BLOCK).min(end);
                let bytes = &data[block..(block + BLOCK).min(data.len())];
                let zero = bytes.iter().all(|&byte| byte == 0);
                let depth = if zero {
                    0
                } else if bytes[0] == 2 {
                    2
                } else {
                    1
                };
                extents.push(StatusExtent { len: (until - at) as u64, zero, hole: zero, depth });
                at = until;
            }
            Ok(extents)
        })
    }
}
