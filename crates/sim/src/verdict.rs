//! Verdict: what must be true of the files after a power loss and at the end.
//!
//! - The format's own check finds nothing broken; sampled, `qemu-img check` finds the same.
//! - Where qcow2's incompatible dirty bit is set, refcounts and flags may say anything, and a repair leaves nothing of that.
//! - Version 2 has no such bit. A change of its snapshots that was cut off, or damage to any image, may leave leaks, and COPIED flags
//!   missing where the refcount is 1: those are counted here, and nothing else may be wrong. No flag where the refcount is above 1, no reference without a refcount.
//! - Opened again, every cell reads as the model says. What looking does to the image is not kept.
//!
//! Not here: what the model says (`model`).

use std::{any::Any, process::Command, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::{
    BlockDevice, DeviceError, Disk, Top, ZeroMode,
    chain::{ChainOptions, CopyOnRead},
};
use readonce_format::driver::{CheckReport, Repair};
use readonce_storage::{ReadAt, SimFile, Storage};
use readonce_testkit::exec::Exec;

use crate::{
    guest::Shared,
    server::Server,
    shape::Layout,
    world::{Disks, OpenAs, Way, World},
};

/// Whether clusters may have leaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaks {
    /// Not one: it was closed clean.
    None,
    /// After a power loss they may.
    Allowed,
}

/// Whether flags that say that nobody shares a cluster may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    /// Not one.
    Right,
    /// Until a repair: a change of the snapshots was cut off, and version 2 of qcow2 has no bit that says so; or damage left
    /// two entries with one cluster, which lack the flag when one of them is written.
    MayLag,
}

/// Whether QEMU is asked as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qemu {
    /// `qemu-img check`.
    Ask,
    /// Not this time.
    Leave,
}

/// How the files are looked at.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Draws how they are opened and read.
    pub seed: u64,
    /// What the check may find.
    pub leaks: Leaks,
    /// What it may find in the image below.
    pub leaks_below: Leaks,
    /// What a cut off change left.
    pub flags: Flags,
    /// The second judge.
    pub qemu: Qemu,
    /// It may have grown to so many cells, or not.
    pub may_have: Option<u64>,
}

/// Checks and reads all of it; from then on the model knows what each cell holds.
///
/// # Panics
/// When something is not as it must be.
pub fn judge(world: &Arc<World>, disks: &Disks, shared: &Arc<Mutex<Shared>>, look: Look) {
    let mut rng = SmallRng::seed_from_u64(look.seed);
    let exec = Exec::new(rng.random());
    // What is read here was kept: the copy holds all of it.
    let copy = disks.map(|file| file.crash_with(|_| true));
    check(&exec, &world.shape.top, &copy.top, look);
    if let (Some(middle), Some(file)) = (&world.shape.middle, &copy.middle) {
        check(&exec, &middle.layout, file, Look { leaks: look.leaks_below, ..look });
    }
    let way = if rng.random() { Way::Chain } else { Way::Hand };
    let how = OpenAs { copy_on_read: rng.random(), budget: 64 << 20, way };
    let read_only = rng.random_range(0..4) == 0;
    let step = 1 << rng.random_range(9..17);
    let bytes = {
        let (world, inner, server) = (Arc::clone(world), Arc::clone(&exec), world.server(exec.rt(), 0));
        exec.run(async move {
            let (disk, _kept) = open(&world, &copy, &inner, &server, how, read_only).await;
            let bytes = read_all(&disk, step).await;
            if read_only {
                is_untouched(&disk, &copy).await;
            }
            // Its tasks are dropped; nothing is owed to them.
            (bytes, disk.size())
        })
    };
    exec.power_off();
    let (bytes, size) = bytes;
    let mut shared = shared.lock();
    let cells = size / shared.model.cell_size();
    if look.may_have == Some(cells) {
        shared.model.grow(cells);
    }
    assert_eq!(cells, shared.model.cell_count(), "the size is kept");
    shared.digest.add_bytes(&bytes);
    shared.model.restart(0, &bytes);
    shared.model.end_restart();
}

