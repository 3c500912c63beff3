//! I/O errors and full disks, at every I/O in turn.

use readonce_format::{Durability, FormatError, Room};
use readonce_storage::sim::{Fault, Lasts};

use crate::guest::{Guest, SMALL, Shape, UNITS, block_on, random_op, rng, wrong};

const SHAPES: [Shape; 3] =
    [SMALL, UNITS, Shape { cluster_bits: 9, refcount_bits: 64, size: (1 << 20) + 1536, ..SMALL }];

#[test]
fn a_full_disk_loses_nothing_and_passes() {
    for shape in SHAPES {
        for n in 1.. {
            let hits = block_on(async {
                let mut rng = rng(7);
                let mut guest = Guest::new(&shape).await;
                guest.files.image.fail_nth(n, Fault::NoSpace, Lasts::ForGood);
                for step in 0..60 {
                    if step == 35 {
                        guest.files.image.heal();
                    }
                    let op = random_op(&mut rng, &shape);
                    match guest.run(&op).await {
                        Ok(()) | Err(FormatError::NoSpace(_)) => {}
                        Err(error) => panic!("{shape:?} n {n}: {op:?}: {error}"),
                    }
                    if step % 20 == 19 {
                        guest.check_reads().await;
                    }
                }
                guest.mapper.close().await.unwrap();
                guest.check_reads().await;
                assert_eq!(wrong(&guest.files.image).await, (0, 0), "{shape:?} n {n}");
                guest.files.image.fault_hits()
            });
            if hits == 0 {
                break;
            }
        }
    }
}

#[test]
fn an_io_error_is_told_and_the_image_stays_whole() {
    for shape in SHAPES {
        for n in 1.. {
            let hits = block_on(async {
                let mut rng = rng(11);
                let mut guest = Guest::new(&shape).await;
                let file = guest.files.image.clone();
                file.fail_nth(n, Fault::Eio, Lasts::Once);
                let mut failures = 0;
                for _ in 0..40 {
                    let op = random_op(&mut rng, &shape);
                    match guest.run(&op).await {
                        Ok(()) => {}
                        Err(FormatError::Io(_)) => {
                            failures += 1;
                            break;
                        }
                        Err(error) => panic!("{shape:?} n {n}: {op:?}: {error}"),
                    }
                }
                let hits = file.fault_hits();
                assert_eq!(failures, hits, "{shape:?} n {n}: an error was swallowed");
                file.heal();
                // What is in memory still reads right.
                guest.check_reads().await;
                assert_eq!(wrong(&file).await.0, 0, "{shape:?} n {n}");
                hits
            });
            if hits == 0 {
                break;
            }
        }
    }
}

#[test]
fn a_flush_that_meets_no_space_keeps_its_links() {
    block_on(async {
        let mut guest = Guest::new(&SMALL).await;
        guest.fill(0, 8).await.unwrap();
        guest.zero(300, 4).await.unwrap();
        guest.fill(600, 8).await.unwrap();
        // The file system had promised the room: writes into it go on in a real one. The simulated one fails whatever may take
        // space, so here the links must stay pending.
        guest.files.image.fail_nth(1, Fault::NoSpace, Lasts::ForGood);
        let error = guest.mapper.flush(Durability::Durable).await.unwrap_err();
        assert!(matches!(error, FormatError::NoSpace(_)), "{error}");
        assert_eq!(guest.mapper.unlinked_bytes(), 16 * 4096);
        guest.files.image.heal();
        guest.flush().await.unwrap();
        assert_eq!(guest.mapper.unlinked_bytes(), 0);
        let reopened = Guest::open(guest.files.crash(0), guest.model.clone()).await.unwrap();
        reopened.check_reads().await;
    });
}

#[test]
fn a_failed_prepare_gives_everything_back() {
    for shape in SHAPES {
        block_on(async {
            let guest = Guest::new(&shape).await;
            let file = &guest.files.image;
            for n in 1.. {
                let hits = file.fault_hits();
                file.fail_nth(n, Fault::NoSpace, Lasts::Once);
                let result = guest.mapper.prepare(0, 4 * shape.cluster_size(), Room::Data).await;
                file.heal();
                if file.fault_hits() == hits {
                    break;
                }
                // A window that does not fit is no failure: exactly what is needed is asked for then.
                if let Err(error) = result {
                    assert!(matches!(error, FormatError::NoSpace(_)), "{error}");
                }
            }
            guest.mapper.close().await.unwrap();
            assert_eq!(wrong(file).await, (0, 0), "{shape:?}");
        });
    }
}
