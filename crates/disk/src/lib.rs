//! What the guest sees: chain, copy-on-read, in-flight table, flush.
//!
//! - `device`: [`BlockDevice`], the trait that exports serve.
//!
//! Not here: HTTP, the bits of a header, a wire protocol.

pub mod device;

pub use device::{BlockDevice, DeviceError, StatusExtent, ZeroMode};
