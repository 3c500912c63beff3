//! The oracle: qemu-img and qemu-io.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Output, Stdio},
};

fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("LC_ALL", "C");
    command
}

/// Images are named by their format.
fn format_of(image: &Path) -> &str {
    image.extension().and_then(|format| format.to_str()).expect("an image's name")
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null());
    match command.output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?}: {error} (Debian: apt install qemu-utils)"),
    }
}

fn must(command: &mut Command) -> String {
    let output = run(command);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// `qemu-img`, which must succeed; returns its output.
pub fn img(folder: &Path, args: &[&str]) -> String {
    must(tool("qemu-img").current_dir(folder).args(args))
}

/// `qemu-io` with these commands, which must succeed, and not say that a pattern does not match.
pub fn io(image: &Path, commands: &[&str]) {
    let mut command = tool("qemu-io");
    command.args(["-f", format_of(image)]);
    for text in commands {
        command.args(["-c", text]);
    }
    // qemu-io tells of a wrong pattern on its output, and by its status only since QEMU 2.11.
    let said = must(command.arg(image));
    assert!(!said.contains("Pattern verification failed"), "{said}");
}

/// What `qemu-io` says on standard error when it opens the image: nothing where it could.
pub fn open_words(image: &Path, read_only: bool) -> String {
    let mut command = tool("qemu-io");
    command.args(["-f", format_of(image)]).args(read_only.then_some("-r")).args(["-c", "length"]).arg(image);
    String::from_utf8(run(&mut command).stderr).expect("text")
}

/// `qemu-img check` finds nothing: no corruption and no leak.
#[track_caller]
pub fn check(image: &Path) {
    must(tool("qemu-img").args(["check", "-q", "-f", format_of(image)]).arg(image));
}

/// `qemu-img compare` finds the image's guest bytes to be these.
#[track_caller]
pub fn compare(image: &Path, bytes: &[u8]) {
    let flat = tempfile::NamedTempFile::new().expect("room");
    std::fs::write(flat.path(), bytes).expect("room");
    must(tool("qemu-img").args(["compare", "-f", format_of(image), "-F", "raw"]).arg(image).arg(flat.path()));
}

/// A qemu-io that has the image open for writing until it is dropped.
pub struct Holder {
    child: Child,
    _answers: BufReader<ChildStdout>,
}

impl Holder {
    pub fn start(image: &Path) -> Self {
        let mut command = tool("qemu-io");
        command.args(["-f", format_of(image)]).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("{command:?}: {error} (Debian: apt install qemu-utils)"),
        };
        // It answers once it has opened the image, and then waits for the next command.
        child.stdin.as_mut().expect("piped").write_all(b"length\n").expect("it reads commands");
        let mut answers = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        answers.read_line(&mut line).expect("it answers");
        assert!(line.contains("KiB") || line.contains("MiB"), "{line}");
        Self { child, _answers: answers }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().expect("qemu-io ends when its commands end");
    }
}
