//! `check` names what is wrong, in qemu-img's words where it has some.

use std::{fs, path::Path};

use crate::common::{Ran, folder, qemu_img, qemu_io, readonce};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const FAR: u64 = 1 << 40;

/// The bytes of a qcow2 image.
struct Image(Vec<u8>);

impl Image {
    fn read(at: &Path) -> Self {
        Self(fs::read(at).expect("the image"))
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.0[at as usize..at as usize + 8].try_into().expect("8 bytes"))
    }

    fn put(&mut self, at: u64, word: u64) {
        self.0[at as usize..at as usize + 8].copy_from_slice(&word.to_be_bytes());
    }

    fn change(&mut self, at: u64, change: impl Fn(u64) -> u64) {
        self.put(at, change(self.word(at)));
    }

    /// Byte offset of the L1 table, of the first L2 table, of the refcount table, of the snapshot table.
    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn l2(&self) -> u64 {
        self.word(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    fn refcounts(&self) -> u64 {
        self.word(48)
    }

    fn snapshots(&self) -> u64 {
        self.word(64)
    }

    /// Overwrites the stored refcount (16 bits) of a cluster.
    fn count(&mut self, cluster: u64, refcount: u16) {
        let at = (self.word(self.refcounts()) + 2 * cluster) as usize;
        self.0[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
    }
}

/// What a check said: lines of standard error in any order, each once. The program's name is left out.
fn said(mut ran: Ran) -> Ran {
    let mut lines: Vec<String> = ran.err.lines().map(str::to_owned).collect();
    for line in &mut lines {
        for name in ["qemu-img: ", "readonce: "] {
            *line = line.strip_prefix(name).unwrap_or(line).to_owned();
        }
    }
    lines.sort();
    lines.dedup();
    ran.err = lines.join("\n");
    ran
}

type Damage = fn(&mut Image);

/// Without names a person with a broken image learns a number, and can neither find what is hit nor compare with qemu-img.
fn compare(options: &str, prepare: &[&[&str]], damages: &[(&str, Damage)]) {
    let at = folder();
    qemu_img(at.path(), &["create", "-q", "-f", "qcow2", "-o", options, "whole.img", "1G"]).ok();
    qemu_io(at.path(), &["-c", "write 0 192k", "-c", "write 512M 64k", "whole.img"]).ok();
    for arguments in prepare {
        qemu_img(at.path(), arguments).ok();
    }
    for &(name, damage) in damages {
        let mut image = Image::read(&at.path().join("whole.img"));
        damage(&mut image);
        fs::write(at.path().join("w.img"), &image.0).expect("room");
        for options in
            [&["check", "w.img"][..], &["check", "-q", "w.img"], &["check", "--output=json", "w.img"]]
        {
            let wanted = said(qemu_img(at.path(), options));
            assert!(!wanted.err.is_empty(), "{name}: {wanted:?}");
            assert_eq!(said(readonce(at.path(), options)), wanted, "{name}");
        }
    }
}

#[test]
fn what_is_wrong_is_named_in_the_words_of_qemu_img() {
    let damages: &[(&str, Damage)] = &[
        ("a refcount too high", |image| image.count(5, 2)),
        ("a refcount too low", |image| image.count(5, 0)),
        ("a table's refcount", |image| image.count(4, 0)),
        ("a cluster that nothing names", |image| image.put(image.l2(), 0)),
        ("no COPIED", |image| image.change(image.l2(), |word| word & !COPIED)),
        ("no COPIED on a table", |image| image.change(image.l1(), |word| word & !COPIED)),
        ("a bit of an L1 entry", |image| image.change(image.l1(), |word| word | 1)),
        ("a bit of an L2 entry", |image| image.change(image.l2(), |word| word | 2)),
        ("a table far away", |image| image.put(image.l1(), COPIED | FAR)),
        ("data far away", |image| image.put(image.l2(), COPIED | FAR)),
        ("data between clusters", |image| image.change(image.l2(), |word| word + 512)),
        ("data twice", |image| image.put(image.l2() + 8, image.word(image.l2()))),
        ("data in its own table", |image| image.put(image.l2() + 8, COPIED | image.l2())),
        ("data in the L1 table", |image| image.put(image.l2() + 8, COPIED | image.l1())),
        ("a table twice", |image| image.put(image.l1() + 8, image.word(image.l1()))),
        ("a bit of a block", |image| image.change(image.refcounts(), |word| word | 1)),
        ("a block far away", |image| image.put(image.refcounts(), FAR)),
        ("a second block far away", |image| image.put(image.refcounts() + 8, FAR)),
        ("a block twice", |image| image.put(image.refcounts() + 8, image.word(image.refcounts()))),
        ("no block", |image| image.put(image.refcounts(), 0)),
        ("COPIED on a stream", |image| image.put(image.l2() + 24, COPIED | COMPRESSED | 0x5_0000)),
        ("a stream far away", |image| image.put(image.l2() + 24, COMPRESSED | FAR)),
    ];
    compare("cluster_size=64k", &[], damages);
}

#[test]
fn what_is_wrong_with_subclusters_or_snapshots_is_named_too() {
    let damages: &[(&str, Damage)] = &[
        ("data and zeros", |image| image.change(image.l2() + 8, |word| word | 1 << 32)),
        ("data nowhere", |image| image.put(image.l2() + 16 * 16 + 8, 1)),
        ("a stream in parts", |image| {
            image.put(image.l2() + 16 * 16, COMPRESSED | 0x5_0000);
            image.put(image.l2() + 16 * 16 + 8, 1);
        }),
    ];
    compare("extended_l2=on", &[], damages);
    let damages: &[(&str, Damage)] = &[
        ("an L1 table between clusters", |image| image.change(image.snapshots(), |word| word + 512)),
        ("an L1 table far away", |image| image.put(image.snapshots(), FAR)),
    ];
    compare("cluster_size=64k", &[&["snapshot", "-c", "one", "whole.img"]], damages);
}

#[test]
fn what_is_wrong_in_a_qed_image_is_named() {
    let at = folder();
    readonce(at.path(), &["create", "-q", "-f", "qed", "whole.img", "8G"]).ok();
    readonce(at.path(), &["io", "-c", "write 0 192k", "whole.img"]).ok();
    let whole = fs::read(at.path().join("whole.img")).expect("the image");
    let word = |at: u64| u64::from_le_bytes(whole[at as usize..at as usize + 8].try_into().expect("8 bytes"));
    let (l1, l2) = (word(40), word(word(40)));
    let table = format!("of the table at {l2:#x} (guest offset");
    for (offset, entry, told) in [
        (l2, FAR, format!("ERROR L2 entry 0 {table} 0x0) is {FAR:#x}: no data cluster can lie there\n")),
        (
            l2 + 8,
            word(l2),
            format!("ERROR L2 entry 1 {table} 0x10000) is {:#x}: that cluster is in use already\n", word(l2)),
        ),
        (
            l2 + 16,
            l2,
            format!("ERROR L2 entry 2 {table} 0x20000) is {l2:#x}: that cluster is in use already\n"),
        ),
        (l1, 1, "ERROR L1 entry 0 is 0x1: no L2 table can lie there\n".to_owned()),
        (l1 + 8, l2, format!("ERROR L1 entry 1 is {l2:#x}: 4 clusters of that table are in use already\n")),
        (l2, 0, format!("Leaked cluster {}\n", word(l2) >> 16)),
    ] {
        let mut bytes = whole.clone();
        bytes[offset as usize..offset as usize + 8].copy_from_slice(&entry.to_le_bytes());
        fs::write(at.path().join("w.img"), bytes).expect("room");
        let checked = readonce(at.path(), &["check", "w.img"]);
        assert!(checked.err.contains(&told), "{told} is not in {checked:?}");
        let mended = readonce(at.path(), &["check", "-r", "all", "w.img"]).ok();
        let told = told.replace("ERROR", "Repairing").replace("Leaked", "Repairing");
        assert!(mended.err.contains(&told), "{told} is not in {mended:?}");
    }
}

/// A hostile image would fill a terminal, or a disk that takes the log, for hours.
#[test]
fn findings_are_told_one_by_one_up_to_a_thousand() {
    let at = folder();
    readonce(at.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "w.img", "1M"]).ok();
    readonce(at.path(), &["io", "-c", "write 0 1M", "w.img"]).ok();
    let mut image = Image::read(&at.path().join("w.img"));
    for entry in 0..32 {
        image.put(image.l1() + 8 * entry, 0);
    }
    fs::write(at.path().join("w.img"), &image.0).expect("room");
    let checked = readonce(at.path(), &["check", "w.img"]);
    assert_eq!(checked.code, Some(3), "{}", checked.out);
    assert_eq!(checked.err.lines().count(), 1001);
    assert!(checked.err.ends_with("1080 more findings are not told one by one\n"), "{}", checked.err);
    let mended = readonce(at.path(), &["check", "-r", "all", "w.img"]).ok();
    assert_eq!(mended.err.lines().filter(|line| line.starts_with("Repairing cluster ")).count(), 1000);
}

/// After a crash with late refcounts a check finds thousands of errors. Nobody can know that they are expected, and `-r leaks` would take what
/// it sees for the truth.
#[test]
fn refcounts_that_were_never_written_are_told_apart() {
    let at = folder();
    qemu_img(at.path(), &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "w.img", "1M"]).ok();
    qemu_io(at.path(), &["-c", "write 0 128k", "-c", "flush", "-c", "sigraise 9", "w.img"]);
    let before = fs::read(at.path().join("w.img")).expect("the image");
    let theirs = said(qemu_img(at.path(), &["check", "w.img"]));
    let ours = said(readonce(at.path(), &["check", "w.img"]));
    assert_eq!((ours.code, &ours.out), (theirs.code, &theirs.out));
    let note = "The image was not closed clean, and with lazy_refcounts its refcounts are written late: opening it for writing, \
                or check -r all, counts them anew";
    assert_eq!(ours.err, format!("{}\n{note}", theirs.err));
    let refused = readonce(at.path(), &["check", "-r", "leaks", "w.img"]);
    assert!(refused.err.contains("ERROR need to rebuild refcount structures\n"), "{refused:?}");
    refused.fails(1, "readonce: Check failed: Input/output error");
    assert!(fs::read(at.path().join("w.img")).expect("the image") == before, "nothing was changed");
    qemu_img(at.path(), &["check", "-r", "leaks", "w.img"]).fails(1, "Check failed: Input/output error");
    let mended = readonce(at.path(), &["check", "-r", "all", "w.img"]).ok();
    assert!(mended.err.contains("Repairing cluster 5 refcount=0 reference=1\n"), "{mended:?}");
    let clean = readonce(at.path(), &["check", "w.img"]).ok();
    assert_eq!(clean.err, "");
}

/// Told of a lock, a person would look for another process that there is not.
#[test]
fn a_repair_is_not_done_without_a_lock() {
    let at = folder();
    readonce(at.path(), &["create", "-q", "-f", "qcow2", "w.img", "1M"]).ok();
    let arguments = ["check", "-U", "-r", "all", "w.img"];
    let theirs = said(qemu_img(at.path(), &arguments));
    assert_eq!(said(readonce(at.path(), &arguments)), theirs);
    assert_eq!(theirs.code, Some(1));
}
