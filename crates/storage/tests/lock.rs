//! Image locks against each other, and against QEMU's own.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use readonce_storage::{Access, BoxFuture, ImageLock, LocalFile, LockError, Moment, OpenMode, Rt, Runtime};

fn open(path: &Path, access: Access) -> LocalFile {
    let mode = if access == Access::Read { OpenMode::Read } else { OpenMode::ReadWrite };
    LocalFile::open(path, mode).expect("there")
}

/// An image that QEMU can open.
fn image(directory: &tempfile::TempDir) -> std::path::PathBuf {
    let path = directory.path().join("image.qed");
    let output = qemu("qemu-img").args(["create", "-q", "-f", "qed"]).arg(&path).arg("1M").output();
    let output = output.expect("qemu-img runs: package qemu-utils");
    assert!(output.status.success(), "{output:?}");
    path
}

fn qemu(tool: &str) -> Command {
    let mut command = Command::new(tool);
    command.env("LC_ALL", "C");
    command
}

/// A qemu-io that holds the image until it is dropped.
struct Holder {
    child: Child,
    _answers: BufReader<ChildStdout>,
}

impl Holder {
    fn start(path: &Path, access: Access) -> Self {
        let mut command = qemu("qemu-io");
        command.args(["-f", "qed"]).args((access == Access::Read).then_some("-r")).arg(path);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io runs: package qemu-utils");
        // It answers when it has opened the image, and then waits for the next command.
        child.stdin.as_mut().expect("piped").write_all(b"length\n").expect("it reads commands");
        let mut answers = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        answers.read_line(&mut line).expect("it answers");
        assert!(line.contains("1 MiB"), "{line}");
        Self { child, _answers: answers }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().expect("qemu-io ends when its commands end");
    }
}

/// What qemu-io says when it opens the image: nothing where it could.
fn qemu_opens(path: &Path, access: Access) -> String {
    let mut command = qemu("qemu-io");
    command
        .args(["-f", "qed"])
        .args((access == Access::Read).then_some("-r"))
        .args(["-c", "length"])
        .arg(path);
    let output = command.output().expect("qemu-io runs: package qemu-utils");
    String::from_utf8(output.stderr).expect("text")
}

const ALL: [(Access, Access); 4] = [
    (Access::Read, Access::Read),
    (Access::Read, Access::Write),
    (Access::Write, Access::Read),
    (Access::Write, Access::Write),
];

/// The words for the second, beside the first.
fn refusal(first: Access, second: Access) -> Option<&'static str> {
    match (first, second) {
        (Access::Read, Access::Read) => None,
        (_, Access::Write) => Some("Failed to get \"write\" lock"),
        (Access::Write, Access::Read) => Some("Failed to get shared \"write\" lock"),
    }
}

#[test]
fn two_of_ours_exclude_each_other_within_one_process() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    std::fs::write(&path, b"").expect("written");
    for (first, second) in ALL {
        let (one, two) = (open(&path, first), open(&path, second));
        let held = ImageLock::take(&one, first).expect("nobody else");
        match (ImageLock::take(&two, second), refusal(first, second)) {
            (Ok(_), None) => {}
            (Err(LockError::InUse(text)), Some(words)) => {
                assert_eq!(
                    text,
                    format!("{words}\nIs another process using the image [{}]?", path.display())
                );
            }
            (got, expected) => panic!("{first:?} {second:?}: {got:?}, expected {expected:?}"),
        }
        // What the refused one took is given back, and so is the lock of the first, with its file still open.
        drop(held);
        let again = ImageLock::take(&two, second).expect("the first is gone");
        drop(again);
        ImageLock::take(&one, first).expect("the second is gone");
    }
}

#[test]
fn we_refuse_what_qemu_holds() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = image(&directory);
    for (first, second) in ALL {
        let file = open(&path, second);
        let holder = Holder::start(&path, first);
        let ours = ImageLock::take(&file, second).map(drop).map_err(|error| error.to_string());
        drop(holder);
        match refusal(first, second) {
            None => ours.expect("two readers"),
            Some(words) => assert!(ours.expect_err("it is held").starts_with(words), "{first:?} {second:?}"),
        }
        ImageLock::take(&file, second).expect("QEMU is gone");
    }
}

