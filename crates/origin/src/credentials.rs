//! Credentials: request headers that grant access, each bound to the scheme, host and port that it was given for (I8).
//!
//! - They come from the environment, or a file that it names, or the user part of a URL that the user typed; never from an image
//!   and never from the command line.
//! - A header goes only to the scheme, host and port that it is bound to, redirects included.
//! - They are never printed: `Debug` shows hosts and names only.
//!
//! Not here: what signs a URL (`signature`), and when requests are made.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use crate::locator::same_authority;

/// User for Basic authentication.
pub const USER_VARIABLE: &str = "READONCE_HTTP_USER";
/// Password for Basic authentication.
pub const PASSWORD_VARIABLE: &str = "READONCE_HTTP_PASSWORD";
/// Bearer token.
pub const TOKEN_VARIABLE: &str = "READONCE_HTTP_TOKEN";
/// Path of a file of headers.
pub const HEADERS_FILE_VARIABLE: &str = "READONCE_HTTP_HEADERS_FILE";
/// What the variables above are bound to: `https://host:port`, or a bare host, which means https. Without it: the URL that
/// the user named.
pub const HOST_VARIABLE: &str = "READONCE_HTTP_HOST";

/// Bytes of a headers file.
const HEADERS_FILE_BYTES_MAX: usize = 64 * 1024;

/// Headers that our own requests decide on.
const RESERVED: &[&str] = &[
    "host",
    "range",
    "if-match",
    "if-none-match",
    "if-range",
    "if-modified-since",
    "if-unmodified-since",
    "accept-encoding",
    "content-length",
    "transfer-encoding",
    "connection",
    "te",
    "upgrade",
    "expect",
];

/// Request headers, each bound to one scheme, host and port.
#[derive(Clone, Default)]
pub struct Credentials {
    bound: Vec<Bound>,
    /// A variable that is set, where no host is known to bind it to.
    bound_to_no_host: Option<&'static str>,
}

#[derive(Clone)]
struct Bound {
    /// Only its scheme, host and port count.
    to: Url,
    name: HeaderName,
    value: HeaderValue,
}

/// What is wrong with the credentials that were given. Never holds a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// The host is no URL.
    #[error("{variable} is '{value}', must be https://HOST[:PORT], http://HOST[:PORT] or a host name")]
    Host {
        /// Which variable, or line of the file.
        variable: String,
        /// As given.
        value: String,
    },
    /// Two ways to authenticate at once.
    #[error("{USER_VARIABLE} and {TOKEN_VARIABLE} are both set: only one of them can be sent")]
    Both,
    /// A value that no header can hold.
    #[error("{variable} cannot be sent in a header: it holds a control character")]
    Value {
        /// Which variable, or line of the file.
        variable: String,
    },
    /// A line of the headers file.
    #[error("{file}, line {line}: {cause}")]
    Line {
        /// Path.
        file: String,
        /// From 1.
        line: usize,
        /// In words.
        cause: String,
    },
    /// The headers file cannot be read.
    #[error("{file}: {cause}")]
    File {
        /// Path.
        file: String,
        /// In words.
        cause: String,
    },
}

impl Credentials {
    /// No credentials.
    pub fn none() -> Self {
        Self::default()
    }

