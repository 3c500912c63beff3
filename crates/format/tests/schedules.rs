//! Group commit of qcow2 under schedules that shuttle draws: tasks of one image link clusters and unlink them, others flush, hand out
//! again what a flush says the disk does not show any more, and look up what changes; the power fails at a drawn moment. A guest's
//! cluster then holds what it may hold, and nobody else's bytes.
//!
//! Not here: the engine above (`disk/tests/threads.rs`); QED, which unlinks nothing.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "this is the test's world")]

use std::{
    ops::Range,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use readonce_format::{
    CommitMode, Driver, Durability, Mapping, Room, WritableMapper,
    driver::{CreateSpec, driver},
};
use readonce_storage::{ReadAt, Rt, SimFile, Storage};
use readonce_testkit::schedules::{Shared, ShuttleRuntime, drawn, schedules, turns};
use shuttle::{
    future::spawn,
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
};

const RANDOM_SCHEDULES: usize = 500;
const PCT_SCHEDULES: usize = 250;
const PCT_DEPTH: usize = 4;
/// Steps after which a schedule is called stuck.
const STEPS_MAX: usize = 1_000_000;
/// Power losses that a schedule looks at.
const LOSSES_MAX: usize = 4;
/// Turns within which one of them comes by itself.
const POWER_TURNS: u64 = 40;

/// Clusters of the guest; half of them belong to each writer.
const CLUSTERS: u64 = 6;
/// Changes of each writer, rounds of each flusher, looks of the reader.
const STEPS: usize = 6;

#[derive(Clone, Copy)]
struct Kind {
    cluster_size: u64,
    options: &'static [(&'static str, &'static str)],
    /// Where the file ends before the guests come, in clusters; at least where it ends when it is made.
    end: u64,
}

const PLAIN: Kind = Kind { cluster_size: 4096, options: &[], end: 0 };
const EXTENDED: Kind = Kind { cluster_size: 16384, options: &[("extended_l2", "on")], end: 0 };
/// A refcount block counts 64 clusters: the second is made soon.
const NARROW: Kind = Kind { cluster_size: 512, options: &[("refcount_bits", "64")], end: 61 };
const LAZY: Kind = Kind { cluster_size: 4096, options: &[("lazy_refcounts", "on")], end: 0 };

fn qcow2() -> &'static dyn Driver {
    driver("qcow2").expect("it is built in")
}

/// A number that a cluster holds throughout; 0 is a cluster of zeros.
type Tag = u32;

/// What a cluster held since it was last known to be on the disk.
#[derive(Clone)]
struct History {
    /// The last may be on its way; those before it were committed.
    tags: Vec<Tag>,
    committed: usize,
    /// What is on the disk is this one or a later one.
    durable: usize,
}

#[derive(Clone)]
struct Model(Vec<History>);

impl Model {
    fn new() -> Self {
        Self(vec![History { tags: vec![0], committed: 0, durable: 0 }; CLUSTERS as usize])
    }

    fn begin(&mut self, cluster: u64, tag: Tag) {
        self.0[cluster as usize].tags.push(tag);
    }

    fn end(&mut self, cluster: u64) {
        let history = &mut self.0[cluster as usize];
        history.committed = history.tags.len() - 1;
    }

    fn committed(&self) -> Vec<usize> {
        self.0.iter().map(|history| history.committed).collect()
    }

    fn flushed(&mut self, committed: &[usize]) {
        for (history, committed) in self.0.iter_mut().zip(committed) {
            history.durable = history.durable.max(*committed);
        }
    }
}

/// What the tasks work on.
struct World {
    kind: Kind,
    file: Arc<SimFile>,
    mapper: Arc<dyn WritableMapper>,
    model: Mutex<Model>,
    /// What power losses left, and what it may hold. Everybody else goes on as if nothing had been.
    losses: Mutex<Vec<(SimFile, Model)>>,
}

