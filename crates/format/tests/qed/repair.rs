//! Check and repair: every kind of damage, and power loss in the middle.

use std::sync::Arc;

use rand::Rng;
use readonce_format::{
    Mapper,
    driver::{CheckReport, Repair},
};
use readonce_storage::{
    ReadAt, SimFile, Storage,
    sim::{Fault, Lasts},
};

use crate::guest::{Guest, Model, SMALL, Shape, block_on, check, qed, read_all, rng, wrong};

const CLUSTER: u64 = 4096;

async fn repair(file: &Arc<SimFile>, what: Repair) -> CheckReport {
    let storage: Arc<dyn Storage> = file.clone();
    qed().repair(&storage, what).await.unwrap()
}

fn entry(bytes: &[u8], at: u64) -> u64 {
    u64::from_le_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
}

/// A closed image with data in three L2 tables, and what it reads as.
async fn image(shape: &Shape) -> (Vec<u8>, Model) {
    let (file, mut guest) = Guest::new(shape).await;
    let clusters = shape.size / CLUSTER;
    guest.write(0, 40).await.unwrap();
    guest.fill(100, 30).await.unwrap();
    guest.write((clusters - 40) * 8, 100).await.unwrap();
    guest.zero(200, 3).await.unwrap();
    guest.write((clusters / 2) * 8, 64).await.unwrap();
    guest.mapper.close().await.unwrap();
    guest.model.flushed();
    assert_eq!(wrong(&file).await, (0, 0));
    (file.contents(), guest.model)
}

async fn reads_as(file: &Arc<SimFile>, model: &Model, context: &str) {
    let mapper = qed().open(file.clone()).await.unwrap();
    let found = read_all(mapper.as_ref() as &dyn Mapper, file.as_ref(), &model.shape).await.unwrap();
    for (sector, found) in (0..).zip(found) {
        assert_eq!(found, model.now(sector), "sector {sector}: {context}");
    }
}

#[test]
fn a_double_reference_gets_its_own_copy() {
    block_on(async {
        let (mut bytes, mut model) = image(&SMALL).await;
        let table = entry(&bytes, CLUSTER);
        let shared = entry(&bytes, table);
        put(&mut bytes, table + 50 * 8, shared);
        put(&mut bytes, table + 51 * 8, shared);
        for cluster in [50, 51] {
            (0..8).for_each(|sector| model.write(cluster * 8 + sector, model.now(sector)));
        }
        let file = Arc::new(SimFile::from_bytes(&bytes));
        assert_eq!(wrong(&file).await, (2, 0));
        let report = repair(&file, Repair::Leaks).await;
        assert_eq!((report.corruptions, report.corruptions_fixed), (2, 0), "leaks only");
        let report = repair(&file, Repair::All).await;
        assert_eq!((report.corruptions, report.corruptions_fixed, report.leaks), (0, 2, 0));
        reads_as(&file, &model, "copied").await;
        let mut guest = Guest::open(file.clone(), model).await.unwrap();
        guest.next_tag = 5000;
        guest.write(50 * 8, 1).await.unwrap();
        guest.check_reads().await;
    });
}

#[test]
fn a_table_that_two_entries_name_gets_its_own_copy() {
    block_on(async {
        let shape = Shape { table_size: 2, size: 24 << 20, ..SMALL };
        let (mut bytes, mut model) = image(&shape).await;
        let table = entry(&bytes, CLUSTER);
        assert_eq!(entry(&bytes, CLUSTER + 8), 0, "the test needs a free L1 entry");
        put(&mut bytes, CLUSTER + 8, table);
        // The second range reads the first one's data, and the backing where that is absent.
        let span = (2 * CLUSTER / 8) * 8;
        for sector in 0..span {
            let tag = model.now(sector);
            let backing = crate::guest::backing_tag(&shape, sector);
            if tag != backing || (800..1040).contains(&sector) {
                model.write(sector + span, tag);
            }
        }
        let file = Arc::new(SimFile::from_bytes(&bytes));
        assert_eq!(wrong(&file).await.0, 2, "both clusters of the table");
        let report = repair(&file, Repair::All).await;
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        assert!(report.corruptions_fixed > 2, "the data of the copied table was shared too");
        reads_as(&file, &model, "copied").await;
    });
}

