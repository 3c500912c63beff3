//! qcow2: QEMU's format, versions 2 and 3, from its published specification.
//!
//! - `header`, `extensions`, `record`, `layout`: what lies where in the file, and which values are valid.
#![allow(dead_code, reason = "the parts arrive one after the other; goes when all are there")]

mod extensions;
mod header;
mod layout;
mod record;
mod refcount;
mod snapshots;
