//! The engine over the real drivers, under schedules that shuttle draws: guests allocate, write in place, unlink, fill and flush as
//! tasks of one image, which are switched at I/O, at waits, and at the short locks and the counters of engine and drivers; the power may
//! fail at a drawn moment. Every read is held against the flat model; the format's own check finds nothing wrong, in what a power loss
//! leaves and in the image that was closed.
//!
//! Not here: the in-flight table and `uses` alone, with threads (`schedules.rs`).

mod support;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::{SeedableRng, rngs::SmallRng};
use readonce_disk::{Disk, Top, ZeroMode};
use readonce_storage::{Rt, SimFile, Storage, sim::NowCalls};
use readonce_testkit::schedules::{Shared, ShuttleRuntime, drawn, schedules, turns};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use support::{
    exec::Exec,
    guest::{Guest, Request},
    model::Model,
    origin::{SECTOR, SimOrigin, stamp_of},
    world::{
        Kind, Leaks, QCOW2, QCOW2_EXTENDED, QCOW2_LAZY, QCOW2_SNAPSHOTS, QED, filling, for_kinds, raw_over,
    },
};

/// Schedules of each script and kind.
const RANDOM_SCHEDULES: usize = 60;
/// The same with priorities that change at this many moments.
const PCT_SCHEDULES: usize = 30;
const PCT_DEPTH: usize = 4;
/// Steps after which a schedule is called stuck.
const STEPS_MAX: usize = 2_000_000;
/// Turns within which the power fails.
const POWER_TURNS: u64 = 120;

/// Small clusters, so that little I/O meets many tables.
const KINDS: [Kind; 5] = [
    Kind { cluster_size: 4096, ..QED },
    Kind { cluster_size: 4096, ..QCOW2 },
    Kind { cluster_size: 32768, ..QCOW2_EXTENDED },
    Kind { cluster_size: 4096, ..QCOW2_LAZY },
    Kind { cluster_size: 4096, ..QCOW2_SNAPSHOTS },
];

const ZERO: Request = Request::Zero(ZeroMode { keep_space: false, only_if_fast: false });

/// What one guest asks for, one request after the other: sectors, first and count.
type Steps = Vec<(Request, u64, u64)>;

/// What runs at once.
#[derive(Clone)]
struct Script {
    kind: Kind,
    /// Bytes.
    size: u64,
    /// Written, and closed clean, before the guests come: sectors, first and count.
    before: Vec<(u64, u64)>,
    guests: Vec<Steps>,
    /// Reads that begin before the close, and that nobody waits for.
    let_go: Vec<(u64, u64)>,
}

/// The image before the guests come.
struct Start {
    bytes: Vec<u8>,
    model: Model,
    stamp: u64,
}

impl Script {
    fn new(kind: Kind, clusters: u64) -> Self {
        Self { kind, size: clusters * kind.cluster_size, before: vec![], guests: vec![], let_go: vec![] }
    }

    /// Runs it under every schedule.
    fn run(self) {
        let script = Arc::new(self);
        let start = Arc::new(script.start());
        let random = RandomScheduler::new(RANDOM_SCHEDULES);
        script.under(random, &start);
        script.under(PctScheduler::new(PCT_DEPTH, PCT_SCHEDULES), &start);
    }

    fn under(self: &Arc<Self>, scheduler: impl Scheduler + 'static, start: &Arc<Start>) {
        let (script, start) = (Arc::clone(self), Arc::clone(start));
        schedules(scheduler, STEPS_MAX, move || {
            let (script, start) = (Arc::clone(&script), Arc::clone(&start));
            async move { script.once(&start).await }
        });
    }

    fn start(&self) -> Start {
        let exec = Exec::new(0);
        let file = Arc::new(SimFile::new());
        let storage: Arc<dyn Storage> = file.clone();
        let model = Arc::new(Mutex::new(Model::new(self.size, self.size)));
        let (script, inner, shared) = (self.clone(), Arc::clone(&exec), Arc::clone(&model));
        let stamp = exec.run(async move {
            script.kind.create(&storage, script.size).await;
            let origin = SimOrigin::new(script.size, inner.rt(), 0);
            let source = raw_over(origin).await;
            let image = script.kind.open(Arc::clone(&storage), source, &inner, filling(false)).await;
            let guest = guest(&Arc::new(Disk::new(Top::Image(Arc::clone(&image)), false)), &shared, 0);
            for &(first, count) in &script.before {
                guest.run(Request::Write, first, count).await;
            }
            image.close(Duration::from_secs(3600)).await.expect("closes clean");
            if script.kind.snapshots {
                script.kind.snapshot(&storage, 0).await;
            }
            *guest.stamps.lock()
        });
        exec.power_off();
        let model = model.lock().clone();
        Start { bytes: file.contents(), model, stamp }
    }

