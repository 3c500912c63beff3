//! Why a layer could not read, write or flush. Shared by all who waited for the same thing.

use std::ops::Range;

use readonce_format::FormatError;
use readonce_origin::FetchError;
use readonce_storage::flat::is_no_space;

use crate::DeviceError;

/// An error of one layer of a chain.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LayerError {
    /// The image breaks its format's rules there; never tried again.
    #[error("the image is corrupt: {0}")]
    Corrupt(String),
    /// The backing could not be read; this request fails, the next tries again.
    #[error("{0}")]
    Backing(#[from] FetchError),
    /// The backing is not there for us: refused, not opened, or never to be asked (`--on-change=offline`).
    #[error("{0}")]
    NoBacking(String),
    /// A local read failed; this request fails.
    #[error("{0}")]
    Io(String),
    /// No room in the image's file system; this request fails.
    #[error("{0}")]
    NoSpace(String),
    /// An earlier write or sync of the image failed: writes and flushes fail until it is opened again.
    #[error("writes are off since an earlier failure: {0}")]
    Latched(String),
    /// The image was closed, and is clean, without these bytes that its guest had written and not flushed.
    #[error("could not save guest bytes {}: {cause}", in_words(ranges))]
    Unsaved {
        /// Guest offsets, bytes.
        ranges: Vec<Range<u64>>,
        /// Why.
        cause: String,
    },
    /// Zeros would have to be written out, and that was not wanted.
    #[error("zeroing this range would not be fast")]
    NotFast,
}

impl LayerError {
    /// The failure of a close that had these guest bytes in memory, and nowhere else.
    pub(crate) fn losing(self, ranges: &[Range<u64>]) -> Self {
        let with = |text: String| match ranges {
            [] => text,
            ranges => format!("{text}; could not save guest bytes {}", in_words(ranges)),
        };
        match self {
            Self::Io(text) => Self::Io(with(text)),
            Self::NoSpace(text) => Self::NoSpace(with(text)),
            Self::Latched(text) => Self::Latched(with(text)),
            other => other,
        }
    }
}

impl From<FormatError> for LayerError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Corrupt { .. } => Self::Corrupt(error.to_string()),
            FormatError::NoSpace(_) => Self::NoSpace(error.to_string()),
            FormatError::Io(error) => error.into(),
            FormatError::Unsupported(_) | FormatError::Invalid(_) | FormatError::CopyFirst => {
                Self::Io(error.to_string())
            }
        }
    }
}

impl From<std::io::Error> for LayerError {
    fn from(error: std::io::Error) -> Self {
        // An origin's read carries its own error inside: keep what it says the caller can do.
        match error.get_ref().and_then(|inner| inner.downcast_ref::<FetchError>()) {
            Some(fetch) => Self::Backing(fetch.clone()),
            None if is_no_space(&error) => Self::NoSpace(error.to_string()),
            None => Self::Io(error.to_string()),
        }
    }
}

impl From<LayerError> for DeviceError {
    fn from(error: LayerError) -> Self {
        match error {
            LayerError::NoSpace(text) => Self::NoSpace(text),
            LayerError::NotFast => Self::NotFast,
            other => Self::Io(other.to_string()),
        }
    }
}

/// Ranges that are told one by one.
const RANGES_TOLD_MAX: usize = 16;

fn in_words(ranges: &[Range<u64>]) -> String {
    let told = ranges.iter().take(RANGES_TOLD_MAX);
    let mut words: Vec<_> = told.map(|range| format!("{:#x}..{:#x}", range.start, range.end)).collect();
    if let Some(more) = ranges.len().checked_sub(RANGES_TOLD_MAX).filter(|&more| more > 0) {
        words.push(format!("and {more} more ranges"));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 MiB of sectors here and there would be a line of a megabyte in a log.
    #[test]
    fn a_few_of_many_ranges_are_told() {
        let ranges: Vec<_> = (0..40).map(|at| at * 1024..at * 1024 + 512).collect();
        let text = LayerError::Unsaved { ranges, cause: "away".into() }.to_string();
        assert!(text.starts_with("could not save guest bytes 0x0..0x200, 0x400..0x600, "), "{text}");
        assert!(text.ends_with("0x3c00..0x3e00, and 24 more ranges: away"), "{text}");
    }
}
