//! A source that is opened when it is first needed.
//!
//! An origin that cannot be reached must not keep an image with local bytes from being used: each use tries again,
//! until one opens it.

use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use readonce_origin::{Class, Sink};
use readonce_storage::BoxFuture;

use crate::{LayerError, StatusExtent, index::Found, source::Source};

/// Opens the source; called again after a failure.
pub type Opener = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Source>, LayerError>> + Send + Sync>;

/// A source that is opened at its first use.
pub struct Lazy {
    open: Opener,
    source: OnceLock<Arc<dyn Source>>,
    /// Attempts that failed.
    failures: AtomicU64,
    /// Held by the attempt under way: how the one before it failed.
    failure: tokio::sync::Mutex<Option<LayerError>>,
}

impl Lazy {
    /// A source that `open` opens.
    pub fn new(open: Opener) -> Self {
        Self { open, source: OnceLock::new(), failures: AtomicU64::new(0), failure: Default::default() }
    }

    /// The source, opened now if it is not yet. Callers at the same time share one attempt.
    pub async fn source(&self) -> Result<&Arc<dyn Source>, LayerError> {
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        let failures = self.failures.load(Ordering::Acquire);
        let mut failure = self.failure.lock().await;
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        // It failed while this caller waited: another attempt each would make the last wait for all of them.
        if self.failures.load(Ordering::Acquire) > failures
            && let Some(error) = &*failure
        {
            return Err(error.clone());
        }
        match (self.open)().await {
            Ok(source) => Ok(self.source.get_or_init(|| source)),
            Err(error) => {
                *failure = Some(error.clone());
                self.failures.fetch_add(1, Ordering::AcqRel);
                Err(error)
            }
        }
    }
}

impl Source for Lazy {
    fn size(&self) -> BoxFuture<'_, Result<u64, LayerError>> {
        Box::pin(async { self.source().await?.size().await })
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>> {
        self.source.get()?.read_now(offset, buf)
    }

    fn may_read_now(&self, offset: u64) -> bool {
        self.source.get().is_some_and(|source| source.may_read_now(offset))
    }

    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), LayerError>> {
        Box::pin(async move { self.source().await?.fetch(range, class, sink).await })
    }

    fn find(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Option<Found>, LayerError>> {
        Box::pin(async move { self.source().await?.find(offset, len_max).await })
    }

    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, LayerError>> {
        Box::pin(async move { self.source().await?.status(offset, len, count_max).await })
    }
}
