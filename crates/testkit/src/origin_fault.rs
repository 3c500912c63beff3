//! Faults: what the faulty origin does wrong, and to which requests.
//!
//! Not here: how it is done (`origin`, `origin_body`).

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use crate::content::Content;

/// One thing that goes wrong with a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing at all is sent for so long.
    DelayHead(Duration),
    /// Nothing is sent until the gate gives a permit, one for each request.
    HoldHead(Arc<Semaphore>),
    /// After so many body bytes nothing comes any more, and the connection stays.
    StallAfter(u64),
    /// After so many body bytes nothing comes for a while; then the rest.
    PauseAfter(u64, Duration),
    /// After so many body bytes the connection is closed.
    CutAfter(u64),
    /// After so many body bytes the connection is reset.
    ResetAfter(u64),
    /// The connection is reset before the head.
    Reset,
    /// The response has this status and an empty body.
    Status {
        /// Status code.
        status: u16,
        /// Value of Retry-After.
        retry_after: Option<String>,
    },
    /// Sends this Content-Range instead of the right one.
    ContentRange(String),
    /// Answers 200 with the whole file.
    IgnoreRange,
    /// The response ends cleanly after so many bytes, without a Content-Length.
    ShortBody(u64),
    /// The body goes on for so many bytes after the range, without a Content-Length.
    LongBody(u64),
    /// Answers with this status and Location.
    Redirect {
        /// Status code.
        status: u16,
        /// Location, as it is sent.
        location: String,
    },
    /// The file is empty.
    Empty,
    /// The file has this ETag, if any, and this content now.
    Version {
        /// As sent, with quotes.
        etag: Option<String>,
        /// The new bytes.
        content: Content,
    },
    /// Has this header instead of the one that it would have.
    Header(String, String),
    /// Lacks this header.
    NoHeader(String),
    /// Denies every If-Match.
    DenyIfMatch,
    /// Answers HEAD as well, which clients made on curl need: no fault at all, but the origin refuses it otherwise.
    AllowHead,
}

/// Which requests a fault meets, counted from when it is given.
#[derive(Debug, Clone)]
pub struct When {
    /// Requests that pass first.
    pub skip: u64,
    /// Requests that are met then.
    pub count: u64,
    /// Only requests for this path; others are not counted.
    pub path: Option<String>,
}

impl When {
    /// The next `count` requests.
    pub fn next(count: u64) -> Self {
        Self { skip: 0, count, path: None }
    }

    /// Every request from now on.
    pub fn always() -> Self {
        Self::next(u64::MAX)
    }

    /// Lets `skip` requests pass first.
    pub fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// Only requests for `path`.
    pub fn on(mut self, path: &str) -> Self {
        self.path = Some(path.to_string());
        self
    }

    /// Whether this request is met; counts it.
    pub(crate) fn meets(&mut self, path: &str) -> bool {
        if self.path.as_deref().is_some_and(|wanted| wanted != path) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if self.count == 0 {
            return false;
        }
        self.count -= 1;
        true
    }
}
