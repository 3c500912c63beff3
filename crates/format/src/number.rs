//! Conversions and roundings that cannot lose a bit.
//!
//! Not here: arithmetic on parsed values. It is checked where it is done.

// File offsets index memory in places that are bounded by a table's or a name's length; a 32-bit build could not hold the
// caches that this crate sizes, and is refused here rather than in every conversion.
const _: () = assert!(usize::BITS == u64::BITS);

/// `value` as an index or length in memory.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).expect("usize is 64 bits wide, asserted above")
}

/// A length in memory as a length in a file.
pub(crate) fn bytes(value: usize) -> u64 {
    u64::try_from(value).expect("usize is 64 bits wide, asserted above")
}

/// The next multiple of `step` (not 0) at or after `value`; `None` past the end of u64.
pub(crate) fn round_up(value: u64, step: u64) -> Option<u64> {
    value.checked_next_multiple_of(step)
}

/// The last multiple of `step` (not 0) at or before `value`.
pub(crate) fn round_down(value: u64, step: u64) -> u64 {
    value - value % step
}
