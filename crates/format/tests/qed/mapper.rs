//! What callers of the mapper see: extents, reservations, commits, syncs, the mark.

use std::sync::Arc;

use rand::Rng;
use readonce_format::{CommitMode, Durability, Extent, FormatError, Mapper, Mapping, Room};
use readonce_storage::{
    ReadAt, SimFile, Storage,
    sim::{Fault, Lasts, NowCalls},
};

use crate::guest::{Guest, Model, SMALL, Shape, block_on, check, create, qed, random_op, rng, wrong};

const CLUSTER: u64 = 4096;

/// The state of the clusters in `range`, one letter each: `.` absent, `D` data, `Z` zero.
async fn drawn(mapper: &dyn Mapper, clusters: std::ops::Range<u64>) -> String {
    let mut out = String::new();
    for cluster in clusters {
        let extent = mapper.lookup(cluster * CLUSTER, CLUSTER).await.unwrap();
        assert_eq!(extent.len, CLUSTER);
        out.push(match extent.mapping {
            Mapping::Absent => '.',
            Mapping::Zero => 'Z',
            Mapping::Shared(_) | Mapping::Compressed(_) => panic!("QED has neither"),
            Mapping::Data(_) => 'D',
        });
    }
    out
}

async fn dirty(file: &Arc<SimFile>) -> bool {
    let reader: Arc<dyn ReadAt> = file.clone();
    qed().describe(&reader).await.unwrap().dirty
}

#[test]
fn a_fill_changes_only_what_is_absent() {
    block_on(async {
        let (file, mut guest) = Guest::new(&SMALL).await;
        let late = guest.mapper.prepare(0, 6 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!((late.guest, late.len), (0, 6 * CLUSTER));
        guest.write(8, 8).await.unwrap();
        guest.zero(3, 1).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), 0..6).await, ".D.Z..");
        assert_eq!(late.commit(CommitMode::IfAbsent), 4 * CLUSTER);
        assert_eq!(drawn(guest.mapper.as_ref(), 0..6).await, "DDDZDD");
        let zero = guest.mapper.prepare(6 * CLUSTER, 2 * CLUSTER, Room::Zero).await.unwrap();
        assert_eq!(zero.at, None);
        assert_eq!(zero.commit(CommitMode::IfAbsent), 2 * CLUSTER);
        assert_eq!(drawn(guest.mapper.as_ref(), 0..9).await, "DDDZDDZZ.");
        guest.write(24, 8).await.unwrap();
        assert_eq!(drawn(guest.mapper.as_ref(), 0..9).await, "DDDDDDZZ.");
        // The two clusters that the late fill did not link are used again, or are gone at the end.
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&file).await, (0, 0));
        assert_eq!(check(&file).await.allocated_clusters, 6);
    });
}

