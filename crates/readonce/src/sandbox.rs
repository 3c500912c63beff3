//! The sandbox of `serve`: what a server does not need, it cannot do, whatever a client, an image or an origin makes of it.
//!
//! - It is put on before the runtime starts any thread. The kernel hands it down to every thread made later, and nothing takes it
//!   off again.
//! - No new privileges. Paths by Landlock: the files of the chain, what names and certificates are looked up in, and no others;
//!   signals and abstract sockets of other programs neither. System calls by seccomp: a list of what is refused (`calls`).
//! - What the files of the chain are is found before (`places`), by reading the headers of local images. A file that
//!   takes the place of another later, by a link or under the same name, is not the one that was allowed.
//! - As much as the kernel can: what is missing is warned of, and the server goes on.
//!
//! Not here: `run`. Its command would inherit all of this.

mod calls;
mod places;

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

pub use places::{Place, of_chain, of_system};

/// The newest Landlock whose rights are known here (Linux 6.12).
const NEWEST: ABI = ABI::V6;

/// What may be done at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum May {
    /// A file, or any file in a folder, may be read; the folder may be listed.
    Read,
    /// A file may be read, written and cut, or asked what only devices know.
    Write,
    /// In a folder, sockets may be made and files removed.
    KeepSocket,
    /// In a folder, files may be removed.
    Remove,
}

impl May {
    fn access(self, is_folder: bool) -> BitFlags<AccessFs> {
        match (self, is_folder) {
            (Self::Read, false) => AccessFs::ReadFile.into(),
            (Self::Read, true) => AccessFs::ReadFile | AccessFs::ReadDir,
            (Self::Write, _) => {
                AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev
            }
            (Self::KeepSocket, _) => AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile,
            (Self::Remove, _) => AccessFs::RemoveFile.into(),
        }
    }
}

/// What of the sandbox is in force.
pub struct InForce {
    /// In words.
    pub words: String,
    /// Each of its parts is.
    pub all: bool,
}

/// Puts this thread, and all that it will start, into the sandbox.
pub fn enter(places: &[Place]) -> InForce {
    let paths = restrict_paths(places);
    let mut all = matches!(paths, Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced));
    let paths = match paths {
        Ok(RulesetStatus::FullyEnforced) => "paths limited by Landlock".to_owned(),
        Ok(RulesetStatus::PartiallyEnforced) => {
            "paths limited by Landlock, as far as this kernel does".to_owned()
        }
        Ok(RulesetStatus::NotEnforced) => "paths NOT limited: this kernel has no Landlock".to_owned(),
        Err(error) => format!("paths NOT limited: {error}"),
    };
    // Landlock's own call sets it too, but not where there is no Landlock.
    // SAFETY: it takes numbers alone.
    let privileges = match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => "no new privileges".to_owned(),
        _ => {
            all = false;
            format!("new privileges NOT refused: {}", std::io::Error::last_os_error())
        }
    };
    let calls = match calls::refuse() {
        Ok(count) => format!("{count} system calls refused by seccomp"),
        Err(error) => {
            all = false;
            format!("system calls NOT limited: {error}")
        }
    };
    InForce { words: format!("{privileges}; {paths}; {calls}"), all }
}

fn restrict_paths(places: &[Place]) -> Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for place in places {
        ruleset = allow(ruleset, &place.path, place.may)?;
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

/// What is not there cannot be allowed, and need not be: whoever opens it says so.
fn allow(ruleset: RulesetCreated, path: &Path, may: May) -> Result<RulesetCreated, RulesetError> {
    let Ok(file) = PathFd::new(path) else { return Ok(ruleset) };
    ruleset.add_rule(PathBeneath::new(file, may.access(path.is_dir())))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind, process::Command};

    use super::*;

    /// A sandbox is of one thread and what that starts: each case has one.
    fn inside<T: Send>(places: &[Place], work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let told = enter(places);
                assert!(told.all, "these tests need Landlock (Linux 5.13) and seccomp: {}", told.words);
                work()
            });
            thread.join().expect("it ran")
        })
    }

    fn refused<T>(done: std::io::Result<T>) -> bool {
        done.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    }

    #[test]
    fn a_path_that_was_not_named_cannot_be_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let [read, written, other, link] =
            ["read", "written", "other", "link"].map(|name| folder.path().join(name));
        for path in [&read, &written, &other] {
            fs::write(path, "text").expect("room");
        }
        std::os::unix::fs::symlink(&other, &link).expect("room");
        let places = [Place::new(&read, May::Read), Place::new(&written, May::Write)];
        inside(&places, || {
            assert_eq!(fs::read(&read).expect("allowed"), b"text");
            assert!(refused(fs::write(&read, "new")));
            fs::write(&written, "new").expect("allowed");
            assert!(refused(fs::read(&other)));
            assert!(refused(fs::read(&link)));
            assert!(refused(fs::write(folder.path().join("new"), "text")));
            assert!(refused(fs::remove_file(&written)));
            assert!(refused(fs::read_dir(folder.path())));
        });
        // Nobody else is held.
        assert_eq!(fs::read(&other).expect("outside"), b"text");
    }

    #[test]
    fn a_file_that_takes_the_place_of_an_allowed_one_is_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, secret) = (folder.path().join("image"), folder.path().join("secret"));
        fs::write(&path, "image").expect("room");
        fs::write(&secret, "secret").expect("room");
        inside(&[Place::new(&path, May::Read)], || {
            assert_eq!(fs::read(&path).expect("allowed"), b"image");
            std::thread::scope(|scope| {
                // A thread of the sandbox cannot do this.
                assert!(scope.spawn(|| refused(fs::rename(&secret, &path))).join().expect("it ran"));
            });
        });
        inside(&[Place::new(&path, May::Read), Place::new(folder.path(), May::Remove)], || {
            fs::remove_file(&path).expect("allowed");
            assert!(refused(fs::hard_link(&secret, &path)));
        });
    }

    #[test]
    fn nothing_can_be_run() {
        let everything = [Place::new("/", May::Read)];
        inside(&everything, || {
            assert!(refused(Command::new("/bin/true").status()));
            // Not even with threads of its own between.
            let below = std::thread::spawn(|| refused(Command::new("/bin/true").status()));
            assert!(below.join().expect("it ran"));
        });
        assert!(Command::new("/bin/true").status().expect("outside").success());
    }

    #[test]
    fn other_processes_cannot_be_read_or_stopped() {
        let mut child = Command::new("/bin/sleep").arg("600").spawn().expect("it starts");
        let number = libc::pid_t::try_from(child.id()).expect("a process number");
        inside(&[], || {
            // SAFETY: neither call takes memory of ours.
            let traced = unsafe { libc::ptrace(libc::PTRACE_SEIZE, number, 0, 0) };
            assert_eq!((traced, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EPERM)));
        });
        child.kill().expect("outside");
        child.wait().expect("it ends");
    }
}
