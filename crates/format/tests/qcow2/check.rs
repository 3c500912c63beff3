//! Check: every count as `qemu-img check` has it, on healthy images over the grid of options and on broken ones.

use std::sync::Arc;

use readonce_format::driver::CheckReport;
use readonce_storage::{
    ReadAt,
    sim::{Fault, Lasts},
};

use crate::{
    damage::{Bytes, COMPRESSED, COPIED, Folder, OFFSET},
    support::{block_on, ok, qcow2},
};

fn ours(bytes: &Bytes) -> CheckReport {
    block_on(qcow2().check(&bytes.reader())).unwrap()
}

/// Both say the same of the image; returns it.
fn agree(folder: &Folder, bytes: &Bytes, context: &str) -> CheckReport {
    folder.save("checked.qcow2", &bytes.0);
    let theirs = folder.check("checked.qcow2").unwrap_or_else(|| panic!("{context}: qemu-img cannot check"));
    let ours = ours(bytes);
    assert_eq!(ours, theirs, "{context}: ours, theirs");
    ours
}

/// Found by the simulator (seed 217810): tables are read twice, and an error of the second read alone was not counted. A repair then took
/// the marks off an image that it had not seen.
#[test]
fn an_error_at_any_read_is_counted() {
    let folder = Folder::new();
    folder.create("image.qcow2", "cluster_size=512,compat=0.10", "64k", &["write -P 1 0 3k"]);
    let mut bytes = folder.load("image.qcow2");
    bytes.clear64(bytes.l1(), COPIED);
    assert_eq!(ours(&bytes).corruptions, 1);
    for nth in 1.. {
        let file = bytes.file();
        file.fail_nth(nth, Fault::Eio, Lasts::Once);
        let reader: Arc<dyn ReadAt> = file.clone();
        let checked = block_on(qcow2().check(&reader));
        if file.fault_hits() == 0 {
            assert!(nth > 5);
            return;
        }
        assert!(checked.is_err() || checked.is_ok_and(|report| report.check_errors > 0), "read {nth}");
    }
}

const WRITES: [&str; 7] = [
    "write -P 1 0 192k",
    "write -P 2 1M 64k",
    "write -P 3 640k 1000",
    "write -z 1536k 128k",
    "write -z 64k 64k",
    "write -P 4 2049k 7k",
    "discard 1M 64k",
];

#[test]
fn healthy_images_over_the_grid() {
    let folder = Folder::new();
    let mut grid: Vec<String> = Vec::new();
    for cluster_size in ["512", "4k", "64k", "2M"] {
        grid.push(format!("cluster_size={cluster_size}"));
        grid.push(format!("cluster_size={cluster_size},compat=0.10"));
    }
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        grid.push(format!("cluster_size=4k,refcount_bits={bits}"));
    }
    grid.push("refcount_bits=64,cluster_size=512,preallocation=metadata".into());
    grid.push("extended_l2=on,cluster_size=16k".into());
    grid.push("extended_l2=on".into());
    grid.push("lazy_refcounts=on".into());
    grid.push("preallocation=metadata".into());
    grid.push("preallocation=falloc,extended_l2=on".into());
    grid.push("compression_type=zstd".into());
    for raw in ["on", "off"] {
        grid.push(format!("data_file={},data_file_raw={raw}", folder.text("data.raw")));
    }
    for options in grid {
        let v2 = options.contains("0.10");
        let data_file = options.contains("data_file");
        let bits: u64 = options
            .split_once("refcount_bits=")
            .map_or(16, |(_, bits)| bits.split(',').next().unwrap().parse().unwrap());
        folder.create("image.qcow2", &options, "4M", &WRITES);
        let report = agree(&folder, &folder.load("image.qcow2"), &options);
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{options}");
        if data_file || bits == 1 {
            continue;
        }
        let image = folder.text("image.qcow2");
        for (name, command) in [("one", "write -P 8 128k 70k"), ("two", "write -P 9 2M 64k")] {
            ok("qemu-img", &["snapshot", "-c", name, &image]);
            folder.io("image.qcow2", &[command]);
        }
        if !v2 {
            ok("qemu-img", &["bitmap", "--add", "--enable", &image, "bits"]);
            folder.io("image.qcow2", &["write -P 10 3M 64k"]);
        }
        let report = agree(&folder, &folder.load("image.qcow2"), &options);
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{options}");
    }
}

