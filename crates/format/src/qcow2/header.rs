//! The header: the fields at the start of the file, the extensions behind them, and the backing name.
//!
//! - A [`Header`] that exists is valid: every field was checked against its limit, and the L1 table lies inside the file.
//! - The head of the file is kept as read, so that a sector of it can be written anew with one field changed.
//! - All of it lies in the first cluster.
//!
//! Not here: what the refcount table and the snapshot table hold; when a header is written.

use bytes::Bytes;
use readonce_storage::ReadAt;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::{
    extensions::{self, Chain, Extension, KIND_BACKING_FORMAT, KIND_DATA_FILE, KIND_RECORD},
    layout::{
        CLUSTER_BITS_EXTENDED_MIN, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, L1_BYTES_MAX, L1_ENTRY_BYTES, Layout,
        REFCOUNT_ORDER_MAX, REFCOUNT_ORDER_V2, REFCOUNT_TABLE_BYTES_MAX, SECTOR_BYTES, SNAPSHOTS_MAX,
    },
    record::Record,
};
use crate::{
    FormatError,
    codec::Codec,
    driver::{BackingRef, DataFile},
    number::{bytes, index, round_down, round_up},
};

/// "QFI" and 0xfb.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the header of version 2.
pub(super) const HEADER_BYTES_V2: u64 = 72;
/// Bytes of the shortest header of version 3.
pub(super) const HEADER_BYTES_V3: u64 = 104;
/// Bytes of the header of version 3 with a compression type.
pub(super) const HEADER_BYTES_COMPRESSION: u64 = 112;
/// Bytes of the longest backing name that the header may store.
pub(super) const STORED_NAME_BYTES_MAX: u64 = 1023;

/// Incompatible: refcounts may be wrong.
pub(super) const INCOMPATIBLE_DIRTY: u64 = 0x01;
/// Incompatible: anything may be wrong; not to be written.
pub(super) const INCOMPATIBLE_CORRUPT: u64 = 0x02;
/// Incompatible: guest data lies in another file.
pub(super) const INCOMPATIBLE_DATA_FILE: u64 = 0x04;
/// Incompatible: the compression type is not 0.
pub(super) const INCOMPATIBLE_COMPRESSION: u64 = 0x08;
/// Incompatible: L2 entries have 16 bytes.
pub(super) const INCOMPATIBLE_EXTENDED_L2: u64 = 0x10;
const INCOMPATIBLE_KNOWN: u64 = 0x1f;
/// Compatible: refcounts may be updated late.
pub(super) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 0x01;
/// Autoclear: persistent bitmaps are consistent.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 0x01;
/// Autoclear: the data file can be read as a raw image.
pub(super) const AUTOCLEAR_DATA_FILE_RAW: u64 = 0x02;
/// Autoclear, ours: only readonce wrote since the pin was set. Any other writer clears it by the rule for unknown bits.
pub(super) const AUTOCLEAR_ONLY_READONCE: u64 = 1 << 63;

/// Bytes read at first: more than the head of nearly every image.
const HEAD_BYTES: u64 = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OnDisk {
    magic: [u8; 4],
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    // From here on only in version 3.
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
}

const _: () = assert!(size_of::<OnDisk>() == 104);

/// The fields of the header, by their names in the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fields {
    /// 2 or 3.
    pub(super) version: u32,
    /// Bytes from the start of the file; 0 without a backing.
    pub(super) backing_file_offset: u64,
    /// Bytes; at most 1023.
    pub(super) backing_file_size: u32,
    /// Of the cluster size, as a power of two.
    pub(super) cluster_bits: u32,
    /// Bytes that the guest sees, as stored: not always a multiple of 512.
    pub(super) size: u64,
    /// 0 in an image that readonce opens.
    pub(super) crypt_method: u32,
    /// Entries of the L1 table; at least what the guest's size needs.
    pub(super) l1_size: u32,
    /// Bytes from the start of the file; a multiple of the cluster size.
    pub(super) l1_table_offset: u64,
    /// Bytes from the start of the file; a multiple of the cluster size.
    pub(super) refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub(super) refcount_table_clusters: u32,
    /// Internal snapshots.
    pub(super) nb_snapshots: u32,
    /// Bytes from the start of the file; a multiple of the cluster size.
    pub(super) snapshots_offset: u64,
    /// 0 in version 2.
    pub(super) incompatible_features: u64,
    /// 0 in version 2.
    pub(super) compatible_features: u64,
    /// 0 in version 2.
    pub(super) autoclear_features: u64,
    /// 4 in version 2.
    pub(super) refcount_order: u32,
    /// Bytes; 72 in version 2.
    pub(super) header_length: u32,
    /// 0 is zlib, 1 is zstd.
    pub(super) compression_type: u8,
}

