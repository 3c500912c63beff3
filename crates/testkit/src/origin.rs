//! A faulty HTTP origin: a real server on the loopback that does wrong what a script tells it.
//!
//! - HTTP/1.1, and HTTP/2 without TLS. Content is generated, so a file may be larger than memory.
//! - Every request is logged, and every body byte counted, as it is handed to the connection.
//! - It can vanish and come back at the same port, and stand behind a [`Link`].
//! - Like a signed URL it refuses HEAD, unless it is told to allow it.
//!
//! Not here: TLS (tests use nginx for it).

#![allow(clippy::disallowed_methods, reason = "a server has real tasks and real time")]

use std::{
    io,
    net::SocketAddr,
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    content::Content,
    origin_body::{Break, FaultyBody},
    origin_fault::{Fault, When},
    shaper::{Link, LinkSpec},
};

/// Path of the file in [`FaultyOrigin::url`]. Every other path serves the same file.
pub const PATH: &str = "/image";

/// What to serve, and how.
#[derive(Debug, Clone)]
pub struct OriginSpec {
    /// The file.
    pub content: Content,
    /// ETag, as sent, with quotes.
    pub etag: Option<String>,
    /// Last-Modified, as sent.
    pub last_modified: Option<String>,
    /// A header that every request must have; others get 401.
    pub require: Option<(String, String)>,
    /// The link before it.
    pub link: Option<LinkSpec>,
}

impl OriginSpec {
    /// A file with a strong ETag, served to everybody, as fast as it goes.
    pub fn new(content: Content) -> Self {
        Self { content, etag: Some("\"v1\"".to_string()), last_modified: None, require: None, link: None }
    }
}

/// One request, as it was answered.
#[derive(Debug, Clone)]
pub struct LogEntry {
    /// Since the origin started.
    pub at: Duration,
    /// Path and query.
    pub target: String,
    /// The bytes that it asked for, if it asked for a range.
    pub range: Option<Range<u64>>,
    /// Its headers.
    pub headers: HeaderMap,
    /// HTTP/1.1 or HTTP/2.
    pub version: Version,
    /// Status of the response; 0 when there was none.
    pub status: u16,
    /// Body bytes handed to the connection so far.
    pub body_bytes: u64,
}

/// A running origin. Dropped, it cuts its connections and is gone.
pub struct FaultyOrigin {
    shared: Arc<Shared>,
    addr: SocketAddr,
    link: Option<Link>,
    stop: Mutex<(CancellationToken, TaskTracker)>,
}

struct Shared {
    spec: Mutex<OriginSpec>,
    faults: Mutex<Vec<(When, Fault)>>,
    log: Mutex<Vec<(LogEntry, Arc<Answered>)>>,
    body_bytes: Arc<AtomicU64>,
    connections: AtomicU64,
    in_flight: AtomicU64,
    in_flight_max: AtomicU64,
    started: Instant,
}

/// What is known of a request only after it was logged.
#[derive(Default)]
struct Answered {
    status: AtomicU16,
    body_bytes: Arc<AtomicU64>,
}

