//! Which requests are refused before the device sees them, and what the others ask for. Pure.
//!
//! - What [`check`] lets through lies inside the device, is at least one byte long, and is no longer than a payload may be where
//!   it has one.
//! - Every refusal answers the request; none ends the connection.
//!
//! Not here: doing it (`connection`, `job`), and broken framing (`wire`).

use readonce_disk::ZeroMode;

use super::{
    contexts::{Context, Contexts},
    errno::Errno,
    wire::{Cursor, Headers, PAYLOAD_LEN_MAX, Request, command, command_flag as flag},
};

/// A request that may be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    Cache,
    WriteZeroes {
        mode: ZeroMode,
        fua: bool,
    },
    BlockStatus {
        one: bool,
        contexts: Contexts,
    },
    /// It succeeds, and there is nothing to do: a length of zero.
    Nothing,
    Disconnect,
}

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub errno: Errno,
    pub text: String,
}

fn refuse<T>(errno: Errno, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { errno, text: text.into() })
}

/// What the connection knows of itself and its device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub headers: Headers,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub contexts: Contexts,
}

/// Decides what becomes of `request`. `len` of the request counts where it is an effect length.
#[inline]
pub(super) fn check(request: &Request, terms: &Terms) -> Result<Command, Refusal> {
    let extended = terms.headers == Headers::Extended;
    let flags_allowed = flag::FUA
        | match request.command {
            command::READ if terms.headers != Headers::Simple => flag::DF,
            command::WRITE if extended => flag::PAYLOAD_LEN,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS if extended => flag::REQ_ONE | flag::PAYLOAD_LEN,
            command::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
    if request.flags & !flags_allowed != 0 {
        return refuse(
            Errno::Invalid,
            format!("command {} does not know flags {:#x}", request.command, request.flags & !flags_allowed),
        );
    }
    let fua = request.flags & flag::FUA != 0;
    let with_payload = request.flags & flag::PAYLOAD_LEN != 0;
    match request.command {
        command::READ => {
            inside(request, terms, Errno::Invalid)?;
            if request.len > u64::from(PAYLOAD_LEN_MAX) {
                let errno = if terms.headers == Headers::Simple { Errno::Invalid } else { Errno::Overflow };
                return too_long(request, errno);
            }
            Ok(or_nothing(request, Command::Read))
        }
        command::WRITE => {
            writable(terms)?;
            if request.len > u64::from(PAYLOAD_LEN_MAX) {
                return too_long(request, Errno::Invalid);
            }
            inside(request, terms, Errno::NoSpace)?;
            Ok(or_nothing(request, Command::Write { fua }))
        }
        command::DISC => Ok(Command::Disconnect),
        // Its offset and length are reserved. Clients that set them mean a flush all the same.
        command::FLUSH => Ok(Command::Flush),
        command::TRIM => {
            writable(terms)?;
            inside(request, terms, Errno::Invalid)?;
            Ok(or_nothing(request, Command::Trim { fua }))
        }
        command::CACHE => {
            inside(request, terms, Errno::Invalid)?;
            Ok(or_nothing(request, Command::Cache))
        }
        command::WRITE_ZEROES => {
            writable(terms)?;
            inside(request, terms, Errno::NoSpace)?;
            let mode = ZeroMode {
                keep_space: request.flags & flag::NO_HOLE != 0,
                only_if_fast: request.flags & flag::FAST_ZERO != 0,
            };
            Ok(or_nothing(request, Command::WriteZeroes { mode, fua }))
        }
        command::BLOCK_STATUS => {
            // With a payload, the length of the effect is in it: see `status_payload`.
            if !with_payload {
                status_range(request, terms)?;
            }
            let one = request.flags & flag::REQ_ONE != 0;
            Ok(Command::BlockStatus { one, contexts: terms.contexts })
        }
        other => refuse(Errno::Invalid, format!("unknown command {other}")),
    }
}

/// Whether block status may be asked of the range.
pub(super) fn status_range(request: &Request, terms: &Terms) -> Result<(), Refusal> {
    if terms.contexts.is_empty() {
        return refuse(Errno::Invalid, "no metadata context was selected");
    }
    if request.len == 0 {
        return refuse(Errno::Invalid, "block status of no bytes");
    }
    inside(request, terms, Errno::Invalid)
}

/// The payload of a block status request: the bytes it is about, and the contexts it is limited to.
pub(super) fn status_payload(payload: &[u8], selected: Contexts) -> Result<(u64, Contexts), Refusal> {
    let mut cursor = Cursor(payload);
    let Some(len) = cursor.u64() else {
        return refuse(Errno::Invalid, "a block status payload of less than 8 bytes");
    };
    let mut contexts = Contexts::default();
    while let Some(id) = cursor.u32() {
        let known = Context::from_id(id).filter(|&context| selected.contains(context));
        if !known.is_some_and(|context| contexts.insert(context)) {
            return refuse(Errno::Invalid, format!("metadata context {id} is not selected, or named twice"));
        }
    }
    if !cursor.0.is_empty() || contexts.is_empty() {
        return refuse(Errno::Invalid, format!("a block status payload of {} bytes", payload.len()));
    }
    Ok((len, contexts))
}

fn or_nothing(request: &Request, command: Command) -> Command {
    if request.len == 0 { Command::Nothing } else { command }
}

fn writable(terms: &Terms) -> Result<(), Refusal> {
    if terms.read_only { refuse(Errno::Perm, "the export is read-only") } else { Ok(()) }
}

#[inline]
fn inside(request: &Request, terms: &Terms, errno: Errno) -> Result<(), Refusal> {
    if request.offset.checked_add(request.len).is_some_and(|end| end <= terms.size) {
        return Ok(());
    }
    refuse(
        errno,
        format!("offset {} and length {} exceed the size {}", request.offset, request.len, terms.size),
    )
}

fn too_long<T>(request: &Request, errno: Errno) -> Result<T, Refusal> {
    refuse(errno, format!("length {} exceeds {PAYLOAD_LEN_MAX}", request.len))
}
