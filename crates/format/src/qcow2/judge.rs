//! Judge: what an entry of an L1 or L2 table says, what of it is wrong, and how it is put right.
//!
//! - An entry is judged by itself, by the length of the file, and by where other tables lie. What it names is counted, and the observer is told.
//! - A wrong entry is told with what it should be: its bits put right, or naming nothing.
//!
//! Not here: which entries there are (`scan`), and writing them (`mend`).

use super::{
    entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO},
    extensions::be_u64,
    layout::{Layout, SECTOR_BYTES},
    scan::{Named, Observer, Scanned, TABLES_MAX},
};
use crate::{
    Finding, FormatError,
    number::{index, round_down},
};

const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
const L2_RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);
/// The half of a subcluster bitmap that says "allocated".
const BITMAP_ALLOCATED: u64 = 0xffff_ffff;

/// What an L2 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Nothing, or zeros; without room in the file.
    None,
    /// Room for the whole cluster at this offset. `data`: some of it shows, so that it cannot be given up.
    Room { at: u64, data: bool },
    /// These bytes of the file.
    Compressed { at: u64, len: u64 },
}

impl Cluster {
    /// Of an entry's words. `bitmap` is 0 without extended entries.
    pub(super) fn of(layout: &Layout, raw: u64, bitmap: u64) -> Self {
        if raw & COMPRESSED != 0 {
            let offset_bits = 62 - (layout.cluster_bits - 8);
            let at = raw & ((1 << offset_bits) - 1);
            let sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
            return Self::Compressed { at, len: (sectors + 1) * 512 - at % 512 };
        }
        let at = raw & OFFSET_MASK;
        if at == 0 && !(layout.external_data && raw & COPIED != 0) {
            return Self::None;
        }
        let data = if layout.extended_l2 { bitmap & BITMAP_ALLOCATED != 0 } else { raw & ZERO == 0 };
        Self::Room { at, data }
    }
}

/// Why something is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It can be put right without losing anything: bits that may not be set.
    Bits,
    /// The offset is not a multiple of the cluster size. Without its lowest bits the entry would be this.
    Unaligned { rounded: u64 },
    /// What it names lies past the end of the file, or can be nowhere.
    Nowhere,
}

/// An entry of an L1 or L2 table that is wrong, and how it is put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WrongEntry {
    /// Byte offset of the entry.
    pub(super) at: u64,
    /// The entry as it should be: bits put right, or naming nothing.
    pub(super) raw: u64,
    /// The second word of an extended L2 entry, as it should be.
    pub(super) bitmap: u64,
    /// The same, where an unaligned offset can be rounded.
    pub(super) rounded_bitmap: u64,
    /// Why.
    pub(super) wrong: Wrong,
}

/// A good entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Byte offset of the entry.
    pub(super) at: u64,
    /// The entry.
    pub(super) raw: u64,
    /// The second word of an extended L2 entry.
    pub(super) bitmap: u64,
}

/// The entries of a piece of an L2 table that are not all zeros.
pub(super) fn entries(layout: &Layout, at: u64, chunk: &[u8]) -> impl Iterator<Item = Entry> {
    let step = index(layout.entry_bytes());
    (at..).step_by(step).zip(chunk.chunks_exact(step)).filter_map(|(at, words)| {
        let (raw, bitmap) = words.split_at_checked(8)?;
        let entry = Entry { at, raw: be_u64(raw), bitmap: be_u64(bitmap) };
        (entry.raw != 0 || entry.bitmap != 0).then_some(entry)
    })
}

/// Judges an L1 entry, and counts and notes the table that it names.
pub(super) fn l1_entry(
    layout: &Layout,
    at: u64,
    raw: u64,
    named: Named,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    let offset = raw & OFFSET_MASK;
    let cluster_size = layout.cluster_size();
    let kept = raw & !L1_RESERVED & !(cluster_size - 1);
    let mut finding = None;
    if raw & L1_RESERVED != 0 {
        observer.found(Finding::L1Bits(raw));
        scanned.wrong(named.total);
        finding = Some((kept, Wrong::Bits));
    }
    let inside = scanned.refer(offset, cluster_size, named.total, observer)?;
    let over = scanned.over > 0;
    if !offset.is_multiple_of(cluster_size) {
        observer.found(Finding::TableUnaligned(offset));
        scanned.wrong(named.total);
        scanned.lost = true;
        finding = Some((0, Wrong::Unaligned { rounded: kept }));
    }
    if !inside || scanned.is_table(offset) {
        scanned.lost = true;
        finding = Some((0, Wrong::Nowhere));
    }
    let twice = named.active > 0 && scanned.tables.get(&offset).is_some_and(|table| table.active > 0);
    match finding {
        Some((raw, wrong)) => observer.wrong_l1(WrongEntry { at, raw, bitmap: 0, rounded_bitmap: 0, wrong }),
        None if over => observer.over_l1(at, raw),
        None if twice => observer.twice_l1(at, raw),
        None => {}
    }
    if inside {
        let table = scanned.tables.entry(offset).or_default();
        table.active += named.active;
        table.total += named.total;
        if scanned.tables.len() > TABLES_MAX {
            return Err(FormatError::Unsupported(format!(
                "the image has more than {TABLES_MAX} L2 tables, the most that can be checked"
            )));
        }
    }
    Ok(())
}

