//! Requests that make no sense, and devices that fail: each is answered, and the connection goes on.

use std::sync::atomic::Ordering::SeqCst;

use readonce_disk::DeviceError;
use readonce_testkit::nbd_client::{Headers, NbdClient, NbdError, RawRequest, command, command_flag as flag};

use crate::{
    device::MemDevice,
    rig::{HEADERS, Rig},
};

const SIZE: usize = 1 << 20;
const MIB: u64 = 1 << 20;
const PAYLOAD_MAX: u64 = 32 << 20;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

fn request(command: u16, flags: u16, offset: u64, len: u64) -> RawRequest {
    let payload = if command == command::WRITE { vec![7; len as usize] } else { Vec::new() };
    RawRequest { flags, command, offset, len, payload }
}

/// The request is refused with `errno` and changes nothing, and the next one works.
async fn check(rig: &Rig, client: &NbdClient, request: RawRequest, errno: u32) {
    let what = format!(
        "command {} flags {:#x} offset {} length {} with {:?}",
        request.command,
        request.flags,
        request.offset,
        request.len,
        client.headers()
    );
    let before = rig.device.contents();
    match client.request(request).await {
        Err(NbdError::Server { errno: given, text }) => {
            assert_eq!(given, errno, "{what}: {text}");
            assert_eq!(text.is_empty(), client.headers() == Headers::Simple, "{what}: {text:?}");
        }
        other => panic!("{what}: {other:?}"),
    }
    assert!(rig.device.contents() == before, "{what}");
    client.read(0, 1).await.expect(&what);
}

#[tokio::test]
async fn a_range_outside_the_device_is_refused() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(SIZE));
        let client = rig.client(headers).await;
        for (offset, len) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 5, 100), (MIB + 1, 0)] {
            for (command, errno) in [
                (command::READ, EINVAL),
                (command::WRITE, ENOSPC),
                (command::TRIM, EINVAL),
                (command::WRITE_ZEROES, ENOSPC),
                (command::CACHE, EINVAL),
            ] {
                check(&rig, &client, request(command, 0, offset, len), errno).await;
            }
            if headers != Headers::Simple && len > 0 {
                check(&rig, &client, request(command::BLOCK_STATUS, 0, offset, len), EINVAL).await;
            }
        }
    }
}

#[tokio::test]
async fn lengths_that_64_bits_make_possible_are_refused() {
    let rig = Rig::new(MemDevice::new(SIZE));
    let client = rig.client(Headers::Extended).await;
    for len in [1 << 32, 1 << 40, u64::MAX] {
        for (command, errno) in [
            (command::READ, EINVAL),
            (command::TRIM, EINVAL),
            (command::WRITE_ZEROES, ENOSPC),
            (command::CACHE, EINVAL),
            (command::BLOCK_STATUS, EINVAL),
        ] {
            check(&rig, &client, request(command, 0, 1, len), errno).await;
        }
    }
}

#[tokio::test]
async fn a_payload_longer_than_the_limit_is_refused() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(40 << 20));
        let client = rig.client(headers).await;
        let too_long = PAYLOAD_MAX + 1;
        let errno = if headers == Headers::Simple { EINVAL } else { EOVERFLOW };
        check(&rig, &client, request(command::READ, 0, 0, too_long), errno).await;
        check(&rig, &client, request(command::WRITE, 0, 0, too_long), EINVAL).await;
        // What carries no payload may be as long as the device.
        client.write_zeroes(0, too_long, 0).await.unwrap();
        client.trim(0, too_long, 0).await.unwrap();
        client.cache(0, too_long).await.unwrap();
    }
}

#[tokio::test]
async fn unknown_commands_and_flags_are_refused() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::new(SIZE));
        let client = rig.client(headers).await;
        for command in [8, 9, 100, u16::MAX] {
            check(&rig, &client, request(command, 0, 0, 0), EINVAL).await;
        }
        for (command, flags) in [
            (command::READ, flag::REQ_ONE),
            (command::READ, flag::NO_HOLE),
            (command::WRITE, flag::DF),
            (command::WRITE, 1 << 15),
            (command::FLUSH, flag::FAST_ZERO),
            (command::TRIM, flag::NO_HOLE),
            (command::CACHE, flag::REQ_ONE),
            (command::WRITE_ZEROES, flag::DF),
            (command::BLOCK_STATUS, flag::DF),
        ] {
            check(&rig, &client, request(command, flags, 0, 512), EINVAL).await;
        }
        if headers == Headers::Simple {
            check(&rig, &client, request(command::READ, flag::DF, 0, 512), EINVAL).await;
            check(&rig, &client, request(command::BLOCK_STATUS, 0, 0, 512), EINVAL).await;
        }
        if headers != Headers::Extended {
            check(&rig, &client, request(command::WRITE, flag::PAYLOAD_LEN, 0, 512), EINVAL).await;
        }
    }
}

