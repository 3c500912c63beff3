//! What callers of the mapper see: extents, reservations, commits, syncs, the marks.

use std::sync::Arc;

use rand::Rng;
use readonce_format::{
    CommitMode, Durability, Extent, FormatError, Mapping, Room, WritableMapper,
    driver::{Repair, SnapshotChange, driver},
};
use readonce_storage::{
    ReadAt, SimFile, Storage, TokioRuntime,
    sim::{Fault, Lasts, NowCalls},
};

use crate::guest::{
    Files, Guest, Model, SMALL, Shape, UNITS, backing_tag, block_on, check, create, qcow2, random_op,
    read_all, rng, sector_of, wrong,
};

const CLUSTER: u64 = 4096;
const UNIT: u64 = 512;
const COPIED: u64 = 1 << 63;

/// The state of `count` pieces of `size` bytes, one letter each: `.` absent, `D` data, `Z` zero, `S` shared.
async fn drawn(mapper: &dyn WritableMapper, size: u64, count: u64) -> String {
    let mut out = String::new();
    for piece in 0..count {
        let extent = mapper.lookup(piece * size, size).await.unwrap();
        assert_eq!(extent.len, size);
        out.push(match extent.mapping {
            Mapping::Absent => '.',
            Mapping::Zero => 'Z',
            Mapping::Data(_) => 'D',
            Mapping::Shared(_) => 'S',
            Mapping::Compressed(_) => 'C',
        });
    }
    out
}

async fn in_use(file: &Arc<SimFile>) -> bool {
    let reader: Arc<dyn ReadAt> = file.clone();
    qcow2().describe(&reader).await.unwrap().in_use
}

async fn snapshot(file: &Arc<SimFile>) {
    let storage: Arc<dyn Storage> = file.clone();
    let change = SnapshotChange::Create { name: "one".into(), date_sec: 1, date_nsec: 0 };
    qcow2().snapshot(&storage, &change).await.unwrap();
}

#[test]
fn a_fill_changes_only_what_is_absent() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        let late = guest.mapper.prepare(0, 6 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!((late.guest, late.len), (0, 6 * CLUSTER));
        guest.write(8, 8).await.unwrap();
        guest.zero(3, 1).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), CLUSTER, 6).await, ".D.Z..");
        assert_eq!(late.commit(CommitMode::IfAbsent), 4 * CLUSTER);
        assert_eq!(drawn(guest.mapper.as_ref(), CLUSTER, 6).await, "DDDZDD");
        let zero = guest.mapper.prepare(6 * CLUSTER, 2 * CLUSTER, Room::Zero).await.unwrap();
        assert_eq!(zero.commit(CommitMode::IfAbsent), 2 * CLUSTER);
        guest.write(24, 8).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), CLUSTER, 9).await, "DDDDDDZZ.");
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&guest.files.image).await, (0, 0));
        assert_eq!(check(&guest.files.image).await.allocated_clusters, 6);
    });
}

#[test]
fn units_of_one_cluster_share_its_room() {
    block_on(async {
        let guest = Guest::new(&UNITS).await;
        let mapper = guest.mapper.as_ref();
        let first = mapper.prepare(2 * UNIT, UNIT, Room::Data).await.unwrap();
        let second = mapper.prepare(5 * UNIT, 3 * UNIT, Room::Data).await.unwrap();
        let dropped = mapper.prepare(20 * UNIT, UNIT, Room::Data).await.unwrap();
        assert_eq!(first.at.unwrap() + 3 * UNIT, second.at.unwrap());
        assert_eq!(first.at.unwrap() + 18 * UNIT, dropped.at.unwrap());
        let place = first.at.unwrap() - 2 * UNIT;
        assert_eq!(second.commit(CommitMode::IfAbsent), 3 * UNIT);
        drop(first);
        drop(dropped);
        assert_eq!(drawn(mapper, UNIT, 10).await, ".....DDD..");
        // A unit of a cluster that has a place goes there.
        let third = mapper.prepare(0, UNIT, Room::Data).await.unwrap();
        assert_eq!(third.at, Some(place));
        third.commit(CommitMode::Overwrite);
        let zero = mapper.prepare(UNIT, UNIT, Room::Zero).await.unwrap();
        zero.commit(CommitMode::Overwrite);
        assert_eq!(drawn(mapper, UNIT, 10).await, "DZ...DDD..");
        // A reservation ends before a unit that is data.
        let run = mapper.prepare(2 * UNIT, 10 * UNIT, Room::Data).await.unwrap();
        assert_eq!((run.at, run.len), (Some(place + 2 * UNIT), 3 * UNIT));
        drop(run);
        // And one of absent units before a unit of zeros, where the disk may still show what was there.
        mapper.prepare(3 * UNIT, UNIT, Room::Zero).await.unwrap().commit(CommitMode::Overwrite);
        let run = mapper.prepare(2 * UNIT, 10 * UNIT, Room::Data).await.unwrap();
        assert_eq!((run.at, run.len), (Some(place + 2 * UNIT), UNIT));
        drop(run);
        assert_eq!(mapper.lookup(0, UNIT).await.unwrap().mapping, Mapping::Data(place));
        mapper.close().await.unwrap();
        assert_eq!(wrong(&guest.files.image).await, (0, 0));
        assert_eq!(check(&guest.files.image).await.allocated_clusters, 1);
    });
}

#[test]
fn a_cluster_of_which_all_reservations_were_dropped_is_free() {
    block_on(async {
        let guest = Guest::new(&UNITS).await;
        let held = [0, 3, 9].map(|unit| guest.mapper.prepare(unit * UNIT, UNIT, Room::Data));
        let mut at = None;
        for room in held {
            at = at.max(room.await.unwrap().at);
        }
        let again = guest.mapper.prepare(64 * UNIT, UNIT, Room::Data).await.unwrap();
        assert!(again.at <= at);
        drop(again);
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&guest.files.image).await, (0, 0));
        assert_eq!(check(&guest.files.image).await.allocated_clusters, 0);
    });
}

