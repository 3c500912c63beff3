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
    // The mark goes only when nothing is lost.
    let reader: Arc<dyn readonce_storage::ReadAt> = crashed.clone();
    let dirty = qed().describe(&reader).await.unwrap().dirty;

    let mut model = model.clone();
    model.settle(&found);
    let mut guest = Guest::open(crashed.clone(), model).await.unwrap();
    guest.next_tag = 0x0100_0000;
    guest.mapper.reclaim().await.unwrap();
    guest.write(3, 30).await.unwrap();
    guest.fill(20, 40).await.unwrap();
    guest.check_reads().await;
    guest.mapper.close().await.unwrap();
    let leaks_before_use = if dirty { 0 } else { report.leaks };
    let (broken, leaks) = wrong(&crashed).await;
    assert_eq!(broken, 0, "{context}");
    assert!(leaks <= leaks_before_use, "{leaks} leaks after a clean close; {context}");
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

#[test]
fn power_loss_while_the_backing_is_renamed() {
    use readonce_format::driver::{BackingRef, HeaderChange, Pin};
    let shape = Shape { cluster_size: 65536, ..SMALL };
    let named = |len: usize, letter: &str| BackingRef { name: letter.repeat(len), format: None };
    let pin = |version: u8| Pin { validator: vec![version; 300], len: 1 };
    for (old_len, new_len) in [(10, 20), (10, 3000), (3000, 10), (3000, 4000), (448, 449)] {
        for n in 1.. {
            let more = block_on(async {
                let file = create(&shape).await;
                let storage: Arc<dyn Storage> = file.clone();
                let (old, new) = (named(old_len, "o"), named(new_len, "n"));
                let change = HeaderChange::Backing(Some(old.clone()), Some(pin(1)));
                qed().change(&storage, &change).await.unwrap();
                file.fail_nth(n, Fault::Eio, Lasts::ForGood);
                let change = HeaderChange::Backing(Some(new.clone()), Some(pin(2)));
                let changed = qed().change(&storage, &change).await.is_ok();
                for seed in 0..20 {
                    let reader: Arc<dyn readonce_storage::ReadAt> = Arc::new(file.crash(seed));
                    let said = qed().describe(&reader).await.unwrap();
                    let backing = said.backing.unwrap();
                    let context = format!("{old_len} to {new_len}, n {n}, seed {seed}");
                    if backing == new {
                        assert_eq!(said.pin, Some(pin(2)), "{context}");
                    } else {
                        assert!(!changed && backing == old, "{context}");
                        assert!(said.pin.is_none() || said.pin == Some(pin(1)), "{context}");
                    }
                }
                !changed
            });
            if !more {
                break;
            }
        }
    }
}
