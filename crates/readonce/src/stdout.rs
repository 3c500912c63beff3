//! Standard output: what a command tells there.
//!
//! - The first write that fails is remembered, and nothing is written after it: a command that has something to end well
//!   looks with `is_gone`, and `end` tells of it in the exit status.
//! - Nobody reading any more is no news: it ends in silence, with the status that the signal would give.

use std::{
    io::{ErrorKind, Write},
    sync::OnceLock,
};

use crate::{
    failure::{Failure, Outcome},
    look::without_number,
};

/// Of one whom SIGPIPE ended.
const EXIT_NO_READER: u8 = 128 + 13;

static GONE: OnceLock<std::io::Error> = OnceLock::new();

/// Writes a text as it is.
pub fn print(text: impl std::fmt::Display) {
    if !is_gone() {
        keep(write!(std::io::stdout(), "{text}"));
    }
}

/// Writes a line.
pub fn line(text: impl std::fmt::Display) {
    print(format_args!("{text}\n"));
}

/// Shows what was printed, though no line ended.
pub fn flush() {
    if !is_gone() {
        keep(std::io::stdout().flush());
    }
}

/// Whether what is printed goes nowhere.
pub fn is_gone() -> bool {
    GONE.get().is_some()
}

fn keep(written: std::io::Result<()>) {
    if let Err(error) = written {
        let _ = GONE.set(error);
    }
}

/// What a command ends with, if all that it printed is to have arrived.
pub fn end(outcome: Outcome) -> Outcome {
    flush();
    match GONE.get() {
        Some(error) if outcome.is_ok() => Err(match error.kind() {
            ErrorKind::BrokenPipe => Failure::silent(EXIT_NO_READER),
            _ => Failure::new(format!("Could not write to standard output: {}", without_number(error))),
        }),
        _ => outcome,
    }
}
