//! The disk: the top image of a chain as a block device.

use std::sync::Arc;

use bytes::Bytes;
use readonce_origin::Class;
use readonce_storage::BoxFuture;

use crate::{BlockDevice, DeviceError, StatusExtent, ZeroMode, image::Image, source::Source};

/// Bytes that a cache request, which may name the whole disk, works on at a time: what a step reads is held until it ends.
const CACHE_STEP_BYTES: u64 = 8 << 20;

/// The top of a chain.
#[derive(Clone)]
pub enum Top {
    /// An image open for writing, at least for fills.
    Image(Arc<Image>),
    /// A layer that cannot be written: everything passes through. Its size in bytes stands beside it.
    Base(Arc<dyn Source>, u64),
}

/// A disk that exports serve.
pub struct Disk {
    top: Top,
    read_only: bool,
}

impl Disk {
    /// A disk over `top`; `read_only` refuses the guest's writes, not the fills.
    pub fn new(top: Top, read_only: bool) -> Self {
        let read_only = read_only || matches!(top, Top::Base(..));
        Self { top, read_only }
    }

    fn source(&self) -> &dyn Source {
        match &self.top {
            Top::Image(image) => &**image,
            Top::Base(source, _) => &**source,
        }
    }

    fn writable(&self) -> Result<&Arc<Image>, DeviceError> {
        match &self.top {
            Top::Image(image) if !self.read_only => Ok(image),
            _ => Err(DeviceError::ReadOnly),
        }
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        match &self.top {
            Top::Image(image) => image.size(),
            Top::Base(_, size) => *size,
        }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), DeviceError>> {
        let read = match &self.top {
            Top::Image(image) => image.read_local(offset, buf),
            Top::Base(source, _) => source.read_now(offset, buf),
        };
        read.map(|result| result.map_err(DeviceError::from))
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, DeviceError>> {
        Box::pin(async move {
            if let Top::Image(image) = &self.top {
                return Ok(image.read(offset, len).await?);
            }
            let mut buf = bytes::BytesMut::zeroed(len);
            let mut place = |at: u64, bytes: Bytes| {
                buf[(at - offset) as usize..][..bytes.len()].copy_from_slice(&bytes);
            };
            self.source().fetch(offset..offset + len as u64, Class::Demand, &mut place).await?;
            Ok(buf.freeze())
        })
    }

    fn write_now(&self, offset: u64, data: &[u8]) -> Option<Result<(), DeviceError>> {
        match self.writable() {
            Ok(image) => image.write_local(offset, data).map(|result| result.map_err(DeviceError::from)),
            Err(error) => Some(Err(error)),
        }
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { Ok(self.writable()?.write(offset, data).await?) })
    }

    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { Ok(self.writable()?.write_zeroes(offset, len, mode).await?) })
    }

    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { Ok(self.writable()?.trim(offset, len).await?) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            match self.writable() {
                Ok(image) => Ok(image.flush().await?),
                // Nothing was written, so nothing is owed.
                Err(_) => Ok(()),
            }
        })
    }

    fn cache(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            if let Top::Image(image) = &self.top
                && image.copy_on_read()
            {
                let end = offset + len;
                let mut at = offset;
                while at < end {
                    let next = end.min(at + CACHE_STEP_BYTES);
                    image.read_pieces(at..next, Class::Demand, &mut |_, _| {}).await?;
                    at = next;
                }
            }
            Ok(())
        })
    }

    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, DeviceError>> {
        Box::pin(async move { Ok(self.source().status(offset, len, count_max).await?) })
    }
}
