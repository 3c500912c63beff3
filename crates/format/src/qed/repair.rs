//! Repair: entries that may not be there, clusters that two entries use, clusters that none uses.
//!
//! - An invalid entry becomes 0: the backing shows through again.
//! - Data that an L1 entry takes for a table is copied before anything in that table is mended.
//! - Of two references to a cluster the first in table order stays; the other is given a copy of its own at the end of the file, so that
//!   the guest reads what it read before. A table that two L1 entries name is copied too, and then its data. Copies may at most
//!   double the file; what is left beyond that stays counted as corrupt.
//! - Leaks are freed by moving the file's last clusters into the holes, and cutting the file. A table moves only into a
//!   hole as long as itself; where there is none, one is made by moving what lies there to the end of the file. The L1
//!   table moves only where another program put it elsewhere than behind the header, and holes stay else (`move_l1`).
//!
//! Every move is copy, sync, relink, sync: a crash leaves the old reference or the new one, both good. An entry is
//! rewritten in one sector. A cluster that a move vacates is used again only after the second sync.
//!
//! - Memory: the bitmap of `scan`, and [`BATCH_MAX`] places at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use readonce_storage::Storage;
use zerocopy::IntoBytes;

use super::{
    check::{count, tell_leaks},
    header::{FEATURE_NEED_CHECK, Header},
    layout::Layout,
    move_l1::move_l1,
    scan::{Beyond, Bitmap, Place, Scanned, Wrong, scan},
};
use crate::{
    FormatError,
    driver::{CheckReport, Repair},
    finding::Tell,
    number::{bytes, index},
};

/// Findings, or places of clusters, that are kept in memory at once; more take another scan.
const BATCH_MAX: usize = 1 << 16;
/// Bytes that are copied between two syncs, but for one unit that is larger.
const MOVE_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are in memory while a unit is copied.
pub(super) const COPY_BYTES: u64 = 1 << 20;

const _: () = assert!(BATCH_MAX * size_of::<(u64, Place)>() <= 4 << 20);

/// Repairs the image; tells what was wrong, and the report tells the state after it.
pub(super) async fn repair(
    file: &Arc<dyn Storage>,
    what: Repair,
    tell: Tell<'_>,
) -> Result<CheckReport, FormatError> {
    let mut header = Header::read(file.as_ref()).await?;
    let mut layout = header.layout;
    let (mut report, scanned) = count(file.as_ref(), &layout, tell).await?;
    if report.leaks > 0 {
        tell_leaks(file.len(), &layout, &scanned, tell);
    }
    drop(scanned);
    if report.check_errors > 0 {
        return Ok(report);
    }
    let mut corruptions_fixed = 0;
    if what == Repair::All && report.corruptions > 0 {
        corruptions_fixed = mend(file, &layout).await?;
        report = count(file.as_ref(), &layout, &mut |_| {}).await?.0;
    }
    let mut leaks_fixed = 0;
    // While two entries use one cluster, moving it for one of them would not be right for the other.
    if report.corruptions == 0 && report.leaks > 0 {
        let leaks = report.leaks;
        if !compact(file, &layout).await? && free_l1(file, &mut header).await? {
            layout = header.layout;
            compact(file, &layout).await?;
        }
        report = count(file.as_ref(), &layout, &mut |_| {}).await?.0;
        leaks_fixed = leaks.saturating_sub(report.leaks);
    }
    let changed = corruptions_fixed > 0 || leaks_fixed > 0;
    let unmark = header.need_check() && report.corruptions == 0 && report.check_errors == 0;
    if changed || unmark {
        file.sync().await?;
        let mut sector = header.sector;
        let fields = &mut sector.fields;
        if unmark {
            fields.features = (fields.features.get() & !FEATURE_NEED_CHECK).into();
        }
        fields.clear_foreign();
        let wrong = report.leaks + report.corruptions + report.check_errors;
        let clean = wrong == 0 && !fields.need_check();
        fields.set_clean_end(clean.then(|| file.len()));
        file.write(0, Bytes::copy_from_slice(sector.as_bytes())).await?;
        file.sync().await?;
    }
    report.corruptions_fixed = corruptions_fixed;
    report.leaks_fixed = leaks_fixed;
    Ok(report)
}