impl Fields {
    /// Reads the fields; those that version 2 lacks get the values that it implies.
    ///
    /// # Errors
    /// `Corrupt` where these are no bytes of a qcow2 header, `Unsupported` for other versions.
    fn parse(head: &[u8]) -> Result<Self, FormatError> {
        if !head.starts_with(&MAGIC) {
            let found = head.get(..4).unwrap_or(head);
            return Err(FormatError::corrupt("magic", found.escape_ascii(), "must be QFI\\xfb"));
        }
        let mut raw = [0; size_of::<OnDisk>()];
        let there = head.len().min(raw.len());
        for (to, from) in raw.iter_mut().zip(head) {
            *to = *from;
        }
        let (raw, _) = OnDisk::read_from_prefix(&raw).expect("104 bytes");
        let version = raw.version.get();
        if !(2..=3).contains(&version) && there >= 8 {
            return Err(FormatError::Unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let header_bytes_min = if version == 2 { HEADER_BYTES_V2 } else { HEADER_BYTES_V3 };
        if bytes(there) < header_bytes_min {
            return Err(FormatError::corrupt(
                "file length",
                there,
                format!("must be at least {header_bytes_min} bytes"),
            ));
        }
        let mut fields = Self {
            version,
            backing_file_offset: raw.backing_file_offset.get(),
            backing_file_size: raw.backing_file_size.get(),
            cluster_bits: raw.cluster_bits.get(),
            size: raw.size.get(),
            crypt_method: raw.crypt_method.get(),
            l1_size: raw.l1_size.get(),
            l1_table_offset: raw.l1_table_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: REFCOUNT_ORDER_V2,
            header_length: u32::try_from(HEADER_BYTES_V2).expect("72"),
            compression_type: 0,
        };
        if version == 3 {
            fields.incompatible_features = raw.incompatible_features.get();
            fields.compatible_features = raw.compatible_features.get();
            fields.autoclear_features = raw.autoclear_features.get();
            fields.refcount_order = raw.refcount_order.get();
            fields.header_length = raw.header_length.get();
            if u64::from(fields.header_length) > HEADER_BYTES_V3 {
                fields.compression_type = head.get(index(HEADER_BYTES_V3)).copied().unwrap_or_default();
            }
        }
        Ok(fields)
    }

    /// Writes the fields over the bytes of a head; fields that this header is too short for are left out.
    pub(super) fn put(&self, head: &mut [u8]) {
        let raw = OnDisk {
            magic: MAGIC,
            version: self.version.into(),
            backing_file_offset: self.backing_file_offset.into(),
            backing_file_size: self.backing_file_size.into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible_features.into(),
            compatible_features: self.compatible_features.into(),
            autoclear_features: self.autoclear_features.into(),
            refcount_order: self.refcount_order.into(),
            header_length: self.header_length.into(),
        };
        let len = if self.version == 2 { HEADER_BYTES_V2 } else { HEADER_BYTES_V3 };
        for (to, from) in head.iter_mut().zip(raw.as_bytes()).take(index(len)) {
            *to = *from;
        }
        if u64::from(self.header_length) > HEADER_BYTES_V3
            && let Some(to) = head.get_mut(index(HEADER_BYTES_V3))
        {
            *to = self.compression_type;
        }
    }
}

/// A sector of the header that is to be written: 512 bytes, which a disk writes whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SectorWrite {
    /// Bytes from the start of the file; a multiple of 512.
    pub(super) at: u64,
    /// 512 bytes.
    pub(super) data: Bytes,
}

/// A valid header.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// As read.
    pub(super) fields: Fields,
    /// The sizes, from the fields.
    pub(super) layout: Layout,
    /// In the order of the file.
    pub(super) extensions: Vec<Extension>,
    /// Where the chain of extensions ends.
    pub(super) extensions_end: u64,
    /// The backing name as the header stores it.
    pub(super) stored_name: Option<String>,
    /// The backing: its whole name, and the stored format.
    pub(super) backing: Option<BackingRef>,
    /// The file that holds the data.
    pub(super) data_file: Option<DataFile>,
    /// The persistent bitmaps.
    pub(super) bitmaps: Option<extensions::Bitmaps>,
    /// Our record; without an extension of ours, one that says nothing.
    pub(super) record: Record,
    /// Where the in-use mark lies, if there is an extension of ours.
    mark_at: Option<u64>,
    /// The bytes of the file from its start to the end of the extensions and of the name, in whole sectors; padded with
    /// zeros where the file ends before.
    head: Vec<u8>,
}

