//! L1 table in memory: which L2 table maps which part of the guest.
//!
//! - Read in pieces of 4 KiB when first needed, or as a whole for writing; at most 32 MiB.
//! - An entry is checked once, when it is read. One that may not be there is kept as it is; using it is `Corrupt`.
//!
//! Not here: when a changed entry reaches the file (`links`, `flush`).

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use bytes::{BufMut, Bytes, BytesMut};
use readonce_storage::{
    ReadAt,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    entry::{COPIED, OFFSET_MASK},
    header::Header,
    layout::{L1_ENTRY_BYTES, Layout, SECTOR_BYTES},
    slice::raw_entries,
};
use crate::{FormatError, number::index};

/// Entries that are read together: 4 KiB.
const PIECE_ENTRIES: u64 = 512;
/// Entries of a sector.
pub(super) const SECTOR_ENTRIES: u64 = SECTOR_BYTES / L1_ENTRY_BYTES;
/// Entries that are read at once where all are wanted: 1 MiB.
const BULK_ENTRIES: u64 = 1 << 17;
/// In memory only: the file holds something that may not be there.
const BAD: u64 = 1 << 1;

/// An entry, decoded: the offset of an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum L1Entry {
    /// No table.
    Absent,
    /// Used by nothing else.
    Own(u64),
    /// Something else uses it too.
    Shared(u64),
}

impl L1Entry {
    /// As the file holds it.
    pub(super) fn word(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Own(table) => table | COPIED,
            Self::Shared(table) => table,
        }
    }

    fn decode(word: u64) -> Self {
        match (word & OFFSET_MASK, word & COPIED) {
            (0, _) => Self::Absent,
            (table, 0) => Self::Shared(table),
            (table, _) => Self::Own(table),
        }
    }
}

struct Piece {
    words: Box<[AtomicU64]>,
    /// What the file holds where an entry is bad.
    bad: BTreeMap<u64, u64>,
}

/// The table.
pub(super) struct L1 {
    file: Arc<dyn ReadAt>,
    layout: Layout,
    /// Byte offset of the table.
    offset: u64,
    /// All entries, those past the guest's end included.
    entries: u64,
    pieces: Box<[OnceLock<Piece>]>,
    load: tokio::sync::Mutex<()>,
}

impl L1 {
    /// The table of an image. Reads nothing.
    pub(super) fn new(file: Arc<dyn ReadAt>, header: &Header) -> Self {
        let entries = u64::from(header.fields.l1_size);
        let pieces = entries.div_ceil(PIECE_ENTRIES);
        Self {
            file,
            layout: header.layout,
            offset: header.fields.l1_table_offset,
            entries,
            pieces: std::iter::repeat_with(OnceLock::new).take(index(pieces)).collect(),
            load: tokio::sync::Mutex::new(()),
        }
    }

    /// Where the table lies: from, to.
    pub(super) fn region(&self) -> (u64, u64) {
        (self.offset, self.offset + self.entries * L1_ENTRY_BYTES)
    }

    fn piece(&self, words: impl Iterator<Item = u64>, mut valid: impl FnMut(u64) -> bool) -> Piece {
        let mut bad = BTreeMap::new();
        let words = (0..).zip(words).map(|(at, word)| {
            let table = word & OFFSET_MASK;
            let known = word & !(OFFSET_MASK | COPIED) == 0;
            if known && (table == 0 || valid(word)) {
                return AtomicU64::new(word);
            }
            bad.insert(at, word);
            AtomicU64::new(BAD)
        });
        Piece { words: words.collect(), bad }
    }

    /// Whether a table may lie there, in a file of `file_len` bytes: what the end of the file cuts off of its last cluster is zeros.
    fn inside(&self, word: u64, file_len: u64) -> bool {
        let table = word & OFFSET_MASK;
        self.layout.valid_cluster(table) && table < file_len
    }

    async fn read(&self, first: u64, count: u64) -> Result<Bytes, FormatError> {
        let count = count.min(self.entries - first);
        let at = self.offset + first * L1_ENTRY_BYTES;
        Ok(self.file.read(at, index(count * L1_ENTRY_BYTES)).await?)
    }

