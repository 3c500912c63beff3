//! `soak READONCE MINUTES`: running servers under load, verified, with their memory and descriptors watched.
//!
//! - Each image has workers that read and write with a model beside them, clients that come and go, and one that never takes its
//!   replies. One export is read-only and keeps nothing, so that the origin is asked to the end.
//! - The origin fails now and then, in ways that must not be seen.
//! - It fails on a wrong byte, a refused request, an unclean end, and when the last quarter of the time needs more memory than the
//!   second at most, or more descriptors at least: the connections of a burst go again, what leaks stays.

#![allow(clippy::disallowed_methods, reason = "outside the engine: real processes, real time")]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use readonce_testkit::{
    Content, Fault, FaultyOrigin, OriginSpec, When,
    guest::{Guest, Part, Tally},
    nbd_client::{ConnectOptions, Handshake, NbdClient, RawRequest, Stream, command, go_data, option},
};
use tokio::{io::AsyncWriteExt, task::JoinSet};

const BYTES: u64 = 256 << 20;
const WORKERS: u64 = 4;
/// Samples of a run.
const SAMPLES: u32 = 40;
/// More than this between the second and the last quarter is growth: caches and allocators breathe.
const GROWTH_BYTES_MAX: u64 = 16 << 20;
const GROWTH_DESCRIPTORS_MAX: u64 = 4;
/// At any time: clients, connections to the origin in full number, and those that replace them.
const DESCRIPTORS_MAX: u64 = 64;

/// What is served: a name for the table, format, options of create, arguments of serve.
const EXPORTS: [(&str, &str, &str, &[&str]); 4] = [
    ("qed", "qed", "copy_on_read", &[]),
    ("qcow2", "qcow2", "copy_on_read", &[]),
    ("subclusters", "qcow2", "cluster_size=128k,extended_l2=on,copy_on_read", &[]),
    ("keeps nothing", "qcow2", "copy_on_read", &["-r", "--copy-on-read=off"]),
];

struct Export {
    name: &'static str,
    child: Child,
    image: PathBuf,
    socket: PathBuf,
    guest: Arc<Guest>,
    writes_percent: u32,
    tally: Arc<Mutex<Tally>>,
    connections: Arc<AtomicU64>,
    /// Memory in bytes, and descriptors.
    samples: Vec<(u64, u64)>,
}

type Failed = String;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let minutes = arguments.get(2).and_then(|minutes| minutes.parse::<f64>().ok());
    let (Some(binary), Some(minutes)) = (arguments.get(1), minutes) else {
        eprintln!("soak READONCE MINUTES");
        return ExitCode::from(2);
    };
    match soak(Path::new(binary), Duration::from_secs_f64(minutes * 60.0)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            eprintln!("soak: {failed}");
            ExitCode::FAILURE
        }
    }
}

