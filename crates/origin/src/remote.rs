//! HTTP origin.

use std::sync::Arc;

use readonce_storage::Rt;
use url::Url;

use crate::{FetchError, FileOrigin, OriginOptions};

/// A file behind a URL.
pub struct HttpOrigin;

impl HttpOrigin {
    /// Opens it.
    ///
    /// # Errors
    /// See [`crate::open`].
    pub async fn open(url: &Url, _options: &OriginOptions, _rt: &Rt) -> Result<Arc<FileOrigin>, FetchError> {
        Err(FetchError::Permanent {
            origin: crate::signature::cut(url).to_string(),
            cause: "HTTP is not built yet".into(),
        })
    }
}
