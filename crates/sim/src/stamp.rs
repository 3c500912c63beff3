//! Stamps: bytes that say which write they are of, and for which place they were meant.
//!
//! - A *cell* is the piece that the model tells apart: a sector, or less. It is filled with one number of eight bytes.
//! - The number's low bits are the cell's index, so that bytes at a wrong place are seen. 0 is a cell of zeros.

/// The stamp of zeros.
pub const ZERO: u64 = 0;
/// Set in stamps of the backing.
const BACKING: u64 = 1 << 63;
/// Bits of a cell's index.
const INDEX_BITS: u32 = 24;

/// The stamp of the `write`th write (from 1) at a cell.
pub fn of_write(write: u64, cell: u64) -> u64 {
    assert!(cell < 1 << INDEX_BITS);
    (write << INDEX_BITS) | cell
}

/// The stamp that `version` of the backing has at a cell; some stretches are zeros.
pub fn of_backing(version: u64, cell: u64) -> u64 {
    if (cell / 16) % 5 == 3 { ZERO } else { BACKING | of_write(version, cell) }
}

/// Fills cells of `cell_size` bytes, the first of which is `first`, by what `stamp` says of each.
pub fn fill(buf: &mut [u8], cell_size: u64, first: u64, stamp: impl Fn(u64) -> u64) {
    for (cell, bytes) in (first..).zip(buf.chunks_exact_mut(cell_size as usize)) {
        let stamp = stamp(cell).to_le_bytes();
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&stamp));
    }
}

/// The stamp of a cell, unless its bytes are of two.
pub fn of_bytes(bytes: &[u8]) -> Option<u64> {
    let (first, rest) = bytes.split_first_chunk::<8>()?;
    rest.chunks_exact(8).all(|word| word == first).then(|| u64::from_le_bytes(*first))
}
