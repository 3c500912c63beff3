//! The header: 64 bytes at the start of the file, and the backing name that it points to.
//!
//! - A [`Header`] that exists is valid: every field was checked against its limit, and the file is long enough for the
//!   L1 table.
//! - The first 512-byte sector is kept as read, so that a rewrite preserves bytes that are not ours.
//!
//! Not here: the pin's record (`record`), and when a header is written.

use std::ops::Range;

use readonce_storage::ReadAt;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::little_endian::{U32, U64},
};

use super::{
    layout::{CLUSTER_SIZE_MAX, CLUSTER_SIZE_MIN, Layout, SECTOR_BYTES, TABLE_SIZE_MAX, image_size_max},
    record,
};
use crate::{
    FormatError,
    driver::{BackingRef, Description, Pin},
    number::{bytes, index},
};

/// "QED" and a zero byte.
pub(super) const MAGIC: [u8; 4] = *b"QED\0";
/// Bytes of the header's fields.
pub(super) const HEADER_BYTES: u64 = 64;
/// Bytes of the longest backing name: what QEMU's driver accepts.
pub(super) const BACKING_NAME_BYTES_MAX: u64 = 4095;

/// Incompatible: there is a backing name.
pub(super) const FEATURE_BACKING_FILE: u64 = 0x01;
/// Incompatible: not closed clean.
pub(super) const FEATURE_NEED_CHECK: u64 = 0x02;
/// Incompatible: the backing is raw and must not be probed.
pub(super) const FEATURE_BACKING_NO_PROBE: u64 = 0x04;
const FEATURES_KNOWN: u64 = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_NO_PROBE;
/// Compatible, from the patch of 2011: copy-on-read is the image's default.
pub(super) const COMPAT_COPY_ON_READ: u64 = 0x01;
/// Compatible, ours: the header area ends with a pin's record.
pub(super) const COMPAT_PIN: u64 = 0x02;
/// Compatible, ours: a pin's record ends where the backing name begins.
pub(super) const COMPAT_PIN_AT_NAME: u64 = 0x04;
/// Autoclear, ours: only readonce wrote since the pin was set. Any other writer clears it by the rule for unknown bits.
pub(super) const AUTOCLEAR_ONLY_READONCE: u64 = 0x01;
/// Autoclear, ours: bits 8 to 63 hold the number of the file's clusters when it was closed clean. They go with every other writer,
/// who may append without a mark.
const AUTOCLEAR_CLEAN_END: u64 = 0x02;
const CLEAN_END_SHIFT: u32 = 8;
const CLEAN_END_MASK: u64 = u64::MAX << CLEAN_END_SHIFT;

/// The fields as they lie in the file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Fields {
    pub(super) magic: [u8; 4],
    pub(super) cluster_size: U32,
    pub(super) table_size: U32,
    pub(super) header_size: U32,
    pub(super) features: U64,
    pub(super) compat_features: U64,
    pub(super) autoclear_features: U64,
    pub(super) l1_table_offset: U64,
    pub(super) image_size: U64,
    pub(super) backing_filename_offset: U32,
    pub(super) backing_filename_size: U32,
}

const _: () = assert!(size_of::<Fields>() == 64);

impl Fields {
    /// Autoclear bits that are not ours.
    pub(super) fn foreign_autoclear(&self) -> u64 {
        let autoclear = self.autoclear_features.get();
        let number = if autoclear & AUTOCLEAR_CLEAN_END == 0 { 0 } else { CLEAN_END_MASK };
        autoclear & !(AUTOCLEAR_ONLY_READONCE | AUTOCLEAR_CLEAN_END | number)
    }

    /// Clears them.
    pub(super) fn clear_foreign(&mut self) {
        self.autoclear_features = (self.autoclear_features.get() & !self.foreign_autoclear()).into();
    }

    /// Whether the image carries NEED_CHECK.
    pub(super) fn need_check(&self) -> bool {
        self.features.get() & FEATURE_NEED_CHECK != 0
    }

    /// Where the file ended when it was closed clean, bytes: nothing in use lies behind it. `None` where that is not known.
    pub(super) fn clean_end(&self) -> Option<u64> {
        let autoclear = self.autoclear_features.get();
        let known = autoclear & AUTOCLEAR_CLEAN_END != 0 && !self.need_check();
        known.then_some(autoclear >> CLEAN_END_SHIFT)?.checked_mul(self.cluster_size.get().into())
    }

