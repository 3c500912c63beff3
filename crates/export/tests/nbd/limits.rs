//! What one connection may hold: requests in flight, their bytes, replies that nobody fetches.

use std::time::Duration;

use futures_util::future::join_all;
use readonce_export::nbd::ServerOptions;
use readonce_testkit::nbd_client::{Headers, NbdClient, RawRequest, command};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    device::MemDevice,
    rig::{HEADERS, Rig, pattern, until},
};

const IN_FLIGHT_MAX: usize = 128;
const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;

fn reads(client: &NbdClient, count: usize, len: usize) -> Vec<tokio::task::JoinHandle<Vec<u8>>> {
    (0..count)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.read(0, len).await.expect("the read is answered") })
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_flight_are_bounded() {
    let rig = Rig::new(MemDevice::new(1 << 20).waiting());
    rig.device.hold();
    let client = rig.client(Headers::Structured).await;
    let reads = reads(&client, 1000, 4096);
    until("the device has as many as it may", || rig.device.gauge.now() == IN_FLIGHT_MAX).await;
    rig.device.release();
    for read in reads {
        assert_eq!(read.await.unwrap().len(), 4096);
    }
    assert_eq!(rig.device.gauge.max(), IN_FLIGHT_MAX);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_reads_in_flight_are_bounded() {
    let len = 24 << 20;
    let rig = Rig::new(MemDevice::new(len).waiting());
    rig.device.hold();
    let client = rig.client(Headers::Structured).await;
    let reads = reads(&client, 6, len);
    until("the device has two", || rig.device.gauge.now() == 2).await;
    rig.device.release();
    join_all(reads).await.into_iter().for_each(|read| assert_eq!(read.unwrap().len(), len));
    assert_eq!(rig.device.gauge.max(), 2);
    assert!(rig.device.live.max() <= IN_FLIGHT_BYTES_MAX, "{}", rig.device.live.max());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_writes_in_flight_are_bounded() {
    let len = 24 << 20;
    let rig = Rig::new(MemDevice::new(len).waiting());
    rig.device.hold();
    let client = rig.client(Headers::Structured).await;
    let data = pattern(1, len);
    let writes: Vec<_> = (0..6)
        .map(|_| {
            let (client, data) = (client.clone(), data.clone());
            tokio::spawn(async move { client.write(0, &data, 0).await })
        })
        .collect();
    until("the device has two", || rig.device.gauge.now() == 2).await;
    rig.device.release();
    join_all(writes).await.into_iter().for_each(|write| write.unwrap().expect("it is written"));
    assert_eq!(rig.device.gauge.max(), 2);
    assert!(rig.device.contents() == data);
}

/// Sends reads and does not receive: the server must stop taking them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_does_not_fill_the_memory() {
    const LEN: usize = 1 << 20;
    const COUNT: usize = 300;
    let data = pattern(9, LEN);
    for device in [MemDevice::with(data.clone()), MemDevice::with(data.clone()).waiting()] {
        let is_waiting = !device.is_instant.load(std::sync::atomic::Ordering::SeqCst);
        let rig = Rig::new(device);
        let mut handshake = rig.handshake().await;
        let go = readonce_testkit::nbd_client::go_data("", &[]);
        handshake.option(readonce_testkit::nbd_client::option::GO, &go).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(handshake.into_stream());
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0; 20]);
        request.extend(u32::try_from(LEN).unwrap().to_be_bytes());
        writer.write_all(&request.repeat(COUNT)).await.unwrap();
        if is_waiting {
            until("as much is read as may be held", || rig.device.live.now() == IN_FLIGHT_BYTES_MAX).await;
        } else {
            let calls = || rig.device.instant_calls.load(std::sync::atomic::Ordering::SeqCst);
            until("the first is read", || calls() > 0).await;
            // Another client is served meanwhile, again and again: the slow one has its share of turns.
            let other = rig.client(Headers::Simple).await;
            for _ in 0..1000 {
                other.read(0, 1).await.unwrap();
            }
            assert!(calls() <= 1000 + 4, "{} reads for nobody", calls() - 1000);
        }
        let mut reply = vec![0; 16 + LEN];
        for _ in 0..COUNT {
            reader.read_exact(&mut reply).await.unwrap();
            assert!(reply[16..] == data);
        }
        assert!(rig.device.live.max() <= IN_FLIGHT_BYTES_MAX, "{}", rig.device.live.max());
        until("all is let go", || rig.device.live.now() == 0).await;
    }
}