/// The images as a disk; what stands beside it keeps it open.
async fn open(
    world: &World,
    disks: &Disks,
    exec: &Arc<Exec>,
    server: &Arc<Server>,
    how: OpenAs,
    read_only: bool,
) -> (Arc<Disk>, Box<dyn Any + Send>) {
    if !read_only {
        let opened = world.open(disks, exec, server, how).await.expect("the images open");
        return (Arc::clone(&opened.disk), Box::new(opened));
    }
    if how.way == Way::Hand {
        let (source, size) = world.open_to_read(disks, exec, server).await.expect("the images open");
        return (Arc::new(Disk::new(Top::Base(source, size), true)), Box::new(()));
    }
    let options = ChainOptions { read_only: true, copy_on_read: CopyOnRead::Off, ..ChainOptions::default() };
    let mounted = world.mount(disks, exec, server, options).await.expect("the images open");
    (Arc::clone(&mounted.chain.disk), Box::new(mounted))
}

async fn read_all(disk: &Disk, step: u64) -> Bytes {
    let size = disk.size();
    let mut all = Vec::with_capacity(size as usize);
    while (all.len() as u64) < size {
        let at = all.len() as u64;
        let len = step.min(size - at) as usize;
        let mut part = vec![0xee; len];
        match disk.read_now(at, &mut part) {
            Some(read) => read.expect("all of it can be read"),
            None => part = disk.read(at, len).await.expect("all of it can be read").into(),
        }
        all.extend(part);
    }
    all.into()
}

/// What was opened to be read cannot be written, and was not.
async fn is_untouched(disk: &Disk, disks: &Disks) {
    let refused = |result| assert!(matches!(result, Err(DeviceError::ReadOnly)), "{result:?}");
    let cell = 512.min(disk.size());
    let mode = ZeroMode { keep_space: false, only_if_fast: false };
    assert!(disk.read_only());
    refused(disk.write(0, vec![1; cell as usize].into()).await);
    refused(disk.write_zeroes(0, cell, mode).await);
    refused(disk.trim(0, cell).await);
    disk.flush().await.expect("nothing is owed");
    disk.cache(0, disk.size()).await.expect("nothing is kept");
    let status = disk.status(0, disk.size(), 16).await.expect("it can be read");
    assert!(status.iter().all(|extent| extent.len > 0) && !status.is_empty());
    assert_eq!(disks.top.unsynced_count(), 0, "reading writes nothing");
}

pub(crate) fn check(exec: &Arc<Exec>, layout: &Layout, file: &Arc<SimFile>, look: Look) {
    if layout.format == "raw" {
        // Nothing in it could be wrong.
        return;
    }
    let asked = layout.clone();
    let mended = Arc::new(file.crash_with(|_| true));
    let storage: Arc<dyn Storage> = mended.clone();
    let description = exec.run(async move {
        let description = asked.describe(&storage).await.expect("it is an image");
        asked.is_described(&description);
        let dirty_refcounts = asked.format == "qcow2" && description.dirty;
        if dirty_refcounts || look.flags == Flags::MayLag {
            let report = asked.driver().repair(&storage, Repair::All).await.expect("the repair runs");
            assert_sound(&report, Leaks::None, 0, "what a repair leaves");
        }
        description
    });
    // Where refcounts are said to be wrong, they are what every writer makes of them.
    let dirty_refcounts = layout.format == "qcow2" && description.dirty;
    let file = if dirty_refcounts { mended } else { Arc::clone(file) };
    let readable: Arc<dyn ReadAt> = file.clone();
    let asked = layout.clone();
    let report = exec.run(async move { asked.driver().check(&readable).await.expect("the check runs") });
    // What a crash left may outlive a close that came before it was reclaimed: the mark then says so.
    let marked = description.dirty || description.in_use || look.flags == Flags::MayLag;
    let leaks = if marked { Leaks::Allowed } else { look.leaks };
    let missing = if look.flags == Flags::MayLag { flags_missing(&file) } else { 0 };
    assert_sound(&report, leaks, missing, "check");
    if look.qemu == Qemu::Ask
        && let Some(report) = ask_qemu(layout, &file)
    {
        assert_sound(&report, leaks, missing, "qemu-img check");
    }
}

