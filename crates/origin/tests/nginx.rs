//! A real server: nginx over HTTP/1.1, and over TLS with HTTP/2.

#![allow(clippy::disallowed_methods, reason = "tests run on the real clock")]

mod common;

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use common::{LEN, content, fetch, fetch_right, open, opened, options};
use readonce_origin::{FetchError, OriginOptions, Validator};
use readonce_testkit::Content;

const KEY_AND_CERTIFICATE: &str = include_str!("data/loopback.pem");

/// A running nginx that serves a folder of its own: `/image`, and the same at `/whole/image` without ranges.
struct Nginx {
    child: Child,
    folder: tempfile::TempDir,
    plain: u16,
    tls: u16,
}

impl Nginx {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("tls.pem"), KEY_AND_CERTIFICATE).expect("room");
        // Another process may take a free port before nginx does: then with others.
        for _ in 0..5 {
            let [plain, tls] = free_ports();
            std::fs::write(folder.path().join("nginx.conf"), config(folder.path(), plain, tls))
                .expect("room");
            let mut child = Command::new("nginx")
                .arg("-c")
                .arg(folder.path().join("nginx.conf"))
                .arg("-p")
                .arg(folder.path())
                .stderr(Stdio::null())
                .spawn()
                .expect("nginx is installed (Debian: apt install nginx-light)");
            if answers(&mut child, tls) {
                let nginx = Self { child, folder, plain, tls };
                nginx.replace(content());
                return nginx;
            }
        }
        panic!("nginx does not start");
    }

    /// Puts another file in the place of the one that is served, as a mirror does: written beside it, then renamed.
    fn replace(&self, content: Content) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, content.bytes(0..content.len())).expect("room");
        std::fs::rename(new, self.folder.path().join("image")).expect("the same folder");
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/image", self.plain)
    }

    fn tls_url(&self) -> String {
        format!("https://127.0.0.1:{}/image", self.tls)
    }

    /// Protocol, range and status of the first `count` requests. A request is logged after its last byte has left, so the log may
    /// be behind for a moment.
    fn log(&self, count: usize) -> Vec<String> {
        loop {
            let log = std::fs::read_to_string(self.folder.path().join("access.log")).unwrap_or_default();
            let lines: Vec<_> =
                log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).collect();
            if lines.len() >= count {
                return lines.into_iter().map(str::to_string).collect();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_ports() -> [u16; 2] {
    let listeners = [0, 0].map(|port| TcpListener::bind(("127.0.0.1", port)).expect("a port"));
    listeners.map(|listener| listener.local_addr().expect("bound").port())
}

/// Waits until it accepts connections; false if it ended instead.
fn answers(child: &mut Child, port: u16) -> bool {
    loop {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return child.try_wait().expect("our child").is_none();
        }
        if child.try_wait().expect("our child").is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn config(folder: &Path, plain: u16, tls: u16) -> String {
    let folder = folder.display();
    format!(
        "daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{
            log_format ranges '$server_protocol $http_range $status';
            access_log {folder}/access.log ranges;
            client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
            uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
            root {folder};
            server {{
                listen 127.0.0.1:{plain};
                location /whole/ {{ alias {folder}/; max_ranges 0; }}
            }}
            server {{
                listen 127.0.0.1:{tls} ssl http2;
                ssl_certificate {folder}/tls.pem; ssl_certificate_key {folder}/tls.pem;
            }}
        }}"
    )
}

#[tokio::test]
async fn a_replaced_file_is_another_version() {
    let nginx = Nginx::start();
    let origin = opened(&nginx.url(), &options()).await;
    assert_eq!(origin.len(), LEN);
    let validator = Validator::decode(&origin.validator()).expect("our own encoding");
    assert!(matches!(validator, Validator::StrongETag(_)), "{validator}");
    fetch_right(&*origin, 1000..LEN).await;
    assert_eq!(nginx.log(2), ["HTTP/1.1 bytes=0-0 206", "HTTP/1.1 bytes=1000-999999 206"]);

    nginx.replace(Content::seeded(2, LEN + 1));
    let error = fetch(&*origin, 0..10).await.expect_err("another version");
    assert!(matches!(error, FetchError::Changed { .. }), "{error:?}");
    assert!(error.to_string().ends_with(&format!("length was {LEN}, is {}", LEN + 1)), "{error}");
}

#[tokio::test]
async fn a_server_without_ranges_is_refused() {
    let nginx = Nginx::start();
    let url = nginx.url().replace("/image", "/whole/image");
    let error = open(&url, &options()).await.map(|_| ()).expect_err("no ranges");
    assert_eq!(error.to_string(), format!("{url}: the server ignores range requests (answered 200)"));
    let absent = nginx.url().replace("/image", "/absent");
    let error = open(&absent, &options()).await.map(|_| ()).expect_err("no file");
    assert_eq!(error.to_string(), format!("{absent}: 404 Not Found"));
}

#[tokio::test]
async fn tls_is_checked_and_offers_http2() {
    let nginx = Nginx::start();
    let error =
        open(&nginx.tls_url(), &options()).await.map(|_| ()).expect_err("not a certificate of the system's");
    assert!(matches!(error, FetchError::Permanent { .. }), "{error:?}");
    assert!(error.to_string().contains("the TLS certificate is refused"), "{error}");

    let trusting =
        OriginOptions { extra_roots_pem: Some(KEY_AND_CERTIFICATE.as_bytes().to_vec()), ..options() };
    let origin = opened(&nginx.tls_url(), &trusting).await;
    fetch_right(&*origin, 0..LEN).await;
    assert_eq!(nginx.log(2), ["HTTP/2.0 bytes=0-0 206", "HTTP/2.0 bytes=0-999999 206"]);

    let no_tls = nginx.url().replace("http:", "https:");
    let error = open(&no_tls, &trusting).await.map(|_| ()).expect_err("TLS to a plain port");
    assert!(error.to_string().contains("the server does not speak TLS here"), "{error}");
}
