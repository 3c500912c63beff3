//! The origin cannot be reached.

use readonce_disk::{
    DeviceError,
    chain::{TopOnly, open_layers},
};
use readonce_origin::Reach;
use readonce_storage::TokioRuntime;
use readonce_testkit::{Content, FaultyOrigin};

use super::place::{
    CLUSTER, LONG, Opened, Place, SHORT, Spec, above, clusters, content, filled_from, impatient, options,
    serve,
};

const SIZE: u64 = 8 * CLUSTER;

/// An image with its first two clusters local, and its origin, gone.
async fn left_alone(place: &Place) -> (FaultyOrigin, Content) {
    let content = content(5, SIZE);
    let origin = serve(&content).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.read(clusters(0..2)).await;
    opened.close().await;
    origin.vanish().await;
    (origin, content)
}

fn is_away(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Io(text) if text.contains("given up after"))
}

/// Waits until a chain's origins have tried again at least once.
async fn tried_again(opened: &Opened) {
    while opened.chain.origins().iter().all(|origin| origin.stats().retries == 0) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_is_local_works_and_a_flush_passes_when_the_origin_is_back() {
    let place = Place::new();
    let (origin, content) = left_alone(&place).await;
    let mut guest = content.bytes(0..SIZE).to_vec();
    let opened = place.open("top.qed", impatient()).await;
    let warnings = opened.warned().await;
    assert!(
        matches!(&warnings[..], [one] if one.contains("the backing cannot be reached now")),
        "{warnings:?}"
    );

    assert!(opened.read(clusters(0..2)).await == guest[..2 * CLUSTER as usize]);
    guest[..100].fill(1);
    opened.write(0, vec![1; 100]).await;
    guest[4 * CLUSTER as usize..5 * CLUSTER as usize].fill(2);
    opened.write(4 * CLUSTER, vec![2; CLUSTER as usize]).await;
    opened.write_zeroes(clusters(5..6)).await;
    guest[5 * CLUSTER as usize..6 * CLUSTER as usize].fill(0);
    opened.flush().await;
    let error = opened.try_read(clusters(2..3)).await.expect_err("nobody answers");
    assert!(is_away(&error), "{error}");

    guest[3 * CLUSTER as usize + 7..][..100].fill(3);
    opened.write(3 * CLUSTER + 7, vec![3; 100]).await;
    assert!(opened.read(3 * CLUSTER + 10..3 * CLUSTER + 20).await[..] == [3; 10]);
    for _ in 0..2 {
        let error = opened.disk().flush().await.expect_err("a cluster that was written in part");
        assert!(is_away(&error), "{error}");
    }
    opened.write(4 * CLUSTER, vec![4; 10]).await;
    guest[4 * CLUSTER as usize..][..10].fill(4);

    origin.come_back().await.expect("its port is free");
    opened.flush().await;
    place.check("top.qed", "DD.DDZ..").await;
    assert!(opened.read(0..SIZE).await == guest, "nothing latched");
    opened.close().await;
    place.check_with_qemu("top.qed", &content, &guest).await;
}

#[tokio::test]
async fn a_read_waits_for_an_origin_that_comes_back_in_time() {
    let place = Place::new();
    let (origin, content) = left_alone(&place).await;
    let opened = place.open("top.qed", options()).await;
    let before: u64 = opened.chain.origins().iter().map(|origin| origin.stats().retries).sum();
    let back = async {
        while opened.chain.origins().iter().map(|origin| origin.stats().retries).sum::<u64>() == before {
            tokio::task::yield_now().await;
        }
        origin.come_back().await.expect("its port is free");
    };
    let (read, ()) = tokio::join!(opened.read(clusters(2..4)), back);
    assert!(read == content.bytes(clusters(2..4)));
    opened.close().await;
    place.check("top.qed", "DDDD....").await;
}

#[tokio::test]
async fn close_names_what_it_could_not_save() {
    let place = Place::new();
    let (origin, content) = left_alone(&place).await;
    let opened = place.open("top.qed", options()).await;
    opened.write(3 * CLUSTER + 512, vec![3; 1024]).await;
    opened.write(4 * CLUSTER, vec![4; CLUSTER as usize]).await;
    opened.write(6 * CLUSTER + 100, vec![6; 1]).await;
    let error = opened.try_close(SHORT).await.expect_err("the origin is away").to_string();
    assert!(error.contains("could not save guest bytes 0x3200..0x3600, 0x6064..0x6065"), "{error}");

    origin.come_back().await.expect("its port is free");
    let mut guest = content.bytes(0..SIZE).to_vec();
    guest[4 * CLUSTER as usize..5 * CLUSTER as usize].fill(4);
    let opened = place.open("top.qed", options()).await;
    assert!(opened.read(0..SIZE).await == guest, "the others were saved");
    opened.close().await;
    place.check_with_qemu("top.qed", &content, &guest).await;
}

#[tokio::test]
async fn close_saves_what_it_can_when_the_origin_comes_back_meanwhile() {
    let place = Place::new();
    let (origin, content) = left_alone(&place).await;
    let opened = place.open("top.qed", options()).await;
    opened.write(3 * CLUSTER + 512, vec![3; 1024]).await;
    tried_again(&opened).await;
    origin.come_back().await.expect("its port is free");
    opened.try_close(LONG).await.expect("the origin is back");
    place.check("top.qed", "DD.D....").await;
    let mut guest = content.bytes(0..SIZE).to_vec();
    guest[3 * CLUSTER as usize + 512..][..1024].fill(3);
    place.check_with_qemu("top.qed", &content, &guest).await;
}

/// `map` and `info --backing-chain` waited for ten minutes, and said nothing until then.
#[tokio::test]
async fn a_chain_that_is_looked_at_needs_the_tables_of_a_backing_at_once() {
    let place = Place::new();
    let far = Place::new();
    far.create("far.qed", Spec { backing: None, ..above("", "", SIZE) }).await;
    let origin = serve(&Content::Given(far.bytes_of("far.qed"))).await;
    place.create("top.qed", filled_from(&origin.url(), "qed", SIZE)).await;
    place.open("top.qed", options()).await.close().await;
    origin.vanish().await;
    let mut options = options();
    options.origin.reach = Reach::Preferred;
    let name = place.path("top.qed");
    let rt = TokioRuntime::current();
    let layers = open_layers(name.to_str().expect("text"), &options, TopOnly::No, &rt);
    let layers =
        tokio::time::timeout(std::time::Duration::from_secs(20), layers).await.expect("not for an hour");
    let error = layers.map(|_| ()).expect_err("nobody answers").to_string();
    assert!(error.contains("given up after"), "{error}");
}

#[tokio::test]
async fn without_a_pinned_version_the_image_does_not_open() {
    let place = Place::new();
    let origin = serve(&content(6, SIZE)).await;
    origin.vanish().await;
    for spec in [filled_from(&origin.url(), "raw", SIZE), above(&origin.url(), "raw", SIZE)] {
        let _ = std::fs::remove_file(place.path("top.qed"));
        place.create("top.qed", spec).await;
        let before = place.bytes_of("top.qed");
        let error = place.try_open("top.qed", options()).await.map(|_| ()).expect_err("nobody answers");
        assert!(error.to_string().contains("given up after"), "{error}");
        assert!(error.to_string().contains(&origin.url()), "{error}");
        assert!(place.bytes_of("top.qed") == before);
    }
}

#[tokio::test]
async fn a_stalled_origin_holds_up_no_write() {
    use readonce_testkit::{Fault, When};
    let place = Place::new();
    let content = content(7, SIZE);
    let origin = serve(&content).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    origin.fault(When::always(), Fault::HoldHead(gate.clone()));
    let read = opened.read(clusters(0..1));
    let writes = async {
        while origin.in_flight() == 0 {
            tokio::task::yield_now().await;
        }
        // Into the cluster that is being fetched, and into another.
        opened.write(100, vec![1; 200]).await;
        opened.write(2 * CLUSTER + 5, vec![2; 5]).await;
        assert!(opened.read(100..300).await[..] == [1; 200], "what was written reads at once");
        gate.add_permits(100);
    };
    let (read, ()) = tokio::join!(read, writes);
    let mut guest = content.bytes(0..SIZE).to_vec();
    let old = guest.clone();
    guest[100..300].fill(1);
    guest[2 * CLUSTER as usize + 5..][..5].fill(2);
    let same_as = |bytes: &[u8]| read == bytes[..CLUSTER as usize];
    assert!(same_as(&old) || same_as(&guest), "the read was under way during the write");
    opened.flush().await;
    assert!(opened.read(0..SIZE).await == guest);
    opened.close().await;
    place.check_with_qemu("top.qed", &content, &guest).await;
}
