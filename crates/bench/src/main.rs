//! `readonce-bench`: the figures that readonce promises, each measured beside its peers in the same run.
//!
//! - `rows`: the benchmarks, one file each. `figure`: what they find, as a table and as JSON.
//! - `bench`: what they share: folder, tools, repetitions. `server`: a running NBD server, ours or a peer. `image`: images to serve.
//! - `bare`: a server that does the least, for what the machine itself costs.
//! - Machines are noisy: rows that measure speed run ours and the peer in turn (A B A B) and give medians.
//! - A peer that is not installed is named in its row.
//!
//! Not here: checks that must hold on every machine; those are tests.

#![allow(clippy::disallowed_methods, reason = "a benchmark is about real time and real processes")]

mod bare;
mod bench;
mod figure;
mod image;
mod rows;
mod server;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

use crate::{bench::Bench, figure::Figure, rows::ROWS};

/// Measures what readonce promises, beside its peers in the same run
#[derive(Debug, Parser)]
#[command(name = "readonce-bench")]
pub struct Args {
    /// Rows to run; all if none is given, `list` to see them
    rows: Vec<String>,
    /// Write the figures to this file as well, as JSON; `-` is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often ours and the peer take turns
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    /// A hundredth of the work where the amount does not change the figure: for a first look
    #[arg(long)]
    quick: bool,
    /// Folder for images; needs 4 GiB
    #[arg(long, value_name = "FOLDER", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// The `readonce` to measure; by default the one beside this program
    #[arg(long, value_name = "PROGRAM")]
    readonce: Option<PathBuf>,
    /// Only be the bare server of this file on this socket
    #[arg(long, hide = true, num_args = 2, value_names = ["FILE", "SOCKET"])]
    bare: Option<Vec<PathBuf>>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some([image, socket]) = args.bare.as_deref() {
        bare::serve(image, socket)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.rows.iter().any(|row| row == "list") {
        for row in ROWS {
            println!("{:10} {}", row.name, row.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = args.rows.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        anyhow::bail!("there is no row '{unknown}'; `list` shows them");
    }
    let bench = Bench::new(&args)?;
    bench.say(&bench.machine());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut figures: Vec<Figure> = Vec::new();
    let mut has_failed = false;
    for row in ROWS.iter().filter(|row| args.rows.is_empty() || args.rows.iter().any(|name| name == row.name))
    {
        bench.say(&format!("{}: {}", row.name, row.about));
        match runtime.block_on((row.run)(&bench)) {
            Ok(found) => figures.extend(found),
            Err(error) => {
                has_failed = true;
                figures.push(Figure::failed(row.name, row.about, &error));
            }
        }
    }
    // With JSON on standard output the table goes where the progress went.
    let is_json_out = args.json.as_deref().is_some_and(|path| path.as_os_str() == "-");
    let table = figure::table(&figures);
    if is_json_out {
        eprint!("{table}");
    } else {
        print!("{table}");
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&figure::json(&bench, &figures))? + "\n";
        if is_json_out {
            print!("{text}");
        } else {
            std::fs::write(path, text)?;
        }
    }
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
