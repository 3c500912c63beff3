//! Locator: a backing name, parsed, and what it may lead to.
//!
//! - A name is read as QEMU reads it: a `:` before any `/` is a protocol; other names are paths, relative to the folder (or URL)
//!   of the image that holds them.
//! - What is printed or stored never holds a user, a password or what signs a URL.
//! - I8: a local image may name anything. An image that came over HTTP may name only its own scheme, host and port, never a
//!   local path, unless the user's [`AllowBacking`] patterns say more.
//!
//! Not here: opening anything (`open`), and the headers that go with a URL (`credentials`).

use std::path::{Component, Path, PathBuf};

use url::Url;

use crate::signature;

/// Where the bytes of an image or backing are.
#[derive(Clone, PartialEq, Eq)]
pub enum Locator {
    /// A path of this machine, as given (a relative one belongs to the working directory).
    File(PathBuf),
    /// An http or https URL, with the user and the signature that it was given with.
    Http(Url),
}

/// Why a name leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocatorError {
    /// The name is empty, or holds a NUL.
    #[error("'{name}' is not a file name")]
    NotAName {
        /// As given.
        name: String,
    },
    /// A `json:` pseudo name.
    #[error("a json: name is not supported: name the file or URL itself, and its format apart from it")]
    Json,
    /// Another protocol.
    #[error("Unknown protocol '{protocol}': readonce reads files, http:// and https://")]
    Protocol {
        /// What stands before the `:`.
        protocol: String,
    },
    /// An http(s) name that is no URL.
    #[error("'{name}' is not a valid URL: {cause}")]
    Url {
        /// As given, without what must not be printed.
        name: String,
        /// The parser's words.
        cause: String,
    },
    /// The policy I8 says no.
    #[error("{parent} may not name {child} as its backing: {why} (--allow-backing permits it)")]
    NotAllowed {
        /// Printable name of the image that names it.
        parent: String,
        /// Printable name of what it names.
        child: String,
        /// In words.
        why: &'static str,
    },
}

impl Locator {
    /// Reads a name. `relative_to` is the image that holds it; a name that the user typed has none.
    ///
    /// # Errors
    /// Not a name, not a valid URL, or a protocol that is not read. Whether the name is allowed is for [`AllowBacking::check`].
    pub fn parse(name: &str, relative_to: Option<&Locator>) -> Result<Self, LocatorError> {
        if name.is_empty() || name.contains('\0') {
            return Err(LocatorError::NotAName { name: name.replace('\0', "\\0") });
        }
        match protocol(name) {
            Some((protocol, rest)) => Self::parse_protocol(name, protocol, rest),
            None => match relative_to {
                Some(Self::File(image)) => Ok(Self::File(sibling(image, name))),
                // An absolute path is one of this machine, also in an image that came over HTTP: QEMU reads it so, and the
                // policy then refuses it.
                Some(Self::Http(_)) if name.starts_with('/') => Ok(Self::File(PathBuf::from(name))),
                Some(Self::Http(image)) => sibling_url(image, name),
                None => Ok(Self::File(PathBuf::from(name))),
            },
        }
    }

    fn parse_protocol(name: &str, protocol: &str, rest: &str) -> Result<Self, LocatorError> {
        match protocol.to_ascii_lowercase().as_str() {
            "http" | "https" => parse_url(name).map(Self::Http),
            "json" => Err(LocatorError::Json),
            "file" => {
                // As QEMU: what follows is the path as it stands, without percent-decoding. A host is accepted only if it is
                // this one.
                let path = match rest.strip_prefix("//") {
                    Some(after) => match after.strip_prefix("localhost") {
                        Some(path) if path.starts_with('/') => path,
                        _ => after,
                    },
                    None => rest,
                };
                if path.is_empty() {
                    return Err(LocatorError::NotAName { name: name.to_string() });
                }
                Ok(Self::File(PathBuf::from(path)))
            }
            _ => Err(LocatorError::Protocol { protocol: protocol.to_string() }),
        }
    }

