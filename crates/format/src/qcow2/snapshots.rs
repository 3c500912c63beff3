//! The snapshot table: what an image says of its internal snapshots.
//!
//! - A [`Table`] that exists is within its limits: at most [`SNAPSHOTS_MAX`] entries in [`TABLE_BYTES_MAX`], each with at
//!   most [`EXTRA_BYTES_MAX`] of extra data. Extra data that we do not know is kept byte for byte.
//! - Entries follow each other at multiples of 8 bytes; the table's length is known only by reading all of it.
//! - Names and ids are bytes. They are shown as UTF-8, with replacements where they are none.
//!
//! Not here: where an L1 table of a snapshot may lie, and how snapshots are made (`snapshot`).

use readonce_storage::ReadAt;

use crate::{
    FormatError,
    driver::Snapshot,
    number::{bytes, index, round_up},
};

/// Bytes of the longest name, as qemu-img cuts it.
pub(super) const NAME_BYTES_MAX: usize = 255;
/// Most snapshots of an image: what QEMU opens.
pub(super) const SNAPSHOTS_MAX: u32 = 65536;
/// Bytes of the longest table: what QEMU opens.
pub(super) const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Most bytes of extra data of an entry: what QEMU opens.
pub(super) const EXTRA_BYTES_MAX: u32 = 1024;
/// Bytes of an entry before its extra data.
const FIXED_BYTES: u64 = 40;
/// Bytes of the extra data that we know, and write: size of the machine state, of the disk, instructions run.
const EXTRA_BYTES_KNOWN: u64 = 24;
/// Bytes that version 3 asks for in every entry: the first two of those.
const EXTRA_BYTES_V3: u64 = 16;
/// "Not counted", in the place of instructions run.
const ICOUNT_NONE: u64 = u64::MAX;
/// Bytes that are read at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// A snapshot as the file stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Byte offset of its L1 table.
    pub(super) l1_offset: u64,
    /// Entries of its L1 table.
    pub(super) l1_entries: u32,
    /// As stored.
    pub(super) id: Vec<u8>,
    /// As stored.
    pub(super) name: Vec<u8>,
    /// Seconds since 1970, UTC.
    pub(super) date_sec: u32,
    /// And nanoseconds.
    pub(super) date_nsec: u32,
    /// How long the guest had run, nanoseconds.
    pub(super) vm_clock_nsec: u64,
    /// Bytes of saved machine state.
    pub(super) vm_state_size: u64,
    /// Bytes that the guest saw; `None` where the entry does not say (then: as many as the image has now).
    pub(super) disk_size: Option<u64>,
    /// Instructions that the guest had run.
    pub(super) icount: Option<u64>,
    /// Extra data after what we know.
    pub(super) extra: Vec<u8>,
    /// Whether the entry holds all that version 3 asks for.
    pub(super) complete: bool,
}

impl Entry {
    /// Whether its id or name is longer than anybody writes.
    pub(super) fn has_long_words(&self) -> bool {
        self.id.len().max(self.name.len()) > NAME_BYTES_MAX
    }

    /// As the outside sees it. `size` is the image's, in bytes.
    pub(super) fn snapshot(&self, size: u64) -> Snapshot {
        Snapshot {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: self.vm_state_size,
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: self.icount,
            disk_size: self.disk_size.unwrap_or(size),
        }
    }

