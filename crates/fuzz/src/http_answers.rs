//! Answers of a hostile HTTP origin: heads, bodies, silence, redirects.
//!
//! - An answer whose head claims nothing but the truth carries the file's bytes; any other carries bytes that are all wrong.
//!   So a byte that is handed out and is not the file's was taken from an answer that was lying.
//! - The list of bad answers ends; then the server is honest. A fetch that does not end is found by `exec`.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderName, HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use readonce_origin::{
    Class, Credentials, FetchError, HttpOrigin, Origin, OriginOptions, Reach, Validator, Version,
    transport::{Head, Request, Response, Transport, TransportError},
};
use readonce_storage::{BoxFuture, Rt};
use url::Url;

use crate::{draw::Draw, exec};

const ETAG: &str = "\"v1\"";
const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
/// In the URL and in the headers that go along; never to be told. Large letters: a host is small ones, whatever was sent.
const SECRET: &str = "S3CRET";

/// The byte of the file at an offset. No byte of an answer that lies is the same.
fn truth(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// What the server knows of versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Strong,
    Weak,
    Dated,
    Length,
}

impl Kind {
    fn validator(self, len: u64) -> Validator {
        match self {
            Self::Strong => Validator::StrongETag(ETAG.into()),
            Self::Weak => Validator::WeakETag { etag: ETAG.into(), len },
            Self::Dated => Validator::LastModified { date: DATE.into(), len },
            Self::Length => Validator::LengthOnly { len },
        }
    }
}

/// One answer's departure from what is right.
#[derive(Debug, Clone)]
enum Twist {
    Status(u16),
    /// Offsets added to first, last and total.
    Range(i8, i8, i8),
    RangeText(String),
    /// A second header of the name, with another value.
    Also(HeaderName, String),
    /// Instead of what is there.
    Header(HeaderName, String),
    Without(HeaderName),
    Redirect(u16, String),
    NoHead {
        passing: bool,
    },
    SilentHead,
}

#[derive(Debug, Clone)]
struct Answer {
    twists: Vec<Twist>,
    /// Bytes of a piece.
    piece: usize,
    /// Bytes after which something happens.
    end: Option<(usize, End)>,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Ends,
    Breaks,
    BreaksForGood,
    Silent,
    /// So many bytes more than were asked.
    Longer(u8),
}

struct Server {
    kind: Kind,
    len: u64,
    url: Url,
    answers: Mutex<std::vec::IntoIter<Answer>>,
    /// What the next request must ask for, while one fetch runs.
    next: Mutex<Option<Range<u64>>>,
}

fn answer(draw: &mut Draw<'_>) -> Answer {
    const NAMES: [HeaderName; 6] = [
        header::CONTENT_RANGE,
        header::CONTENT_LENGTH,
        header::CONTENT_ENCODING,
        header::CONTENT_TYPE,
        header::ETAG,
        header::LAST_MODIFIED,
    ];
    const VALUES: &[&str] = &[
        "",
        "bytes 0-0/1",
        "bytes 0-0/*",
        "bytes */0",
        "bytes */100",
        "bytes=0-0/100",
        "bytes 5-1/9",
        "BYTES 1-2/3",
        "0",
        "1",
        "-1",
        "+1",
        "18446744073709551616",
        "1, 1",
        "gzip",
        "identity",
        "identity, gzip",
        "Identity",
        "multipart/byteranges; boundary=x",
        "\"v1\"",
        "W/\"v1\"",
        "\"v2\"",
        "v1",
        "w/\"v1\"",
        "*",
        DATE,
        "Mon, 07 Nov 1994 08:49:37 GMT",
        " ",
        "\t",
    ];
    const PLACES: &[&str] = &[
        "/other",
        "//other/x",
        "http://h/img?sig=S3CRET",
        "http://user:S3CRET@evil/x",
        "https://h/img",
        "file:///etc/passwd",
        "",
        "?",
        "#",
        "http://",
        "http://h:99999/",
        "data:,x",
        "/\u{7f}",
        "http://h/loop",
        "HTTP://H/x",
    ];
    let text = |draw: &mut Draw<'_>| match draw.below(4) {
        0 => unknowing(String::from_utf8_lossy(draw.bytes(300)).into_owned()),
        _ => draw.of(VALUES).to_owned(),
    };
    let mut twists = Vec::new();
    for _ in 0..draw.of(&[0, 1, 1, 1, 2, 3]) {
        let name = NAMES[draw.index(NAMES.len())].clone();
        twists.push(match draw.below(12) {
            0 => Twist::Status(
                draw.of(&[200, 416, 412, 403, 404, 429, 500, 503, 206, 304, 100, 204, 599, 407, 401, 999]),
            ),
            1 | 2 => Twist::Range(draw.byte() as i8 % 3, draw.byte() as i8 % 3, draw.byte() as i8 % 3),
            3 => Twist::RangeText(text(draw)),
            4 | 5 => Twist::Also(name, text(draw)),
            6 | 7 => Twist::Header(name, text(draw)),
            8 => Twist::Without(name),
            9 => {
                let place = if draw.once_in(6) { text(draw) } else { draw.of(PLACES).to_owned() };
                Twist::Redirect(draw.of(&[301, 302, 303, 307, 308]), place)
            }
            10 => Twist::NoHead { passing: !draw.once_in(4) },
            _ => Twist::SilentHead,
        });
    }
    let end = draw.once_in(2).then(|| {
        let at = draw.index(600);
        let end = match draw.below(6) {
            0 => End::Ends,
            1 | 2 => End::Breaks,
            3 => End::BreaksForGood,
            4 => End::Silent,
            _ => End::Longer(draw.byte()),
        };
        (at, end)
    });
    Answer { twists, piece: 1 + draw.index(700), end }
}

