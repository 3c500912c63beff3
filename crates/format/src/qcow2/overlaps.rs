//! Overlaps: L1 tables that lie where something else lies, and which of the two gives way in a repair.
//!
//! - An L1 table that is longer than its guest's size uses is cut to that, where its rest lies on something else.
//! - The active state is what the guest sees now. A snapshot's table that lies on an L2 table of it, or on the snapshot table, is taken
//!   for a wrong offset: the snapshot is dropped. Not so where it names an L2 table in the same place as the active L1 table does: then
//!   it is an L1 table for certain, and what lies on it is wrong.
//! - A snapshot table that reaches over something else, and in which a name or an id is longer than anybody writes, is taken for
//!   one with a wrong length: it ends before that snapshot. Where the next one begins is not known then.
//! - A snapshot's table that lies on the active L1 table, or on data, is copied to the end of the file, within the limit of all copies.
//! - This comes before any entry is mended: bytes that are mended as two things are lost as both.
//!
//! Not here: tables that cannot be where they are said to be (`scan`), and refcounts, which can always be counted anew (`recount`).

use std::{ops::Range, sync::Arc};

use readonce_storage::{ReadAt, Storage};

use super::{
    chunks::{Chunks, read_padded, words},
    counts::Counts,
    entry::OFFSET_MASK,
    header::Header,
    layout::L1_ENTRY_BYTES,
    recount::end_of_file,
    scan::{Nobody, Scanned, scan},
    snapshots::{Entry, Table},
};
use crate::FormatError;

/// Cuts the active L1 table; says whether it had to be. Durable.
pub(super) async fn cut_active(file: &Arc<dyn Storage>, header: &mut Header) -> Result<bool, FormatError> {
    let layout = header.layout;
    let used = layout.l1_entries_used().max(1);
    let clusters_to = |entries: u64| {
        let end = header.fields.l1_table_offset.saturating_add(entries * L1_ENTRY_BYTES);
        end.div_ceil(layout.cluster_size())
    };
    let rest = clusters_to(used)..clusters_to(header.fields.l1_size.into());
    if rest.is_empty() {
        return Ok(false);
    }
    let used = u32::try_from(used).expect("at most 2^22");
    let mut cut = header.clone();
    cut.change_fields(|fields| fields.l1_size = used);
    let scanned = scan(file.as_ref(), &cut, &mut Nobody).await?;
    if scanned.counts.next_used(rest.start, rest.end).is_none() {
        return Ok(false);
    }
    let switch = header.change_fields(|fields| fields.l1_size = used);
    file.write(switch.at, switch.data).await?;
    file.sync().await?;
    Ok(true)
}

/// The snapshot table without what cannot be there and without overlaps; `None` where it can stay as it is. Copies of L1 tables are
/// written, and not synced.
pub(super) async fn snapshots(
    file: &Arc<dyn Storage>,
    header: &Header,
    scanned: &Scanned,
    copies_left: &mut u64,
) -> Result<Option<Table>, FormatError> {
    let mut changed = scanned.short_snapshots;
    let mut table = Table { entries: Vec::new(), bytes: scanned.snapshots.bytes };
    let places = Places::new(header, scanned)?;
    for (number, entry) in scanned.snapshots.entries.iter().enumerate() {
        if entry.has_long_words() && places.snapshots_meet_others() {
            changed = true;
            break;
        }
        let mut entry = entry.clone();
        let remedy = match scanned.bad_snapshots.contains(&number) {
            true => Remedy::Drop,
            false => places.remedy(file.as_ref(), &entry).await?,
        };
        changed |= remedy != Remedy::None;
        match remedy {
            Remedy::None | Remedy::Rewrite => {}
            Remedy::Cut(entries) => entry.l1_entries = entries,
            Remedy::Drop => continue,
            Remedy::Copy => {
                let len = u64::from(entry.l1_entries) * L1_ENTRY_BYTES;
                let Some(left) = copies_left.checked_sub(len.next_multiple_of(header.layout.cluster_size()))
                else {
                    continue;
                };
                *copies_left = left;
                let l1 = read_padded(file.as_ref(), entry.l1_offset, len).await?;
                entry.l1_offset = end_of_file(file, header.layout.cluster_size());
                file.write(entry.l1_offset, l1).await?;
            }
        }
        table.entries.push(entry);
    }
    Ok(changed.then_some(table))
}

/// What is done about a snapshot's L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// It lies alone.
    None,
    /// The snapshot table lies on it: that one moves.
    Rewrite,
    /// It is too long: so many entries are used.
    Cut(u32),
    /// It gets a place of its own.
    Copy,
    /// The snapshot goes.
    Drop,
}

