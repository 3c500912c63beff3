//! `readonce serve` in its sandbox: what it cannot do any more, and that each thread of it is inside.
//!
//! Not here: each single refusal, which the unit tests of `sandbox` show; and that serving works in it, which all tests of `serve`
//! show.

use std::{collections::BTreeMap, fs, path::Path};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::common::{Ran, Serving, folder, qemu_img, qemu_io, readonce};

/// `top.img` over `mid.img` over `base.raw`, which is opened when it is first needed; `secret` is a file like it.
fn chain_in(at: &Path) {
    fs::write(at.join("base.raw"), vec![1; 1 << 20]).expect("room");
    fs::write(at.join("secret"), vec![2; 1 << 20]).expect("room");
    // QEMU pins nothing, so the chain itself does not tell one file from the other.
    qemu_img(at, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.img"]).ok();
    qemu_img(at, &["create", "-q", "-f", "qcow2", "-b", "mid.img", "-F", "qcow2", "top.img"]).ok();
}

/// What a client is told of the guest's first cluster, read for the first time after `change`.
fn read_after(arguments: &[&str], pattern: u8, change: impl FnOnce(&Path)) -> (Ran, Ran) {
    let folder = folder();
    let at = folder.path();
    chain_in(at);
    let arguments: Vec<&str> = ["-k", "s", "-v", "top.img"].iter().chain(arguments).copied().collect();
    let serving = Serving::start(at, &arguments);
    change(at);
    let read = format!("read -P {pattern} 0 64k");
    let client = qemu_io(at, &["-f", "raw", "-c", &read, &serving.uri]);
    let ended = serving.end_by(libc::SIGTERM);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!at.join("s").exists());
    (client, ended)
}

fn put_a_link_to_the_secret(at: &Path) {
    fs::remove_file(at.join("base.raw")).expect("there");
    std::os::unix::fs::symlink("secret", at.join("base.raw")).expect("room");
}

#[test]
fn a_file_of_the_chain_is_opened_late_and_another_in_its_place_is_not() {
    let (client, ended) = read_after(&[], 1, |_| ());
    client.ok();
    assert!(ended.err.contains("sandbox: no new privileges; paths limited by Landlock"), "{ended:?}");

    let (client, ended) = read_after(&[], 2, put_a_link_to_the_secret);
    assert!(client.code == Some(1) && client.out.contains("Input/output error"), "{client:?}");
    assert!(ended.err.contains("base.raw': Permission denied"), "{ended:?}");

    // It is the sandbox that keeps it out.
    let (client, ended) = read_after(&["--no-sandbox"], 2, put_a_link_to_the_secret);
    client.ok();
    assert!(ended.err.contains("no sandbox"), "{ended:?}");
}

/// Of each thread: whether it may gain privileges, and whether a filter is on its calls.
fn threads(process: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let texts = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a field of Linux");
        line.trim().to_owned()
    };
    texts.map(|text| (field(&text, "NoNewPrivs:"), field(&text, "Seccomp:"))).collect()
}

#[test]
fn every_thread_is_inside() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qcow2", "a.img", "64M"]).ok();
    // What holds for the tests themselves, the server has anyhow.
    let ours = threads("self")[0].clone();
    let inside = ("1".to_owned(), "2".to_owned());
    for (arguments, wanted) in [(&[][..], inside), (&["--no-sandbox"][..], ours)] {
        let arguments: Vec<&str> = ["-k", "s", "a.img"].iter().chain(arguments).copied().collect();
        let serving = Serving::start(at, &arguments);
        // The ring and its thread are there once something was synced.
        qemu_io(at, &["-f", "raw", "-c", "write 0 8M", "-c", "flush", "-c", "read 0 8M", &serving.uri]).ok();
        let threads = threads(&serving.id().to_string());
        assert!(threads.len() > 1, "{threads:?}");
        assert!(threads.iter().all(|thread| *thread == wanted), "{threads:?}");
        assert_eq!(serving.end_by(libc::SIGTERM).code, Some(0));
    }
}

/// What is started in `work` finds a kernel without Landlock.
fn without_landlock<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let none = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into().expect("seccomp is there");
    let calls = BTreeMap::from([(libc::SYS_landlock_create_ruleset, Vec::new())]);
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, none, arch).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a program");
    // It is of one thread and what that starts.
    let thread = || {
        seccompiler::apply_filter(&program).expect("seccomp is there");
        work()
    };
    std::thread::scope(|scope| scope.spawn(thread).join().expect("it ran"))
}

/// Whoever relied on the sandbox on such a kernel was told of it with `-v` alone.
#[test]
fn a_sandbox_that_is_not_whole_is_warned_of() {
    let folder = folder();
    let at = folder.path();
    readonce(at, &["create", "-q", "-f", "qcow2", "a.img", "64M"]).ok();
    let told = |arguments: &[&str]| {
        let serving = Serving::start(at, &[&["-k", "s", "a.img"], arguments].concat());
        let ended = serving.end_by(libc::SIGTERM);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.err
    };
    let part = "warning: the sandbox is not whole: no new privileges; paths NOT limited: this kernel has no Landlock; ";
    let without = without_landlock(|| told(&[]));
    assert!(without.contains(part), "{without}");
    assert!(without.contains("system calls refused by seccomp"), "{without}");
    for arguments in [&[][..], &["--no-sandbox"]] {
        assert!(!told(arguments).contains("sandbox"), "{arguments:?}: nothing is missing that was asked for");
    }
}
