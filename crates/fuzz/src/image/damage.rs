//! Damage: fields, entries and bytes of an image become something else, at drawn places; the file is cut or grows.
//!
//! - Values are near what could be there, or far from it.

use readonce_testkit::tables::{Format, OFFSET, Tables};

use super::make::Made;
use crate::draw::Draw;

/// Fields of the header: offset and bytes.
fn fields(format: Format) -> Vec<(u64, usize)> {
    match format {
        Format::Qed => {
            [(4, 4), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4), (60, 4)].to_vec()
        }
        Format::Qcow2 => [
            (4, 4),
            (8, 8),
            (16, 4),
            (20, 4),
            (24, 8),
            (32, 4),
            (36, 4),
            (40, 8),
            (48, 8),
            (56, 4),
            (60, 4),
            (64, 8),
            (72, 8),
            (80, 8),
            (88, 8),
            (96, 4),
            (100, 4),
            (104, 1),
            (112, 4),
            (116, 4),
            (120, 4),
            (124, 4),
        ]
        .to_vec(),
    }
}

/// Sets a number, and says so.
fn set(words: &mut Tables<'_>, at: u64, len: usize, value: u64) {
    tell!("{len} bytes at {at:#x} become {value:#x}");
    words.set(at, len, value);
}

/// Whether a cluster of a qcow2 image's L1 table is one of its L2 tables too.
pub(crate) fn l1_is_l2(made: &mut Made) -> bool {
    let words = Tables { bytes: &mut made.file, format: Format::Qcow2 };
    let (start, len) = (words.get(40, 8), words.get(36, 4) * 8);
    let end = start.saturating_add(len).min(words.bytes.len() as u64);
    (start..end).step_by(8).any(|at| (start..end).contains(&(words.get(at, 8) & OFFSET)))
}

/// Damages the image's file. Returns the bytes of a hole behind it.
pub(crate) fn damage(format: Format, made: &mut Made, draw: &mut Draw<'_>) -> u64 {
    let cluster = made.cluster_size;
    let file_len = made.file.len() as u64;
    let mut tail = made.tail;
    let mut words = Tables { bytes: &mut made.file, format };
    let levels: Vec<Vec<u64>> = words.levels().into_iter().filter(|level| !level.is_empty()).collect();
    let fields = fields(format);
    for _ in 0..draw.below(8) {
        match draw.below(16) {
            0..=8 => {
                let level = &levels[draw.index(levels.len())];
                let at = level[draw.index(level.len())];
                let was = words.get(at, 8);
                let value = match draw.below(8) {
                    0 => words.get(level[draw.index(level.len())], 8),
                    1 => {
                        let other = &levels[draw.index(levels.len())];
                        words.get(other[draw.index(other.len())], 8)
                    }
                    _ => value(was, cluster, file_len, draw),
                };
                set(&mut words, at, 8, value);
            }
            9..=11 => {
                let (at, len) = fields[draw.index(fields.len())];
                let was = words.get(at, len);
                let value = value(was, cluster, file_len, draw);
                set(&mut words, at, len, value);
            }
            12 => {
                // Where names, extensions and records lie.
                let at = draw.below(cluster.min(600));
                set(&mut words, at, 1, draw.byte().into());
            }
            13 => {
                let at = draw.below(cluster.min(600));
                let bytes = draw.bytes(40).to_vec();
                let room = words.bytes.iter_mut().skip(at as usize);
                room.zip(bytes).for_each(|(to, from)| *to = from);
            }
            14 => {
                let at = draw.below(file_len.clamp(1, 1 << 16));
                set(&mut words, at, 1, draw.byte().into());
            }
            _ => {
                let len = match draw.below(3) {
                    0 => file_len.saturating_sub(draw.below(2 * cluster)),
                    1 => file_len / cluster.max(1) * draw.below(256) / 256 * cluster,
                    _ => draw.below(file_len.max(1)),
                };
                tell!("cut from {file_len} to {len}");
                words.bytes.truncate(len as usize);
                tail = 0;
            }
        }
    }
    match draw.below(32) {
        // A hole as long as a file can be takes a second to check; tests of its own try that.
        31 => tail + (1 << draw.below(36)),
        29..=30 => tail + draw.below(4 * cluster),
        _ => tail,
    }
}

/// What a word, a field or an entry may become.
fn value(was: u64, cluster: u64, file_len: u64, draw: &mut Draw<'_>) -> u64 {
    let clusters = file_len / cluster + 3;
    let near = |draw: &mut Draw<'_>| draw.below(clusters.max(1)) * cluster;
    match draw.below(12) {
        0..=3 => near(draw) | draw.of(&[0, 1 << 63, 0, 1 << 63, 1, 1 << 62]),
        4 => was ^ 1 << draw.below(64),
        5 => was.wrapping_add(draw.of(&[1, u64::MAX, cluster, cluster.wrapping_neg(), 512, 8])),
        6 => draw.below(256),
        7 => 1 << draw.below(64),
        8 => draw.of(&[0, u64::MAX, u64::MAX >> 1, u64::MAX << 9, 1 << 56, (1 << 56) - 512, u64::MAX << 32]),
        9 => near(draw) + draw.of(&[1, 8, 511, 512, cluster / 2]),
        10 => 1 << 62 | near(draw) | draw.below(256) << draw.of(&[53, 54, 60, 61]),
        _ => draw.number(),
    }
}
