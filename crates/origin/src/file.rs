//! File origin: a backing that is a file of this machine.
//!
//! - Its length is the one at open; a file that has another length than pinned is refused.
//! - Another device, inode or mtime than pinned is only noted: copying a file changes all three and nothing else.
//!
//! Not here: locks on the file, and files that somebody writes while they are read (QEMU does not see that either).

use std::{ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use readonce_storage::{BoxFuture, ReadAt};

use crate::{Class, FetchError, Origin, OriginNote, OriginOptions, OriginStats, Sink, Validator, Version};

/// Bytes of one read of a fetch, so that a large range does not need memory of its own size.
const PIECE_BYTES_MAX: u64 = 1024 * 1024;

/// A file as an origin.
pub struct FileOrigin {
    name: String,
    file: std::fs::File,
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
        let io = |error: std::io::Error| permanent(error.to_string());
        let file = std::fs::File::open(path).map_err(io)?;
        let version = version_of(&file).map_err(io)?;
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
                tracing::warn!(file = %name, %expected, %found, "the backing file may have changed since it was pinned");
                notes.push(OriginNote::MayHaveChanged { expected, found });
            }
        }
        Ok(Arc::new(Self { name, file, version, notes, stats: OriginStats::default() }))
    }

    fn read_exact(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        self.file.read_exact_at(buf, offset)
    }
}

impl ReadAt for FileOrigin {
    fn len(&self) -> u64 {
        self.version.len
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<std::io::Result<()>> {
        Some(self.read_exact(offset, buf).inspect(|()| self.stats.add_bytes(buf.len() as u64)))
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, std::io::Result<Bytes>> {
        Box::pin(async move {
            let mut buf = vec![0; len];
            self.read_exact(offset, &mut buf)?;
            self.stats.add_bytes(len as u64);
            Ok(buf.into())
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
                let piece = self.read(at, len as usize).await.map_err(|error| FetchError::Permanent {
                    origin: self.name.clone(),
                    cause: format!("read of {len} bytes at {at}: {error}"),
                })?;
                sink(at, piece);
                at += len;
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

fn version_of(file: &std::fs::File) -> std::io::Result<Version> {
    use std::{io::Seek, os::unix::fs::FileTypeExt, os::unix::fs::MetadataExt};
    let metadata = file.metadata()?;
    let len = if metadata.file_type().is_block_device() {
        // The size of a block device is where its end is.
        let mut file = file;
        file.seek(std::io::SeekFrom::End(0))?
    } else if metadata.is_file() {
        metadata.len()
    } else {
        return Err(std::io::Error::other("is not a regular file or block device"));
    };
    let mtime_ns = i128::from(metadata.mtime())
        .saturating_mul(1_000_000_000)
        .saturating_add(i128::from(metadata.mtime_nsec()));
    let validator = Validator::File { device: metadata.dev(), inode: metadata.ino(), size: len, mtime_ns };
    Ok(Version { validator, len })
}
