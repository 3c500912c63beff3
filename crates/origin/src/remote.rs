//! HTTP origin: a file behind a URL, at one version.
//!
//! - Every response is judged before a byte of it is handed out (`response`); what the server sends beyond that is an error.
//! - A body that breaks off is resumed: only the rest of the range is asked again (I4).
//! - A redirect is resolved once. The resolved URL is kept until it is denied (an expired signature) or fails without an
//!   answer; then the first URL is asked again.
//! - Silence is waited out for no longer than the whole patience there is, be it for a probe or for a fetch.
//! - If-Match goes along with a strong ETag, so that a changed file costs no body. If-Range would answer with the whole file.
//!
//! Not here: bytes on the wire (`transport`), patience (`retry`), order (`schedule`), time limits (`stall`).

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, StreamExt, future::Either};
use http::{HeaderMap, HeaderValue, header};
use readonce_storage::{
    BoxFuture, ReadAt, Rt,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use url::Url;

use crate::{
    Class, Credentials, FetchError, Origin, OriginNote, OriginOptions, OriginStats, Reach, Sink,
    StatsSnapshot, Validator, Version,
    credentials::{HOST_VARIABLE, authority},
    http::HttpTransport,
    origin::counted,
    redirect,
    response::{Verdict, judge},
    retry::{Action, Retry},
    schedule::Places,
    signature,
    stall::StallWatch,
    transport::{Body, Request, Response, Transport, TransportError},
    validator::brief,
};

/// Requests of read-ahead, profile and stream in flight, together.
const BACKGROUND_REQUESTS_MAX: usize = 8;

/// The range of the probe: one byte, since a signed URL may refuse HEAD.
const PROBE: Range<u64> = 0..1;

/// A probe that takes longer is told of: a person waits, and may think that nothing happens.
const WAIT_TOLD_AFTER: Duration = Duration::from_secs(1);

/// The shortest silence that counts as a failure, however short the patience: a distant server may need that long.
const SILENCE_MIN: Duration = Duration::from_secs(1);

/// A file behind a URL.
pub struct HttpOrigin {
    remote: Remote,
    version: Version,
    notes: Vec<OriginNote>,
    places: Places,
    retry_for: Duration,
}

impl HttpOrigin {
    /// Opens it over the network.
    ///
    /// # Errors
    /// See [`crate::open()`].
    pub async fn open(url: &Url, options: &OriginOptions, rt: &Rt) -> Result<Arc<Self>, FetchError> {
        Self::open_with(Arc::new(HttpTransport::new(options)), url, options, rt).await
    }

    /// Opens it over a transport of the caller's.
    ///
    /// # Errors
    /// See [`crate::open()`].
    pub async fn open_with(
        transport: Arc<dyn Transport>,
        url: &Url,
        options: &OriginOptions,
        rt: &Rt,
    ) -> Result<Arc<Self>, FetchError> {
        let remote = Remote::new(transport, url, options, rt);
        let mut notes = Vec::new();
        // An image made beside a local file, and both served since: as for a file, only the length says more than "maybe".
        let is_file = |version: &&Version| matches!(version.validator, Validator::File { .. });
        let was_file = options.expect.as_ref().filter(is_file);
        let expect = options.expect.as_ref().filter(|version| !is_file(version));
        let version = match (expect, options.reach) {
            (Some(pinned), Reach::Later) => pinned.clone(),
            _ => match (remote.probe(expect, options.probe_for).await, expect, options.reach) {
                (Ok(version), ..) => version,
                (Err(FetchError::Away { cause, .. }), Some(pinned), Reach::Preferred) => {
                    notes.push(OriginNote::NotReached { cause });
                    pinned.clone()
                }
                (Err(error), ..) => return Err(error),
            },
        };
        if let Some(file) = was_file {
            if file.len != version.len {
                let cause = format!("length was {}, is {}", file.len, version.len);
                return Err(FetchError::Changed { origin: remote.name.clone(), cause });
            }
            let (expected, found) = (file.validator.to_string(), version.validator.to_string());
            notes.push(OriginNote::MayHaveChanged { expected, found });
        }
        if version.validator.is_length_only() {
            notes.push(OriginNote::LengthOnly);
        }
        let places = Places::new(options.connections_max, BACKGROUND_REQUESTS_MAX);
        Ok(Arc::new(Self { remote, version, notes, places, retry_for: options.retry_for }))
    }

    async fn fetch_range(&self, range: Range<u64>, class: Class, sink: Sink<'_>) -> Result<(), FetchError> {
        if range.start >= range.end {
            return Ok(());
        }
        if range.end > self.version.len {
            return Err(self.remote.permanent(format!(
                "bytes {}-{} are past the end of the file, {} bytes",
                range.start, range.end, self.version.len
            )));
        }
        let mut at = range.start;
        let mut place = self.places.take(class).await;
        let mut retry = Retry::new(self.remote.rt.now(), self.retry_for);
        loop {
            let rest = at..range.end;
            let mut take = |piece: Bytes| {
                let len = piece.len() as u64;
                sink(at, piece);
                at += len;
                self.remote.stats.add_bytes(len);
                retry.progress(self.remote.rt.now());
            };
            // No patience at all means one attempt, and that gets a whole one's time.
            let silence_max = match self.retry_for.is_zero() {
                true => self.remote.stall_timeout,
                false => self.remote.silence_max(self.retry_for),
            };
            let attempt = self.remote.attempt(rest, Some(&self.version), silence_max, &mut take);
            let error = match attempt.await {
                Ok(_) => return Ok(()),
                // The break came after the last byte.
                Err(Failure::Passing { .. }) if at == range.end => return Ok(()),
                Err(error) => error,
            };
            // A pause takes no place from others.
            drop(place);
            self.remote.pause(&mut retry, error).await?;
            place = self.places.take(class).await;
        }
    }
}

impl ReadAt for HttpOrigin {
    fn len(&self) -> u64 {
        self.version.len
    }

    fn read_now(&self, _offset: u64, _buf: &mut [u8]) -> Option<std::io::Result<()>> {
        None
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, std::io::Result<Bytes>> {
        Box::pin(async move {
            let end = offset.checked_add(len as u64).filter(|end| *end <= self.version.len);
            let end = end.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
            let mut pieces = BytesMut::with_capacity(len);
            let mut sink = |_, piece: Bytes| pieces.extend_from_slice(&piece);
            self.fetch_range(offset..end, Class::Demand, &mut sink).await.map_err(std::io::Error::other)?;
            Ok(pieces.freeze())
        })
    }
}

impl Origin for HttpOrigin {
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(self.fetch_range(range, class, sink))
    }

    fn may_read_now(&self, _offset: u64) -> bool {
        false
    }

    fn name(&self) -> String {
        self.remote.name.clone()
    }

    fn validator(&self) -> Vec<u8> {
        self.version.validator.encode()
    }

    fn notes(&self) -> Vec<OriginNote> {
        self.notes.clone()
    }

    fn stats(&self) -> StatsSnapshot {
        self.remote.stats.snapshot()
    }
}

/// Why one attempt failed.
enum Failure {
    Passing { cause: String, wait: Option<Duration> },
    Changed(String),
    Permanent(String),
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Passing(cause) => Self::Passing { cause, wait: None },
            TransportError::Permanent(cause) => Self::Permanent(cause),
        }
    }
}

