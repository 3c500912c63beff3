//! Mending: an image that something else damaged is looked at and repaired, while its disk fails.
//!
//! - Nothing that is done with a damaged image panics or hangs, and looking writes nothing.
//! - A cluster that could be read right before the repair can be read right after it, however often the repair was cut off.
//! - Where data is in a file of its own, that may be cut: nothing in the tables says how long it is.
//! - What a repair leaves is sound, and can be used.
//! - The model knows nothing of the other clusters: they are written anew, up to the end of the disk (QED seed 704040 and qcow2
//!   seed 2005818 grew it then, and saw what a damaged entry had brought in behind it).
//! - A check that counts something wrong has told of it.
//!
//! Not here: what is damaged (`damage`).

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::Source;
use readonce_format::{
    driver::{CheckReport, Repair, SnapshotChange},
    finding::Finding,
};
use readonce_origin::Class;
use readonce_storage::{ReadAt, SimFile, Storage};

use super::{CLOSE_WAIT, Run};
use readonce_testkit::exec::Exec;

use crate::{
    damage::damage,
    plan::DiskFault,
    shape::Layout,
    stamp,
    verdict::{Flags, Leaks},
    world::{Disks, OpenAs, Way},
};

/// Where the offset stands in an entry of qcow2.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Repairs that are cut off, at most, before one is let alone.
const CUT_OFF_MAX: u32 = 2;

/// Bytes by which a repaired image may grow: far more than all that is written into it.
const GROWN_MAX: u64 = 64 << 20;

impl Run {
    /// Damages the top and repairs it. What cannot be repaired is as if it had not happened.
    pub(super) fn damage(&mut self, seed: u64, fault: Option<&DiskFault>) {
        if self.world.shape.top.format == "raw" {
            // No table, and nothing that could be repaired.
            return;
        }
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut bytes = self.disks.top.contents();
        damage(self.world.shape.top.format, &mut bytes, &mut rng);
        // Files of its own: those of the run must be there again if nothing comes of this.
        let copies = self.disks.map(|file| file.crash_with(|_| true));
        let mut damaged = Disks { top: Arc::new(SimFile::from_bytes(&bytes)), ..copies };
        if let Some(data) = &mut damaged.data
            && rng.random_range(0..3) == 0
        {
            *data = Arc::new(cut(data, &mut rng));
        }
        let damaged = damaged;
        let (checked, good) = self.seen(&damaged, &mut rng);
        assert_eq!(damaged.top.unsynced_count(), 0, "looking writes nothing");

        let mut disks = damaged;
        if let Some(fault) = fault {
            for _ in 0..rng.random_range(1..=CUT_OFF_MAX) {
                disks.top.fail_nth(fault.nth, fault.fault, fault.lasts);
                let _ = self.repair(&disks, &mut rng);
                self.figures.faults += disks.top.fault_hits();
                let keep = rng.random();
                disks = disks.map(|file| file.crash(keep));
            }
        }
        let repaired = self.repair(&disks, &mut rng);
        let Ok(before) = checked else { return };
        if before.check_errors > 0 {
            return;
        }
        let report =
            repaired.unwrap_or_else(|error| panic!("what can be checked cannot be repaired: {error}"));
        let len = bytes.len() as u64;
        let grown = disks.top.len().saturating_sub(len);
        if report.corruptions > 0 && grown > len / 8 {
            // Copies of what is used twice have a bound.
            return;
        }
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{before:?} became {report:?}");
        let (again, kept) = self.seen(&disks, &mut rng);
        let again = again.unwrap_or_else(|error| panic!("what a repair leaves cannot be checked: {error}"));
        let found = (again.corruptions, again.check_errors, again.leaks);
        assert_eq!(found, (0, 0, report.leaks), "a second check disagrees");
        if let Some(lost) =
            (0..good.len()).find(|&cluster| good[cluster] && !kept.get(cluster).is_some_and(|kept| *kept))
        {
            panic!("cluster {lost} could be read before the repair, and is something else after it");
        }
        let sound = (self.disks.clone(), self.snapshots.clone(), self.flags, self.leaky);
        self.disks = disks;
        self.figures.mended += 1;
        self.tail_unknown = true;
        // Two entries may have one cluster, as with snapshots, after a repair that was cut off or by the damage itself: that is
        // sound. When one of them is written, the other lacks its flag; a power loss then can leave a refcount too high.
        self.flags = Flags::MayLag;
        self.leaky = true;
        let forgotten = self.forget_snapshots(&mut rng);
        let written = forgotten == Done::All && self.write_anew(&good, &mut rng) == Done::All;
        let grown = self.disks.top.len().saturating_sub(len);
        assert!(grown <= GROWN_MAX, "a repaired image grew by {grown} bytes");
        if !written {
            (self.disks, self.snapshots, self.flags, self.leaky) = sound;
            return;
        }
        self.look(Leaks::Allowed, None);
    }

