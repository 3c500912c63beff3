//! Rounds: a flush is run once for all who asked for it before it began.
//!
//! - A call that arrives while a round runs waits for the next one, with all others that do.
//! - A round is durable if anybody who shares it wants that.
//!
//! Not here: what a round does (a format's `flush`).

use std::{collections::BTreeMap, io};

use readonce_storage::sync::Mutex;

use crate::{Durability, FormatError};

/// Results of rounds that are kept for callers that have not looked yet.
const RESULTS_MAX: usize = 64;

/// The rounds of one image.
#[derive(Default)]
pub(crate) struct Rounds {
    state: Mutex<State>,
    /// Held by the round that runs.
    run: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Rounds begun.
    begun: u64,
    /// The last round that somebody wants durable.
    durable: u64,
    /// Rounds done, and how they ended.
    results: BTreeMap<u64, Option<FormatError>>,
}

impl Rounds {
    /// Runs a round, or shares one that begins after this call.
    pub(crate) async fn run<F: Future<Output = Result<(), FormatError>>>(
        &self,
        durability: Durability,
        round: impl FnOnce(Durability) -> F,
    ) -> Result<(), FormatError> {
        let wanted = {
            let mut state = self.state.lock();
            let wanted = state.begun + 1;
            if durability == Durability::Durable {
                state.durable = wanted;
            }
            wanted
        };
        let _run = self.run.lock().await;
        let (this, durability) = {
            let mut state = self.state.lock();
            if let Some(result) = state.results.get(&wanted) {
                return result.as_ref().map_or(Ok(()), |error| Err(copy(error)));
            }
            state.begun += 1;
            // A round whose future was cancelled left no result; this one does its work.
            let durable = state.durable >= wanted;
            (state.begun, if durable { Durability::Durable } else { Durability::Linked })
        };
        let result = round(durability).await;
        let mut state = self.state.lock();
        for done in wanted..=this {
            state.results.insert(done, result.as_ref().err().map(copy));
        }
        while state.results.len() > RESULTS_MAX {
            state.results.pop_first();
        }
        result
    }
}

/// The same error for another caller of the round.
fn copy(error: &FormatError) -> FormatError {
    let again = |error: &io::Error| io::Error::new(error.kind(), error.to_string());
    match error {
        FormatError::NoSpace(error) => FormatError::NoSpace(again(error)),
        FormatError::Io(error) => FormatError::Io(again(error)),
        FormatError::Corrupt { field, value, limit } => FormatError::corrupt(field, value, limit),
        FormatError::Unsupported(message) => FormatError::Unsupported(message.clone()),
        FormatError::Invalid(message) => FormatError::Invalid(message.clone()),
        FormatError::CopyFirst => FormatError::CopyFirst,
    }
}
