//! Repair: entries, refcounts and COPIED flags become right, and the marks of an image that may be wrong go.
//!
//! - `Leaks` lowers refcounts that are too high. It changes no reference, and does nothing where the refcount table or a
//!   block is broken, where refcounts were to be written late and never were, or where something is wrong that may have meant the clusters
//!   that seem to be leaked.
//! - `All` mends entries (`mend`), raises what is too low and writes anew what is broken (`recount`), then flags, then lowers.
//! - A cluster that two entries show is copied for one of them; where that would be too much, both keep it with a refcount of 2, and
//!   either gets its own copy when it is written.
//! - Refcounts behind the end of the file are lowered too, though no check tells of them.
//! - Power loss at any moment leaves an image that can be repaired again, without loss of what could be kept before.
//!
//! Not here: what is wrong (`check`).

use std::sync::Arc;

use readonce_storage::Storage;

use super::{
    check::count,
    chunks::read_padded,
    flags::{Change, set_flags},
    header::{
        AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, AUTOCLEAR_ONLY_READONCE, Header, INCOMPATIBLE_CORRUPT,
        INCOMPATIBLE_DIRTY,
    },
    mend::mend,
    recount::Recount,
    refcount::TABLE_OFFSET_MASK,
    scan::{Nobody, Scanned, refcounts, references},
};
use crate::{
    Finding, FormatError,
    driver::{CheckReport, Repair},
    finding::Tell,
    number::index,
};

/// Repairs the image; tells what was wrong, and the report tells the state after it.
pub(super) async fn repair(
    file: &Arc<dyn Storage>,
    what: Repair,
    tell: Tell<'_>,
) -> Result<CheckReport, FormatError> {
    let mut header = Header::read(file.as_ref()).await?;
    let (before, scanned, compared) = count(file.as_ref(), &header, tell).await?;
    if scanned.check_errors > 0 {
        return Ok(before);
    }
    if what == Repair::Leaks && header.dirty() && compared.too_low > 0 {
        // Refcounts that were never written say nothing about leaks.
        tell(Finding::NeedsRebuild);
        tell(Finding::NotWrittenYet);
        return Ok(before);
    }
    let wrong = before.corruptions > 0
        || before.leaks > 0
        || before.check_errors > 0
        || counts_behind(file, &header, &scanned).await?;
    let mut after = before;
    if wrong {
        drop((scanned, compared));
        match what {
            Repair::Leaks => free_leaks(file, &mut header).await?,
            Repair::All => {
                clear_autoclear(file, &mut header).await?;
                let scanned = mend(file, &mut header).await?;
                if scanned.check_errors == 0 {
                    recount(file, &mut header, scanned).await?;
                }
            }
        }
        after = count(file.as_ref(), &header, &mut |_| {}).await?.0;
        cut(file, &after).await?;
    }
    if after.corruptions == 0 && after.check_errors == 0 {
        unmark(file, &mut header).await?;
    }
    after.corruptions_fixed = before.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = before.leaks.saturating_sub(after.leaks);
    Ok(after)
}