    /// What a check says, and which clusters read as the model says; none where the image cannot be opened.
    fn seen(&self, disks: &Disks, rng: &mut SmallRng) -> (Result<CheckReport, String>, Vec<bool>) {
        let exec = Exec::new(rng.random());
        let (world, disks, inner) = (Arc::clone(&self.world), disks.clone(), Arc::clone(&exec));
        let stamps = self.shared.lock().model.stamps();
        let seen = exec.run(async move {
            let readable: Arc<dyn ReadAt> = disks.top.clone();
            let mut told = 0_u64;
            let mut tell = |finding: Finding| {
                assert!(!finding.to_string().is_empty(), "{finding:?}");
                told += 1;
            };
            let report = world.shape.top.driver().check_telling(&readable, &mut tell).await;
            let report = report.map_err(|error| error.to_string());
            if let Ok(report) = &report {
                let wrong = report.corruptions + report.check_errors + report.leaks;
                assert!(told > 0 || wrong == 0, "nothing was told of {report:?}");
            }
            let cells = world.shape.top.cluster_size / world.shape.cell;
            let server = world.server(inner.rt(), 0);
            // A pin that is to come would be a change.
            let late = world.shape.pinned_late && disks_pin(&world.shape.top, &disks).await.is_none();
            let opened = if late { None } else { world.open_to_read(&disks, &inner, &server).await.ok() };
            let Some((source, size)) = opened else { return (report, Vec::new()) };
            let mut good = Vec::new();
            for (first, stamps) in
                (0..).step_by(cells.max(1) as usize).zip(stamps.chunks(cells.max(1) as usize))
            {
                let (at, len) = (first * world.shape.cell, stamps.len() as u64 * world.shape.cell);
                good.push(at + len <= size && reads_as(&source, at, stamps, world.shape.cell).await);
            }
            (report, good)
        });
        exec.power_off();
        seen
    }

    fn repair(&self, disks: &Disks, rng: &mut SmallRng) -> Result<CheckReport, String> {
        let exec = Exec::new(rng.random());
        let (driver, file) = (self.world.shape.top.driver(), disks.top.clone());
        let repaired = exec.run(async move {
            let file: Arc<dyn Storage> = file;
            driver.repair(&file, Repair::All).await.map_err(|error| error.to_string())
        });
        exec.power_off();
        repaired
    }

    /// What the snapshots hold is not known any more.
    fn forget_snapshots(&mut self, rng: &mut SmallRng) -> Done {
        let exec = Exec::new(rng.random());
        let (layout, file) = (self.world.shape.top.clone(), self.disks.top.clone());
        let done = exec.run(async move { delete_snapshots(&layout, &(file as Arc<dyn Storage>)).await });
        if done == Done::All {
            self.snapshots.clear();
        }
        done
    }

    /// Writes what is not known.
    fn write_anew(&mut self, good: &[bool], rng: &mut SmallRng) -> Done {
        let exec = Exec::new(rng.random());
        let (world, disks, inner) = (Arc::clone(&self.world), self.disks.clone(), Arc::clone(&exec));
        let cell = world.shape.cell;
        let cells = (world.shape.top.cluster_size / cell).max(1);
        let stamps = Arc::new(Mutex::new(self.shared.lock().model.stamps()));
        let (number, told) = (self.shared.lock().model.next_write(), Arc::clone(&stamps));
        let good = good.to_vec();
        let written = exec.run(async move {
            let how = OpenAs { copy_on_read: false, budget: 64 << 20, way: Way::Hand };
            let server = world.server(inner.rt(), 0);
            let opened = world.open(&disks, &inner, &server, how).await.expect("what was repaired opens");
            let count = told.lock().len() as u64;
            for cluster in 0..count.div_ceil(cells) {
                if good.get(cluster as usize).is_some_and(|good| *good) {
                    continue;
                }
                let (first, end) = (cluster * cells, ((cluster + 1) * cells).min(count));
                let mut data = vec![0; ((end - first) * cell) as usize];
                stamp::fill(&mut data, cell, first, |at| stamp::of_write(number, at));
                match opened.top.write(first * cell, data.into()).await {
                    Err(error) if no_check_tells(&world.shape.top, disks.top.len(), &error.to_string()) => {
                        return Done::Refused;
                    }
                    written => written.expect("what was repaired can be written"),
                }
                (first..end).for_each(|at| told.lock()[at as usize] = stamp::of_write(number, at));
            }
            for closed in opened.close(CLOSE_WAIT).await {
                closed.expect("the disk is well");
            }
            Done::All
        });
        exec.power_off();
        if written == Done::Refused {
            return written;
        }
        self.shared.lock().model.replace(&stamps.lock());
        let keep = rng.random();
        self.disks = self.disks.map(|file| file.crash(keep));
        written
    }
}

