//! The NBD server: protocol only.
//!
//! - `wire`: numbers and layouts of the protocol. `errno`: why a request failed, in NBD's words.
//! - `request`: which requests are refused, and how; pure. `status`: extents into block status chunks; pure.
//! - `handshake`: fixed newstyle option haggling. `contexts`: the metadata contexts.
//! - `inbox`, `outbox`: the bytes received and to be sent. `job`: a request that has to wait.
//! - `pool`: what all connections together may hold.
//! - `connection`: one client in the transmission phase. `server`: all of them. `listener`: where they come from.
//!
//! The protocol is <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, and for extended headers the same file
//! on the branch `extension-ext-header`. Not here: TLS, more than one export.

mod connection;
mod contexts;
mod errno;
mod handshake;
mod inbox;
mod job;
mod listener;
mod outbox;
mod pool;
mod request;
mod server;
mod status;
mod wire;

pub use errno::{Errno, device_errno};
pub use listener::{BindError, Listener, UnixSocket};
pub use server::{Server, ServerOptions, TextTooLong, Unfinished};
pub use wire::PAYLOAD_LEN_MAX;
