//! Some hundred seeds, the same seed twice, and the short scripts whose every crash point is quickly done.

use readonce_sim::{
    exhaustive,
    plan::Plan,
    run::{Outcome, Watch, run},
    shape::Formats,
};

/// Seeds that a test of every day runs; a failing one is named, with the command that cuts it down.
const SEEDS: u64 = 60;

fn one(seed: u64, formats: Formats) -> Outcome {
    ask(seed, formats, 60)
}

fn ask(seed: u64, formats: Formats, qemu_every: u32) -> Outcome {
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
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        let digest = one(seed, Formats::All).digest;
        assert_eq!(digest, ask(seed, Formats::All, 0).digest, "seed {seed}, whether QEMU is asked or not");
    }
    assert_ne!(one(1, Formats::All).digest, one(2, Formats::All).digest);
}

/// The disk fails while the image is opened, and its backing is being tried behind it: the image stayed locked until that was given up.
#[test]
fn an_open_that_fails_holds_no_lock() {
    one(2, Formats::Qcow2);
}

/// The refcount table grows while what a crash left is looked for: the scan read it where it lay before, among guest data by then, and had
/// a refcount block handed out again.
#[test]
fn a_refcount_table_that_grows_costs_no_refcount_block() {
    one(2_013_940, Formats::Qcow2);
}

#[test]
fn every_crash_point_of_short_scripts() {
    let short = ["first fill", "group commit", "repair"];
    let wanted = |name: &str| name.starts_with("qed") && short.iter().any(|end| name.ends_with(end));
    let counts = exhaustive::some(wanted, |_| ());
    assert!(counts.points > 50, "the machine died at many points: {counts:?}");
}