/// A server may say what it likes, but for what we know and it does not. Nor may a URL of its own say that, which loses its tabs.
fn unknowing(text: String) -> String {
    if text.replace(['\t', '\r', '\n'], "").contains(SECRET) { String::new() } else { text }
}

/// Whether two headers say the same, as a list or apart.
fn same_text(name: &HeaderName, a: &str, b: &str) -> bool {
    let (a, b) = (a.trim(), b.trim());
    match *name {
        header::CONTENT_RANGE | header::CONTENT_ENCODING => a.eq_ignore_ascii_case(b),
        _ => a == b,
    }
}

impl Server {
    /// The head of the truth, and then twisted; and whether it still claims nothing but the truth.
    fn head(&self, range: &Range<u64>, twists: &[Twist]) -> (Head, bool) {
        let mut head = Head { status: StatusCode::PARTIAL_CONTENT, ..Head::default() };
        let value = |text: &str| HeaderValue::from_bytes(text.as_bytes()).ok();
        let content_range = |first: u64, last: u64, total: u64| format!("bytes {first}-{last}/{total}");
        let right = content_range(range.start, range.end - 1, self.len);
        let mut set = |name: HeaderName, text: &str| {
            head.headers.insert(name, value(text).expect("our own text"));
        };
        set(header::CONTENT_RANGE, &right);
        set(header::CONTENT_LENGTH, &(range.end - range.start).to_string());
        match self.kind {
            Kind::Strong => set(header::ETAG, ETAG),
            Kind::Weak => set(header::ETAG, &format!("W/{ETAG}")),
            Kind::Dated => {}
            Kind::Length => {}
        }
        if matches!(self.kind, Kind::Strong | Kind::Dated) {
            set(header::LAST_MODIFIED, DATE);
        }
        let honest = head.clone();
        for twist in twists {
            match twist {
                Twist::Status(status) => head.status = StatusCode::from_u16(*status).expect("three digits"),
                Twist::Range(first, last, total) => {
                    let add = |value: u64, more: i8| value.saturating_add_signed(more.into());
                    let text = content_range(
                        add(range.start, *first),
                        add(range.end - 1, *last),
                        add(self.len, *total),
                    );
                    head.headers.insert(header::CONTENT_RANGE, value(&text).expect("digits"));
                }
                Twist::RangeText(text) => {
                    if let Some(value) = value(text) {
                        head.headers.insert(header::CONTENT_RANGE, value);
                    }
                }
                Twist::Also(name, text) => {
                    if let Some(value) = value(text) {
                        head.headers.append(name.clone(), value);
                    }
                }
                Twist::Header(name, text) => {
                    if let Some(value) = value(text) {
                        head.headers.insert(name.clone(), value);
                    }
                }
                Twist::Without(name) => drop(head.headers.remove(name)),
                Twist::Redirect(status, place) => {
                    head.status = StatusCode::from_u16(*status).expect("three digits");
                    if let Some(value) = value(place) {
                        head.headers.insert(header::LOCATION, value);
                    }
                }
                Twist::NoHead { .. } | Twist::SilentHead => {}
            }
        }
        let claims_truth = self.claims_truth(&head, &honest);
        (head, claims_truth)
    }