/// An L1 entry, inside the guest's size or beyond it, that names a guest's cluster: entries were mended in the guest's bytes, and it read
/// zeros where it had written.
#[test]
fn data_that_an_entry_takes_for_a_table_is_kept() {
    let shape = Shape { size: 24 << 20, ..SMALL };
    for l1_index in [3, 12, 511] {
        block_on(async {
            let (mut bytes, mut model) = image(&shape).await;
            let table = entry(&bytes, CLUSTER);
            let data = entry(&bytes, table + 3 * 8);
            assert_eq!(entry(&bytes, CLUSTER + l1_index * 8), 0, "the test needs a free L1 entry");
            put(&mut bytes, CLUSTER + l1_index * 8, data);
            // Past the file's end: not valid when the copy makes the file longer.
            let end = bytes.len() as u64;
            put(&mut bytes, table + 60 * 8, end);
            for sector in 0..8 {
                let backing = crate::guest::backing_tag(&shape, 60 * 8 + sector);
                model.write(60 * 8 + sector, backing);
            }
            let file = Arc::new(SimFile::from_bytes(&bytes));
            let broken = wrong(&file).await.0;
            let report = repair(&file, Repair::All).await;
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            assert_eq!(report.corruptions_fixed, broken);
            reads_as(&file, &model, "copied").await;
        });
    }
}

#[test]
fn what_may_not_be_there_shows_the_backing() {
    block_on(async {
        let (mut bytes, mut model) = image(&SMALL).await;
        let table = entry(&bytes, CLUSTER);
        put(&mut bytes, table, 2);
        put(&mut bytes, table + 8, 1 << 50);
        let misaligned = entry(&bytes, table + 16) | 8;
        put(&mut bytes, table + 16, misaligned);
        for sector in 0..24 {
            model.write(sector, crate::guest::backing_tag(&SMALL, sector));
        }
        // Unused L1 entries are looked at too. 1 is no L1 value.
        put(&mut bytes, CLUSTER + 500 * 8, 1);
        let file = Arc::new(SimFile::from_bytes(&bytes));
        let (broken, leaks) = wrong(&file).await;
        assert_eq!((broken, leaks), (4, 3));
        let report = repair(&file, Repair::All).await;
        assert_eq!((report.corruptions_fixed, report.corruptions), (4, 0));
        assert_eq!((report.leaks_fixed, report.leaks), (3, 0));
        reads_as(&file, &model, "cleared").await;
    });
}

#[test]
fn leaks_are_freed_and_the_file_is_cut() {
    for table_size in [1, 2, 4, 16] {
        for seed in 0..12 {
            block_on(async {
                let shape = Shape { table_size, size: 40 << 20, ..SMALL };
                let (mut bytes, mut model) = image(&shape).await;
                let mut rng = rng(seed);
                // Data entries are taken away, so that holes are everywhere, between tables too; and more at the end.
                for l1 in 0..table_size * 512 {
                    let table = entry(&bytes, CLUSTER + l1 * 8);
                    if table == 0 {
                        continue;
                    }
                    let mut table = table;
                    if rng.random_bool(0.5) {
                        // The table lies behind its data, and where it was is a hole.
                        let moved = bytes.len() as u64;
                        bytes.extend_from_within(table as usize..(table + table_size * CLUSTER) as usize);
                        put(&mut bytes, CLUSTER + l1 * 8, moved);
                        table = moved;
                    }
                    let keep = rng.random_range(0.0..1.0);
                    for at in 0..table_size * 512 {
                        if entry(&bytes, table + at * 8) > 1 && rng.random_bool(keep) {
                            put(&mut bytes, table + at * 8, 0);
                            let cluster = l1 * table_size * 512 + at;
                            for sector in cluster * 8..((cluster + 1) * 8).min(shape.size / 512) {
                                model.write(sector, crate::guest::backing_tag(&shape, sector));
                            }
                        }
                    }
                }
                let len = bytes.len();
                bytes.resize(len + rng.random_range(0..5 * CLUSTER as usize), 0xdd);
                let file = Arc::new(SimFile::from_bytes(&bytes));
                let (broken, leaks) = wrong(&file).await;
                assert_eq!(broken, 0);
                let context = format!("tables of {table_size}, seed {seed}");
                let report = repair(&file, Repair::Leaks).await;
                assert_eq!(
                    (report.leaks, report.leaks_fixed, report.corruptions),
                    (0, leaks, 0),
                    "{context}"
                );
                reads_as(&file, &model, &context).await;
                if leaks > 0 {
                    assert_eq!(file.len() % CLUSTER, 0);
                    // What is left behind the last whole cluster counts as one, as in QEMU.
                    let clusters = (bytes.len() as u64).div_ceil(CLUSTER);
                    assert_eq!(file.len() / CLUSTER, clusters - leaks, "{context}");
                }
            });
        }
    }
}

