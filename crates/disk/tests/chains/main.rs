//! Whole chains on real files, over a real HTTP origin, with QEMU's tools as the oracle.
//!
//! - `place`: a folder of images, and a chain opened from it. `model`: what a disk must read as. `qemu`: the oracle.
//! - `fills`: one operation, the image before and after it, and what the origin was asked. `shapes`: chains of every shape
//!   against the model. `turns`: QEMU and readonce use one image in turn.
//! - `versions`, `away`, `behind`, `wrong`: the backing changes, cannot be reached, has not answered yet, answers wrong. `policy`: what is not opened.
//! - `lower`: what is special below the top. `edges`: versions and backings that nobody can have.
//! - `locks`, `mounts`: other users of the image, and file systems that are full or read-only.
//! - `far_data`: the data file of an image that lies behind a URL.
//! - `qcow2`: what only qcow2 has: compressed clusters, data files, snapshots, marks.
//!
//! Not here: `kill -9`, which needs a process to kill (the command's tests).

#![allow(clippy::disallowed_methods, reason = "tests run on the real clock")]

mod away;
mod behind;
mod edges;
mod far_data;
mod fills;
mod locks;
mod lower;
mod model;
mod mounts;
mod place;
mod policy;
mod qcow2;
mod qemu;
mod shapes;
mod turns;
mod versions;
mod wrong;
