//! Power loss: after every operation, and at every I/O.

use std::sync::Arc;

use rand::Rng;
use readonce_format::{Durability, FormatError, Mapping, Room, driver::Repair};
use readonce_storage::{
    ReadAt, SimFile, Storage,
    sim::{Fault, Lasts},
};

use crate::{
    guest::{
        DataIn, Files, Guest, Model, Op, SMALL, Shape, UNITS, block_on, check, create, qcow2, random_op,
        read_all, rng, wrong,
    },
    qemu::Folder,
};

/// The image after a power loss: nothing broken, every sector as it may be, and usable.
async fn survives(crashed: Files, model: &Model, context: &str) {
    let lazy = model.shape.lazy;
    // A check does not look past the end of the file, where refcounts may be that a crash left.
    let mut longer = crashed.image.contents();
    longer.resize(longer.len() + (1 << 20), 0);
    let report = check(&Arc::new(SimFile::from_bytes(&longer))).await;
    // With lazy refcounts a crash leaves refcounts that are too low, and a bit that says so.
    assert!(lazy || report.corruptions == 0, "{report:?} {context}");
    assert_eq!(report.check_errors, 0, "{context}");
    let found = reads_as_it_may(&crashed, model, context).await;
    let mut model = model.clone();
    model.settle(&found);
    let mut guest = Guest::open(crashed.clone(), model).await.unwrap();
    guest.next_tag = 0x0100_0000;
    guest.mapper.reclaim().await.unwrap();
    guest.write(3, 30).await.unwrap();
    guest.fill(20, 40).await.unwrap();
    guest.check_reads().await;
    for _ in 0..1000 {
        // Long enough for the scan, but for those that end early.
        tokio::task::yield_now().await;
    }
    guest.fill(100, 10).await.unwrap();
    guest.mapper.close().await.unwrap();
    let (broken, leaks) = wrong(&crashed.image).await;
    assert_eq!(broken, 0, "{context}");
    // A refcount that a crash left too high beside a snapshot's reference stays for a check.
    let leaks_before_use = if guest.model.shared { report.leaks } else { 0 };
    assert!(leaks <= leaks_before_use, "{leaks} leaks after a clean close; {context}");
    let again = Guest::open(crashed, guest.model.clone()).await.unwrap();
    again.check_reads().await;
}

fn run(seed: u64, shape: Shape) {
    let folder = Folder::new(shape);
    let files = block_on(create(&shape));
    run_on(seed, &folder, files, Model::new(shape));
}

fn run_on(seed: u64, folder: &Folder, files: Files, model: Model) {
    let shape = model.shape;
    block_on(async {
        let mut rng = rng(seed);
        let mut guest = Guest::open(files, model).await.unwrap();
        for step in 0..60 {
            let op = random_op(&mut rng, &shape);
            guest.run(&op).await.unwrap();
            if step % 4 == 0 {
                let crashed = guest.files.crash(seed * 1000 + step);
                let context = format!("{shape:?} seed {seed} step {step} after {op:?}");
                if step % 20 == 0 && !shape.lazy {
                    folder.save(&crashed);
                    folder.is_whole(&context);
                }
                survives(crashed, &guest.model, &context).await;
            }
        }
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        guest.model.flushed();
        assert_eq!(wrong(&guest.files.image).await, (0, 0), "seed {seed}");
        folder.save(&guest.files);
        survives(guest.files.crash(seed), &guest.model, &format!("seed {seed} closed")).await;
    });
}

/// Small clusters: the refcount table of one cluster must grow, blocks are made all the time.
const TINY: Shape = Shape { cluster_bits: 9, refcount_bits: 64, size: (1 << 20) + 1536, ..SMALL };

fn shapes() -> [Shape; 7] {
    [
        SMALL,
        UNITS,
        TINY,
        Shape { version: 2, backing: false, ..SMALL },
        Shape { lazy: true, backing: false, ..SMALL },
        Shape { data: DataIn::File, ..SMALL },
        Shape { refcount_bits: 1, ..UNITS },
    ]
}

#[test]
fn power_loss_after_any_operation() {
    for shape in shapes() {
        for seed in 0..4 {
            run(seed, shape);
        }
    }
}

