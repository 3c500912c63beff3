//! Deep chains: once a range was looked up, no layer below the top is asked for it again.

mod support;

use std::sync::{Arc, atomic::Ordering};

use readonce_disk::{Base, BaseFiles, BlockDevice, Disk, Image, Indexed, Source, Top};
use readonce_format::{Abilities, Geometry, Mapper};
use readonce_storage::{ReadAt, Storage};
use support::{
    exec::Exec,
    fake::{Fake, FakeSpec, Start},
    origin::{SECTOR, SimOrigin, backing_stamp, stamp_of},
    world::{filling, raw_over},
};

const CLUSTER: u64 = 16 << 10;
const CLUSTERS: u64 = 64;
const SIZE: u64 = CLUSTERS * CLUSTER;
const DEPTH: u64 = 32;

/// A layer whose every `DEPTH`th cluster from `number` on is zeros, and the rest absent.
fn layer(number: u64) -> Arc<Fake> {
    let spec = FakeSpec {
        geometry: Geometry { size: SIZE, cluster_size: CLUSTER, fill_unit: CLUSTER },
        abilities: Abilities { zero: true, unlink: true },
    };
    Fake::new(spec, |cluster| match cluster % DEPTH == number && number % 4 == 1 {
        true => Start::Zero,
        false => Start::Absent,
    })
}

/// Sectors are the backing's, but for the clusters of zeros.
fn check(offset: u64, bytes: &[u8]) {
    for (index, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
        let at = offset / SECTOR + index as u64;
        let hidden = at * SECTOR / CLUSTER % DEPTH % 4 == 1;
        assert_eq!(stamp_of(sector), if hidden { 0 } else { backing_stamp(at) }, "sector {at}");
    }
}

fn lookups(layers: &[Arc<Fake>]) -> u64 {
    layers.iter().map(|layer| layer.lookups.load(Ordering::Relaxed)).sum()
}

/// Layers above each other over an origin; the middle one is an image of its own where `fills`.
async fn chain(exec: &Arc<Exec>, layers: &[Arc<Fake>], fills: bool) -> Arc<dyn Source> {
    let origin = SimOrigin::new(SIZE, exec.rt(), 0);
    let mut below = raw_over(origin.clone()).await;
    for (number, layer) in layers.iter().enumerate() {
        below = if fills && number == layers.len() / 2 {
            let file: Arc<dyn Storage> = layer.file.clone();
            Image::new(layer.clone(), file, Some(Indexed::new(below)), exec.rt(), filling(true))
        } else {
            let own: Arc<dyn ReadAt> = layer.file.clone();
            let mapper: Arc<dyn Mapper> = layer.clone();
            let files = BaseFiles { own, data: origin.clone() };
            Arc::new(Base::new(mapper, files, Some(below), &exec.rt()))
        };
    }
    Indexed::new(below)
}

#[test]
fn a_second_read_asks_no_layer() {
    let exec = Exec::new(1);
    let layers: Vec<_> = (0..DEPTH).map(layer).collect();
    let (inner, asked) = (exec.clone(), layers.clone());
    exec.run(async move {
        let disk = Disk::new(Top::Base(chain(&inner, &asked, false).await, SIZE), true);
        for (offset, len) in [(0, SIZE), (SECTOR, CLUSTER), (5 * CLUSTER - SECTOR, 2 * SECTOR)] {
            let before = lookups(&asked);
            check(offset, &disk.read(offset, len as usize).await.expect("the origin answers"));
            let count = lookups(&asked) - before;
            match offset {
                0 => assert!(count >= DEPTH, "each layer is asked once"),
                _ => assert_eq!(count, 0, "{len} bytes at {offset}"),
            }
        }
        // In small pieces, from the start.
        let before = lookups(&asked);
        for offset in (0..SIZE).step_by(4096) {
            check(offset, &disk.read(offset, 4096).await.expect("the origin answers"));
        }
        assert_eq!(lookups(&asked), before);
    });
    exec.power_off();
}

#[test]
fn a_layer_that_is_filled_is_not_looked_through() {
    let exec = Exec::new(2);
    let layers: Vec<_> = (0..DEPTH).map(layer).collect();
    let (inner, asked) = (exec.clone(), layers.clone());
    exec.run(async move {
        let middle = asked.len() / 2;
        let disk = Disk::new(Top::Base(chain(&inner, &asked, true).await, SIZE), true);
        for _ in 0..2 {
            let above = lookups(&asked[middle + 1..]);
            check(0, &disk.read(0, SIZE as usize).await.expect("the origin answers"));
            inner.rt().sleep(std::time::Duration::from_secs(2)).await;
            if above > 0 {
                assert_eq!(lookups(&asked[middle + 1..]), above, "above it nothing changes");
            }
        }
        assert!(asked[middle].draw().contains('D'), "it was filled");
    });
    exec.power_off();
}
