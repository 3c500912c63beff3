//! A write does not wait for the network: its latency while the cluster that it goes into is being fetched.

use std::time::{Duration, Instant};

use readonce_testkit::{Content, Fault, FaultyOrigin, OriginSpec, When};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
    image::{self, CLUSTER},
    server::{Launch, Server},
};

/// What the link takes for anything.
const DELAY: Duration = Duration::from_secs(2);
const SIZE: u64 = 256 << 20;
const SECTORS: u64 = 4096;

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let rounds = if bench.quick { 1 } else { 5 };
    let content = Content::seeded(3, SIZE);

    let origin = FaultyOrigin::start(OriginSpec::new(content.clone())).await?;
    let image = image::overlay(bench, "write.qed", image::QED, &origin.url(), SIZE).await?;
    let server = Launch::ours(bench, &image, &["--copy-on-read=on"]).start()?;
    let ours = measure(&server, &origin, &content, rounds).await?;
    origin.heal();
    server.stop()?;

    let qemu = match bench.missing(&[Tool::QemuImg, Tool::QemuStorageDaemon, Tool::QemuCurl]) {
        Some(missing) => [Value::Words(missing.clone()), Value::Words(missing)],
        None => {
            let origin = FaultyOrigin::start(OriginSpec::new(content.clone())).await?;
            super::allow_head(&origin);
            let image = image::qemu_overlay(bench, "write.qcow2", image::QCOW2, &origin.url(), SIZE)?;
            let server = Launch::qemu_copy_on_read(bench, &image, "qcow2", &origin.url()).start()?;
            let found = measure(&server, &origin, &content, rounds).await?;
            origin.heal();
            server.stop()?;
            found.map(|found| Value::Number(median(&found)))
        }
    };
    let figures = ["whole", "in part"].into_iter().zip(ours).zip(qemu);
    Ok(figures
        .map(|((part, ours), qemu)| Figure {
            row: "write",
            what: format!("write to a cluster being fetched, {part}, link of 2 s"),
            unit: "ms",
            ours: Value::Number(median(&ours)),
            peers: vec![("QEMU copy-on-read on qcow2", qemu)],
            target: Target::Below(5.0),
            note: format!("median of {rounds}, slowest {:.1} ms", ours.iter().copied().fold(0.0, f64::max)),
        })
        .collect())
}

/// Milliseconds of each write of a whole cluster, and of each of part of one. Checks that they are there afterwards.
async fn measure(
    server: &Server,
    origin: &FaultyOrigin,
    content: &Content,
    rounds: u64,
) -> anyhow::Result<[Vec<f64>; 2]> {
    let (reader, writer) = (server.connect().await?, server.connect().await?);
    let mut found = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let seen = origin.log().len();
        origin.fault(When::always(), Fault::DelayHead(DELAY));
        for (at, (offset_in, len)) in [(0, CLUSTER), (CLUSTER / 2, SECTORS)].into_iter().enumerate() {
            let cluster = (round * 2 + at as u64 + 1) * (16 << 20);
            let fetching = tokio::spawn({
                let reader = reader.clone();
                async move { reader.read(cluster, SECTORS as usize).await }
            });
            // The request is under way once the origin has it; it is then held.
            while origin.log().len() <= seen + at {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let data = vec![0xa5; len as usize];
            let start = Instant::now();
            writer.write(cluster + offset_in, &data, 0).await?;
            found[at].push(start.elapsed().as_secs_f64() * 1000.0);
            let old = fetching.await??;
            let is_new = offset_in == 0 && old.iter().all(|byte| *byte == 0xa5);
            anyhow::ensure!(
                is_new || old == content.bytes(cluster..cluster + SECTORS),
                "the read got neither the old bytes nor the new ones"
            );
            let now = writer.read(cluster, CLUSTER as usize).await?;
            let mut expected = content.bytes(cluster..cluster + CLUSTER).to_vec();
            expected[offset_in as usize..(offset_in + len) as usize].fill(0xa5);
            anyhow::ensure!(now == expected, "the write was lost at {cluster}");
        }
        origin.heal();
        super::allow_head(origin);
    }
    Ok(found)
}
