//! Run: a plan, done from its first session to its last.
//!
//! - What is wrong panics, with words for it. The same plan gives the same run, to the byte: its digest says so.
//!
//! Not here: what is drawn (`plan`), what must be true afterwards (`verdict`).

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::{Disk, Top};
use readonce_format::driver::SnapshotChange;
use readonce_storage::{
    ReadAt,
    sim::{Fault, NowCalls},
};

use crate::{
    bug::Bug,
    exec::{Digest, Exec},
    guest::{self, Faults, Guest, Shared},
    model::Model,
    plan::{Change, End, Plan, Session},
    verdict::{Leaks, Look, Qemu, judge},
    world::{Disks, OpenAs, Opened, Wanted, World},
};

/// A close never waits longer for the origin, and time costs nothing.
const CLOSE_WAIT: Duration = Duration::from_secs(3600);

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
        self.faults += other.faults;
        self.polls += other.polls;
        self.working += other.working;
        self.whole += other.whole;
    }
}

/// How a run is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// A bug that it has.
    pub bug: Option<Bug>,
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
}

/// Does all that a plan says.
///
/// # Panics
/// When something is wrong.
pub fn run(plan: &Plan, watch: Watch) -> Outcome {
    let start = Instant::now();
    let world = Arc::new(World::new(plan.shape.clone(), watch.bug));
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
            self.change(*change);
        }
        let start = Instant::now();
        let exec = Exec::new(session.schedule);
        let server = self.world.server(exec.rt(), 40);
        let how = OpenAs { copy_on_read: session.copy_on_read, budget: session.budget };
        // Opening meets no faults: whether an image opens that cannot be read is not the question here.
        let opened = {
            let (world, disks) = (Arc::clone(&self.world), self.disks.clone());
            let (inner, server) = (Arc::clone(&exec), Arc::clone(&server));
            exec.run(async move { world.open(&disks, &inner, &server, how).await.expect("the images open") })
        };
        server.arm(session.origin_faults.iter().map(|(_, fault)| *fault));
        for file in self.disks.all() {
            file.set_yields(self.rng.random(), 2);
            if self.rng.random_range(0..4) == 0 {
                file.set_now_calls(NowCalls::Random(self.rng.random()));
            }
        }
        for (_, fault) in &session.disk_faults {
            self.disks.top.fail_nth(fault.nth, fault.fault, fault.lasts);
        }
        let files: Vec<_> = self.disks.all().cloned().collect();
        let any = |fault| session.disk_faults.iter().any(|(_, planned)| planned.fault == fault);
        let faults = Arc::new(Faults {
            server: Arc::clone(&server),
            files: files.clone(),
            eio: any(Fault::Eio),
            scarce: session.budget < 1 << 20,
        });
        let may_latch = any(Fault::Eio) || any(Fault::SyncFails);
        let guests = self.guests(session, &exec, &opened, &faults);
        let closed = match session.end {
            End::PowerLoss(polls, _) => {
                exec.run_for(guests, polls);
                false
            }
            End::Close => {
                exec.run(guests);
                server.heal();
                files.iter().for_each(|file| file.heal());
                self.close(&exec, opened, !may_latch || !faults.disk())
            }
        };
        exec.power_off();
        self.figures.polls += exec.polls();
        let keep = match session.end {
            End::PowerLoss(_, keep) => keep,
            // After a clean close nothing is owed to luck either: the power goes now.
            End::Close => self.rng.random(),
        };
        let mut each = SmallRng::seed_from_u64(keep);
        self.figures.faults += server.fault_hits() + files.iter().map(|file| file.fault_hits()).sum::<u64>();
        // What a power loss before the first sync leaks has no mark yet, and stays until a check: only what was never cut off
        // or refused must be without leaks.
        self.leaky |= !closed || faults.disk();
        let leaks = if self.leaky { Leaks::Allowed } else { Leaks::None };
        self.disks = self.disks.map(|file| file.crash(each.random()));
        self.figures.crashes += u64::from(!closed);
        self.figures.closes += u64::from(closed);
        self.figures.working += start.elapsed();
        {
            let mut shared = self.shared.lock();
            shared.digest.add(exec.digest());
            self.disks.all().for_each(|file| shared.digest.add(file.len()));
        }
        self.look(leaks);
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
            disk: Arc::new(Disk::new(Top::Image(Arc::clone(&opened.top)), false)),
            image: Arc::clone(&opened.top),
            shared: Arc::clone(&self.shared),
            faults: Arc::clone(faults),
            rt: exec.rt(),
            cell: self.world.shape.cell,
        };
        let ops = |guest: &Vec<_>| guest.iter().map(|&(_, op)| op).collect();
        guest::all(session.guests.iter().map(|list| (guest.clone(), ops(list))).collect(), exec.rt())
    }

    /// Closes; whether it was clean, which it must be where nothing latched.
    fn close(&self, exec: &Arc<Exec>, opened: Opened, must: bool) -> bool {
        let closed = exec.run(async move {
            opened.top.close(CLOSE_WAIT).await?;
            match opened.middle {
                Some(middle) => middle.close(CLOSE_WAIT).await,
                None => Ok(()),
            }
        });
        match closed {
            Ok(()) => {
                let mut shared = self.shared.lock();
                let now = shared.model.tick();
                shared.model.end_flush(now);
                true
            }
            Err(error) => {
                assert!(!must, "closing failed, and nothing had latched: {error}");
                false
            }
        }
    }

    fn look(&mut self, leaks: Leaks) {
        let ask = self.watch.qemu_every > 0 && self.rng.random_range(0..self.watch.qemu_every.max(1)) == 0;
        let qemu = if ask { Qemu::Ask } else { Qemu::Leave };
        let look = Look { seed: self.rng.random(), leaks, qemu, may_have: None };
        judge(&self.world, &self.disks, &self.shared, look);
    }

    /// A change of the closed image. Whether it did what it should is seen by the next look.
    fn change(&mut self, change: Change) {
        let layout = &self.world.shape.top;
        let wanted = match change {
            Change::Grow(sectors) => {
                let old = self.shared.lock().model.cell_count() * self.world.shape.cell;
                // A longer backing would show; a snapshot has the old size.
                if old < self.world.shape.backing_len || !self.snapshots.is_empty() || layout.data_file {
                    return;
                }
                let size = old + sectors * 512;
                self.shared.lock().model.grow(size / self.world.shape.cell);
                Wanted::Size(size)
            }
            Change::Rename => {
                self.renames += 1;
                Wanted::Name(self.renames)
            }
            Change::Repair => Wanted::Repair,
            Change::Snapshot | Change::Apply(_) | Change::Delete(_) if !layout.snapshots => return,
            Change::Snapshot => {
                self.snapshots_made += 1;
                let name = format!("s{}", self.snapshots_made);
                self.snapshots.insert(name.clone(), self.shared.lock().model.stamps());
                Wanted::Snapshot(SnapshotChange::Create { name, date_sec: 0, date_nsec: 0 })
            }
            Change::Apply(number) => {
                let Some(name) = self.snapshot(number) else { return };
                self.shared.lock().model.replace(&self.snapshots[&name]);
                Wanted::Snapshot(SnapshotChange::Apply(name))
            }
            Change::Delete(number) => {
                let Some(name) = self.snapshot(number) else { return };
                self.snapshots.remove(&name);
                Wanted::Snapshot(SnapshotChange::Delete(name))
            }
        };
        let exec = Exec::new(self.rng.random());
        let (world, disks) = (Arc::clone(&self.world), self.disks.clone());
        exec.run(async move { world.change(&disks, &wanted).await.expect("the image is changed") });
        // It ended durable: the power may go.
        let seed = self.rng.random();
        self.disks = self.disks.map(|file| file.crash(seed));
        self.shared.lock().model.end_restart();
        self.look(Leaks::Allowed);
    }

    fn snapshot(&self, number: u64) -> Option<String> {
        let index = number as usize % self.snapshots.len().max(1);
        self.snapshots.keys().nth(index).cloned()
    }
}
