//! A running NBD server, ours or a peer's: how it is started, watched and ended.
//!
//! - Every server listens on a Unix socket of its own and has one export.
//! - One that is dropped is killed.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use readonce_testkit::nbd_client::{ConnectOptions, Headers, NbdClient, NbdError, lean};

use crate::bench::Bench;

/// How long a server may take until it accepts, and until it has ended.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to start a server.
pub struct Launch {
    words: Vec<String>,
    socket: PathBuf,
    export: String,
    /// Prints its URI once it accepts; else it accepts once its socket answers.
    prints_uri: bool,
    cpu: Option<usize>,
    syncs: Option<PathBuf>,
    log: PathBuf,
}

impl Launch {
    fn new(bench: &Bench, name: &str, words: impl FnOnce(&str) -> Vec<String>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{name}.{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let socket = bench.path(&format!("{name}.sock"));
        Self {
            words: words(&socket.display().to_string()),
            socket,
            export: String::new(),
            prints_uri: false,
            cpu: None,
            syncs: None,
            log: bench.path(&format!("{name}.log")),
        }
    }

    /// Ours, serving `image`; `options` are those of `readonce serve`.
    pub fn ours(bench: &Bench, image: &Path, options: &[&str]) -> Self {
        let launch = Self::new(bench, "readonce", |socket| {
            let mut words = vec![bench.readonce.display().to_string()];
            words.extend(["serve", "--quiet", "-k", socket].map(str::to_owned));
            words.extend(options.iter().map(|&option| option.to_owned()));
            words.push(image.display().to_string());
            words
        });
        Self { prints_uri: true, ..launch }
    }

    /// The bare server of this program. It does not end when it is asked to: drop it.
    pub fn bare(bench: &Bench, image: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.display().to_string();
        Ok(Self::new(bench, "bare", |socket| {
            vec![program, "--bare".to_owned(), image.display().to_string(), socket.to_owned()]
        }))
    }

    /// `qemu-nbd`, with further `options`.
    pub fn qemu_nbd(bench: &Bench, image: &Path, format: &str, options: &[&str]) -> Self {
        Self::new(bench, "qemu-nbd", |socket| {
            let mut words =
                ["qemu-nbd", "-f", format, "-k", socket, "-t", "-e", "64"].map(str::to_owned).to_vec();
            words.extend(options.iter().map(|&option| option.to_owned()));
            words.push(image.display().to_string());
            words
        })
    }

    /// QEMU's copy-on-read on `image`, which was made over the raw file at `url`.
    pub fn qemu_copy_on_read(bench: &Bench, image: &Path, format: &str, url: &str) -> Self {
        let launch = Self::new(bench, "qemu-storage-daemon", |socket| {
            let origin = format!("driver=http,node-name=origin,read-only=on,url={url}");
            let image = format!(
                "driver={format},node-name=image,file.driver=file,file.filename={},backing=origin",
                image.display()
            );
            [
                "qemu-storage-daemon",
                "--blockdev",
                &origin,
                "--blockdev",
                &image,
                "--blockdev",
                "driver=copy-on-read,node-name=filter,file=image",
                "--nbd-server",
                &format!("addr.type=unix,addr.path={socket},max-connections=0"),
                "--export",
                "type=nbd,id=export,node-name=filter,name=disk,writable=on",
            ]
            .map(str::to_owned)
            .to_vec()
        });
        Self { export: "disk".to_owned(), ..launch }
    }

    /// nbdkit's copy-on-write filter with copy-on-read on `url`, in blocks of `block_bytes`.
    pub fn nbdkit(bench: &Bench, url: &str, block_bytes: u64) -> Self {
        Self::new(bench, "nbdkit", |socket| {
            ["nbdkit", "-f", "-U", socket, "--filter=cow", "curl"]
                .map(str::to_owned)
                .into_iter()
                .chain([
                    url.to_owned(),
                    "cow-on-read=true".to_owned(),
                    format!("cow-block-size={block_bytes}"),
                ])
                .collect()
        })
    }

    /// On this CPU only.
    pub fn pinned(self, cpu: usize) -> Self {
        Self { cpu: Some(cpu), ..self }
    }

    /// With its syncs counted. io_uring is refused to it: syncs that go through it would not be seen.
    pub fn counting_syncs(self, bench: &Bench) -> Self {
        let name = self.log.with_extension("strace");
        let syncs = bench.path(&name.file_name().unwrap_or_default().to_string_lossy());
        Self { syncs: Some(syncs), ..self }
    }

    /// Starts it, and waits until it accepts.
    pub fn start(self) -> anyhow::Result<Server> {
        let mut words = Vec::new();
        if let Some(cpu) = self.cpu {
            words.extend(["taskset".to_owned(), "-c".to_owned(), cpu.to_string()]);
        }
        if let Some(path) = &self.syncs {
            // -D: the server stays our child, so that it can be told to end.
            words.extend(["strace", "-D", "-f", "-qq", "-o"].map(str::to_owned));
            words.push(path.display().to_string());
            words.extend(["-e", "trace=fsync,fdatasync,io_uring_setup"].map(str::to_owned));
            words.extend(["-e", "inject=io_uring_setup:error=ENOSYS"].map(str::to_owned));
        }
        words.extend(self.words);
        let log = File::create(&self.log)?;
        let start = Instant::now();
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .env("TMPDIR", self.log.parent().unwrap_or(Path::new("/tmp")))
            .stdin(Stdio::null())
            .stdout(if self.prints_uri { Stdio::piped() } else { Stdio::from(log.try_clone()?) })
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} cannot be started", words[0]))?;
        let mut uri = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut uri)?;
        }
        let mut server = Server {
            child,
            socket: self.socket,
            export: self.export,
            log: self.log,
            syncs: self.syncs,
            started_in: Duration::ZERO,
        };
        while let Err(error) = UnixStream::connect(&server.socket) {
            if start.elapsed() > PATIENCE || server.child.try_wait()?.is_some() {
                return Err(anyhow::Error::from(error).context(server.log()));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        server.started_in = start.elapsed();
        Ok(server)
    }
}

