//! The hot path: a local image, all of it allocated and in the page cache, over NBD.
//!
//! - All servers run all the time, each with an equal image, pinned to the same CPU; the client is on another, or on the same
//!   where the row says so. They take turns in short slices, so that what else the machine does meets all alike.
//! - Where one core does all, a bare loop that does the least shows what the machine allows at all.
//! - How the page cache holds a file is up to how it was written: in one folio for each large write. ext4 walks a whole folio for
//!   each small write into it, whoever writes; so one load is measured with single pages too, as after random reads from the disk.
//! - QEMU is given its best options: each set is measured, and the fastest is taken for the comparison.

use readonce_testkit::nbd_client::lean::{Op, Pattern, Until, Workload};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
    image,
    server::{Launch, Server},
};

const SIZE: u64 = 1 << 30;
/// Requests above it are large: they are sequential and counted in bytes.
const SMALL: u32 = 4096;
/// Slices of each server in one turn.
const SLICES: usize = 3;

/// What `qemu-nbd` may be told; the best is taken for each load.
const QEMU_OPTIONS: &[&[&str]] = &[&["--cache=writeback"], &["--cache=writeback", "--aio=io_uring"]];

struct Load {
    what: &'static str,
    op: Op,
    size: u32,
    depth: usize,
    one_core: bool,
    /// The page cache holds single pages, from here on.
    in_pages: bool,
    times: f64,
}

const LOADS: &[Load] = &[
    Load {
        what: "4 KiB random read, depth 32",
        op: Op::Read,
        size: 4096,
        depth: 32,
        one_core: false,
        in_pages: false,
        times: 3.0,
    },
    Load {
        what: "4 KiB random write, depth 32",
        op: Op::Write,
        size: 4096,
        depth: 32,
        one_core: false,
        in_pages: false,
        times: 3.0,
    },
    Load {
        what: "4 KiB random read, depth 1, one core",
        op: Op::Read,
        size: 4096,
        depth: 1,
        one_core: true,
        in_pages: false,
        times: 2.0,
    },
    Load {
        what: "256 KiB read, depth 16",
        op: Op::Read,
        size: 256 << 10,
        depth: 16,
        one_core: false,
        in_pages: false,
        times: 1.3,
    },
    Load {
        what: "256 KiB write, depth 16",
        op: Op::Write,
        size: 256 << 10,
        depth: 16,
        one_core: false,
        in_pages: false,
        times: 1.3,
    },
    Load {
        what: "4 KiB random write, depth 32, page cache in pages of 4 KiB",
        op: Op::Write,
        size: 4096,
        depth: 32,
        one_core: false,
        in_pages: true,
        times: 3.0,
    },
];

/// Runs the row.
pub async fn run(bench: &Bench, format: &str, row: &'static str) -> anyhow::Result<Vec<Figure>> {
    anyhow::ensure!(bench.missing(&[Tool::Taskset]).is_none(), "taskset is missing (package util-linux)");
    let missing = bench.missing(&[Tool::QemuNbd]);
    let image = image::full(bench, &format!("local.{format}"), format, SIZE).await?;
    let mut all = vec![Launch::ours(bench, &image, &["-f", format]).pinned(0).start()?];
    let mut images = vec![image.clone()];
    if missing.is_none() {
        for (at, options) in QEMU_OPTIONS.iter().enumerate() {
            let image = image::full(bench, &format!("local-peer{at}.{format}"), format, SIZE).await?;
            all.push(Launch::qemu_nbd(bench, &image, format, options).pinned(0).start()?);
            images.push(image);
        }
    }
    // It only reads, and every byte of the image's file is as good as another.
    let bare = Launch::bare(bench, &image)?.pinned(0).start()?;
    let mut figures = Vec::new();
    for load in LOADS {
        if load.in_pages {
            images.iter().try_for_each(|image| image::cache_in_pages(image))?;
        }
        let mut bare_found = Vec::new();
        let mut found = vec![Vec::new(); all.len()];
        for server in &all {
            measure(bench, load, server)?;
        }
        for _ in 0..bench.repeat * SLICES {
            for (server, found) in all.iter().zip(&mut found) {
                found.push(measure(bench, load, server)?);
            }
            if load.one_core {
                bare_found.push(measure(bench, load, &bare)?);
            }
        }
        let medians: Vec<f64> = found.iter().map(|found| median(found)).collect();
        bench.say(&format!("{}: {medians:.0?} requests a second", load.what));
        let is_large = load.size > SMALL;
        let scale = if is_large { f64::from(load.size) / f64::from(1 << 20) } else { 1.0 };
        let peer = match &missing {
            Some(missing) => Value::Words(missing.clone()),
            None => Value::Number((medians[1..].iter().copied().fold(0.0, f64::max) * scale).round()),
        };
        let mut peers = vec![("qemu-nbd", peer)];
        if load.one_core {
            peers.push(("a bare loop: receive, read, send", Value::Number(median(&bare_found).round())));
        }
        figures.push(Figure {
            row,
            what: format!("{format}: {}", load.what),
            unit: if is_large { "MiB/s" } else { "/s" },
            ours: Value::Number((medians[0] * scale).round()),
            peers,
            target: Target::Times(load.times),
            note: String::new(),
        });
    }
    for server in all {
        server.stop()?;
    }
    Ok(figures)
}

/// Requests per second.
fn measure(bench: &Bench, load: &Load, server: &Server) -> anyhow::Result<f64> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let client_cpu = if load.one_core || cpus == 1 { 0 } else { 1 };
    let workload = Workload {
        op: load.op,
        size: load.size,
        depth: load.depth,
        pattern: if load.size > SMALL { Pattern::Sequential } else { Pattern::Random },
        span: SIZE,
        until: Until::Time(bench.span() / 6),
    };
    Ok(server.load(workload, client_cpu)?.ops_per_second())
}
