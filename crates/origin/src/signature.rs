//! Signature: the parts of a URL that grant access rather than name the file, and their removal.
//!
//! - What is left names the same file for ever; what is cut expires, and is given again at open.
//! - A short name that could mean anything (`se`, `sp`, `md5`) is cut only beside what makes it part of a signature.
//!
//! Not here: what is stored or compared (`locator`).

use url::Url;

/// Parameters that sign whenever they are there, in lower case.
const SIGNING: &[&str] = &[
    "sig",
    "signature",
    "sign",
    "expires",
    "key-pair-id",
    "policy",
    "token",
    "access_token",
    "auth_token",
    "auth",
    "authorization",
    "awsaccesskeyid",
    "googleaccessid",
    "ossaccesskeyid",
    "security-token",
    "apikey",
    "api_key",
    "access_key",
    "secret",
    "password",
    "jwt",
    "hmac",
    "sas",
    "hdnts",
    "hdnea",
    "hdntl",
    "__token__",
    "__gda__",
    "q-ak",
    "q-signature",
    "q-key-time",
    "q-header-list",
    "q-url-param-list",
];

/// Families of parameters that sign, by the beginning of their name.
const SIGNING_PREFIXES: &[&str] = &["x-amz-", "x-goog-", "x-oss-", "x-ms-", "x-cos-", "q-sign-"];

/// What an Azure shared access signature holds beside `sig`.
const AZURE: &[&str] = &[
    "sv", "ss", "srt", "sr", "sp", "st", "se", "spr", "sip", "si", "sdd", "ses", "skoid", "sktid", "skt",
    "ske", "sks", "skv", "saoid", "suoid", "scid",
];

/// The URL without user, password, fragment, and what signs it; the rest of the query stays as it is, in order.
pub fn cut(url: &Url) -> Url {
    let mut out = url.clone();
    // Both fail only for URLs that cannot have a user; http and https always can.
    let _ = out.set_username("");
    let _ = out.set_password(None);
    out.set_fragment(None);
    let Some(query) = url.query() else { return out };
    let names: Vec<String> = query.split('&').map(name).collect();
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    // `sig` alone could be a pair of anything; with one of its companions it is a shared access signature.
    let azure = has("sig");
    let nginx_secure_link = has("expires");
    let signs = |name: &str| {
        SIGNING.contains(&name)
            || SIGNING_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            || (azure && AZURE.contains(&name))
            || (nginx_secure_link && matches!(name, "md5" | "st"))
    };
    let kept: Vec<&str> =
        query.split('&').zip(&names).filter(|(_, name)| !signs(name)).map(|(pair, _)| pair).collect();
    out.set_query(if kept.is_empty() { None } else { Some(kept.join("&")) }.as_deref());
    out
}

/// The decoded name of a `name=value` pair, in lower case.
fn name(pair: &str) -> String {
    url::form_urlencoded::parse(pair.as_bytes())
        .next()
        .map(|(name, _)| name.to_ascii_lowercase())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, left: &str) {
        assert_eq!(cut(&Url::parse(url).expect("a URL")).as_str(), left);
    }

    #[test]
    fn what_signs_is_cut() {
        check(
            "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4&X-Amz-Credential=a%2Fb&X-Amz-Date=1&X-Amz-Expires=60\
             &X-Amz-SignedHeaders=host&X-Amz-Signature=ff&versionId=3",
            "https://b.s3.amazonaws.com/k?versionId=3",
        );
        check("https://h/k?X-Goog-Signature=1&x-goog-date=2&generation=5", "https://h/k?generation=5");
        check(
            "https://a.blob.core.windows.net/c/b?sv=2022&se=x&sr=b&sp=r&sig=q%3D",
            "https://a.blob.core.windows.net/c/b",
        );
        check("https://d.cloudfront.net/x?Expires=1&Signature=s&Key-Pair-Id=k", "https://d.cloudfront.net/x");
        check("https://d.cloudfront.net/x?Policy=p&Signature=s&Key-Pair-Id=k", "https://d.cloudfront.net/x");
        check("http://h/x?md5=abc&expires=9", "http://h/x");
        check("http://h/x?To%6ben=abc&a=1", "http://h/x?a=1");
    }

    #[test]
    fn what_names_the_file_stays_as_it_is() {
        check("http://h/x?b=2&a=%2F&a=1&flag", "http://h/x?b=2&a=%2F&a=1&flag");
        check("http://h/x?sp=1&se=2&md5=3", "http://h/x?sp=1&se=2&md5=3");
        check("http://u:p@h/x?", "http://h/x?");
    }
}
