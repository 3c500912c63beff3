//! Compressed clusters: streams that are whole, broken, or anything.

use std::io::Write;

use flate2::{Compression, write::DeflateEncoder};
use readonce_format::codec::Codec;

use crate::draw::Draw;

/// Bytes of the largest cluster that is tried; decoders are bounded by the caller's buffer, so larger ones do the same.
const CLUSTER_MAX: usize = 64 << 10;

/// Packs `cluster`.
pub(crate) fn compress(codec: Codec, cluster: &[u8]) -> Vec<u8> {
    match codec {
        Codec::Deflate => {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
            encoder.write_all(cluster).expect("memory takes it");
            encoder.finish().expect("memory takes it")
        }
        Codec::Zstd => zstd::encode_all(cluster, 3).expect("memory takes it"),
    }
}

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let codec = draw.of(&[Codec::Deflate, Codec::Zstd]);
    let len = 512 << draw.below(8);
    assert!(len <= CLUSTER_MAX);
    if draw.once_in(2) {
        any_bytes(codec, len, draw.rest());
    } else {
        broken(codec, len, &mut draw);
    }
}

/// What comes out depends on the stream alone, and a smaller cluster gets the beginning of it.
fn any_bytes(codec: Codec, len: usize, stream: &[u8]) -> Option<Vec<u8>> {
    let unpack = |len: usize, before: u8| {
        let mut cluster = vec![before; len];
        codec.decompress(stream, &mut cluster).ok().map(|()| cluster)
    };
    let cluster = unpack(len, 0);
    assert!(cluster == unpack(len, 0xee), "{codec:?}: what the buffer held before shows");
    if let Some(cluster) = &cluster {
        let half = unpack(len / 2, 0x55).expect("a part of what can be had can be had");
        assert!(half == cluster[..len / 2], "{codec:?}: half a cluster differs");
    }
    cluster
}

fn broken(codec: Codec, len: usize, draw: &mut Draw<'_>) {
    let pattern = draw.bytes(64);
    let mut cluster: Vec<u8> = pattern.iter().copied().cycle().take(len).collect();
    cluster.resize(len, 0);
    let noise = draw.below(8) as usize * len / 8;
    let mut state = 1_u32;
    for byte in &mut cluster[..noise] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    // zstd allows several frames.
    let mut stream = if codec == Codec::Zstd && draw.once_in(4) {
        let (head, tail) = cluster.split_at(draw.index(len));
        [compress(codec, head), compress(codec, tail)].concat()
    } else {
        compress(codec, &cluster)
    };
    let whole = stream.len();
    stream.extend(draw.bytes(600));
    let mut good = true;
    for _ in 0..draw.below(6) {
        let at = draw.index(whole);
        match draw.below(4) {
            0 => stream[at] = draw.byte(),
            1 => stream[at] ^= 1 << draw.below(8),
            2 => stream.truncate(at.max(1)),
            _ => stream.insert(at, draw.byte()),
        }
        good = false;
        if stream.len() < whole {
            break;
        }
    }
    let unpacked = any_bytes(codec, len, &stream);
    if good {
        assert!(unpacked.is_some_and(|unpacked| unpacked == cluster), "{codec:?}: a whole stream is refused");
    }
}