/// Whether a refcount counts a cluster behind all that is used: a repair may have been cut off between raising and lowering. No check
/// tells of these, as QEMU's does not, but an image that is open for writing grows behind them.
async fn counts_behind(
    file: &Arc<dyn Storage>,
    header: &Header,
    scanned: &Scanned,
) -> Result<bool, FormatError> {
    let refcounts = refcounts(&header.layout);
    let first = refcounts.table_index(scanned.end());
    let blocks = (0..).zip(scanned.table.iter().map(|raw| raw & TABLE_OFFSET_MASK)).skip(index(first));
    for (number, offset) in blocks.filter(|&(_, offset)| offset > 0) {
        let block = read_padded(file.as_ref(), offset, refcounts.cluster_size()).await?;
        let from = if number == first { refcounts.block_index(scanned.end()) } else { 0 };
        if (from..refcounts.per_block()).any(|at| refcounts.refcount(&block, at) > 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Makes the refcounts and the COPIED flags of an image right whose refcounts were not written before a crash (the dirty bit), and
/// takes that bit off. Entries that are wrong stay as they are; while there are such, nothing is freed.
///
/// # Errors
/// `Corrupt` where the snapshot table cannot be read, `Unsupported` where the image is too large to be scanned, `Io`.
pub(super) async fn rebuild_refcounts(file: &Arc<dyn Storage>) -> Result<(), FormatError> {
    let mut header = Header::read(file.as_ref()).await?;
    let scanned = references(file.as_ref(), &header, &mut Nobody).await?;
    if scanned.check_errors > 0 {
        let error = std::io::Error::other("a table cannot be read");
        return Err(FormatError::Io(error));
    }
    recount(file, &mut header, scanned).await?;
    let switch = header.change_fields(|fields| fields.incompatible_features &= !INCOMPATIBLE_DIRTY);
    file.write(switch.at, switch.data).await?;
    file.sync().await?;
    Ok(())
}

/// Makes refcounts and flags say what was scanned. In the order of a snapshot's switch, so that at no moment a flag says "alone" beside a
/// refcount above 1.
async fn recount(
    file: &Arc<dyn Storage>,
    header: &mut Header,
    mut scanned: Scanned,
) -> Result<(), FormatError> {
    let tables = std::mem::take(&mut scanned.tables);
    let active = || tables.iter().map(|(&table, &named)| (table, named));
    let lost = scanned.lost;
    let recount = Recount::plan(header, scanned)?;
    set_flags(file, header, active(), &recount.counts, Change::Clear).await?;
    file.sync().await?;
    recount.raise(file, header).await?;
    if !lost {
        recount.lower(file).await?;
    }
    set_flags(file, header, active(), &recount.counts, Change::Any).await?;
    file.sync().await?;
    Ok(())
}

/// Lowers what is too high, and sets the flags but those of clusters whose refcount is too low: two may show such a cluster, and
/// a flag that says "alone" would have one of them written into the other.
async fn free_leaks(file: &Arc<dyn Storage>, header: &mut Header) -> Result<(), FormatError> {
    let mut scanned = references(file.as_ref(), header, &mut Nobody).await?;
    if scanned.lost || scanned.check_errors > 0 {
        return Ok(());
    }
    let tables = std::mem::take(&mut scanned.tables);
    let table = std::mem::take(&mut scanned.table);
    scanned.table.clone_from(&table);
    let recount = Recount::plan(header, scanned)?;
    if !recount.is_as_stored(&table) {
        return Ok(());
    }
    clear_autoclear(file, header).await?;
    let too_low = recount.lower_only(file).await?;
    set_flags(file, header, tables.into_iter(), &recount.counts, Change::AnyBut(&too_low)).await?;
    file.sync().await?;
    Ok(())
}

/// Takes off the autoclear bits that nobody here keeps true. Bitmaps stay true: no guest byte changes (`mend` sees to those that do).
pub(super) async fn clear_autoclear(file: &Arc<dyn Storage>, header: &mut Header) -> Result<(), FormatError> {
    let kept = AUTOCLEAR_DATA_FILE_RAW | AUTOCLEAR_ONLY_READONCE | AUTOCLEAR_BITMAPS;
    if header.fields.autoclear_features & !kept != 0 {
        let switch = header.change_fields(|fields| fields.autoclear_features &= kept);
        file.write(switch.at, switch.data).await?;
        file.sync().await?;
    }
    Ok(())
}

/// Cuts off what nothing uses at the end of the file.
async fn cut(file: &Arc<dyn Storage>, report: &CheckReport) -> Result<(), FormatError> {
    let clean = report.corruptions == 0 && report.check_errors == 0 && report.leaks == 0;
    if let Some(end) = report.image_end_offset.filter(|&end| clean && end < file.len()) {
        file.set_len(end).await?;
        file.sync().await?;
    }
    Ok(())
}

/// Takes off the marks of an image that may be wrong.
async fn unmark(file: &Arc<dyn Storage>, header: &mut Header) -> Result<(), FormatError> {
    let marks = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT;
    let mut changes = Vec::new();
    if header.fields.incompatible_features & marks != 0 {
        changes.push(header.change_fields(|fields| fields.incompatible_features &= !marks));
    }
    if header.record.in_use {
        changes.extend(header.set_in_use(false));
    }
    if changes.is_empty() {
        return Ok(());
    }
    file.sync().await?;
    for change in changes {
        file.write(change.at, change.data).await?;
    }
    file.sync().await?;
    Ok(())
}
