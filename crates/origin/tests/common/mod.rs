//! What the tests of this crate share: options, a runtime whose waits are short, and one way to fetch.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::disallowed_methods, reason = "the test runtime stands on the real clock")]

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use readonce_origin::{Class, FetchError, Locator, Origin, OriginOptions, Proxies};
use readonce_storage::{BoxFuture, Moment, Rt, Runtime};
use readonce_testkit::{Content, FaultyOrigin, OriginSpec};

/// Bytes of the file that most tests serve.
pub const LEN: u64 = 1_000_000;

/// How many times faster than real time the test runtime's clock goes.
const SPEED: u32 = 20;

/// A runtime whose clock goes [`SPEED`] times as fast as the real one, and whose random numbers are a count.
pub struct FastRuntime {
    start: tokio::time::Instant,
    random: AtomicU64,
}

impl FastRuntime {
    pub fn start() -> Rt {
        Arc::new(Self { start: tokio::time::Instant::now(), random: AtomicU64::new(0) })
    }
}

impl Runtime for FastRuntime {
    fn now(&self) -> Moment {
        self.start.elapsed() * SPEED
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration / SPEED))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
    fn random(&self) -> u64 {
        self.random.fetch_add(1, Ordering::Relaxed)
    }
}

/// Options of a test: no proxy between it and the loopback, and no stall, which a loaded machine could otherwise show.
pub fn options() -> OriginOptions {
    OriginOptions {
        proxies: Proxies::None,
        stall_timeout: Duration::from_secs(3600),
        probe_for: Duration::from_secs(3600),
        ..OriginOptions::default()
    }
}

pub fn content() -> Content {
    Content::seeded(1, LEN)
}

pub async fn faulty() -> FaultyOrigin {
    FaultyOrigin::start(OriginSpec::new(content())).await.expect("a port")
}

pub async fn open(url: &str, options: &OriginOptions) -> Result<Arc<dyn Origin>, FetchError> {
    let locator = Locator::parse(url, None).expect("a URL");
    readonce_origin::open(&locator, options, &FastRuntime::start()).await
}

/// Opens, and fails the test where that fails.
pub async fn opened(url: &str, options: &OriginOptions) -> Arc<dyn Origin> {
    open(url, options).await.unwrap_or_else(|error| panic!("open {url}: {error}"))
}

/// Fetches a range and checks that its bytes come exactly once, in order.
pub async fn fetch(origin: &dyn Origin, range: Range<u64>) -> Result<Vec<u8>, FetchError> {
    let mut got = Vec::new();
    let mut sink = |at, piece: Bytes| {
        assert_eq!(at, range.start + got.len() as u64, "pieces follow each other");
        assert!(!piece.is_empty());
        got.extend_from_slice(&piece);
    };
    origin.fetch(range.clone(), Class::Demand, &mut sink).await?;
    assert_eq!(got.len() as u64, range.end - range.start);
    Ok(got)
}

/// Fetches a range and compares it with what the server holds.
pub async fn fetch_right(origin: &dyn Origin, range: Range<u64>) {
    let got = fetch(origin, range.clone()).await.unwrap_or_else(|error| panic!("fetch {range:?}: {error}"));
    assert!(got[..] == content().bytes(range.clone()), "wrong bytes in {range:?}");
}

/// The ranges that were asked for, in order.
pub fn asked(server: &FaultyOrigin) -> Vec<Range<u64>> {
    server.log().into_iter().filter_map(|entry| entry.range).collect()
}
