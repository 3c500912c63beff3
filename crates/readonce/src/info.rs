//! `readonce info`: what an image says of itself, as qemu-img tells it; ours after it.

use std::{fmt::Write as _, os::unix::fs::MetadataExt, process::ExitCode};

use readonce_disk::chain::{Layer, TopOnly};
use readonce_format::driver::{Description, Detail, Pin, Snapshot};
use readonce_origin::{Locator, Pinned, Validator};
use readonce_storage::runtime::TokioRuntime;
use serde_json::{Map, Value, json};

use crate::{
    failure::Outcome,
    human,
    json::text,
    look::{self, LookArgs, Output},
    snapshot, stdout,
};

/// Tell about an image: sizes, backing file, pinned version
#[derive(Debug, clap::Args)]
#[command(override_usage = "readonce info [OPTIONS] IMAGE")]
pub struct Args {
    #[command(flatten)]
    look: LookArgs,
    /// human or json
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    output: String,
    /// Tell about every image of the chain
    #[arg(long)]
    backing_chain: bool,
    /// File or URL
    #[arg(value_name = "IMAGE", hide_default_value = true)]
    images: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let output = look::output("info", &args.output)?;
    let image = look::one_image("info", &args.images)?;
    let top_only = if args.backing_chain { TopOnly::No } else { TopOnly::Yes };
    let layers = look::layers(image, &args.look, top_only, &TokioRuntime::current()).await?;
    let facts: Vec<Facts> = layers.iter().map(Facts::of).collect();
    match output {
        Output::Json if args.backing_chain => {
            stdout::line(text(&Value::Array(facts.iter().map(Facts::json).collect())));
        }
        Output::Json => stdout::line(text(&facts[0].json())),
        Output::Human => {
            let told: Vec<String> = facts.iter().map(Facts::human).collect();
            stdout::print(told.join("\n"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is told of one layer.
struct Facts<'a> {
    layer: &'a Layer,
    name: String,
    protocol: String,
    file_bytes: u64,
    disk_bytes: Option<u64>,
    full_backing: Option<String>,
}

impl<'a> Facts<'a> {
    fn of(layer: &'a Layer) -> Self {
        let (protocol, disk_bytes) = match &layer.locator {
            Locator::File(path) => {
                let blocks = std::fs::metadata(path).ok().map(|metadata| metadata.blocks() * 512);
                ("file".to_owned(), blocks)
            }
            Locator::Http(url) => (url.scheme().to_owned(), None),
        };
        let backing = layer.description.backing.as_ref();
        let full_backing = backing.map(|backing| match Locator::parse(&backing.name, Some(&layer.locator)) {
            Ok(locator) => locator.printable(),
            Err(_) => backing.name.clone(),
        });
        Self {
            layer,
            name: layer.locator.printable(),
            protocol,
            // QEMU counts a file in sectors of 512 bytes.
            file_bytes: layer.origin.len().next_multiple_of(512),
            disk_bytes,
            full_backing,
        }
    }

    fn json(&self) -> Value {
        let description = &self.layer.description;
        let mut file = Map::new();
        file.insert("children".into(), json!([]));
        file.insert("virtual-size".into(), self.file_bytes.into());
        file.insert("filename".into(), self.name.as_str().into());
        file.insert("format".into(), self.protocol.as_str().into());
        if let Some(bytes) = self.disk_bytes {
            file.insert("actual-size".into(), bytes.into());
            file.insert("format-specific".into(), json!({"type": "file", "data": {}}));
        }
        file.insert("dirty-flag".into(), false.into());

        let mut all = Map::new();
        all.insert("children".into(), json!([{"name": "file", "info": file}]));
        if !description.snapshots.is_empty() {
            all.insert("snapshots".into(), description.snapshots.iter().map(snapshot_json).collect());
        }
        let backing = description.backing.as_ref();
        if let Some(format) = backing.and_then(|backing| backing.format.as_deref()) {
            all.insert("backing-filename-format".into(), format.into());
        }
        all.insert("virtual-size".into(), description.virtual_size.into());
        all.insert("filename".into(), self.name.as_str().into());
        if let Some(bytes) = description.cluster_size {
            all.insert("cluster-size".into(), bytes.into());
        }
        all.insert("format".into(), description.format.into());
        if let Some(bytes) = self.disk_bytes {
            all.insert("actual-size".into(), bytes.into());
        }
        if !description.details.is_empty() {
            let data = group_json(&description.details);
            all.insert("format-specific".into(), json!({"type": description.format, "data": data}));
        }
        if let (Some(full), Some(backing)) = (&self.full_backing, backing) {
            all.insert("full-backing-filename".into(), full.as_str().into());
            all.insert("backing-filename".into(), backing.name.as_str().into());
        }
        all.insert("dirty-flag".into(), description.dirty.into());
        if backing.is_some() || description.in_use {
            all.insert("readonce".into(), self.ours_json());
        }
        Value::Object(all)
    }

    fn ours_json(&self) -> Value {
        let description = &self.layer.description;
        let mut ours = Map::new();
        ours.insert("copy-on-read".into(), description.copy_on_read.into());
        if description.in_use {
            ours.insert("in-use".into(), true.into());
        }
        if let Some(pin) = &description.pin {
            ours.insert("pin".into(), json!({"validator": validator(pin), "length": pin.len}));
            if let Some(only) = description.only_readonce_wrote {
                ours.insert("only-readonce-wrote".into(), only.into());
            }
        }
        Value::Object(ours)
    }

    fn human(&self) -> String {
        let description = &self.layer.description;
        let bytes = |bytes: u64| format!("{} ({bytes} bytes)", human::size(bytes));
        let disk_size = self.disk_bytes.map_or("unavailable".to_owned(), human::size);
        let mut out = String::new();
        let _ = writeln!(out, "image: {}", self.name);
        let _ = writeln!(out, "file format: {}", description.format);
        let _ = writeln!(out, "virtual size: {}", bytes(description.virtual_size));
        let _ = writeln!(out, "disk size: {disk_size}");
        if let Some(bytes) = description.cluster_size {
            let _ = writeln!(out, "cluster_size: {bytes}");
        }
        if description.dirty {
            let _ = writeln!(out, "cleanly shut down: no");
        }
        if let (Some(full), Some(backing)) = (&self.full_backing, &description.backing) {
            let _ = write!(out, "backing file: {}", backing.name);
            if *full != backing.name {
                let _ = write!(out, " (actual path: {full})");
            }
            let _ = writeln!(out);
            if let Some(format) = &backing.format {
                let _ = writeln!(out, "backing file format: {format}");
            }
        }
        out += &snapshot::table(&description.snapshots.iter().collect::<Vec<_>>());
        if !description.details.is_empty() {
            out += "Format specific information:\n";
            group_human(&mut out, 1, &description.details);
        }
        let _ = writeln!(out, "Child node '/file':");
        let _ = writeln!(out, "    filename: {}", self.name);
        let _ = writeln!(out, "    protocol type: {}", self.protocol);
        let _ = writeln!(out, "    file length: {}", bytes(self.file_bytes));
        let _ = writeln!(out, "    disk size: {disk_size}");
        if description.in_use {
            let _ = writeln!(out, "in use by readonce, or not closed clean: yes");
        }
        if description.backing.is_some() {
            let _ = writeln!(out, "copy on read: {}", if description.copy_on_read { "on" } else { "off" });
            if let Some(pin) = &description.pin {
                let _ = writeln!(out, "backing file version: {}", version(pin));
                let wrote = match description.only_readonce_wrote {
                    Some(true) => "yes",
                    Some(false) => "no, another program wrote too",
                    None => "cannot be told of this version of the format",
                };
                let _ = writeln!(out, "written by readonce only: {wrote}");
            }
        }
        out
    }
}

/// What qemu-io tells of an image that it has open.
pub fn of_open(description: &Description) -> String {
    let mut out = format!("format name: {}\n", description.format);
    if let Some(cluster_size) = description.cluster_size {
        let _ = writeln!(out, "cluster size: {}", human::scaled(cluster_size as f64));
        // Machine state of snapshots lies behind all that the L1 table's used entries map.
        let extended = description.details.contains(&("extended-l2", Detail::Flag(true)));
        let span = cluster_size * cluster_size / if extended { 16 } else { 8 };
        let state = match description.format {
            "qcow2" => description.virtual_size.next_multiple_of(span),
            _ => 0,
        };
        let _ = writeln!(out, "vm state offset: {}", human::scaled(state as f64));
    }
    if !description.details.is_empty() {
        out += "Format specific information:\n";
        group_human(&mut out, 1, &description.details);
    }
    out
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut all = Map::new();
    if let Some(icount) = snapshot.icount {
        all.insert("icount".into(), icount.into());
    }
    all.insert("vm-clock-nsec".into(), (snapshot.vm_clock_nsec % 1_000_000_000).into());
    all.insert("name".into(), snapshot.name.as_str().into());
    all.insert("date-sec".into(), snapshot.date_sec.into());
    all.insert("date-nsec".into(), snapshot.date_nsec.into());
    all.insert("vm-clock-sec".into(), (snapshot.vm_clock_nsec / 1_000_000_000).into());
    all.insert("id".into(), snapshot.id.as_str().into());
    all.insert("vm-state-size".into(), snapshot.vm_state_size.into());
    Value::Object(all)
}

fn group_json(group: &[(&'static str, Detail)]) -> Value {
    Value::Object(group.iter().map(|(name, detail)| ((*name).to_owned(), detail_json(detail))).collect())
}

fn detail_json(detail: &Detail) -> Value {
    match detail {
        Detail::Text(text) => text.as_str().into(),
        Detail::Flag(flag) => (*flag).into(),
        Detail::Number(number) => (*number).into(),
        Detail::List(list) => list.iter().map(detail_json).collect(),
        Detail::Group(group) => group_json(group),
    }
}

fn group_human(out: &mut String, depth: usize, group: &[(&'static str, Detail)]) {
    for (name, detail) in group {
        detail_human(out, depth, &name.replace('-', " "), detail);
    }
}

/// One fact, and below it, further to the right, what it holds.
fn detail_human(out: &mut String, depth: usize, name: &str, detail: &Detail) {
    let _ = write!(out, "{:width$}{name}:", "", width = depth * 4);
    let _ = match detail {
        Detail::Text(text) => writeln!(out, " {text}"),
        Detail::Flag(flag) => writeln!(out, " {flag}"),
        Detail::Number(number) => writeln!(out, " {number}"),
        Detail::List(_) | Detail::Group(_) => writeln!(out),
    };
    match detail {
        Detail::List(list) => {
            for (index, detail) in list.iter().enumerate() {
                detail_human(out, depth + 1, &format!("[{index}]"), detail);
            }
        }
        Detail::Group(group) => group_human(out, depth + 1, group),
        Detail::Text(_) | Detail::Flag(_) | Detail::Number(_) => {}
    }
}

/// A pin in words for a person: each fact once, and times as a clock shows them.
fn version(pin: &Pin) -> String {
    let Ok(pinned) = Pinned::decode(&pin.validator, pin.len) else { return validator(pin) };
    let own = match &pinned.own.validator {
        tag @ Validator::StrongETag(_) => format!("{tag} ({} bytes)", pin.len),
        Validator::LengthOnly { len } => format!("length alone, {len} bytes"),
        Validator::File { device, inode, size, mtime_ns } => {
            let seconds = i64::try_from(*mtime_ns).ok().map(|time| time.div_euclid(1_000_000_000));
            let changed = match seconds.and_then(|seconds| u32::try_from(seconds).ok()) {
                Some(seconds) => human::local_time(seconds),
                None => format!("{mtime_ns} ns"),
            };
            format!("file of {size} bytes, changed {changed}, inode {inode} on device {device}")
        }
        other => other.to_string(),
    };
    match &pinned.data {
        Some(data) => format!("{own}; its data file: {}", data.validator),
        None => own,
    }
}

/// A pin's validator in words.
pub fn validator(pin: &Pin) -> String {
    match Pinned::decode(&pin.validator, pin.len) {
        Ok(pinned) => pinned.to_string(),
        Err(error) => error.to_string(),
    }
}
