//! Image formats. A driver is a *mapper*: it says where a guest range lies, sets room aside, and links it.
//!
//! - `mapper`: the traits [`Mapper`] and [`WritableMapper`], and what they speak in.
//! - `codec`: compressed clusters.
//! - `driver`: the trait [`Driver`] of a format as a whole, and the list of formats.
//! - `finding`: what a check finds wrong, one by one.
//! - `cache`, `clusters`, `reclaim`, `rounds`: parts that formats with clusters and tables share. `options`: values of `-o` options.
//! - One folder for each format.
//!
//! A driver does metadata I/O only, through the byte traits of `readonce-storage`. It moves no guest data, knows
//! nothing of copy-on-read, of origins or of exports.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions))]

mod cache;
mod clusters;
pub mod codec;
pub mod driver;
pub mod error;
pub mod finding;
pub mod mapper;
mod number;
mod options;
pub mod qcow2;
pub mod qed;
pub mod raw;
mod reclaim;
mod rounds;

pub use driver::Driver;
pub use error::FormatError;
pub use finding::Finding;
pub use mapper::{
    Abilities, CommitMode, Compressed, Durability, Extent, Geometry, Mapper, Mapping, Reservation, Room,
    Unlinked, WritableMapper,
};
