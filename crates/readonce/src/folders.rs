//! Temporary folders, mode 0700, deleted with what is in them.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{failure::Failure, human};

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

/// Whether `bytes` fit where `folder` is, as far as can be told.
///
/// # Errors
/// They do not.
pub fn check_room(folder: &Path, bytes: u64) -> Result<(), Failure> {
    let Ok(stat) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    Err(Failure::new(format!(
        "'{}' has room for {}, {} are needed: set TMPDIR to another folder",
        folder.display(),
        human::size(free),
        human::size(bytes)
    )))
}

fn make_in(folder: &Path) -> Result<TempDir, Failure> {
    tempfile::Builder::new()
        .prefix("readonce-")
        .tempdir_in(folder)
        .map_err(|error| Failure::new(format!("Could not make a folder in '{}': {error}", folder.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without room the demo failed after 20 s with "connection reset by peer".
    #[test]
    fn a_folder_without_room_is_told() {
        let folder = std::env::temp_dir();
        assert!(check_room(&folder, 0).is_ok());
        let told = check_room(&folder, u64::MAX).expect_err("nobody has that").text;
        assert!(told.contains("16 EiB are needed: set TMPDIR"), "{told}");
    }
}
