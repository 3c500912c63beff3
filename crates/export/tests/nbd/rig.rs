//! A server of a memory device on a Unix socket, and clients of it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use readonce_export::nbd::{Listener, Server, ServerOptions};
use readonce_testkit::nbd_client::{ConnectOptions, Handshake, Headers, NbdClient};

use crate::device::MemDevice;

/// Every kind of header, for tests that hold for all.
pub const HEADERS: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

/// How long a condition may take to come true before the test fails; nothing is concluded from its passing.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Rig {
    pub device: Arc<MemDevice>,
    pub server: Server,
    pub socket: PathBuf,
    pub uri: String,
    _folder: tempfile::TempDir,
}

impl Rig {
    pub fn new(device: Arc<MemDevice>) -> Self {
        Self::with(device, ServerOptions::default())
    }

    pub fn with(device: Arc<MemDevice>, options: ServerOptions) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let socket = folder.path().join("nbd.sock");
        let server = Server::new(device.clone(), options).expect("the names are short");
        let listener = Listener::unix(&socket).expect("nobody else is there");
        let uri = server.uri(&listener);
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await });
        Self { device, server, socket, uri, _folder: folder }
    }

    pub async fn client(&self, headers: Headers) -> NbdClient {
        let options = ConnectOptions { headers, ..ConnectOptions::default() };
        let client = NbdClient::connect_unix(&self.socket, &options).await.expect("the server agrees");
        assert_eq!(client.headers(), headers);
        client
    }

    pub async fn handshake(&self) -> Handshake {
        Handshake::unix(&self.socket).await.expect("the server greets")
    }

    /// Another connection still works: what happened before hurt only its own.
    pub async fn is_well(&self) {
        self.device.release();
        let client = self.client(Headers::Simple).await;
        client.read(0, 512).await.expect("a new connection reads");
    }
}

/// Waits until `condition` holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}
