//! A map that lives in memory, of a format that can do everything: subclusters, shared and compressed clusters, unlinking. It
//! holds its caller to every rule of the seam, and what is used again is overwritten at once, so that a late reader shows.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use readonce_format::{
    Abilities, CommitMode, Compressed, Durability, Extent, FormatError, Geometry, Mapper, Mapping,
    Reservation, Room, Unlinked, WritableMapper, codec::Codec, mapper::ReservationHolder,
};
use readonce_storage::{BoxFuture, ReadAt, SimFile, Storage};

use super::origin::{SECTOR, backing_stamp, sector};

/// What a fake image can do.
#[derive(Debug, Clone, Copy)]
pub struct FakeSpec {
    pub geometry: Geometry,
    pub abilities: Abilities,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Absent,
    Zero,
    Data(u64),
    Shared(u64),
    /// Byte offset of the cluster's stream, and its bytes.
    Compressed(u64, u64),
}

pub struct Fake {
    me: Weak<Fake>,
    pub spec: FakeSpec,
    pub file: Arc<SimFile>,
    state: Mutex<State>,
    /// Lookups so far.
    pub lookups: AtomicU64,
}

struct State {
    units: Vec<Unit>,
    /// Bytes.
    end: u64,
    /// The place of a cluster that has some, or room for some, by cluster.
    places: BTreeMap<u64, u64>,
    /// Clusters that may be taken.
    free: Vec<u64>,
    unlinked: Vec<u64>,
    takeable: Vec<u64>,
    /// Reservations held: first unit, units, of whole clusters.
    held: Vec<(u64, u64, Whole)>,
    uncommitted_bytes: u64,
    pub reused_count: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whole {
    Clusters,
    Parts,
    /// A copy changes shared units alone: it may be held beside others, and do nothing.
    Copy,
}

/// What a cluster of a new fake image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Absent,
    Zero,
    Data,
    Shared,
    /// Half of it, by units in turn; the rest is absent.
    SharedHalf,
    Compressed,
}

