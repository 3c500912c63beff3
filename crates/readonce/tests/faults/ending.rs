//! SIGTERM while the origin is slow: guest bytes that wait for it are saved if it comes back in time.

use std::sync::Arc;

use readonce_testkit::{Fault, When};
use tokio::sync::Semaphore;

use crate::{
    common::{KEEPERS, folder, readonce},
    server::{Server, image_over, is_clean, origin_and_guest},
};

/// Of the NBD protocol: the server ends.
const ESHUTDOWN: u32 = 108;

/// A part of a subcluster, each in another cluster.
fn place(index: u64) -> u64 {
    index * (300 << 10) + 512
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_answers_at_the_last_moment_saves_the_guests_bytes() {
    for keeper in KEEPERS {
        let folder = folder();
        let at = folder.path();
        let (origin, _guest) = origin_and_guest(4 << 20, 1).await;
        image_over(&origin.url(), at, keeper);
        let server = Server::start(at, &["--shutdown-timeout", "1m"]);
        let gate = Arc::new(Semaphore::new(0));
        origin.fault(When::always(), Fault::HoldHead(Arc::clone(&gate)));
        let client = server.client().await;
        for index in 0..8_u64 {
            client.write(place(index), &[9; 1024], 0).await.expect("writes wait for nobody");
        }
        let flush = tokio::spawn({
            let client = client.clone();
            async move { client.flush().await }
        });
        server.until(|_| origin.in_flight() > 0).await;
        server.signal(libc::SIGTERM);
        server.until(|server| server.log().contains("ending")).await;
        // Its listener is closed: the end is under way, and what is left of it needs the origin.
        server.until(|server| std::os::unix::net::UnixStream::connect(server.socket()).is_err()).await;
        origin.heal();
        gate.add_permits(Semaphore::MAX_PERMITS >> 1);
        assert_eq!(server.ended().await, Some(0));
        // The flush was answered truly, or not at all; or it came after the signal, and was not taken.
        let flushed = flush.await.expect("it ran");
        let is_true = match &flushed {
            Ok(()) => true,
            Err(error) => matches!(error.errno(), None | Some(ESHUTDOWN)),
        };
        assert!(is_true, "{flushed:?}");
        is_clean(at, keeper.0);
        origin.vanish().await;
        let mut arguments = vec!["io".to_owned(), "--on-change=offline".to_owned()];
        for index in 0..8 {
            arguments.extend(["-c".to_owned(), format!("read -P 9 {} 1k", place(index))]);
        }
        arguments.push("c.img".to_owned());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        readonce(at, &arguments).ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_went_and_came_back_at_the_last_moment_saves_them_too() {
    for keeper in KEEPERS {
        let folder = folder();
        let at = folder.path();
        let (origin, _guest) = origin_and_guest(4 << 20, 1).await;
        image_over(&origin.url(), at, keeper);
        let server = Server::start(at, &["--shutdown-timeout", "1m"]);
        let client = server.client().await;
        origin.vanish().await;
        client.write(place(1), &[9; 1024], 0).await.expect("writes wait for nobody");
        server.signal(libc::SIGTERM);
        server.until(|server| std::os::unix::net::UnixStream::connect(server.socket()).is_err()).await;
        origin.come_back().await.expect("the port");
        assert_eq!(server.ended().await, Some(0));
        is_clean(at, keeper.0);
        readonce(at, &["io", "--on-change=offline", "-c", &format!("read -P 9 {} 1k", place(1)), "c.img"])
            .ok();
    }
}