impl Header {
    /// Reads and checks the header, the extensions and the backing name: the first 4 KiB, or the first cluster where they
    /// need more.
    ///
    /// # Errors
    /// `Corrupt` names the field; `Unsupported` names unknown incompatible features, versions and encryption; `Io`.
    pub(super) async fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        let file_len = file.len();
        let head = file.read(0, index(file_len.min(HEAD_BYTES))).await?;
        let fields = Fields::parse(&head)?;
        check_cluster(&fields)?;
        let head_max = file_len.min(1 << fields.cluster_bits);
        if let Some(header) = Self::parse(&head, &fields, file_len, bytes(head.len()) >= head_max)? {
            return Ok(header);
        }
        let head = file.read(0, index(head_max)).await?;
        let header = Self::parse(&head, &fields, file_len, true)?;
        Ok(header.expect("a complete head needs no more bytes"))
    }

    /// `None`: there are more bytes in the first cluster, and they are needed.
    fn parse(
        head: &[u8],
        fields: &Fields,
        file_len: u64,
        complete: bool,
    ) -> Result<Option<Self>, FormatError> {
        let cluster_size = 1 << fields.cluster_bits;
        let name_end = check_name(fields, cluster_size)?;
        let chain_end_max = if name_end > 0 { fields.backing_file_offset } else { cluster_size };
        let chain = extensions::walk(head, fields.header_length.into(), chain_end_max, complete);
        let unknown = fields.incompatible_features & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            // The names may be had even where the rest of the chain is broken.
            let known = match &chain {
                Ok(Chain::Cut) => return Ok(None),
                Ok(Chain::Whole(extensions, _)) => extensions.as_slice(),
                Err(_) => &[],
            };
            return Err(unknown_features(known, unknown));
        }
        let Chain::Whole(extensions, extensions_end) = chain? else { return Ok(None) };
        let used = extensions_end.max(name_end);
        if bytes(head.len()) < used && !complete {
            return Ok(None);
        }
        let layout = check(fields, file_len)?;

        let mut kept = head.get(..index(used)).unwrap_or(head).to_vec();
        kept.resize(index(round_up(used.max(1), SECTOR_BYTES).expect("inside of a cluster")), 0);
        if let Some(behind) = head.get(index(used)..) {
            // The rest of the last sector stays what it is.
            for (to, from) in kept.iter_mut().skip(index(used)).zip(behind) {
                *to = *from;
            }
        }

        let stored_name = if name_end > 0 {
            let name = kept.get(index(fields.backing_file_offset)..index(name_end)).unwrap_or_default();
            Some(extensions::text(name, "backing_file_name")?)
        } else {
            None
        };
        let ours = extensions::find(&extensions, KIND_RECORD);
        let record = ours.map_or_else(Record::default, |ours| {
            Record::parse(&ours.data, stored_name.as_deref().unwrap_or_default())
        });
        let mark_at = ours.filter(|ours| !ours.data.is_empty()).map(|ours| ours.at);
        let format = extensions::string(&extensions, KIND_BACKING_FORMAT, "backing format")?;
        let backing = stored_name.as_ref().map(|name| BackingRef {
            name: record.whole_name.as_ref().unwrap_or(name).clone(),
            format: format.filter(|format| !format.is_empty()),
        });
        let data_file = if layout.external_data {
            let name = extensions::string(&extensions, KIND_DATA_FILE, "data file name")?;
            let name = name.filter(|name| !name.is_empty());
            let name =
                name.ok_or_else(|| FormatError::Invalid("'data-file' is required for this image".into()))?;
            Some(DataFile { name, raw: fields.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0 })
        } else if fields.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0 {
            return Err(FormatError::corrupt(
                "autoclear_features",
                format!("{:#x}", fields.autoclear_features),
                "must not have the bit for raw external data without a data file",
            ));
        } else {
            None
        };
        let bitmaps = extensions::bitmaps(&extensions, cluster_size)?;
        Ok(Some(Self {
            fields: *fields,
            layout,
            extensions,
            extensions_end,
            stored_name,
            backing,
            data_file,
            bitmaps,
            record,
            mark_at,
            head: kept,
        }))
    }

    /// Whether refcounts may be wrong.
    pub(super) fn dirty(&self) -> bool {
        self.fields.incompatible_features & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether the image must not be written.
    pub(super) fn corrupt(&self) -> bool {
        self.fields.incompatible_features & INCOMPATIBLE_CORRUPT != 0
    }

    /// Whether refcounts may be updated late.
    pub(super) fn lazy_refcounts(&self) -> bool {
        self.fields.compatible_features & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// How clusters are compressed.
    pub(super) fn codec(&self) -> Codec {
        if self.fields.compression_type == 0 { Codec::Deflate } else { Codec::Zstd }
    }

    /// Whether the image has a place for the in-use mark. One that has not gets it from `change::adopt`.
    pub(super) fn has_mark(&self) -> bool {
        self.mark_at.is_some()
    }

    /// Whether only readonce wrote since the pin was set. Version 2 has no autoclear bits, and cannot tell.
    pub(super) fn only_readonce_wrote(&self) -> Option<bool> {
        (self.fields.version >= 3).then_some(self.fields.autoclear_features & AUTOCLEAR_ONLY_READONCE != 0)
    }

    /// Changes fields, here and in the sector that is to be written. Of an image of version 2 only those change that it has.
    /// Where the size changes, `layout` does not: the caller reads the header again.
    pub(super) fn change_fields(&mut self, change: impl FnOnce(&mut Fields)) -> SectorWrite {
        change(&mut self.fields);
        if self.fields.version == 2 {
            self.fields.incompatible_features = 0;
            self.fields.compatible_features = 0;
            self.fields.autoclear_features = 0;
        }
        self.fields.put(&mut self.head);
        self.sector(0)
    }

    /// Clears the autoclear bits that are not kept true by readonce: all but "raw external data" and ours. `None`: there are none.
    pub(super) fn clear_autoclear(&mut self) -> Option<SectorWrite> {
        let kept = AUTOCLEAR_DATA_FILE_RAW | AUTOCLEAR_ONLY_READONCE;
        (self.fields.autoclear_features & !kept != 0)
            .then(|| self.change_fields(|fields| fields.autoclear_features &= kept))
    }

    /// Sets the in-use mark, here and in the sector that is to be written, which may be the first one. `None`: there is no place
    /// for it.
    pub(super) fn set_in_use(&mut self, in_use: bool) -> Option<SectorWrite> {
        let at = self.mark_at?;
        *self.head.get_mut(index(at))? = u8::from(in_use);
        self.record.in_use = in_use;
        Some(self.sector(round_down(at, SECTOR_BYTES)))
    }

    /// The header's own bytes, with fields that readonce does not know.
    pub(super) fn header_bytes(&self) -> &[u8] {
        self.head
            .get(..index(self.fields.header_length.into()))
            .expect("the extensions lie behind the header")
    }

    /// The bytes of the file from its start to the end of the extensions and of the name, in whole sectors.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    fn sector(&self, at: u64) -> SectorWrite {
        let data = self.head.get(index(at)..index(at + SECTOR_BYTES)).expect("the head has whole sectors");
        SectorWrite { at, data: Bytes::copy_from_slice(data) }
    }

    /// Bytes of the first cluster that neither the fields, nor the extensions, nor the name use.
    pub(super) fn bytes_free(&self) -> u64 {
        let name = self.stored_name.as_ref().map_or(0, |name| bytes(name.len()));
        self.layout.cluster_size().saturating_sub(self.extensions_end + name)
    }
}

