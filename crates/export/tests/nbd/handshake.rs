//! Options, one by one.

use readonce_export::nbd::ServerOptions;
use readonce_testkit::nbd_client::{
    ConnectOptions, Handshake, Headers, go_data, meta_query, option, option_reply as reply,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{device::MemDevice, rig::Rig};

fn rig() -> Rig {
    let options = ServerOptions {
        export_name: "fedora".into(),
        description: "a disk from afar".into(),
        ..ServerOptions::default()
    };
    Rig::with(MemDevice::new(1 << 20), options)
}

/// The option is answered by these kinds of replies, in this order.
async fn check(handshake: &mut Handshake, option: u32, data: &[u8], kinds: &[u32]) -> Vec<Vec<u8>> {
    let replies = handshake.option(option, data).await.expect("an answer");
    let given: Vec<u32> = replies.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(given, kinds, "option {option}");
    replies.into_iter().map(|(_, data)| data).collect()
}

#[tokio::test]
async fn list_names_the_export() {
    let rig = rig();
    let mut handshake = rig.handshake().await;
    let replies = check(&mut handshake, option::LIST, &[], &[reply::SERVER, reply::ACK]).await;
    assert_eq!(replies[0], b"\0\0\0\x06fedoraa disk from afar");
    check(&mut handshake, option::LIST, b"x", &[reply::ERR_INVALID]).await;
}

#[tokio::test]
async fn info_tells_what_is_asked() {
    let rig = rig();
    let mut handshake = rig.handshake().await;
    let kinds = [reply::INFO, reply::INFO, reply::INFO, reply::INFO, reply::ACK];
    for name in ["fedora", ""] {
        let replies = check(&mut handshake, option::INFO, &go_data(name, &[1, 2, 3, 77]), &kinds).await;
        assert_eq!(replies[0][..10], [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]);
        assert_eq!(replies[1], [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
        assert_eq!(replies[2], b"\0\x01fedora");
        assert_eq!(replies[3], b"\0\x02a disk from afar");
    }
    check(&mut handshake, option::INFO, &go_data("other", &[]), &[reply::ERR_UNKNOWN]).await;
    check(&mut handshake, option::GO, &go_data("other", &[]), &[reply::ERR_UNKNOWN]).await;
    for broken in [&b""[..], b"\0\0\0\x09short\0\0", b"\0\0\0\0\0\x05", b"\xff\xff\xff\xff"] {
        check(&mut handshake, option::GO, broken, &[reply::ERR_INVALID]).await;
    }
    handshake
        .go(&ConnectOptions { export: "fedora".into(), ..Default::default() })
        .await
        .expect("it goes on");
}

#[tokio::test]
async fn unknown_and_refused_options_are_answered() {
    let rig = rig();
    let mut handshake = rig.handshake().await;
    for unknown in [0, 4, 12, 1000, u32::MAX] {
        check(&mut handshake, unknown, &[0; 1000], &[reply::ERR_UNSUP]).await;
    }
    check(&mut handshake, option::STARTTLS, &[], &[reply::ERR_POLICY]).await;
    check(&mut handshake, option::STARTTLS, b"x", &[reply::ERR_INVALID]).await;
    check(&mut handshake, option::GO, &[0; 100_000], &[reply::ERR_TOO_BIG]).await;
    check(&mut handshake, option::STRUCTURED_REPLY, b"x", &[reply::ERR_INVALID]).await;
    check(&mut handshake, option::STRUCTURED_REPLY, &[], &[reply::ACK]).await;
    check(&mut handshake, option::EXTENDED_HEADERS, b"x", &[reply::ERR_INVALID]).await;
    check(&mut handshake, option::EXTENDED_HEADERS, &[], &[reply::ACK]).await;
    check(&mut handshake, option::EXTENDED_HEADERS, &[], &[reply::ERR_INVALID]).await;
    check(&mut handshake, option::STRUCTURED_REPLY, &[], &[reply::ERR_EXT_HEADER_REQD]).await;
    check(&mut handshake, option::ABORT, b"ignored", &[reply::ACK]).await;
    let mut rest = Vec::new();
    handshake.into_stream().read_to_end(&mut rest).await.expect("the server closes");
    assert!(rest.is_empty());
}

#[tokio::test]
async fn metadata_contexts_are_listed_and_selected() {
    let rig = rig();
    let mut handshake = rig.handshake().await;
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    check(&mut handshake, list, &meta_query("fedora", &[]), &[reply::ERR_INVALID]).await;
    check(&mut handshake, set, &meta_query("fedora", &["base:allocation"]), &[reply::ERR_INVALID]).await;
    check(&mut handshake, option::STRUCTURED_REPLY, &[], &[reply::ACK]).await;
    let mut names = async |option: u32, queries: &[&str]| {
        let replies = handshake.option(option, &meta_query("fedora", queries)).await.unwrap();
        let (last, contexts) = replies.split_last().unwrap();
        assert_eq!(last.0, reply::ACK, "{queries:?}");
        let names = contexts.iter().map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap());
        names.collect::<Vec<_>>()
    };
    let (base, qemu) = ("base:allocation", "qemu:allocation-depth");
    assert_eq!(names(list, &[]).await, [base, qemu]);
    assert_eq!(names(list, &["base:"]).await, [base]);
    assert_eq!(names(list, &["qemu:"]).await, [qemu]);
    assert_eq!(names(list, &["qemu:dirty-bitmap:b0", "x-any:"]).await, [""; 0]);
    assert_eq!(names(set, &[base, "base:", "qemu:", base]).await, [base]);
    assert_eq!(names(set, &[qemu, base]).await, [base, qemu]);
    assert_eq!(names(set, &[]).await, [""; 0]);
    let many = vec![base; 1000];
    check(&mut handshake, set, &meta_query("fedora", &many), &[reply::ERR_TOO_BIG]).await;
    check(&mut handshake, set, &meta_query("other", &[base]), &[reply::ERR_UNKNOWN]).await;
    let mut cut = meta_query("fedora", &[base]);
    cut.pop();
    check(&mut handshake, set, &cut, &[reply::ERR_INVALID]).await;
    let mut long = meta_query("fedora", &[base]);
    long.push(0);
    check(&mut handshake, set, &long, &[reply::ERR_INVALID]).await;
    // The failures have cleared what was selected before.
    let client = handshake
        .go(&ConnectOptions { export: "fedora".into(), headers: Headers::Structured, contexts: Vec::new() })
        .await
        .unwrap();
    assert_eq!(client.block_status(0, 512, 0).await.unwrap_err().errno(), Some(22));
}

/// An old client: NBD_OPT_EXPORT_NAME, and 124 zeros unless it asked for none.
#[tokio::test]
async fn old_clients_enter_by_the_export_name() {
    let rig = rig();
    for (flags, padding) in [(0_u32, 124), (1, 124), (3, 0)] {
        let mut stream = tokio::net::UnixStream::connect(&rig.socket).await.unwrap();
        stream.read_exact(&mut [0; 18]).await.unwrap();
        let mut message = flags.to_be_bytes().to_vec();
        message.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x06fedora");
        // Without waiting for the answer, a read of 8 bytes with the cookie "a cookie".
        message.extend(0x2560_9513_u32.to_be_bytes());
        message.extend(b"\0\0\0\0a cookie\0\0\0\0\0\0\0\0\0\0\0\x08");
        stream.write_all(&message).await.unwrap();
        let mut answer = vec![0; 10 + padding + 24];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[..8], (1_u64 << 20).to_be_bytes());
        assert!(answer[10..10 + padding].iter().all(|&byte| byte == 0));
        assert_eq!(answer[10 + padding..], *b"\x67\x44\x66\x98\0\0\0\0a cookie\0\0\0\0\0\0\0\0");
    }
}

#[tokio::test]
async fn a_client_that_does_not_wait_for_answers_gets_them_all() {
    let rig = rig();
    let mut stream = tokio::net::UnixStream::connect(&rig.socket).await.unwrap();
    let mut message = 3_u32.to_be_bytes().to_vec();
    message.extend(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    message.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
    for _ in 0..1000 {
        message.extend(0x2560_9513_u32.to_be_bytes());
        message.extend(b"\0\0\0\0a cookie\0\0\0\0\0\0\0\0\0\0\0\x08");
    }
    message.extend(0x2560_9513_u32.to_be_bytes());
    message.extend([0, 0, 0, 2]);
    message.extend([0; 20]);
    stream.write_all(&message).await.unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    // Greeting, one ACK, GO's three replies, then a chunk of 28 + 8 bytes for each read.
    assert_eq!(all.len(), 18 + 20 + (20 + 12) + (20 + 14) + 20 + 1000 * 36);
}
