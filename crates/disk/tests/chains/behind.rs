//! The origin is asked behind an image that knows its version: what is local waits for no answer. Every origin here holds its answers
//! back until the test lets them go.

use std::{
    io,
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use parking_lot::Mutex;
use readonce_disk::chain::{ChainOptions, Lockable, Opener, Places};
use readonce_origin::{FetchError, Locator, Origin, OriginOptions};
use readonce_storage::{BoxFuture, OpenMode, Rt};
use readonce_testkit::{Content, Fault, FaultyOrigin, When};
use tokio::sync::Semaphore;

use super::{
    place::{
        CLUSTER, LONG, Opened, Place, Spec, above, asked, clusters, content, filled_from, options, serve,
    },
    qemu,
};

const SIZE: u64 = 8 * CLUSTER;

/// Nothing here takes so long, unless it waits for what never comes.
const HANGS: Duration = Duration::from_secs(20);

/// A probe that is never given up.
fn patient() -> ChainOptions {
    let mut options = options();
    options.origin.probe_for = LONG;
    options
}

/// An image of `backing`, with its first two clusters local, whose origin answers no more until the gate opens.
async fn silent(place: &Place, content: &Content, format: &str) -> (FaultyOrigin, Arc<Semaphore>) {
    let origin = serve(content).await;
    place.create("top.qed", filled_from(&origin.url(), format, SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.read(clusters(0..2)).await;
    opened.close().await;
    origin.clear_log();
    let gate = Arc::new(Semaphore::new(0));
    origin.fault(When::always(), Fault::HoldHead(gate.clone()));
    (origin, gate)
}

async fn open(place: &Place) -> Opened {
    let opened = tokio::time::timeout(HANGS, place.open("top.qed", patient())).await;
    opened.expect("it opens without an answer")
}

/// An image all of whose bytes were local took ten seconds to open while its server was down.
#[tokio::test]
async fn what_is_local_is_used_before_the_origin_ever_answers() {
    let base = content(1, SIZE);
    let remote = Place::new();
    remote.create("far.qed", Spec { backing: None, ..above("", "", SIZE) }).await;
    let written = super::place::open(remote.path("far.qed").to_str().expect("text"), options()).await;
    let written = written.expect("it opens");
    written.write(0, base.bytes(0..SIZE)).await;
    written.close().await;
    for (format, served) in [("raw", base.clone()), ("qed", Content::Given(remote.bytes_of("far.qed")))] {
        let place = Place::new();
        let (origin, gate) = silent(&place, &served, format).await;
        let opened = open(&place).await;
        assert!(opened.read(clusters(0..2)).await == base.bytes(clusters(0..2)));
        opened.write(clusters(5..6).start, vec![5; CLUSTER as usize]).await;
        opened.flush().await;
        assert!(opened.read(clusters(5..6)).await[..] == [5; CLUSTER as usize]);
        assert_eq!(opened.warnings(), Vec::<String>::new());
        assert!(origin.log().iter().all(|entry| entry.body_bytes == 0), "it answered");
        // What is not there waits, and has it once somebody answers.
        let (read, ()) = tokio::join!(opened.read(clusters(2..4)), async {
            while origin.in_flight() == 0 {
                tokio::task::yield_now().await;
            }
            gate.add_permits(1000);
        });
        assert!(read == base.bytes(clusters(2..4)), "{format}");
        opened.close().await;
        place.check("top.qed", "DDDD.D..").await;
    }
}

/// Bytes of two versions would meet in one image, were a read let through before the answer.
#[tokio::test]
async fn no_byte_counts_before_the_version_was_compared() {
    let place = Place::new();
    let old = content(1, SIZE);
    let (origin, gate) = silent(&place, &old, "raw").await;
    origin.replace(content(2, SIZE), Some("\"v2\""));
    let opened = open(&place).await;
    assert!(opened.read(clusters(0..2)).await == old.bytes(clusters(0..2)));
    let release = async {
        while origin.in_flight() == 0 {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1000);
    };
    let (read, ()) = tokio::join!(opened.try_read(clusters(1..3)), release);
    let words = "the file changed since this image was made: ";
    let error = read.expect_err("it is another version").to_string();
    assert!(error.contains(words), "{error}");
    let warnings = opened.warned().await;
    assert!(matches!(&warnings[..], [one] if one.contains(words)), "{warnings:?}");
    assert_eq!(asked(&origin), [], "no more than the probe");
    opened.close().await;
    place.check("top.qed", "DD......").await;
}

/// An end of `serve` would have waited for a dead server, or left the image marked and locked.
#[tokio::test]
async fn a_close_ends_the_probe() {
    let place = Place::new();
    let (origin, _gate) = silent(&place, &content(1, SIZE), "raw").await;
    let opened = open(&place).await;
    while origin.in_flight() == 0 {
        tokio::task::yield_now().await;
    }
    opened.write(clusters(5..6).start, vec![5; CLUSTER as usize]).await;
    tokio::time::timeout(HANGS, opened.close()).await.expect("it waits for nobody");
    while origin.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    assert!(!place.describe("top.qed").await.dirty);
    place.check("top.qed", "DD...D..").await;
    // Its lock is gone too; and one that is let go without a close asks no further either.
    drop(open(&place).await);
    open(&place).await.close().await;
    while origin.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
}

/// This machine, but for an origin that never answers, and a data file that is seen to be missing once the origin is being asked.
struct Missing {
    asks: mpsc::Sender<()>,
    asked: Mutex<mpsc::Receiver<()>>,
    /// Asking goes no further until the other end is gone.
    gate: Mutex<mpsc::Receiver<()>>,
}

impl Opener for Missing {
    fn file(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn Lockable>> {
        if path.ends_with("data.raw") {
            self.asked.lock().recv_timeout(HANGS).expect("the origin is asked behind the image");
            return Err(io::ErrorKind::NotFound.into());
        }
        Places::default().file(path, mode)
    }

    fn origin<'a>(
        &'a self,
        _: &'a Locator,
        _: &'a OriginOptions,
        _: &'a Rt,
    ) -> BoxFuture<'a, Result<Arc<dyn Origin>, FetchError>> {
        self.asks.send(()).expect("both ends are here");
        let _ = self.gate.lock().recv();
        Box::pin(std::future::pending())
    }
}

/// Whoever put the data file back and tried again in the same process was told for 20 s and more that the image is in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_that_fails_gives_its_lock_back_while_the_origin_is_asked() {
    let place = Place::new();
    let origin = serve(&content(1, SIZE)).await;
    let (url, size) = (origin.url(), SIZE.to_string());
    let data = format!("data_file={}", place.path("data.raw").display());
    let create =
        ["create", "-q", "-u", "-f", "qcow2", "-b", &url, "-F", "raw", "-o", &data, "top.qcow2", &size];
    qemu::img(place.folder(), &create);
    place.open("top.qcow2", options()).await.close().await;

    let (asks, asked) = mpsc::channel();
    let (release, gate) = mpsc::channel::<()>();
    let missing = Arc::new(Missing { asks, asked: Mutex::new(asked), gate: Mutex::new(gate) });
    let places = Places::new(missing.clone());
    let error = place.try_open("top.qcow2", ChainOptions { places, ..patient() }).await;
    let error = error.map(|_| ()).expect_err("its data file is missing").to_string();
    assert!(error.contains("data.raw"), "{error}");
    // The origin is still being asked: another user does not wait for that.
    let again = place.try_open("top.qcow2", options()).await;
    drop(release);
    again.unwrap_or_else(|error| panic!("{error}")).close().await;
    // And nothing stays of it.
    let gone = async {
        while Arc::strong_count(&missing) > 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(HANGS, gone).await.expect("it asks no further");
}