#[test]
fn a_dropped_reservation_leaves_nothing() {
    block_on(async {
        let (file, guest) = Guest::new(&SMALL).await;
        let before = file.len();
        let first = guest.mapper.prepare(0, 4 * CLUSTER, Room::Data).await.unwrap();
        let at = first.at;
        drop(first);
        let second = guest.mapper.prepare(0, 4 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!(second.at, at, "the room is handed out again");
        drop(second);
        assert_eq!(drawn(guest.mapper.as_ref(), 0..4).await, "....");
        guest.mapper.close().await.unwrap();
        // The empty L2 table stays: it is linked.
        assert_eq!(file.len(), before + CLUSTER);
        assert_eq!(wrong(&file).await, (0, 0));
        assert!(!dirty(&file).await);
    });
}

#[test]
fn extents_merge_what_lies_together() {
    block_on(async {
        let (_file, mut guest) = Guest::new(&SMALL).await;
        let lookup = async |guest: &Guest, offset, len| guest.mapper.lookup(offset, len).await.unwrap();
        let absent = lookup(&guest, 512, u64::MAX).await;
        assert_eq!(absent, Extent { mapping: Mapping::Absent, len: SMALL.size - 512 });
        guest.fill(2, 5).await.unwrap();
        guest.zero(7, 3).await.unwrap();
        let data = lookup(&guest, 2 * CLUSTER + 100, u64::MAX).await;
        let Mapping::Data(at) = data.mapping else { panic!("{data:?}") };
        assert_eq!((at % CLUSTER, data.len), (100, 5 * CLUSTER - 100));
        let zero = lookup(&guest, 8 * CLUSTER, u64::MAX).await;
        assert_eq!(zero, Extent { mapping: Mapping::Zero, len: 2 * CLUSTER });
        let short = lookup(&guest, 8 * CLUSTER, 7).await;
        assert_eq!(short, Extent { mapping: Mapping::Zero, len: 7 });
        let past = guest.mapper.lookup(SMALL.size, 1).await.unwrap_err();
        assert!(matches!(past, FormatError::Invalid(_)), "{past}");
    });
}

#[test]
fn a_run_stops_at_a_table_and_at_the_end() {
    block_on(async {
        let (_file, guest) = Guest::new(&SMALL).await;
        let across = guest.mapper.prepare(510 * CLUSTER, 10 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!(across.len, 2 * CLUSTER);
        let end = SMALL.size.div_ceil(CLUSTER) * CLUSTER;
        let last = guest.mapper.prepare(end - CLUSTER, 4 * CLUSTER, Room::Data).await.unwrap();
        assert_eq!(last.len, CLUSTER);
        assert!(guest.mapper.prepare(end, CLUSTER, Room::Data).await.is_err());
        assert!(guest.mapper.prepare(100, CLUSTER, Room::Data).await.is_err());
        assert!(guest.mapper.prepare(0, 0, Room::Data).await.is_err());
    });
}

#[test]
fn sixty_four_fills_cost_four_syncs_until_closed() {
    let shape = Shape { cluster_size: 65536, table_size: 4, size: 64 << 20, backing: true };
    block_on(async {
        let (file, mut guest) = Guest::new(&shape).await;
        let before = file.sync_count();
        guest.fill(0, 32).await.unwrap();
        guest.mapper.flush(Durability::Linked).await.unwrap();
        guest.fill(100, 32).await.unwrap();
        guest.mapper.flush(Durability::Linked).await.unwrap();
        guest.mapper.close().await.unwrap();
        assert_eq!(file.sync_count() - before, 4);
        assert_eq!(wrong(&file).await, (0, 0));
        assert!(!dirty(&file).await);
    });
}

#[test]
fn syncs_of_a_flush() {
    block_on(async {
        let (file, mut guest) = Guest::new(&SMALL).await;
        let syncs = async |guest: &Guest, durability| {
            let before = file.sync_count();
            guest.mapper.flush(durability).await.unwrap();
            file.sync_count() - before
        };
        assert_eq!(syncs(&guest, Durability::Linked).await, 0);
        assert_eq!(syncs(&guest, Durability::Durable).await, 1, "writes in place are not known here");
        guest.fill(0, 3).await.unwrap();
        assert_eq!(guest.mapper.unlinked_bytes(), 3 * CLUSTER);
        assert_eq!(syncs(&guest, Durability::Durable).await, 2);
        assert_eq!(guest.mapper.unlinked_bytes(), 0);
        guest.fill(3, 3).await.unwrap();
        assert_eq!(syncs(&guest, Durability::Linked).await, 1);
        assert_eq!(syncs(&guest, Durability::Durable).await, 1);
        guest.zero(9, 3).await.unwrap();
        assert_eq!(guest.mapper.unlinked_bytes(), 0);
        assert_eq!(syncs(&guest, Durability::Durable).await, 2);
    });
}

#[test]
fn flushes_share_rounds() {
    block_on(async {
        let (file, mut guest) = Guest::new(&SMALL).await;
        file.set_yields(1, 3);
        guest.fill(0, 3).await.unwrap();
        let before = file.sync_count();
        let flush = || guest.mapper.flush(Durability::Durable);
        let all: Vec<_> = (0..50).map(|_| flush()).collect();
        for result in join_all(all).await {
            result.unwrap();
        }
        // The first began a round for itself, two syncs; the others came while it ran, and shared one of one sync.
        assert_eq!(file.sync_count() - before, 3);

        file.fail_nth(2, Fault::SyncFails, Lasts::Once);
        let all: Vec<_> = (0..5).map(|_| flush()).collect();
        let failed = join_all(all).await.into_iter().filter(Result::is_err).count();
        assert_eq!(failed, 4, "whoever shares a round shares its failure");
    });
}

async fn join_all<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut futures: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        let mut ready = true;
        for (future, result) in &mut futures {
            if result.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *result = Some(value),
                    std::task::Poll::Pending => ready = false,
                }
            }
        }
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    futures.into_iter().map(|(_, result)| result.unwrap()).collect()
}

