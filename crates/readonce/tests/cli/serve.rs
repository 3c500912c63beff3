//! `readonce serve` with QEMU's clients: what they read and write, how it ends, what is in the image after it.

use std::os::unix::fs::PermissionsExt;

use readonce_testkit::{Content, Fault, When};

use crate::common::{
    KEEPERS, ORIGIN_BYTES, Ran, Serving, command, folder, names, origin, qemu_img, qemu_io, readonce,
    write_origin_bytes,
};

/// `c.img`, an image over an origin in `at`.
fn image_over(url: &str, at: &std::path::Path, (format, options): (&str, &str)) {
    let options = format!("{options}copy_on_read");
    readonce(at, &["create", "-q", "-f", format, "-o", &options, "-b", url, "-F", "raw", "c.img"]).ok();
}

/// For tests of what no format changes.
const ANY: (&str, &str) = KEEPERS[1];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_is_fetched_once_and_kept() {
    for keeper in KEEPERS {
        what_is_read_is_fetched_once_in(keeper).await;
    }
}

async fn what_is_read_is_fetched_once_in(keeper: (&str, &str)) {
    let (format, _) = keeper;
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, keeper);
    write_origin_bytes(&at.join("wanted.raw"));
    origin.clear_log();
    let probe_bytes = origin.body_bytes();

    let serving = Serving::start(at, &["-k", "s", "c.img"]);
    assert_eq!(serving.uri, format!("nbd+unix:///?socket={}/s", at.display()));
    let mode = std::fs::metadata(at.join("s")).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for _ in 0..2 {
        qemu_img(at, &["compare", "-f", "raw", "-F", "raw", &serving.uri, "wanted.raw"]).ok();
    }
    qemu_io(at, &["-f", "raw", "-c", "write -P 9 1M 100k", "-c", "flush", &serving.uri]).ok();
    let ended = serving.end_by(libc::SIGTERM);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.err.contains(&format!("opened c.img ({format}) to read and write")), "{ended:?}");
    assert!(ended.err.contains(&format!("opened {} (raw) to read", origin.url())), "{ended:?}");
    assert!(!at.join("s").exists());
    // The probe at open asks for a byte.
    let fetched = origin.body_bytes() - probe_bytes;
    assert!((ORIGIN_BYTES..=ORIGIN_BYTES + 1).contains(&fetched), "{fetched}");

    origin.vanish().await;
    qemu_img(at, &["check", "-f", format, "-U", "c.img"]).fails(1, "Could not open backing file");
    readonce(at, &["check", "c.img"]).ok();
    readonce(at, &["io", "--on-change=offline", "-c", "read -P 9 1M 100k", "-c", "read 0 4M", "c.img"]).ok();
    // Cut from its backing, it is a whole image for QEMU.
    readonce(at, &["rebase", "-u", "-b", "", "c.img"]).ok();
    qemu_img(at, &["check", "c.img"]).ok();
    qemu_io(at, &["-c", "read -P 9 1M 100k", "c.img"]).ok();
    qemu_io(at, &["-f", "raw", "-c", "write -P 9 1M 100k", "wanted.raw"]).ok();
    qemu_img(at, &["compare", "c.img", "wanted.raw"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn part_of_a_cluster_is_saved_at_the_end() {
    for keeper in KEEPERS {
        part_of_a_cluster_is_saved_at_the_end_in(keeper).await;
    }
}

async fn part_of_a_cluster_is_saved_at_the_end_in(keeper: (&str, &str)) {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, keeper);
    write_origin_bytes(&at.join("wanted.raw"));
    qemu_io(at, &["-f", "raw", "-c", "write -P 9 68k 4k", "wanted.raw"]).ok();
    let serving = Serving::start(at, &["--quiet", "-p", "0", "c.img"]);
    assert!(serving.uri.starts_with("nbd://127.0.0.1:"), "{}", serving.uri);
    // No flush: qemu-io sends one when it closes the device, so the client is one that does not.
    write_and_leave(&serving.uri, 68 << 10, &[9; 4096]).await;
    let ended = serving.end_by(libc::SIGINT);
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    readonce(at, &["check", "c.img"]).ok();
    let serving = Serving::start(at, &["-r", "-k", "s", "c.img"]);
    qemu_img(at, &["compare", "-f", "raw", "-F", "raw", &serving.uri, "wanted.raw"]).ok();
    qemu_io(at, &["-f", "raw", "-r", "-c", "read -P 9 68k 4k", &serving.uri]).ok();
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
}

async fn write_and_leave(uri: &str, offset: u64, data: &[u8]) {
    use readonce_testkit::nbd_client::{ConnectOptions, NbdClient};
    let address = uri.trim_start_matches("nbd://").trim_end_matches('/').parse().expect("an address");
    let client = NbdClient::connect_tcp(address, &ConnectOptions::default()).await.expect("a server");
    client.write(offset, data, 0).await.expect("written");
    client.abandon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_cannot_be_saved_are_named() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    let serving =
        Serving::start(at, &["-p", "0", "--retry-for", "100ms", "--shutdown-timeout", "1s", "c.img"]);
    origin.vanish().await;
    write_and_leave(&serving.uri, 68 << 10, &[9; 4096]).await;
    let ended = serving.end_by(libc::SIGTERM).fails(1, "could not save guest bytes 0x11000..0x12000");
    assert!(ended.err.contains("readonce: c.img: "), "{ended:?}");
    // Nothing of it is in the image, and the image is whole.
    origin.come_back().await.expect("the port");
    readonce(at, &["check", "-r", "all", "c.img"]).ok();
    write_origin_bytes(&at.join("wanted.raw"));
    let serving = Serving::start(at, &["-k", "s", "c.img"]);
    qemu_img(at, &["compare", "-f", "raw", "-F", "raw", &serving.uri, "wanted.raw"]).ok();
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_kill_nothing_is_corrupt_and_what_was_flushed_is_there() {
    for keeper in KEEPERS {
        after_kill_nothing_is_corrupt_in(keeper).await;
    }
}

async fn after_kill_nothing_is_corrupt_in(keeper: (&str, &str)) {
    let (format, _) = keeper;
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, keeper);
    for round in 1..=4_u8 {
        let serving = Serving::start(at, &["-k", "s", "c.img"]);
        let place = u64::from(round) * 300;
        let flushed = format!("write -P {round} {place}k 100k");
        let unflushed = format!("write -P 99 {}k 64k", 2048 + place);
        qemu_io(at, &["-f", "raw", "-c", &flushed, "-c", "flush", "-c", "read 0 2M", &serving.uri]).ok();
        qemu_io(at, &["-f", "raw", "-c", &unflushed, &serving.uri]).ok();
        assert_eq!(serving.end_by(libc::SIGKILL).code, None);
        // The kernel ends the rings of a process, and with them its locks, a moment after the process.
        let unlocked = |_| readonce(at, &["info", "c.img"]).code == Some(0);
        assert!((0..1000).any(unlocked), "{:?}", readonce(at, &["info", "c.img"]));
        // The mark of qcow2 is ours alone. QEMU knows QED's, and does not tell of it.
        let told = |ran: Ran| -> serde_json::Value { serde_json::from_str(&ran.ok().out).expect("JSON") };
        let info = ["info", "-U", "--output=json", "c.img"];
        let (ours, theirs) = (told(readonce(at, &info)), told(qemu_img(at, &info)));
        let marked = (ours["dirty-flag"] == true, ours["readonce"]["in-use"] == true);
        assert_eq!(marked, if format == "qed" { (true, false) } else { (false, true) }, "{ours}");
        assert_eq!(theirs["dirty-flag"], false);
        let checked = readonce(at, &["check", "-U", "c.img"]);
        assert!(matches!(checked.code, Some(0 | 3)), "{checked:?}");
        let commands: Vec<String> = (1..=round)
            .flat_map(|round| ["-c".to_owned(), format!("read -P {round} {}k 100k", u64::from(round) * 300)])
            .collect();
        let arguments: Vec<&str> =
            ["io"].into_iter().chain(commands.iter().map(String::as_str)).chain(["c.img"]).collect();
        readonce(at, &arguments).ok();
    }
    readonce(at, &["check", "-r", "all", "c.img"]).ok();
    readonce(at, &["check", "c.img"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_export_still_fills() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    let serving =
        Serving::start(at, &["-k", "s", "--drive", "file=c.img,readonly=on,cor=on,if=ide,format=qcow2"]);
    qemu_io(at, &["-f", "raw", "-r", "-c", "read 0 128k", &serving.uri]).ok();
    qemu_io(at, &["-f", "raw", "-c", "length", &serving.uri]).fails(1, "Permission denied");
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
    let map = readonce(at, &["map", "c.img"]).ok().out;
    assert!(map.contains("c.img\n0x20000"), "{map}");

    // With copy-on-read off nothing is kept.
    let before = std::fs::read(at.join("c.img")).expect("an image");
    let serving = Serving::start(at, &["-k", "s", "-r", "--copy-on-read=off", "c.img"]);
    qemu_io(at, &["-f", "raw", "-r", "-c", "read 1M 128k", &serving.uri]).ok();
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
    assert!(std::fs::read(at.join("c.img")).expect("an image") == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_origin_is_refused_and_what_is_local_reads() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    readonce(at, &["io", "-c", "read 0 64k", "c.img"]).ok();
    write_origin_bytes(&at.join("old.raw"));
    origin.replace(Content::seeded(8, ORIGIN_BYTES), Some("\"new\""));
    for choice in ["--on-change=refuse", "--on-change=offline"] {
        let serving = Serving::start(at, &["-k", "s", choice, "c.img"]);
        qemu_io(at, &["-f", "raw", "-c", "read 0 64k", &serving.uri]).ok();
        let told = qemu_io(at, &["-f", "raw", "-c", "read 64k 64k", &serving.uri]);
        assert!(told.code == Some(1) && told.out.contains("Input/output error"), "{told:?}");
        let ended = serving.end_by(libc::SIGTERM);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        if choice == "--on-change=refuse" {
            assert!(ended.err.contains("changed"), "{ended:?}");
        }
    }
    readonce(at, &["serve", "-k", "s", "--on-change=repin", "c.img"])
        .fails(1, "only for an image that holds none");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_away_at_open_is_a_warning() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    readonce(at, &["io", "-c", "read 0 64k", "c.img"]).ok();
    origin.vanish().await;
    let serving = Serving::start(at, &["-k", "s", "--retry-for", "100ms", "c.img"]);
    qemu_io(at, &["-f", "raw", "-c", "read 0 64k", &serving.uri]).ok();
    let told = qemu_io(at, &["-f", "raw", "-c", "read 64k 64k", &serving.uri]);
    assert!(told.code == Some(1) && told.out.contains("Input/output error"), "{told:?}");
    origin.come_back().await.expect("the port");
    qemu_io(at, &["-f", "raw", "-c", "read 64k 64k", &serving.uri]).ok();
    let ended = serving.end_by(libc::SIGTERM);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.err.contains("readonce: warning: ") && ended.err.contains(&origin.url()), "{ended:?}");
}

/// Each would be a line in somebody's log, and an alarm, of nothing that went wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_is_no_news() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    let serving = Serving::start(at, &["-k", "s", "c.img"]);
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    origin.fault(When::always(), Fault::HoldHead(gate.clone()));
    let mut client = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 64k", &serving.uri])
        .spawn()
        .expect("it starts");
    while origin.in_flight() == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    client.kill().expect("it runs");
    client.wait().expect("it ends");
    for words in [&b""[..], b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0"] {
        let mut client = std::os::unix::net::UnixStream::connect(at.join("s")).expect("it listens");
        std::io::Write::write_all(&mut client, words).expect("it is there");
    }
    origin.heal();
    gate.add_permits(64);
    qemu_io(at, &["-f", "raw", "-c", "read 0 64k", &serving.uri]).ok();
    let ended = serving.end_by(libc::SIGTERM);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.err.contains("abandoned") && !ended.err.contains("handshake"), "{ended:?}");
    assert!(!ended.err.contains("warning"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn passing_failures_are_not_seen() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    write_origin_bytes(&at.join("wanted.raw"));
    origin.fault(When::next(2), Fault::Status { status: 503, retry_after: None });
    origin.fault(When::next(6), Fault::CutAfter(1000));
    let serving = Serving::start(at, &["-k", "s", "c.img"]);
    qemu_img(at, &["compare", "-f", "raw", "-F", "raw", &serving.uri, "wanted.raw"]).ok();
    assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_waits_for_the_origin_does_not_hold_up_the_end() {
    use readonce_testkit::nbd_client::{ConnectOptions, NbdClient};
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    image_over(&origin.url(), at, ANY);
    let serving = Serving::start(at, &["-k", "s", "--shutdown-timeout", "1s", "c.img"]);
    let client = NbdClient::connect_unix(at.join("s"), &ConnectOptions::default()).await.expect("a server");
    client.write(68 << 10, &[9; 4096], 0).await.expect("written");
    client.flush().await.expect("flushed");
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    origin.fault(When::always(), Fault::HoldHead(gate));
    let asked = origin.log().len();
    let reader = tokio::spawn({
        let client = client.clone();
        async move { client.read(1 << 20, 4096).await }
    });
    while origin.log().len() == asked {
        tokio::task::yield_now().await;
    }
    // Nothing of the guest waits for the origin, so the end is a clean one.
    let ended = tokio::task::spawn_blocking(|| serving.end_by(libc::SIGTERM)).await.expect("it ran");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(reader.await.expect("it ran").is_err());
    readonce(at, &["check", "c.img"]).ok();
    readonce(at, &["io", "--on-change=offline", "-c", "read -P 9 68k 4k", "c.img"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_a_pid_file_and_a_port() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qed", "a.qed", "1M"]).ok();
    let serving =
        Serving::start(at, &["-p", "0", "-b", "localhost", "-x", "disk one", "--pid-file", "pid", "a.qed"]);
    assert!(serving.uri.ends_with("/disk%20one"), "{}", serving.uri);
    assert_eq!(std::fs::read_to_string(at.join("pid")).expect("a file"), format!("{}\n", serving.id()));
    qemu_io(at, &["-f", "raw", "-c", "write -P 1 0 1M", &serving.uri]).ok();
    assert_eq!(serving.end_by(libc::SIGHUP).code, Some(0));
    assert_eq!(names(at), ["a.qed"]);
    qemu_io(at, &["-c", "read -P 1 0 1M", "a.qed"]).ok();
    qemu_img(at, &["check", "a.qed"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_come_from_the_environment_and_stay_out_of_sight() {
    use readonce_testkit::{FaultyOrigin, OriginSpec};
    let folder = folder();
    let at = folder.path();
    let spec = OriginSpec {
        require: Some(("authorization".into(), "Bearer sesame".into())),
        ..OriginSpec::new(Content::seeded(7, ORIGIN_BYTES))
    };
    let origin = FaultyOrigin::start(spec).await.expect("a port");
    let url = origin.url();
    let create = ["create", "-f", "qcow2", "-b", &url, "-F", "raw", "c.img"];
    readonce(at, &create).fails(1, "401");
    assert_eq!(names(at), Vec::<String>::new());
    let output = command(at).args(create).env("READONCE_HTTP_TOKEN", "sesame").output().expect("it runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // A name that only the image holds gets no credential, unless the user names its host.
    let io = ["io", "--retry-for", "100ms", "-c", "read 0 64k", "c.img"];
    let output = command(at).args(io).env("READONCE_HTTP_TOKEN", "sesame").output().expect("it runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let host = format!("http://{}", origin.addr());
    let output = command(at)
        .args(io)
        .env("READONCE_HTTP_TOKEN", "sesame")
        .env("READONCE_HTTP_HOST", host)
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
