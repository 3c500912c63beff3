//! Repair: what is broken becomes right, nothing that could be kept is lost, and power may fail at any moment.

use std::sync::Arc;

use readonce_format::driver::{CheckReport, Repair};
use readonce_storage::{
    ReadAt, SimFile, Storage,
    sim::{Fault, Lasts},
};

use crate::{
    check::{
        DAMAGES, Damage, EXTENDED_DAMAGES, SNAPSHOT_DAMAGES, extended_image, plain_image, snapshot_image,
    },
    damage::{Bytes, COPIED, Folder, OFFSET},
    support::{block_on, ok, qcow2, tool},
};

async fn repair(file: &Arc<SimFile>, what: Repair) -> CheckReport {
    let storage: Arc<dyn Storage> = file.clone();
    qcow2().repair(&storage, what).await.unwrap()
}

pub async fn repair_all(file: &Arc<SimFile>) -> CheckReport {
    repair(file, Repair::All).await
}

pub async fn repair_leaks(file: &Arc<SimFile>) -> CheckReport {
    repair(file, Repair::Leaks).await
}

pub async fn check(file: &Arc<SimFile>) -> CheckReport {
    let reader: Arc<dyn ReadAt> = file.clone();
    qcow2().check(&reader).await.unwrap()
}

/// What the guest reads, by qemu-img; clusters that cannot be read are an error.
fn guest(folder: &Folder, bytes: &[u8]) -> Option<Vec<u8>> {
    folder.save("read.qcow2", bytes);
    let (from, to) = (folder.text("read.qcow2"), folder.text("read.raw"));
    let (_, read) = tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &from, &to]);
    read.then(|| std::fs::read(&to).unwrap())
}

