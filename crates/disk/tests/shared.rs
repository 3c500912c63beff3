//! What a format beyond QED needs of the engine: shared and compressed clusters, subclusters, zeros and trims that unlink, places
//! that are used again. On a fake map that checks every rule of the seam, beside the flat model.

mod support;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::{
    Disk, Image, ImageOptions, LayerError, Top, ZeroMode,
    inflight::{Budgets, FETCH_BYTES_MAX},
};
use readonce_format::{Abilities, Geometry};
use readonce_storage::Storage;
use support::{
    exec::Exec,
    fake::{Fake, FakeSpec, Start},
    guest::Guest,
    model::Model,
    origin::{SECTOR, SimOrigin, backing_stamp, stamp_of},
    world::raw_over,
};

const CLUSTER: u64 = 16 << 10;
const ALL: Abilities = Abilities { zero: true, unlink: true };

struct World {
    exec: Arc<Exec>,
    fake: Arc<Fake>,
    origin: Arc<SimOrigin>,
    image: Arc<Image>,
}

impl Drop for World {
    fn drop(&mut self) {
        // Its timers hold the image, which holds it.
        self.exec.power_off();
    }
}

impl World {
    /// Clusters by letter: `.` absent, `Z` zero, `D` data, `S` shared, `H` every other unit shared, `C` compressed.
    fn new(letters: &str, fill_unit: u64, abilities: Abilities) -> Self {
        let size = letters.len() as u64 * CLUSTER;
        let letters: Vec<char> = letters.chars().collect();
        let spec = FakeSpec { geometry: Geometry { size, cluster_size: CLUSTER, fill_unit }, abilities };
        let fake = Fake::new(spec, |cluster| match letters[cluster as usize] {
            'Z' => Start::Zero,
            'D' => Start::Data,
            'S' => Start::Shared,
            'H' => Start::SharedHalf,
            'C' => Start::Compressed,
            _ => Start::Absent,
        });
        Self::open(1, fake, size, Budgets::default())
    }

    fn open(seed: u64, fake: Arc<Fake>, backing_len: u64, budgets: Budgets) -> Self {
        let exec = Exec::new(seed);
        let origin = SimOrigin::new(backing_len, exec.rt(), 0);
        let (below, mapper, rt) = (origin.clone(), fake.clone(), exec.rt());
        let image = exec.run(async move {
            let storage: Arc<dyn Storage> = mapper.file.clone();
            let options = ImageOptions { copy_on_read: true, budgets };
            Image::new(mapper, storage, Some(raw_over(below).await), rt, options)
        });
        Self { exec, fake, origin, image }
    }

    fn run<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Image>) -> F,
    ) -> T {
        self.exec.run(work(Arc::clone(&self.image)))
    }

    #[track_caller]
    fn check(&self, letters: &str) {
        assert_eq!(self.fake.draw(), letters);
    }
}

/// A range of clusters, in bytes, `bytes` of them.
fn fill(bytes: u64, stamp: u8) -> Bytes {
    Bytes::from(vec![stamp; bytes as usize])
}

#[track_caller]
fn assert_backing(offset: u64, bytes: &[u8]) {
    for (index, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
        let at = offset / SECTOR + index as u64;
        assert_eq!(stamp_of(sector), backing_stamp(at), "sector {at}");
    }
}

#[test]
fn shared_and_compressed_clusters_read_and_ask_nothing_of_the_backing() {
    let world = World::new("SCCDC.", CLUSTER, ALL);
    world.run(|image| async move {
        for (offset, len) in [(0, 5 * CLUSTER), (CLUSTER + 700, 3000), (2 * CLUSTER - 100, 200)] {
            let bytes = image.read(offset, len as usize).await.expect("local");
            let skip = (SECTOR - offset % SECTOR) % SECTOR;
            let whole = (len - skip) / SECTOR * SECTOR;
            assert_backing(offset + skip, &bytes[skip as usize..(skip + whole) as usize]);
        }
    });
    assert_eq!(world.origin.asked_bytes(), 0);
    world.check("SCCDC.");
}

#[test]
fn a_compressed_cluster_is_read_once_for_all_its_readers() {
    let world = World::new("CC", CLUSTER, ALL);
    let before = world.fake.file.op_count();
    world.run(|image| async move {
        let readers = (0..16u64).map(|index| {
            let image = Arc::clone(&image);
            async move {
                let bytes = image.read(index * 1024, 1024).await.expect("local");
                assert_backing(index * 1024, &bytes);
            }
        });
        join_all(readers).await;
        for index in 0..16u64 {
            image.read(index * 1024, 1024).await.expect("kept");
        }
    });
    assert_eq!(world.fake.file.op_count() - before, 1, "one read of the stream");
}