#[test]
fn room_that_is_held_outlives_the_unlinking_of_its_cluster() {
    block_on(async {
        let mut guest = Guest::new(&UNITS).await;
        guest.write(0, 1).await.unwrap();
        guest.flush().await.unwrap();
        let held = guest.mapper.prepare(5 * UNIT, UNIT, Room::Data).await.unwrap();
        let at = held.at.unwrap();
        guest.zero_clusters(0, 1).await.unwrap();
        guest.flush().await.unwrap();
        assert!(guest.mapper.take_unlinked().is_none(), "somebody may still write there");
        // Whoever holds the room puts the cluster back where it was.
        held.commit(CommitMode::Overwrite);
        assert_eq!(guest.mapping(5 * UNIT).await.unwrap(), Mapping::Data(at));
        assert_eq!(drawn(guest.mapper.as_ref(), UNIT, 7).await, "ZZZZZDZ");
        guest.flush().await.unwrap();
        assert!(guest.mapper.take_unlinked().is_none());
        let held = guest.mapper.prepare(7 * UNIT, UNIT, Room::Data).await.unwrap();
        guest.zero_clusters(0, 1).await.unwrap();
        guest.flush().await.unwrap();
        drop(held);
        guest.flush().await.unwrap();
        assert!(guest.mapper.take_unlinked().is_some());
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&guest.files.image).await, (0, 0));
    });
}

#[test]
fn what_a_snapshot_shows_is_shared_until_it_is_copied() {
    for shape in [SMALL, UNITS] {
        block_on(async {
            let cluster = shape.cluster_size();
            let mut guest = Guest::new(&shape).await;
            guest.write(0, 4 * cluster / 512).await.unwrap();
            guest.mapper.close().await.unwrap();
            snapshot(&guest.files.image).await;
            guest.model.flushed();
            let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
            guest.next_tag = 100;
            let mapper = guest.mapper.clone();
            assert_eq!(drawn(mapper.as_ref(), cluster, 5).await, "SSSS.");
            guest.copy(1).await.unwrap();
            assert_eq!(drawn(mapper.as_ref(), cluster, 5).await, "SDSS.");
            guest.write(0, cluster / 512).await.unwrap();
            assert_eq!(drawn(mapper.as_ref(), cluster, 5).await, "DDSS.");
            guest.zero_clusters(2, 1).await.unwrap();
            assert_eq!(drawn(mapper.as_ref(), cluster, 5).await, "DDZS.");
            // A fill never replaces what is there.
            let late = mapper.prepare(3 * cluster, cluster, Room::Data).await.unwrap();
            assert_eq!(late.commit(CommitMode::IfAbsent), 0);
            guest.check_reads().await;
            guest.flush().await.unwrap();
            assert!(mapper.take_unlinked().is_none(), "the snapshot still has them");
            mapper.close().await.unwrap();
            assert_eq!(wrong(&guest.files.image).await, (0, 0));
            let storage: Arc<dyn Storage> = guest.files.image.clone();
            qcow2().snapshot(&storage, &SnapshotChange::Delete("one".into())).await.unwrap();
            assert_eq!(wrong(&guest.files.image).await, (0, 0));
            Guest::open(guest.files, guest.model).await.unwrap().check_reads().await;
        });
    }
}

#[test]
fn what_only_seems_to_be_shared_is_copied_and_freed() {
    // The flags say that table and clusters are shared, the refcounts that they are not: a crash of another program.
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        guest.fill(0, 4).await.unwrap();
        guest.mapper.close().await.unwrap();
        let file = guest.files.image.clone();
        let l1 = word(&file, 40, 0);
        let l2 = word(&file, l1, 0) & !(1 << 63);
        file.write(l1, l2.to_be_bytes().to_vec().into()).await.unwrap();
        let entry = word(&file, l2, 1) & !(1 << 63);
        file.write(l2 + 8, entry.to_be_bytes().to_vec().into()).await.unwrap();
        let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), CLUSTER, 5).await, "SSSS.");
        for cluster in 0..4 {
            guest.copy(cluster).await.unwrap();
        }
        assert_eq!(drawn(guest.mapper.as_ref(), CLUSTER, 5).await, "DDDD.");
        guest.flush().await.unwrap();
        guest.mapper.take_unlinked().unwrap().reuse();
        guest.fill(10, 20).await.unwrap();
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&file).await, (0, 0));
    });
}

#[test]
fn a_broken_entry_of_the_refcount_table_stays() {
    block_on(async {
        let shape = Shape { cluster_bits: 9, refcount_bits: 64, size: 1 << 20, ..SMALL };
        let mut guest = Guest::new(&shape).await;
        guest.fill(0, 200).await.unwrap();
        guest.mapper.close().await.unwrap();
        let file = guest.files.image.clone();
        let table = word(&file, 48, 0);
        // A block that lies in the L1 table; it would count what lies behind the end.
        let broken = word(&file, 40, 0);
        file.write(table + 40 * 8, broken.to_be_bytes().to_vec().into()).await.unwrap();
        let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
        guest.fill(300, 300).await.unwrap();
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        assert_eq!(word(&file, table, 40), broken, "for a check to see");
        guest.check_reads().await;
    });
}