#[test]
fn a_link_made_during_a_flush_waits_for_the_next() {
    // One cluster is flushed while another is written and linked, in the same sector of the same table, or in a new table
    // whose L1 entry lies in the same sector. Whenever the power goes, then or in the next flush, the second is never
    // seen without its data.
    for seed in 0..400 {
        block_on(async {
            let (file, mut guest) = Guest::new(&SMALL).await;
            if seed % 2 == 0 {
                guest.fill(5, 1).await.unwrap();
                guest.flush().await.unwrap();
            }
            guest.fill(0, 1).await.unwrap();
            file.set_yields(seed, 4);
            let mapper = guest.mapper.clone();
            let cluster = if seed % 4 < 2 { 1 } else { 700 };
            let late = async {
                let room = mapper.prepare(cluster * CLUSTER, CLUSTER, Room::Data).await.unwrap();
                let tags = (cluster * 8..cluster * 8 + 8)
                    .flat_map(|sector| crate::guest::sector_of(crate::guest::backing_tag(&SMALL, sector)));
                file.write(room.at.unwrap(), tags.collect::<Vec<u8>>().into()).await.unwrap();
                room.commit(CommitMode::IfAbsent);
            };
            // No second sync, which would cover the late data by chance.
            let (result, ()) = tokio::join!(mapper.flush(Durability::Linked), late);
            result.unwrap();
            check_crashed(&file, &guest, seed).await;
            file.fail_nth(seed / 4 % 6 + 1, Fault::Eio, Lasts::ForGood);
            let _ = mapper.flush(Durability::Durable).await;
            check_crashed(&file, &guest, seed).await;
        });
    }
}

async fn check_crashed(file: &SimFile, guest: &Guest, seed: u64) {
    let crashed = Arc::new(file.crash(seed));
    let reopened = Guest::open(crashed.clone(), guest.model.clone()).await.unwrap();
    reopened.check_reads().await;
    assert_eq!(wrong(&crashed).await.0, 0, "seed {seed}");
}

#[test]
fn the_mark_is_there_while_clusters_are_allocated() {
    block_on(async {
        let (file, mut guest) = Guest::new(&SMALL).await;
        assert!(!dirty(&file).await);
        guest.fill(0, 1).await.unwrap();
        assert!(dirty(&file).await);
        let held = guest.mapper.prepare(CLUSTER, CLUSTER, Room::Data).await.unwrap();
        guest.mapper.settle().await.unwrap();
        assert!(dirty(&file).await, "something is in flight");
        drop(held);
        guest.mapper.settle().await.unwrap();
        assert!(!dirty(&file).await);
        assert_eq!(wrong(&file).await, (0, 0));
        guest.fill(2, 1).await.unwrap();
        assert!(dirty(&file).await);
        // A hole that only moving a cluster would close: the mark stays while the guest may write in place.
        let hole = guest.mapper.prepare(10 * CLUSTER, CLUSTER, Room::Data).await.unwrap();
        guest.fill(3, 1).await.unwrap();
        drop(hole);
        guest.mapper.settle().await.unwrap();
        assert!(dirty(&file).await);
        guest.mapper.close().await.unwrap();
        assert!(!dirty(&file).await);
        assert_eq!(wrong(&file).await, (0, 0));
        guest.check_reads().await;
    });
}

#[test]
fn what_a_crash_left_is_used_again() {
    block_on(async {
        let (file, mut guest) = Guest::new(&SMALL).await;
        guest.fill(0, 4).await.unwrap();
        guest.flush().await.unwrap();
        guest.fill(8, 32).await.unwrap();
        let crashed = Arc::new(file.crash_with(|_| true));
        let (broken, leaks) = wrong(&crashed).await;
        assert!(broken == 0 && leaks >= 32, "{leaks}");
        let mut model = guest.model.clone();
        model.flushed();
        let mut guest = Guest::open(crashed.clone(), model).await.unwrap();
        guest.mapper.reclaim().await.unwrap();
        while file_end_moves(&crashed, &mut guest).await {
            tokio::task::yield_now().await;
        }
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&crashed).await, (0, 0));
        guest.check_reads().await;
    });
}