/// What lies where, by clusters.
struct Places<'a> {
    header: &'a Header,
    scanned: &'a Scanned,
    /// How many L1 tables lie on each cluster.
    l1s: Counts,
    /// Byte offsets of the L2 tables of the active state.
    active_tables: Vec<u64>,
}

impl<'a> Places<'a> {
    fn new(header: &'a Header, scanned: &'a Scanned) -> Result<Self, FormatError> {
        let active = scanned.tables.iter().filter(|(_, named)| named.active > 0).map(|(&at, _)| at);
        let mut places =
            Self { header, scanned, l1s: Counts::new(u64::MAX), active_tables: active.collect() };
        for cluster in places.active_l1() {
            places.l1s.add(cluster, 1)?;
        }
        for (number, entry) in scanned.snapshots.entries.iter().enumerate() {
            if !scanned.bad_snapshots.contains(&number) {
                for cluster in places.l1_of(entry) {
                    places.l1s.add(cluster, 1)?;
                }
            }
        }
        Ok(places)
    }

    fn clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let cluster_size = self.header.layout.cluster_size();
        offset / cluster_size..offset.saturating_add(len).div_ceil(cluster_size)
    }

    fn active_l1(&self) -> Range<u64> {
        let fields = &self.header.fields;
        self.clusters(fields.l1_table_offset, u64::from(fields.l1_size) * L1_ENTRY_BYTES)
    }

    fn l1_of(&self, entry: &Entry) -> Range<u64> {
        self.clusters(entry.l1_offset, u64::from(entry.l1_entries) * L1_ENTRY_BYTES)
    }

    fn snapshots(&self) -> Range<u64> {
        self.clusters(self.header.fields.snapshots_offset, self.scanned.snapshots.bytes)
    }

    /// Whether the snapshot table shares a cluster with anything.
    fn snapshots_meet_others(&self) -> bool {
        self.snapshots().any(|cluster| self.scanned.counts.count(cluster) > 1)
    }

    async fn remedy(&self, file: &dyn ReadAt, entry: &Entry) -> Result<Remedy, FormatError> {
        let layout = &self.header.layout;
        let own = self.l1_of(entry);
        let on_snapshots = meets(&own, &self.snapshots());
        let on_table = self.is_on_active_table(&own);
        let on_active = meets(&own, &self.active_l1());
        let on_data = own.clone().any(|cluster| {
            let table = self.scanned.tables.get(&(cluster * layout.cluster_size()));
            let tables = table.map_or(0, |named| named.total);
            self.scanned.counts.count(cluster) > self.l1s.count(cluster).saturating_add(tables)
        });
        if !(on_snapshots || on_table || on_active || on_data) {
            return Ok(Remedy::None);
        }
        // The machine's state lies behind what the guest sees.
        let seen = layout.l1_entries_for(entry.disk_size.unwrap_or(layout.image_size));
        let used = seen.saturating_add(layout.l1_entries_for(entry.vm_state_size)).max(1);
        Ok(match u32::try_from(used) {
            Ok(used) if used < entry.l1_entries => Remedy::Cut(used),
            _ if (on_snapshots || on_table) && !self.agrees(file, entry).await? => Remedy::Drop,
            _ if on_table => Remedy::None,
            _ if on_active || on_data => Remedy::Copy,
            _ => Remedy::Rewrite,
        })
    }

    fn is_on_active_table(&self, own: &Range<u64>) -> bool {
        let cluster_size = self.header.layout.cluster_size();
        // One that is not aligned lies on two clusters.
        let start = own.start.saturating_mul(cluster_size).saturating_sub(cluster_size - 1);
        let first = self.active_tables.partition_point(|&at| at < start);
        self.active_tables.get(first).is_some_and(|&at| at < own.end.saturating_mul(cluster_size))
    }

    /// Whether the snapshot's L1 table names an L2 table where the active one names the same.
    async fn agrees(&self, file: &dyn ReadAt, entry: &Entry) -> Result<bool, FormatError> {
        let fields = &self.header.fields;
        let len = u64::from(fields.l1_size.min(entry.l1_entries)) * L1_ENTRY_BYTES;
        let mut own = Chunks::new(file, entry.l1_offset, len);
        let mut active = Chunks::new(file, fields.l1_table_offset, len);
        while let (Some((_, own)), Some((_, active))) = (own.next().await, active.next().await) {
            let (own, active) = (own?, active?);
            let mut pairs = words(0, &own).zip(words(0, &active));
            if pairs
                .any(|((_, own), (_, active))| own & OFFSET_MASK != 0 && (own ^ active) & OFFSET_MASK == 0)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn meets(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start.max(other.start) < one.end.min(other.end)
}
