//! Snapshots of an image that nobody has open: made, applied, deleted, with qemu-img's results and in its words.
//!
//! - Every change is a switch of the header's first sector, from one snapshot table or L1 table to another that was written at the
//!   end of the file. In this order, each step synced before the next: the new table and the dirty bit; flags that must go;
//!   refcounts raised to what the file will refer to; the switch; refcounts lowered; flags that may come; the dirty bit off.
//! - So COPIED is never set where a refcount is above 1: a writer that believes the flag would write into what a snapshot shows too.
//!   And no reference is ever without a refcount: what nothing counts is given to the next who asks for room.
//! - Power loss leaves the state before or after, refcounts that are too high (leaks), and flags that are missing where the refcount
//!   is 1 (the writer copies a cluster that it could have written in place). The dirty bit makes every writer put that right;
//!   version 2 has no such bit, and waits for a repair.
//!
//! Not here: the table's bytes (`snapshots`), refcounts (`recount`).

use std::sync::Arc;

use readonce_storage::Storage;

use super::{
    chunks::{read_padded, words},
    entry::COPIED,
    flags::{Change, set_flags},
    header::{AUTOCLEAR_BITMAPS, Fields, Header, INCOMPATIBLE_DIRTY},
    layout::{L1_BYTES_MAX, L1_ENTRY_BYTES, SECTOR_BYTES},
    recount::{Recount, end_of_file},
    repair::{clear_autoclear, rebuild_refcounts},
    scan::{Nobody, references},
    snapshots::{Entry, NAME_BYTES_MAX, SNAPSHOTS_MAX, Table},
};
use crate::{FormatError, driver::SnapshotChange, number::index};

/// Changes the internal snapshots, durably.
///
/// # Errors
/// `Invalid` and `Unsupported` say what qemu-img says; `Corrupt` where a table is wrong.
pub(super) async fn change(file: &Arc<dyn Storage>, change: &SnapshotChange) -> Result<(), FormatError> {
    let mut header = Header::read(file.as_ref()).await?;
    if header.corrupt() {
        return Err(FormatError::Invalid("qcow2: Image is corrupt; cannot be opened read/write".into()));
    }
    if header.dirty() {
        rebuild_refcounts(file).await?;
        header = Header::read(file.as_ref()).await?;
    }
    match change {
        SnapshotChange::Create { name, date_sec, date_nsec } => {
            create(file, header, name, *date_sec, *date_nsec).await
        }
        SnapshotChange::Apply(which) => apply(file, header, which).await,
        SnapshotChange::Delete(name) => delete(file, header, name).await,
    }
}

async fn create(
    file: &Arc<dyn Storage>,
    mut header: Header,
    name: &str,
    date_sec: u32,
    date_nsec: u32,
) -> Result<(), FormatError> {
    let failed = |why: &str| FormatError::Invalid(format!("Could not create snapshot '{name}': {why}"));
    if header.layout.external_data {
        return Err(FormatError::Unsupported(failed("Operation not supported").to_string()));
    }
    if header.fields.nb_snapshots >= SNAPSHOTS_MAX {
        return Err(failed("File too large"));
    }
    let mut table = read_table(file, &header).await?;
    let mut name_end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(name_end) {
        name_end -= 1;
    }
    let stored_name = name.get(..name_end).unwrap_or_default();
    let id =
        table.entries.iter().map(|entry| id_number(&entry.id)).max().unwrap_or_default().saturating_add(1);

    let before = file.len();
    let active = (header.fields.l1_table_offset, header.fields.l1_size);
    let l1_offset = write_l1(file, &header, active, active.1).await?;
    table.entries.push(Entry {
        l1_offset,
        l1_entries: active.1,
        id: id.to_string().into_bytes(),
        name: stored_name.as_bytes().to_vec(),
        date_sec,
        date_nsec,
        vm_clock_nsec: 0,
        vm_state_size: 0,
        disk_size: Some(header.layout.image_size),
        // As qemu-img, which does not count and says so with a 0.
        icount: Some(0),
        extra: Vec::new(),
        complete: true,
    });
    let (offset, count) = write_table(file, &header, &table).await?;
    let switched = switch(file, &mut header, |fields| {
        fields.snapshots_offset = offset;
        fields.nb_snapshots = count;
    });
    match switched.await? {
        Switched::Done => Ok(()),
        Switched::TooMany => {
            // What was written is not referred to.
            file.set_len(before).await?;
            Err(failed("Invalid argument"))
        }
    }
}

