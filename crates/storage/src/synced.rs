//! Syncs in order: what several tasks may sync, none of them unaware of another's failure.
//!
//! - One sync at a time. The kernel tells a descriptor of lost writes once: of two syncs that cover the same writes, one alone would
//!   fail, and the other's caller would build on what is lost.
//! - After a failed sync every later one fails with the same words.
//!
//! Not here: what becomes of writes then. They go on; the room above refuses them.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;

use crate::{BoxFuture, ReadAt, Storage};

/// A storage whose syncs are in order. See the module.
pub struct Synced {
    inner: Arc<dyn Storage>,
    one_at_a_time: tokio::sync::Mutex<()>,
    failure: OnceLock<(io::ErrorKind, String)>,
}

impl Synced {
    /// Orders the syncs of `inner`, as far as they are asked for here.
    pub fn over(inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Self { inner, one_at_a_time: tokio::sync::Mutex::new(()), failure: OnceLock::new() })
    }
}

impl ReadAt for Synced {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.inner.read_now(offset, buf)
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        self.inner.read(offset, len)
    }
}

impl Storage for Synced {
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        self.inner.write_now(offset, data)
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.inner.write(offset, data)
    }

    fn allocate(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.inner.allocate(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.inner.write_zeroes(offset, len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.inner.punch_hole(offset, len)
    }

    fn set_len(&self, len: u64) -> BoxFuture<'_, io::Result<()>> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let _turn = self.one_at_a_time.lock().await;
            if let Some((kind, words)) = self.failure.get() {
                return Err(io::Error::new(*kind, words.clone()));
            }
            let synced = self.inner.sync().await;
            if let Err(error) = &synced {
                let _ = self.failure.set((error.kind(), error.to_string()));
            }
            synced
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        SimFile,
        sim::{Fault, Lasts},
    };

    /// Found by the simulator (qcow2, seed 212568): of two syncs at the same time one was told what both had lost, and links were
    /// written to bytes that were not there.
    #[tokio::test]
    async fn a_failed_sync_is_told_to_all_who_sync() {
        let file = Arc::new(SimFile::new());
        file.set_yields(3, 4);
        let synced = Synced::over(file.clone());
        synced.write(0, Bytes::from_static(&[7; 512])).await.expect("room");
        file.fail_nth(1, Fault::SyncFails, Lasts::Once);
        let (one, other) = tokio::join!(synced.sync(), synced.sync());
        assert!(one.is_err() && other.is_err());
        assert_eq!(file.sync_count(), 1);
        assert!(synced.sync().await.is_err());
        // Reads and writes go on.
        synced.write(512, Bytes::from_static(b"x")).await.expect("room");
        assert_eq!(synced.read(0, 512).await.expect("there"), &[7; 512][..]);
    }
}
