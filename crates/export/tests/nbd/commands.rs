//! Every command and flag, against a flat model.

use std::sync::atomic::Ordering::SeqCst;

use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::ZeroMode;
use readonce_testkit::nbd_client::{
    Headers, NbdClient, RawRequest, command, command_flag as flag, meta_query,
};

use crate::{
    device::{BLOCK, MemDevice},
    rig::{HEADERS, Rig, pattern, until},
};

const REGION: usize = 300_000;
const WORKERS: usize = 8;
const OPERATIONS: usize = 200;

/// One worker: random operations on its own region, each compared with what the model says.
async fn work(client: NbdClient, worker: usize, seed: u64) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let base = (worker * REGION) as u64;
    let mut model = vec![0_u8; REGION];
    for step in 0..OPERATIONS {
        let start = rng.random_range(0..REGION);
        let long = if rng.random_ratio(1, 8) { REGION } else { 9000 };
        let end = REGION.min(start + rng.random_range(1..=long));
        let (offset, len) = (base + start as u64, (end - start) as u64);
        let fua = if rng.random() { flag::FUA } else { 0 };
        let what = format!("seed {seed} step {step} range {start}..{end}");
        match rng.random_range(0..10) {
            0..=3 => {
                let data = client.read(offset, end - start).await.expect(&what);
                assert!(data == model[start..end], "{what}");
            }
            4..=6 => {
                let data = pattern(rng.random(), end - start);
                client.write(offset, &data, fua).await.expect(&what);
                model[start..end].copy_from_slice(&data);
            }
            7 => {
                let hole = if rng.random() { flag::NO_HOLE } else { 0 };
                client.write_zeroes(offset, len, fua | hole).await.expect(&what);
                model[start..end].fill(0);
            }
            8 => {
                client.trim(offset, len, fua).await.expect(&what);
                model[start..end].fill(0);
            }
            _ => {
                client.flush().await.expect(&what);
                client.cache(offset, len).await.expect(&what);
            }
        }
    }
    model
}

async fn check_model(device: std::sync::Arc<MemDevice>, headers: Headers, seed: u64) {
    let rig = Rig::new(device);
    // Two connections, half of the workers on each.
    let clients = [rig.client(headers).await, rig.client(headers).await];
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| tokio::spawn(work(clients[worker % 2].clone(), worker, seed + worker as u64)))
        .collect();
    let mut model = Vec::new();
    for worker in workers {
        model.extend(worker.await.expect("the worker found no difference"));
    }
    assert!(rig.device.contents() == model, "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_match_a_flat_model_when_answered_at_once() {
    for headers in HEADERS {
        let device = MemDevice::new(WORKERS * REGION);
        check_model(device.clone(), headers, 100).await;
        assert!(device.instant_calls.load(SeqCst) > 100);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_match_a_flat_model_when_they_wait() {
    for headers in HEADERS {
        let device = MemDevice::new(WORKERS * REGION).waiting();
        check_model(device.clone(), headers, 200).await;
        assert_eq!(device.instant_calls.load(SeqCst), 0);
        // The client may have the last data before the server has let go of it.
        until("all is let go", || device.gauge.now() == 0 && device.live.now() == 0).await;
    }
}

#[tokio::test]
async fn the_longest_read_and_write_go_through() {
    const LONGEST: usize = 32 << 20;
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(LONGEST + 4096));
        let client = rig.client(headers).await;
        let data = pattern(7, LONGEST);
        client.write(77, &data, flag::FUA).await.expect("32 MiB are written");
        assert!(client.read(77, LONGEST).await.expect("32 MiB are read") == data);
        assert!(rig.device.durable()[77..77 + LONGEST] == data);
    }
}

#[tokio::test]
async fn only_flush_and_fua_make_durable() {
    for headers in HEADERS {
        for device in [MemDevice::new(1 << 16), MemDevice::new(1 << 16).waiting()] {
            let rig = Rig::new(device);
            let client = rig.client(headers).await;
            let durable = |at: usize| rig.device.durable()[at];
            client.write(0, &[1; 10], 0).await.unwrap();
            assert_eq!(durable(0), 0);
            client.flush().await.unwrap();
            assert_eq!(durable(0), 1);
            client.write(0, &[2; 10], flag::FUA).await.unwrap();
            assert_eq!(durable(0), 2);
            client.write_zeroes(0, 1, 0).await.unwrap();
            assert_eq!(durable(0), 2);
            client.write_zeroes(0, 1, flag::FUA).await.unwrap();
            assert_eq!(durable(0), 0);
            client.trim(1, 1, flag::FUA).await.unwrap();
            assert_eq!(durable(1), 0);
            // Allowed on anything.
            let read = RawRequest { flags: flag::FUA, len: 1, offset: 2, ..RawRequest::default() };
            assert_eq!(client.request(read).await.unwrap().data, [2]);
        }
    }
}

#[tokio::test]
async fn the_modes_of_write_zeroes_reach_the_device() {
    let rig = Rig::new(MemDevice::new(1 << 16));
    for headers in HEADERS {
        let client = rig.client(headers).await;
        client.write_zeroes(0, 4096, 0).await.unwrap();
        client.write_zeroes(0, 4096, flag::NO_HOLE).await.unwrap();
        client.write_zeroes(0, 4096, flag::FAST_ZERO).await.unwrap();
        let error = client.write_zeroes(0, 4095, flag::FAST_ZERO).await.unwrap_err();
        assert_eq!(error.errno(), Some(95), "ENOTSUP");
        let mode = |keep_space, only_if_fast| ZeroMode { keep_space, only_if_fast };
        let seen = std::mem::take(&mut *rig.device.zero_modes.lock());
        assert_eq!(seen, [mode(false, false), mode(true, false), mode(false, true), mode(false, true)]);
    }
}

