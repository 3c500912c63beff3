//! The signals that ask the program to end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// Signals caught from when this is made.
pub struct Signals {
    caught: Vec<(i32, Signal)>,
}

impl Signals {
    /// Catches SIGTERM, SIGINT and SIGHUP.
    pub fn catch() -> Result<Self, Failure> {
        let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        let caught = kinds.into_iter().map(|kind| Ok((kind.as_raw_value(), signal(kind)?)));
        let caught = caught.collect::<io::Result<_>>();
        Ok(Self { caught: caught.map_err(|error| Failure::new(format!("cannot catch signals: {error}")))? })
    }

    /// Waits for the next; gives its number.
    pub async fn next(&mut self) -> i32 {
        let waits = self.caught.iter_mut().map(|(number, signal)| {
            Box::pin(async move {
                signal.recv().await;
                *number
            })
        });
        futures_util::future::select_all(waits).await.0
    }
}

/// Runs what comes before there is anything to save; a signal ends it.
pub async fn until_signal<T>(
    signals: &mut Signals,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        done = work => done,
        number = signals.next() => {
            Err(Failure::with_exit(u8::try_from(128 + number).unwrap_or(1), "interrupted"))
        }
    }
}

/// Ends the program at once when another signal comes: the person does not want to wait for the end.
pub fn end_at_the_next(mut signals: Signals) {
    tokio::spawn(async move {
        let number = signals.next().await;
        crate::report::tell("ended at once by a second signal: bytes that were not flushed may be lost");
        std::process::exit(128 + number);
    });
}
