//! Layers below the top: pinned before they are filled, used while the rest is offline, and away.

use std::time::Duration;

use readonce_disk::chain::{ChainOptions, OnChange};
use readonce_format::driver::{BackingRef, HeaderChange, driver};
use readonce_storage::{LocalFile, OpenMode, Storage};
use readonce_testkit::{Content, Fault, When};

use super::place::{
    CLUSTER, LONG, Place, Spec, above, asked, clusters, content, filled_from, impatient, options, serve,
};

const SIZE: u64 = 8 * CLUSTER;

#[tokio::test]
async fn a_lower_image_is_pinned_before_it_is_filled() {
    let place = Place::new();
    let (old, new) = (content(1, SIZE), content(2, SIZE));
    let origin = serve(&old).await;
    place.create("cache.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    place.create("top.qed", above("cache.qed", "qed", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    assert!(opened.read(clusters(0..2)).await == old.bytes(clusters(0..2)));
    opened.close().await;
    assert!(place.describe("cache.qed").await.pin.is_some(), "not pinned");
    origin.replace(new, Some("\"v2\""));
    let opened = place.open("top.qed", options()).await;
    let error = opened.try_read(clusters(0..4)).await.expect_err("two versions would meet").to_string();
    assert!(error.contains("the file changed"), "{error}");
    opened.close().await;
}

#[tokio::test]
async fn a_qed_backing_that_is_away_holds_up_no_open() {
    let place = Place::new();
    place.raw("base.raw", &content(1, SIZE).bytes(0..SIZE));
    let remote = Place::new();
    super::qemu::img(remote.folder(), &["create", "-q", "-f", "qed", "middle.qed", "32k"]);
    let origin = serve(&Content::Given(remote.bytes_of("middle.qed"))).await;
    place.create("top.qed", filled_from(&origin.url(), "qed", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.write(0, vec![1; CLUSTER as usize]).await;
    opened.close().await;
    origin.vanish().await;
    // Patient for an hour once it is open, but not before.
    let opened = tokio::time::timeout(Duration::from_secs(20), place.open("top.qed", options())).await;
    let opened = opened.expect("it opens without its backing");
    assert!(opened.read(0..CLUSTER).await[..] == [1; CLUSTER as usize]);
    opened.warned().await;
    let (read, back) = tokio::join!(opened.read(0..SIZE), origin.come_back());
    back.expect("its port is free");
    assert!(read[CLUSTER as usize..].iter().all(|byte| *byte == 0));
    opened.close().await;
}

#[tokio::test]
async fn offline_reads_local_images_below_the_top() {
    let place = Place::new();
    let content = content(1, SIZE);
    let origin = serve(&content).await;
    place.create("cache.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("cache.qed", options()).await;
    opened.read(clusters(0..2)).await;
    opened.close().await;
    place.create("top.qed", above("cache.qed", "qed", SIZE)).await;
    origin.clear_log();
    let opened = place.open("top.qed", ChainOptions { on_change: OnChange::Offline, ..options() }).await;
    assert!(opened.read(clusters(0..2)).await == content.bytes(clusters(0..2)));
    assert!(opened.try_read(clusters(2..3)).await.is_err());
    opened.close().await;
    assert_eq!(origin.log().len(), 0);
}

#[tokio::test]
async fn an_image_made_of_local_files_can_be_served() {
    let place = Place::new();
    let base = content(1, SIZE);
    place.raw("base.raw", &base.bytes(0..SIZE));
    place.create("a.qed", above("base.raw", "raw", SIZE)).await;
    let opened = place.open("a.qed", options()).await;
    opened.write(0, vec![1; 512]).await;
    opened.close().await;
    let origin = serve(&Content::Given(place.bytes_of("a.qed"))).await;
    let beside = Fault::Version { etag: Some("\"b\"".into()), content: base.clone() };
    origin.fault(When::always().on("/i/base.raw"), beside);
    let read_only = ChainOptions { read_only: true, ..options() };
    let opened = super::place::open(&origin.url_of("/i/a.qed"), read_only).await.expect("it opens");
    let read = opened.try_read(clusters(1..2)).await.expect("the same file, elsewhere");
    assert!(read == base.bytes(clusters(1..2)));
}

/// Many small reads end, whatever the cluster sizes above each other; each byte is asked once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_reads_go_through_two_images_that_fill() {
    const LEN: u64 = 4 << 20;
    let content = content(5, LEN);
    let origin = serve(&content).await;
    for (seed, lower_size, upper_size) in [(1, 4096, 65536), (2, 65536, 4096), (3, 1 << 20, 512)] {
        let place = Place::new();
        let url = origin.url();
        let lower = Spec { cluster_size: lower_size, ..filled_from(&url, "raw", LEN) };
        place.create("lower.qed", lower).await;
        let upper = Spec { cluster_size: upper_size, ..filled_from("lower.qed", "qed", LEN) };
        place.create("top.qcow2", upper).await;
        origin.clear_log();
        let opened = place.open("top.qcow2", options()).await;
        let mut draw: u64 = seed;
        for _ in 0..300 {
            draw = (draw * 1_103_515_245 + 12_345) % (1 << 31);
            let at = (draw >> 8) % (LEN / 4096);
            let range = at * 4096..(at + 1) * 4096;
            assert!(opened.read(range.clone()).await == content.bytes(range));
        }
        opened.close().await;
        let mut ranges = asked(&origin);
        ranges.sort_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "asked twice");
        let opened = place.open("top.qcow2", options()).await;
        assert!(opened.read(0..LEN).await == content.bytes(0..LEN));
        opened.close().await;
    }
}

/// Its fills came from a version that nobody remembered: that the file had another length since was not seen.
#[tokio::test]
async fn a_raw_file_that_is_told_by_its_bytes_is_pinned() {
    for name in ["top.qed", "top.qcow2"] {
        let place = Place::new();
        place.raw("base.raw", &content(1, SIZE).bytes(0..SIZE));
        place.create(name, filled_from("base.raw", "raw", SIZE)).await;
        let file = LocalFile::open(place.path(name), OpenMode::ReadWrite).expect("it is there");
        let file: std::sync::Arc<dyn Storage> = std::sync::Arc::new(file);
        let backing = BackingRef { name: "base.raw".into(), format: None };
        let format = name.rsplit('.').next().and_then(driver).expect("known");
        format.change(&file, &HeaderChange::Backing(Some(backing), None)).await.expect("room");
        drop(file);
        let opened = place.open(name, options()).await;
        opened.read(clusters(0..1)).await;
        opened.close().await;
        assert!(place.describe(name).await.pin.is_some(), "{name}");
        place.raw("base.raw", &content(2, 2 * SIZE).bytes(0..2 * SIZE));
        let opened = place.open(name, options()).await;
        let error = opened.try_read(clusters(1..2)).await.expect_err("another file").to_string();
        assert!(error.contains("length was"), "{error}");
        opened.close().await;
    }
}

/// The image above it was filled from one version today and from another tomorrow, and nobody could have told.
#[tokio::test]
async fn a_lower_image_that_pins_no_version_is_told() {
    let place = Place::new();
    let origin = serve(&content(1, SIZE)).await;
    place.create("middle.qed", above(&origin.url(), "raw", SIZE)).await;
    place.create("top.qed", above("middle.qed", "qed", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    let warnings = opened.warnings();
    let says = |text: &String| text.contains("middle.qed pins no version") && text.contains(&origin.url());
    assert!(matches!(&warnings[..], [one] if says(one)), "{warnings:?}");
    opened.close().await;
    // What it advises helps.
    place.open("middle.qed", options()).await.close().await;
    let opened = place.open("top.qed", options()).await;
    assert_eq!(opened.warnings(), Vec::<String>::new());
    opened.close().await;
}

/// While nobody answers, readers share an attempt: were each to make its own in turn, the last of many would wait for all.
#[tokio::test]
async fn readers_of_a_layer_that_is_away_share_an_attempt() {
    let place = Place::new();
    let origin = serve(&content(1, SIZE)).await;
    place.create("middle.qed", above(&origin.url(), "raw", SIZE)).await;
    place.create("top.qed", above("middle.qed", "qed", SIZE)).await;
    let opened = place.open("top.qed", impatient()).await;
    // Every attempt to open the layer at the bottom asks once: what does not pass is not tried again by itself.
    origin.fault(When::always(), Fault::Status { status: 404, retry_after: None });
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    origin.fault(When::always(), Fault::HoldHead(gate.clone()));
    let reads = (0..16).map(|index| opened.try_read(index * 512..index * 512 + 512));
    let open_gate = async {
        while origin.in_flight() == 0 {
            tokio::task::yield_now().await;
        }
        gate.add_permits(100);
    };
    let (reads, ()) = tokio::join!(futures_util::future::join_all(reads), open_gate);
    assert!(reads.iter().all(|read| read.is_err()));
    assert_eq!(origin.log().len(), 1, "one attempt for all sixteen");
    opened.try_close(LONG).await.expect("nothing was written");
}
