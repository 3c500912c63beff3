//! The real transport: reqwest over rustls with the system's roots, HTTP/1.1 and HTTP/2, proxies from the environment.
//!
//! - Redirects, retries, decompression and cookies are off: what they would decide is decided in `remote`.
//! - Plain http needs no certificates, so a machine without any can use it: the TLS client is made when first needed.
//!
//! Not here: credentials, time limits.

use std::{error::Error, sync::OnceLock, time::Duration};

use futures_util::StreamExt;
use readonce_storage::BoxFuture;
use reqwest::{Certificate, Client, ClientBuilder, redirect};

use crate::{
    HttpVersion, OriginOptions,
    open::Proxies,
    transport::{Head, Request, Response, Transport, TransportError},
};

/// Bytes in flight that one HTTP/2 stream may have: 1 Gbit/s at 60 ms, one request at a time.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;

/// The same for all streams of a connection; what can lie unread in memory for one origin.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// A connection whose other end stopped answering is found out and dropped within these, before a stalled request is tried
/// again: on the same dead connection it would stall once more.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long a ping, or bytes that were sent, may stay without an answer.
const PING_ANSWER_MAX: Duration = Duration::from_secs(15);

/// Sends requests over the network.
pub struct HttpTransport {
    http_version: HttpVersion,
    proxies: Proxies,
    extra_roots_pem: Option<Vec<u8>>,
    plain: OnceLock<Result<Client, TransportError>>,
    tls: OnceLock<Result<Client, TransportError>>,
}

impl HttpTransport {
    /// A transport with connections of its own.
    pub fn new(options: &OriginOptions) -> Self {
        Self {
            http_version: options.http_version,
            proxies: options.proxies,
            extra_roots_pem: options.extra_roots_pem.clone(),
            plain: OnceLock::new(),
            tls: OnceLock::new(),
        }
    }

    fn client(&self, scheme: &str) -> Result<&Client, TransportError> {
        let slot = match scheme {
            "https" => self.tls.get_or_init(|| self.tls_client()),
            _ => self
                .plain
                .get_or_init(|| build(self.builder().tls_certs_only(std::iter::empty::<Certificate>()))),
        };
        slot.as_ref().map_err(Clone::clone)
    }

    fn builder(&self) -> ClientBuilder {
        // The first caller in the process decides; it is always ring, and an error only says that it is there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = Client::builder()
            .redirect(redirect::Policy::none())
            .user_agent(concat!("readonce/", env!("CARGO_PKG_VERSION")))
            .tcp_keepalive(PING_EVERY)
            .tcp_keepalive_interval(PING_ANSWER_MAX / 3)
            .tcp_keepalive_retries(3)
            .tcp_user_timeout(PING_ANSWER_MAX)
            .http2_keep_alive_interval(PING_EVERY)
            .http2_keep_alive_timeout(PING_ANSWER_MAX)
            .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
            .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let builder = match self.proxies {
            Proxies::Environment => builder,
            Proxies::None => builder.no_proxy(),
        };
        match self.http_version {
            HttpVersion::Auto => builder,
            HttpVersion::Http1 => builder.http1_only(),
            HttpVersion::Http2 => builder.http2_prior_knowledge(),
        }
    }

    fn tls_client(&self) -> Result<Client, TransportError> {
        let mut builder = self.builder();
        if let Some(pem) = &self.extra_roots_pem {
            let roots = Certificate::from_pem_bundle(pem).map_err(|error| {
                TransportError::Permanent(format!("certificates to trust: {}", cause(&error)))
            })?;
            builder = builder.tls_certs_merge(roots);
        }
        build(builder)
    }
}

fn build(builder: ClientBuilder) -> Result<Client, TransportError> {
    builder
        .build()
        .map_err(|error| TransportError::Permanent(format!("TLS cannot be set up: {}", cause(&error))))
}

impl Transport for HttpTransport {
    fn get(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            let client = self.client(request.url.scheme())?;
            let range = request.range_header();
            let response = client
                .get(request.url)
                .headers(request.headers)
                .header(http::header::RANGE, range)
                // The bytes of the file are wanted, not of a compressed form of it.
                .header(http::header::ACCEPT_ENCODING, "identity")
                .send()
                .await
                .map_err(classify)?;
            let head = Head { status: response.status(), headers: response.headers().clone() };
            let body = response.bytes_stream().map(|piece| piece.map_err(classify));
            Ok(Response { head, body: Box::pin(body) })
        })
    }
}

/// The error without its URL, which may hold a signature.
fn classify(error: reqwest::Error) -> TransportError {
    let words = cause(&error);
    match tls_error(&error) {
        Some(rustls::Error::InvalidCertificate(_)) => {
            TransportError::Permanent(format!("the TLS certificate is refused: {words}"))
        }
        Some(rustls::Error::InvalidMessage(_)) => {
            TransportError::Permanent(format!("the server does not speak TLS here: {words}"))
        }
        Some(rustls::Error::PeerIncompatible(_) | rustls::Error::AlertReceived(_)) => {
            TransportError::Permanent(format!("no TLS connection can be agreed on: {words}"))
        }
        _ if error.is_builder() => TransportError::Permanent(words),
        _ if error.is_connect() => TransportError::Passing(format!("cannot connect: {words}")),
        _ => TransportError::Passing(words),
    }
}

/// The innermost cause, which is the one that says something.
fn cause(error: &dyn Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An io::Error hides what it wraps from `source`, which goes on below it.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}
