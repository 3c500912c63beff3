//! Redirects, proxies, and which credentials go where.

#![allow(clippy::disallowed_methods, reason = "tests run on the real clock")]

mod common;

use std::sync::Arc;

use common::{content, faulty, fetch, fetch_right, open, opened, options};
use readonce_origin::{Credentials, FetchError, Locator, OriginOptions, Proxies};
use readonce_testkit::{Fault, FaultyOrigin, OriginSpec, When};

fn to(location: String) -> Fault {
    Fault::Redirect { status: 302, location }
}

fn targets(server: &FaultyOrigin) -> Vec<String> {
    server.log().into_iter().map(|entry| entry.target).collect()
}

/// The Authorization headers that a server saw, `-` for none.
fn authorizations(server: &FaultyOrigin) -> Vec<String> {
    let seen = |headers: http::HeaderMap| match headers.get("authorization") {
        Some(value) => value.to_str().expect("text").to_string(),
        None => "-".to_string(),
    };
    server.log().into_iter().map(|entry| seen(entry.headers)).collect()
}

fn with_token(url: &str) -> OriginOptions {
    let variable = |name: &str| (name == "READONCE_HTTP_TOKEN").then(|| "t0ken".to_string());
    let named = url::Url::parse(url).expect("a URL");
    let credentials = Credentials::from_variables(&variable, Some(&named)).expect("valid");
    OriginOptions { credentials: Arc::new(credentials), ..options() }
}

#[tokio::test]
async fn a_redirect_is_resolved_once() {
    let server = faulty().await;
    server.fault(When::always().on("/image"), to("/moved/1".into()));
    server.fault(When::always().on("/moved/1"), to("2?token=x".into()));
    let origin = opened(&server.url(), &options()).await;
    fetch_right(&*origin, 0..10).await;
    fetch_right(&*origin, 10..20).await;
    let last = "/moved/2?token=x";
    assert_eq!(targets(&server), ["/image", "/moved/1", last, last, last]);
    assert_eq!(origin.stats().redirects, 2);
    assert_eq!(origin.name(), server.url());
}

#[tokio::test]
async fn a_target_that_expired_is_resolved_again() {
    for status in [401, 403, 404, 410] {
        let server = faulty().await;
        server.fault(When::next(1).on("/image"), to("/signed?n=1".into()));
        let origin = opened(&server.url(), &options()).await;
        server.fault(When::next(1).on("/signed"), Fault::Status { status, retry_after: None });
        server.fault(When::next(1).on("/image"), to("/signed?n=2".into()));
        fetch_right(&*origin, 0..10).await;
        fetch_right(&*origin, 10..20).await;
        let expected = ["/image", "/signed?n=1", "/signed?n=1", "/image", "/signed?n=2", "/signed?n=2"];
        assert_eq!(targets(&server), expected, "{status}");
        assert_eq!(origin.stats().retries, 0);
    }
}

#[tokio::test]
async fn a_fresh_target_that_is_denied_is_an_error() {
    let server = faulty().await;
    server.fault(When::always().on("/image"), to("/signed?sig=1&sv=2".into()));
    let origin = opened(&server.url(), &options()).await;
    server.fault(When::always().on("/signed"), Fault::Status { status: 403, retry_after: None });
    let error = fetch(&*origin, 0..10).await.expect_err("denied for good").to_string();
    let url = server.url();
    assert_eq!(error, format!("{url}: 403 Forbidden (redirected to {})", server.url_of("/signed")));
}

#[tokio::test]
async fn redirects_without_end_or_sense_are_errors() {
    for (location, words) in [
        ("/image", "more than 10 redirects"),
        ("ftp://h/x", "redirected to ftp:, which is not http"),
        ("http://", "redirected to an invalid URL: empty host"),
    ] {
        let server = faulty().await;
        server.fault(When::always().on("/image"), to(location.into()));
        let error = open(&server.url(), &options()).await.map(|_| ()).expect_err(location);
        assert!(matches!(error, FetchError::Permanent { .. }), "{error:?}");
        assert_eq!(error.to_string(), format!("{}: {words}", server.url()));
    }
}

