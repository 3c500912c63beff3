//! Connections that come, hang, vanish and are ended; the socket's file.

use std::{os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use readonce_export::nbd::{BindError, Listener, Server, ServerOptions};
use readonce_testkit::nbd_client::{ConnectOptions, Headers, NbdClient, NbdError, RawRequest, command, lean};
use tokio::io::AsyncWriteExt;

use crate::{
    device::MemDevice,
    rig::{HEADERS, Rig, until},
};

#[tokio::test]
async fn a_disconnect_waits_for_what_was_asked() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(1 << 20).waiting());
        rig.device.hold();
        let client = rig.client(headers).await;
        let (one, two) = (client.clone(), client.clone());
        let read = tokio::spawn(async move { one.read(0, 4096).await });
        let write = tokio::spawn(async move { two.write(0, &[1; 4096], 0).await });
        until("both wait", || rig.device.gauge.now() == 2).await;
        client.disconnect().await.unwrap();
        rig.device.release();
        read.await.unwrap().expect("the read is answered");
        write.await.unwrap().expect("the write is answered");
        client.ended().await;
        until("it is gone", || rig.server.connections() == 0).await;
    }
}

#[tokio::test]
async fn a_client_that_vanishes_takes_its_reads_along_and_not_its_writes() {
    // So long that it is not the timeout of an ending connection that takes them.
    let options = ServerOptions { shutdown_timeout: Duration::from_secs(3600), ..ServerOptions::default() };
    let rig = Rig::with(MemDevice::new(1 << 20).waiting(), options);
    rig.device.hold();
    let client = rig.client(Headers::Extended).await;
    for at in 0..50 {
        let client = client.clone();
        tokio::spawn(async move { client.read(at * 4096, 4096).await });
    }
    let writer = client.clone();
    let write = tokio::spawn(async move { writer.write(0, &[1; 4096], 0).await });
    until("all wait", || rig.device.gauge.now() == 51).await;
    // The connection is closed in the middle of a request.
    client.send_bytes(&[0x21]).await.unwrap();
    write.abort();
    let _ = write.await;
    client.abandon().await;
    until("the reads are gone", || rig.device.gauge.now() == 1).await;
    rig.device.release();
    until("the write is done", || rig.device.gauge.now() == 0).await;
    until("the connection is gone", || rig.server.connections() == 0).await;
    assert_eq!(rig.device.contents()[..4096], [1; 4096]);
}

/// A connection that may hold no more reads no more from its socket, so that it does not meet the end of the stream there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_vanishes_is_missed_while_it_may_hold_no_more() {
    const LEN: usize = 1 << 20;
    let options = ServerOptions {
        shutdown_timeout: Duration::from_secs(3600),
        held_bytes_max: 32 * LEN,
        ..ServerOptions::default()
    };
    let rig = Rig::with(MemDevice::new(LEN).waiting(), options);
    rig.device.hold();
    // One that may have no more requests in flight.
    let tcp = Listener::tcp(None, 0).await.unwrap();
    let Listener::Tcp(port) = &tcp else { unreachable!("it was made so") };
    let address = port.local_addr().unwrap();
    let serving = rig.server.clone();
    tokio::spawn(async move { serving.serve(tcp).await });
    let over_tcp = NbdClient::connect_tcp(address, &ConnectOptions::default()).await.unwrap();
    for (client, others) in [(rig.client(Headers::Simple).await, 1), (over_tcp, 0)] {
        send_reads(&client, 300, 512).await;
        until("it has its number", || rig.device.gauge.now() == 128).await;
        client.abandon().await;
        until("it is missed", || rig.server.connections() == others).await;
        until("its reads are gone", || rig.device.gauge.now() == 0).await;
    }
    // Those for which the others leave no room.
    let other = rig.client(Headers::Simple).await;
    send_reads(&other, 32, LEN).await;
    until("it has all the room", || rig.device.gauge.now() == 32).await;
    for headers in HEADERS {
        let client = rig.client(headers).await;
        send_reads(&client, 4, LEN).await;
        client.abandon().await;
    }
    until("they are missed", || rig.server.connections() == 1).await;
    assert_eq!(rig.device.gauge.now(), 32, "the one that is there still waits");
    rig.is_well().await;
}

