//! The pin's record: which version of the backing the image belongs to.
//!
//! A compat bit announces it and says where it ends: one at the very end of the header area, where neither the fields nor a backing
//! name written by QEMU reach, another where the backing name begins. So a change of the name has a place for the new record that
//! leaves the old one whole. The fixed part comes last, so that it is found from the end; the validator lies before it:
//!
//! | bytes from the record's end | field (little-endian) |
//! |---|---|
//! | 40..32 | magic `READONCE` |
//! | 32..28 | version, 1 |
//! | 28..24 | length of the whole record, bytes |
//! | 24..16 | FNV-1a hash of the backing name that the record belongs to |
//! | 16..8 | length of the backing's file, bytes |
//! | 8..4 | 0 |
//! | 4..0 | CRC32C of everything before it, validator first |
//!
//! - A record with a bad magic, version, length or CRC is no record; one of another name is no pin. Neither is an error:
//!   another program may have changed the name, and a crash may have torn the record.
//!
//! Not here: what the validator means.

use bytes::{BufMut, Bytes, BytesMut};
use readonce_storage::ReadAt;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::little_endian::{U32, U64},
};

use super::header::HEADER_BYTES;
use crate::{
    FormatError,
    driver::Pin,
    number::{bytes, index},
};

const MAGIC: [u8; 8] = *b"READONCE";
const VERSION: u32 = 1;
/// Bytes of the longest validator.
pub(super) const VALIDATOR_BYTES_MAX: u64 = 1024;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Fixed {
    magic: [u8; 8],
    version: U32,
    length: U32,
    name_hash: U64,
    backing_len: U64,
    zero: U32,
    crc: U32,
}

const FIXED_BYTES: u64 = 40;
const _: () = assert!(size_of::<Fixed>() == 40);

/// A record with a good CRC.
pub(super) struct Found {
    name_hash: u64,
    pin: Pin,
    /// Bytes of the whole record.
    pub(super) record_bytes: u64,
}

impl Found {
    /// The pin, if the record belongs to the backing of that name.
    pub(super) fn pin_for(self, name: &str) -> Option<Pin> {
        (self.name_hash == hash(name)).then_some(self.pin)
    }
}

/// Reads the record that ends at `end`; `None` where there is no good one.
pub(super) async fn read(file: &dyn ReadAt, end: u64) -> Result<Option<Found>, FormatError> {
    let Some(fixed_at) = end.checked_sub(FIXED_BYTES).filter(|&at| at >= HEADER_BYTES) else {
        return Ok(None);
    };
    let tail = file.read(fixed_at, index(FIXED_BYTES)).await?;
    let Ok(fixed) = Fixed::read_from_bytes(&tail) else { return Ok(None) };
    let record_bytes = u64::from(fixed.length.get());
    let whole = FIXED_BYTES..=FIXED_BYTES + VALIDATOR_BYTES_MAX;
    if fixed.magic != MAGIC || fixed.version.get() != VERSION || !whole.contains(&record_bytes) {
        return Ok(None);
    }
    let Some(start) = end.checked_sub(record_bytes).filter(|&at| at >= HEADER_BYTES) else {
        return Ok(None);
    };
    let validator = file.read(start, index(record_bytes - FIXED_BYTES)).await?;
    if fixed.crc.get() != crc(&validator, &fixed) {
        return Ok(None);
    }
    let pin = Pin { validator: validator.to_vec(), len: fixed.backing_len.get() };
    Ok(Some(Found { name_hash: fixed.name_hash.get(), pin, record_bytes }))
}

/// The record of `pin` for the backing of that name; it is written so that it ends where a compat bit says.
///
/// # Errors
/// `Invalid` where the validator is too long.
pub(super) fn encode(pin: &Pin, name: &str) -> Result<Bytes, FormatError> {
    let validator_bytes = bytes(pin.validator.len());
    if validator_bytes > VALIDATOR_BYTES_MAX {
        return Err(FormatError::Invalid(format!(
            "the validator is {validator_bytes} bytes long, at most {VALIDATOR_BYTES_MAX} fit"
        )));
    }
    let record_bytes = FIXED_BYTES + validator_bytes;
    let mut fixed = Fixed {
        magic: MAGIC,
        version: VERSION.into(),
        length: u32::try_from(record_bytes).expect("at most 1064").into(),
        name_hash: hash(name).into(),
        backing_len: pin.len.into(),
        zero: 0.into(),
        crc: 0.into(),
    };
    fixed.crc = crc(&pin.validator, &fixed).into();
    let mut record = BytesMut::with_capacity(index(record_bytes));
    record.put_slice(&pin.validator);
    record.put_slice(fixed.as_bytes());
    Ok(record.freeze())
}

fn crc(validator: &[u8], fixed: &Fixed) -> u32 {
    let (before_crc, _) = fixed.as_bytes().split_at(size_of::<Fixed>() - size_of::<U32>());
    crc32c::crc32c_append(crc32c::crc32c(validator), before_crc)
}

/// FNV-1a, 64 bits. It tells names apart that a person or QEMU wrote; it need not withstand an attacker, who could as well write
/// the record itself.
fn hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
