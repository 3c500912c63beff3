//! Jobs: processes that run seeds. One that fails ends with the words of the failure; the others are stopped.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use readonce_sim::{
    plan::Plan,
    run::{Figures, Watch, run},
};

use crate::{Args, QEMU_EVERY, ids::Ids};

/// What a failed job ends with.
const FAILED: i32 = 101;

/// Seeds FROM to TO, without TO.
#[derive(Debug, Clone, Copy)]
pub struct Seeds {
    /// The first.
    pub from: u64,
    /// Behind the last.
    pub to: u64,
}

/// A seed that failed, and why.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Which.
    pub seed: u64,
    /// The panic's words.
    pub words: String,
}

/// What `--seeds` takes.
pub fn parse_seeds(text: &str) -> Result<Seeds, String> {
    let (from, to) = text.split_once("..").ok_or("FROM..TO is wanted")?;
    let number = |word: &str| word.parse().map_err(|_| format!("'{word}' is no number"));
    let seeds = Seeds { from: number(from)?, to: number(to)? };
    if seeds.from < seeds.to { Ok(seeds) } else { Err("no seed lies in it: TO is left out".into()) }
}

/// The command that runs a seed again.
pub fn replay(args: &Args, seed: u64) -> String {
    let mut line = format!("cargo run --release -p readonce-sim -- --seed {seed}");
    for word in options(args) {
        line.push(' ');
        line.push_str(&word);
    }
    line
}

/// Options that make a run what it is, apart from its seed.
fn options(args: &Args) -> Vec<String> {
    use clap::ValueEnum;
    let name =
        |value: Option<clap::builder::PossibleValue>| value.expect("all have names").get_name().to_owned();
    let mut options = Vec::new();
    if args.format != readonce_sim::shape::Formats::All {
        options.extend(["--format".into(), name(args.format.to_possible_value())]);
    }
    if args.salt > 0 {
        options.extend(["--salt".into(), args.salt.to_string()]);
    }
    if args.without != Ids::default() {
        options.extend(["--without".into(), args.without.to_string()]);
    }
    if args.qemu_every != QEMU_EVERY {
        options.extend(["--qemu-every".into(), args.qemu_every.to_string()]);
    }
    options
}

/// Starts a process that runs these seeds, every `step`th.
fn start(args: &Args, seeds: Seeds, step: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program is a file"));
    command.args(["--worker", "--seeds", &format!("{}..{}", seeds.from, seeds.to)]);
    command.args(["--step", &step.to_string()]);
    if let Some(seconds) = args.seconds {
        command.args(["--seconds", &seconds.to_string()]);
    }
    command.args(options(args)).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().expect("this program starts again")
}

/// Runs the seeds in processes.
///
/// # Errors
/// The first failure.
pub fn all(args: &Args) -> Result<Figures, Failure> {
    let seeds =
        args.seeds.unwrap_or(Seeds { from: 0, to: if args.seconds.is_some() { u64::MAX } else { 100 } });
    let jobs = args.jobs.clamp(1, (seeds.to - seeds.from).max(1));
    let (tell, told) = mpsc::channel();
    let mut children = Vec::new();
    for job in 0..jobs {
        let mut child = start(args, Seeds { from: seeds.from + job, ..seeds }, jobs);
        let lines = BufReader::new(child.stdout.take().expect("it was piped"));
        children.push(child);
        let tell = tell.clone();
        std::thread::spawn(move || {
            let _ = tell.send(listen(lines));
        });
    }
    drop(tell);
    let mut figures = Figures::default();
    let mut failure = None;
    for result in told {
        match result {
            Ok(some) => figures.add(&some),
            Err(found) => {
                failure = Some(found);
                break;
            }
        }
    }
    for child in &mut children {
        if failure.is_some() {
            let _ = child.kill();
        }
        let _ = child.wait();
    }
    failure.map_or(Ok(figures), Err)
}

/// Reads what a job says: the seed that it is at, the words of its end, or its figures.
fn listen(lines: impl BufRead) -> Result<Figures, Failure> {
    let mut seed = 0;
    let mut words = String::new();
    for line in lines.lines().map_while(Result::ok) {
        if let Some(figures) = line.strip_prefix("figures ") {
            return Ok(parse(figures));
        }
        match line.strip_prefix("seed ").and_then(|number| number.parse().ok()) {
            Some(number) => seed = number,
            None => words = [words, line].join("\n"),
        }
    }
    Err(Failure { seed, words })
}

fn parse(line: &str) -> Figures {
    let mut numbers = line.split(' ').map(|word| word.parse::<u64>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    Figures {
        runs: next(),
        ops: next(),
        crashes: next(),
        closes: next(),
        refusals: next(),
        cut_changes: next(),
        mended: next(),
        faults: next(),
        polls: next(),
        working: Duration::from_nanos(next()),
        whole: Duration::from_nanos(next()),
    }
}

/// Runs seeds here. Says which one it is at; a panic says why and ends the process.
pub fn work(args: &Args, watch: Watch) -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        println!("{info}");
        let _ = std::io::stdout().flush();
        std::process::exit(FAILED);
    }));
    let start = Instant::now();
    let seeds = args.seeds.unwrap_or(Seeds { from: 0, to: 0 });
    let mut figures = Figures::default();
    let mut seed = seeds.from;
    while seed < seeds.to && args.seconds.is_none_or(|max| start.elapsed().as_secs() < max) {
        println!("seed {seed}");
        let plan = Plan::draw(seed, args.format, args.salt).without(&args.without.0);
        let outcome = run(&plan, watch);
        if seeds.to - seeds.from == 1 {
            println!("digest {:016x}", outcome.digest);
        }
        figures.add(&outcome.figures);
        seed = seed.saturating_add(args.step);
    }
    let Figures { runs, ops, crashes, closes, refusals, cut_changes, mended, faults, polls, working, whole } =
        figures;
    let (working, whole) = (working.as_nanos(), whole.as_nanos());
    println!(
        "figures {runs} {ops} {crashes} {closes} {refusals} {cut_changes} {mended} {faults} {polls} {working} {whole}"
    );
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn args(words: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(["readonce-sim"].iter().chain(words))
    }

    #[test]
    fn the_replay_line_says_all_that_makes_a_run() {
        let of = |words: &[&str]| replay(&args(words).expect("good words"), 7);
        let plain = "cargo run --release -p readonce-sim -- --seed 7";
        assert_eq!(of(&["--jobs", "2", "--seconds", "3"]), plain);
        assert_eq!(
            of(&["--format", "qed", "--salt", "3", "--without", "1-4", "--qemu-every", "1"]),
            format!("{plain} --format qed --salt 3 --without 1-4 --qemu-every 1")
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            &["--seeds", "9..3"][..],
            &["--seeds", "3..3"],
            &["--seed", "1", "--seeds", "2..3"],
            &["--jobs", "0"],
            &["--seconds", "0"],
            &["--format", "vmdk"],
            &["--exhaustive", "--seed", "3"],
            &["--show"],
        ] {
            assert!(args(words).is_err(), "{words:?}");
        }
    }
}
