//! What the tests share: QEMU's tools, a folder, images in memory.

use std::{future::Future, path::PathBuf, process::Command, sync::Arc};

use readonce_format::{
    Driver, FormatError,
    driver::{BackingRef, CreateSpec, Description, HeaderChange, driver},
};
use readonce_storage::{ReadAt, SimFile, Storage};

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub fn qcow2() -> &'static dyn Driver {
    driver("qcow2").unwrap()
}

/// Runs a tool; its output, and whether it went well.
pub fn tool(name: &str, args: &[&str]) -> (String, bool) {
    let output = Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{name} cannot be run ({error}): install the package qemu-utils"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (text, output.status.success())
}

pub fn ok(name: &str, args: &[&str]) -> String {
    let (text, success) = tool(name, args);
    assert!(success, "{name} {args:?}: {text}");
    text
}

/// A folder that holds `backing.raw`, 2 MiB of numbered sectors.
pub struct Folder(tempfile::TempDir);

pub const BACKING_BYTES: u64 = 2 << 20;

impl Folder {
    pub fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let sectors = (0..BACKING_BYTES / 512).flat_map(|sector| [(sector + 1).to_le_bytes(); 64]);
        std::fs::write(folder.path("backing.raw"), sectors.flatten().collect::<Vec<u8>>()).unwrap();
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// `qemu-img create`, inside the folder; `data.raw` is the data file where the options name one.
    pub fn qemu_create(&self, name: &str, options: &str, backing: bool, size: &str) -> Result<(), String> {
        let text = self.text(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if backing {
            args.extend(["-b", "backing.raw", "-F", "raw"]);
        }
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([&text, size]);
        let (text, success) = tool("qemu-img", &args);
        if success { Ok(()) } else { Err(text) }
    }

    pub fn load(&self, name: &str) -> Arc<SimFile> {
        Arc::new(SimFile::from_bytes(&std::fs::read(self.path(name)).unwrap()))
    }

    pub fn save(&self, name: &str, file: &SimFile) {
        std::fs::write(self.path(name), file.contents()).unwrap();
    }

    /// `qemu-img info`, without what differs from one file to another.
    pub fn info(&self, name: &str) -> String {
        let text = ok("qemu-img", &["info", "-f", "qcow2", &self.text(name)]);
        let same = |line: &&str| {
            !["image:", "disk size:", "filename:", "file length:"]
                .iter()
                .any(|own| line.trim().starts_with(own))
        };
        text.lines().filter(same).collect::<Vec<_>>().join("\n")
    }

    /// `qemu-img check` finds nothing.
    pub fn is_clean(&self, name: &str, context: &str) {
        let (text, clean) = tool("qemu-img", &["check", "-f", "qcow2", &self.text(name)]);
        assert!(clean && text.contains("No errors were found"), "{context}: {text}");
    }
}

/// A spec with options as typed: `a=b,c`. `data_file` is taken out of them.
pub fn spec(options: &str, backing: bool, size: u64) -> CreateSpec {
    let mut spec = CreateSpec { size, ..CreateSpec::default() };
    if backing {
        spec.backing = Some(BackingRef { name: "backing.raw".into(), format: Some("raw".into()) });
    }
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("data_file", name)) => spec.data_file = Some(name.to_owned()),
            Some((name, value)) => spec.options.push((name.to_owned(), Some(value.to_owned()))),
            None => spec.options.push((option.to_owned(), None)),
        }
    }
    spec
}

pub fn create(spec: &CreateSpec) -> Result<Arc<SimFile>, FormatError> {
    create_with_data(spec).map(|(file, _)| file)
}

pub fn create_with_data(spec: &CreateSpec) -> Result<(Arc<SimFile>, Arc<SimFile>), FormatError> {
    let (file, data) = (Arc::new(SimFile::from_bytes(b"old")), Arc::new(SimFile::from_bytes(b"old")));
    let (storage, data_storage): (Arc<dyn Storage>, Arc<dyn Storage>) = (file.clone(), data.clone());
    block_on(qcow2().create(&storage, Some(&data_storage), spec))?;
    Ok((file, data))
}

pub fn describe(file: &Arc<SimFile>) -> Result<Description, FormatError> {
    let reader: Arc<dyn ReadAt> = file.clone();
    block_on(qcow2().describe(&reader))
}

pub fn change(file: &Arc<SimFile>, change: &HeaderChange) -> Result<(), FormatError> {
    let storage: Arc<dyn Storage> = file.clone();
    block_on(qcow2().change(&storage, change))
}

/// The bytes that a header has as a number.
pub fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
