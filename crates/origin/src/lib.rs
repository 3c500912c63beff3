//! Origins: where the bytes of a backing come from, at one version.
//!
//! - `origin`: the trait [`Origin`], its classes and errors. - `validator`: what names one version.
//! - `locator`: a parsed backing name, and what it may lead to.
//!
//! Not here: formats, images, what the bytes mean.

pub mod origin;

pub use origin::{Class, FetchError, Origin, Sink};