impl World {
    fn power_fails(&self) {
        let crashed = self.file.crash(drawn(u64::MAX));
        // Since the crash there was no switch.
        let model = self.model().clone();
        let mut losses = self.losses.lock().expect("no panic");
        if losses.len() < LOSSES_MAX {
            losses.push((crashed, model));
        }
    }

    fn model(&self) -> std::sync::MutexGuard<'_, Model> {
        self.model.lock().expect("no panic")
    }

    /// Links new places, and unlinks them: no cluster is written in place.
    async fn write(&self, clusters: Range<u64>) {
        let size = self.kind.cluster_size;
        for step in 0..STEPS {
            let cluster = clusters.start + drawn(clusters.end - clusters.start);
            let at = cluster * size;
            let linked =
                matches!(self.mapper.lookup(at, 1).await.expect("looks up").mapping, Mapping::Data(_));
            let room = if linked { Room::Zero } else { Room::Data };
            let tag = if linked { 0 } else { (cluster as Tag + 1) << 8 | step as Tag };
            let room = self.mapper.prepare(at, size, room).await.expect("there is room");
            if let Some(place) = room.at {
                self.file.write(place, bytes_of(tag, size)).await.expect("writes");
                // If anything on the disk still shows this place, it shows now.
                if drawn(3) == 0 {
                    self.power_fails();
                }
            }
            self.model().begin(cluster, tag);
            assert_eq!(room.commit(CommitMode::Overwrite), size);
            self.model().end(cluster);
            turns(drawn(3)).await;
        }
    }

    /// Nobody reads what is unlinked, so that it may be used again at once.
    async fn flush(&self) {
        for _ in 0..STEPS {
            let durability = if drawn(3) == 0 { Durability::Linked } else { Durability::Durable };
            let committed = self.model().committed();
            self.mapper.flush(durability).await.expect("flushes");
            if durability == Durability::Durable {
                self.model().flushed(&committed);
            }
            if let Some(unlinked) = self.mapper.take_unlinked() {
                unlinked.reuse();
            }
            turns(drawn(3)).await;
        }
    }

    /// A lookup sees an entry as it was before a change or after it, never half of each.
    async fn look(&self) {
        for _ in 0..STEPS * 4 {
            let cluster = drawn(CLUSTERS);
            // Once a writer is through with it it is never absent again.
            let written = self.model().0[cluster as usize].committed > 0;
            if let Some(extent) = self.mapper.lookup_now(cluster * self.kind.cluster_size, 1) {
                match extent.expect("no entry is wrong").mapping {
                    Mapping::Data(at) => assert!(at >= self.kind.cluster_size, "data over the header"),
                    Mapping::Zero => {}
                    Mapping::Absent => assert!(!written, "cluster {cluster} is gone"),
                    other => panic!("nothing is shared or compressed: {other:?}"),
                }
            }
            turns(drawn(2)).await;
        }
    }
}

fn bytes_of(tag: Tag, len: u64) -> Bytes {
    tag.to_le_bytes().repeat(len as usize / 4).into()
}

/// What a power loss left: sound, and no cluster holds what it never held.
async fn survives(file: SimFile, rt: Rt, kind: Kind, model: &Model) {
    let file = Arc::new(file);
    let reader: Arc<dyn ReadAt> = file.clone();
    let report = qcow2().check(&reader).await.expect("checks");
    // With lazy refcounts they may be too low, and a bit says so.
    let lazy = kind.options.contains(&("lazy_refcounts", "on"));
    assert!(lazy || report.corruptions == 0, "{report:?}");
    assert_eq!(report.check_errors, 0);
    let mapper = qcow2().open_writable(file.clone(), None, rt).await.expect("opens");
    for (cluster, history) in (0..).zip(&model.0) {
        let extent = mapper.lookup(cluster * kind.cluster_size, kind.cluster_size).await.expect("looks up");
        let found = match extent.mapping {
            Mapping::Data(at) => {
                let bytes = file.read(at, kind.cluster_size as usize).await.expect("reads");
                let tag = Tag::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
                assert_eq!(bytes, bytes_of(tag, kind.cluster_size), "cluster {cluster} is torn");
                tag
            }
            _ => 0,
        };
        let allowed = &history.tags[history.durable..];
        assert!(allowed.contains(&found), "cluster {cluster} holds {found:#x}, may hold {allowed:x?}");
    }
}

