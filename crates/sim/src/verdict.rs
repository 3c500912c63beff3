//! Verdict: what must be true of the files after a power loss and at the end.
//!
//! - The format's own check finds nothing broken; sampled, `qemu-img check` finds the same.
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

/// Whether what says who shares a cluster may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    /// Never.
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
    // Where refcounts are said to be wrong, they are what every writer makes of them.
    let file = Arc::new(file.crash_with(|_| true));
    let readable: Arc<dyn ReadAt> = file.clone();
    let storage: Arc<dyn Storage> = file.clone();
    let (report, marked) = exec.run(async move {
        let description = asked.describe(&storage).await.expect("it is an image");
        let dirty_refcounts = asked.format == "qcow2" && description.dirty;
        if dirty_refcounts || look.flags == Flags::MayLag {
            let mended = asked.driver().repair(&storage, Repair::All).await.expect("the repair runs");
            assert_sound(&mended, Leaks::None, "what a repair leaves");
        }
        let report = asked.driver().check(&readable).await.expect("the check runs");
        (report, description.dirty || description.in_use)
    });
    // What a crash left may outlive a close that came before it was reclaimed: the mark then says so.
    let leaks = if marked { Leaks::Allowed } else { look.leaks };
    assert_sound(&report, leaks, "check");
    if look.qemu == Qemu::Ask
        && let Some(report) = ask_qemu(layout, &file)
    {
        assert_sound(&report, leaks, "qemu-img check");
    }
}

fn assert_sound(report: &CheckReport, leaks: Leaks, who: &str) {
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{who}: {report:?}");
    if leaks == Leaks::None {
        assert_eq!(report.leaks, 0, "{who}: {report:?}");
    }
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