/// Whether a new cluster still goes behind the file's end of before.
async fn file_end_moves(file: &Arc<SimFile>, guest: &mut Guest) -> bool {
    let end = file.len();
    let room = guest.mapper.prepare(1000 * CLUSTER, CLUSTER, Room::Data).await.unwrap();
    room.at.unwrap() + CLUSTER > end - (8 << 20)
}

#[test]
fn many_tasks_at_once() {
    for seed in 0..20 {
        block_on(async {
            let (file, guest) = Guest::new(&SMALL).await;
            file.set_yields(seed, 3);
            file.set_now_calls(NowCalls::Random(seed));
            let mapper = guest.mapper.clone();
            // Every cluster is filled by three tasks at once; exactly one of them links it.
            let mut tasks = Vec::new();
            for task in 0..90_u64 {
                let (mapper, file) = (mapper.clone(), file.clone());
                tasks.push(async move {
                    let cluster = task % 30 * 40;
                    let room = mapper.prepare(cluster * CLUSTER, CLUSTER, Room::Data).await.unwrap();
                    let tags = (0..8).flat_map(|sector| {
                        crate::guest::sector_of(crate::guest::backing_tag(&SMALL, cluster * 8 + sector))
                    });
                    file.write(room.at.unwrap(), tags.collect::<Vec<u8>>().into()).await.unwrap();
                    let linked = room.commit(CommitMode::IfAbsent);
                    if task % 7 == 0 {
                        mapper.flush(Durability::Durable).await.unwrap();
                    }
                    let extent = mapper.lookup(cluster * CLUSTER, 1).await.unwrap();
                    assert!(matches!(extent.mapping, Mapping::Data(_)));
                    linked
                });
            }
            let linked: u64 = join_all(tasks).await.into_iter().sum();
            assert_eq!(linked, 30 * CLUSTER);
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&file).await, (0, 0), "seed {seed}");
            assert_eq!(check(&file).await.allocated_clusters, 30);
            guest.check_reads().await;
        });
    }
}

#[test]
fn every_legal_shape_works() {
    for cluster_bits in 12..=26 {
        for table_size in [1, 2, 4, 8, 16] {
            let cluster_size = 1 << cluster_bits;
            // A check reads whole tables, up to 1 GiB: the largest are left to the other tests.
            if cluster_size * table_size > 8 << 20 {
                continue;
            }
            let shape = Shape { cluster_size, table_size, size: cluster_size * 3 + 512, backing: true };
            block_on(async {
                let file = create(&shape).await;
                let mapper = qed()
                    .open_writable(file.clone(), None, readonce_storage::TokioRuntime::current())
                    .await
                    .unwrap();
                let room = mapper.prepare(cluster_size, cluster_size * 2, Room::Data).await.unwrap();
                assert_eq!(room.len, cluster_size * 2);
                file.write(room.at.unwrap(), vec![1; 512].into()).await.unwrap();
                room.commit(CommitMode::IfAbsent);
                mapper
                    .prepare(cluster_size * 3, cluster_size, Room::Zero)
                    .await
                    .unwrap()
                    .commit(CommitMode::Overwrite);
                mapper.close().await.unwrap();
                let report = check(&file).await;
                assert_eq!(
                    (report.corruptions, report.leaks, report.allocated_clusters),
                    (0, 0, 2),
                    "{shape:?}"
                );
                let reader = qed().open(file.clone()).await.unwrap();
                let data = reader.lookup(cluster_size, u64::MAX).await.unwrap();
                assert_eq!(data.len, cluster_size * 2, "{shape:?}");
                let end = reader.lookup(cluster_size * 3, u64::MAX).await.unwrap();
                assert_eq!(end, Extent { mapping: Mapping::Zero, len: 512 });
            });
        }
    }
}

#[test]
fn the_largest_image_costs_no_memory() {
    let shape = Shape { cluster_size: 65536, table_size: 4, size: 16 << 40, backing: false };
    block_on(async {
        let file = create(&shape).await;
        let mapper =
            qed().open_writable(file.clone(), None, readonce_storage::TokioRuntime::current()).await.unwrap();
        let mut rng = rng(5);
        for _ in 0..300 {
            let cluster = rng.random_range(0..shape.size / 65536);
            let room = mapper.prepare(cluster * 65536, 65536, Room::Data).await.unwrap();
            room.commit(CommitMode::IfAbsent);
        }
        let last = mapper.prepare(shape.size - 65536, 65536, Room::Data).await.unwrap();
        last.commit(CommitMode::IfAbsent);
        mapper.close().await.unwrap();
        assert_eq!(wrong(&file).await, (0, 0));
        // No data was written: the tables' sectors are all that is in memory.
        assert!(file.resident_bytes() < 16 << 20, "{}", file.resident_bytes());
        let ops = file.op_count();
        let reader = qed().open(file.clone()).await.unwrap();
        assert!(file.op_count() - ops <= 2, "opening reads the header only");
        assert!(matches!(reader.lookup(shape.size - 1, 1).await.unwrap().mapping, Mapping::Data(_)));
    });
}

