//! A format as a whole: probe, create, open, describe, check, change. And the list of formats.
//!
//! Not here: which file it is, locks, chains. The caller opens the bytes.

use std::sync::Arc;

use readonce_storage::{BoxFuture, ReadAt, Rt, Storage};

use crate::{FormatError, Mapper, WritableMapper, finding::Tell};

/// Every format that readonce knows, in the order in which they are probed.
pub fn drivers() -> &'static [&'static dyn Driver] {
    &[&crate::qed::Qed, &crate::qcow2::Qcow2, &crate::raw::Raw]
}

/// The driver of that name (`qed`, `qcow2`, `raw`).
pub fn driver(name: &str) -> Option<&'static dyn Driver> {
    drivers().iter().copied().find(|driver| driver.name() == name)
}

/// The name of a format that has no driver here but is known by its first bytes, so that nobody takes it for raw.
pub fn unsupported_format(head: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &'static str); 6] = [
        (b"QFI\xfb\0\0\0\x01", "qcow"),
        (b"KDMV", "vmdk"),
        (b"# Disk DescriptorFile", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"LUKS\xba\xbe", "luks"),
    ];
    known.iter().find(|(magic, _)| head.starts_with(magic)).map(|&(_, name)| name)
}

/// One `-o` option that a format takes at create: name, and qemu-img's help text for it.
#[derive(Debug, Clone, Copy)]
pub struct OptionSpec {
    /// As typed before `=`.
    pub name: &'static str,
    /// One line of help.
    pub help: &'static str,
}

/// What to create.
#[derive(Debug, Clone, Default)]
pub struct CreateSpec {
    /// Bytes that the guest sees; the driver rounds up to 512.
    pub size: u64,
    /// The backing as it is to be stored.
    pub backing: Option<BackingRef>,
    /// `-o` options in order, without those that `size` and `backing` say; a bare option has no value.
    pub options: Vec<(String, Option<String>)>,
    /// The pinned version of the backing.
    pub pin: Option<Pin>,
    /// The name of the file that is to hold the data, as it is stored; `None`: the image's own file holds it.
    pub data_file: Option<String>,
}

/// The backing as an image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingRef {
    /// The stored name.
    pub name: String,
    /// The stored format; `None`: to be probed.
    pub format: Option<String>,
}

/// The version of the backing that an image belongs to. Opaque here: `readonce-origin` reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// The validator as `readonce-origin` encodes it; at most 1024 bytes.
    pub validator: Vec<u8>,
    /// Bytes of the backing's file.
    pub len: u64,
}

/// What an image says of itself.
#[derive(Debug, Clone)]
pub struct Description {
    /// Driver name.
    pub format: &'static str,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes; `None` for raw.
    pub cluster_size: Option<u64>,
    /// As stored.
    pub backing: Option<BackingRef>,
    /// The image's own copy-on-read default.
    pub copy_on_read: bool,
    /// The pinned version, if a valid record belongs to the stored backing name.
    pub pin: Option<Pin>,
    /// Whether only readonce wrote since the pin was set; meaningless without a pin. `None`: the image cannot tell.
    pub only_readonce_wrote: Option<bool>,
    /// Whether the image is marked as not closed clean, by a mark that every program knows.
    pub dirty: bool,
    /// Whether a mark of ours says that the image is in use, or was and not closed clean.
    pub in_use: bool,
    /// Bytes of the header area still free for a longer backing name and record.
    pub header_bytes_max: u64,
    /// The file that holds the data, where that is not the image's own.
    pub data_file: Option<DataFile>,
    /// The format's own facts, by qemu-img's names for them (`format-specific`) and in its order; empty where it has none.
    pub details: Vec<(&'static str, Detail)>,
    /// Internal snapshots, in the order of the file.
    pub snapshots: Vec<Snapshot>,
}

impl Description {
    /// What to tell whoever has the image written or grown here: that its persistent bitmaps are of no use from then on. `None`: it has
    /// none, or they were stale before.
    pub fn bitmaps_lost(&self) -> Option<String> {
        let count = self.details.iter().find_map(|(name, detail)| match detail {
            Detail::List(bitmaps) if *name == "bitmaps" => Some(bitmaps.len()).filter(|&count| count > 0),
            _ => None,
        })?;
        Some(format!(
            "its persistent bitmaps ({count}) are stale from now on, as readonce does not keep them: the next backup must be a full one"
        ))
    }
}

/// A file that holds an image's data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// As stored: relative to the image's file.
    pub name: String,
    /// Whether it reads as a raw image of the disk.
    pub raw: bool,
}

/// A fact of a format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detail {
    /// Words.
    Text(String),
    /// Yes or no.
    Flag(bool),
    /// A count.
    Number(u64),
    /// Several of the same kind.
    List(Vec<Detail>),
    /// Named facts that belong together.
    Group(Vec<(&'static str, Detail)>),
}

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique in the image; digits, by custom.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970, UTC.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions that the guest had run, where that was counted.
    pub icount: Option<u64>,
    /// Bytes that the guest saw.
    pub disk_size: u64,
}

