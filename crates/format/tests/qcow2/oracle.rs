//! Reading: images that QEMU's tools filled, read through the mapper, equal what `qemu-img convert` makes of them.

use std::sync::Arc;

use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_format::Mapping;
use readonce_storage::{ReadAt, SimFile};

use crate::support::{BACKING_BYTES, Folder, block_on, ok, qcow2, tool};

const SIZE: u64 = (3 << 20) + 1536;

/// All that the guest sees, by lookups of at most `step` bytes.
async fn read_all(file: &Arc<SimFile>, data: Option<&[u8]>, backing: &[u8], step: u64) -> Vec<u8> {
    let reader: Arc<dyn ReadAt> = file.clone();
    let mapper = qcow2().open(reader).await.unwrap();
    let own = file.contents();
    let data = data.unwrap_or(&own);
    let size = mapper.geometry().size;
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        let offset = out.len() as u64;
        let len_max = step.min(size - offset);
        let extent = mapper.lookup(offset, len_max).await.unwrap();
        assert!((1..=len_max).contains(&extent.len), "{offset}: {extent:?}");
        // What is cached says the same.
        assert_eq!(mapper.lookup_now(offset, len_max).unwrap().unwrap(), extent);
        let end = out.len() + extent.len as usize;
        let padded = |bytes: &[u8], at: u64| -> Vec<u8> {
            let from = bytes.len().min(at as usize);
            let to = bytes.len().min((at + extent.len) as usize);
            bytes[from..to].to_vec()
        };
        match extent.mapping {
            Mapping::Absent => out.extend(padded(backing, offset)),
            Mapping::Zero => {}
            Mapping::Data(at) | Mapping::Shared(at) => out.extend(padded(data, at)),
            Mapping::Compressed(found) => {
                let stream = &own[found.at as usize..(found.at + found.len) as usize];
                let mut cluster = vec![0xee; mapper.geometry().cluster_size as usize];
                found.codec.decompress(stream, &mut cluster).unwrap();
                out.extend_from_slice(&cluster[found.skip as usize..(found.skip + extent.len) as usize]);
            }
        }
        // Past the end of a file there are zeros.
        out.resize(end, 0);
    }
    out
}

/// Commands of qemu-io: data, zeros and holes anywhere, compressed clusters where the image can have them.
fn commands(rng: &mut SmallRng, cluster_size: u64, compressed: bool, count: u32) -> Vec<String> {
    (0..count)
        .map(|number| {
            let len = rng.random_range(1..=150_000u64);
            let at = rng.random_range(0..SIZE - len);
            let pattern = number % 255 + 1;
            match rng.random_range(0..6) {
                0 => format!("write -z {} {}", at / 512 * 512, len.div_ceil(512) * 512),
                1 => format!("write -z -u {} {}", at / cluster_size * cluster_size, cluster_size),
                2 => format!("discard {} {}", at / cluster_size * cluster_size, cluster_size),
                3 | 4 if compressed => {
                    let clusters = (len / cluster_size).clamp(1, 8);
                    let at = (at / cluster_size).min(SIZE / cluster_size - clusters);
                    format!("write -c -P {pattern} {} {}", at * cluster_size, clusters * cluster_size)
                }
                _ => format!("write -P {pattern} {at} {len}"),
            }
        })
        .filter(|command| {
            // What reaches past the end is no command.
            let mut words = command.split(' ').rev().map(|word| word.parse::<u64>());
            let (len, at) = (words.next().unwrap().unwrap(), words.next().unwrap().unwrap());
            at + len <= SIZE
        })
        .collect()
}

fn io(path: &str, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(path);
    // QEMU refuses to compress what is there already.
    let (text, _) = tool("qemu-io", &args);
    assert!(text.contains("wrote "), "{text}");
}

#[test]
fn reads_what_qemu_wrote() {
    let folder = Folder::new();
    let backing_bytes = std::fs::read(folder.path("backing.raw")).unwrap();
    for (seed, (options, cluster_size)) in (0..).zip([
        ("", 65536),
        ("compat=0.10", 65536),
        ("compat=0.10,cluster_size=512", 512),
        ("cluster_size=1k,compression_type=zstd,refcount_bits=1", 1024),
        ("cluster_size=4k,lazy_refcounts=on,refcount_bits=64", 4096),
        ("cluster_size=2M,compression_type=zstd", 2 << 20),
        ("cluster_size=1M", 1 << 20),
        ("extended_l2=on,cluster_size=16k", 16384),
        ("extended_l2=on,cluster_size=128k,compression_type=zstd", 131_072),
        ("data_file=DATA,cluster_size=8k", 8192),
        ("data_file=DATA,extended_l2=on", 65536),
        ("data_file=DATA,data_file_raw=on", 65536),
    ]) {
        for backing in [false, true] {
            let external = options.contains("DATA");
            if backing && options.contains("raw") {
                continue;
            }
            let context = format!("{options} {backing}");
            let options = options.replace("DATA", &folder.text("data.raw"));
            folder.qemu_create("image", &options, backing, &SIZE.to_string()).unwrap();
            let path = folder.text("image");
            let mut rng = SmallRng::seed_from_u64(seed);
            // A compressed cluster has one bit of refcount only where its neighbours lie in others.
            let compressed = !external && !options.contains("refcount_bits=1");
            for round in 0..3 {
                io(&path, &commands(&mut rng, cluster_size, compressed, 12));
                ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path, &folder.text("theirs.raw")]);
                let theirs = std::fs::read(folder.path("theirs.raw")).unwrap();
                let data = external.then(|| std::fs::read(folder.path("data.raw")).unwrap());
                let backing_bytes = if backing { backing_bytes.as_slice() } else { &[] };
                let step = [u64::MAX, 100_000, 3000][round];
                let ours = block_on(read_all(&folder.load("image"), data.as_deref(), backing_bytes, step));
                assert!(ours == theirs, "{context}, round {round}: differ at {:?}", differ(&ours, &theirs));
                if !external && !options.contains("refcount_bits=1") {
                    ok("qemu-img", &["snapshot", "-c", &format!("round{round}"), &path]);
                }
            }
        }
    }
}

fn differ(ours: &[u8], theirs: &[u8]) -> Option<usize> {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs)
}

#[test]
fn reads_a_compressed_image() {
    let folder = Folder::new();
    let backing = std::fs::read(folder.path("backing.raw")).unwrap();
    let mut rng = SmallRng::seed_from_u64(7);
    for options in [
        "cluster_size=512",
        "",
        "cluster_size=2M",
        "compression_type=zstd",
        "extended_l2=on,compression_type=zstd,cluster_size=32k",
    ] {
        // Half of the bytes are noise, so that clusters of every length follow each other.
        let mut bytes = backing.clone();
        bytes.chunks_mut(1024).for_each(|chunk| {
            let noise = rng.random_range(0..=chunk.len());
            rng.fill(&mut chunk[..noise]);
        });
        folder.save("source.raw", &SimFile::from_bytes(&bytes));
        let (source, path) = (folder.text("source.raw"), folder.text("image"));
        let mut args = vec!["convert", "-c", "-f", "raw", "-O", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([source.as_str(), &path]);
        ok("qemu-img", &args);
        let file = folder.load("image");
        let found = block_on(read_all(&file, None, &[], u64::MAX));
        assert!(found == bytes, "{options}: differ at {:?}", differ(&found, &bytes));
        assert_eq!(found.len() as u64, BACKING_BYTES);
    }
}