fn unknown_features(extensions: &[Extension], unknown: u64) -> FormatError {
    let (mut names, rest) = extensions::incompatible_names(extensions, unknown);
    if rest != 0 {
        names.push(format!("Unknown incompatible feature: {rest:x}"));
    }
    FormatError::Unsupported(format!("Unsupported qcow2 feature(s): {}", names.join(", ")))
}

/// Checks what reading on depends on.
fn check_cluster(fields: &Fields) -> Result<(), FormatError> {
    if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&fields.cluster_bits) {
        return Err(FormatError::corrupt(
            "cluster_bits",
            fields.cluster_bits,
            format!("must be within [{CLUSTER_BITS_MIN}, {CLUSTER_BITS_MAX}]"),
        ));
    }
    if fields.version == 3 {
        let header_length = u64::from(fields.header_length);
        let cluster_size = 1u64 << fields.cluster_bits;
        if !(HEADER_BYTES_V3..=cluster_size).contains(&header_length) || !header_length.is_multiple_of(8) {
            return Err(FormatError::corrupt(
                "header_length",
                header_length,
                format!("must be a multiple of 8 within [{HEADER_BYTES_V3}, {cluster_size}]"),
            ));
        }
    }
    Ok(())
}

/// Where the backing name ends; 0 without one. QEMU takes an empty name for no backing.
fn check_name(fields: &Fields, cluster_size: u64) -> Result<u64, FormatError> {
    let (offset, size) = (fields.backing_file_offset, u64::from(fields.backing_file_size));
    if size == 0 && offset > cluster_size {
        let limit = format!("must lie in the first cluster, {cluster_size} bytes");
        return Err(FormatError::corrupt("backing_file_offset", offset, limit));
    }
    if offset == 0 || size == 0 {
        return Ok(0);
    }
    let header_length = u64::from(fields.header_length);
    if !(header_length..cluster_size).contains(&offset) {
        return Err(FormatError::corrupt(
            "backing_file_offset",
            offset,
            format!(
                "must lie behind the header, {header_length} bytes, in the first cluster, {cluster_size} bytes"
            ),
        ));
    }
    let size_max = STORED_NAME_BYTES_MAX.min(cluster_size - offset);
    if size > size_max {
        return Err(FormatError::corrupt("backing_file_size", size, format!("must be at most {size_max}")));
    }
    Ok(offset + size)
}

