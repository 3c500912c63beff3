//! Trace: what a guest once asked of its disk, and when. A JSON object on each line.
//!
//! - A trace that exists can be replayed: each request lies inside [`OFFSET_MAX`], is at most [`LEN_MAX`] long, and ends after it began.
//!
//! Not here: replaying it.

use serde::Deserialize;

/// Where the last byte of a request may lie.
pub const OFFSET_MAX: u64 = 1 << 62;
/// Bytes of one request, at most.
pub const LEN_MAX: u64 = 32 << 20;
/// Seconds from the first request to the end of the last, at most.
const SECONDS_MAX: f64 = 1e6;

/// A request.
#[derive(Debug, Clone, Deserialize)]
pub struct Request {
    /// What.
    pub op: Op,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// When it began, seconds.
    pub start: f64,
    /// When it ended, seconds.
    pub end: f64,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Bytes.
    Read,
    /// Bytes to be kept.
    Write,
    /// Zeros.
    Zero,
    /// What is there is not needed.
    Trim,
    /// What was written is to be durable.
    Flush,
}

/// A line that is no request.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct NoTrace {
    /// Counted from 1.
    pub line: usize,
    /// Why.
    pub why: String,
}

/// Reads a trace.
///
/// # Errors
/// The first line that is no request.
pub fn parse(text: &str) -> Result<Vec<Request>, NoTrace> {
    text.lines()
        .enumerate()
        .map(|(at, line)| one(line).map_err(|why| NoTrace { line: at + 1, why }))
        .collect()
}

fn one(line: &str) -> Result<Request, String> {
    let request: Request = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if request.len > LEN_MAX {
        return Err(format!("len {} is above {LEN_MAX}", request.len));
    }
    if request.offset > OFFSET_MAX - request.len {
        return Err(format!("offset {} is too large", request.offset));
    }
    if !(0.0 <= request.start && request.start <= request.end && request.end <= SECONDS_MAX) {
        return Err(format!("{} to {} is no time", request.start, request.end));
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_cannot_be_replayed_is_named() {
        let good = r#"{"op": "read", "offset": 0, "len": 512, "start": 0.0, "end": 5.1e-05}"#;
        assert_eq!(parse(good).expect("a request").len(), 1);
        for (from, to) in [
            ("512", "99999999999"),
            ("\"offset\": 0", "\"offset\": 18446744073709551615"),
            ("5.1e-05", "-1"),
            ("5.1e-05", "1e300"),
            ("read", "rewind"),
        ] {
            let text = format!("{good}\n{}", good.replace(from, to));
            assert_eq!(parse(&text).expect_err("no request").line, 2, "{to}");
        }
    }
}
