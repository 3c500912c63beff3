//! Images made by QEMU's tools, their structure by hand, and damage done to it.

use std::{path::PathBuf, sync::Arc};

use readonce_format::driver::CheckReport;
use readonce_storage::{ReadAt, SimFile};

use crate::support::{ok, tool};

/// A folder for images.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Makes an image with these options, and runs commands of qemu-io on it.
    pub fn create(&self, name: &str, options: &str, size: &str, commands: &[&str]) {
        let path = self.text(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([&path, size]);
        ok("qemu-img", &args);
        self.io(name, commands);
    }

    pub fn io(&self, name: &str, commands: &[&str]) {
        if commands.is_empty() {
            return;
        }
        let path = self.text(name);
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(&path);
        let output = ok("qemu-io", &args);
        assert!(!output.contains("failed"), "{commands:?}: {output}");
    }

    pub fn load(&self, name: &str) -> Bytes {
        Bytes(std::fs::read(self.path(name)).unwrap())
    }

    pub fn save(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// What `qemu-img check` says; `None` where it cannot check.
    pub fn check(&self, name: &str) -> Option<CheckReport> {
        let (json, _) = tool("qemu-img", &["check", "-f", "qcow2", "--output=json", &self.text(name)]);
        let number = |field: &str| -> u64 {
            let Some((_, rest)) = json.split_once(&format!("\"{field}\": ")) else { return 0 };
            rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
        };
        json.contains("total-clusters").then(|| CheckReport {
            check_errors: number("check-errors"),
            corruptions: number("corruptions"),
            leaks: number("leaks"),
            corruptions_fixed: 0,
            leaks_fixed: 0,
            total_clusters: number("total-clusters"),
            allocated_clusters: number("allocated-clusters"),
            fragmented_clusters: number("fragmented-clusters"),
            compressed_clusters: number("compressed-clusters"),
            image_end_offset: Some(number("image-end-offset")),
        })
    }
}

/// An image in memory.
#[derive(Clone)]
pub struct Bytes(pub Vec<u8>);

pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;

impl Bytes {
    pub fn u32(&self, at: u64) -> u64 {
        u32::from_be_bytes(self.0[at as usize..][..4].try_into().unwrap()).into()
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.0[at as usize..][..8].try_into().unwrap())
    }

    pub fn put32(&mut self, at: u64, value: u64) {
        self.0[at as usize..][..4].copy_from_slice(&u32::try_from(value).unwrap().to_be_bytes());
    }

    pub fn put64(&mut self, at: u64, value: u64) {
        self.0[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
    }

    /// Sets bits of the word at `at`.
    pub fn or64(&mut self, at: u64, bits: u64) {
        let value = self.u64(at);
        self.put64(at, value | bits);
    }

    /// Clears bits of the word at `at`.
    pub fn clear64(&mut self, at: u64, bits: u64) {
        let value = self.u64(at);
        self.put64(at, value & !bits);
    }

    /// Adds to the word at `at`.
    pub fn add64(&mut self, at: u64, more: u64) {
        let value = self.u64(at);
        self.put64(at, value + more);
    }

    pub fn cluster(&self) -> u64 {
        1 << self.u32(20)
    }

    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Byte offset of the active L1 table.
    pub fn l1(&self) -> u64 {
        self.u64(40)
    }

    /// Byte offset of the L2 table that an entry of the active L1 table names.
    pub fn l2(&self, index: u64) -> u64 {
        self.u64(self.l1() + 8 * index) & OFFSET
    }

    /// Byte offset of the refcount table.
    pub fn table(&self) -> u64 {
        self.u64(48)
    }

    /// Byte offset of a refcount block.
    pub fn block(&self, index: u64) -> u64 {
        self.u64(self.table() + 8 * index) & !0x1ff
    }

    /// Byte offset of the snapshot table.
    pub fn snapshots(&self) -> u64 {
        self.u64(64)
    }

    /// Byte offset of the data of a header extension.
    pub fn extension(&self, kind: u64) -> u64 {
        let mut at = self.u32(100);
        while self.u32(at) != kind {
            assert_ne!(self.u32(at), 0, "the extension is there");
            at += 8 + self.u32(at + 4).next_multiple_of(8);
        }
        at + 8
    }

    pub fn file(&self) -> Arc<SimFile> {
        Arc::new(SimFile::from_bytes(&self.0))
    }

    pub fn reader(&self) -> Arc<dyn ReadAt> {
        self.file()
    }
}