#[test]
fn compressed_images() {
    let folder = Folder::new();
    let mut raw = Vec::new();
    let mut random = 1_u32;
    for cluster in 0..40 {
        for byte in 0..65536 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noisy = byte < cluster * 1500;
            raw.push(if noisy { (random >> 24) as u8 } else { cluster as u8 });
        }
    }
    folder.save("plain.raw", &raw);
    for options in [
        "",
        "compression_type=zstd",
        "compat=0.10",
        "cluster_size=4k",
        "cluster_size=2M",
        "refcount_bits=1",
        "extended_l2=on",
        "cluster_size=512,refcount_bits=2",
    ] {
        let (from, to) = (folder.text("plain.raw"), folder.text("image.qcow2"));
        let mut args = vec!["convert", "-c", "-f", "raw", "-O", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([from.as_str(), to.as_str()]);
        ok("qemu-img", &args);
        let report = agree(&folder, &folder.load("image.qcow2"), options);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options}");
        assert!(report.compressed_clusters > 0, "{options}");
        folder.io("image.qcow2", &["write -P 1 64k 64k", "write -P 1 1M 512"]);
        agree(&folder, &folder.load("image.qcow2"), options);
    }

    // The offsets of the last image with clusters of 64 KiB, broken.
    let (from, to) = (folder.text("plain.raw"), folder.text("image.qcow2"));
    ok("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &from, &to]);
    let good = folder.load("image.qcow2");
    let entry = good.l2(0) + 8;
    for (context, value) in [
        ("past the end", COMPRESSED | 1 << 30),
        ("over the end", COMPRESSED | 0xff << 54 | (good.len() - 100)),
        ("over the end, but not by a cluster", COMPRESSED | 0xff << 54 | (good.len() - 65636)),
        ("the same stream twice", good.u64(entry + 8)),
        ("at the header", COMPRESSED),
        ("COPIED", good.u64(entry) | COPIED),
    ] {
        let mut bytes = good.clone();
        bytes.put64(entry, value);
        agree(&folder, &bytes, context);
    }
}

