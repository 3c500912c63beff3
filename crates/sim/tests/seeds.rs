//! Some hundred seeds, the same seed twice, and the short scripts whose every crash point is quickly done.

use readonce_sim::{
    exhaustive,
    plan::Plan,
    run::{Outcome, Watch, run},
    shape::Formats,
};

/// Seeds that a test of every day runs; a failing one is named, with the command that cuts it down.
const SEEDS: u64 = 60;

/// Seeds that found something once, and what; all qcow2. Drawn with the program's own `--qemu-every`, which the draw depends on.
const FOUND: [(u64, &str); 4] = [
    (209_746, "a refcount block that counts itself was reclaimed beside an allocation"),
    (212_568, "of two syncs at the same time one alone was told that writes were lost"),
    (217_810, "an error of a check's second read was not counted"),
    (300_161, "a repair set flags before it lowered refcounts"),
];

fn one(seed: u64, formats: Formats) -> Outcome {
    replay(seed, formats, 60)
}

fn replay(seed: u64, formats: Formats, qemu_every: u32) -> Outcome {
    let plan = Plan::draw(seed, formats, 0);
    let watch = Watch { bug: None, qemu_every };
    std::panic::catch_unwind(|| run(&plan, watch)).unwrap_or_else(|panic| {
        eprintln!("replay: cargo run --release -p readonce-sim -- --seed {seed}");
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn seeds_keep_the_promises() {
    let mut crashes = 0;
    for seed in 0..SEEDS {
        crashes += one(seed, Formats::All).figures.crashes;
    }
    assert!(crashes > SEEDS / 2, "power losses are drawn: {crashes}");
}

#[test]
fn what_was_found_once_stays_mended() {
    for (seed, what) in FOUND {
        eprintln!("{seed}: {what}");
        replay(seed, Formats::Qcow2, 200);
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        assert_eq!(one(seed, Formats::All).digest, one(seed, Formats::All).digest, "seed {seed}");
    }
    assert_ne!(one(1, Formats::All).digest, one(2, Formats::All).digest);
}

#[test]
fn every_crash_point_of_short_scripts() {
    let short = ["first fill", "group commit", "repair"];
    let wanted = |name: &str| name.starts_with("qed") && short.iter().any(|end| name.ends_with(end));
    let counts = exhaustive::some(wanted, |_| ());
    assert!(counts.points > 50, "the machine died at many points: {counts:?}");
}