    /// Says that the file ends clean with `file_len` bytes; `None`, and a length that is not whole clusters, that it is not known.
    pub(super) fn set_clean_end(&mut self, file_len: Option<u64>) {
        let cluster_size = u64::from(self.cluster_size.get());
        let autoclear = self.autoclear_features.get() & !(AUTOCLEAR_CLEAN_END | CLEAN_END_MASK);
        let number = match file_len {
            // Below 2^51: a file has less than 2^63 bytes.
            Some(len) if len.is_multiple_of(cluster_size) => {
                AUTOCLEAR_CLEAN_END | ((len / cluster_size) << CLEAN_END_SHIFT)
            }
            _ => 0,
        };
        self.autoclear_features = (autoclear | number).into();
    }
}

/// The first sector: the fields, and bytes after them that are kept as they are.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct HeaderSector {
    pub(super) fields: Fields,
    pub(super) rest: [u8; 448],
}

const _: () = assert!(size_of::<HeaderSector>() == 512);

/// A valid header.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// As read; the fields are valid.
    pub(super) sector: HeaderSector,
    /// The sizes, from the fields.
    pub(super) layout: Layout,
    /// The backing, as stored.
    pub(super) backing: Option<BackingRef>,
    /// The pin, where a good record belongs to the stored name.
    pub(super) pin: Option<Pin>,
    /// Where the record lies, bytes; empty without a good one.
    pub(super) record: Range<u64>,
}