    /// Adds the entry at the end of a table. `size` is the image's, in bytes. Ids and names have at most 65535 bytes.
    fn put(&self, size: u64, out: &mut Vec<u8>) {
        let word =
            |length: usize| u16::try_from(length).expect("parsed from a u16, or checked by who made it");
        let extra = EXTRA_BYTES_KNOWN + bytes(self.extra.len());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(word(self.id.len()).to_be_bytes());
        out.extend(word(self.name.len()).to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        // The short field is kept right for readers that know only it.
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(u32::try_from(extra).expect("at most 1024 and 24").to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.unwrap_or(size).to_be_bytes());
        out.extend(self.icount.unwrap_or(ICOUNT_NONE).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// All snapshots of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// In the order of the file.
    pub(super) entries: Vec<Entry>,
    /// Bytes that the table takes in the file it was read from, padding included.
    pub(super) bytes: u64,
}

impl Table {
    /// Reads the table of `count` snapshots at `offset`.
    ///
    /// # Errors
    /// `Corrupt` names the field; `Io`.
    pub(super) async fn read(file: &dyn ReadAt, offset: u64, count: u32) -> Result<Self, FormatError> {
        if count > SNAPSHOTS_MAX {
            return Err(FormatError::corrupt(
                "nb_snapshots",
                count,
                format!("must be at most {SNAPSHOTS_MAX}"),
            ));
        }
        let mut cursor = Cursor { file, table: offset, at: 0, chunk: bytes::Bytes::new(), chunk_at: 0 };
        let mut table = Self::default();
        for number in 0..count {
            table.entries.push(cursor.entry(number).await?);
        }
        table.bytes = round_up(cursor.at, 8).expect("at most the table's longest length");
        Ok(table)
    }

    /// The table as it is to lie in a file. `size` is the image's, in bytes; entries that do not say how much the guest saw
    /// say so afterwards.
    ///
    /// # Errors
    /// `Invalid` where it would be longer than a table may be.
    pub(super) fn serialise(&self, size: u64) -> Result<Vec<u8>, FormatError> {
        let mut out = Vec::new();
        for entry in &self.entries {
            entry.put(size, &mut out);
            if bytes(out.len()) > TABLE_BYTES_MAX {
                return Err(FormatError::Invalid(format!(
                    "the snapshot table would be longer than {TABLE_BYTES_MAX} bytes"
                )));
            }
        }
        Ok(out)
    }

    /// The snapshots as the outside sees them. `size` is the image's, in bytes.
    pub(super) fn snapshots(&self, size: u64) -> Vec<Snapshot> {
        self.entries.iter().map(|entry| entry.snapshot(size)).collect()
    }
}

/// Reads a table from its start on, in chunks.
struct Cursor<'a> {
    file: &'a dyn ReadAt,
    /// Byte offset of the table.
    table: u64,
    /// Bytes of the table that are parsed.
    at: u64,
    /// What was read last, and where in the table it begins.
    chunk: bytes::Bytes,
    chunk_at: u64,
}

impl Cursor<'_> {
    async fn entry(&mut self, number: u32) -> Result<Entry, FormatError> {
        self.at = round_up(self.at, 8).expect("at most the table's longest length");
        let fixed = self.take(number, FIXED_BYTES).await?;
        let mut fixed = Fields(&fixed);
        let l1_offset = fixed.u64();
        let l1_entries = fixed.u32();
        let id_bytes = fixed.u16();
        let name_bytes = fixed.u16();
        let date_sec = fixed.u32();
        let date_nsec = fixed.u32();
        let vm_clock_nsec = fixed.u64();
        let vm_state_size = fixed.u32();
        let extra_bytes = fixed.u32();
        if extra_bytes > EXTRA_BYTES_MAX {
            return Err(FormatError::corrupt(
                format!("extra_data_size of snapshot {number}"),
                extra_bytes,
                format!("must be at most {EXTRA_BYTES_MAX}"),
            ));
        }
        let extra_bytes = u64::from(extra_bytes);
        let extra = self.take(number, extra_bytes).await?;
        let mut known = Fields(&extra);
        let vm_state_size = if extra_bytes >= 8 { known.u64() } else { vm_state_size.into() };
        let disk_size = (extra_bytes >= EXTRA_BYTES_V3).then(|| known.u64());
        let icount = (extra_bytes >= EXTRA_BYTES_KNOWN).then(|| known.u64());
        Ok(Entry {
            l1_offset,
            l1_entries,
            id: self.take(number, id_bytes.into()).await?.to_vec(),
            name: self.take(number, name_bytes.into()).await?.to_vec(),
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size,
            disk_size,
            icount: icount.filter(|&icount| icount != ICOUNT_NONE),
            extra: extra.get(index(EXTRA_BYTES_KNOWN)..).unwrap_or_default().to_vec(),
            complete: extra_bytes >= EXTRA_BYTES_V3,
        })
    }

    /// The next `len` bytes, at most 64 KiB.
    async fn take(&mut self, number: u32, len: u64) -> Result<bytes::Bytes, FormatError> {
        let end = self.at + len;
        if end > TABLE_BYTES_MAX {
            return Err(FormatError::corrupt(
                format!("snapshot {number}"),
                format!("at byte {} of the table", self.at),
                format!("must end within the first {TABLE_BYTES_MAX}"),
            ));
        }
        if end > self.chunk_at + bytes(self.chunk.len()) {
            let inside = self.table.checked_add(self.at).map_or(0, |at| self.file.len().saturating_sub(at));
            if inside < len {
                return Err(FormatError::corrupt(
                    format!("snapshot {number}"),
                    format!("at byte {} of the table at {}", self.at, self.table),
                    format!("must lie inside the file, {} bytes", self.file.len()),
                ));
            }
            self.chunk = self.file.read(self.table + self.at, index(inside.min(CHUNK_BYTES))).await?;
            self.chunk_at = self.at;
        }
        let from = index(self.at - self.chunk_at);
        self.at = end;
        Ok(self.chunk.slice(from..from + index(len)))
    }
}

/// Big-endian fields of a piece that is long enough for those that are asked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn field<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the caller read as many bytes as it asks");
        self.0 = rest;
        *field
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.field())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.field())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.field())
    }
}

