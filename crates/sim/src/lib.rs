//! The simulator: the engine in one thread, from a seed, under every fault that its world has; judged by a flat model.
//!
//! - `model`: what each cell may read as. `stamp`: bytes that say what they are.
//! - `shape`, `plan`: what is drawn: images, requests, faults. `run`: doing it. `verdict`: what must be true afterwards.
//! - `world`: the files and the chain, `places`: as `disk::chain` opens them. `remote`, `server`: what the origin holds, and HTTP without a network. `guest`: requests.
//! - `damage`: images that something else broke.
//!
//! Unchanged under it: `disk`, `format`, and `origin` down to its transport. Not here: threads (`disk/tests/schedules.rs`),
//! real files, sockets and processes.

#![allow(
    clippy::disallowed_methods,
    reason = "it measures itself by the real clock, and decides nothing by it"
)]

pub mod damage;
pub mod exhaustive;
pub mod guest;
pub mod model;
pub mod places;
pub mod plan;
pub mod remote;
pub mod run;
pub mod server;
pub mod shape;
pub mod stamp;
pub mod verdict;
pub mod world;
