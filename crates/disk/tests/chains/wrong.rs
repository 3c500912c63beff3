//! The origin answers, but wrong: what passes is not seen by the guest, what does not is an error of that read alone.

use readonce_disk::DeviceError;
use readonce_testkit::{Fault, When};

use super::place::{CLUSTER, Place, clusters, content, filled_from, options, serve};

const SIZE: u64 = 64 * CLUSTER;

/// After `fault`, which meets each of `count` requests, a read and a write into a part are right, and no byte came twice.
async fn check_passes(count: u64, fault: Fault) {
    let place = Place::new();
    let content = content(8, SIZE);
    let origin = serve(&content).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    let before = origin.body_bytes();
    origin.fault(When::next(count), fault.clone());
    opened.write(9 * CLUSTER + 100, vec![9; 100]).await;
    let mut guest = content.bytes(0..SIZE).to_vec();
    guest[9 * CLUSTER as usize + 100..][..100].fill(9);
    assert!(opened.read(0..SIZE).await == guest, "{fault:?}");
    opened.flush().await;
    opened.close().await;
    assert!(origin.log().len() as u64 > count + 1, "the fault was met: {fault:?}");
    // What a cut leaves in the sockets on the way is lost, and asked again: less than a request.
    assert!(origin.body_bytes() - before < 2 * SIZE, "{fault:?}");
    place.check_with_qemu("top.qed", &content, &guest).await;
}

#[tokio::test]
async fn what_passes_fails_no_read() {
    check_passes(3, Fault::Status { status: 503, retry_after: None }).await;
    check_passes(1, Fault::CutAfter(10_000)).await;
    check_passes(2, Fault::ResetAfter(5_000)).await;
    check_passes(1, Fault::ShortBody(7_777)).await;
    check_passes(1, Fault::Reset).await;
}

/// While every request meets `fault`, what is not local fails in these words and is not stored; what is local reads.
async fn check_fails(fault: Fault, words: &str) {
    let place = Place::new();
    let content = content(9, SIZE);
    let origin = serve(&content).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.read(clusters(0..2)).await;
    origin.fault(When::always(), fault.clone());
    let error = opened.try_read(clusters(1..4)).await.expect_err("a wrong answer is not data");
    assert!(matches!(&error, DeviceError::Io(text) if text.contains(words)), "{fault:?}: {error}");
    assert!(opened.read(clusters(0..2)).await == content.bytes(clusters(0..2)));
    opened.flush().await;
    opened.write(5 * CLUSTER, vec![5; 10]).await;
    let error = opened.disk().flush().await.expect_err("the rest of the cluster cannot be had");
    assert!(error.to_string().contains(words), "{fault:?}: {error}");
    origin.heal();
    let mut guest = content.bytes(0..SIZE).to_vec();
    guest[5 * CLUSTER as usize..][..10].fill(5);
    opened.flush().await;
    assert!(opened.read(0..SIZE).await == guest, "{fault:?}");
    opened.close().await;
    place.check_with_qemu("top.qed", &content, &guest).await;
}

#[tokio::test]
async fn what_does_not_pass_is_an_error_and_never_data() {
    check_fails(Fault::IgnoreRange, "200").await;
    check_fails(Fault::ContentRange(format!("bytes 0-8191/{SIZE}")), "got bytes 0-8191/262144").await;
    check_fails(Fault::ContentRange("bytes */262144".into()), "Content-Range").await;
    check_fails(Fault::Status { status: 404, retry_after: None }, "404").await;
    check_fails(Fault::Status { status: 403, retry_after: None }, "403").await;
}
