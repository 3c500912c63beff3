//! Remote: the file that the origin serves: the cells of a backing, raw or as a qcow2 image. Images with compressed clusters, too,
//! that only need a backing.
//!
//! - The image is put together here, apart from the driver: what the driver reads was not written by it. Compressed clusters are
//!   packed one behind the other, as `qemu-img convert -c` does it.
//!
//! Not here: how it is served (`server`).

use std::io::Write;

use bytes::Bytes;

use crate::{shape::Remote, stamp};

/// Bytes of a cluster of the remote image.
pub const CLUSTER: usize = 4096;
const CLUSTER_BITS: u32 = 12;
/// Entries of an L2 table, and of a refcount block.
const L2_ENTRIES: usize = CLUSTER / 8;
const BLOCK_ENTRIES: usize = CLUSTER / 2;
/// Where the offset ends in a compressed cluster's entry.
const COMPRESSED_BITS: u32 = 62 - (CLUSTER_BITS - 8);

/// The file, with `version`'s stamps in the first `len` bytes.
pub fn file(remote: Remote, version: u64, len: u64, cell: u64) -> Bytes {
    let mut guest = vec![0; len as usize];
    stamp::fill(&mut guest, cell, 0, |at| stamp::of_backing(version, at));
    match remote {
        Remote::Nothing => Bytes::new(),
        Remote::Raw => guest.into(),
        Remote::Qcow2(packing) => image(&guest, packing, Zeros::Said),
    }
}

/// A qcow2 image without a backing in which clusters of zeros are absent and the others packed.
pub fn packed(guest: &[u8], packing: Packing) -> Bytes {
    image(guest, packing, Zeros::Absent)
}

/// How an image holds its clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As they are.
    Plain,
    /// Compressed, each by itself.
    Deflate,
    /// The same, by another method.
    Zstd,
}

/// What stands for a cluster of zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeros {
    /// In turn nothing and a zero cluster: without a backing both read as zeros.
    Said,
    /// Nothing.
    Absent,
}

fn put_u32(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put_u64(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// A qcow2 image, version 3, of these bytes.
fn image(guest: &[u8], packing: Packing, zeros: Zeros) -> Bytes {
    let clusters = guest.len().div_ceil(CLUSTER);
    let tables = clusters.div_ceil(L2_ENTRIES).max(1);
    assert!(tables <= L2_ENTRIES, "the L1 table is one cluster");
    // Header, refcount table, refcount block, L1 table, L2 tables, data.
    let l1 = 3 * CLUSTER;
    let data = l1 + CLUSTER + tables * CLUSTER;
    let mut file = vec![0; data];
    let mut counts = vec![1u16; data / CLUSTER];
    let mut count = |range: std::ops::Range<usize>| {
        for cluster in range.start / CLUSTER..range.end.div_ceil(CLUSTER) {
            counts.resize(counts.len().max(cluster + 1), 0);
            counts[cluster] += 1;
        }
    };
    for table in 0..tables {
        put_u64(&mut file, l1 + table * 8, ((l1 + CLUSTER + table * CLUSTER) as u64) | 1 << 63);
    }
    for (index, bytes) in guest.chunks(CLUSTER).enumerate() {
        let entry = l1 + CLUSTER + index * 8;
        if bytes.iter().all(|&byte| byte == 0) {
            let is_zero_cluster = zeros == Zeros::Said && index % 2 == 1;
            put_u64(&mut file, entry, u64::from(is_zero_cluster));
            continue;
        }
        let mut whole = bytes.to_vec();
        whole.resize(CLUSTER, 0);
        let packed = match packing {
            Packing::Deflate => Some(deflate(&whole)),
            Packing::Zstd => Some(zstd::bulk::compress(&whole, 1).expect("memory takes it")),
            Packing::Plain => None,
        };
        let packed = packed.filter(|packed| packed.len() < CLUSTER);
        match packed {
            Some(packed) => {
                let at = file.len();
                let sectors = (at + packed.len() - 1) / 512 - at / 512;
                put_u64(&mut file, entry, 1 << 62 | (sectors as u64) << COMPRESSED_BITS | at as u64);
                count(at..at + packed.len());
                file.extend(packed);
            }
            None => {
                let at = file.len().next_multiple_of(CLUSTER);
                file.resize(at, 0);
                put_u64(&mut file, entry, at as u64 | 1 << 63);
                count(at..at + CLUSTER);
                file.extend(whole);
            }
        }
    }
    file.resize(file.len().next_multiple_of(CLUSTER), 0);
    assert!(counts.len() <= BLOCK_ENTRIES, "the refcounts are one block");
    put_u64(&mut file, CLUSTER, 2 * CLUSTER as u64);
    for (index, count) in counts.iter().enumerate() {
        file[2 * CLUSTER + index * 2..][..2].copy_from_slice(&count.to_be_bytes());
    }
    file[..4].copy_from_slice(b"QFI\xfb");
    put_u32(&mut file, 4, 3);
    put_u32(&mut file, 20, CLUSTER_BITS);
    put_u64(&mut file, 24, guest.len() as u64);
    put_u32(&mut file, 36, tables as u32);
    put_u64(&mut file, 40, l1 as u64);
    put_u64(&mut file, 48, CLUSTER as u64);
    put_u32(&mut file, 56, 1);
    // Refcounts of 16 bits; the header's length.
    put_u32(&mut file, 96, 4);
    put_u32(&mut file, 100, 104);
    if packing == Packing::Zstd {
        // An incompatible feature: a field of its own names the method.
        put_u64(&mut file, 72, 1 << 3);
        put_u32(&mut file, 100, 112);
        file[104] = 1;
    }
    file.into()
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory takes it");
    encoder.finish().expect("memory takes it")
}
