//! Create and describe: images made by either program say the same to both.

use std::sync::Arc;

use readonce_format::driver::{BackingRef, Detail, Pin};
use readonce_storage::{SimFile, Storage};

use crate::support::{BACKING_BYTES, Folder, block_on, create, create_with_data, describe, ok, qcow2, spec};

const OPTIONS: &[&str] = &[
    "",
    "compat=0.10",
    "compat=v2,cluster_size=512",
    "compat=1.1,lazy_refcounts=on",
    "compat=v3,cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4k,refcount_bits=1",
    "refcount_bits=64,cluster_size=1k",
    "refcount_bits=2,compression_type=zstd",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=128k,compression_type=zstd,lazy_refcounts=on,refcount_bits=32",
    "compression_type=zlib,lazy_refcounts=off,extended_l2=off",
];

/// A description as `qemu-img info --output=json` prints `format-specific`, without white space.
fn json(detail: &Detail) -> String {
    match detail {
        Detail::Text(text) => format!("\"{text}\""),
        Detail::Flag(flag) => flag.to_string(),
        Detail::Number(number) => number.to_string(),
        Detail::List(list) => format!("[{}]", list.iter().map(json).collect::<Vec<_>>().join(",")),
        Detail::Group(group) => {
            let fields: Vec<_> =
                group.iter().map(|(name, value)| format!("\"{name}\":{}", json(value))).collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

fn says_as_qemu(folder: &Folder, name: &str, context: &str) {
    let described = describe(&folder.load(name)).unwrap();
    let theirs = ok("qemu-img", &["info", "-f", "qcow2", "--output=json", &folder.text(name)]);
    let theirs: String = theirs.chars().filter(|c| !c.is_whitespace()).collect();
    let mut expect = vec![
        format!(
            "\"format-specific\":{{\"type\":\"qcow2\",\"data\":{}}}",
            json(&Detail::Group(described.details))
        ),
        format!("\"virtual-size\":{}", described.virtual_size),
        format!("\"cluster-size\":{}", described.cluster_size.unwrap()),
        format!("\"dirty-flag\":{}", described.dirty),
    ];
    if let Some(backing) = described.backing {
        expect.push(format!("\"backing-filename\":\"{}\"", backing.name));
        expect.push(format!("\"backing-filename-format\":\"{}\"", backing.format.unwrap()));
    }
    for snapshot in described.snapshots {
        expect.push(format!(
            "{{\"icount\":{},\"vm-clock-nsec\":{},\"name\":\"{}\",\"date-sec\":{},\"date-nsec\":{},\"vm-clock-sec\":{},\
             \"id\":\"{}\",\"vm-state-size\":{}}}",
            snapshot.icount.unwrap(),
            snapshot.vm_clock_nsec % 1_000_000_000,
            snapshot.name,
            snapshot.date_sec,
            snapshot.date_nsec,
            snapshot.vm_clock_nsec / 1_000_000_000,
            snapshot.id,
            snapshot.vm_state_size,
        ));
    }
    for part in expect {
        assert!(theirs.contains(&part), "{context}: {part} is not in {theirs}");
    }
}

#[test]
fn info_and_check_as_of_an_image_made_by_qemu_img() {
    let folder = Folder::new();
    for options in OPTIONS {
        for (backing, size) in [(false, 0), (true, 3 << 20), (false, (1 << 30) + 512)] {
            let context = format!("{options} {backing} {size}");
            folder.qemu_create("theirs", options, backing, &size.to_string()).unwrap();
            let ours = create(&spec(options, backing, size)).unwrap();
            assert_eq!(ours.unsynced_count(), 0, "{context}");
            folder.save("ours", &ours);
            assert_eq!(folder.info("ours"), folder.info("theirs"), "{context}");
            folder.is_clean("ours", &context);
            says_as_qemu(&folder, "ours", &context);
            says_as_qemu(&folder, "theirs", &context);
            if backing {
                ok(
                    "qemu-img",
                    &["compare", "-f", "qcow2", "-F", "qcow2", &folder.text("ours"), &folder.text("theirs")],
                );
            }
        }
    }
}

#[test]
fn a_large_image_has_as_many_tables_as_it_needs() {
    let folder = Folder::new();
    for (options, size) in [
        ("", 1 << 44),
        ("cluster_size=512", 128 << 30),
        ("cluster_size=512,refcount_bits=64", 40 << 30),
        ("extended_l2=on", 1 << 50),
        ("cluster_size=2M", 1 << 61),
    ] {
        let file = create(&spec(options, false, size)).unwrap();
        assert!(file.resident_bytes() < 16 << 20, "{options}");
        folder.save("ours", &file);
        assert!(folder.info("ours").contains(&format!("({size} bytes)")), "{options}");
        folder.is_clean("ours", options);
    }
}

#[test]
fn preallocated_images_are_clean_and_hold_as_much_as_those_of_qemu_img() {
    let folder = Folder::new();
    for options in [
        "preallocation=metadata",
        "preallocation=metadata,compat=0.10",
        "preallocation=falloc,cluster_size=512,refcount_bits=1",
        "preallocation=full,cluster_size=4k,refcount_bits=64",
        "preallocation=metadata,extended_l2=on",
    ] {
        let size = (5 << 20) + 1536;
        folder.qemu_create("theirs", options, false, &size.to_string()).unwrap();
        let ours = create(&spec(options, false, size)).unwrap();
        folder.save("ours", &ours);
        assert_eq!(folder.info("ours"), folder.info("theirs"), "{options}");
        folder.is_clean("ours", options);
        let allocated = |name: &str| {
            let report = ok("qemu-img", &["check", "-f", "qcow2", "--output=json", &folder.text(name)]);
            report.lines().find(|line| line.contains("\"allocated-clusters\"")).map(str::to_owned)
        };
        assert_eq!(allocated("ours"), allocated("theirs"), "{options}");
        let (ours, theirs) = (folder.text("ours"), folder.text("theirs"));
        ok("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &ours, &theirs]);
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1000000 70000", &folder.text("ours")]);
        folder.is_clean("ours", options);
    }
}

#[test]
fn data_files() {
    let folder = Folder::new();
    for options in [
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw,data_file_raw=on,extended_l2=on",
        "data_file=data.raw,preallocation=metadata",
        "data_file=data.raw,preallocation=falloc,cluster_size=4k",
    ] {
        let size = 1 << 20;
        // QEMU looks for a relative name in the folder that it runs in.
        let options = options.replace("data.raw", &folder.text("data.raw"));
        let options = options.as_str();
        folder.qemu_create("theirs", options, false, &size.to_string()).unwrap();
        let theirs = folder.info("theirs");
        let (ours, data) = create_with_data(&spec(options, false, size)).unwrap();
        assert_eq!(data.contents(), vec![0; size as usize], "{options}");
        assert_eq!(data.unsynced_count(), 0, "{options}");
        folder.save("ours", &ours);
        folder.save("data.raw", &data);
        assert_eq!(folder.info("ours"), theirs, "{options}");
        folder.is_clean("ours", options);
        says_as_qemu(&folder, "ours", options);
        let file = describe(&ours).unwrap().data_file.unwrap();
        assert_eq!((file.name, file.raw), (folder.text("data.raw"), options.contains("data_file_raw")));
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 100000 70000", &folder.text("ours")]);
        folder.is_clean("ours", options);
        assert_eq!(std::fs::read(folder.path("data.raw")).unwrap()[100_000], 7, "{options}");
    }
}

#[test]
fn snapshots_and_bitmaps_are_described() {
    let folder = Folder::new();
    folder.qemu_create("theirs", "cluster_size=4k", false, "1M").unwrap();
    let path = folder.text("theirs");
    ok("qemu-img", &["bitmap", "--add", &path, "first"]);
    ok("qemu-img", &["bitmap", "--add", "-g", "32k", &path, "second-one"]);
    ok("qemu-img", &["bitmap", "--disable", &path, "second-one"]);
    ok("qemu-img", &["snapshot", "-c", "before", &path]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 70000", &path]);
    ok("qemu-img", &["snapshot", "-c", "after", &path]);
    says_as_qemu(&folder, "theirs", "with bitmaps");
    let described = describe(&folder.load("theirs")).unwrap();
    assert_eq!(described.snapshots.len(), 2);
    assert!(described.details.iter().any(|(name, _)| *name == "bitmaps"));
}

#[test]
fn refusals_are_those_of_qemu_img() {
    let folder = Folder::new();
    for (options, backing, size) in [
        ("cluster_size=1000", false, "1M"),
        ("cluster_size=256", false, "1M"),
        ("cluster_size=4M", false, "1M"),
        ("cluster_size=0", false, "1M"),
        ("cluster_size=abc", false, "1M"),
        ("cluster_size=-1", false, "1M"),
        ("refcount_bits=3", false, "1M"),
        ("refcount_bits=128", false, "1M"),
        ("refcount_bits=0", false, "1M"),
        ("refcount_bits=abc", false, "1M"),
        ("refcount_bits", false, "1M"),
        ("refcount_bits=8,compat=0.10", false, "1M"),
        ("compat=0.11", false, "1M"),
        ("compat=", false, "1M"),
        ("compat", false, "1M"),
        ("compat=V3", false, "1M"),
        ("extended_l2=on,compat=0.10", false, "1M"),
        ("extended_l2=on,cluster_size=8k", false, "1M"),
        ("extended_l2=1", false, "1M"),
        ("lazy_refcounts=on,compat=0.10", false, "1M"),
        ("lazy_refcounts=maybe", false, "1M"),
        ("data_file_raw=on", false, "1M"),
        ("data_file=data.raw,compat=0.10", false, "1M"),
        ("data_file=data.raw,data_file_raw=on", true, "1M"),
        ("compression_type=zstd,compat=0.10", false, "1M"),
        ("compression_type=lz4", false, "1M"),
        ("preallocation=some", false, "1M"),
        ("preallocation=metadata", true, "1M"),
        ("preallocation=full", true, "1M"),
        ("bogus=1", false, "1M"),
        ("", false, "3E"),
        ("cluster_size=2M", false, "3E"),
        ("cluster_size=512", false, "129G"),
    ] {
        let name = format!("refused {options} {size}");
        let theirs = options.replace("data.raw", &folder.text("data.raw"));
        let theirs = folder.qemu_create("refused", &theirs, backing, size).expect_err(&name);
        let theirs = theirs.replace(&format!("qemu-img: {}: ", folder.text("refused")), "");
        let bytes = match size.split_at(size.len() - 1) {
            (number, "M") => number.parse::<u64>().unwrap() << 20,
            (number, "G") => number.parse::<u64>().unwrap() << 30,
            (number, _) => number.parse::<u64>().unwrap() << 60,
        };
        let ours = create(&spec(options, backing, bytes)).expect_err(&name);
        // QEMU adds where its options are described.
        let theirs = theirs.trim_end();
        assert!(theirs.starts_with(&ours.to_string()), "{name}: {ours} is not {theirs}");
    }
}

#[test]
fn a_refused_image_leaves_the_file_alone() {
    let file = Arc::new(SimFile::from_bytes(b"old"));
    let storage: Arc<dyn Storage> = file.clone();
    let refused = block_on(qcow2().create(&storage, None, &spec("cluster_size=3", false, 0)));
    assert!(refused.is_err());
    assert_eq!(file.contents(), b"old");
}

#[test]
fn pin_copy_on_read_and_a_long_url() {
    let folder = Folder::new();
    let url = format!("http://host.example/images/disk.raw?token={}", "x".repeat(2000));
    let mut spec = spec("copy_on_read", true, 1 << 20);
    spec.pin = Some(Pin { validator: b"\"etag\"".to_vec(), len: 12345 });
    for (name, stored, cluster_size) in [
        ("http://host.example/short", "http://host.example/short", "512"),
        (url.as_str(), "http://host.example/images/disk.raw", "4k"),
        (url.as_str(), "http://host.example/images/disk.raw", "64k"),
    ] {
        for compat in ["v2", "v3"] {
            let mut spec = spec.clone();
            spec.backing = Some(BackingRef { name: name.to_owned(), format: Some("raw".into()) });
            spec.options.push(("cluster_size".into(), Some(cluster_size.into())));
            spec.options.push(("compat".into(), Some(compat.into())));
            let file = create(&spec).unwrap();
            let described = describe(&file).unwrap();
            assert_eq!(described.backing, spec.backing);
            assert_eq!(described.pin, spec.pin);
            assert!(described.copy_on_read);
            assert_eq!(described.only_readonce_wrote, (compat == "v3").then_some(true));
            folder.save("ours", &file);
            assert!(folder.info("ours").contains(&format!("backing file: {stored}\n")));
        }
    }
}

#[test]
fn what_qemu_keeps_of_the_record() {
    let folder = Folder::new();
    for compat in ["v2", "v3"] {
        let mut spec = spec(&format!("copy_on_read,compat={compat}"), true, BACKING_BYTES);
        spec.pin = Some(Pin { validator: b"etag".to_vec(), len: 12345 });
        folder.save("ours", &create(&spec).unwrap());
        let path = folder.text("ours");
        let now = || describe(&folder.load("ours")).unwrap();
        assert_eq!(now().only_readonce_wrote, (compat == "v3").then_some(true));

        ok("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", &path]);
        assert_eq!((now().pin, now().copy_on_read), (spec.pin.clone(), true), "{compat}");
        assert_eq!(now().only_readonce_wrote, (compat == "v3").then_some(false), "{compat}");

        ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "./backing.raw", &path]);
        assert_eq!((now().pin, now().copy_on_read), (None, true), "{compat}");
        ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "backing.raw", &path]);
        assert_eq!((now().pin, now().copy_on_read), (spec.pin.clone(), true), "{compat}");
        folder.is_clean("ours", compat);
    }
}