impl Fake {
    /// An image whose clusters are what `start` says; what they hold is what the backing would show there.
    pub fn new(spec: FakeSpec, start: impl Fn(u64) -> Start) -> Arc<Self> {
        let file = Arc::new(SimFile::new());
        let Geometry { size, cluster_size, fill_unit } = spec.geometry;
        let (mut units, mut end) = (Vec::new(), cluster_size);
        let mut places = BTreeMap::new();
        for cluster in 0..size.div_ceil(cluster_size) {
            let bytes = cluster_bytes(cluster, cluster_size);
            let start = start(cluster);
            let at = end;
            let mut stream = Vec::new();
            if start == Start::Compressed {
                stream = stored_deflate(&bytes);
                // Not aligned, as in life.
                end += stream.len() as u64 + 13;
                write(&file, at, &stream);
            } else if !matches!(start, Start::Absent | Start::Zero) {
                end += cluster_size;
                write(&file, at, &bytes);
                places.insert(cluster, at);
            }
            for unit in 0..cluster_size / fill_unit {
                let at_unit = at + unit * fill_unit;
                units.push(match start {
                    Start::Absent => Unit::Absent,
                    Start::Zero => Unit::Zero,
                    Start::Data => Unit::Data(at_unit),
                    Start::SharedHalf if unit % 2 == 1 => Unit::Absent,
                    Start::Shared | Start::SharedHalf => Unit::Shared(at_unit),
                    Start::Compressed => Unit::Compressed(at, stream.len() as u64),
                });
            }
        }
        end = end.next_multiple_of(cluster_size);
        write(&file, end, &[0]);
        end += cluster_size;
        let state = State {
            units,
            end,
            places,
            free: Vec::new(),
            unlinked: Vec::new(),
            takeable: Vec::new(),
            held: Vec::new(),
            uncommitted_bytes: 0,
            reused_count: 0,
        };
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            spec,
            file,
            state: Mutex::new(state),
            lookups: AtomicU64::new(0),
        })
    }

    /// The image as letters, one a unit.
    pub fn draw(&self) -> String {
        let letter = |unit: &Unit| match unit {
            Unit::Absent => '.',
            Unit::Zero => 'Z',
            Unit::Data(_) => 'D',
            Unit::Shared(_) => 'S',
            Unit::Compressed(..) => 'C',
        };
        let last = self.spec.geometry.size.div_ceil(self.spec.geometry.fill_unit);
        self.state.lock().units.iter().take(last as usize).map(letter).collect()
    }

    /// Clusters that were used again.
    pub fn reused_count(&self) -> u64 {
        self.state.lock().reused_count
    }

    fn per_cluster(&self) -> u64 {
        self.spec.geometry.cluster_size / self.spec.geometry.fill_unit
    }

    fn extent(&self, offset: u64, len_max: u64) -> Extent {
        let Geometry { size, cluster_size, fill_unit } = self.spec.geometry;
        assert!(offset < size && len_max > 0, "lookup at {offset} of {size}");
        self.lookups.fetch_add(1, Ordering::Relaxed);
        let state = self.state.lock();
        let len_max = len_max.min(size - offset);
        let mapping_at = |at: u64| match state.units[(at / fill_unit) as usize] {
            Unit::Absent => Mapping::Absent,
            Unit::Zero => Mapping::Zero,
            Unit::Data(to) => Mapping::Data(to + at % fill_unit),
            Unit::Shared(to) => Mapping::Shared(to + at % fill_unit),
            Unit::Compressed(at_stream, len) => Mapping::Compressed(Compressed {
                at: at_stream,
                len,
                codec: Codec::Deflate,
                skip: at % cluster_size,
            }),
        };
        let mapping = mapping_at(offset);
        let mut end = (offset / fill_unit + 1) * fill_unit;
        while end < offset + len_max {
            let next = mapping_at(end);
            let joins = match (mapping, next) {
                (Mapping::Data(at), Mapping::Data(next)) | (Mapping::Shared(at), Mapping::Shared(next)) => {
                    at + (end - offset) == next
                }
                (Mapping::Compressed(_), Mapping::Compressed(_)) => !end.is_multiple_of(cluster_size),
                (mapping, next) => mapping == next,
            };
            if !joins {
                break;
            }
            end += fill_unit;
        }
        Extent { mapping, len: (end - offset).min(len_max) }
    }

    fn prepare_now(&self, offset: u64, len: u64, room: Room) -> Result<Reservation, FormatError> {
        let Geometry { size, cluster_size, fill_unit } = self.spec.geometry;
        assert!(offset.is_multiple_of(fill_unit) && len.is_multiple_of(fill_unit) && len > 0);
        assert!(offset + len <= size.next_multiple_of(cluster_size), "room past the end");
        let ends = |end: u64| end.is_multiple_of(cluster_size) || end == size.next_multiple_of(fill_unit);
        let mut state = self.state.lock();
        let state = &mut *state;
        let of = |unit: u64| (unit / self.per_cluster()) * self.per_cluster();
        let (first, mut count) = (offset / fill_unit, len / fill_unit);
        let needs_whole = |unit: Unit| {
            matches!(unit, Unit::Shared(_) | Unit::Compressed(..))
                || (room == Room::Zero && matches!(unit, Unit::Data(_)))
        };
        let asked = &state.units[first as usize..(first + count) as usize];
        let whole = match room {
            Room::Copy => Whole::Copy,
            _ if asked.iter().any(|&unit| needs_whole(unit)) => Whole::Clusters,
            _ => Whole::Parts,
        };
        if whole != Whole::Parts {
            assert!(offset.is_multiple_of(cluster_size) && ends(offset + len), "whole clusters");
        } else if room == Room::Data {
            assert!(!asked.iter().any(|unit| matches!(unit, Unit::Data(_))), "room over data");
        }
        match room {
            Room::Zero => assert!(self.spec.abilities.zero),
            Room::Copy => assert!(len == cluster_size || offset + len > size),
            Room::Data => {}
        }
        if whole == Whole::Clusters && room == Room::Zero {
            assert!(self.spec.abilities.unlink);
        }
        for &(held_first, held_count, held_whole) in &state.held {
            let overlaps = |a: u64, a_end: u64| a < held_first + held_count && held_first < a_end;
            let clusters = || {
                let end = of(first + count - 1) + self.per_cluster();
                overlaps(of(first), end)
                    || (of(held_first) < end
                        && of(first) < of(held_first + held_count - 1) + self.per_cluster())
            };
            if whole == Whole::Copy || held_whole == Whole::Copy {
                continue;
            }
            assert!(!overlaps(first, first + count), "two reservations of one unit");
            if whole == Whole::Clusters || held_whole == Whole::Clusters {
                assert!(!clusters(), "parts are reserved beside a whole cluster");
            }
        }
        let mut at = None;
        match (room, whole) {
            (Room::Zero, _) => {}
            (_, Whole::Clusters | Whole::Copy) => {
                // One cluster at a time: reservations may be shorter than asked.
                count = count.min(self.per_cluster());
                at = Some(take(state, cluster_size));
            }
            (_, Whole::Parts) => {
                count = count.min(self.per_cluster() - first % self.per_cluster());
                let cluster = first / self.per_cluster();
                let units = &state.units[of(first) as usize..(of(first) + self.per_cluster()) as usize];
                let shared = units.iter().any(|unit| matches!(unit, Unit::Shared(_) | Unit::Compressed(..)));
                if shared {
                    return Err(FormatError::CopyFirst);
                }
                let place = match state.places.get(&cluster) {
                    Some(&place) => place,
                    None => {
                        let place = take(state, cluster_size);
                        state.places.insert(cluster, place);
                        place
                    }
                };
                at = Some(place + first % self.per_cluster() * fill_unit);
            }
        }
        state.held.push((first, count, whole));
        let holder = Holder { fake: self.me.upgrade().expect("it is in use"), room, whole };
        Ok(Reservation::new(offset, count * fill_unit, at, Arc::new(holder)))
    }
}

