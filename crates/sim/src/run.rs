//! Run: a plan, done from its first session to its last.
//!
//! - What is wrong panics, with words for it. The same plan gives the same run, to the byte: its digest says so.
//!
//! Not here: what is drawn (`plan`), what must be true afterwards (`verdict`), images that are damaged (`mending`), what may be refused
//! (`asking` of a format, `mounting` of a chain), what is fetched and kept (`locality`).

mod asking;
mod locality;
mod mending;
mod mounting;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::LayerError;
use readonce_format::driver::{Repair, SnapshotChange};
use readonce_storage::{
    ReadAt, Storage,
    sim::{Fault, NowCalls},
};
use readonce_testkit::exec::{Digest, Exec};

use crate::{
    guest::{self, Faults, Guest, OF_READS, Shared, hits},
    model::{Ended, Model},
    plan::{Change, Changing, During, End, Op, Plan, Session, Which},
    remote::Packing,
    shape::Remote,
    verdict::{Flags, Leaks, Look, Qemu, judge},
    world::{Disks, OpenAs, Opened, Wanted, Way, World},
};

/// A close never waits longer for the origin, and time costs nothing.
const CLOSE_WAIT: Duration = Duration::from_secs(3600);

/// A bound of what is in flight that no session meets, bytes.
const PLENTY: u64 = 64 << 20;

/// Of so many looks, one is followed by opening the chain with options drawn without sense.
const MOUNTED: u32 = 4;

/// Turns of other tasks that a slow read or write of a disk waits for, at most.
const STALL_MAX: u32 = 400;

/// What runs did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Runs.
    pub runs: u64,
    /// Guest requests that ended.
    pub ops: u64,
    /// Power losses.
    pub crashes: u64,
    /// Images closed clean.
    pub closes: u64,
    /// Images that did not open, because their disks failed.
    pub refusals: u64,
    /// Changes of closed images that a fault or a power loss cut off.
    pub cut_changes: u64,
    /// Damaged images that were repaired.
    pub mended: u64,
    /// Faults of disks and origin that were met.
    pub faults: u64,
    /// Steps of the executor while guests were at work.
    pub polls: u64,
    /// Time while guests were at work: without what is only checking.
    pub working: Duration,
    /// Time in all.
    pub whole: Duration,
}

impl Figures {
    /// Takes others in.
    pub fn add(&mut self, other: &Self) {
        self.runs += other.runs;
        self.ops += other.ops;
        self.crashes += other.crashes;
        self.closes += other.closes;
        self.refusals += other.refusals;
        self.cut_changes += other.cut_changes;
        self.mended += other.mended;
        self.faults += other.faults;
        self.polls += other.polls;
        self.working += other.working;
        self.whole += other.whole;
    }
}

/// How a run is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// Of so many looks at the files, one asks QEMU; 0: none.
    pub qemu_every: u32,
}

/// The end of a run in which nothing was wrong.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// A mark of everything that happened.
    pub digest: u64,
    /// What it did.
    pub figures: Figures,
}

/// What goes from session to session.
struct Run {
    world: Arc<World>,
    disks: Disks,
    shared: Arc<Mutex<Shared>>,
    rng: SmallRng,
    watch: Watch,
    figures: Figures,
    /// Internal snapshots: name, and what the disk was.
    snapshots: BTreeMap<String, Vec<u64>>,
    snapshots_made: u64,
    renames: usize,
    /// Something happened that may leave leaks.
    leaky: bool,
    /// The same of the image below: until it is closed clean by who writes it, which not every session does.
    leaky_below: bool,
    /// Nobody knows what tables say of what lies behind the end: growth would show it.
    tail_unknown: bool,
    /// Something happened that may leave flags behind.
    flags: Flags,
}