impl FaultyOrigin {
    /// Starts an origin on a free port of the loopback, on the current tokio runtime.
    ///
    /// # Errors
    /// No port can be bound.
    pub async fn start(spec: OriginSpec) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?;
        let link = match spec.link {
            Some(link) => Some(Link::start(addr, link).await?),
            None => None,
        };
        let shared = Arc::new(Shared {
            spec: Mutex::new(spec),
            faults: Mutex::default(),
            log: Mutex::default(),
            body_bytes: Arc::default(),
            connections: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
            started: Instant::now(),
        });
        let stop = serve(listener, shared.clone());
        Ok(Self { shared, addr, link, stop: Mutex::new(stop) })
    }

    /// URL of the file, through the link if there is one.
    pub fn url(&self) -> String {
        self.url_of(PATH)
    }

    /// URL of another path (beginning with `/`).
    pub fn url_of(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr())
    }

    /// Where clients connect to: the link if there is one.
    pub fn addr(&self) -> SocketAddr {
        self.link.as_ref().map_or(self.addr, Link::addr)
    }

    /// The link, if there is one.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// Adds a fault. Of several that meet a request all take effect, the later one where they contradict.
    pub fn fault(&self, when: When, fault: Fault) {
        self.shared.faults.lock().push((when, fault));
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.shared.faults.lock().clear();
    }

    /// Serves another file from now on.
    pub fn replace(&self, content: Content, etag: Option<&str>) {
        let mut spec = self.shared.spec.lock();
        spec.content = content;
        spec.etag = etag.map(str::to_string);
    }

    /// Every request so far, in order of arrival.
    pub fn log(&self) -> Vec<LogEntry> {
        let log = self.shared.log.lock();
        log.iter()
            .map(|(entry, answered)| LogEntry {
                status: answered.status.load(Ordering::Relaxed),
                body_bytes: answered.body_bytes.load(Ordering::Relaxed),
                ..entry.clone()
            })
            .collect()
    }

    /// Empties the log; the counters go on.
    pub fn clear_log(&self) {
        self.shared.log.lock().clear();
    }

    /// Body bytes of all responses, as handed to the connections.
    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::Relaxed)
    }

    /// Connections that were accepted.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Requests that wait for their head now.
    pub fn in_flight(&self) -> u64 {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// The most requests that were waiting for their head at once.
    pub fn in_flight_max(&self) -> u64 {
        self.shared.in_flight_max.load(Ordering::Relaxed)
    }

    /// Cuts every connection and refuses new ones.
    pub async fn vanish(&self) {
        let (stop, tasks) = self.stop.lock().clone();
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }

    /// Listens again at the same port, after [`FaultyOrigin::vanish`].
    ///
    /// # Errors
    /// Somebody else has taken the port.
    pub async fn come_back(&self) -> io::Result<()> {
        let listener = TcpListener::bind(self.addr).await?;
        *self.stop.lock() = serve(listener, self.shared.clone());
        Ok(())
    }
}

impl Drop for FaultyOrigin {
    fn drop(&mut self) {
        self.stop.lock().0.cancel();
    }
}

fn serve(listener: TcpListener, shared: Arc<Shared>) -> (CancellationToken, TaskTracker) {
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(accept(listener, shared, stop.clone(), tasks.clone()));
    (stop, tasks)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken, tasks: TaskTracker) {
    loop {
        let socket = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => socket,
                // No file descriptor left, or a client that is gone already.
                Err(_) => { tokio::time::sleep(Duration::from_millis(10)).await; continue }
            },
        };
        let _ = socket.set_nodelay(true);
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let (shared, stop) = (shared.clone(), stop.clone());
        tasks.spawn(async move {
            let reset = Arc::new(AtomicBool::new(false));
            let io = TokioIo::new(Resettable { socket, reset: reset.clone() });
            let service = service_fn(|request| answer(request, shared.clone(), reset.clone()));
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder.http1().timer(TokioTimer::new());
            builder.http2().timer(TokioTimer::new());
            let connection = builder.serve_connection(io, service);
            tokio::select! {
                () = stop.cancelled() => {}
                // A connection that the client or the script broke is no error of ours.
                _ = connection => {}
            }
        });
    }
}

/// A request that was counted as in flight.
struct InFlight<'a>(&'a AtomicU64);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the faults of one request come to.
#[derive(Default)]
struct Plan {
    delay: Duration,
    gate: Option<Arc<Semaphore>>,
    breaks: Option<(u64, Break)>,
    sized: bool,
    extra: u64,
    reset: bool,
    status: Option<(u16, Option<String>)>,
    content_range: Option<String>,
    ignore_range: bool,
    redirect: Option<(u16, String)>,
    headers: Vec<(String, Option<String>)>,
    deny_if_match: bool,
    allow_head: bool,
}