    /// Credentials from the environment. `named` is the URL that the user named on the command line or in `READONCE_URL`; a
    /// name that only an image holds must not be given here, since an image is no authority.
    ///
    /// Without `named` and without `READONCE_HTTP_HOST` nothing is bound, and nothing is sent.
    ///
    /// # Errors
    /// A malformed variable or file.
    pub fn from_environment(named: Option<&Url>) -> Result<Self, CredentialsError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self::from_variables(&variable, named)
    }

    /// As [`Credentials::from_environment`], with the variables from `variable`.
    ///
    /// # Errors
    /// A malformed variable or file.
    pub fn from_variables(
        variable: &dyn Fn(&str) -> Option<String>,
        named: Option<&Url>,
    ) -> Result<Self, CredentialsError> {
        let to = match variable(HOST_VARIABLE) {
            Some(value) => Some(parse_host(&value).ok_or_else(|| CredentialsError::Host {
                variable: HOST_VARIABLE.to_string(),
                value: value.clone(),
            })?),
            None => named.cloned(),
        };
        let mut credentials = Self::none();
        let user = variable(USER_VARIABLE);
        let token = variable(TOKEN_VARIABLE);
        let authorization = match (&user, &token) {
            (Some(_), Some(_)) => return Err(CredentialsError::Both),
            (Some(user), None) => {
                let password = variable(PASSWORD_VARIABLE).unwrap_or_default();
                Some((basic(user, &password), USER_VARIABLE))
            }
            (None, Some(token)) => Some((format!("Bearer {token}"), TOKEN_VARIABLE)),
            (None, None) => None,
        };
        if to.is_none() {
            credentials.bound_to_no_host = authorization.as_ref().map(|(_, variable)| *variable);
        }
        if let (Some((value, variable)), Some(to)) = (authorization, &to) {
            let value = HeaderValue::from_str(&value)
                .map_err(|_| CredentialsError::Value { variable: variable.to_string() })?;
            credentials.bind(to, http::header::AUTHORIZATION, value);
        }
        if let Some(file) = variable(HEADERS_FILE_VARIABLE) {
            let fail = |cause: String| CredentialsError::File { file: file.clone(), cause };
            let text = std::fs::read_to_string(&file).map_err(|error| fail(error.to_string()))?;
            if text.len() > HEADERS_FILE_BYTES_MAX {
                return Err(fail(format!(
                    "is {} bytes, at most {HEADERS_FILE_BYTES_MAX} are read",
                    text.len()
                )));
            }
            credentials.add_headers_file(&file, &text, to.as_ref())?;
        }
        Ok(credentials)
    }

    /// Adds the lines of a headers file: `Name: value`, empty lines, `#` comments, and `[https://host:port]`, which binds the lines
    /// after it; lines before the first such go to `default`.
    ///
    /// # Errors
    /// The first malformed line.
    pub fn add_headers_file(
        &mut self,
        file: &str,
        text: &str,
        default: Option<&Url>,
    ) -> Result<(), CredentialsError> {
        let mut to = default.cloned();
        for (index, line) in text.lines().enumerate() {
            let fail = |cause: &str| CredentialsError::Line {
                file: file.to_string(),
                line: index.saturating_add(1),
                cause: cause.to_string(),
            };
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(section) = line.strip_prefix('[') {
                let host = section.strip_suffix(']').and_then(parse_host);
                to = Some(host.ok_or_else(|| fail("a section must be [https://HOST:PORT]"))?);
                continue;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| fail("must be 'Name: value'"))?;
            let name =
                HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| fail("is not a header name"))?;
            if RESERVED.contains(&name.as_str()) {
                return Err(fail(&format!("the header {name} is set by readonce itself")));
            }
            let value =
                HeaderValue::from_str(value.trim()).map_err(|_| fail("the value cannot be in a header"))?;
            let Some(to) = &to else { return Err(fail("no host: put [https://HOST] before it")) };
            self.bind(to, name, value);
        }
        Ok(())
    }

    /// Adds the user and password of a URL that the user typed, bound to that URL's scheme, host and port. Those of the
    /// environment for the same place win, as they are the more deliberate.
    pub fn add_user_of(&mut self, url: &Url) {
        if url.username().is_empty() && url.password().is_none() {
            return;
        }
        let taken =
            |bound: &Bound| same_authority(&bound.to, url) && bound.name == http::header::AUTHORIZATION;
        if self.bound.iter().any(taken) {
            return;
        }
        let value = basic(&decode(url.username()), &decode(url.password().unwrap_or_default()));
        // Base64 holds nothing that a header could not.
        if let Ok(value) = HeaderValue::from_str(&value) {
            self.bind(url, http::header::AUTHORIZATION, value);
        }
    }

    /// Binds a header to the scheme, host and port of `to`.
    pub fn bind(&mut self, to: &Url, name: HeaderName, mut value: HeaderValue) {
        value.set_sensitive(true);
        self.bound.push(Bound { to: crate::signature::cut(to), name, value });
    }

    /// The headers that may go to `url`.
    pub fn headers_for(&self, url: &Url) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for bound in self.bound.iter().filter(|bound| same_authority(&bound.to, url)) {
            headers.append(bound.name.clone(), bound.value.clone());
        }
        headers
    }

    /// Whether there are any, for whatever host.
    pub fn is_empty(&self) -> bool {
        self.bound.is_empty()
    }

    /// The variable that is set, but bound to nothing and so never sent: nothing says which host it is for.
    pub fn bound_to_no_host(&self) -> Option<&'static str> {
        self.bound_to_no_host
    }

    /// What they are bound to, each once: scheme, host and port.
    pub(crate) fn places(&self) -> Vec<String> {
        let mut places: Vec<String> = self.bound.iter().map(|bound| authority(&bound.to)).collect();
        places.sort();
        places.dedup();
        places
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.bound.iter().map(|bound| format!("{} for {}", bound.name, authority(&bound.to)));
        f.debug_list().entries(shown).finish()
    }
}

/// `scheme://host:port`.
pub(crate) fn authority(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// `https://host:port`, `http://host:port`, or `host[:port]` for https.
fn parse_host(value: &str) -> Option<Url> {
    let value = value.trim();
    let url = match value.contains("://") {
        true => Url::parse(value).ok()?,
        false => Url::parse(&format!("https://{value}")).ok()?,
    };
    let plain = url.path() == "/" && url.query().is_none() && url.username().is_empty();
    (matches!(url.scheme(), "http" | "https") && plain).then_some(url)
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))
}