/// Does all that a plan says.
///
/// # Panics
/// When something is wrong.
pub fn run(plan: &Plan, watch: Watch) -> Outcome {
    let start = Instant::now();
    let world = Arc::new(World::new(plan.shape.clone()));
    let disks = Disks::new(&plan.shape);
    let exec = Exec::new(plan.seed);
    let stamps = {
        let (world, disks, inner) = (Arc::clone(&world), disks.clone(), Arc::clone(&exec));
        exec.run(async move { world.create(&disks, &inner).await })
    };
    exec.power_off();
    let model = Model::new(plan.shape.cell, stamps);
    let mut run = Run {
        world,
        disks: disks.map(|file| file.crash(0)),
        shared: Arc::new(Mutex::new(Shared { model, digest: Digest::default(), ops: 0 })),
        rng: SmallRng::seed_from_u64(plan.seed ^ 0x5eed),
        watch,
        figures: Figures { runs: 1, ..Figures::default() },
        snapshots: BTreeMap::new(),
        snapshots_made: 0,
        renames: 0,
        leaky: false,
        leaky_below: false,
        tail_unknown: false,
        flags: Flags::Right,
    };
    plan.sessions.iter().for_each(|session| run.session(session));
    let shared = run.shared.lock();
    run.figures.ops = shared.ops;
    run.figures.whole = start.elapsed();
    Outcome { digest: shared.digest.value(), figures: run.figures }
}

impl Run {
    fn session(&mut self, session: &Session) {
        for (_, change) in &session.before {
            self.change(change);
        }
        let start = Instant::now();
        let punctual = self.rng.random_range(0..4) == 0;
        let exec = if punctual { Exec::punctual(session.schedule) } else { Exec::new(session.schedule) };
        let server = self.world.server(exec.rt(), 40);
        let way = if self.rng.random_range(0..3) == 0 { Way::Chain } else { Way::Hand };
        let how = OpenAs { copy_on_read: session.copy_on_read, budget: session.budget, way };
        server.arm(session.origin_faults.iter().map(|(_, fault)| *fault));
        // What has been looked up is read or written late: another guest may have taken it away and given it to a third.
        let stalls = self.rng.random_range(0..4) == 0;
        for file in self.disks.all() {
            file.set_yields(self.rng.random(), 2);
            if stalls {
                file.set_stalls(self.rng.random(), 16, STALL_MAX);
                file.set_now_calls(NowCalls::Random(self.rng.random()));
            } else if self.rng.random_range(0..4) == 0 {
                file.set_now_calls(NowCalls::Random(self.rng.random()));
            }
        }
        for (_, (which, fault)) in &session.disk_faults {
            self.disks.file(*which).fail_nth(fault.nth, fault.fault, fault.lasts);
        }
        let faults = Arc::new(Faults {
            server: Arc::clone(&server),
            own: self.disks.own(),
            below: self.disks.below(),
            scarce: session.budget < PLENTY && way == Way::Hand,
            lazy: way == Way::Chain,
            going: session
                .guests
                .iter()
                .flatten()
                .any(|(_, op)| matches!(op, Op::Abandon(..)) && op.changes().is_some()),
            latched: AtomicBool::new(false),
            punctual,
        });
        let opening = {
            let (world, disks) = (Arc::clone(&self.world), self.disks.clone());
            let (inner, server) = (Arc::clone(&exec), Arc::clone(&server));
            async move { world.open(&disks, &inner, &server, how).await }
        };
        let opened = match session.end {
            End::PowerLoss(During::Opening, polls, _) => exec.run_for(opening, polls),
            _ => Some(exec.run(opening)),
        };
        let closed = match (opened, session.end) {
            (None, _) => {
                self.figures.crashes += 1;
                false
            }
            (Some(Err(error)), _) => {
                let unpinned = self.world.shape.pinned_late && server.fault_hits() > 0;
                assert!(faults.disk() || unpinned, "the images do not open: {error}");
                self.figures.refusals += 1;
                false
            }
            (Some(Ok(opened)), End::PowerLoss(During::Closing, polls, _)) => {
                exec.run(self.guests(session, &exec, &opened, &faults));
                let fills_below = opened.fills_below();
                let clean = self.close(&exec, opened, &faults, Some(polls));
                self.leaky_below &= !(clean && fills_below);
                self.figures.crashes += 1;
                clean
            }
            (Some(Ok(opened)), End::PowerLoss(_, polls, _)) => {
                exec.run_for(self.guests(session, &exec, &opened, &faults), polls);
                self.figures.crashes += 1;
                false
            }
            (Some(Ok(opened)), End::Close { healed }) => {
                let before = locality::of(&exec, &opened.disk, self.world.shape.cell);
                exec.run(self.guests(session, &exec, &opened, &faults));
                let after = locality::of(&exec, &opened.disk, self.world.shape.cell);
                if faults.none_for_good() {
                    locality::judge(session, &self.world.shape, (&before, &after), server.sent_again());
                }
                if healed {
                    server.heal();
                    self.disks.all().for_each(|file| file.heal());
                }
                let fills_below = opened.fills_below();
                let clean = self.close(&exec, opened, &faults, None);
                self.leaky_below &= !(clean && fills_below);
                self.figures.closes += u64::from(clean);
                clean
            }
        };
        exec.power_off();
        self.figures.polls += exec.polls();
        let keep = match session.end {
            End::PowerLoss(_, _, keep) => keep,
            // After a clean close nothing is owed to luck either: the power goes now.
            End::Close { .. } => self.rng.random(),
        };
        let mut each = SmallRng::seed_from_u64(keep);
        self.figures.faults +=
            server.fault_hits() + self.disks.all().map(|file| file.fault_hits()).sum::<u64>();
        // What was cut off is reclaimed by the next close, but for a refcount that is too high beside references: of a snapshot, or of
        // several compressed clusters.
        let counts = self.snapshots_made > 0 || self.world.shape.top.packed != Packing::Plain;
        self.leaky |= counts && (!closed || faults.disk());
        self.leaky_below |= !closed;
        let leaks = if self.leaky || !closed { Leaks::Allowed } else { Leaks::None };
        self.disks = self.disks.map(|file| file.crash(each.random()));
        self.figures.working += start.elapsed();
        {
            let mut shared = self.shared.lock();
            shared.digest.add(exec.digest());
            self.disks.all().for_each(|file| shared.digest.add(file.len()));
        }
        self.look(leaks, None);
    }

