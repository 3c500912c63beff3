//! Origins: where the bytes of a backing come from, at one version.
//!
//! - `origin`: the trait [`Origin`], its classes, errors and notes. `stats`: its counters.
//! - `validator`: what names one version.
//! - `locator`: a parsed backing name, and what it may lead to. `signature`: what of a URL is never kept.
//! - `credentials`: headers that grant access, bound to their hosts.
//! - `open`: options, and the one way to an origin. `file`, `remote`: the two kinds.
//! - Behind `remote`, deciding: `response`, `redirect`, `retry`, `schedule`; doing: `transport`, `http`, `stall`.
//!
//! Not here: formats, images, what the bytes mean.

pub mod credentials;
pub mod file;
mod http;
pub mod locator;
pub mod open;
pub mod origin;
mod redirect;
pub mod remote;
mod response;
mod retry;
pub mod schedule;
mod signature;
mod stall;
pub mod stats;
pub mod transport;
pub mod validator;

pub use credentials::{Credentials, CredentialsError};
pub use file::FileOrigin;
pub use locator::{AllowBacking, Locator, LocatorError};
pub use open::{HttpVersion, OriginOptions, Proxies, Reach, open};
pub use origin::{Class, FetchError, Origin, OriginNote, Sink};
pub use remote::HttpOrigin;
pub use stats::{OriginStats, StatsSnapshot};
pub use validator::{Pinned, Validator, Version};
