//! One operation on an image over a URL: what becomes of each cluster, and what the origin is asked.

use std::ops::Range;

use readonce_testkit::Content;

use super::place::{CLUSTER, Opened, Place, asked, clusters, content, filled_from, options, serve};

/// Clusters of the image; the backing ends in the middle of the seventh.
const COUNT: u64 = 8;
/// Bytes of the backing.
const BACKING: u64 = 6 * CLUSTER + 1000;
/// The cluster of the backing that is all zeros.
const ZEROS: u64 = 5;

/// What is done, in bytes.
#[derive(Clone)]
enum Do {
    Read(Range<u64>),
    Cache(Range<u64>),
    Write(Range<u64>),
    Zero(Range<u64>),
    Trim(Range<u64>),
}
use Do::{Cache, Read, Trim, Write, Zero};

fn backing() -> Content {
    let mut bytes = Content::seeded(7, BACKING).bytes(0..BACKING).to_vec();
    bytes[(ZEROS * CLUSTER) as usize..((ZEROS + 1) * CLUSTER) as usize].fill(0);
    Content::Given(bytes.into())
}

/// Brings an empty image into the drawn state without reading anything.
async fn prepare(opened: &Opened, guest: &mut [u8], letters: &str) {
    for (index, letter) in (0..).zip(letters.chars()) {
        let range = clusters(index..index + 1);
        let bytes = &mut guest[range.start as usize..range.end as usize];
        match letter {
            'D' => {
                bytes.fill(0xd0 + index as u8);
                opened.write(range.start, bytes.to_vec()).await;
            }
            'Z' => {
                bytes.fill(0);
                opened.write_zeroes(range).await;
            }
            _ => {}
        }
    }
    opened.flush().await;
}

/// An image drawn as `before` is drawn as `after` when `what` was done and flushed, and the origin was asked for these ranges.
/// What the guest sees is right at once and in the file. (A flush waits for no fill, so the file is looked at when it is closed.)
async fn check(before: &str, what: Do, after: &str, fetched: &[Range<u64>]) {
    let content = backing();
    let place = Place::new();
    let origin = serve(&content).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", COUNT * CLUSTER)).await;
    let opened = place.open("top.qed", options()).await;
    let mut guest = content.bytes(0..BACKING).to_vec();
    guest.resize((COUNT * CLUSTER) as usize, 0);
    prepare(&opened, &mut guest, before).await;
    place.check("top.qed", before).await;
    origin.clear_log();

    let bytes = |range: &Range<u64>| range.start as usize..range.end as usize;
    match what {
        Read(range) => assert!(opened.read(range.clone()).await == guest[bytes(&range)], "{range:?}"),
        Cache(range) => opened.disk().cache(range.start, range.end - range.start).await.expect("cache"),
        Write(range) => {
            guest[bytes(&range)].fill(0xaa);
            opened.write(range.start, guest[bytes(&range)].to_vec()).await;
            assert!(opened.read(range.clone()).await == guest[bytes(&range)], "{range:?}");
        }
        Zero(range) => {
            guest[bytes(&range)].fill(0);
            opened.write_zeroes(range.clone()).await;
            assert!(opened.read(range.clone()).await == guest[bytes(&range)], "{range:?}");
        }
        Trim(range) => {
            opened.disk().trim(range.start, range.end - range.start).await.expect("trim");
            for index in range.start / CLUSTER..range.end / CLUSTER {
                // What is trimmed of the image's own data becomes zeros here; a cluster that is absent shows the backing on.
                if before.as_bytes()[index as usize] == b'D' {
                    guest[bytes(&clusters(index..index + 1))].fill(0);
                }
            }
        }
    }
    opened.flush().await;
    assert_eq!(asked(&origin), fetched, "asked of the origin, {before} to {after}");
    opened.close().await;
    place.check("top.qed", after).await;
    place.check_with_qemu("top.qed", &content, &guest).await;
}

#[tokio::test]
async fn a_read_fills_what_it_touches() {
    check("........", Read(clusters(0..2)), "DD......", &[clusters(0..2)]).await;
    check("........", Read(5000..5001), ".D......", &[clusters(1..2)]).await;
    check(".D.Z....", Read(clusters(0..4)), "DDDZ....", &[clusters(0..1), clusters(2..3)]).await;
    check("DDDD....", Read(clusters(0..4)), "DDDD....", &[]).await;
    check("........", Cache(clusters(1..3)), ".DD.....", &[clusters(1..3)]).await;
}

#[tokio::test]
async fn zeros_of_the_backing_become_a_zero_cluster() {
    check("........", Read(clusters(5..6)), ".....Z..", &[clusters(5..6)]).await;
}

