//! What a person hears on standard error while a chain is used, and the log.
//!
//! Standard error may be closed while we serve: nothing here fails for that.

use std::{
    io::{IsTerminal, Write},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use indicatif::ProgressBar;
use readonce_disk::chain::{Report, Reporter};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// The bar that is drawn now, if any: lines must not run into it.
static BAR: OnceLock<ProgressBar> = OnceLock::new();

/// Lines go above this bar from now on.
pub fn go_above(bar: ProgressBar) {
    let _ = BAR.set(bar);
}

/// One line on standard error, after the program's name.
pub fn tell(text: impl std::fmt::Display) {
    let line = || {
        let _ = writeln!(std::io::stderr(), "readonce: {text}");
    };
    match BAR.get() {
        Some(bar) if !bar.is_finished() => bar.suspend(line),
        _ => line(),
    }
}

/// Whole lines on standard error, as they are.
pub fn lines(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Warns.
pub fn warn(text: impl std::fmt::Display) {
    tell(format_args!("warning: {text}"));
}

/// Flags about how much is told.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct ToldArgs {
    /// Log to standard error what is done; twice: in detail
    #[arg(short = 'v', long, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Tell nothing but errors
    #[arg(long, conflicts_with = "verbose")]
    pub quiet: bool,
}

impl ToldArgs {
    /// Tells of a chain on standard error: warnings, and every file and URL that is opened.
    pub fn reporter(self) -> Reporter {
        Arc::new(move |report| match report {
            _ if self.quiet => {}
            Report::Opened { name, format, writable } => {
                let how = if writable { "to read and write" } else { "to read" };
                tell(format_args!("opened {name} ({format}) {how}"));
            }
            Report::Warning(text) => warn(text),
        })
    }

    /// Tells of a chain on standard error: warnings alone.
    pub fn warnings(self) -> Reporter {
        let all = self.reporter();
        Arc::new(move |report| {
            if let Report::Warning(_) = report {
                all(report);
            }
        })
    }

    /// One line, unless all is to be quiet.
    pub fn say(self, text: impl std::fmt::Display) {
        if !self.quiet {
            tell(text);
        }
    }

    /// Whether progress and a summary are wanted: a person looks on.
    pub fn for_a_person(self) -> bool {
        !self.quiet && (self.verbose > 0 || std::io::stderr().is_terminal())
    }

    /// Starts the log. `RUST_LOG` wins over the flags.
    pub fn start_log(self) {
        start_log(match (self.quiet, self.verbose) {
            (true, _) => "error",
            (_, 0) => "warn",
            (_, 1) => "info",
            (_, _) => "debug",
        });
    }
}

/// Starts the log at a level, or as `RUST_LOG` says. Up to warnings it reads like every other line; a log proper has times and
/// places.
pub fn start_log(level: &str) {
    let asked = tracing_subscriber::EnvFilter::try_from_default_env();
    let plain = asked.is_err() && matches!(level, "error" | "warn");
    let filter = asked.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| AboveTheBar)
        .with_ansi(std::io::stderr().is_terminal());
    let _ = if plain { log.event_format(Plain::default()).try_init() } else { log.try_init() };
}

/// Sentences for a person; one that comes again and again is told once.
#[derive(Default)]
struct Plain {
    last: Mutex<String>,
}

impl<S, N> FormatEvent<S, N> for Plain
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        let mut text = String::new();
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == text {
            return Ok(());
        }
        let warning = if *event.metadata().level() == tracing::Level::ERROR { "" } else { "warning: " };
        writeln!(writer, "readonce: {warning}{text}")?;
        *last = text;
        Ok(())
    }
}

/// Writes log lines to standard error without running into the bar.
struct AboveTheBar;

impl Write for AboveTheBar {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match BAR.get() {
            Some(bar) if !bar.is_finished() => bar.suspend(|| std::io::stderr().write(bytes)),
            _ => std::io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
