//! The engine under a drawn schedule: guests race reads, writes, zeroes, trims and flushes over a slow origin, the power
//! fails, the image is opened again. Checked: I1, I2, I3, and that the format's own check finds no corruption.

mod support;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::{Disk, ImageOptions, Top, inflight::Budgets};
use readonce_storage::{SimFile, Storage};
use support::{
    chain::Below,
    exec::Exec,
    guest::Guest,
    model::Model,
    origin::{SECTOR, stamp_of},
    world::{KINDS, Kind, Leaks, QED},
};

#[derive(Debug, Clone, Copy)]
struct World {
    seed: u64,
    kind: Kind,
    budgets: Budgets,
    size: u64,
    backing_len: u64,
    copy_on_read: bool,
    fail_of_256: u16,
    guests: u64,
    ops_per_guest: u64,
    epochs: u64,
}

impl World {
    fn draw(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        // QED as often as all the others together have it: it is where most of this was learnt.
        let kind = if rng.random_range(0..4) == 0 { QED } else { KINDS[rng.random_range(0..KINDS.len())] };
        let sizes = match kind.options {
            [("extended_l2", _)] => [16384, 32768, 65536],
            _ => [4096, 8192, 65536],
        };
        let cluster_size = sizes[rng.random_range(0..3)];
        let kind = Kind { cluster_size, ..kind };
        let bytes_max = [64 << 20, 3 * cluster_size, 1][rng.random_range(0..3)];
        let size = cluster_size * rng.random_range(1..40) + SECTOR * rng.random_range(0..8);
        Self {
            seed,
            kind,
            budgets: Budgets { fetch_bytes_max: bytes_max, guest_bytes_max: bytes_max },
            size,
            backing_len: rng.random_range(SECTOR..size * 5 / 4) / SECTOR * SECTOR + SECTOR,
            copy_on_read: rng.random_range(0..4) != 0,
            fail_of_256: [0, 0, 16][rng.random_range(0..3)],
            guests: rng.random_range(1..8),
            ops_per_guest: 40,
            epochs: 4,
        }
    }

    fn options(&self) -> ImageOptions {
        ImageOptions { copy_on_read: self.copy_on_read, budgets: self.budgets }
    }
}

fn run(world: World, below: &Below) {
    let seed = world.seed;
    let model = Arc::new(Mutex::new(Model::new(world.size, world.backing_len)));
    let stamps = Arc::new(Mutex::new(0));
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x5eed);
    let mut file = Arc::new(SimFile::new());
    for epoch in 0..world.epochs {
        let exec = Exec::new(rng.random());
        let storage: Arc<dyn Storage> = file.clone();
        let (image, origins) = {
            let (exec2, below, storage) = (Arc::clone(&exec), below.clone(), Arc::clone(&storage));
            exec.run(async move {
                let kind = world.kind;
                if epoch == 0 {
                    kind.create(&storage, world.size).await;
                } else if kind.snapshots {
                    kind.snapshot(&storage, epoch).await;
                }
                kind.check(Arc::clone(&storage), Leaks::Allowed, "opened").await;
                // What is read before the guests come is there; the rest fails as drawn.
                let (source, origins) = below.open(world.backing_len, &exec2.rt(), 200, 0).await;
                let image = kind.open(storage, source, &exec2, world.options()).await;
                (image, origins)
            })
        };
        origins.iter().for_each(|origin| *origin.fail_of_256.lock() = world.fail_of_256);
        file.set_yields(rng.random(), 3);
        let disk = Arc::new(Disk::new(Top::Image(Arc::clone(&image)), false));
        let mut guests: Vec<_> = (0..world.guests)
            .map(|_| Guest {
                disk: Arc::clone(&disk),
                model: Arc::clone(&model),
                stamps: Arc::clone(&stamps),
                rng: SmallRng::seed_from_u64(rng.random()),
                cluster_sectors: world.kind.cluster_size / SECTOR,
                writes_may_fail: world.fail_of_256 > 0,
            })
            .collect();
        let last = epoch + 1 == world.epochs;
        let ops = world.ops_per_guest;
        let main = async move {
            let tasks: Vec<_> = guests
                .iter_mut()
                .map(|guest| async move {
                    for _ in 0..ops {
                        guest.op().await;
                    }
                })
                .collect();
            futures_util::future::join_all(tasks).await;
        };
        if last {
            exec.run(main);
            origins.iter().for_each(|origin| *origin.fail_of_256.lock() = 0);
            let closing = Arc::clone(&image);
            exec.run(async move { closing.close(Duration::from_secs(3600)).await.expect("closes clean") });
            let closed = Arc::clone(&storage);
            exec.run(async move { world.kind.check(closed, Leaks::None, "closed").await });
        } else {
            let polls = rng.random_range(0..8_000);
            exec.run_for(main, polls);
            exec.power_off();
        }
        drop((disk, image, storage));
        exec.power_off();
        // After a clean close nothing is owed to luck either: a crash then must lose nothing that close flushed.
        file = Arc::new(file.crash(rng.random()));
        verify(&world, below, &model, &file, last);
    }
}

