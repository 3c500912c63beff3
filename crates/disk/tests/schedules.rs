//! Under every schedule that shuttle draws: the in-flight table, with threads that fetch, store and write one unit, and the two
//! races of 2011 by name (the image is a map and its bytes behind locks of their own, as in the engine); and `uses`, with threads
//! that read a place which is unlinked and used again.
#![allow(clippy::disallowed_methods, reason = "threads are what is tested")]

use bytes::Bytes;
use readonce_disk::inflight::{
    Budget, Budgets, Delivery, Fetch, InFlight, Leave, Read, Store, Stored, Write,
};
use shuttle::{
    sync::{Arc, Mutex},
    thread,
};

/// The module under test, its atomics drawn by shuttle.
#[path = "../src/uses.rs"]
#[allow(dead_code, reason = "a test takes what it needs")]
mod uses;
mod atomics {
    pub use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
}

const UNIT: usize = 8;
const SCHEDULES: usize = 3_000;

#[derive(Default)]
struct Image {
    table: Mutex<Option<InFlight<()>>>,
    /// `None`: absent.
    data: Mutex<Option<[u8; UNIT]>>,
}

impl Image {
    fn new() -> Arc<Self> {
        let image = Self::default();
        *image.table.lock().unwrap() = Some(InFlight::new(UNIT as u64, Budgets::default()));
        Arc::new(image)
    }

    fn table<T>(&self, work: impl FnOnce(&mut InFlight<()>) -> T) -> T {
        work(self.table.lock().unwrap().as_mut().expect("made in new"))
    }

    fn fetch(self: &Arc<Self>, fetch: Fetch) -> thread::JoinHandle<()> {
        let image = Arc::clone(self);
        thread::spawn(move || {
            for (at, piece) in [(0, &b"back"[..]), (4, &b"ing!"[..])] {
                thread::yield_now();
                for store in image.table(|table| table.fetched(fetch.id, at, piece)) {
                    image.store(store, Mode::IfAbsent);
                }
            }
            image.table(|table| table.fetch_ended(&fetch, None));
        })
    }

    fn store(&self, store: Store<()>, mode: Mode) {
        thread::yield_now();
        let bytes: [u8; UNIT] = store.bytes[..].try_into().expect("a whole unit");
        self.link(bytes, if store.room.is_some() { Mode::Overwrite } else { mode });
        self.table(|table| table.stored(store.unit, Stored::Linked));
    }

    fn link(&self, bytes: [u8; UNIT], mode: Mode) {
        let mut data = self.data.lock().unwrap();
        match (&*data, mode) {
            (Some(_), Mode::IfAbsent) => {}
            (Some(_), Mode::Overwrite) => panic!("data is written in place, never linked over"),
            (None, _) => *data = Some(bytes),
        }
    }

    fn write(self: &Arc<Self>, from: usize, bytes: &[u8]) {
        loop {
            if let Some(data) = &mut *self.data.lock().unwrap() {
                data[from..from + bytes.len()].copy_from_slice(bytes);
                return;
            }
            thread::yield_now();
            let mut fetch = None;
            let step = self.table(|table| {
                let absent = || self.data.lock().unwrap().is_none();
                match table.write(0, from as u64, bytes) {
                    Write::NeedsRoom => {
                        let leave = leave(table, Budget::Guest);
                        table.begin_prepare(0, leave);
                        Write::NeedsRoom
                    }
                    // Looked at again under the table's lock.
                    Write::Free if absent() && bytes.len() == UNIT => {
                        table.begin_write(0);
                        Write::TakenOver
                    }
                    Write::Free if absent() => {
                        table.begin_write(0);
                        let room = ((), leave(table, Budget::Guest));
                        let (begun, store) = table.begin_guest(0, room, from as u64, bytes, UNIT as u64);
                        fetch = begun;
                        Write::Absorbed(store)
                    }
                    other => other,
                }
            });
            let fetching = fetch.map(|fetch| self.fetch(fetch));
            match step {
                Write::Absorbed(store) => {
                    if let Some(store) = store {
                        self.store(store, Mode::Overwrite);
                    }
                    if let Some(fetching) = fetching {
                        fetching.join().unwrap();
                    }
                    return;
                }
                Write::TakenOver => {
                    thread::yield_now();
                    self.link(bytes.try_into().expect("a whole unit"), Mode::Overwrite);
                    self.table(|table| table.end_write(0));
                    return;
                }
                Write::Wait(_) | Write::Free => thread::yield_now(),
                Write::NeedsRoom => {
                    thread::yield_now();
                    let store = self.table(|table| table.attach(0, (), from as u64, bytes));
                    if let Some(store) = store {
                        self.store(store, Mode::Overwrite);
                    }
                    return;
                }
            }
        }
    }

