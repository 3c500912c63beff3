//! What the origin does when the server goes wrong, over real sockets.

#![allow(clippy::disallowed_methods, reason = "tests run on the real clock")]

mod common;

use std::{ops::Range, sync::Arc, time::Duration};

use common::{LEN, asked, content, faulty, fetch, fetch_right, open, opened, options};
use readonce_origin::{Class, FetchError, HttpVersion, OriginNote, OriginOptions, Reach, Validator, Version};
use readonce_testkit::{Content, Fault, FaultyOrigin, OriginSpec, When};
use tokio::sync::Semaphore;

/// The range that `check` fetches.
const RANGE: Range<u64> = 100_000..400_000;

/// Opens a healthy server, lets one request meet `fault`, and fetches: the bytes must be right. Returns the ranges that were
/// asked for after the probe.
async fn check_passes(fault: Fault) -> Vec<Range<u64>> {
    check_passes_with(fault, options()).await
}

async fn check_passes_with(fault: Fault, options: OriginOptions) -> Vec<Range<u64>> {
    let server = faulty().await;
    let origin = opened(&server.url(), &options).await;
    server.clear_log();
    server.fault(When::next(1), fault);
    fetch_right(&*origin, RANGE).await;
    let stats = origin.stats();
    assert_eq!(stats.bytes, RANGE.end - RANGE.start);
    let asked = asked(&server);
    assert_eq!(stats.requests, 1 + asked.len() as u64, "the probe and these");
    assert_eq!(stats.retries, asked.len() as u64 - 1);
    asked
}

/// Opens a healthy server, lets every request meet `fault`, and fetches: it must fail without a second request, in these
/// words.
async fn check_fails(fault: Fault, words: &str) -> FetchError {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    server.clear_log();
    server.fault(When::always(), fault);
    let error = fetch(&*origin, RANGE).await.expect_err("a fault that does not pass");
    assert_eq!(asked(&server), [RANGE]);
    let expected = format!("{}: {words}", server.url());
    assert_eq!(error.to_string(), expected);
    error
}

