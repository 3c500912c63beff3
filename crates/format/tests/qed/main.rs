//! Tests of the QED driver from outside: with QEMU's tools as oracle, with power loss, with faults, with broken images.
#![allow(clippy::disallowed_methods, reason = "tests run on the real runtime")]

mod crash;
mod faults;
mod guest;
mod hostile;
mod mapper;
mod oracle;
mod repair;