/// The server's side: everything that does not depend on a version.
struct Remote {
    /// Printable.
    name: String,
    /// As given, without user and password.
    url: Url,
    credentials: Credentials,
    transport: Arc<dyn Transport>,
    rt: Rt,
    stall_timeout: Duration,
    /// Where redirects led, while that works.
    resolved: Mutex<Option<Url>>,
    /// Off once the server turned out to deny what it then delivers.
    if_match: AtomicBool,
    stats: OriginStats,
}

impl Remote {
    fn new(transport: Arc<dyn Transport>, url: &Url, options: &OriginOptions, rt: &Rt) -> Self {
        let mut credentials = Credentials::clone(&options.credentials);
        credentials.add_user_of(url);
        let mut bare = url.clone();
        // Both fail only for URLs that cannot have a user; http and https always can.
        let _ = bare.set_username("");
        let _ = bare.set_password(None);
        bare.set_fragment(None);
        Self {
            name: signature::cut(url).to_string(),
            url: bare,
            credentials,
            transport,
            rt: rt.clone(),
            stall_timeout: options.stall_timeout,
            resolved: Mutex::new(None),
            if_match: AtomicBool::new(true),
            stats: OriginStats::default(),
        }
    }

    /// How long an attempt may be silent where `limit` is all the patience there is.
    fn silence_max(&self, limit: Duration) -> Duration {
        self.stall_timeout.min(limit.max(SILENCE_MIN))
    }

