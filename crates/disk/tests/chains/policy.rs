//! What an image may lead to: no loop, no local path and no other host from the network, nothing at all if the user says so.

use readonce_disk::{DeviceError, chain::ChainOptions};
use readonce_origin::AllowBacking;
use readonce_testkit::{Content, Fault, FaultyOrigin, When};

use super::{
    place::{CLUSTER, Opened, Place, above, clusters, content, filled_from, open, options, serve},
    qemu,
};

const SIZE: u64 = 8 * CLUSTER;

fn read_only() -> ChainOptions {
    ChainOptions { read_only: true, ..options() }
}

/// A chain whose trouble is found at open or at the first read of what is not local: either way nothing is read, and the words
/// say why.
async fn check_refused(name: &str, options: ChainOptions, words: &str) {
    let error = match open(name, options).await {
        Err(error) => error.to_string(),
        Ok(opened) => {
            let read = opened.try_read(clusters(0..1)).await;
            opened.close().await;
            match read {
                Err(DeviceError::Io(text)) => text,
                other => panic!("{name}: {other:?}"),
            }
        }
    };
    assert!(error.contains(words), "{name}: {error}");
}

#[tokio::test]
async fn loops_are_refused() {
    let place = Place::new();
    place.create("self.qed", above("self.qed", "qed", SIZE)).await;
    place.create("dotted.qed", above("./dotted.qed", "qed", SIZE)).await;
    place.create("a.qed", above("b.qed", "qed", SIZE)).await;
    place.create("b.qed", above("c.qed", "qed", SIZE)).await;
    place.create("c.qed", above("a.qed", "qed", SIZE)).await;
    for name in ["self.qed", "dotted.qed", "a.qed"] {
        let path = place.path(name).display().to_string();
        for options in [options(), read_only()] {
            check_refused(&path, options, "the backing chain has a loop").await;
        }
    }
}

/// A loop that the names do not show ends at the bound on a chain's length, or at the image's own lock.
#[tokio::test]
async fn a_loop_that_its_names_hide_ends_too() {
    let place = Place::new();
    std::fs::create_dir(place.path("sub")).expect("room");
    place.create("a.qed", above("sub/../a.qed", "qed", SIZE)).await;
    let path = place.path("a.qed").display().to_string();
    check_refused(&path, options(), "Is another process using the image").await;
    check_refused(&path, read_only(), "the backing chain has more than 200 images").await;
}

#[tokio::test]
async fn a_loop_over_http_is_refused() {
    let place = Place::new();
    place.create("a.qed", above("a.qed", "qed", SIZE)).await;
    let origin = serve(&Content::Given(place.bytes_of("a.qed"))).await;
    check_refused(&origin.url_of("/x/a.qed"), read_only(), "the backing chain has a loop").await;
    place.create("top.qed", filled_from(&origin.url_of("/x/a.qed"), "qed", SIZE)).await;
    check_refused(place.path("top.qed").to_str().expect("text"), options(), "the backing chain has a loop")
        .await;
}

/// An image that names `backing`, served over HTTP.
async fn served(place: &Place, backing: &str) -> FaultyOrigin {
    let _ = std::fs::remove_file(place.path("served.qed"));
    place.create("served.qed", above(backing, "raw", SIZE)).await;
    serve(&Content::Given(place.bytes_of("served.qed"))).await
}

fn allowing(pattern: &str) -> ChainOptions {
    ChainOptions { allow_backing: AllowBacking::new([pattern.to_owned()]), ..read_only() }
}

async fn check_shows(opened: &Opened, bytes: &Content) {
    assert!(opened.read(0..SIZE).await == bytes.bytes(0..SIZE));
}

#[tokio::test]
async fn an_image_from_the_network_names_no_local_path() {
    let place = Place::new();
    let secret = content(1, SIZE);
    place.raw("secret.raw", &secret.bytes(0..SIZE));
    let path = place.path("secret.raw").display().to_string();
    let words = "an image read over the network may not name a local file";
    for name in [path.clone(), format!("file:{path}"), format!("file://{path}"), format!("/../{path}")] {
        let origin = served(&place, &name).await;
        check_refused(&origin.url_of("/i/a.qed"), read_only(), words).await;
        // Also as the backing of a local image, which itself may name anything.
        let _ = std::fs::remove_file(place.path("top.qed"));
        place.create("top.qed", filled_from(&origin.url_of("/i/a.qed"), "qed", SIZE)).await;
        check_refused(place.path("top.qed").to_str().expect("text"), options(), words).await;
        check_refused(&origin.url_of("/i/a.qed"), allowing(&format!("{path}.not")), words).await;
        let allowed = open(&origin.url_of("/i/a.qed"), allowing(&path)).await.expect("the user allows it");
        check_shows(&allowed, &secret).await;
    }
    let origin = served(&place, "nbd://127.0.0.1/x").await;
    check_refused(&origin.url(), allowing("*"), "Unknown protocol 'nbd'").await;
}

#[tokio::test]
async fn an_image_from_the_network_names_no_other_host() {
    let place = Place::new();
    let behind = content(2, SIZE);
    // Another port is another server.
    let other = serve(&behind).await;
    let origin = served(&place, &other.url()).await;
    let words = "it is at another host";
    check_refused(&origin.url(), read_only(), words).await;
    place.create("top.qed", filled_from(&origin.url(), "qed", SIZE)).await;
    check_refused(place.path("top.qed").to_str().expect("text"), options(), words).await;
    assert_eq!(other.log().len(), 0, "it was not even asked");
    let allowed = open(&origin.url(), allowing(&format!("http://{}/*", other.addr()))).await;
    check_shows(&allowed.expect("the user allows it"), &behind).await;
}

#[tokio::test]
async fn an_image_from_the_network_may_name_its_own_host() {
    let place = Place::new();
    let behind = content(3, SIZE);
    for name in ["base.raw", "sub/../base.raw"] {
        let origin = served(&place, name).await;
        let answer = Fault::Version { etag: Some("\"b\"".into()), content: behind.clone() };
        origin.fault(When::always().on("/i/base.raw"), answer);
        let opened = open(&origin.url_of("/i/a.qed"), read_only()).await.expect("its own host");
        check_shows(&opened, &behind).await;
    }
}

#[tokio::test]
async fn no_backing_files_opens_nothing() {
    let place = Place::new();
    let behind = content(4, SIZE);
    let origin = serve(&behind).await;
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.read(clusters(0..1)).await;
    opened.close().await;
    origin.clear_log();
    let alone = ChainOptions { no_backing_files: true, ..options() };
    let opened = place.open("top.qed", alone.clone()).await;
    assert!(opened.read(clusters(0..1)).await == behind.bytes(clusters(0..1)));
    let error = opened.try_read(clusters(0..2)).await.expect_err("it is not local");
    assert!(error.to_string().contains("--no-backing-files"), "{error}");
    opened.write(2 * CLUSTER, vec![2; CLUSTER as usize]).await;
    opened.close().await;
    assert_eq!(origin.log().len(), 0);
    place.check("top.qed", "D.D.....").await;

    // A backing that is not there, or no file, is no trouble then.
    let nowhere = ["create", "-q", "-f", "qed", "-u", "-b", "/nowhere/at-all", "-F", "raw", "no.qed", "1M"];
    qemu::img(place.folder(), &nowhere);
    let opened = place.open("no.qed", alone).await;
    assert!(opened.try_read(0..512).await.is_err());
    opened.close().await;
}
