//! Progress while an image is served, and the closing summary: on standard error, where a person looks on.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use readonce_disk::chain::{Chain, driver_of};
use readonce_format::Mapping;
use readonce_storage::{LocalFile, ReadAt, local::OpenMode};
use tokio::task::JoinHandle;

use crate::{human, report};

/// How often the line is drawn anew.
const TICK: Duration = Duration::from_millis(200);
/// How long counting local clusters may take at the end, of an image with many tables.
const COUNT_TIMEOUT: Duration = Duration::from_secs(2);

/// What was asked of the origins of a chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes.
    pub bytes: u64,
    /// Requests; none for files.
    pub requests: u64,
}

impl Fetched {
    /// By the origins opened so far.
    pub fn by(chain: &Chain) -> Self {
        let mut all = Self::default();
        for origin in chain.origins() {
            let stats = origin.stats();
            all.bytes += stats.bytes;
            all.requests += stats.requests;
        }
        all
    }
}

/// The line that moves.
pub struct Progress {
    bar: ProgressBar,
    task: JoinHandle<()>,
}

impl Progress {
    /// Draws what changes until it is dropped. Nothing is drawn where standard error is not a terminal.
    pub fn start(chain: Arc<Chain>) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        report::go_above(bar.clone());
        let started = Instant::now();
        let drawn = bar.clone();
        let task = tokio::spawn(async move {
            let mut last = Fetched::default();
            loop {
                tokio::time::sleep(TICK).await;
                let now = Fetched::by(&chain);
                if now == last {
                    // The terminal may be the command's, too: nothing is drawn without need.
                    continue;
                }
                let rate = (now.bytes - last.bytes) * 1000 / TICK.as_millis() as u64;
                last = now;
                drawn.set_message(format!(
                    "{} fetched in {}, {}/s, {}",
                    human::size(now.bytes),
                    human::counted(now.requests, "request"),
                    human::size(rate),
                    human::seconds(started.elapsed()),
                ));
                drawn.tick();
            }
        });
        Self { bar, task }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.task.abort();
        self.bar.finish_and_clear();
    }
}

/// The closing line. The image must be closed.
pub async fn summary(image: Option<&Path>, fetched: Fetched, time: Duration) -> String {
    let clusters = match image {
        Some(image) => tokio::time::timeout(COUNT_TIMEOUT, clusters(image)).await.ok().flatten(),
        None => None,
    };
    let clusters =
        clusters.map_or(String::new(), |(local, total)| format!("{local} of {total} clusters local, "));
    format!(
        "{clusters}{} fetched in {}, {}",
        human::size(fetched.bytes),
        human::counted(fetched.requests, "request"),
        human::seconds(time)
    )
}

/// Clusters that an image holds, and those that its size spans.
async fn clusters(image: &Path) -> Option<(u64, u64)> {
    let file: Arc<dyn ReadAt> = Arc::new(LocalFile::open(image, OpenMode::Read).ok()?);
    let driver = driver_of(&*file, None).await.ok()?;
    let cluster_size = driver.describe(&file).await.ok()?.cluster_size?;
    let mapper = driver.open(file).await.ok()?;
    let size = mapper.geometry().size;
    let (mut at, mut local) = (0, 0);
    while at < size {
        let extent = mapper.lookup(at, size - at).await.ok()?;
        if extent.mapping != Mapping::Absent {
            local += extent.len.div_ceil(cluster_size);
        }
        at += extent.len;
    }
    Some((local, size.div_ceil(cluster_size)))
}
