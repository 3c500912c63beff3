//! A recorded boot, replayed: how long the guest takes over a slow link, and what is downloaded.
//!
//! - A closed loop: a request starts when all that had ended before it started have ended, plus the thinking time that lay
//!   between, at the pace of a hardware-virtualised guest.

use std::{
    collections::BTreeSet,
    ops::Range,
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use readonce_testkit::{
    Content, FaultyOrigin, LinkSpec, OriginSpec,
    nbd_client::{NbdClient, NbdError},
    trace::{self, Op, Request},
};
use tokio::sync::watch;

use super::{SEND_TRIM, SEND_WRITE_ZEROES};
use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
    image,
    server::{Launch, Server},
};

const TRACE: &str = include_str!("../../traces/debian-minimal-boot.jsonl");
/// Bytes of the disk that was booted.
const SIZE: u64 = 2 << 30;
/// The trace was recorded under software emulation.
const PACE: f64 = 0.1;

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let mut trace = trace::parse(TRACE)?;
    if bench.quick {
        trace.truncate(100);
    }
    let qemu_missing = bench.missing(&[Tool::QemuImg, Tool::QemuStorageDaemon, Tool::QemuCurl]);
    let nbdkit_missing = bench.missing(&[Tool::Nbdkit]);
    let names = [
        "readonce on qed",
        "readonce on qcow2, subclusters of 4 KiB",
        "QEMU copy-on-read on qcow2",
        "nbdkit curl+cow 64 KiB",
        "nbdkit curl+cow 1 MiB",
    ];
    let missing = [None, None, qemu_missing, nbdkit_missing.clone(), nbdkit_missing];
    let mut found = vec![Vec::new(); names.len()];
    for _ in 0..bench.repeat {
        for (who, name) in names.iter().enumerate().filter(|(who, _)| missing[*who].is_none()) {
            let run = replay_on(bench, &trace, who).await.map_err(|error| format!("{error:#}"));
            bench.say(&format!("{name}: {run:?}"));
            found[who].push(run);
        }
    }
    let value = |who: usize, of: fn(&Run) -> f64| -> Value {
        if let Some(missing) = &missing[who] {
            return Value::Words(missing.clone());
        }
        let runs: Result<Vec<f64>, String> =
            found[who].iter().map(|run| run.as_ref().map(of).map_err(Clone::clone)).collect();
        runs.map(|runs| median(&runs)).into()
    };
    let figure = |what: &str, unit, of: fn(&Run) -> f64| Figure {
        row: "boot",
        what: format!("recorded boot, 100 Mbit/s 40 ms: {what}"),
        unit,
        ours: value(0, of),
        peers: (1..names.len()).map(|who| (names[who], value(who, of))).collect(),
        target: Target::Report,
        note: String::new(),
    };
    let once = Figure {
        row: "boot",
        what: "recorded boot: bytes fetched / bytes of distinct 4 KiB blocks read before they were written"
            .to_owned(),
        unit: "×",
        ours: value(1, |run| run.asked as f64 / run.wanted as f64),
        peers: Vec::new(),
        target: Target::AtMost(1.0),
        note: "qcow2, subclusters of 4 KiB".to_owned(),
    };
    let for_a_flush = Figure {
        row: "boot",
        what: "recorded boot: bytes fetched that no read wanted, for which a flush would wait".to_owned(),
        unit: "B",
        ours: value(1, |run| run.unwanted as f64),
        peers: Vec::new(),
        target: Target::AtMost(0.0),
        note: "qcow2, subclusters of 4 KiB".to_owned(),
    };
    Ok(vec![
        once,
        for_a_flush,
        figure("wall", "s", |run| run.seconds),
        figure("downloaded", "MiB", |run| run.downloaded as f64 / f64::from(1 << 20)),
        figure("requests to the origin", "", |run| run.requests as f64),
    ])
}

#[derive(Debug, Clone, Copy)]
struct Run {
    seconds: f64,
    downloaded: u64,
    requests: usize,
    /// Bytes of the ranges asked for, the probe apart.
    asked: u64,
    /// Bytes of the blocks that reads of the trace need from the origin.
    wanted: u64,
    /// Bytes asked for that lie in no such block.
    unwanted: u64,
}

/// Bytes of a subcluster.
const BLOCK: u64 = 4096;

/// The blocks that reads need from the origin: those that were not written whole before.
fn wanted_blocks(trace: &[Request]) -> BTreeSet<u64> {
    let (mut wanted, mut written) = (BTreeSet::new(), BTreeSet::new());
    for request in trace {
        let end = request.offset + request.len;
        match request.op {
            Op::Read => {
                wanted.extend(
                    (request.offset / BLOCK..end.div_ceil(BLOCK)).filter(|block| !written.contains(block)),
                );
            }
            Op::Write | Op::Zero => written.extend(request.offset.div_ceil(BLOCK)..end / BLOCK),
            Op::Trim | Op::Flush => {}
        }
    }
    wanted
}