/// Repairs all, and has qemu-img look at it.
fn repaired(folder: &Folder, damaged: &Bytes, context: &str) -> Bytes {
    let file = damaged.file();
    let report = block_on(repair(&file, Repair::All));
    let state = (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(state, (0, 0, 0), "{context}: {report:?}");
    let bytes = Bytes(file.contents());
    folder.save("repaired.qcow2", &bytes.0);
    ok("qemu-img", &["check", "-q", "-f", "qcow2", &folder.text("repaired.qcow2")]);
    bytes
}

/// Clusters of 4 KiB that read differently.
fn differing(one: &[u8], other: &[u8]) -> Vec<usize> {
    assert_eq!(one.len(), other.len());
    let pairs = one.chunks(4096).zip(other.chunks(4096)).enumerate();
    pairs.filter(|(_, (one, other))| one != other).map(|(at, _)| at).collect()
}

#[test]
fn every_damage_is_mended_and_no_more_is_lost() {
    let folder = Folder::new();
    for options in ["", ",refcount_bits=2", ",refcount_bits=64"] {
        let good = plain_image(&folder, options);
        let before = guest(&folder, &good.0).unwrap();
        for (context, damage) in DAMAGES {
            if context.starts_with("block: ") && !options.is_empty() {
                continue;
            }
            let mut bytes = good.clone();
            damage(&mut bytes);
            let damaged = guest(&folder, &bytes.0);
            let bytes = repaired(&folder, &bytes, context);
            if *context == "L2: compressed by mistake" || *context == "L2: compressed with COPIED" {
                // The bytes are no stream.
                continue;
            }
            let after = guest(&folder, &bytes.0).unwrap_or_else(|| panic!("{context}: cannot be read"));
            // What could be read reads the same; else at most the clusters that the damaged entry mapped are lost.
            if let Some(damaged) = damaged
                && !context.contains("past the end")
                && !context.contains("gone")
                && !["L1: only COPIED", "L1: itself", "several"].contains(context)
            {
                assert_eq!(differing(&damaged, &after), Vec::<usize>::new(), "{context}: {options}");
            }
            let lost = differing(&before, &after).len();
            let lost_max = match *context {
                "L1: past the end" | "L1: cleared" => 16,
                "L1: two name one table" => 20,
                "L1: a refcount block" | "L1: only COPIED" | "L1: itself" => 4,
                "file: the last four clusters are gone" => 4,
                context if context.starts_with("L2") || context == "file: the last cluster is gone" => 2,
                "several" => 2,
                "file: cut in the last cluster" => 1,
                _ => 0,
            };
            assert!(lost <= lost_max, "{context}: {options}: {lost} clusters are lost");
        }
    }
}

#[test]
fn unaligned_entries_keep_what_they_named() {
    let folder = Folder::new();
    let good = plain_image(&folder, "");
    let before = guest(&folder, &good.0).unwrap();
    for context in ["L1: unaligned", "L2: unaligned data", "L1: reserved bit 0", "L2: reserved bit 58"] {
        let (_, damage) = DAMAGES.iter().find(|(name, _)| *name == context).unwrap();
        let mut bytes = good.clone();
        damage(&mut bytes);
        let after = guest(&folder, &repaired(&folder, &bytes, context).0).unwrap();
        assert_eq!(differing(&before, &after), Vec::<usize>::new(), "{context}");
    }
}

#[test]
fn a_cluster_that_two_entries_name_gets_its_own_copy() {
    let folder = Folder::new();
    for bits in [1, 2, 16] {
        let good = plain_image(&folder, &format!(",refcount_bits={bits}"));
        let mut bytes = good.clone();
        let shared = bytes.u64(bytes.l2(0) + 16);
        for entry in [8, 24, 32, 800] {
            bytes.put64(bytes.l2(0) + entry, shared);
        }
        let damaged = guest(&folder, &bytes.0).unwrap();
        let bytes = repaired(&folder, &bytes, "shared");
        assert_eq!(guest(&folder, &bytes.0).unwrap(), damaged, "{bits} bits");
        // A write to one of them is not seen in the others.
        folder.save("written.qcow2", &bytes.0);
        folder.io("written.qcow2", &["write -P 77 4k 4k"]);
        ok("qemu-img", &["check", "-q", "-f", "qcow2", &folder.text("written.qcow2")]);
        let after = guest(&folder, &folder.load("written.qcow2").0).unwrap();
        assert_eq!(differing(&damaged, &after), vec![1], "{bits} bits");
    }
}

#[test]
fn data_that_lies_on_a_table_is_copied_away() {
    let folder = Folder::new();
    let good = plain_image(&folder, "");
    let targets: [fn(&Bytes) -> u64; 5] = [|_| 0, |b| b.l1(), |b| b.l2(1), |b| b.block(0), |b| b.table()];
    for (number, target) in targets.iter().enumerate() {
        let mut bytes = good.clone();
        let at = target(&good);
        bytes.put64(good.l2(0) + 8, COPIED | at.max(if number == 0 { 0 } else { 1 }));
        if number == 0 {
            continue;
        }
        let damaged = guest(&folder, &bytes.0).unwrap();
        let bytes = repaired(&folder, &bytes, "on a table");
        let named = bytes.u64(bytes.l2(0) + 8);
        assert!(named & OFFSET != at && named & COPIED != 0, "target {number}: {named:#x}");
        assert_eq!(guest(&folder, &bytes.0).unwrap(), damaged, "target {number}");
    }
}

#[test]
fn snapshots_are_kept() {
    let folder = Folder::new();
    let good = snapshot_image(&folder);
    let read = |bytes: &Bytes, snapshot: &str| {
        folder.save("snapshot.qcow2", &bytes.0);
        let (from, to) = (folder.text("snapshot.qcow2"), folder.text("snapshot.raw"));
        let args = ["convert", "-f", "qcow2", "-O", "raw", "-l", snapshot, &from, &to];
        tool("qemu-img", &args).1.then(|| std::fs::read(&to).unwrap())
    };
    let active = guest(&folder, &good.0).unwrap();
    let two = read(&good, "two").unwrap();
    for (context, damage) in SNAPSHOT_DAMAGES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let bytes = repaired(&folder, &bytes, context);
        assert_eq!(guest(&folder, &bytes.0).unwrap(), active, "{context}");
        if *context == "one fewer" {
            assert!(read(&bytes, "two").is_none());
        } else if *context != "data under the snapshot only" {
            assert!(read(&bytes, "two").unwrap() == two, "{context}");
        }
        let gone = ["L1 unaligned", "L1 past the end", "L1 too long"].contains(context);
        assert_eq!(bytes.u32(60), 2 - u64::from(gone || *context == "one fewer"), "{context}");
    }
}

