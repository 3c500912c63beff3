//! What the rows share: a folder, the programs that are there, how much to do.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tempfile::TempDir;

use crate::Args;

/// What the rows share.
pub struct Bench {
    dir: TempDir,
    start: Instant,
    /// Our program.
    pub readonce: PathBuf,
    /// Turns of ours and peer.
    pub repeat: usize,
    /// A small part of the work.
    pub quick: bool,
}

impl Bench {
    /// Finds our program and makes a folder, which goes with this.
    pub fn new(args: &Args) -> anyhow::Result<Self> {
        let readonce = match &args.readonce {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("readonce"),
        };
        anyhow::ensure!(readonce.exists(), "{} is not there: build it first", readonce.display());
        let dir = tempfile::Builder::new()
            .prefix("readonce-bench.")
            .tempdir_in(&args.dir)
            .with_context(|| format!("no folder can be made in {}", args.dir.display()))?;
        Ok(Self {
            dir,
            start: Instant::now(),
            readonce: std::fs::canonicalize(readonce)?,
            repeat: usize::from(args.repeat),
            quick: args.quick,
        })
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `count`, or a hundredth of it where a first look was asked for.
    pub fn amount(&self, count: u64) -> u64 {
        if self.quick { (count / 100).max(1) } else { count }
    }

    /// How long one measurement of speed takes.
    pub fn span(&self) -> Duration {
        Duration::from_millis(if self.quick { 300 } else { 3000 })
    }

    /// Progress, to standard error.
    pub fn say(&self, text: &str) {
        eprintln!("[{:>5.1} s] {text}", self.start.elapsed().as_secs_f64());
    }

    /// The machine, in a line.
    pub fn machine(&self) -> String {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let load = read("/proc/loadavg");
        let kernel = read("/proc/sys/kernel/osrelease");
        format!("{cpus} CPUs, Linux {}, load {}", kernel.trim(), load.split(' ').next().unwrap_or("unknown"))
    }

    /// Why one of `programs` cannot be used: its name and the Debian package to install. `None`: all are there.
    pub fn missing(&self, programs: &[Tool]) -> Option<String> {
        programs
            .iter()
            .find(|tool| !tool.is_there())
            .map(|tool| format!("missing: {} (package {})", tool.name(), tool.package()))
    }
}

/// A program of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// QEMU's image tool.
    QemuImg,
    /// QEMU's NBD server.
    QemuNbd,
    /// QEMU's block layer as a daemon; it has copy-on-read.
    QemuStorageDaemon,
    /// QEMU's HTTP driver.
    QemuCurl,
    /// nbdkit and its plugins.
    Nbdkit,
    /// Counts system calls.
    Strace,
    /// Pins processes.
    Taskset,
}

impl Tool {
    /// As it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::QemuImg => "qemu-img",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
            Self::QemuCurl => "QEMU's curl driver",
            Self::Nbdkit => "nbdkit",
            Self::Strace => "strace",
            Self::Taskset => "taskset",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::QemuImg | Self::QemuNbd | Self::QemuStorageDaemon => "qemu-utils",
            Self::QemuCurl => "qemu-block-extra",
            Self::Nbdkit => "nbdkit",
            Self::Strace => "strace",
            Self::Taskset => "util-linux",
        }
    }

    fn is_there(self) -> bool {
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output();
            output.ok().filter(|output| output.status.success())
        };
        match self {
            // Distributions keep the driver in a package of its own. Opening names the driver if it is not there.
            Self::QemuCurl => {
                let output = Command::new("qemu-img").args(["info", "http://127.0.0.1:1/"]).output();
                output.is_ok_and(|output| {
                    let text = String::from_utf8_lossy(&output.stderr).into_owned();
                    !text.contains("Unknown protocol") && !text.contains("not found")
                })
            }
            Self::Nbdkit => run("nbdkit", &["--dump-plugin", "curl"]).is_some(),
            Self::Strace => run("strace", &["-V"]).is_some(),
            tool => run(tool.name(), &["--version"]).is_some(),
        }
    }
}
