//! Images that lie behind a URL, as clouds publish them: compressed, with a data file beside them, under long names.

use readonce_testkit::{Content, Fault, FaultyOrigin, OriginSpec, When};

use std::{path::Path, process::Command};

use crate::{
    common::{Serving, folder, info, qemu, qemu_img, readonce},
    webserver::Nginx,
};

const BYTES: u64 = 1 << 20;

/// `map` of an image that holds everything failed while its origin was away, and all was told twice.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_is_away_is_told_once() {
    let folder = folder();
    let at = folder.path();
    let spec = OriginSpec { etag: None, last_modified: None, ..OriginSpec::new(Content::seeded(5, BYTES)) };
    let origin = FaultyOrigin::start(spec).await.expect("a port");
    let url = origin.url();
    let create = ["create", "-q", "-f", "qed", "-o", "copy_on_read", "-b", &url, "-F", "raw", "c.qed"];
    let told = readonce(at, &create).ok();
    assert_eq!(told.err.matches("neither ETag nor Last-Modified").count(), 1, "{told:?}");
    readonce(at, &["io", "-c", "read 0 1M", "c.qed"]).ok();
    let told = readonce(at, &["info", "c.qed"]).ok();
    assert!(told.out.contains("backing file version: length alone, 1048576 bytes\n"), "{told:?}");

    readonce(at, &["create", "-q", "-f", "qed", "-o", "copy_on_read", "-b", &url, "-F", "raw", "e.qed"]).ok();

    origin.vanish().await;
    let io = |image| ["io", "-v", "--retry-for", "100ms", "-c", "read 0 1M", image];
    for (arguments, code, count) in [
        (&["map", "--retry-for", "100ms", "c.qed"][..], 0, 1..2),
        (&io("e.qed"), 1, 1..2),
        (&io("c.qed"), 0, 0..2),
    ] {
        let told = readonce(at, arguments);
        assert_eq!(told.code, Some(code), "{told:?}");
        // Where all is local, it may be over before the server was given up.
        assert!(count.contains(&told.err.matches("cannot be reached now").count()), "{told:?}");
        assert!(!told.err.contains("opened http"), "{told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_file_is_used_pinned_and_told() {
    let folder = folder();
    let at = folder.path();
    let plain = Content::seeded(3, BYTES);
    std::fs::write(at.join("plain.raw"), plain.bytes(0..BYTES)).expect("room");
    let convert = ["convert", "-O", "qcow2", "-o", "data_file=data.raw", "-f", "raw"];
    qemu_img(at, &[&convert[..], &["plain.raw", "far.qcow2"]].concat()).ok();
    let given = |name: &str| Content::Given(std::fs::read(at.join(name)).expect("made").into());
    let origin = FaultyOrigin::start(OriginSpec::new(given("far.qcow2"))).await.expect("a port");
    let data_is = |etag: &str, content: Content| {
        origin.heal();
        let version = Fault::Version { etag: Some(etag.into()), content };
        origin.fault(When::always().on("/data.raw"), version);
    };
    data_is("\"d1\"", given("data.raw"));
    let url = origin.url_of("/far.qcow2");

    let over = ["create", "-q", "-f", "qcow2", "-o", "copy_on_read", "-b", &url, "-F", "qcow2"];
    readonce(at, &[&over[..], &["c.qcow2"]].concat()).ok();
    let told = readonce(at, &["info", "--backing-chain", "c.qcow2"]).ok().out;
    assert!(told.contains("data file: data.raw"), "{told}");
    assert!(told.contains("its data file: ETag \"d1\""), "{told}");
    let told = readonce(at, &["info", "--output=json", "c.qcow2"]).ok().out;
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let pinned = told["readonce"]["pin"]["validator"].as_str().expect("pinned");
    assert!(pinned.ends_with("; its data file: ETag \"d1\""), "{pinned}");
    let map = readonce(at, &["map", "--output=json", &url]).ok().out;
    assert!(map.contains("\"data\": true"), "{map}");

    // The same at another path is the same version.
    let moved = origin.url_of("/./far.qcow2");
    readonce(at, &["rebase", "-u", "-b", &moved, "-F", "qcow2", "c.qcow2"]).ok();
    readonce(at, &["io", "-c", "read 0 512k", "c.qcow2"]).ok();
    data_is("\"d2\"", Content::seeded(4, BYTES));
    readonce(at, &["io", "-c", "read 0 1M", "c.qcow2"])
        .fails(1, "the file changed since this image was made");
    readonce(at, &["rebase", "-u", "-b", &url, "-F", "qcow2", "c.qcow2"])
        .fails(1, "versions must not be mixed");
    data_is("\"d1\"", given("data.raw"));
    readonce(at, &["io", "-c", "read 0 1M", "c.qcow2"]).ok();
    readonce(at, &["rebase", "-u", "-b", "plain.raw", "-F", "raw", "c.qcow2"])
        .fails(1, "versions must not be mixed");

    // `run` keeps an image for each version of either file.
    let run = |script: &str| {
        let command = format!("qemu-io -f raw -r -c '{script}' {{uri}}");
        readonce(at, &["run", "-r", &url, "--", "sh", "-c", &command]).ok()
    };
    run("read 0 512k");
    data_is("\"d3\"", Content::seeded(5, BYTES));
    let told = run("read 0 512k").err;
    assert!(told.contains("changed: a new image is begun"), "{told}");

    origin.heal();
    origin.fault(When::always().on("/data.raw"), Fault::Status { status: 404, retry_after: None });
    let missing = format!("{}: 404 Not Found", origin.url_of("/data.raw"));
    readonce(at, &[&over[..], &["x.qcow2"]].concat()).fails(1, "404 Not Found").fails(1, "/data.raw");
    let told = readonce(at, &["io", "-r", "-c", "read 0 512", &url]);
    assert!(told.err.replace('\'', "").contains(&missing), "{told:?}");
    readonce(at, &["io", "-r", "--no-backing-files", "-c", "read 0 512", &url])
        .fails(1, "--no-backing-files");
}

/// An ext4 file system of real files: this workspace's, and the first bytes of this program.
fn root(at: &Path) {
    let tree = at.join("tree");
    std::fs::create_dir(&tree).expect("room");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("crates");
    let copied = Command::new("cp").args(["-r", "--"]).arg(sources).arg(tree.join("src")).status();
    assert!(copied.is_ok_and(|status| status.success()));
    let program = std::fs::read(std::env::current_exe().expect("this program")).expect("it runs");
    std::fs::create_dir(tree.join("bin")).expect("room");
    std::fs::write(tree.join("bin/program"), &program[..program.len().min(8 << 20)]).expect("room");
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let made = Command::new("mke2fs")
        .env("PATH", path)
        .args(["-q", "-t", "ext4", "-d", "tree", "root.raw", "48M"])
        .current_dir(at)
        .status()
        .expect("mke2fs is installed (Debian: apt install e2fsprogs)");
    assert!(made.success());
}

/// As a cloud's image is used: compressed, from a web server, read by a real client through an image that keeps it.
#[test]
fn a_compressed_root_file_system_from_a_web_server_is_what_it_was() {
    let (folder, web) = (folder(), folder());
    let at = folder.path();
    root(at);
    let nginx = Nginx::start(web.path());
    for codec in ["zlib", "zstd"] {
        let served = web.path().join(codec);
        let served = served.to_str().expect("text");
        let option = format!("compression_type={codec}");
        qemu_img(at, &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option, "root.raw", served]).ok();
        let url = format!("http://127.0.0.1:{}/{codec}", nginx.port);
        let over = ["create", "-q", "-f", "qcow2", "-o", "copy_on_read", "-b", &url, "-F", "qcow2"];
        readonce(at, &[&over[..], &["c.img"]].concat()).ok();
        let serving = Serving::start(at, &["-k", "s", "c.img"]);
        for client in [&["qemu-img", "convert", "-f", "raw", "-O", "raw"][..], &["nbdcopy"]] {
            qemu(client[0], at, &[&client[1..], &[&serving.uri, "out.raw"]].concat()).ok();
            qemu_img(at, &["compare", "-f", "raw", "-F", "raw", "root.raw", "out.raw"]).ok();
            std::fs::remove_file(at.join("out.raw")).expect("made");
        }
        assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
        // All of it is kept: what QEMU reads without the server is the same.
        readonce(at, &["rebase", "-u", "-b", "", "c.img"]).ok();
        qemu_img(at, &["check", "c.img"]).ok();
        qemu_img(at, &["compare", "-f", "qcow2", "-F", "raw", "c.img", "root.raw"]).ok();
        std::fs::remove_file(at.join("c.img")).expect("made");
    }
}

