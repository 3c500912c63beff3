//! Plan: everything that will happen in a run, drawn from its seed before it begins.
//!
//! - Each guest request, fault and change has a number, and a plan can be had without some of them: that is how a failing run
//!   is cut down. What is left is the same as it was.
//! - The schedule itself is drawn while the run goes, from the seed that the plan names.
//!
//! Not here: doing it (`run`).

use std::collections::BTreeSet;

use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_disk::ZeroMode;
use readonce_storage::sim::{Fault, Lasts};

use crate::shape::{Formats, Shape};

/// Number of an element that can be left out.
pub type Id = u32;

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What it was drawn from.
    pub seed: u64,
    /// The images.
    pub shape: Shape,
    /// From open to close or power loss, one after the other.
    pub sessions: Vec<Session>,
}

/// An element with its number.
pub type Numbered<T> = (Id, T);

/// One session.
#[derive(Debug, Clone)]
pub struct Session {
    /// What the schedule is drawn from.
    pub schedule: u64,
    /// What is done to the closed image before it.
    pub before: Vec<Numbered<Changing>>,
    /// The top fills.
    pub copy_on_read: bool,
    /// Bound of what is in flight, bytes, both kinds.
    pub budget: u64,
    /// Requests of each guest, in order.
    pub guests: Vec<Vec<Numbered<Op>>>,
    /// The images' disks, while they are opened too.
    pub disk_faults: Vec<Numbered<(Which, DiskFault)>>,
    /// The origin, by the number of the request.
    pub origin_faults: Vec<Numbered<(u64, OriginFault)>>,
    /// How it ends.
    pub end: End,
}

/// What a guest does; offsets and lengths are cells.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// Reads.
    Read(u64, u64),
    /// Begins something and goes away.
    Abandon(Left, u64, u64),
    /// Writes.
    Write(u64, u64),
    /// Writes, then flushes.
    WriteThrough(u64, u64),
    /// Zeroes.
    Zero(u64, u64, ZeroMode),
    /// Discards.
    Trim(u64, u64),
    /// Flushes.
    Flush,
    /// Asks for a range to be brought in.
    Cache(u64, u64),
    /// Asks where a range is.
    Status(u64, u64),
    /// Does nothing for so many milliseconds.
    Pause(u64),
    /// Turns copy-on-read on or off.
    CopyOnRead(bool),
}

/// What a guest that goes away had begun.
#[derive(Debug, Clone, Copy)]
pub enum Left {
    /// A read.
    Read,
    /// A write.
    Write,
    /// Zeroing.
    Zero,
    /// A discard.
    Trim,
    /// A flush.
    Flush,
}

impl Op {
    /// The cells that it may change.
    pub fn changes(self) -> Option<(u64, u64)> {
        match self {
            Self::Write(at, count)
            | Self::WriteThrough(at, count)
            | Self::Zero(at, count, _)
            | Self::Trim(at, count) => Some((at, count)),
            Self::Abandon(Left::Write | Left::Zero | Left::Trim, at, count) => Some((at, count)),
            _ => None,
        }
    }

    /// The cells that it makes local, where the image fills.
    pub fn brings(self) -> Option<(u64, u64)> {
        match self {
            Self::Read(at, count) | Self::Cache(at, count) => Some((at, count)),
            _ => None,
        }
    }
}

/// What is done between two sessions.
#[derive(Debug, Clone, Copy)]
pub enum Change {
    /// Grows the disk by so many sectors.
    Grow(u64),
    /// Makes an internal snapshot.
    Snapshot,
    /// Makes the disk what one of the snapshots is (by this number, modulo their count).
    Apply(u64),
    /// Lets one of the snapshots go.
    Delete(u64),
    /// Gives the backing another name for the same bytes.
    Rename,
    /// Repairs all.
    Repair,
    /// Repairs leaks.
    FreeLeaks,
    /// Says whether the image is to be filled.
    CopyOnRead(bool),
    /// Asks for what may be refused, drawn from this; of copies.
    Ask(u64),
    /// Damages the image, drawn from this, and repairs it.
    Damage(u64),
}

/// A change of a closed image, after which the power goes; or in the middle of it, where it meets a fault of its disk.
#[derive(Debug, Clone, Copy)]
pub struct Changing {
    /// What.
    pub change: Change,
    /// Counted from the change's start.
    pub fault: Option<DiskFault>,
}

