//! Power loss: after every operation, and at every I/O.

use std::sync::Arc;

use readonce_format::Mapper;
use readonce_storage::{
    SimFile, Storage,
    sim::{Fault, Lasts},
};

use crate::guest::{
    Guest, Model, SMALL, Shape, block_on, check, create, qed, random_op, read_all, rng, wrong,
};

/// The image after a power loss: nothing broken, every sector as it may be, and usable.
async fn survives(crashed: Arc<SimFile>, model: &Model, context: &str) {
    let report = check(&crashed).await;
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{context}");
    let mapper = qed().open(crashed.clone()).await.unwrap();
    let found = read_all(mapper.as_ref() as &dyn Mapper, crashed.as_ref(), &model.shape).await.unwrap();
    for (sector, (found, allowed)) in found.iter().zip(&model.allowed).enumerate() {
        assert!(allowed.contains(found), "sector {sector} is {found:#x}, may be {allowed:x?}; {context}");
    }
    let mut model = model.clone();
    model.settle(&found);
    let mut guest = Guest::open(crashed.clone(), model).await.unwrap();
    guest.next_tag = 0x0100_0000;
    guest.mapper.reclaim().await.unwrap();
    guest.write(3, 30).await.unwrap();
    guest.fill(20, 40).await.unwrap();
    guest.check_reads().await;
    guest.mapper.close().await.unwrap();
    assert_eq!(wrong(&crashed).await, (0, 0), "closed clean; {context}");
    let again = Guest::open(crashed, guest.model.clone()).await.unwrap();
    again.check_reads().await;
}

fn run(seed: u64, shape: Shape) {
    block_on(async {
        let mut rng = rng(seed);
        let (file, mut guest) = Guest::new(&shape).await;
        for step in 0..60 {
            let op = random_op(&mut rng, &shape);
            guest.run(&op).await.unwrap();
            if step % 4 == 0 {
                let crashed = Arc::new(file.crash(seed * 1000 + step));
                survives(crashed, &guest.model, &format!("seed {seed} step {step} after {op:?}")).await;
            }
        }
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        guest.model.flushed();
        assert_eq!(wrong(&file).await, (0, 0), "seed {seed}");
        survives(Arc::new(file.crash(seed)), &guest.model, &format!("seed {seed} closed")).await;
    });
}

#[test]
fn power_loss_after_any_operation() {
    for seed in 0..10 {
        run(seed, SMALL);
        run(seed, Shape { backing: false, table_size: 2, ..SMALL });
    }
}

#[test]
fn power_loss_at_any_io() {
    for seed in 0..3 {
        // The n-th I/O and all after it fail, then the power goes.
        for n in 1.. {
            let more = block_on(async {
                let mut rng = rng(seed);
                let (file, mut guest) = Guest::new(&SMALL).await;
                file.fail_nth(n, Fault::Eio, Lasts::ForGood);
                let mut failed = false;
                for _ in 0..40 {
                    let op = random_op(&mut rng, &SMALL);
                    if guest.run(&op).await.is_err() {
                        failed = true;
                        break;
                    }
                }
                if !failed {
                    failed = guest.mapper.close().await.is_err();
                }
                let context = format!("seed {seed} n {n}");
                survives(Arc::new(file.crash(n)), &guest.model, &context).await;
                failed || file.fault_hits() > 0
            });
            if !more {
                break;
            }
        }
    }
}

/// Without a word of where the file ended, a power loss before the first sync would leave clusters that nobody ever looks for: the image
/// grows by a group of fills with each such power loss.
#[test]
fn what_grows_without_a_mark_is_found_at_the_next_open() {
    for seed in 0..20 {
        block_on(async {
            let (file, mut guest) = Guest::new(&SMALL).await;
            for _ in 0..3 {
                guest.fill(0, 3).await.unwrap();
                guest.mapper.close().await.unwrap();
                guest.fill(7, 30).await.unwrap();
                survives(Arc::new(file.crash(seed)), &guest.model, &format!("seed {seed}")).await;
                guest.flush().await.unwrap();
            }
        });
    }
}

/// What QEMU closed has no such word: the mark is synced before anything grows, once.
#[test]
fn what_grows_after_another_program_is_marked() {
    for seed in 0..20 {
        block_on(async {
            let file = create(&SMALL).await;
            // QEMU clears the bits that it does not know.
            file.write(32, vec![0; 8].into()).await.unwrap();
            file.sync().await.unwrap();
            let mut guest = Guest::open(file.clone(), Model::new(SMALL)).await.unwrap();
            let syncs = file.sync_count();
            guest.fill(7, 30).await.unwrap();
            assert_eq!(file.sync_count() - syncs, 1);
            survives(Arc::new(file.crash(seed)), &guest.model, &format!("seed {seed}")).await;
            guest.mapper.close().await.unwrap();
            let syncs = file.sync_count();
            guest.fill(40, 3).await.unwrap();
            assert_eq!(file.sync_count() - syncs, 0);
        });
    }
}