#[test]
fn power_loss_with_compressed_clusters_and_a_snapshot() {
    for (seed, shape) in (0..4).flat_map(|seed| [(seed, SMALL), (seed, UNITS)]) {
        let shape = Shape { size: (3 << 20) + 1536, ..shape };
        let folder = Folder::new(shape);
        let options = format!("cluster_size={},extended_l2={}", shape.cluster_size(), shape.extended_l2);
        folder.convert(&options);
        folder.ok("qemu-img", &["snapshot", "-c", "first", "image.qcow2"]);
        folder.qemu_io(&["write -P 7 0 100k".into(), "write -z 1M 300k".into()]);
        folder.ok("qemu-img", &["snapshot", "-c", "second", "image.qcow2"]);
        let mut model = Model::new(shape);
        (0..200).for_each(|sector| model.write(sector, 0x0707_0707));
        (2048..2648).for_each(|sector| model.write(sector, 0));
        model.flushed();
        model.shape.backing = false;
        model.shared = true;
        run_on(seed, &folder, folder.load(), model);
        folder.ok("qemu-img", &["snapshot", "-a", "first", "image.qcow2"]);
        folder.reads(&Model::new(shape), "the first snapshot");
    }
}

/// A refcount on the disk without the mark that tells of it is a leak that nobody looks for: each such power loss would leave a group of
/// fills behind.
#[test]
fn no_refcount_is_on_the_disk_before_the_mark() {
    for shape in [SMALL, Shape { version: 2, backing: false, ..SMALL }] {
        // The sync of the first round, and all after it, does not come back.
        for n in 1.. {
            let more = block_on(async {
                let mut guest = Guest::new(&shape).await;
                guest.fill(0, 3).await.unwrap();
                guest.mapper.close().await.unwrap();
                Storage::sync(guest.files.image.as_ref()).await.unwrap();
                guest.model.flushed();
                guest.files.image.fail_nth(n, Fault::Eio, Lasts::ForGood);
                let failed = guest.fill(7, 30).await.is_err() || guest.flush().await.is_err();
                for seed in 0..8 {
                    survives(guest.files.crash(seed), &guest.model, &format!("n {n} seed {seed}")).await;
                }
                failed
            });
            if !more {
                break;
            }
        }
    }
}

#[test]
fn power_loss_at_any_io() {
    for (seed, shape) in (0..).zip([SMALL, UNITS, TINY, Shape { lazy: true, ..SMALL }]) {
        // The n-th I/O and all after it fail, then the power goes.
        for n in 1.. {
            let more = block_on(async {
                let mut rng = rng(seed);
                let mut guest = Guest::new(&shape).await;
                guest.files.image.fail_nth(n, Fault::Eio, Lasts::ForGood);
                let mut failed = false;
                for _ in 0..40 {
                    let op = random_op(&mut rng, &shape);
                    if guest.run(&op).await.is_err() {
                        failed = true;
                        break;
                    }
                }
                if !failed {
                    failed = guest.mapper.close().await.is_err();
                }
                survives(guest.files.crash(n), &guest.model, &format!("seed {seed} n {n}")).await;
                failed || guest.files.image.fault_hits() > 0
            });
            if !more {
                break;
            }
        }
    }
}

/// A mark that a crash tears, or that is there before what it tells of, would cost the image: it is damaged already.
#[test]
fn power_loss_while_an_image_is_marked_corrupt() {
    for damage in [Damage::Table, Damage::Block, Damage::NoBlock] {
        for n in 1.. {
            let more = block_on(async {
                let mut guest = Guest::new(&SMALL).await;
                guest.fill(0, 8).await.unwrap();
                guest.mapper.close().await.unwrap();
                let file = guest.files.image.clone();
                damage.make(&file).await;
                file.sync().await.unwrap();
                guest.model.flushed();
                let mut guest = Guest::open(guest.files, guest.model).await.unwrap();
                file.fail_nth(n, Fault::Eio, Lasts::ForGood);
                for unit in 8..24 {
                    let _refused = guest.fill(unit, 1).await;
                    tokio::task::yield_now().await;
                }
                let _failed = guest.flush().await;
                let _failed = guest.mapper.close().await;
                for seed in 0..4 {
                    let context = format!("{damage:?} n {n} seed {seed}");
                    let crashed = guest.files.crash(seed);
                    reads_as_it_may(&crashed, &guest.model, &context).await;
                    let storage: Arc<dyn Storage> = crashed.image.clone();
                    let report = qcow2().repair(&storage, Repair::All).await.unwrap();
                    assert_eq!(
                        (report.corruptions, report.leaks, report.check_errors),
                        (0, 0, 0),
                        "{context}"
                    );
                    let found = reads_as_it_may(&crashed, &guest.model, &context).await;
                    let mut model = guest.model.clone();
                    model.settle(&found);
                    let mut guest = Guest::open(crashed, model).await.unwrap();
                    guest.fill(30, 20).await.unwrap();
                    guest.mapper.close().await.unwrap();
                    assert_eq!(wrong(&guest.files.image).await, (0, 0), "{context}");
                }
                file.fault_hits() > 0
            });
            if !more {
                break;
            }
        }
    }
}

