//! Exhaustive: short scripts, and a power loss at every operation of the disk, with every subset of what was not synced.
//!
//! - The machine dies at the first operation, at the second, and so on, until the script ends first.
//! - Up to `SUBSETS_OF_MAX` unsynced operations, each subset of them is what the disk kept. Beyond, every prefix, every single
//!   one kept and every single one lost, and `DRAWN` drawn subsets.
//! - Each such disk is checked and read back in whole.
//!
//! Not here: torn operations; the seeded runs have them.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::AtomicBool},
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::ZeroMode;
use readonce_format::driver::{Repair, SnapshotChange};
use readonce_storage::{
    ReadAt,
    sim::{Fault, Lasts},
};
use readonce_testkit::exec::{Digest, Exec};

use crate::{
    guest::{self, Faults, Guest, Shared},
    model::{Ended, Model},
    plan::Op,
    shape::{Formats, Layout, Remote, Shape},
    verdict::{Flags, Leaks, Look, Qemu, judge},
    world::{Disks, OpenAs, Wanted, Way, World},
};

/// Unsynced operations of which every subset is tried.
const SUBSETS_OF_MAX: usize = 9;
/// Subsets drawn where there are more.
const DRAWN: usize = 64;

/// What is crashed at every point.
#[derive(Debug, Clone)]
enum Act {
    /// Guests at the open image, and whether it is closed then.
    Guests(Vec<Vec<Op>>, Close),
    /// A change of the closed image.
    Change(Wanted),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Close {
    Yes,
    No,
}

/// A script: what was before, all of it durable, and what is crashed.
struct Script {
    name: &'static str,
    shape: Shape,
    before: Vec<Act>,
    /// And a power loss after which clusters leak.
    leaky: bool,
    act: Act,
    /// The guests see this many cells afterwards.
    may_have: Option<u64>,
}

/// How many states were looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Crash points.
    pub points: u64,
    /// Disks.
    pub states: u64,
}

/// Runs every script over every format; `tell` hears of each. Those for which `wanted` says no are left out.
pub fn some(wanted: impl Fn(&str) -> bool, mut tell: impl FnMut(String)) -> Counts {
    let mut all = Counts::default();
    for layout in layouts() {
        for script in scripts(&layout) {
            let name =
                format!("{} {} {:?}: {}", layout.format, layout.cluster_size, layout.options, script.name);
            if !wanted(&name) {
                continue;
            }
            let counts = script.run();
            tell(format!("{name}: {} crash points, {} disks", counts.points, counts.states));
            all.points += counts.points;
            all.states += counts.states;
        }
    }
    all
}

/// Runs those of some formats.
pub fn all(formats: Formats, mut tell: impl FnMut(String)) {
    let counts = some(|name| formats.has(name.split(' ').next().unwrap_or_default()), &mut tell);
    tell(format!("{} crash points, {} disks, each checked and read back", counts.points, counts.states));
}

