//! What only qcow2 has: compressed clusters, data files, internal snapshots, the mark of a broken image. Made by QEMU's tools, used
//! by us, judged by QEMU's tools.

use std::ops::Range;

use readonce_disk::{DeviceError, chain::ChainOptions};
use readonce_testkit::Content;

use super::{
    model::Model,
    place::{Opened, Place, Spec, above, asked, clusters, content, filled_from, open, options, serve},
    qemu,
};

const SIZE: u64 = 3 << 20;

/// Bytes that compress, with stretches of zeros and some that do not compress at all.
fn bytes(seed: u64) -> Vec<u8> {
    let mut bytes = content(seed, SIZE).bytes(0..SIZE).to_vec();
    for (index, chunk) in bytes.chunks_mut(1000).enumerate() {
        if index % 64 > 8 {
            chunk.fill(index as u8);
        }
    }
    bytes
}

/// A compressed qcow2 of these bytes.
fn compressed(place: &Place, name: &str, bytes: &[u8], codec: &str) {
    place.raw("plain.raw", bytes);
    let codec = format!("compression_type={codec}");
    qemu::img(
        place.folder(),
        &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &codec, "plain.raw", name],
    );
}

#[track_caller]
fn assert_read_once(asked: &[Range<u64>]) {
    let mut asked = asked.to_vec();
    asked.sort_by_key(|range| range.start);
    for pair in asked.windows(2) {
        assert!(pair[0].end <= pair[1].start, "asked twice: {pair:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_image_far_away_is_read_once_and_kept() {
    for (seed, codec) in [(1, "zlib"), (2, "zstd")] {
        let place = Place::new();
        let plain = bytes(seed);
        compressed(&place, "far.qcow2", &plain, codec);
        let origin = serve(&Content::Given(place.bytes_of("far.qcow2"))).await;
        let local = Place::new();
        let url = origin.url();
        let top = Spec { cluster_size: 65536, ..filled_from(&url, "qcow2", SIZE) };
        local.create("top.qcow2", top).await;
        let opened = local.open("top.qcow2", options()).await;
        for start in (0..SIZE).step_by(10_000) {
            let range = start..(start + 10_000).min(SIZE);
            let read = opened.read(range.clone()).await;
            assert!(read == plain[range.start as usize..range.end as usize], "{codec}, {range:?}");
        }
        let ranges = asked(&origin);
        assert_read_once(&ranges);
        let far = place.bytes_of("far.qcow2").len() as u64;
        let sum: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert!(sum <= far, "{sum} bytes of {far}");
        assert!(ranges.len() as u64 <= 4 + far / 65536, "neighbours come along: {ranges:?}");
        opened.close().await;
        // Kept: nothing but the header and its tables is asked when it is opened again.
        origin.clear_log();
        let opened = local.open("top.qcow2", options()).await;
        assert!(opened.read(0..SIZE).await == plain);
        opened.close().await;
        assert!(asked(&origin).len() <= 1, "{:?}", asked(&origin));
        local.raw("plain.raw", &plain);
        local.rebase("top.qcow2", "plain.raw", "raw").await;
        qemu::check(&local.path("top.qcow2"));
        qemu::compare(&local.path("top.qcow2"), &plain);
    }
}

#[tokio::test]
async fn what_a_format_reads_far_away_and_what_the_guest_reads_is_asked_once() {
    let place = Place::new();
    let plain = bytes(3);
    place.raw("plain.raw", &plain);
    qemu::img(place.folder(), &["convert", "-f", "raw", "-O", "qcow2", "plain.raw", "far.qcow2"]);
    let origin = serve(&Content::Given(place.bytes_of("far.qcow2"))).await;
    let mut read_only = options();
    read_only.format = Some("qcow2".into());
    let opened = open(&origin.url(), read_only).await.expect("it opens");
    assert!(opened.read(0..SIZE).await == plain);
    assert_read_once(&asked(&origin));
    opened.close().await;
}

/// Clusters that do not compress are stored plain, and with small clusters they share blocks with those that do: of 512 bytes, 1.27
/// times the file was downloaded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_compresses_and_what_does_not_is_asked_once_together() {
    for codec in ["zlib", "zstd"] {
        for cluster_size in [512, 4 << 10, 64 << 10, 2 << 20] {
            let place = Place::new();
            let mut plain = Content::seeded(cluster_size, SIZE).bytes(0..SIZE).to_vec();
            // Two that compress, one that does not.
            for (index, cluster) in plain.chunks_mut(cluster_size as usize).enumerate() {
                if index % 3 > 0 {
                    cluster[100..].fill(index as u8);
                }
            }
            place.raw("plain.raw", &plain);
            let option = format!("compression_type={codec},cluster_size={cluster_size}");
            let convert =
                ["convert", "-c", "-O", "qcow2", "-o", &option, "-f", "raw", "plain.raw", "far.qcow2"];
            qemu::img(place.folder(), &convert);
            let origin = serve(&Content::Given(place.bytes_of("far.qcow2"))).await;
            let url = origin.url();
            let top = Spec { cluster_size: 65536, ..filled_from(&url, "qcow2", SIZE) };
            place.create("top.qcow2", top).await;
            let opened = place.open("top.qcow2", options()).await;
            // Each of 16 begins elsewhere, and reads all.
            let readers = (0..16).map(|reader| {
                let (opened, plain) = (&opened, &plain);
                async move {
                    let step = SIZE / 48;
                    for index in 0..48 {
                        let at = (index + reader * 3) % 48 * step;
                        let read = opened.read(at..at + step).await;
                        assert!(
                            read == plain[at as usize..(at + step) as usize],
                            "{codec}, {cluster_size}, {at}"
                        );
                    }
                }
            });
            futures_util::future::join_all(readers).await;
            opened.close().await;
            let ranges = asked(&origin);
            assert_read_once(&ranges);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_image_is_written() {
    for (seed, codec) in [(4, "zlib"), (5, "zstd")] {
        let place = Place::new();
        let plain = bytes(seed);
        compressed(&place, "top.qcow2", &plain, codec);
        let mut model = Model::over(seed, &plain, SIZE);
        let opened = place.open("top.qcow2", options()).await;
        model.use_disk(opened.disk(), 100).await;
        opened.close().await;
        qemu::check(&place.path("top.qcow2"));
        qemu::compare(&place.path("top.qcow2"), &model.bytes);
        let opened = place.open("top.qcow2", options()).await;
        model.check_all(opened.disk()).await;
        opened.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_keep_what_they_show() {
    for (seed, extended) in [(6, "off"), (7, "on")] {
        let place = Place::new();
        let plain = bytes(seed);
        place.raw("plain.raw", &plain);
        let extended = format!("extended_l2={extended}");
        qemu::img(
            place.folder(),
            &["convert", "-f", "raw", "-O", "qcow2", "-o", &extended, "plain.raw", "top.qcow2"],
        );
        let mut model = Model::over(seed, &plain, SIZE);
        let mut kept = Vec::new();
        for name in ["one", "two"] {
            qemu::img(place.folder(), &["snapshot", "-c", name, "top.qcow2"]);
            kept.push((name, model.bytes.clone()));
            let opened = place.open("top.qcow2", options()).await;
            model.use_disk(opened.disk(), 60).await;
            opened.close().await;
            qemu::check(&place.path("top.qcow2"));
            qemu::compare(&place.path("top.qcow2"), &model.bytes);
        }
        for (name, bytes) in kept {
            qemu::img(place.folder(), &["convert", "-l", name, "-O", "raw", "top.qcow2", "snapshot.raw"]);
            assert!(place.bytes_of("snapshot.raw") == bytes, "{name} shows something else");
        }
    }
}

async fn with_data_file(place: &Place, raw: &str) -> Opened {
    // QEMU looks for a name without a folder where it was started, not beside the image.
    let data = place.path("data.raw");
    let create = format!("data_file={},data_file_raw={raw}", data.display());
    qemu::img(place.folder(), &["create", "-q", "-f", "qcow2", "-o", &create, "top.qcow2", "3M"]);
    qemu::io(&place.path("top.qcow2"), &["write -P 0x11 64k 200k"]);
    place.open("top.qcow2", options()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_in_a_file_of_its_own() {
    for raw in ["off", "on"] {
        let place = Place::new();
        let opened = with_data_file(&place, raw).await;
        assert_eq!(opened.opened(), ["data.raw raw+", "top.qcow2 qcow2+"]);
        let mut start = vec![0; SIZE as usize];
        start[64 << 10..264 << 10].fill(0x11);
        let mut model = Model::over(8, &start, SIZE);
        model.use_disk(opened.disk(), 100).await;
        opened.close().await;
        qemu::check(&place.path("top.qcow2"));
        qemu::compare(&place.path("top.qcow2"), &model.bytes);
        if raw == "on" {
            assert!(place.bytes_of("data.raw")[..] == model.bytes[..], "it reads as a raw image");
        }
        let read_only = ChainOptions { read_only: true, ..options() };
        let opened = place.open("top.qcow2", read_only).await;
        model.check_all(opened.disk()).await;
        assert_eq!(opened.opened(), ["data.raw raw", "top.qcow2 qcow2"]);
        opened.close().await;
    }
}

/// Copied without its tail of zeros, or grown by one program alone: each read of the tail failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_file_that_ends_early_reads_as_zeros_from_there() {
    for read_only in [true, false] {
        let place = Place::new();
        with_data_file(&place, "off").await.close().await;
        let end = (100 << 10) + 100;
        let data = std::fs::File::options().write(true).open(place.path("data.raw")).expect("made");
        data.set_len(end).expect("room");
        let mut start = vec![0; SIZE as usize];
        start[64 << 10..end as usize].fill(0x11);
        qemu::compare(&place.path("top.qcow2"), &start);
        let mut model = Model::over(8, &start, SIZE);
        let opened = place.open("top.qcow2", ChainOptions { read_only, ..options() }).await;
        assert!(opened.read((end - 1)..(end + 1)).await[..] == [0x11, 0]);
        model.check_all(opened.disk()).await;
        if !read_only {
            model.use_disk(opened.disk(), 100).await;
        }
        opened.close().await;
        qemu::check(&place.path("top.qcow2"));
        qemu::compare(&place.path("top.qcow2"), &model.bytes);
    }
}

#[tokio::test]
async fn a_data_file_is_locked_as_its_image_is() {
    let place = Place::new();
    let opened = with_data_file(&place, "off").await;
    std::fs::copy(place.path("top.qcow2"), place.path("other.qcow2")).expect("room");
    let error = place.try_open("other.qcow2", options()).await.map(|_| ()).expect_err("in use").to_string();
    assert!(error.contains("data.raw") && error.contains("lock"), "{error}");
    opened.close().await;
    place.open("other.qcow2", options()).await.close().await;
}

/// An incremental backup would be made of bitmaps that say nothing any more, or fail, and nobody would know since when.
#[tokio::test]
async fn bitmaps_that_go_stale_are_told_once() {
    let place = Place::new();
    qemu::img(place.folder(), &["create", "-q", "-f", "qcow2", "top.qcow2", "3M"]);
    qemu::img(place.folder(), &["bitmap", "--add", "top.qcow2", "b0"]);
    qemu::img(place.folder(), &["bitmap", "--add", "top.qcow2", "b1"]);
    let opened = place.open("top.qcow2", ChainOptions { read_only: true, ..options() }).await;
    assert_eq!(opened.warnings(), [""; 0]);
    opened.close().await;
    let opened = place.open("top.qcow2", options()).await;
    let warnings = opened.warnings();
    assert!(
        matches!(&warnings[..], [one] if one.contains("persistent bitmaps (2) are stale")),
        "{warnings:?}"
    );
    opened.close().await;
    let opened = place.open("top.qcow2", options()).await;
    assert_eq!(opened.warnings(), [""; 0]);
    opened.close().await;
}

#[tokio::test]
async fn an_image_marked_corrupt_is_read_and_not_written() {
    let place = Place::new();
    let plain = bytes(9);
    place.raw("base.raw", &plain);
    place.create("top.qcow2", above("base.raw", "raw", SIZE)).await;
    // Incompatible feature bit 1.
    let mut image = place.bytes_of("top.qcow2").to_vec();
    image[79] |= 2;
    place.raw("top.qcow2", &image);
    let opened = place.open("top.qcow2", options()).await;
    let warnings = opened.warnings();
    assert!(matches!(&warnings[..], [one] if one.contains("is marked corrupt")), "{warnings:?}");
    assert!(opened.read(clusters(0..4)).await == plain[..clusters(0..4).end as usize]);
    let error = opened.try_write(0, vec![1; 512]).await.expect_err("read-only");
    assert!(matches!(error, DeviceError::ReadOnly), "{error}");
    assert!(opened.disk().read_only());
    opened.close().await;
    assert!(place.bytes_of("top.qcow2") == image, "nothing is written");
}
