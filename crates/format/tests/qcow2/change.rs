//! Changes of the header: QEMU sees them, nothing else is lost, and a crash leaves the old header or the new one.

use std::sync::Arc;

use readonce_format::{
    FormatError,
    driver::{BackingRef, HeaderChange, Pin},
};
use readonce_storage::{
    SimFile,
    sim::{Fault, Lasts},
};

use crate::support::{
    BACKING_BYTES, Folder, be, block_on, change, create, create_with_data, describe, ok, qcow2, spec, tool,
};

fn backing(name: &str) -> BackingRef {
    BackingRef { name: name.to_owned(), format: Some("raw".into()) }
}

fn pin(validator: &str) -> Pin {
    Pin { validator: validator.as_bytes().to_vec(), len: 4711 }
}

/// What is to be the same before and after, or to change: backing, pin, copy-on-read, size.
type Says = (Option<BackingRef>, Option<Pin>, bool, u64);

fn says(file: &Arc<SimFile>) -> Says {
    let described = describe(file).unwrap();
    (described.backing, described.pin, described.copy_on_read, described.virtual_size)
}

#[test]
fn qemu_reads_what_was_changed() {
    let folder = Folder::new();
    for options in [
        "",
        "compat=v2",
        "cluster_size=512",
        "extended_l2=on,lazy_refcounts=on",
        "cluster_size=4k,refcount_bits=1",
    ] {
        for by_qemu in [false, true] {
            let context = format!("{options} {by_qemu}");
            if by_qemu {
                folder.qemu_create("image", options, true, "2M").unwrap();
            } else {
                folder.save("image", &create(&spec(options, true, BACKING_BYTES)).unwrap());
            }
            let path = folder.text("image");
            ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 1M 70000", &path]);
            let before = folder.info("image");
            let file = folder.load("image");

            change(&file, &HeaderChange::CopyOnRead(true)).unwrap();
            assert_eq!(says(&file), (Some(backing("backing.raw")), None, true, BACKING_BYTES), "{context}");
            change(&file, &HeaderChange::Pin(pin("first"))).unwrap();
            assert_eq!(says(&file).1, Some(pin("first")), "{context}");
            assert_eq!(
                describe(&file).unwrap().only_readonce_wrote,
                (options != "compat=v2").then_some(true),
                "{context}"
            );
            folder.save("image", &file);
            assert_eq!(folder.info("image"), before, "{context}");
            folder.is_clean("image", &context);

            let other = backing("./backing.raw");
            change(&file, &HeaderChange::Backing(Some(other.clone()), Some(pin("second")))).unwrap();
            assert_eq!(says(&file), (Some(other), Some(pin("second")), true, BACKING_BYTES), "{context}");
            change(&file, &HeaderChange::CopyOnRead(false)).unwrap();
            change(&file, &HeaderChange::Backing(Some(backing("backing.raw")), None)).unwrap();
            assert_eq!(says(&file), (Some(backing("backing.raw")), None, false, BACKING_BYTES), "{context}");
            assert_ne!(describe(&file).unwrap().only_readonce_wrote, Some(true), "{context}");
            folder.save("image", &file);
            assert_eq!(folder.info("image"), before, "{context}");
            ok("qemu-io", &["-f", "qcow2", "-c", "read -P 9 1M 70000", &path]);

            change(&file, &HeaderChange::Backing(None, None)).unwrap();
            assert_eq!(says(&file), (None, None, false, BACKING_BYTES), "{context}");
            folder.save("image", &file);
            assert!(!folder.info("image").contains("backing"), "{context}");
            folder.is_clean("image", &context);
        }
    }
}

