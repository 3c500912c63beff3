//! `--pid-file`: our process number, for who started us and wants to end us.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{failure::Failure, look};

/// A file that holds our process number from `write` on, for as long as this lives.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    file: File,
    is_ours: bool,
}

impl PidFile {
    /// Opens it. What another process wrote there stays: it may be the one that has our socket.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let mut options = File::options();
        options.write(true);
        let opened = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                options.open(path).map(|file| (file, false))
            }
            opened => opened.map(|file| (file, true)),
        };
        let (file, is_ours) = opened.map_err(|error| not_written(path, &error))?;
        Ok(Self { path: path.to_owned(), file, is_ours })
    }

    /// Writes the number.
    pub fn write(&mut self) -> Result<(), Failure> {
        self.is_ours = true;
        // A pipe or a terminal has no length.
        let _ = self.file.set_len(0);
        writeln!(self.file, "{}", std::process::id()).map_err(|error| not_written(&self.path, &error))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn not_written(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("Could not write '{}': {}", path.display(), look::without_number(error)))
}