/// Judges an L2 entry, and counts what it names. `next`: where data would lie that follows the entry before.
pub(super) fn l2_entry(
    layout: &Layout,
    entry: Entry,
    named: Named,
    next: &mut Option<u64>,
    scanned: &mut Scanned,
    observer: &mut dyn Observer,
) -> Result<(), FormatError> {
    let Entry { at, raw, bitmap } = entry;
    let cluster_size = layout.cluster_size();
    let cluster = Cluster::of(layout, raw, bitmap);
    // The entry as it should be, and without what it names.
    let mut mended = entry;
    let has_zero_flag = layout.version >= 3;
    let reserved = if has_zero_flag { L2_RESERVED } else { L2_RESERVED | ZERO };
    let zero = if layout.extended_l2 { 0 } else { raw & ZERO & !reserved };
    let emptied = Entry { at, raw: zero, bitmap: bitmap & !BITMAP_ALLOCATED };
    let mut rounded_bitmap = 0;
    let mut wrong = None;
    if !matches!(cluster, Cluster::Compressed { .. }) && raw & reserved != 0 {
        observer.found(Finding::L2Bits(raw));
        scanned.wrong(named.total);
        mended.raw &= !reserved;
        wrong = Some(Wrong::Bits);
    }
    match cluster {
        Cluster::None => {
            if bitmap & BITMAP_ALLOCATED != 0 {
                observer.found(Finding::SubclustersNowhere);
                scanned.wrong(named.total);
                mended.bitmap &= !BITMAP_ALLOCATED;
                wrong = Some(Wrong::Bits);
            }
        }
        Cluster::Compressed { at: stream, len } => {
            if raw & COPIED != 0 {
                observer.found(Finding::CompressedCopied(stream));
                scanned.wrong(named.total);
                mended.raw &= !COPIED;
                wrong = Some(Wrong::Bits);
            }
            // Entries are as long as the tables are aligned.
            let index = at % cluster_size / layout.entry_bytes();
            if layout.external_data {
                observer.found(Finding::CompressedOutside { index, entry: raw });
                scanned.wrong(named.total);
                mended = Entry { at, raw: 0, bitmap: 0 };
                wrong = Some(Wrong::Nowhere);
            } else if bitmap != 0 {
                observer.found(Finding::CompressedSubclusters { index, entry: raw });
                scanned.wrong(named.total);
                scanned.lost = true;
                mended.bitmap = 0;
                wrong = Some(Wrong::Bits);
            } else {
                if !scanned.refer(stream, len, named.total, observer)? {
                    scanned.lost = true;
                    wrong = Some(Wrong::Bits);
                    match cut_stream(layout, mended.raw, stream, scanned.file_len) {
                        Some(cut) => mended.raw = cut,
                        None => {
                            mended = Entry { at, raw: 0, bitmap: 0 };
                            wrong = Some(Wrong::Nowhere);
                        }
                    }
                }
                scanned.allocated += named.active;
                scanned.fragmented += named.active;
                scanned.compressed += named.active;
            }
        }
        Cluster::Room { at: offset, .. } => {
            let both = bitmap & bitmap >> 32 & BITMAP_ALLOCATED;
            if both != 0 {
                observer.found(Finding::Subclusters(offset));
                scanned.wrong(named.total);
                mended.bitmap &= !(both << 32);
                wrong = Some(Wrong::Bits);
            }
            scanned.allocated += named.active;
            if next.is_some_and(|next| next != offset) {
                scanned.fragmented += named.active;
            }
            *next = offset.checked_add(cluster_size);
            if !offset.is_multiple_of(cluster_size) {
                observer.found(Finding::DataUnaligned(offset));
                scanned.wrong(named.total);
                scanned.lost = true;
                wrong = Some(Wrong::Unaligned { rounded: mended.raw & !(OFFSET_MASK & (cluster_size - 1)) });
                rounded_bitmap = mended.bitmap;
                mended = emptied;
            }
            if !layout.external_data && !scanned.refer(offset, cluster_size, named.total, observer)? {
                scanned.lost = true;
                wrong = Some(Wrong::Nowhere);
                mended = emptied;
            }
        }
    }
    match wrong {
        Some(wrong) => observer.wrong_l2(WrongEntry {
            at,
            raw: mended.raw,
            bitmap: mended.bitmap,
            rounded_bitmap,
            wrong,
        }),
        None if cluster != Cluster::None && !layout.external_data => {
            observer.l2(entry, cluster, named, scanned.over > 0, scanned)
        }
        None => {}
    }
    Ok(())
}

/// The entry of a compressed cluster whose stream begins inside the file, cut to end there. `None`: it begins behind it.
fn cut_stream(layout: &Layout, raw: u64, stream: u64, file_len: u64) -> Option<u64> {
    let offset_bits = 62 - (layout.cluster_bits - 8);
    let sectors =
        file_len.checked_sub(round_down(stream, SECTOR_BYTES)).filter(|&left| left > 0)? / SECTOR_BYTES;
    Some(raw & (COMPRESSED | ((1 << offset_bits) - 1)) | (sectors - 1) << offset_bits)
}