#[test]
fn what_is_not_changed_is_kept() {
    let folder = Folder::new();
    folder.qemu_create("image", "", true, "2M").unwrap();
    let path = folder.text("image");
    ok("qemu-img", &["bitmap", "--add", &path, "bitmap"]);
    ok("qemu-img", &["snapshot", "-c", "snapshot", &path]);
    // An extension and a field that nobody knows: the header is 8 bytes longer.
    let mut bytes = std::fs::read(&path).unwrap();
    let name_at = be(&bytes[8..16]) as usize;
    let rest = bytes[112..name_at + 11].to_vec();
    let mut longer = b"\0\0\0\0\0\0\0\x07".to_vec();
    longer.extend_from_slice(&0x1234_5678u32.to_be_bytes());
    longer.extend_from_slice(b"\0\0\0\x05hello\xff\xff\xff");
    longer.extend_from_slice(&rest);
    bytes[112..112 + longer.len()].copy_from_slice(&longer);
    bytes[8..16].copy_from_slice(&(name_at as u64 + 24).to_be_bytes());
    bytes[100..104].copy_from_slice(&120u32.to_be_bytes());
    let file = Arc::new(SimFile::from_bytes(&bytes));
    folder.save("image", &file);
    let before = folder.info("image");

    change(&file, &HeaderChange::CopyOnRead(true)).unwrap();
    change(&file, &HeaderChange::Backing(Some(backing("backing.raw")), Some(pin("x")))).unwrap();
    folder.save("image", &file);
    assert_eq!(folder.info("image"), before);
    let after = file.contents();
    assert_eq!(&after[112..120], b"\0\0\0\0\0\0\0\x07");
    let head = &after[..4096];
    assert!(head.windows(13).any(|bytes| bytes == b"\x12\x34\x56\x78\0\0\0\x05hello"));
    assert!(head.windows(19).any(|bytes| bytes == b"extended L2 entries"));
    assert_eq!(describe(&file).unwrap().snapshots.len(), 1);
    folder.is_clean("image", "kept");
    // Bits that nobody knows are cleared, ours and the bitmaps' stay.
    assert_eq!(be(&after[88..96]), 1 << 63 | 1);
}

#[test]
fn a_crash_leaves_the_old_header_or_the_new_one() {
    let folder = Folder::new();
    let long = format!("http://host/{}", "n".repeat(900));
    let url = format!("http://host/disk?{}", "t".repeat(3000));
    let images = ["", "compat=v2", "cluster_size=16k,extended_l2=on"].map(|options| {
        folder.qemu_create("image", options, true, "2M").unwrap();
        [folder.load("image").contents(), create(&spec(options, true, BACKING_BYTES)).unwrap().contents()]
    });
    let first = pin(&"v".repeat(700));
    for (number, image) in images.as_flattened().iter().enumerate() {
        let steps = [
            HeaderChange::Pin(first.clone()),
            HeaderChange::Backing(Some(backing(&long)), Some(pin("second"))),
            HeaderChange::CopyOnRead(true),
            HeaderChange::Backing(Some(backing(&url)), Some(pin(&"w".repeat(1024)))),
            HeaderChange::Size(600 << 20),
            HeaderChange::Backing(Some(backing("x")), None),
            HeaderChange::Backing(None, None),
        ];
        let mut image = image.clone();
        for step in &steps {
            let old = says(&Arc::new(SimFile::from_bytes(&image)));
            let done = Arc::new(SimFile::from_bytes(&image));
            change(&done, step).unwrap();
            assert_eq!(done.unsynced_count(), 0);
            let operations = done.op_count();
            let new = says(&done);
            let mut seen_old = false;
            for nth in 1..=operations {
                let file = Arc::new(SimFile::from_bytes(&image));
                file.fail_nth(nth, Fault::Eio, Lasts::ForGood);
                let result = change(&file, step);
                assert!(result.is_err(), "operation {nth}");
                for seed in 0..6 {
                    let crashed = Arc::new(file.crash(seed));
                    let found = says(&crashed);
                    assert!(found == old || found == new, "operation {nth} of {step:?}: {found:?}");
                    seen_old |= found == old;
                    if seed == 0 && number == 0 {
                        let whole = found.0.map(|backing| backing.name).unwrap_or_default();
                        qemu_takes(&folder, &crashed, &whole);
                    }
                    // And it can be done again.
                    change(&crashed, step).unwrap();
                    assert_eq!(says(&crashed), new, "operation {nth} of {step:?}");
                }
            }
            assert!(seen_old);
            image = done.contents();
        }
    }
}

/// In clusters that have room for two heads and not for three: power is lost in one change, and then in the next.
#[test]
fn a_change_after_one_that_was_cut_off_can_be_cut_off_as_well() {
    let to = |name: &str| HeaderChange::Backing(Some(backing(name)), Some(pin(&name.repeat(30))));
    let made = create(&spec("cluster_size=2k", true, BACKING_BYTES)).unwrap();
    change(&made, &to("first.raw")).unwrap();
    let (image, other, third) = (made.contents(), to("other.raw"), to("third.raw"));
    for nth in 1.. {
        let file = Arc::new(SimFile::from_bytes(&image));
        file.fail_nth(nth, Fault::Eio, Lasts::ForGood);
        if change(&file, &other).is_ok() {
            break;
        }
        for seed in 0..4 {
            let between = file.crash(seed).contents();
            let old = says(&Arc::new(SimFile::from_bytes(&between)));
            for mth in 1.. {
                let file = Arc::new(SimFile::from_bytes(&between));
                file.fail_nth(mth, Fault::Eio, Lasts::ForGood);
                let done = change(&file, &third).is_ok();
                for seed in 0..8 {
                    let found = says(&Arc::new(file.crash(seed)));
                    let whole = found.0 == Some(backing("third.raw"))
                        && found.1 == Some(pin(&"third.raw".repeat(30)));
                    assert!(whole || !done && found == old, "{nth}, then {mth}: {found:?}");
                }
                if done {
                    break;
                }
            }
        }
    }
}