/// Moves the L1 table out of the way of holes, where there is space for that; says whether it moved.
async fn free_l1(file: &Arc<dyn Storage>, header: &mut Header) -> Result<bool, FormatError> {
    let l1 = header.layout.l1_offset;
    match move_l1(file, header).await {
        Ok(_) | Err(FormatError::NoSpace(_)) => Ok(header.layout.l1_offset != l1),
        Err(error) => Err(error),
    }
}

/// One unit (a data cluster or an L2 table) that is to lie elsewhere.
#[derive(Debug, Clone, Copy)]
struct Move {
    /// The entry that names it.
    place: Place,
    /// Byte offsets.
    from: u64,
    to: u64,
}

impl Move {
    fn len(&self, layout: &Layout) -> u64 {
        unit_clusters(layout, &self.place) * layout.cluster_size
    }
}

/// Clusters of what an entry names.
fn unit_clusters(layout: &Layout, place: &Place) -> u64 {
    match place {
        Place::L1(_) => layout.table_size,
        Place::L2 { .. } => 1,
    }
}

/// Moves the units that reach into a range of the file, a few clusters long, to the file's end.
pub(super) async fn move_units_away(
    file: &Arc<dyn Storage>,
    layout: &Layout,
    range: Range<u64>,
) -> Result<(), FormatError> {
    let cluster_size = layout.cluster_size;
    let mut owners = owners(file, layout, range.start / cluster_size, range.end / cluster_size).await?;
    while let Some((at, place)) = owners.pop_first() {
        let unit = Move { place, from: at * cluster_size, to: layout.whole_clusters_end(file.len()) };
        move_units(file, layout, &[unit]).await?;
        if let Place::L1(moved) = place {
            relocate(&mut owners, moved, unit.to);
        }
    }
    Ok(())
}

/// Copies units and relinks them. Nothing may use what `to` names.
async fn move_units(file: &Arc<dyn Storage>, layout: &Layout, moves: &[Move]) -> Result<(), FormatError> {
    if moves.is_empty() {
        return Ok(());
    }
    for unit in moves {
        let len = unit.len(layout);
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(COPY_BYTES);
            let copied = file.read(unit.from + done, index(piece)).await?;
            file.write(unit.to + done, copied).await?;
            done += piece;
        }
    }
    file.sync().await?;
    for unit in moves {
        file.write(unit.place.offset(layout), Bytes::copy_from_slice(&unit.to.to_le_bytes())).await?;
    }
    Ok(file.sync().await?)
}

