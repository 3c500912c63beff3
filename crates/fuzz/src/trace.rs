//! Traces: any text. What is taken can be replayed, and is the same when it is read line by line.

use readonce_testkit::trace::{LEN_MAX, OFFSET_MAX, parse};

use crate::draw::Draw;

const PIECES: &[&str] = &[
    r#"{"op": "read", "offset": 512, "len": 512, "start": 0.5, "end": 1e0}"#,
    "{",
    "}",
    "\"op\": ",
    "\"read\"",
    "\"flush\"",
    "\"offset\": ",
    "\"len\": ",
    "\"start\": ",
    "\"end\": ",
    ", ",
    "0",
    "-1",
    "1e308",
    "18446744073709551615",
    "NaN",
    "null",
    "[",
    "\"",
    "\\u0000",
    "\n",
    "\r\n",
    "\u{e9}",
];

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let text = if draw.once_in(2) {
        String::from_utf8_lossy(draw.rest()).into_owned()
    } else {
        (0..draw.below(24)).map(|_| draw.of(PIECES)).collect()
    };
    let lines: Vec<_> = text.lines().map(|line| parse(&format!("{line}\n"))).collect();
    match parse(&text) {
        Ok(requests) => {
            assert_eq!(requests.len(), lines.len());
            for request in requests {
                assert!(request.len <= LEN_MAX);
                assert!(request.offset.checked_add(request.len).is_some_and(|end| end <= OFFSET_MAX));
                assert!(request.start >= 0.0 && request.end >= request.start && request.end.is_finite());
            }
        }
        Err(error) => {
            assert!(lines[error.line - 1].is_err(), "{error}");
            assert!(lines[..error.line - 1].iter().all(Result::is_ok), "{error} is not the first");
        }
    }
}