/// QEMU opens the image, sees (the stored part of) the backing name, and keeps the record when it writes the header anew.
fn qemu_takes(folder: &Folder, image: &Arc<SimFile>, whole_name: &str) {
    folder.save("crashed", image);
    let stored = if whole_name.len() > 1023 { "http://host/disk" } else { whole_name };
    let info = folder.info("crashed");
    match stored {
        "" => assert!(!info.contains("backing"), "{info}"),
        _ => assert!(info.contains(&format!("backing file: {stored}")), "{info}"),
    }
    let before = says(image);
    ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", stored, &folder.text("crashed")]);
    assert_eq!(says(&folder.load("crashed")), before);
}

#[test]
fn a_grown_image_is_clean() {
    let folder = Folder::new();
    for (options, sizes) in [
        ("", [1 << 20, 10 << 30, 1 << 44]),
        ("compat=v2", [512, 1 << 30, 1 << 40]),
        ("cluster_size=512", [100 << 10, 100 << 20, 10 << 30]),
        ("cluster_size=512,refcount_bits=64", [100 << 10, 100 << 20, 5 << 30]),
        ("cluster_size=1k,refcount_bits=1", [0, 1 << 30, 100 << 30]),
        ("extended_l2=on,cluster_size=16k", [3 << 20, 3 << 30, 1 << 40]),
        ("preallocation=metadata,cluster_size=4k", [1 << 20, 16 << 30, 1 << 40]),
    ] {
        for by_qemu in [false, true] {
            let context = format!("{options} {by_qemu}");
            if by_qemu {
                folder.qemu_create("image", options, false, &sizes[0].to_string()).unwrap();
            } else {
                folder.save("image", &create(&spec(options, false, sizes[0])).unwrap());
            }
            let path = folder.text("image");
            if sizes[0] > 0 {
                ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 512", &path]);
            }
            let mut wrote = Vec::new();
            for size in &sizes[1..] {
                let file = folder.load("image");
                change(&file, &HeaderChange::Size(*size)).unwrap();
                assert_eq!(file.unsynced_count(), 0, "{context}");
                assert_eq!(describe(&file).unwrap().virtual_size, *size);
                folder.save("image", &file);
                folder.is_clean("image", &context);
                let at = size - 4096;
                wrote.push(format!("read -P 6 {at} 4096"));
                ok("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 6 {at} 4096"), &path]);
                folder.is_clean("image", &context);
            }
            if sizes[0] > 0 {
                wrote.push("read -P 5 0 512".into());
            }
            let mut args = vec!["-f", "qcow2"];
            wrote.iter().for_each(|command| args.extend(["-c", command]));
            args.push(&path);
            assert!(!ok("qemu-io", &args).contains("failed"), "{context}");
        }
    }
}

#[test]
fn growth_that_crashes_leaks_at_most() {
    let folder = Folder::new();
    for options in
        ["cluster_size=512", "cluster_size=512,refcount_bits=64", "cluster_size=1k,refcount_bits=1", ""]
    {
        folder.qemu_create("image", options, false, "1M").unwrap();
        let image = folder.load("image").contents();
        let step = HeaderChange::Size(3 << 30);
        let done = Arc::new(SimFile::from_bytes(&image));
        change(&done, &step).unwrap();
        for nth in 1..=done.op_count() {
            let file = Arc::new(SimFile::from_bytes(&image));
            file.fail_nth(nth, Fault::Eio, Lasts::ForGood);
            assert!(change(&file, &step).is_err());
            let crashed = Arc::new(file.crash(nth));
            folder.save("crashed", &crashed);
            let (report, _) = tool("qemu-img", &["check", "-f", "qcow2", &folder.text("crashed")]);
            assert!(!report.contains("ERROR") && !report.contains("corrupt"), "{options} {nth}: {report}");
            change(&crashed, &step).unwrap();
            folder.save("crashed", &crashed);
            let (report, _) = tool("qemu-img", &["check", "-f", "qcow2", &folder.text("crashed")]);
            assert!(!report.contains("ERROR") && !report.contains("corrupt"), "{options} {nth}: {report}");
        }
    }
}

