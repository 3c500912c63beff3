//! qcow2: QEMU's format, versions 2 and 3, from its published specification.
//!
//! - `header`, `extensions`, `record`, `layout`: what lies where in the file, and which values are valid.
//! - `refcount`, `snapshots`: refcounts and snapshots as the file stores them; `scan`, `check`: what refers to clusters, and
//!   whether the refcounts say the same.
//! - `entry`, `slice`, `l1`, `tables`: the tables in memory; `reader`: an image open for reading.
#![allow(dead_code, reason = "the parts arrive one after the other; goes when all are there")]

mod check;
mod entry;
mod extensions;
mod header;
mod known;
mod l1;
mod layout;
mod reader;
mod record;
mod refcount;
mod scan;
mod slice;
mod snapshots;
mod tables;
