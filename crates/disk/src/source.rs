//! A source: what an image has behind it, be it one origin or a whole chain.
//!
//! - Reads only, at any byte. What lies past its size is the caller's business (zeros).
//! - A fetch hands out each byte of its range once, in any order, as soon as it is there.

use std::ops::Range;

use readonce_origin::{Class, Sink};
use readonce_storage::BoxFuture;

use crate::{LayerError, StatusExtent, index::Found};

/// What an image's absent units are read from.
pub trait Source: Send + Sync + 'static {
    /// Bytes that it shows; may have to open it first.
    fn size(&self) -> BoxFuture<'_, Result<u64, LayerError>>;

    /// Fills `buf` from `offset` if that needs no waiting. The range lies inside the source.
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), LayerError>>;

    /// Whether [`Source::read_now`] from `offset` on may give bytes: asked, without I/O, before a large buffer is made for it.
    fn may_read_now(&self, _offset: u64) -> bool {
        true
    }

    /// Fetches `range`, which lies inside the source.
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), LayerError>>;

    /// Where the bytes from `offset` lie, at most `len_max` of them, for an index that keeps it. `None`: that may change, or is
    /// not known.
    fn find(&self, _offset: u64, _len_max: u64) -> BoxFuture<'_, Result<Option<Found>, LayerError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// States of the range (inside the source) in order, with 1 as the depth of the source's own top. At least one extent.
    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, LayerError>>;
}

/// The most zeros handed out in one piece, bytes.
const ZERO_PIECE_BYTES_MAX: u64 = 1 << 20;

/// Hands out zeros for `range`.
pub(crate) fn sink_zeros(range: Range<u64>, sink: Sink<'_>) {
    static ZEROS: [u8; ZERO_PIECE_BYTES_MAX as usize] = [0; ZERO_PIECE_BYTES_MAX as usize];
    let mut at = range.start;
    while at < range.end {
        let count = (range.end - at).min(ZERO_PIECE_BYTES_MAX);
        sink(at, bytes::Bytes::from_static(&ZEROS[..count as usize]));
        at += count;
    }
}
