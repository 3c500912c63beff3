//! An image of any format on a simulated disk, over a simulated origin.

use std::sync::Arc;

use readonce_disk::{Base, BaseFiles, Image, ImageOptions, Source, inflight::Budgets};
use readonce_format::{
    Driver,
    driver::{BackingRef, CreateSpec, Repair, SnapshotChange, driver},
};
use readonce_storage::{ReadAt, Rt, SimFile, Storage};

use super::{exec::Exec, origin::SimOrigin};

/// A format and how its images are made.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub format: &'static str,
    pub options: &'static [(&'static str, &'static str)],
    /// Bytes.
    pub cluster_size: u64,
    /// An internal snapshot is made now and then.
    pub snapshots: bool,
    /// After a crash its refcounts are wrong until it is opened for writing.
    pub lazy: bool,
}

/// QED with small tables.
pub const QED: Kind = Kind {
    format: "qed",
    options: &[("table_size", "1")],
    cluster_size: 65536,
    snapshots: false,
    lazy: false,
};
/// qcow2 as it is made by default.
pub const QCOW2: Kind = Kind { format: "qcow2", options: &[], ..QED };
/// Version 2: no zero clusters above a backing.
pub const QCOW2_OLD: Kind = Kind { options: &[("compat", "0.10")], ..QCOW2 };
/// Subclusters.
pub const QCOW2_EXTENDED: Kind = Kind { options: &[("extended_l2", "on")], ..QCOW2 };
/// Refcounts written late, and narrow.
pub const QCOW2_LAZY: Kind =
    Kind { options: &[("lazy_refcounts", "on"), ("refcount_bits", "1")], lazy: true, ..QCOW2 };
/// Shared with snapshots.
pub const QCOW2_SNAPSHOTS: Kind = Kind { snapshots: true, ..QCOW2 };
/// Both.
pub const QCOW2_EXTENDED_SNAPSHOTS: Kind = Kind { snapshots: true, ..QCOW2_EXTENDED };

/// All of them.
pub const KINDS: [Kind; 7] =
    [QED, QCOW2, QCOW2_OLD, QCOW2_EXTENDED, QCOW2_LAZY, QCOW2_SNAPSHOTS, QCOW2_EXTENDED_SNAPSHOTS];

/// A test of each of these kinds; a failure is told with its kind.
pub fn for_kinds(kinds: &[Kind], test: impl Fn(Kind)) {
    for &kind in kinds {
        if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(kind))) {
            eprintln!("with {kind:?}");
            std::panic::resume_unwind(panic);
        }
    }
}

impl Kind {
    pub fn driver(&self) -> &'static dyn Driver {
        driver(self.format).expect("a known format")
    }

    /// Makes an image over a raw backing.
    pub async fn create(&self, file: &Arc<dyn Storage>, size: u64) {
        let mut options: Vec<_> =
            self.options.iter().map(|&(name, value)| (name.into(), Some(value.into()))).collect();
        options.push(("cluster_size".into(), Some(self.cluster_size.to_string())));
        let spec = CreateSpec {
            size,
            backing: Some(BackingRef { name: "origin".into(), format: Some("raw".into()) }),
            options,
            pin: None,
            data_file: None,
        };
        self.driver().create(file, None, &spec).await.expect("the image is made");
    }

    /// The image above `backing`, open for writing.
    pub async fn open(
        &self,
        file: Arc<dyn Storage>,
        backing: Arc<dyn Source>,
        exec: &Arc<Exec>,
        options: ImageOptions,
    ) -> Arc<Image> {
        self.open_on(exec.rt(), file, backing, options).await
    }

    /// The same on any runtime.
    pub async fn open_on(
        &self,
        rt: Rt,
        file: Arc<dyn Storage>,
        backing: Arc<dyn Source>,
        options: ImageOptions,
    ) -> Arc<Image> {
        let mapper = self
            .driver()
            .open_writable(Arc::clone(&file), None, Arc::clone(&rt))
            .await
            .expect("the image opens");
        let image = Image::new(mapper, file, Some(backing), rt, options);
        image.start_reclaim();
        image
    }

    /// What the image holds is kept as a snapshot too, so that none of it may be written in place.
    pub async fn snapshot(&self, file: &Arc<dyn Storage>, name: u64) {
        let readable: Arc<dyn ReadAt> = file.clone();
        if self.driver().describe(&readable).await.expect("an image").dirty {
            self.driver().repair(file, Repair::All).await.expect("what a crash left is mended");
        }
        let change = SnapshotChange::Create { name: format!("s{name}"), date_sec: 0, date_nsec: 0 };
        self.driver().snapshot(file, &change).await.expect("a snapshot is made");
    }

    /// The format's own check finds nothing wrong; no leaks either where `leaks` is none.
    pub async fn check(&self, file: Arc<dyn Storage>, leaks: Leaks, when: &str) {
        let readable: Arc<dyn ReadAt> = file;
        if self.lazy && self.driver().describe(&readable).await.expect("an image").dirty {
            return;
        }
        let report = self.driver().check(&readable).await.expect("the check runs");
        assert_eq!(report.corruptions, 0, "{when}: {report:?}");
        assert_eq!(report.check_errors, 0, "{when}: {report:?}");
        if leaks == Leaks::None {
            assert_eq!(report.leaks, 0, "{when}: {report:?}");
        }
    }
}

/// Copy-on-read, with the bounds of every day.
pub fn filling(copy_on_read: bool) -> ImageOptions {
    ImageOptions { copy_on_read, budgets: Budgets::default() }
}

/// The origin as a source.
pub async fn raw_over(origin: Arc<SimOrigin>) -> Arc<dyn Source> {
    let raw = driver("raw").expect("raw is a known format");
    let bytes: Arc<dyn ReadAt> = origin.clone();
    let files = BaseFiles { own: bytes.clone(), data: origin.clone() };
    Arc::new(Base::new(raw.open(bytes).await.expect("raw opens"), files, None, &origin.rt))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaks {
    None,
    Allowed,
}

/// Everything that a test of one image needs.
pub struct World {
    pub exec: Arc<Exec>,
    pub file: Arc<SimFile>,
    pub origin: Arc<SimOrigin>,
    pub image: Arc<Image>,
}

impl Drop for World {
    fn drop(&mut self) {
        // Its timers hold the image, which holds it.
        self.exec.power_off();
    }
}

impl World {
    /// An empty image with copy-on-read over an origin of the same size that answers at once.
    pub fn new(kind: Kind, seed: u64, size: u64) -> Self {
        let exec = Exec::punctual(seed);
        let file = Arc::new(SimFile::new());
        let origin = SimOrigin::new(size, exec.rt(), 0);
        let (storage, below, inner): (Arc<dyn Storage>, _, _) = (file.clone(), origin.clone(), exec.clone());
        let image = exec.run(async move {
            kind.create(&storage, size).await;
            kind.open(storage, raw_over(below).await, &inner, filling(true)).await
        });
        Self { exec, file, origin, image }
    }

    pub fn run<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Image>) -> F,
    ) -> T {
        self.exec.run(work(Arc::clone(&self.image)))
    }
}
