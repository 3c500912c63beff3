//! The words of the command line, taken apart: what a person, or a script that somebody feeds, may type.
//!
//! - `options`: `-o` lists, sizes and times. `drive`: `--drive`. `command`: a line of `readonce io`.
//! - No word panics. What is refused is refused in QEMU's words, where QEMU has them.
//!
//! Not here: flags (the binary), names of images (`origin`'s locators), what the words do.

pub mod command;
pub mod drive;
pub mod options;

/// Why a word is not taken, as a person reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(pub String);

impl Refused {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}
