//! Images that lie behind a URL, as clouds publish them: qcow2 with a data file beside it.

use readonce_testkit::{Content, Fault, FaultyOrigin, OriginSpec, When};

use crate::common::{folder, qemu_img, readonce};

const BYTES: u64 = 1 << 20;

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