#[test]
fn growth_shows_nothing_that_lay_behind_the_end() {
    let folder = Folder::new();
    let file = create(&spec("cluster_size=512,preallocation=metadata", false, 1 << 20)).unwrap();
    let mut bytes = file.contents();
    // The L1 table has 32 entries and room for 64: the machine state of a snapshot begins at the 36th.
    let l1 = be(&bytes[40..48]) as usize;
    bytes.copy_within(l1..l1 + 8, l1 + 35 * 8);
    bytes[36..40].copy_from_slice(&40u32.to_be_bytes());
    let file = Arc::new(SimFile::from_bytes(&bytes));
    change(&file, &HeaderChange::Size((1 << 20) + 512)).unwrap();
    assert_eq!(be(&file.contents()[40..48]) as usize, l1, "no entry that matters: the table stays");
    change(&file, &HeaderChange::Size(2 << 20)).unwrap();
    folder.save("image", &file);
    let map =
        ok("qemu-img", &["map", "-f", "qcow2", "--output=json", "--start-offset=1M", &folder.text("image")]);
    assert!(!map.contains("\"present\": true"), "{map}");
}

#[test]
fn bitmaps_of_a_grown_image_are_stale() {
    let folder = Folder::new();
    folder.qemu_create("image", "", false, "1M").unwrap();
    let path = folder.text("image");
    ok("qemu-img", &["bitmap", "--add", &path, "bitmap"]);
    assert!(folder.info("image").contains("bitmap"));
    let file = folder.load("image");
    change(&file, &HeaderChange::Size(2 << 20)).unwrap();
    assert!(!describe(&file).unwrap().details.iter().any(|(name, _)| *name == "bitmaps"));
    folder.save("image", &file);
    // QEMU warns, and opens it.
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 64k", &path]);
}

#[test]
fn bitmaps_are_stale_before_a_guest_can_write_in_place() {
    let folder = Folder::new();
    folder.qemu_create("image", "", false, "1M").unwrap();
    ok("qemu-img", &["bitmap", "--add", &folder.text("image"), "bitmap"]);
    let file = folder.load("image");
    assert_eq!(be(&file.contents()[88..96]) & 1, 1);
    block_on(async {
        drop(
            qcow2()
                .open_writable(file.clone(), None, readonce_storage::TokioRuntime::current())
                .await
                .unwrap(),
        );
    });
    // Whatever a crash keeps of what is not synced.
    assert_eq!(be(&file.crash_with(|_| false).contents()[88..96]) & 1, 0);
}

fn refused(file: &Arc<SimFile>, step: &HeaderChange, expect: &str) {
    let before = file.contents();
    let error = change(file, step).unwrap_err();
    assert!(matches!(error, FormatError::Invalid(_) | FormatError::Unsupported(_)), "{error:?}");
    assert_eq!(error.to_string(), expect);
    assert!(file.contents() == before, "{expect}: the file changed");
}

#[test]
fn refusals() {
    let folder = Folder::new();
    let alone = create(&spec("", false, 1 << 20)).unwrap();
    refused(&alone, &HeaderChange::CopyOnRead(true), "qcow2 only supports Copy-on-Read with a backing file");
    refused(&alone, &HeaderChange::Pin(pin("x")), "a version can be pinned only with a backing file");
    refused(&alone, &HeaderChange::Size(512), "Shrinking images is currently not supported");
    refused(
        &alone,
        &HeaderChange::Size(3 << 60),
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
    );
    let (raw, _) = create_with_data(&spec("data_file=a,data_file_raw=on", false, 1 << 20)).unwrap();
    refused(
        &raw,
        &HeaderChange::Backing(Some(backing("x")), None),
        "Backing file and data-file-raw cannot be used at the same time",
    );
    folder.qemu_create("image", "compat=v2", false, "1M").unwrap();
    ok("qemu-img", &["snapshot", "-c", "a", &folder.text("image")]);
    refused(
        &folder.load("image"),
        &HeaderChange::Size(2 << 20),
        "Can't resize a v2 image which has snapshots",
    );
    let small = create(&spec("cluster_size=512", true, 1 << 20)).unwrap();
    refused(
        &small,
        &HeaderChange::Backing(Some(backing(&"x".repeat(600))), None),
        "the header, its extensions and the backing file name need 784 bytes, they have one cluster, 512 bytes",
    );
    let mut corrupt = alone.contents();
    corrupt[79] |= 2;
    refused(
        &Arc::new(SimFile::from_bytes(&corrupt)),
        &HeaderChange::Size(2 << 20),
        "qcow2: Image is corrupt; cannot be opened read/write",
    );
}