/// Which of the images' disks; where there is no such one, the top's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The top image's own.
    Top,
    /// The one with its data.
    Data,
    /// The one of the image below.
    Middle,
}

/// A fault of an image's disk: from the nth operation that it can hit.
#[derive(Debug, Clone, Copy)]
pub struct DiskFault {
    /// Counted from 1, from the start of the session.
    pub nth: u64,
    /// What.
    pub fault: Fault,
    /// How long.
    pub lasts: Lasts,
}

/// A fault of the origin.
#[derive(Debug, Clone, Copy)]
pub enum OriginFault {
    /// Answers after so many milliseconds.
    Slow(u64),
    /// Never answers.
    Stall,
    /// Breaks the connection before it answers.
    Reset,
    /// Answers with this status.
    Status(u16),
    /// 429 with Retry-After, seconds.
    TooMany(u64),
    /// Breaks off after so many 256ths of the body.
    Cut(u8),
    /// Ends the body early, without an error.
    Truncate(u8),
    /// Stops sending after so many 256ths of the body.
    StallBody(u8),
    /// Says another range than was asked.
    WrongRange,
    /// Sends more than it said.
    Longer,
    /// Sends the whole file.
    Whole,
    /// Another version is there from now on, for so many requests.
    Changed(u64),
    /// Refuses every connection for so many requests.
    Dead(u64),
}

impl OriginFault {
    /// Whether it may fail a read however often that is tried.
    pub fn is_hard(self) -> bool {
        match self {
            Self::Slow(_)
            | Self::Stall
            | Self::Reset
            | Self::TooMany(_)
            | Self::Cut(_)
            | Self::Truncate(_)
            | Self::StallBody(_) => false,
            Self::Status(status) => matches!(status, 404 | 412),
            Self::WrongRange | Self::Longer | Self::Whole | Self::Changed(_) | Self::Dead(_) => true,
        }
    }
}

/// How a session ends.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// Guests end, the images are closed, after all faults were healed or not.
    Close {
        /// They were.
        healed: bool,
    },
    /// The power goes in the midst of this, after so many steps of the executor; the seed draws what the disk keeps.
    PowerLoss(During, u64, u64),
}

/// When the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum During {
    /// The images are being opened.
    Opening,
    /// Guests are at work.
    Work,
    /// Guests have ended, the images are being closed.
    Closing,
}

/// Draws plans.
struct Draw {
    rng: SmallRng,
    id: Id,
    cells: u64,
    cluster_cells: u64,
    /// Cells of a large request.
    cells_max: u64,
}

impl Plan {
    /// The plan of a seed. `salt` draws other schedules and crashes for the same requests.
    pub fn draw(seed: u64, formats: Formats, salt: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let shape = Shape::draw(&mut rng, formats);
        let cells = shape.size / shape.cell;
        let cluster_cells = (shape.top.cluster_size / shape.cell).max(1);
        let count = rng.random_range(2..6);
        let cells_max = if shape.is_big() { 2048 } else { 256 };
        let mut draw = Draw { rng, id: 0, cells, cluster_cells, cells_max };
        let sessions = (0..count).map(|number| draw.session(number, number + 1 == count, &shape)).collect();
        let mut plan = Self { seed, shape, sessions };
        if salt > 0 {
            let mut rng = SmallRng::seed_from_u64(salt);
            for session in &mut plan.sessions {
                session.schedule ^= rng.random::<u64>();
                if let End::PowerLoss(_, polls, keep) = &mut session.end {
                    *keep ^= rng.random::<u64>();
                    *polls = rng.random_range(0..=*polls);
                }
            }
        }
        plan
    }

    /// Leaves elements out.
    pub fn without(mut self, out: &BTreeSet<Id>) -> Self {
        fn keep<T>(out: &BTreeSet<Id>, list: &mut Vec<Numbered<T>>) {
            list.retain(|(id, _)| !out.contains(id));
        }
        for session in &mut self.sessions {
            keep(out, &mut session.before);
            keep(out, &mut session.disk_faults);
            keep(out, &mut session.origin_faults);
            session.guests.iter_mut().for_each(|guest| keep(out, guest));
            session.guests.retain(|guest| !guest.is_empty());
        }
        self
    }

