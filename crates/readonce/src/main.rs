//! readonce
fn main() {}
