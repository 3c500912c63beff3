//! `readonce run`: the command, its status and signals, and what is kept where.

use std::{path::Path, process::Stdio};

use readonce_testkit::{Content, Fault, FaultyOrigin, When};

use crate::common::{
    ORIGIN_BYTES, Ran, command, folder, names, origin, qemu_img, readonce, write_origin_bytes,
};

fn cache(at: &Path, ending: &str) -> Vec<String> {
    names(&at.join("cache/readonce")).into_iter().filter(|name| name.ends_with(ending)).collect()
}

/// Copies the whole disk out of the export and compares.
fn convert(at: &Path, origin: &FaultyOrigin) -> Ran {
    let url = origin.url();
    let script = "qemu-img convert -f raw -O raw \"$READONCE_URI\" out.raw";
    readonce(at, &["run", "--retry-for", "100ms", &url, "--", "sh", "-c", script])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_is_kept_in_the_cache_and_writes_are_not() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    write_origin_bytes(&at.join("wanted.raw"));
    let told = convert(at, &origin).ok();
    qemu_img(at, &["compare", "out.raw", "wanted.raw"]).ok();
    assert!(told.err.contains("what the command wrote is gone"), "{told:?}");
    assert_eq!(cache(at, ".qcow2").len(), 1);

    let url = origin.url();
    let script = "qemu-io -f raw -c 'write -P 9 0 64k' -c flush {uri} && qemu-io -f raw -c 'read -P 9 0 64k' nbd+unix:///?socket={socket}";
    let asked = origin.body_bytes();
    readonce(at, &["run", &url, "--", "sh", "-c", script]).ok();
    convert(at, &origin).ok();
    qemu_img(at, &["compare", "out.raw", "wanted.raw"]).ok();
    // Two runs, and each may look for the version more than once, a byte each time.
    assert!(origin.body_bytes() - asked < 10, "{}", origin.body_bytes() - asked);

    origin.vanish().await;
    let told = convert(at, &origin).ok();
    assert!(told.err.contains("what was read before is used"), "{told:?}");
    qemu_img(at, &["compare", "out.raw", "wanted.raw"]).ok();
    assert_eq!(names(at), ["cache", "out.raw", "wanted.raw"]);
}