/// One thing that is broken.
pub type Damage = (&'static str, fn(&mut Bytes));

/// What can be broken in an image of clusters of 4 KiB with data under two L1 entries. The last cluster is data.
pub const DAMAGES: &[Damage] = &[
    ("L1: reserved bit 0", |b| b.or64(b.l1(), 1)),
    ("L1: reserved bit 60", |b| b.or64(b.l1(), 1 << 60)),
    ("L1: past the end", |b| b.put64(b.l1(), COPIED | 1 << 30)),
    ("L1: COPIED missing", |b| b.clear64(b.l1(), COPIED)),
    ("L1: two name one table", |b| b.put64(b.l1() + 8, b.u64(b.l1()))),
    ("L1: cleared", |b| b.put64(b.l1(), 0)),
    ("L1: a refcount block", |b| b.put64(b.l1() + 8, b.block(0))),
    ("L1: unaligned", |b| b.add64(b.l1(), 512)),
    ("L1: only COPIED", |b| b.put64(b.l1() + 8, COPIED)),
    ("L1: itself", |b| b.put64(b.l1() + 8, b.l1())),
    ("L2: reserved bit 1", |b| b.or64(b.l2(0) + 8, 2)),
    ("L2: reserved bit 58", |b| b.or64(b.l2(0) + 8, 1 << 58)),
    ("L2: reserved bit of nothing", |b| b.put64(b.l2(0) + 8 * 300, 2)),
    ("L2: unaligned data", |b| b.add64(b.l2(0) + 8, 512)),
    ("L2: unaligned zeros", |b| b.add64(b.l2(0) + 8, 513)),
    ("L2: past the end", |b| b.put64(b.l2(0) + 8, COPIED | 1 << 30)),
    ("L2: just past the end", |b| b.put64(b.l2(0) + 8, COPIED | b.len())),
    ("L2: zeros past the end", |b| b.put64(b.l2(0) + 8, COPIED | b.len() | 1)),
    ("L2: two name one cluster", |b| b.put64(b.l2(0) + 8, b.u64(b.l2(0) + 16))),
    ("L2: three name one cluster", |b| {
        let entry = b.u64(b.l2(0) + 16);
        b.put64(b.l2(0) + 8, entry);
        b.put64(b.l2(1) + 8, entry);
    }),
    ("L2: COPIED missing", |b| b.clear64(b.l2(0) + 8, COPIED)),
    ("L2: leak", |b| b.put64(b.l2(0) + 8, 0)),
    ("L2: only COPIED", |b| b.put64(b.l2(0) + 8, COPIED)),
    ("L2: plain zeros with COPIED", |b| b.put64(b.l2(0) + 8, COPIED | 1)),
    ("L2: names its own table", |b| b.put64(b.l2(0) + 8, COPIED | b.l2(0))),
    ("L2: names the header's L1 table", |b| b.put64(b.l2(0) + 8, COPIED | b.l1())),
    ("L2: names a refcount block", |b| b.put64(b.l2(0) + 8, COPIED | b.block(0))),
    ("L2: names the refcount table", |b| b.put64(b.l2(0) + 8, COPIED | b.table())),
    ("L2: compressed by mistake", |b| {
        let entry = b.u64(b.l2(0) + 8) & !COPIED;
        b.put64(b.l2(0) + 8, COMPRESSED | entry);
    }),
    ("L2: compressed with COPIED", |b| b.or64(b.l2(0) + 8, COMPRESSED)),
    ("table: reserved bit", |b| b.or64(b.table(), 1)),
    ("table: unaligned", |b| b.add64(b.table(), 512)),
    ("table: past the end", |b| b.put64(b.table(), 1 << 30)),
    ("table: cleared", |b| b.put64(b.table(), 0)),
    ("table: two entries name one block", |b| b.put64(b.table() + 8, b.u64(b.table()))),
    ("table: second entry past the end", |b| b.put64(b.table() + 8, 1 << 30)),
    ("table: an L2 table", |b| b.put64(b.table(), b.l2(0))),
    ("table: itself", |b| b.put64(b.table(), b.table())),
    ("table: the header", |b| b.put64(b.table() + 8 * 3, b.cluster() * 3)),
    ("header: refcount table past the end", |b| b.put64(48, 1 << 30)),
    ("header: no refcount table", |b| b.put32(56, 0)),
    ("header: refcount table too long", |b| b.put32(56, 3)),
    ("header: refcount table is the L1 table", |b| b.put64(48, b.l1())),
    ("header: refcount table is data", |b| b.put64(48, b.u64(b.l2(0)) & OFFSET)),
    ("block: zeros", |b| {
        let (at, len) = (b.block(0) as usize, b.cluster() as usize);
        b.0[at..at + len].fill(0);
    }),
    ("block: ones", |b| {
        let (at, len) = (b.block(0) as usize, b.cluster() as usize);
        b.0[at..at + len].fill(0xff);
    }),
    ("block: two leaks", |b| b.put32(b.block(0), 0x0002_0005)),
    ("block: a leak past the end", |b| b.put32(b.block(0) + 2000, 0x0001_0001)),
    ("block: one too low", |b| b.put32(b.block(0) + 8, 0x0001_0000)),
    ("file: dirty", |b| b.or64(72, 1)),
    ("file: corrupt", |b| b.or64(72, 2)),
    ("file: longer", |b| b.0.extend([0; 4096 * 3])),
    ("file: longer by a part", |b| b.0.extend([0; 100])),
    ("file: cut in the last cluster", |b| b.0.truncate(b.0.len() - 4000)),
    ("file: the last cluster is gone", |b| b.0.truncate(b.0.len() - 4096)),
    ("file: the last four clusters are gone", |b| b.0.truncate(b.0.len() - 4 * 4096)),
    ("several", |b| {
        b.or64(b.table(), 1);
        b.put64(b.l2(0) + 8, 0);
        b.put64(b.l2(0) + 16, b.u64(b.l2(0) + 24));
        b.or64(b.l1(), 2);
    }),
];

/// An image for [`DAMAGES`].
pub fn plain_image(folder: &Folder, options: &str) -> Bytes {
    folder.create(
        "plain.qcow2",
        &format!("cluster_size=4k{options}"),
        "4M",
        &["write -P 1 0 64k", "write -P 2 2M 16k", "write -z 1M 8k", "write -z 0 4k"],
    );
    folder.load("plain.qcow2")
}

#[test]
fn damaged_images() {
    let folder = Folder::new();
    let good = plain_image(&folder, "");
    for (context, damage) in DAMAGES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        agree(&folder, &bytes, context);
    }
}

