//! Every target over its corpus and over seeded random bytes, on the stable toolchain.
//!
//! - No input takes more memory than [`MEMORY_MAX`] beyond what was there before, counted by the allocator.
//! - An input that fails is kept in a file, which the example `again` and libFuzzer run again.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs, panic,
    path::{Path, PathBuf},
};

use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};
use readonce_fuzz::TARGETS;

/// Bytes that one input may take.
const MEMORY_MAX: usize = 192 << 20;

/// Counts what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(more: isize) {
    // A thread that ends frees after its counters are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + more);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("it can be read").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has no corpus");
    files
}

/// Runs one input; a failure names it and keeps it.
fn one(target: &str, run: fn(&[u8]), name: &str, input: &[u8]) {
    let before = HELD.with(Cell::get);
    MOST.with(|most| most.set(before));
    let result = panic::catch_unwind(|| run(input));
    let took = MOST.with(Cell::get) - before;
    let result = result.map_err(|_| "it panics".to_owned()).and_then(|()| {
        if took <= MEMORY_MAX as isize { Ok(()) } else { Err(format!("it takes {took} bytes of memory")) }
    });
    if let Err(error) = result {
        let kept = std::env::temp_dir().join(format!("fuzz-{target}-{name}"));
        fs::write(&kept, input).expect("the folder for temporary files can be written");
        panic!(
            "{target}, input {name}: {error}. Again: FUZZ_TELL=1 cargo run -p readonce-fuzz --example again {target} {}",
            kept.display()
        );
    }
}

fn check(target: &str, random_count: u64) {
    let (_, run) = *TARGETS.iter().find(|(name, _)| *name == target).expect("it is in the list");
    for path in corpus(target) {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        one(target, run, &name, &fs::read(&path).expect("it can be read"));
    }
    let first = std::env::var("FUZZ_SEED").map_or(0, |seed| seed.parse().expect("FUZZ_SEED is a number"));
    let count = std::env::var("FUZZ_COUNT")
        .map_or(random_count, |count| count.parse().expect("FUZZ_COUNT is a number"));
    for seed in first..first + count {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut input = vec![0; rng.random_range(1..600)];
        rng.fill_bytes(&mut input);
        one(target, run, &format!("seed-{seed}"), &input);
    }
}

macro_rules! targets {
    ($($name:ident: $count:expr,)*) => {
        $(#[test] fn $name() { check(stringify!($name), $count); })*

        #[test]
        fn none_is_left_out() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(TARGETS.map(|(name, _)| name), tested);
        }
    };
}

targets! {
    qed_image: 100,
    qcow2_image: 100,
    image_bytes: 200,
    codec: 500,
    nbd_server: 100,
    http_answers: 1000,
    locator: 1000,
    validator: 1000,
    words: 1000,
    nbd_client: 500,
    trace: 1000,
}