    /// All guests of a session.
    fn guests(
        &self,
        session: &Session,
        exec: &Arc<Exec>,
        opened: &Opened,
        faults: &Arc<Faults>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let guest = Guest {
            disk: Arc::clone(&opened.disk),
            image: Arc::clone(&opened.top),
            shared: Arc::clone(&self.shared),
            faults: Arc::clone(faults),
            rt: exec.rt(),
            cell: self.world.shape.cell,
        };
        let ops = |guest: &Vec<_>| guest.iter().map(|&(_, op)| op).collect();
        guest::all(session.guests.iter().map(|list| (guest.clone(), ops(list))).collect(), exec.rt())
    }

    /// Closes, or is cut off after so many steps; whether all of it was clean.
    fn close(&self, exec: &Arc<Exec>, opened: Opened, faults: &Faults, polls_max: Option<u64>) -> bool {
        let bad_before = faults.server.bad_answers();
        let full = |files: &[_]| hits(files, &[Fault::NoSpace]);
        let full_before = [full(&faults.own), full(&faults.below)];
        let closing = async move { opened.close(CLOSE_WAIT).await };
        let ended = match polls_max {
            Some(polls) => exec.run_for(closing, polls),
            None => Some(exec.run(closing)),
        };
        // What was cut off promised nothing.
        let Some([top, middle]) = ended else { return false };
        let explained = |files: &[_], full_before| {
            hits(files, &[Fault::Eio, Fault::SyncFails, Fault::Short]) > 0 || full(files) > full_before
        };
        if let Err(error) = &middle {
            assert!(explained(&faults.below, full_before[1]), "closing the middle failed: {error}");
        }
        let mut shared = self.shared.lock();
        let now = shared.model.tick();
        match top {
            Ok(()) => shared.model.end_flush(now),
            Err(LayerError::Unsaved { ranges, cause }) => {
                let away = faults.server.bad_answers() > bad_before || hits(&faults.below, &OF_READS) > 0;
                assert!(
                    away || faults.going || full(&faults.own) > full_before[0],
                    "closing lost {ranges:?}, and all was there: {cause}"
                );
                shared.model.end_close(now, &ranges);
            }
            Err(error) => {
                let of_lower = faults.lazy && explained(&faults.below, full_before[1]);
                assert!(
                    of_lower || explained(&faults.own, full_before[0]),
                    "closing failed, and nothing had: {error}"
                );
                return false;
            }
        }
        middle.is_ok()
    }

