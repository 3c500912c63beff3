//! How long the origin waits, on a scripted transport and invented time: nothing here takes real seconds.

mod common;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use common::fetch;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, StatusCode};
use readonce_origin::{
    FetchError, HttpOrigin, OriginOptions, Reach, Validator, Version,
    transport::{Body, Head, Request, Response, Transport, TransportError},
};
use readonce_storage::{BoxFuture, TokioRuntime};

const LEN: u64 = 100;

/// What the server does with one request.
#[derive(Clone)]
enum Act {
    /// Sends the range in pieces of so many bytes, each so long after the one before.
    Send { piece: usize, every: Duration },
    /// Sends so many bytes, then breaks off.
    Break { bytes: usize },
    /// Cannot be reached.
    Away,
    /// A certificate that is not trusted.
    Untrusted,
    /// Never answers.
    Silent,
    /// Sends so many bytes and nothing more.
    Stall { bytes: usize },
    /// A status, and what Retry-After says.
    Status(u16, Option<&'static str>),
}

/// Does the acts in turn, the last one for ever.
struct Script {
    acts: Mutex<VecDeque<Act>>,
    /// When each request came, and what it asked for.
    log: Mutex<Vec<(Duration, std::ops::Range<u64>)>>,
    start: tokio::time::Instant,
}

impl Transport for Script {
    fn get(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let mut acts = self.acts.lock().expect("no panic");
        let act = if acts.len() > 1 { acts.pop_front() } else { acts.front().cloned() };
        self.log.lock().expect("no panic").push((self.start.elapsed(), request.range.clone()));
        Box::pin(perform(act.expect("a script has an act"), request))
    }
}

fn bytes(range: std::ops::Range<u64>) -> Bytes {
    range.map(|at| at as u8).collect()
}

#[allow(clippy::disallowed_methods, reason = "tokio's clock is the invented one here")]
async fn perform(act: Act, request: Request) -> Result<Response, TransportError> {
    let broken = || Err(TransportError::Passing("connection reset".into()));
    let range = request.range.clone();
    let mut head = Head { status: StatusCode::PARTIAL_CONTENT, headers: HeaderMap::new() };
    let mut put = |name, value: String| {
        head.headers.insert(name, value.parse().expect("legal"));
    };
    put(http::header::ETAG, "\"v1\"".into());
    put(http::header::CONTENT_RANGE, format!("bytes {}-{}/{LEN}", range.start, range.end - 1));
    let body: Body = match act {
        Act::Away => return Err(TransportError::Passing("cannot connect: refused".into())),
        Act::Untrusted => {
            return Err(TransportError::Permanent("the TLS certificate is refused: expired".into()));
        }
        Act::Silent => std::future::pending().await,
        Act::Status(status, retry_after) => {
            head.status = StatusCode::from_u16(status).expect("legal");
            if let Some(value) = retry_after {
                head.headers.insert(http::header::RETRY_AFTER, value.parse().expect("legal"));
            }
            stream::empty().boxed()
        }
        Act::Send { piece, every } => {
            let pieces: Vec<_> = range.clone().step_by(piece).collect();
            stream::iter(pieces)
                .then(move |at| async move {
                    tokio::time::sleep(every).await;
                    Ok(bytes(at..(at + piece as u64).min(range.end)))
                })
                .boxed()
        }
        Act::Break { bytes: count } => {
            let sent = bytes(range.start..range.start + count as u64);
            stream::iter([Ok(sent), broken()]).boxed()
        }
        Act::Stall { bytes: count } => {
            let sent = bytes(range.start..range.start + count as u64);
            stream::iter([Ok(sent)]).chain(stream::pending()).boxed()
        }
    };
    Ok(Response { head, body })
}

struct Outcome {
    result: Result<Vec<u8>, FetchError>,
    log: Vec<(Duration, std::ops::Range<u64>)>,
    took: Duration,
}

/// Fetches everything from a server that does `acts`, with the default patience: 10 minutes, stalls of 30 seconds.
async fn run(acts: Vec<Act>) -> Outcome {
    run_for(OriginOptions::default().retry_for, acts).await
}

/// The same with another patience.
#[allow(clippy::disallowed_methods, reason = "tokio's clock is the invented one here")]
async fn run_for(retry_for: Duration, acts: Vec<Act>) -> Outcome {
    let start = tokio::time::Instant::now();
    let script = Arc::new(Script { acts: Mutex::new(acts.into()), log: Mutex::default(), start });
    let expect = Version { validator: Validator::StrongETag("\"v1\"".into()), len: LEN };
    let options =
        OriginOptions { expect: Some(expect), reach: Reach::Later, retry_for, ..OriginOptions::default() };
    let url = url::Url::parse("http://h/x").expect("a URL");
    let rt = TokioRuntime::current();
    let origin = HttpOrigin::open_with(script.clone(), &url, &options, &rt);
    let origin = origin.await.expect("nothing is asked");
    let result = fetch(&*origin, 0..LEN).await;
    let log = script.log.lock().expect("no panic").clone();
    Outcome { result, log, took: start.elapsed() }
}

#[track_caller]
fn assert_whole(outcome: &Outcome) {
    let got = outcome.result.as_ref().expect("it passes in the end");
    assert_eq!(got[..], bytes(0..LEN)[..]);
}

const MINUTE: Duration = Duration::from_secs(60);
const AT_ONCE: Act = Act::Send { piece: LEN as usize, every: Duration::ZERO };

#[tokio::test(start_paused = true)]
async fn a_slow_transfer_is_never_cut() {
    let outcome = run(vec![Act::Send { piece: 1, every: Duration::from_secs(29) }]).await;
    assert_whole(&outcome);
    assert_eq!(outcome.log.len(), 1);
    assert_eq!(outcome.took, Duration::from_secs(29) * LEN as u32);
}

#[tokio::test(start_paused = true)]
async fn silence_is_a_failure_after_half_a_minute() {
    let outcome = run(vec![Act::Silent, Act::Stall { bytes: 40 }, AT_ONCE]).await;
    assert_whole(&outcome);
    let ranges: Vec<_> = outcome.log.iter().map(|(_, range)| range.clone()).collect();
    assert_eq!(ranges, [0..LEN, 0..LEN, 40..LEN]);
    // Two stalls, and two first pauses of at most a quarter of a second each.
    assert!(outcome.took >= MINUTE && outcome.took < MINUTE + Duration::from_secs(1), "{:?}", outcome.took);
}

/// `--retry-for 5s` waited for half a minute: a guest's own timeout came before ours.
#[tokio::test(start_paused = true)]
async fn silence_is_waited_out_no_longer_than_patience_lasts() {
    let five = Duration::from_secs(5);
    let outcome = run_for(five, vec![Act::Silent]).await;
    let error = outcome.result.expect_err("never an answer");
    let words = "http://h/x: given up after 5 s, 1 attempt; last: no answer within 5 s";
    assert_eq!((error.to_string().as_str(), outcome.took), (words, five));

    // Bytes that arrive end the silence, and the rest is asked for.
    let outcome = run_for(five, vec![Act::Break { bytes: 99 }, Act::Silent]).await;
    assert!(outcome.result.is_err());
    assert_eq!(outcome.log.iter().map(|(_, range)| range.start).collect::<Vec<_>>(), [0, 99]);
    // Never again is one attempt, with all of its time.
    let slow = Act::Send { piece: LEN as usize, every: Duration::from_secs(20) };
    assert_whole(&run_for(Duration::ZERO, vec![slow]).await);
}

/// Each open of an image whose origin was away looked hung for ten seconds.
#[tokio::test(start_paused = true)]
#[allow(clippy::disallowed_methods, reason = "tokio's clock is the invented one here")]
async fn a_wait_at_open_is_told_once() {
    let told = |acts: Vec<Act>| async move {
        let start = tokio::time::Instant::now();
        let script = Arc::new(Script { acts: Mutex::new(acts.into()), log: Mutex::default(), start });
        let options = OriginOptions { probe_for: Duration::from_secs(10), ..OriginOptions::default() };
        let url = url::Url::parse("http://me:pass@h/x?sig=secret").expect("a URL");
        let lines = Lines::default();
        let _here = tracing::subscriber::set_default(lines.clone());
        let opened = HttpOrigin::open_with(script, &url, &options, &TokioRuntime::current()).await;
        let lines = lines.0.lock().expect("no panic").clone();
        (opened.is_ok(), start.elapsed().as_secs(), lines)
    };
    let line = vec!["waiting for http://h/x".to_owned()];
    assert_eq!(told(vec![Act::Silent]).await, (false, 10, line.clone()));
    assert_eq!(told(vec![Act::Away]).await, (false, 10, line));
    assert_eq!(told(vec![Act::Away, AT_ONCE]).await, (true, 0, vec![]));
    assert_eq!(told(vec![Act::Status(404, None)]).await, (false, 0, vec![]));
}

/// Keeps the sentences that a person would see: warnings.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut |_: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            self.0.lock().expect("no panic").push(format!("{value:?}"));
        });
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn patience_counts_from_the_last_byte() {
    let outcome = run(vec![Act::Break { bytes: 1 }, Act::Away]).await;
    let error = outcome.result.expect_err("it never comes back");
    let FetchError::Away { waited, attempts, .. } = &error else { panic!("{error:?}") };
    assert!(*waited >= 10 * MINUTE && *waited < 10 * MINUTE + Duration::from_secs(1), "{waited:?}");
    // Pauses that double up to half a minute: some two dozen in ten minutes, and not hundreds.
    assert!((20..60).contains(attempts), "{attempts}");
    assert!(error.to_string().starts_with("http://h/x: given up after 600 s, "), "{error}");
    assert!(error.to_string().ends_with("attempts; last: cannot connect: refused"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_origin_that_moves_is_never_given_up() {
    // Every attempt yields one byte and breaks: each is progress.
    let mut acts = vec![Act::Break { bytes: 1 }; LEN as usize - 1];
    acts.push(AT_ONCE);
    let outcome = run(acts).await;
    assert_whole(&outcome);
    let starts: Vec<_> = outcome.log.iter().map(|(_, range)| range.start).collect();
    assert_eq!(starts, (0..LEN).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn the_server_says_when_to_come_back() {
    let outcome = run(vec![Act::Status(503, Some("120")), AT_ONCE]).await;
    assert_whole(&outcome);
    assert_eq!(outcome.log.len(), 2);
    assert!(outcome.took >= 2 * MINUTE && outcome.took < 3 * MINUTE, "{:?}", outcome.took);
}

#[tokio::test(start_paused = true)]
async fn what_will_not_pass_is_not_waited_for() {
    for (act, words) in [
        (Act::Untrusted, "http://h/x: the TLS certificate is refused: expired"),
        (Act::Status(404, None), "http://h/x: 404 Not Found"),
    ] {
        let outcome = run(vec![act]).await;
        let error = outcome.result.expect_err("for good");
        assert!(matches!(error, FetchError::Permanent { .. }), "{error:?}");
        assert_eq!(error.to_string(), words);
        assert_eq!((outcome.log.len(), outcome.took), (1, Duration::ZERO));
    }
}
