//! Locators: any name, beside any image. What is stored or printed holds no secret and leads to the same place.

use readonce_origin::{AllowBacking, Locator};
use url::Url;

use crate::draw::Draw;

/// What a name is put together from: everything that means something in one.
const PIECES: &[&str] = &[
    "http://",
    "https://",
    "http:",
    "HTTP://",
    "file:",
    "file://",
    "file://localhost/",
    "json:",
    "nbd:",
    "/",
    "//",
    "\\",
    "..",
    ".",
    "h",
    "host",
    "H:80",
    ":8080",
    ":99999",
    "@",
    "u:p@",
    "?",
    "a=1",
    "sig=",
    "&sv=1",
    "&",
    "=",
    "#",
    "%",
    "%2e",
    "%00",
    "%40",
    "[::1]",
    "127.1",
    "xn--",
    " ",
    "\t",
    "\n",
    "\u{e9}",
    "\u{202e}",
    "*",
    ";",
    "x",
];
const BASES: &[&str] = &[
    "i.qed",
    "/d/i.qed",
    "file:a:b/i.qed",
    "http://h/d/i.qed",
    "https://u:p@h:8443/d/i.qed?sig=1",
    "http://h",
    "http://[::1]/i",
];
/// Never to be stored or printed.
const SECRETS: [&str; 3] = ["us3r", "s3cret", "s1gned"];

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    if draw.once_in(4) {
        let name = signed(&mut draw);
        is_silent(&name);
        any_name(&name, None);
        return;
    }
    let name = if draw.once_in(4) {
        String::from_utf8_lossy(draw.rest()).into_owned()
    } else {
        (0..draw.below(12)).map(|_| draw.of(PIECES)).collect()
    };
    any_name(&name, None);
    for base in BASES {
        any_name(&name, Some(&Locator::parse(base, None).expect("they are names")));
    }
}

/// A URL with secrets in every place for one.
fn signed(draw: &mut Draw<'_>) -> String {
    const KEYS: &[&str] = &[
        "sig",
        "X-Amz-Signature",
        "x-goog-signature",
        "Signature",
        "token",
        "To%6ben",
        "access_token",
        "Policy",
        "hdnts",
        "x-ms-key",
        "password",
        "auth",
        "X%2dAmz-Credential",
        "sas",
    ];
    let mut name = draw.of(&["http://", "https://", "HTTPS://", "hTTp://"]).to_owned();
    name.push_str(draw.of(&[
        "us3r:s3cret@",
        "us3r@",
        ":s3cret@",
        "us3r:s3cret%40x@",
        "us3r:s3cret@s3cret@",
        "",
    ]));
    name.push_str(draw.of(&["h", "host:8080", "[::1]:1", "h%20st", "", "h:99999", "ho st"]));
    name.push_str(draw.of(&["/x", "", "/a/../b", "/%00", "/a%3fb"]));
    for index in 0..draw.below(4) {
        name.push_str(if index == 0 { "?" } else { "&" });
        name.push_str(draw.of(&["a=1&", "", "flag&"]));
        name.push_str(draw.of(KEYS));
        name.push_str("=s1gned");
    }
    name.push_str(draw.of(&["", "#frag", "#a?b"]));
    name
}

fn is_silent(name: &str) {
    let said = match Locator::parse(name, None) {
        Ok(locator) => {
            vec![locator.stored_name(), locator.printable(), locator.to_string(), format!("{locator:?}")]
        }
        Err(error) => vec![error.to_string()],
    };
    for text in said {
        for secret in SECRETS {
            assert!(!text.contains(secret), "{name:?}: {text:?} tells a secret");
        }
    }
}

fn any_name(name: &str, base: Option<&Locator>) {
    let locator = match Locator::parse(name, base) {
        Ok(locator) => locator,
        Err(error) => {
            assert!(error.to_string().len() < 256 + 8 * name.len());
            return;
        }
    };
    assert!(locator.same_place(&locator));
    if let Locator::Http(url) = &locator {
        let stored = locator.stored_name();
        let again = Locator::parse(&stored, None).expect("what is stored can be read");
        assert!(again.same_place(&locator), "{name:?}: stored as {stored:?}, which is elsewhere");
        assert_eq!(again.stored_name(), stored, "{name:?}: storing it again changes it");
        assert!(matches!(url.scheme(), "http" | "https"));
        let parsed = Url::parse(&stored).expect("a URL");
        assert_eq!((parsed.username(), parsed.password(), parsed.fragment()), ("", None, None), "{name:?}");
        assert_eq!(
            (parsed.host(), parsed.port_or_known_default()),
            (url.host(), url.port_or_known_default())
        );
    }
    let Some(base) = base else { return };
    // I8, decided again: an image from the network leads to its own scheme, host and port.
    let Locator::Http(image) = base else {
        assert!(base.may_name(&locator));
        return;
    };
    let inside = match &locator {
        Locator::File(_) => false,
        Locator::Http(child) => {
            child.scheme() == image.scheme()
                && child.host_str() == image.host_str()
                && child.port_or_known_default() == image.port_or_known_default()
        }
    };
    assert_eq!(base.may_name(&locator), inside, "{name:?} beside {base}");
    assert_eq!(AllowBacking::default().check(base, &locator).is_ok(), inside);
    let all = AllowBacking::new(["*".to_owned()]);
    let relative = matches!(&locator, Locator::File(path) if path.is_relative());
    assert!(relative || all.check(base, &locator).is_ok());
}
