//! Chains of every shape and mix of formats, used at random beside the flat model, then judged by QEMU.

use readonce_disk::chain::{ChainOptions, CopyOnRead};
use readonce_testkit::{Content, Fault, When};

use super::{
    model::Model,
    place::{Opened, Place, Spec, above, content, filled_from, options, serve},
    qemu,
};

/// Rounds of up to four requests each.
const ROUNDS: usize = 150;

/// Sizes in bytes; the bottom is raw.
#[derive(Debug, Clone, Copy)]
struct Shape {
    bottom: u64,
    middle: u64,
    top: u64,
    cluster_size: u64,
    middle_fills: bool,
    top_fills: bool,
    formats: Formats,
}

/// Formats of the middle and of the top.
#[derive(Debug, Clone, Copy)]
struct Formats {
    middle: &'static str,
    top: &'static str,
    /// With subclusters, where clusters are large enough.
    extended: bool,
}

const QED: Formats = Formats { middle: "qed", top: "qed", extended: false };
const MIXED: [Formats; 4] = [
    Formats { middle: "qcow2", top: "qcow2", extended: false },
    Formats { middle: "qed", top: "qcow2", extended: true },
    Formats { middle: "qcow2", top: "qed", extended: false },
    Formats { middle: "qcow2", top: "qcow2", extended: true },
];

impl Shape {
    fn names(&self) -> (String, String) {
        (format!("middle.{}", self.formats.middle), format!("top.{}", self.formats.top))
    }

    fn extended(&self, format: &str) -> bool {
        self.formats.extended && format == "qcow2" && self.cluster_size >= 16384
    }

    fn middle<'a>(&self, backing: &'a str) -> Spec<'a> {
        let extended = self.extended(self.formats.middle);
        let (cluster_size, copy_on_read) = (self.cluster_size, self.middle_fills);
        Spec { cluster_size, copy_on_read, extended, ..above(backing, "raw", self.middle) }
    }

    fn top<'a>(&self, backing: &'a str) -> Spec<'a> {
        let extended = self.extended(self.formats.top);
        let (cluster_size, copy_on_read) = (self.cluster_size, self.top_fills);
        Spec { cluster_size, copy_on_read, extended, ..above(backing, self.formats.middle, self.top) }
    }
}

const EVEN: Shape = Shape {
    bottom: 1 << 20,
    middle: 1 << 20,
    top: 1 << 20,
    cluster_size: 65536,
    middle_fills: false,
    top_fills: true,
    formats: QED,
};

/// Each image is shorter or longer than the one behind it, or ends inside a cluster, or both.
fn shapes() -> Vec<Shape> {
    let odd = Shape { bottom: 700_001, middle: 700_416, top: 700_416, ..EVEN };
    vec![
        EVEN,
        odd,
        Shape { top_fills: false, middle_fills: true, ..odd },
        Shape { bottom: 300_000, middle: 600_064, top: 900_096, cluster_size: 4096, ..EVEN },
        Shape { bottom: 900_000, middle: 600_064, top: 300_032, cluster_size: 4096, ..EVEN },
        Shape { bottom: 900_000, middle: 300_032, top: 900_096, middle_fills: true, ..EVEN },
        Shape {
            bottom: 300_000,
            middle: 900_096,
            top: 600_064,
            middle_fills: true,
            cluster_size: 8192,
            ..EVEN
        },
        Shape { bottom: 1000, middle: 512, top: 66_048, ..EVEN },
        Shape { cluster_size: 1 << 20, bottom: 1_500_000, middle: 2_000_384, top: 1_800_192, ..EVEN },
    ]
}

async fn use_at_random(model: &mut Model, opened: Opened) {
    model.use_disk(opened.disk(), ROUNDS).await;
    assert_eq!(opened.warnings(), Vec::<String>::new());
    opened.close().await;
}