impl Plan {
    fn add(&mut self, fault: Fault, spec: &mut OriginSpec) {
        match fault {
            Fault::DelayHead(duration) => self.delay = duration,
            Fault::HoldHead(gate) => self.gate = Some(gate),
            Fault::StallAfter(bytes) => self.breaks = Some((bytes, Break::Stall)),
            Fault::PauseAfter(bytes, duration) => self.breaks = Some((bytes, Break::Pause(duration))),
            Fault::CutAfter(bytes) => self.breaks = Some((bytes, Break::Cut)),
            Fault::ResetAfter(bytes) => self.breaks = Some((bytes, Break::Reset)),
            Fault::Reset => self.reset = true,
            Fault::Status { status, retry_after } => self.status = Some((status, retry_after)),
            Fault::ContentRange(value) => self.content_range = Some(value),
            Fault::IgnoreRange => self.ignore_range = true,
            Fault::ShortBody(bytes) => {
                self.breaks = Some((bytes, Break::End));
                self.sized = false;
            }
            Fault::LongBody(bytes) => {
                self.extra = bytes;
                self.sized = false;
            }
            Fault::Redirect { status, location } => self.redirect = Some((status, location)),
            Fault::Empty => spec.content = Content::Given(Bytes::new()),
            Fault::Version { etag, content } => {
                spec.etag = etag;
                spec.content = content;
            }
            Fault::Header(name, value) => self.headers.push((name, Some(value))),
            Fault::NoHeader(name) => self.headers.push((name, None)),
            Fault::DenyIfMatch => self.deny_if_match = true,
            Fault::AllowHead => self.allow_head = true,
        }
    }
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    reset: Arc<AtomicBool>,
) -> Result<Response<FaultyBody>, io::Error> {
    let mut spec = shared.spec.lock().clone();
    let mut plan = Plan { sized: true, ..Plan::default() };
    for (when, fault) in shared.faults.lock().iter_mut() {
        if when.meets(request.uri().path()) {
            plan.add(fault.clone(), &mut spec);
        }
    }
    let answered = shared.record(&request);
    let now = shared.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
    shared.in_flight_max.fetch_max(now, Ordering::Relaxed);
    let in_flight = InFlight(&shared.in_flight);
    if !plan.delay.is_zero() {
        tokio::time::sleep(plan.delay).await;
    }
    if let Some(gate) = &plan.gate {
        gate.acquire().await.expect("a gate is not closed").forget();
    }
    drop(in_flight);
    if plan.reset {
        reset.store(true, Ordering::Relaxed);
        return Err(io::Error::other("reset by the script"));
    }
    let (mut head, range) = head_of(&request, &spec, &plan);
    for (name, value) in &plan.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a script's header has a legal name");
        head.headers.remove(&name);
        if let Some(value) = value {
            head.headers.insert(name, value.parse().expect("a script's header has a legal value"));
        }
    }
    answered.status.store(head.status.as_u16(), Ordering::Relaxed);
    let has_body = range.start < range.end;
    let body = FaultyBody {
        content: spec.content,
        range,
        extra: if has_body { plan.extra } else { 0 },
        breaks: plan.breaks.filter(|_| has_body),
        sized: plan.sized,
        counts: [shared.body_bytes.clone(), answered.body_bytes.clone()],
        reset,
        reset_at_end: false,
        pause: None,
    };
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}

impl Shared {
    /// Logs a request; returns what is to be filled in later.
    fn record(&self, request: &Request<Incoming>) -> Arc<Answered> {
        let target = request.uri().path_and_query().map_or_else(String::new, ToString::to_string);
        let entry = LogEntry {
            at: self.started.elapsed(),
            target,
            range: asked_range(request.headers(), u64::MAX).ok().flatten(),
            headers: request.headers().clone(),
            version: request.version(),
            status: 0,
            body_bytes: 0,
        };
        let answered = Arc::new(Answered::default());
        self.log.lock().push((entry, answered.clone()));
        answered
    }
}

