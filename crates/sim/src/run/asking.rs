//! Asking: what a format may refuse: headers that something else broke, changes and options drawn without sense.
//!
//! - Nothing panics or hangs. Looking writes nothing.
//! - What is refused changes nothing of what the image says; what is done leaves a sound image.
//! - All of it is done to copies: the run goes on as if nothing had been asked.
//!
//! Not here: repairs (`mending`).

use std::sync::Arc;

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use readonce_disk::chain::driver_of;
use readonce_format::{
    Driver,
    driver::{BackingRef, CreateSpec, HeaderChange, Pin},
};
use readonce_storage::{ReadAt, SimFile, Storage};

use super::Run;
use readonce_testkit::exec::Exec;

/// Broken headers that are looked at.
const HEADERS: u32 = 6;
/// Bytes of the longest image that is asked for with room for all of it.
const SIZE_MAX: u64 = 4 << 20;

impl Run {
    /// Asks for what may be refused.
    pub(super) fn ask(&mut self, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let exec = Exec::new(rng.random());
        let (driver, top) = (self.world.shape.top.driver(), self.disks.top.contents());
        exec.run(async move {
            for _ in 0..HEADERS {
                look_at_broken(driver, top.clone(), &mut rng).await;
            }
            change(driver, &top, &mut rng).await;
            create(driver, &mut rng).await;
        });
        exec.power_off();
    }
}

/// Breaks the header, and looks.
async fn look_at_broken(driver: &'static dyn Driver, mut bytes: Vec<u8>, rng: &mut SmallRng) {
    let header = bytes.len().min(512);
    for _ in 0..rng.random_range(1..4) {
        let at =
            if rng.random() { rng.random_range(0..header.min(128)) } else { rng.random_range(0..header) };
        bytes[at] = match rng.random_range(0..4) {
            0 => rng.random(),
            1 => bytes[at].wrapping_add(1),
            _ => bytes[at] ^ 1 << rng.random_range(0..8),
        };
    }
    let file = Arc::new(SimFile::from_bytes(&bytes));
    let readable: Arc<dyn ReadAt> = file.clone();
    let _ = driver_of(&*readable, None).await;
    let described = driver.describe(&readable).await;
    let opened = driver.open(readable.clone()).await;
    if let (Ok(described), Ok(mapper)) = (&described, &opened) {
        assert_eq!(mapper.geometry().size, described.virtual_size);
        let size = described.virtual_size;
        if size > 0 {
            let _ = mapper.lookup(0, size).await;
            let _ = mapper.lookup(size - 1, 1).await;
        }
    }
    let _ = driver.check(&readable).await;
    assert_eq!(file.unsynced_count(), 0, "looking writes nothing");
}

fn drawn_backing(rng: &mut SmallRng) -> Option<BackingRef> {
    let len = *[1, 20, 300, 1023, 1024, 5000].choose(rng).expect("some");
    let format = [None, Some("raw"), Some("qcow2"), Some("x")].choose(rng).expect("some").map(Into::into);
    rng.random::<bool>().then(|| BackingRef { name: "n".repeat(len), format })
}

fn drawn_pin(rng: &mut SmallRng) -> Pin {
    let len = *[0, 8, 1024, 1025].choose(rng).expect("some");
    Pin { validator: vec![b'v'; len], len: rng.random() }
}