#[test]
fn an_absent_unit_of_a_shared_cluster_has_no_room_before_the_copy() {
    block_on(async {
        let mut guest = Guest::new(&UNITS).await;
        guest.write(0, 1).await.unwrap();
        guest.mapper.close().await.unwrap();
        snapshot(&guest.files.image).await;
        guest.model.flushed();
        let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
        let refused = guest.mapper.prepare(3 * UNIT, UNIT, Room::Data).await.map(drop);
        assert!(matches!(refused, Err(FormatError::CopyFirst)), "{refused:?}");
        guest.copy(0).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), UNIT, 4).await, "D...");
        guest.fill(0, 6).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), UNIT, 7).await, "DDDDDD.");
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&guest.files.image).await, (0, 0));
    });
}

#[test]
fn extents_merge_what_lies_together() {
    block_on(async {
        for shape in [SMALL, UNITS] {
            let (unit, cluster) = (shape.unit(), shape.cluster_size());
            let mut guest = Guest::new(&shape).await;
            let lookup = async |guest: &Guest, offset, len| guest.mapper.lookup(offset, len).await.unwrap();
            let absent = lookup(&guest, 512, u64::MAX).await;
            assert_eq!(absent, Extent { mapping: Mapping::Absent, len: shape.size - 512 });
            guest.fill(2 * cluster / unit, 5 * cluster / unit).await.unwrap();
            guest.zero(7 * cluster / unit, 3 * cluster / unit).await.unwrap();
            let data = lookup(&guest, 2 * cluster + 100, u64::MAX).await;
            let Mapping::Data(at) = data.mapping else { panic!("{data:?}") };
            assert_eq!((at % cluster, data.len), (100, 5 * cluster - 100));
            let zero = lookup(&guest, 8 * cluster + 7, u64::MAX).await;
            assert_eq!(zero, Extent { mapping: Mapping::Zero, len: 2 * cluster - 7 });
            let short = lookup(&guest, 8 * cluster, 7).await;
            assert_eq!(short, Extent { mapping: Mapping::Zero, len: 7 });
            let past = guest.mapper.lookup(shape.size, 1).await.unwrap_err();
            assert!(matches!(past, FormatError::Invalid(_)), "{past}");
        }
    });
}

#[test]
fn a_run_stops_at_a_table_and_at_the_end() {
    block_on(async {
        let guest = Guest::new(&SMALL).await;
        let across = guest.mapper.prepare(510 * CLUSTER, 10 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!(across.len, 2 * CLUSTER);
        let end = SMALL.size.div_ceil(CLUSTER) * CLUSTER;
        let last = guest.mapper.prepare(end - CLUSTER, 4 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!(last.len, CLUSTER);
        assert!(guest.mapper.prepare(end, CLUSTER, Room::Data).await.is_err());
        assert!(guest.mapper.prepare(100, CLUSTER, Room::Data).await.is_err());
        assert!(guest.mapper.prepare(0, 0, Room::Data).await.is_err());
        let guest = Guest::new(&UNITS).await;
        // Part of a cluster, then whole ones, then the units that the guest has of the last one.
        let part = guest.mapper.prepare(30 * UNIT, 70 * UNIT, Room::Data).await.unwrap();
        assert_eq!(part.len, 2 * UNIT);
        let whole = guest.mapper.prepare(32 * UNIT, 70 * UNIT, Room::Data).await.unwrap();
        assert_eq!(whole.len, 64 * UNIT);
        let end = guest.mapper.prepare(UNITS.size - 3 * UNIT, 99 * UNIT, Room::Data).await.unwrap();
        assert_eq!(end.len, 3 * UNIT);
    });
}

#[test]
fn sixty_four_fills_cost_four_syncs_until_closed() {
    for lazy in [false, true] {
        let shape = Shape { cluster_bits: 16, size: 64 << 20, lazy, ..SMALL };
        block_on(async {
            let mut guest = Guest::new(&shape).await;
            let syncs = guest.files.image.sync_count();
            for cluster in 0..64 {
                guest.fill(cluster * 7, 1).await.unwrap();
            }
            guest.mapper.close().await.unwrap();
            let syncs = guest.files.image.sync_count() - syncs;
            assert!(syncs <= 4, "lazy {lazy}: {syncs}");
            assert_eq!(wrong(&guest.files.image).await, (0, 0));
        });
    }
}

#[test]
fn syncs_of_a_flush() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        let syncs = async |guest: &Guest, durability| {
            let before = guest.files.image.sync_count();
            guest.mapper.flush(durability).await.unwrap();
            guest.files.image.sync_count() - before
        };
        assert_eq!(syncs(&guest, Durability::Linked).await, 0);
        assert_eq!(syncs(&guest, Durability::Durable).await, 1, "writes in place are not known here");
        guest.fill(0, 3).await.unwrap();
        assert_eq!(guest.mapper.unlinked_bytes(), 3 * CLUSTER);
        assert_eq!(syncs(&guest, Durability::Linked).await, 2, "the mark's, once");
        assert_eq!(guest.mapper.unlinked_bytes(), 0);
        assert_eq!(syncs(&guest, Durability::Durable).await, 1);
        guest.fill(9, 3).await.unwrap();
        assert_eq!(syncs(&guest, Durability::Durable).await, 2);
    });
}