/// Percent-decoding of a URL's user part. Bytes that are no UTF-8 are replaced: no server could have given such a user.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while let Some(byte) = bytes.get(index) {
        let hex = (*byte == b'%')
            .then(|| bytes.get(index + 1..index + 3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match hex {
            Some(decoded) => {
                out.push(decoded);
                index += 3;
            }
            None => {
                out.push(*byte);
                index += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let [a, b, c] = [0, 1, 2].map(|index| u32::from(group.get(index).copied().unwrap_or(0)));
        let bits = a << 16 | b << 8 | c;
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            let shown = digit <= group.len();
            out.push(if shown { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).expect("a URL")
    }

    fn sent(credentials: &Credentials, to: &str) -> String {
        let headers = credentials.headers_for(&url(to));
        let mut out: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().expect("text"))).collect();
        out.sort();
        out.join(" ")
    }

    fn from(variables: &[(&str, &str)], named: Option<&str>) -> Result<Credentials, CredentialsError> {
        let find =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        Credentials::from_variables(&find, named.map(url).as_ref())
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_credential_goes_only_where_it_was_given_for() {
        let token = from(&[(TOKEN_VARIABLE, "t")], Some("https://h/image")).expect("valid");
        assert_eq!(sent(&token, "https://h:443/other"), "authorization=Bearer t");
        for elsewhere in ["http://h/x", "https://h:8443/x", "https://h.evil/x", "https://evil/h"] {
            assert_eq!(sent(&token, elsewhere), "", "{elsewhere}");
        }
        let user = from(
            &[(USER_VARIABLE, "me"), (PASSWORD_VARIABLE, "pw"), (HOST_VARIABLE, "http://h:81")],
            Some("https://other/"),
        )
        .expect("valid");
        assert_eq!(sent(&user, "http://h:81/x"), "authorization=Basic bWU6cHc=");
        assert_eq!(sent(&user, "https://other/"), "");
        let unbound = from(&[(TOKEN_VARIABLE, "t")], None).expect("valid");
        assert!(unbound.is_empty());
        assert_eq!(unbound.bound_to_no_host(), Some(TOKEN_VARIABLE));
        assert_eq!((token.bound_to_no_host(), user.bound_to_no_host()), (None, None));
    }

    #[test]
    fn the_user_of_a_typed_url_is_bound_to_it() {
        let mut credentials = Credentials::none();
        credentials.add_user_of(&url("http://me:p%40w@h/x"));
        assert_eq!(sent(&credentials, "http://h/y"), "authorization=Basic bWU6cEB3");
        assert_eq!(sent(&credentials, "http://g/y"), "");
        assert_eq!(format!("{credentials:?}"), "[\"authorization for http://h\"]");
    }

    #[test]
    fn a_headers_file_binds_its_sections() {
        let mut credentials = Credentials::none();
        let text = "# mine\nX-Key: one\n\n[http://b:81]\nX-Key: two\nX-More: a: b\n";
        credentials.add_headers_file("f", text, Some(&url("https://a/x"))).expect("valid");
        assert_eq!(sent(&credentials, "https://a/"), "x-key=one");
        assert_eq!(sent(&credentials, "http://b:81/"), "x-key=two x-more=a: b");
    }

    #[test]
    fn what_is_malformed_is_named_without_its_value() {
        let message =
            |result: Result<Credentials, CredentialsError>| result.expect_err("malformed").to_string();
        assert!(
            message(from(&[(HOST_VARIABLE, "ftp://x")], None)).starts_with("READONCE_HTTP_HOST is 'ftp://x'")
        );
        assert!(message(from(&[(USER_VARIABLE, "u"), (TOKEN_VARIABLE, "t")], None)).contains("both set"));
        let bad = message(from(&[(TOKEN_VARIABLE, "secret\n")], Some("http://h")));
        assert!(bad.contains(TOKEN_VARIABLE) && !bad.contains("secret"), "{bad}");
        let mut credentials = Credentials::none();
        let mut line = |text: &str| {
            let error = credentials.add_headers_file("f", text, None).expect_err("malformed").to_string();
            assert!(!error.contains("secret"), "{error}");
            error
        };
        assert_eq!(line("X: secret"), "f, line 1: no host: put [https://HOST] before it");
        assert_eq!(line("\nsecret"), "f, line 2: must be 'Name: value'");
        assert_eq!(line("[nowhere"), "f, line 1: a section must be [https://HOST:PORT]");
        assert_eq!(line("[h]\nRange: secret"), "f, line 2: the header range is set by readonce itself");
    }
}