/// A change of an image's internal snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotChange {
    /// Keeps the disk as it is now under a name. Date: seconds and nanoseconds since 1970, UTC.
    Create {
        /// What people will call it.
        name: String,
        /// Seconds.
        date_sec: u32,
        /// And nanoseconds.
        date_nsec: u32,
    },
    /// Makes the disk what it was; the snapshot stays. By id, else by name.
    Apply(String),
    /// Lets a snapshot go. By name alone, as qemu-img.
    Delete(String),
}

/// What `check` looks for, and mends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Free leaked clusters only.
    Leaks,
    /// Mend everything.
    All,
}

/// What a check found. Counts as in QEMU's ImageCheck.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// I/O errors that kept parts from being checked.
    pub check_errors: u64,
    /// Broken entries that remain.
    pub corruptions: u64,
    /// Leaked clusters that remain.
    pub leaks: u64,
    /// Broken entries mended.
    pub corruptions_fixed: u64,
    /// Leaked clusters freed.
    pub leaks_fixed: u64,
    /// Clusters that the guest's size spans.
    pub total_clusters: u64,
    /// Data clusters in use.
    pub allocated_clusters: u64,
    /// Data clusters not next to their guest predecessor.
    pub fragmented_clusters: u64,
    /// Of the allocated ones, those that are compressed.
    pub compressed_clusters: u64,
    /// Where the image's last used cluster ends, if the format tells it.
    pub image_end_offset: Option<u64>,
}

/// A change of what the header says, done at once and durably, on an image that nobody has open for writing.
#[derive(Debug, Clone)]
pub enum HeaderChange {
    /// `amend -o copy_on_read`.
    CopyOnRead(bool),
    /// `rebase -u`: another backing name; the pin goes along only if given here.
    Backing(Option<BackingRef>, Option<Pin>),
    /// Pins an image that had no pin (first open for writing), or replaces it.
    Pin(Pin),
    /// `resize`: bytes; may only grow.
    Size(u64),
}

/// A format.
pub trait Driver: Send + Sync {
    /// As in `-f`.
    fn name(&self) -> &'static str;

    /// Whether the first bytes of a file (up to 512) are of this format. Raw never says yes.
    fn probe(&self, head: &[u8]) -> bool;

    /// The `-o` options of create.
    fn create_options(&self) -> &'static [OptionSpec];

    /// Makes an image in `file`, which is emptied first, as is `data`, the file that the spec names for the data. Nothing
    /// is written when the spec is not valid. Ends durable.
    fn create<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        data: Option<&'a Arc<dyn Storage>>,
        spec: &'a CreateSpec,
    ) -> BoxFuture<'a, Result<(), FormatError>>;

    /// Why QEMU would not open the image that `create` makes of a spec, though its format allows it; in QEMU's words.
    fn refused_by_qemu(&self, _spec: &CreateSpec) -> Option<&'static str> {
        None
    }

    /// What the image says of itself.
    fn describe<'a>(&self, file: &'a Arc<dyn ReadAt>) -> BoxFuture<'a, Result<Description, FormatError>>;

    /// Opens for reading. Changes nothing. Where data lies, in this file or another, the description says.
    fn open(&self, file: Arc<dyn ReadAt>) -> BoxFuture<'static, Result<Arc<dyn Mapper>, FormatError>>;

    /// Opens for writing. Writes nothing until the first change, but for autoclear bits that would not stay true. A dirty image is not repaired here beyond what reading it
    /// needs: see [`WritableMapper::reclaim`]. `data` is the file that holds the data, where the description names one.
    fn open_writable(
        &self,
        file: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        rt: Rt,
    ) -> BoxFuture<'static, Result<Arc<dyn WritableMapper>, FormatError>>;

    /// Whether [`Driver::open_writable`] itself mends what an image that was not closed clean may have wrong. Else it is checked
    /// before, where it has no backing: another program may have written links before their data.
    fn mends_itself(&self) -> bool {
        false
    }

    /// Checks, and hands each finding on as it is met. `Unsupported` for raw.
    fn check_telling<'a>(
        &self,
        file: &'a Arc<dyn ReadAt>,
        tell: Tell<'a>,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>>;

    /// Checks and repairs. What was wrong before is told; the report tells the state after it.
    fn repair_telling<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        repair: Repair,
        tell: Tell<'a>,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>>;

    /// [`Driver::check_telling`] for who wants the counts alone.
    fn check<'a>(&'a self, file: &'a Arc<dyn ReadAt>) -> BoxFuture<'a, Result<CheckReport, FormatError>> {
        Box::pin(async move { self.check_telling(file, &mut |_| {}).await })
    }

    /// [`Driver::repair_telling`] for who wants the counts alone.
    fn repair<'a>(
        &'a self,
        file: &'a Arc<dyn Storage>,
        repair: Repair,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>> {
        Box::pin(async move { self.repair_telling(file, repair, &mut |_| {}).await })
    }

    /// Changes the header.
    fn change<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        change: &'a HeaderChange,
    ) -> BoxFuture<'a, Result<(), FormatError>>;

    /// Changes the internal snapshots, durably, on an image that nobody has open. `Unsupported` where there are none.
    fn snapshot<'a>(
        &self,
        _file: &'a Arc<dyn Storage>,
        _change: &'a SnapshotChange,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        let name = self.name();
        Box::pin(async move {
            Err(FormatError::Unsupported(format!("Format driver '{name}' has no internal snapshots")))
        })
    }
}
