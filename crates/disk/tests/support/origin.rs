//! A simulated origin: known bytes, drawn delays and pieces, failures, and a count of what was asked.

use std::{io, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use readonce_origin::{Class, FetchError, Origin, Sink};
use readonce_storage::{BoxFuture, ReadAt, Rt};

/// Stamp of a backing sector; guest writes have smaller ones.
pub const BACKING: u64 = 1 << 63;
pub const SECTOR: u64 = 512;

/// The bytes of one sector with that stamp. Stamp 0 is a sector of zeros.
pub fn sector(stamp: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&stamp.to_le_bytes());
    }
    bytes
}

/// The stamp of a sector; panics if it is torn inside.
pub fn stamp_of(bytes: &[u8]) -> u64 {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    assert!(bytes.chunks_exact(8).all(|chunk| chunk == stamp.to_le_bytes()), "a sector of two writes");
    stamp
}

/// The stamp that the backing has at a sector; some stretches are zeros.
pub fn backing_stamp(sector: u64) -> u64 {
    if (sector / 16) % 5 == 3 { 0 } else { BACKING | sector }
}

pub struct SimOrigin {
    pub len: u64,
    /// An image's bytes; `None`: the backing's stamps.
    pub content: Option<Bytes>,
    pub rt: Rt,
    /// Of 256, how many fetches fail half-way.
    pub fail_of_256: Mutex<u16>,
    pub delay_ms_max: u64,
    /// Before the first byte of each fetch.
    pub hold_ms: Mutex<u64>,
    pub asked: Mutex<Vec<Range<u64>>>,
}

impl SimOrigin {
    pub fn new(len: u64, rt: Rt, delay_ms_max: u64) -> Arc<Self> {
        Self::of(None, len, rt, delay_ms_max)
    }

    /// An origin of an image.
    pub fn of_image(image: Bytes, rt: Rt, delay_ms_max: u64) -> Arc<Self> {
        let len = image.len() as u64;
        Self::of(Some(image), len, rt, delay_ms_max)
    }

    fn of(content: Option<Bytes>, len: u64, rt: Rt, delay_ms_max: u64) -> Arc<Self> {
        Arc::new(Self {
            len,
            content,
            rt,
            fail_of_256: Mutex::new(0),
            delay_ms_max,
            hold_ms: Mutex::new(0),
            asked: Mutex::default(),
        })
    }

    pub fn asked_bytes(&self) -> u64 {
        self.asked.lock().iter().map(|range| range.end - range.start).sum()
    }

    fn bytes(&self, range: Range<u64>) -> Bytes {
        if range.is_empty() {
            return Bytes::new();
        }
        if let Some(content) = &self.content {
            return content.slice(range.start as usize..range.end as usize);
        }
        let first = range.start / SECTOR;
        let mut bytes = Vec::new();
        for at in first..range.end.div_ceil(SECTOR) {
            bytes.extend_from_slice(&sector(backing_stamp(at)));
        }
        let skip = (range.start - first * SECTOR) as usize;
        Bytes::from(bytes).slice(skip..skip + (range.end - range.start) as usize)
    }

    async fn run(&self, range: Range<u64>, sink: Sink<'_>) -> Result<(), FetchError> {
        assert!(range.start < range.end && range.end <= self.len, "asked for {range:?} of {}", self.len);
        self.asked.lock().push(range.clone());
        let fails = (self.rt.random() % 256) < u64::from(*self.fail_of_256.lock());
        let stop = range.start + self.rt.random() % (range.end - range.start);
        let hold = *self.hold_ms.lock();
        self.rt.sleep(Duration::from_millis(hold)).await;
        let mut at = range.start;
        while at < range.end {
            self.rt.sleep(Duration::from_millis(self.rt.random() % (self.delay_ms_max + 1))).await;
            let end = (at + 1 + self.rt.random() % 40_000).min(range.end);
            if fails && end > stop {
                sink(at, self.bytes(at..stop));
                return Err(FetchError::Away {
                    origin: "sim".into(),
                    waited: Duration::ZERO,
                    attempts: 1,
                    cause: "drawn".into(),
                });
            }
            sink(at, self.bytes(at..end));
            at = end;
        }
        Ok(())
    }
}

impl ReadAt for SimOrigin {
    fn len(&self) -> u64 {
        self.len
    }
    fn read_now(&self, _: u64, _: &mut [u8]) -> Option<io::Result<()>> {
        None
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move { Ok(self.bytes(offset..offset + len as u64)) })
    }
}

impl Origin for SimOrigin {
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        _: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(self.run(range, sink))
    }
    fn name(&self) -> String {
        "sim".into()
    }
    fn validator(&self) -> Vec<u8> {
        b"sim".to_vec()
    }
}