    /// Name to print: no user, password or signature in it.
    pub fn printable(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Http(url) => signature::cut(url).to_string(),
        }
    }

    /// Name to store in an image: user, password, fragment and what signs the URL are cut away, the rest of the query kept.
    pub fn stored_name(&self) -> String {
        self.printable()
    }

    /// Whether both name the same place once signatures are cut: a freshly signed URL stands for a stored name.
    pub fn same_place(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(a), Self::File(b)) => a == b,
            (Self::Http(a), Self::Http(b)) => signature::cut(a) == signature::cut(b),
            _ => false,
        }
    }

    /// Whether an image at this place may name `child` as its backing without leave of the user (I8).
    pub fn may_name(&self, child: &Self) -> bool {
        self.why_not_name(child).is_none()
    }

    fn why_not_name(&self, child: &Self) -> Option<&'static str> {
        match (self, child) {
            (Self::File(_), _) => None,
            (Self::Http(_), Self::File(_)) => {
                Some("an image read over the network may not name a local file")
            }
            (Self::Http(parent), Self::Http(child)) => {
                if parent.scheme() == "https" && child.scheme() == "http" {
                    Some("it goes from https to http")
                } else if !same_authority(parent, child) {
                    Some("it is at another host")
                } else {
                    None
                }
            }
        }
    }
}

impl std::fmt::Display for Locator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.printable())
    }
}

/// Prints no user, password or signature: a locator may end up in a log.
impl std::fmt::Debug for Locator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Http(_) => f.debug_tuple("Http").field(&self.printable()).finish(),
        }
    }
}

/// What the user permits beyond the policy: `--allow-backing PATTERN`, where `*` stands for any run of characters.
///
/// A pattern is compared with the printable name: a URL without user and signature, or an absolute path in which `.` and `..`
/// are resolved (symbolic links are not). To permit a host write `https://host/*`, with the slash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowBacking {
    patterns: Vec<String>,
}

impl AllowBacking {
    /// The patterns, each as typed.
    pub fn new(patterns: impl IntoIterator<Item = String>) -> Self {
        Self { patterns: patterns.into_iter().collect() }
    }

    /// Whether the image at `parent` may have `child` as its backing.
    ///
    /// # Errors
    /// [`LocatorError::NotAllowed`], with the reason.
    pub fn check(&self, parent: &Locator, child: &Locator) -> Result<(), LocatorError> {
        let Some(why) = parent.why_not_name(child) else { return Ok(()) };
        let name = match child {
            Locator::File(path) => match resolved(path) {
                Some(path) => path,
                None => return Err(not_allowed(parent, child, "its path is not absolute")),
            },
            Locator::Http(_) => child.printable(),
        };
        if self.patterns.iter().any(|pattern| glob(pattern, &name)) {
            return Ok(());
        }
        Err(not_allowed(parent, child, why))
    }
}

fn not_allowed(parent: &Locator, child: &Locator, why: &'static str) -> LocatorError {
    LocatorError::NotAllowed { parent: parent.printable(), child: child.printable(), why }
}

