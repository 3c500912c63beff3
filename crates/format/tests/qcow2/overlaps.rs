//! Damaged images in which a table is said to lie, or to reach, where something else lies: a repair keeps what is there.

use std::sync::Arc;

use readonce_format::{
    CommitMode, Mapping, Room, WritableMapper,
    driver::{Repair, SnapshotChange},
};
use readonce_storage::{
    SimFile, Storage, TokioRuntime,
    sim::{Fault, Lasts},
};

use crate::{
    damage::{Bytes, COMPRESSED, COPIED, OFFSET},
    repair::{Guest, check, repair_all, repair_leaks},
    support::{block_on, create, qcow2, spec},
};

/// An image of 64 KiB whose first `clusters` clusters were written, the first half before a snapshot "s" where one is asked.
fn image(options: &str, clusters: u64, snapshot: bool) -> Bytes {
    let file = create(&spec(options, false, 64 << 10)).unwrap();
    let cluster = Bytes(file.contents()).cluster();
    let half = if snapshot { clusters / 2 } else { 0 };
    block_on(async {
        write(&file, cluster, 0..half).await;
        if snapshot {
            let storage: Arc<dyn Storage> = file.clone();
            let change = SnapshotChange::Create { name: "s".into(), date_sec: 1, date_nsec: 2 };
            qcow2().snapshot(&storage, &change).await.unwrap();
        }
        write(&file, cluster, half..clusters).await;
    });
    Bytes(file.contents())
}

/// A guest's session: these clusters are written.
async fn write(file: &Arc<SimFile>, cluster: u64, clusters: std::ops::Range<u64>) {
    let storage: Arc<dyn Storage> = file.clone();
    let rt = TokioRuntime::current();
    let mapper: Arc<dyn WritableMapper> = qcow2().open_writable(storage.clone(), None, rt).await.unwrap();
    for number in clusters {
        let mapped = mapper.lookup(number * cluster, cluster).await.unwrap().mapping;
        let room = match mapped {
            Mapping::Shared(_) => Room::Copy,
            Mapping::Data(_) => panic!("it is the image's own"),
            _ => Room::Data,
        };
        let room = mapper.prepare(number * cluster, cluster, room).await.unwrap();
        storage.write(room.at.unwrap(), vec![number as u8 + 1; cluster as usize].into()).await.unwrap();
        room.commit(CommitMode::Overwrite);
    }
    mapper.settle().await.unwrap();
    mapper.close().await.unwrap();
}

/// Damages and repairs it; what the guest reads is kept.
fn kept(good: &Bytes, context: &str, damage: impl Fn(&mut Bytes)) -> Bytes {
    let mut bytes = good.clone();
    damage(&mut bytes);
    let file = bytes.file();
    let report = block_on(repair_all(&file));
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{context}");
    assert!(Guest::of(&file.contents()).active() == Guest::of(&good.0).active(), "{context}");
    // And it can be written.
    let free = (64 << 10) / good.cluster() - 1;
    block_on(write(&file, good.cluster(), free..free + 1));
    let report = block_on(check(&file));
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}, written");
    Bytes(file.contents())
}

#[test]
fn a_snapshot_whose_l1_table_would_be_the_header_is_dropped() {
    // It would have cost the whole image: the header's words were mended as L1 entries.
    let good = image("cluster_size=1k", 40, true);
    let after = kept(&good, "header", |b| b.put64(b.snapshots(), 0));
    assert_eq!(after.u32(60), 0);
}

#[test]
fn a_snapshot_whose_l1_table_would_be_an_l2_table_is_dropped() {
    // It would have cost all that the L2 table maps.
    let good = image("cluster_size=1k", 40, true);
    let after = kept(&good, "L2", |b| b.put64(b.snapshots(), b.l2(0)));
    assert_eq!(after.u32(60), 0);
    let after = kept(&good, "snapshot table", |b| b.put64(b.snapshots(), b.snapshots()));
    assert_eq!(after.u32(60), 0);
}

#[test]
fn an_l1_table_that_would_be_a_snapshots_l2_table_is_told_though_the_refcount_counts_both() {
    // Found by fuzzing: nothing was told, and what the guest wrote then became an entry of the snapshot.
    let good = image("cluster_size=1k", 0, false);
    let file = good.file();
    block_on(async {
        write(&file, good.cluster(), 5..6).await;
        let storage: Arc<dyn Storage> = file.clone();
        let change = SnapshotChange::Create { name: "s".into(), date_sec: 1, date_nsec: 2 };
        qcow2().snapshot(&storage, &change).await.unwrap();
    });
    let mut bytes = Bytes(file.contents());
    bytes.put64(40, bytes.l2(0));
    let file = bytes.file();
    assert_eq!(block_on(check(&file)).corruptions, 1);
    let report = block_on(repair_all(&file));
    assert_eq!((report.corruptions, report.leaks, report.corruptions_fixed), (0, 0, 1));
    block_on(write(&file, good.cluster(), 7..8));
    let report = block_on(check(&file));
    assert_eq!((report.corruptions, report.leaks), (0, 0), "written");
}