    /// The numbers of all elements.
    pub fn ids(&self) -> Vec<Id> {
        let mut ids = Vec::new();
        for session in &self.sessions {
            ids.extend(session.before.iter().map(|(id, _)| *id));
            ids.extend(session.disk_faults.iter().map(|(id, _)| *id));
            ids.extend(session.origin_faults.iter().map(|(id, _)| *id));
            ids.extend(session.guests.iter().flatten().map(|(id, _)| *id));
        }
        ids
    }
}

impl Draw {
    fn numbered<T>(&mut self, element: T) -> Numbered<T> {
        self.id += 1;
        (self.id, element)
    }

    /// One of `of` times.
    fn once_in(&mut self, of: u32) -> bool {
        self.rng.random_range(0..of) == 0
    }

    fn session(&mut self, number: u32, last: bool, shape: &Shape) -> Session {
        let guests = self.rng.random_range(1..9);
        let ops = [8, 40, 160][self.rng.random_range(0..if shape.is_big() { 1 } else { 3 })];
        // What a session is like: some have no faults, most have no faults of the disk.
        let disk_faults = if last || !self.once_in(4) { 0 } else { self.rng.random_range(1..3) };
        let origin_faults = if self.once_in(2) { 0 } else { self.rng.random_range(1..6) };
        let changes = if number == 0 { 0 } else { self.rng.random_range(0..3) };
        let cluster = shape.top.cluster_size;
        // Everything at once on few clusters, and next to no memory for it.
        let crowded = self.once_in(5);
        let local = crowded || self.once_in(3);
        let budgets = if crowded { [3 * cluster, 1, 1, 1] } else { [64 << 20, 64 << 20, 3 * cluster, 1] };
        Session {
            schedule: self.rng.random(),
            before: (0..changes)
                .map(|_| {
                    let changing = self.changing();
                    self.numbered(changing)
                })
                .collect(),
            copy_on_read: !self.once_in(5),
            budget: budgets[self.rng.random_range(0..4)],
            guests: (0..guests)
                .map(|_| {
                    (0..ops)
                        .map(|_| {
                            let op = if crowded { self.crowded_op() } else { self.op(local) };
                            self.numbered(op)
                        })
                        .collect()
                })
                .collect(),
            disk_faults: (0..disk_faults)
                .map(|_| {
                    let fault = (self.which(), self.disk_fault());
                    self.numbered(fault)
                })
                .collect(),
            origin_faults: (0..origin_faults)
                .map(|_| {
                    let mut fault = (self.rng.random_range(0..30), self.origin_fault());
                    if shape.pinned_late && matches!(fault.1, OriginFault::Changed(_)) {
                        // Whatever is there first is the version: what answers the first request, if nothing keeps it from that.
                        fault = match origin_faults {
                            1 => (fault.0.max(1), fault.1),
                            _ => (fault.0, OriginFault::Reset),
                        };
                    }
                    self.numbered(fault)
                })
                .collect(),
            end: if last || self.once_in(4) {
                End::Close { healed: last || self.rng.random() }
            } else {
                let (during, bits) = match self.rng.random_range(0..16) {
                    0 => (During::Opening, 3..9),
                    1..3 => (During::Closing, 3..11),
                    _ => (During::Work, 4..15),
                };
                let polls_max: u64 = 1 << self.rng.random_range(bits);
                End::PowerLoss(during, self.rng.random_range(0..polls_max), self.rng.random())
            },
        }
    }

    fn range(&mut self, local: bool) -> (u64, u64) {
        let cells = if local { self.cells.min(self.cluster_cells * 3) } else { self.cells };
        let cluster = self.cluster_cells;
        let first = self.rng.random_range(0..cells);
        let (first, count) = match self.rng.random_range(0..8) {
            0..5 => (first, self.rng.random_range(1..9)),
            5..7 => (first / cluster * cluster, cluster.min(self.cells_max)),
            _ => (first, self.rng.random_range(1..(cluster * 3).clamp(2, self.cells_max * 3 / 2))),
        };
        (first, count.min(self.cells - first))
    }

    fn op(&mut self, local: bool) -> Op {
        let (at, len) = self.range(local);
        match self.rng.random_range(0..100) {
            0..40 => Op::Read(at, len),
            40..43 => Op::Abandon(self.left(), at, len),
            43..70 => Op::Write(at, len),
            70..73 => Op::WriteThrough(at, len),
            73..80 => Op::Zero(at, len, self.zero_mode()),
            80..86 => Op::Trim(at, len),
            86..90 => Op::Flush,
            90..93 => Op::Cache(at, len),
            93..95 => Op::Status(at, len),
            95..99 => Op::Pause([1, 100, 600, 7_000][self.rng.random_range(0..4)]),
            _ => Op::CopyOnRead(self.rng.random()),
        }
    }