    /// Once, under one schedule.
    async fn once(&self, start: &Start) {
        let runtime = ShuttleRuntime::new();
        let rt: Rt = Arc::new(Shared(Arc::clone(&runtime)));
        let file = Arc::new(SimFile::from_bytes(&start.bytes));
        file.set_now_calls(NowCalls::Random(drawn(u64::MAX)));
        file.set_yields(drawn(u64::MAX), 2);
        file.set_stalls(drawn(u64::MAX), 8, 20);
        let model = Arc::new(Mutex::new(start.model.clone()));
        let origin = SimOrigin::new(self.size, Arc::clone(&rt), 2);
        let source = raw_over(origin).await;
        let image = self.kind.open_on(Arc::clone(&rt), file.clone(), source, filling(true)).await;
        let disk = Arc::new(Disk::new(Top::Image(Arc::clone(&image)), false));

        let power = shuttle::future::spawn({
            let (file, model) = (Arc::clone(&file), Arc::clone(&model));
            async move {
                turns(drawn(POWER_TURNS)).await;
                (file.crash(drawn(u64::MAX)), model.lock().clone())
            }
        });
        let first_guest = guest(&disk, &model, start.stamp);
        let guests: Vec<_> = self
            .guests
            .iter()
            .map(|steps| {
                let guest = Guest { stamps: Arc::clone(&first_guest.stamps), ..guest(&disk, &model, 0) };
                let steps = steps.clone();
                shuttle::future::spawn(async move {
                    for (request, first, count) in steps {
                        guest.run(request, first, count).await;
                    }
                })
            })
            .collect();
        for guest in guests {
            guest.await.expect("a guest ends");
        }
        for &(first, count) in &self.let_go {
            let patience = drawn(20);
            let read = image.read(first * SECTOR, (count * SECTOR) as usize);
            futures_util::future::select(Box::pin(read), Box::pin(turns(patience))).await;
        }
        for (first, count) in self.touched() {
            if self.let_go.is_empty() {
                first_guest.run(Request::Read, first, count).await;
            }
        }
        image.close(Duration::from_secs(3600)).await.expect("closes clean");
        runtime.tasks_ended().await;
        let closed = {
            let mut model = model.lock();
            let now = model.tick();
            model.end_flush(now);
            model.clone()
        };
        self.verify(&file, &closed, Leaks::None, &rt).await;

        let (left, model) = power.await.expect("the power fails");
        self.verify(&left, &model, Leaks::Allowed, &rt).await;
        runtime.tasks_ended().await;
    }

    /// Checks what is on a disk, opens it, and reads all that was touched.
    async fn verify(&self, file: &SimFile, model: &Model, leaks: Leaks, rt: &Rt) {
        let copy: Arc<dyn Storage> = Arc::new(SimFile::from_bytes(&file.contents()));
        self.kind.check(Arc::clone(&copy), leaks, "at the end").await;
        let source = raw_over(SimOrigin::new(self.size, Arc::clone(rt), 0)).await;
        let image = self.kind.open_on(Arc::clone(rt), copy, source, filling(false)).await;
        for (first, count) in self.touched() {
            let bytes = image.read(first * SECTOR, (count * SECTOR) as usize).await.expect("all can be read");
            for (at, bytes) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
                model.check_after_crash(at, stamp_of(bytes));
            }
        }
    }

    /// Sectors that the script touches: first and count.
    fn touched(&self) -> Vec<(u64, u64)> {
        let guests = self.guests.iter().flatten().map(|&(_, first, count)| (first, count));
        guests.chain(self.let_go.iter().copied()).filter(|&(_, count)| count > 0).collect()
    }
}

fn guest(disk: &Arc<Disk>, model: &Arc<Mutex<Model>>, stamp: u64) -> Guest {
    Guest {
        disk: Arc::clone(disk),
        model: Arc::clone(model),
        stamps: Arc::new(Mutex::new(stamp)),
        rng: SmallRng::seed_from_u64(0),
        cluster_sectors: 1,
        writes_may_fail: false,
    }
}

fn flush() -> (Request, u64, u64) {
    (Request::Flush, 0, 0)
}

/// Without a switch between two short locks the tests below would still pass, and show nothing about them.
#[test]
fn what_takes_a_lock_twice_is_met_in_between() {
    let was_lost = Arc::new(Mutex::new(false));
    let tell = Arc::clone(&was_lost);
    schedules(RandomScheduler::new(200), STEPS_MAX, move || {
        let (tell, count) = (Arc::clone(&tell), Arc::new(readonce_storage::sync::Mutex::new(0)));
        async move {
            let tasks = [(); 2].map(|()| {
                let count = Arc::clone(&count);
                shuttle::future::spawn(async move {
                    let old = *count.lock();
                    *count.lock() = old + 1;
                })
            });
            for task in tasks {
                task.await.expect("it ends");
            }
            *tell.lock() |= *count.lock() == 1;
        }
    });
    assert!(*was_lost.lock());
}