/// The same warning twice looks like two servers.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_version_is_told_by_is_said_once() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    for header in ["etag", "last-modified"] {
        origin.fault(When::always(), Fault::NoHeader(header.into()));
    }
    let told = convert(at, &origin).ok();
    assert_eq!(told.err.matches("neither ETag nor Last-Modified").count(), 1, "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_read_only_and_without_copy_on_read() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let write = "qemu-io -f raw -c 'write -P 9 0 64k' -c 'read -P 9 0 64k' -c 'read 1M 64k' {uri}";
    let held = |wanted: &str| {
        let image = format!("cache/readonce/{}", cache(at, ".qcow2")[0]);
        let told = readonce(at, &["io", "-r", "-c", "alloc 0 4M", &image]).ok().out;
        assert!(told.starts_with(wanted), "{told}");
    };
    readonce(at, &["run", "--copy-on-read=off", &url, "--", "sh", "-c", write]).ok();
    held("0/");
    let read = "qemu-io -r -f raw -c 'read 1M 64k' {uri}; qemu-io -f raw -c 'write 0 64k' {uri} 2>/dev/null && exit 9; true";
    readonce(at, &["run", "-r", &url, "--", "sh", "-c", read]).ok();
    held("65536/");
    readonce(at, &["run", &url, "--", "sh", "-c", write]).ok();
    held("65536/");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_a_new_image_and_a_warning() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    convert(at, &origin).ok();
    let content = Content::seeded(8, ORIGIN_BYTES);
    origin.replace(content.clone(), Some("\"new\""));
    let told = convert(at, &origin).ok();
    assert!(told.err.contains("changed: a new image is begun"), "{told:?}");
    assert_eq!(cache(at, ".qcow2").len(), 2);
    assert!(std::fs::read(at.join("out.raw")).expect("a file") == content.bytes(0..ORIGIN_BYTES));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_of_the_same_url_is_told_so() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let mut first = command(at)
        .args(["run", &url, "--", "sh", "-c", "echo ready; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut ready = String::new();
    let stdout = first.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut ready).expect("text");
    assert_eq!(ready, "ready\n");
    let told = readonce(at, &["run", &url, "--", "true"]).fails(1, "another `readonce run` uses");
    assert!(told.err.contains("--image FILE"), "{told:?}");
    readonce(at, &["run", "--image", "own.qed", &url, "--", "true"]).ok();
    drop(first.stdin.take());
    first.wait().expect("it ends");
    readonce(at, &["run", &url, "--", "true"]).ok();
}

/// The flags of serve: a script that runs either gives both the same.
#[test]
fn the_export_has_a_name_and_the_process_a_file() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]).ok();
    let script = "echo {uri} && test \"$(cat pid)\" = $PPID && qemu-img info {uri} >info";
    let told =
        readonce(at, &["run", "--pid-file", "pid", "-x", "disk", "a.qcow2", "--", "sh", "-c", script]).ok();
    assert!(told.out.starts_with("nbd+unix:///disk?socket="), "{told:?}");
    assert_eq!(names(at), ["a.qcow2", "info"]);
    readonce(at, &["run", "--pid-file", "no/pid", "a.qcow2", "--", "true"])
        .fails(1, "Could not write 'no/pid': No such file or directory");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_ones_own_keeps_everything() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let write = "qemu-io -f raw -c 'write -P 9 0 64k' {uri}";
    readonce(at, &["run", "--image", "own.qed", &url, "--", "sh", "-c", write]).ok();
    readonce(
        at,
        &["run", "--image", "own.qed", &url, "--", "sh", "-c", "qemu-io -f raw -c 'read -P 9 0 64k' {uri}"],
    )
    .ok();
    readonce(at, &["run", "own.qed", "--", "sh", "-c", "qemu-io -f raw -c 'read -P 9 0 64k' {uri}"]).ok();
    readonce(at, &["check", "own.qed"]).ok();
    readonce(at, &["run", "--image", "own.qed", &origin.url_of("/other"), "--", "true"])
        .fails(1, "own.qed is an image over");
    readonce(at, &["run", &origin.url(), "--image", "nowhere/own.qed", "--", "true"])
        .fails(1, "Could not create 'nowhere/own.qed'");
    assert_eq!(names(at), ["own.qed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_made_in_the_format_asked_and_keeps_it() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let format = |image: &str| {
        let told = readonce(at, &["info", "--output=json", image]).ok().out;
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        (
            told["format"].clone(),
            told["cluster-size"].clone(),
            told["format-specific"]["data"]["extended-l2"].clone(),
        )
    };
    let subclusters = ("qcow2".into(), 131_072.into(), true.into());
    let qed = ("qed".into(), 65_536.into(), serde_json::Value::Null);
    // In the cache: what is there is used, whatever -f says.
    let read = "qemu-io -r -f raw -c 'read 1M 64k' {uri}";
    for asked in [&["-f", "qed"][..], &[], &["-f", "qcow2"]] {
        let arguments = [&["run"], asked, &[&url, "--", "sh", "-c", read]].concat();
        readonce(at, &arguments).ok();
        assert_eq!(cache(at, ".qcow2"), Vec::<String>::new());
        assert_eq!(format(&format!("cache/readonce/{}", cache(at, ".qed")[0])), qed);
    }
    std::fs::remove_dir_all(at.join("cache")).expect("a folder");
    readonce(at, &["run", &url, "--", "sh", "-c", read]).ok();
    assert_eq!(format(&format!("cache/readonce/{}", cache(at, ".qcow2")[0])), subclusters);
    // A page is fetched and kept as a page.
    let fetched = origin.body_bytes();
    readonce(at, &["run", &url, "--", "sh", "-c", "qemu-io -r -f raw -c 'read 2M 4k' {uri}"]).ok();
    assert!(origin.body_bytes() - fetched < 4096 + 10, "{}", origin.body_bytes() - fetched);
    // A page is written without any of the backing.
    let fetched = origin.body_bytes();
    readonce(at, &["run", &url, "--", "sh", "-c", "qemu-io -f raw -c 'write 3M 4k' -c flush {uri}"]).ok();
    assert!(origin.body_bytes() - fetched < 10, "{}", origin.body_bytes() - fetched);

    for (image, asked, wanted) in [("own", &[][..], &subclusters), ("own.qed", &["-f", "qed"], &qed)] {
        for _ in 0..2 {
            let arguments = [&["run", "--image", image], asked, &[&url, "--", "true"]].concat();
            readonce(at, &arguments).ok();
            assert_eq!(format(image), *wanted);
        }
        readonce(at, &["run", image, "--", "true"]).ok();
    }
    readonce(at, &["run", "-f", "raw", &url, "--", "true"]).fails(1, "'raw' cannot keep what is read");
    readonce(at, &["run", "-f", "nope", "--image", "x", &url, "--", "true"])
        .fails(1, "Unknown driver 'nope'");
    readonce(at, &["run", "-F", "qcow2", "--image", "x", &url, "--", "true"]).fails(1, "not in qcow2 format");
    assert_eq!(names(at), ["cache", "own", "own.qed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_given_for_nothing_is_told() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let (url, other) = (origin.url(), origin.url_of("/other?sig=secret"));
    let told = readonce(at, &["run", "--url", &other, &url, "--", "true"]).ok();
    let warning =
        format!("warning: --url {}: no image here is known to name this place", origin.url_of("/other"));
    assert!(told.err.contains(&warning) && !told.err.contains("secret"), "{told:?}");
    let told = readonce(at, &["run", "--url", &format!("{url}?sig=secret"), &url, "--", "true"]).ok();
    assert!(!told.err.contains("--url"), "{told:?}");
}

#[test]
fn the_status_is_that_of_the_command() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qed", "a.qed", "1M"]).ok();
    for (script, code) in
        [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)]
    {
        assert_eq!(readonce(at, &["run", "a.qed", "--", "sh", "-c", script]).code, Some(code), "{script}");
    }
    readonce(at, &["run", "a.qed", "--", "no-such-command"])
        .fails(127, "no-such-command: No such file or directory");
    readonce(at, &["run", "a.qed", "--", "./a.qed"]).fails(126, "Permission denied");
    assert_eq!(names(at), ["a.qed"]);
    qemu_img(at, &["check", "a.qed"]).ok();
}

