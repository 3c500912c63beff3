//! Clients that vanish, crowd, or never take their replies: others go on, and memory and descriptors come back.

use std::sync::Arc;

use readonce_testkit::{
    Fault, When,
    guest::Guest,
    nbd_client::{ConnectOptions, Handshake, Headers, NbdClient, RawRequest, command},
};
use tokio::{io::AsyncWriteExt, net::UnixStream, sync::Semaphore};

use crate::{
    common::{KEEPERS, folder},
    rounds,
    server::{LoadSpec, Server, image_over, is_clean, load, origin_and_guest},
};

const BYTES: u64 = 8 << 20;
const MIXED: LoadSpec = LoadSpec { seed: 1, requests_max: 40, writes_percent: 50 };

/// The server serves others, and ends as ever.
async fn all_is_well(server: Server, guest: &Arc<Guest>, at: &std::path::Path, format: &str) {
    let tally = load(guest, &server, MIXED).await;
    assert!(tally.writes > 0 && !tally.is_cut, "{tally:?}");
    assert_eq!(tally.reads_failed + tally.writes_failed + tally.flushes_failed, 0, "{tally:?}");
    guest.compare_all(&server.client().await).await.expect("all of it");
    assert_eq!(server.end().await, Some(0));
    is_clean(at, format);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_payload_never_ends_changes_nothing() {
    for keeper in KEEPERS {
        let folder = folder();
        let at = folder.path();
        let (origin, guest) = origin_and_guest(BYTES, 1).await;
        image_over(&origin.url(), at, keeper);
        let server = Server::start(at, &[]);
        for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
            // One that is done inline, one that needs a task, one over many clusters.
            for len in [4096, 100 << 10, 4 << 20] {
                let options = ConnectOptions { headers, ..ConnectOptions::default() };
                let client = NbdClient::connect_unix(server.socket(), &options).await.expect("it accepts");
                let payload = vec![7; len / 2];
                let flags = if headers == Headers::Extended {
                    readonce_testkit::nbd_client::command_flag::PAYLOAD_LEN
                } else {
                    0
                };
                let command = command::WRITE;
                let request = RawRequest { flags, command, offset: 64 << 10, len: len as u64, payload };
                let _reply = client.send(request).await.expect("sent");
                client.abandon().await;
            }
        }
        all_is_well(server, &guest, at, keeper.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_vanishes_with_requests_in_flight_leaves_nothing_behind() {
    for keeper in KEEPERS {
        let folder = folder();
        let at = folder.path();
        let (origin, guest) = origin_and_guest(BYTES, 1).await;
        image_over(&origin.url(), at, keeper);
        let server = Server::start(at, &[]);
        // So that the connections to the origin are there.
        server.client().await.read(0, 1).await.expect("the origin is there");
        let descriptors = server.descriptors();
        let gate = Arc::new(Semaphore::new(0));
        origin.fault(When::always(), Fault::HoldHead(Arc::clone(&gate)));
        for round in 1..=4 {
            let client = server.client().await;
            let asked = origin.log().len();
            for index in 0..32_u64 {
                // Reads of many clusters: nobody has them yet.
                let request = RawRequest {
                    command: command::READ,
                    offset: (index * 4 + round % 2) * (64 << 10),
                    len: 4096,
                    ..RawRequest::default()
                };
                let _reply = client.send(request).await.expect("sent");
            }
            // A flush beside them, and bytes that are no request.
            let request = RawRequest { command: command::FLUSH, ..RawRequest::default() };
            let _reply = client.send(request).await.expect("sent");
            server.until(|_| origin.log().len() > asked || origin.in_flight() > 0).await;
            client.send_bytes(&[0x25, 0x60]).await.expect("sent");
            client.abandon().await;
            // Others are served meanwhile.
            server.client().await.write(32 << 10, &guest_backing(32 << 10, 512), 0).await.expect("written");
        }
        origin.heal();
        gate.add_permits(Semaphore::MAX_PERMITS >> 1);
        server.until(|server| server.descriptors() <= descriptors + 16).await;
        all_is_well(server, &guest, at, keeper.0).await;
    }
}

/// What is there already, so that the model need not know of the write.
fn guest_backing(offset: u64, len: u64) -> Vec<u8> {
    readonce_testkit::Content::seeded(1, BYTES).bytes(offset..offset + len).to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_opened_and_dropped_leave_nothing_behind() {
    let folder = folder();
    let at = folder.path();
    let (origin, guest) = origin_and_guest(BYTES, 1).await;
    image_over(&origin.url(), at, KEEPERS[1]);
    let server = Server::start(at, &[]);
    guest.compare_all(&server.client().await).await.expect("all of it");
    open_and_drop(&server, 100).await;
    let descriptors = server.descriptors();
    let resident = server.resident_bytes();
    open_and_drop(&server, rounds(500, 10_000)).await;
    server.until(|server| server.descriptors() <= descriptors + 4).await;
    let grown = server.resident_bytes().saturating_sub(resident);
    assert!(grown < 16 << 20, "{grown} bytes more than after the first hundred");
    all_is_well(server, &guest, at, "qcow2").await;
}

/// Drops each at another point of its life.
async fn open_and_drop(server: &Server, count: u64) {
    for index in 0..count {
        match index % 6 {
            0 => drop(UnixStream::connect(server.socket()).await.expect("it accepts")),
            1 => {
                let mut stream = UnixStream::connect(server.socket()).await.expect("it accepts");
                // The server may have gone on to the greeting only.
                let _ = stream.write_all(&[0, 0, 0, 3, b'I', b'H']).await;
            }
            2 => drop(Handshake::unix(server.socket()).await.expect("greeted")),
            3 => server.client().await.abandon().await,
            4 => {
                let client = server.client().await;
                let request = RawRequest { command: command::READ, len: 1 << 20, ..RawRequest::default() };
                let _reply = client.send(request).await.expect("sent");
                client.abandon().await;
            }
            _ => server.client().await.disconnect().await.expect("sent"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_take_their_replies_cost_bounded_memory() {
    const CLIENTS: u64 = 8;
    /// Requests of each: their replies would be 2 GiB.
    const REQUESTS: u64 = 2048;
    /// Bytes that one connection's requests may hold, and the bytes around it.
    const BYTES_MAX: u64 = 80 << 20;
    let folder = folder();
    let at = folder.path();
    let (origin, guest) = origin_and_guest(BYTES, 1).await;
    image_over(&origin.url(), at, KEEPERS[1]);
    let server = Server::start(at, &[]);
    guest.compare_all(&server.client().await).await.expect("all of it");
    let descriptors = server.descriptors();
    let resident = server.resident_bytes();

    for len in [1_u32 << 20, 2 << 20] {
        let mut streams = Vec::new();
        for _ in 0..CLIENTS {
            let mut stream = Handshake::unix(server.socket()).await.expect("greeted");
            let go = readonce_testkit::nbd_client::go_data("", &[]);
            stream.option(readonce_testkit::nbd_client::option::GO, &go).await.expect("agreed");
            let mut stream = stream.into_stream();
            let mut requests = Vec::new();
            for cookie in 0..REQUESTS {
                requests.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
                requests.extend_from_slice(&[0, 0, 0, 0]);
                requests.extend_from_slice(&cookie.to_be_bytes());
                requests.extend_from_slice(&0_u64.to_be_bytes());
                requests.extend_from_slice(&len.to_be_bytes());
            }
            // The server stops taking them at some point; the rest stays in the socket, or here.
            let _ =
                tokio::time::timeout(std::time::Duration::from_millis(50), stream.write_all(&requests)).await;
            streams.push(stream);
        }
        // Others are served meanwhile.
        let tally = load(&guest, &server, MIXED).await;
        assert!(tally.reads > 0 && tally.reads_failed + tally.writes_failed == 0, "{tally:?}");
        let grown = server.resident_bytes().saturating_sub(resident);
        eprintln!("{CLIENTS} clients, replies of {len} bytes: {} MiB more", grown >> 20);
        assert!(grown < CLIENTS * BYTES_MAX, "{grown} bytes more, {len} bytes each");
        drop(streams);
        server.until(|server| server.descriptors() <= descriptors + 4).await;
    }
    all_is_well(server, &guest, at, "qcow2").await;
}