#[test]
fn extended_entries_keep_their_data() {
    let folder = Folder::new();
    let good = extended_image(&folder);
    let before = guest(&folder, &good.0).unwrap();
    for (context, damage) in EXTENDED_DAMAGES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let bytes = repaired(&folder, &bytes, context);
        if ["compressed with a bitmap", "compressed"].contains(context) {
            // The bytes are no stream.
            continue;
        }
        let after = guest(&folder, &bytes.0).unwrap();
        let gone = ["past the end", "unaligned, nothing allocated"].contains(context);
        assert_eq!(differing(&before, &after).len(), if gone { 4 } else { 0 }, "{context}");
    }
}

#[test]
fn leaks_alone() {
    let folder = Folder::new();
    let good = plain_image(&folder, "");
    let before = guest(&folder, &good.0).unwrap();
    for (context, damage) in DAMAGES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let file = bytes.file();
        let found = block_on(check(&file));
        let report = block_on(repair(&file, Repair::Leaks));
        let again = block_on(check(&file));
        assert_eq!((report.corruptions, report.leaks), (again.corruptions, again.leaks), "{context}");
        assert_eq!(report.leaks + report.leaks_fixed, found.leaks.max(report.leaks), "{context}");
        assert!(report.corruptions <= found.corruptions, "{context}");
        let free = found.check_errors == 0 && found.corruptions == 0;
        let expect = ["L2: leak", "L2: only COPIED", "L2: plain zeros with COPIED", "block: two leaks"];
        if expect.contains(context) {
            assert!(free && report.leaks_fixed > 0, "{context}: {report:?}");
            folder.save("repaired.qcow2", &file.contents());
            ok("qemu-img", &["check", "-q", "-f", "qcow2", &folder.text("repaired.qcow2")]);
        }
        if ["L2: COPIED missing", "L1: COPIED missing", "block: ones"].contains(context) {
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}");
        }
        // What had meant something that cannot be told is not freed.
        if ["L1: past the end", "L1: unaligned", "L2: unaligned data"].contains(context) {
            assert_eq!(report.leaks_fixed, 0, "{context}");
        }
    }
    assert_eq!(guest(&folder, &good.0).unwrap(), before);
}

#[test]
fn a_healthy_image_is_not_touched() {
    let folder = Folder::new();
    for bytes in [plain_image(&folder, ""), snapshot_image(&folder), extended_image(&folder)] {
        for what in [Repair::Leaks, Repair::All] {
            let file = bytes.file();
            block_on(repair(&file, what));
            assert!(file.contents() == bytes.0);
        }
    }
}

#[test]
fn marks_go_when_all_is_well() {
    let folder = Folder::new();
    let good = plain_image(&folder, "");
    for what in [Repair::Leaks, Repair::All] {
        let mut bytes = good.clone();
        bytes.or64(72, 3);
        let file = bytes.file();
        block_on(repair(&file, what));
        assert_eq!(Bytes(file.contents()).u64(72), 0, "{what:?}");
        // Not while something is wrong.
        bytes.put64(bytes.l2(0) + 8, COPIED | 1 << 30);
        let file = bytes.file();
        block_on(repair(&file, what));
        assert_eq!(Bytes(file.contents()).u64(72), if what == Repair::All { 0 } else { 3 }, "{what:?}");
    }
}

