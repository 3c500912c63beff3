//! amend, resize and rebase, and what qemu-img makes of the image after them.

use std::path::Path;

use readonce_testkit::Content;

use crate::common::{ORIGIN_BYTES, folder, info, origin, qemu_img, qemu_io, readonce};

#[test]
fn amend_turns_copy_on_read_on_and_off() {
    for (format, name) in [("qed", "QED"), ("qcow2", "qcow2")] {
        amend(format, name);
    }
}

fn amend(format: &str, name: &str) {
    let folder = folder();
    let at = folder.path();
    std::fs::write(at.join("base.raw"), vec![7; 1 << 20]).expect("room");
    readonce(at, &["create", "-q", "-f", format, "-b", "base.raw", "-F", "raw", "c.img"]).ok();
    for (option, on) in [("copy_on_read=on", true), ("copy_on_read=off", false), ("copy_on_read", true)] {
        readonce(at, &["amend", "-o", option, "c.img"]).ok();
        assert_eq!(info(at, "c.img")["readonce"]["copy-on-read"], on);
    }
    qemu_io(at, &["-c", "read -P 7 0 1M", "c.img"]).ok();
    readonce(at, &["amend", "-o", "cluster_size=4k", "c.img"]).fails(1, "only copy_on_read can change");
    readonce(at, &["amend", "-o", "compat=v2", "c.img"]).fails(1, "only copy_on_read can change");
    readonce(at, &["amend", "-o", "nothing=4", "c.img"]).fails(1, "Invalid parameter 'nothing'");
    readonce(at, &["amend", "c.img"]).fails(1, "Must specify options (-o)");
    readonce(at, &["create", "-q", "-f", format, "alone.img", "1M"]).ok();
    readonce(at, &["amend", "-o", "copy_on_read", "alone.img"])
        .fails(1, &format!("{name} only supports Copy-on-Read with a backing file"));
    qemu_img(at, &["check", "-f", format, "c.img"]).ok();
}

#[test]
fn resize_grows_and_never_shrinks() {
    for (format, size_max_told) in [("qed", "Invalid image size"), ("qcow2", "The image size is too large")] {
        resize(format, size_max_told);
    }
}

fn resize(format: &str, size_max_told: &str) {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", format, "a.img", "1M"]).ok();
    qemu_io(at, &["-c", "write -P 5 0 1M", "a.img"]).ok();
    assert_eq!(readonce(at, &["resize", "a.img", "+1M"]).ok().out, "Image resized.\n");
    assert_eq!(readonce(at, &["resize", "-q", "a.img", "3M"]).ok().out, "");
    assert_eq!(info(at, "a.img")["virtual-size"], 3 << 20);
    qemu_io(at, &["-c", "read -P 5 0 1M", "-c", "read -P 0 1M 2M", "a.img"]).ok();
    qemu_img(at, &["check", "a.img"]).ok();
    for size in ["1M", "-1M"] {
        readonce(at, &["resize", "--shrink", "--", "a.img", size])
            .fails(1, "Shrinking images is currently not supported");
        readonce(at, &["resize", "--", "a.img", size]).fails(1, "Use the --shrink option");
    }
    readonce(at, &["resize", "a.img", "0"]).fails(1, "New image size must be positive");
    readonce(at, &["resize", "a.img", "100P"]).fails(1, size_max_told);
    assert_eq!(info(at, "a.img")["virtual-size"], 3 << 20);
}

/// Reads the first cluster, so that it is local.
#[test]
fn resize_shows_nothing_of_a_longer_backing() {
    for (format, options) in [
        ("qed", "copy_on_read=off"),
        ("qcow2", "compat=1.1"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "compat=0.10"),
    ] {
        let folder = folder();
        let at = folder.path();
        std::fs::write(at.join("base.raw"), vec![7; 20 << 20]).expect("room");
        readonce(
            at,
            &["create", "-q", "-f", format, "-o", options, "-b", "base.raw", "-F", "raw", "c.img", "5000k"],
        )
        .ok();
        readonce(at, &["resize", "c.img", "30M"]).ok();
        let reads = [
            "-c",
            "read -P 7 0 5000k",
            "-c",
            "read -P 0 5000k 10M",
            "-c",
            "read -P 0 15000k 15720k",
            "c.img",
        ];
        readonce(at, &[&["io"][..], &reads].concat()).ok();
        qemu_io(at, &reads).ok();
        qemu_img(at, &["check", "-f", format, "c.img"]).ok();
    }
}

