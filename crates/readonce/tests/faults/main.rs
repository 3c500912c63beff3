//! The binary in a bad world: no space, a disk that fails, power cuts, kills, an origin that goes and comes, clients that misbehave.
//!
//! - `server`: a running `readonce serve`, its memory and descriptors. `disk`: a file on a disk that fails when it is told to.
//! - `space`, `disk_errors`, `crashes`, `nginx`, `clients`, `ending`: the cases.
//!
//! The load and its model are `readonce_testkit::guest`. With `READONCE_LONG` set, loops are longer: `script/soak` does that.
//! Not here: what needs no real disk, process or server (`readonce-disk`'s tests).

#![allow(clippy::disallowed_methods, reason = "tests outside the engine: real processes, real time")]

mod clients;
#[allow(dead_code, reason = "shared with the tests of the command line")]
#[path = "../cli/common.rs"]
mod common;
mod crashes;
mod disk;
mod disk_errors;
mod ending;
mod nginx;
mod server;
mod space;
#[path = "../cli/webserver.rs"]
mod webserver;

/// How often: a few times on each change, many times when there is time.
fn rounds(short: u64, long: u64) -> u64 {
    if std::env::var_os("READONCE_LONG").is_some() { long } else { short }
}