#[tokio::test]
async fn a_payload_where_none_belongs_is_thrown_away() {
    let rig = Rig::new(MemDevice::new(SIZE));
    let client = rig.client(Headers::Extended).await;
    for command in [command::READ, command::FLUSH, command::TRIM, command::WRITE_ZEROES, 77] {
        for len in [1, 512, 300_000] {
            let flags = flag::PAYLOAD_LEN;
            let payload = vec![0x25; len];
            let request = RawRequest { flags, command, offset: 0, len: len as u64, payload };
            check(&rig, &client, request, EINVAL).await;
        }
    }
}

#[tokio::test]
async fn a_length_of_zero_succeeds_and_does_nothing() {
    for headers in HEADERS {
        let rig = Rig::new(MemDevice::with(vec![9; SIZE]));
        let client = rig.client(headers).await;
        for offset in [0, 100, MIB] {
            assert!(client.read(offset, 0).await.unwrap().is_empty());
            client.trim(offset, 0, flag::FUA).await.unwrap();
            client.write_zeroes(offset, 0, 0).await.unwrap();
            client.cache(offset, 0).await.unwrap();
            client.write(offset, &[], 0).await.unwrap();
        }
        if headers != Headers::Simple {
            check(&rig, &client, request(command::BLOCK_STATUS, 0, 0, 0), EINVAL).await;
        }
        assert_eq!(rig.device.contents(), vec![9; SIZE]);
    }
}

#[tokio::test]
async fn a_read_only_export_says_so_and_refuses_writes() {
    for headers in HEADERS {
        let device = MemDevice::with(vec![9; SIZE]);
        device.read_only.store(true, SeqCst);
        let rig = Rig::new(device);
        let client = rig.client(headers).await;
        assert_ne!(client.flags() & 2, 0, "NBD_FLAG_READ_ONLY");
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            check(&rig, &client, request(command, 0, 0, 512), EPERM).await;
            check(&rig, &client, request(command, 0, MIB, 512), EPERM).await;
        }
        client.flush().await.unwrap();
        client.cache(0, 512).await.unwrap();
        assert_eq!(client.read(5, 1).await.unwrap(), [9]);
    }
}

#[tokio::test]
async fn every_error_of_the_device_answers_its_request_alone() {
    let errors: [(fn() -> DeviceError, u32); 4] = [
        (|| DeviceError::Io("the origin is away".into()), EIO),
        (|| DeviceError::NoSpace("the disk is full".into()), ENOSPC),
        (|| DeviceError::ReadOnly, EPERM),
        (|| DeviceError::NotFast, ENOTSUP),
    ];
    for headers in HEADERS {
        for device in [MemDevice::new(SIZE), MemDevice::new(SIZE).waiting()] {
            let rig = Rig::new(device);
            let client = rig.client(headers).await;
            for (error, errno) in errors {
                for command in 0..=command::BLOCK_STATUS {
                    if command == command::DISC
                        || command == command::BLOCK_STATUS && headers == Headers::Simple
                    {
                        continue;
                    }
                    for flags in [0, flag::FUA] {
                        *rig.device.failure.lock() = Some(error);
                        let given = client.request(request(command, flags, 0, 4096)).await.unwrap_err();
                        *rig.device.failure.lock() = None;
                        assert_eq!(given.errno(), Some(errno), "command {command}: {given}");
                        if headers != Headers::Simple {
                            assert!(given.to_string().contains(&error().to_string()), "{given}");
                        }
                        assert_eq!(client.read(0, 4).await.unwrap(), [0; 4]);
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn an_error_text_of_any_length_fits() {
    let rig = Rig::new(MemDevice::new(SIZE));
    *rig.device.failure.lock() = Some(|| DeviceError::Io("ä".repeat(100_000)));
    let NbdError::Server { text, .. } = rig.client(Headers::Extended).await.read(0, 1).await.unwrap_err()
    else {
        panic!("no answer of the server");
    };
    assert!(text.starts_with('ä') && text.len() <= 4096, "{}", text.len());
}
