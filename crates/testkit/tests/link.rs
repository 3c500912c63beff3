//! The link reaches its rate, keeps to it, and keeps its delay.
//!
//! Time on a shared machine swings: what is asserted is what no load can excuse, namely that a link is never *faster* than it
//! is said to be, and that every byte arrives. How close it comes is printed: `cargo test --release -p readonce-testkit --test
//! link -- --nocapture`.

#![allow(clippy::disallowed_methods, reason = "a link is measured in real time")]

use std::time::{Duration, Instant};

use readonce_testkit::{Link, LinkSpec};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A server that answers each byte with `per_byte` others, until the client is gone.
async fn server(per_byte: usize) -> std::net::SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let addr = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let block = vec![7; 256 * 1024];
                while socket.read_u8().await.is_ok() {
                    let mut left = per_byte;
                    while left > 0 {
                        let len = left.min(block.len());
                        if socket.write_all(&block[..len]).await.is_err() {
                            return;
                        }
                        left -= len;
                    }
                }
            });
        }
    });
    addr
}

/// Downloads `bytes` over each of `connections` at once; returns the time from the first request to the last byte.
async fn download(link: &Link, connections: usize, bytes: usize) -> Duration {
    let mut sockets = Vec::new();
    for _ in 0..connections {
        let mut socket = TcpStream::connect(link.addr()).await.expect("a link");
        // One answer first: the handshake is not what is measured.
        socket.write_u8(0).await.expect("open");
        discard(&mut socket, bytes).await;
        sockets.push(socket);
    }
    let start = Instant::now();
    let running: Vec<_> = sockets
        .into_iter()
        .map(|mut socket| {
            tokio::spawn(async move {
                socket.write_u8(0).await.expect("open");
                discard(&mut socket, bytes).await;
            })
        })
        .collect();
    for task in running {
        task.await.expect("no panic");
    }
    start.elapsed()
}

async fn discard(socket: &mut TcpStream, bytes: usize) {
    let mut buf = vec![0; 256 * 1024];
    let mut left = bytes;
    while left > 0 {
        let want = left.min(buf.len());
        let len = socket.read(&mut buf[..want]).await.expect("open");
        assert!(len > 0, "cut {left} bytes early");
        left -= len;
    }
}

async fn check(spec: LinkSpec, connections: usize, bytes: usize) {
    let link = Link::start(server(bytes).await, spec).await.expect("a port");
    let took = download(&link, connections, bytes).await;
    let bits = (connections * bytes) as f64 * 8.0;
    let ideal = spec.round_trip + Duration::from_secs_f64(bits / spec.bits_per_second as f64);
    let percent = 100.0 * ideal.as_secs_f64() / took.as_secs_f64();
    println!("{spec:?}, {connections} connections: {took:?}, ideal {ideal:?}, {percent:.1} %");
    assert!(took + Duration::from_millis(1) >= ideal, "faster than the link: {took:?} < {ideal:?}");
    // The first download of each connection, and the one that was measured.
    assert_eq!(link.down_bytes(), (2 * connections * bytes) as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_of_100_megabit_is_never_faster() {
    check(LinkSpec::new(100, 40), 1, 8_000_000).await;
    check(LinkSpec::new(100, 40), 8, 1_000_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_of_one_gigabit_is_never_faster() {
    check(LinkSpec::new(1000, 40), 1, 60_000_000).await;
    check(LinkSpec::new(1000, 40), 8, 7_500_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_round_trip_is_kept_and_a_handshake_costs_one_more() {
    let spec = LinkSpec { bits_per_second: 0, round_trip: Duration::from_millis(40) };
    let link = Link::start(server(1).await, spec).await.expect("a port");
    let start = Instant::now();
    let mut socket = TcpStream::connect(link.addr()).await.expect("a link");
    for round in 2..6 {
        socket.write_u8(0).await.expect("open");
        socket.read_u8().await.expect("open");
        let took = start.elapsed();
        println!("{round} round trips: {took:?}");
        assert!(
            took + Duration::from_millis(1) >= spec.round_trip * round,
            "{round} round trips took {took:?}"
        );
    }
}
