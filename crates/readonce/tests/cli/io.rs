//! `readonce io` says what qemu-io says, but for the times.

use std::process::Stdio;

use crate::common::{KEEPERS, Ran, Serving, command, folder, qemu_img, qemu_io, readonce};

/// Without the figures that no two runs share.
fn without_times(ran: Ran) -> Ran {
    let cut = |line: &str| match line.find(" ops; ") {
        Some(end) => format!("{}\n", &line[..end]),
        None => format!("{line}\n"),
    };
    // What went wrong in detail is ours.
    let err = ran.err.lines().filter(|line| !line.starts_with("readonce: ")).map(cut).collect();
    Ran { out: ran.out.lines().map(cut).collect(), err, ..ran }
}

#[test]
fn the_words_are_those_of_qemu_io() {
    for keeper in KEEPERS {
        words_in(keeper);
    }
}

fn words_in((format, options): (&str, &str)) {
    let options = format!("{options}cluster_size={}", if options.is_empty() { "64k" } else { "128k" });
    let (theirs, ours) = (folder(), folder());
    for at in [theirs.path(), ours.path()] {
        std::fs::write(at.join("base.raw"), vec![0x5a; 1 << 20]).expect("room");
        qemu_img(at, &["create", "-q", "-f", format, "-o", &options, "-b", "base.raw", "-F", "raw", "w.img"])
            .ok();
        std::fs::write(at.join("abc"), "abc").expect("room");
        std::fs::write(at.join("empty"), "").expect("room");
    }
    for commands in [
        &["read 0 64k", "length", "read -P 0x5a 0 1M"][..],
        &["write -P 0xaa 4k 4k", "read -P 0xaa 4k 4k", "read -P 0xbb 4k 512", "read -v 4k 40"],
        &["write -z 0 64k", "flush", "read -P 0 0 64k", "map", "alloc 0 128k", "alloc 0"],
        &["foo"],
        &["read"],
        &["read 0"],
        &["read a 1"],
        &["read 0 b"],
        &["read 0 2M"],
        &["write 1M 512"],
        &["write 64k 1", "read -q 0 1k", "read 0 1.5k"],
        &["read -P 300 0 1k"],
        &["read -P zz 0 1k"],
        &["read -s 4 -l 8 -P 0 0 1k"],
        &["write -P 1 -z 0 1k"],
        &["write -n 0 64k"],
        &["writev -P 1 0 1k 1k", "readv -v 0 16 16", "writev -q 0 512"],
        &[
            "aio_write -P 3 0 1k",
            "aio_flush",
            "aio_write -z 0 512",
            "aio_flush",
            "write -P 3 0 512",
            "read -P 3 0 1k",
        ],
        &["info"],
        // More than QEMU takes in one request: a typed T for M is to be told, not written for an hour.
        &[
            "write -z 0 4G",
            "discard 0 3G",
            "write -z 0 2147483648",
            "discard 0 x",
            "write -P 1 0 3G",
            "read 0 3G",
            "discard 0 1k 1k",
        ],
        &["write -s abc 0 10", "read -v 0 10", "writev -z 0 512"],
        &["write -s nofile 0 8", "write -s empty 0 8", "write -s abc -P 1 0 8", "write -s abc -z 0 8"],
        &["sleep", "sleep 1 2", "help read write", "help nope", "alloc 0 1 2", "length 1", "flush x"],
        &["quit", "read 0 1k"],
    ] {
        let mut arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        arguments.push("w.img");
        let wanted = without_times(qemu_io(theirs.path(), &arguments));
        arguments.insert(0, "io");
        assert_eq!(without_times(readonce(ours.path(), &arguments)), wanted, "{commands:?}");
    }
    // One command, not all; the first line alone is the same, as ours has fewer options.
    let told = readonce(ours.path(), &["io", "-c", "help discard", "w.img"]).ok().out;
    let wanted = qemu_io(theirs.path(), &["-c", "help discard", "w.img"]).ok().out;
    assert_eq!(told.lines().next(), wanted.lines().next());
    assert!(!told.contains("writes a number"), "{told}");
    // Ours has fewer options, so its usage is another.
    let refused = readonce(ours.path(), &["io", "-c", "write -x 0 1", "w.img"])
        .fails(1, "write: invalid option -- 'x'\n");
    assert!(refused.out.starts_with("write [-"), "{refused:?}");
    qemu_img(ours.path(), &["check", "w.img"]).ok();
    let theirs = theirs.path().join("w.img");
    qemu_img(ours.path(), &["compare", "w.img", theirs.to_str().expect("text")]).ok();
}

