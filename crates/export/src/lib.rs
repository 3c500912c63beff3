//! Exports: how a [`BlockDevice`](readonce_disk::BlockDevice) is served to clients.
//!
//! - `nbd`: an NBD server, on a Unix socket or TCP.
//!
//! Not here: formats, chains, copy-on-read. An export knows its protocol and the block device trait, nothing else.
//! A new export is a new folder and one line below.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

pub mod nbd;
