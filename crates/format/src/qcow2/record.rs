//! The record: what readonce keeps in an image beyond the specification, in a header extension of its own.
//!
//! QEMU keeps the extension when it rewrites the header, and ignores what it says.
//!
//! | bytes | field (big-endian) |
//! |---|---|
//! | 0 | the in-use mark: 1 while readonce has the image open and has allocated in it, else 0 |
//! | 1 | version, 1 |
//! | 2..4 | flags: bit 0, copy-on-read is the image's default; bit 1, there is a pin; bit 2, there is a whole name |
//! | 4..8 | where the payload begins, counted from byte 0 |
//! | 8..16 | FNV-1a hash of the stored backing name that pin and whole name belong to |
//! | 16..24 | length of the backing's file, bytes |
//! | 24..26 | length of the validator, bytes |
//! | 26..28 | length of the whole name, bytes |
//! | 28..36 | 0 |
//! | 36..40 | CRC32C of bytes 1..36 and of the payload |
//! | payload | the validator, then the whole backing name |
//!
//! - The mark is changed in place, alone, and is not covered by the CRC.
//! - Pin and whole name of another stored name count for nothing: another program has changed the name.
//! - A record with an unknown version or a bad CRC says nothing. Neither is an error.
//! - Bytes of the extension outside of these mean nothing: a rewrite of the header passes through such a state (`change`).
//!
//! Not here: what the validator means.

use bytes::{BufMut, Bytes, BytesMut};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use crate::{FormatError, driver::Pin, number::bytes};

const VERSION: u8 = 1;
const FLAG_COPY_ON_READ: u16 = 0x01;
const FLAG_PIN: u16 = 0x02;
const FLAG_WHOLE_NAME: u16 = 0x04;
/// Bytes of the longest validator.
pub(super) const VALIDATOR_BYTES_MAX: u64 = 1024;
/// Bytes of the longest whole backing name.
pub(super) const WHOLE_NAME_BYTES_MAX: u64 = 4095;
/// Bytes before the payload.
pub(super) const FIXED_BYTES: u64 = 40;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Fixed {
    mark: u8,
    version: u8,
    flags: U16,
    payload_at: U32,
    name_hash: U64,
    backing_len: U64,
    validator_bytes: U16,
    name_bytes: U16,
    zero: U64,
    crc: U32,
}

const _: () = assert!(size_of::<Fixed>() == 40);

/// What the record says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Whether the image was in use, and has not been closed clean since.
    pub(super) in_use: bool,
    /// The image's copy-on-read default.
    pub(super) copy_on_read: bool,
    /// The pinned version of the backing.
    pub(super) pin: Option<Pin>,
    /// The backing name, where the header cannot hold it.
    pub(super) whole_name: Option<String>,
}

impl Record {
    /// Reads the data of our extension, in an image whose header stores this backing name (empty without one).
    pub(super) fn parse(data: &[u8], stored_name: &str) -> Self {
        let nothing = Self::default();
        let Ok((fixed, _)) = Fixed::read_from_prefix(data) else { return nothing };
        let nothing = Self { in_use: fixed.mark != 0, ..nothing };
        if fixed.version != VERSION {
            return nothing;
        }
        let (validator_bytes, name_bytes) =
            (usize::from(fixed.validator_bytes.get()), usize::from(fixed.name_bytes.get()));
        let payload = usize::try_from(fixed.payload_at.get())
            .ok()
            .and_then(|at| data.get(at..))
            .and_then(|rest| rest.get(..validator_bytes + name_bytes));
        let Some(payload) = payload.filter(|payload| crc(&fixed, payload) == fixed.crc.get()) else {
            return nothing;
        };
        let flags = fixed.flags.get();
        let mut found = Self { copy_on_read: flags & FLAG_COPY_ON_READ != 0, ..nothing };
        if fixed.name_hash.get() != hash(stored_name) {
            return found;
        }
        let (validator, name) = payload.split_at(validator_bytes);
        if flags & FLAG_PIN != 0 && bytes(validator_bytes) <= VALIDATOR_BYTES_MAX {
            found.pin = Some(Pin { validator: validator.to_vec(), len: fixed.backing_len.get() });
        }
        if flags & FLAG_WHOLE_NAME != 0 && bytes(name_bytes) <= WHOLE_NAME_BYTES_MAX {
            let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty() && !name.contains('\0'));
            // What other programs show of the backing must not be another one.
            found.whole_name = name.filter(|name| name.starts_with(stored_name)).map(str::to_owned);
        }
        found
    }

    /// Where the payload begins in the data of our extension; `None` where that is not ours, or says nothing.
    pub(super) fn payload_at(data: &[u8]) -> Option<u64> {
        let (fixed, _) = Fixed::read_from_prefix(data).ok()?;
        (fixed.version == VERSION).then(|| fixed.payload_at.get().into())
    }

    /// The fixed part and the payload, for an image whose header stores this backing name (empty without one). The payload
    /// is to lie `payload_at` bytes behind the fixed part's beginning.
    ///
    /// # Errors
    /// `Invalid` where the validator or the whole name is too long.
    pub(super) fn encode(&self, stored_name: &str, payload_at: u64) -> Result<(Bytes, Bytes), FormatError> {
        let mut flags = 0;
        let mut payload = BytesMut::new();
        let mut backing_len = 0;
        if self.copy_on_read {
            flags |= FLAG_COPY_ON_READ;
        }
        if let Some(pin) = &self.pin {
            let len = bytes(pin.validator.len());
            if len > VALIDATOR_BYTES_MAX {
                return Err(FormatError::Invalid(format!(
                    "the validator is {len} bytes long, at most {VALIDATOR_BYTES_MAX} fit"
                )));
            }
            flags |= FLAG_PIN;
            backing_len = pin.len;
            payload.put_slice(&pin.validator);
        }
        let validator_bytes = payload.len();
        if let Some(name) = &self.whole_name {
            let len = bytes(name.len());
            if len > WHOLE_NAME_BYTES_MAX {
                return Err(FormatError::Invalid(format!(
                    "the backing file name is {len} bytes long, at most {WHOLE_NAME_BYTES_MAX} fit"
                )));
            }
            flags |= FLAG_WHOLE_NAME;
            payload.put_slice(name.as_bytes());
        }
        let name_bytes = payload.len() - validator_bytes;
        let mut fixed = Fixed {
            mark: u8::from(self.in_use),
            version: VERSION,
            flags: flags.into(),
            payload_at: u32::try_from(payload_at).expect("inside of a cluster").into(),
            name_hash: hash(stored_name).into(),
            backing_len: backing_len.into(),
            validator_bytes: u16::try_from(validator_bytes).expect("at most 1024").into(),
            name_bytes: u16::try_from(name_bytes).expect("at most 4095").into(),
            zero: 0.into(),
            crc: 0.into(),
        };
        fixed.crc = crc(&fixed, &payload).into();
        Ok((Bytes::copy_from_slice(fixed.as_bytes()), payload.freeze()))
    }
}