#[test]
fn a_link_made_during_a_flush_waits_for_the_next() {
    // One unit is flushed while another is written and linked: in the same sector of the same table, in the same entry, or in
    // a new table whose L1 entry lies in the same sector. Whenever the power goes, then or in the next flush, the
    // second is never seen without its data, nor with a refcount that is too low.
    for (seed, shape) in (0..200).flat_map(|seed| [(seed, SMALL), (seed, UNITS)]) {
        block_on(async {
            let mut guest = Guest::new(&shape).await;
            let file = guest.files.image.clone();
            if seed % 2 == 0 {
                guest.fill(5, 1).await.unwrap();
                guest.flush().await.unwrap();
            }
            guest.fill(0, 1).await.unwrap();
            file.set_yields(seed, 4);
            let mapper = guest.mapper.clone();
            let unit = if seed % 4 < 2 { 1 } else { 700 };
            let late = async {
                let room = mapper.prepare(unit * shape.unit(), shape.unit(), Room::Data).await.unwrap();
                let sectors = unit * shape.unit() / 512..(unit + 1) * shape.unit() / 512;
                let tags = sectors.flat_map(|sector| sector_of(backing_tag(&shape, sector)));
                file.write(room.at.unwrap(), tags.collect::<Vec<u8>>().into()).await.unwrap();
                room.commit(CommitMode::IfAbsent);
            };
            // No second sync, which would cover the late data by chance.
            let (result, ()) = tokio::join!(mapper.flush(Durability::Linked), late);
            result.unwrap();
            check_crashed(&guest, seed).await;
            file.fail_nth(seed / 4 % 6 + 1, Fault::Eio, Lasts::ForGood);
            let _ = mapper.flush(Durability::Durable).await;
            check_crashed(&guest, seed).await;
        });
    }
}

async fn check_crashed(guest: &Guest, seed: u64) {
    let crashed = guest.files.crash(seed);
    let reopened = Guest::open(crashed.clone(), guest.model.clone()).await.unwrap();
    reopened.check_reads().await;
    assert_eq!(wrong(&crashed.image).await.0, 0, "seed {seed}");
}

#[test]
fn the_marks_are_there_while_clusters_are_allocated() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        let file = guest.files.image.clone();
        assert!(!in_use(&file).await);
        guest.fill(0, 1).await.unwrap();
        assert!(in_use(&file).await);
        let held = guest.mapper.prepare(CLUSTER, CLUSTER, Room::Data).await.unwrap();
        guest.mapper.settle().await.unwrap();
        assert!(in_use(&file).await, "something is in flight");
        drop(held);
        guest.mapper.settle().await.unwrap();
        assert!(!in_use(&file).await);
        assert_eq!(wrong(&file).await, (0, 0));
        guest.fill(2, 1).await.unwrap();
        assert!(in_use(&file).await);
        guest.mapper.close().await.unwrap();
        assert!(!in_use(&file).await);
        assert_eq!(wrong(&file).await, (0, 0));
        guest.check_reads().await;
    });
}

#[test]
fn foreign_autoclear_bits_go_with_the_open_for_writing() {
    block_on(async {
        let files = create(&SMALL).await;
        // All autoclear bits but the one that needs a data file, and one unknown compatible bit.
        files.image.write(88, vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfd].into()).await.unwrap();
        files.image.write(80, vec![0x40].into()).await.unwrap();
        let mut guest = Guest::open(files.clone(), Model::new(SMALL)).await.unwrap();
        let now = files.image.contents();
        assert_eq!(now[88..96], [0x80, 0, 0, 0, 0, 0, 0, 0], "a write in place is not known here");
        guest.fill(0, 1).await.unwrap();
        assert_eq!(files.image.contents()[88..96], [0x80, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(files.image.contents()[80], 0x40, "unknown compatible bits stay");
    });
}

#[test]
fn a_corrupt_image_is_not_written() {
    block_on(async {
        let files = create(&SMALL).await;
        files.image.write(79, vec![2].into()).await.unwrap();
        let refused = Guest::open(files.clone(), Model::new(SMALL)).await.map(drop).unwrap_err();
        assert_eq!(refused.to_string(), "qcow2: Image is corrupt; cannot be opened read/write");
        assert!(qcow2().open(files.image).await.is_ok(), "it can be read");
    });
}

/// The word that the L1 or L2 table at `table` has at `index`.
fn word(file: &SimFile, table: u64, index: u64) -> u64 {
    let at = (table + index * 8) as usize;
    u64::from_be_bytes(file.contents()[at..at + 8].try_into().unwrap())
}

/// Closes an image, and sets the zero flag of its first L2 entry.
async fn with_zero_flag(shape: &Shape) -> (Files, Model) {
    let mut guest = Guest::new(shape).await;
    guest.write(0, 300).await.unwrap();
    guest.mapper.close().await.unwrap();
    let file = guest.files.image.clone();
    let l2 = word(&file, word(&file, 40, 0), 0) & 0x00ff_ffff_ffff_fe00;
    let entry = word(&file, l2, 0) | 1;
    file.write(l2, entry.to_be_bytes().to_vec().into()).await.unwrap();
    (guest.files, guest.model)
}

#[test]
fn a_zero_flag_beside_bitmaps_is_not_heeded() {
    block_on(async {
        let (files, model) = with_zero_flag(&UNITS).await;
        assert_eq!(wrong(&files.image).await, (0, 0));
        let mut guest = Guest::open(files, model).await.unwrap();
        guest.check_reads().await;
        guest.write(1, 3).await.unwrap();
        guest.mapper.close().await.unwrap();
        guest.check_reads().await;
    });
}

#[test]
fn a_zero_flag_in_version_2_is_told_and_mended() {
    block_on(async {
        let (files, model) = with_zero_flag(&Shape { version: 2, ..SMALL }).await;
        assert_eq!(wrong(&files.image).await, (1, 0));
        let storage: Arc<dyn Storage> = files.image.clone();
        let report = qcow2().repair(&storage, Repair::All).await.unwrap();
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
        Guest::open(files, model).await.unwrap().check_reads().await;
    });
}

/// An image that a repair had left so would have become a file of gigabytes, most of them a hole, with the first write.
#[test]
fn a_refcount_block_that_counts_nothing_does_not_move_the_end() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        guest.write(0, 8).await.unwrap();
        guest.mapper.close().await.unwrap();
        let file = guest.files.image.clone();
        let end = file.len().next_multiple_of(CLUSTER);
        let refcounts = word(&file, 48, 0);
        let block = word(&file, refcounts, 0);
        file.set_len(end + CLUSTER).await.unwrap();
        file.write(block + end / CLUSTER * 2, vec![0, 1].into()).await.unwrap();
        file.write(refcounts + CLUSTER - 8, end.to_be_bytes().to_vec().into()).await.unwrap();
        assert_eq!(wrong(&file).await, (0, 0));
        let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
        guest.write(100, 8).await.unwrap();
        guest.mapper.close().await.unwrap();
        assert!(file.len() < 1 << 20, "{}", file.len());
        assert_eq!(wrong(&file).await, (0, 0));
        guest.check_reads().await;
    });
}

