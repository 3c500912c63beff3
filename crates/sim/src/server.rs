//! Server: an HTTP server without a network. The origin's own scheduling, retries and validators run over it unchanged.
//!
//! - It serves files under URLs, each at a version that its ETag names. Delays and pieces are drawn from the runtime; faults come
//!   from the plan, by the number of the request.
//!
//! Not here: what the files hold (`world`).

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use readonce_origin::transport::{Body, Head, Request, Response, Transport, TransportError};
use readonce_storage::{BoxFuture, Rt};

use crate::plan::OriginFault;

/// A file at two versions; the second is what it changes to.
#[derive(Debug, Clone)]
pub struct Served {
    /// The one that is pinned.
    pub bytes: Bytes,
    /// Another one of the same length.
    pub changed: Bytes,
}

/// A probe asks for one byte.
const PROBE_BYTES: u64 = 1;

/// The server.
pub struct Server {
    rt: Rt,
    files: BTreeMap<String, Served>,
    /// Milliseconds before an answer, at most.
    delay_ms_max: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    requests: u64,
    faults: BTreeMap<u64, Vec<OriginFault>>,
    dead_until: u64,
    changed_until: u64,
    hits: u64,
    /// Answers that were not good.
    bad: u64,
    /// Met faults that asking again does not mend.
    hard_hits: u64,
    /// What was sent of each file so far, and how many bytes of that were sent again.
    sent: BTreeMap<String, BTreeMap<u64, u64>>,
    sent_again: u64,
}

impl State {
    /// Takes in that these bytes are sent.
    fn sends(&mut self, path: &str, range: Range<u64>) {
        let sent = self.sent.entry(path.to_owned()).or_default();
        let Range { mut start, mut end } = range.clone();
        while let Some((&from, &to)) = sent.range(..=end).next_back().filter(|&(_, &to)| to >= start) {
            self.sent_again += to.min(range.end).saturating_sub(from.max(range.start));
            sent.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        sent.insert(start, end);
    }
}

/// How a body goes.
struct Sent {
    rt: Rt,
    bytes: Bytes,
    delay_ms_max: u64,
    end: BodyEnd,
}

#[derive(Clone, Copy)]
enum BodyEnd {
    Whole,
    Cut,
    Stall,
}

impl Server {
    /// A server of these files, by path.
    pub fn new(rt: Rt, files: BTreeMap<String, Served>, delay_ms_max: u64) -> Arc<Self> {
        Arc::new(Self { rt, files, delay_ms_max, state: Mutex::default() })
    }

    /// Arms faults, counted from the next request.
    pub fn arm(&self, faults: impl IntoIterator<Item = (u64, OriginFault)>) {
        let mut state = self.state.lock();
        let from = state.requests;
        for (nth, fault) in faults {
            state.faults.entry(from + nth).or_default().push(fault);
        }
    }

    /// From now on all is well.
    pub fn heal(&self) {
        let mut state = self.state.lock();
        state.faults.clear();
        state.dead_until = 0;
        state.changed_until = 0;
    }

    /// Faults that were met.
    pub fn fault_hits(&self) -> u64 {
        self.state.lock().hits
    }

    /// Answers that were not good, so far.
    pub fn bad_answers(&self) -> u64 {
        self.state.lock().bad
    }

    /// Faults that were met and that asking again does not mend.
    pub fn hard_hits(&self) -> u64 {
        self.state.lock().hard_hits
    }

    /// Bytes that were sent before; what a probe asks for is not counted.
    pub fn sent_again(&self) -> u64 {
        self.state.lock().sent_again
    }

    async fn answer(&self, request: Request) -> Result<Response, TransportError> {
        let (mut fault, changed, dead) = {
            let mut state = self.state.lock();
            let number = state.requests;
            state.requests += 1;
            let mut fault = None;
            for armed in state.faults.remove(&number).unwrap_or_default() {
                state.hits += 1;
                state.hard_hits += u64::from(armed.is_hard());
                match armed {
                    OriginFault::Changed(count) => state.changed_until = number + count,
                    OriginFault::Dead(count) => state.dead_until = number + count,
                    other => fault = Some(other),
                }
            }
            (fault, number < state.changed_until, number < state.dead_until)
        };
        let mut delay = Duration::from_millis(self.rt.random() % (self.delay_ms_max + 1));
        if let Some(OriginFault::Slow(ms)) = fault {
            delay += Duration::from_millis(ms);
            fault = None;
        }
        self.rt.sleep(delay).await;
        if dead || changed || fault.is_some() {
            self.state.lock().bad += 1;
        }
        if dead {
            return Err(TransportError::Passing("connection refused".into()));
        }
        match fault {
            Some(OriginFault::Stall) => std::future::pending().await,
            Some(OriginFault::Reset) => Err(TransportError::Passing("connection reset".into())),
            Some(OriginFault::Status(status)) => Ok(self.empty(status, None)),
            Some(OriginFault::TooMany(wait)) => Ok(self.empty(429, Some(wait))),
            fault => Ok(self.file(&request, fault, changed)),
        }
    }

