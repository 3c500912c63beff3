//! Response: what the head of a response means. Pure: no clock, no network.
//!
//! - A body counts only with `206`, exactly the range that was asked, a total, an agreeing Content-Length, no
//!   Content-Encoding, and the pinned version (I6). A header that can be said only once and is said in two ways is neither. Anything
//!   else never becomes guest data.
//! - What may pass is told apart from what will not.
//!
//! Not here: when to ask again (`retry`), where a redirect leads (`remote`).

use std::{ops::Range, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use crate::{Validator, Version, transport::Head, validator::brief};

/// What a head means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The body is the range that was asked, of this version (the pinned one, if there is one).
    Body(Version),
    /// It is elsewhere: the Location as sent.
    Redirect(String),
    /// A condition of ours was not met: probably another version.
    ConditionFailed,
    /// May pass; the server may have said when.
    Passing {
        /// In words.
        cause: String,
        /// What Retry-After asks for.
        wait: Option<Duration>,
    },
    /// 401, 403, 404, 410: will not pass, unless this is the target of a redirect that expired.
    Denied(String),
    /// Another version.
    Changed(String),
    /// Will not pass.
    Permanent(String),
}

/// Judges the head of the answer to a GET of `want` (not empty). `pinned`: the version that the answer must be of.
pub fn judge(head: &Head, want: &Range<u64>, pinned: Option<&Version>) -> Verdict {
    let status = head.status;
    if let (200 | 206 | 416, Some(name)) = (status.as_u16(), contradicted(&head.headers)) {
        return Verdict::Permanent(format!("the server sends {name} more than once, with different values"));
    }
    match status.as_u16() {
        206 => judge_partial(&head.headers, want, pinned),
        200 if content_length(&head.headers) == Ok(Some(0)) => empty(pinned),
        200 => Verdict::Permanent("the server ignores range requests (answered 200)".into()),
        301 | 302 | 303 | 307 | 308 => match text(&head.headers, header::LOCATION) {
            Some(location) => Verdict::Redirect(location.to_string()),
            None => Verdict::Permanent(format!("{} without a Location", words(status))),
        },
        401 | 403 | 404 | 410 => Verdict::Denied(words(status)),
        407 => Verdict::Permanent(format!("{}: the proxy wants a user and password", words(status))),
        412 => Verdict::ConditionFailed,
        416 => judge_unsatisfiable(&head.headers, want, pinned),
        // What the server cannot do at all will not come back by waiting.
        501 | 505 => Verdict::Permanent(words(status)),
        // Timed out, misdirected, too early, too many.
        408 | 421 | 425 | 429 => passing(status, &head.headers),
        500.. => passing(status, &head.headers),
        _ => Verdict::Permanent(words(status)),
    }
}

fn judge_partial(headers: &HeaderMap, want: &Range<u64>, pinned: Option<&Version>) -> Verdict {
    let permanent = Verdict::Permanent;
    let multipart = |kind: &HeaderValue| {
        kind.as_bytes().trim_ascii_start().to_ascii_lowercase().starts_with(b"multipart/byteranges")
    };
    if headers.get_all(header::CONTENT_TYPE).iter().any(multipart) {
        return permanent("the server answers one range with several parts (multipart/byteranges)".into());
    }
    let encoded = |encoding: &&HeaderValue| !encoding.as_bytes().eq_ignore_ascii_case(b"identity");
    if let Some(encoding) = headers.get_all(header::CONTENT_ENCODING).iter().find(encoded) {
        return permanent(format!(
            "the server sends the file encoded (Content-Encoding: {})",
            brief(&format!("{encoding:?}"))
        ));
    }
    let last = want.end.saturating_sub(1);
    let asked = format!("asked for bytes {}-{last}", want.start);
    let Some(sent) = text(headers, header::CONTENT_RANGE) else {
        return permanent(format!("206 without a Content-Range, {asked}"));
    };
    let sent = &brief(sent);
    let total = match ContentRange::parse(sent) {
        Some(ContentRange::Part { first, last: sent_last, total }) => {
            if first != want.start || sent_last != last {
                return permanent(format!("{asked}, got {sent}"));
            }
            match total {
                Some(total) => total,
                None => return permanent("the server does not tell the length of the file".into()),
            }
        }
        _ => return permanent(format!("Content-Range is '{sent}', {asked}")),
    };
    if total <= last {
        return permanent(format!("Content-Range is '{sent}': it ends past the end of the file"));
    }
    match content_length(headers) {
        Err(value) => return permanent(format!("Content-Length is '{}'", brief(&value))),
        Ok(Some(len)) if len != want.end.saturating_sub(want.start) => {
            return permanent(format!("Content-Length is {len} with Content-Range '{sent}'"));
        }
        Ok(_) => {}
    }
    let etag = text(headers, header::ETAG);
    let last_modified = text(headers, header::LAST_MODIFIED);
    let Some(pinned) = pinned else {
        return Verdict::Body(Version {
            validator: Validator::from_headers(etag, last_modified, total),
            len: total,
        });
    };
    if total != pinned.len {
        return Verdict::Changed(format!("length was {}, is {total}", pinned.len));
    }
    match pinned.validator.check_headers(etag, last_modified, total) {
        Ok(()) => Verdict::Body(pinned.clone()),
        Err(cause) => Verdict::Changed(cause),
    }
}