/// Refcounts that say of everything, tables too, that it is free: guest data would be written over.
#[test]
fn what_refcounts_wrongly_call_free_is_not_handed_out() {
    for table in [false, true] {
        block_on(async {
            let mut guest = Guest::new(&SMALL).await;
            guest.fill(0, 8).await.unwrap();
            guest.mapper.close().await.unwrap();
            let file = guest.files.image.clone();
            let refcounts = word(&file, 48, 0);
            let (at, len) = if table { (refcounts, 8) } else { (word(&file, refcounts, 0), 4096) };
            file.write(at, vec![0; len].into()).await.unwrap();
            let before = file.contents();
            let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
            let mut refused = false;
            for unit in 8..200 {
                refused |= guest.fill(unit, 1).await.is_err();
                tokio::task::yield_now().await;
            }
            assert!(refused, "table {table}");
            assert_eq!(file.contents()[79] & 2, 2, "table {table}: it is marked");
            let l1 = word(&file, 40, 0);
            let l2 = word(&file, l1, 0) & 0x00ff_ffff_ffff_fe00;
            for unit in 0..8 {
                let data = (word(&file, l2 + unit * 8, 0) & 0x00ff_ffff_ffff_fe00) as usize;
                let (now, then) = (&file.contents()[data..data + 4096], &before[data..data + 4096]);
                assert!(now == then, "table {table}: unit {unit} is what it was");
            }
        });
    }
}

/// QEMU takes what is cut off for zeros, and so does a check: an image that both call clean was an I/O error to read, and was marked corrupt.
#[test]
fn a_table_or_a_refcount_block_that_the_end_of_the_file_cuts_goes_on_as_zeros() {
    for block in [false, true] {
        block_on(async {
            let mut guest = Guest::new(&SMALL).await;
            if block {
                guest.fill(0, 8).await.unwrap();
            } else {
                guest.zero(0, 8).await.unwrap();
            }
            guest.mapper.close().await.unwrap();
            guest.model.flushed();
            let file = guest.files.image.clone();
            let end = file.len().next_multiple_of(CLUSTER);
            if block {
                // It counts 2048 clusters in its 4096 bytes, of which few are there.
                let table = word(&file, 48, 0);
                let old = word(&file, table, 0);
                let bytes = file.contents()[old as usize..][..4096].to_vec();
                file.set_len(end).await.unwrap();
                file.write(end, bytes.into()).await.unwrap();
                file.write(end + end / CLUSTER * 2, vec![0, 1].into()).await.unwrap();
                file.write(end + old / CLUSTER * 2, vec![0, 0].into()).await.unwrap();
                file.write(table, end.to_be_bytes().to_vec().into()).await.unwrap();
                file.set_len(end + 2048).await.unwrap();
            } else {
                assert_eq!(
                    word(&file, word(&file, 40, 0), 0) & !COPIED,
                    end - CLUSTER,
                    "the table comes last"
                );
                file.set_len(end - 2048).await.unwrap();
            }
            assert_eq!(wrong(&file).await, (0, 0), "block {block}");
            let reader = qcow2().open(file.clone()).await.unwrap();
            let found = read_all(reader.as_ref(), &guest.files, &SMALL).await.unwrap();
            assert!(found.iter().zip(&guest.model.allowed).all(|(tag, allowed)| allowed.contains(tag)));
            let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
            guest.check_reads().await;
            guest.fill(300, 8).await.unwrap();
            guest.write(0, 64).await.unwrap();
            guest.flush().await.unwrap();
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&file).await, (0, 0), "block {block}");
            let guest = Guest::open(guest.files, guest.model).await.unwrap();
            guest.check_reads().await;
        });
    }
}

/// A flush that meets it fails for good; the file grew, with holes of gigabytes, past what the entry counts.
#[test]
fn a_refcount_table_entry_that_names_no_block_marks_the_image_corrupt() {
    for (what, raw) in [("unaligned", 0x1_0200_u64), ("past the end", 0x7000_0000), ("reserved bits", 0x2001)]
    {
        block_on(async {
            let mut guest = Guest::new(&SMALL).await;
            guest.fill(0, 8).await.unwrap();
            guest.mapper.close().await.unwrap();
            guest.model.flushed();
            let file = guest.files.image.clone();
            file.write(word(&file, 48, 0), raw.to_be_bytes().to_vec().into()).await.unwrap();
            let before = file.contents();
            let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
            guest.check_reads().await;
            assert_eq!(file.contents(), before, "{what}: who reads changes nothing");
            for unit in [20, 21, 200] {
                let error = guest.fill(unit, 1).await.unwrap_err();
                assert!(matches!(error, FormatError::Corrupt { .. }), "{what}: {error}");
            }
            assert_eq!(file.contents()[79] & 2, 2, "{what}: it is marked");
            assert_eq!(file.len(), before.len() as u64, "{what}: it did not grow");
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            let storage: Arc<dyn Storage> = file.clone();
            let report = qcow2().repair(&storage, Repair::All).await.unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}");
            let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
            guest.fill(20, 8).await.unwrap();
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&file).await, (0, 0), "{what}");
        });
    }
}

