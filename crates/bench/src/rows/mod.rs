//! The rows: one benchmark each.

mod allocate;
mod boot;
mod compressed;
mod huge;
mod local;
mod once;
mod race_model;
mod race_storm;
mod races;
mod syncs;
mod write_latency;

use std::{future::Future, pin::Pin};

use readonce_testkit::{Fault, FaultyOrigin, When};

use crate::{bench::Bench, figure::Figure};

/// Lets the origin answer HEAD, which curl-based clients need to learn the size.
pub fn allow_head(origin: &FaultyOrigin) {
    origin.fault(When::always(), Fault::AllowHead);
}

/// Transmission flags of the protocol.
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;

type Found<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Vec<Figure>>> + 'a>>;

/// One benchmark.
pub struct Row {
    /// As it is called on the command line.
    pub name: &'static str,
    /// What it measures.
    pub about: &'static str,
    /// Runs it.
    pub run: for<'a> fn(&'a Bench) -> Found<'a>,
}

/// All of them, in the order of the table.
pub const ROWS: &[Row] = &[
    Row {
        name: "once",
        about: "bytes asked of the origin / bytes of distinct clusters read, 16 readers at once",
        run: |bench| Box::pin(once::run(bench)),
    },
    Row {
        name: "races",
        about: "lost writes in random racing requests over a slow origin",
        run: |bench| Box::pin(races::run(bench)),
    },
    Row {
        name: "write",
        about: "write to a cluster being fetched, link of 2 s",
        run: |bench| Box::pin(write_latency::run(bench)),
    },
    Row {
        name: "syncs",
        about: "syncs for 64 fills within a second, until clean close",
        run: |bench| Box::pin(syncs::run(bench)),
    },
    Row {
        name: "local",
        about: "speed of a local QED image over NBD",
        run: |bench| Box::pin(local::run(bench, "qed", "local")),
    },
    Row {
        name: "qcow2",
        about: "speed of a local qcow2 image over NBD",
        run: |bench| Box::pin(local::run(bench, "qcow2", "qcow2")),
    },
    Row {
        name: "allocate",
        about: "speed of writes that allocate, in qcow2 over a local raw backing",
        run: |bench| Box::pin(allocate::run(bench)),
    },
    Row {
        name: "compressed",
        about: "reading a compressed qcow2 image in sequence",
        run: |bench| Box::pin(compressed::run(bench)),
    },
    Row {
        name: "huge",
        about: "open time and memory of a 16 TiB image whose L2 tables all exist, QED and qcow2",
        run: |bench| Box::pin(huge::run(bench)),
    },
    Row {
        name: "boot",
        about: "a recorded boot, link 100 Mbit/s 40 ms",
        run: |bench| Box::pin(boot::run(bench)),
    },
];
