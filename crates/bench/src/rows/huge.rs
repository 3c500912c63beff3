//! A huge image: how long it takes to open, and how much memory a million random reads of it cost.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use readonce_disk::chain::{self, ChainOptions};
use readonce_storage::TokioRuntime;
use readonce_testkit::nbd_client::lean::{Op, Pattern, Until, Workload};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
    image,
    server::Launch,
};

const SIZE: u64 = 16 << 40;
const READS: u64 = 1_000_000;
/// QEMU reads a whole L2 table for most of them: a million would take minutes, and its memory does not grow any more.
const PEER_READS: u64 = 50_000;

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let mut figures = of_format(bench, "qed").await?;
    figures.extend(of_format(bench, "qcow2").await?);
    Ok(figures)
}

async fn of_format(bench: &Bench, format: &'static str) -> anyhow::Result<Vec<Figure>> {
    let image = image::tables_exist(bench, &format!("huge.{format}"), format, SIZE).await?;
    let missing = bench.missing(&[Tool::QemuNbd]);
    let (mut opens, mut ours, mut peer) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.repeat {
        opens.push(milliseconds(open(&image, format).await?));
        ours.push(measure(bench, &image, Launch::ours(bench, &image, &["-f", format]), READS)?);
        if missing.is_none() {
            peer.push(measure(bench, &image, Launch::qemu_nbd(bench, &image, format, &[]), PEER_READS)?);
        }
    }
    std::fs::remove_file(&image)?;
    let middle =
        |found: &[Measured], of: fn(&Measured) -> f64| median(&found.iter().map(of).collect::<Vec<_>>());
    let peer_value = |of| match &missing {
        Some(missing) => Value::Words(missing.clone()),
        None => Value::Number(middle(&peer, of)),
    };
    let figure = |what: &str, unit, ours, peers: Vec<_>, target, note: &str| Figure {
        row: "huge",
        what: format!("16 TiB {format} image, all L2 tables: {what}"),
        unit,
        ours: Value::Number(ours),
        peers,
        target,
        note: note.to_owned(),
    };
    Ok(vec![
        figure(
            "cold open, the chain alone",
            "ms",
            median(&opens),
            Vec::new(),
            Target::Below(50.0),
            "metadata not in the page cache",
        ),
        figure(
            "cold open, from the start of the process until it accepts",
            "ms",
            middle(&ours, |measured| measured.open),
            vec![("qemu-nbd", peer_value(|measured| measured.open))],
            Target::Below(50.0),
            "",
        ),
        figure(
            "most memory in a million random reads",
            "MiB",
            middle(&ours, |measured| measured.memory),
            vec![("qemu-nbd", peer_value(|measured| measured.memory))],
            Target::Below(128.0),
            "",
        ),
        figure(
            "these reads",
            "/s",
            middle(&ours, |measured| measured.rate).round(),
            vec![("qemu-nbd", peer_value(|measured| measured.rate.round()))],
            Target::Report,
            "depth 32, tables from the disk",
        ),
    ])
}

struct Measured {
    /// Milliseconds.
    open: f64,
    /// MiB.
    memory: f64,
    /// Reads per second.
    rate: f64,
}

fn measure(bench: &Bench, image: &Path, launch: Launch, reads: u64) -> anyhow::Result<Measured> {
    forget(image)?;
    let server = launch.start()?;
    let reads = bench.amount(reads);
    let workload = Workload {
        op: Op::Read,
        size: 4096,
        depth: 32,
        pattern: Pattern::Random,
        span: SIZE,
        until: Until::Count(reads),
    };
    let figures = server.load(workload, 0)?;
    let memory = server.memory_max()? as f64 / f64::from(1 << 20);
    let open = milliseconds(server.started_in);
    server.stop()?;
    Ok(Measured { open, memory, rate: figures.ops_per_second() })
}

async fn open(image: &Path, format: &str) -> anyhow::Result<Duration> {
    forget(image)?;
    let start = Instant::now();
    let chain = chain::open(
        &image.display().to_string(),
        ChainOptions { format: Some(format.to_owned()), ..ChainOptions::default() },
        TokioRuntime::current(),
        std::sync::Arc::new(|_| {}),
    )
    .await?;
    let elapsed = start.elapsed();
    chain.close(Duration::from_secs(10)).await?;
    Ok(elapsed)
}

/// Drops the file from the page cache.
fn forget(image: &Path) -> anyhow::Result<()> {
    let file = std::fs::File::open(image)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