async fn once(kind: Kind, start: &[u8]) {
    let runtime = ShuttleRuntime::new();
    let rt: Rt = Arc::new(Shared(Arc::clone(&runtime)));
    let file = Arc::new(SimFile::from_bytes(start));
    file.set_yields(drawn(u64::MAX), 1);
    let mapper = qcow2().open_writable(file.clone(), None, Arc::clone(&rt)).await.expect("opens");
    let (model, losses) = (Mutex::new(Model::new()), Mutex::default());
    let world = Arc::new(World { kind, file, mapper, model, losses });
    let half = CLUSTERS / 2;
    let mut tasks = vec![spawn({
        let world = Arc::clone(&world);
        async move {
            turns(drawn(POWER_TURNS)).await;
            world.power_fails();
        }
    })];
    for clusters in [0..half, half..CLUSTERS] {
        let world = Arc::clone(&world);
        tasks.push(spawn(async move { world.write(clusters).await }));
    }
    for _ in 0..2 {
        let world = Arc::clone(&world);
        tasks.push(spawn(async move { world.flush().await }));
    }
    tasks.push(spawn({
        let world = Arc::clone(&world);
        async move { world.look().await }
    }));
    for task in tasks {
        task.await.expect("no task panics");
    }
    let losses = std::mem::take(&mut *world.losses.lock().expect("no panic"));
    for (crashed, model) in losses {
        survives(crashed, Arc::clone(&rt), kind, &model).await;
    }
    world.mapper.close().await.expect("closes");
    runtime.tasks_ended().await;
    let mut model = world.model().clone();
    let committed = model.committed();
    model.flushed(&committed);
    survives(world.file.crash(0), rt, kind, &model).await;
}

fn under_schedules(kind: Kind) {
    let spec = CreateSpec {
        size: CLUSTERS * kind.cluster_size,
        backing: None,
        options: [("cluster_size", kind.cluster_size.to_string())]
            .into_iter()
            .chain(kind.options.iter().map(|&(name, value)| (name, value.to_owned())))
            .map(|(name, value)| (name.to_owned(), Some(value)))
            .collect(),
        pin: None,
        data_file: None,
    };
    let file = Arc::new(SimFile::new());
    let storage: Arc<dyn Storage> = file.clone();
    tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime")
        .block_on(async { qcow2().create(&storage, None, &spec).await.expect("creates") });
    let mut start = file.contents();
    start.resize(start.len().max((kind.end * kind.cluster_size) as usize), 0);
    let start: Arc<[u8]> = start.into();
    let under = |scheduler: Box<dyn Scheduler + Send>| {
        let start = Arc::clone(&start);
        schedules(scheduler, STEPS_MAX, move || {
            let start = Arc::clone(&start);
            async move { once(kind, &start).await }
        });
    };
    under(Box::new(RandomScheduler::new(RANDOM_SCHEDULES)));
    under(Box::new(PctScheduler::new(PCT_DEPTH, PCT_SCHEDULES)));
}

#[test]
fn a_round_unlinks_what_it_writes_and_nothing_else() {
    under_schedules(PLAIN);
}

#[test]
fn an_entry_of_two_words_is_seen_whole() {
    under_schedules(EXTENDED);
}

#[test]
fn refcount_blocks_are_made_in_the_midst_of_rounds() {
    under_schedules(NARROW);
}

#[test]
fn lazy_refcounts_lose_no_cluster() {
    under_schedules(LAZY);
}