#[test]
fn an_entry_far_past_the_end_that_names_no_block_is_met_when_the_file_grows_to_there() {
    const TINY: Shape = Shape { cluster_bits: 9, refcount_bits: 64, size: 1 << 20, ..SMALL };
    // Clusters, and the bytes of the file that a block counts.
    const SPAN: u64 = 64 * 512;
    block_on(async {
        let mut guest = Guest::new(&TINY).await;
        guest.fill(0, 8).await.unwrap();
        guest.mapper.close().await.unwrap();
        let file = guest.files.image.clone();
        file.write(word(&file, 48, 0) + 8 * 9, 0x7000_0000_u64.to_be_bytes().to_vec().into()).await.unwrap();
        let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
        let mut filled = 8;
        while guest.fill(filled, 1).await.is_ok() {
            filled += 1;
        }
        assert!(filled > 400 && filled < 9 * 64, "{filled}");
        guest.check_reads().await;
        assert_eq!(file.contents()[79] & 2, 2);
        guest.flush().await.unwrap();
        // What was filled before is whole.
        let before = check(&file).await;
        assert_eq!((before.corruptions, before.check_errors), (1, 0), "{before:?}");
        guest.mapper.close().await.unwrap();
        assert!(file.len() <= 9 * SPAN, "{}", file.len());
        let storage: Arc<dyn Storage> = file.clone();
        let report = qcow2().repair(&storage, Repair::All).await.unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        Guest::open(guest.files, guest.model).await.unwrap().check_reads().await;
    });
}

#[test]
fn corruption_met_by_an_image_open_for_writing_is_marked() {
    /// What an entry is made to be, from the offsets of L1 table, refcount table and its own table.
    type Make = fn(u64, u64, u64) -> u64;
    let broken: [(&str, Make); 8] = [
        ("unaligned", |_, _, _| 0x8000_0000_0001_0200),
        ("behind the end", |_, _, _| 0x8000_0000_7000_0000),
        ("the L1 table", |l1, _, _| 1 << 63 | l1),
        ("the refcount table", |_, refcounts, _| 1 << 63 | refcounts),
        ("a refcount block", |_, refcounts, _| 1 << 63 | (refcounts + 4096)),
        ("an L2 table", |_, _, l2| 1 << 63 | l2),
        ("reserved bits", |_, _, _| 0x8100_0000_0001_0000),
        ("the header, compressed", |_, _, _| 1 << 62 | 0x100),
    ];
    for (what, make) in broken {
        block_on(async {
            let mut guest = Guest::new(&SMALL).await;
            guest.fill(0, 4).await.unwrap();
            guest.mapper.close().await.unwrap();
            let file = guest.files.image.clone();
            let (l1, refcounts) = (word(&file, 40, 0), word(&file, 48, 0));
            let l2 = word(&file, l1, 0) & 0x00ff_ffff_ffff_fe00;
            file.write(l2 + 8, make(l1, refcounts, l2).to_be_bytes().to_vec().into()).await.unwrap();
            let before = file.contents();
            let guest = Guest::open(guest.files, guest.model).await.unwrap();
            assert!(guest.mapper.lookup(0, 1).await.is_ok(), "{what}");
            assert_eq!(file.contents(), before, "{what}: what is right changes nothing");
            // Room, or a place to read or to write in place.
            let error = guest.mapper.prepare(CLUSTER, CLUSTER, Room::Data).await.map(drop).unwrap_err();
            assert!(matches!(error, FormatError::Corrupt { .. }), "{what}: {error}");
            assert_eq!(file.contents()[79] & 2, 2, "{what}");
            file.write(0, before[..4096].to_vec().into()).await.unwrap();
            let guest = Guest::open(guest.files, guest.model).await.unwrap();
            assert!(guest.mapper.lookup_now(CLUSTER, 1).is_none(), "{what}: it is to wait for the mark");
            let error = guest.mapper.lookup(CLUSTER, 1).await.unwrap_err();
            assert!(matches!(error, FormatError::Corrupt { .. }), "{what}: {error}");
            assert_eq!(file.contents()[79] & 2, 2, "{what}");
            assert!(guest.mapper.lookup(0, 1).await.is_ok(), "{what}");
            let error = guest.mapper.prepare(9 * CLUSTER, CLUSTER, Room::Data).await.map(drop).unwrap_err();
            assert!(matches!(error, FormatError::Corrupt { .. }), "{what}: {error}");
        });
    }
}

#[test]
fn many_tasks_at_once() {
    for shape in [SMALL, UNITS] {
        for seed in 0..12 {
            block_on(async {
                let guest = Guest::new(&shape).await;
                let file = guest.files.image.clone();
                file.set_yields(seed, 3);
                file.set_now_calls(NowCalls::Random(seed));
                let mapper = guest.mapper.clone();
                let unit = shape.unit();
                // Units of thirty neighbourhoods are filled side by side.
                let mut tasks = Vec::new();
                for task in 0..90_u64 {
                    let (mapper, file) = (mapper.clone(), file.clone());
                    tasks.push(async move {
                        let number = task % 30 * 40 + task / 30;
                        let room = mapper.prepare(number * unit, unit, Room::Data).await.unwrap();
                        let sectors = number * unit / 512..(number + 1) * unit / 512;
                        let tags = sectors.flat_map(|sector| sector_of(backing_tag(&shape, sector)));
                        file.write(room.at.unwrap(), tags.collect::<Vec<u8>>().into()).await.unwrap();
                        assert_eq!(room.commit(CommitMode::IfAbsent), unit);
                        if task % 7 == 0 {
                            mapper.flush(Durability::Durable).await.unwrap();
                        }
                        let extent = mapper.lookup(number * unit, 1).await.unwrap();
                        assert!(matches!(extent.mapping, Mapping::Data(_)));
                    });
                }
                join_all(tasks).await;
                guest.check_reads().await;
                guest.mapper.close().await.unwrap();
                assert_eq!(wrong(&file).await, (0, 0), "{shape:?} seed {seed}");
                guest.check_reads().await;
            });
        }
    }
}