/// Changes the header of a copy.
async fn change(driver: &'static dyn Driver, bytes: &[u8], rng: &mut SmallRng) {
    let file = Arc::new(SimFile::from_bytes(bytes));
    let (storage, readable): (Arc<dyn Storage>, Arc<dyn ReadAt>) = (file.clone(), file.clone());
    let before = driver.describe(&readable).await.expect("it is an image");
    let size = before.virtual_size;
    let wanted = match rng.random_range(0..4) {
        0 => HeaderChange::CopyOnRead(rng.random()),
        1 => HeaderChange::Backing(drawn_backing(rng), rng.random::<bool>().then(|| drawn_pin(rng))),
        2 => HeaderChange::Pin(drawn_pin(rng)),
        _ => {
            let sizes = [0, 1, size.saturating_sub(512), size + 1, size + 512, 1 << 40, 1 << 62, u64::MAX];
            HeaderChange::Size(*sizes.choose(rng).expect("some"))
        }
    };
    let done = driver.change(&storage, &wanted).await;
    let after = driver.describe(&readable).await.unwrap_or_else(|error| panic!("after {wanted:?}: {error}"));
    match done {
        Err(_) => {
            let said = |description: &readonce_format::driver::Description| {
                (
                    description.virtual_size,
                    description.backing.clone(),
                    description.pin.clone(),
                    description.copy_on_read,
                )
            };
            assert_eq!(said(&after), said(&before), "{wanted:?} was refused");
        }
        Ok(()) if driver.name() == "raw" || before.dirty => {}
        Ok(()) => {
            let (was, is) = (driver.check(&readable_of(bytes)).await, driver.check(&readable).await);
            let (was, is) = (was.expect("it can be checked"), is.expect("it can be checked"));
            assert!(
                is.corruptions <= was.corruptions && is.check_errors == 0,
                "{wanted:?}: {was:?}, then {is:?}"
            );
        }
    }
}

fn readable_of(bytes: &[u8]) -> Arc<dyn ReadAt> {
    Arc::new(SimFile::from_bytes(bytes))
}

/// Makes an image with any options.
async fn create(driver: &'static dyn Driver, rng: &mut SmallRng) {
    const VALUES: &[&str] = &[
        "on", "off", "1", "2", "3", "16", "64", "128", "512", "4k", "16384", "64k", "2M", "4M", "0.10",
        "1.1", "v2", "v3", "zlib", "zstd", "metadata", "falloc", "full", "x", "",
    ];
    let sizes = [0, 1, 512, 1 << 20, SIZE_MAX];
    let mut spec = CreateSpec {
        size: *sizes.choose(rng).expect("some"),
        backing: drawn_backing(rng),
        ..CreateSpec::default()
    };
    spec.pin = (spec.backing.is_some() && rng.random()).then(|| drawn_pin(rng));
    spec.data_file = (driver.name() == "qcow2" && rng.random_range(0..4) == 0).then(|| "data".to_owned());
    for _ in 0..rng.random_range(0..4) {
        let name = driver.create_options().choose(rng).map_or("x", |option| option.name);
        let value = rng.random_range(0..8) > 0;
        spec.options.push((name.to_owned(), value.then(|| (*VALUES.choose(rng).expect("some")).to_owned())));
    }
    if rng.random_range(0..4) == 0 && !spec.options.iter().any(|(name, _)| name == "preallocation") {
        spec.size = *[1 << 40, 1 << 56, i64::MAX as u64, u64::MAX].choose(rng).expect("some");
    }
    let (file, data) = (Arc::new(SimFile::new()), Arc::new(SimFile::new()));
    let (storage, data): (Arc<dyn Storage>, Arc<dyn Storage>) = (file.clone(), data);
    let made = driver.create(&storage, Some(&data), &spec).await;
    if made.is_err() {
        assert_eq!(file.len(), 0, "{spec:?} was refused");
        return;
    }
    let readable: Arc<dyn ReadAt> = file.clone();
    assert_eq!(file.unsynced_count(), 0, "{spec:?}: it ends durable");
    let described = driver.describe(&readable).await.unwrap_or_else(|error| panic!("{spec:?}: {error}"));
    assert_eq!(described.virtual_size, spec.size.next_multiple_of(512), "{spec:?}");
    // QED keeps no format but raw.
    let name = |backing: &Option<BackingRef>| backing.as_ref().map(|backing| backing.name.clone());
    assert_eq!(name(&described.backing), name(&spec.backing), "{spec:?}");
    assert_eq!(described.data_file.map(|data| data.name), spec.data_file, "{spec:?}");
    if spec.size <= SIZE_MAX && driver.name() != "raw" {
        let report = driver.check(&readable).await.unwrap_or_else(|error| panic!("{spec:?}: {error}"));
        assert_eq!(
            (report.corruptions, report.leaks, report.check_errors),
            (0, 0, 0),
            "{spec:?}: {report:?}"
        );
    }
}
