//! The transport: one ranged GET, done and nothing decided.
//!
//! - It follows no redirect, sends no credential of its own, decodes no content, and sets no time limit.
//! - Its errors are told apart in two: what may pass by itself, and what will not.
//!
//! Not here: what a response means (`response`), when to ask again (`retry`). `http` is the real one.

use std::{ops::Range, pin::Pin};

use bytes::Bytes;
use futures_util::Stream;
use http::{HeaderMap, StatusCode};
use readonce_storage::BoxFuture;
use url::Url;

/// A GET of one range.
#[derive(Debug, Clone)]
pub struct Request {
    /// Without user and password.
    pub url: Url,
    /// Bytes asked for; not empty.
    pub range: Range<u64>,
    /// Credentials and conditions. `Range` is not among them.
    pub headers: HeaderMap,
}

impl Request {
    /// The value of the `Range` header.
    pub fn range_header(&self) -> String {
        // HTTP's ranges hold their last byte.
        format!("bytes={}-{}", self.range.start, self.range.end.saturating_sub(1))
    }
}

/// What came back before the body.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
}

/// The body as it arrives. Dropped, the rest is not read.
pub type Body = Pin<Box<dyn Stream<Item = Result<Bytes, TransportError>> + Send>>;

/// A response whose body has not been read.
pub struct Response {
    /// Status and headers.
    pub head: Head,
    /// Body.
    pub body: Body,
}

/// Why there is no response, or no more of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// Not reached, reset, cut off: may pass.
    #[error("{0}")]
    Passing(String),
    /// A certificate that is not trusted, a request that cannot be made: will not pass by itself.
    #[error("{0}")]
    Permanent(String),
}

/// Sends requests.
pub trait Transport: Send + Sync + 'static {
    /// Sends one request and waits for the head of its response.
    ///
    /// # Errors
    /// Whatever kept a head from arriving. A status such as 404 is no error here.
    fn get(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>>;
}