    fn read(self: &Arc<Self>) -> Bytes {
        loop {
            if let Some(data) = *self.data.lock().unwrap() {
                return Bytes::copy_from_slice(&data);
            }
            thread::yield_now();
            let mut begun = None;
            let read = self.table(|table| match table.read(0, 0..UNIT as u64) {
                Read::Free if self.data.lock().unwrap().is_none() => {
                    let leave = leave(table, Budget::Fetch);
                    begun = Some(table.begin_fetch(0, leave, UNIT as u64));
                    table.read(0, 0..UNIT as u64)
                }
                other => other,
            });
            let fetching = begun.map(|fetch| self.fetch(fetch));
            let told = match read {
                Read::Known(bytes) => Some(bytes),
                Read::Free => None,
                Read::Wait(mut told, again) => {
                    assert!(again.is_none(), "nothing has failed");
                    loop {
                        match told.try_recv() {
                            Ok(Delivery::Bytes(bytes)) => break Some(bytes),
                            Ok(Delivery::Retry) => break None,
                            Ok(Delivery::Failed(error)) => panic!("{error}"),
                            Err(_) => thread::yield_now(),
                        }
                    }
                }
            };
            if let Some(fetching) = fetching {
                fetching.join().unwrap();
            }
            if let Some(bytes) = told {
                return bytes;
            }
        }
    }
}

fn leave(table: &mut InFlight<()>, budget: Budget) -> Leave {
    table.admit(budget).expect("one unit has room")
}

#[derive(Clone, Copy)]
enum Mode {
    IfAbsent,
    Overwrite,
}

/// A reader beside writers; afterwards every write is there, and the reader saw each of them whole or not at all.
fn race(writes: &'static [(usize, &'static [u8])]) {
    shuttle::check_random(
        move || {
            let image = Image::new();
            let reader = {
                let image = Arc::clone(&image);
                thread::spawn(move || image.read())
            };
            let writers: Vec<_> = writes
                .iter()
                .map(|&(from, bytes)| {
                    let image = Arc::clone(&image);
                    thread::spawn(move || {
                        image.write(from, bytes);
                        let now = image.read();
                        assert_eq!(&now[from..from + bytes.len()], bytes, "a completed write is read");
                    })
                })
                .collect();
            let seen = reader.join().unwrap();
            for writer in writers {
                writer.join().unwrap();
            }
            let mut whole = *b"backing!";
            for &(from, bytes) in writes {
                let part = from..from + bytes.len();
                assert!(
                    seen[part.clone()] == *bytes || seen[part.clone()] == whole[part.clone()],
                    "{seen:?}"
                );
                whole[part].copy_from_slice(bytes);
            }
            assert_eq!(&image.read()[..], whole);
            image.table(|table| assert!(table.is_empty()));
        },
        SCHEDULES,
    );
}

#[test]
fn race_of_2011_a_whole_cluster_write_during_a_fill() {
    race(&[(0, b"WWWWWWWW")]);
}

#[test]
fn race_of_2011_a_write_to_another_sector_of_the_filling_cluster() {
    race(&[(2, b"WW")]);
}

#[test]
fn two_writes_to_parts_of_one_cluster_and_a_fill() {
    race(&[(0, b"ab"), (5, b"xyz")]);
}

#[test]
fn writes_that_cover_a_cluster_together_need_no_backing() {
    race(&[(0, b"abcd"), (4, b"wxyz")]);
}

/// A place in the file that a map names until it is unlinked; used again, it holds another's bytes.
#[derive(Default)]
struct Place {
    uses: uses::Uses,
    linked: Mutex<bool>,
    used_again: Mutex<bool>,
}

impl Place {
    fn linked() -> Arc<Self> {
        Arc::new(Self { linked: Mutex::new(true), ..Self::default() })
    }

    /// Looks up, then reads.
    fn read(&self) {
        let inside = self.uses.enter();
        if *self.linked.lock().unwrap() {
            thread::yield_now();
            assert!(!*self.used_again.lock().unwrap(), "another's bytes are read");
        }
        drop(inside);
    }

    fn unlink_and_use_again(&self) {
        *self.linked.lock().unwrap() = false;
        shuttle::future::block_on(self.uses.quiesce());
        *self.used_again.lock().unwrap() = true;
    }
}

#[test]
fn what_was_unlinked_is_used_again_only_when_its_readers_have_left() {
    shuttle::check_random(
        || {
            let place = Place::linked();
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    let place = Arc::clone(&place);
                    thread::spawn(move || (0..2).for_each(|_| place.read()))
                })
                .collect();
            place.unlink_and_use_again();
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        },
        SCHEDULES,
    );
}

#[test]
fn several_waits_for_readers_end_and_one_given_up_misleads_none() {
    shuttle::check_random(
        || {
            let places = [Place::linked(), Place::linked()];
            // Both places belong to one image.
            let image = Arc::clone(&places[0]);
            let readers: Vec<_> = (0..2)
                .map(|at| {
                    let (image, place) = (Arc::clone(&image), Arc::clone(&places[at]));
                    thread::spawn(move || {
                        let inside = image.uses.enter();
                        if *place.linked.lock().unwrap() {
                            thread::yield_now();
                            assert!(!*place.used_again.lock().unwrap(), "another's bytes are read");
                        }
                        drop(inside);
                    })
                })
                .collect();
            let waiters: Vec<_> = places
                .iter()
                .map(|place| {
                    let (image, place) = (Arc::clone(&image), Arc::clone(place));
                    thread::spawn(move || {
                        *place.linked.lock().unwrap() = false;
                        {
                            let mut given_up = Box::pin(image.uses.quiesce());
                            let waker = std::task::Waker::noop();
                            let _ = given_up.as_mut().poll(&mut std::task::Context::from_waker(waker));
                        }
                        shuttle::future::block_on(image.uses.quiesce());
                        *place.used_again.lock().unwrap() = true;
                    })
                })
                .collect();
            readers.into_iter().chain(waiters).for_each(|thread| thread.join().unwrap());
        },
        SCHEDULES,
    );
}
