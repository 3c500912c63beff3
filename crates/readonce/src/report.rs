//! What a person hears on standard error while a chain is used.

use std::sync::Arc;

use readonce_disk::chain::{Report, Reporter};

/// Warns.
pub fn warn(text: impl std::fmt::Display) {
    eprintln!("readonce: warning: {text}");
}

/// How much is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Warnings, and every file and URL that is opened.
    All,
    /// Warnings.
    Warnings,
    /// Nothing.
    Nothing,
}

/// Tells on standard error.
pub fn reporter(told: Told) -> Reporter {
    Arc::new(move |report| match report {
        Report::Opened { name, format, writable } if told == Told::All => {
            let how = if writable { "read and written" } else { "read" };
            eprintln!("readonce: {name}: {format}, {how}");
        }
        Report::Warning(text) if told != Told::Nothing => warn(text),
        Report::Opened { .. } | Report::Warning(_) => {}
    })
}
