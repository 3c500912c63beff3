//! Syncs that fills cost: 64 clusters read one after the other within a second, then a clean end. Counted by strace.

use std::time::Instant;

use readonce_testkit::{Content, FaultyOrigin, OriginSpec};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value},
    image::{self, CLUSTER},
    server::{Launch, Server},
};

const FILLS: u64 = 64;
/// Clusters from one to the next.
const STRIDE: u64 = 16;
const SIZE: u64 = FILLS * STRIDE * CLUSTER;

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let strace = bench.missing(&[Tool::Strace]);
    let origin = FaultyOrigin::start(OriginSpec::new(Content::seeded(4, SIZE))).await?;
    super::allow_head(&origin);
    let mut slowest: f64 = 0.0;
    let mut ours = Vec::new();
    for kind in [image::QED, image::QCOW2] {
        ours.push(match &strace {
            Some(missing) => Value::Words(missing.clone()),
            None => {
                let name = format!("syncs.{}", kind.format);
                let image = image::overlay(bench, &name, kind, &origin.url(), SIZE).await?;
                // The first open pins the image and syncs for it: once in its life, and not for a fill.
                Launch::ours(bench, &image, &["--copy-on-read=on"]).start()?.stop()?;
                let launch = Launch::ours(bench, &image, &["--copy-on-read=on"]).counting_syncs(bench);
                Value::Number(fill(launch.start()?, &mut slowest).await? as f64)
            }
        });
    }
    let missing = strace.or(bench.missing(&[Tool::QemuImg, Tool::QemuStorageDaemon, Tool::QemuCurl]));
    let mut peers = Vec::new();
    for (name, kind) in
        [("QEMU copy-on-read on qed", image::QED), ("QEMU copy-on-read on qcow2", image::QCOW2)]
    {
        let format = kind.format;
        let value = match &missing {
            Some(missing) => Value::Words(missing.clone()),
            None => {
                let image =
                    image::qemu_overlay(bench, &format!("syncs-peer.{format}"), kind, &origin.url(), SIZE)?;
                let launch = Launch::qemu_copy_on_read(bench, &image, format, &origin.url());
                Value::Number(fill(launch.counting_syncs(bench).start()?, &mut slowest).await? as f64)
            }
        };
        peers.push((name, value));
    }
    // Groups close by the clock: a machine that is too busy gives ours more of them.
    let note = if slowest < 1.0 { String::new() } else { format!("the fills took {slowest:.1} s") };
    let figures = ours.into_iter().zip(["qed", "qcow2"]).map(|(ours, format)| Figure {
        row: "syncs",
        what: format!("{format}: syncs for {FILLS} fills within a second, until clean close"),
        unit: "",
        ours,
        peers: peers.clone(),
        target: Target::AtMost(4.0),
        note: note.clone(),
    });
    Ok(figures.collect())
}

async fn fill(server: Server, slowest: &mut f64) -> anyhow::Result<u64> {
    let client = server.connect().await?;
    let start = Instant::now();
    for fill in 0..FILLS {
        client.read(fill * STRIDE * CLUSTER, 4096).await?;
    }
    *slowest = slowest.max(start.elapsed().as_secs_f64());
    client.disconnect().await?;
    server.stop_and_count()
}
