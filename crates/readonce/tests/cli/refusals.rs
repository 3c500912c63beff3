//! Bad input: the sentence, the exit status, and that nothing is made or changed.

use readonce_testkit::{Content, Fault, When};

use crate::common::{Ran, Serving, folder, names, origin, qemu_img, readonce};

#[test]
fn what_is_refused_makes_nothing() {
    let folder = folder();
    let at = folder.path();
    std::fs::write(at.join("base.raw"), vec![7; 1 << 20]).expect("room");
    std::fs::write(at.join("there.qed"), b"something else").expect("room");
    qemu_img(at, &["create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", "over.qed"]).ok();
    std::fs::hard_link(at.join("base.raw"), at.join("same.raw")).expect("room");
    let before = names(at);
    for (arguments, sentence) in [
        (
            "create -f qed -o copy_on_read x.qed 1M",
            "x.qed: QED only supports Copy-on-Read with a backing file",
        ),
        (
            "create -f qed -o copy_on_read there.qed 1M",
            "there.qed: QED only supports Copy-on-Read with a backing file",
        ),
        (
            "create -f qed -o copy_on_read=maybe -b base.raw -F raw x.qed",
            "x.qed: Parameter 'copy_on_read' expects 'on' or 'off'",
        ),
        (
            "create -f qed -o copy_on_read -b base.raw x.qed",
            "x.qed: Backing file specified without backing format",
        ),
        (
            "create -f qed -b base.raw -F raw -o cluster_size=128M x.qed",
            "cluster size must be within range [4096, 67108864]",
        ),
        (
            "create -f qcow2 -o copy_on_read x.qcow2 1M",
            "x.qcow2: qcow2 only supports Copy-on-Read with a backing file",
        ),
        (
            "create -f qcow2 -o copy_on_read there.qed 1M",
            "there.qed: qcow2 only supports Copy-on-Read with a backing file",
        ),
        (
            "create -f qcow2 -o encrypt.format=luks x.qcow2 1M",
            "LUKS or AES encryption cannot be made or used",
        ),
        ("create -f qcow2 -o encryption=on x.qcow2 1M", "LUKS or AES encryption cannot be made or used"),
        (
            "create -f qcow2 -b over.qed -F qed -o data_file=base.raw x.qcow2",
            "the backing chain holds the file that is to hold the data",
        ),
        ("create -f qed -b base.raw -F raw same.raw", "same filename as the backing file"),
        ("create -f qed -b over.qed -F qed base.raw", "the backing chain holds the file that is to be made"),
        ("create -f qed -b ftp://host/x -F raw x.qed 1M", "Unknown protocol 'ftp'"),
        ("create -f qed -b json:{} -F raw x.qed 1M", "json: name is not supported"),
        ("create -f qed http://127.0.0.1:9/x.qed 1M", "does not support image creation"),
        ("create -f qed --retry-for 100ms -b http://127.0.0.1:9/x -F raw x.qed", "http://127.0.0.1:9/x"),
        ("create -f qed --retry-for never x.qed 1M", "'never' is not a time"),
        ("run x.raw", "Nothing to run"),
        ("run base.raw -- true", "never guessed to be raw for writing: say -f raw"),
        ("serve base.raw", "Nowhere to listen: give -k SOCKET or -p PORT"),
        ("serve -k s", "Expecting one image file name"),
        ("serve -k s base.raw", "never guessed to be raw for writing: say -f raw"),
        ("serve -k s nowhere.qed", "Could not open 'nowhere.qed': No such file or directory"),
        ("serve -k base.raw over.qed", "the file exists and is not a socket"),
        ("serve -k s --drive file=over.qed,cor=perhaps", "Parameter 'cor' expects 'on' or 'off'"),
        ("serve -k s --drive file=over.qed,aio=native", "Invalid parameter 'aio'"),
        ("serve -k s --drive file=over.qed over.qed", "exclude each other"),
        // Which of the two was meant cannot be known; a guess may write what was to be read alone.
        (
            "serve -k s --drive file=over.qed,cor=on --copy-on-read=off",
            "cor=on and --copy-on-read=off contradict",
        ),
        (
            "serve -k s --drive file=over.qed,cor=off --copy-on-read=on",
            "cor=off and --copy-on-read=on contradict",
        ),
        ("serve -k s --drive file=over.qed,format=qed -f raw", "format=qed and -f raw contradict"),
        ("serve -k s --drive file=over.qed,readonly=off -r", "readonly=off and -r contradict"),
        ("serve -b 127.0.0.1 over.qed", "the following required arguments were not provided: --port <PORT>"),
        ("serve -p abc over.qed", "expected a number from 0 to 65535"),
        ("rebase -F raw over.qed", "Must specify backing file (-b) or use unsafe mode (-u)"),
        ("serve -k s --copy-on-read=on -f raw base.raw", "the image has no backing file"),
        ("serve -k s --copy-on-read=never over.qed", "expected on, off or auto"),
        ("serve -k s --on-change=ignore over.qed", "expected refuse, offline or repin"),
        ("resize base.raw 2M", "never guessed to be raw for writing: say -f raw"),
        (
            "io -c length nowhere.qed",
            "can't open device nowhere.qed: Could not open 'nowhere.qed': No such file or directory",
        ),
        ("check --nonsense over.qed", "unexpected argument '--nonsense'"),
    ] {
        let told = readonce(at, &arguments.split(' ').collect::<Vec<_>>());
        assert_eq!(told.code, Some(1), "{arguments}: {told:?}");
        assert!(told.err.starts_with("readonce: "), "{arguments}: {told:?}");
        assert!(told.err.contains(sentence), "{arguments}: {told:?}");
        assert_eq!(names(at), before, "{arguments}");
    }
    assert_eq!(std::fs::read(at.join("there.qed")).expect("a file"), b"something else");
    assert_eq!(std::fs::read(at.join("base.raw")).expect("a file"), vec![7; 1 << 20]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_cannot_serve_is_told_with_its_url_and_why() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let create = || {
        let arguments = ["create", "-f", "qed", "--retry-for", "100ms", "-b", &url, "-F", "raw", "x.qed"];
        let told = readonce(at, &arguments);
        assert_eq!(told.code, Some(1), "{told:?}");
        assert!(told.err.contains(&url), "{told:?}");
        assert!(told.err.ends_with("Could not open backing image.\n"), "{told:?}");
        assert_eq!(names(at), Vec::<String>::new());
        told.err
    };
    let status = |status| Fault::Status { status, retry_after: None };
    for (fault, cause) in [(status(404), "404"), (status(403), "403"), (Fault::IgnoreRange, "200")] {
        origin.fault(When::always(), fault);
        let told = create();
        assert!(told.contains(cause), "{cause}: {told}");
        origin.heal();
    }
    origin.replace(Content::seeded(1, 0), None);
    create();
    origin.vanish().await;
    create();
}

#[test]
fn an_image_in_use_is_refused_in_qemus_words() {
    let folder = folder();
    let at = folder.path();
    qemu_img(at, &["create", "-q", "-f", "qed", "a.qed", "1M"]).ok();
    let serving = Serving::start(at, &["-k", "s", "a.qed"]);
    let lock = "Failed to get";
    for arguments in [
        &["info", "a.qed"][..],
        &["check", "a.qed"],
        &["check", "-r", "all", "a.qed"],
        &["resize", "a.qed", "2M"],
        &["create", "-f", "qed", "a.qed", "2M"],
        &["serve", "-k", "other", "a.qed"],
        &["io", "-c", "length", "a.qed"],
    ] {
        let told = readonce(at, arguments).fails(1, lock);
        assert!(told.err.contains("Is another process using the image [a.qed]?"), "{told:?}");
    }
    qemu_img(at, &["info", "a.qed"]).fails(1, lock);
    // It is looked at alone, as by qemu-img: a script makes overlays while a guest runs.
    readonce(at, &["create", "-q", "-f", "qed", "-b", "a.qed", "-F", "qed", "over.qed"]).ok();
    readonce(at, &["info", "-U", "a.qed"]).ok();
    readonce(at, &["map", "-U", "a.qed"]).ok();
    readonce(at, &["check", "-U", "a.qed"]).ok();
    readonce(at, &["serve", "-k", "s", "a.qed"]).fails(1, "the socket is in use");
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
    readonce(at, &["info", "a.qed"]).ok();
}

/// qemu-io begins otherwise than the others.
fn not_opened(arguments: &[&str], image: &str) -> String {
    match arguments {
        ["io", ..] => format!("can't open device {image}: "),
        _ => format!("Could not open '{image}': "),
    }
}

#[test]
fn broken_images_are_told_by_field_value_and_limit() {
    let folder = folder();
    let at = folder.path();
    qemu_img(at, &["create", "-q", "-f", "qed", "good.qed", "1M"]).ok();
    let good = std::fs::read(at.join("good.qed")).expect("an image");
    for (place, value, words) in [
        (4, 3_u64, "cluster_size"),
        (8, 17, "table_size"),
        (12, 0, "header_size"),
        (16, 0x80, "features"),
        (40, 1 << 40, "l1_table_offset"),
        (48, 513, "image_size"),
    ] {
        let mut bad = good.clone();
        let width = if place < 16 { 4 } else { 8 };
        bad[place..place + width].copy_from_slice(&value.to_le_bytes()[..width]);
        std::fs::write(at.join("bad.qed"), bad).expect("room");
        for arguments in
            [&["info", "bad.qed"][..], &["io", "-c", "length", "bad.qed"], &["serve", "-k", "s", "bad.qed"]]
        {
            readonce(at, arguments).fails(1, &not_opened(arguments, "bad.qed")).fails(1, words);
        }
    }
    std::fs::write(at.join("bad.qed"), &good[..40]).expect("room");
    readonce(at, &["info", "bad.qed"]).fails(1, "Could not open 'bad.qed'");
    // qcow2, whose numbers go the other way round.
    qemu_img(at, &["create", "-q", "-f", "qcow2", "good.qcow2", "1M"]).ok();
    let good = std::fs::read(at.join("good.qcow2")).expect("an image");
    for (place, value, words) in [
        (4, 9_u32, "Unsupported qcow2 version 9"),
        (20, 30, "cluster_bits"),
        (32, 1, "AES encryption of qcow2 images is not supported"),
        (32, 2, "LUKS encryption of qcow2 images is not supported"),
        (36, u32::MAX, "l1_size"),
        (40, 1 << 30, "l1_table_offset"),
        (76, 1 << 20, "Unsupported qcow2 feature(s): Unknown incompatible feature: 100000"),
        (96, 7, "refcount_order"),
    ] {
        let mut bad = good.clone();
        bad[place..place + 4].copy_from_slice(&value.to_be_bytes());
        std::fs::write(at.join("bad.qcow2"), bad).expect("room");
        for arguments in
            [&["info", "bad.qcow2"][..], &["io", "-c", "length", "bad.qcow2"], &["map", "bad.qcow2"]]
        {
            readonce(at, arguments).fails(1, &not_opened(arguments, "bad.qcow2")).fails(1, words);
        }
    }
    // A chain that comes back to itself.
    qemu_img(at, &["create", "-q", "-f", "qed", "-u", "-b", "two.qed", "-F", "qed", "one.qed", "1M"]).ok();
    qemu_img(at, &["create", "-q", "-f", "qed", "-u", "-b", "one.qed", "-F", "qed", "two.qed", "1M"]).ok();
    readonce(at, &["info", "--backing-chain", "one.qed"]).fails(1, "loop");
    readonce(at, &["map", "one.qed"]).fails(1, "loop");
    readonce(at, &["io", "-c", "read 0 512", "one.qed"]).fails(1, "loop");
}

/// What qemu-img refuses because it would mean two things, or nothing, is refused in its words; scripts that come from it go on working.
#[test]
fn options_that_contradict_are_refused_as_qemu_img_refuses_them() {
    let at = folder();
    let agree = |arguments: &[&str]| {
        let after = |ran: Ran| {
            let err = ran.err.replace("qemu-img: ", "readonce: ");
            (ran.code, ran.out, err, names(at.path()))
        };
        let _ = std::fs::remove_file(at.path().join("w.img"));
        let theirs = after(qemu_img(at.path(), arguments));
        let _ = std::fs::remove_file(at.path().join("w.img"));
        assert_eq!(after(readonce(at.path(), arguments)), theirs, "{arguments:?}");
    };
    for format in ["qed", "qcow2"] {
        agree(&["create", "-f", format, "-o", "size=1M", "w.img", "2M"]);
        agree(&["create", "-f", format, "-o", "size=1M", "w.img"]);
        agree(&["create", "-f", format, "-o", "nocow=on", "w.img", "1M"]);
        agree(&["create", "-f", format, "-o", "nocow=off", "w.img", "1M"]);
        agree(&["create", "-f", format, "-o", "nocow=maybe", "w.img", "1M"]);
        agree(&["create", "-f", format, "-o", "backing_fmt=raw", "w.img", "1M"]);
        agree(&["create", "-f", format, "-F", "raw", "w.img", "1M"]);
    }
    agree(&["create", "-f", "raw", "-o", "nocow=on", "w.img", "1M"]);
}

#[test]
fn a_size_to_take_away_is_understood_and_refused() {
    let at = folder();
    for options in
        [&["create", "-q", "-f", "qed", "w.img", "4M"][..], &["create", "-q", "-f", "qed", "v.img", "4M"]]
    {
        readonce(at.path(), options).ok();
    }
    for name in ["w.qcow2", "v.qcow2"] {
        readonce(at.path(), &["create", "-q", "-f", "qcow2", name, "4M"]).ok();
    }
    for (ours, theirs) in [
        (&["resize", "w.img", "-1M"][..], &["resize", "v.img", "-1M"][..]),
        (&["resize", "w.img", "--", "-1M"], &["resize", "v.img", "--", "-1M"]),
        (&["resize", "w.img", "1M"], &["resize", "v.img", "1M"]),
        (&["resize", "--shrink", "w.img", "-1M"], &["resize", "--shrink", "v.img", "-1M"]),
        (&["resize", "w.img", "-4M"], &["resize", "v.img", "-4M"]),
        (&["resize", "--shrink", "w.img", "5M"], &["resize", "--shrink", "v.img", "5M"]),
        // Not rounded in silence: a script that asks for one byte would believe that it has it.
        (&["resize", "w.img", "+1"], &["resize", "v.img", "+1"]),
        (&["resize", "w.img", "+512"], &["resize", "v.img", "+512"]),
        (&["resize", "w.qcow2", "+1"], &["resize", "v.qcow2", "+1"]),
    ] {
        let (ours, theirs) = (readonce(at.path(), ours), qemu_img(at.path(), theirs));
        assert_eq!(ours.err, theirs.err.replace("qemu-img: ", "readonce: "));
        assert_eq!((ours.code, ours.out), (theirs.code, theirs.out));
    }
}
