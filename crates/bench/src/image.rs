//! Images to serve.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::Context as _;
use readonce_format::driver::{BackingRef, CreateSpec, driver};
use readonce_storage::{LocalFile, Storage, local::OpenMode};
use readonce_testkit::nbd_client::lean::{Op, Pattern, Until, Workload};

use crate::{bench::Bench, server::Launch};

/// Bytes of a cluster, QED's and qcow2's default.
pub const CLUSTER: u64 = 64 * 1024;

/// An empty QED image over the raw file at `url`, as `readonce create` makes it, but not pinned yet.
pub async fn overlay(bench: &Bench, name: &str, url: &str, size: u64) -> anyhow::Result<PathBuf> {
    let backing = BackingRef { name: url.to_owned(), format: Some("raw".to_owned()) };
    let options = vec![("copy_on_read".to_owned(), Some("on".to_owned()))];
    create(bench, name, CreateSpec { size, backing: Some(backing), options, ..CreateSpec::default() }).await
}

/// The same in `format`, made by `qemu-img`.
pub fn qemu_overlay(
    bench: &Bench,
    name: &str,
    format: &str,
    url: &str,
    size: u64,
) -> anyhow::Result<PathBuf> {
    let path = bench.path(name);
    remove(&path)?;
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-u", "-f", format, "-F", "raw", "-b", url])
        .arg(&path)
        .arg(size.to_string())
        .output()?;
    anyhow::ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(path)
}

/// A QED image without backing, all of whose clusters were written once, in order, a cluster at a time as fills do it. It
/// stays in the page cache.
pub async fn full(bench: &Bench, name: &str, size: u64) -> anyhow::Result<PathBuf> {
    let path = create(bench, name, CreateSpec { size, ..CreateSpec::default() }).await?;
    let server = Launch::ours(bench, &path, &[]).start()?;
    let size_of_one = u32::try_from(CLUSTER)?;
    let until = Until::Count(size / CLUSTER);
    let pattern = Pattern::Sequential;
    server.load(Workload { op: Op::Write, size: size_of_one, depth: 4, pattern, span: size, until }, 0)?;
    server.stop()?;
    OpenOptions::new().write(true).open(&path)?.sync_all()?;
    Ok(path)
}

/// A QED image all of whose L2 tables exist. In each, every eighth page of 4 KiB is full of entries, the rest are holes: so a
/// random read needs a table that it has not seen, and 1 of 8 has data, in a sparse file.
pub async fn tables_exist(bench: &Bench, name: &str, size: u64) -> anyhow::Result<PathBuf> {
    const TABLE: u64 = 4 * CLUSTER;
    const ENTRIES: u64 = TABLE / 8;
    const PAGE: u64 = 4096;
    let path = create(bench, name, CreateSpec { size, ..CreateSpec::default() }).await?;
    let file = OpenOptions::new().write(true).open(&path)?;
    let l1_offset = CLUSTER;
    let tables = size.div_ceil(ENTRIES * CLUSTER);
    let l2_start = l1_offset + TABLE;
    let mut next_cluster = l2_start + tables * TABLE;
    let mut l1 = Vec::new();
    for table in 0..tables {
        let at = l2_start + table * TABLE;
        l1.extend(at.to_le_bytes());
        for page in (0..TABLE / PAGE).step_by(8) {
            let mut entries = Vec::with_capacity(PAGE as usize);
            for _ in 0..PAGE / 8 {
                entries.extend(next_cluster.to_le_bytes());
                next_cluster += CLUSTER;
            }
            file.write_all_at(&entries, at + page * PAGE)?;
        }
    }
    file.write_all_at(&l1, l1_offset)?;
    file.set_len(next_cluster)
        .context("the file system does not take a file of 2 TiB, though it is sparse")?;
    file.sync_all()?;
    Ok(path)
}

async fn create(bench: &Bench, name: &str, spec: CreateSpec) -> anyhow::Result<PathBuf> {
    let path = bench.path(name);
    remove(&path)?;
    let file: Arc<dyn Storage> = Arc::new(LocalFile::open(&path, OpenMode::CreateNew)?);
    let driver = driver("qed").context("there is no format qed")?;
    driver.create(&file, None, &spec).await?;
    Ok(path)
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
