//! Redirect: where a Location leads, and whether we go there. Pure.
//!
//! - Never from https to http, nowhere but http(s), and at most [`HOPS_MAX`] times for one request.
//! - A user or password in a Location is not used: a server does not hand out authority over another.
//!
//! Not here: keeping and forgetting the resolved URL (`remote`), and which headers go along (`credentials`).

use url::Url;

use crate::{signature, validator::brief};

/// Redirects in a row that are followed.
pub const HOPS_MAX: usize = 10;

/// The URL that `location`, sent by `from`, leads to.
///
/// # Errors
/// Why we do not go there, in words that hold no signature.
pub fn target(from: &Url, location: &str) -> Result<Url, String> {
    let mut to = from.join(location).map_err(|error| format!("redirected to an invalid URL: {error}"))?;
    if !matches!(to.scheme(), "http" | "https") {
        return Err(format!("redirected to {}:, which is not http", brief(to.scheme())));
    }
    // Both fail only for URLs that cannot have a user; http and https always can.
    let _ = to.set_username("");
    let _ = to.set_password(None);
    to.set_fragment(None);
    if from.scheme() == "https" && to.scheme() == "http" {
        return Err(format!("redirected from https to http ({})", brief(signature::cut(&to).as_str())));
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(from: &str, location: &str, leads: &str) {
        let to = match target(&Url::parse(from).expect("a URL"), location) {
            Ok(url) => url.to_string(),
            Err(cause) => cause,
        };
        assert_eq!(to, leads);
    }

    #[test]
    fn a_location_is_followed_within_bounds() {
        check("http://a/b/c", "d?x=1#f", "http://a/b/d?x=1");
        check("http://a/b/c", "/d", "http://a/d");
        check("http://a/b", "//c:81/d", "http://c:81/d");
        check("http://a/b", "https://me:pw@c/d", "https://c/d");
        check("https://a/b", "http://a/b?sig=1", "redirected from https to http (http://a/b)");
        check("http://a/b", "file:///etc/passwd", "redirected to file:, which is not http");
        check("http://a/b", "http://", "redirected to an invalid URL: empty host");
    }
}