#[test]
fn a_write_into_a_part_copies_the_cluster_once_and_keeps_the_rest() {
    for unit in [CLUSTER, 4096] {
        let world = World::new("SC", unit, ALL);
        let per_cluster = (CLUSTER / unit) as usize;
        world.run(|image| async move {
            let writers =
                [(512, 1), (8192, 2), (CLUSTER + 512, 3), (2 * CLUSTER - 512, 4)].map(|(at, stamp)| {
                    let image = Arc::clone(&image);
                    async move { image.write(at, fill(512, stamp)).await.expect("room") }
                });
            join_all(writers).await;
            for (at, stamp) in [(512, 1), (8192, 2), (CLUSTER + 512, 3), (2 * CLUSTER - 512, 4)] {
                assert_eq!(image.read(at, 512).await.expect("local"), fill(512, stamp));
            }
            for at in [0, 1024, 4096, CLUSTER, CLUSTER + 1024] {
                assert_backing(at, &image.read(at, 512).await.expect("local"));
            }
            image.flush().await.expect("durable");
        });
        world.check(&"D".repeat(2 * per_cluster));
        assert_eq!(world.origin.asked_bytes(), 0, "a copy is local");
    }
}

#[test]
fn a_write_of_whole_clusters_reads_nothing_of_them() {
    let world = World::new("SCS", CLUSTER, ALL);
    let before = world.fake.file.op_count();
    world.run(|image| async move { image.write(0, fill(3 * CLUSTER, 7)).await.expect("room") });
    // Room and data for each; nothing else.
    assert_eq!(world.fake.file.op_count() - before, 6);
    world.check("DDD");
}

#[test]
fn a_copy_leaves_absent_subclusters_absent_and_a_fill_beside_shared_ones_is_kept() {
    let world = World::new("HH", 4096, ALL);
    let rt = world.exec.rt();
    world.check("S.S.S.S.");
    world.run(|image| async move {
        image.write(0, fill(512, 7)).await.expect("room");
        image.flush().await.expect("nothing is missing");
    });
    world.check("D.D.S.S.");
    assert_eq!(world.origin.asked_bytes(), 0);
    world.run(|image| async move {
        assert_backing(CLUSTER, &image.read(CLUSTER, CLUSTER as usize).await.expect("the origin answers"));
        rt.sleep(Duration::from_secs(2)).await;
        assert_backing(CLUSTER, &image.read(CLUSTER, CLUSTER as usize).await.expect("local"));
    });
    // Sectors 48 to 63 of every 80 of the backing are zeros.
    world.check("D.D.DDDZ".replace('Z', if backing_stamp(56) == 0 { "Z" } else { "D" }).as_str());
    assert_eq!(world.origin.asked_bytes(), 8192, "what is local is not asked");
}

#[test]
fn zeros_and_trims_of_whole_clusters_unlink_and_the_place_is_used_again() {
    let world = World::new("DSCDSC", CLUSTER, ALL);
    let rt = world.exec.rt();
    let fake = Arc::clone(&world.fake);
    world.run(|image| async move {
        image.write_zeroes(0, 3 * CLUSTER, ZeroMode::default()).await.expect("room");
        image.trim(3 * CLUSTER, 3 * CLUSTER).await.expect("room");
        assert_eq!(fake.draw(), "ZZZZZZ");
        assert_eq!(fake.reused_count(), 0, "the links are not on the disk yet");
        image.flush().await.expect("durable");
        rt.sleep(Duration::from_secs(1)).await;
        assert_eq!(fake.reused_count(), 4, "compressed ones have no place of their own here");
        let bytes = image.read(0, 6 * CLUSTER as usize).await.expect("local");
        assert!(bytes.iter().all(|&byte| byte == 0));
    });
}

