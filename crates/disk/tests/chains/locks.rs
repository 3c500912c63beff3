//! Other users of the images of a chain, QEMU among them.

use readonce_disk::chain::{ChainOptions, CopyOnRead, Locks};

use super::{
    place::{CLUSTER, Place, above, clusters, content, filled_from, options},
    qemu,
};

const SIZE: u64 = 1 << 20;

async fn chain(place: &Place) {
    place.raw("base.raw", &content(1, SIZE).bytes(0..SIZE));
    place.create("middle.qed", above("base.raw", "raw", SIZE)).await;
    place.create("top.qed", above("middle.qed", "qed", SIZE)).await;
}

/// QEMU's words when another has the image open for writing.
fn words(place: &Place, name: &str, what: &str) -> String {
    format!("Failed to get {what} lock\nIs another process using the image [{}]?", place.path(name).display())
}

#[tokio::test]
async fn one_writer_and_nobody_beside() {
    let place = Place::new();
    chain(&place).await;
    let opened = place.open("top.qed", options()).await;
    let read_only = ChainOptions { read_only: true, ..options() };
    let second = place.try_open("top.qed", options()).await.map(|_| ()).expect_err("in use");
    let path = place.path("top.qed").display().to_string();
    assert_eq!(
        second.to_string(),
        format!("Could not open '{path}': {}", words(&place, "top.qed", "\"write\""))
    );
    let reader = place.try_open("top.qed", read_only.clone()).await.map(|_| ()).expect_err("in use");
    assert_eq!(
        reader.to_string(),
        format!(
            "Could not open '{path}': {}",
            words(&place, "top.qed", "\"consistent read\"")
                .replace("\"consistent read\"", "shared \"write\"")
        )
    );
    for (name, read_only, what) in [
        ("top.qed", false, "\"write\""),
        ("top.qed", true, "shared \"write\""),
        // A backing may be read by others, but not written.
        ("middle.qed", false, "\"write\""),
        ("middle.qed", true, ""),
    ] {
        let said = qemu::open_words(&place.path(name), read_only);
        match what {
            "" => assert_eq!(said, "", "{name}"),
            what => assert!(said.contains(words(&place, name, what).as_str()), "{name}: {said}"),
        }
    }
    let only_looking =
        ChainOptions { locks: Locks::Share, copy_on_read: CopyOnRead::Off, ..read_only.clone() };
    let looking = place.open("top.qed", only_looking).await;
    assert!(looking.read(clusters(0..1)).await == content(1, SIZE).bytes(0..CLUSTER));
    opened.write(0, vec![1; 512]).await;
    opened.close().await;
    assert_eq!(qemu::open_words(&place.path("top.qed"), false), "", "close gives the lock back");
    place.open("top.qed", options()).await.close().await;
}

#[tokio::test]
async fn readers_share_and_qemu_is_respected() {
    let place = Place::new();
    chain(&place).await;
    let read_only = ChainOptions { read_only: true, ..options() };
    let first = place.open("top.qed", read_only.clone()).await;
    let second = place.open("top.qed", read_only.clone()).await;
    assert_eq!(qemu::open_words(&place.path("top.qed"), true), "");
    let said = qemu::open_words(&place.path("top.qed"), false);
    assert!(said.contains(&words(&place, "top.qed", "\"write\"")), "{said}");
    first.close().await;
    second.close().await;

    let holder = qemu::Holder::start(&place.path("middle.qed"));
    let error = place.try_open("top.qed", options()).await.map(|_| ()).expect_err("its backing is written");
    assert!(error.to_string().contains(&words(&place, "middle.qed", "shared \"write\"")), "{error}");
    drop(holder);
    let holder = qemu::Holder::start(&place.path("top.qed"));
    let error = place.try_open("top.qed", options()).await.map(|_| ()).expect_err("it is written");
    assert!(error.to_string().contains(&words(&place, "top.qed", "\"write\"")), "{error}");
    drop(holder);
    place.open("top.qed", options()).await.close().await;
}

#[tokio::test]
async fn a_lower_image_that_another_reads_is_not_filled_but_used() {
    let place = Place::new();
    let base = content(2, SIZE).bytes(0..SIZE);
    place.raw("base.raw", &base);
    place.create("cache.qed", filled_from("base.raw", "raw", SIZE)).await;
    place.create("top.qed", above("cache.qed", "qed", SIZE)).await;
    let read_only = ChainOptions { read_only: true, copy_on_read: CopyOnRead::Off, ..options() };
    let other = place.open("cache.qed", read_only).await;
    let opened = place.open("top.qed", options()).await;
    let warnings = opened.warnings();
    assert!(matches!(&warnings[..], [one] if one.contains("cache.qed is not filled: ")), "{warnings:?}");
    assert!(opened.read(0..9000).await == base[..9000]);
    opened.close().await;
    other.close().await;
    assert!(!place.draw("cache.qed").await.contains('D'));
}

#[tokio::test]
async fn a_closed_chain_has_no_file_open() {
    let place = Place::new();
    place.raw("base.raw", &content(1, SIZE).bytes(0..SIZE));
    place.create("top.qed", filled_from("base.raw", "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.read(0..SIZE).await;
    opened.close().await;
    // The image's timers may still run for a few seconds.
    for _ in 0..100 {
        let folder = place.folder().to_owned();
        let open = std::fs::read_dir("/proc/self/fd")
            .expect("Linux")
            .flatten()
            .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|path| path.starts_with(&folder)));
        if open.count() == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("files are open ten seconds after the chain was closed");
}