/// Scripts of qemu-io's words ended at the first of these.
#[test]
fn images_are_opened_closed_and_grown_in_the_words_of_qemu_io() {
    for format in ["qed", "qcow2"] {
        let folder = folder();
        let at = folder.path();
        for commands in [
            &["truncate 2M", "length", "read -P 0 1M 1M", "write -P 7 1M 64k", "read -P 7 1M 64k"][..],
            &["truncate 100", "truncate", "truncate x", "truncate -m x 3M", "truncate 1 2 3 4", "length"],
            &["reopen -r", "write 0 512", "truncate 3M", "reopen -w", "write -P 5 0 512", "reopen"],
            &["reopen -r -w", "reopen a b", "write 0 512", "reopen -r", "reopen -r", "write 0 512"],
            &[
                "open w.img",
                "close",
                "length",
                "close",
                "read 0 512",
                "write 0 512",
                "truncate 4M",
                "sleep 1",
            ],
            &["close", "open -r w.img", "write 0 512", "length", "close", "open w.img", "write 0 512"],
            &["close", "open -r absent", "open absent", "length", "open"],
            &["close 1", "abort 1", "close", "quit", "length"],
        ] {
            let mut arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
            arguments.push("w.img");
            let mut said = Vec::new();
            for run in
                [qemu_io, |at: &_, arguments: &[&str]| readonce(at, &[&["io"][..], arguments].concat())]
            {
                qemu_img(at, &["create", "-q", "-f", format, "w.img", "1M"]).ok();
                let ran = run(at, &arguments);
                let out = without_times(Ran { out: ran.out, err: String::new(), ..ran }).out;
                // Ours is named by a usage with fewer options.
                let out = out.replace("[(-r|-w)] [-c cache] [-o options]", "[(-r|-w)]");
                said.push((ran.code, out, ran.err.replace("qemu-io: ", "readonce: ")));
                qemu_img(at, &["check", "w.img"]).ok();
            }
            assert_eq!(said[1], said[0], "{format} {commands:?}");
        }
        // What a crash leaves is there, and what was not flushed may be.
        let crash = ["-c", "write -P 9 0 64k", "-c", "flush", "-c", "abort", "-c", "length", "w.img"];
        let ran = readonce(at, &[&["io"][..], &crash].concat());
        assert!(ran.code != Some(0) && !ran.out.contains("MiB\n1 MiB"), "{ran:?}");
        readonce(at, &["io", "-c", "read -P 9 0 64k", "w.img"]).ok();
        for refused in
            ["write -c 0 64k", "open -n w.img", "reopen -o x=y", "truncate -m full 9M", "truncate 512"]
        {
            let ran = readonce(at, &["io", "-c", refused, "w.img"]);
            let wanted = if refused.starts_with("open") { "open already" } else { "support" };
            ran.fails(1, wanted);
        }
    }
}

/// What the backing holds behind the old end stays unseen.
#[test]
fn an_image_that_grows_while_it_is_used_shows_nothing_of_a_longer_backing() {
    let folder = folder();
    let at = folder.path();
    std::fs::write(at.join("base.raw"), vec![7; 2 << 20]).expect("room");
    readonce(at, &["create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", "w.img", "1M"]).ok();
    let commands = ["-c", "read -P 7 0 1M", "-c", "truncate 3M", "-c", "read -P 0 1M 2M", "w.img"];
    readonce(at, &[&["io"][..], &commands].concat()).ok();
    qemu_io(at, &["-c", "read -P 0 1M 2M", "w.img"]).ok();
}

/// Scripts match this line.
#[test]
fn what_cannot_be_opened_is_told_in_the_words_of_qemu_io() {
    let folder = folder();
    let at = folder.path();
    std::fs::write(at.join("not.img"), "hello").expect("room");
    std::fs::create_dir(at.join("d")).expect("room");
    for format in ["qed", "qcow2"] {
        readonce(at, &["create", "-q", "-f", format, &format!("a.{format}"), "1M"]).ok();
    }
    let serving = [Serving::start(at, &["-k", "s", "a.qed"]), Serving::start(at, &["-k", "t", "a.qcow2"])];
    for arguments in [
        &["-f", "qed", "not.img"][..],
        &["-f", "qcow2", "not.img"],
        &["-f", "qcow2", "absent.img"],
        &["absent.img"],
        &["-r", "absent.img"],
        &["d"],
        &["-f", "foo", "not.img"],
        &["a.qed"],
        &["a.qcow2"],
    ] {
        let arguments = [&["-c", "length"], arguments].concat();
        let wanted = qemu_io(at, &arguments);
        let told = readonce(at, &[&["io"][..], &arguments].concat());
        assert_eq!(told.err, wanted.err.replace("qemu-io: ", "readonce: "), "{arguments:?}");
        assert_eq!((told.code, told.out), (wanted.code, wanted.out), "{arguments:?}");
    }
    drop(serving);
}

