//! Why a request failed, in NBD's words.
//!
//! Not here: when a request is refused before the device sees it (`request`).

use readonce_disk::DeviceError;

/// The errors that NBD knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errno {
    /// NBD_EPERM: the export is read-only.
    Perm,
    /// NBD_EIO.
    Io,
    /// NBD_EINVAL: the request makes no sense.
    Invalid,
    /// NBD_ENOSPC: no space, or a write past the end.
    NoSpace,
    /// NBD_EOVERFLOW: longer than a reply may be.
    Overflow,
    /// NBD_ENOTSUP: a fast zero that would not be fast.
    NotSupported,
    /// NBD_ESHUTDOWN: the server ends.
    Shutdown,
}

impl Errno {
    /// The number on the wire.
    pub fn number(self) -> u32 {
        match self {
            Errno::Perm => 1,
            Errno::Io => 5,
            Errno::Invalid => 22,
            Errno::NoSpace => 28,
            Errno::Overflow => 75,
            Errno::NotSupported => 95,
            Errno::Shutdown => 108,
        }
    }
}

/// The one place where the device's errors become NBD's.
pub fn device_errno(error: &DeviceError) -> Errno {
    match error {
        DeviceError::Io(_) => Errno::Io,
        DeviceError::NoSpace(_) => Errno::NoSpace,
        DeviceError::ReadOnly => Errno::Perm,
        DeviceError::NotFast => Errno::NotSupported,
    }
}