/// An image with a cluster that two entries name, and holes in front of its tables.
async fn damaged(shape: &Shape) -> (Vec<u8>, Model) {
    let (mut bytes, mut model) = image(shape).await;
    let table = entry(&bytes, CLUSTER);
    let shared = entry(&bytes, table);
    put(&mut bytes, table + 50 * 8, shared);
    put(&mut bytes, table + 105 * 8, 0);
    (0..8).for_each(|sector| model.write(50 * 8 + sector, model.now(sector)));
    for at in 0..4 {
        put(&mut bytes, table + (1 + at) * 8, 0);
        for sector in (1 + at) * 8..(2 + at) * 8 {
            model.write(sector, crate::guest::backing_tag(shape, sector));
        }
    }
    (bytes, model)
}

/// One read that fails while holes are closed would cost all data: the file was cut as if nothing used it.
#[test]
fn one_error_at_any_io_of_a_repair() {
    let shape = Shape { table_size: 2, size: 24 << 20, ..SMALL };
    for n in 1.. {
        let hits = block_on(async {
            let (bytes, model) = damaged(&shape).await;
            let file = Arc::new(SimFile::from_bytes(&bytes));
            let storage: Arc<dyn Storage> = file.clone();
            file.fail_nth(n, Fault::Eio, Lasts::Once);
            let _ = qed().repair(&storage, Repair::All).await;
            let hits = file.fault_hits();
            file.heal();
            let context = format!("n {n}");
            reads_as(&file, &model, &context).await;
            let report = repair(&file, Repair::All).await;
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}");
            reads_as(&file, &model, &context).await;
            hits
        });
        if hits == 0 {
            return;
        }
    }
}

#[test]
fn power_loss_at_any_io_of_a_repair() {
    let shape = Shape { table_size: 2, size: 24 << 20, ..SMALL };
    for n in 1.. {
        let more = block_on(async {
            let (bytes, model) = damaged(&shape).await;
            let file = Arc::new(SimFile::from_bytes(&bytes));
            let storage: Arc<dyn Storage> = file.clone();
            file.fail_nth(n, Fault::Eio, Lasts::ForGood);
            let result = qed().repair(&storage, Repair::All).await;
            for seed in 0..6 {
                let crashed = Arc::new(file.crash(n * 10 + seed));
                let context = format!("n {n} seed {seed}");
                reads_as(&crashed, &model, &context).await;
                let report = repair(&crashed, Repair::All).await;
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}");
                reads_as(&crashed, &model, &context).await;
            }
            result.is_err() || file.fault_hits() > 0
        });
        if !more {
            break;
        }
    }
}