#[tokio::test]
async fn behind_the_end_of_the_backing_nothing_is_asked() {
    check("........", Read(clusters(7..8)), "........", &[]).await;
    check("........", Read(clusters(6..8)), "......D.", &[6 * CLUSTER..BACKING]).await;
    // A raw file shows whole sectors.
    let end = BACKING.next_multiple_of(512);
    check("........", Read(end..end + 9), "........", &[]).await;
    check("........", Write(7 * CLUSTER + 5..7 * CLUSTER + 6), ".......D", &[]).await;
    check("........", Write(BACKING + 5..BACKING + 6), "......D.", &[6 * CLUSTER..BACKING]).await;
}

#[tokio::test]
async fn a_write_asks_only_for_the_rest_of_its_clusters() {
    check("........", Write(clusters(1..3)), ".DD.....", &[]).await;
    check("........", Write(0..100), "D.......", &[100..CLUSTER]).await;
    check("D..Z....", Write(5..4 * CLUSTER - 5), "DDDD....", &[]).await;
    let (head, tail) = (0..3000, CLUSTER + 100..2 * CLUSTER);
    check("........", Write(3000..CLUSTER + 100), "DD......", &[head, tail]).await;
}

#[tokio::test]
async fn zeroes_ask_for_nothing_where_clusters_are_whole() {
    check("..D.....", Zero(clusters(1..4)), ".ZDZ....", &[]).await;
    check("...Z....", Zero(3 * CLUSTER + 5..3 * CLUSTER + 9), "...Z....", &[]).await;
    check("........", Zero(100..2 * CLUSTER), "DZ......", &[0..100]).await;
}

#[tokio::test]
async fn a_trim_keeps_every_mapping() {
    check("D.Z.....", Trim(clusters(0..4)), "D.Z.....", &[]).await;
}

#[tokio::test]
async fn a_lower_image_with_copy_on_read_is_filled_and_the_top_is_not() {
    let content = content(3, COUNT * CLUSTER);
    let origin = serve(&content).await;
    let place = Place::new();
    place.create("cache.qed", filled_from(&origin.url(), "raw", COUNT * CLUSTER)).await;
    place.create("top.qed", super::place::above("cache.qed", "qed", COUNT * CLUSTER)).await;

    let opened = place.open("top.qed", options()).await;
    assert!(opened.read(clusters(0..3)).await == content.bytes(clusters(0..3)));
    assert!(opened.read(clusters(1..4)).await == content.bytes(clusters(1..4)));
    opened.write(clusters(4..5).start, vec![9; 512]).await;
    opened.flush().await;
    place.check("top.qed", "....D...").await;
    assert_eq!(opened.opened(), ["cache.qed qed+", "top.qed qed+", "image raw"]);
    assert_eq!(opened.warnings(), Vec::<String>::new());
    opened.close().await;
    place.check("cache.qed", "DDDDD...").await;

    origin.clear_log();
    let opened = place.open("top.qed", options()).await;
    assert!(opened.read(clusters(0..4)).await == content.bytes(clusters(0..4)));
    assert_eq!(asked(&origin), [], "what is local is not asked again");
    opened.close().await;
    place.check_with_qemu("cache.qed", &content, &content.bytes(0..COUNT * CLUSTER)).await;
}

#[tokio::test]
async fn copy_on_read_off_keeps_nothing_and_on_needs_a_backing() {
    use readonce_disk::chain::{ChainOptions, CopyOnRead};
    let content = content(4, COUNT * CLUSTER);
    let origin = serve(&content).await;
    let place = Place::new();
    place.create("top.qed", filled_from(&origin.url(), "raw", COUNT * CLUSTER)).await;
    let off = ChainOptions { copy_on_read: CopyOnRead::Off, ..options() };
    let opened = place.open("top.qed", off).await;
    assert!(opened.read(100..9000).await == content.bytes(100..9000));
    opened.close().await;
    place.check("top.qed", "........").await;
    assert_eq!(asked(&origin), [100..9000], "no more than the guest wants");

    place.create("plain.qed", super::place::above(&origin.url(), "raw", COUNT * CLUSTER)).await;
    let on = ChainOptions { copy_on_read: CopyOnRead::On, read_only: true, ..options() };
    let opened = place.open("plain.qed", on.clone()).await;
    assert!(opened.read(clusters(0..1)).await == content.bytes(clusters(0..1)));
    assert!(opened.try_write(0, vec![1; 512]).await.is_err(), "the export is read-only");
    opened.close().await;
    place.check("plain.qed", "D.......").await;

    super::qemu::img(place.folder(), &["create", "-q", "-f", "qed", "alone.qed", "1M"]);
    let error = place.try_open("alone.qed", on).await.map(|_| ()).expect_err("there is nothing to copy");
    assert!(
        error.to_string().ends_with("copy-on-read was asked for, but the image has no backing file"),
        "{error}"
    );
}