/// Mends wrong entries; returns how many corruptions, as `check` counts them.
///
/// Of a cluster that one entry takes for a table and another for data, nobody knows which it is. So the data is copied before anything is
/// written there, and what is wrong elsewhere goes before that: an entry past the file's end would become valid when the file grows.
async fn mend(file: &Arc<dyn Storage>, layout: &Layout) -> Result<u64, FormatError> {
    let mut copies_left = layout.whole_clusters_end(file.len()) / layout.cluster_size;
    let data = data_in_tables(file, layout, copies_left).await?;
    let mut fixed = clear_invalid(file, layout, &data).await?;
    move_units(file, layout, &data).await?;
    copies_left -= bytes(data.len());
    fixed += bytes(data.len());
    loop {
        let mut findings = Vec::new();
        let note = |place, raw, finding| {
            if findings.len() < BATCH_MAX {
                findings.push((place, raw, finding));
            }
        };
        let scanned = scan(file.as_ref(), layout, Beyond::Wrong, note, |_, _| {}).await?;
        if scanned.check_errors > 0 {
            return Ok(fixed);
        }
        let fixed_before = fixed;
        let mut moves: Vec<Move> = Vec::new();
        let mut end = scanned.used.clusters() * layout.cluster_size;
        let mut moved_bytes = 0;
        for (place, raw, finding) in findings {
            match finding {
                Wrong::Invalid => {
                    file.write(place.offset(layout), Bytes::from_static(&[0; 8])).await?;
                    fixed += 1;
                }
                Wrong::Double(times) => {
                    let unit = Move { place, from: raw, to: end };
                    let Some(left) = copies_left.checked_sub(unit_clusters(layout, &place)) else { continue };
                    copies_left = left;
                    end += unit.len(layout);
                    moved_bytes += unit.len(layout);
                    moves.push(unit);
                    fixed += times;
                    if moved_bytes >= MOVE_BYTES_MAX {
                        move_units(file, layout, &moves).await?;
                        moves.clear();
                        moved_bytes = 0;
                    }
                }
            }
        }
        move_units(file, layout, &moves).await?;
        if fixed == fixed_before {
            return Ok(fixed);
        }
        file.sync().await?;
    }
}

/// Moves for data that lies in tables, to the file's end: at most [`BATCH_MAX`], and as many as may be copied.
async fn data_in_tables(
    file: &Arc<dyn Storage>,
    layout: &Layout,
    copies_max: u64,
) -> Result<Vec<Move>, FormatError> {
    let cluster_size = layout.cluster_size;
    let end = layout.whole_clusters_end(file.len());
    let mut tables = Bitmap::new(end / cluster_size)?;
    let seen = |place, offset: u64| {
        if matches!(place, Place::L1(_)) {
            let first = offset / cluster_size;
            (first..first + layout.table_size).for_each(|cluster| {
                tables.set(cluster);
            });
        }
    };
    all_read(&scan(file.as_ref(), layout, Beyond::Wrong, |_, _, _| {}, seen).await?)?;
    let mut moves: Vec<Move> = Vec::new();
    let note = |place, raw, finding| {
        let is_data = matches!((place, finding), (Place::L2 { .. }, Wrong::Double(_)));
        let room = moves.len() < BATCH_MAX && bytes(moves.len()) < copies_max;
        if is_data && room && tables.is_set(raw / cluster_size) {
            moves.push(Move { place, from: raw, to: end + bytes(moves.len()) * cluster_size });
        }
    };
    all_read(&scan(file.as_ref(), layout, Beyond::Wrong, note, |_, _| {}).await?)?;
    Ok(moves)
}

/// Clears entries that hold what may not be there, but for those of tables that hold what `data` moves; returns how many.
async fn clear_invalid(file: &Arc<dyn Storage>, layout: &Layout, data: &[Move]) -> Result<u64, FormatError> {
    let data: BTreeSet<u64> = data.iter().map(|unit| unit.from).collect();
    let holds_data =
        |table: u64| data.range(table..table.saturating_add(layout.table_bytes())).next().is_some();
    let mut cleared = 0;
    loop {
        let mut places = Vec::new();
        let note = |place, _, finding| {
            let in_doubt = matches!(place, Place::L2 { table, .. } if holds_data(table));
            if finding == Wrong::Invalid && !in_doubt && places.len() < BATCH_MAX {
                places.push(place);
            }
        };
        let scanned = scan(file.as_ref(), layout, Beyond::Wrong, note, |_, _| {}).await?;
        all_read(&scanned)?;
        if places.is_empty() {
            return Ok(cleared);
        }
        for place in &places {
            file.write(place.offset(layout), Bytes::from_static(&[0; 8])).await?;
        }
        file.sync().await?;
        cleared += bytes(places.len());
    }
}