#[test]
fn commands_come_from_standard_input_without_c() {
    let folder = folder();
    readonce(folder.path(), &["create", "-q", "-f", "qed", "w.qed", "1M"]).ok();
    let script = folder.path().join("script");
    std::fs::write(&script, "length\nread -P 1 0 512\nq\nlength\n").expect("room");
    let output = command(folder.path())
        .args(["io", "w.qed"])
        .stdin(Stdio::from(std::fs::File::open(script).expect("a file")))
        .output()
        .expect("it runs");
    let out = String::from_utf8(output.stdout).expect("text");
    assert!(
        out.starts_with("readonce> 1 MiB\nreadonce> Pattern verification failed at offset 0, 512 bytes\n"),
        "{out}"
    );
    assert_eq!(out.matches("MiB\n").count(), 1, "{out}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn copy_on_read_and_read_only() {
    let folder = folder();
    let at = folder.path();
    std::fs::write(at.join("base.raw"), vec![0x5a; 1 << 20]).expect("room");
    readonce(at, &["create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", "w.qed"]).ok();
    readonce(at, &["io", "-r", "-c", "write 0 64k", "w.qed"]).fails(1, "Block node is read-only");
    let local = |wanted: &str| {
        let map = readonce(at, &["io", "-r", "-c", "alloc 0 1M", "w.qed"]).ok().out;
        assert!(map.starts_with(wanted), "{map}");
    };
    readonce(at, &["io", "-c", "read 0 64k", "w.qed"]).ok();
    local("0/1048576");
    readonce(at, &["io", "-r", "-C", "-c", "read 0 64k", "w.qed"]).ok();
    local("65536/1048576");
    readonce(at, &["io", "--drive", "file=w.qed,cor=on,if=virtio", "-c", "read 64k 1"]).ok();
    local("131072/1048576");
    // As with qemu-io: nothing to copy is no error.
    readonce(at, &["create", "-q", "-f", "qed", "alone.qed", "1M"]).ok();
    readonce(at, &["io", "-C", "-c", "read 0 4k", "alone.qed"]).ok();
    // What is asked for and not done is told.
    let told = readonce(at, &["io", "-r", "--on-change=repin", "-c", "length", "w.qed"]).ok();
    assert!(told.err.contains("--on-change=repin does nothing"), "{told:?}");
}

#[test]
fn an_end_of_standard_output_is_told_or_silent_and_the_image_is_closed_clean() {
    let folder = folder();
    let at = folder.path();
    for format in ["qed", "qcow2"] {
        readonce(at, &["create", "-q", "-f", format, "w.img", "4M"]).ok();
        let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
        let output = command(at).args(["info", "w.img"]).stdout(full).output().expect("it runs");
        let err = String::from_utf8(output.stderr).expect("text");
        assert_eq!(err, "readonce: Could not write to standard output: No space left on device\n");
        assert_eq!(output.status.code(), Some(1));

        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = command(at)
            .args(["io", "-c", "write 0 64k", "-c", "length", "-c", "write 1M 64k", "w.img"])
            .stdout(writer)
            .output()
            .expect("it runs");
        assert_eq!((output.status.code(), output.stderr), (Some(141), Vec::new()));
        let told = qemu_img(at, &["info", "w.img"]).ok();
        assert!(!told.out.contains("cleanly shut down: no"), "{told:?}");
        let told = readonce(at, &["check", "w.img"]).ok();
        assert!(told.out.contains("1/64 = 1.56% allocated"), "{told:?}");
    }
}

/// Without it nobody could look into an image that a guest has; with it nothing may be written, fills included.
#[test]
fn an_image_in_use_is_read_with_force_share() {
    for (format, _) in KEEPERS {
        let at = folder();
        std::fs::write(at.path().join("base.raw"), vec![0x5a; 1 << 20]).expect("room");
        let create =
            ["create", "-q", "-f", format, "-o", "copy_on_read=on", "-b", "base.raw", "-F", "raw", "w.img"];
        readonce(at.path(), &create).ok();
        let serving = Serving::start(at.path(), &["-k", "s", "w.img"]);
        let before = std::fs::read(at.path().join("w.img")).expect("the image");
        let read = ["-c", "read -P 0x5a 0 64k", "w.img"];
        readonce(at.path(), &[&["io", "-r"][..], &read].concat()).fails(1, "lock");
        readonce(at.path(), &[&["io", "-U", "-r"][..], &read].concat()).ok();
        let words = "w.img: force-share=on can only be used with read-only images";
        readonce(at.path(), &[&["io", "-U"][..], &read].concat()).fails(1, words);
        readonce(at.path(), &[&["io", "-C", "-U", "-r"][..], &read].concat()).fails(1, words);
        assert!(std::fs::read(at.path().join("w.img")).expect("the image") == before, "{format}");
        serving.end_by(libc::SIGTERM).ok();
    }
}