#[tokio::test]
async fn cache_reaches_the_device() {
    let rig = Rig::new(MemDevice::new(1 << 16));
    rig.client(Headers::Structured).await.cache(100, 9000).await.unwrap();
    assert_eq!(*rig.device.caches.lock(), [(100, 9000)]);
}

#[tokio::test]
async fn a_read_that_must_not_be_split_is_not() {
    let rig = Rig::new(MemDevice::new(8 << 20));
    for headers in [Headers::Structured, Headers::Extended] {
        let client = rig.client(headers).await;
        assert_ne!(client.flags() & 1 << 7, 0, "NBD_FLAG_SEND_DF");
        let read = RawRequest { flags: flag::DF, len: 8 << 20, ..RawRequest::default() };
        assert_eq!(client.request(read).await.unwrap().chunks, 1);
    }
    assert_eq!(rig.client(Headers::Simple).await.flags() & 1 << 7, 0);
}

/// `.` nothing, `1` and `2` data of the top and of the image below; a letter a block.
fn drawn(picture: &str) -> Vec<u8> {
    picture.bytes().flat_map(|letter| [if letter == b'.' { 0 } else { letter - b'0' }; BLOCK]).collect()
}

#[tokio::test]
async fn block_status_tells_each_context_its_own_runs() {
    let rig = Rig::new(MemDevice::with(drawn("..1122..")));
    let block = BLOCK as u64;
    for headers in [Headers::Structured, Headers::Extended] {
        let client = rig.client(headers).await;
        let names: Vec<&str> = client.contexts().iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["base:allocation", "qemu:allocation-depth"]);
        let ids: Vec<u32> = client.contexts().iter().map(|(id, _)| *id).collect();
        let check =
            async |offset: u64, len: u64, flags: u16, allocation: &[(u64, u64)], depth: &[(u64, u64)]| {
                let status = client.block_status(offset, len, flags).await.unwrap();
                assert_eq!(status, [(ids[0], allocation.to_vec()), (ids[1], depth.to_vec())]);
            };
        let (two, four) = (2 * block, 4 * block);
        let depth = [(two, 0), (two, 1), (two, 2), (two, 0)];
        check(0, 8 * block, 0, &[(two, 3), (four, 0), (two, 3)], &depth).await;
        check(0, 8 * block, flag::REQ_ONE, &[(two, 3)], &[(two, 0)]).await;
        check(two, 6 * block, flag::REQ_ONE, &[(four, 0)], &[(two, 1)]).await;
        check(100, 50, 0, &[(50, 3)], &[(50, 0)]).await;
        check(two - 1, 2, 0, &[(1, 3), (1, 0)], &[(1, 0), (1, 1)]).await;
    }
}

#[tokio::test]
async fn block_status_can_be_limited_to_a_context_by_a_payload() {
    let rig = Rig::new(MemDevice::with(drawn("..11")));
    let client = rig.client(Headers::Extended).await;
    assert_ne!(client.flags() & 1 << 12, 0, "NBD_FLAG_BLOCK_STATUS_PAYLOAD");
    let depth = client.contexts()[1].0;
    let ask = async |len: u64, ids: &[u32]| {
        let mut payload = len.to_be_bytes().to_vec();
        payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
        let len = payload.len() as u64;
        let (flags, command) = (flag::PAYLOAD_LEN, command::BLOCK_STATUS);
        client.request(RawRequest { flags, command, offset: 0, len, payload }).await
    };
    let block = BLOCK as u64;
    let status = ask(4 * block, &[depth]).await.unwrap().status;
    assert_eq!(status, [(depth, vec![(2 * block, 0), (2 * block, 1)])]);
    for (len, ids) in [
        (block, vec![depth, depth]),
        (block, vec![99]),
        (block, vec![]),
        (0, vec![depth]),
        (5 * block, vec![depth]),
        (block, vec![depth; 65]),
    ] {
        let error = ask(len, &ids).await.unwrap_err();
        assert_eq!(error.errno(), Some(22), "EINVAL for {len} {ids:?}: {error}");
    }
    // A payload that is announced and empty names no range either.
    let (flags, command) = (flag::PAYLOAD_LEN, command::BLOCK_STATUS);
    let empty = RawRequest { flags, command, offset: 0, len: 0, payload: Vec::new() };
    assert_eq!(client.request(empty).await.unwrap_err().errno(), Some(22));
    client.read(0, 1).await.expect("the connection goes on");
}

#[tokio::test]
async fn contexts_selected_for_another_name_do_not_count() {
    use readonce_testkit::nbd_client::{ConnectOptions, option};
    let options = readonce_export::nbd::ServerOptions { export_name: "disk".into(), ..Default::default() };
    let rig = Rig::with(MemDevice::new(1 << 16), options);
    let mut handshake = rig.handshake().await;
    handshake.option(option::STRUCTURED_REPLY, &[]).await.unwrap();
    let query = meta_query("disk", &["base:allocation"]);
    assert_eq!(handshake.option(option::SET_META_CONTEXT, &query).await.unwrap().len(), 2);
    // The empty name is the same export, but it is not the same name.
    let options =
        ConnectOptions { headers: Headers::Structured, contexts: Vec::new(), export: String::new() };
    let client = handshake.go(&options).await.unwrap();
    let error = client.block_status(0, 4096, 0).await.unwrap_err();
    assert_eq!(error.errno(), Some(22));
}
