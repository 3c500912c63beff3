//! A running `readonce serve` of `c.img`, and a load on it.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use readonce_testkit::{
    FaultyOrigin,
    guest::{Guest, Part, Tally},
    nbd_client::{ConnectOptions, NbdClient},
};
use tokio::task::JoinSet;

use crate::common::{command, qemu_img, readonce};

/// Workers of a load, each with a connection.
pub const WORKERS: u64 = 4;

/// A process that serves. Dropped, it is killed.
pub struct Server {
    child: Child,
    folder: PathBuf,
}

impl Server {
    /// Serves `c.img` of `folder` at the socket `s` there; what it says goes to the file `log`.
    #[track_caller]
    pub fn start(folder: &Path, arguments: &[&str]) -> Self {
        let log = File::options().append(true).create(true).open(folder.join("log")).expect("a file");
        // One that was killed leaves its socket.
        let _ = std::fs::remove_file(folder.join("s"));
        let mut child = command(folder)
            .args(["serve", "-k", "s"])
            .args(arguments)
            .arg("c.img")
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("it starts");
        let mut uri = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut uri).expect("text");
        let server = Self { child, folder: folder.to_owned() };
        assert!(!uri.is_empty(), "it did not start: {}", server.log());
        server
    }

    /// A client of it.
    pub async fn client(&self) -> NbdClient {
        NbdClient::connect_unix(self.socket(), &ConnectOptions::default()).await.expect("it accepts clients")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("s")
    }

    /// What it and those before it have said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).expect("a file")
    }

    pub fn signal(&self, signal: i32) {
        let id = i32::try_from(self.child.id()).expect("a process number");
        // SAFETY: the child was not waited for, so the number is its.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Waits for its end; the exit code, if it had one.
    pub async fn ended(mut self) -> Option<i32> {
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Ends it as a person does.
    #[track_caller]
    pub fn end(self) -> impl Future<Output = Option<i32>> {
        self.signal(libc::SIGTERM);
        self.ended()
    }

    pub async fn kill(self) {
        self.signal(libc::SIGKILL);
        let folder = self.folder.clone();
        assert_eq!(self.ended().await, None);
        // The kernel ends the rings of a process, and with them its writes and locks, a moment after the process.
        while readonce(&folder, &["info", "c.img"]).code != Some(0) {}
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs").count()
    }

    /// Bytes of memory.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux tells it");
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number");
        kib * 1024
    }

    /// Waits until `is_so`; a test that waits for ever is ended by whoever runs it.
    pub async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        while !is_so(self) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `c.img` in `folder`, above `url`.
#[track_caller]
pub fn image_over(url: &str, folder: &Path, (format, options): (&str, &str)) {
    let options = format!("{options}copy_on_read");
    let _ = std::fs::remove_file(folder.join("c.img"));
    readonce(folder, &["create", "-q", "-f", format, "-o", &options, "-b", url, "-F", "raw", "c.img"]).ok();
}

/// Our check and QEMU's find nothing.
#[track_caller]
pub fn is_clean(folder: &Path, format: &str) {
    readonce(folder, &["check", "c.img"]).ok();
    let name = format!(
        r#"json:{{"driver":"{format}","backing":null,"file":{{"driver":"file","filename":"c.img"}}}}"#
    );
    let ran = qemu_img(folder, &["check", &name]).ok();
    assert!(ran.out.starts_with("No errors were found"), "{ran:?}");
}

/// After a crash there may be leaks, and nothing else.
#[track_caller]
pub fn is_not_corrupt(folder: &Path) {
    let ran = readonce(folder, &["check", "-U", "c.img"]);
    assert!(matches!(ran.code, Some(0 | 3)), "{ran:?}");
}

/// An origin of its own bytes, and a guest that knows them.
pub async fn origin_and_guest(bytes: u64, seed: u64) -> (FaultyOrigin, Arc<Guest>) {
    let content = readonce_testkit::Content::seeded(seed, bytes);
    let origin =
        FaultyOrigin::start(readonce_testkit::OriginSpec::new(content.clone())).await.expect("a port");
    (origin, Arc::new(Guest::new(content)))
}

/// Workers in the background.
pub struct Load {
    tasks: JoinSet<Result<Tally, String>>,
}

/// How a load is.
#[derive(Debug, Clone, Copy)]
pub struct LoadSpec {
    pub seed: u64,
    /// Requests of each worker, at most.
    pub requests_max: u64,
    pub writes_percent: u32,
}

impl Load {
    pub async fn start(guest: &Arc<Guest>, server: &Server, spec: LoadSpec) -> Self {
        let mut load = Self { tasks: JoinSet::new() };
        for worker in 0..WORKERS {
            let (guest, client) = (Arc::clone(guest), server.client().await);
            let LoadSpec { seed, requests_max, writes_percent } = spec;
            let part = Part { worker, workers: WORKERS, seed, requests_max, writes_percent };
            load.tasks.spawn(async move { guest.work(&client, part, &AtomicBool::new(false)).await });
        }
        load
    }

    /// Waits until one worker has ended.
    pub async fn first(&mut self) -> Tally {
        let ended = self.tasks.join_next().await.expect("there are workers");
        ended.expect("it did not panic").expect("every byte is right")
    }

    /// Waits until all have ended by themselves.
    pub async fn all(mut self) -> Tally {
        let mut tally = Tally::default();
        while !self.tasks.is_empty() {
            tally = tally.plus(self.first().await);
        }
        tally
    }
}

/// A load to its end.
pub async fn load(guest: &Arc<Guest>, server: &Server, spec: LoadSpec) -> Tally {
    Load::start(guest, server, spec).await.all().await
}