/// `missing`: flags that are missing, which a check counts among the corruptions.
fn assert_sound(report: &CheckReport, leaks: Leaks, missing: u64, who: &str) {
    let found = (report.corruptions, report.check_errors);
    assert_eq!(found, (missing, 0), "{who}, {missing} flags are missing: {report:?}");
    if leaks == Leaks::None {
        assert_eq!(report.leaks, 0, "{who}: {report:?}");
    }
}

/// COPIED flags that are missing in the active tables of a qcow2 image, by a walk of our own; 0 for any other image.
fn flags_missing(file: &SimFile) -> u64 {
    let bytes = file.contents();
    let number = |at: u64, len: usize| -> u64 {
        let field = bytes.get(at as usize..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    };
    if !bytes.starts_with(b"QFI\xfb") {
        return 0;
    }
    let version_2 = number(4, 4) == 2;
    let (order, features) = if version_2 { (4, 0) } else { (number(96, 4), number(72, 8)) };
    let entry_bytes = if features & 1 << 4 != 0 { 16 } else { 8 };
    let cluster_size = 1 << number(20, 4);
    let refcount_table = number(48, 8);
    let refcount = |at: u64| {
        let (cluster, per_block) = (at / cluster_size, (cluster_size * 8) >> order);
        let bit = (cluster % per_block) << order;
        match number(refcount_table + cluster / per_block * 8, 8) {
            0 => 0,
            block if order >= 3 => number(block + bit / 8, 1 << (order - 3)),
            block => number(block + bit / 8, 1) >> (bit % 8) & ((1 << (1 << order)) - 1),
        }
    };
    let (copied, compressed, offset) = (1 << 63, 1 << 62, 0x00ff_ffff_ffff_fe00);
    let lacks = |entry: u64| {
        let named = entry & offset;
        u64::from(entry & (copied | compressed) == 0 && named != 0 && refcount(named) == 1)
    };
    let l1 = number(40, 8);
    let mut missing = 0;
    for at in (l1..l1 + number(36, 4) * 8).step_by(8) {
        let entry = number(at, 8);
        missing += lacks(entry);
        let table = entry & offset;
        if table != 0 {
            missing += (table..table + cluster_size)
                .step_by(entry_bytes)
                .map(|at| lacks(number(at, 8)))
                .sum::<u64>();
        }
    }
    missing
}

/// Whether `qemu-img` is there.
pub fn qemu_is_there() -> bool {
    Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success())
}

fn ask_qemu(layout: &Layout, file: &SimFile) -> Option<CheckReport> {
    // QEMU 10.0.2 opens no QED image whose tables have one cluster ("QED table offset is invalid"), also of those that it makes.
    if layout.format == "qed" && file.contents().get(8..12) == Some(&1_u32.to_le_bytes()) {
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder for an image");
    let path = folder.path().join("image");
    std::fs::write(&path, file.contents()).expect("room for an image");
    // What lies behind it is not there, and a check does not need it.
    let mut opened = serde_json::json!({
        "driver": layout.format,
        "file": { "driver": "file", "filename": path },
        "backing": null,
    });
    if layout.data_file {
        // Its contents do not matter to a check.
        let path = folder.path().join("data.raw");
        std::fs::write(&path, []).expect("room for a file");
        opened["data-file"] = serde_json::json!({ "driver": "file", "filename": path });
    }
    let output = Command::new("qemu-img")
        .args(["check", "--output", "json"])
        .arg(format!("json:{opened}"))
        .output()
        .expect("qemu-img runs");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
        panic!("qemu-img check: {}", String::from_utf8_lossy(&output.stderr));
    });
    let number = |name: &str| json.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    Some(CheckReport {
        check_errors: number("check-errors"),
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        ..CheckReport::default()
    })
}
