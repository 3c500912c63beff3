//! A folder of images; a chain opened from it; an image drawn as letters.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use readonce_disk::{
    BlockDevice, DeviceError, LayerError, ZeroMode,
    chain::{self, Chain, ChainOptions, OpenError, Report},
};
use readonce_format::{
    Driver, Mapping,
    driver::{BackingRef, CreateSpec, Description, HeaderChange, driver},
};
use readonce_origin::{OriginOptions, Proxies};
use readonce_storage::{LocalFile, OpenMode, ReadAt, Storage, TokioRuntime};
use readonce_testkit::{Content, FaultyOrigin, OriginSpec};

/// Bytes of a cluster where a test does not say another size: small, so that images can be drawn.
pub const CLUSTER: u64 = 4096;
/// More than any step takes; a test that waits for so long hangs.
pub const LONG: Duration = Duration::from_secs(3600);
/// How long a fetch is tried where a test is to see it given up.
pub const SHORT: Duration = Duration::from_millis(200);

/// A folder of its own, gone at the end.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file as it is.
    pub fn raw(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("room");
    }

    pub fn bytes_of(&self, name: &str) -> Bytes {
        std::fs::read(self.path(name)).expect("it is there").into()
    }

    /// Makes an image, of the format that its name ends with.
    pub async fn create(&self, name: &str, spec: Spec<'_>) {
        let file: Arc<dyn Storage> =
            Arc::new(LocalFile::open(self.path(name), OpenMode::CreateNew).expect("room"));
        let mut options = vec![("cluster_size".into(), Some(spec.cluster_size.to_string()))];
        if name.ends_with("qed") {
            options.push(("table_size".into(), Some("2".into())));
        }
        if spec.extended {
            options.push(("extended_l2".into(), Some("on".into())));
        }
        if spec.copy_on_read {
            options.push(("copy_on_read".into(), None));
        }
        let backing =
            spec.backing.map(|(name, format)| BackingRef { name: name.into(), format: Some(format.into()) });
        let spec = CreateSpec { size: spec.size, backing, options, pin: None, data_file: None };
        format_of(name).create(&file, None, &spec).await.expect("the image is made");
    }

    pub async fn try_open(&self, name: &str, options: ChainOptions) -> Result<Opened, OpenError> {
        open(self.path(name).to_str().expect("text"), options).await
    }

    pub async fn open(&self, name: &str, options: ChainOptions) -> Opened {
        self.try_open(name, options).await.unwrap_or_else(|error| panic!("{error}"))
    }

    pub async fn describe(&self, name: &str) -> Description {
        let file: Arc<dyn ReadAt> = self.file(name);
        format_of(name).describe(&file).await.expect("an image")
    }

    fn file(&self, name: &str) -> Arc<LocalFile> {
        Arc::new(LocalFile::open(self.path(name), OpenMode::Read).expect("it is there"))
    }

    /// The image as its file says it: `.` absent, `D` data, `Z` zero, one letter a cluster.
    pub async fn draw(&self, name: &str) -> String {
        let mapper = format_of(name).open(self.file(name)).await.expect("an image");
        let geometry = mapper.geometry();
        let mut letters = String::new();
        let mut at = 0;
        while at < geometry.size {
            let extent = mapper.lookup(at, 1).await.expect("a sound table");
            letters.push(match extent.mapping {
                Mapping::Absent => '.',
                Mapping::Data(_) => 'D',
                Mapping::Shared(_) => 'S',
                Mapping::Compressed(_) => 'C',
                Mapping::Zero => 'Z',
            });
            at += geometry.fill_unit;
        }
        letters
    }

    /// The image is drawn so.
    #[track_caller]
    pub fn check(&self, name: &str, letters: &str) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let drawn = self.draw(name).await;
            assert_eq!(drawn, letters, "{name}, at {caller}");
        }
    }

    /// Makes a file the image's backing, in place of a URL that QEMU's tools cannot read without their package for it.
    /// `qemu-img rebase` refuses an image with compat bits that it does not know.
    pub async fn rebase(&self, name: &str, backing: &str, format: &str) {
        let file = LocalFile::open(self.path(name), OpenMode::ReadWrite).expect("it is there");
        let file: Arc<dyn Storage> = Arc::new(file);
        let backing = BackingRef { name: backing.into(), format: Some(format.into()) };
        format_of(name)
            .change(&file, &HeaderChange::Backing(Some(backing), None))
            .await
            .expect("the name is short");
    }

    /// A chain over a URL, as QEMU sees it when a copy of it has the file itself as its backing: sound, without leaks, and with
    /// these guest bytes.
    pub async fn check_with_qemu(&self, name: &str, content: &Content, guest: &[u8]) {
        let copy = &format!("copy-for-qemu-{name}");
        std::fs::copy(self.path(name), self.path(copy)).expect("room");
        self.raw("origin-for-qemu.raw", &content.bytes(0..content.len()));
        self.rebase(copy, "origin-for-qemu.raw", "raw").await;
        super::qemu::check(&self.path(copy));
        super::qemu::compare(&self.path(copy), guest);
    }
}

