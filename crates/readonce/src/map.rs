//! `readonce map`: which file of the chain holds which range, as qemu-img tells it.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use readonce_disk::chain::{Layer, TopOnly};
use readonce_format::Mapping;
use readonce_origin::Locator;
use readonce_storage::runtime::TokioRuntime;
use readonce_words::options;

use crate::{
    failure::{Failure, Outcome},
    look::{self, LookArgs, Output},
    stdout,
};

/// Tell where each range of an image lies
#[derive(Debug, clap::Args)]
#[command(override_usage = "readonce map [OPTIONS] IMAGE")]
pub struct Args {
    #[command(flatten)]
    look: LookArgs,
    /// human or json
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    output: String,
    /// First byte of the guest (suffixes as of sizes)
    #[arg(short = 's', long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// Bytes at most (suffixes as of sizes)
    #[arg(short = 'l', long, value_name = "BYTES")]
    max_length: Option<String>,
    /// File or URL
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let output = look::output("map", &args.output)?;
    let image = look::one_image("map", &args.images)?;
    let bytes = |name: &str, text: &Option<String>| match text {
        Some(text) => options::size(text)
            .map(Some)
            .map_err(|_| Failure::new(format!("Invalid {name} specified: '{text}'."))),
        None => Ok(None),
    };
    let start = bytes("start offset", &args.start_offset)?.unwrap_or(0);
    let len_max = bytes("max length", &args.max_length)?.unwrap_or(u64::MAX);
    let layers = look::layers(image, &args.look, TopOnly::No, &TokioRuntime::current())
        .await
        .map_err(|failure| through(image, failure))?;
    let mut files = Vec::new();
    for layer in &layers {
        files.push(DataOf::layer(layer).await);
    }
    let map = Map { layers: &layers, files };

    let size = layers[0].mapper.geometry().size;
    let end = size.min(start.saturating_add(len_max));
    let mut printer = Printer { output, printed: false };
    printer.begin();
    let mut pending: Option<Entry> = None;
    let mut at = start;
    while at < end {
        let entry = map.entry(at, end - at).await?;
        at += entry.len;
        pending = Some(match pending {
            Some(last) if last.goes_on_with(&entry) => Entry { len: last.len + entry.len, ..last },
            Some(last) => {
                printer.entry(&last, &map)?;
                entry
            }
            None => entry,
        });
    }
    if let Some(last) = pending {
        printer.entry(&last, &map)?;
    }
    printer.end();
    Ok(ExitCode::SUCCESS)
}

/// QEMU's `map` opens the whole chain through its top, and says so.
fn through(image: &str, failure: Failure) -> Failure {
    let opening = format!("Could not open '{image}': ");
    match failure.text.starts_with("Could not open '") && !failure.text.starts_with(&opening) {
        true => {
            Failure { text: format!("{opening}Could not open backing file: {}", failure.text), ..failure }
        }
        false => failure,
    }
}

/// A range in one state.
#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u64,
    len: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Entry {
    fn goes_on_with(&self, next: &Self) -> bool {
        let offsets = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.len) == Some(next),
            (None, None) => true,
            _ => false,
        };
        let state = |entry: &Self| (entry.depth, entry.present, entry.zero, entry.data, entry.compressed);
        offsets && state(self) == state(next)
    }
}

struct Map<'a> {
    layers: &'a [Layer],
    files: Vec<DataOf>,
}

impl Map<'_> {
    /// The state from `start` on, at most `len_max` bytes of it. As in QEMU's tool, what no layer holds belongs to the last
    /// one that reaches so far.
    async fn entry(&self, start: u64, len_max: u64) -> Result<Entry, Failure> {
        let mut len = len_max;
        for (depth, layer) in self.layers.iter().enumerate() {
            let extent = layer
                .mapper
                .lookup(start, len)
                .await
                .map_err(|error| look::cannot_open(&layer.locator.printable(), error))?;
            len = extent.len;
            let nothing = Entry {
                start,
                len,
                depth,
                present: true,
                zero: false,
                data: false,
                compressed: false,
                offset: None,
            };
            let data = Entry { data: true, ..nothing };
            let holes = &self.files[depth].holes;
            if layer.description.format == "raw" {
                // All of a raw file is there; where it has holes, or ends inside a sector, it reads as zeros.
                let entry = Entry { offset: Some(start), ..data };
                return Ok(match (extent.mapping, holes) {
                    (Mapping::Data(_), Some(holes)) => {
                        let entry = holes.seen(entry, start);
                        Entry { data: !entry.zero, ..entry }
                    }
                    (Mapping::Data(_), None) => entry,
                    _ => Entry { zero: true, data: false, ..entry },
                });
            }
            match extent.mapping {
                Mapping::Data(offset) | Mapping::Shared(offset) => {
                    let entry = Entry { offset: Some(offset), ..data };
                    return Ok(match holes {
                        Some(holes) => holes.seen(entry, offset),
                        None => entry,
                    });
                }
                Mapping::Compressed(_) => return Ok(Entry { compressed: true, ..data }),
                Mapping::Zero => return with_room(layer, Entry { zero: true, ..nothing }).await,
                Mapping::Absent => {}
            }
            let below = self.layers.get(depth + 1).map_or(0, |below| below.mapper.geometry().size);
            if start >= below {
                return with_room(layer, Entry { present: false, zero: true, ..nothing }).await;
            }
            len = len.min(below - start);
        }
        unreachable!("the last layer answers for itself")
    }
}