async fn join_all<F: Future<Output = ()>>(tasks: Vec<F>) {
    let mut tasks: Vec<_> = tasks.into_iter().map(|task| Some(Box::pin(task))).collect();
    std::future::poll_fn(|cx| {
        for place in &mut tasks {
            if place.as_mut().is_some_and(|task| task.as_mut().poll(cx).is_ready()) {
                *place = None;
            }
        }
        if tasks.iter().all(Option::is_none) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[test]
fn entries_of_two_words_are_seen_whole_by_other_threads() {
    // Units go from zero to data, to zero, to a new place: a reader who saw the words of two moments would see data in no
    // place, or a place without data.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        let files = create(&Shape { backing: false, ..UNITS }).await;
        let mapper = qcow2().open_writable(files.image.clone(), None, TokioRuntime::current()).await.unwrap();
        let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let mut readers = Vec::new();
        for _ in 0..2 {
            let (mapper, done) = (mapper.clone(), done.clone());
            readers.push(tokio::spawn(async move {
                let mut seen = [0_u64; 3];
                while !done.load(std::sync::atomic::Ordering::Acquire) {
                    for _ in 0..1000 {
                        let Some(extent) = mapper.lookup_now(0, 1 << 20) else { continue };
                        let extent = extent.unwrap();
                        match extent.mapping {
                            Mapping::Absent => seen[0] += 1,
                            Mapping::Zero => seen[1] += 1,
                            Mapping::Data(at) => {
                                assert!(at.is_multiple_of(16384) && at > 0, "{at}");
                                assert!(extent.len >= 16384, "{}", extent.len);
                                seen[2] += 1;
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    tokio::task::yield_now().await;
                }
                seen
            }));
        }
        for step in 0..3000 {
            let room = mapper.prepare(0, 16384, Room::Data).await.unwrap();
            assert_eq!(room.commit(CommitMode::Overwrite), 16384);
            let room = mapper.prepare(0, 16384, Room::Zero).await.unwrap();
            room.commit(CommitMode::Overwrite);
            if step % 10 == 0 {
                mapper.flush(Durability::Durable).await.unwrap();
                mapper.take_unlinked().unwrap().reuse();
            }
        }
        done.store(true, std::sync::atomic::Ordering::Release);
        for reader in readers {
            let seen = reader.await.unwrap();
            assert!(seen[1] + seen[2] > 0, "{seen:?}");
        }
        mapper.close().await.unwrap();
        assert_eq!(wrong(&files.image).await, (0, 0));
    });
}

#[test]
fn slices_are_lost_and_read_again_under_many_threads() {
    // Slices that share their place in the cache, more than fit there, and that threads share: a stale copy of one would
    // lose a link.
    let shape = Shape { size: 128 << 30, backing: false, ..SMALL };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        let files = create(&shape).await;
        let mapper = qcow2().open_writable(files.image.clone(), None, TokioRuntime::current()).await.unwrap();
        let mut tasks = Vec::new();
        for thread in 0..4_u64 {
            let mapper = mapper.clone();
            tasks.push(tokio::spawn(async move {
                let mut rng = rng(thread);
                let mut mine = Vec::new();
                for step in 0..4000_u64 {
                    // Every thread has a cluster of its own in each slice.
                    let slice = rng.random_range(0..32) * 2048 + rng.random_range(0..4);
                    let guest = (slice * 512 + thread * 3 + rng.random_range(0..3)) * CLUSTER;
                    let extent = mapper.lookup(guest, CLUSTER).await.unwrap();
                    if extent.mapping == Mapping::Absent {
                        let room = mapper.prepare(guest, CLUSTER, Room::Data).await.unwrap();
                        let at = room.at.unwrap();
                        assert_eq!(room.commit(CommitMode::Overwrite), CLUSTER);
                        mine.push((guest, at));
                    }
                    for _ in 0..3 {
                        let other = rng.random_range(0..32) * 2048 + rng.random_range(0..4);
                        let _ = mapper.lookup_now(other * 512 * CLUSTER, 1);
                    }
                    if let Some(&(guest, at)) = mine.get(rng.random_range(0..=mine.len())) {
                        let found = match mapper.lookup_now(guest, 1) {
                            Some(found) => found.unwrap(),
                            None => mapper.lookup(guest, 1).await.unwrap(),
                        };
                        assert_eq!(found.mapping, Mapping::Data(at));
                    }
                    match step % 500 {
                        100 => mapper.flush(Durability::Linked).await.unwrap(),
                        400 => mapper.flush(Durability::Durable).await.unwrap(),
                        _ => {}
                    }
                }
                mine
            }));
        }
        let mut all = Vec::new();
        for task in tasks {
            all.extend(task.await.unwrap());
        }
        mapper.close().await.unwrap();
        let reader = qcow2().open(files.image.clone()).await.unwrap();
        for &(guest, at) in &all {
            assert_eq!(reader.lookup(guest, 1).await.unwrap().mapping, Mapping::Data(at));
        }
        let report = check(&files.image).await;
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        assert_eq!(report.allocated_clusters, all.len() as u64);
    });
}

#[test]
fn every_size_of_clusters_and_refcounts_works() {
    for (cluster_bits, refcount_bits) in
        (9..=21).flat_map(|bits| [(bits, 16), (bits, [1, 2, 4, 8, 32, 64][bits as usize % 6])])
    {
        let cluster = 1_u64 << cluster_bits;
        let shape = Shape { cluster_bits, refcount_bits, size: cluster * 3 + 512, ..SMALL };
        block_on(async {
            let files = create(&shape).await;
            let mapper =
                qcow2().open_writable(files.image.clone(), None, TokioRuntime::current()).await.unwrap();
            let room = mapper.prepare(cluster, cluster * 2, Room::Data).await.unwrap();
            assert_eq!(room.len, cluster * 2);
            files.image.write(room.at.unwrap(), vec![1; 512].into()).await.unwrap();
            room.commit(CommitMode::IfAbsent);
            let zero = mapper.prepare(cluster * 3, cluster, Room::Zero).await.unwrap();
            zero.commit(CommitMode::Overwrite);
            mapper.close().await.unwrap();
            let report = check(&files.image).await;
            let found = (report.corruptions, report.leaks, report.allocated_clusters);
            assert_eq!(found, (0, 0, 2), "{shape:?}");
            let reader = qcow2().open(files.image.clone()).await.unwrap();
            let data = reader.lookup(cluster, u64::MAX).await.unwrap();
            assert_eq!(data.len, cluster * 2, "{shape:?}");
            let end = reader.lookup(cluster * 3, u64::MAX).await.unwrap();
            assert_eq!(end, Extent { mapping: Mapping::Zero, len: 512 });
        });
    }
}

#[test]
fn a_table_for_every_half_gib() {
    // 16 TiB, every L2 table there: what is read at open and kept does not grow with that.
    let shape = Shape { cluster_bits: 16, size: 16 << 40, backing: false, ..SMALL };
    block_on(async {
        let files = create(&shape).await;
        let file = &files.image;
        let tables = 32768_u64;
        let first = file.len().next_multiple_of(65536);
        let l1: Vec<u8> =
            (0..tables).flat_map(|table| (1 << 63 | (first + table * 65536)).to_be_bytes()).collect();
        let l1_offset = word(file, 40, 0);
        file.write(l1_offset, l1.into()).await.unwrap();
        file.set_len(first + tables * 65536).await.unwrap();
        let ops = file.op_count();
        let mapper = qcow2().open_writable(file.clone(), None, TokioRuntime::current()).await.unwrap();
        // The header, the refcount table, the block that counts the end, the L1 table.
        assert!(file.op_count() - ops <= 5, "{}", file.op_count() - ops);
        let mut rng = rng(9);
        for _ in 0..100_000 {
            let offset = rng.random_range(0..shape.size);
            assert_eq!(mapper.lookup_now(offset, 1).unwrap().unwrap().mapping, Mapping::Absent);
        }
    });
}

#[test]
fn holes_of_earlier_sessions_are_used_again() {
    block_on(async {
        let shape = Shape { cluster_bits: 16, size: 64 << 20, ..SMALL };
        let mut guest = Guest::new(&shape).await;
        guest.fill(0, 400).await.unwrap();
        guest.zero_clusters(0, 300).await.unwrap();
        guest.mapper.close().await.unwrap();
        let len = guest.files.image.len();
        let mut model = guest.model.clone();
        model.flushed();
        let mut guest = Guest::open(guest.files.clone(), model).await.unwrap();
        for unit in 500..800 {
            guest.fill(unit, 1).await.unwrap();
            tokio::task::yield_now().await;
        }
        guest.mapper.close().await.unwrap();
        // The first cluster told that there is need; the next ones went into the holes.
        assert!(guest.files.image.len() <= len + 8 * 65536, "{} {len}", guest.files.image.len());
        guest.check_reads().await;
        assert_eq!(wrong(&guest.files.image).await, (0, 0));
    });
}

#[test]
fn closing_leaves_nothing_after_anything() {
    for seed in 0..12 {
        block_on(async {
            let shape = [SMALL, UNITS, Shape { lazy: true, ..SMALL }][seed as usize % 3];
            let mut rng = rng(seed);
            let mut guest = Guest::new(&shape).await;
            for _ in 0..5 {
                for _ in 0..20 {
                    let op = random_op(&mut rng, &shape);
                    guest.run(&op).await.unwrap();
                }
                guest.mapper.close().await.unwrap();
                assert_eq!(wrong(&guest.files.image).await, (0, 0), "seed {seed}");
                assert!(!in_use(&guest.files.image).await);
                guest.check_reads().await;
            }
        });
    }
}

#[test]
fn a_last_cluster_that_the_file_cuts_off_reads_as_zeros_and_is_written() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        guest.fill(0, 1).await.unwrap();
        guest.mapper.close().await.unwrap();
        let file = guest.files.image.clone();
        let Mapping::Data(at) = guest.mapping(0).await.unwrap() else { panic!("it was filled") };
        assert_eq!(at + CLUSTER, file.len());
        file.set_len(at + 1024).await.unwrap();
        let reader = driver("qcow2").unwrap().open(file.clone()).await.unwrap();
        let data = reader.lookup(0, CLUSTER).await.unwrap();
        assert_eq!(data, Extent { mapping: Mapping::Data(at), len: 1024 });
        let rest = reader.lookup(1024, CLUSTER).await.unwrap();
        assert_eq!(rest, Extent { mapping: Mapping::Zero, len: CLUSTER - 1024 });
        let mut model = Model::new(SMALL);
        (2..8).for_each(|sector| model.write(sector, 0));
        model.flushed();
        let files = Files { image: file.clone(), data: None };
        let mut guest = Guest::open(files, model).await.unwrap();
        guest.write(5, 1).await.unwrap();
        guest.check_reads().await;
        guest.fill(1, 3).await.unwrap();
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&file).await, (0, 0));
    });
}