async fn replay_on(bench: &Bench, trace: &[Request], who: usize) -> anyhow::Result<Run> {
    let link = Some(LinkSpec::new(100, 40));
    let content = Content::seeded(7, SIZE);
    let origin = FaultyOrigin::start(OriginSpec { link, ..OriginSpec::new(content.clone()) }).await?;
    super::allow_head(&origin);
    let url = origin.url();
    let launch = match who {
        0 => {
            let image = image::overlay(bench, "boot.qed", image::QED, &url, SIZE).await?;
            Launch::ours(bench, &image, &["--copy-on-read=on"])
        }
        1 => {
            let image =
                image::overlay(bench, "boot-extended.qcow2", image::QCOW2_EXTENDED, &url, SIZE).await?;
            Launch::ours(bench, &image, &["--copy-on-read=on"])
        }
        2 => {
            let image = image::qemu_overlay(bench, "boot.qcow2", image::QCOW2, &url, SIZE)?;
            Launch::qemu_copy_on_read(bench, &image, "qcow2", &url)
        }
        3 => Launch::nbdkit(bench, &url, 64 << 10),
        _ => Launch::nbdkit(bench, &url, 1 << 20),
    };
    let server = launch.start()?;
    let seconds = replay(&server, trace, &content).await?;
    // What was read ahead for the boot is part of what it cost.
    let log = origin.log();
    let asked: Vec<Range<u64>> = log
        .iter()
        .filter_map(|entry| entry.range.clone())
        .filter(|range| range.end - range.start > 1)
        .collect();
    let wanted = wanted_blocks(trace);
    let blocks = asked.iter().flat_map(|range| range.start / BLOCK..range.end.div_ceil(BLOCK));
    let run = Run {
        seconds,
        downloaded: origin.body_bytes(),
        requests: log.len(),
        asked: asked.iter().map(|range| range.end - range.start).sum(),
        wanted: wanted.len() as u64 * BLOCK,
        unwanted: blocks.filter(|block| !wanted.contains(block)).count() as u64 * BLOCK,
    };
    server.stop()?;
    Ok(run)
}

/// Seconds from the first request to the end of the last.
async fn replay(server: &Server, trace: &[Request], content: &Content) -> anyhow::Result<f64> {
    let client = server.connect().await?;
    // How many requests, in order of their end, have ended. Whoever waits for a count waits for all of them.
    let ended: Vec<watch::Sender<bool>> = trace.iter().map(|_| watch::Sender::new(false)).collect();
    let start = Instant::now();
    let requests = trace.iter().enumerate().map(|(at, request)| {
        let (client, ended) = (&client, &ended);
        async move {
            let before = trace[..at].iter().enumerate().filter(|(_, other)| other.end <= request.start);
            let mut thinking_since: f64 = 0.0;
            for (other, earlier) in before {
                thinking_since = thinking_since.max(earlier.end);
                ended[other].subscribe().wait_for(|ended| *ended).await?;
            }
            tokio::time::sleep(Duration::from_secs_f64((request.start - thinking_since) * PACE)).await;
            perform(client, request).await.map_err(|error| anyhow::anyhow!("{request:?}: {error}"))?;
            ended[at].send_replace(true);
            Ok::<(), anyhow::Error>(())
        }
    });
    try_join_all(requests).await?;
    let seconds = start.elapsed().as_secs_f64();
    check(&client, trace, content).await?;
    client.disconnect().await?;
    Ok(seconds)
}

async fn perform(client: &NbdClient, request: &Request) -> Result<(), NbdError> {
    let can = |flag: u16| client.flags() & flag != 0;
    match request.op {
        Op::Read => client.read(request.offset, request.len as usize).await.map(drop),
        Op::Write => client.write(request.offset, &vec![0x5a; request.len as usize], 0).await,
        // What a server does not offer a guest does in another way.
        Op::Zero if !can(SEND_WRITE_ZEROES) => {
            client.write(request.offset, &vec![0; request.len as usize], 0).await
        }
        Op::Trim if !can(SEND_TRIM) => Ok(()),
        Op::Zero => client.write_zeroes(request.offset, request.len, 0).await,
        Op::Trim => client.trim(request.offset, request.len, 0).await,
        Op::Flush => client.flush().await,
    }
}

/// A read of the trace that no write met must give the origin's bytes.
async fn check(client: &NbdClient, trace: &[Request], content: &Content) -> anyhow::Result<()> {
    let meets = |one: &Request, other: &Request| {
        one.offset < other.offset + other.len && other.offset < one.offset + one.len
    };
    let (reads, writes): (Vec<_>, Vec<_>) = trace.iter().partition(|request| matches!(request.op, Op::Read));
    let mut untouched = reads.iter().filter(|read| !writes.iter().any(|write| meets(read, write)));
    for read in untouched.by_ref().step_by(20) {
        let data = client.read(read.offset, read.len as usize).await?;
        anyhow::ensure!(
            data == content.bytes(read.offset..read.offset + read.len),
            "wrong bytes at {}",
            read.offset
        );
    }
    Ok(())
}