    /// Finds the version by one byte; with `pinned` it must be that one. A wait is told of, once.
    async fn probe(&self, pinned: Option<&Version>, limit: Duration) -> Result<Version, FetchError> {
        let probing = std::pin::pin!(self.probe_silently(pinned, limit));
        match futures_util::future::select(probing, self.rt.sleep(WAIT_TOLD_AFTER)).await {
            Either::Left((found, _)) => found,
            Either::Right(((), probing)) => {
                tracing::warn!("waiting for {}", self.name);
                probing.await
            }
        }
    }

    async fn probe_silently(&self, pinned: Option<&Version>, limit: Duration) -> Result<Version, FetchError> {
        let mut retry = Retry::new(self.rt.now(), limit);
        loop {
            let mut ignore = |_| ();
            let patience = self.silence_max(limit);
            let attempt = self.attempt(PROBE, pinned, patience, &mut ignore);
            // A person waits: redirects and slow bytes do not prolong it.
            let error = match readonce_storage::runtime::timeout(&self.rt, patience, attempt).await {
                Ok(Ok(version)) => return Ok(version),
                Ok(Err(error)) => error,
                Err(_) => Failure::Passing { cause: no_answer(patience), wait: None },
            };
            self.pause(&mut retry, error).await?;
        }
    }

    /// After a failure: waits until it is time for the next attempt.
    ///
    /// # Errors
    /// There will be no next attempt.
    async fn pause(&self, retry: &mut Retry, error: Failure) -> Result<(), FetchError> {
        let (cause, wait) = match error {
            Failure::Passing { cause, wait } => (cause, wait),
            Failure::Changed(cause) => return Err(FetchError::Changed { origin: self.name.clone(), cause }),
            Failure::Permanent(cause) => return Err(self.permanent(cause)),
        };
        match retry.failed(self.rt.now(), wait, self.rt.random()) {
            Action::Again { delay } => {
                tracing::debug!(origin = %self.name, %cause, ?delay, "asking again");
                self.stats.add_retry();
                self.rt.sleep(delay).await;
                Ok(())
            }
            Action::GiveUp { waited, attempts } => {
                Err(FetchError::Away { origin: self.name.clone(), waited, attempts, cause })
            }
        }
    }

    fn permanent(&self, cause: String) -> FetchError {
        FetchError::Permanent { origin: self.name.clone(), cause }
    }

