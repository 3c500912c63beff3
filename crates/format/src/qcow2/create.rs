//! Create: options, limits and the bytes of a new image.
//!
//! - Everything is checked before a file is emptied.
//! - A refusal that QEMU has too is in QEMU's words.
//! - The parts lie one after the other: header, refcount table, refcount blocks, L1 table; where the image is preallocated, L2
//!   tables and data. Every cluster has the refcount 1.
//! - The header is written last, behind a sync: a file that begins with one is an image.
//!
//! Not here: rounding up a size to what a backing has. The caller knows the backing.

use std::sync::Arc;

use bytes::Bytes;
use readonce_storage::Storage;

use super::{
    extensions::{KIND_DATA_FILE, KIND_FEATURE_NAMES, feature_names},
    head::Head,
    header::{
        AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, Fields, INCOMPATIBLE_COMPRESSION,
        INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2,
    },
    layout::{
        CLUSTER_BITS_EXTENDED_MIN, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, L1_ENTRY_BYTES, Layout,
        REFCOUNT_ORDER_MAX, REFCOUNT_ORDER_V2, SECTOR_BYTES,
    },
    record::Record,
    refcount::Refcounts,
};
use crate::{
    FormatError,
    driver::{CreateSpec, OptionSpec},
    number::round_up,
    options,
};

pub(super) const OPTIONS: &[OptionSpec] = &[
    OptionSpec { name: "cluster_size", help: "qcow2 cluster size" },
    OptionSpec { name: "compat", help: "Compatibility level (v2 [0.10] or v3 [1.1])" },
    OptionSpec { name: "compression_type", help: "Compression method used for image cluster compression" },
    OptionSpec {
        name: "copy_on_read",
        help: "Copy what is read from the backing file into the image (on/off)",
    },
    OptionSpec { name: "data_file_raw", help: "The external data file must stay valid as a raw image" },
    OptionSpec { name: "extended_l2", help: "Extended L2 tables" },
    OptionSpec { name: "lazy_refcounts", help: "Postpone refcount updates" },
    OptionSpec {
        name: "preallocation",
        help: "Preallocation mode (allowed values: off, metadata, falloc, full)",
    },
    OptionSpec { name: "refcount_bits", help: "Width of a reference count entry in bits" },
];

/// COPIED: the refcount of what an entry names is 1.
const ENTRY_COPIED: u64 = 1 << 63;
/// Bytes of tables that are made and written at once.
const PIECE_BYTES: u64 = 1 << 20;
/// What a new image of version 3 says its feature bits are called: kind, bit, name.
const FEATURE_NAMES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
    (2, 63, "only readonce wrote"),
];

/// What is set aside for the guest's data at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preallocation {
    Off,
    /// Tables.
    Metadata,
    /// Tables, and space for the data.
    Falloc,
    /// Tables, and data written as zeros.
    Full,
}

/// The options, as typed.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    cluster_size: u64,
    version: u32,
    compression_type: u8,
    copy_on_read: bool,
    data_file_raw: bool,
    extended_l2: bool,
    lazy_refcounts: bool,
    preallocation: Preallocation,
    refcount_bits: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cluster_size: 64 << 10,
            version: 3,
            compression_type: 0,
            copy_on_read: false,
            data_file_raw: false,
            extended_l2: false,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            refcount_bits: 16,
        }
    }
}