    /// Reads all of the table, once, before anything else is asked; `valid` is asked of every word that names a table
    /// inside the file.
    pub(super) async fn load_all(&self, mut valid: impl FnMut(u64) -> bool) -> Result<(), FormatError> {
        let file_len = self.file.len();
        let mut first = 0;
        while first < self.entries {
            let read = self.read(first, BULK_ENTRIES).await?;
            let mut words = raw_entries(&read, false).map(|raw| raw.word).peekable();
            let mut at = first / PIECE_ENTRIES;
            while words.peek().is_some() {
                let piece = self.piece(words.by_ref().take(index(PIECE_ENTRIES)), |word| {
                    self.inside(word, file_len) && valid(word)
                });
                if let Some(place) = self.pieces.get(index(at)) {
                    place.get_or_init(|| piece);
                }
                at += 1;
            }
            first += BULK_ENTRIES;
        }
        Ok(())
    }

    fn loaded(&self, l1_index: u64) -> Option<&Piece> {
        self.pieces.get(index(l1_index / PIECE_ENTRIES))?.get()
    }

    fn in_piece(&self, piece: &Piece, l1_index: u64) -> Result<L1Entry, FormatError> {
        let word = piece.words.get(index(l1_index % PIECE_ENTRIES)).map(|word| word.load(Ordering::Acquire));
        match word {
            Some(word) if word != BAD => Ok(L1Entry::decode(word)),
            _ => Err(self.corrupt(piece, l1_index)),
        }
    }

    fn corrupt(&self, piece: &Piece, l1_index: u64) -> FormatError {
        let word = piece.bad.get(&(l1_index % PIECE_ENTRIES)).copied().unwrap_or_default();
        FormatError::corrupt(
            format!("L1 entry {l1_index}"),
            format!("{word:#x}"),
            "must be 0, or the offset of an L2 table inside the file that lies in no other table",
        )
    }

    /// The entry, if its piece is in memory.
    pub(super) fn entry_now(&self, l1_index: u64) -> Option<Result<L1Entry, FormatError>> {
        Some(self.in_piece(self.loaded(l1_index)?, l1_index))
    }

    /// The entry, read if need be.
    pub(super) async fn entry(&self, l1_index: u64) -> Result<L1Entry, FormatError> {
        if let Some(entry) = self.entry_now(l1_index) {
            return entry;
        }
        let place = self.pieces.get(index(l1_index / PIECE_ENTRIES)).ok_or_else(|| {
            FormatError::corrupt("l1_size", self.entries, format!("must be more than {l1_index}"))
        })?;
        let _one_at_a_time = self.load.lock().await;
        if place.get().is_none() {
            let file_len = self.file.len();
            let read = self.read(l1_index - l1_index % PIECE_ENTRIES, PIECE_ENTRIES).await?;
            let words = raw_entries(&read, false).map(|raw| raw.word);
            let piece = self.piece(words, |word| self.inside(word, file_len));
            place.get_or_init(|| piece);
        }
        let piece = place.get().expect("just put there");
        self.in_piece(piece, l1_index)
    }

    /// Entries without a table from `l1_index` on, as far as its piece goes and at most `count_max`.
    pub(super) fn absent_run(&self, l1_index: u64, count_max: u64) -> u64 {
        let Some(piece) = self.loaded(l1_index) else { return 0 };
        let run = piece.words.iter().skip(index(l1_index % PIECE_ENTRIES)).take(index(count_max));
        let run = run.take_while(|word| word.load(Ordering::Acquire) & OFFSET_MASK == 0);
        crate::number::bytes(run.take_while(|word| word.load(Ordering::Acquire) != BAD).count())
    }

    /// Changes an entry whose piece is in memory.
    pub(super) fn set(&self, l1_index: u64, entry: L1Entry) {
        let piece = self.loaded(l1_index).expect("an entry is read before it is changed");
        let word = piece.words.get(index(l1_index % PIECE_ENTRIES)).expect("an entry that was read");
        word.store(entry.word(), Ordering::Release);
    }

    /// Where the sector of the table that holds an entry lies, and what the file is to hold there; `other` names what it is
    /// to hold for an entry instead of what memory has. The piece is in memory.
    pub(super) fn sector(&self, l1_index: u64, other: impl Fn(u64) -> Option<u64>) -> (u64, Bytes) {
        let first = l1_index - l1_index % SECTOR_ENTRIES;
        let mut out = BytesMut::with_capacity(index(SECTOR_BYTES));
        for at in first..(first + SECTOR_ENTRIES).min(self.entries) {
            let piece = self.loaded(at).expect("a sector lies in one piece");
            let in_piece = at % PIECE_ENTRIES;
            let word = piece.words.get(index(in_piece)).map_or(0, |word| word.load(Ordering::Acquire));
            let word = if word == BAD { piece.bad.get(&in_piece).copied().unwrap_or_default() } else { word };
            out.put_u64(other(at).unwrap_or(word));
        }
        (self.offset + first * L1_ENTRY_BYTES, out.freeze())
    }
}
