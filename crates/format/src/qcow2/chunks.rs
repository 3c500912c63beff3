//! Chunks: a table in the file, read piece by piece as big-endian words. What lies past the end of the file reads as zeros.

use bytes::Bytes;
use readonce_storage::ReadAt;

use super::extensions::be_u64;
use crate::number::{index, round_down};

/// Bytes of a table that are read at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// Bytes of a file as QEMU sees them: zeros past its end.
pub(super) async fn read_padded(file: &dyn ReadAt, offset: u64, len: u64) -> Result<Bytes, std::io::Error> {
    let there = file.len().saturating_sub(offset).min(len);
    if there == len {
        return file.read(offset, index(len)).await;
    }
    let mut padded = Vec::new();
    if there > 0 {
        padded.extend_from_slice(&file.read(offset, index(there)).await?);
    }
    padded.resize(index(len), 0);
    Ok(padded.into())
}

/// A table, read in chunks; past the end of the file it reads as zeros, and is not read.
pub(super) struct Chunks<'a> {
    file: &'a dyn ReadAt,
    at: u64,
    end: u64,
}

impl<'a> Chunks<'a> {
    /// `len` bytes from `offset`, a multiple of 16.
    pub(super) fn new(file: &'a dyn ReadAt, offset: u64, len: u64) -> Self {
        let end = offset.saturating_add(len).min(file.len().saturating_add(15));
        Self { file, at: offset, end }
    }

    /// The next chunk and its byte offset; whole entries.
    pub(super) async fn next(&mut self) -> Option<(u64, Result<Bytes, std::io::Error>)> {
        let left = self.end.checked_sub(self.at).filter(|&left| left > 0)?;
        let at = self.at;
        // Entries never straddle two chunks: tables are multiples of 8 long, and chunks of 16.
        let len = left.min(CHUNK_BYTES);
        self.at += len;
        tokio::task::yield_now().await;
        Some((at, read_padded(self.file, at, round_down(len.saturating_add(7), 8)).await))
    }
}

/// Big-endian words with their byte offset.
pub(super) fn words(at: u64, data: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    (at..).step_by(8).zip(data.chunks_exact(8).map(be_u64))
}
