//! Images whose tables point anywhere: check and repair never panic, hang or take memory beyond a bound, and what can be
//! checked is clean once it is repaired.

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use readonce_format::driver::{Repair, SnapshotChange};
use readonce_storage::{ReadAt, SimFile, Storage};

use crate::{
    damage::{Bytes, COMPRESSED, COPIED, Folder},
    support::{block_on, ok, qcow2},
};

/// A small image of each kind: snapshots, compressed clusters, bitmaps, extended entries.
fn images() -> &'static [Bytes] {
    static IMAGES: OnceLock<Vec<Bytes>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let folder = Folder::new();
        let mut images = Vec::new();
        for options in [
            "cluster_size=512",
            "cluster_size=512,refcount_bits=1",
            "cluster_size=4k,refcount_bits=64",
            "cluster_size=512,refcount_bits=2,compat=1.1",
            "cluster_size=512,compat=0.10",
            "cluster_size=16k,extended_l2=on",
        ] {
            let writes =
                ["write -P 1 0 4k", "write -P 2 100k 6k", "write -c -P 3 128k 16k", "write -z 20k 4k"];
            folder.create("image.qcow2", options, "256k", &writes);
            let image = folder.text("image.qcow2");
            // Where a snapshot's references fit.
            if !options.contains("refcount_bits=1") && !options.contains("refcount_bits=2") {
                ok("qemu-img", &["snapshot", "-c", "one", &image]);
                folder.io("image.qcow2", &["write -P 5 2k 2k"]);
            }
            if !options.ends_with("0.10") {
                ok("qemu-img", &["bitmap", "--add", &image, "bits"]);
                folder.io("image.qcow2", &["write -P 6 101k 1k"]);
            }
            images.push(folder.load("image.qcow2"));
        }
        images
    })
}

/// Whatever check and repair can do with an image.
async fn use_it(bytes: &[u8]) {
    let file = Arc::new(SimFile::from_bytes(bytes));
    let reader: Arc<dyn ReadAt> = file.clone();
    let storage: Arc<dyn Storage> = file.clone();
    let checked = qcow2().check(&reader).await;
    assert!(file.unsynced_count() == 0, "checking writes nothing");
    if let (Ok(checked), Ok(freed)) = (&checked, qcow2().repair(&storage, Repair::Leaks).await) {
        assert!(freed.corruptions <= checked.corruptions, "{checked:?} {freed:?}");
    }
    let file = Arc::new(SimFile::from_bytes(bytes));
    let reader: Arc<dyn ReadAt> = file.clone();
    let storage: Arc<dyn Storage> = file.clone();
    let change = SnapshotChange::Create { name: "new".into(), date_sec: 0, date_nsec: 0 };
    let _ = qcow2().snapshot(&storage, &change).await;
    let _ = qcow2().snapshot(&storage, &SnapshotChange::Apply("one".into())).await;
    let _ = qcow2().snapshot(&storage, &SnapshotChange::Delete("one".into())).await;
    assert!(file.resident_bytes() < 16 << 20);

    let file = Arc::new(SimFile::from_bytes(bytes));
    let storage: Arc<dyn Storage> = file.clone();
    let repaired = qcow2().repair(&storage, Repair::All).await;
    assert!(file.resident_bytes() < 16 << 20);
    if checked.is_ok() {
        let repaired = repaired.unwrap();
        let again = qcow2().check(&reader_of(&file)).await.unwrap();
        assert_eq!((again.corruptions, again.leaks), (repaired.corruptions, repaired.leaks));
        assert_eq!((repaired.corruptions, repaired.leaks, repaired.check_errors), (0, 0, 0), "{checked:?}");
    }
    drop(reader);
}

fn reader_of(file: &Arc<SimFile>) -> Arc<dyn ReadAt> {
    file.clone()
}

/// Byte offsets of all words of the image's tables, and of the header's fields.
fn words(bytes: &Bytes) -> Vec<u64> {
    let cluster = bytes.cluster();
    let mut words: Vec<u64> = (3..14).map(|word| word * 8).collect();
    let mut table = |at: u64, len: u64| words.extend((at..at + len).step_by(8));
    table(bytes.l1(), bytes.u32(36) * 8);
    table(bytes.table(), 64);
    table(bytes.block(0), cluster.min(1024));
    for index in 0..bytes.u32(36) {
        if bytes.l2(index) != 0 {
            table(bytes.l2(index), cluster.min(1024));
        }
    }
    if bytes.u32(60) > 0 {
        table(bytes.snapshots(), 72);
        table(bytes.u64(bytes.snapshots()), bytes.u32(36) * 8);
    }
    if bytes.u32(4) == 3 && bytes.u64(88) & 1 == 1 {
        let directory = bytes.u64(bytes.extension(0x2385_2875) + 16);
        table(directory, 32);
        table(bytes.u64(directory), 16);
    }
    words
}