/// The header holds 1023 bytes of a name; a signed or deep URL is longer, and was pinned under the name that it begins with.
#[tokio::test(flavor = "multi_thread")]
async fn a_url_longer_than_the_header_holds_is_kept_whole() {
    let folder = folder();
    let at = folder.path();
    let plain = Content::seeded(6, BYTES);
    let origin = FaultyOrigin::start(OriginSpec::new(plain.clone())).await.expect("a port");
    std::fs::write(at.join("plain.raw"), plain.bytes(0..BYTES)).expect("room");
    let named = |letters: usize| origin.url_of(&format!("/{}/disk.raw", "x".repeat(letters)));
    let create = |url: &str, name: &str| {
        readonce(at, &["create", "-q", "-f", "qcow2", "-o", "copy_on_read", "-b", url, "-F", "raw", name])
    };
    let (long, longer) = (named(1200), named(3000));
    create(&long, "c.qcow2").ok();
    assert_eq!(info(at, "c.qcow2")["full-backing-filename"], long.as_str());
    readonce(at, &["io", "-c", "read 0 256k", "c.qcow2"]).ok();
    let pin = info(at, "c.qcow2")["readonce"]["pin"].clone();
    assert!(pin["validator"].is_string(), "{pin}");
    readonce(at, &["rebase", "-u", "-b", &longer, "-F", "raw", "c.qcow2"]).ok();
    assert_eq!(info(at, "c.qcow2")["full-backing-filename"], longer.as_str());
    assert_eq!(info(at, "c.qcow2")["readonce"]["pin"], pin);
    origin.clear_log();
    readonce(at, &["io", "-c", "read 0 1M", "c.qcow2"]).ok();
    assert!(!origin.log().is_empty() && origin.log().iter().all(|entry| longer.ends_with(&entry.target)));
    readonce(at, &["rebase", "-u", "-b", "", "c.qcow2"]).ok();
    qemu_img(at, &["check", "c.qcow2"]).ok();
    qemu_img(at, &["compare", "-f", "qcow2", "-F", "raw", "c.qcow2", "plain.raw"]).ok();
    create(&named(4095), "x.qcow2").fails(1, "at most 1023 fit, or 4095 of a URL");
    assert!(!at.join("x.qcow2").exists());
}
