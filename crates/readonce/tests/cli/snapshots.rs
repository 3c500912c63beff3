//! `readonce snapshot` does, and says, what qemu-img snapshot does.

use serde_json::Value;

use crate::common::{Ran, Serving, folder, qemu_img, qemu_io, readonce};

/// Without what the clock says.
fn without_dates(ran: Ran) -> Ran {
    let cut = |line: &str| match line.find(" 20").filter(|_| line.contains("0000:00:00")) {
        Some(at) => format!("{}{}\n", &line[..at], &line[at + 20..]),
        None => format!("{line}\n"),
    };
    let rename = |text: String| text.replace("qemu-img", "readonce");
    Ran { out: ran.out.lines().map(cut).collect(), err: rename(ran.err), ..ran }
}

#[test]
fn snapshots_are_those_of_qemu_img() {
    let (theirs, ours) = (folder(), folder());
    for at in [theirs.path(), ours.path()] {
        for (image, options) in [
            ("a.qcow2", "cluster_size=64k"),
            ("one.qcow2", "refcount_bits=1"),
            ("d.qcow2", "data_file=d.raw"),
        ] {
            qemu_img(at, &["create", "-q", "-f", "qcow2", "-o", options, image, "1M"]).ok();
            qemu_io(at, &["-c", "write -P 1 0 256k", image]).ok();
        }
        qemu_img(at, &["create", "-q", "-f", "qed", "x.qed", "1M"]).ok();
    }
    let write = |commands: &[&str]| {
        for at in [theirs.path(), ours.path()] {
            qemu_io(at, &[commands, &["a.qcow2"]].concat()).ok();
        }
    };
    let both = |lines: &[&str]| {
        for line in lines {
            let mut words: Vec<&str> = line.split(' ').collect();
            words.insert(0, "snapshot");
            let wanted = without_dates(qemu_img(theirs.path(), &words));
            assert_eq!(without_dates(readonce(ours.path(), &words)), wanted, "{line}");
        }
    };
    both(&["a.qcow2", "-l a.qcow2", "-c first a.qcow2", "-l a.qcow2"]);
    write(&["-c", "write -P 2 128k 256k"]);
    both(&["-q -c 1 a.qcow2", "-c third a.qcow2", "-l -q a.qcow2", "-U -l a.qcow2", "-f qcow2 -l a.qcow2"]);
    write(&["-c", "write -P 3 0 1M"]);
    both(&["-a first a.qcow2"]);
    write(&["-c", "read -P 1 0 256k", "-c", "read -P 0 256k 768k", "-c", "write -P 4 0 64k"]);
    // By number before name, but deleted by name.
    both(&[
        "-a 2 a.qcow2",
        "-d 1 a.qcow2",
        "-l a.qcow2",
        "-d 1 a.qcow2",
        "-a nope a.qcow2",
        "-d nope a.qcow2",
    ]);
    write(&["-c", "read -P 1 0 128k", "-c", "read -P 2 128k 256k"]);
    both(&[
        "-c x -l a.qcow2",
        "-c x -d x a.qcow2",
        "-U -c x a.qcow2",
        "-l nowhere.qcow2",
        "-c x nowhere.qcow2",
        "-l",
        "-l a.qcow2 b",
        "-l x.qed",
        "-c x x.qed",
        "-a x x.qed",
        "-d x x.qed",
        "-l d.qcow2",
        "-c x d.qcow2",
        "-c x one.qcow2",
        "-c y one.qcow2",
    ]);
    for at in [theirs.path(), ours.path()] {
        qemu_img(at, &["check", "a.qcow2"]).ok();
    }
    let told = |at| -> Value {
        let told = qemu_img(at, &["info", "--output=json", "a.qcow2"]).ok().out;
        let mut told: Value = serde_json::from_str(&told).expect("JSON");
        for snapshot in told["snapshots"].as_array_mut().expect("a list") {
            let snapshot = snapshot.as_object_mut().expect("an object");
            assert!(snapshot.remove("date-sec").is_some_and(|date| date.as_u64() > Some(1_700_000_000)));
            snapshot.remove("date-nsec");
        }
        told["snapshots"].take()
    };
    assert_eq!(told(ours.path()), told(theirs.path()));
}

#[test]
fn an_image_in_use_keeps_its_snapshots() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]).ok();
    readonce(at, &["snapshot", "-c", "one", "a.qcow2"]).ok();
    let serving = Serving::start(at, &["-k", "s", "a.qcow2"]);
    for arguments in [["-c", "two", "a.qcow2"], ["-a", "one", "a.qcow2"], ["-d", "one", "a.qcow2"]] {
        readonce(at, &[&["snapshot"], &arguments[..]].concat())
            .fails(1, "Is another process using the image");
    }
    readonce(at, &["snapshot", "a.qcow2"]).fails(1, "Is another process using the image");
    assert!(readonce(at, &["snapshot", "-U", "a.qcow2"]).ok().out.contains("one"));
    // What the snapshot shows is not written over.
    qemu_io(at, &["-f", "raw", "-c", "write -P 7 0 1M", &serving.uri]).ok();
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
    qemu_img(at, &["check", "a.qcow2"]).ok();
    readonce(at, &["snapshot", "-a", "one", "a.qcow2"]).ok();
    qemu_io(at, &["-c", "read -P 0 0 1M", "a.qcow2"]).ok();
}