#[test]
fn a_snapshot_whose_l1_table_would_be_data_leaves_the_data() {
    // It would have cost the cluster: its bytes were mended as L1 entries.
    let good = image("cluster_size=1k", 40, true);
    kept(&good, "data", |b| b.put64(b.snapshots(), b.u64(b.l2(0) + 8) & OFFSET));
    kept(&good, "own data", |b| b.put64(b.snapshots(), b.u64(b.l2(0) + 8 * 30) & OFFSET));
}

#[test]
fn an_entry_that_names_a_snapshots_l1_table_does_not_cost_the_snapshot() {
    // It would have cost the snapshot. The second table is the active state's alone, the first is shared.
    let good = image("cluster_size=512", 128, true);
    for l2 in [false, true] {
        let mut bytes = good.clone();
        let l1 = bytes.u64(bytes.snapshots());
        let at = if l2 { bytes.l2(0) + 16 } else { bytes.l1() + 8 };
        bytes.put64(at, COPIED | l1);
        let file = bytes.file();
        let report = block_on(repair_all(&file));
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        let (before, after) = (Guest::of(&good.0), Guest::of(&file.contents()));
        // The entry lies in a table that the snapshot shows too, where it is an L2 entry.
        assert!(l2 || before.snapshots() == after.snapshots(), "L2: {l2}");
        assert_eq!(after.snapshots().len(), 1, "L2: {l2}");
    }
}

#[test]
fn a_snapshots_l1_table_that_is_too_long_is_cut() {
    // It would have cost what lies behind it, or the snapshot.
    let good = image("cluster_size=1k", 40, true);
    for entries in [2, 129, 513, 2000] {
        let after = kept(&good, "too long", |b| b.put32(b.snapshots() + 8, entries));
        assert_eq!(after.u32(60), 1, "{entries}");
        assert!(Guest::of(&after.0).snapshots() == Guest::of(&good.0).snapshots(), "{entries}");
    }
}

#[test]
fn a_snapshots_name_that_is_too_long_costs_the_snapshot_alone() {
    // It would have cost all that the L2 table maps that the snapshot table then reached over.
    let good = image("cluster_size=1k", 40, true);
    let bytes = good.len() - good.snapshots() - 96;
    for name in [1000, 2000, 5000, bytes] {
        let size = u16::try_from(name).unwrap().to_be_bytes();
        let after = kept(&good, &format!("{name} bytes"), |b| {
            let at = b.snapshots() as usize + 14;
            b.0[at..at + 2].copy_from_slice(&size);
        });
        assert_eq!(after.u32(60), 0, "{name}");
    }
}

#[test]
fn a_refcount_table_that_is_too_long_costs_nothing() {
    // It would have cost every L2 table behind it: the clusters that the table is said to have were taken for its own.
    let good = image("cluster_size=512", 40, false);
    for clusters in [2, 3, 20, 64, 256, 11776] {
        kept(&good, &format!("{clusters} clusters"), |b| b.put32(56, clusters));
    }
}

#[test]
fn an_l1_table_that_is_too_long_is_cut() {
    // It would have cost what lies behind it: tables and data were mended as L1 entries.
    let good = image("cluster_size=1k", 40, false);
    let clusters = good.len() / 1024;
    for entries in [2, 65, 129, 513, (clusters - good.l1() / 1024) * 128] {
        let after = kept(&good, &format!("{entries} entries"), |b| b.put32(36, entries));
        assert!(after.u32(36) <= 128, "{entries}");
    }
    // Room to grow stays.
    let after = kept(&good, "room", |b| {
        let l1: Vec<u8> = b.0[b.l1() as usize..][..1024].to_vec();
        let at = b.len().next_multiple_of(1024);
        b.0.resize(at as usize, 0);
        b.0.extend(l1);
        b.0.resize(at as usize + 4096, 0);
        b.put64(40, at);
        b.put32(36, 512);
    });
    assert_eq!(after.u32(36), 512);
}

#[test]
fn freeing_leaks_leaves_no_flag_behind() {
    // It would have cost a second repair: the report had more corruptions than before.
    let mut bytes = image("cluster_size=1k", 40, false);
    // One refcount too high, its flag as that asks; one too low.
    let at = |b: &Bytes, entry: u64| b.block(0) + (b.u64(b.l2(0) + 8 * entry) & OFFSET) / 1024 * 2;
    let put16 = |b: &mut Bytes, at: u64, value: u16| {
        b.0[at as usize..][..2].copy_from_slice(&value.to_be_bytes());
    };
    let (high, low) = (at(&bytes, 3), at(&bytes, 5));
    put16(&mut bytes, high, 2);
    bytes.clear64(bytes.l2(0) + 24, COPIED);
    put16(&mut bytes, low, 0);
    bytes.clear64(bytes.l2(0) + 40, COPIED);
    let file = bytes.file();
    let before = block_on(check(&file));
    assert_eq!((before.corruptions, before.leaks), (1, 1));
    let report = block_on(repair_leaks(&file));
    assert_eq!((report.corruptions, report.leaks, report.leaks_fixed), (1, 0, 1));
    // What seems to be alone by a refcount that is too low is not written in place.
    bytes.put64(bytes.l2(0) + 48, bytes.u64(bytes.l2(0) + 40));
    put16(&mut bytes, low, 1);
    let file = bytes.file();
    block_on(repair_leaks(&file));
    assert_eq!(Bytes(file.contents()).u64(bytes.l2(0) + 40) & COPIED, 0);
    assert_eq!(Bytes(file.contents()).u64(bytes.l2(0) + 48) & COPIED, 0);
}