fn judge_unsatisfiable(headers: &HeaderMap, want: &Range<u64>, pinned: Option<&Version>) -> Verdict {
    let total = match text(headers, header::CONTENT_RANGE).and_then(ContentRange::parse) {
        Some(ContentRange::Unsatisfied { total }) => total,
        _ => None,
    };
    match (total, pinned) {
        (Some(0), _) => empty(pinned),
        (Some(total), Some(pinned)) if total != pinned.len => {
            Verdict::Changed(format!("length was {}, is {total}", pinned.len))
        }
        // Servers that give no Content-Range with it give it for the first byte of an empty file only.
        (None, None) if want.start == 0 => {
            Verdict::Permanent("the file is empty, or the server refuses ranges (416)".into())
        }
        _ => Verdict::Permanent(format!(
            "{} for bytes {}-{}",
            words(StatusCode::RANGE_NOT_SATISFIABLE),
            want.start,
            want.end.saturating_sub(1)
        )),
    }
}

fn empty(pinned: Option<&Version>) -> Verdict {
    match pinned {
        Some(pinned) => Verdict::Changed(format!("length was {}, the file is empty now", pinned.len)),
        None => Verdict::Permanent("the file is empty".into()),
    }
}

fn passing(status: StatusCode, headers: &HeaderMap) -> Verdict {
    Verdict::Passing { cause: words(status), wait: retry_after(headers) }
}

/// Seconds, or a date. A date counts from the server's own Date: its clock and ours may differ, and ours is not asked.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = text(headers, header::RETRY_AFTER)?.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let now = httpdate::parse_http_date(text(headers, header::DATE)?).ok()?;
    Some(until.duration_since(now).unwrap_or_default())
}

/// `404 Not Found`.
fn words(status: StatusCode) -> String {
    match status.canonical_reason() {
        Some(reason) => format!("{} {reason}", status.as_str()),
        None => status.as_str().to_string(),
    }
}

/// Headers of which there can be one, and the word for each.
const SINGLE: [(HeaderName, &str); 4] = [
    (header::CONTENT_RANGE, "Content-Range"),
    (header::CONTENT_LENGTH, "Content-Length"),
    (header::ETAG, "ETag"),
    (header::LAST_MODIFIED, "Last-Modified"),
];