#[test]
fn leaked_clusters_at_the_end_are_cut_off() {
    let folder = Folder::new();
    let mut bytes = plain_image(&folder, "");
    let len = bytes.len();
    bytes.put64(bytes.l1() + 8, 0);
    let file = bytes.file();
    let report = block_on(repair(&file, Repair::Leaks));
    assert_eq!((report.leaks_fixed, report.leaks), (5, 0));
    assert_eq!(file.len(), len - 5 * 4096);
}

#[test]
fn a_refcount_behind_the_end_that_no_check_tells_of_goes() {
    // What a repair that was cut off after it raised refcounts may leave: the image would grow behind it, sparse.
    let folder = Folder::new();
    let good = plain_image(&folder, "");
    for what in [Repair::Leaks, Repair::All] {
        let mut bytes = good.clone();
        let last = bytes.block(0) + 4096 - 8;
        bytes.put64(last, 1);
        let file = bytes.file();
        assert_eq!(block_on(check(&file)).leaks, 0);
        let report = block_on(repair(&file, what));
        assert_eq!((report.leaks_fixed, report.corruptions, report.leaks), (0, 0, 0));
        assert!(file.contents() == good.0, "{what:?}");
    }
}

#[test]
fn more_blocks_than_the_table_has_room_for() {
    // The image is full, and its refcounts are lost.
    let folder = Folder::new();
    let writes = ["write -P 1 0 3M"];
    folder.create("small.qcow2", "cluster_size=512,refcount_bits=64", "4M", &writes);
    let mut bytes = folder.load("small.qcow2");
    let before = guest(&folder, &bytes.0).unwrap();
    let (table, len) = (bytes.table() as usize, bytes.u32(56) as usize * 512);
    assert!(len > 512, "more than one cluster");
    bytes.0[table..table + len].fill(0);
    let mut short = bytes.clone();
    short.put32(56, 1);
    for damaged in [bytes, short] {
        let bytes = repaired(&folder, &damaged, "no refcounts");
        assert_eq!(guest(&folder, &bytes.0).unwrap(), before);
    }
}

/// Repairs with the machine dying at every operation, and again after it: what is read then is what is read without a
/// crash.
fn crashes(damaged: &Bytes, context: &str, seeds: u64) {
    let whole = damaged.file();
    block_on(repair(&whole, Repair::All));
    let expect = Guest::of(&whole.contents());
    for nth in 1.. {
        let file = damaged.file();
        file.fail_nth(nth, Fault::Eio, Lasts::ForGood);
        let storage: Arc<dyn Storage> = file.clone();
        let died = block_on(qcow2().repair(&storage, Repair::All)).is_err();
        if file.fault_hits() == 0 {
            assert!(!died && nth > 1);
            return;
        }
        for seed in 0..seeds {
            let crashed = Arc::new(file.crash(seed * 1000 + nth));
            let report = block_on(repair(&crashed, Repair::All));
            let state = (report.corruptions, report.leaks, report.check_errors);
            assert_eq!(state, (0, 0, 0), "{context}: operation {nth}, seed {seed}");
            assert!(Guest::of(&crashed.contents()) == expect, "{context}: operation {nth}, seed {seed}");
        }
    }
}

/// What every mapped cluster of the active state and of the snapshots reads as, by our own walk of the tables.
#[derive(PartialEq)]
pub struct Guest(Vec<Vec<(u64, Vec<u8>)>>);

/// Byte offset and entries of the active L1 table and of the snapshots' L1 tables.
pub fn l1_tables(bytes: &Bytes) -> Vec<(u64, u64)> {
    let mut tables = vec![(bytes.l1(), bytes.u32(36))];
    let mut at = bytes.snapshots();
    for _ in 0..bytes.u32(60) {
        tables.push((bytes.u64(at), bytes.u32(at + 8)));
        let names = (bytes.u32(at + 12) >> 16) + (bytes.u32(at + 12) & 0xffff);
        at += (40 + bytes.u32(at + 36) + names).next_multiple_of(8);
    }
    tables
}