#[test]
fn parts_are_zeroed_in_place_and_keep_space_unlinks_nothing() {
    let world = World::new("DSCDS", CLUSTER, ALL);
    let keep = ZeroMode { keep_space: true, only_if_fast: false };
    world.run(|image| async move {
        for at in 0..3 {
            image.write_zeroes(at * CLUSTER + 512, 1024, ZeroMode::default()).await.expect("room");
        }
        image.write_zeroes(3 * CLUSTER, 2 * CLUSTER, keep).await.expect("room");
        for at in 0..3 {
            let bytes = image.read(at * CLUSTER, 4096).await.expect("local");
            assert_backing(at * CLUSTER, &bytes[..512]);
            assert!(bytes[512..1536].iter().all(|&byte| byte == 0));
            assert_backing(at * CLUSTER + 1536, &bytes[1536..]);
        }
        let bytes = image.read(3 * CLUSTER, 2 * CLUSTER as usize).await.expect("local");
        assert!(bytes.iter().all(|&byte| byte == 0));
    });
    world.check("DDDDD");
}

#[test]
fn without_zero_clusters_zeros_are_data() {
    let world = World::new(".SCD", CLUSTER, Abilities { zero: false, unlink: false });
    world.run(|image| async move {
        image.write_zeroes(0, 4 * CLUSTER, ZeroMode::default()).await.expect("room");
        let bytes = image.read(0, 4 * CLUSTER as usize).await.expect("local");
        assert!(bytes.iter().all(|&byte| byte == 0));
    });
    world.check("DDDD");
    assert_eq!(world.origin.asked_bytes(), 0);
}

#[test]
fn zeros_that_must_be_fast_are_refused_before_anything_changes() {
    let fast = ZeroMode { keep_space: false, only_if_fast: true };
    let keep = ZeroMode { keep_space: true, only_if_fast: true };
    let refused = |letters: &str, abilities: Abilities, offset: u64, len: u64, mode: ZeroMode| {
        let world = World::new(letters, CLUSTER, abilities);
        let zeroed = world.run(move |image| async move { image.write_zeroes(offset, len, mode).await });
        match zeroed {
            Ok(()) => false,
            Err(LayerError::NotFast) => {
                assert_eq!(world.fake.draw(), letters);
                true
            }
            Err(error) => panic!("{error}"),
        }
    };
    let (none, all) = (Abilities { zero: false, unlink: false }, ALL);
    assert!(!refused("D.SCZ", all, 0, 5 * CLUSTER, fast));
    assert!(!refused("D", all, 512, 512, fast));
    assert!(refused("DS", all, 0, CLUSTER + 512, fast));
    assert!(refused("C", all, 512, CLUSTER - 512, fast));
    assert!(refused("D.", all, 0, CLUSTER + 512, fast));
    assert!(refused("S", all, 0, CLUSTER, keep));
    assert!(refused("D.", none, 0, 2 * CLUSTER, fast));
    assert!(!refused("D.", Abilities { zero: true, unlink: false }, 0, 2 * CLUSTER, fast));
}

#[test]
fn a_trim_hides_the_backing_where_the_format_can_unlink() {
    let world = World::new("..D.", CLUSTER, ALL);
    world.run(|image| async move { image.trim(100, 3 * CLUSTER - 100).await.expect("room") });
    world.check(".ZZ.");
    let world = World::new("..D.", CLUSTER, Abilities { zero: true, unlink: false });
    world.run(|image| async move { image.trim(100, 3 * CLUSTER - 100).await.expect("room") });
    world.check("..D.");
}

/// A reader that looked a cluster up before it was unlinked reads it after: its place must not hold another's bytes yet.
#[test]
fn what_was_unlinked_waits_for_a_slow_reader() {
    for seed in 0..200 {
        let world = World::new("DD", CLUSTER, ALL);
        world.fake.file.set_yields(seed, 12);
        world.run(|image| async move {
            let reader = Arc::clone(&image);
            let read = async move {
                let bytes = reader.read(0, 2 * CLUSTER as usize).await.expect("local");
                for sector in bytes.chunks_exact(SECTOR as usize) {
                    // Torn inside, or of another place: this panics.
                    stamp_of(sector);
                }
            };
            let unlink = async move {
                image.write_zeroes(0, CLUSTER, ZeroMode::default()).await.expect("room");
                image.flush().await.expect("durable");
            };
            futures_util::future::join(read, unlink).await;
        });
    }
}