/// What can be broken in the snapshots of an image.
pub const SNAPSHOT_DAMAGES: &[Damage] = &[
    ("L1 unaligned", |b| b.add64(b.snapshots(), 512)),
    ("L1 past the end", |b| b.put64(b.snapshots(), 1 << 30)),
    ("L1 too long", |b| b.put32(b.snapshots() + 8, 1 << 24)),
    ("L1 too short", |b| b.put32(b.snapshots() + 8, 1)),
    ("one fewer", |b| b.put32(60, 1)),
    ("COPIED in its L1 table", |b| b.or64(b.u64(b.snapshots()), COPIED)),
    ("a wrong entry in its L1 table", |b| b.put64(b.u64(b.snapshots()), 1 << 30)),
    ("its L1 table is the active one", |b| b.put64(b.snapshots(), b.l1())),
    ("a wrong entry in a shared L2 table", |b| b.or64((b.u64(b.u64(b.snapshots())) & OFFSET) + 24, 2)),
    ("data under the snapshot only", |b| b.put64((b.u64(b.u64(b.snapshots())) & OFFSET) + 8, 0)),
];

/// An image for [`SNAPSHOT_DAMAGES`].
pub fn snapshot_image(folder: &Folder) -> Bytes {
    plain_image(folder, "");
    let image = folder.text("plain.qcow2");
    ok("qemu-img", &["snapshot", "-c", "one", &image]);
    folder.io("plain.qcow2", &["write -P 3 4k 8k"]);
    ok("qemu-img", &["snapshot", "-c", "two", &image]);
    folder.io("plain.qcow2", &["write -P 4 2M 4k"]);
    folder.load("plain.qcow2")
}

#[test]
fn damaged_snapshots() {
    let folder = Folder::new();
    let good = snapshot_image(&folder);
    assert_eq!(agree(&folder, &good, "healthy").corruptions, 0);
    for (context, damage) in SNAPSHOT_DAMAGES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        agree(&folder, &bytes, context);
    }
}

/// What can be broken in an image with extended L2 entries, clusters of 16 KiB.
pub const EXTENDED_DAMAGES: &[Damage] = &[
    ("allocated and zero", |b| b.put64(b.l2(0) + 8, 0x1_ffff_ffff)),
    ("allocated without a cluster", |b| b.put64(b.l2(0) + 16 * 10 + 8, 1)),
    ("both without a cluster", |b| b.put64(b.l2(0) + 16 * 10 + 8, 0x1_0000_0001)),
    ("bit 0", |b| b.or64(b.l2(0), 1)),
    ("unaligned", |b| b.add64(b.l2(0), 512)),
    ("unaligned, nothing allocated", |b| {
        b.add64(b.l2(0), 512);
        b.put64(b.l2(0) + 8, 0);
    }),
    ("compressed with a bitmap", |b| {
        b.clear64(b.l2(0), COPIED);
        b.or64(b.l2(0), COMPRESSED);
    }),
    ("compressed", |b| {
        b.clear64(b.l2(0), COPIED);
        b.or64(b.l2(0), COMPRESSED);
        b.put64(b.l2(0) + 8, 0);
    }),
    ("past the end", |b| b.put64(b.l2(0), COPIED | 1 << 30)),
];

/// An image for [`EXTENDED_DAMAGES`].
pub fn extended_image(folder: &Folder) -> Bytes {
    let writes = [
        "write -P 1 0 64k",
        "write -P 2 64k 1k",
        "write -z 80k 1k",
        "write -P 3 96k 16k",
        "write -z 96k 512",
    ];
    folder.create("extended.qcow2", "extended_l2=on,cluster_size=16k", "8M", &writes);
    folder.load("extended.qcow2")
}