#[test]
fn qemu_refuses_what_we_hold() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = image(&directory);
    for (first, second) in ALL {
        let file = open(&path, first);
        let lock = ImageLock::take(&file, first).expect("nobody else");
        let theirs = qemu_opens(&path, second);
        match refusal(first, second) {
            None => assert_eq!(theirs, ""),
            Some(words) => {
                let hint = format!("{words}\nIs another process using the image [{}]?\n", path.display());
                assert!(theirs.ends_with(&hint), "{first:?} {second:?}: {theirs}");
            }
        }
        drop(lock);
        assert_eq!(qemu_opens(&path, second), "");
    }
}

#[test]
fn words_are_qemus() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = image(&directory);
    for (first, second) in ALL {
        let holder = Holder::start(&path, first);
        let theirs = qemu_opens(&path, second);
        let ours = match ImageLock::take(&open(&path, second), second) {
            Ok(_) => String::new(),
            Err(error) => format!("qemu-io: can't open device {}: {error}\n", path.display()),
        };
        drop(holder);
        assert_eq!(ours, theirs, "{first:?} {second:?}");
    }
}

#[test]
fn a_lock_keeps_its_file_open() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    std::fs::write(&path, b"").expect("written");
    let file = open(&path, Access::Write);
    let lock = ImageLock::take(&file, Access::Write).expect("nobody else");
    drop(file);
    ImageLock::take(&open(&path, Access::Read), Access::Read).expect_err("still locked");
    drop(lock);
    ImageLock::take(&open(&path, Access::Read), Access::Read).expect("unlocked");
}

#[test]
fn a_foreign_write_lock_is_in_use_as_well() {
    use std::os::fd::AsRawFd;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    std::fs::write(&path, b"").expect("written");
    let foreign = std::fs::File::options().write(true).open(&path).expect("there");
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `whole` is a valid `flock`.
    assert_eq!(unsafe { libc::fcntl(foreign.as_raw_fd(), libc::F_OFD_SETLK, &whole) }, 0);
    let file = open(&path, Access::Read);
    let error = ImageLock::take(&file, Access::Read).expect_err("all of it is locked");
    assert!(
        matches!(&error, LockError::InUse(text) if text.starts_with("Failed to lock byte 100\n")),
        "{error}"
    );
}

/// Time passes by sleeping alone; after some naps a lock is given back.
struct Naps {
    slept: Mutex<Duration>,
    until: Duration,
    held: Mutex<Option<ImageLock>>,
}

impl Runtime for Naps {
    fn now(&self) -> Moment {
        *self.slept.lock().expect("no panic")
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let mut slept = self.slept.lock().expect("no panic");
        *slept += duration;
        if *slept >= self.until {
            self.held.lock().expect("no panic").take();
        }
        Box::pin(std::future::ready(()))
    }
    fn spawn(&self, _: BoxFuture<'static, ()>) {
        unreachable!("a lock spawns nothing")
    }
    fn random(&self) -> u64 {
        0
    }
}

/// A `check` right after the `kill -9` of a server was refused: its lock stays until the kernel has ended its io_uring.
#[tokio::test]
async fn a_lock_that_is_going_is_waited_for_and_one_that_stays_is_not() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    std::fs::write(&path, b"").expect("written");
    let (one, two) = (open(&path, Access::Write), open(&path, Access::Read));
    for (until, goes) in [(Duration::from_millis(300), true), (Duration::MAX, false)] {
        let held = ImageLock::take(&one, Access::Write).expect("nobody else");
        let rt: Rt = Arc::new(Naps { slept: Mutex::default(), until, held: Mutex::new(Some(held)) });
        match ImageLock::wait(&two, Access::Read, &rt).await {
            Ok(_) => assert!(goes),
            Err(error) => assert!(!goes && matches!(error, LockError::InUse(_)), "{error}"),
        }
    }
}
