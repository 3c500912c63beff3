//! The lean client from the command line: `lean SOCKET read|write SIZE DEPTH SECONDS [SPAN] [seq]`, sizes in bytes.

use std::time::Duration;

use readonce_testkit::nbd_client::lean::{Address, Op, Pattern, Until, Workload, run};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |at: usize| args[at].parse::<u64>().expect("a number");
    let workload = Workload {
        op: if args[2] == "write" { Op::Write } else { Op::Read },
        size: u32::try_from(number(3)).expect("at most 32 bits"),
        depth: usize::try_from(number(4)).expect("at most 64 bits"),
        pattern: if args.get(7).is_some() { Pattern::Sequential } else { Pattern::Random },
        span: args.get(6).map_or(64 << 20, |_| number(6)),
        until: Until::Time(Duration::from_secs(number(5))),
    };
    let figures = run(&Address::Unix(args[1].clone().into()), "", &workload).expect("the run succeeds");
    println!(
        "{:>10.0} ops/s {:>8.0} MiB/s  p50 {:?} p99 {:?} p999 {:?}",
        figures.ops_per_second(),
        figures.mib_per_second(),
        figures.p50,
        figures.p99,
        figures.p999
    );
}