/// Opens what is left and reads all of it.
fn verify(world: &World, below: &Below, model: &Arc<Mutex<Model>>, file: &Arc<SimFile>, closed: bool) {
    let exec = Exec::new(world.seed);
    // What reading does to the image is not kept.
    let copy: Arc<dyn Storage> = Arc::new(SimFile::from_bytes(&file.contents()));
    let (world, exec2, below) = (*world, Arc::clone(&exec), below.clone());
    let bytes = exec.run(async move {
        world.kind.check(Arc::clone(&copy), Leaks::Allowed, "after the crash").await;
        let (source, _origins) = below.open(world.backing_len, &exec2.rt(), 0, 0).await;
        let image = world.kind.open(copy, source, &exec2, world.options()).await;
        let mut all = Vec::new();
        for at in (0..world.size).step_by(SECTOR as usize * 8) {
            let len = (world.size - at).min(SECTOR * 8) as usize;
            all.extend_from_slice(&image.read(at, len).await.expect("all can be read"));
        }
        all
    });
    // Its timers hold the image, which holds it.
    exec.power_off();
    let mut model = model.lock();
    if closed {
        let now = model.tick();
        model.end_flush(now);
    }
    for (at, bytes) in bytes.chunks_exact(SECTOR as usize).enumerate() {
        let stamp = stamp_of(bytes);
        model.check_after_crash(at as u64, stamp);
        model.restart(at as u64, stamp);
    }
    let now = model.tick();
    model.end_flush(now);
}

/// Runs the seeds `READONCE_SEEDS=FROM..TO`, or a few; a failing one is named for a replay.
fn run_seeds(test: &str, few: &str, below: impl Fn(&World) -> Below) {
    let seeds = std::env::var("READONCE_SEEDS").unwrap_or_else(|_| few.into());
    let (from, to) = seeds.split_once("..").expect("READONCE_SEEDS=FROM..TO");
    let parse = |text: &str| text.parse::<u64>().expect("a seed is a number");
    for seed in parse(from)..parse(to) {
        let world = World::draw(seed);
        let below = below(&world);
        if let Err(panic) = std::panic::catch_unwind(|| run(world, &below)) {
            eprintln!(
                "replay: READONCE_SEEDS={seed}..{} cargo test -p readonce-disk --test races {test}\n{world:?}",
                seed + 1
            );
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn random_races_and_crashes_keep_the_promises() {
    run_seeds("random_races", "0..100", |_| Below::Raw);
}

/// What lies behind has compressed clusters, internal snapshots, and metadata that must come over the network as well.
#[test]
fn races_over_a_chain_of_images_keep_the_promises() {
    run_seeds("races_over", "0..24", |world| {
        let codec = ["zlib", "zstd"][(world.seed % 2) as usize];
        let cluster_size = [512, 4096, 65536][(world.seed % 3) as usize];
        Below::chain(world.backing_len, codec, cluster_size)
    });
}
