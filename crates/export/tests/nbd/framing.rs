//! Clients that break the framing lose their connection, and only theirs.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_testkit::nbd_client::{
    Headers, NbdError, RawRequest, command, command_flag as flag, option, option_reply,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    device::MemDevice,
    rig::{HEADERS, Rig, pattern, until},
};

fn header(headers: Headers, flags: u16, command: u16, len: u64) -> Vec<u8> {
    let magic: u32 = if headers == Headers::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend([0; 16]);
    if headers == Headers::Extended {
        bytes.extend(len.to_be_bytes());
    } else {
        bytes.extend(u32::try_from(len).unwrap().to_be_bytes());
    }
    bytes
}

#[tokio::test]
async fn bytes_that_are_no_request_end_the_connection() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(1 << 20));
        let neighbour = rig.client(headers).await;
        let other = if headers == Headers::Extended { Headers::Simple } else { Headers::Extended };
        for bytes in [
            pattern(3, 100),
            vec![0; 4],
            // The magic of the headers that were not agreed on.
            header(other, 0, command::READ, 512),
            // More payload than anyone would throw away.
            header(headers, flag::PAYLOAD_LEN, command::WRITE, 0xffff_ffff),
        ] {
            let client = rig.client(headers).await;
            client.send_bytes(&bytes).await.unwrap();
            assert!(matches!(client.ended().await, NbdError::Closed(_)), "{headers:?}");
            neighbour.read(0, 512).await.expect("the neighbour goes on");
        }
    }
}

#[tokio::test]
async fn requests_before_the_broken_one_are_answered() {
    for device in [MemDevice::new(1 << 20), MemDevice::new(1 << 20).waiting()] {
        let rig = Rig::new(device);
        let client = rig.client(Headers::Simple).await;
        let mut reads = Vec::new();
        for _ in 0..50 {
            let read = RawRequest { len: 9000, ..RawRequest::default() };
            reads.push(client.send(read).await.unwrap());
        }
        client.send_bytes(b"no request at all, that is, not even the magic").await.unwrap();
        for read in reads {
            assert_eq!(read.await.unwrap().unwrap().data, vec![0; 9000]);
        }
        client.ended().await;
    }
}

#[tokio::test]
async fn a_request_cut_off_at_any_byte_hurts_nobody() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(1 << 20));
        let mut bytes =
            header(headers, if headers == Headers::Extended { flag::PAYLOAD_LEN } else { 0 }, 1, 20);
        bytes.extend([5; 20]);
        for len in 0..bytes.len() {
            let client = rig.client(headers).await;
            client.send_bytes(&bytes[..len]).await.unwrap();
            drop(client);
        }
        until("all are gone", || rig.server.connections() == 0).await;
        assert_eq!(rig.device.contents(), vec![0; 1 << 20]);
        rig.is_well().await;
    }
}

/// Requests with a right magic and anything behind it: whatever becomes of the connection, the server lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_requests_hurt_nobody() {
    let rig = Rig::new(MemDevice::new(1 << 20));
    for seed in 0..300 {
        let headers = HEADERS[seed % 3];
        let mut rng = SmallRng::seed_from_u64(seed as u64);
        let client = rig.client(headers).await;
        for _ in 0..20 {
            let len = if rng.random() { rng.random_range(0..100_000) } else { rng.random::<u64>() };
            let len = if headers == Headers::Extended { len } else { len & 0xffff_ffff };
            let flags = if rng.random() { 0 } else { 1 << rng.random_range(0..16) };
            let mut bytes = header(headers, flags, rng.random_range(0..10), len);
            let offset = if rng.random() { rng.random_range(0..1 << 20) } else { rng.random::<u64>() };
            bytes[16..24].copy_from_slice(&offset.to_be_bytes());
            // Mostly as much payload as was promised, so that the next request is one.
            let payload_len = usize::try_from(len.min(100_000)).unwrap();
            bytes.extend(pattern(seed as u64, if rng.random_ratio(1, 10) { 100 } else { payload_len }));
            if client.send_bytes(&bytes).await.is_err() {
                break;
            }
        }
        client.abandon().await;
    }
    until("all are gone", || rig.server.connections() == 0).await;
    rig.is_well().await;
}

/// Sends `bytes` as the answer to the greeting, and waits for the server to close.
async fn greet_with(rig: &Rig, bytes: &[u8]) {
    let mut stream = tokio::net::UnixStream::connect(&rig.socket).await.unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    // The server may have closed before all was sent.
    let _ = stream.write_all(bytes).await;
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    rig.is_well().await;
}

fn option_bytes(option: u32, len: u32) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(b"IHAVEOPT");
    bytes.extend(option.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

#[tokio::test]
async fn a_broken_handshake_ends_the_connection() {
    let rig = Rig::new(MemDevice::new(1 << 20));
    // Client flags that nobody knows.
    greet_with(&rig, &0x8000_0003_u32.to_be_bytes()).await;
    // An option without its magic.
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend([0x55; 16]);
    greet_with(&rig, &bytes).await;
    // Options of a length that nobody sends.
    greet_with(&rig, &option_bytes(option::GO, u32::MAX)).await;
    greet_with(&rig, &option_bytes(option::EXPORT_NAME, 1 << 17)).await;
    // An export that is not here, asked for in the way that has no answer.
    let mut bytes = option_bytes(option::EXPORT_NAME, 5);
    bytes.extend(b"other");
    greet_with(&rig, &bytes).await;
    // Any other option without fixed newstyle.
    let mut bytes = option_bytes(option::LIST, 0);
    bytes[..4].copy_from_slice(&[0; 4]);
    greet_with(&rig, &bytes).await;
    // A client that never comes to an end.
    let mut handshake = rig.handshake().await;
    let mut count = 0;
    while let Ok(replies) = handshake.option(option::LIST, &[]).await {
        assert_eq!(replies.last().unwrap().0, option_reply::ACK);
        count += 1;
        assert!(count < 10_000);
    }
    rig.is_well().await;
}

#[tokio::test]
async fn a_client_that_does_not_finish_the_handshake_is_let_go() {
    let options = readonce_export::nbd::ServerOptions {
        handshake_timeout: std::time::Duration::from_millis(1),
        ..Default::default()
    };
    let rig = Rig::with(MemDevice::new(1 << 20), options);
    let mut stream = tokio::net::UnixStream::connect(&rig.socket).await.unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("the server closes");
    assert_eq!(all.len(), 18);
    until("it is gone", || rig.server.connections() == 0).await;
}