/// Whether two URLs share scheme, host and port: as far as a credential may go.
pub fn same_authority(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// What stands before a `:` that comes before any `/`, and what follows it.
fn protocol(name: &str) -> Option<(&str, &str)> {
    let end = name.find([':', '/'])?;
    let (protocol, rest) = name.split_at(end);
    Some((protocol, rest.strip_prefix(':')?))
}

fn parse_url(name: &str) -> Result<Url, LocatorError> {
    let refuse = |cause: &str| LocatorError::Url {
        // The name could not be taken apart, so nothing of it that might be a password is printed.
        name: match name.find(['@', '?']) {
            Some(_) => format!("{}…", name.split("://").next().unwrap_or_default()),
            None => name.to_string(),
        },
        cause: cause.to_string(),
    };
    // The parser would also take `http:/host` and `http:host`, which no other tool reads so.
    if !name.get(..8).unwrap_or(name).contains("://") {
        return Err(refuse("'//' is missing after the protocol"));
    }
    let mut url = Url::parse(name).map_err(|error| refuse(&error.to_string()))?;
    url.set_fragment(None);
    Ok(url)
}

/// The path beside an image, as text and without asking the file system.
fn sibling(image: &Path, name: &str) -> PathBuf {
    match image.parent() {
        Some(folder) => folder.join(name),
        None => PathBuf::from(name),
    }
}

/// The URL beside an image. Put together as text: with a relative URL's rules `\\other\x` or `//other/x` would lead to another host.
fn sibling_url(image: &Url, name: &str) -> Result<Locator, LocatorError> {
    let mut base = image.clone();
    base.set_query(None);
    base.set_fragment(None);
    let base = base.as_str();
    let folder_end = base.rfind('/').map_or(base.len(), |slash| slash.saturating_add(1));
    let folder = base.get(..folder_end).unwrap_or(base);
    parse_url(&format!("{folder}{name}")).map(Locator::Http)
}

/// The path with `.` and `..` resolved as text; `None` for a relative one.
fn resolved(path: &Path) -> Option<String> {
    if !path.is_absolute() {
        return None;
    }
    let mut out = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(out.display().to_string())
}

/// Whether `pattern` matches all of `text`; `*` stands for any run of characters. Linear in practice, never exponential: only
/// the last star is ever tried again.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    star = Some((star_p, star_t + 1));
                    p = star_p + 1;
                    t = star_t + 1;
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Locator {
        Locator::parse(name, None).expect(name)
    }

    fn beside(image: &str, name: &str) -> String {
        match Locator::parse(name, Some(&parse(image))) {
            Ok(locator) => locator.printable(),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn a_name_is_read_as_qemu_reads_it() {
        assert_eq!(parse("base.raw"), Locator::File("base.raw".into()));
        assert_eq!(parse("/a/b.raw"), Locator::File("/a/b.raw".into()));
        assert_eq!(parse("./odd:name"), Locator::File("./odd:name".into()));
        assert_eq!(parse("file:a b.raw"), Locator::File("a b.raw".into()));
        assert_eq!(parse("file:///a%20b.raw"), Locator::File("/a%20b.raw".into()));
        assert_eq!(parse("file://localhost/x"), Locator::File("/x".into()));
        assert_eq!(parse("HTTP://Host:80/x"), parse("http://host/x"));
        for (name, message) in [
            ("", "not a file name"),
            ("a\0b", "not a file name"),
            ("json:{\"driver\":\"raw\"}", "json: name is not supported"),
            ("nbd://host/x", "Unknown protocol 'nbd'"),
            ("odd:name", "Unknown protocol 'odd'"),
            ("http:/host/x", "not a valid URL"),
            ("http://", "not a valid URL"),
            ("http://ho st/x", "not a valid URL"),
        ] {
            let error = Locator::parse(name, None).expect_err(name).to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
        let error = Locator::parse("http://me:secret@ho st/", None).expect_err("a space in a host");
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    /// Names put together from every piece that means something: none may panic, and what comes out must hold what is promised.
    #[test]
    fn any_name_is_read_or_refused() {
        const PIECES: &[&str] = &[
            "http:",
            "https:",
            "file:",
            "json:",
            "nbd:",
            "/",
            "//",
            "\\",
            "..",
            ".",
            "h",
            "H:80",
            ":99999",
            "@",
            "u:p@",
            "?",
            "sig=s3cret",
            "&sv=1",
            "#",
            "%",
            "%2e",
            "%00",
            "[::1]",
            " ",
            "\u{e9}",
            "\u{202e}",
            "\n",
            "*",
        ];
        let images = [parse("/d/i.qed"), parse("http://h/d/i.qed")];
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut name = String::new();
            for _ in 0..7 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                name.push_str(PIECES[(state >> 33) as usize % PIECES.len()]);
            }
            for image in &images {
                let Ok(child) = Locator::parse(&name, Some(image)) else { continue };
                let Locator::Http(url) = &child else { continue };
                let shown = child.printable();
                let clean = Url::parse(&shown).expect("it was one");
                assert!(clean.username().is_empty() && clean.password().is_none(), "{name:?} -> {shown}");
                assert!(clean.query_pairs().all(|(name, _)| name != "sig"), "{name:?} -> {shown}");
                let again = parse(&child.stored_name());
                assert!(again.same_place(&child), "{name:?} -> {shown}");
                let local = matches!(image, Locator::File(_));
                let same = url.host_str() == Some("h") && url.port_or_known_default() == Some(80);
                assert!(!image.may_name(&child) || local || same, "{name:?} -> {shown}");
            }
        }
    }

    #[test]
    fn a_relative_name_belongs_to_the_image_that_holds_it() {
        assert_eq!(beside("dir/top.qed", "base.qed"), "dir/base.qed");
        assert_eq!(beside("top.qed", "base.qed"), "base.qed");
        assert_eq!(beside("/a/top.qed", "../b/base.qed"), "/a/../b/base.qed");
        assert_eq!(beside("/a/top.qed", "/c"), "/c");
        assert_eq!(beside("http://h/a/top.qed?sig=1", "base.qed"), "http://h/a/base.qed");
        assert_eq!(beside("http://h/a/top.qed", "../base.qed"), "http://h/base.qed");
        assert_eq!(beside("http://h", "base.qed"), "http://h/base.qed");
        assert_eq!(beside("http://h/a/top.qed", "\\\\evil\\x"), "http://h/a///evil/x");
        assert_eq!(beside("http://h/a/top.qed", "//evil/x"), "//evil/x");
        assert_eq!(beside("http://h/a/top.qed", "/etc/shadow"), "/etc/shadow");
    }

    #[test]
    fn an_image_from_the_network_names_only_its_own_host() {
        let local = parse("/images/top.qed");
        let remote = parse("https://h:8443/a/top.qed");
        for child in ["/etc/shadow", "http://any/x", "rel", "https://h:8443/b"] {
            assert!(local.may_name(&parse(child)), "{child}");
        }
        assert!(remote.may_name(&parse("https://h:8443/b")));
        assert!(remote.may_name(&parse("https://H:8443/b?x=1")));
        for child in [
            "/etc/shadow",
            "rel",
            "http://h:8443/b",
            "https://h/b",
            "https://h2:8443/b",
            "https://h:8443@evil/b",
        ] {
            assert!(!remote.may_name(&parse(child)), "{child}");
        }
        assert!(!parse("http://h/a").may_name(&parse("https://h/a")));
    }

    #[test]
    fn the_user_may_permit_more() {
        let remote = parse("http://h/top.qed");
        let allow = AllowBacking::new(["https://cdn/*.raw".to_string(), "/srv/images/*".to_string()]);
        let check = |child: &str| allow.check(&remote, &parse(child)).is_ok();
        assert!(check("http://h/other"));
        assert!(check("https://cdn/a/b.raw"));
        assert!(check("https://cdn/b.raw?X-Amz-Signature=1"));
        assert!(check("/srv/images/a/b"));
        assert!(check("/srv/images/../images/a"));
        assert!(!check("/srv/images/../../etc/shadow"));
        assert!(!check("srv/images/a"));
        assert!(!check("https://cdn.evil/b.raw"));
        assert!(!check("https://cdn/b.raw2"));
        let error = AllowBacking::default().check(&remote, &parse("/etc/shadow")).expect_err("a local path");
        assert_eq!(
            error.to_string(),
            "http://h/top.qed may not name /etc/shadow as its backing: an image read over the network may not name a \
             local file (--allow-backing permits it)"
        );
    }

    #[test]
    fn a_glob_matches_whole_names() {
        assert!(glob("*", ""));
        assert!(glob("a*c*e", "abcde"));
        assert!(glob("*ab", "aab"));
        assert!(!glob("a*b", "abc"));
        assert!(!glob("", "a"));
        assert!(glob("a**", "a"));
    }

    #[test]
    fn secrets_are_neither_printed_nor_stored() {
        let locator = parse("https://me:secret@h/x?id=7&X-Amz-Signature=abc#frag");
        assert_eq!(locator.printable(), "https://h/x?id=7");
        assert_eq!(locator.stored_name(), "https://h/x?id=7");
        assert_eq!(format!("{locator:?}"), "Http(\"https://h/x?id=7\")");
        assert!(locator.same_place(&parse("https://h/x?id=7")));
        assert!(locator.same_place(&parse("https://h/x?X-Amz-Signature=zzz&id=7")));
        assert!(!locator.same_place(&parse("https://h/x?id=8")));
        assert!(!locator.same_place(&parse("/x")));
    }
}