/// A header that says two things: a cache or a proxy on the way put two answers into one.
fn contradicted(headers: &HeaderMap) -> Option<&'static str> {
    let differs = |name: &HeaderName| {
        let mut values = headers.get_all(name).iter().map(|value| value.as_bytes().trim_ascii());
        let first = values.next();
        values.any(|value| Some(value) != first)
    };
    SINGLE.iter().find(|(name, _)| differs(name)).map(|&(_, word)| word)
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn content_length(headers: &HeaderMap) -> Result<Option<u64>, String> {
    let Some(value) = headers.get(header::CONTENT_LENGTH) else { return Ok(None) };
    let digits = value.to_str().map(str::trim).unwrap_or_default();
    match digits.bytes().all(|byte| byte.is_ascii_digit()) {
        true => digits.parse().map(Some).map_err(|_| digits.to_string()),
        false => Err(digits.to_string()),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum ContentRange {
    /// `bytes 0-9/100`, or `/*`.
    Part { first: u64, last: u64, total: Option<u64> },
    /// `bytes */100`.
    Unsatisfied { total: Option<u64> },
}

impl ContentRange {
    fn parse(value: &str) -> Option<Self> {
        let value = value.trim();
        let (unit, rest) = value.split_once(' ')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (range, total) = rest.trim().split_once('/')?;
        let total = match total {
            "*" => None,
            digits => Some(number(digits)?),
        };
        if range == "*" {
            return Some(Self::Unsatisfied { total });
        }
        let (first, last) = range.split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        (first <= last).then_some(Self::Part { first, last, total })
    }
}

/// Digits and nothing else: `parse` alone would take a sign.
fn number(digits: &str) -> Option<u64> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Judges `status` and `headers` ("Name: value" lines) as the answer to bytes 10-19 of a file pinned to ETag "a" and
    /// 100 bytes; `sees` begins the verdict as `Debug` prints it.
    #[track_caller]
    fn check(status: u16, headers: &str, sees: &str) {
        check_with(status, headers, Some(&pin()), sees);
    }

    #[track_caller]
    fn check_with(status: u16, headers: &str, pinned: Option<&Version>, sees: &str) {
        let mut head = Head { status: StatusCode::from_u16(status).expect("a status"), ..Head::default() };
        for line in headers.split('\n').filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").expect("Name: value");
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            head.headers.append(name, value.parse().expect("a value"));
        }
        let verdict = format!("{:?}", judge(&head, &(10..20), pinned));
        assert!(verdict.starts_with(sees), "got {verdict}\nnot {sees}");
    }

    fn pin() -> Version {
        Version { validator: Validator::StrongETag("\"a\"".into()), len: 100 }
    }

    const GOOD: &str = "Content-Range: bytes 10-19/100\nContent-Length: 10\nETag: \"a\"";

    #[test]
    fn only_the_right_part_of_the_right_version_is_a_body() {
        check(206, GOOD, "Body(");
        check(206, "Content-Range: bytes 10-19/100\nETag: \"a\"", "Body(");
        check(206, "Content-Range: BYTES 10-19/100\nETag: \"a\"\nContent-Encoding: Identity", "Body(");
        check_with(206, GOOD, None, "Body(Version { validator: StrongETag(\"\\\"a\\\"\"), len: 100 })");
        check(206, "ETag: \"a\"", "Permanent(\"206 without a Content-Range");
        for range in ["10-18/100", "11-20/100", "10-20/100", "0-9/100", "9-19/100"] {
            let headers = format!("Content-Range: bytes {range}\nETag: \"a\"");
            check(206, &headers, &format!("Permanent(\"asked for bytes 10-19, got bytes {range}"));
        }
        for range in
            ["bytes 10-19", "bytes +10-19/100", "items 10-19/100", "bytes 19-10/100", "bytes */100", "x"]
        {
            check(206, &format!("Content-Range: {range}\nETag: \"a\""), "Permanent(\"Content-Range is '");
        }
        check(206, "Content-Range: bytes 10-19/19\nETag: \"a\"", "Permanent(\"Content-Range is ");
        check(
            206,
            "Content-Range: bytes 10-19/*\nETag: \"a\"",
            "Permanent(\"the server does not tell the length",
        );
        check(206, "Content-Range: bytes 10-19/100\nContent-Length: 9", "Permanent(\"Content-Length is 9");
        check(
            206,
            "Content-Range: bytes 10-19/100\nContent-Length: -9",
            "Permanent(\"Content-Length is '-9'",
        );
        check(
            206,
            &format!("{GOOD}\nContent-Encoding: gzip"),
            "Permanent(\"the server sends the file encoded",
        );
        check(
            206,
            "Content-Type: Multipart/byteranges; boundary=x",
            "Permanent(\"the server answers one range",
        );
    }

    /// The first of two ETags may be a stale cache's: its bytes would be kept as those of the pinned version.
    #[test]
    fn a_header_that_says_two_things_is_refused() {
        for (twice, word) in [
            ("ETag: \"b\"", "ETag"),
            ("Content-Range: bytes 10-19/101", "Content-Range"),
            ("Content-Length: 11", "Content-Length"),
            ("Last-Modified: x\nLast-Modified: y", "Last-Modified"),
        ] {
            let expect = format!("Permanent(\"the server sends {word} more than once");
            check(206, &format!("{GOOD}\n{twice}"), &expect);
            check_with(206, &format!("{GOOD}\n{twice}"), None, &expect);
        }
        check(206, &format!("{GOOD}\n{GOOD}"), "Body(");
        check(200, "Content-Length: 0\nContent-Length: 5", "Permanent(\"the server sends Content-Length");
        check(416, "Content-Range: bytes */0\nContent-Range: bytes */100", "Permanent(\"the server sends");
        let encoded = "Content-Encoding: identity\nContent-Encoding: gzip";
        check(206, &format!("{GOOD}\n{encoded}"), "Permanent(\"the server sends the file encoded");
        let parts = "Content-Type: text/plain\nContent-Type: multipart/byteranges";
        check(206, &format!("{GOOD}\n{parts}"), "Permanent(\"the server answers one range");
    }

    #[test]
    fn another_version_is_a_change() {
        check(206, "Content-Range: bytes 10-19/101\nETag: \"a\"", "Changed(\"length was 100, is 101");
        check(
            206,
            "Content-Range: bytes 10-19/100\nETag: \"b\"",
            "Changed(\"ETag was \\\"a\\\", is \\\"b\\\"",
        );
        check(206, "Content-Range: bytes 10-19/100", "Changed(\"ETag was \\\"a\\\", not there any more");
        check(416, "Content-Range: bytes */5", "Changed(\"length was 100, is 5");
        check(416, "Content-Range: bytes */0", "Changed(\"length was 100, the file is empty now");
        check(200, "Content-Length: 0", "Changed(\"length was 100, the file is empty now");
        check(412, "", "ConditionFailed");
    }

    #[test]
    fn a_whole_file_is_not_a_range() {
        check(200, "Content-Length: 100", "Permanent(\"the server ignores range requests (answered 200)");
        check_with(200, "Content-Length: 0", None, "Permanent(\"the file is empty");
        check_with(416, "Content-Range: bytes */0", None, "Permanent(\"the file is empty");
        check(416, "", "Permanent(\"416 Range Not Satisfiable for bytes 10-19");
    }

    #[test]
    fn what_passes_is_told_apart_from_what_does_not() {
        for status in [408, 421, 425, 429, 500, 502, 503, 504, 511, 520, 599] {
            check(status, "", "Passing {");
        }
        for status in [401, 403, 404, 410] {
            check(status, "", "Denied(");
        }
        for status in [204, 205, 300, 304, 305, 400, 405, 407, 451, 501, 505] {
            check(status, "", "Permanent(");
        }
        check(404, "", "Denied(\"404 Not Found\"");
        for status in [301, 302, 303, 307, 308] {
            check(status, "Location: /y", "Redirect(\"/y\")");
            check(status, "", "Permanent(");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        check(429, "Retry-After: 7", "Passing { cause: \"429 Too Many Requests\", wait: Some(7s) }");
        check(
            503,
            "Date: Sun, 06 Nov 1994 08:49:37 GMT\nRetry-After: Sun, 06 Nov 1994 08:50:07 GMT",
            "Passing { cause: \"503 Service Unavailable\", wait: Some(30s) }",
        );
        check(
            503,
            "Date: Sun, 06 Nov 1994 08:49:37 GMT\nRetry-After: Sun, 06 Nov 1994 08:49:07 GMT",
            "Passing { cause: \"503 Service Unavailable\", wait: Some(0ns) }",
        );
        check(503, "Retry-After: soon", "Passing { cause: \"503 Service Unavailable\", wait: None }");
    }
}
