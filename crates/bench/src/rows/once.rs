//! Each byte once: what is asked of the origin, over what was read.
//!
//! 16 connections read at once, 4 KiB each, in the same and in neighbouring clusters; then they go elsewhere. What counts is the sum
//! of the ranges asked for, the one-byte probe apart.

use futures_util::future::try_join_all;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_testkit::{Content, FaultyOrigin, LinkSpec, OriginSpec};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value},
    image::{self, CLUSTER},
    server::{Launch, Server},
};

const READERS: usize = 16;
/// Clusters that the readers of one round share.
const NEIGHBOURS: u64 = 4;
/// Clusters from one round to the next: far enough that read-ahead of one is not what another wants.
const STRIDE: u64 = 64;
const READ: u64 = 4096;

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let rounds = if bench.quick { 4 } else { 64 };
    let size = rounds * STRIDE * CLUSTER;
    let content = Content::seeded(1, size);
    let link = Some(LinkSpec::new(100, 40));
    let spec = OriginSpec { link, ..OriginSpec::new(content.clone()) };

    let origin = FaultyOrigin::start(spec.clone()).await?;
    let image = image::overlay(bench, "once.qed", image::QED, &origin.url(), size).await?;
    let server = Launch::ours(bench, &image, &["--copy-on-read=on"]).start()?;
    let distinct = read(&server, &content, rounds).await?;
    server.stop()?;
    let ours = asked(&origin) as f64 / distinct as f64;

    let qemu = match bench.missing(&[Tool::QemuImg, Tool::QemuStorageDaemon, Tool::QemuCurl]) {
        Some(missing) => Value::Words(missing),
        None => {
            let origin = FaultyOrigin::start(spec).await?;
            super::allow_head(&origin);
            let image = image::qemu_overlay(bench, "once.qcow2", image::QCOW2, &origin.url(), size)?;
            let server = Launch::qemu_copy_on_read(bench, &image, "qcow2", &origin.url()).start()?;
            let distinct = read(&server, &content, rounds).await?;
            server.stop()?;
            Value::Number(asked(&origin) as f64 / distinct as f64)
        }
    };
    Ok(vec![Figure {
        row: "once",
        what: "bytes asked / bytes of distinct clusters read, 16 readers".to_owned(),
        unit: "×",
        ours: Value::Number(ours),
        peers: vec![("QEMU copy-on-read on qcow2", qemu)],
        target: Target::AtMost(1.0),
        note: String::new(),
    }])
}

/// Reads, checks what comes, and gives the bytes of the clusters that were touched.
async fn read(server: &Server, content: &Content, rounds: u64) -> anyhow::Result<u64> {
    let clients = try_join_all((0..READERS).map(|_| server.connect())).await?;
    let mut rng = SmallRng::seed_from_u64(1);
    for round in 0..rounds {
        let reads = clients.iter().zip(0_u64..).map(|(client, reader)| {
            let cluster = round * STRIDE + reader % NEIGHBOURS;
            let offset = cluster * CLUSTER + rng.random_range(0..CLUSTER / READ) * READ;
            async move {
                let data = client.read(offset, READ as usize).await?;
                anyhow::ensure!(
                    data == content.bytes(offset..offset + READ),
                    "wrong bytes at {offset}: {}",
                    server.log()
                );
                Ok(())
            }
        });
        try_join_all(reads).await?;
    }
    for client in clients {
        client.disconnect().await?;
    }
    Ok(rounds * NEIGHBOURS * CLUSTER)
}

fn asked(origin: &FaultyOrigin) -> u64 {
    let log = origin.log();
    let ranges = log.iter().filter_map(|entry| entry.range.as_ref());
    ranges.map(|range| range.end - range.start).filter(|len| *len > 1).sum()
}
