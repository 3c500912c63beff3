//! QEMU and readonce use one image in turn.

use std::ops::Range;

use super::{
    model::assert_same,
    place::{CLUSTER, Place, Spec, above, clusters, content, filled_from, options},
    qemu,
};

const SIZE: u64 = 16 * CLUSTER;

/// The words about an image that another program wrote since it was pinned.
const ANOTHER_WROTE: &str = "another program wrote this image since its backing was pinned";

fn same(count: u64, byte: u8) -> Vec<u8> {
    vec![byte; count as usize]
}

#[tokio::test]
async fn an_image_of_qemu_img_is_pinned_at_its_first_open_for_writing() {
    let place = Place::new();
    let base = content(1, 1 << 20).bytes(0..1 << 20);
    place.raw("base.raw", &base);
    let options_of_qed = "cluster_size=4096,table_size=2";
    let create =
        ["create", "-q", "-f", "qed", "-o", options_of_qed, "-b", "base.raw", "-F", "raw", "top.qed"];
    qemu::img(place.folder(), &create);
    assert!(place.describe("top.qed").await.pin.is_none());

    let looked = readonce_disk::chain::ChainOptions { read_only: true, ..options() };
    let before = place.bytes_of("top.qed");
    let opened = place.open("top.qed", looked).await;
    assert!(opened.read(0..9000).await == base[..9000]);
    opened.close().await;
    assert!(place.bytes_of("top.qed") == before, "who only looks changes nothing");

    let opened = place.open("top.qed", options()).await;
    opened.write(5000, same(5000, 0x5a)).await;
    opened.close().await;
    let described = place.describe("top.qed").await;
    assert_eq!(described.pin.map(|pin| pin.len), Some(1 << 20));
    assert!(described.only_readonce_wrote == Some(true) && !described.dirty);
    let mut guest = base.to_vec();
    guest[5000..10_000].fill(0x5a);
    qemu::check(&place.path("top.qed"));
    qemu::compare(&place.path("top.qed"), &guest);
    qemu::io(&place.path("top.qed"), &["read -P 0x5a 5000 5000"]);
}

#[tokio::test]
async fn ours_then_qemu_io_then_ours() {
    let place = Place::new();
    let base = content(2, SIZE).bytes(0..SIZE);
    place.raw("base.raw", &base);
    place.create("top.qed", filled_from("base.raw", "raw", SIZE)).await;
    let top = place.path("top.qed");
    let mut guest = base.to_vec();

    let opened = place.open("top.qed", options()).await;
    opened.write(0, same(CLUSTER, 0x11)).await;
    opened.write(3 * CLUSTER + 100, same(50, 0x12)).await;
    opened.write_zeroes(clusters(5..6)).await;
    assert!(opened.read(clusters(7..8)).await == base[7 * CLUSTER as usize..8 * CLUSTER as usize]);
    opened.close().await;
    guest[..CLUSTER as usize].fill(0x11);
    guest[3 * CLUSTER as usize + 100..][..50].fill(0x12);
    guest[5 * CLUSTER as usize..6 * CLUSTER as usize].fill(0);
    place.check("top.qed", "D..D.Z.D........").await;

    qemu::io(
        &top,
        &[
            "read -P 0x11 0 4k",
            "read -P 0x12 12388 50",
            "read -P 0 20k 4k",
            "write -P 0x21 4k 4k",
            "write -P 0x22 28k 512",
            "write -z 32k 4k",
            "write -P 0x23 0 512",
        ],
    );
    guest[4096..8192].fill(0x21);
    guest[28 * 1024..][..512].fill(0x22);
    guest[32 * 1024..36 * 1024].fill(0);
    guest[..512].fill(0x23);
    place.check("top.qed", "DD.D.Z.DZ.......").await;

    let opened = place.open("top.qed", options()).await;
    let warnings = opened.warnings();
    assert!(matches!(&warnings[..], [one] if one.contains(ANOTHER_WROTE)), "{warnings:?}");
    assert_same(&opened.read(0..SIZE).await, &guest);
    opened.write(8 * CLUSTER + 1, same(1, 0x31)).await;
    opened.close().await;
    guest[8 * CLUSTER as usize + 1] = 0x31;
    // Of 16 clusters of the backing two are zeros.
    place.check("top.qed", "DDDDDZDDDDDDDDZZ").await;
    qemu::check(&top);
    qemu::compare(&top, &guest);
    qemu::io(&top, &["read -P 0x31 32769 1"]);
}

/// Random use by ours and random patterns by qemu-io, over and over, on a chain of two QED images.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_turns_at_random() {
    use super::model::Model;
    use rand::{Rng, SeedableRng, rngs::SmallRng};
    for (seed, cluster_size, copy_on_read) in [(1, 4096, true), (2, 65536, false), (3, 16384, true)] {
        println!("seed {seed}");
        let place = Place::new();
        let size = 900_096;
        let base = content(seed, 500_001).bytes(0..500_001);
        place.raw("base.raw", &base);
        place.create("middle.qed", Spec { cluster_size, ..above("base.raw", "raw", 700_416) }).await;
        let top = Spec { cluster_size, copy_on_read, ..above("middle.qed", "qed", size) };
        place.create("top.qed", top).await;
        let mut model = Model::over(seed, &base, size);
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..4 {
            let opened = place.open("top.qed", options()).await;
            model.use_disk(opened.disk(), 40).await;
            opened.close().await;
            qemu::check(&place.path("top.qed"));

            let mut commands = Vec::new();
            let mut letters = place.draw("top.qed").await.into_bytes();
            for _ in 0..12 {
                let start = rng.random_range(0..size / 512 - 1) * 512;
                let len = rng.random_range(1..=(size - start).min(100_000) / 512) * 512;
                let (start, len) = around_zero_clusters(&letters, cluster_size, size, start..start + len);
                let pattern: u8 = rng.random();
                let zero = rng.random_range(0..3) == 0;
                let touched = start / cluster_size..(start + len).div_ceil(cluster_size);
                letters[touched.start as usize..touched.end as usize].fill(if zero { b'Z' } else { b'D' });
                let bytes = &mut model.bytes[start as usize..(start + len) as usize];
                bytes.fill(if zero { 0 } else { pattern });
                commands.push(match zero {
                    true => format!("write -z {start} {len}"),
                    false => format!("write -P {pattern} {start} {len}"),
                });
                commands.push(format!("read -P {} {start} {len}", if zero { 0 } else { pattern }));
            }
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            qemu::io(&place.path("top.qed"), &commands);
        }
        let opened = place.open("top.qed", options()).await;
        model.check_all(opened.disk()).await;
        opened.close().await;
        qemu::check(&place.path("top.qed"));
        qemu::compare(&place.path("top.qed"), &model.bytes);
    }
}

/// The range, made longer until it covers every zero cluster that it touches. A write by QEMU (10.0) into a part of a zero cluster
/// shows the backing again in the rest of that cluster.
fn around_zero_clusters(letters: &[u8], cluster_size: u64, size: u64, range: Range<u64>) -> (u64, u64) {
    let is_zero = |at: u64| letters[(at / cluster_size) as usize] == b'Z';
    let Range { mut start, mut end } = range;
    if is_zero(start) {
        start -= start % cluster_size;
    }
    if is_zero(end - 1) {
        end = end.next_multiple_of(cluster_size).min(size);
    }
    (start, end - start)
}
