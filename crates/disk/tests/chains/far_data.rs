//! The data file of an image that lies behind a URL: found beside it, pinned with it, opened only where a backing may be.

use readonce_disk::chain::{ChainOptions, OnChange};
use readonce_format::driver::{HeaderChange, Pin, driver};
use readonce_origin::{AllowBacking, Pinned};
use readonce_storage::{LocalFile, OpenMode, Storage};
use readonce_testkit::{Content, Fault, FaultyOrigin, When};

use super::{
    place::{Opened, Place, content, filled_from, impatient, open, options, serve},
    qemu,
};

const SIZE: u64 = 1 << 20;
const HALF: u64 = SIZE / 2;

/// What is served: an image, its data file, and what they show.
struct Far {
    origin: FaultyOrigin,
    shown: Vec<u8>,
}

impl Far {
    /// An image at `/i/far.qcow2` that names `data` as its data file; `/i/data.raw` is that file.
    async fn naming(data: &str) -> Self {
        let place = Place::new();
        let shown = content(1, SIZE).bytes(0..SIZE).to_vec();
        place.raw("plain.raw", &shown);
        // The name is QEMU's to open as well: it gets its last form afterwards.
        let mut name = "data.raw".to_owned();
        name.extend(std::iter::repeat_n('x', data.len().saturating_sub(name.len())));
        let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o"];
        let with = [format!("data_file={name}"), "plain.raw".into(), "far.qcow2".into()];
        qemu::img(place.folder(), &[&convert[..], &with.each_ref().map(String::as_str)].concat());
        let mut image = place.bytes_of("far.qcow2").to_vec();
        let at = image.windows(name.len()).position(|bytes| bytes == name.as_bytes()).expect("stored");
        image[at..at + name.len()].copy_from_slice(data.as_bytes());
        let origin = serve(&Content::Given(image.into())).await;
        let far = Self { origin, shown };
        far.replace_data("\"d1\"", &place.bytes_of(&name));
        far
    }

    fn replace_data(&self, etag: &str, bytes: &[u8]) {
        self.origin.heal();
        let content = Content::Given(bytes.to_vec().into());
        self.origin
            .fault(When::always().on("/i/data.raw"), Fault::Version { etag: Some(etag.into()), content });
    }

    fn url(&self) -> String {
        self.origin.url_of("/i/far.qcow2")
    }

    /// An image over it, in a folder of its own.
    async fn top(&self) -> Place {
        let place = Place::new();
        place.create("top.qcow2", filled_from(&self.url(), "qcow2", SIZE)).await;
        place
    }

    fn asked_of_data(&self) -> u64 {
        let log = self.origin.log();
        log.iter().filter(|entry| entry.target == "/i/data.raw").map(|entry| entry.body_bytes).sum()
    }
}

/// Not local: refused with these words, at open or at the read.
async fn check_refused(opened: Result<Opened, impl ToString>, words: &str) {
    let error = match opened {
        Err(error) => error.to_string(),
        Ok(opened) => {
            let error = opened.try_read(HALF..HALF + 512).await.expect_err("refused").to_string();
            opened.close().await;
            error
        }
    };
    assert!(error.replace('\'', "").contains(words), "{error}");
}

fn read_only() -> ChainOptions {
    ChainOptions { read_only: true, format: Some("qcow2".into()), ..options() }
}

#[tokio::test]
async fn it_is_read_once_and_pinned_with_its_image() {
    for name in ["data.raw", "sub/../data.raw"] {
        let far = Far::naming(name).await;
        let place = far.top().await;
        let opened = place.open("top.qcow2", options()).await;
        assert_eq!(opened.opened(), ["data.raw raw", "far.qcow2 qcow2", "top.qcow2 qcow2+"]);
        assert!(opened.read(0..SIZE).await[..] == far.shown[..]);
        assert!(opened.read(0..SIZE).await[..] == far.shown[..]);
        opened.close().await;
        let zeros = far.shown.chunks(65536).filter(|cluster| cluster.iter().all(|&byte| byte == 0)).count();
        let (asked, data) = (far.asked_of_data(), SIZE - 65536 * zeros as u64);
        assert!((data..=data + 4).contains(&asked), "{asked} bytes of {data}, and probes");
        let pin = place.describe("top.qcow2").await.pin.expect("pinned");
        let pinned = Pinned::decode(&pin.validator, pin.len).expect("ours");
        assert!(pinned.to_string().contains("its data file: ETag \"d1\""), "{pinned}");
    }
}

#[tokio::test]
async fn one_that_ends_early_reads_as_zeros_from_there() {
    let far = Far::naming("data.raw").await;
    far.replace_data("\"d1\"", &far.shown[..HALF as usize + 100]);
    let place = far.top().await;
    for _ in 0..2 {
        let opened = place.open("top.qcow2", options()).await;
        let read = opened.read(0..SIZE).await;
        assert!(read[..HALF as usize + 100] == far.shown[..HALF as usize + 100]);
        assert!(read[HALF as usize + 100..].iter().all(|&byte| byte == 0));
        opened.close().await;
    }
}