#[tokio::test]
async fn a_token_stays_with_its_host() {
    let spec = || OriginSpec {
        require: Some(("authorization".into(), "Bearer t0ken".into())),
        ..OriginSpec::new(content())
    };
    let server = FaultyOrigin::start(spec()).await.expect("a port");
    let other = faulty().await;
    let url = server.url();

    let origin = opened(&url, &with_token(&url)).await;
    fetch_right(&*origin, 0..10).await;
    assert_eq!(authorizations(&server), ["Bearer t0ken", "Bearer t0ken"]);

    // Another port is another place: the redirect's target gets nothing.
    server.clear_log();
    server.fault(When::always(), to(other.url()));
    let origin = opened(&url, &with_token(&url)).await;
    fetch_right(&*origin, 0..10).await;
    assert_eq!(authorizations(&server), ["Bearer t0ken"]);
    assert_eq!(authorizations(&other), ["-", "-"]);

    // Given for another place, it is not sent, and the error says so.
    server.heal();
    let error = open(&url, &with_token(&other.url())).await.map(|_| ()).expect_err("no token, no file");
    let [there, here] = [&other, &server].map(|server| server.url().replace("/image", ""));
    let words = format!("the credentials that were given are for {there}, not for {here}");
    assert_eq!(error.to_string(), format!("{url}: 401 Unauthorized; {words}"));

    // A token alone does not say where it may go: people looked for what was wrong with the token.
    let token = |name: &str| (name == "READONCE_HTTP_TOKEN").then(|| "s3cret".to_owned());
    let credentials = Arc::new(Credentials::from_variables(&token, None).expect("valid"));
    let error = open(&url, &OriginOptions { credentials, ..options() }).await.map(|_| ());
    let words = "READONCE_HTTP_TOKEN is set, but not for which host: it is sent with READONCE_HTTP_HOST=";
    let error = error.expect_err("not sent").to_string();
    assert_eq!(error, format!("{url}: 401 Unauthorized; {words}{here}"));
}

#[tokio::test]
async fn the_user_of_a_url_is_used_and_never_shown() {
    let server = faulty().await;
    let other = faulty().await;
    server.fault(When::always().on("/image"), to(other.url().replace("http://", "http://a:b@")));
    let url = server.url().replace("http://", "http://me:pass@");
    let origin = opened(&url, &options()).await;
    fetch_right(&*origin, 0..10).await;
    assert_eq!(authorizations(&server), ["Basic bWU6cGFzcw=="]);
    assert_eq!(authorizations(&other), ["-", "-"]);
    assert_eq!(origin.name(), server.url());
    other.fault(When::always(), Fault::Status { status: 404, retry_after: None });
    server.heal();
    server.fault(When::always(), Fault::Status { status: 404, retry_after: None });
    let error = fetch(&*origin, 0..10).await.expect_err("gone");
    assert_eq!(error.to_string(), format!("{}: 404 Not Found", server.url()));
}

#[tokio::test]
async fn a_freshly_signed_url_stands_for_a_stored_name() {
    let server = faulty().await;
    let signed = format!("{}?id=1&X-Amz-Signature=fresh", server.url());
    let override_with = |url: &str| OriginOptions {
        url_override: vec![Locator::parse(url, None).expect("a URL")],
        ..options()
    };
    let stored = Locator::parse(&signed, None).expect("a URL").stored_name();
    assert_eq!(stored, format!("{}?id=1", server.url()));
    let origin = opened(&stored, &override_with(&signed)).await;
    assert_eq!(origin.name(), stored);
    opened(&stored, &override_with(&server.url_of("/another?X-Amz-Signature=fresh"))).await;
    assert_eq!(targets(&server), ["/image?id=1&X-Amz-Signature=fresh", "/image?id=1"]);
}

/// The environment belongs to the whole process, so the test runs itself again in one of its own.
#[tokio::test]
async fn the_proxy_of_the_environment_is_used() {
    const CHILD: &str = "READONCE_TEST_IS_CHILD";
    let far = "http://far.invalid/image";
    if std::env::var_os(CHILD).is_some() {
        let options = OriginOptions { proxies: Proxies::Environment, ..options() };
        let origin = opened(far, &options).await;
        fetch_right(&*origin, 0..10).await;
        return;
    }
    // A server takes a request for any host, as a proxy does.
    let proxy = faulty().await;
    let child = tokio::process::Command::new(std::env::current_exe().expect("a test binary"))
        .args(["--exact", "the_proxy_of_the_environment_is_used"])
        .env(CHILD, "1")
        .env("http_proxy", format!("http://{}", proxy.addr()))
        .env_remove("HTTP_PROXY")
        .env_remove("no_proxy")
        .env_remove("NO_PROXY")
        .env_remove("REQUEST_METHOD")
        .output();
    let output = child.await.expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let hosts: Vec<_> =
        proxy.log().into_iter().filter_map(|entry| entry.headers.get("host").cloned()).collect();
    assert_eq!(hosts, ["far.invalid", "far.invalid"]);
}