impl Header {
    /// Reads and checks the header, the backing name and the record.
    ///
    /// # Errors
    /// `Corrupt` names the field; `Unsupported` names unknown incompatible bits; `Io`.
    pub(super) async fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        let file_len = file.len();
        // The shortest image that can be valid has a header's and a table's cluster.
        if file_len < SECTOR_BYTES {
            let magic_read = file.read(0, index(file_len.min(4))).await?;
            if magic_read[..] != MAGIC {
                return Err(not_qed(&magic_read));
            }
            return Err(FormatError::corrupt("file length", file_len, "must be at least 512 bytes"));
        }
        let head = file.read(0, index(SECTOR_BYTES)).await?;
        let sector = HeaderSector::read_from_bytes(&head).map_err(|_| {
            FormatError::corrupt("header", format!("{} bytes", head.len()), "must be 512 bytes")
        })?;
        let layout = check(&sector.fields, file_len)?;
        let mut header = Self { sector, layout, backing: None, pin: None, record: 0..0 };
        header.backing = header.read_backing(file).await?;
        if let Some(end) = header.record_end()
            && let Some(found) = record::read(file, end).await?
        {
            header.record = end - found.record_bytes..end;
            header.pin = header.backing.as_ref().and_then(|backing| found.pin_for(&backing.name));
        }
        Ok(header)
    }

    async fn read_backing(&self, file: &dyn ReadAt) -> Result<Option<BackingRef>, FormatError> {
        let fields = &self.sector.fields;
        let (offset, size) = (fields.backing_filename_offset.get(), fields.backing_filename_size.get());
        // QEMU takes an empty name for no backing.
        if fields.features.get() & FEATURE_BACKING_FILE == 0 || size == 0 {
            return Ok(None);
        }
        let name = file.read(offset.into(), index(size.into())).await?;
        let name = std::str::from_utf8(&name)
            .ok()
            .filter(|name| !name.contains('\0'))
            .ok_or_else(|| {
                FormatError::corrupt(
                    "backing_filename",
                    name.escape_ascii(),
                    "must be UTF-8 without zero bytes",
                )
            })?
            .to_owned();
        let raw = fields.features.get() & FEATURE_BACKING_NO_PROBE != 0;
        Ok(Some(BackingRef { name, format: raw.then(|| "raw".to_owned()) }))
    }

    /// Where the record ends that the header announces.
    fn record_end(&self) -> Option<u64> {
        let fields = &self.sector.fields;
        match fields.compat_features.get() & (COMPAT_PIN | COMPAT_PIN_AT_NAME) {
            COMPAT_PIN => Some(self.layout.header_bytes),
            COMPAT_PIN_AT_NAME if self.backing.is_some() => Some(fields.backing_filename_offset.get().into()),
            _ => None,
        }
    }

    /// Whether the image carries NEED_CHECK.
    pub(super) fn need_check(&self) -> bool {
        self.sector.fields.need_check()
    }

    /// Whether the file grew after it was closed clean: a power loss took the mark, or whoever wrote knows nothing of marks.
    pub(super) fn grew_unmarked(&self, file_len: u64) -> bool {
        self.sector.fields.clean_end().is_some_and(|end| file_len > end)
    }

    /// What the image says of itself.
    pub(super) fn describe(&self) -> Description {
        let fields = &self.sector.fields;
        Description {
            format: "qed",
            virtual_size: self.layout.image_size,
            cluster_size: Some(self.layout.cluster_size),
            backing: self.backing.clone(),
            copy_on_read: fields.compat_features.get() & COMPAT_COPY_ON_READ != 0,
            pin: self.pin.clone(),
            only_readonce_wrote: Some(fields.autoclear_features.get() & AUTOCLEAR_ONLY_READONCE != 0),
            dirty: self.need_check(),
            in_use: false,
            header_bytes_max: self.bytes_free(),
            data_file: None,
            details: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    /// Bytes of the header area that neither the fields, nor the name, nor the record use.
    pub(super) fn bytes_free(&self) -> u64 {
        let name = self.backing.as_ref().map_or(0, |backing| bytes(backing.name.len()));
        let record = self.record.end - self.record.start;
        self.layout.header_bytes.saturating_sub(HEADER_BYTES + name + record)
    }
}

fn not_qed(found: &[u8]) -> FormatError {
    FormatError::corrupt("magic", found.escape_ascii(), "must be QED\\x00")
}

/// Checks every field.
fn check(fields: &Fields, file_len: u64) -> Result<Layout, FormatError> {
    if fields.magic != MAGIC {
        return Err(not_qed(&fields.magic));
    }
    let unknown = fields.features.get() & !FEATURES_KNOWN;
    if unknown != 0 {
        return Err(FormatError::Unsupported(format!(
            "features has unknown incompatible bits {unknown:#x}, known are {FEATURES_KNOWN:#x}"
        )));
    }
    let cluster_size = u64::from(fields.cluster_size.get());
    if !cluster_size.is_power_of_two() || !(CLUSTER_SIZE_MIN..=CLUSTER_SIZE_MAX).contains(&cluster_size) {
        return Err(FormatError::corrupt(
            "cluster_size",
            cluster_size,
            format!("must be a power of 2 within [{CLUSTER_SIZE_MIN}, {CLUSTER_SIZE_MAX}]"),
        ));
    }
    let table_size = u64::from(fields.table_size.get());
    if !table_size.is_power_of_two() || table_size > TABLE_SIZE_MAX {
        return Err(FormatError::corrupt(
            "table_size",
            table_size,
            format!("must be a power of 2 within [1, {TABLE_SIZE_MAX}]"),
        ));
    }
    let header_size = u64::from(fields.header_size.get());
    if header_size == 0 {
        return Err(FormatError::corrupt("header_size", 0, "must be at least 1 cluster"));
    }
    // 2^32 clusters of 2^26 bytes fit.
    let header_bytes = header_size * cluster_size;
    if header_bytes > file_len {
        return Err(FormatError::corrupt(
            "header_size",
            header_size,
            format!("must lie inside the file, {} clusters", file_len / cluster_size),
        ));
    }
    let image_size = fields.image_size.get();
    let size_max = image_size_max(cluster_size, table_size);
    if !image_size.is_multiple_of(SECTOR_BYTES) || image_size > size_max {
        return Err(FormatError::corrupt(
            "image_size",
            image_size,
            format!("must be a multiple of 512 and at most {size_max}"),
        ));
    }
    let layout = Layout {
        cluster_size,
        table_size,
        header_bytes,
        l1_offset: fields.l1_table_offset.get(),
        image_size,
    };
    if !layout.valid_l1(file_len) {
        return Err(FormatError::corrupt(
            "l1_table_offset",
            layout.l1_offset,
            format!(
                "must be a multiple of {cluster_size}, at least {header_bytes}, and {} bytes before the last whole \
                 cluster's end at {}",
                layout.table_bytes(),
                layout.whole_clusters_end(file_len)
            ),
        ));
    }
    check_backing(fields, header_bytes)?;
    Ok(layout)
}

fn check_backing(fields: &Fields, header_bytes: u64) -> Result<(), FormatError> {
    let size = u64::from(fields.backing_filename_size.get());
    if fields.features.get() & FEATURE_BACKING_FILE == 0 || size == 0 {
        return Ok(());
    }
    if size > BACKING_NAME_BYTES_MAX {
        return Err(FormatError::corrupt(
            "backing_filename_size",
            size,
            format!("must be at most {BACKING_NAME_BYTES_MAX}"),
        ));
    }
    let offset = u64::from(fields.backing_filename_offset.get());
    if offset < HEADER_BYTES || offset + size > header_bytes {
        return Err(FormatError::corrupt(
            "backing_filename_offset",
            offset,
            format!("must be at least {HEADER_BYTES} and end inside the header area, {header_bytes} bytes"),
        ));
    }
    Ok(())
}
