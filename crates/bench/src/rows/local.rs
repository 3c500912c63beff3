//! The hot path: a local QED image, all of it allocated and in the page cache, over NBD.
//!
//! - Both servers serve the same file, in turn, pinned to the same CPU; the client is on another, or on the same where the row says so.
//! - QEMU is given its best options: each set is tried, and the fastest is taken for the comparison.

use std::{fs::File, io, path::Path};

use readonce_testkit::nbd_client::lean::{Op, Pattern, Until, Workload};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
    image,
    server::Launch,
};

const SIZE: u64 = 1 << 30;

/// What `qemu-nbd` may be told; the best is taken for each load.
const QEMU_OPTIONS: &[&[&str]] = &[&["--cache=writeback"], &["--cache=writeback", "--aio=io_uring"]];

struct Load {
    what: &'static str,
    op: Op,
    size: u32,
    depth: usize,
    one_core: bool,
    times: f64,
}

const LOADS: &[Load] = &[
    Load {
        what: "4 KiB random read, depth 32",
        op: Op::Read,
        size: 4096,
        depth: 32,
        one_core: false,
        times: 3.0,
    },
    Load {
        what: "4 KiB random write, depth 32",
        op: Op::Write,
        size: 4096,
        depth: 32,
        one_core: false,
        times: 3.0,
    },
    Load {
        what: "4 KiB random read, depth 1, one core",
        op: Op::Read,
        size: 4096,
        depth: 1,
        one_core: true,
        times: 2.0,
    },
    Load {
        what: "256 KiB read, depth 16",
        op: Op::Read,
        size: 256 << 10,
        depth: 16,
        one_core: false,
        times: 1.3,
    },
    Load {
        what: "256 KiB write, depth 16",
        op: Op::Write,
        size: 256 << 10,
        depth: 16,
        one_core: false,
        times: 1.3,
    },
];

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    anyhow::ensure!(bench.missing(&[Tool::Taskset]).is_none(), "taskset is missing (package util-linux)");
    let image = image::full(bench, "local.qed", SIZE).await?;
    let missing = bench.missing(&[Tool::QemuNbd]);
    let mut figures = Vec::new();
    for load in LOADS {
        bench.say(load.what);
        let mut ours = Vec::new();
        let mut qemu = vec![Vec::new(); QEMU_OPTIONS.len()];
        for _ in 0..bench.repeat {
            ours.push(measure(bench, load, &image, Launch::ours(bench, &image, &["-f", "qed"]))?);
            if missing.is_none() {
                for (options, found) in QEMU_OPTIONS.iter().zip(&mut qemu) {
                    let launch = Launch::qemu_nbd(bench, &image, "qed", options);
                    found.push(measure(bench, load, &image, launch)?);
                }
            }
        }
        let peer = match &missing {
            Some(missing) => Value::Words(missing.clone()),
            None => Value::Number(qemu.iter().map(|found| median(found)).fold(0.0, f64::max)),
        };
        let (unit, scale) =
            if load.size > 4096 { ("MiB/s", f64::from(load.size) / f64::from(1 << 20)) } else { ("/s", 1.0) };
        let scaled = |value: Value| match value {
            Value::Number(number) => Value::Number((number * scale).round()),
            words => words,
        };
        figures.push(Figure {
            row: "local",
            what: load.what.to_owned(),
            unit,
            ours: scaled(Value::Number(median(&ours))),
            peers: vec![("qemu-nbd", scaled(peer))],
            target: Target::Times(load.times),
            note: String::new(),
        });
    }
    std::fs::remove_file(&image)?;
    Ok(figures)
}

/// Requests per second.
fn measure(bench: &Bench, load: &Load, image: &Path, launch: Launch) -> anyhow::Result<f64> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let client_cpu = if load.one_core || cpus == 1 { 0 } else { 1 };
    warm(image)?;
    let server = launch.pinned(0).start()?;
    let workload = |until| Workload {
        op: load.op,
        size: load.size,
        depth: load.depth,
        pattern: if load.size > 4096 { Pattern::Sequential } else { Pattern::Random },
        span: SIZE,
        until,
    };
    server.load(workload(Until::Time(bench.span() / 6)), client_cpu)?;
    let figures = server.load(workload(Until::Time(bench.span())), client_cpu)?;
    server.stop()?;
    // What one wrote must not be written back while the other is measured.
    File::open(image)?.sync_all()?;
    Ok(figures.ops_per_second())
}

/// Brings the file into the page cache.
fn warm(image: &Path) -> io::Result<()> {
    io::copy(&mut File::open(image)?, &mut io::sink()).map(drop)
}