/// Small subclusters: what one piece of a fetch completes is stored by few writes.
#[test]
fn neighbouring_fills_are_stored_together() {
    let size = 1 << 20;
    let spec =
        FakeSpec { geometry: Geometry { size, cluster_size: 128 << 10, fill_unit: 4096 }, abilities: ALL };
    let world = World::open(3, Fake::new(spec, |_| Start::Absent), size, Budgets::default());
    let rt = world.exec.rt();
    let before = world.fake.file.op_count();
    world.run(|image| async move {
        assert_backing(0, &image.read(0, size as usize).await.expect("the origin answers"));
        rt.sleep(Duration::from_secs(1)).await;
    });
    // A piece is up to 40 000 bytes, of which runs of zeros are 8 KiB long every 40 KiB, and a cluster ends every 128 KiB.
    let ops = world.fake.file.op_count() - before;
    assert!(ops < 350, "{ops} operations for 256 units");
    assert_eq!(world.origin.asked_bytes(), size);
}

fn run(seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let fill_unit = [CLUSTER, CLUSTER, 4096, 512][rng.random_range(0..4)];
    let size = CLUSTER * rng.random_range(1..12) + SECTOR * rng.random_range(0..33);
    let backing_len = rng.random_range(SECTOR..size * 5 / 4) / SECTOR * SECTOR + SECTOR;
    let abilities = match rng.random_range(0..4) {
        0 => Abilities { zero: false, unlink: false },
        1 => Abilities { zero: true, unlink: false },
        _ => ALL,
    };
    let few: u64 = [FETCH_BYTES_MAX, 2 * CLUSTER, 1][rng.random_range(0..3)];
    let budgets = Budgets { fetch_bytes_max: few, guest_bytes_max: few };
    let spec = FakeSpec { geometry: Geometry { size, cluster_size: CLUSTER, fill_unit }, abilities };
    let start_seed: u64 = rng.random();
    let fake = Fake::new(spec, |cluster| {
        let mut rng = SmallRng::seed_from_u64(start_seed ^ cluster);
        // What is local shows what the backing would: behind its end that is zeros.
        if (cluster + 1) * CLUSTER > backing_len {
            return Start::Absent;
        }
        match rng.random_range(0..8) {
            0 => Start::Data,
            1 | 2 => Start::Shared,
            3 if fill_unit < CLUSTER => Start::SharedHalf,
            3..=5 => Start::Compressed,
            _ => Start::Absent,
        }
    });
    let world = World::open(rng.random(), fake, backing_len, budgets);
    let fails = [0, 0, 16][rng.random_range(0..3)];
    *world.origin.fail_of_256.lock() = fails;
    world.fake.file.set_yields(rng.random(), 3);
    let model = Arc::new(Mutex::new(Model::new(size, backing_len)));
    let stamps = Arc::new(Mutex::new(0));
    let disk = Arc::new(Disk::new(Top::Image(Arc::clone(&world.image)), false));
    let guests: Vec<_> = (0..rng.random_range(1..8))
        .map(|_| Guest {
            disk: Arc::clone(&disk),
            model: Arc::clone(&model),
            stamps: Arc::clone(&stamps),
            rng: SmallRng::seed_from_u64(rng.random()),
            cluster_sectors: CLUSTER / SECTOR,
            writes_may_fail: fails > 0,
        })
        .collect();
    world.run(|_| async move {
        let tasks = guests.into_iter().map(|mut guest| async move {
            for _ in 0..60 {
                guest.op().await;
            }
        });
        join_all(tasks).await;
    });
    *world.origin.fail_of_256.lock() = 0;
    let model = Arc::clone(&model);
    world.run(|image| async move {
        let begin = model.lock().tick();
        for first in (0..size / SECTOR).step_by(8) {
            let count = 8.min(size / SECTOR - first);
            let bytes = image.read(first * SECTOR, (count * SECTOR) as usize).await.expect("all can be read");
            for (index, bytes) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                model.lock().check_read(first + index as u64, stamp_of(bytes), begin);
            }
        }
        image.close(Duration::from_secs(3600)).await.expect("closes clean");
    });
}

/// Runs the seeds `READONCE_SEEDS=FROM..TO`, or a few; a failing one is named for a replay.
#[test]
fn random_races_over_every_kind_of_cluster() {
    let seeds = std::env::var("READONCE_SEEDS").unwrap_or_else(|_| "0..150".into());
    let (from, to) = seeds.split_once("..").expect("READONCE_SEEDS=FROM..TO");
    let parse = |text: &str| text.parse::<u64>().expect("a seed is a number");
    for seed in parse(from)..parse(to) {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!(
                "replay: READONCE_SEEDS={seed}..{} cargo test -p readonce-disk --test shared",
                seed + 1
            );
            std::panic::resume_unwind(panic);
        }
    }
}