/// Lets the probe meet `fault`: it must fail without a second request, in these words.
async fn check_open_fails(fault: Fault, words: &str) {
    let server = faulty().await;
    server.fault(When::always(), fault);
    let error = open(&server.url(), &options()).await.map(|_| ()).expect_err("a fault that does not pass");
    assert!(matches!(error, FetchError::Permanent { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("{}: {words}", server.url()));
    assert_eq!(server.log().len(), 1);
}

/// The second request asks for the rest of the first, and for no byte that came.
#[track_caller]
fn assert_resumed(asked: &[Range<u64>], at_most: u64) {
    let [first, second] = asked else { panic!("two requests, not {asked:?}") };
    assert_eq!(*first, RANGE);
    assert_eq!(second.end, RANGE.end);
    assert!(second.start > RANGE.start && second.start <= RANGE.start + at_most, "{second:?}");
}

#[tokio::test]
async fn one_byte_finds_the_size_and_one_request_the_rest() {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    assert_eq!(origin.len(), LEN);
    assert_eq!(origin.name(), server.url());
    assert_eq!(Validator::decode(&origin.validator()), Ok(Validator::StrongETag("\"v1\"".into())));
    assert_eq!(origin.notes(), []);
    fetch_right(&*origin, 5..LEN).await;
    assert_eq!(asked(&server), [0..1, 5..LEN]);
    assert_eq!(server.body_bytes(), 1 + LEN - 5);
    assert_eq!(server.connections(), 1, "the connection is used again");
    let conditions: Vec<_> =
        server.log().iter().map(|entry| entry.headers.get("if-match").cloned()).collect();
    assert_eq!(conditions, [None, Some("\"v1\"".parse().expect("a header"))]);
    assert_eq!(&origin.read(7, 9).await.expect("inside")[..], &content().bytes(7..16)[..]);
    let past = origin.read(LEN - 1, 2).await.expect_err("past the end");
    assert_eq!(past.kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(matches!(fetch(&*origin, 0..LEN + 1).await, Err(FetchError::Permanent { .. })));
    assert_eq!(asked(&server).len(), 3, "past the end nothing is asked");
}

#[tokio::test]
async fn http2_is_one_connection_for_many_requests() {
    let server = faulty().await;
    let options = OriginOptions { http_version: HttpVersion::Http2, ..options() };
    let origin = opened(&server.url(), &options).await;
    let all = (0..10).map(|index| fetch_right(&*origin, index * 100_000..(index + 1) * 100_000));
    futures_util::future::join_all(all).await;
    assert_eq!(server.connections(), 1);
    assert!(server.log().iter().all(|entry| entry.version == http::Version::HTTP_2));
    assert_eq!(server.body_bytes(), 1 + LEN);
}

/// Waits until the server holds so many requests.
async fn held(server: &FaultyOrigin, count: u64) {
    while server.in_flight() < count {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn requests_run_beside_each_other_up_to_the_limit() {
    let server = faulty().await;
    let options = OriginOptions { connections_max: 4, ..options() };
    let origin = opened(&server.url(), &options).await;
    let gate = Arc::new(Semaphore::new(0));
    server.fault(When::always(), Fault::HoldHead(gate.clone()));
    let all = (0..20).map(|index| fetch_right(&*origin, index * 50_000..(index + 1) * 50_000));
    let open_gate = async {
        held(&server, 4).await;
        gate.add_permits(20);
    };
    tokio::join!(futures_util::future::join_all(all), open_gate);
    assert_eq!(server.in_flight_max(), 4);
    assert_eq!(server.body_bytes(), 1 + LEN);
}

#[tokio::test]
async fn demand_does_not_wait_for_the_background() {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    let gate = Arc::new(Semaphore::new(0));
    server.fault(When::always(), Fault::HoldHead(gate.clone()));
    let stream = |index: u64| {
        let origin = origin.clone();
        async move {
            let mut sink = |_, _| ();
            origin
                .fetch(index * 10..index * 10 + 10, Class::Stream, &mut sink)
                .await
                .expect("served in the end");
        }
    };
    let streams: Vec<_> = (0..50).map(|index| tokio::spawn(stream(index))).collect();
    // As many as the background may have are in flight, the others wait.
    held(&server, 8).await;
    let demand = tokio::spawn({
        let origin = origin.clone();
        async move { fetch_right(&*origin, 999_000..LEN).await }
    });
    held(&server, 9).await;
    assert_eq!(asked(&server).last(), Some(&(999_000..LEN)), "demand overtakes the streams that wait");
    gate.add_permits(51);
    demand.await.expect("no panic");
    for stream in streams {
        stream.await.expect("no panic");
    }
    assert_eq!(server.body_bytes(), 1 + 500 + 1000);
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    for status in [500, 502, 503, 504, 408, 429] {
        assert_eq!(check_passes(Fault::Status { status, retry_after: None }).await, [RANGE, RANGE]);
    }
    let soon = Some("1".to_string());
    assert_eq!(check_passes(Fault::Status { status: 429, retry_after: soon }).await, [RANGE, RANGE]);
    assert_eq!(check_passes(Fault::Reset).await, [RANGE, RANGE]);
}

#[tokio::test]
async fn a_broken_body_is_resumed_where_it_broke() {
    assert_resumed(&check_passes(Fault::CutAfter(70_000)).await, 70_000);
    assert_resumed(&check_passes(Fault::ShortBody(70_000)).await, 70_000);
    let asked = check_passes(Fault::ResetAfter(70_000)).await;
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(
        asked[1].start >= RANGE.start && asked[1].end == RANGE.end,
        "a reset may take along what was sent"
    );
    let http2 = OriginOptions { http_version: HttpVersion::Http2, ..options() };
    assert_resumed(&check_passes_with(Fault::CutAfter(70_000), http2).await, 70_000);
}

#[tokio::test]
async fn a_stall_is_a_break_and_silence_before_the_head_too() {
    // 0.5 s of real time.
    let options = || OriginOptions { stall_timeout: Duration::from_secs(10), ..options() };
    // On a loaded machine the next request may be late as well: what counts is where it goes on.
    let asked = check_passes_with(Fault::StallAfter(70_000), options()).await;
    assert_resumed(&asked[..2], 70_000);
    let asked = check_passes_with(Fault::DelayHead(Duration::from_secs(600)), options()).await;
    assert_eq!(asked[..2], [RANGE, RANGE]);
}

#[tokio::test]
async fn what_does_not_pass_fails_at_once() {
    let status = |status| Fault::Status { status, retry_after: None };
    check_fails(status(404), "404 Not Found").await;
    check_fails(status(403), "403 Forbidden").await;
    check_fails(status(410), "410 Gone").await;
    check_fails(status(401), "401 Unauthorized").await;
    check_fails(Fault::IgnoreRange, "the server ignores range requests (answered 200)").await;
    let wrong = "bytes 100001-400000/1000000";
    check_fails(Fault::ContentRange(wrong.into()), &format!("asked for bytes 100000-399999, got {wrong}"))
        .await;
    let encoded = Fault::Header("content-encoding".into(), "gzip".into());
    check_fails(encoded, "the server sends the file encoded (Content-Encoding: \"gzip\")").await;
}

#[tokio::test]
async fn a_body_longer_than_its_range_is_refused() {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    server.fault(When::always(), Fault::LongBody(5));
    // One piece of the server, and then the surplus: whether it is there already when the range is full is up to the network,
    // but no byte of it may come out.
    match fetch(&*origin, 0..10).await {
        Ok(bytes) => assert!(bytes[..] == content().bytes(0..10)),
        Err(error) => {
            assert!(error.to_string().ends_with("the body is longer than its Content-Range"), "{error}")
        }
    }
}

#[tokio::test]
async fn another_version_is_never_mixed_in() {
    let changed =
        |etag: &str, len| Fault::Version { etag: Some(etag.into()), content: Content::seeded(2, len) };
    // The first answer is 412; the second request finds out what it is now.
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    server.fault(When::always(), changed("\"v2\"", LEN));
    let error = fetch(&*origin, RANGE).await.expect_err("another version");
    assert!(matches!(error, FetchError::Changed { .. }), "{error:?}");
    assert!(error.to_string().ends_with("ETag was \"v1\", is \"v2\""), "{error}");
    assert_eq!(asked(&server), [0..1, RANGE, RANGE]);

    let server = FaultyOrigin::start(OriginSpec {
        etag: None,
        last_modified: Some("Sun, 06 Nov 1994 08:49:37 GMT".into()),
        ..OriginSpec::new(content())
    });
    let server = server.await.expect("a port");
    let origin = opened(&server.url(), &options()).await;
    fetch_right(&*origin, RANGE).await;
    server
        .fault(When::always(), Fault::Header("last-modified".into(), "Mon, 07 Nov 1994 08:49:37 GMT".into()));
    let error = fetch(&*origin, RANGE).await.expect_err("another version");
    assert!(matches!(error, FetchError::Changed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_change_between_the_parts_of_a_resumed_body_is_seen() {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    server.fault(When::next(1), Fault::CutAfter(70_000));
    let content = Content::seeded(2, LEN);
    server.fault(When::always().after(1), Fault::Version { etag: Some("\"v2\"".into()), content });
    let mut got = Vec::new();
    let mut sink = |_, piece: bytes::Bytes| got.extend_from_slice(&piece);
    let result = origin.fetch(RANGE, Class::Demand, &mut sink).await;
    assert!(matches!(result, Err(FetchError::Changed { .. })), "{result:?}");
    let kept = RANGE.start..RANGE.start + got.len() as u64;
    assert!(got[..] == common::content().bytes(kept), "the pieces before the error are good");
}

#[tokio::test]
async fn a_server_that_compares_etags_wrongly_gets_no_condition() {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    server.fault(When::always(), Fault::DenyIfMatch);
    fetch_right(&*origin, 0..10).await;
    fetch_right(&*origin, 10..20).await;
    assert_eq!(asked(&server), [0..1, 0..10, 0..10, 10..20]);
}

#[tokio::test]
async fn what_cannot_be_an_origin_is_refused_at_open() {
    check_open_fails(Fault::Empty, "the file is empty").await;
    check_open_fails(Fault::IgnoreRange, "the server ignores range requests (answered 200)").await;
    check_open_fails(
        Fault::ContentRange("bytes 0-0/*".into()),
        "the server does not tell the length of the file",
    )
    .await;
    check_open_fails(
        Fault::NoHeader("content-range".into()),
        "206 without a Content-Range, asked for bytes 0-0",
    )
    .await;
    check_open_fails(Fault::Status { status: 404, retry_after: None }, "404 Not Found").await;
}

#[tokio::test]
async fn length_alone_is_noted() {
    let spec = OriginSpec { etag: None, ..OriginSpec::new(content()) };
    let server = FaultyOrigin::start(spec).await.expect("a port");
    let origin = opened(&server.url(), &options()).await;
    assert_eq!(origin.notes(), [OriginNote::LengthOnly]);
    assert_eq!(Validator::decode(&origin.validator()), Ok(Validator::LengthOnly { len: LEN }));
    fetch_right(&*origin, RANGE).await;
}

#[tokio::test]
async fn a_pinned_version_is_checked_at_open() {
    let server = faulty().await;
    let pin = |etag: &str, len| {
        let expect = Some(Version { validator: Validator::StrongETag(etag.into()), len });
        OriginOptions { expect, ..options() }
    };
    opened(&server.url(), &pin("\"v1\"", LEN)).await;
    for (etag, len, words) in
        [("\"v0\"", LEN, "ETag was \"v0\", is \"v1\""), ("\"v1\"", LEN - 1, "length was 999999, is 1000000")]
    {
        let error = open(&server.url(), &pin(etag, len)).await.map(|_| ()).expect_err("another version");
        assert!(matches!(error, FetchError::Changed { .. }), "{error:?}");
        assert!(error.to_string().ends_with(words), "{error}");
    }
}

#[tokio::test]
async fn an_origin_that_is_away_may_come_back() {
    let server = faulty().await;
    let first = opened(&server.url(), &options()).await;
    let expect = Version::decode(&first.validator(), first.len()).expect("our own encoding");
    server.vanish().await;

    let short = OriginOptions { probe_for: Duration::ZERO, retry_for: Duration::ZERO, ..options() };
    let error = open(&server.url(), &short).await.map(|_| ()).expect_err("nobody is there");
    assert!(matches!(error, FetchError::Away { attempts: 1, .. }), "{error:?}");
    assert!(error.to_string().contains("cannot connect"), "{error}");

    let pinned = OriginOptions { expect: Some(expect), reach: Reach::Preferred, ..short };
    let origin = opened(&server.url(), &pinned).await;
    assert!(matches!(origin.notes()[..], [OriginNote::NotReached { .. }]), "{:?}", origin.notes());
    assert_eq!(origin.len(), LEN);
    assert!(matches!(fetch(&*origin, RANGE).await, Err(FetchError::Away { .. })));

    let later = OriginOptions { reach: Reach::Later, ..pinned };
    server.come_back().await.expect("the port is still free");
    server.clear_log();
    let unasked = opened(&server.url(), &later).await;
    assert_eq!(server.log().len(), 0);
    fetch_right(&*origin, RANGE).await;
    fetch_right(&*unasked, RANGE).await;
    assert_eq!(asked(&server), [RANGE, RANGE]);
}

#[tokio::test]
async fn a_fetch_waits_for_an_origin_that_comes_back() {
    let server = faulty().await;
    let origin = opened(&server.url(), &options()).await;
    server.vanish().await;
    let coming_back = async {
        while origin.stats().retries < 2 {
            tokio::task::yield_now().await;
        }
        server.come_back().await.expect("the port is still free");
    };
    tokio::join!(fetch_right(&*origin, RANGE), coming_back);
}
