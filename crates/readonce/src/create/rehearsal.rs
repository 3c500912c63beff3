//! A file that is none: a driver that creates an image there has checked all that was asked, and nothing was touched.

use bytes::Bytes;
use readonce_storage::{BoxFuture, ReadAt, Storage};

/// Bytes that take everything.
pub struct Rehearsal;

impl ReadAt for Rehearsal {
    fn len(&self) -> u64 {
        0
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Option<std::io::Result<()>> {
        None
    }

    fn read(&self, _: u64, _: usize) -> BoxFuture<'_, std::io::Result<Bytes>> {
        Box::pin(std::future::ready(Err(std::io::ErrorKind::UnexpectedEof.into())))
    }
}

impl Storage for Rehearsal {
    fn write_now(&self, _: u64, _: &[u8]) -> Option<std::io::Result<()>> {
        Some(Ok(()))
    }

    fn write(&self, _: u64, _: Bytes) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn allocate(&self, _: u64, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn punch_hole(&self, _: u64, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn set_len(&self, _: u64) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn sync(&self) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
