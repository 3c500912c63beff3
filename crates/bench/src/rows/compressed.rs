//! Reading a compressed image from its start to its end, in process: `readonce io` beside `qemu-io`, the same words.
//!
//! - What is compressed is what the machine has installed: programs and libraries.
//! - The whole process is timed, and both images are in the page cache. Both processes may use every CPU.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use crate::{
    bench::{Bench, Tool},
    figure::{Figure, Target, Value, median},
};

const SIZE: u64 = 512 << 20;
/// Bytes of one read: what a copying program asks for.
const READ: u64 = 2 << 20;

/// Runs the row.
pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    if let Some(missing) = bench.missing(&[Tool::QemuImg]) {
        anyhow::bail!("no compressed image can be made: {missing}");
    }
    let raw = bench.path("compressed.raw");
    let size = programs(&raw, bench.amount(SIZE).next_multiple_of(READ))?;
    let mut figures = Vec::new();
    for (codec, times) in [("zlib", 1.2), ("zstd", 1.0)] {
        let image = bench.path(&format!("{codec}.qcow2"));
        let made = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", &format!("compression_type={codec}")])
            .args([&raw, &image])
            .status()?;
        anyhow::ensure!(made.success(), "qemu-img convert: {made}");
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..bench.repeat {
            ours.push(measure(
                Command::new(&bench.readonce).args(["io", "-r", "-f", "qcow2"]),
                &image,
                size,
            )?);
            peer.push(measure(Command::new("qemu-io").args(["-r", "-f", "qcow2"]), &image, size)?);
        }
        figures.push(Figure {
            row: "compressed",
            what: format!("qcow2, {codec}: reading it all in sequence, in process"),
            unit: "MiB/s",
            ours: Value::Number(median(&ours).round()),
            peers: vec![("qemu-io", Value::Number(median(&peer).round()))],
            target: Target::Times(times),
            note: String::new(),
        });
    }
    Ok(figures)
}

/// Fills a file with installed programs and libraries; gives its length, a multiple of a read's.
fn programs(raw: &Path, size: u64) -> anyhow::Result<u64> {
    let mut out = io::BufWriter::new(File::create(raw)?);
    let mut len = 0;
    for folder in ["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/sbin"] {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths.iter().filter(|path| path.is_file() && !path.is_symlink()) {
            let Ok(file) = File::open(path) else { continue };
            len += io::copy(&mut file.take(size - len), &mut out)?;
        }
    }
    let len = len - len % READ;
    anyhow::ensure!(len > 0, "no programs are installed where they are looked for");
    out.flush()?;
    out.get_ref().set_len(len)?;
    Ok(len)
}

/// MiB a second.
fn measure(program: &mut Command, image: &Path, size: u64) -> anyhow::Result<f64> {
    for at in (0..size).step_by(READ as usize) {
        program.args(["-c", &format!("read -q {at} {READ}")]);
    }
    program.arg(image).stdout(Stdio::null());
    let start = Instant::now();
    let status = program.status()?;
    anyhow::ensure!(status.success(), "{:?}: {status}", program.get_program());
    Ok(size as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}