async fn apply(file: &Arc<dyn Storage>, mut header: Header, which: &str) -> Result<(), FormatError> {
    let failed = |why: &str| FormatError::Invalid(format!("Could not apply snapshot '{which}': {why}"));
    if header.bitmaps.is_some() && header.fields.autoclear_features & AUTOCLEAR_BITMAPS != 0 {
        return Err(failed("Device has active dirty bitmaps"));
    }
    if header.layout.external_data {
        let why = failed("Failed to load snapshot: Operation not supported");
        return Err(FormatError::Unsupported(why.to_string()));
    }
    let table = read_table(file, &header).await?;
    let by_id = table.entries.iter().find(|entry| entry.id == which.as_bytes());
    let entry = by_id.or_else(|| table.entries.iter().find(|entry| entry.name == which.as_bytes()));
    let Some(entry) = entry else {
        return Err(failed("Failed to load snapshot: No such file or directory"));
    };
    let size = entry.disk_size.unwrap_or(header.layout.image_size);
    if size != header.layout.image_size && header.fields.version < 3 {
        return Err(failed("Can't resize a v2 image which has snapshots"));
    }
    let entries = header.layout.l1_entries_for(size).max(entry.l1_entries.into());
    if !size.is_multiple_of(SECTOR_BYTES) || entries * L1_ENTRY_BYTES > L1_BYTES_MAX {
        return Err(FormatError::corrupt(
            format!("disk size of snapshot '{which}'"),
            size,
            format!("must be a multiple of {SECTOR_BYTES} and at most {}", header.layout.image_size_max()),
        ));
    }
    let entries = u32::try_from(entries).expect("at most 2^22, checked above");
    let before = file.len();
    let l1_offset = write_l1(file, &header, (entry.l1_offset, entry.l1_entries), entries).await?;
    let switched = switch(file, &mut header, |fields| {
        fields.l1_table_offset = l1_offset;
        fields.l1_size = entries;
        fields.size = size;
    });
    match switched.await? {
        Switched::Done => Ok(()),
        Switched::TooMany => {
            file.set_len(before).await?;
            Err(failed("Failed to load snapshot: Invalid argument"))
        }
    }
}

async fn delete(file: &Arc<dyn Storage>, mut header: Header, name: &str) -> Result<(), FormatError> {
    let mut table = read_table(file, &header).await?;
    // By name alone, as qemu-img.
    let Some(at) = table.entries.iter().position(|entry| entry.name == name.as_bytes()) else {
        return Err(FormatError::Invalid(format!("Could not delete snapshot '{name}': snapshot not found")));
    };
    table.entries.remove(at);
    let (offset, count) = write_table(file, &header, &table).await?;
    let switched = switch(file, &mut header, |fields| {
        fields.snapshots_offset = offset;
        fields.nb_snapshots = count;
    });
    match switched.await? {
        Switched::Done => Ok(()),
        // Fewer references than before.
        Switched::TooMany => Err(wrong()),
    }
}

async fn read_table(file: &Arc<dyn Storage>, header: &Header) -> Result<Table, FormatError> {
    Table::read(file.as_ref(), header.fields.snapshots_offset, header.fields.nb_snapshots).await
}

/// The number that an id begins with; 0 without one.
fn id_number(id: &[u8]) -> u64 {
    let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number: u64, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
}

