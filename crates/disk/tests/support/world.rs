//! A QED image on a simulated disk, over a simulated origin.

use std::sync::Arc;

use readonce_disk::{Base, BaseFiles, Image, ImageOptions, Source};
use readonce_format::{
    Driver,
    driver::{BackingRef, CreateSpec, driver},
};
use readonce_storage::{ReadAt, SimFile, Storage};

use super::{exec::Exec, origin::SimOrigin};

pub fn qed() -> &'static dyn Driver {
    driver("qed").expect("qed is a known format")
}

/// Makes an image with small tables over a raw backing.
pub async fn create(file: &Arc<dyn Storage>, size: u64, cluster_size: u64) {
    let spec = CreateSpec {
        size,
        backing: Some(BackingRef { name: "origin".into(), format: Some("raw".into()) }),
        options: vec![
            ("cluster_size".into(), Some(cluster_size.to_string())),
            ("table_size".into(), Some("1".into())),
        ],
        pin: None,
        data_file: None,
    };
    qed().create(file, None, &spec).await.expect("the image is made");
}

/// The origin as a source.
pub async fn raw_over(origin: Arc<SimOrigin>) -> Arc<dyn Source> {
    let raw = driver("raw").expect("raw is a known format");
    let bytes: Arc<dyn ReadAt> = origin.clone();
    let files = BaseFiles { own: bytes.clone(), data: origin.clone() };
    Arc::new(Base::new(raw.open(bytes).await.expect("raw opens"), files, None, &origin.rt))
}

/// The image above `backing`, open for writing.
pub async fn open(
    file: Arc<dyn Storage>,
    backing: Arc<dyn Source>,
    exec: &Arc<Exec>,
    copy_on_read: bool,
) -> Arc<Image> {
    let mapper = qed().open_writable(Arc::clone(&file), None, exec.rt()).await.expect("the image opens");
    let image = Image::new(
        mapper,
        file,
        Some(backing),
        exec.rt(),
        ImageOptions { copy_on_read, ..ImageOptions::default() },
    );
    image.start_reclaim();
    image
}

/// The format's own check finds nothing wrong; no leaks either where `leaks` is none.
pub async fn check(file: Arc<dyn Storage>, leaks: Leaks, when: &str) {
    let readable: Arc<dyn ReadAt> = file;
    let report = qed().check(&readable).await.expect("the check runs");
    assert_eq!(report.corruptions, 0, "{when}: {report:?}");
    assert_eq!(report.check_errors, 0, "{when}: {report:?}");
    if leaks == Leaks::None {
        assert_eq!(report.leaks, 0, "{when}: {report:?}");
    }
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

impl World {
    /// An empty image with copy-on-read over an origin of the same size that answers at once.
    pub fn new(seed: u64, size: u64, cluster_size: u64) -> Self {
        let exec = Exec::new(seed);
        let file = Arc::new(SimFile::new());
        let origin = SimOrigin::new(size, exec.rt(), 0);
        let (storage, below, inner): (Arc<dyn Storage>, _, _) = (file.clone(), origin.clone(), exec.clone());
        let image = exec.run(async move {
            create(&storage, size, cluster_size).await;
            open(storage, raw_over(below).await, &inner, true).await
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
