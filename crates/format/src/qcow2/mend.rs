//! Mend: entries of L1 and L2 tables, the snapshot table and the bitmaps become what they may be.
//!
//! - Bits that may not be set are cleared. An offset that is not aligned loses its lowest bits, where nothing else uses the
//!   cluster that it then names; else the entry names nothing, as one does that points past the end of the file: the backing
//!   shows through there (zeros stay zeros).
//! - Data that lies on a table, and data that is referred to more often than the widest refcount can say, is copied to the
//!   end of the file. Copies may at most double the file (or take 1 MiB); what is left beyond that stays.
//! - What two entries of the active state show (compressed bytes that lie in a cluster of data among it) is copied too, up to 64 MiB: once one of them were written, the other would be alone with a
//!   COPIED flag that nobody sets. Beyond that, or where the disk is full, they share it, with a refcount of 2.
//! - Snapshots whose L1 table cannot be there are dropped. Bitmaps that are broken are marked stale.
//! - L1 tables that lie on something else give way first (`overlaps`). L1 entries are mended before L2 entries are looked at:
//!   what a wrong L1 entry names is no table, and is not written. L2 entries are mended before the file grows by a copy.
//! - Every change is one sector, after a sync of what it names: power loss leaves some entries mended.
//! - Memory: that of the scan, its counts twice, and [`BATCH_MAX`] findings at a time.
//!
//! Not here: refcounts and COPIED flags, which are wrong afterwards (`repair`).

use std::{collections::BTreeSet, ops::RangeInclusive, sync::Arc};

use bytes::Bytes;
use readonce_storage::{Storage, flat::is_no_space};

use super::{
    chunks::read_padded,
    counts::Counts,
    entry::{COMPRESSED, COPIED, OFFSET_MASK},
    header::{AUTOCLEAR_BITMAPS, Header},
    judge::{Cluster, Entry, Wrong, WrongEntry},
    layout::{Layout, SECTOR_BYTES},
    overlaps,
    recount::end_of_file,
    scan::{Named, Nobody, Observer, Scanned, references},
    snapshots::Table,
};
use crate::FormatError;

/// Findings that are kept in memory at once; more take another scan.
const BATCH_MAX: usize = 1 << 16;
/// Scans of one repair. More than this many batches are left to the next one.
const ROUNDS_MAX: usize = 100;
/// Bytes that copies may take in any case.
const COPIES_BYTES_MIN: u64 = 1 << 20;
/// Bytes that copies of what two entries share may take in any case: the limit of a convenience.
const SHARED_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are copied between two syncs, but for one cluster that is larger.
const COPY_BYTES_MAX: u64 = 64 << 20;

/// Of a cluster that an entry names as its own.
const ROOM: u64 = 1;
/// Of a cluster that holds compressed bytes.
const PACKED: u64 = 2;

/// Mends everything but refcounts and COPIED flags, which are wrong afterwards. Returns what a last scan saw.
///
/// # Errors
/// `Corrupt` where the snapshot table cannot be read.
pub(super) async fn mend(file: &Arc<dyn Storage>, header: &mut Header) -> Result<Scanned, FormatError> {
    let must = file.len().max(COPIES_BYTES_MIN);
    let mut copies_left = CopiesLeft { must, shared: must.min(SHARED_BYTES_MAX) };
    overlaps::cut_active(file, header).await?;
    for _ in 0..ROUNDS_MAX {
        let mut found = Found::new();
        let scanned = references(file.as_ref(), header, &mut found).await?;
        if scanned.check_errors > 0 || !round(file, header, &scanned, &found, &mut copies_left).await? {
            return Ok(scanned);
        }
        file.sync().await?;
    }
    references(file.as_ref(), header, &mut Nobody).await
}