#[test]
fn two_writers_allocate_under_one_new_table_while_a_flush_runs() {
    for_kinds(&KINDS, |kind| {
        let c = kind.cluster_size / SECTOR;
        let mut script = Script::new(kind, 8);
        script.guests = vec![
            vec![
                (Request::Write, 0, c),
                (Request::Write, 2 * c + 1, 2),
                flush(),
                (Request::Write, 4 * c, 2 * c),
            ],
            vec![(Request::Write, c, c), (Request::Write, 2 * c + 4, 2), (Request::Read, 0, 3 * c), flush()],
            vec![flush(), (Request::Write, 3 * c, c), flush()],
        ];
        script.run();
    });
}

#[test]
fn a_write_in_place_meets_what_is_unlinked() {
    for_kinds(&KINDS, |kind| {
        let c = kind.cluster_size / SECTOR;
        let mut script = Script::new(kind, 12);
        script.before = vec![(0, 4 * c)];
        script.guests = vec![
            vec![
                (Request::Write, 1, 2),
                (Request::Write, c + 1, 3),
                (Request::Write, 2 * c, c),
                (Request::Write, 0, 1),
            ],
            vec![(Request::Trim, 0, 2 * c), flush(), (ZERO, c, 2 * c), (Request::Write, c, c)],
            vec![flush(), (Request::Write, 6 * c, 2 * c), flush(), (Request::Write, 8 * c, 2 * c)],
            vec![(Request::Read, 0, 4 * c), (Request::Read, 0, 4 * c), (Request::Read, 0, 4 * c)],
        ];
        script.run();
    });
}

#[test]
fn fills_meet_whole_writes_parts_of_them_or_a_flush() {
    for_kinds(&KINDS, |kind| {
        let c = kind.cluster_size / SECTOR;
        let mut script = Script::new(kind, 8);
        script.guests = vec![
            vec![(Request::Read, 0, 3 * c), (Request::Read, c, 2), (Request::Read, 4 * c, c)],
            vec![(Request::Write, 2, 3), (Request::Write, c, c), (Request::Read, 0, 2 * c)],
            vec![(Request::Write, 5, 1), (ZERO, 2 * c + 1, 4), flush(), (Request::Write, 4 * c + 3, 2)],
            vec![(Request::Read, 0, 5 * c), flush(), (Request::Read, 3 * c, 2 * c)],
        ];
        script.run();
    });
}

#[test]
fn tables_grow_while_flushes_run() {
    // A refcount block counts 64 clusters, the table's one cluster 64 blocks: 2 MiB, nearly all of it used before. QED has an L2
    // table for each 2 MiB.
    let narrow: Kind = Kind { cluster_size: 512, options: &[("refcount_bits", "64")], ..QCOW2 };
    for_kinds(&[KINDS[0], narrow], |kind| {
        let (size, before, at) = match kind.format {
            "qed" => (8 << 20, (0, 8), [4096, 8192, 12288]),
            _ => (4 << 20, (0, 3920), [4000, 5000, 6000]),
        };
        let mut script = Script::new(kind, size / kind.cluster_size);
        script.before = vec![before];
        script.guests = at
            .iter()
            .map(|&at| {
                vec![
                    (Request::Write, at, 24),
                    flush(),
                    (Request::Write, at + 24, 40),
                    (Request::Read, at + 60, 8),
                    flush(),
                ]
            })
            .collect();
        script.run();
    });
}

#[test]
fn a_close_meets_fills_that_nobody_waits_for() {
    for_kinds(&KINDS, |kind| {
        let c = kind.cluster_size / SECTOR;
        let mut script = Script::new(kind, 12);
        script.guests = vec![
            vec![(Request::Read, 1, 1), (Request::Write, 3 * c + 1, 2)],
            vec![(Request::Write, c + 1, 1), (Request::Read, 4 * c, 2)],
        ];
        script.let_go = vec![(5 * c, 3 * c), (0, 2 * c), (9 * c + 1, 1)];
        script.run();
    });
}

#[test]
fn slices_leave_the_cache_while_they_change() {
    // Of slices so far apart all belong in one set of the cache, which keeps six.
    const SLICES: u64 = 8;
    let small: Kind = Kind { cluster_size: 512, ..QCOW2 };
    let large: Kind = Kind { cluster_size: 4096, options: &[("table_size", "16")], ..QED };
    for_kinds(&[small, large], |kind| {
        let apart = match kind.format {
            "qed" => 4 << 30,
            _ => 64 << 20,
        } / SECTOR;
        let c = kind.cluster_size / SECTOR;
        let each = |request, at, count| (0..SLICES).map(move |slice| (request, slice * apart + at, count));
        let mut script = Script::new(kind, SLICES * apart / c);
        script.before = vec![(0, c), (2 * apart, c), (4 * apart, 2 * c)];
        script.guests = vec![
            each(Request::Write, c, c)
                .take(5)
                .chain([flush()])
                .chain(each(Request::Read, 0, 3 * c))
                .collect(),
            each(Request::Write, 2 * c, c)
                .skip(3)
                .chain([flush()])
                .chain(each(Request::Write, 0, 1))
                .collect(),
            each(Request::Read, 0, 3 * c).chain([flush()]).chain(each(Request::Trim, 0, c)).collect(),
        ];
        script.run();
    });
}
