//! The command line as a person and a script meet it: the binary itself, qemu-img, qemu-io and NBD clients beside it.
//!
//! - `common`: running things. `images`: create, info, map, check, against qemu-img. `changes`: amend, rebase, resize.
//!   `snapshots`: against qemu-img. `refusals`: bad input. `io`: against qemu-io. `serve`, `run`: with clients. `sandbox`:
//!   what `serve` cannot do any more. `far`: images that lie behind a URL, with `webserver`. `demo`. `corruption`: what a guest meets. `check`: what is wrong, by name.

#![allow(clippy::disallowed_methods, reason = "tests outside the engine: real processes, real time")]

mod changes;
mod check;
mod common;
mod corruption;
mod demo;
mod far;
mod images;
mod io;
mod refusals;
mod run;
mod sandbox;
mod serve;
mod snapshots;
#[allow(dead_code, reason = "shared with the tests of a bad world")]
mod webserver;
