//! Some hundred seeds, the same seed twice, and the short scripts whose every crash point is quickly done.

use readonce_sim::{
    exhaustive,
    plan::Plan,
    run::{Outcome, Watch, run},
    shape::Formats,
};

/// Seeds that a test of every day runs; a failing one is named, with the command that cuts it down.
const SEEDS: u64 = 60;

fn one(seed: u64) -> Outcome {
    ask(seed, 60)
}

fn ask(seed: u64, qemu_every: u32) -> Outcome {
    let plan = Plan::draw(seed, Formats::All, 0);
    let watch = Watch { qemu_every };
    std::panic::catch_unwind(|| run(&plan, watch)).unwrap_or_else(|panic| {
        eprintln!("replay: cargo run --release -p readonce-sim -- --seed {seed} --qemu-every {qemu_every}");
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn seeds_keep_the_promises() {
    let mut crashes = 0;
    for seed in 0..SEEDS {
        crashes += one(seed).figures.crashes;
    }
    assert!(crashes > SEEDS / 2, "power losses are drawn: {crashes}");
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        let digest = one(seed).digest;
        assert_eq!(digest, ask(seed, 0).digest, "seed {seed}, whether QEMU is asked or not");
    }
    assert_ne!(one(1).digest, one(2).digest);
}

#[test]
fn every_crash_point_of_short_scripts() {
    let short = ["first fill", "group commit", "repair"];
    let wanted = |name: &str| name.starts_with("qed") && short.iter().any(|end| name.ends_with(end));
    let counts = exhaustive::some(wanted, |_| ());
    assert!(counts.points > 50, "the machine died at many points: {counts:?}");
}