    fn claims_truth(&self, head: &Head, honest: &Head) -> bool {
        let all = |name: &HeaderName| -> Vec<String> {
            let values = head.headers.get_all(name).iter();
            values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
        };
        let right =
            |name: &HeaderName| honest.headers.get(name).map_or("", |value| value.to_str().expect("our own"));
        let only = |name: &HeaderName| all(name).iter().all(|text| same_text(name, text, right(name)));
        let (range, etag, date) = (header::CONTENT_RANGE, header::ETAG, header::LAST_MODIFIED);
        let tags = all(&etag);
        let version = match self.kind {
            Kind::Strong => !tags.is_empty() && only(&etag),
            // Weak comparison.
            Kind::Weak => {
                !tags.is_empty()
                    && tags
                        .iter()
                        .all(|tag| tag.trim().trim_start_matches(['W', 'w']).trim_start_matches('/') == ETAG)
            }
            Kind::Dated => !all(&date).is_empty() && only(&date),
            Kind::Length => true,
        };
        let parts = all(&header::CONTENT_TYPE);
        head.status == StatusCode::PARTIAL_CONTENT
            && !all(&range).is_empty()
            && only(&range)
            && only(&header::CONTENT_LENGTH)
            && all(&header::CONTENT_ENCODING)
                .iter()
                .all(|text| same_text(&header::CONTENT_ENCODING, text, "identity"))
            && !parts.iter().any(|text| text.trim().starts_with("multipart/"))
            && version
    }

    fn check_request(&self, request: &Request) {
        assert!(
            request.range.start < request.range.end && request.range.end <= self.len.max(1),
            "{request:?}"
        );
        assert!(request.url.username().is_empty() && request.url.password().is_none());
        let own = (request.url.scheme(), request.url.host_str(), request.url.port_or_known_default())
            == (self.url.scheme(), self.url.host_str(), self.url.port_or_known_default());
        assert!(
            own || !request.headers.contains_key(header::AUTHORIZATION),
            "credentials go to {}",
            request.url
        );
        assert!(matches!(request.url.scheme(), "http" | "https"));
        if let Some(next) = &*self.next.lock() {
            assert_eq!(&request.range, next, "a byte is asked again");
        }
    }
}

struct HostileTransport(Arc<Server>);

impl Transport for HostileTransport {
    fn get(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        self.0.check_request(&request);
        let honest = Answer { twists: Vec::new(), piece: 1000, end: None };
        let answer = self.0.answers.lock().next().unwrap_or(honest);
        tell!("{:?} {:?}: {answer:?}", request.range, request.headers);
        let no_head = answer.twists.iter().find_map(|twist| match twist {
            Twist::NoHead { passing: true } => Some(TransportError::Passing("reset".into())),
            Twist::NoHead { passing: false } => Some(TransportError::Permanent("refused".into())),
            _ => None,
        });
        let is_silent = answer.twists.iter().any(|twist| matches!(twist, Twist::SilentHead));
        let (head, claims_truth) = self.0.head(&request.range, &answer.twists);
        tell!("  {head:?}, truth: {claims_truth}");
        let body = body(&request.range, &answer, claims_truth);
        Box::pin(async move {
            if is_silent {
                std::future::pending::<()>().await;
            }
            match no_head {
                Some(error) => Err(error),
                None => Ok(Response { head, body: Box::pin(body) }),
            }
        })
    }
}

