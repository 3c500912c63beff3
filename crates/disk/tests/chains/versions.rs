//! The backing is not the pinned version any more: refuse, offline, repin.

use std::time::Duration;

use readonce_disk::{
    DeviceError,
    chain::{ChainOptions, OnChange},
};
use readonce_testkit::{Content, FaultyOrigin};

use super::place::{CLUSTER, Opened, Place, asked, clusters, content, filled_from, options, serve};

const SIZE: u64 = 8 * CLUSTER;

fn on_change(on_change: OnChange) -> ChainOptions {
    ChainOptions { on_change, ..options() }
}

/// An image of version 1 with its first two clusters local, and the origin, which serves version 2 now.
async fn changed(place: &Place) -> (FaultyOrigin, Content, Content) {
    let (old, new) = (content(1, SIZE), content(2, SIZE));
    let origin = serve(&old).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    assert!(opened.read(clusters(0..2)).await == old.bytes(clusters(0..2)));
    opened.close().await;
    place.check("top.qed", "DD......").await;
    origin.replace(new.clone(), Some("\"v2\""));
    origin.clear_log();
    (origin, old, new)
}

/// What is not local fails with these words, what is local reads, and the guest may write.
async fn check_only_local_reads(opened: &Opened, old: &Content, words: &str) {
    assert!(opened.read(clusters(0..2)).await == old.bytes(clusters(0..2)));
    let error = opened.try_read(clusters(1..3)).await.expect_err("it is not local");
    assert!(matches!(&error, DeviceError::Io(text) if text.contains(words)), "{error}");
    opened.write(clusters(5..6).start, vec![5; CLUSTER as usize]).await;
    opened.write_zeroes(clusters(6..7)).await;
    opened.flush().await;
    assert!(opened.read(clusters(5..6)).await[..] == [5; CLUSTER as usize]);
    // A write into a part completes, but cannot be made durable.
    opened.write(clusters(7..8).start, vec![7; 512]).await;
    assert!(opened.read(clusters(7..8).start..clusters(7..8).start + 512).await[..] == [7; 512]);
    assert!(opened.read(clusters(6..7)).await[..] == [0; CLUSTER as usize]);
    let error = opened.disk().flush().await.expect_err("the rest of the cluster cannot be had");
    assert!(error.to_string().contains(words), "{error}");
}

/// Closing names the bytes of the eighth cluster, and the image is sound without them.
async fn check_close_names_the_rest(place: &Place, opened: Opened) {
    let error = opened.try_close(Duration::from_secs(60)).await.expect_err("they cannot be saved");
    assert!(error.to_string().contains("could not save guest bytes 0x7000..0x7200"), "{error}");
    place.check("top.qed", "DD...DZ.").await;
}

#[tokio::test]
async fn refuse_gives_what_is_local_and_says_why() {
    let place = Place::new();
    let (origin, old, _) = changed(&place).await;
    let opened = place.open("top.qed", options()).await;
    let words = "the file changed since this image was made: ";
    let warnings = opened.warned().await;
    assert!(matches!(&warnings[..], [one] if one.contains(words) && one.contains("\"v2\"")), "{warnings:?}");
    check_only_local_reads(&opened, &old, words).await;
    check_close_names_the_rest(&place, opened).await;
    assert_eq!(origin.log().iter().map(|entry| entry.body_bytes).max(), Some(1), "no byte but of the probe");
}

#[tokio::test]
async fn a_change_while_the_image_is_open_mixes_nothing() {
    let place = Place::new();
    let old = content(1, SIZE);
    let origin = serve(&old).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.read(clusters(0..2)).await;
    origin.replace(content(2, SIZE), Some("\"v2\""));
    check_only_local_reads(&opened, &old, "the file changed since this image was made: ").await;
    // It comes back: then all goes on.
    origin.replace(old.clone(), Some("\"v1\""));
    opened.flush().await;
    let mut guest = old.bytes(0..SIZE).to_vec();
    guest[clusters(5..6).start as usize..][..CLUSTER as usize].fill(5);
    guest[clusters(6..7).start as usize..][..CLUSTER as usize].fill(0);
    guest[clusters(7..8).start as usize..][..512].fill(7);
    assert!(opened.read(0..SIZE).await == guest);
    opened.close().await;
    place.check_with_qemu("top.qed", &old, &guest).await;
}

#[tokio::test]
async fn offline_never_asks() {
    let place = Place::new();
    let (origin, old, _) = changed(&place).await;
    let opened = place.open("top.qed", on_change(OnChange::Offline)).await;
    check_only_local_reads(&opened, &old, "--on-change=offline").await;
    check_close_names_the_rest(&place, opened).await;
    assert_eq!(origin.log().len(), 0, "{:?}", origin.log());
}

#[tokio::test]
async fn repin_is_only_for_an_image_that_holds_nothing() {
    let place = Place::new();
    let (origin, old, new) = changed(&place).await;
    let before = place.bytes_of("top.qed");
    let refused = place.try_open("top.qed", on_change(OnChange::Repin)).await.map(|_| ());
    let error = refused.expect_err("it holds two clusters").to_string();
    assert!(error.contains("the image holds clusters of the old version already"), "{error}");
    assert!(place.bytes_of("top.qed") == before, "a refused open changes nothing");
    assert_eq!(asked(&origin), []);

    // Back to version 1, and a fresh image of it.
    origin.replace(old, Some("\"v1\""));
    place.create("empty.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    place.open("empty.qed", options()).await.close().await;
    let pinned = place.describe("empty.qed").await.pin.expect("pinned at its first open");
    origin.replace(new.clone(), Some("\"v2\""));
    let opened = place.open("empty.qed", on_change(OnChange::Repin)).await;
    assert!(opened.read(0..SIZE).await == new.bytes(0..SIZE));
    opened.close().await;
    let repinned = place.describe("empty.qed").await.pin.expect("still pinned");
    assert_ne!(repinned.validator, pinned.validator);
    let opened = place.open("empty.qed", options()).await;
    assert_eq!(opened.warnings(), Vec::<String>::new());
    opened.close().await;
    place.check_with_qemu("empty.qed", &new, &new.bytes(0..SIZE)).await;
}

#[tokio::test]
async fn a_backing_of_another_length_is_a_change_even_under_the_same_name() {
    let place = Place::new();
    let (origin, old, _) = changed(&place).await;
    origin.replace(content(1, SIZE + CLUSTER), Some("\"v1\""));
    let opened = place.open("top.qed", options()).await;
    check_only_local_reads(&opened, &old, "the file changed since this image was made: ").await;
}