/// Moves clusters until no hole is left, and cuts the file. `false` where holes stay: a table is wrong or cannot be read,
/// or only the L1 table could fill them. Nothing else may use the file.
pub(super) async fn compact(file: &Arc<dyn Storage>, layout: &Layout) -> Result<bool, FormatError> {
    let first = layout.header_bytes / layout.cluster_size;
    let mut window_last = None;
    loop {
        let (report, scanned) = count(file.as_ref(), layout, &mut |_| {}).await?;
        if report.corruptions > 0 || report.check_errors > 0 {
            return Ok(false);
        }
        let mut pass = Pass { file, layout, first, used: scanned.used, owners: BTreeMap::new() };
        let end = pass.used.last_set(u64::MAX).map_or(first, |last| last + 1).max(first);
        if pass.used.next_free(first).is_none_or(|hole| hole >= end) {
            // Only what lies behind the last cluster is free.
            if report.leaks > 0 {
                file.set_len(end * layout.cluster_size).await?;
                file.sync().await?;
            }
            return Ok(true);
        }
        let start = pass.tail_start(first + pass.used.count_set(first));
        pass.owners = owners(file, layout, start, u64::MAX).await?;
        match pass.run(window_last).await? {
            Progress::Moved => {}
            Progress::Window(hole) => window_last = Some(hole),
            Progress::Stuck => {
                // A hole stays that nothing fits; what is free behind the last cluster goes all the same.
                file.set_len(end * layout.cluster_size).await?;
                file.sync().await?;
                return Ok(false);
            }
        }
    }
}

/// The units that reach into `start..end` (clusters), by their first cluster; at most as many as fit in memory, from `start` on.
/// One that is missing would be written over: a table that cannot be read is an error here.
async fn owners(
    file: &Arc<dyn Storage>,
    layout: &Layout,
    start: u64,
    end: u64,
) -> Result<BTreeMap<u64, Place>, FormatError> {
    let mut owners = BTreeMap::new();
    let seen = |place, offset: u64| {
        let at = offset / layout.cluster_size;
        if at < end && at + unit_clusters(layout, &place) > start {
            owners.insert(at, place);
        }
    };
    let scanned = scan(file.as_ref(), layout, Beyond::Wrong, |_, _, _| {}, seen).await?;
    all_read(&scanned)?;
    Ok(owners)
}

fn all_read(scanned: &Scanned) -> Result<(), FormatError> {
    match scanned.check_errors {
        0 => Ok(()),
        _ => Err(FormatError::Io(std::io::Error::other("a table cannot be read"))),
    }
}

enum Progress {
    /// Something moved, or what remains is known only after another scan.
    Moved,
    /// A table moved into a window made for it at this cluster.
    Window(u64),
    /// No way on.
    Stuck,
}

/// One pass over the tail.
struct Pass<'a> {
    file: &'a Arc<dyn Storage>,
    layout: &'a Layout,
    /// The first cluster behind the header area.
    first: u64,
    used: Bitmap,
    /// The units of the tail, by their first cluster.
    owners: BTreeMap<u64, Place>,
}