struct Head {
    status: StatusCode,
    headers: HeaderMap,
}

/// The head, and the part of the file that is the body.
fn head_of(request: &Request<Incoming>, spec: &OriginSpec, plan: &Plan) -> (Head, Range<u64>) {
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, value: &str| {
        headers.insert(name, HeaderValue::from_str(value).expect("a script's header has a legal value"));
    };
    let len = spec.content.len();
    let status = |code: u16| StatusCode::from_u16(code).expect("a script's status is legal");
    if let Some((code, retry_after)) = &plan.status {
        if let Some(value) = retry_after {
            put(header::RETRY_AFTER, value);
        }
        return (Head { status: status(*code), headers }, 0..0);
    }
    if let Some((code, location)) = &plan.redirect {
        put(header::LOCATION, location);
        return (Head { status: status(*code), headers }, 0..0);
    }
    if request.method() != Method::GET && !(plan.allow_head && request.method() == Method::HEAD) {
        return (Head { status: StatusCode::METHOD_NOT_ALLOWED, headers }, 0..0);
    }
    if let Some((name, value)) = &spec.require
        && request.headers().get(name).is_none_or(|sent| sent.as_bytes() != value.as_bytes())
    {
        return (Head { status: StatusCode::UNAUTHORIZED, headers }, 0..0);
    }
    put(header::ACCEPT_RANGES, "bytes");
    if let Some(etag) = &spec.etag {
        put(header::ETAG, etag);
    }
    if let Some(date) = &spec.last_modified {
        put(header::LAST_MODIFIED, date);
    }
    if let Some(wanted) = request.headers().get(header::IF_MATCH)
        && (plan.deny_if_match || spec.etag.as_ref().is_none_or(|etag| wanted.as_bytes() != etag.as_bytes()))
    {
        return (Head { status: StatusCode::PRECONDITION_FAILED, headers }, 0..0);
    }
    let range = if plan.ignore_range { Ok(None) } else { asked_range(request.headers(), len) };
    match range {
        Ok(Some(range)) => {
            let right = format!("bytes {}-{}/{len}", range.start, range.end - 1);
            put(header::CONTENT_RANGE, plan.content_range.as_deref().unwrap_or(&right));
            (Head { status: StatusCode::PARTIAL_CONTENT, headers }, range)
        }
        Ok(None) => (Head { status: StatusCode::OK, headers }, 0..len),
        Err(Unsatisfiable) => {
            put(header::CONTENT_RANGE, &format!("bytes */{len}"));
            (Head { status: StatusCode::RANGE_NOT_SATISFIABLE, headers }, 0..0)
        }
    }
}

struct Unsatisfiable;

/// The one range that was asked; a header that is not understood is ignored, as RFC 9110 says.
fn asked_range(headers: &HeaderMap, len: u64) -> Result<Option<Range<u64>>, Unsatisfiable> {
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes="));
    let Some((first, last)) = range.and_then(|range| range.split_once('-')) else { return Ok(None) };
    let Ok(first) = first.parse::<u64>() else { return Ok(None) };
    let last = match last {
        "" => u64::MAX,
        digits => match digits.parse::<u64>() {
            Ok(last) if last >= first => last,
            _ => return Ok(None),
        },
    };
    if first >= len {
        return Err(Unsatisfiable);
    }
    Ok(Some(first..last.saturating_add(1).min(len)))
}

/// A socket that can be told to end with a reset.
struct Resettable {
    socket: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Resettable {
    /// An error once the reset is wanted; the socket then sends it as it is dropped.
    fn check(&self) -> io::Result<()> {
        if self.reset.load(Ordering::Relaxed) {
            self.socket.set_zero_linger()?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

impl Drop for Resettable {
    fn drop(&mut self) {
        // A body that breaks off ends the connection without another write.
        let _ = self.check();
    }
}

impl AsyncRead for Resettable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Resettable {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.socket).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}
