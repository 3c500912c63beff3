//! Findings: what a check found wrong, one by one, in the words of qemu-img where it has some.
//!
//! - A check hands each finding on as it meets it, and keeps none: a hostile image has billions. Who listens bounds what is kept.
//! - Offsets, entries and counts are told as they are in the file.
//!
//! Not here: the counts (`driver::CheckReport`), and what is done about it.

use std::fmt::{self, Display, Formatter};

/// Whom a check tells what it finds.
pub type Tell<'a> = &'a mut (dyn FnMut(Finding) + Send);

/// Something that is wrong in an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// A cluster is referred to more or less often than the file says.
    Refcount {
        /// Its number: byte offset by cluster size.
        cluster: u64,
        /// What the file says.
        stored: u64,
        /// How often it is referred to.
        counted: u64,
    },
    /// Clusters whose refcount cannot be read.
    RefcountsUnread {
        /// The first.
        cluster: u64,
        /// How many.
        count: u64,
    },
    /// Clusters of a format without refcounts that nothing refers to.
    Leaked {
        /// The first.
        cluster: u64,
        /// How many in a row.
        count: u64,
    },
    /// Bytes behind the last whole cluster.
    CutOff {
        /// How many.
        bytes: u64,
    },
    /// The flag of an L1 entry that says "nothing else refers to this" does not go with the refcount.
    CopiedTable {
        /// Index in the L1 table.
        index: u64,
        /// As it is.
        entry: u64,
        /// Stored refcount of the table.
        refcount: u64,
    },
    /// The same of an L2 entry.
    CopiedData {
        /// As it is.
        entry: u64,
        /// Stored refcount of the cluster.
        refcount: u64,
    },
    /// An L1 entry has bits that may not be set.
    L1Bits(u64),
    /// An L2 entry has.
    L2Bits(u64),
    /// An L1 entry names a table at an offset that is no multiple of the cluster size.
    TableUnaligned(u64),
    /// An L2 entry names such a data cluster.
    DataUnaligned(u64),
    /// Something refers to bytes past the end of the file.
    PastEnd {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// The cluster at this byte offset is referred to more often than the widest refcount can say.
    Overflow(u64),
    /// The entry of the compressed cluster at this byte offset says that it may be written in place.
    CompressedCopied(u64),
    /// A compressed cluster in an image whose data lies in another file.
    CompressedOutside {
        /// Index in the L2 table.
        index: u64,
        /// As it is.
        entry: u64,
    },
    /// A compressed cluster with subclusters.
    CompressedSubclusters {
        /// Index in the L2 table.
        index: u64,
        /// As it is.
        entry: u64,
    },
    /// Subclusters of the cluster at this byte offset are data and zeros at once.
    Subclusters(u64),
    /// Subclusters are data in a cluster that has no place.
    SubclustersNowhere,
    /// Entry of the refcount table with bits that may not be set.
    BlockBits(u64),
    /// Entry of the refcount table that names a block at an offset that is no multiple of the cluster size.
    BlockUnaligned(u64),
    /// Entry of the refcount table that names a block past the end of the file.
    BlockOutside(u64),
    /// A refcount block that is used for something else too.
    BlockShared {
        /// Index in the refcount table.
        index: u64,
        /// How often it is referred to.
        counted: u64,
    },
    /// An L2 table that is used for something else too, which its refcount counts.
    TableShared {
        /// Byte offset.
        offset: u64,
        /// How often it is referred to as a table.
        tables: u64,
        /// How often it is referred to.
        counted: u64,
    },
    /// The entry of an internal snapshot lacks what version 3 asks for.
    SnapshotIncomplete(u64),
    /// The L1 table of an internal snapshot cannot be where its entry says.
    SnapshotTable {
        /// Unique in the image.
        id: String,
        /// What people call it.
        name: String,
        /// Byte offset.
        offset: u64,
    },
    /// The directory of the persistent bitmaps is broken at this entry.
    BitmapDirectory(u64),
    /// An entry of a persistent bitmap's table holds what may not be there.
    BitmapEntry(u64),
    /// A part of a table cannot be read.
    Unreadable {
        /// Byte offset.
        offset: u64,
        /// Why.
        cause: String,
    },
    /// The image was not closed clean, and its refcounts are written late.
    NotWrittenYet,
    /// Leaks cannot be told from clusters in use before the refcounts are counted anew.
    NeedsRebuild,
    /// An L1 entry of a QED image.
    QedL1 {
        /// Index in the L1 table.
        index: u64,
        /// As it is.
        entry: u64,
        /// Clusters that something else uses; 0 where it can be no table's offset at all.
        used: u64,
    },
    /// An L2 entry of a QED image.
    QedL2 {
        /// Byte offset of its table.
        table: u64,
        /// Index in that table.
        index: u64,
        /// As it is.
        entry: u64,
        /// Byte offset of the cluster in the guest's disk.
        guest: u64,
        /// Whether something else uses the cluster; else it can be no cluster's offset at all.
        used: bool,
    },
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refcount { cluster, stored, counted } => {
                let kind = if stored > counted { "Leaked" } else { "ERROR" };
                write!(f, "{kind} cluster {cluster} refcount={stored} reference={counted}")
            }
            Self::RefcountsUnread { cluster, count } => {
                let last = cluster + count.saturating_sub(1);
                write!(f, "ERROR the refcounts of clusters {cluster} to {last} cannot be read")
            }
            Self::Leaked { cluster, count: 1 } => write!(f, "Leaked cluster {cluster}"),
            Self::Leaked { cluster, count } => {
                write!(f, "Leaked clusters {cluster} to {}", cluster + count.saturating_sub(1))
            }
            Self::CutOff { bytes } => write!(f, "Leaked {bytes} bytes behind the last whole cluster"),
            Self::CopiedTable { index, entry, refcount } => {
                write!(
                    f,
                    "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                )
            }
            Self::CopiedData { entry, refcount } => {
                write!(f, "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
            }
            Self::L1Bits(entry) => write!(f, "ERROR found L1 entry with reserved bits set: {entry:x}"),
            Self::L2Bits(entry) => write!(f, "ERROR found l2 entry with reserved bits set: {entry:x}"),
            Self::TableUnaligned(offset) => {
                write!(f, "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            }
            Self::DataUnaligned(offset) => {
                write!(
                    f,
                    "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
                )
            }
            Self::PastEnd { offset, size } => write!(
                f,
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset \
                 {offset:#x} size {size:#x}"
            ),
            Self::Overflow(offset) => write!(f, "ERROR: overflow cluster offset={offset:#x}"),
            Self::CompressedCopied(offset) => {
                write!(f, "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters")
            }
            Self::CompressedOutside { index, entry } => {
                write!(f, "ERROR compressed cluster {index} with data file, entry={entry:#x}")
            }
            Self::CompressedSubclusters { index, entry } => write!(
                f,
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            ),
            Self::Subclusters(offset) => {
                write!(
                    f,
                    "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
                )
            }
            Self::SubclustersNowhere => {
                write!(f, "ERROR: Unallocated cluster has non-zero subcluster allocation map")
            }
            Self::BlockBits(index) => write!(f, "ERROR refcount table entry {index} has reserved bits set"),
            Self::BlockUnaligned(index) => write!(
                f,
                "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ),
            Self::BlockOutside(index) => write!(f, "ERROR refcount block {index} is outside image"),
            Self::BlockShared { index, counted } => {
                write!(f, "ERROR refcount block {index} refcount={counted}")
            }
            Self::TableShared { offset, tables, counted } => write!(
                f,
                "ERROR l2_offset={offset:x}: Table is something else too: of {counted} references {tables} name a table"
            ),
            Self::SnapshotIncomplete(index) => write!(f, "ERROR snapshot table entry {index} is incomplete"),
            Self::SnapshotTable { id, name, offset } => write!(
                f,
                "ERROR snapshot {} ({}) l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry \
                 corrupted",
                id.escape_debug(),
                name.escape_debug()
            ),
            Self::BitmapDirectory(index) => {
                write!(f, "ERROR bitmap directory entry {index} is broken; what follows it is not looked at")
            }
            Self::BitmapEntry(entry) => {
                write!(f, "ERROR found bitmap table entry that may not be: {entry:x}")
            }
            Self::Unreadable { offset, cause } => {
                write!(f, "ERROR the table at offset {offset:#x} cannot be read: {cause}")
            }
            Self::NotWrittenYet => write!(
                f,
                "The image was not closed clean, and with lazy_refcounts its refcounts are written late: opening it for \
                 writing, or check -r all, counts them anew"
            ),
            Self::NeedsRebuild => write!(f, "ERROR need to rebuild refcount structures"),
            Self::QedL1 { index, entry, used: 0 } => {
                write!(f, "ERROR L1 entry {index} is {entry:#x}: no L2 table can lie there")
            }
            Self::QedL1 { index, entry, used } => {
                write!(
                    f,
                    "ERROR L1 entry {index} is {entry:#x}: {used} clusters of that table are in use already"
                )
            }
            Self::QedL2 { table, index, entry, guest, used } => {
                let why =
                    if *used { "that cluster is in use already" } else { "no data cluster can lie there" };
                write!(
                    f,
                    "ERROR L2 entry {index} of the table at {table:#x} (guest offset {guest:#x}) is {entry:#x}: {why}"
                )
            }
        }
    }
}
