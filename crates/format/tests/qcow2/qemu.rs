//! QEMU's tools on an image in a folder.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::Arc,
};

use readonce_storage::SimFile;

use crate::guest::{DataIn, Files, Model, Shape, backing_bytes};

/// A folder with an image, its backing and its data file in it.
pub struct Folder {
    folder: tempfile::TempDir,
    shape: Shape,
}

impl Folder {
    pub fn new(shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        if shape.backing {
            std::fs::write(folder.path().join("backing.raw"), backing_bytes(&shape)).unwrap();
        }
        Self { folder, shape }
    }

    /// Runs a tool in the folder: QEMU looks for a data file from where it runs.
    pub fn tool(&self, name: &str, args: &[&str]) -> Output {
        Command::new(name)
            .args(args)
            .current_dir(self.folder.path())
            .output()
            .unwrap_or_else(|error| panic!("{name} cannot be run ({error}): install the package qemu-utils"))
    }

    /// Runs a tool that is to succeed; what it said.
    pub fn ok(&self, name: &str, args: &[&str]) -> String {
        let output = self.tool(name, args);
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name} {args:?}: {text}");
        text
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn image(&self) -> PathBuf {
        self.path("image.qcow2")
    }

    pub fn save(&self, files: &Files) {
        std::fs::write(self.image(), files.image.contents()).unwrap();
        if let Some(data) = &files.data {
            std::fs::write(self.path("data.raw"), data.contents()).unwrap();
        }
    }

    pub fn load(&self) -> Files {
        let read = |path: PathBuf| Arc::new(SimFile::from_bytes(&std::fs::read(path).unwrap()));
        let data = (self.shape.data != DataIn::Own).then(|| read(self.path("data.raw")));
        Files { image: read(self.image()), data }
    }

    /// qemu-img finds the image clean: no leaks either.
    pub fn is_clean(&self, context: &str) {
        let output = self.tool("qemu-img", &["check", "-f", "qcow2", "image.qcow2"]);
        assert!(output.status.success(), "{context}: {output:?}");
    }

    /// qemu-img finds nothing broken; leaks are allowed.
    pub fn is_whole(&self, context: &str) {
        let output = self.tool("qemu-img", &["check", "-f", "qcow2", "image.qcow2"]);
        assert!([Some(0), Some(3)].contains(&output.status.code()), "{context}: {output:?}");
    }

    /// qemu-img reads the model's bytes.
    pub fn reads(&self, model: &Model, context: &str) {
        let plain = self.path("plain.raw");
        std::fs::write(&plain, model.bytes()).unwrap();
        let args = ["compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "plain.raw"];
        let output = self.tool("qemu-img", &args);
        assert!(output.status.success(), "{context}: {output:?}");
    }

    /// Makes the image from the backing's bytes, compressed.
    pub fn convert(&self, options: &str) {
        let mut args = vec!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        args.extend(["backing.raw", "image.qcow2"]);
        self.ok("qemu-img", &args);
    }

    /// qemu-io's commands, in one run.
    pub fn qemu_io(&self, commands: &[String]) {
        let mut args = vec!["-f", "qcow2"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push("image.qcow2");
        let said = self.ok("qemu-io", &args);
        assert!(!said.contains("failed"), "{said}");
    }
}
