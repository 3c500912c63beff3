//! Flat bytes: what every other room stands on.
//!
//! - `flat`: the byte traits, [`ReadAt`] and [`Storage`].
//! - `runtime`: the one parameter through which time, randomness and spawning come in.
//! - `local`: a file of this machine. `lock`: QEMU's image locks on it.
//! - `engine`: how an operation that may wait is done. `ring`: the same, on io_uring.
//! - `sync`: short locks and counters, which tests can put in any order.
//! - `synced`: syncs of several tasks in order.
//! - `dirty`: whether a write to a file would have to wait. `cgroup`: what memory cgroups say to that.
//! - `sim`: a simulated disk with power loss. `sparse`: the bytes that it holds.
//!
//! Not here: formats, origins, anything that knows what the bytes mean.

mod cgroup;
mod dirty;
mod engine;
pub mod flat;
pub mod local;
pub mod lock;
mod ring;
pub mod runtime;
pub mod sim;
mod sparse;
pub mod sync;
mod synced;

pub use flat::{BoxFuture, ReadAt, Storage};
pub use local::{FileIdentity, LocalFile, OpenMode};
pub use lock::{Access, ImageLock, LockError};
pub use runtime::{Moment, Rt, Runtime, TokioRuntime};
pub use sim::SimFile;
pub use synced::Synced;
