//! Writes that allocate: 4 KiB at random places, depth 32, into an empty qcow2 image over a local raw file.
//!
//! - Each measurement is of a new image: what counts is the first write to a cluster or subcluster.
//! - All servers are pinned to one CPU, the client to the other; they take turns.
//! - The page cache grows by up to 64 KiB with each write. On a virtual machine the first touch of memory that the host took back costs
//!   more than the write itself, and whoever runs first pays it: so as much is touched and given back before each measurement.

use readonce_testkit::{
    Content,
    nbd_client::lean::{Op, Pattern, Until, Workload},
};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
    image::{self, Kind},
    server::Launch,
};

const SIZE: u64 = 4 << 30;
const WRITES: u64 = 20_000;
/// What the writes of one measurement may add to the page cache, in bytes.
const CACHE_BYTES: u64 = WRITES * image::CLUSTER + (256 << 20);
/// Measurements of each server in one turn.
const SLICES: usize = 3;
const QEMU_OPTIONS: &[&[&str]] = &[&["--cache=writeback"], &["--cache=writeback", "--aio=io_uring"]];

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let backing = bench.path("allocate.raw");
    let content = Content::seeded(9, SIZE);
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(&backing)?);
    for at in (0..SIZE).step_by(1 << 20) {
        std::io::Write::write_all(&mut file, &content.bytes(at..at + (1 << 20)))?;
    }
    file.into_inner()?.sync_all()?;
    let missing = bench.missing(&[Tool::QemuNbd, Tool::QemuImg]);
    let backing = backing.display().to_string();
    let mut figures = Vec::new();
    for (what, kind) in [("default", image::QCOW2), ("extended L2, 4 KiB", image::QCOW2_EXTENDED)] {
        let mut found = vec![Vec::new(); 1 + QEMU_OPTIONS.len()];
        for _ in 0..bench.repeat * SLICES {
            found[0].push(ours(bench, kind, &backing).await?);
            for (at, options) in QEMU_OPTIONS.iter().enumerate().filter(|_| missing.is_none()) {
                found[at + 1].push(peer(bench, kind, &backing, options)?);
            }
        }
        let best = found[1..]
            .iter()
            .filter(|found| !found.is_empty())
            .map(|found| median(found))
            .fold(0.0, f64::max);
        let peer = match &missing {
            Some(missing) => Value::Words(missing.clone()),
            None => Value::Number(best.round()),
        };
        figures.push(Figure {
            row: "allocate",
            what: format!("qcow2, {what}: allocating 4 KiB random writes, depth 32"),
            unit: "/s",
            ours: Value::Number(median(&found[0]).round()),
            peers: vec![("qemu-nbd", peer)],
            target: Target::Times(2.0),
            note: String::new(),
        });
    }
    Ok(figures)
}

async fn ours(bench: &Bench, kind: Kind, backing: &str) -> anyhow::Result<f64> {
    let image = image::overlay(bench, "allocate.qcow2", kind, backing, SIZE).await?;
    // Opened once before: the first open pins the image.
    let launch = || Launch::ours(bench, &image, &["-f", "qcow2", "--copy-on-read=off"]).pinned(0);
    launch().start()?.stop()?;
    measure(bench, launch())
}

fn peer(bench: &Bench, kind: Kind, backing: &str, options: &[&str]) -> anyhow::Result<f64> {
    let image = image::qemu_overlay(bench, "allocate-peer.qcow2", kind, backing, SIZE)?;
    measure(bench, Launch::qemu_nbd(bench, &image, "qcow2", options).pinned(0))
}

/// Writes a second.
fn measure(bench: &Bench, launch: Launch) -> anyhow::Result<f64> {
    let server = launch.start()?;
    let workload = Workload {
        op: Op::Write,
        size: 4096,
        depth: 32,
        pattern: Pattern::Random,
        span: SIZE,
        until: Until::Count(bench.amount(WRITES)),
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    touch_memory(bench.amount(CACHE_BYTES));
    let figures = server.load(workload, usize::from(cpus > 1))?;
    // What was written is not needed: no time for a flush.
    drop(server);
    Ok(figures.ops_per_second())
}

/// Touches `bytes` of memory and gives them back.
fn touch_memory(bytes: u64) {
    let bytes = usize::try_from(bytes).expect("less than the address space");
    std::hint::black_box(vec![1_u8; bytes]);
}