    /// Asks for `range` once, redirects included, and hands its bytes to `take` in order. It fails after `silence_max` without
    /// any.
    async fn attempt(
        &self,
        range: Range<u64>,
        pinned: Option<&Version>,
        silence_max: Duration,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<Version, Failure> {
        let mut watch = StallWatch::new(&self.rt, silence_max);
        let (mut url, mut from_memory) = match self.resolved.lock().clone() {
            Some(url) => (url, true),
            None => (self.url.clone(), false),
        };
        let mut conditional = self.if_match.load(Ordering::Relaxed);
        let mut hops = 0;
        loop {
            let headers = self.headers(&url, pinned.filter(|_| conditional));
            let request = Request { url: url.clone(), range: range.clone(), headers };
            self.stats.add_request();
            let Response { head, body } = match watch.guard(self.transport.get(request)).await {
                Ok(Ok(response)) => response,
                failed => {
                    self.forget_resolved();
                    let failure = match failed {
                        Ok(Err(error)) => error.into(),
                        _ => Failure::Passing { cause: no_answer(silence_max), wait: None },
                    };
                    return Err(self.located(failure, &url));
                }
            };
            let failure = match judge(&head, &range, pinned) {
                Verdict::Body(version) => {
                    if hops > 0 {
                        *self.resolved.lock() = Some(url.clone());
                    }
                    if !conditional && pinned.is_some() {
                        self.if_match.store(false, Ordering::Relaxed);
                    }
                    let len = range.end - range.start;
                    let done = self.take_body(body, len, &mut watch, take).await;
                    return done.map(|()| version).map_err(|failure| self.located(failure, &url));
                }
                Verdict::Redirect(location) => {
                    if hops == redirect::HOPS_MAX {
                        Failure::Permanent(format!("more than {hops} redirects"))
                    } else {
                        match redirect::target(&url, &location) {
                            Ok(target) => {
                                self.stats.add_redirect();
                                hops += 1;
                                url = target;
                                continue;
                            }
                            Err(cause) => Failure::Permanent(cause),
                        }
                    }
                }
                Verdict::Denied(_) if from_memory => {
                    // What was resolved before has expired: the first URL leads to a fresh one.
                    self.forget_resolved();
                    from_memory = false;
                    hops = 0;
                    url = self.url.clone();
                    continue;
                }
                Verdict::Denied(cause) => Failure::Permanent(self.hint(cause, &url)),
                Verdict::ConditionFailed if conditional => {
                    // Asked without a condition, the answer shows which version it is now. A server that then delivers the
                    // pinned version compares ETags wrongly, and gets no condition any more.
                    conditional = false;
                    continue;
                }
                Verdict::ConditionFailed => {
                    Failure::Permanent("412 Precondition Failed, without a condition".into())
                }
                Verdict::Passing { cause, wait } => {
                    self.forget_resolved();
                    Failure::Passing { cause, wait }
                }
                Verdict::Changed(cause) => Failure::Changed(cause),
                Verdict::Permanent(cause) => Failure::Permanent(cause),
            };
            return Err(self.located(failure, &url));
        }
    }

    /// Hands out exactly `len` bytes of the body, in pieces as they come.
    async fn take_body(
        &self,
        mut body: Body,
        len: u64,
        watch: &mut StallWatch<'_>,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Failure> {
        let longer = || Failure::Permanent("the body is longer than its Content-Range".into());
        let mut left = len;
        while left > 0 {
            let broken = |cause: String| Failure::Passing { cause, wait: None };
            match watch.guard(body.next()).await {
                Ok(Some(Ok(piece))) => {
                    left = left.checked_sub(piece.len() as u64).ok_or_else(longer)?;
                    if !piece.is_empty() {
                        take(piece);
                    }
                }
                Ok(Some(Err(TransportError::Passing(cause)))) => {
                    let left = counted(left, "byte");
                    return Err(broken(format!("the body broke off {left} early: {cause}")));
                }
                Ok(Some(Err(error))) => return Err(error.into()),
                Ok(None) => return Err(broken(format!("the body ended {} early", counted(left, "byte")))),
                Err(_) => {
                    let (silent, left) = (watch.limit().as_secs_f32(), counted(left, "byte"));
                    return Err(broken(format!("no byte for {silent} s, {left} before the end")));
                }
            }
        }
        // The end itself is not waited for, but what lies there already must not be data.
        match body.next().now_or_never() {
            Some(Some(Ok(piece))) if !piece.is_empty() => Err(longer()),
            _ => Ok(()),
        }
    }

    fn headers(&self, url: &Url, condition: Option<&Version>) -> HeaderMap {
        let mut headers = self.credentials.headers_for(url);
        if let Some(Version { validator: Validator::StrongETag(etag), .. }) = condition
            // Without quotes it is no ETag of the RFC, and a strict server would refuse the condition.
            && etag.starts_with('"')
            && let Ok(value) = HeaderValue::from_str(etag)
        {
            headers.insert(header::IF_MATCH, value);
        }
        headers
    }

    fn forget_resolved(&self) {
        *self.resolved.lock() = None;
    }

    /// Names the redirect's target where the failure is there.
    fn located(&self, failure: Failure, url: &Url) -> Failure {
        if *url == self.url {
            return failure;
        }
        let at = |cause: String| format!("{cause} (redirected to {})", brief(signature::cut(url).as_str()));
        match failure {
            Failure::Passing { cause, wait } => Failure::Passing { cause: at(cause), wait },
            Failure::Changed(cause) => Failure::Changed(at(cause)),
            Failure::Permanent(cause) => Failure::Permanent(at(cause)),
        }
    }

    /// What a person may have missed where credentials are at hand and none of them was sent.
    fn hint(&self, cause: String, url: &Url) -> String {
        let denied = cause.starts_with("401") || cause.starts_with("403");
        if !denied || !self.credentials.headers_for(url).is_empty() {
            return cause;
        }
        let here = authority(url);
        let bound = self.credentials.places();
        if let Some(variable) = self.credentials.bound_to_no_host() {
            format!(
                "{cause}; {variable} is set, but not for which host: it is sent with {HOST_VARIABLE}={here}"
            )
        } else if bound.is_empty() {
            cause
        } else {
            let bound = brief(&bound.join(", "));
            format!("{cause}; the credentials that were given are for {bound}, not for {here}")
        }
    }
}

fn no_answer(waited: Duration) -> String {
    format!("no answer within {} s", waited.as_secs_f32())
}