/// A running server.
pub struct Server {
    child: Child,
    socket: PathBuf,
    export: String,
    log: PathBuf,
    syncs: Option<PathBuf>,
    /// From the start of its process until it accepted.
    pub started_in: Duration,
}

impl Server {
    /// Connects to it.
    pub async fn connect(&self) -> Result<NbdClient, NbdError> {
        let options = ConnectOptions {
            export: self.export.clone(),
            headers: Headers::Structured,
            contexts: Vec::new(),
        };
        NbdClient::connect_unix(&self.socket, &options).await
    }

    /// Puts a load on it from this CPU.
    pub fn load(&self, workload: lean::Workload, cpu: usize) -> anyhow::Result<lean::Figures> {
        let (address, export) = (lean::Address::Unix(self.socket.clone()), self.export.clone());
        // A thread of its own, because the pinning stays with the thread.
        let thread = std::thread::spawn(move || {
            let mut cpus = rustix::thread::CpuSet::new();
            cpus.set(cpu);
            rustix::thread::sched_setaffinity(None, &cpus)?;
            lean::run(&address, &export, &workload)
        });
        let figures = thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        figures.with_context(|| self.log())
    }

    /// The most memory that it ever had, in bytes.
    pub fn memory_max(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// What it said last.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    /// It does not end, or not with success.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                anyhow::ensure!(status.success(), "the server ended with {status}: {}", self.log());
                return Ok(());
            }
            anyhow::ensure!(start.elapsed() < PATIENCE, "the server does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops it, and tells how many syncs it made in its life.
    pub fn stop_and_count(self) -> anyhow::Result<u64> {
        let path = self.syncs.clone().context("its syncs were not counted")?;
        self.stop()?;
        // The tracer outlives its process for a moment: all is written once nothing more comes.
        let mut len = u64::MAX;
        loop {
            let now = std::fs::metadata(&path)?.len();
            if now == len {
                break;
            }
            len = now;
            std::thread::sleep(Duration::from_millis(300));
        }
        let text = std::fs::read_to_string(&path)?;
        let is_begin = |line: &&str| !line.contains("resumed>") && !line.contains("io_uring_setup");
        let is_sync = |line: &&str| line.contains("fsync(") || line.contains("fdatasync(");
        Ok(text.lines().filter(is_sync).filter(is_begin).count() as u64)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