async fn soak(binary: &Path, time: Duration) -> Result<(), Failed> {
    let folder = tempfile::Builder::new().prefix("readonce-soak-").tempdir().map_err(text)?;
    let content = Content::seeded(3, BYTES);
    let origin = FaultyOrigin::start(OriginSpec::new(content.clone())).await.map_err(text)?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    let mut exports = Vec::new();
    for spec in EXPORTS {
        let export = Export::start(binary, folder.path(), &origin.url(), &content, spec)?;
        export.spawn_clients(&mut tasks, &stop).await?;
        exports.push(export);
    }

    println!(
        "{:>6}  {:14} {:>8} {:>5} {:>10} {:>10} {:>8} {:>8}",
        "s", "export", "MiB", "fds", "reads", "writes", "flushes", "clients"
    );
    let began = Instant::now();
    for sample in 1..=SAMPLES {
        let due = began + time * sample / SAMPLES;
        tokio::select! {
            () = tokio::time::sleep_until(due.into()) => {}
            Some(ended) = tasks.join_next() => ended.map_err(text)??,
        }
        origin.clear_log();
        origin.heal();
        origin.fault(When::next(2).after(50), Fault::CutAfter(5000));
        origin.fault(When::next(1).after(90), Fault::Status { status: 503, retry_after: None });
        origin.fault(When::next(1).after(120), Fault::Reset);
        for export in &mut exports {
            export.sample(began.elapsed())?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(text)??;
    }
    origin.heal();
    for export in exports {
        export.end(binary).await?;
    }
    println!("no wrong byte, no refusal, no growth");
    Ok(())
}

impl Export {
    fn start(
        binary: &Path,
        folder: &Path,
        url: &str,
        content: &Content,
        (name, format, options, arguments): (&'static str, &str, &str, &[&str]),
    ) -> Result<Self, Failed> {
        let image = folder.join(name.replace(' ', "-"));
        let socket = image.with_extension("socket");
        let created = Command::new(binary)
            .args(["create", "-q", "-f", format, "-o", options, "-b", url, "-F", "raw"])
            .arg(&image)
            .status()
            .map_err(text)?;
        if !created.success() {
            return Err(format!("{name}: create failed"));
        }
        let mut child = Command::new(binary)
            .args(["serve", "--quiet", "-k"])
            .arg(&socket)
            .args(arguments)
            .arg(&image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(text)?;
        let mut uri = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut uri).map_err(text)?;
        Ok(Self {
            name,
            child,
            image,
            socket,
            guest: Arc::new(Guest::new(content.clone())),
            writes_percent: if arguments.is_empty() { 40 } else { 0 },
            tally: Arc::default(),
            connections: Arc::default(),
            samples: Vec::new(),
        })
    }

    async fn spawn_clients(
        &self,
        tasks: &mut JoinSet<Result<(), Failed>>,
        stop: &Arc<AtomicBool>,
    ) -> Result<(), Failed> {
        for worker in 0..WORKERS {
            let (guest, tally, stop) = (Arc::clone(&self.guest), Arc::clone(&self.tally), Arc::clone(stop));
            let (client, writes_percent, name) =
                (connect(&self.socket).await?, self.writes_percent, self.name);
            tasks.spawn(async move {
                for seed in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let part = Part { worker, workers: WORKERS, seed, requests_max: 200, writes_percent };
                    let done =
                        guest.work(&client, part, &stop).await.map_err(|wrong| format!("{name}: {wrong}"))?;
                    let failed =
                        done.reads_failed + done.writes_failed + done.writes_no_space + done.flushes_failed;
                    if failed > 0 || done.is_cut {
                        return Err(format!("{name}: {done:?}"));
                    }
                    let mut tally = tally.lock().expect("no panic with it");
                    *tally = tally.plus(done);
                }
                Ok(())
            });
        }
        // One that asks and never takes the replies, again and again; and others that come and go meanwhile.
        let (socket, connections, stop) =
            (self.socket.clone(), Arc::clone(&self.connections), Arc::clone(stop));
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let slow = never_reads(&socket).await?;
                for index in 0..100 {
                    let client = connect(&socket).await?;
                    connections.fetch_add(1, Ordering::Relaxed);
                    if index % 2 == 0 {
                        for _ in 0..4 {
                            let request =
                                RawRequest { command: command::READ, len: 1 << 20, ..RawRequest::default() };
                            client.send(request).await.map_err(text)?;
                        }
                        client.abandon().await;
                    } else {
                        client.disconnect().await.map_err(text)?;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                drop(slow);
            }
            Ok(())
        });
        Ok(())
    }

    fn sample(&mut self, at: Duration) -> Result<(), Failed> {
        let process = format!("/proc/{}", self.child.id());
        let status = std::fs::read_to_string(format!("{process}/status")).map_err(text)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        let bytes = kib.ok_or_else(|| format!("{}: it has ended", self.name))? * 1024;
        let descriptors = std::fs::read_dir(format!("{process}/fd")).map_err(text)?.count() as u64;
        self.samples.push((bytes, descriptors));
        let tally = *self.tally.lock().expect("no panic with it");
        println!(
            "{:6.0}  {:14} {:8.1} {descriptors:5} {:10} {:10} {:8} {:8}",
            at.as_secs_f64(),
            self.name,
            bytes as f64 / f64::from(1 << 20),
            tally.reads,
            tally.writes,
            tally.flushes,
            self.connections.load(Ordering::Relaxed)
        );
        Ok(())
    }

    async fn end(mut self, binary: &Path) -> Result<(), Failed> {
        let name = self.name;
        self.guest
            .compare_all(&connect(&self.socket).await?)
            .await
            .map_err(|wrong| format!("{name}: {wrong}"))?;
        let id = self.child.id().to_string();
        Command::new("kill").args(["-TERM", &id]).status().map_err(text)?;
        let status = self.child.wait().map_err(text)?;
        if !status.success() {
            return Err(format!("{name}: ended with {status}"));
        }
        let checked = Command::new(binary).args(["check", "-q"]).arg(&self.image).output().map_err(text)?;
        if !checked.status.success() {
            return Err(format!("{name}: check: {checked:?}"));
        }
        let (bytes, descriptors): (Vec<u64>, Vec<u64>) = self.samples.iter().copied().unzip();
        let (before, after) = second_and_last(&bytes, |quarter| quarter.iter().copied().max());
        if after > before + GROWTH_BYTES_MAX {
            return Err(format!("{name}: memory grew from {before} to {after} bytes"));
        }
        let (before, after) = second_and_last(&descriptors, |quarter| quarter.iter().copied().min());
        if after > before + GROWTH_DESCRIPTORS_MAX {
            return Err(format!("{name}: descriptors grew from {before} to {after}"));
        }
        if let Some(many) = descriptors.iter().find(|count| **count > DESCRIPTORS_MAX) {
            return Err(format!("{name}: {many} descriptors at once"));
        }
        Ok(())
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `of` says of the second and of the last quarter of the samples.
fn second_and_last(samples: &[u64], of: fn(&[u64]) -> Option<u64>) -> (u64, u64) {
    let quarter = samples.len() / 4;
    let of = |samples| of(samples).expect("a quarter has samples");
    (of(&samples[quarter..2 * quarter]), of(&samples[3 * quarter..]))
}

async fn connect(socket: &Path) -> Result<NbdClient, Failed> {
    NbdClient::connect_unix(socket, &ConnectOptions::default()).await.map_err(text)
}

/// A client whose replies would be a gigabyte, and who takes none.
async fn never_reads(socket: &Path) -> Result<Box<dyn Stream>, Failed> {
    let mut handshake = Handshake::unix(socket).await.map_err(text)?;
    handshake.option(option::GO, &go_data("", &[])).await.map_err(text)?;
    let mut stream = handshake.into_stream();
    let mut requests = Vec::new();
    for cookie in 0..1024_u64 {
        requests.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        requests.extend_from_slice(&[0, 0, 0, 0]);
        requests.extend_from_slice(&cookie.to_be_bytes());
        requests.extend_from_slice(&0_u64.to_be_bytes());
        requests.extend_from_slice(&(1_u32 << 20).to_be_bytes());
    }
    // The server stops taking requests at some point.
    let _ = tokio::time::timeout(Duration::from_millis(100), stream.write_all(&requests)).await;
    Ok(stream)
}

fn text(error: impl std::fmt::Display) -> Failed {
    error.to_string()
}
