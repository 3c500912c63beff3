//! Opening an origin: the options, and one function for every kind of place.
//!
//! - What signs a stored name is given again here: an override for the same place is taken instead of it.
//! - [`Reach`] says what an origin that cannot be reached means: an error (create), a note (open of an image that knows its
//!   version), or that nobody asks yet (lower images of a chain).
//!
//! Not here: policy I8, which the caller checks with [`crate::AllowBacking`] before it opens what an image names.

use std::{sync::Arc, time::Duration};

use readonce_storage::Rt;

use crate::{Credentials, FetchError, FileOrigin, Locator, Origin, Version, remote::HttpOrigin};

/// How an origin is opened and asked.
#[derive(Debug, Clone)]
pub struct OriginOptions {
    /// How long a fetch is tried again since the last byte arrived (`--retry-for`). Zero: never again. An attempt is silent for no
    /// longer than that, but for a second at least.
    pub retry_for: Duration,
    /// The same for the probe at open, which a person waits for.
    pub probe_for: Duration,
    /// A request with no byte for so long is given up and counts as failed; a slow transfer is never cut.
    pub stall_timeout: Duration,
    /// What an origin that cannot be reached means.
    pub reach: Reach,
    /// The version that the image pins. `None`: whatever is found is taken.
    pub expect: Option<Version>,
    /// Headers that grant access, bound to their hosts.
    pub credentials: Arc<Credentials>,
    /// Freshly signed URLs (`--url`, `READONCE_URL`), each taken instead of a name for the same place.
    pub url_override: Vec<Locator>,
    /// Demand requests in flight; HTTP/1.1 makes as many connections. At least 1.
    pub connections_max: usize,
    /// Which HTTP.
    pub http_version: HttpVersion,
    /// Whether proxies are used.
    pub proxies: Proxies,
    /// Certificates (PEM) to trust beside the system's.
    pub extra_roots_pem: Option<Vec<u8>>,
}

/// What an origin that cannot be reached means at open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// An error.
    Required,
    /// With a pinned version: a note, and every fetch tries again. Without: an error.
    Preferred,
    /// With a pinned version: the network is not asked at open. Without: as `Required`.
    Later,
}

/// Which HTTP to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/2 where TLS offers it, else HTTP/1.1.
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 without asking, over plain connections too.
    Http2,
}

/// Which proxies to go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxies {
    /// Those of `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`, in either case.
    Environment,
    /// None: for an origin of our own on the loopback.
    None,
}

impl Default for OriginOptions {
    fn default() -> Self {
        Self {
            retry_for: Duration::from_secs(600),
            probe_for: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            reach: Reach::Required,
            expect: None,
            credentials: Arc::new(Credentials::none()),
            url_override: Vec::new(),
            connections_max: 16,
            http_version: HttpVersion::Auto,
            proxies: Proxies::Environment,
            extra_roots_pem: None,
        }
    }
}

/// Opens the origin at `locator`, or at an override for the same place.
///
/// # Errors
/// `Away`: not reached in time (see [`Reach`]). `Changed`: not the pinned version. `Permanent`: it cannot serve as an origin.
pub async fn open(
    locator: &Locator,
    options: &OriginOptions,
    rt: &Rt,
) -> Result<Arc<dyn Origin>, FetchError> {
    let place = options.url_override.iter().find(|other| other.same_place(locator)).unwrap_or(locator);
    match place {
        Locator::File(path) => Ok(FileOrigin::open(path, options)? as Arc<dyn Origin>),
        Locator::Http(url) => Ok(HttpOrigin::open(url, options, rt).await? as Arc<dyn Origin>),
    }
}