/// Copies an L1 table (offset and entries), without COPIED flags, to the end of the file, `entries` long; its offset.
async fn write_l1(
    file: &Arc<dyn Storage>,
    header: &Header,
    (offset, from_entries): (u64, u32),
    entries: u32,
) -> Result<u64, FormatError> {
    let len = u64::from(from_entries) * L1_ENTRY_BYTES;
    if len > L1_BYTES_MAX || !offset.is_multiple_of(header.layout.cluster_size()) {
        return Err(FormatError::corrupt(
            "l1_table_offset of a snapshot",
            format!("{offset}, for {from_entries} entries"),
            format!(
                "must be a multiple of {} for at most {L1_BYTES_MAX} bytes",
                header.layout.cluster_size()
            ),
        ));
    }
    let l1 = read_padded(file.as_ref(), offset, len).await?;
    let mut copy: Vec<u8> = words(0, &l1).flat_map(|(_, raw)| (raw & !COPIED).to_be_bytes()).collect();
    copy.resize(index(u64::from(entries) * L1_ENTRY_BYTES), 0);
    let at = end_of_file(file, header.layout.cluster_size());
    file.write(at, copy.into()).await?;
    Ok(at)
}

/// Writes a snapshot table to the end of the file; its offset and its entries.
async fn write_table(
    file: &Arc<dyn Storage>,
    header: &Header,
    table: &Table,
) -> Result<(u64, u32), FormatError> {
    if table.entries.is_empty() {
        return Ok((0, 0));
    }
    let at = end_of_file(file, header.layout.cluster_size());
    file.write(at, table.serialise(header.layout.image_size)?.into()).await?;
    Ok((at, u32::try_from(table.entries.len()).expect("at most 65536")))
}

fn wrong() -> FormatError {
    FormatError::corrupt("the image", "wrong in its tables", "must be repaired first")
}

/// Whether a switch was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switched {
    /// It is durable.
    Done,
    /// A cluster would be referred to more often than the largest refcount says. Nothing changed.
    TooMany,
}

/// Changes the header, and refcounts and flags with it. The tables that it names afterwards are written.
async fn switch(
    file: &Arc<dyn Storage>,
    header: &mut Header,
    change: impl Fn(&mut Fields),
) -> Result<Switched, FormatError> {
    let mut after = header.clone();
    after.change_fields(&change);
    after.layout.image_size = after.fields.size;
    let mut scanned = references(file.as_ref(), &after, &mut Nobody).await?;
    if scanned.check_errors > 0 {
        return Err(FormatError::Io(std::io::Error::other("a table cannot be read")));
    }
    if scanned.corruptions > 0 {
        let now = references(file.as_ref(), header, &mut Nobody).await?;
        return if now.corruptions == 0 && !scanned.lost { Ok(Switched::TooMany) } else { Err(wrong()) };
    }
    let tables = std::mem::take(&mut scanned.tables);
    let active = || tables.iter().map(|(&table, &named)| (table, named));
    let recount = Recount::plan(header, scanned)?;

    clear_autoclear(file, header).await?;
    set_dirty(file, header, true).await?;
    // The tables that are active before the switch need no look: where one of them says "alone", no other table shows the cluster,
    // so that its refcount is not raised.
    set_flags(file, &after, active(), &recount.counts, Change::Clear).await?;
    file.sync().await?;
    recount.raise(file, header).await?;
    let sector = header.change_fields(&change);
    file.write(sector.at, sector.data).await?;
    file.sync().await?;
    recount.lower(file).await?;
    set_flags(file, &after, active(), &recount.counts, Change::Any).await?;
    file.sync().await?;
    let end = recount.counts.last_used().map_or(0, |last| (last + 1) * header.layout.cluster_size());
    if end < file.len() {
        file.set_len(end).await?;
        file.sync().await?;
    }
    set_dirty(file, header, false).await?;
    Ok(Switched::Done)
}

/// Sets the dirty bit, or takes it off; durable. Version 2 has none.
async fn set_dirty(file: &Arc<dyn Storage>, header: &mut Header, dirty: bool) -> Result<(), FormatError> {
    if header.fields.version < 3 {
        return Ok(());
    }
    let sector = header.change_fields(|fields| {
        fields.incompatible_features &= !INCOMPATIBLE_DIRTY;
        fields.incompatible_features |= if dirty { INCOMPATIBLE_DIRTY } else { 0 };
    });
    file.write(sector.at, sector.data).await?;
    file.sync().await?;
    Ok(())
}
