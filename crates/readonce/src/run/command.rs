//! The command of `readonce run`: its words, its signals, its status.

use std::{io::ErrorKind, os::unix::process::ExitStatusExt, path::Path};

use tokio::process::Command;

use crate::{failure::Failure, signals::Signals};

/// As shells have it.
const EXIT_NOT_FOUND: u8 = 127;
const EXIT_NOT_RUN: u8 = 126;

/// Runs the command to its end. Signals that we get are passed on.
pub async fn run(words: &[String], uri: &str, socket: &Path, signals: &mut Signals) -> Result<u8, Failure> {
    let socket = socket.display().to_string();
    let words: Vec<String> =
        words.iter().map(|word| word.replace("{uri}", uri).replace("{socket}", &socket)).collect();
    let Some((program, arguments)) = words.split_first() else {
        return Err(Failure::with_exit(EXIT_NOT_FOUND, "there is no command"));
    };
    let mut child =
        Command::new(program).args(arguments).env("READONCE_URI", uri).spawn().map_err(|error| {
            let exit = if error.kind() == ErrorKind::NotFound { EXIT_NOT_FOUND } else { EXIT_NOT_RUN };
            Failure::with_exit(exit, format!("{program}: {}", crate::look::without_number(&error)))
        })?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            number = signals.next() => {
                if number != libc::SIGINT || !has_it_from_the_terminal() {
                    pass_on(&child, number);
                }
            }
        }
    };
    let status = status.map_err(|error| Failure::new(format!("{program}: {error}")))?;
    let code = status.code().or(status.signal().map(|number| 128 + number)).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// A terminal sends Ctrl-C to every process of its foreground group, so also to the command.
fn has_it_from_the_terminal() -> bool {
    // SAFETY: both only ask the system; a standard input that is no terminal answers -1, which is no group.
    unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

fn pass_on(child: &tokio::process::Child, number: i32) {
    let Some(id) = child.id().and_then(|id| libc::pid_t::try_from(id).ok()) else { return };
    // SAFETY: the child was not waited for yet (`id` is there), so the number is still its.
    unsafe { libc::kill(id, number) };
}
