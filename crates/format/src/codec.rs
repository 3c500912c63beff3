//! Codec: how a compressed cluster becomes bytes again.
//!
//! - A zlib stream is raw deflate without a zlib header; a zstd stream is one frame or several.
//! - A stream is done once the cluster is full: what follows it belongs to others. One that ends before is broken.
//! - Memory is bounded by the caller's buffer and the decoder's window.
//!
//! Not here: where streams lie (the format), who decompresses when (`readonce-disk`).

use std::io::Read;

use crate::FormatError;

/// The largest zstd window that is accepted, as a power of two: 8 MiB, four times the largest cluster.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How a cluster is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate.
    Deflate,
    /// Zstandard.
    Zstd,
}

impl Codec {
    /// Fills `cluster`, a whole cluster, from `stream`, which may go on past the stream's end.
    ///
    /// # Errors
    /// `Corrupt` where the stream is broken or too short.
    pub fn decompress(self, stream: &[u8], cluster: &mut [u8]) -> Result<(), FormatError> {
        let done = match self {
            Self::Deflate => flate2::read::DeflateDecoder::new(stream).read_exact(cluster),
            Self::Zstd => zstd(stream, cluster),
        };
        done.map_err(|error| {
            FormatError::corrupt("compressed cluster", error, "must hold a whole cluster of compressed bytes")
        })
    }
}

fn zstd(stream: &[u8], cluster: &mut [u8]) -> std::io::Result<()> {
    let mut rest = stream;
    let mut done = 0;
    while let Some(left) = cluster.get_mut(done..).filter(|left| !left.is_empty()) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(rest)?.single_frame();
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        let mut filled = 0;
        while let Some(room) = left.get_mut(filled..).filter(|room| !room.is_empty()) {
            match decoder.read(room)? {
                0 => break,
                count => filled += count,
            }
        }
        let after = decoder.finish();
        if filled == 0 && after.len() == rest.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        rest = after;
        done += filled;
    }
    Ok(())
}