impl Options {
    fn parse(options: &[(String, Option<String>)]) -> Result<Self, FormatError> {
        let mut parsed = Self::default();
        for (name, value) in options {
            let value = value.as_deref();
            match name.as_str() {
                "cluster_size" => parsed.cluster_size = options::size(name, value)?,
                "compat" => {
                    let words = [("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)];
                    parsed.version = options::word("version", value, &words)?;
                }
                "compression_type" => {
                    let words = [("zlib", 0), ("zstd", 1)];
                    parsed.compression_type = options::word("compression-type", value, &words)?;
                }
                "copy_on_read" => parsed.copy_on_read = options::switch(name, value)?,
                "data_file_raw" => parsed.data_file_raw = options::switch(name, value)?,
                "extended_l2" => parsed.extended_l2 = options::switch(name, value)?,
                "lazy_refcounts" => parsed.lazy_refcounts = options::switch(name, value)?,
                "preallocation" => {
                    let words = [
                        ("off", Preallocation::Off),
                        ("metadata", Preallocation::Metadata),
                        ("falloc", Preallocation::Falloc),
                        ("full", Preallocation::Full),
                    ];
                    parsed.preallocation = options::word(name, value, &words)?;
                }
                "refcount_bits" => parsed.refcount_bits = options::number(name, value)?,
                _ => return Err(FormatError::Invalid(format!("Invalid parameter '{name}'"))),
            }
        }
        Ok(parsed)
    }

    /// What QEMU refuses, in its words.
    fn check(&self, spec: &CreateSpec) -> Result<(), FormatError> {
        let invalid = |message: &str| Err(FormatError::Invalid(message.to_owned()));
        let sizes = (1 << CLUSTER_BITS_MIN)..=(1 << CLUSTER_BITS_MAX);
        if !self.cluster_size.is_power_of_two() || !sizes.contains(&self.cluster_size) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.preallocation != Preallocation::Off && spec.backing.is_some() && !self.extended_l2 {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        let newer = |what: &str| {
            let message = format!("{what} compatibility level 1.1 and above (use version=v3 or greater)");
            Err(FormatError::Invalid(message))
        };
        let old = self.version == 2;
        if self.extended_l2 {
            if old {
                return newer("Extended L2 entries are only supported with");
            }
            if self.cluster_size < 1 << CLUSTER_BITS_EXTENDED_MIN {
                return invalid(
                    "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
                );
            }
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 1 << REFCOUNT_ORDER_MAX {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if old && self.refcount_bits != 1 << REFCOUNT_ORDER_V2 {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            );
        }
        if old && self.lazy_refcounts {
            return newer("Lazy refcounts only supported with");
        }
        if old && spec.data_file.is_some() {
            return newer("External data files are only supported with");
        }
        if self.data_file_raw && spec.data_file.is_none() {
            return invalid("data-file-raw requires data-file");
        }
        if self.data_file_raw && spec.backing.is_some() {
            return Err(raw_data_with_backing());
        }
        if old && self.compression_type != 0 {
            return newer("Non-zlib compression type is only supported with");
        }
        if self.copy_on_read && spec.backing.is_none() {
            return Err(copy_on_read_needs_backing());
        }
        Ok(())
    }
}

/// In the form of the patch of 2011.
pub(super) fn copy_on_read_needs_backing() -> FormatError {
    FormatError::Invalid("qcow2 only supports Copy-on-Read with a backing file".into())
}

/// A data file that reads as the disk cannot lack what a backing has.
pub(super) fn raw_data_with_backing() -> FormatError {
    FormatError::Invalid("Backing file and data-file-raw cannot be used at the same time".into())
}

/// In QEMU's words.
pub(super) fn too_large() -> FormatError {
    FormatError::Invalid(
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)".into(),
    )
}

/// What a new image holds. Counts are clusters.
struct Plan {
    layout: Layout,
    preallocation: Preallocation,
    head: Vec<u8>,
    table_clusters: u64,
    blocks: u64,
    l1_clusters: u64,
    /// 0 where nothing is preallocated, or nothing is to be.
    l2_tables: u64,
    /// Guest clusters that the L2 tables name.
    guest_clusters: u64,
    /// Of those, the ones that lie in the image's own file.
    data_clusters: u64,
}

impl Plan {
    fn new(spec: &CreateSpec) -> Result<Self, FormatError> {
        let options = Options::parse(&spec.options)?;
        options.check(spec)?;
        let layout = Layout {
            version: options.version,
            cluster_bits: options.cluster_size.trailing_zeros(),
            extended_l2: options.extended_l2,
            refcount_order: options.refcount_bits.trailing_zeros(),
            external_data: spec.data_file.is_some(),
            image_size: round_up(spec.size, SECTOR_BYTES).ok_or_else(too_large)?,
        };
        if layout.image_size > layout.image_size_max() {
            return Err(too_large());
        }
        let preallocation = match options.preallocation {
            // Without tables the data file would not be part of the image, as in QEMU.
            Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
            other => other,
        };

        let cluster_size = layout.cluster_size();
        let l1_entries = layout.l1_entries_used();
        let l1_clusters = (l1_entries * L1_ENTRY_BYTES).div_ceil(cluster_size);
        let (l2_tables, guest_clusters) = match preallocation {
            Preallocation::Off => (0, 0),
            _ => (l1_entries, layout.image_size.div_ceil(cluster_size)),
        };
        let data_clusters = if layout.external_data { 0 } else { guest_clusters };
        let refcounts = Refcounts::new(layout.cluster_bits, layout.refcount_order);
        let others = 1 + l1_clusters + l2_tables + data_clusters;
        let structure = refcounts.structure(others).ok_or_else(too_large)?;
        let mut plan = Self {
            layout,
            preallocation,
            head: Vec::new(),
            table_clusters: structure.table_clusters,
            blocks: structure.blocks,
            l1_clusters,
            l2_tables,
            guest_clusters,
            data_clusters,
        };
        plan.head = plan.head(spec, &options)?;
        Ok(plan)
    }

    fn head(&self, spec: &CreateSpec, options: &Options) -> Result<Vec<u8>, FormatError> {
        let layout = &self.layout;
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let narrow = |value: u64| u32::try_from(value).expect("bounded by the limits of its table");
        let fields = Fields {
            version: layout.version,
            backing_file_offset: 0,
            backing_file_size: 0,
            cluster_bits: layout.cluster_bits,
            size: layout.image_size,
            crypt_method: 0,
            l1_size: narrow(layout.l1_entries_used()),
            l1_table_offset: self.l1_at(),
            refcount_table_offset: layout.cluster_size(),
            refcount_table_clusters: narrow(self.table_clusters),
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: bit(layout.external_data, INCOMPATIBLE_DATA_FILE)
                | bit(options.compression_type != 0, INCOMPATIBLE_COMPRESSION)
                | bit(layout.extended_l2, INCOMPATIBLE_EXTENDED_L2),
            compatible_features: bit(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS),
            autoclear_features: bit(options.data_file_raw, AUTOCLEAR_DATA_FILE_RAW),
            refcount_order: layout.refcount_order,
            header_length: 0,
            compression_type: options.compression_type,
        };
        let mut head = Head::new(fields);
        head.set_backing(spec.backing.as_ref(), spec.pin.as_ref())?;
        if let Some(name) = &spec.data_file {
            if name.is_empty() || name.contains('\0') {
                return Err(FormatError::Invalid(
                    "the data file name must not be empty or hold a zero byte".into(),
                ));
            }
            head.extensions.push((KIND_DATA_FILE, Bytes::copy_from_slice(name.as_bytes())));
        }
        let record = head.record.get_or_insert_with(Record::default);
        record.copy_on_read = options.copy_on_read;
        let needed = *record != Record::default();
        let without_names = head.clone();
        if layout.version == 3 {
            head.extensions.push((KIND_FEATURE_NAMES, feature_names(FEATURE_NAMES)));
        }
        // Where the cluster is small the names go first, then a record that says nothing yet.
        head.bytes()
            .or_else(|_| without_names.bytes())
            .or_else(|error| if needed { Err(error) } else { Head { record: None, ..without_names }.bytes() })
    }

    fn blocks_at(&self) -> u64 {
        (1 + self.table_clusters) * self.layout.cluster_size()
    }

    fn l1_at(&self) -> u64 {
        self.blocks_at() + self.blocks * self.layout.cluster_size()
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1_clusters * self.layout.cluster_size()
    }

    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2_tables * self.layout.cluster_size()
    }

    /// Every cluster of the image's own file.
    fn clusters(&self) -> u64 {
        1 + self.table_clusters + self.blocks + self.l1_clusters + self.l2_tables + self.data_clusters
    }

    fn file_bytes(&self) -> u64 {
        self.clusters() * self.layout.cluster_size()
    }

    /// The L2 entry of the guest cluster of that number, without its subclusters: those stay absent.
    fn l2_entry(&self, cluster: u64) -> u64 {
        let start = if self.layout.external_data { 0 } else { self.data_at() };
        (start + cluster * self.layout.cluster_size()) | ENTRY_COPIED
    }
}

/// Makes the image, durable when this returns.
pub(super) async fn create(
    file: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    spec: &CreateSpec,
) -> Result<(), FormatError> {
    let plan = Plan::new(spec)?;
    file.set_len(0).await?;
    if let (Some(data), Some(_)) = (data, &spec.data_file) {
        data.set_len(0).await?;
        data.set_len(plan.layout.image_size).await?;
        set_aside(data, plan.preallocation, 0, plan.layout.image_size).await?;
        data.sync().await?;
    }
    file.set_len(plan.file_bytes()).await?;
    let cluster_size = plan.layout.cluster_size();
    set_aside(file, plan.preallocation, plan.data_at(), plan.data_clusters * cluster_size).await?;
    write_entries(file, cluster_size, plan.blocks, |block| plan.blocks_at() + block * cluster_size).await?;
    write_refcounts(file, &plan).await?;
    if plan.l2_tables > 0 {
        write_entries(file, plan.l1_at(), plan.l2_tables, |table| {
            (plan.l2_at() + table * cluster_size) | ENTRY_COPIED
        })
        .await?;
        // An extended entry is two words, the second of which says that no subcluster is there.
        let words = plan.layout.entry_bytes() / L1_ENTRY_BYTES;
        write_entries(file, plan.l2_at(), plan.guest_clusters * words, |word| {
            if word.is_multiple_of(words) { plan.l2_entry(word / words) } else { 0 }
        })
        .await?;
    }
    file.sync().await?;
    file.write(0, Bytes::from(plan.head)).await?;
    Ok(file.sync().await?)
}

async fn set_aside(
    file: &Arc<dyn Storage>,
    preallocation: Preallocation,
    at: u64,
    len: u64,
) -> Result<(), FormatError> {
    if len == 0 {
        return Ok(());
    }
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => file.allocate(at, len).await?,
        Preallocation::Full => file.write_zeroes(at, len).await?,
    }
    Ok(())
}

/// Writes `count` entries of 8 bytes in pieces.
async fn write_entries(
    file: &Arc<dyn Storage>,
    at: u64,
    count: u64,
    entry: impl Fn(u64) -> u64,
) -> Result<(), FormatError> {
    let mut done = 0;
    while done < count {
        let next = (done + PIECE_BYTES / L1_ENTRY_BYTES).min(count);
        let piece: Vec<u8> = (done..next).flat_map(|number| entry(number).to_be_bytes()).collect();
        file.write(at + done * L1_ENTRY_BYTES, Bytes::from(piece)).await?;
        done = next;
    }
    Ok(())
}

/// Writes the refcount blocks: 1 for every cluster.
async fn write_refcounts(file: &Arc<dyn Storage>, plan: &Plan) -> Result<(), FormatError> {
    let layout = &plan.layout;
    let refcounts = Refcounts::new(layout.cluster_bits, layout.refcount_order);
    let per_block = refcounts.per_block();
    let ones = |count: u64| Bytes::from(refcounts.block((0..count).map(|at| (at, 1))));
    let mut left = plan.clusters();
    let full = if left > per_block { ones(per_block) } else { Bytes::new() };
    for block in 0..plan.blocks {
        let count = left.min(per_block);
        let data = if count == per_block && !full.is_empty() { full.clone() } else { ones(count) };
        file.write(plan.blocks_at() + block * layout.cluster_size(), data).await?;
        left -= count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::BackingRef;

    fn spec(options: &str) -> CreateSpec {
        let mut spec = CreateSpec { size: 1 << 20, ..CreateSpec::default() };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (option, None),
            };
            match (name, value) {
                ("backing", Some(name)) => {
                    spec.backing = Some(BackingRef { name, format: Some("raw".into()) });
                }
                ("data_file", name) => spec.data_file = name,
                ("size", Some(size)) => spec.size = size.parse().unwrap(),
                (name, value) => spec.options.push((name.to_owned(), value)),
            }
        }
        spec
    }

