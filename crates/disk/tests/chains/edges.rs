//! The edges of a chain: a version that cannot be told, a backing that cannot be opened, however often it is tried.

use std::{path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use readonce_disk::{
    BlockDevice,
    chain::{self, Chain, ChainOptions, CopyOnRead, OnChange, OpenError, Report},
};
use readonce_format::driver::{BackingRef, CreateSpec, Description, Pin, driver};
use readonce_origin::OriginOptions;
use readonce_storage::{LocalFile, ReadAt, Storage, local::OpenMode, runtime::TokioRuntime};

const CLUSTER: usize = 65536;

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}

async fn create(path: &Path, backing: &str, format: &str, copy_on_read: bool, pin: Option<Pin>) {
    let file: Arc<dyn Storage> = Arc::new(LocalFile::open(path, OpenMode::CreateNew).expect("new"));
    let spec = CreateSpec {
        size: 16 * CLUSTER as u64,
        backing: Some(BackingRef { name: backing.into(), format: Some(format.into()) }),
        options: vec![("copy_on_read".into(), Some(if copy_on_read { "on" } else { "off" }.into()))],
        pin,
        data_file: None,
    };
    driver("qed").expect("known").create(&file, None, &spec).await.expect("made");
}

async fn describe(path: &Path) -> Description {
    let file: Arc<dyn ReadAt> = Arc::new(LocalFile::open(path, OpenMode::Read).expect("there"));
    driver("qed").expect("known").describe(&file).await.expect("an image")
}

async fn open(path: &Path, options: ChainOptions) -> (Result<Chain, OpenError>, Arc<Mutex<Vec<String>>>) {
    let warnings = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&warnings);
    let reporter: chain::Reporter = Arc::new(move |report| {
        if let Report::Warning(text) = report {
            heard.lock().push(text);
        }
    });
    let name = path.to_str().expect("our own name");
    (chain::open(name, options, TokioRuntime::current(), reporter).await, warnings)
}

#[test]
fn a_lower_image_that_fills_is_pinned_before_its_first_fill() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("base.raw"), vec![1; 16 * CLUSTER]).expect("room");
    run(async {
        // As `create -u`, or qemu-img and then `amend -o copy_on_read`, make it.
        create(&path("lower.qed"), "base.raw", "raw", true, None).await;
        create(&path("top.qed"), "lower.qed", "qed", false, None).await;
        let (chain, warnings) = open(&path("top.qed"), ChainOptions::default()).await;
        let chain = chain.expect("opens");
        chain.disk.read(0, CLUSTER).await.expect("reads");
        chain.close(Duration::from_secs(30)).await.expect("closes");
        let lower = describe(&path("lower.qed")).await;
        let len = std::fs::metadata(path("lower.qed")).expect("there").len();
        assert!(len > 6 * CLUSTER as u64, "it was filled");
        assert!(
            lower.pin.is_some(),
            "filled from a version that nobody remembers; warnings {:?}",
            warnings.lock()
        );
    });
}

#[test]
fn a_pin_that_cannot_be_read_does_not_stand_for_any_version() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("base.raw"), vec![1; 16 * CLUSTER]).expect("room");
    run(async {
        // Of a later version of the encoding.
        let pin = Pin { validator: vec![200, 1, 2, 3], len: 16 * CLUSTER as u64 };
        create(&path("top.qed"), "base.raw", "raw", true, Some(pin)).await;
        let (chain, warnings) = open(&path("top.qed"), ChainOptions::default()).await;
        let read = match &chain {
            Ok(chain) => chain.disk.read(0, CLUSTER).await.is_ok(),
            Err(_) => false,
        };
        assert!(
            !read || !warnings.lock().is_empty(),
            "filled from an unchecked version, and nobody was told"
        );
    });
}

#[test]
fn with_repin_an_origin_that_is_away_is_a_warning_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    run(async {
        let version = readonce_origin::Version {
            validator: readonce_origin::Validator::StrongETag("\"a\"".into()),
            len: 16 * CLUSTER as u64,
        };
        let pin = Pin { validator: version.validator.encode(), len: version.len };
        create(&path("top.qed"), "http://127.0.0.1:9/x", "raw", true, Some(pin)).await;
        for on_change in [OnChange::Refuse, OnChange::Repin] {
            let origin = OriginOptions {
                probe_for: Duration::from_millis(100),
                retry_for: Duration::from_millis(100),
                ..OriginOptions::default()
            };
            let options = ChainOptions { on_change, origin, ..ChainOptions::default() };
            let (chain, _) = open(&path("top.qed"), options).await;
            assert!(chain.is_ok(), "{on_change:?}: {}", chain.err().expect("just looked at"));
            chain.expect("just looked at").close(Duration::from_secs(1)).await.expect("closes");
        }
    });
}

/// How often files of `folder` are open in this process.
fn open_files(folder: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").expect("Linux");
    let targets = all.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.starts_with(folder)).count()
}

#[test]
fn a_backing_that_cannot_be_opened_costs_nothing_each_time_it_is_tried() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    // A QED image by its magic, and nothing that fits it.
    std::fs::write(path("bottom.qed"), [&b"QED\0"[..], &[0; 4096]].concat()).expect("room");
    run(async {
        create(&path("lower.qed"), "bottom.qed", "qed", false, None).await;
        create(&path("top.qed"), "lower.qed", "qed", false, None).await;
        // Nothing fills, so nothing is opened for writing first.
        let options = ChainOptions { copy_on_read: CopyOnRead::Off, ..ChainOptions::default() };
        let (chain, _) = open(&path("top.qed"), options).await;
        let chain = chain.expect("what is lower is opened when needed");
        chain.disk.read(0, 512).await.expect_err("the bottom is no image");
        let before = open_files(folder.path());
        for _ in 0..32 {
            chain.disk.read(0, 512).await.expect_err("the bottom is no image");
        }
        let after = open_files(folder.path());
        assert!(after <= before, "{before} files were open, {after} are");
    });
}

/// A lower image that fills is locked, then opened: an attempt that fails in between must not leave the lock behind.
#[test]
fn a_failed_attempt_to_open_a_lower_image_leaves_no_lock() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    run(async {
        create(&path("bottom.qed"), "gopher://h/x", "raw", true, None).await;
        create(&path("lower.qed"), "bottom.qed", "qed", false, None).await;
        create(&path("top.qed"), "lower.qed", "qed", false, None).await;
        let (chain, warnings) = open(&path("top.qed"), ChainOptions::default()).await;
        let chain = chain.expect("what is lower is opened when needed");
        let first = chain.disk.read(0, 512).await.expect_err("an unknown protocol").to_string();
        let second = chain.disk.read(0, 512).await.expect_err("an unknown protocol").to_string();
        assert_eq!(
            first,
            second,
            "the first attempt holds what the second needs; warnings {:?}",
            warnings.lock()
        );
    });
}
