//! The block device that an export serves: any byte offset and length, many requests at once.
//!
//! - The `_now` calls never wait and are the hot path; `None` means: take the waiting call.
//! - Dropping a waiting call's future is allowed; a write may then have happened or not.
//! - Ranges lie inside `0..size()`: the export refuses others before it calls. `len` is at least 1.

use bytes::Bytes;
use readonce_storage::BoxFuture;

/// Why a request failed. One function of each protocol turns it into an errno.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// EIO for this request; the connection and other requests go on.
    #[error("{0}")]
    Io(String),
    /// ENOSPC for this request alone.
    #[error("{0}")]
    NoSpace(String),
    /// The device is read-only: EPERM.
    #[error("the device is read-only")]
    ReadOnly,
    /// Fast zero was asked and it would not be fast: ENOTSUP.
    #[error("zeroing this range would not be fast")]
    NotFast,
}

/// How to write zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// The space must stay allocated (NBD_CMD_FLAG_NO_HOLE).
    pub keep_space: bool,
    /// Fail with [`DeviceError::NotFast`] rather than write zeros out (NBD_CMD_FLAG_FAST_ZERO).
    pub only_if_fast: bool,
}

/// A run of guest bytes in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes; at least 1.
    pub len: u64,
    /// Reads as zeros for certain (NBD_STATE_ZERO).
    pub zero: bool,
    /// Nothing is allocated in any image of the chain (NBD_STATE_HOLE).
    pub hole: bool,
    /// Which image of the chain holds it: 1 is the top, 0 none (qemu:allocation-depth).
    pub depth: u32,
}

/// A disk as an export sees it.
pub trait BlockDevice: Send + Sync + 'static {
    /// Bytes; may grow while it is served.
    fn size(&self) -> u64;
    /// Whether every write is refused.
    fn read_only(&self) -> bool;
    /// Fills `buf` from `offset` if that needs no waiting.
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), DeviceError>>;
    /// Reads `len` bytes.
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, DeviceError>>;
    /// Writes `data` if that needs no waiting.
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<Result<(), DeviceError>>;
    /// Writes `data`; not yet durable.
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), DeviceError>>;
    /// Makes the range read as zeros.
    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> BoxFuture<'_, Result<(), DeviceError>>;
    /// Tells that the range's contents are not wanted any more; reads of it stay what they are, or become zeros.
    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>>;
    /// Makes every write that completed before the call durable.
    fn flush(&self) -> BoxFuture<'_, Result<(), DeviceError>>;
    /// Brings the range into the image (NBD_CMD_CACHE), where copy-on-read is on; else does nothing.
    fn cache(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>>;
    /// The states of the range, in order; may end early, but tells of at least one byte. At most `count_max` extents.
    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, DeviceError>>;
}