    /// What may race with fills and with each other.
    fn crowded_op(&mut self) -> Op {
        let (at, len) = self.range(true);
        match self.rng.random_range(0..100) {
            0..35 => Op::Read(at, len),
            35..38 => Op::Cache(at, len),
            38..42 => Op::Abandon(self.left(), at, len),
            42..55 => Op::Zero(at, len, self.zero_mode()),
            55..70 => Op::Trim(at, len),
            70..90 => Op::Write(at, len),
            90..94 => Op::Flush,
            94..99 => Op::Pause([1, 30, 600, 7_000][self.rng.random_range(0..4)]),
            _ => Op::CopyOnRead(self.rng.random()),
        }
    }

    fn left(&mut self) -> Left {
        [Left::Read, Left::Write, Left::Zero, Left::Trim, Left::Flush][self.rng.random_range(0..5)]
    }

    fn zero_mode(&mut self) -> ZeroMode {
        ZeroMode { keep_space: self.rng.random(), only_if_fast: self.once_in(4) }
    }

    fn changing(&mut self) -> Changing {
        let change = self.change();
        let fault = (!self.once_in(3)).then(|| {
            let fault = [Fault::Eio, Fault::Eio, Fault::Eio, Fault::NoSpace, Fault::SyncFails, Fault::Short]
                [self.rng.random_range(0..6)];
            let nth_max = if fault == Fault::SyncFails { 6 } else { 1 << self.rng.random_range(1..8) };
            let lasts = if self.once_in(3) { Lasts::Once } else { Lasts::ForGood };
            DiskFault { nth: self.rng.random_range(1..=nth_max), fault, lasts }
        });
        Changing { change, fault }
    }

    fn change(&mut self) -> Change {
        match self.rng.random_range(0..30) {
            0..5 => Change::Grow(self.rng.random_range(1..200)),
            5..12 => Change::Snapshot,
            12..15 => Change::Apply(self.rng.random_range(0..8)),
            15..20 => Change::Delete(self.rng.random_range(0..8)),
            20..22 => Change::Rename,
            22..24 => Change::Repair,
            24 => Change::FreeLeaks,
            25 => Change::CopyOnRead(self.rng.random()),
            26..28 => Change::Ask(self.rng.random()),
            _ => Change::Damage(self.rng.random()),
        }
    }

    fn which(&mut self) -> Which {
        [Which::Top, Which::Top, Which::Data, Which::Middle][self.rng.random_range(0..4)]
    }

    fn disk_fault(&mut self) -> DiskFault {
        let fault = [Fault::Eio, Fault::Short, Fault::NoSpace, Fault::NoSpace, Fault::SyncFails]
            [self.rng.random_range(0..5)];
        let nth_max = if fault == Fault::SyncFails { 8 } else { 1 << self.rng.random_range(1..11) };
        let lasts = match fault {
            // For good it is a disk that died.
            Fault::Eio | Fault::Short if !self.once_in(4) => Lasts::Once,
            _ if self.once_in(2) => Lasts::Once,
            _ => Lasts::ForGood,
        };
        DiskFault { nth: self.rng.random_range(1..=nth_max), fault, lasts }
    }

    fn origin_fault(&mut self) -> OriginFault {
        let part = self.rng.random();
        match self.rng.random_range(0..20) {
            0..4 => OriginFault::Slow(1 << self.rng.random_range(0..14)),
            4 => OriginFault::Stall,
            5 => OriginFault::Reset,
            6..8 => OriginFault::Status([500, 502, 503, 504, 408, 404, 412][self.rng.random_range(0..7)]),
            8 => OriginFault::TooMany(self.rng.random_range(0..100)),
            9..12 => OriginFault::Cut(part),
            12 => OriginFault::Truncate(part),
            13 => OriginFault::StallBody(part),
            14 => OriginFault::WrongRange,
            15 => OriginFault::Longer,
            16 => OriginFault::Whole,
            17..19 => OriginFault::Changed(self.rng.random_range(1..20)),
            _ => OriginFault::Dead(self.rng.random_range(1..40)),
        }
    }
}