#[test]
fn foreign_autoclear_bits_go_with_the_first_change() {
    block_on(async {
        let file = create(&SMALL).await;
        file.write(32, vec![0xff; 8].into()).await.unwrap();
        file.write(24, vec![0xff; 8].into()).await.unwrap();
        let mut guest = Guest::open(file.clone(), Model::new(SMALL)).await.unwrap();
        assert_eq!(file.contents()[32..40], [0xff; 8], "opening changes nothing");
        guest.fill(0, 1).await.unwrap();
        assert_eq!(file.contents()[32..40], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(file.contents()[24..32], [0xff; 8], "unknown compatible bits stay");
    });
}

#[test]
fn closing_finds_every_place_after_anything() {
    for seed in 0..30 {
        block_on(async {
            let shape = Shape { table_size: [1, 2, 4][seed as usize % 3], ..SMALL };
            let mut rng = rng(seed);
            let (file, mut guest) = Guest::new(&shape).await;
            for _ in 0..5 {
                for _ in 0..20 {
                    let op = random_op(&mut rng, &shape);
                    guest.run(&op).await.unwrap();
                }
                guest.mapper.close().await.unwrap();
                assert_eq!(wrong(&file).await, (0, 0), "seed {seed}");
                assert!(!dirty(&file).await);
                guest.check_reads().await;
            }
        });
    }
}

#[test]
fn slices_are_lost_and_read_again_under_many_threads() {
    // Slices that share their place in the cache, more than fit there, and that threads share: a stale copy of one would
    // lose a link.
    let shape = Shape { cluster_size: 4096, table_size: 16, size: 128 << 30, backing: false };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        let file = create(&shape).await;
        let mapper =
            qed().open_writable(file.clone(), None, readonce_storage::TokioRuntime::current()).await.unwrap();
        let mut tasks = Vec::new();
        for thread in 0..4_u64 {
            let mapper = mapper.clone();
            tasks.push(tokio::spawn(async move {
                let mut rng = rng(thread);
                let mut mine = Vec::new();
                for step in 0..6000_u64 {
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
        let reader = qed().open(file.clone()).await.unwrap();
        for &(guest, at) in &all {
            assert_eq!(reader.lookup(guest, 1).await.unwrap().mapping, Mapping::Data(at));
        }
        let report = check(&file).await;
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        assert_eq!(report.allocated_clusters, all.len() as u64);
    });
}

#[test]
fn a_table_for_every_two_gib() {
    // 16 TiB, every L2 table there: what is read at open and kept does not grow with that.
    let shape = Shape { cluster_size: 65536, table_size: 4, size: 16 << 40, backing: false };
    block_on(async {
        let file = create(&shape).await;
        let tables = 8192_u64;
        let first = file.len();
        let l1: Vec<u8> = (0..tables).flat_map(|table| (first + table * 262144).to_le_bytes()).collect();
        file.write(65536, l1.into()).await.unwrap();
        file.set_len(first + tables * 262144).await.unwrap();
        // As another program makes it: its file did not grow behind our back.
        file.write(32, vec![0; 8].into()).await.unwrap();
        let ops = file.op_count();
        let mapper =
            qed().open_writable(file.clone(), None, readonce_storage::TokioRuntime::current()).await.unwrap();
        // The header, and the part of the L1 table that the guest's size uses, by slices.
        assert_eq!(file.op_count() - ops, 1 + tables / 512);
        let mut rng = rng(9);
        let lookups = std::env::var("READONCE_LOOKUPS").map_or(100_000, |count| count.parse().unwrap());
        for _ in 0..lookups {
            let offset = rng.random_range(0..shape.size);
            assert_eq!(mapper.lookup_now(offset, 1).unwrap().unwrap().mapping, Mapping::Absent);
        }
    });
}