fn crc(fixed: &Fixed, payload: &[u8]) -> u32 {
    let bytes = fixed.as_bytes();
    let covered = bytes.get(1..bytes.len() - size_of::<U32>()).expect("40 bytes");
    crc32c::crc32c_append(crc32c::crc32c(covered), payload)
}

/// FNV-1a, 64 bits. It tells names apart that a person or QEMU wrote; it need not withstand an attacker, who could as well write
/// the record itself.
fn hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            in_use: true,
            copy_on_read: true,
            pin: Some(Pin { validator: b"\"etag\"".to_vec(), len: 12345 }),
            whole_name: Some("http://host/disk?token=1".into()),
        }
    }

    fn encoded(record: &Record, name: &str) -> Vec<u8> {
        let (fixed, payload) = record.encode(name, FIXED_BYTES).unwrap();
        [fixed, payload].concat()
    }

    #[test]
    fn says_what_was_written() {
        for record in [record(), Record::default(), Record { pin: None, in_use: false, ..record() }] {
            let data = encoded(&record, "http://host/disk");
            assert_eq!(Record::parse(&data, "http://host/disk"), record);
        }
    }

    #[test]
    fn another_name_has_no_pin() {
        let found = Record::parse(&encoded(&record(), "http://host/disk"), "http://host/other");
        assert_eq!(found, Record { pin: None, whole_name: None, ..record() });
    }

    #[test]
    fn a_broken_byte_says_nothing_but_the_mark() {
        let whole = encoded(&record(), "http:");
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 0x55;
            let found = Record::parse(&broken, "http:");
            let expect = if at == 0 { record() } else { Record { in_use: true, ..Record::default() } };
            assert_eq!(found, expect, "byte {at}");
        }
        for len in 0..whole.len() {
            let found = Record::parse(&whole[..len], "http:");
            assert_eq!(found, Record { in_use: len >= 40, ..Record::default() }, "{len} bytes");
        }
    }

    #[test]
    fn a_whole_name_begins_with_the_stored_one() {
        let found = Record::parse(&encoded(&record(), "file:"), "file:");
        assert_eq!(found, Record { whole_name: None, ..record() });
    }

    #[test]
    fn a_payload_further_on() {
        let (fixed, payload) = record().encode("http:", 100).unwrap();
        let mut data = fixed.to_vec();
        data.resize(100, 0xee);
        data.extend_from_slice(&payload);
        data.extend_from_slice(&[0xee; 9]);
        assert_eq!(Record::parse(&data, "http:"), record());
    }

    #[test]
    fn too_long_is_refused() {
        let pin = Some(Pin { validator: vec![0; 1025], len: 0 });
        assert!(Record { pin, ..Record::default() }.encode("a", 40).is_err());
        let whole_name = Some("x".repeat(4096));
        assert!(Record { whole_name, ..Record::default() }.encode("a", 40).is_err());
    }
}
