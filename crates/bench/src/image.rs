//! Images to serve.

use std::{
    fs::{File, OpenOptions},
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

/// What an image is to be: its format, and the options that differ from the format's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// As in `-f`.
    pub format: &'static str,
    /// As in `-o`.
    pub options: &'static [(&'static str, &'static str)],
}

/// QED as it is by default.
pub const QED: Kind = Kind { format: "qed", options: &[] };
/// qcow2 as it is by default.
pub const QCOW2: Kind = Kind { format: "qcow2", options: &[] };
/// qcow2 with subclusters of 4 KiB, as `readonce run` makes it.
pub const QCOW2_EXTENDED: Kind =
    Kind { format: "qcow2", options: &[("extended_l2", "on"), ("cluster_size", "131072")] };

/// An empty image over the raw file at `backing`, a URL or a path, as `readonce create` makes it, but not pinned yet.
pub async fn overlay(
    bench: &Bench,
    name: &str,
    kind: Kind,
    backing: &str,
    size: u64,
) -> anyhow::Result<PathBuf> {
    let backing = BackingRef { name: backing.to_owned(), format: Some("raw".to_owned()) };
    let mut options = vec![("copy_on_read".to_owned(), Some("on".to_owned()))];
    options.extend(kind.options.iter().map(|&(name, value)| (name.to_owned(), Some(value.to_owned()))));
    let spec = CreateSpec { size, backing: Some(backing), options, ..CreateSpec::default() };
    create(bench, name, kind.format, spec).await
}

/// The same, made by `qemu-img`.
pub fn qemu_overlay(
    bench: &Bench,
    name: &str,
    kind: Kind,
    backing: &str,
    size: u64,
) -> anyhow::Result<PathBuf> {
    let path = bench.path(name);
    remove(&path)?;
    let options = kind.options.iter().flat_map(|(name, value)| ["-o".to_owned(), format!("{name}={value}")]);
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-u", "-f", kind.format, "-F", "raw", "-b", backing])
        .args(options)
        .arg(&path)
        .arg(size.to_string())
        .output()?;
    anyhow::ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(path)
}

/// An image without backing, all of whose clusters were written once, in order, a cluster at a time as fills do it. It
/// stays in the page cache.
pub async fn full(bench: &Bench, name: &str, format: &str, size: u64) -> anyhow::Result<PathBuf> {
    let path = create(bench, name, format, CreateSpec { size, ..CreateSpec::default() }).await?;
    let server = Launch::ours(bench, &path, &["-f", format]).start()?;
    let size_of_one = u32::try_from(CLUSTER)?;
    let until = Until::Count(size / CLUSTER);
    let pattern = Pattern::Sequential;
    server.load(Workload { op: Op::Write, size: size_of_one, depth: 4, pattern, span: size, until }, 0)?;
    server.stop()?;
    OpenOptions::new().write(true).open(&path)?.sync_all()?;
    Ok(path)
}

const PAGE: u64 = 4096;

/// Has the page cache hold a file in single pages, read one by one.
pub fn cache_in_pages(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut page = [0; PAGE as usize];
    for at in (0..file.metadata()?.len() / PAGE).map(|page| page * PAGE) {
        file.read_exact_at(&mut page, at)?;
    }
    Ok(())
}

/// An image all of whose L2 tables exist. In each, every eighth page of 4 KiB is full of entries, the rest are holes: so a
/// random read needs a table that it has not seen, and 1 of 8 has data, in a sparse file.
pub async fn tables_exist(bench: &Bench, name: &str, format: &str, size: u64) -> anyhow::Result<PathBuf> {
    let path = create(bench, name, format, CreateSpec { size, ..CreateSpec::default() }).await?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    match format {
        "qed" => qed_tables(&file, size)?,
        _ => qcow2_tables(&file, size)?,
    }
    file.sync_all()?;
    Ok(path)
}

fn qed_tables(file: &File, size: u64) -> anyhow::Result<()> {
    const TABLE: u64 = 4 * CLUSTER;
    const ENTRIES: u64 = TABLE / 8;
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
    // As another program makes it: what we said in the autoclear bits of where the file ends is not true any more.
    file.write_all_at(&[0; 8], 32)?;
    set_len(file, next_cluster)
}

/// Refcounts of 16 bits, all 1 up to the end of the file; the refcount block that the image had is left over.
fn qcow2_tables(file: &File, size: u64) -> anyhow::Result<()> {
    const ENTRIES: u64 = CLUSTER / 8;
    const COPIED: u64 = 1 << 63;
    const BLOCK_ENTRIES: u64 = CLUSTER / 2;
    let mut header = [0; 72];
    file.read_exact_at(&mut header, 0)?;
    let field = |at: usize| -> anyhow::Result<u64> {
        Ok(u64::from_be_bytes(header[at..at + 8].try_into().context("eight bytes")?))
    };
    let (l1_offset, refcount_table_offset) = (field(40)?, field(48)?);
    let tables = size.div_ceil(ENTRIES * CLUSTER);
    let data_clusters = tables * ENTRIES / 8;
    let l2_start = file.metadata()?.len().next_multiple_of(CLUSTER);
    let blocks_start = l2_start + tables * CLUSTER;
    let other_clusters = blocks_start / CLUSTER + data_clusters;
    let blocks = other_clusters.div_ceil(BLOCK_ENTRIES - 1);
    let mut next_cluster = blocks_start + blocks * CLUSTER;
    let mut l1 = Vec::new();
    for table in 0..tables {
        let at = l2_start + table * CLUSTER;
        l1.extend((at | COPIED).to_be_bytes());
        for page in (0..CLUSTER / PAGE).step_by(8) {
            let mut entries = Vec::with_capacity(PAGE as usize);
            for _ in 0..PAGE / 8 {
                entries.extend((next_cluster | COPIED).to_be_bytes());
                next_cluster += CLUSTER;
            }
            file.write_all_at(&entries, at + page * PAGE)?;
        }
    }
    let clusters = next_cluster / CLUSTER;
    let mut refcount_table = Vec::new();
    for block in 0..blocks {
        let ones = clusters.saturating_sub(block * BLOCK_ENTRIES).min(BLOCK_ENTRIES);
        let at = blocks_start + block * CLUSTER;
        refcount_table.extend(at.to_be_bytes());
        file.write_all_at(&[0, 1].repeat(ones as usize), at)?;
    }
    anyhow::ensure!(
        refcount_table.len() as u64 <= CLUSTER,
        "the refcount table of a new image is one cluster"
    );
    file.write_all_at(&refcount_table, refcount_table_offset)?;
    file.write_all_at(&l1, l1_offset)?;
    set_len(file, next_cluster)
}

fn set_len(file: &File, len: u64) -> anyhow::Result<()> {
    file.set_len(len).context("the file system does not take a file of 2 TiB, though it is sparse")
}

async fn create(bench: &Bench, name: &str, format: &str, spec: CreateSpec) -> anyhow::Result<PathBuf> {
    let path = bench.path(name);
    remove(&path)?;
    let file: Arc<dyn Storage> = Arc::new(LocalFile::open(&path, OpenMode::CreateNew)?);
    let driver = driver(format).with_context(|| format!("there is no format {format}"))?;
    driver.create(&file, None, &spec).await?;
    Ok(path)
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
