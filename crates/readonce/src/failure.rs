//! How a command ends badly: a sentence on standard error after the program's name, and an exit status.

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use readonce_disk::chain::OpenError;
use readonce_words::Refused;

/// What every command gives back.
pub type Outcome = Result<ExitCode, Failure>;

/// A command failed.
#[derive(Debug)]
pub struct Failure {
    /// Exit status.
    pub exit: u8,
    /// What is told, without the program's name; nothing where it is empty.
    pub text: String,
}

impl Failure {
    /// Exit status 1, as of qemu-img.
    pub fn new(text: impl Into<String>) -> Self {
        Self { exit: 1, text: text.into() }
    }

    /// The same with another exit status.
    pub fn with_exit(exit: u8, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }

    /// Wrong use of `command`.
    pub fn usage(command: &str, text: impl Into<String>) -> Self {
        Self::new(format!("{}\nTry 'readonce {command} --help' for more info", text.into()))
    }

    /// An exit status without a word.
    pub fn silent(exit: u8) -> Self {
        Self::with_exit(exit, "")
    }

    /// Tells it.
    pub fn tell(&self) -> ExitCode {
        if !self.text.is_empty() {
            crate::report::tell(&self.text);
        }
        ExitCode::from(self.exit)
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self::new(refused.0)
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        Self::new(error.to_string())
    }
}

/// Tells what clap found wrong. Its exit status would be 2, which from `check` means a corrupt image.
pub fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<String> =
        std::env::args().skip(1).take(1).filter(|word| !word.starts_with('-')).collect();
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let text = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "Not enough arguments".to_owned()
        }
        ErrorKind::InvalidSubcommand => {
            format!("Command not found: {}", context(ContextKind::InvalidSubcommand).unwrap_or_default())
        }
        _ => {
            let text = error.to_string();
            let mut lines = text.lines();
            let mut first = lines.next().unwrap_or_default().to_owned();
            // What follows a colon is what the line is about, one name a line.
            while first.ends_with(':')
                && let Some(name) = lines.next()
            {
                first = format!("{first} {}", name.trim());
            }
            first.strip_prefix("error: ").unwrap_or(&first).to_owned()
        }
    };
    let command = match error.kind() {
        ErrorKind::InvalidSubcommand => String::new(),
        _ => arguments.concat() + " ",
    };
    eprintln!("readonce: {text}\nTry 'readonce {}--help' for more info", command.trim_start());
    ExitCode::from(1)
}