/// What image to make.
#[derive(Clone, Copy)]
pub struct Spec<'a> {
    pub size: u64,
    /// Name and format, as stored.
    pub backing: Option<(&'a str, &'a str)>,
    pub copy_on_read: bool,
    pub cluster_size: u64,
    /// With subclusters.
    pub extended: bool,
}

/// An image of small clusters above `backing`.
pub fn above<'a>(backing: &'a str, format: &'a str, size: u64) -> Spec<'a> {
    Spec {
        size,
        backing: Some((backing, format)),
        copy_on_read: false,
        cluster_size: CLUSTER,
        extended: false,
    }
}

/// The same, with copy-on-read.
pub fn filled_from<'a>(backing: &'a str, format: &'a str, size: u64) -> Spec<'a> {
    Spec { copy_on_read: true, ..above(backing, format, size) }
}

/// The format that a name ends with.
fn format_of(name: &str) -> &'static dyn Driver {
    let format = name.rsplit('.').next().unwrap_or_default();
    driver(format).expect("images are named by their format")
}

/// How a test opens a chain: no proxy between it and the loopback, patient, and no stall that a loaded machine could show.
pub fn options() -> ChainOptions {
    let origin = OriginOptions {
        proxies: Proxies::None,
        retry_for: LONG,
        probe_for: SHORT,
        stall_timeout: LONG,
        ..OriginOptions::default()
    };
    ChainOptions { origin, ..ChainOptions::default() }
}

/// The same, but a fetch is soon given up.
pub fn impatient() -> ChainOptions {
    let mut options = options();
    options.origin.retry_for = SHORT;
    options
}

/// Generated bytes with stretches of zeros: of 16 clusters, the last two are zeros.
pub fn content(seed: u64, len: u64) -> Content {
    let mut bytes = Content::seeded(seed, len).bytes(0..len).to_vec();
    for (index, cluster) in bytes.chunks_mut(CLUSTER as usize).enumerate() {
        if index % 16 >= 14 {
            cluster.fill(0);
        }
    }
    Content::Given(bytes.into())
}

/// An origin that serves `content`.
pub async fn serve(content: &Content) -> FaultyOrigin {
    FaultyOrigin::start(OriginSpec::new(content.clone())).await.expect("a port")
}

/// The ranges that were asked for since the log was cleared, without the probes of one byte.
pub fn asked(origin: &FaultyOrigin) -> Vec<Range<u64>> {
    let ranges = origin.log().into_iter().filter_map(|entry| entry.range);
    ranges.filter(|range| *range != (0..1)).collect()
}