fn take(state: &mut State, cluster_size: u64) -> u64 {
    state.free.pop().unwrap_or_else(|| {
        state.end += cluster_size;
        state.end - cluster_size
    })
}

struct Holder {
    fake: Arc<Fake>,
    room: Room,
    whole: Whole,
}

impl Holder {
    fn let_go(&self, state: &mut State, first: u64, count: u64) {
        let at = state.held.iter().position(|held| *held == (first, count, self.whole));
        state.held.remove(at.expect("a reservation ends once"));
    }
}

impl ReservationHolder for Holder {
    fn commit(&self, guest: u64, len: u64, at: Option<u64>, mode: CommitMode) -> u64 {
        let unit_bytes = self.fake.spec.geometry.fill_unit;
        let (first, count) = (guest / unit_bytes, len / unit_bytes);
        let mut state = self.fake.state.lock();
        let state = &mut *state;
        self.let_go(state, first, count);
        let mut linked = 0;
        let cluster_units = first as usize..(first + self.fake.per_cluster()) as usize;
        let is_shared = |unit: &Unit| matches!(unit, Unit::Shared(_) | Unit::Compressed(..));
        if self.whole == Whole::Copy && !state.units[cluster_units].iter().any(is_shared) {
            state.free.extend(at);
            return len;
        }
        // An image may end inside a cluster, which goes as a whole all the same.
        let affected = match self.whole {
            Whole::Clusters | Whole::Copy => {
                (first + count).next_multiple_of(self.fake.per_cluster()) - first
            }
            Whole::Parts => count,
        };
        for index in 0..affected {
            let unit = state.units[(first + index) as usize];
            let to = at.map(|at| at + index * unit_bytes);
            let new = match (self.room, unit, mode) {
                (Room::Data, Unit::Absent, _) => Unit::Data(to.expect("a place")),
                (Room::Zero, Unit::Absent, _) => Unit::Zero,
                (_, _, CommitMode::IfAbsent) => continue,
                (Room::Data, Unit::Data(_), _) => panic!("data linked over data"),
                (Room::Data, ..) => Unit::Data(to.expect("a place")),
                (Room::Zero, ..) => Unit::Zero,
                (Room::Copy, Unit::Shared(_) | Unit::Compressed(..), _) => Unit::Data(to.expect("a place")),
                (Room::Copy, other, _) => other,
            };
            linked += if index < count { unit_bytes } else { 0 };
            state.units[(first + index) as usize] = new;
        }
        if self.whole != Whole::Parts {
            let per_cluster = self.fake.per_cluster();
            for cluster in first / per_cluster..(first + count).div_ceil(per_cluster) {
                if let Some(before) = state.places.remove(&cluster) {
                    state.unlinked.push(before);
                }
                if let Some(at) = at {
                    state.places.insert(cluster, at);
                }
            }
        }
        state.uncommitted_bytes += linked;
        linked
    }

