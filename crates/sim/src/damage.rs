//! Damage: words of an image's tables become something else, at drawn places; the file is cut, or grows.
//!
//! - The header stays, but for the marks that say that the image may be wrong.
//!
//! Not here: where words lie (`testkit::tables`), what is done with the image then (`run::mending`).

use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};
use readonce_testkit::tables::{Format, Tables};

/// An entry of qcow2 that describes a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// Damages an image.
pub fn damage(format: &str, bytes: &mut Vec<u8>, rng: &mut SmallRng) {
    let qcow2 = format == "qcow2";
    let mut words = Tables { bytes, format: if qcow2 { Format::Qcow2 } else { Format::Qed } };
    let (cluster, mut levels) = (words.cluster_size(), words.levels());
    levels.retain(|level| !level.is_empty());
    for _ in 0..rng.random_range(1..6) {
        let len = words.bytes.len() as u64;
        match rng.random_range(0..16) {
            0 => {
                // Between clusters: what is cut inside of one that is a table is refused by readers, and no check tells.
                let kept = rng.random_range(1..=(len / cluster).max(1)) * cluster;
                words.bytes.truncate(kept as usize);
            }
            1 => {
                let more = rng.random_range(1..3 * cluster);
                words.bytes.extend((0..more).map(|at| (at >> 3) as u8));
            }
            2 if qcow2 && words.get(4, 4) == 3 => {
                // Dirty, or corrupt.
                let features = words.get(72, 8) | 1 << rng.random_range(0..2);
                words.set(72, 8, features);
            }
            2 if !qcow2 => {
                let features = words.get(16, 8) | 2;
                words.set(16, 8, features);
            }
            _ => {
                let Some(level) = levels.choose(rng) else { continue };
                let at = *level.choose(rng).expect("none is empty");
                let value = value(&words, &levels, at, cluster, rng);
                words.set(at, 8, value);
            }
        }
    }
}

/// What a word may become: near what could be there, or far from it.
fn value(words: &Tables<'_>, levels: &[Vec<u64>], at: u64, cluster: u64, rng: &mut SmallRng) -> u64 {
    let was = words.get(at, 8);
    let clusters = words.bytes.len() as u64 / cluster + 3;
    let near = rng.random_range(0..clusters) * cluster;
    match rng.random_range(0..12) {
        0..3 => near | [0, 1 << 63, 1, 1 << 62].choose(rng).expect("some"),
        3..5 => {
            let level = levels.choose(rng).expect("the word is of one");
            words.get(*level.choose(rng).expect("none is empty"), 8)
        }
        5 => 0,
        6 => was ^ 1 << rng.random_range(0..64),
        7 => was.wrapping_add([1, u64::MAX, cluster, cluster.wrapping_neg(), 512][rng.random_range(0..5)]),
        8 => rng.random_range(0..256),
        9 => near + [1, 8, 511, 512, cluster / 2][rng.random_range(0..5)],
        10 => COMPRESSED | near | rng.random_range(0..256) << [53, 54, 60, 61][rng.random_range(0..4)],
        _ => rng.random(),
    }
}