/// Mends what one scan found, the first kind of it; says whether anything changed.
async fn round(
    file: &Arc<dyn Storage>,
    header: &mut Header,
    scanned: &Scanned,
    found: &Found,
    copies_left: &mut CopiesLeft,
) -> Result<bool, FormatError> {
    let layout = header.layout;
    let entries_change = !found.l1.is_empty() || !found.l2.is_empty();
    if scanned.bad_bitmaps || entries_change && header.fields.autoclear_features & AUTOCLEAR_BITMAPS != 0 {
        let switch = header.change_fields(|fields| fields.autoclear_features &= !AUTOCLEAR_BITMAPS);
        file.write(switch.at, switch.data).await?;
        return Ok(true);
    }
    if let Some(table) = overlaps::snapshots(file, header, scanned, &mut copies_left.must).await? {
        write_snapshots(file, header, &table).await?;
        return Ok(true);
    }
    // Unaligned, it was counted once for each of the two clusters that it touches.
    let alone = |raw: u64| {
        let cluster = (raw & OFFSET_MASK) / layout.cluster_size();
        cluster > 0 && cluster < scanned.clusters && scanned.counts.count(cluster) == 1
    };
    if !found.l1.is_empty() {
        for finding in &found.l1 {
            let raw = match finding.wrong {
                Wrong::Unaligned { rounded } if alone(rounded) => rounded,
                _ => finding.raw,
            };
            file.write(finding.at, words(&layout, raw, None)).await?;
        }
        return Ok(true);
    }
    // Entries are mended before the file grows: what points past its end would name a copy then. But a table may lie on data; that
    // is copied away first.
    let is_data = found.data_clusters(&layout);
    let (on_data, apart): (Vec<_>, Vec<_>) =
        found.l2.iter().partition(|finding| is_data.contains(&(finding.at / layout.cluster_size())));
    let all_known = found.copies.len() < BATCH_MAX;
    let changed = if all_known && !apart.is_empty() {
        apart
    } else if copy(file, &layout, &found.copies, copies_left).await? {
        return Ok(true);
    } else if all_known {
        on_data
    } else {
        found.l2.iter().collect()
    };
    for finding in &changed {
        let (raw, bitmap) = match finding.wrong {
            Wrong::Unaligned { rounded } if layout.external_data || alone(rounded) => {
                (rounded, finding.rounded_bitmap)
            }
            _ => (finding.raw, finding.bitmap),
        };
        file.write(finding.at, words(&layout, raw, Some(bitmap))).await?;
    }
    Ok(!changed.is_empty())
}

/// What a scan found to mend.
struct Found {
    l1: Vec<WrongEntry>,
    l2: Vec<WrongEntry>,
    copies: Vec<Copy>,
    /// Clusters that an entry of the active tables names have a count, [`ROOM`] or [`PACKED`].
    active: Counts,
}

impl Found {
    fn new() -> Self {
        Self { l1: Vec::new(), l2: Vec::new(), copies: Vec::new(), active: Counts::new(PACKED) }
    }
}

/// Why something is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// It cannot stay where it is.
    Must,
    /// Two entries of the active state share it.
    Shared,
}

/// Bytes that copies may still take.
struct CopiesLeft {
    must: u64,
    shared: u64,
}

/// Something that is to lie elsewhere.
#[derive(Debug, Clone, Copy)]
struct Copy {
    entry: Entry,
    /// Byte offset, and bytes.
    from: u64,
    len: u64,
    /// Else it is an L1 entry.
    is_l2: bool,
    need: Need,
}

impl Observer for Found {
    fn wrong_l1(&mut self, finding: WrongEntry) {
        push(&mut self.l1, finding);
    }

    fn wrong_l2(&mut self, finding: WrongEntry) {
        push(&mut self.l2, finding);
    }

    fn over_l1(&mut self, at: u64, raw: u64) {
        self.copy_table(at, raw, Need::Must);
    }

    fn twice_l1(&mut self, at: u64, raw: u64) {
        self.copy_table(at, raw, Need::Shared);
    }

    fn l2(&mut self, entry: Entry, cluster: Cluster, named: Named, over: bool, scanned: &Scanned) {
        let (from, len, need) = match cluster {
            Cluster::Room { at, .. } if over || scanned.is_metadata(at) => (at, 0, Need::Must),
            Cluster::Compressed { at, len } if over || scanned.meets_metadata(at, len) => {
                (at, len, Need::Must)
            }
            Cluster::Room { at, .. } if named.active > 0 && self.is_twice(scanned.cluster(at)) => {
                (at, 0, Need::Shared)
            }
            Cluster::Compressed { at, len }
                if named.active > 0
                    && self.is_in_room(scanned.cluster(at)..=scanned.cluster(at + len.saturating_sub(1))) =>
            {
                (at, len, Need::Shared)
            }
            _ => return,
        };
        push(&mut self.copies, Copy { entry, from, len, is_l2: true, need });
    }
}

impl Found {
    fn copy_table(&mut self, at: u64, raw: u64, need: Need) {
        let entry = Entry { at, raw, bitmap: 0 };
        push(&mut self.copies, Copy { entry, from: raw & OFFSET_MASK, len: 0, is_l2: false, need });
    }