#[test]
fn what_two_entries_share_is_apart_after_a_repair() {
    // It would have cost a corruption by name after the next write, and a second repair: nobody sets the flag of an entry that is
    // alone once the other was written.
    for (options, tables) in
        [("cluster_size=512,refcount_bits=32", false), ("cluster_size=512,lazy_refcounts=on", true)]
    {
        let good = image(options, 70, false);
        for (one, other) in [(9, 12), (12, 9)] {
            let mut bytes = good.clone();
            let table = if tables { bytes.l1() } else { bytes.l2(0) };
            let (one, other) = if tables { (one % 2, other % 2) } else { (one, other) };
            bytes.put64(table + 8 * other, bytes.u64(table + 8 * one));
            let seen = Guest::of(&bytes.0);
            let file = bytes.file();
            let report = block_on(repair_all(&file));
            assert_eq!((report.corruptions, report.leaks), (0, 0));
            assert!(Guest::of(&file.contents()) == seen);
            let repaired = Bytes(file.contents());
            let table = if tables { repaired.l1() } else { repaired.l2(0) };
            for entry in [one, other] {
                assert_ne!(repaired.u64(table + 8 * entry) & COPIED, 0, "{options}: entry {entry}");
            }
        }
    }
}

#[test]
fn compressed_bytes_in_a_cluster_of_data_are_apart_after_a_repair() {
    // It would have cost a corruption by name after the next write of what was compressed, and a second repair.
    let good = image("cluster_size=4k", 14, false);
    for (data, compressed) in [(3, 9), (9, 3)] {
        let mut bytes = good.clone();
        let table = bytes.l2(0);
        bytes.put64(table + 8 * compressed, COMPRESSED | bytes.u64(table + 8 * data) & OFFSET);
        let file = bytes.file();
        let report = block_on(repair_all(&file));
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        let repaired = Bytes(file.contents());
        assert_ne!(repaired.u64(repaired.l2(0) + 8 * data) & COPIED, 0, "data in entry {data}");
        assert_ne!(repaired.u64(repaired.l2(0) + 8 * compressed) & COMPRESSED, 0, "data in entry {data}");
        block_on(write(&file, 4096, compressed..compressed + 1));
        let report = block_on(check(&file));
        assert_eq!((report.corruptions, report.leaks), (0, 0), "data in entry {data}, written");
    }
}

#[test]
fn what_is_too_much_to_be_copied_stays_shared() {
    // A disk that is full does not fail a repair that needs no room.
    let mut bytes = image("cluster_size=1k", 40, false);
    bytes.put64(bytes.l2(0) + 8, bytes.u64(bytes.l2(0) + 16));
    let seen = Guest::of(&bytes.0);
    let file = bytes.file();
    file.fail_nth(1, Fault::NoSpace, Lasts::Once);
    let storage: Arc<dyn Storage> = file.clone();
    let report = block_on(qcow2().repair(&storage, Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.leaks, file.fault_hits()), (0, 0, 1));
    assert!(Guest::of(&file.contents()) == seen);
    let repaired = Bytes(file.contents());
    assert_eq!(repaired.u64(repaired.l2(0) + 8), repaired.u64(repaired.l2(0) + 16));
}

#[test]
fn what_points_past_the_end_does_not_name_copies() {
    // It would have cost the repair: each copy made the file long enough for the next entry, until a limit ended it half-way; and the
    // guest would have read copies of other clusters there.
    let mut bytes = {
        let options = "cluster_size=1k,compat=v2,preallocation=metadata";
        Bytes(create(&spec(options, false, 600 << 10)).unwrap().contents())
    };
    bytes.0.truncate(264 << 10);
    // Something is to be copied: two entries name one table, and one names data.
    bytes.put64(bytes.l1(), bytes.u64(bytes.l1() + 8) & !COPIED);
    bytes.put64(bytes.l1() + 32, COPIED | 0x2a000);
    let entries = (0..4).flat_map(|table| (0..128).map(move |entry| (table, entry)));
    let named = entries.map(|(table, entry)| bytes.u64(bytes.l2(table) + 8 * entry) & OFFSET);
    let inside = named.filter(|&at| at > 0 && at < bytes.len()).count();
    let file = bytes.file();
    let report = block_on(repair_all(&file));
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    assert_eq!(Guest::of(&file.contents()).active().len(), inside);
}