/// A chain of files, its middle written first, then its top.
async fn check_files(seed: u64, shape: Shape) {
    let place = Place::new();
    let bottom = content(seed, shape.bottom).bytes(0..shape.bottom);
    place.raw("base.raw", &bottom);
    let (middle, top) = shape.names();
    place.create(&middle, shape.middle("base.raw")).await;
    let mut model = Model::over(seed, &bottom, shape.middle);
    use_at_random(&mut model, place.open(&middle, options()).await).await;
    qemu::compare(&place.path(&middle), &model.bytes);
    let middle_bytes = model.bytes;

    place.create(&top, shape.top(&middle)).await;
    let mut model = Model::over(seed + 1, &middle_bytes, shape.top);
    use_at_random(&mut model, place.open(&top, options()).await).await;
    for image in [&middle, &top] {
        qemu::check(&place.path(image));
    }
    qemu::compare(&place.path(&top), &model.bytes);
    qemu::compare(&place.path(&middle), &middle_bytes);
    assert!(place.bytes_of("base.raw") == bottom, "a backing is never written");

    let read_only = ChainOptions { read_only: true, copy_on_read: CopyOnRead::Off, ..options() };
    let opened = place.open(&top, read_only).await;
    model.check_all(opened.disk()).await;
    opened.close().await;
    let opened = place.open(&top, options()).await;
    model.use_disk(opened.disk(), ROUNDS / 3).await;
    model.check_all(opened.disk()).await;
    opened.close().await;
    qemu::check(&place.path(&top));
    qemu::compare(&place.path(&top), &model.bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_above_files() {
    for (index, shape) in (0..).zip(shapes()) {
        let mixed = MIXED[index as usize % MIXED.len()];
        for formats in [QED, mixed] {
            let shape = Shape { formats, ..shape };
            println!("seed {}: {shape:?}", 10 * index);
            check_files(10 * index, shape).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_at_the_bottom() {
    for (index, shape) in (0..).zip(shapes()) {
        let shape = match index % 3 {
            0 => shape,
            _ => Shape { formats: MIXED[(index as usize + 1) % MIXED.len()], ..shape },
        };
        println!("seed {}: {shape:?}", 500 + index);
        let content = content(500 + index, shape.bottom);
        let origin = serve(&content).await;
        let place = Place::new();
        let (middle, top) = shape.names();
        let url = origin.url();
        place.create(&middle, shape.middle(&url)).await;
        let mut model = Model::over(500 + index, &content.bytes(0..shape.bottom), shape.middle);
        use_at_random(&mut model, place.open(&middle, options()).await).await;
        place.check_with_qemu(&middle, &content, &model.bytes).await;

        place.create(&top, shape.top(&middle)).await;
        let mut model = Model::over(600 + index, &model.bytes, shape.top);
        use_at_random(&mut model, place.open(&top, options()).await).await;
        let opened = place.open(&top, options()).await;
        model.check_all(opened.disk()).await;
        opened.close().await;
        place.rebase(&middle, "base.raw", "raw").await;
        place.raw("base.raw", &content.bytes(0..shape.bottom));
        qemu::check(&place.path(&middle));
        qemu::check(&place.path(&top));
        qemu::compare(&place.path(&top), &model.bytes);
    }
}

/// A QED image that is read over HTTP and names its backing beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_in_the_middle() {
    for (seed, size, cluster_size) in [(800, 4 << 20, 65536), (801, 3_000_320, 4096)] {
        let place = Place::new();
        let base = content(seed, 2_600_001).bytes(0..2_600_001);
        place.raw("base.raw", &base);
        place.create("middle.qed", Spec { cluster_size, ..above("base.raw", "raw", size) }).await;
        // Little, so that much of the base shows through. By QEMU, which pins no version of the local file.
        let mut bytes = base.to_vec();
        bytes.resize(size as usize, 0);
        bytes[70_000..170_000].fill(0x31);
        bytes[1_048_576..1_310_720].fill(0);
        let middle = place.path("middle.qed");
        qemu::io(&middle, &["write -P 0x31 70000 100000", "write -z 1M 256k"]);

        // Another folder, so that a name looked for in the wrong place is not found.
        let origin = serve(&Content::Given(place.bytes_of("middle.qed"))).await;
        let beside = Fault::Version { etag: Some("\"base\"".into()), content: Content::Given(base) };
        origin.fault(When::always().on("/images/base.raw"), beside);
        let url = origin.url_of("/images/middle.qed?version=3");
        let local = Place::new();
        local.create("top.qed", Spec { cluster_size, ..filled_from(&url, "qed", size) }).await;
        let mut model = Model::over(seed, &bytes, size);
        use_at_random(&mut model, local.open("top.qed", options()).await).await;
        let asked: std::collections::BTreeSet<_> =
            origin.log().into_iter().map(|entry| entry.target).collect();
        assert!(asked.iter().eq(["/images/base.raw", "/images/middle.qed?version=3"]), "{asked:?}");

        std::fs::copy(place.path("middle.qed"), local.path("middle.qed")).expect("room");
        std::fs::copy(place.path("base.raw"), local.path("base.raw")).expect("room");
        local.rebase("top.qed", "middle.qed", "qed").await;
        qemu::check(&local.path("top.qed"));
        qemu::compare(&local.path("top.qed"), &model.bytes);
        let opened = local.open("top.qed", options()).await;
        model.check_all(opened.disk()).await;
        opened.close().await;
    }
}

/// A URL as the top itself: read-only, nothing kept.
#[tokio::test]
async fn a_url_at_the_top() {
    let content = content(900, 300_000);
    let origin = serve(&content).await;
    let mut options = options();
    options.format = Some("raw".into());
    let opened = super::place::open(&origin.url(), options.clone()).await.expect("it opens");
    assert_eq!(opened.warnings(), [format!("{} is not local: it is served read-only", origin.url())]);
    assert!(opened.disk().read_only());
    // Raw shows whole sectors, as in QEMU.
    let mut model = Model::over(900, &content.bytes(0..300_000), 300_032);
    assert_eq!(opened.disk().size(), 300_032);
    model.check_all(opened.disk()).await;
    assert!(opened.try_write(0, vec![1; 512]).await.is_err());
    opened.close().await;
}