    fn refused(options: &str, expect: &str) {
        match Plan::new(&spec(options)) {
            Ok(_) => panic!("{options} is taken"),
            Err(error) => assert_eq!(error.to_string(), expect, "{options}"),
        }
    }

    #[test]
    fn refusals_that_qemu_img_has_not() {
        let cor = "qcow2 only supports Copy-on-Read with a backing file";
        refused("copy_on_read", cor);
        refused("copy_on_read=on,cluster_size=2M", cor);
        let long = "x".repeat(1024);
        refused(
            &format!("backing={long}"),
            "the backing file name is 1024 bytes long, at most 1023 fit, or 4095 of a URL",
        );
        let long = "x".repeat(400);
        refused(
            &format!("backing={long},cluster_size=512,copy_on_read"),
            "the header, its extensions and the backing file name need 584 bytes, they have one cluster, 512 bytes",
        );
    }

    #[test]
    fn what_fits_into_a_small_cluster() {
        let long = format!("backing={},cluster_size=512", "x".repeat(370));
        assert!(Plan::new(&spec(&long)).is_ok());
        assert!(Plan::new(&spec("backing=a,cluster_size=512,copy_on_read")).is_ok());
    }

    #[test]
    fn the_parts_of_the_smallest_and_of_a_large_image() {
        let plan = Plan::new(&spec("size=0")).unwrap();
        assert_eq!((plan.table_clusters, plan.blocks, plan.l1_clusters, plan.clusters()), (1, 1, 0, 3));
        let plan = Plan::new(&spec("size=137438953472,cluster_size=512,refcount_bits=64")).unwrap();
        assert_eq!(plan.l1_clusters, 65536);
        assert_eq!(plan.blocks, plan.clusters().div_ceil(64));
        assert_eq!(plan.table_clusters, plan.blocks.div_ceil(64));
    }
}
