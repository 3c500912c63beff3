//! File systems that are full or read-only.
//!
//! A test that needs one runs itself again in a mount namespace of its own, where it may mount a small tmpfs: nothing is
//! seen outside, and nothing is left behind.

use std::{path::Path, process::Command};

use readonce_disk::{DeviceError, chain::ChainOptions};

use super::{
    place::{CLUSTER, Place, clusters, content, filled_from, options, serve},
    qemu,
};

const SIZE: u64 = 64 * CLUSTER;
/// Set in the namespace: there the test does its work.
const INSIDE: &str = "READONCE_TEST_IN_NAMESPACE";

/// Whether this is the inner run of the test `name`. In the outer one it runs the inner one, which must pass.
fn in_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    command.arg("--mount");
    // Whoever is not root becomes root of a user namespace, where the system permits that.
    let is_root =
        std::fs::metadata("/proc/self").is_ok_and(|us| std::os::unix::fs::MetadataExt::uid(&us) == 0);
    command.args((!is_root).then_some("--map-root-user"));
    command.arg(std::env::current_exe().expect("a test has a file"));
    command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    let output = command.output().expect("unshare runs (Debian: apt install util-linux)");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success() && text(&output.stdout).contains("1 passed"),
        "in a mount namespace (needs root, or user namespaces): {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    false
}

/// A mount; dropped, it is gone, so that the folder under it can be removed.
struct Mount<'a>(&'a Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

fn mount<'a>(args: &[&str], at: &'a Path) -> Mount<'a> {
    let output = Command::new("mount").args(args).arg(at).output();
    let output = output.expect("mount runs (Debian: apt install mount)");
    assert!(output.status.success(), "mount {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Mount(at)
}

/// Takes all the room that is left at `path`.
fn take_all_room(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).expect("an empty file");
    for piece in [1 << 16, 1 << 12, 1] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
}

#[tokio::test]
async fn a_full_disk_hurts_no_read_and_only_the_write_that_meets_it() {
    if !in_namespace("mounts::a_full_disk_hurts_no_read_and_only_the_write_that_meets_it") {
        return;
    }
    let content = content(1, SIZE);
    let origin = serve(&content).await;
    let place = Place::new();
    let _mounted = mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], place.folder());
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    let mut guest = content.bytes(0..SIZE).to_vec();
    opened.write(0, vec![1; 2 * CLUSTER as usize]).await;
    guest[..2 * CLUSTER as usize].fill(1);
    opened.flush().await;

    take_all_room(&place.path("filler"));
    for _ in 0..2 {
        assert!(opened.read(0..SIZE).await == guest, "every read goes on");
    }
    for (offset, len) in [(20 * CLUSTER, CLUSTER), (21 * CLUSTER + 5, 10), (20 * CLUSTER, 9 * CLUSTER)] {
        let error = opened.try_write(offset, vec![2; len as usize]).await.expect_err("there is no room");
        assert!(matches!(error, DeviceError::NoSpace(_)), "{error}");
    }
    assert!(
        opened.read(20 * CLUSTER..30 * CLUSTER).await == guest[20 * CLUSTER as usize..30 * CLUSTER as usize]
    );
    opened.write(100, vec![3; 100]).await;
    guest[100..200].fill(3);
    opened.flush().await;
    assert!(opened.read(0..SIZE).await == guest, "what has its room is written");

    std::fs::remove_file(place.path("filler")).expect("our own file");
    opened.write(21 * CLUSTER + 5, vec![4; 10]).await;
    guest[21 * CLUSTER as usize + 5..][..10].fill(4);
    opened.flush().await;
    assert!(opened.read(0..SIZE).await == guest);
    opened.close().await;
    let letters = place.draw("top.qed").await;
    assert!(!letters.contains('.'), "with room again reads fill: {letters}");
    // The copy would not fit beside it.
    let wide = Place::new();
    std::fs::copy(place.path("top.qed"), wide.path("top.qed")).expect("room");
    wide.check_with_qemu("top.qed", &content, &guest).await;
}

#[tokio::test]
async fn an_image_that_cannot_be_written_passes_reads_through() {
    if !in_namespace("mounts::an_image_that_cannot_be_written_passes_reads_through") {
        return;
    }
    let content = content(2, SIZE);
    let origin = serve(&content).await;
    let place = Place::new();
    place.create("top.qed", filled_from(&origin.url(), "raw", SIZE)).await;
    let opened = place.open("top.qed", options()).await;
    opened.write(0, vec![1; CLUSTER as usize]).await;
    opened.read(clusters(1..3)).await;
    opened.close().await;
    let folder = place.folder().to_str().expect("text");
    let _mounted = mount(&["--bind", "-o", "ro", folder], place.folder());
    let before = place.bytes_of("top.qed");

    let error = place.try_open("top.qed", options()).await.map(|_| ()).expect_err("the guest would write");
    assert!(error.to_string().ends_with("Read-only file system"), "{error}");
    let read_only = ChainOptions { read_only: true, ..options() };
    let opened = place.open("top.qed", read_only).await;
    let warnings = opened.warnings();
    assert!(
        matches!(&warnings[..], [one] if one.contains("it is not filled, reads pass through")),
        "{warnings:?}"
    );
    assert_eq!(opened.opened()[0], "top.qed qed");
    let mut guest = content.bytes(0..SIZE).to_vec();
    guest[..CLUSTER as usize].fill(1);
    for _ in 0..2 {
        assert!(opened.read(0..SIZE).await == guest);
    }
    assert!(matches!(opened.try_write(0, vec![1; 1]).await, Err(DeviceError::ReadOnly)));
    opened.flush().await;
    let said = qemu::open_words(&place.path("top.qed"), false);
    assert!(said.contains("Read-only file system"), "{said}");
    opened.close().await;
    assert!(place.bytes_of("top.qed") == before);
}