#[test]
fn damage_that_stays_keeps_the_mark() {
    block_on(async {
        let (mut bytes, model) = image(&SMALL).await;
        bytes[16] |= 2;
        let table = entry(&bytes, CLUSTER);
        let shared = entry(&bytes, table);
        put(&mut bytes, table + 50 * 8, shared);
        let file = Arc::new(SimFile::from_bytes(&bytes));
        let reader: Arc<dyn ReadAt> = file.clone();
        let mut guest = Guest::open(file.clone(), model).await.unwrap();
        guest.mapper.reclaim().await.unwrap();
        guest.fill(300, 2).await.unwrap();
        guest.mapper.close().await.unwrap();
        assert!(qed().describe(&reader).await.unwrap().dirty, "a double reference is not hidden");
        repair(&file, Repair::All).await;
        assert!(!qed().describe(&reader).await.unwrap().dirty);
        assert_eq!(check(&file).await.corruptions, 0);
    });
}

/// The same image with `gap` free clusters between the header and the L1 table.
fn with_gap(bytes: &[u8], table_bytes: u64, gap: u64) -> Vec<u8> {
    let shift = gap * CLUSTER;
    let mut moved = bytes.to_vec();
    put(&mut moved, 32, 0);
    put(&mut moved, 40, CLUSTER + shift);
    for l1_entry in (CLUSTER..CLUSTER + table_bytes).step_by(8) {
        let table = entry(bytes, l1_entry);
        if table == 0 {
            continue;
        }
        put(&mut moved, l1_entry, table + shift);
        for l2_entry in (table..table + table_bytes).step_by(8) {
            let place = entry(bytes, l2_entry);
            if place > 1 {
                put(&mut moved, l2_entry, place + shift);
            }
        }
    }
    let behind_header = CLUSTER as usize;
    moved.splice(behind_header..behind_header, vec![0x77; shift as usize]);
    moved
}

/// The same image with its L1 table behind all else, and what it left unused.
fn with_l1_at_end(bytes: &[u8], table_bytes: u64) -> Vec<u8> {
    let mut moved = bytes.to_vec();
    put(&mut moved, 32, 0);
    put(&mut moved, 40, bytes.len() as u64);
    let l1 = CLUSTER as usize..(CLUSTER + table_bytes) as usize;
    moved.extend_from_slice(&bytes[l1.clone()]);
    moved[l1].fill(0x77);
    moved
}

/// An image of another program kept its holes before the L1 table for ever, and every check said that it leaks.
#[test]
fn holes_before_the_l1_table_go() {
    let shape = Shape { table_size: 2, size: 24 << 20, ..SMALL };
    let table_bytes = 2 * CLUSTER;
    let (bytes, model) = block_on(async {
        let (file, mut guest) = Guest::new(&shape).await;
        guest.write(0, 40).await.unwrap();
        guest.write((5 << 20) / 512, 16).await.unwrap();
        guest.mapper.close().await.unwrap();
        guest.model.flushed();
        (file.contents(), guest.model)
    });
    for foreign in [
        with_gap(&bytes, table_bytes, 1),
        with_gap(&bytes, table_bytes, 2),
        with_gap(&bytes, table_bytes, 30),
        with_l1_at_end(&bytes, table_bytes),
    ] {
        for n in 1.. {
            let more = block_on(async {
                let file = Arc::new(SimFile::from_bytes(&foreign));
                let (corruptions, leaks) = wrong(&file).await;
                assert!(corruptions == 0 && leaks > 0, "the test needs holes alone");
                reads_as(&file, &model, "as made").await;
                let storage: Arc<dyn Storage> = file.clone();
                file.fail_nth(n, Fault::Eio, Lasts::ForGood);
                let result = qed().repair(&storage, Repair::Leaks).await;
                for seed in 0..4 {
                    let crashed = Arc::new(file.crash(n * 10 + seed));
                    let context = format!("n {n} seed {seed}");
                    reads_as(&crashed, &model, &context).await;
                    let report = repair(&crashed, Repair::Leaks).await;
                    assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}");
                    assert_eq!(crashed.len(), bytes.len() as u64, "{context}");
                    reads_as(&crashed, &model, &context).await;
                }
                result.is_err() || file.fault_hits() > 0
            });
            if !more {
                break;
            }
        }
    }
}