fn fill(folder: &Path, image: &str) {
    readonce(folder, &["io", "-c", "read 0 64k", image]).ok();
    let map = readonce(folder, &["io", "-c", "map", image]).ok().out;
    assert!(map.starts_with("64 KiB (0x10000) bytes     allocated at offset 0 bytes"), "{map}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rebase_keeps_the_pin_where_the_version_is_the_same() {
    for format in ["qed", "qcow2"] {
        rebase_keeps(format).await;
    }
}

async fn rebase_keeps(format: &str) {
    let folder = folder();
    let at = folder.path();
    let (origin, moved) = (origin().await, origin().await);
    readonce(
        at,
        &["create", "-q", "-f", format, "-o", "copy_on_read", "-b", &origin.url(), "-F", "raw", "c.img"],
    )
    .ok();
    fill(at, "c.img");
    let before = info(at, "c.img");
    readonce(at, &["rebase", "-u", "-b", &moved.url(), "-F", "raw", "c.img"]).ok();
    let after = info(at, "c.img");
    assert_eq!(after["backing-filename"], moved.url());
    assert_eq!(after["readonce"], before["readonce"]);
    origin.vanish().await;
    readonce(at, &["io", "-c", "read 1M 64k", "c.img"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn rebase_never_mixes_two_versions() {
    for format in ["qed", "qcow2"] {
        rebase_never_mixes(format).await;
    }
}

async fn rebase_never_mixes(format: &str) {
    let folder = folder();
    let at = folder.path();
    let (origin, other) = (origin().await, origin().await);
    other.replace(Content::seeded(8, ORIGIN_BYTES), Some("\"other\""));
    let create = |name: &str| {
        readonce(
            at,
            &["create", "-q", "-f", format, "-o", "copy_on_read", "-b", &origin.url(), "-F", "raw", name],
        )
        .ok();
    };
    create("filled.img");
    create("empty.img");
    fill(at, "filled.img");
    let before = std::fs::read(at.join("filled.img")).expect("an image");
    readonce(at, &["rebase", "-u", "-b", &other.url(), "-F", "raw", "filled.img"])
        .fails(1, "versions must not be mixed");
    assert_eq!(std::fs::read(at.join("filled.img")).expect("an image"), before);

    let told = readonce(at, &["rebase", "-u", "-b", &other.url(), "-F", "raw", "empty.img"]).ok();
    assert!(told.err.contains("no cluster is local yet, so the new version is pinned"), "{told:?}");
    assert_eq!(info(at, "empty.img")["readonce"]["pin"]["validator"], "ETag \"other\"");
    readonce(at, &["io", "-c", "read 0 64k", "empty.img"]).ok();

    if format == "qcow2" {
        // What only a snapshot holds comes back.
        create("kept.img");
        for (option, name) in [("-c", "empty"), ("-c", "filled"), ("-a", "empty"), ("-d", "empty")] {
            if name == "filled" {
                fill(at, "kept.img");
            }
            readonce(at, &["snapshot", option, name, "kept.img"]).ok();
        }
        readonce(at, &["rebase", "-u", "-b", &other.url(), "-F", "raw", "kept.img"])
            .fails(1, "versions must not be mixed");
        origin.replace(Content::seeded(9, ORIGIN_BYTES), Some("\"third\""));
        readonce(at, &["io", "--on-change=repin", "-c", "length", "kept.img"])
            .fails(1, "only for an image that holds none");
    }

    other.vanish().await;
    readonce(at, &["rebase", "--retry-for", "100ms", "-u", "-b", &other.url(), "-F", "raw", "filled.img"])
        .fails(1, "versions must not be mixed");
    readonce(at, &["rebase", "-u", "-b", "x.raw", "filled.img"]).fails(1, "backing format must be specified");
    readonce(at, &["rebase", "-b", "x.raw", "-F", "raw", "filled.img"])
        .fails(1, "only rebase -u is supported");
    let signed = format!("{}?token=secret", origin.url());
    let told = readonce(at, &["rebase", "-u", "-b", &signed, "-F", "raw", "empty.img"]);
    assert!(told.err.contains("is not kept in the image: give the URL again"), "{told:?}");
    // As with qemu-img, whatever format is named.
    readonce(at, &["rebase", "-u", "-F", "raw", "filled.img"]).ok();
    assert_eq!(info(at, "filled.img").get("backing-filename"), None);
    qemu_img(at, &["check", "filled.img"]).ok();
}

/// A person who does not know what can change, or what a script of qemu-img's passes, is not to be told that it is wrong.
#[test]
fn help_and_words_that_change_nothing_are_taken() {
    let at = folder();
    let at = at.path();
    for format in ["qed", "qcow2"] {
        readonce(at, &["create", "-q", "-f", format, "a.img", "1M"]).ok();
        for words in [&["-f", format][..], &["a.img"]] {
            let told = readonce(at, &[&["amend", "-o", "help"], words].concat()).ok().out;
            assert!(
                told.starts_with(&format!("Amend options for '{format}':\n  copy_on_read=<bool")),
                "{told}"
            );
        }
        readonce(at, &["check", "-T", "none", "a.img"]).ok();
        readonce(at, &["check", "-T", "some", "a.img"]).fails(1, "Invalid source cache option: some");
        readonce(at, &["resize", "--preallocation=off", "a.img", "2M"]).ok();
        readonce(at, &["resize", "--preallocation=full", "a.img", "3M"])
            .fails(1, "Unsupported preallocation mode 'full'");
        for words in
            [&["create", "-f", format, "-o", "help"][..], &["create", "-f", format, "-o", "help", "a.img"]]
        {
            let (ours, theirs) = (readonce(at, words).ok().out, qemu_img(at, words).ok().out);
            let ours: Vec<&str> = ours.lines().filter(|line| !line.contains("copy_on_read")).collect();
            // Neither encryption nor what the file would be told of.
            let not_ours = ["encrypt", "extent_size_hint"];
            let qed_file = |line: &str| format == "qed" && line.contains("preallocation");
            let theirs: Vec<&str> = theirs
                .lines()
                .filter(|line| !not_ours.iter().any(|name| line.contains(name)) && !qed_file(line))
                .collect();
            assert_eq!(ours, theirs, "{words:?}");
        }
    }
}

/// A variable that was empty in a script gave another image than it asked for.
#[test]
fn lists_of_options_are_refused_as_qemu_img_refuses_them() {
    let folder = folder();
    let at = folder.path();
    qemu_img(at, &["create", "-q", "-f", "qed", "a.img", "1M"]).ok();
    for list in ["", ",", ",,", ",size=1M", ",,size=1M", "size=1M,", "size=1M,,,"] {
        for arguments in
            [&["create", "-f", "qed", "-o", list, "x.img", "1M"][..], &["amend", "-o", list, "a.img"]]
        {
            let wanted = qemu_img(at, arguments);
            let told = readonce(at, arguments);
            assert_eq!(told.err, wanted.err.replace("qemu-img: ", "readonce: "), "{arguments:?}");
            assert_eq!(told.code, wanted.code, "{arguments:?}");
        }
    }
    for mode in ["full", "many"] {
        let told = readonce(at, &["resize", "--preallocation", mode, "a.img", "2M"]);
        told.fails(
            1,
            if mode == "full" { "Unsupported preallocation mode" } else { "Invalid preallocation mode" },
        );
    }
}

/// A script that compares lengths with those of qemu-img found another one.
#[test]
fn a_raw_file_grows_to_the_byte() {
    let folder = folder();
    let at = folder.path();
    for size in ["+1", "1048600", "+513"] {
        for name in ["ours.raw", "theirs.raw"] {
            std::fs::write(at.join(name), vec![7; 1 << 20]).expect("room");
        }
        readonce(at, &["resize", "-f", "raw", "ours.raw", size]).ok();
        qemu_img(at, &["resize", "-f", "raw", "theirs.raw", size]).ok();
        let len = |name: &str| std::fs::metadata(at.join(name)).expect("it is there").len();
        assert_eq!(len("ours.raw"), len("theirs.raw"), "{size}");
    }
}

/// A typing error was taken, with the backing gone.
#[test]
fn rebase_refuses_a_format_that_it_does_not_know() {
    let folder = folder();
    let at = folder.path();
    for format in ["qed", "qcow2"] {
        qemu_img(at, &["create", "-q", "-u", "-f", format, "-b", "x.raw", "-F", "raw", "a.img", "1M"]).ok();
        for arguments in
            [&["rebase", "-u", "-F", "foo", "a.img"][..], &["rebase", "-u", "-b", "x", "-F", "foo", "a.img"]]
        {
            let wanted = qemu_img(at, arguments);
            let told = readonce(at, arguments);
            assert_eq!(told.err, wanted.err.replace("qemu-img: ", "readonce: "));
            assert_eq!((told.code, wanted.code), (Some(1), Some(1)));
        }
        assert_eq!(info(at, "a.img")["backing-filename"], "x.raw");
    }
}
