//! Other people's clients: libnbd's tools and QEMU's.

use std::{path::Path, process::Output};

use readonce_export::nbd::ServerOptions;
use tokio::process::Command;

use crate::{
    device::{BLOCK, MemDevice},
    rig::{Rig, pattern},
};

/// Runs a tool to its end; it must succeed. Gives what it printed.
async fn run(package: &str, tool: &str, args: &[&str]) -> String {
    let Output { status, stdout, stderr } = match Command::new(tool).args(args).output().await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            panic!("{tool} is not installed: apt-get install {package}")
        }
        other => other.expect("the tool starts"),
    };
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{tool} {args:?}: {status}\n{stdout}{}", String::from_utf8_lossy(&stderr));
    stdout
}

async fn libnbd(tool: &str, args: &[&str]) -> String {
    run("libnbd-bin", tool, args).await
}

async fn qemu(tool: &str, args: &[&str]) -> String {
    run("qemu-utils", tool, args).await
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary file's name is plain")
}

/// Data, holes and data again.
fn sparse(len: usize) -> Vec<u8> {
    let mut data = pattern(11, len);
    data[len / 4 / BLOCK * BLOCK..len / 2 / BLOCK * BLOCK].fill(0);
    data
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_sees_what_is_served() {
    let options = ServerOptions {
        export_name: "fedora".into(),
        description: "a disk from afar".into(),
        ..ServerOptions::default()
    };
    let rig = Rig::with(MemDevice::with(sparse(64 * BLOCK)), options);
    let info = libnbd("nbdinfo", &[&rig.uri]).await;
    for expected in [
        "export=\"fedora\"",
        "export-size: 262144",
        "a disk from afar",
        "base:allocation",
        "qemu:allocation-depth",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(expected), "{expected}:\n{info}");
    }
    let list = libnbd("nbdinfo", &["--list", &rig.uri]).await;
    assert!(list.contains("export=\"fedora\""), "{list}");
    let map = libnbd("nbdinfo", &["--map", &rig.uri]).await;
    let map: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        map,
        [
            ["0", "65536", "0", "data"],
            ["65536", "65536", "3", "hole,zero"],
            ["131072", "131072", "0", "data"]
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_copies_out_and_in() {
    for is_waiting in [false, true] {
        let device = MemDevice::with(sparse(20 << 20));
        let rig = Rig::new(if is_waiting { device.waiting() } else { device });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("copy.raw");
        libnbd("nbdcopy", &[&rig.uri, text(&file)]).await;
        let copy = std::fs::read(&file).unwrap();
        assert!(copy == rig.device.contents());

        let changed = sparse(20 << 20).into_iter().map(|byte| byte.wrapping_mul(3)).collect::<Vec<_>>();
        std::fs::write(&file, &changed).unwrap();
        libnbd("nbdcopy", &["--flush", text(&file), &rig.uri]).await;
        assert!(rig.device.contents() == changed);
        assert!(rig.device.durable() == changed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_reads_and_writes() {
    for is_waiting in [false, true] {
        let device = MemDevice::new(64 << 20);
        let rig = Rig::new(if is_waiting { device.waiting() } else { device });
        let mut args = vec!["-f", "raw", "-t", "writeback"];
        for command in [
            "write -P 0xaa 0 64k",
            "read -P 0xaa 0 64k",
            "write -z 4k 4k",
            "read -P 0 4k 4k",
            "write -z -u 8k 8k",
            "write -f -P 3 1M 40M",
            "read -P 3 1M 40M",
            "aio_write -P 5 50M 1M",
            "aio_read 1M 1M",
            "aio_flush",
            "read -P 5 50M 1M",
            "discard 50M 64k",
            "write -P 7 513 1000",
            "read -P 7 513 1000",
            "flush",
        ] {
            args.extend(["-c", command]);
        }
        args.push(&rig.uri);
        let output = qemu("qemu-io", &args).await;
        assert!(!output.contains("failed"), "{output}");
        assert_eq!(rig.device.contents()[513..1513], [7; 1000]);
        assert_eq!(rig.device.durable()[41 << 20 >> 1], 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_compares_converts_and_maps() {
    let rig = Rig::new(MemDevice::with(sparse(8 << 20)));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy.raw");
    qemu("qemu-img", &["convert", "-f", "raw", "-O", "raw", &rig.uri, text(&file)]).await;
    qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", &rig.uri, text(&file)]).await;
    assert!(std::fs::read(&file).unwrap() == rig.device.contents());

    let map = qemu("qemu-img", &["map", "--output=json", "-f", "raw", &rig.uri]).await;
    let field = |line: &str, name: &str| {
        let value = line.split(&format!("\"{name}\": ")).nth(1).expect(name);
        value.split([',', '}']).next().expect(name).to_owned()
    };
    let runs: Vec<(String, String, String)> = map
        .lines()
        .filter(|line| line.contains("\"start\""))
        .map(|line| (field(line, "start"), field(line, "length"), field(line, "zero")))
        .collect();
    let run = |start: u64, len: u64, zero: bool| (start.to_string(), len.to_string(), zero.to_string());
    assert_eq!(runs, [run(0, 2 << 20, false), run(2 << 20, 2 << 20, true), run(4 << 20, 4 << 20, false)]);

    // Back again, into another export.
    let target = Rig::new(MemDevice::with(vec![1; 8 << 20]));
    qemu("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&file), &target.uri]).await;
    assert!(target.device.contents() == rig.device.contents());
    assert!(target.device.durable() == rig.device.contents());
}