#[test]
fn power_loss_while_a_hole_is_closed() {
    for n in 1.. {
        let more = block_on(async {
            let (file, mut guest) = Guest::new(&SMALL).await;
            guest.fill(0, 8).await.unwrap();
            let held = guest.mapper.prepare(64 * 4096, 8 * 4096, readonce_format::Room::Data).await.unwrap();
            guest.fill(700, 20).await.unwrap();
            guest.write(9, 50).await.unwrap();
            guest.flush().await.unwrap();
            drop(held);
            file.fail_nth(n, Fault::Eio, Lasts::ForGood);
            let closed = guest.mapper.close().await;
            let storage: Arc<dyn Storage> = file.clone();
            survives(Arc::new(file.crash(n)), &guest.model, &format!("n {n}")).await;
            drop(storage);
            closed.is_err()
        });
        if !more {
            break;
        }
    }
}

/// A pin that was lost is made anew at the next open, from what the server has then: the image would mix two versions of its backing.
#[test]
fn power_loss_while_the_backing_is_renamed_keeps_a_pin() {
    use readonce_format::driver::{BackingRef, HeaderChange, Pin};
    let named = |len: usize, letter: &str| BackingRef { name: letter.repeat(len), format: None };
    let pin = |version: u8, len: usize| Pin { validator: vec![version; len], len: 1 };
    // Length of the name and of the validator, before and after. One that is the same has the same letters.
    let large = [(10, 300, 20, 300), (10, 20, 3000, 20), (3000, 300, 10, 300), (3000, 9, 4000, 1024)];
    let small = [
        (10, 9, 20, 9),
        (10, 300, 400, 300),
        (1500, 300, 1600, 300),
        (448, 9, 449, 9),
        (1000, 300, 1000, 300),
    ];
    let cases = large.iter().map(|case| (65536, case)).chain(small.iter().map(|case| (4096, case)));
    for (cluster_size, &(old_len, old_pin, new_len, new_pin)) in cases {
        let old = (named(old_len, "o"), pin(1, old_pin));
        let new = (named(new_len, if new_len == old_len { "o" } else { "n" }), pin(2, new_pin));
        for n in 1.. {
            let more = block_on(async {
                let file = create(&Shape { cluster_size, ..SMALL }).await;
                let storage: Arc<dyn Storage> = file.clone();
                // As it is made, and after changes: the record lies where it did not lie before.
                for between in [&new, &old] {
                    let change = HeaderChange::Backing(Some(between.0.clone()), Some(between.1.clone()));
                    qed().change(&storage, &change).await.unwrap();
                }
                file.fail_nth(n, Fault::Eio, Lasts::ForGood);
                let change = HeaderChange::Backing(Some(new.0.clone()), Some(new.1.clone()));
                let changed = qed().change(&storage, &change).await.is_ok();
                for seed in 0..20 {
                    let reader: Arc<dyn readonce_storage::ReadAt> = Arc::new(file.crash(seed));
                    let said = qed().describe(&reader).await.unwrap();
                    let found = (said.backing.unwrap(), said.pin);
                    let context = format!("{cluster_size}: {old_len} to {new_len}, n {n}, seed {seed}");
                    let whole = |(name, pin): &(BackingRef, Pin)| (name.clone(), Some(pin.clone()));
                    assert!(found == whole(&new) || !changed && found == whole(&old), "{context}: {found:?}");
                }
                !changed
            });
            if !more {
                break;
            }
        }
    }
}

#[test]
fn a_change_that_a_power_loss_could_tear_is_refused() {
    use readonce_format::driver::{BackingRef, HeaderChange, Pin};
    block_on(async {
        let file = create(&SMALL).await;
        let storage: Arc<dyn Storage> = file.clone();
        let to = |letter: &str| {
            let backing = BackingRef { name: letter.repeat(2500), format: None };
            HeaderChange::Backing(Some(backing), Some(Pin { validator: vec![1; 300], len: 1 }))
        };
        qed().change(&storage, &to("o")).await.unwrap();
        let before = file.contents();
        let error = qed().change(&storage, &to("n")).await.unwrap_err();
        assert!(error.to_string().contains("has no room for the new backing file name"), "{error}");
        assert_eq!(file.contents(), before);
    });
}
