//! Lost writes: a storm of reads, writes, zeroes, trims and flushes that race with fills over a slow origin.
//!
//! - The storm comes in epochs, each on an image with nothing local, because fills are what writes race with.
//! - After each epoch everything is read; then the image is closed, opened again, and read again.

use std::time::{Duration, Instant};

use bytes::Bytes;
use readonce_testkit::{Content, FaultyOrigin, LinkSpec, OriginSpec};

use super::race_storm::{Storm, clients};
use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value},
    image,
    server::Launch,
};

const SIZE: u64 = 48 << 20;
const REQUESTS: u64 = 1_000_000;
const EPOCH_REQUESTS: u64 = 20_000;
/// Peers get less: what they do shows early.
const PEER_REQUESTS: u64 = 40_000;
/// An epoch that takes longer hangs.
const EPOCH_TIME_MAX: Duration = Duration::from_secs(120);

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let link = Some(LinkSpec::new(400, 10));
    let content = Content::Given(Bytes::from(Storm::backing(SIZE)));
    let origin = FaultyOrigin::start(OriginSpec { link, ..OriginSpec::new(content) }).await?;
    super::allow_head(&origin);
    let url = origin.url();

    let requests = bench.amount(REQUESTS);
    let mut ours = Vec::new();
    for (format, kinds) in [("qed", &[image::QED][..]), ("qcow2", &[image::QCOW2, image::QCOW2_EXTENDED][..])]
    {
        let start = Instant::now();
        let mut outcome = Outcome::default();
        for kind in kinds.iter().copied().cycle() {
            if outcome.requests >= requests || outcome.has_ended() {
                break;
            }
            let image = image::overlay(bench, "races.image", kind, &url, SIZE).await?;
            let launch = || Launch::ours(bench, &image, &["--copy-on-read=on"]);
            outcome.epoch(launch, EPOCH_REQUESTS.min(requests), Reopen::Yes).await?;
        }
        bench.say(&format!("ours, {format}: {outcome:?}, {:.0} s", start.elapsed().as_secs_f64()));
        ours.push((format, outcome));
    }

    let qemu_missing = bench.missing(&[Tool::QemuImg, Tool::QemuStorageDaemon, Tool::QemuCurl]);
    let mut peers = Vec::new();
    let kinds =
        [("nbdkit cow", None), ("QEMU on qed", Some(image::QED)), ("QEMU on qcow2", Some(image::QCOW2))];
    for (name, kind) in kinds {
        let missing = if kind.is_none() { bench.missing(&[Tool::Nbdkit]) } else { qemu_missing.clone() };
        if let Some(missing) = missing {
            peers.push((name, Value::Words(missing)));
            continue;
        }
        let mut outcome = Outcome::default();
        while outcome.requests < bench.amount(PEER_REQUESTS) && !outcome.has_ended() {
            match kind {
                None => {
                    // Its overlay is a temporary file: there is nothing to open again.
                    let launch = || Launch::nbdkit(bench, &url, image::CLUSTER);
                    outcome.epoch(launch, EPOCH_REQUESTS.min(requests), Reopen::No).await?;
                }
                Some(kind) => {
                    let image = image::qemu_overlay(bench, "races.peer", kind, &url, SIZE)?;
                    let launch = || Launch::qemu_copy_on_read(bench, &image, kind.format, &url);
                    outcome.epoch(launch, EPOCH_REQUESTS.min(requests), Reopen::Yes).await?;
                }
            }
        }
        bench.say(&format!("{name}: {outcome:?}"));
        peers.push((name, outcome.value()));
    }
    let figures = ours.iter().map(|(format, outcome)| Figure {
        row: "races",
        what: format!("{format}: sectors lost in {requests} racing requests over a slow origin"),
        unit: "",
        ours: outcome.value(),
        peers: peers.clone(),
        target: Target::AtMost(0.0),
        note: format!("peers: {}", bench.amount(PEER_REQUESTS)),
    });
    Ok(figures.collect())
}

/// Whether the image can be opened again after the storm.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reopen {
    Yes,
    No,
}

#[derive(Debug, Default)]
struct Outcome {
    requests: u64,
    wrong: u64,
    first_wrong: Option<String>,
    ended: Option<String>,
}

impl Outcome {
    fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    fn value(&self) -> Value {
        match &self.ended {
            None => Value::Number(self.wrong as f64),
            Some(how) => Value::Words(format!("{how} after {} requests, {} lost", self.requests, self.wrong)),
        }
    }

    /// One storm. What the server does wrong is kept; an error is one of the benchmark itself.
    async fn epoch(
        &mut self,
        launch: impl Fn() -> Launch,
        requests: u64,
        reopen: Reopen,
    ) -> anyhow::Result<()> {
        let storm = Storm::new(SIZE, requests);
        let mut server = launch().start()?;
        let connections = clients(&server).await?;
        let raged = tokio::time::timeout(EPOCH_TIME_MAX, storm.rage(&connections, self.requests)).await;
        self.requests += storm.done();
        self.wrong += storm.wrong();
        self.first_wrong = self.first_wrong.take().or(storm.first_wrong());
        match raged {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                let how = match server.ended()? {
                    Some(status) => format!("ended with {status}"),
                    None => format!("a request failed ({error})"),
                };
                self.ended = Some(format!("{how}: {}", server.log()));
                return Ok(());
            }
            Err(_) => {
                self.ended = Some("hangs".to_owned());
                return Ok(());
            }
        }
        for client in connections {
            client.disconnect().await?;
        }
        if let Err(error) = server.stop() {
            self.ended = Some(error.to_string());
            return Ok(());
        }
        if reopen == Reopen::Yes {
            let before = storm.wrong();
            let server = launch().start()?;
            let client = server.connect().await?;
            storm.read_all(&client).await?;
            client.disconnect().await?;
            server.stop()?;
            self.wrong += storm.wrong() - before;
            self.first_wrong =
                self.first_wrong.take().or(storm.first_wrong().map(|wrong| format!("opened again: {wrong}")));
        }
        Ok(())
    }
}