/// What is broken of the refcounts.
#[derive(Debug, Clone, Copy)]
enum Damage {
    /// The table names no block.
    Table,
    /// The block says that everything is free.
    Block,
    /// The table names a block that is none.
    NoBlock,
}

impl Damage {
    async fn make(self, file: &Arc<SimFile>) {
        let word = |at: u64| u64::from_be_bytes(file.contents()[at as usize..][..8].try_into().unwrap());
        let table = word(48);
        let (at, bytes) = match self {
            Self::Table => (table, vec![0; 8]),
            Self::Block => (word(table), vec![0; 4096]),
            Self::NoBlock => (table, 0x1_0200_u64.to_be_bytes().to_vec()),
        };
        file.write(at, bytes.into()).await.unwrap();
    }
}

/// Every sector of the crashed image is as it may be.
async fn reads_as_it_may(crashed: &Files, model: &Model, context: &str) -> Vec<u32> {
    let mapper = qcow2().open(crashed.image.clone()).await.unwrap();
    let found = read_all(mapper.as_ref(), crashed, &model.shape).await.unwrap();
    for (sector, (found, allowed)) in found.iter().zip(&model.allowed).enumerate() {
        assert!(allowed.contains(found), "sector {sector} is {found:#x}, may be {allowed:x?}; {context}");
    }
    found
}

#[test]
fn power_loss_while_the_refcount_table_grows() {
    for n in 1.. {
        let more = block_on(async {
            let shape = Shape { size: 24 << 20, ..TINY };
            let mut guest = Guest::new(&shape).await;
            // 64 refcounts a block, 64 blocks a table of one cluster: 2 MiB of file.
            guest.fill(0, 3500).await.unwrap();
            guest.flush().await.unwrap();
            guest.files.image.fail_nth(n, Fault::Eio, Lasts::ForGood);
            let grown: Result<(), FormatError> = async {
                guest.fill(3500, 1500).await?;
                guest.flush().await?;
                guest.mapper.close().await
            }
            .await;
            if n % 7 == 0 || grown.is_ok() {
                survives(guest.files.crash(n), &guest.model, &format!("n {n}")).await;
            }
            grown.is_err()
        });
        if !more {
            break;
        }
    }
}

#[test]
fn a_new_refcount_block_is_on_the_disk_before_the_table_names_it() {
    for n in 1.. {
        let more = block_on(async {
            let mut guest = Guest::new(&TINY).await;
            guest.fill(0, 60).await.unwrap();
            guest.flush().await.unwrap();
            guest.files.image.fail_nth(n, Fault::Eio, Lasts::ForGood);
            let flushed: Result<(), FormatError> = async {
                guest.fill(200, 100).await?;
                guest.flush().await
            }
            .await;
            for seed in 0..16 {
                let (broken, _) = wrong(&guest.files.crash(seed).image).await;
                assert_eq!(broken, 0, "n {n} seed {seed}");
            }
            flushed.is_err()
        });
        if !more {
            break;
        }
    }
}

/// Somebody who opens an image for a moment, again and again, would keep its leaks and its mark for ever.
#[test]
fn an_image_that_is_closed_at_once_is_reclaimed_all_the_same() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        guest.fill(0, 4).await.unwrap();
        guest.flush().await.unwrap();
        guest.fill(8, 300).await.unwrap();
        guest.mapper.flush(Durability::Linked).await.unwrap();
        let crashed = Files { image: Arc::new(guest.files.image.crash_with(|_| false)), data: None };
        assert!(wrong(&crashed.image).await.1 >= 8);
        let mut model = guest.model.clone();
        model.flushed();
        let guest = Guest::open(crashed.clone(), model).await.unwrap();
        guest.mapper.reclaim().await.unwrap();
        guest.mapper.close().await.unwrap();
        assert_eq!(wrong(&crashed.image).await, (0, 0));
        let reader: Arc<dyn ReadAt> = crashed.image.clone();
        assert!(!qcow2().describe(&reader).await.unwrap().in_use);
    });
}