/// Half an image of the old data, half of the new: what the guest would have read without a pin of the data file.
#[tokio::test]
async fn a_changed_data_file_is_not_mixed_in() {
    let far = Far::naming("data.raw").await;
    let place = far.top().await;
    let words = "data.raw: the file changed since this image was made";
    // While it is read.
    let opened = place.open("top.qcow2", options()).await;
    assert!(opened.read(0..HALF).await[..] == far.shown[..HALF as usize]);
    far.replace_data("\"d2\"", &content(2, SIZE).bytes(0..SIZE));
    check_refused(Ok::<_, String>(opened), words).await;
    // While it is not.
    let opened = place.open("top.qcow2", options()).await;
    assert!(opened.read(0..HALF).await[..] == far.shown[..HALF as usize]);
    let warnings = opened.warned().await;
    assert!(matches!(&warnings[..], [one] if one.contains("the file changed")), "{warnings:?}");
    check_refused(Ok::<_, String>(opened), "the file changed since this image was made").await;
    let repin = ChainOptions { on_change: OnChange::Repin, ..options() };
    check_refused(
        place.try_open("top.qcow2", repin.clone()).await,
        "the image holds clusters of the old version",
    )
    .await;
    // An image that holds nothing takes the new one.
    let fresh = far.top().await;
    fresh.open("top.qcow2", options()).await.close().await;
    far.replace_data("\"d3\"", &content(3, SIZE).bytes(0..SIZE));
    let opened = fresh.open("top.qcow2", repin).await;
    assert!(opened.read(0..512).await == content(3, SIZE).bytes(0..512));
    opened.close().await;
}

#[tokio::test]
async fn one_that_is_not_there_is_named() {
    let far = Far::naming("data.raw").await;
    far.origin.heal();
    far.origin.fault(When::always().on("/i/data.raw"), Fault::Status { status: 404, retry_after: None });
    let words = format!("{}: 404 Not Found", far.origin.url_of("/i/data.raw"));
    check_refused(open(&far.url(), read_only()).await, &words).await;
    let place = far.top().await;
    check_refused(place.try_open("top.qcow2", impatient()).await, &words).await;
}

#[tokio::test]
async fn it_lies_where_a_backing_may_and_never_here() {
    let secret = Place::new();
    secret.raw("secret.raw", &[7; 4096]);
    let path = secret.path("secret.raw").display().to_string();
    let anything = ChainOptions { allow_backing: AllowBacking::new(["*".to_owned()]), ..read_only() };
    for name in [path.clone(), format!("file:{path}")] {
        let far = Far::naming(&name).await;
        check_refused(open(&far.url(), read_only()).await, "is a local file").await;
        check_refused(open(&far.url(), anything.clone()).await, "is a local file").await;
    }
    let other = Far::naming("data.raw").await;
    let far = Far::naming(&other.origin.url_of("/i/data.raw")).await;
    other.origin.clear_log();
    check_refused(open(&far.url(), read_only()).await, "it is at another host").await;
    assert_eq!(other.origin.log().len(), 0, "it was not even asked");
    let opened = open(&far.url(), anything).await.expect("the user allows it");
    assert!(opened.read(0..SIZE).await[..] == far.shown[..]);
    opened.close().await;
    let far = Far::naming("far.qcow2").await;
    check_refused(open(&far.url(), read_only()).await, "it names itself as its data file").await;
}

#[tokio::test]
async fn without_backing_files_it_is_not_opened() {
    let far = Far::naming("data.raw").await;
    let alone = ChainOptions { no_backing_files: true, ..read_only() };
    check_refused(open(&far.url(), alone).await, "--no-backing-files").await;
    assert_eq!(far.asked_of_data(), 0);
}

/// What filled it can have been any version.
#[tokio::test]
async fn an_image_that_pins_its_backing_alone_reads_no_data() {
    let far = Far::naming("data.raw").await;
    let place = far.top().await;
    place.open("top.qcow2", options()).await.close().await;
    let pin = place.describe("top.qcow2").await.pin.expect("pinned");
    let own = Pinned { data: None, ..Pinned::decode(&pin.validator, pin.len).expect("ours") };
    let change = HeaderChange::Pin(Pin { validator: own.encode(), len: pin.len });
    let file = LocalFile::open(place.path("top.qcow2"), OpenMode::ReadWrite).expect("it is there");
    let file: std::sync::Arc<dyn Storage> = std::sync::Arc::new(file);
    driver("qcow2").expect("known").change(&file, &change).await.expect("room");
    check_refused(place.try_open("top.qcow2", options()).await, "pins no version of this data file").await;
}