/// A word that may be anywhere near what it should be, or far away.
fn value() -> impl Strategy<Value = u64> {
    let flags = prop::sample::select(vec![0, COPIED, COMPRESSED, COPIED | 1, 1, 2, COMPRESSED | COPIED]);
    let near = (0..200_u64, prop::sample::select(vec![512_u64, 4096, 16384]), flags)
        .prop_map(|(cluster, size, flags)| (cluster * size) | flags);
    prop_oneof![8 => near, 1 => any::<u64>(), 1 => (0..64_u32).prop_map(|bit| 1 << bit)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tables_point_anywhere(
        image in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..8),
    ) {
        let mut bytes = image.get(images()).clone();
        let words = words(&bytes);
        for (at, value) in edits {
            bytes.put64(*at.get(&words), value);
        }
        block_on(use_it(&bytes.0));
    }

    #[test]
    fn cut_short(image in any::<prop::sample::Index>(), len in any::<prop::sample::Index>()) {
        let bytes = image.get(images());
        block_on(use_it(&bytes.0[..len.index(bytes.0.len())]));
    }
}

#[test]
fn a_file_that_claims_too_much_is_not_scanned() {
    let folder = Folder::new();
    folder.create("image.qcow2", "", "1M", &["write 0 64k"]);
    let good = folder.load("image.qcow2");
    let message = |file: &Arc<SimFile>| {
        let error = block_on(qcow2().check(&reader_of(file))).unwrap_err();
        let storage: Arc<dyn Storage> = file.clone();
        assert_eq!(
            block_on(qcow2().repair(&storage, Repair::All)).unwrap_err().to_string(),
            error.to_string()
        );
        assert!(file.unsynced_count() == 0, "nothing was written");
        error.to_string()
    };
    let huge = good.file();
    block_on(huge.set_len(1 << 50)).unwrap();
    block_on(huge.sync()).unwrap();
    assert_eq!(message(&huge), "the file has 17179869184 clusters, at most 2147483648 can be checked");

    // Snapshots whose L1 tables take 2 TiB of holes.
    let file = good.file();
    let table = good.len().next_multiple_of(65536);
    let mut entries = Vec::new();
    for snapshot in 0..65536_u64 {
        entries.extend(((1 << 30) + snapshot * (32 << 20)).to_be_bytes());
        entries.extend((4_u32 << 20).to_be_bytes());
        entries.extend([0; 24]);
        entries.extend(16_u32.to_be_bytes());
        entries.extend([0; 16]);
    }
    let mut header = good.clone();
    header.put64(64, table);
    header.put32(60, 65536);
    block_on(async {
        file.set_len(3 << 40).await.unwrap();
        file.write(0, header.0[..512].to_vec().into()).await.unwrap();
        file.write(table, entries.into()).await.unwrap();
        file.sync().await.unwrap();
    });
    assert_eq!(message(&file), "the tables are longer than the 68719476736 bytes that can be checked");
}

#[test]
fn space_that_nothing_uses_costs_nothing() {
    // 60 TiB of a sparse file, with a cluster at its end.
    let folder = Folder::new();
    folder.create("image.qcow2", "", "1M", &["write 0 64k"]);
    let mut bytes = folder.load("image.qcow2");
    let far = 60 << 40;
    bytes.put64(bytes.l2(0), COPIED | far);
    let file = bytes.file();
    block_on(async {
        file.write(far, vec![7; 65536].into()).await.unwrap();
        file.sync().await.unwrap();
    });
    let report = block_on(qcow2().check(&reader_of(&file))).unwrap();
    assert_eq!((report.corruptions, report.leaks), (2, 1));
    let storage: Arc<dyn Storage> = file.clone();
    let report = block_on(qcow2().repair(&storage, Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    assert!(file.resident_bytes() < 4 << 20, "{}", file.resident_bytes());
}
