//! Codec: how a compressed cluster becomes bytes again.
//!
//! - A zlib stream is raw deflate without a zlib header; a zstd stream is one frame or several.
//! - A stream is done once the cluster is full: what follows it belongs to others. One that ends before is broken.
//! - Memory is bounded by the caller's buffer and the decoder's window.
//!
//! Not here: where streams lie (the format), who decompresses when (`readonce-disk`).

use std::io::Read;

use crate::FormatError;

/// The largest zstd window that is accepted, as a power of two: 8 MiB, four times the largest cluster.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How a cluster is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate.
    Deflate,
    /// Zstandard.
    Zstd,
}

impl Codec {
    /// Fills `cluster`, a whole cluster, from `stream`, which may go on past the stream's end.
    ///
    /// # Errors
    /// `Corrupt` where the stream is broken or too short.
    pub fn decompress(self, stream: &[u8], cluster: &mut [u8]) -> Result<(), FormatError> {
        let done = match self {
            Self::Deflate => flate2::read::DeflateDecoder::new(stream).read_exact(cluster),
            Self::Zstd => zstd(stream, cluster),
        };
        done.map_err(|error| {
            FormatError::corrupt("compressed cluster", error, "must hold a whole cluster of compressed bytes")
        })
    }
}

fn zstd(stream: &[u8], cluster: &mut [u8]) -> std::io::Result<()> {
    let mut rest = stream;
    let mut done = 0;
    while let Some(left) = cluster.get_mut(done..).filter(|left| !left.is_empty()) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(rest)?.single_frame();
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        let mut filled = 0;
        while let Some(room) = left.get_mut(filled..).filter(|room| !room.is_empty()) {
            match decoder.read(room)? {
                0 => break,
                count => filled += count,
            }
        }
        let after = decoder.finish();
        if filled == 0 && after.len() == rest.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        rest = after;
        done += filled;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::DeflateEncoder, write::ZlibEncoder};
    use proptest::prelude::*;

    use super::*;

    const CLUSTER: usize = 64 << 10;

    /// Half of it can be compressed.
    fn cluster() -> Vec<u8> {
        let mut noise = 1u32;
        (0..CLUSTER)
            .map(|at| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if at / 700 % 2 == 0 { (noise >> 24) as u8 } else { (at / 700) as u8 }
            })
            .collect()
    }

    fn compress(codec: Codec, bytes: &[u8]) -> Vec<u8> {
        match codec {
            Codec::Deflate => {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Codec::Zstd => zstd::encode_all(bytes, 3).unwrap(),
        }
    }

    fn decompress(codec: Codec, stream: &[u8]) -> Option<Vec<u8>> {
        let mut cluster = vec![0xee; CLUSTER];
        codec.decompress(stream, &mut cluster).is_ok().then_some(cluster)
    }

    const CODECS: [Codec; 2] = [Codec::Deflate, Codec::Zstd];

    #[test]
    fn what_follows_a_stream_belongs_to_others() {
        for codec in CODECS {
            let stream = compress(codec, &cluster());
            for behind in [&[][..], &[0; 511], &[0xff; 4096], &compress(codec, b"others'")] {
                assert_eq!(decompress(codec, &[&stream, behind].concat()).unwrap(), cluster(), "{codec:?}");
            }
        }
    }

    #[test]
    fn a_stream_that_ends_early_is_broken() {
        for codec in CODECS {
            let stream = compress(codec, &cluster());
            // The last bytes of a stream may hold its end alone.
            for len in (0..stream.len() - 16).step_by(97) {
                assert!(decompress(codec, &stream[..len]).is_none(), "{codec:?} {len}");
            }
            assert!(decompress(codec, &compress(codec, &cluster()[1..])).is_none(), "{codec:?}");
            assert!(decompress(codec, &compress(codec, b"")).is_none(), "{codec:?}");
        }
    }

    #[test]
    fn a_stream_that_inflates_beyond_a_cluster_is_cut() {
        for codec in CODECS {
            let bomb = compress(codec, &vec![7; 256 << 20]);
            assert!(bomb.len() < 1 << 20, "{codec:?}");
            assert_eq!(decompress(codec, &bomb).unwrap(), vec![7; CLUSTER], "{codec:?}");
        }
    }

    #[test]
    fn zstd_in_several_frames() {
        let whole = cluster();
        let (first, rest) = whole.split_at(1000);
        let (second, third) = rest.split_at(30_000);
        let frames = [first, second, b"", third].map(|part| compress(Codec::Zstd, part)).concat();
        assert_eq!(decompress(Codec::Zstd, &frames).unwrap(), whole);
        // Only empty frames: an end is reached.
        assert!(decompress(Codec::Zstd, &compress(Codec::Zstd, b"").repeat(1000)).is_none());
    }

    #[test]
    fn zstd_with_a_window_beyond_the_bound_is_refused() {
        let window = |log: u32| {
            let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            // A frame of unknown length states its window.
            encoder.write_all(&cluster()).unwrap();
            encoder.finish().unwrap()
        };
        assert!(decompress(Codec::Zstd, &window(ZSTD_WINDOW_LOG_MAX)).is_some());
        assert!(decompress(Codec::Zstd, &window(ZSTD_WINDOW_LOG_MAX + 1)).is_none());
    }

    #[test]
    fn a_stream_of_the_other_kind_is_refused() {
        assert!(decompress(Codec::Zstd, &compress(Codec::Deflate, &cluster())).is_none());
        assert!(decompress(Codec::Deflate, &compress(Codec::Zstd, &cluster())).is_none());
        // A header of zlib's is none of raw deflate's: its first byte is the start of a block of a reserved type or of stored
        // bytes whose length does not fit.
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(&cluster()).unwrap();
        assert!(decompress(Codec::Deflate, &zlib.finish().unwrap()).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes(stream in prop::collection::vec(any::<u8>(), 0..3000)) {
            for codec in CODECS {
                let _ = decompress(codec, &stream);
                let _ = decompress(codec, &[&[0x28, 0xb5, 0x2f, 0xfd], stream.as_slice()].concat());
            }
        }

        #[test]
        fn broken_streams(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            for codec in CODECS {
                let mut stream = compress(codec, &cluster());
                for (at, value) in &edits {
                    let at = at.index(stream.len());
                    stream[at] = *value;
                }
                let _ = decompress(codec, &stream);
            }
        }
    }
}
