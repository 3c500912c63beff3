//! `kill -9` and power cuts under load: what was flushed is there, nothing is corrupt, and it goes on.

use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    common::{KEEPERS, folder},
    disk::FaultyDisk,
    rounds,
    server::{Load, LoadSpec, Server, image_over, is_clean, is_not_corrupt, origin_and_guest},
};

const BYTES: u64 = 8 << 20;
/// Crashes of one image; a new one has more to allocate.
const CRASHES: u64 = 4;

/// What ends the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crash {
    /// The process alone: what it wrote is in the system's cache.
    Kill,
    /// The process and its disk: what it did not sync may be gone, in any part.
    PowerCut,
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_lose_nothing_that_was_flushed() {
    for round in 0..rounds(1, 30) {
        for keeper in KEEPERS {
            one_image(keeper, Crash::Kill, round).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn power_cuts_lose_nothing_that_was_flushed() {
    for round in 0..rounds(2, 60) {
        for keeper in KEEPERS {
            one_image(keeper, Crash::PowerCut, round).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn power_cuts_with_lazy_refcounts_lose_nothing_that_was_flushed() {
    for round in 0..rounds(1, 30) {
        one_image(("qcow2", "lazy_refcounts=on,"), Crash::PowerCut, round).await;
    }
}

async fn one_image(keeper: (&str, &str), crash: Crash, seed: u64) {
    eprintln!("{keeper:?}, {crash:?}, seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let folder = folder();
    let at = folder.path();
    let (origin, guest) = origin_and_guest(BYTES, seed).await;
    image_over(&origin.url(), at, keeper);
    let disk = match crash {
        Crash::Kill => None,
        Crash::PowerCut => match FaultyDisk::mount(&at.join("c.img")) {
            Some(disk) => Some(disk),
            None => return,
        },
    };
    for _ in 0..CRASHES {
        let server = Server::start(at, &[]);
        let spec = LoadSpec {
            seed: random.random(),
            requests_max: random.random_range(1..150),
            writes_percent: random.random_range(10..90),
        };
        if let Some(disk) = &disk {
            disk.lose_power_after_syncs(random.random_range(1..12));
        }
        let mut load = Load::start(&guest, &server, spec).await;
        let first = load.first().await;
        server.kill().await;
        let tally = first.plus(load.all().await);
        assert_eq!(tally.reads_failed, 0, "{tally:?}");
        // Without power writes fail; a kill alone is seen only as the end of the connection.
        assert!(disk.is_some() || tally.writes_failed + tally.flushes_failed == 0, "{tally:?}");
        if let Some(disk) = &disk {
            disk.cut(random.random());
        }
        // Where refcounts are lazy they are wrong until it is opened for writing.
        if !keeper.1.contains("lazy") {
            is_not_corrupt(at);
        }
        // Without copy-on-read, so that there is still something to fill.
        let server = Server::start(at, &["-r", "--copy-on-read=off"]);
        guest.compare_all(&server.client().await).await.expect("what was flushed is there");
        assert_eq!(server.end().await, Some(0));
    }
    let server = Server::start(at, &[]);
    let spec = LoadSpec { seed, requests_max: 50, writes_percent: 50 };
    let tally = crate::server::load(&guest, &server, spec).await;
    assert!(tally.writes > 0 && !tally.is_cut, "{tally:?}");
    guest.compare_all(&server.client().await).await.expect("all of it");
    assert_eq!(server.end().await, Some(0));
    is_clean(at, keeper.0);
    let server = Server::start(at, &["-r"]);
    guest.compare_all(&server.client().await).await.expect("all of it");
    assert_eq!(server.end().await, Some(0));
}