async fn send_reads(client: &NbdClient, count: usize, len: usize) {
    let len = len as u64;
    for _ in 0..count {
        let request = RawRequest { command: command::READ, len, ..RawRequest::default() };
        client.send(request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_connections_leave_nothing_behind() {
    let rig = Rig::new(MemDevice::new(1 << 20));
    let baseline = Arc::strong_count(&rig.device);
    for round in 0..500 {
        // At every stage: not a byte, a greeting, an agreement, half a request, a request.
        drop(tokio::net::UnixStream::connect(&rig.socket).await.unwrap());
        drop(rig.handshake().await);
        let client = rig.client(HEADERS[round % 3]).await;
        if round % 2 == 0 {
            client.send_bytes(&[0x25, 0x60]).await.unwrap();
        } else {
            client.read(0, 4096).await.unwrap();
        }
        drop(client);
        let mut stream = tokio::net::UnixStream::connect(&rig.socket).await.unwrap();
        let _ = stream.write_all(&[0; 3]).await;
    }
    until("all are gone", || rig.server.connections() == 0).await;
    assert_eq!(rig.server.connections_accepted(), 2000);
    assert_eq!(Arc::strong_count(&rig.device), baseline);
    rig.is_well().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_place() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let rig = Rig::with(MemDevice::new(1 << 20), options);
    let (one, _two) = (rig.client(Headers::Simple).await, rig.client(Headers::Simple).await);
    let socket = rig.socket.clone();
    let three =
        tokio::spawn(async move { NbdClient::connect_unix(socket, &ConnectOptions::default()).await });
    // The others are served meanwhile; the third has no place.
    for _ in 0..100 {
        one.read(0, 1).await.unwrap();
    }
    assert_eq!(rig.server.connections(), 2);
    assert!(!three.is_finished());
    one.disconnect().await.unwrap();
    three.await.unwrap().expect("there is a place now").read(0, 1).await.unwrap();
}

#[tokio::test]
async fn shutdown_answers_what_was_taken_and_refuses_the_rest() {
    let rig = Rig::new(MemDevice::new(1 << 20).waiting());
    rig.device.hold();
    let idle = rig.client(Headers::Simple).await;
    let client = rig.client(Headers::Structured).await;
    let reads: Vec<_> = (0..200)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.read(0, 4096).await })
        })
        .collect();
    until("the device has as many as it may", || rig.device.gauge.now() == 128).await;
    let server = rig.server.clone();
    let shutdown = tokio::spawn(async move { server.shutdown().await });
    assert!(matches!(idle.ended().await, NbdError::Closed(_)));
    until("the socket is gone", || !rig.socket.exists()).await;
    rig.device.release();
    let (mut done, mut refused) = (0, 0);
    for read in reads {
        match read.await.unwrap() {
            Ok(_) => done += 1,
            Err(error) => {
                assert!(error.errno().is_none_or(|errno| errno == 108), "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!((done, refused), (128, 72));
    shutdown.await.unwrap().expect("all ended in time");
    assert_eq!(rig.server.connections(), 0);
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let options = ServerOptions { shutdown_timeout: Duration::from_millis(10), ..ServerOptions::default() };
    let rig = Rig::with(MemDevice::new(1 << 20).waiting(), options);
    rig.device.hold();
    let client = rig.client(Headers::Simple).await;
    let (one, two) = (client.clone(), client.clone());
    let read = tokio::spawn(async move { one.read(0, 4096).await });
    let write = tokio::spawn(async move { two.write(0, &[1; 4096], 0).await });
    until("both wait", || rig.device.gauge.now() == 2).await;
    // The read is cut; the write cannot be, and is told of.
    assert_eq!(rig.server.shutdown().await.unwrap_err().tasks, 1);
    assert!(read.await.unwrap().is_err());
    assert!(write.await.unwrap().is_err());
    rig.device.release();
    rig.server.shutdown().await.expect("now it is over");
    assert_eq!(rig.device.contents()[0], 1);
}

#[tokio::test]
async fn a_socket_is_private_and_goes_with_its_listener() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a b%.sock");
    let listener = Listener::unix(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let folder_text = folder.path().to_str().unwrap();
    assert_eq!(listener.uri("x/ü"), format!("nbd+unix:///x/%C3%BC?socket={folder_text}/a%20b%25.sock"));
    assert!(matches!(Listener::unix(&path), Err(BindError::InUse(_))));
    drop(listener);
    assert!(!path.exists());
    // A socket that nobody listens on any more, as after `kill -9`.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::unix(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    // Someone else's by now: not ours to remove.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file").unwrap();
    drop(listener);
    assert!(path.exists());
    assert!(matches!(Listener::unix(&path), Err(BindError::NotASocket(_))));
    assert!(matches!(Listener::unix(folder.path().join("x".repeat(200))), Err(BindError::Io(..))));
    assert!(matches!(Listener::unix(folder.path().join("no/folder")), Err(BindError::Io(..))));
}

#[tokio::test]
async fn tcp_serves_as_well() {
    let device = MemDevice::with(vec![3; 1 << 20]);
    let options = ServerOptions { export_name: "disk".into(), ..ServerOptions::default() };
    let server = Server::new(device, options).unwrap();
    let listener = Listener::tcp(None, 0).await.unwrap();
    let uri = server.uri(&listener);
    let address = uri.strip_prefix("nbd://").unwrap().strip_suffix("/disk").unwrap().parse().unwrap();
    let serving = server.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    for headers in HEADERS {
        let options = ConnectOptions { headers, ..ConnectOptions::default() };
        let client = NbdClient::connect_tcp(address, &options).await.unwrap();
        client.write(5, &[4; 300_000], 0).await.unwrap();
        assert_eq!(client.read(4, 3).await.unwrap(), [3, 4, 4]);
    }
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn names_that_do_not_fit_are_refused() {
    let options = ServerOptions { export_name: "x".repeat(4097), ..ServerOptions::default() };
    assert!(Server::new(MemDevice::new(512), options).is_err());
}

/// The client of the benchmarks does what it says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lean_client_counts_what_it_did() {
    use lean::{Address, Op, Pattern, Until, Workload};
    for device in [MemDevice::new(1 << 20), MemDevice::new(1 << 20).waiting()] {
        let rig = Rig::new(device);
        for (op, size, depth) in
            [(Op::Read, 4096, 32), (Op::Write, 4096, 32), (Op::Read, 1 << 18, 3), (Op::Write, 7, 1)]
        {
            let workload = Workload {
                op,
                size,
                depth,
                pattern: Pattern::Sequential,
                span: 1 << 20,
                until: Until::Count(1000),
            };
            let address = Address::Unix(rig.socket.clone());
            let figures = tokio::task::spawn_blocking(move || lean::run(&address, "", &workload));
            let figures = figures.await.unwrap().expect("it runs");
            assert_eq!((figures.ops, figures.bytes), (1000, 1000 * u64::from(size)));
            assert!(figures.p50 <= figures.p99 && figures.p99 <= figures.p999);
        }
        // Written once all over: nothing is left of the zeros but what the pattern has itself.
        let zeros = rig.device.contents().iter().filter(|&&byte| byte == 0).count();
        assert!(zeros < (1 << 20) / 100, "{zeros}");
    }
}