impl Guest {
    pub fn of(contents: &[u8]) -> Self {
        let bytes = Bytes(contents.to_vec());
        let tables = l1_tables(&bytes);
        Self(tables.into_iter().map(|(at, len)| Self::state(&bytes, at, len)).collect())
    }

    pub fn snapshots(&self) -> &[Vec<(u64, Vec<u8>)>] {
        &self.0[1..]
    }

    pub fn active(&self) -> &[(u64, Vec<u8>)] {
        &self.0[0]
    }

    fn state(bytes: &Bytes, l1: u64, len: u64) -> Vec<(u64, Vec<u8>)> {
        let cluster = bytes.cluster();
        let mut state = Vec::new();
        for l1_index in 0..len {
            let table = bytes.u64(l1 + 8 * l1_index) & OFFSET;
            for l2_index in (0..cluster / 8).filter(|_| table > 0) {
                let entry = bytes.u64(table + 8 * l2_index) & !COPIED;
                let data = match entry & OFFSET {
                    0 => entry.to_be_bytes().to_vec(),
                    _ if entry & 1 == 1 => vec![1],
                    at => bytes.0[at as usize..bytes.0.len().min((at + cluster) as usize)].to_vec(),
                };
                if entry != 0 {
                    state.push((l1_index * cluster / 8 + l2_index, data));
                }
            }
        }
        state
    }
}

#[test]
fn power_loss_at_every_operation() {
    let folder = Folder::new();
    let small = |options: &str| {
        let writes = ["write -P 1 0 6k", "write -P 2 40k 2k", "write -z 8k 1k"];
        folder.create("small.qcow2", &format!("cluster_size=512{options}"), "64k", &writes);
        folder.load("small.qcow2")
    };
    let damages: &[Damage] = &[
        ("no refcounts", |b| b.put64(b.table(), 0)),
        ("an unaligned block", |b| b.or64(b.table(), 32)),
        ("a short table", |b| b.put32(56, 0)),
        ("leaks and flags", |b| {
            b.put64(b.l2(0) + 8, 0);
            b.clear64(b.l2(0) + 16, COPIED);
            b.clear64(b.l1(), COPIED);
            b.or64(72, 1);
        }),
        ("shared", |b| {
            let entry = b.u64(b.l2(0) + 16);
            b.put64(b.l2(0) + 8, entry);
            b.put64(b.l2(0) + 24, entry);
            b.put64(b.l2(0) + 40, COPIED | b.l2(1));
            b.put64(b.l2(0) + 48, COPIED | b.table());
        }),
        ("wrong entries", |b| {
            b.put64(b.l2(0) + 8, COPIED | 1 << 30);
            b.or64(b.l2(0) + 16, 2);
            b.or64(b.l1(), 1 << 57);
            b.put64(b.l1() + 8, 1 << 30);
        }),
    ];
    for options in ["", ",refcount_bits=1"] {
        let good = small(options);
        for (context, damage) in damages {
            let mut bytes = good.clone();
            damage(&mut bytes);
            crashes(&bytes, context, 3);
        }
    }
    let image = folder.text("small.qcow2");
    small("");
    ok("qemu-img", &["snapshot", "-c", "one", &image]);
    folder.io("small.qcow2", &["write -P 3 512 2k"]);
    ok("qemu-img", &["snapshot", "-c", "two", &image]);
    let mut bytes = folder.load("small.qcow2");
    bytes.put64(bytes.snapshots(), 1 << 30);
    crashes(&bytes, "snapshot", 3);
    bytes.put32(56, 0);
    crashes(&bytes, "snapshot and refcounts", 3);
}