fn layouts() -> Vec<Layout> {
    let of = |format, cluster_size, options: &[(&'static str, &str)]| {
        let mut layout = Layout::plain(format, cluster_size);
        options.iter().for_each(|(name, value)| layout.set(name, value));
        layout
    };
    let qcow2 = |cluster_size, options: &[(&'static str, &str)]| of("qcow2", cluster_size, options);
    let qed = of("qed", 4096, &[("table_size", "1")]);
    vec![
        qed,
        qcow2(4096, &[]),
        // Small tables: they grow soon.
        qcow2(512, &[]),
        qcow2(512, &[("compat", "0.10")]),
        qcow2(16384, &[("extended_l2", "on")]),
        qcow2(512, &[("lazy_refcounts", "on")]),
        qcow2(512, &[("refcount_bits", "64")]),
    ]
}

fn scripts(layout: &Layout) -> Vec<Script> {
    let cell = 512;
    let cluster = layout.cluster_size / cell;
    let shape = |clusters: u64| Shape {
        top: layout.clone(),
        middle: None,
        remote: Remote::Raw,
        size: clusters * layout.cluster_size,
        backing_len: clusters * layout.cluster_size,
        cell,
        pinned_late: false,
    };
    let script =
        |name, before, act| Script { name, shape: shape(12), before, leaky: false, act, may_have: None };
    let one = |ops: Vec<Op>, close| Act::Guests(vec![ops], close);
    let filled = || one(vec![Op::Write(cluster, cluster), Op::Write(3 * cluster, 2 * cluster)], Close::Yes);
    let left_open = || {
        one(vec![Op::Write(5 * cluster, 3 * cluster), Op::Read(0, 1), Op::Flush, Op::Pause(600)], Close::No)
    };
    let snapshot = |name: &str| {
        let create = SnapshotChange::Create { name: name.into(), date_sec: 0, date_nsec: 0 };
        Act::Change(Wanted::Snapshot(create))
    };
    let mut scripts = vec![
        script(
            "first fill",
            vec![],
            one(vec![Op::Read(0, 1), Op::Pause(600), Op::Read(0, cluster)], Close::Yes),
        ),
        script("last fill", vec![filled()], one(vec![Op::Read(0, 12 * cluster), Op::Pause(600)], Close::Yes)),
        script(
            "group commit",
            vec![],
            one(
                vec![Op::Read(0, cluster), Op::Read(2 * cluster, 3 * cluster), Op::Flush, Op::Write(0, 1)],
                Close::No,
            ),
        ),
        script(
            "write during fill",
            vec![],
            Act::Guests(
                vec![
                    vec![Op::Read(0, cluster), Op::Flush],
                    vec![Op::Write(0, 1), Op::Write(cluster, cluster), Op::Flush, Op::Write(0, 1)],
                ],
                Close::No,
            ),
        ),
        script(
            "zeroes and trims",
            vec![filled()],
            one(
                vec![
                    Op::Zero(cluster, cluster, ZeroMode::default()),
                    Op::Trim(3 * cluster, cluster),
                    Op::Flush,
                    Op::Write(8 * cluster, cluster),
                    Op::Flush,
                ],
                Close::Yes,
            ),
        ),
        script("open and close", vec![left_open()], one(vec![Op::Pause(10_000)], Close::Yes)),
        script("repair", vec![left_open()], Act::Change(Wanted::Repair(Repair::All))),
        script("another backing name", vec![filled()], Act::Change(Wanted::Name(1))),
    ];
    let size = 300 * layout.cluster_size;
    scripts.push(Script {
        name: "growth",
        shape: shape(12),
        before: vec![filled()],
        leaky: false,
        act: Act::Change(Wanted::Size(size)),
        may_have: Some(size / cell),
    });
    if layout.cluster_size <= 512 {
        scripts.push(Script {
            name: "growth of tables",
            shape: shape(700),
            before: vec![],
            leaky: false,
            act: one(vec![Op::Write(0, 150), Op::Flush, Op::Write(300, 200), Op::Flush], Close::Yes),
            may_have: None,
        });
    } else if layout.cluster_size <= 4096 {
        // A table maps 512 clusters.
        scripts.push(Script {
            name: "a second table",
            shape: shape(700),
            before: vec![one(vec![Op::Write(0, cluster)], Close::Yes)],
            leaky: false,
            act: one(
                vec![
                    Op::Read(511 * cluster, 2 * cluster),
                    Op::Write(600 * cluster, cluster),
                    Op::Flush,
                    Op::Write(1, 1),
                    Op::Write(513 * cluster, cluster),
                    Op::Flush,
                ],
                Close::Yes,
            ),
            may_have: None,
        });
    }
    if !layout.lazy {
        // Refcounts that are not written leak nothing.
        let repair = Act::Change(Wanted::Repair(Repair::All));
        scripts.push(Script { leaky: true, ..script("repair of leaks", vec![filled()], repair) });
    }
    if layout.snapshots {
        scripts.extend([
            script("snapshot", vec![filled()], snapshot("a")),
            script(
                "copy-on-write after a snapshot",
                vec![filled(), snapshot("a")],
                one(
                    vec![
                        Op::Write(cluster, 1),
                        Op::Write(3 * cluster, 2 * cluster),
                        Op::Flush,
                        Op::Zero(0, cluster, ZeroMode::default()),
                    ],
                    Close::Yes,
                ),
            ),
            script(
                "snapshot applied",
                vec![filled(), snapshot("a"), filled()],
                Act::Change(Wanted::Snapshot(SnapshotChange::Apply("a".into()))),
            ),
            script(
                "snapshot deleted",
                vec![filled(), snapshot("a"), filled()],
                Act::Change(Wanted::Snapshot(SnapshotChange::Delete("a".into()))),
            ),
        ]);
    }
    scripts
}

impl Script {
    fn run(&self) -> Counts {
        let world = Arc::new(World::new(self.shape.clone()));
        let disks = Disks::new(&self.shape);
        let exec = Exec::new(1);
        let stamps = {
            let (world, disks, inner) = (Arc::clone(&world), disks.clone(), Arc::clone(&exec));
            exec.run(async move { world.create(&disks, &inner).await })
        };
        let mut model = Model::new(self.shape.cell, stamps);
        let mut disks = disks.map(|file| file.crash_with(|_| true));
        let mut kept = None;
        for act in &self.before {
            if matches!(act, Act::Change(Wanted::Snapshot(SnapshotChange::Create { .. }))) {
                kept = Some(model.stamps());
            }
            model = perform(&world, &disks, model, act, kept.as_deref());
            disks = disks.map(|file| file.crash_with(|_| true));
            let mut counts = Counts::default();
            model = look(&world, &disks, &model, None, Flags::Right, &mut counts);
        }
        if self.leaky {
            let half = self.shape.size / self.shape.cell / 2;
            let guests = Act::Guests(vec![vec![Op::Write(0, half), Op::Flush]], Close::No);
            (disks, model) = leaking(&world, &disks, &model, &guests);
            model = look(&world, &disks, &model, None, Flags::Right, &mut Counts::default());
        }
        let cut_snapshot = matches!(self.act, Act::Change(Wanted::Snapshot(_)));
        let flags = if cut_snapshot && self.shape.top.is_version_2() { Flags::MayLag } else { Flags::Right };
        let mut counts = Counts::default();
        for point in 1.. {
            let disks = disks.map(|file| file.crash_with(|_| true));
            disks.top.fail_nth(point, Fault::Eio, Lasts::ForGood);
            let after = perform(&world, &disks, model.clone(), &self.act, kept.as_deref());
            counts.points += 1;
            for keep in subsets(disks.top.unsynced_count(), point) {
                let disks = disks.map(|file| file.crash_with(|index| keep.contains(&index)));
                look(&world, &disks, &after, self.may_have, flags, &mut counts);
            }
            if disks.top.fault_hits() == 0 {
                return counts;
            }
        }
        unreachable!("a script ends")
    }
}

/// Which unsynced operations are kept, each once.
fn subsets(count: usize, seed: u64) -> BTreeSet<BTreeSet<usize>> {
    if count <= SUBSETS_OF_MAX {
        let members = |mask: u32| (0..count).filter(move |index| mask >> index & 1 == 1).collect();
        return (0..1u32 << count).map(members).collect();
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    let prefixes = (0..=count).map(|end| (0..end).collect());
    let only = (0..count).map(|index| BTreeSet::from([index]));
    let without = (0..count).map(|lost| (0..count).filter(|index| *index != lost).collect());
    let drawn: Vec<_> = (0..DRAWN).map(|_| (0..count).filter(|_| rng.random()).collect()).collect();
    prefixes.chain(only).chain(without).chain(drawn).collect()
}

/// What the first power loss left after which clusters leak.
fn leaking(world: &Arc<World>, disks: &Disks, model: &Model, act: &Act) -> (Disks, Model) {
    for point in 1.. {
        let disks = disks.map(|file| file.crash_with(|_| true));
        disks.top.fail_nth(point, Fault::Eio, Lasts::ForGood);
        let model = perform(world, &disks, model.clone(), act, None);
        assert!(disks.top.fault_hits() > 0, "no power loss leaves leaks");
        let disks = disks.map(|file| file.crash_with(|_| true));
        let (top, driver) = (disks.top.clone(), world.shape.top.driver());
        let report = Exec::new(point).run(async move {
            let file: Arc<dyn ReadAt> = top;
            driver.check(&file).await.expect("it can be read")
        });
        if report.leaks > 0 {
            return (disks, model);
        }
    }
    unreachable!("a script ends")
}

/// Does it until it ends or the machine dies; returns what must be there then.
fn perform(world: &Arc<World>, disks: &Disks, model: Model, act: &Act, kept: Option<&[u64]>) -> Model {
    let exec = Exec::new(7);
    let shared = Arc::new(Mutex::new(Shared { model, digest: Digest::default(), ops: 0 }));
    match act {
        Act::Guests(ops, close) => {
            let server = world.server(exec.rt(), 5);
            let faults = Arc::new(Faults {
                server: Arc::clone(&server),
                own: disks.own(),
                below: disks.below(),
                scarce: false,
                lazy: false,
                going: false,
                latched: AtomicBool::new(false),
                punctual: false,
            });
            let (world, inner, disks) = (Arc::clone(world), Arc::clone(&exec), disks.clone());
            let (ops, close, told) = (ops.clone(), *close, Arc::clone(&shared));
            exec.run(async move {
                let how = OpenAs { copy_on_read: true, budget: 64 << 20, way: Way::Hand };
                let opened = match world.open(&disks, &inner, &server, how).await {
                    Ok(opened) => opened,
                    Err(error) => {
                        assert!(faults.disk(), "the images do not open: {error}");
                        return;
                    }
                };
                let guest = Guest {
                    disk: Arc::clone(&opened.disk),
                    image: Arc::clone(&opened.top),
                    shared: Arc::clone(&told),
                    faults: Arc::clone(&faults),
                    rt: inner.rt(),
                    cell: world.shape.cell,
                };
                guest::all(ops.into_iter().map(|ops| (guest.clone(), ops)).collect(), inner.rt()).await;
                if close == Close::Yes {
                    let begin = told.lock().model.tick();
                    match opened.top.close(std::time::Duration::from_secs(3600)).await {
                        Ok(()) => told.lock().model.end_flush(begin),
                        Err(error) => assert!(faults.disk(), "closing failed: {error}"),
                    }
                }
            });
        }
        Act::Change(wanted) => {
            let applied = match (wanted, kept) {
                (Wanted::Snapshot(SnapshotChange::Apply(_)), Some(kept)) => Some(kept.to_vec()),
                _ => None,
            };
            let begin = applied.as_ref().map(|kept| {
                let mut shared = shared.lock();
                let cells = shared.model.cell_count();
                (shared.model.begin_write(0, cells, |at| kept[at as usize]), cells)
            });
            let (world, files, wanted) = (Arc::clone(world), disks.clone(), wanted.clone());
            let changed = exec.run(async move { world.change(&files, &wanted).await });
            let died = disks.all().any(|file| file.fault_hits() > 0);
            assert!(changed.is_ok() || died, "{changed:?}");
            let mut shared = shared.lock();
            if let Some((begin, cells)) = begin {
                let ended = if changed.is_ok() { Ended::Done } else { Ended::Maybe };
                shared.model.end_write(0, cells, begin, ended);
            }
            if changed.is_ok() {
                // It ends durable.
                let now = shared.model.tick();
                shared.model.end_flush(now);
            }
        }
    }
    exec.power_off();
    shared.lock().model.clone()
}

fn look(
    world: &Arc<World>,
    disks: &Disks,
    model: &Model,
    may_have: Option<u64>,
    flags: Flags,
    counts: &mut Counts,
) -> Model {
    let shared = Shared { model: model.clone(), digest: Digest::default(), ops: 0 };
    let shared = Arc::new(Mutex::new(shared));
    counts.states += 1;
    judge(
        world,
        disks,
        &shared,
        Look {
            seed: counts.states,
            leaks: Leaks::Allowed,
            leaks_below: Leaks::Allowed,
            flags,
            qemu: Qemu::Leave,
            may_have,
        },
    );
    shared.lock().model.clone()
}