/// Opens the chain from `name` down; a name may be a URL.
pub async fn open(name: &str, options: ChainOptions) -> Result<Opened, OpenError> {
    let reports = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let keep = Arc::clone(&reports);
    let reporter: chain::Reporter = Arc::new(move |report| keep.lock().push(report));
    let chain = chain::open(name, options, TokioRuntime::current(), reporter).await?;
    Ok(Opened { chain, reports })
}

/// An open chain, used as an export would use it.
pub struct Opened {
    pub chain: Chain,
    reports: Arc<parking_lot::Mutex<Vec<Report>>>,
}

impl Opened {
    pub fn disk(&self) -> &dyn BlockDevice {
        &*self.chain.disk
    }

    pub async fn try_read(&self, range: Range<u64>) -> Result<Bytes, DeviceError> {
        try_read(self.disk(), range).await
    }

    /// Reads, and fails the test where that fails.
    pub async fn read(&self, range: Range<u64>) -> Bytes {
        self.try_read(range.clone()).await.unwrap_or_else(|error| panic!("read of {range:?}: {error}"))
    }

    pub async fn try_write(&self, offset: u64, data: impl Into<Bytes>) -> Result<(), DeviceError> {
        try_write(self.disk(), offset, data.into()).await
    }

    /// Writes, and fails the test where that fails.
    pub async fn write(&self, offset: u64, data: impl Into<Bytes>) {
        self.try_write(offset, data).await.unwrap_or_else(|error| panic!("write at {offset}: {error}"));
    }

    pub async fn write_zeroes(&self, range: Range<u64>) {
        let len = range.end - range.start;
        let zeroed = self.disk().write_zeroes(range.start, len, ZeroMode::default()).await;
        zeroed.unwrap_or_else(|error| panic!("zeroes at {range:?}: {error}"));
    }

    pub async fn flush(&self) {
        self.disk().flush().await.unwrap_or_else(|error| panic!("flush: {error}"));
    }

    /// Closes clean, and fails the test where that fails.
    pub async fn close(self) {
        self.try_close(LONG).await.unwrap_or_else(|error| panic!("close: {error}"));
    }

    pub async fn try_close(self, wait_max: Duration) -> Result<(), LayerError> {
        self.chain.close(wait_max).await
    }

    /// The warnings, once there are any: an origin is asked behind the image.
    pub async fn warned(&self) -> Vec<String> {
        while self.warnings().is_empty() {
            tokio::task::yield_now().await;
        }
        self.warnings()
    }

    pub fn warnings(&self) -> Vec<String> {
        let reports = self.reports.lock();
        let warnings = reports.iter().filter_map(|report| match report {
            Report::Warning(text) => Some(text.clone()),
            Report::Opened { .. } => None,
        });
        warnings.collect()
    }

    /// What was opened: the last part of each name, its format, and `+` where it is written to.
    pub fn opened(&self) -> Vec<String> {
        let reports = self.reports.lock();
        let opened = reports.iter().filter_map(|report| match report {
            Report::Warning(_) => None,
            Report::Opened { name, format, writable } => {
                let name = name.rsplit('/').next().unwrap_or_default();
                Some(format!("{name} {format}{}", if *writable { "+" } else { "" }))
            }
        });
        opened.collect()
    }
}

/// As an export reads: at once where that is possible.
pub async fn try_read(disk: &dyn BlockDevice, range: Range<u64>) -> Result<Bytes, DeviceError> {
    let mut buf = vec![0xee; (range.end - range.start) as usize];
    match disk.read_now(range.start, &mut buf) {
        Some(read) => read.map(|()| buf.into()),
        None => disk.read(range.start, buf.len()).await,
    }
}

/// As an export writes: at once where that is possible.
pub async fn try_write(disk: &dyn BlockDevice, offset: u64, data: Bytes) -> Result<(), DeviceError> {
    match disk.write_now(offset, &data) {
        Some(written) => written,
        None => disk.write(offset, data).await,
    }
}

/// The clusters of a range, in bytes.
pub fn clusters(range: Range<u64>) -> Range<u64> {
    range.start * CLUSTER..range.end * CLUSTER
}
