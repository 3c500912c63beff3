//! Temporary folders, mode 0700, deleted with what is in them.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::failure::Failure;

/// Longest path of a socket's folder: what its address holds, with room for our own name.
const SOCKET_FOLDER_BYTES_MAX: usize = 80;

/// One for a socket.
pub fn private() -> Result<TempDir, Failure> {
    let usual = std::env::temp_dir();
    make_in(if usual.as_os_str().len() > SOCKET_FOLDER_BYTES_MAX { Path::new("/tmp") } else { &usual })
}

/// One for an image that may grow: as of QEMU's -snapshot, not in memory if that can be helped.
pub fn roomy() -> Result<TempDir, Failure> {
    match std::env::var_os("TMPDIR") {
        Some(folder) if !folder.is_empty() => make_in(&PathBuf::from(folder)),
        _ if Path::new("/var/tmp").is_dir() => make_in(Path::new("/var/tmp")),
        _ => make_in(&std::env::temp_dir()),
    }
}

fn make_in(folder: &Path) -> Result<TempDir, Failure> {
    tempfile::Builder::new()
        .prefix("readonce-")
        .tempdir_in(folder)
        .map_err(|error| Failure::new(format!("Could not make a folder in '{}': {error}", folder.display())))
}