    fn empty(&self, status: u16, retry_after: Option<u64>) -> Response {
        let mut head = Head { status: StatusCode::from_u16(status).expect("a status"), ..Head::default() };
        if let Some(wait) = retry_after {
            head.headers.insert(header::RETRY_AFTER, HeaderValue::from(wait));
        }
        Response { head, body: self.body(Bytes::new(), BodyEnd::Whole) }
    }

    fn file(&self, request: &Request, fault: Option<OriginFault>, changed: bool) -> Response {
        let Some(served) = self.files.get(request.url.path()) else { return self.empty(404, None) };
        let all = if changed { &served.changed } else { &served.bytes };
        let etag = if changed { "\"changed\"" } else { "\"first\"" };
        if request.headers.get(header::IF_MATCH).is_some_and(|wanted| wanted != etag) {
            return self.empty(412, None);
        }
        let len = all.len() as u64;
        let Range { start, end } = request.range;
        if start >= len {
            return self.empty(416, None);
        }
        let end = end.min(len);
        let mut head = Head { status: StatusCode::PARTIAL_CONTENT, ..Head::default() };
        head.headers.insert(header::ETAG, HeaderValue::from_static(etag));
        head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(end - start));
        let mut say = |range: Range<u64>| {
            let text = format!("bytes {}-{}/{len}", range.start, range.end - 1);
            head.headers.insert(header::CONTENT_RANGE, text.parse().expect("plain text"));
        };
        say(start..end);
        let mut bytes = all.slice(start as usize..end as usize);
        let part = |of: u8| (bytes.len() * usize::from(of)) >> 8;
        let mut state = self.state.lock();
        let body_end = match fault {
            Some(OriginFault::Cut(of)) => {
                bytes.truncate(part(of));
                BodyEnd::Cut
            }
            Some(OriginFault::Truncate(of)) => {
                bytes.truncate(part(of));
                BodyEnd::Whole
            }
            Some(OriginFault::StallBody(of)) => {
                bytes.truncate(part(of));
                BodyEnd::Stall
            }
            Some(OriginFault::WrongRange) => {
                say(start + 1..end + 1);
                if end < len {
                    // And means it.
                    bytes = all.slice(start as usize + 1..end as usize + 1);
                }
                BodyEnd::Whole
            }
            Some(OriginFault::Longer) => {
                bytes = Bytes::from([&bytes[..], b"more"].concat());
                BodyEnd::Whole
            }
            Some(OriginFault::Whole) => {
                head.status = StatusCode::OK;
                head.headers.remove(header::CONTENT_RANGE);
                head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(len));
                bytes = all.clone();
                BodyEnd::Whole
            }
            _ => BodyEnd::Whole,
        };
        if end - start > PROBE_BYTES {
            state.sends(request.url.path(), start..start + bytes.len() as u64);
        }
        drop(state);
        Response { head, body: self.body(bytes, body_end) }
    }

    fn body(&self, bytes: Bytes, end: BodyEnd) -> Body {
        let sent = Sent { rt: self.rt.clone(), bytes, delay_ms_max: self.delay_ms_max, end };
        Box::pin(stream::unfold(sent, |mut sent| async move {
            let piece = sent.next().await?;
            Some((piece, sent))
        }))
    }
}

impl Sent {
    async fn next(&mut self) -> Option<Result<Bytes, TransportError>> {
        if self.bytes.is_empty() {
            return match self.end {
                BodyEnd::Whole => None,
                BodyEnd::Cut => {
                    self.end = BodyEnd::Whole;
                    Some(Err(TransportError::Passing("connection reset".into())))
                }
                BodyEnd::Stall => std::future::pending().await,
            };
        }
        let draw = self.rt.random();
        if !draw.is_multiple_of(4) {
            self.rt.sleep(Duration::from_millis((draw >> 8) % (self.delay_ms_max + 1))).await;
        }
        let len = (1 + (draw >> 32) % 40_000).min(self.bytes.len() as u64);
        Some(Ok(self.bytes.split_to(len as usize)))
    }
}

impl Transport for Server {
    fn get(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(self.answer(request))
    }
}