#[cfg(test)]
mod tests {
    use readonce_storage::SimFile;

    use super::*;

    fn entry(number: u8, extra: usize) -> Entry {
        Entry {
            l1_offset: u64::from(number) << 16,
            l1_entries: 7,
            id: number.to_string().into_bytes(),
            name: vec![b'n'; usize::from(number) * 200],
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: u64::from(number) << 30,
            disk_size: Some(4 << 30),
            icount: number.is_multiple_of(2).then_some(99),
            extra: vec![0xab; extra],
            complete: true,
        }
    }

    fn read(bytes: &[u8], offset: u64, count: u32) -> Result<Table, FormatError> {
        let file = SimFile::from_bytes(bytes);
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(Table::read(&file, offset, count))
    }

    fn message(bytes: &[u8], offset: u64, count: u32) -> String {
        read(bytes, offset, count).unwrap_err().to_string()
    }

    #[test]
    fn what_was_written_is_read_again() {
        let mut table = Table::default();
        (0..=250).for_each(|number| table.entries.push(entry(number, usize::from(number) * 4)));
        let mut bytes = vec![0x55; 512];
        bytes.extend(table.serialise(1 << 20).unwrap());
        table.bytes = (bytes.len() - 512) as u64;
        let count = table.entries.len() as u32;
        assert_eq!(read(&bytes, 512, count).unwrap(), table);
    }

    #[test]
    fn short_extra_data_says_less() {
        let mut bytes = Table { entries: vec![entry(1, 0)], bytes: 0 }.serialise(0).unwrap();
        bytes.drain(40..64);
        bytes[36..40].copy_from_slice(&0_u32.to_be_bytes());
        let found = read(&bytes, 0, 1).unwrap();
        let found = &found.entries[0];
        assert_eq!((found.disk_size, found.icount, found.complete), (None, None, false));
        assert_eq!(found.vm_state_size, 1 << 30, "the short field");
        assert_eq!(found.snapshot(77).disk_size, 77);
    }

    #[test]
    fn limits_are_kept() {
        let good = Table { entries: vec![entry(1, 0)], bytes: 0 }.serialise(0).unwrap();
        assert!(message(&good, 0, 65537).contains("nb_snapshots is 65537, must be at most 65536"));
        assert!(message(&good, 0, 2).contains("snapshot 1 is at byte"));
        assert!(message(&good, u64::MAX - 7, 1).contains("must lie inside the file"));
        let mut bytes = good.clone();
        bytes[36..40].copy_from_slice(&1025_u32.to_be_bytes());
        assert_eq!(message(&bytes, 0, 1), "extra_data_size of snapshot 0 is 1025, must be at most 1024");
        bytes[36..40].copy_from_slice(&1024_u32.to_be_bytes());
        assert!(message(&bytes, 0, 1).contains("must lie inside the file"));
        let mut large = Table::default();
        large.entries.resize(1100, Entry { name: vec![b'x'; 65535], ..entry(1, 0) });
        assert!(large.serialise(0).unwrap_err().to_string().contains("longer than 67108864"));
    }

    #[test]
    fn a_table_that_is_too_long_is_not_read_to_its_end() {
        let mut one = Table { entries: vec![Entry { name: vec![b'x'; 65000], ..entry(1, 0) }], bytes: 0 };
        let bytes = one.serialise(0).unwrap();
        one.entries.clear();
        let bytes = bytes.repeat(1100);
        assert!(message(&bytes, 0, 1100).contains("must end within the first 67108864"));
    }
}