    /// The clusters whose data is to be copied.
    fn data_clusters(&self, layout: &Layout) -> BTreeSet<u64> {
        let cluster_size = layout.cluster_size();
        let copies = self.copies.iter().filter(|copy| copy.is_l2);
        copies
            .flat_map(|copy| {
                copy.from / cluster_size..=(copy.from + copy.len.saturating_sub(1)) / cluster_size
            })
            .collect()
    }

    /// Whether an entry of the active tables named the cluster before; from now on one did.
    fn is_twice(&mut self, cluster: u64) -> bool {
        let twice = self.active.count(cluster) > 0;
        // Where that does not fit in memory, the entries go on to share it.
        let _ = self.active.set(cluster, ROOM);
        twice
    }

    /// Whether an entry of the active tables named one of the clusters as its own; else they hold compressed bytes from now on, which
    /// share a cluster with others of their kind.
    fn is_in_room(&mut self, clusters: RangeInclusive<u64>) -> bool {
        if clusters.clone().any(|cluster| self.active.count(cluster) == ROOM) {
            return true;
        }
        for cluster in clusters {
            let _ = self.active.set(cluster, PACKED);
        }
        false
    }
}

fn push<T>(list: &mut Vec<T>, item: T) {
    if list.len() < BATCH_MAX {
        list.push(item);
    }
}

/// An entry as it lies in the file. `bitmap`: of an L2 entry, which has one where entries are extended.
fn words(layout: &Layout, raw: u64, bitmap: Option<u64>) -> Bytes {
    let mut words = raw.to_be_bytes().to_vec();
    if layout.extended_l2 {
        words.extend(bitmap.map(u64::to_be_bytes).into_iter().flatten());
    }
    words.into()
}

/// Copies to the end of the file what is referred to too often, and changes the entries; says whether anything changed.
async fn copy(
    file: &Arc<dyn Storage>,
    layout: &Layout,
    copies: &[Copy],
    copies_left: &mut CopiesLeft,
) -> Result<bool, FormatError> {
    let cluster_size = layout.cluster_size();
    let mut changed = false;
    let mut rest = copies.iter().peekable();
    while rest.peek().is_some() {
        let mut moved: Vec<(Copy, u64)> = Vec::new();
        let mut bytes = 0;
        let mut to = end_of_file(file, cluster_size);
        while bytes < COPY_BYTES_MAX
            && let Some(copy) = rest.next()
        {
            let len = if copy.len == 0 { cluster_size } else { copy.len };
            let room = len.next_multiple_of(cluster_size);
            let left = match copy.need {
                Need::Must => &mut copies_left.must,
                Need::Shared => &mut copies_left.shared,
            };
            let Some(less) = left.checked_sub(room) else { continue };
            *left = less;
            let data = read_padded(file.as_ref(), copy.from, len).await?;
            match file.write(to, data).await {
                Err(error) if copy.need == Need::Shared && is_no_space(&error) => {
                    *left = 0;
                    continue;
                }
                written => written?,
            }
            moved.push((*copy, to));
            to += room;
            bytes += room;
        }
        if moved.is_empty() {
            continue;
        }
        // The last cluster is whole, so that what is placed behind the file lies behind it.
        if file.len() < to {
            file.set_len(to).await?;
        }
        file.sync().await?;
        for (copy, to) in &moved {
            let raw = if copy.entry.raw & COMPRESSED != 0 {
                let offset_bits = 62 - (layout.cluster_bits - 8);
                let sectors = copy.len.div_ceil(SECTOR_BYTES);
                COMPRESSED | (sectors - 1) << offset_bits | to
            } else {
                copy.entry.raw & !OFFSET_MASK | COPIED | to
            };
            let bitmap = copy.is_l2.then_some(copy.entry.bitmap);
            file.write(copy.entry.at, words(layout, raw, bitmap)).await?;
        }
        file.sync().await?;
        changed = true;
    }
    Ok(changed)
}

/// Writes a snapshot table at the end of the file, and shows it. Refcounts know nothing of it yet.
async fn write_snapshots(
    file: &Arc<dyn Storage>,
    header: &mut Header,
    table: &Table,
) -> Result<(), FormatError> {
    let data = table.serialise(header.layout.image_size)?;
    let at = if data.is_empty() { 0 } else { end_of_file(file, header.layout.cluster_size()) };
    file.write(at, data.into()).await?;
    file.sync().await?;
    let count = u32::try_from(table.entries.len()).expect("at most 65536");
    let switch = header.change_fields(|fields| {
        fields.nb_snapshots = count;
        fields.snapshots_offset = at;
    });
    file.write(switch.at, switch.data).await?;
    file.sync().await?;
    Ok(())
}