/// The entry of what reads as zeros, with the room that it has all the same.
async fn with_room(layer: &Layer, entry: Entry) -> Result<Entry, Failure> {
    let room = layer.mapper.room(entry.start, entry.len).await;
    let (offset, len) = room.map_err(|error| look::cannot_open(&layer.locator.printable(), error))?;
    Ok(Entry { offset, len, ..entry })
}

/// The file that holds a layer's data.
struct DataOf {
    name: String,
    /// Where its holes tell something.
    holes: Option<Holes>,
}

impl DataOf {
    async fn layer(layer: &Layer) -> Self {
        let description = &layer.description;
        let data_file = description.data_file.as_ref();
        let locator = match data_file.map(|data| Locator::parse(&data.name, Some(&layer.locator))) {
            Some(Ok(locator)) => locator,
            _ => layer.locator.clone(),
        };
        let told = match &layer.locator {
            _ if description.format == "raw" => true,
            Locator::File(path) => match std::fs::metadata(path) {
                // This is no more than a hint, and an image that cannot be read says so elsewhere.
                Ok(metadata) => layer.mapper.names_holes(metadata.blocks() * 512).await.unwrap_or(false),
                Err(_) => false,
            },
            Locator::Http(_) => false,
        };
        let holes = match &locator {
            Locator::File(path) if told => Holes::open(path).ok(),
            _ => None,
        };
        Self { name: locator.printable(), holes }
    }
}

/// The holes of a local file.
struct Holes {
    file: File,
}

impl Holes {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(PathBuf::from(path))? })
    }

    /// The entry, whose bytes begin at `offset` of the file, as far as they are all in a hole or all not.
    fn seen(&self, entry: Entry, offset: u64) -> Entry {
        match self.at(offset) {
            Some((zero, len)) => Entry { zero, len: entry.len.min(len), ..entry },
            None => entry,
        }
    }

    /// Whether a hole is there, and how far that goes; `None` where the file system does not tell.
    fn at(&self, offset: u64) -> Option<(bool, u64)> {
        use rustix::{fs::SeekFrom, io::Errno};
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Some((true, data - offset)),
            Ok(_) => {
                let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(offset)).ok()?;
                (hole > offset).then(|| (false, hole - offset))
            }
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => Some((true, u64::MAX)),
            Err(_) => None,
        }
    }
}

struct Printer {
    output: Output,
    printed: bool,
}

impl Printer {
    fn begin(&self) {
        match self.output {
            Output::Human => {
                stdout::line(format_args!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"))
            }
            Output::Json => stdout::print("["),
        }
    }

    fn entry(&mut self, entry: &Entry, map: &Map<'_>) -> Result<(), Failure> {
        let Entry { start, len, depth, present, zero, data, compressed, offset } = entry;
        match self.output {
            Output::Human if *data && offset.is_none() => {
                return Err(Failure::new("File contains external, encrypted or compressed clusters."));
            }
            Output::Human if *zero || !data => {}
            Output::Human => {
                let name = &map.files[*depth].name;
                let [start, len, offset] = [*start, *len, offset.unwrap_or(0)].map(hex);
                stdout::line(format_args!("{start:<16}{len:<16}{offset:<16}{name}"));
            }
            Output::Json => {
                if self.printed {
                    stdout::line(",");
                }
                stdout::print(format_args!(
                    "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
                     \"data\": {data}, \"compressed\": {compressed}"
                ));
                if let Some(offset) = offset {
                    stdout::print(format_args!(", \"offset\": {offset}"));
                }
                stdout::print("}");
                self.printed = true;
            }
        }
        Ok(())
    }

    fn end(&self) {
        if self.output == Output::Json {
            stdout::line("]");
        }
    }
}

/// As C's `%#x`: zero has no prefix.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}
