//! The NBD server as its clients see it: our own client, libnbd's tools, QEMU's.
//!
//! - `device`: the device served, with switches. `rig`: a server and its clients.
//! - `commands`: every command against a flat model. `refusals`: bad requests. `framing`: broken ones.
//! - `handshake`, `limits`, `life` (connections that come, hang and go), `tools`.

#![allow(clippy::disallowed_methods, reason = "tests stand outside the engine: real sockets, real time")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

mod commands;
mod device;
mod framing;
mod handshake;
mod life;
mod limits;
mod refusals;
mod rig;
mod tools;