    fn release(&self, guest: u64, len: u64, at: Option<u64>) {
        let unit_bytes = self.fake.spec.geometry.fill_unit;
        let mut state = self.fake.state.lock();
        self.let_go(&mut state, guest / unit_bytes, len / unit_bytes);
        if let (Some(at), Whole::Clusters | Whole::Copy) = (at, self.whole) {
            state.free.push(at);
        }
    }
}

impl Mapper for Fake {
    fn geometry(&self) -> Geometry {
        self.spec.geometry
    }

    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        Some(Ok(self.extent(offset, len_max)))
    }

    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>> {
        Box::pin(std::future::ready(Ok(self.extent(offset, len_max))))
    }
}

impl WritableMapper for Fake {
    fn abilities(&self) -> Abilities {
        self.spec.abilities
    }

    fn prepare(&self, offset: u64, len: u64, room: Room) -> BoxFuture<'_, Result<Reservation, FormatError>> {
        Box::pin(async move {
            // Something to wait on, so that others come in between.
            self.file.read(0, 0).await?;
            self.prepare_now(offset, len, room)
        })
    }

    fn flush(&self, _: Durability) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            let unlinked = std::mem::take(&mut self.state.lock().unlinked);
            self.file.sync().await?;
            let mut state = self.state.lock();
            state.uncommitted_bytes = 0;
            state.takeable.extend(unlinked);
            Ok(())
        })
    }

    fn unlinked_bytes(&self) -> u64 {
        self.state.lock().uncommitted_bytes
    }

    fn take_unlinked(&self) -> Option<Unlinked> {
        let taken = std::mem::take(&mut self.state.lock().takeable);
        if taken.is_empty() {
            return None;
        }
        let fake = self.me.upgrade().expect("it is in use");
        Some(Unlinked::new(move || {
            let junk: Vec<u8> = (0..fake.spec.geometry.cluster_size).map(|at| at as u8 | 1).collect();
            for &at in &taken {
                write(&fake.file, at, &junk);
            }
            let mut state = fake.state.lock();
            state.reused_count += taken.len() as u64;
            state.free.extend(taken);
        }))
    }

    fn settle(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn close(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        assert!(self.state.lock().held.is_empty(), "something is in flight");
        Box::pin(std::future::ready(Ok(())))
    }

    fn reclaim(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn write(file: &SimFile, at: u64, bytes: &[u8]) {
    // Whatever the mode of the `_now` calls is.
    let mut write = file.write(at, bytes.to_vec().into());
    let waker = std::task::Waker::noop();
    while write.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending() {}
}

/// What the backing shows in a cluster.
pub fn cluster_bytes(cluster: u64, cluster_size: u64) -> Vec<u8> {
    let first = cluster * cluster_size / SECTOR;
    (first..first + cluster_size / SECTOR).flat_map(|at| sector(backing_stamp(at))).collect()
}

/// Raw deflate in blocks that are not compressed (RFC 1951, 3.2.4), with somebody else's bytes behind it.
pub fn stored_deflate(bytes: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    let blocks: Vec<_> = bytes.chunks(40_000).collect();
    for (index, block) in blocks.iter().enumerate() {
        let len = block.len() as u16;
        stream.push(u8::from(index + 1 == blocks.len()));
        stream.extend_from_slice(&len.to_le_bytes());
        stream.extend_from_slice(&(!len).to_le_bytes());
        stream.extend_from_slice(block);
    }
    stream.extend_from_slice(b"another's");
    stream
}
