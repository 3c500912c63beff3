//! What can go wrong in a format. A variant is what the caller can do next.

use std::io;

use readonce_storage::flat::is_no_space;

/// An error of a format driver.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The image breaks its format's rules. Never tried again; `check` may repair it.
    #[error("{field} is {value}, {limit}")]
    Corrupt {
        /// The field's name in the specification.
        field: String,
        /// What it holds.
        value: String,
        /// What it may hold.
        limit: String,
    },
    /// Legal, but not something that this driver does.
    #[error("{0}")]
    Unsupported(String),
    /// What the caller asked cannot be, in the caller's words (a bad option, a size out of range).
    #[error("{0}")]
    Invalid(String),
    /// The units lie in a cluster whose place something else shows too (an internal snapshot), though they themselves hold
    /// nothing there: no room for them alone. Ask for [`Room::Copy`](crate::Room::Copy) of the cluster, commit it, ask again.
    #[error("the cluster is shared with a snapshot and must be copied first")]
    CopyFirst,
    /// No room in the file system. Nothing changed; may be tried again.
    #[error("{0}")]
    NoSpace(#[source] io::Error),
    /// A read, write or sync of metadata failed. On a write path it latches in the room above.
    #[error("{0}")]
    Io(#[source] io::Error),
}

impl FormatError {
    /// A broken field, its value and the rule that it breaks (`limit` reads on: "must be …").
    pub fn corrupt(field: impl ToString, value: impl ToString, limit: impl ToString) -> Self {
        Self::Corrupt { field: field.to_string(), value: value.to_string(), limit: limit.to_string() }
    }
}

impl From<io::Error> for FormatError {
    fn from(error: io::Error) -> Self {
        if is_no_space(&error) { Self::NoSpace(error) } else { Self::Io(error) }
    }
}