/// Checks every other field.
fn check(fields: &Fields, file_len: u64) -> Result<Layout, FormatError> {
    match fields.crypt_method {
        0 => {}
        1 => return Err(encrypted("AES")),
        2 => return Err(encrypted("LUKS")),
        other => {
            return Err(FormatError::corrupt("crypt_method", other, "must be 0 (none), 1 (AES) or 2 (LUKS)"));
        }
    }
    if fields.refcount_order > REFCOUNT_ORDER_MAX {
        return Err(FormatError::corrupt(
            "refcount_order",
            fields.refcount_order,
            format!("must be at most {REFCOUNT_ORDER_MAX}"),
        ));
    }
    let extended_l2 = fields.incompatible_features & INCOMPATIBLE_EXTENDED_L2 != 0;
    if extended_l2 && fields.cluster_bits < CLUSTER_BITS_EXTENDED_MIN {
        return Err(FormatError::corrupt(
            "cluster_bits",
            fields.cluster_bits,
            format!("must be at least {CLUSTER_BITS_EXTENDED_MIN} with extended L2 entries"),
        ));
    }
    check_compression(fields)?;
    let layout = Layout {
        version: fields.version,
        cluster_bits: fields.cluster_bits,
        extended_l2,
        refcount_order: fields.refcount_order,
        external_data: fields.incompatible_features & INCOMPATIBLE_DATA_FILE != 0,
        // The bytes of a last, incomplete sector cannot be read, as in QEMU.
        image_size: round_down(fields.size, SECTOR_BYTES),
    };
    if fields.size > layout.image_size_max() {
        return Err(FormatError::corrupt(
            "size",
            fields.size,
            format!("must be at most {}", layout.image_size_max()),
        ));
    }
    check_l1(fields, &layout, file_len)?;
    let cluster_size = layout.cluster_size();
    let table_bytes = u64::from(fields.refcount_table_clusters) * cluster_size;
    if table_bytes > REFCOUNT_TABLE_BYTES_MAX {
        return Err(FormatError::corrupt(
            "refcount_table_clusters",
            fields.refcount_table_clusters,
            format!("must be at most {}", REFCOUNT_TABLE_BYTES_MAX / cluster_size),
        ));
    }
    check_table_offset("refcount_table_offset", fields.refcount_table_offset, table_bytes, cluster_size)?;
    if fields.nb_snapshots > SNAPSHOTS_MAX {
        return Err(FormatError::corrupt(
            "nb_snapshots",
            fields.nb_snapshots,
            format!("must be at most {SNAPSHOTS_MAX}"),
        ));
    }
    if fields.nb_snapshots > 0 && fields.snapshots_offset == 0 {
        return Err(FormatError::corrupt("snapshots_offset", 0, "must not be 0"));
    }
    check_table_offset("snapshots_offset", fields.snapshots_offset, 0, cluster_size)?;
    Ok(layout)
}