/// What became of something that was to be done to all of a repaired image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    /// It was.
    All,
    /// No check tells what stands in the way: an L2 entry that readers and writers refuse, or a name that cannot be said.
    Refused,
}

/// Whether an error is about an entry that no check tells of: compressed bytes on a table, another place of a data file than its own,
/// or an L2 table that the end of the file cuts.
fn no_check_tells(layout: &Layout, file_len: u64, error: &str) -> bool {
    let word = error.split(" is 0x").nth(1).and_then(|rest| rest.split(',').next());
    let word = word.and_then(|word| u64::from_str_radix(word.split(' ').next()?, 16).ok());
    let Some(word) = word else { return false };
    let cut = || (word & OFFSET).saturating_add(layout.cluster_size) > file_len;
    match error {
        error if error.contains("L2 entry") => layout.data_file || word & 1 << 62 != 0,
        error => error.contains("L1 entry") && cut(),
    }
}

/// Deletes all snapshots, by their names as a person does it; none, where a name is no UTF-8 and so none that could be given.
async fn delete_snapshots(layout: &Layout, file: &Arc<dyn Storage>) -> Done {
    let snapshots = layout.describe(file).await.expect("it was repaired").snapshots;
    if snapshots.iter().any(|snapshot| snapshot.name.contains(char::REPLACEMENT_CHARACTER)) {
        return Done::Refused;
    }
    for snapshot in snapshots {
        let delete = SnapshotChange::Delete(snapshot.name);
        layout.driver().snapshot(file, &delete).await.expect("the image is sound");
    }
    Done::All
}

/// A data file without its end: a place between clusters or inside of one.
fn cut(file: &SimFile, rng: &mut SmallRng) -> SimFile {
    let mut bytes = file.contents();
    bytes.truncate(rng.random_range(0..=bytes.len() / 512) * 512);
    SimFile::from_bytes(&bytes)
}

/// Whether an image is pinned.
async fn disks_pin(layout: &Layout, disks: &Disks) -> Option<readonce_format::driver::Pin> {
    let file: Arc<dyn Storage> = disks.top.clone();
    layout.describe(&file).await.ok()?.pin
}

/// Whether all cells from byte `at` on are these.
async fn reads_as(source: &Arc<dyn Source>, at: u64, stamps: &[u64], cell: u64) -> bool {
    let mut bytes = vec![0; stamps.len() * cell as usize];
    let end = at + bytes.len() as u64;
    let mut place = |from: u64, part: Bytes| {
        bytes[(from - at) as usize..][..part.len()].copy_from_slice(&part);
    };
    let read = source.fetch(at..end, Class::Demand, &mut place).await;
    read.is_ok()
        && bytes
            .chunks_exact(cell as usize)
            .zip(stamps)
            .all(|(bytes, &stamp)| stamp::of_bytes(bytes) == Some(stamp))
}

#[cfg(test)]
mod tests {
    use readonce_format::driver::CreateSpec;

    use super::*;

    /// Seed 604475 of qcow2: the damage hit a name. Nobody's image was at stake; a sound repair was called a failure.
    #[test]
    fn a_snapshot_whose_name_is_no_utf8_is_left() {
        let layout = Layout::plain("qcow2", 4096);
        let file: Arc<dyn Storage> = Arc::new(SimFile::new());
        let exec = Exec::new(0);
        exec.run(async move {
            let spec = CreateSpec { size: 1 << 20, ..CreateSpec::default() };
            layout.driver().create(&file, None, &spec).await.expect("the image is made");
            let create = SnapshotChange::Create { name: "before".into(), date_sec: 0, date_nsec: 0 };
            layout.driver().snapshot(&file, &create).await.expect("there is room for one");
            let len = file.len();
            let bytes = file.read(0, len as usize).await.expect("the disk is well");
            let at = bytes.windows(6).position(|name| name == b"before").expect("it has the name") as u64;
            file.write(at, Bytes::from_static(&[0xff])).await.expect("the disk is well");
            assert_eq!(delete_snapshots(&layout, &file).await, Done::Refused);
            file.write(at, Bytes::from_static(b"B")).await.expect("the disk is well");
            assert_eq!(delete_snapshots(&layout, &file).await, Done::All);
        });
    }
}