    fn look(&mut self, leaks: Leaks, may_have: Option<u64>) {
        // Drawn in any case: whoever is asked, the same seed is the same run.
        let draw: u32 = self.rng.random();
        let ask = self.watch.qemu_every > 0 && draw.is_multiple_of(self.watch.qemu_every);
        let qemu = if ask { Qemu::Ask } else { Qemu::Leave };
        let leaks_below = if self.leaky_below { Leaks::Allowed } else { leaks };
        let look = Look { seed: self.rng.random(), leaks, leaks_below, flags: self.flags, qemu, may_have };
        judge(&self.world, &self.disks, &self.shared, look);
        if self.rng.random_range(0..MOUNTED) == 0 {
            self.mount_anyhow();
        }
    }

    /// A change of a closed image. Whether it did what it should is seen by the next look.
    fn change(&mut self, changing: &Changing) {
        match changing.change {
            Change::Damage(seed) => return self.damage(seed, changing.fault.as_ref()),
            Change::Ask(seed) => return self.ask(seed),
            _ => {}
        }
        let Some(wanted) = self.wanted(changing.change) else { return };
        let changed_file = match wanted {
            Wanted::Name(_) => self.disks.file(Which::Middle),
            _ => &self.disks.top,
        };
        if let Some(fault) = &changing.fault {
            changed_file.fail_nth(fault.nth, fault.fault, fault.lasts);
        }
        let exec = Exec::new(self.rng.random());
        let changed = {
            let (world, disks, wanted) = (Arc::clone(&self.world), self.disks.clone(), wanted.clone());
            exec.run(async move { world.change(&disks, &wanted).await })
        };
        let met = changed_file.fault_hits() > 0;
        if let Err(error) = &changed {
            assert!(met, "{wanted:?}: {error}");
        }
        self.leaky |= met;
        match wanted {
            Wanted::Snapshot(_) if met && self.world.shape.top.is_version_2() => self.flags = Flags::MayLag,
            Wanted::Repair(Repair::All) if changed.is_ok() => self.flags = Flags::Right,
            _ => {}
        }
        self.figures.cut_changes += u64::from(changed.is_err());
        let ended = if changed.is_ok() { Ended::Done } else { Ended::Maybe };
        let may_have = self.model_changes(&wanted, ended);
        // If it ended it is durable: the power may go.
        let seed = self.rng.random();
        self.disks = self.disks.map(|file| file.crash(seed));
        self.look(Leaks::Allowed, may_have);
        self.list_snapshots(&wanted, ended);
    }

