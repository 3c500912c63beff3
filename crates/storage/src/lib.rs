//! Flat bytes: what every other room stands on.
//!
//! - `flat`: the byte traits, [`ReadAt`] and [`Storage`].
//! - `runtime`: the one parameter through which time, randomness and spawning come in.
//! - `local`: a file of this machine. `ring`: io_uring for what would block. `lock`: QEMU's image locks.
//! - `sim`: a simulated disk with power loss.
//!
//! Not here: formats, origins, anything that knows what the bytes mean.

pub mod flat;
pub mod runtime;
pub mod sim;

pub use flat::{BoxFuture, ReadAt, Storage};
pub use runtime::{Moment, Rt, Runtime, TokioRuntime};
pub use sim::SimFile;
