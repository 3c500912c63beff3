//! File origin: a backing that is a file of this machine.
//!
//! - Its length is the one at open; a file that has another length than pinned is refused.
//! - Another device, inode or mtime than pinned is only noted: copying a file changes all three and nothing else.
//!
//! Not here: locks on the file, and files that somebody writes while they are read (QEMU does not see that either).

use std::{ops::Range, path::Path, sync::Arc};

use bytes::{Bytes, BytesMut};
use readonce_storage::{
    BoxFuture, ReadAt,
    local::{FileIdentity, LocalFile, OpenMode},
};

use crate::{Class, FetchError, Origin, OriginNote, OriginOptions, OriginStats, Sink, Validator, Version};

/// Bytes of one read of a fetch, so that a large range does not need memory of its own size.
const PIECE_BYTES_MAX: u64 = 1024 * 1024;
/// Bytes of one read in the caller's poll.
const INLINE_BYTES_MAX: u64 = 256 * 1024;

/// A file as an origin.
pub struct FileOrigin {
    name: String,
    file: LocalFile,
    version: Version,
    notes: Vec<OriginNote>,
    stats: OriginStats,
}

impl FileOrigin {
    /// Opens the file read-only.
    ///
    /// # Errors
    /// `Permanent`: it cannot be opened, or is not a file or block device. `Changed`: its length is not the pinned one.
    pub fn open(path: &Path, options: &OriginOptions) -> Result<Arc<Self>, FetchError> {
        let name = path.display().to_string();
        let permanent = |cause: String| FetchError::Permanent { origin: name.clone(), cause };
        // The name goes before the cause anyway.
        let named = format!("Could not open '{name}': ");
        let io = |error: std::io::Error| permanent(error.to_string().replace(&named, ""));
        let file = LocalFile::open(path, OpenMode::Read).map_err(io)?;
        let version = version_of(file.identity().map_err(io)?);
        let mut notes = Vec::new();
        if let Some(expected) = &options.expect {
            if expected.len != version.len {
                return Err(FetchError::Changed {
                    origin: name,
                    cause: format!("length was {}, is {}", expected.len, version.len),
                });
            }
            if expected.validator != version.validator {
                let (expected, found) = (expected.validator.to_string(), version.validator.to_string());
                notes.push(OriginNote::MayHaveChanged { expected, found });
            }
        }
        Ok(Arc::new(Self { name, file, version, notes, stats: OriginStats::default() }))
    }

    /// The file may grow, an origin never does.
    fn within(&self, offset: u64, len: usize) -> std::io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.version.len => Ok(()),
            _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl ReadAt for FileOrigin {
    fn len(&self) -> u64 {
        self.version.len
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<std::io::Result<()>> {
        if let Err(error) = self.within(offset, buf.len()) {
            return Some(Err(error));
        }
        let result = self.file.read_now(offset, buf)?;
        Some(result.inspect(|()| self.stats.add_bytes(buf.len() as u64)))
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, std::io::Result<Bytes>> {
        Box::pin(async move {
            self.within(offset, len)?;
            let bytes = self.file.read(offset, len).await?;
            self.stats.add_bytes(bytes.len() as u64);
            Ok(bytes)
        })
    }
}

impl Origin for FileOrigin {
    fn fetch<'a>(
        &'a self,
        range: Range<u64>,
        _class: Class,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async move {
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(PIECE_BYTES_MAX);
                // What is in the page cache needs no other thread.
                let mut buf = BytesMut::zeroed(len.min(INLINE_BYTES_MAX) as usize);
                let piece = match self.read_now(at, &mut buf) {
                    Some(read) => read.map(|()| buf.freeze()),
                    None => self.read(at, len as usize).await,
                };
                let piece = piece.map_err(|error| FetchError::Permanent {
                    origin: self.name.clone(),
                    cause: format!("read of {len} bytes at {at}: {error}"),
                })?;
                let count = piece.len() as u64;
                sink(at, piece);
                at += count;
                if at < range.end {
                    tokio::task::yield_now().await;
                }
            }
            Ok(())
        })
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn validator(&self) -> Vec<u8> {
        self.version.validator.encode()
    }

    fn notes(&self) -> Vec<OriginNote> {
        self.notes.clone()
    }

    fn stats(&self) -> crate::StatsSnapshot {
        self.stats.snapshot()
    }
}

fn version_of(identity: FileIdentity) -> Version {
    let FileIdentity { device, inode, len, mtime_s, mtime_ns } = identity;
    let mtime_ns = i128::from(mtime_s).saturating_mul(1_000_000_000).saturating_add(i128::from(mtime_ns));
    Version { validator: Validator::File { device, inode, size: len, mtime_ns }, len }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pinned_at(path: &Path) -> OriginOptions {
        let origin = FileOrigin::open(path, &OriginOptions::default()).expect("a file");
        let expect = Version::decode(&origin.validator(), origin.len()).expect("our own encoding");
        OriginOptions { expect: Some(expect), ..OriginOptions::default() }
    }

    #[tokio::test]
    async fn a_fetch_hands_out_the_bytes_once_and_in_order() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let data: Vec<u8> = (0..3_000_001_u32).map(|index| (index % 251) as u8).collect();
        std::fs::write(file.path(), &data).expect("room");
        let origin = FileOrigin::open(file.path(), &OriginOptions::default()).expect("a file");
        let mut got = Vec::new();
        let mut sink = |at, piece: Bytes| {
            assert_eq!(at, 7 + got.len() as u64);
            got.extend_from_slice(&piece);
        };
        origin.fetch(7..3_000_001, Class::Demand, &mut sink).await.expect("inside");
        assert!(got == data[7..]);
        assert_eq!(origin.stats().bytes, 3_000_001 - 7);
        assert_eq!(&origin.read(1, 2).await.expect("inside")[..], &data[1..3]);
        let past = origin.read(3_000_000, 2).await.expect_err("past the end");
        assert_eq!(past.kind(), std::io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn another_mtime_is_noted_and_another_length_refused() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "four").expect("room");
        let options = pinned_at(file.path());
        let notes = |options| FileOrigin::open(file.path(), options).map(|origin| origin.notes().len());
        assert_eq!(notes(&options).expect("unchanged"), 0);
        file.as_file().set_modified(std::time::SystemTime::UNIX_EPOCH).expect("our own file");
        assert_eq!(notes(&options).expect("only another mtime"), 1);
        std::fs::write(file.path(), "five!").expect("room");
        let error = notes(&options).expect_err("another length");
        assert!(matches!(error, FetchError::Changed { .. }), "{error}");
        assert!(error.to_string().ends_with("length was 4, is 5"), "{error}");
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        for path in [folder.path().to_owned(), folder.path().join("absent")] {
            let error = FileOrigin::open(&path, &OriginOptions::default()).map(|_| ()).expect_err("no file");
            assert!(matches!(error, FetchError::Permanent { .. }), "{error}");
            assert_eq!(error.to_string().matches(&path.display().to_string()).count(), 1, "{error}");
        }
    }
}