impl Pass<'_> {
    /// Where the tail begins whose units this pass looks at: not below `target`, where the image will end, and with no
    /// more units than fit in memory.
    fn tail_start(&self, target: u64) -> u64 {
        let mut start = u64::MAX;
        for _ in 0..BATCH_MAX {
            match self.used.last_set(start) {
                Some(at) if at >= target => start = at,
                _ => break,
            }
        }
        start
    }

    async fn run(&mut self, window_last: Option<u64>) -> Result<Progress, FormatError> {
        let mut moves: Vec<Move> = Vec::new();
        let mut moved_bytes = 0;
        let mut any = false;
        let mut end = u64::MAX;
        let mut hole_start = self.first;
        while let Some(top) = self.used.last_set(end) {
            end = top + 1;
            let Some(hole) = self.used.next_free(hole_start).filter(|&hole| hole < top) else { break };
            hole_start = hole;
            let unit = self.owners.range(..=top).next_back().map(|(&at, &place)| (at, place));
            let Some((at, place)) = unit.filter(|(at, place)| at + unit_clusters(self.layout, place) > top)
            else {
                break;
            };
            if matches!(place, Place::L1(_)) {
                move_units(self.file, self.layout, &moves).await?;
                moves.clear();
                any = true;
                match self.hole_for_table(hole, at) {
                    Some(to) => self.move_unit(at, place, to).await?,
                    None => return self.make_window(hole, at, place, end, window_last).await,
                }
                continue;
            }
            moves.push(self.plan(at, place, hole));
            any = true;
            moved_bytes += self.layout.cluster_size;
            if moved_bytes >= MOVE_BYTES_MAX {
                move_units(self.file, self.layout, &moves).await?;
                moves.clear();
                moved_bytes = 0;
            }
        }
        move_units(self.file, self.layout, &moves).await?;
        Ok(if any { Progress::Moved } else { Progress::Stuck })
    }

    /// Notes that a unit goes from cluster `at` to `to`. What it vacates lies above every later hole of this pass, so it
    /// is not used again before the move is done.
    fn plan(&mut self, at: u64, place: Place, to: u64) -> Move {
        let clusters = unit_clusters(self.layout, &place);
        (at..at + clusters).for_each(|cluster| self.used.clear(cluster));
        (to..to + clusters).for_each(|cluster| {
            self.used.set(cluster);
        });
        self.owners.remove(&at);
        let cluster_size = self.layout.cluster_size;
        Move { place, from: at * cluster_size, to: to * cluster_size }
    }

    /// Moves one unit at once. Entries of a table lie elsewhere afterwards.
    async fn move_unit(&mut self, at: u64, place: Place, to: u64) -> Result<(), FormatError> {
        let unit = self.plan(at, place, to);
        move_units(self.file, self.layout, &[unit]).await?;
        if let Place::L1(moved) = place {
            relocate(&mut self.owners, moved, unit.to);
        }
        Ok(())
    }

    /// The first hole from `start` on, below `end`, that a table fits in.
    fn hole_for_table(&self, start: u64, end: u64) -> Option<u64> {
        let mut at = start;
        loop {
            let hole = self.used.next_free(at)?;
            let hole_end = self.used.next_set(hole)?;
            if hole >= end {
                return None;
            }
            if hole_end.min(end) - hole >= self.layout.table_size {
                return Some(hole);
            }
            at = hole_end;
        }
    }

    /// Moves what lies in the first `table_size` clusters from the lowest hole on to `end`, and the table at `at` there. Every
    /// window lies above the last one, so this ends.
    async fn make_window(
        &mut self,
        hole: u64,
        at: u64,
        table: Place,
        end: u64,
        window_last: Option<u64>,
    ) -> Result<Progress, FormatError> {
        let layout = self.layout;
        let window_end = hole + layout.table_size;
        let l1 = layout.l1_offset / layout.cluster_size;
        let meets_l1 = hole < l1 + layout.table_size && l1 < window_end;
        if meets_l1 || window_last.is_some_and(|last| hole <= last) {
            return Ok(Progress::Stuck);
        }
        self.owners = owners(self.file, layout, hole, window_end).await?;
        let mut free = end.max(window_end);
        let mut table_at = at;
        while let Some((&unit_at, &place)) = self.owners.first_key_value() {
            let clusters = unit_clusters(layout, &place);
            self.used.grow(free + clusters);
            self.move_unit(unit_at, place, free).await?;
            if place == table {
                table_at = free;
            }
            free += clusters;
        }
        self.move_unit(table_at, table, hole).await?;
        Ok(Progress::Window(hole))
    }
}

/// The entries of a table that moved lie in its new place.
fn relocate(owners: &mut BTreeMap<u64, Place>, moved: u64, to: u64) {
    for place in owners.values_mut() {
        if let Place::L2 { l1_index, table, .. } = place
            && *l1_index == moved
        {
            *table = to;
        }
    }
}