fn body(
    range: &Range<u64>,
    answer: &Answer,
    claims_truth: bool,
) -> impl futures_util::Stream<Item = Result<Bytes, TransportError>> + Send + use<> {
    let mut bytes: Vec<u8> = range.clone().map(truth).collect();
    if !claims_truth {
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
    }
    let mut last = None;
    let mut is_silent = false;
    match answer.end {
        None => {}
        Some((_, End::Longer(more))) => {
            bytes.extend((0..u64::from(more)).map(|more| !truth(range.end + more)))
        }
        Some((at, end)) => {
            bytes.truncate(at);
            match end {
                End::Breaks => last = Some(Err(TransportError::Passing("reset".into()))),
                End::BreaksForGood => last = Some(Err(TransportError::Permanent("refused".into()))),
                End::Silent => is_silent = true,
                End::Ends | End::Longer(_) => {}
            }
        }
    }
    let mut pieces: Vec<_> =
        bytes.chunks(answer.piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    // Empty pieces are none.
    pieces.insert(pieces.len() / 2, Ok(Bytes::new()));
    pieces.extend(last);
    let silence = if is_silent { stream::pending().left_stream() } else { stream::empty().right_stream() };
    stream::iter(pieces).chain(silence)
}

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let kind = draw.of(&[Kind::Strong, Kind::Weak, Kind::Dated, Kind::Length]);
    let len = draw.of(&[1000, 1, 2, 512, 3000]);
    let version = Version { validator: kind.validator(len), len };
    let expect = match draw.below(4) {
        0 => None,
        1 => Some(Version { validator: Validator::StrongETag("\"v0\"".into()), len }),
        _ => Some(version.clone()),
    };
    let reach = draw.of(&[Reach::Required, Reach::Preferred, Reach::Later]);
    let seconds = |draw: &mut Draw<'_>| Duration::from_secs(draw.of(&[0, 1, 60, 3600]));
    let (retry_for, probe_for) = (seconds(&mut draw), seconds(&mut draw));
    let fetches: Vec<Range<u64>> = (0..1 + draw.below(4))
        .map(|_| {
            let start = draw.below(len);
            start..start + 1 + draw.below(len - start)
        })
        .collect();
    let url =
        Url::parse(draw.of(&["http://h/img?sig=S3CRET&id=1", "https://me:S3CRET@h/img"])).expect("our own");
    let mut answers = Vec::new();
    while !draw.is_done() && answers.len() < 24 {
        answers.push(answer(&mut draw));
    }
    let server = Server {
        kind,
        len,
        url: url.clone(),
        answers: Mutex::new(answers.into_iter()),
        next: Mutex::default(),
    };
    let options = OriginOptions {
        retry_for,
        probe_for,
        reach,
        expect,
        credentials: Arc::new(Credentials::none()),
        ..OriginOptions::default()
    };
    tell!("{kind:?} {len} {options:?} {fetches:?}");
    exec::run(|rt| session(Arc::new(server), options, version, fetches, rt));
}

async fn session(
    server: Arc<Server>,
    options: OriginOptions,
    version: Version,
    fetches: Vec<Range<u64>>,
    rt: Rt,
) {
    let transport = Arc::new(HostileTransport(server.clone()));
    let url = server.url.clone();
    let origin = match HttpOrigin::open_with(transport, &url, &options, &rt).await {
        Ok(origin) => origin,
        Err(error) => return is_silent(&error),
    };
    if let Some(expect) = &options.expect {
        assert_eq!(origin.validator(), expect.validator.encode(), "the pin is kept to");
    }
    // Opened at another version, all later answers are of it, or refused; which, is told by the tests with a model of both.
    let is_ours = origin.validator() == version.validator.encode()
        && readonce_storage::ReadAt::len(&*origin) == version.len;
    for range in fetches {
        if range.end > readonce_storage::ReadAt::len(&*origin) {
            continue;
        }
        *server.next.lock() = Some(range.clone());
        let mut at = range.start;
        let mut sink = |offset: u64, piece: Bytes| {
            assert_eq!(offset, at, "pieces follow each other");
            assert!(!piece.is_empty());
            for (offset, byte) in (offset..).zip(&piece) {
                assert!(
                    !is_ours || *byte == truth(offset),
                    "byte {offset} was taken from an answer that lies"
                );
            }
            at += piece.len() as u64;
            *server.next.lock() = Some(at..range.end);
        };
        let result = origin.fetch(range.clone(), Class::Demand, &mut sink).await;
        assert!(at <= range.end);
        match result {
            Ok(()) => assert_eq!(at, range.end, "all of it came"),
            Err(error) => is_silent(&error),
        }
    }
    assert!(!origin.name().contains(SECRET));
    origin.notes().iter().for_each(|note| assert!(note.to_string().len() < 4096));
}

fn is_silent(error: &FetchError) {
    let text = error.to_string();
    assert!(!text.contains(SECRET), "{text}");
    assert!(text.len() < 4096, "{} bytes of error", text.len());
}
