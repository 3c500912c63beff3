//! Tests of the qcow2 driver from outside: with QEMU's tools as oracle, with power loss, with broken images.
#![allow(clippy::disallowed_methods, reason = "tests run on the real runtime")]

mod change;
mod check;
mod crash;
mod create;
mod damage;
mod faults;
mod guest;
mod hostile;
mod imago;
mod mapper;
mod mutated;
mod oracle;
mod overlaps;
mod qemu;
mod repair;
mod snapshot;
mod support;
mod turns;
