//! `readonce-sim`: runs seeds, counts what they did, and cuts a failing one down to its shortest history.
//!
//! - Each job is a process of its own that runs its share of the seeds; a panic ends it, and its last words are the failure.
//! - `shrink`: what can be left out. `exhaustive`: every crash point of short scripts.
//!
//! Not here: what a run is (`readonce_sim::run`).

#![allow(
    clippy::disallowed_methods,
    reason = "it measures itself by the real clock, and decides nothing by it"
)]

mod ids;
mod job;
mod shrink;

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use readonce_sim::{
    exhaustive,
    plan::Plan,
    run::{Figures, Watch},
    shape::Formats,
    verdict,
};

use crate::{ids::Ids, job::Seeds};

/// What `--qemu-every` is where it is not said.
const QEMU_EVERY: u32 = 200;

/// Runs the engine from seeds, under every fault, against a flat model
#[derive(Debug, Clone, Parser)]
#[command(name = "readonce-sim")]
struct Args {
    /// One seed
    #[arg(long, value_name = "N", conflicts_with_all = ["seeds", "seconds"])]
    seed: Option<u64>,
    /// Seeds FROM to TO, without TO
    #[arg(long, value_name = "FROM..TO", value_parser = job::parse_seeds)]
    seeds: Option<Seeds>,
    /// Seeds from --seeds or 0 on, for so long
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Processes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    jobs: u64,
    /// Which formats are drawn
    #[arg(long, value_enum, default_value_t = Formats::All)]
    format: Formats,
    /// Of so many looks at an image, one asks qemu-img; 0: none
    #[arg(long, value_name = "N", default_value_t = QEMU_EVERY)]
    qemu_every: u32,
    /// Leaves elements of the plan out (`3,7-9`)
    #[arg(long, value_name = "IDS", default_value = "")]
    without: Ids,
    /// Draws another schedule and other crashes for the same plan
    #[arg(long, value_name = "N", default_value_t = 0)]
    salt: u64,
    /// Prints the plan of the seed
    #[arg(long, requires = "seed")]
    show: bool,
    /// A failing seed is not cut down
    #[arg(long)]
    no_shrink: bool,
    /// Every crash point of short scripts, and every subset of what was not synced up to a bound
    #[arg(long, conflicts_with_all = ["seed", "seeds", "seconds", "without", "salt", "show", "jobs"])]
    exhaustive: bool,
    /// Runs the seeds in this process
    #[arg(long, hide = true)]
    worker: bool,
    /// Of seeds FROM on, every so many
    #[arg(long, hide = true, default_value_t = 1)]
    step: u64,
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    if args.exhaustive {
        exhaustive::all(args.format, |told| println!("{told}"));
        return ExitCode::SUCCESS;
    }
    if args.qemu_every > 0 && !verdict::qemu_is_there() {
        eprintln!("qemu-img is not installed (Debian: qemu-utils); only readonce's own check is asked");
        args.qemu_every = 0;
    }
    let watch = Watch { qemu_every: args.qemu_every };
    if args.worker {
        return job::work(&args, watch);
    }
    if let Some(seed) = args.seed {
        let plan = Plan::draw(seed, args.format, args.salt).without(&args.without.0);
        if args.show {
            println!("{plan:#?}");
        }
        args.seeds = Some(Seeds { from: seed, to: seed + 1 });
    }
    match job::all(&args) {
        Ok(figures) => {
            print(&figures);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("seed {} failed: {}", failure.seed, failure.words);
            if !args.no_shrink {
                shrink::shrink(&args, &failure);
            } else {
                println!("replay: {}", job::replay(&args, failure.seed));
            }
            ExitCode::FAILURE
        }
    }
}

fn print(figures: &Figures) {
    let rate = |time: Duration| figures.ops as f64 / time.as_secs_f64().max(1e-9);
    println!(
        "{} runs, {} guest operations, {} power losses while guests were at work, {} while images were changed, {} clean closes, \
         {} images refused by their disk, {} damaged images repaired, {} faults",
        figures.runs,
        figures.ops,
        figures.crashes,
        figures.cut_changes,
        figures.closes,
        figures.refusals,
        figures.mended,
        figures.faults
    );
    println!(
        "{:.0} operations/s on one core at work; {:.0} with checks and read-backs; {:.1} steps an operation",
        rate(figures.working),
        rate(figures.whole),
        figures.polls as f64 / figures.ops.max(1) as f64
    );
}
