//! Exec: the runtime of a target. A run that neither ends nor waits for a timer, or polls too often, is a hang: it panics.

use std::future::Future;

use readonce_storage::Rt;
use readonce_testkit::exec::Exec;

/// Polls after which a run is called a hang.
const POLLS_MAX: u64 = 2_000_000;

/// Runs `main` to its end, with a runtime of its own.
pub fn run<F>(main: impl FnOnce(Rt) -> F) -> F::Output
where
    F: Future<Output: Send> + Send + 'static,
{
    let exec = Exec::new(0);
    let result = exec.run_for(main(exec.rt()), POLLS_MAX);
    // Tasks may own the runtime that holds them.
    exec.power_off();
    result.expect("the run does not end")
}