#[test]
fn what_a_crash_left_is_used_again() {
    for shape in [SMALL, UNITS, TINY] {
        block_on(async {
            let mut guest = Guest::new(&shape).await;
            guest.fill(0, 4).await.unwrap();
            guest.flush().await.unwrap();
            guest.fill(8, 300).await.unwrap();
            guest.mapper.flush(Durability::Linked).await.unwrap();
            // The refcounts are there, the links are not.
            let crashed = Files { image: Arc::new(guest.files.image.crash_with(|_| false)), data: None };
            let (broken, leaks) = wrong(&crashed.image).await;
            assert!(broken == 0 && leaks >= 8, "{leaks}");
            let mut model = guest.model.clone();
            model.flushed();
            let guest = Guest::open(crashed.clone(), model).await.unwrap();
            let len = crashed.image.len();
            guest.mapper.reclaim().await.unwrap();
            let mut rounds = 0;
            while wrong(&crashed.image).await != (0, 0) {
                tokio::task::yield_now().await;
                guest.mapper.settle().await.unwrap();
                rounds += 1;
                assert!(rounds < 10_000, "{shape:?}: {:?}", wrong(&crashed.image).await);
            }
            for _ in 0..2000 {
                // The holes are looked for after that.
                tokio::task::yield_now().await;
            }
            guest.check_reads().await;
            // What was freed is taken before the file grows.
            let room = guest.mapper.prepare(20 * shape.unit(), shape.unit(), Room::Data).await.unwrap();
            assert!(room.at.unwrap() < len, "{shape:?}");
            drop(room);
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&crashed.image).await, (0, 0));
        });
    }
}

/// An image after a power loss, and what it holds.
async fn crashed(shape: &Shape) -> (Files, Model) {
    let mut guest = Guest::new(shape).await;
    guest.write(0, 30).await.unwrap();
    guest.flush().await.unwrap();
    (Files { image: Arc::new(guest.files.image.crash_with(|_| true)), data: None }, guest.model.clone())
}

/// Whether it is dirty, and in use.
async fn marks(file: &Arc<SimFile>) -> (bool, bool) {
    let reader: Arc<dyn ReadAt> = file.clone();
    let described = qcow2().describe(&reader).await.unwrap();
    (described.dirty, described.in_use)
}

#[test]
fn the_marks_of_a_crash_go_with_a_close_though_nothing_was_allocated() {
    for shape in [SMALL, Shape { lazy: true, ..SMALL }] {
        block_on(async {
            let (files, model) = crashed(&shape).await;
            assert_eq!(marks(&files.image).await, (shape.lazy, true));
            let guest = Guest::open(files.clone(), model).await.unwrap();
            guest.mapper.reclaim().await.unwrap();
            for _ in 0..2000 {
                tokio::task::yield_now().await;
            }
            guest.mapper.close().await.unwrap();
            assert_eq!(marks(&files.image).await, (false, false), "{shape:?}");
            assert_eq!(wrong(&files.image).await, (0, 0));
        });
    }
}

#[test]
fn refcounts_are_right_after_a_close_though_leaks_may_be_left() {
    block_on(async {
        let shape = Shape { lazy: true, ..SMALL };
        let (files, model) = crashed(&shape).await;
        let mut guest = Guest::open(files.clone(), model).await.unwrap();
        guest.write(300, 30).await.unwrap();
        // Nobody looked for leaks: the next open is to do it beside its guest, and need not count before it begins.
        guest.mapper.close().await.unwrap();
        assert_eq!(marks(&files.image).await, (false, true));
        assert_eq!(wrong(&files.image).await, (0, 0));
        guest.check_reads().await;
    });
}

/// A refcount block that counts itself, made in a hole while leaks are looked for: no table of the file names it yet. Taken for a
/// leak, it would be given to a guest's data, and the image lose the refcounts of a whole stretch.
#[test]
fn a_new_refcount_block_in_a_hole_is_no_leak() {
    for seed in 0..20 {
        block_on(async {
            let (files, model) = crashed(&TINY).await;
            // Two stretches, each of one block, that nothing counts.
            files.image.set_len(390 << 10).await.unwrap();
            files.image.sync().await.unwrap();
            let mut guest = Guest::open(files.clone(), model).await.unwrap();
            guest.next_tag = 0x0100_0000;
            // The holes are looked for as room is taken.
            guest.write(100, 4).await.unwrap();
            for _ in 0..300 {
                tokio::task::yield_now().await;
            }
            files.image.set_yields(seed, 6);
            guest.write(200, 250).await.unwrap();
            guest.mapper.reclaim().await.unwrap();
            for _ in 0..3000 {
                tokio::task::yield_now().await;
            }
            guest.write(500, 250).await.unwrap();
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&files.image).await, (0, 0), "seed {seed}");
            guest.check_reads().await;
        });
    }
}

