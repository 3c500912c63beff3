//! Shrink: the shortest history that still fails.
//!
//! - Elements are left out in ever smaller pieces, as long as what is left fails at the same place, with the same words; other schedules are tried too,
//!   because fewer requests are another schedule anyway.
//! - It ends after `SHRINK_TIME_MAX`; what it has then still fails.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use readonce_sim::plan::{Id, Plan};

use crate::{
    Args,
    ids::Ids,
    job::{self, Failure, Seeds},
};

/// How long it is tried.
const SHRINK_TIME_MAX: Duration = Duration::from_secs(60);
/// Schedules that are tried for each piece.
const SALTS: u64 = 6;

/// Cuts the plan of `seed` down, and prints what is left.
pub fn shrink(args: &Args, failed: &Failure) {
    let seed = failed.seed;
    let wrong = wrong(&failed.words);
    let start = Instant::now();
    let mut best =
        Args { seeds: Some(Seeds { from: seed, to: seed + 1 }), jobs: 1, seconds: None, ..args.clone() };
    let plan = Plan::draw(seed, args.format, 0);
    let mut left: Vec<Id> = plan.ids().into_iter().filter(|id| !best.without.0.contains(id)).collect();
    let mut words = String::new();
    let mut piece = left.len().div_ceil(2).max(1);
    'pieces: loop {
        let mut at = 0;
        let mut progress = false;
        while at < left.len() {
            if start.elapsed() > SHRINK_TIME_MAX {
                break 'pieces;
            }
            let end = (at + piece).min(left.len());
            let mut without: BTreeSet<Id> = best.without.0.clone();
            without.extend(&left[at..end]);
            match fails(&best, &Ids(without), &wrong) {
                Some((tried, failure)) => {
                    best = tried;
                    words = failure.words;
                    left.drain(at..end);
                    progress = true;
                }
                None => at = end,
            }
        }
        match (piece, progress) {
            (1, false) => break,
            (1, true) => {}
            _ => piece = piece.div_ceil(2),
        }
    }
    let plan = Plan::draw(seed, best.format, best.salt).without(&best.without.0);
    println!("\nits shortest history, found in {:.0?}, {} elements:", start.elapsed(), left.len());
    println!("  {:?}", plan.shape);
    for session in plan.sessions {
        println!("  session: copy on read {}, budget {}", session.copy_on_read, session.budget);
        session.before.iter().for_each(|(id, change)| println!("    [{id}] before: {change:?}"));
        session
            .disk_faults
            .iter()
            .for_each(|(id, fault)| println!("    [{id}] {:?}: {:?}", fault.0, fault.1));
        session
            .origin_faults
            .iter()
            .for_each(|(id, fault)| println!("    [{id}] request {} meets {:?}", fault.0, fault.1));
        for (number, guest) in session.guests.iter().enumerate() {
            guest.iter().for_each(|(id, op)| println!("    [{id}] guest {number}: {op:?}"));
        }
        println!("    end: {:?}", session.end);
    }
    if !words.is_empty() {
        println!("it fails with: {words}");
    }
    println!("replay: {}", job::replay(&best, seed));
}

/// Where the panic was, and what it says first, up to its numbers: other words are another failure.
fn wrong(words: &str) -> String {
    let mut lines = words.lines().skip_while(|line| !line.contains("panicked at"));
    let place = lines.next().unwrap_or_default();
    let says = lines.next().unwrap_or_default();
    let says = says.split(|letter: char| letter.is_ascii_digit()).next().unwrap_or_default();
    format!("{place} {says}")
}

fn fails(best: &Args, without: &Ids, like: &str) -> Option<(Args, Failure)> {
    // The schedule that failed last is the likeliest.
    let salts = std::iter::once(best.salt).chain((0..SALTS).filter(|salt| *salt != best.salt));
    salts.into_iter().find_map(|salt| {
        let tried = Args { without: without.clone(), salt, ..best.clone() };
        let failure = job::all(&tried).err().filter(|failure| wrong(&failure.words) == like)?;
        Some((tried, failure))
    })
}

#[cfg(test)]
mod tests {
    use super::wrong;

    #[test]
    fn another_cell_is_the_same_failure_and_another_promise_is_not() {
        let of = |says: &str| wrong(&format!("\npanicked at crates/sim/src/model.rs:265:17:\n{says}"));
        assert_eq!(of("read: cell 12 is 0x5"), of("read: cell 7 holds bytes of two writes"));
        assert_ne!(of("read: cell 12 is 0x5"), of("after the crash: cell 12 is 0x5"));
    }
}
