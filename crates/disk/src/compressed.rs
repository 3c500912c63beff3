//! Compressed clusters of one file: decompressed once, kept for a while.
//!
//! - Readers of a cluster at the same time share one decompression; neighbours are decompressed side by side.
//! - A stream never changes while a map names it, so what is kept needs no care when the image does: a stream that no
//!   map names any more is not asked for again.
//! - Kept: [`KEPT_BYTES_MAX`]; under way: [`BUSY_BYTES_MAX`] (but always one each).
//!
//! Not here: where streams lie (the map), how they are packed (`readonce_format::codec`).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use readonce_format::{Compressed, FormatError};
use readonce_storage::{ReadAt, Rt, sync::Mutex};
use tokio::sync::{Semaphore, oneshot};

use crate::LayerError;

/// Bytes of decompressed clusters that are kept: a few requests' worth, so that small reads in sequence find the rest of
/// their cluster.
const KEPT_BYTES_MAX: usize = 4 << 20;
/// Bytes of clusters and streams in the hands of decompressions under way, in all.
const BUSY_BYTES_MAX: usize = 32 << 20;
/// One permit stands for so many of them.
const PERMIT_BYTES: usize = 1 << 10;
/// Readers of different clusters meet at a lock only by chance.
const STRIPES_MAX: usize = 8;

/// Decompresses the clusters of one file.
pub struct Clusters {
    rt: Rt,
    file: Arc<dyn ReadAt>,
    /// Bytes.
    cluster_size: usize,
    /// Clusters that each stripe keeps.
    kept_max: usize,
    stripes: Box<[Mutex<Stripe>]>,
    busy: Semaphore,
}

/// A stream: where it is, and how long at most.
type Key = (u64, u64);

#[derive(Default)]
struct Stripe {
    /// The last one used is at the back.
    kept: VecDeque<(Key, Bytes)>,
    waiting: BTreeMap<Key, Vec<oneshot::Sender<Result<Bytes, LayerError>>>>,
}

/// A whole cluster, now or soon.
pub(crate) enum Coming {
    Here(Bytes),
    Soon(oneshot::Receiver<Result<Bytes, LayerError>>),
}

impl Coming {
    /// The cluster's bytes.
    pub(crate) async fn bytes(self) -> Result<Bytes, LayerError> {
        match self {
            Self::Here(bytes) => Ok(bytes),
            Self::Soon(told) => told
                .await
                .unwrap_or_else(|_| Err(LayerError::Io("the request was abandoned at shutdown".into()))),
        }
    }
}

impl Clusters {
    /// The compressed clusters in `file`, each `cluster_size` bytes once decompressed.
    pub fn new(file: Arc<dyn ReadAt>, cluster_size: u64, rt: Rt) -> Arc<Self> {
        let cluster_size = usize::try_from(cluster_size).expect("a cluster fits in memory");
        let kept_max = (KEPT_BYTES_MAX / cluster_size).max(1);
        let stripes = STRIPES_MAX.min(kept_max);
        Arc::new(Self {
            rt,
            file,
            cluster_size,
            kept_max: kept_max / stripes,
            stripes: (0..stripes).map(|_| Mutex::default()).collect(),
            busy: Semaphore::new(BUSY_BYTES_MAX / PERMIT_BYTES),
        })
    }

    /// Fills `buf` with what lies at the place if its cluster is kept.
    pub(crate) fn read_now(&self, place: &Compressed, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        let cluster = self.stripe((place.at, place.len)).lock().find((place.at, place.len))?;
        let part = part_of(&cluster, place.skip, buf.len());
        if let Ok(part) = &part {
            buf.copy_from_slice(part);
        }
        Some(part.map(drop))
    }

    /// Begins to read the place's whole cluster; goes on by itself when the caller stops waiting.
    pub(crate) fn start(self: &Arc<Self>, place: &Compressed) -> Coming {
        let key = (place.at, place.len);
        let (tell, told) = oneshot::channel();
        {
            let mut stripe = self.stripe(key).lock();
            if let Some(cluster) = stripe.find(key) {
                return Coming::Here(cluster);
            }
            let waiting = stripe.waiting.entry(key).or_default();
            waiting.push(tell);
            if waiting.len() > 1 {
                return Coming::Soon(told);
            }
        }
        let (clusters, place) = (Arc::clone(self), *place);
        self.rt.spawn(Box::pin(async move {
            let result = clusters.decompress(&place).await;
            let waiting = {
                let mut stripe = clusters.stripe(key).lock();
                if let Ok(cluster) = &result {
                    stripe.keep(key, cluster.clone(), clusters.kept_max);
                }
                stripe.waiting.remove(&key).unwrap_or_default()
            };
            for tell in waiting {
                let _ = tell.send(result.clone());
            }
        }));
        Coming::Soon(told)
    }

    /// The `len` bytes at the place.
    pub(crate) async fn read(self: &Arc<Self>, place: &Compressed, len: usize) -> Result<Bytes, LayerError> {
        let cluster = self.start(place).bytes().await?;
        part_of(&cluster, place.skip, len)
    }

    async fn decompress(&self, place: &Compressed) -> Result<Bytes, LayerError> {
        let stream_len = usize::try_from(place.len).unwrap_or(usize::MAX);
        let bytes = self.cluster_size.saturating_add(stream_len).clamp(1, BUSY_BYTES_MAX);
        let permits = u32::try_from(bytes.div_ceil(PERMIT_BYTES)).expect("clamped to the bound");
        let _busy = self.busy.acquire_many(permits).await.expect("nobody closes it");
        // A map that says more is wrong, and must not make us allocate it.
        if stream_len > self.cluster_size.saturating_mul(2) {
            let error =
                FormatError::corrupt("compressed cluster", stream_len, "must be at most two clusters long");
            return Err(error.into());
        }
        let stream = self.file.read(place.at, stream_len).await?;
        let mut cluster = vec![0; self.cluster_size];
        place.codec.decompress(&stream, &mut cluster)?;
        Ok(cluster.into())
    }

    fn stripe(&self, (at, _): Key) -> &Mutex<Stripe> {
        // Streams lie one after the other at any offset: neighbours go to different stripes by a multiplicative hash.
        let hash = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.stripes[hash as usize % self.stripes.len()]
    }
}

impl Stripe {
    fn find(&mut self, key: Key) -> Option<Bytes> {
        let index = self.kept.iter().rposition(|(kept, _)| *kept == key)?;
        let last = self.kept.len() - 1;
        if index != last {
            let found = self.kept.remove(index)?;
            self.kept.push_back(found);
        }
        Some(self.kept[last].1.clone())
    }

    fn keep(&mut self, key: Key, cluster: Bytes, kept_max: usize) {
        while self.kept.len() >= kept_max {
            self.kept.pop_front();
        }
        self.kept.push_back((key, cluster));
    }
}

/// `len` bytes from `skip` inside a cluster.
pub(crate) fn part_of(cluster: &Bytes, skip: u64, len: usize) -> Result<Bytes, LayerError> {
    let start = usize::try_from(skip).unwrap_or(usize::MAX);
    match start.checked_add(len) {
        Some(end) if end <= cluster.len() => Ok(cluster.slice(start..end)),
        _ => {
            Err(FormatError::corrupt("compressed cluster", skip, "must be asked for inside the cluster")
                .into())
        }
    }
}