#[test]
fn signals_reach_the_command_and_the_image_is_closed_clean() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qed", "a.qed", "1M"]).ok();
    let script = "trap 'exit 5' TERM; qemu-io -f raw -c 'write -P 3 0 64k' {uri} >/dev/null; echo ready; while :; do sleep 0.1; done";
    let mut child = command(at)
        .args(["run", "--quiet", "a.qed", "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut ready = String::new();
    let stdout = child.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut ready).expect("text");
    assert_eq!(ready, "ready\n");
    let id: i32 = child.id().try_into().expect("a process number");
    // SAFETY: the child was not waited for, so the number is its.
    assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
    assert_eq!(child.wait().expect("it ends").code(), Some(5));
    qemu_img(at, &["check", "a.qed"]).ok();
    readonce(at, &["io", "-c", "read -P 3 0 64k", "a.qed"]).ok();
    assert_eq!(names(at), ["a.qed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_before_the_command_leaves_nothing_behind() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    origin.fault(When::always(), Fault::HoldHead(gate));
    let mut child = command(at)
        .args(["run", &origin.url(), "--", "touch", "ran"])
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    while origin.log().is_empty() {
        tokio::task::yield_now().await;
    }
    let id: i32 = child.id().try_into().expect("a process number");
    // SAFETY: the child was not waited for, so the number is its.
    assert_eq!(unsafe { libc::kill(id, libc::SIGINT) }, 0);
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert_eq!(names(at), ["cache"]);
    assert_eq!(cache(at, ".qcow2"), Vec::<String>::new());
}
