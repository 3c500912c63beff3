//! nginx stopped, started again, and its file replaced by another version, all under reads.

use std::{sync::Arc, time::Duration};

use readonce_testkit::{Content, guest::Guest};

use crate::{
    common::{KEEPERS, folder},
    rounds,
    server::{Load, LoadSpec, Server, image_over, is_clean},
    webserver::Nginx,
};

const BYTES: u64 = 8 << 20;

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread")]
async fn versions_never_meet_and_the_old_file_heals() {
    for keeper in KEEPERS {
        let (web, folder) = (folder(), folder());
        let at = folder.path();
        let mut nginx = Nginx::start(web.path());
        let old = Content::seeded(1, BYTES);
        nginx.write("old", &old, 2 * DAY);
        nginx.write("same-length", &Content::seeded(2, BYTES), DAY);
        nginx.write("longer", &Content::seeded(3, BYTES + 4096), DAY);
        nginx.write("shorter", &Content::seeded(4, BYTES / 2), DAY);
        nginx.serve("old");
        image_over(&format!("http://127.0.0.1:{}/image", nginx.port), at, keeper);
        let guest = Arc::new(Guest::new(old));
        let server = Server::start(at, &["--retry-for", "100ms"]);
        // The model knows the old version alone: a byte of another fails the load.
        let mut refused = 0;
        for round in 0..rounds(1, 10) {
            for other in ["same-length", "longer", "shorter", "absent", "stopped"] {
                let spec = LoadSpec { seed: round, requests_max: 10, writes_percent: 10 };
                let busy = Load::start(&guest, &server, spec).await;
                match other {
                    "absent" => std::fs::remove_file(web.path().join("image")).expect("there"),
                    "stopped" => nginx.stop(),
                    other => nginx.serve(other),
                }
                let tally = busy.all().await;
                assert!(tally.writes_failed == 0 && !tally.is_cut, "{other}: {tally:?}");
                let client = server.client().await;
                refused += tally.reads_failed + u64::from(client.read(BYTES - 512, 512).await.is_err());
                match other {
                    "stopped" => assert!(nginx.run(), "the port is free"),
                    _ => nginx.serve("old"),
                }
            }
        }
        assert!(refused > 0, "something was missing from the image while the file was another");
        // No restart, no flag: the old file is there again.
        guest.compare_all(&server.client().await).await.expect("healed");
        server.client().await.flush().await.expect("healed");
        assert_eq!(server.end().await, Some(0));
        is_clean(at, keeper.0);
        nginx.stop();
        let server = Server::start(at, &["-r", "--on-change=offline"]);
        guest.compare_all(&server.client().await).await.expect("all of it is local");
        assert_eq!(server.end().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_reads_is_not_seen() {
    let (web, folder) = (folder(), folder());
    let at = folder.path();
    let mut nginx = Nginx::start(web.path());
    let content = Content::seeded(1, BYTES);
    nginx.write("old", &content, DAY);
    nginx.serve("old");
    image_over(&format!("http://127.0.0.1:{}/image", nginx.port), at, KEEPERS[1]);
    let guest = Arc::new(Guest::new(content));
    let server = Server::start(at, &[]);
    let restarting = tokio::task::spawn_blocking(move || {
        for _ in 0..rounds(5, 100) {
            nginx.stop();
            assert!(nginx.run(), "the port is free");
        }
        nginx
    });
    let spec = LoadSpec { seed: 3, requests_max: 40, writes_percent: 30 };
    let tally = crate::server::load(&guest, &server, spec).await;
    let _nginx = restarting.await.expect("it ran");
    assert_eq!(tally.reads_failed + tally.writes_failed + tally.flushes_failed, 0, "{tally:?}");
    guest.compare_all(&server.client().await).await.expect("all of it");
    assert_eq!(server.end().await, Some(0));
    is_clean(at, "qcow2");
}
