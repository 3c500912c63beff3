//! Verdict: what must be true of the files after a power loss and at the end.
//!
//! - The format's own check finds nothing broken; sampled, `qemu-img check` finds the same.
//! - Where qcow2's incompatible dirty bit is set, refcounts and flags may say anything, and a repair leaves nothing of that.
//! - Version 2 has no such bit. A change of its snapshots that was cut off may leave leaks, and COPIED flags missing where the refcount
//!   is 1: those are counted here, and nothing else may be wrong. No flag where the refcount is above 1, no reference without a refcount.
//! - Opened again, every cell reads as the model says. What looking does to the image is not kept.
//!
//! Not here: what the model says (`model`).

use std::{process::Command, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::{Image, Source};
use readonce_format::driver::{CheckReport, Repair};
use readonce_origin::Class;
use readonce_storage::{ReadAt, SimFile, Storage};

use crate::{
    exec::Exec,
    guest::Shared,
    shape::Layout,
    world::{Disks, OpenAs, World},
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
    /// Until a repair: a change of the snapshots was cut off, and version 2 of qcow2 has no bit that says so.
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
        check(&exec, &middle.layout, file, look);
    }
    let how = OpenAs { copy_on_read: rng.random(), budget: 64 << 20 };
    let step = 1 << rng.random_range(9..17);
    let bytes = {
        let (world, inner, server) = (Arc::clone(world), Arc::clone(&exec), world.server(exec.rt(), 0));
        exec.run(async move {
            let opened = world.open(&copy, &inner, &server, how).await.expect("the images open");
            let bytes = read_all(&opened.top, step).await;
            // Its tasks are dropped; nothing is owed to them.
            (bytes, opened.top.size())
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

async fn read_all(image: &Arc<Image>, step: u64) -> Bytes {
    let size = image.size();
    let mut all = vec![0; size as usize];
    let mut at = 0;
    while at < size {
        let len = step.min(size - at);
        let mut place = |from: u64, bytes: Bytes| {
            all[from as usize..from as usize + bytes.len()].copy_from_slice(&bytes);
        };
        image.fetch(at..at + len, Class::Demand, &mut place).await.expect("all of it can be read");
        at += len;
    }
    all.into()
}

fn check(exec: &Arc<Exec>, layout: &Layout, file: &Arc<SimFile>, look: Look) {
    let asked = layout.clone();
    let mended = Arc::new(file.crash_with(|_| true));
    let storage: Arc<dyn Storage> = mended.clone();
    let description = exec.run(async move {
        let description = asked.describe(&storage).await.expect("it is an image");
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

/// COPIED flags that are missing in the active tables of a qcow2 image of version 2, by a walk of our own; 0 for any other image.
fn flags_missing(file: &SimFile) -> u64 {
    let bytes = file.contents();
    let number = |at: u64, len: usize| -> u64 {
        let field = bytes.get(at as usize..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    };
    if !bytes.starts_with(b"QFI\xfb") || number(4, 4) != 2 {
        return 0;
    }
    let cluster_size = 1 << number(20, 4);
    let refcount_table = number(48, 8);
    let refcount = |at: u64| {
        // Two bytes each.
        let (cluster, per_block) = (at / cluster_size, cluster_size / 2);
        match number(refcount_table + cluster / per_block * 8, 8) {
            0 => 0,
            block => number(block + cluster % per_block * 2, 2),
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
            missing += (table..table + cluster_size).step_by(8).map(|at| lacks(number(at, 8))).sum::<u64>();
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