fn encrypted(method: &str) -> FormatError {
    FormatError::Unsupported(format!("{method} encryption of qcow2 images is not supported"))
}

fn check_compression(fields: &Fields) -> Result<(), FormatError> {
    let bit = fields.incompatible_features & INCOMPATIBLE_COMPRESSION != 0;
    match (fields.compression_type, bit) {
        (0, false) | (1, true) => Ok(()),
        (0 | 1, _) => Err(FormatError::corrupt(
            "incompatible_features",
            format!("{:#x}", fields.incompatible_features),
            format!(
                "must have bit 3 set exactly where compression_type, which is {}, is not 0",
                fields.compression_type
            ),
        )),
        (other, _) => Err(FormatError::Unsupported(format!(
            "unknown compression_type {other}, known are 0 (zlib) and 1 (zstd)"
        ))),
    }
}

fn check_l1(fields: &Fields, layout: &Layout, file_len: u64) -> Result<(), FormatError> {
    let entries = u64::from(fields.l1_size);
    let entries_max = L1_BYTES_MAX / L1_ENTRY_BYTES;
    let entries_min = layout.l1_entries_for(fields.size);
    if !(entries_min..=entries_max).contains(&entries) {
        return Err(FormatError::corrupt(
            "l1_size",
            entries,
            format!(
                "must be at least {entries_min}, for a guest of {} bytes, and at most {entries_max}",
                fields.size
            ),
        ));
    }
    let table_bytes = entries * L1_ENTRY_BYTES;
    check_table_offset("l1_table_offset", fields.l1_table_offset, table_bytes, layout.cluster_size())?;
    if entries == 0 {
        return Ok(());
    }
    let inside = fields.l1_table_offset.checked_add(table_bytes).is_some_and(|end| end <= file_len);
    if fields.l1_table_offset == 0 || !inside {
        return Err(FormatError::corrupt(
            "l1_table_offset",
            fields.l1_table_offset,
            format!("must not be 0, and its {table_bytes} bytes must lie inside the file, {file_len} bytes"),
        ));
    }
    Ok(())
}

/// The rules that every table's offset in the header obeys.
fn check_table_offset(name: &str, offset: u64, len: u64, cluster_size: u64) -> Result<(), FormatError> {
    let end_max = i64::MAX.unsigned_abs();
    if !offset.is_multiple_of(cluster_size) || offset.checked_add(len).is_none_or(|end| end > end_max) {
        return Err(FormatError::corrupt(
            name,
            offset,
            format!("must be a multiple of {cluster_size}, and the table must end below 2^63"),
        ));
    }
    Ok(())
}
