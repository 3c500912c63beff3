//! A disk that fails under load: what latches, what goes on, and what is there when the image is opened again.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use readonce_testkit::{FaultyOrigin, guest::Guest};

use crate::{
    common::{KEEPERS, folder},
    disk::{Faults, FaultyDisk},
    server::{Load, LoadSpec, Server, image_over, is_clean, is_not_corrupt, load, origin_and_guest},
};

const BYTES: u64 = 8 << 20;
const MIXED: LoadSpec = LoadSpec { seed: 1, requests_max: 60, writes_percent: 50 };

/// An image on a disk that can fail, its origin, and who uses it.
struct Scene {
    // The disk is unmounted before its folder goes.
    disk: FaultyDisk,
    folder: tempfile::TempDir,
    guest: Arc<Guest>,
    _origin: FaultyOrigin,
}

impl Scene {
    async fn new(keeper: (&str, &str)) -> Option<Self> {
        let folder = folder();
        let (origin, guest) = origin_and_guest(BYTES, 5).await;
        image_over(&origin.url(), folder.path(), keeper);
        let disk = FaultyDisk::mount(&folder.path().join("c.img"))?;
        Some(Self { disk, folder, guest, _origin: origin })
    }

    fn serve(&self) -> Server {
        Server::start(self.folder.path(), &[])
    }

    /// Nothing fails, then something does under load until a request has seen it.
    async fn load_until_it_fails(&self, server: &Server, fault: fn(&Faults) -> &AtomicBool) {
        let before = load(&self.guest, server, MIXED).await;
        assert_eq!(
            (before.writes_failed, before.flushes_failed, before.reads_failed),
            (0, 0, 0),
            "{before:?}"
        );
        assert!(before.writes > 0 && before.flushes > 0, "{before:?}");
        let busy = Load::start(&self.guest, server, LoadSpec { seed: 2, ..MIXED }).await;
        fault(self.disk.faults()).store(true, Ordering::Relaxed);
        let during = busy.all().await;
        assert!(!during.is_cut, "{during:?}: {}", server.log());
        // A flush after them all, in case none of theirs came after the fault.
        if during.writes_failed + during.flushes_failed == 0 {
            server.client().await.flush().await.expect_err("the disk fails");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_latches_writes_and_reads_go_on() {
    for keeper in KEEPERS {
        latches(keeper, |faults| &faults.syncs).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_latches_writes_and_reads_go_on() {
    for keeper in KEEPERS {
        latches(keeper, |faults| &faults.writes).await;
    }
}

async fn latches(keeper: (&str, &str), fault: fn(&Faults) -> &AtomicBool) {
    let Some(scene) = Scene::new(keeper).await else { return };
    let server = scene.serve();
    scene.load_until_it_fails(&server, fault).await;

    // The disk works again, and nobody can know what it lost.
    fault(scene.disk.faults()).store(false, Ordering::Relaxed);
    let syncs = scene.disk.syncs();
    let latched = load(&scene.guest, &server, LoadSpec { seed: 3, ..MIXED }).await;
    assert_eq!((latched.writes, latched.flushes), (0, 0), "{latched:?}");
    assert!(latched.writes_failed > 0 && latched.flushes_failed > 0, "{latched:?}");
    assert_eq!(latched.writes_no_space, 0, "{latched:?}");
    assert!(latched.reads > 0 && latched.reads_failed == 0, "{latched:?}");
    assert_eq!(scene.disk.syncs(), syncs, "a sync that failed is not tried again");
    assert_eq!(server.end().await, Some(1));

    scene.disk.cut(7);
    let at = scene.folder.path();
    is_not_corrupt(at);
    let server = scene.serve();
    scene.guest.compare_all(&server.client().await).await.expect("what was flushed is there");
    let after = load(&scene.guest, &server, LoadSpec { seed: 4, ..MIXED }).await;
    assert_eq!((after.writes_failed, after.flushes_failed, after.reads_failed), (0, 0, 0), "{after:?}");
    assert_eq!(server.end().await, Some(0));
    is_clean(at, keeper.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_reads_latch_nothing() {
    for keeper in KEEPERS {
        let Some(scene) = Scene::new(keeper).await else { return };
        let server = scene.serve();
        load(&scene.guest, &server, MIXED).await;
        assert_eq!(server.end().await, Some(0));
        // Opened again, Linux has nothing of it in its cache.
        let server = scene.serve();
        scene.disk.faults().reads.store(true, Ordering::Relaxed);
        let during = load(&scene.guest, &server, LoadSpec { seed: 2, ..MIXED }).await;
        assert!(during.reads_failed > 0 && !during.is_cut, "{during:?}");
        scene.disk.faults().reads.store(false, Ordering::Relaxed);
        let after = load(&scene.guest, &server, LoadSpec { seed: 3, ..MIXED }).await;
        assert_eq!((after.writes_failed, after.flushes_failed, after.reads_failed), (0, 0, 0), "{after:?}");
        assert_eq!(server.end().await, Some(0));
        is_clean(scene.folder.path(), keeper.0);
        let server = scene.serve();
        scene.guest.compare_all(&server.client().await).await.expect("all of it");
    }
}