/// The refcount table gets another place while leaks are looked for, and guest bytes lie where it was. Read there, it would name no
/// refcount blocks; freed for that, they would be given to a guest's data.
#[test]
fn a_refcount_table_that_moves_meanwhile_costs_no_refcount_block() {
    // A table of one cluster counts 2 MiB.
    let shape = Shape { size: 5 << 20, ..TINY };
    // How far the search has come by then.
    for turns in 0..40 {
        block_on(async {
            let mut guest = Guest::new(&shape).await;
            guest.fill(0, 3800).await.unwrap();
            guest.flush().await.unwrap();
            let files = Files { image: Arc::new(guest.files.image.crash_with(|_| true)), data: None };
            let table = refcount_table(&files.image).await;
            let mut guest = Guest::open(files.clone(), guest.model.clone()).await.unwrap();
            // As long as several turns, so that they can end between any two reads.
            files.image.set_yields(turns, 500);
            guest.mapper.reclaim().await.unwrap();
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            files.image.set_yields(turns, 0);
            for cluster in 4000..5000 {
                // Zeros, stored: a table of nothing.
                guest.next_tag = 0;
                guest.write(cluster, 1).await.unwrap();
                if cluster % 100 == 0 {
                    guest.flush().await.unwrap();
                }
            }
            guest.next_tag = 0x0100_0000;
            assert_ne!(refcount_table(&files.image).await, table, "it did not move");
            for _ in 0..3000 {
                tokio::task::yield_now().await;
            }
            guest.write(8000, 500).await.unwrap();
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&files.image).await, (0, 0), "after {turns} turns");
            guest.check_reads().await;
        });
    }
}

/// Where the header says that it lies.
async fn refcount_table(file: &Arc<SimFile>) -> u64 {
    u64::from_be_bytes(file.read(48, 8).await.unwrap()[..].try_into().unwrap())
}

#[test]
fn what_changes_while_a_crash_is_cleaned_up_is_left_alone() {
    for (seed, shape) in (0..25).flat_map(|seed| [(seed, SMALL), (seed, UNITS)]) {
        block_on(async {
            let mut guest = Guest::new(&shape).await;
            guest.write(0, 300).await.unwrap();
            guest.flush().await.unwrap();
            guest.fill(400, 100).await.unwrap();
            guest.mapper.flush(Durability::Linked).await.unwrap();
            let crashed = Files { image: Arc::new(guest.files.image.crash_with(|_| false)), data: None };
            let mut guest = Guest::open(crashed.clone(), guest.model.clone()).await.unwrap();
            guest.next_tag = 0x0100_0000;
            // There are holes below the old end, and they are known.
            guest.zero_clusters(0, 9).await.unwrap();
            guest.flush().await.unwrap();
            guest.run(&Op::Reuse).await.unwrap();
            guest.fill(600, 1).await.unwrap();
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            crashed.image.set_yields(seed, 6);
            guest.mapper.reclaim().await.unwrap();
            // As the scan runs they are taken, and others come.
            let mut rng = rng(seed);
            for _ in 0..12 {
                guest.write(rng.random_range(0..200), 60).await.unwrap();
                guest.zero_clusters(rng.random_range(0..8), 2).await.unwrap();
                guest.flush().await.unwrap();
                guest.run(&Op::Reuse).await.unwrap();
            }
            for _ in 0..3000 {
                tokio::task::yield_now().await;
            }
            guest.write(0, 250).await.unwrap();
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(&crashed.image).await, (0, 0), "{shape:?} seed {seed}");
            guest.check_reads().await;
        });
    }
}

#[test]
fn a_cluster_is_used_again_only_after_its_unlinking_is_on_the_disk() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        guest.write(0, 8).await.unwrap();
        guest.flush().await.unwrap();
        let before = guest.mapping(0).await.unwrap();
        guest.zero_clusters(0, 1).await.unwrap();
        assert!(guest.mapper.take_unlinked().is_none(), "the disk still shows it");
        guest.mapper.flush(Durability::Linked).await.unwrap();
        assert!(guest.mapper.take_unlinked().is_none(), "it is written, not synced");
        guest.flush().await.unwrap();
        let unlinked = guest.mapper.take_unlinked().expect("the disk does not show it any more");
        assert!(guest.mapper.take_unlinked().is_none(), "it is handed out once");
        let room = guest.mapper.prepare(4096, 4096, Room::Data).await.unwrap();
        assert_ne!(Some(before), room.at.map(Mapping::Data), "somebody may still read there");
        drop(room);
        unlinked.reuse();
        let room = guest.mapper.prepare(8192, 4096, Room::Data).await.unwrap();
        assert_eq!(Some(before), room.at.map(Mapping::Data));
    });
}
