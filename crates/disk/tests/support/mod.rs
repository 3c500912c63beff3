//! What the engine's tests stand on: a seeded executor with invented time, and a simulated origin.
#![allow(dead_code, reason = "each test file takes what it needs")]
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "this is the test's world")]

pub mod chain;
pub mod exec;
pub mod fake;
pub mod guest;
pub mod model;
pub mod origin;
pub mod world;