#[test]
fn damaged_extended_entries() {
    let folder = Folder::new();
    let good = extended_image(&folder);
    for (context, damage) in EXTENDED_DAMAGES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        agree(&folder, &bytes, context);
    }
}

#[test]
fn damaged_images_with_a_data_file() {
    let folder = Folder::new();
    let options = format!("data_file={}", folder.text("data.raw"));
    folder.create(
        "image.qcow2",
        &options,
        "8M",
        &["write -P 1 0 128k", "write -P 2 1M 64k", "write -z 2M 64k"],
    );
    let good = folder.load("image.qcow2");
    let damages: &[Damage] = &[
        ("cleared", |b| b.put64(b.l2(0), 0)),
        ("COPIED missing", |b| b.clear64(b.l2(0) + 8, COPIED)),
        ("another offset", |b| b.put64(b.l2(0) + 8, COPIED | 5 << 16)),
        ("far away", |b| b.put64(b.l2(0) + 8, COPIED | 1 << 40)),
        ("unaligned", |b| b.add64(b.l2(0) + 8, 512)),
        ("compressed", |b| b.put64(b.l2(0) + 8, COMPRESSED | 1 << 16)),
        ("compressed with COPIED", |b| b.put64(b.l2(0) + 8, COPIED | COMPRESSED | 1 << 16)),
    ];
    for (context, damage) in damages {
        let mut bytes = good.clone();
        damage(&mut bytes);
        agree(&folder, &bytes, context);
    }
}

#[test]
fn bitmaps_stale_and_broken() {
    let folder = Folder::new();
    plain_image(&folder, "");
    let image = folder.text("plain.qcow2");
    for name in ["b0", "b1"] {
        ok("qemu-img", &["bitmap", "--add", "--enable", "-g", "4096", &image, name]);
    }
    folder.io("plain.qcow2", &["write -P 1 0 64k", "write 2M 4k"]);
    let good = folder.load("plain.qcow2");
    assert_eq!(agree(&folder, &good, "healthy").corruptions, 0);
    let directory = good.u64(good.extension(0x2385_2875) + 16);
    let table = good.u64(directory);

    let mut stale = good.clone();
    stale.put64(88, 0);
    assert!(agree(&folder, &stale, "stale").leaks > 0);
    for (context, at, value) in [
        ("bitmap past the end", table, 1 << 30),
        ("all ones", table, 1),
        ("table past the end", directory, 1 << 30),
    ] {
        let mut bytes = good.clone();
        bytes.put64(at, value);
        agree(&folder, &bytes, context);
    }
    // Images that QEMU does not open.
    for (context, at, value) in [
        ("unaligned bitmap", table, good.u64(table) + 512),
        ("bitmap and all ones", table, good.u64(table) | 1),
        ("reserved bit", table, good.u64(table) | 2),
        ("unaligned table", directory, table + 512),
        ("flags, type, granularity", directory + 8, u64::MAX),
        ("extra data", directory + 16, good.u64(directory + 16) | 8),
    ] {
        let mut bytes = good.clone();
        bytes.put64(at, value);
        folder.save("checked.qcow2", &bytes.0);
        assert_eq!(folder.check("checked.qcow2"), None, "{context}");
        assert!(ours(&bytes).corruptions > 0, "{context}");
    }
}

#[test]
fn what_cannot_be_checked_says_why() {
    let folder = Folder::new();
    let good = snapshot_image(&folder);
    let cases: &[Damage] = &[
        ("extra_data_size of snapshot 0 is 2000, must be at most 1024", |b| {
            b.put32(b.snapshots() + 36, 2000)
        }),
        ("snapshot 0 is at byte 0 of the table at 1073741824, must lie inside the file", |b| {
            b.put64(64, 1 << 30);
        }),
        ("must be at most 1024", |b| b.put32(60, 60000)),
    ];
    for (expect, damage) in cases {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let error = block_on(qcow2().check(&bytes.reader())).unwrap_err();
        assert!(error.to_string().contains(expect), "{error}");
    }
}
