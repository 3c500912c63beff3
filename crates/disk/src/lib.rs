//! What the guest sees: chain, copy-on-read, in-flight table, flush.
//!
//! - `device`: [`BlockDevice`], the trait that exports serve. - `disk`: the top of a chain as such a device.
//! - `image`: a layer open for writing; `read`, `write`, `zero`, `fill`, `flush` are its waiting paths.
//! - `inflight`: who changes which unit; a plain state machine.
//! - `copy`: clusters that are copied before they are written. `uses`: who may still read what was unlinked.
//! - `compressed`: compressed clusters, decompressed once.
//! - `source`: what an image has behind it; `base`: a read-only layer; `lazy`: one that is opened when needed.
//! - `pieces`: an origin far away, read in larger pieces that are kept.
//! - `index`: where the bytes of a whole chain lie, once looked up.
//! - `chain`: opening all of it under one policy.
//! - `status`: which layer holds a range.
//!
//! Not here: HTTP, the bits of a header, a wire protocol.

pub mod base;
pub mod chain;
mod compressed;
mod copy;
pub mod device;
pub mod disk;
pub mod error;
mod fill;
pub mod flush;
pub mod image;
pub mod index;
pub mod inflight;
pub mod lazy;
pub mod pieces;
mod ranges;
pub mod read;
pub mod source;
mod status;
mod uses;
mod write;
mod zero;

/// What counts without a lock. Its own module, so that a test can run `uses` under drawn schedules.
mod atomics {
    pub use readonce_storage::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
}

pub use base::{Base, BaseFiles};
pub use device::{BlockDevice, DeviceError, StatusExtent, ZeroMode};
pub use disk::{Disk, Top};
pub use error::LayerError;
pub use image::{Image, ImageFiles, ImageOptions};
pub use index::Indexed;
pub use lazy::Lazy;
pub use source::Source;