/// A thousand clients, each with the 64 MiB that it may have in flight, could have made the server take all memory of the machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_slow_readers_together_do_not_fill_the_memory() {
    const LEN: usize = 1 << 20;
    const EACH: usize = 40;
    const HELD_BYTES_MAX: usize = 64 << 20;
    let data = pattern(9, LEN);
    let options = ServerOptions { held_bytes_max: HELD_BYTES_MAX, ..ServerOptions::default() };
    let rig = Rig::with(MemDevice::with(data.clone()).waiting(), options);
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0; 20]);
    request.extend(u32::try_from(LEN).unwrap().to_be_bytes());
    let mut readers = Vec::new();
    for _ in 0..4 {
        let mut handshake = rig.handshake().await;
        let go = readonce_testkit::nbd_client::go_data("", &[]);
        handshake.option(readonce_testkit::nbd_client::option::GO, &go).await.unwrap();
        let mut stream = handshake.into_stream();
        stream.write_all(&request.repeat(EACH)).await.unwrap();
        readers.push(stream);
    }
    until("as much is read as may be held", || rig.device.live.now() == HELD_BYTES_MAX).await;
    // Small requests of others are served meanwhile, and large ones once there is room.
    let other = rig.client(Headers::Simple).await;
    for _ in 0..100 {
        other.read(0, 4096).await.unwrap();
    }
    let large = tokio::spawn(async move { other.read(0, LEN).await });
    let drained = readers.into_iter().map(async |mut stream| {
        let mut reply = vec![0; 16 + LEN];
        for _ in 0..EACH {
            stream.read_exact(&mut reply).await.unwrap();
            assert!(reply[16..] == data);
        }
        stream
    });
    // They stay connected to the end.
    let readers = join_all(drained).await;
    assert!(large.await.unwrap().unwrap() == data);
    assert!(rig.device.live.max() <= HELD_BYTES_MAX + (128 << 10), "{}", rig.device.live.max());
    until("all is let go", || rig.device.live.now() == 0).await;
    drop(readers);
}

/// Where one task has ended, a connection stands back for others that are about to: a reply would have stayed where it was, were one
/// of the others to take a day.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_does_not_wait_for_requests_that_go_on_waiting() {
    const COUNT: usize = 100;
    let data = pattern(3, COUNT * 4096);
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::with(data.clone()).waiting());
        rig.device.hold_caches();
        let client = rig.client(headers).await;
        let waits = {
            let client = client.clone();
            tokio::spawn(async move { client.cache(0, 4096).await })
        };
        until("it waits", || rig.device.gauge.now() == 1).await;
        // One alone, then as many as end at the same time.
        for count in [1, 2, COUNT] {
            rig.device.hold();
            let reads = (0..count).map(|at| {
                let client = client.clone();
                tokio::spawn(async move { client.read(at as u64 * 4096, 4096).await })
            });
            let reads: Vec<_> = reads.collect();
            until("all wait", || rig.device.gauge.now() == 1 + count).await;
            rig.device.release();
            let replies = tokio::time::timeout(Duration::from_secs(30), join_all(reads)).await;
            for (at, reply) in replies.expect("replies are left where they are").into_iter().enumerate() {
                assert!(reply.unwrap().unwrap() == data[at * 4096..][..4096], "reply {at}");
            }
        }
        assert!(!waits.is_finished());
        rig.device.release_caches();
        waits.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_does_not_hold_up_what_does_not() {
    let rig = Rig::new(MemDevice::new(1 << 20).waiting());
    rig.device.hold();
    let client = rig.client(Headers::Extended).await;
    let held = reads(&client, 100, 4096);
    until("all wait", || rig.device.gauge.now() == 100).await;
    rig.device.is_instant.store(true, std::sync::atomic::Ordering::SeqCst);
    for _ in 0..100 {
        client.read(0, 4096).await.unwrap();
        client.write(0, &[1; 100], 0).await.unwrap();
    }
    assert!(held.iter().all(|read| !read.is_finished()));
    rig.device.release();
    join_all(held).await;
}

/// A client that never stops sending what is answered at once, and one request that waits: it comes out in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_inline_work_lets_completions_out() {
    let rig = Rig::new(MemDevice::new(1 << 20));
    let client = rig.client(Headers::Simple).await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let flood = {
        let client = client.clone();
        tokio::spawn(async move {
            while !*stopped.borrow() {
                let reads = (0..500).map(|_| {
                    client.send(RawRequest { command: command::READ, len: 512, ..RawRequest::default() })
                });
                for read in join_all(reads).await {
                    read.expect("sent").await.unwrap().unwrap();
                }
            }
        })
    };
    for _ in 0..20 {
        client.flush().await.unwrap();
        client.cache(0, 4096).await.unwrap();
    }
    stop.send_replace(true);
    flood.await.unwrap();
}