    /// What a change asks of the format, if it can be asked now.
    fn wanted(&mut self, change: Change) -> Option<Wanted> {
        let layout = &self.world.shape.top;
        if layout.format == "raw" && !matches!(change, Change::Grow(_)) {
            return None;
        }
        let wanted = match change {
            Change::Grow(sectors) => {
                let old = self.shared.lock().model.cell_count() * self.world.shape.cell;
                // A longer backing would show; a snapshot has the old size.
                let shows = old < self.world.shape.backing_len || self.tail_unknown;
                if shows || !self.snapshots.is_empty() || layout.data_file {
                    return None;
                }
                Wanted::Size(old + sectors * 512)
            }
            Change::CopyOnRead(_) | Change::Rename if !self.world.shape.is_backed() => return None,
            Change::Rename if self.world.shape.remote == Remote::Nothing => return None,
            Change::CopyOnRead(on) => Wanted::CopyOnRead(on),
            Change::Damage(_) | Change::Ask(_) => return None,
            Change::Rename => {
                self.renames += 1;
                Wanted::Name(self.renames)
            }
            Change::Repair => Wanted::Repair(Repair::All),
            Change::FreeLeaks => Wanted::Repair(Repair::Leaks),
            Change::Snapshot | Change::Apply(_) | Change::Delete(_) if !layout.snapshots => return None,
            Change::Snapshot if self.snapshots.len() >= layout.snapshots_max() => return None,
            Change::Snapshot => {
                self.snapshots_made += 1;
                let name = format!("s{}", self.snapshots_made);
                Wanted::Snapshot(SnapshotChange::Create { name, date_sec: 0, date_nsec: 0 })
            }
            Change::Apply(number) => Wanted::Snapshot(SnapshotChange::Apply(self.snapshot(number)?)),
            Change::Delete(number) => Wanted::Snapshot(SnapshotChange::Delete(self.snapshot(number)?)),
        };
        Some(wanted)
    }

    /// What guests may see after a change; cells that there may be.
    fn model_changes(&mut self, wanted: &Wanted, ended: Ended) -> Option<u64> {
        let mut shared = self.shared.lock();
        let model = &mut shared.model;
        let mut may_have = None;
        match wanted {
            Wanted::Size(size) => {
                let cells = size / self.world.shape.cell;
                match ended {
                    Ended::Done => model.grow(cells),
                    Ended::Maybe => may_have = Some(cells),
                }
            }
            Wanted::Snapshot(SnapshotChange::Apply(name)) => {
                let (stamps, cells) = (&self.snapshots[name], model.cell_count());
                let begin = model.begin_write(0, cells, |at| stamps[at as usize]);
                model.end_write(0, cells, begin, ended);
            }
            Wanted::Snapshot(SnapshotChange::Create { name, .. }) => {
                self.snapshots.insert(name.clone(), model.stamps());
            }
            _ => {}
        }
        model.end_restart();
        may_have
    }

    /// The image has the snapshots that it must have; what was cut off may be done or not.
    fn list_snapshots(&mut self, wanted: &Wanted, ended: Ended) {
        let exec = Exec::new(self.rng.random());
        let (layout, file) = (self.world.shape.top.clone(), self.disks.top.clone());
        let found = exec.run(async move {
            let file: Arc<dyn Storage> = file;
            let snapshots = layout.describe(&file).await.expect("it is an image").snapshots;
            snapshots.into_iter().map(|snapshot| snapshot.name).collect::<BTreeSet<_>>()
        });
        let (name, must_be) = match wanted {
            Wanted::Snapshot(SnapshotChange::Create { name, .. }) => (name, true),
            Wanted::Snapshot(SnapshotChange::Delete(name)) => (name, false),
            _ => (&String::new(), false),
        };
        let is = found.contains(name);
        assert!(is == must_be || ended == Ended::Maybe, "snapshot '{name}': {found:?}");
        if !is {
            self.snapshots.remove(name);
        }
        assert!(
            found.iter().eq(self.snapshots.keys()),
            "snapshots {found:?}, not {:?}",
            self.snapshots.keys()
        );
    }

    fn snapshot(&self, number: u64) -> Option<String> {
        let index = number as usize % self.snapshots.len().max(1);
        self.snapshots.keys().nth(index).cloned()
    }
}
