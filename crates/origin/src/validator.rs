//! Validator: what names one version of an origin's bytes (I6), how it is kept in an image, and when two are the same.
//!
//! - The best that the origin offers is taken: a strong ETag, else a weak ETag or Last-Modified with the length, else the
//!   length alone (with a warning: a changed file of the same length goes unseen).
//! - Encoded it is at most [`ENCODED_BYTES_MAX`] bytes and carries a version, so that an older reader refuses rather than
//!   misreads.
//! - The kind that was pinned decides what is compared: a header that appears later changes nothing, one that vanishes does.
//! - A file whose data lies in another is pinned together with that other one ([`Pinned`]).
//!
//! Not here: what to do about a difference (`open` for files, `response` for HTTP).

use std::fmt;

/// Bytes that an encoded validator may take in an image.
pub const ENCODED_BYTES_MAX: usize = 1024;

/// Bytes of an ETag or Last-Modified that still fit; a longer one is treated as absent.
const TEXT_BYTES_MAX: usize = 960;

/// Characters of a server's text in a message.
const TEXT_SHOWN_MAX: usize = 200;

/// First byte of the encoding.
const ENCODING_VERSION: u8 = 1;

/// Second byte of the encoding of two: the length of the first as an u16, the first, the data file's length as an u64, the second.
const KIND_WITH_DATA: u8 = 6;

/// Names one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validator {
    /// An ETag that changes with every byte, quotes included.
    StrongETag(String),
    /// An ETag that only promises the same meaning (without its `W/`, quotes included), and the length in bytes.
    WeakETag {
        /// Opaque tag with its quotes.
        etag: String,
        /// Bytes.
        len: u64,
    },
    /// A Last-Modified date as the server wrote it, and the length in bytes.
    LastModified {
        /// As sent; never parsed.
        date: String,
        /// Bytes.
        len: u64,
    },
    /// The length in bytes and nothing else.
    LengthOnly {
        /// Bytes.
        len: u64,
    },
    /// A file of this machine.
    File {
        /// Device number.
        device: u64,
        /// Inode number.
        inode: u64,
        /// Bytes.
        size: u64,
        /// Modification time in nanoseconds since 1970, negative before.
        mtime_ns: i128,
    },
}

/// A validator, and the length that belongs to it: what an image pins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Names the version.
    pub validator: Validator,
    /// Bytes.
    pub len: u64,
}

/// All that an image pins of its backing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// Of the backing's own file.
    pub own: Version,
    /// Of the file that holds its data, where that is another.
    pub data: Option<Version>,
}

/// Why bytes are not an encoded validator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a newer readonce.
    #[error("validator has version {0}, this readonce knows version {ENCODING_VERSION}")]
    Version(u8),
    /// Broken.
    #[error("validator of {len} bytes is malformed: {cause}")]
    Malformed {
        /// Bytes in all.
        len: usize,
        /// What is wrong.
        cause: &'static str,
    },
}

impl Validator {
    /// The best validator that response headers offer. Values that are no printable text, or too long to keep, count as absent.
    pub fn from_headers(etag: Option<&str>, last_modified: Option<&str>, len: u64) -> Self {
        if let Some(tag) = etag.and_then(parse_etag) {
            return match tag {
                ETag::Strong(etag) => Self::StrongETag(etag),
                ETag::Weak(etag) => Self::WeakETag { etag, len },
            };
        }
        match last_modified.map(str::trim).filter(|date| can_be_kept(date)) {
            Some(date) => Self::LastModified { date: date.to_string(), len },
            None => Self::LengthOnly { len },
        }
    }

    /// Whether a response with these headers, of a file of `len` bytes, is of this version.
    ///
    /// # Errors
    /// The difference in words: what was, what is.
    pub fn check_headers(
        &self,
        etag: Option<&str>,
        last_modified: Option<&str>,
        len: u64,
    ) -> Result<(), String> {
        let tag = etag.and_then(parse_etag);
        let shown =
            || etag.map_or_else(|| "not there any more".to_string(), |etag| format!("is {}", brief(etag)));
        match self {
            Self::StrongETag(expected) => match tag {
                Some(ETag::Strong(found)) if found == *expected => Ok(()),
                _ => Err(format!("ETag was {expected}, {}", shown())),
            },
            Self::WeakETag { etag: expected, len: expected_len } => match tag {
                // Weak comparison: a server may learn to call the same tag strong.
                Some(ETag::Strong(found) | ETag::Weak(found)) if found == *expected => {
                    same_len(*expected_len, len)
                }
                _ => Err(format!("ETag was W/{expected}, {}", shown())),
            },
            Self::LastModified { date: expected, len: expected_len } => match last_modified.map(str::trim) {
                Some(found) if found == expected => same_len(*expected_len, len),
                Some(found) => Err(format!("Last-Modified was \"{expected}\", is \"{}\"", brief(found))),
                None => Err(format!("Last-Modified was \"{expected}\", not there any more")),
            },
            Self::LengthOnly { len: expected_len } => same_len(*expected_len, len),
            Self::File { .. } => Err(format!("was a file ({self}), is on HTTP")),
        }
    }

    /// Whether this tells versions of one length apart.
    pub fn is_length_only(&self) -> bool {
        matches!(self, Self::LengthOnly { .. })
    }

    /// The bytes to keep in an image; at most [`ENCODED_BYTES_MAX`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![ENCODING_VERSION];
        match self {
            Self::StrongETag(etag) => {
                out.push(1);
                out.extend_from_slice(etag.as_bytes());
            }
            Self::WeakETag { etag, len } => {
                out.push(2);
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(etag.as_bytes());
            }
            Self::LastModified { date, len } => {
                out.push(3);
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(date.as_bytes());
            }
            Self::LengthOnly { len } => {
                out.push(4);
                out.extend_from_slice(&len.to_le_bytes());
            }
            Self::File { device, inode, size, mtime_ns } => {
                out.push(5);
                out.extend_from_slice(&device.to_le_bytes());
                out.extend_from_slice(&inode.to_le_bytes());
                out.extend_from_slice(&size.to_le_bytes());
                out.extend_from_slice(&mtime_ns.to_le_bytes());
            }
        }
        assert!(out.len() <= ENCODED_BYTES_MAX, "a validator's text is bounded where it is made");
        out
    }

    /// Reads what [`Validator::encode`] wrote.
    ///
    /// # Errors
    /// Another version, or malformed. Any bytes may be given.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let malformed = |cause| DecodeError::Malformed { len: bytes.len(), cause };
        if bytes.len() > ENCODED_BYTES_MAX {
            return Err(malformed("it is longer than 1024 bytes"));
        }
        let (version, rest) = bytes.split_first().ok_or(malformed("it is empty"))?;
        if *version != ENCODING_VERSION {
            return Err(DecodeError::Version(*version));
        }
        let (kind, rest) = rest.split_first().ok_or(malformed("the kind is missing"))?;
        let mut reader = Reader { rest };
        let short = || malformed("it is cut short");
        let validator = match kind {
            1 => Self::StrongETag(reader.text().ok_or(malformed("the ETag is not text, or too long"))?),
            2 => Self::WeakETag {
                len: reader.u64().ok_or_else(short)?,
                etag: reader.text().ok_or(malformed("the ETag is not text, or too long"))?,
            },
            3 => Self::LastModified {
                len: reader.u64().ok_or_else(short)?,
                date: reader.text().ok_or(malformed("the date is not text, or too long"))?,
            },
            4 => Self::LengthOnly { len: reader.u64().ok_or_else(short)? },
            5 => Self::File {
                device: reader.u64().ok_or_else(short)?,
                inode: reader.u64().ok_or_else(short)?,
                size: reader.u64().ok_or_else(short)?,
                mtime_ns: i128::from_le_bytes(reader.array().ok_or_else(short)?),
            },
            _ => return Err(malformed("the kind is unknown")),
        };
        if !reader.rest.is_empty() {
            return Err(malformed("something follows it"));
        }
        Ok(validator)
    }
}

impl Version {
    /// The version that an image's pin holds.
    ///
    /// # Errors
    /// The validator cannot be decoded.
    pub fn decode(validator: &[u8], len: u64) -> Result<Self, DecodeError> {
        Ok(Self { validator: Validator::decode(validator)?, len })
    }
}

impl Pinned {
    /// The bytes to keep in an image as the validator, beside the length of the backing's own file. Of two long texts they may be
    /// more than [`ENCODED_BYTES_MAX`], which no image keeps.
    pub fn encode(&self) -> Vec<u8> {
        let own = self.own.validator.encode();
        let Some(data) = &self.data else { return own };
        let own_len = u16::try_from(own.len()).expect("at most 1024 bytes");
        let mut out = vec![ENCODING_VERSION, KIND_WITH_DATA];
        out.extend_from_slice(&own_len.to_le_bytes());
        out.extend_from_slice(&own);
        out.extend_from_slice(&data.len.to_le_bytes());
        out.extend_from_slice(&data.validator.encode());
        out
    }

    /// Reads what [`Pinned::encode`] wrote; `len` is the length of the backing's own file.
    ///
    /// # Errors
    /// Another version, or malformed. Any bytes may be given.
    pub fn decode(bytes: &[u8], len: u64) -> Result<Self, DecodeError> {
        let Some(rest) = bytes.strip_prefix(&[ENCODING_VERSION, KIND_WITH_DATA]) else {
            return Ok(Self { own: Version::decode(bytes, len)?, data: None });
        };
        let malformed = |cause| DecodeError::Malformed { len: bytes.len(), cause };
        if bytes.len() > ENCODED_BYTES_MAX {
            return Err(malformed("it is longer than 1024 bytes"));
        }
        let short = || malformed("it is cut short");
        let mut reader = Reader { rest };
        let own_len = reader.array().map(u16::from_le_bytes).ok_or_else(short)?;
        let (own, rest) = reader.rest.split_at_checked(usize::from(own_len)).ok_or_else(short)?;
        let mut reader = Reader { rest };
        let data_len = reader.u64().ok_or_else(short)?;
        Ok(Self {
            own: Version::decode(own, len)?,
            data: Some(Version { validator: Validator::decode(reader.rest)?, len: data_len }),
        })
    }
}

impl fmt::Display for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.own.validator)?;
        match &self.data {
            Some(data) => write!(f, "; its data file: {}", data.validator),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Validator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StrongETag(etag) => write!(f, "ETag {etag}"),
            Self::WeakETag { etag, len } => write!(f, "ETag W/{etag}, {len} bytes"),
            Self::LastModified { date, len } => write!(f, "Last-Modified {date}, {len} bytes"),
            Self::LengthOnly { len } => write!(f, "{len} bytes"),
            Self::File { device, inode, size, mtime_ns } => {
                write!(f, "device {device}, inode {inode}, {size} bytes, mtime {mtime_ns} ns")
            }
        }
    }
}

fn same_len(expected: u64, found: u64) -> Result<(), String> {
    if expected == found { Ok(()) } else { Err(format!("length was {expected}, is {found}")) }
}

/// At most as much of a server's text as a sentence can take.
pub(crate) fn brief(text: &str) -> String {
    match text.char_indices().nth(TEXT_SHOWN_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_string(),
    }
}

enum ETag {
    Strong(String),
    Weak(String),
}

/// An ETag header. A value without quotes is against the RFC, but some servers send it: it is taken as it stands, and as
/// strong, because such a server does not know of weak ones.
fn parse_etag(value: &str) -> Option<ETag> {
    let value = value.trim();
    let (weak, tag) = match value.strip_prefix("W/").or_else(|| value.strip_prefix("w/")) {
        Some(tag) => (true, tag),
        None => (false, value),
    };
    if tag == "\"\"" || !can_be_kept(tag) {
        return None;
    }
    Some(if weak { ETag::Weak(tag.to_string()) } else { ETag::Strong(tag.to_string()) })
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// All that is left, as printable text.
    fn text(&mut self) -> Option<String> {
        let text = std::str::from_utf8(std::mem::take(&mut self.rest)).ok()?;
        can_be_kept(text).then(|| text.to_string())
    }
}

/// Whether an image can hold a text, and give it back: what is pinned must be read again.
fn can_be_kept(text: &str) -> bool {
    !text.is_empty() && text.len() <= TEXT_BYTES_MAX && !text.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Validator> {
        vec![
            Validator::StrongETag("\"abc-1\"".into()),
            Validator::WeakETag { etag: "\"x\"".into(), len: u64::MAX },
            Validator::LastModified { date: "Sun, 06 Nov 1994 08:49:37 GMT".into(), len: 5 },
            Validator::LengthOnly { len: 0 },
            Validator::File { device: 1, inode: 2, size: 3, mtime_ns: -4 },
        ]
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for validator in examples() {
            assert_eq!(Validator::decode(&validator.encode()), Ok(validator));
        }
    }

    #[test]
    fn a_data_file_is_pinned_with_its_image() {
        for own in examples() {
            for data in examples().into_iter().map(Some).chain([None]) {
                let version = |validator, len| Version { validator, len };
                let pinned =
                    Pinned { own: version(own.clone(), 10), data: data.map(|data| version(data, 11)) };
                let encoded = pinned.encode();
                assert_eq!(Pinned::decode(&encoded, 10).as_ref(), Ok(&pinned));
                // A readonce that knows of no data files refuses.
                assert_eq!(Validator::decode(&encoded).is_ok(), pinned.data.is_none());
                for cut in 0..encoded.len() {
                    assert!(Pinned::decode(&encoded[..cut], 10).as_ref() != Ok(&pinned));
                }
            }
        }
        assert!(Pinned::decode(&[1, 6, 255, 255], 1).is_err());
        assert!(Pinned::decode(&[[1, 6].as_slice(), &[0; 1023]].concat(), 1).is_err());
    }

    #[test]
    fn bytes_from_outside_are_refused_not_trusted() {
        for validator in examples() {
            let encoded = validator.encode();
            for cut in 0..encoded.len() {
                let decoded = Validator::decode(&encoded[..cut]);
                // A shorter text is still a text; everything else must be refused.
                assert!(decoded.is_err() || decoded.is_ok_and(|shorter| shorter != validator));
            }
        }
        assert_eq!(Validator::decode(&[2, 1, b'"']), Err(DecodeError::Version(2)));
        assert!(Validator::decode(&[1, 9]).is_err());
        assert!(Validator::decode(&[1, 1, 0xff]).is_err());
        assert!(Validator::decode(&[1, 1, b'\n']).is_err());
        assert!(Validator::decode(&[1; 1025]).is_err());
        let mut long = Validator::LengthOnly { len: 1 }.encode();
        long.push(0);
        assert!(Validator::decode(&long).is_err());
    }

    #[test]
    fn the_best_header_is_taken() {
        let from = |etag, date| Validator::from_headers(etag, date, 7).to_string();
        assert_eq!(from(Some("\"a\""), Some("d")), "ETag \"a\"");
        assert_eq!(from(Some("W/\"a\""), Some("d")), "ETag W/\"a\", 7 bytes");
        assert_eq!(from(Some("bare"), None), "ETag bare");
        assert_eq!(from(Some("\"\""), Some("d")), "Last-Modified d, 7 bytes");
        assert_eq!(from(None, None), "7 bytes");
        let long = format!("\"{}\"", "x".repeat(2000));
        assert_eq!(from(Some(&long), None), "7 bytes");
        assert!(Validator::from_headers(Some(&"x".repeat(960)), None, 7).encode().len() <= ENCODED_BYTES_MAX);
    }

    /// A header may hold tabs. Pinned, such an ETag could not be read again, and the image could not be opened any more.
    #[test]
    fn a_text_with_control_characters_is_absent() {
        let from = |etag, date| Validator::from_headers(etag, date, 7).to_string();
        assert_eq!(from(Some("\"a\tb\""), Some("d")), "Last-Modified d, 7 bytes");
        assert_eq!(from(Some("W/\"a\tb\""), Some("d\te")), "7 bytes");
        assert_eq!(from(Some("\t\"a\"\t"), None), "ETag \"a\"");
        assert_eq!(from(None, Some("d\u{7f}")), "7 bytes");
    }

    #[test]
    fn the_pinned_kind_decides_what_is_compared() {
        let strong = Validator::StrongETag("\"a\"".into());
        assert_eq!(strong.check_headers(Some("\"a\""), None, 1), Ok(()));
        assert_eq!(strong.check_headers(Some("\"b\""), None, 1), Err("ETag was \"a\", is \"b\"".into()));
        assert_eq!(strong.check_headers(Some("W/\"a\""), None, 1), Err("ETag was \"a\", is W/\"a\"".into()));
        assert_eq!(strong.check_headers(None, None, 1), Err("ETag was \"a\", not there any more".into()));

        let weak = Validator::WeakETag { etag: "\"a\"".into(), len: 9 };
        assert_eq!(weak.check_headers(Some("W/\"a\""), None, 9), Ok(()));
        assert_eq!(weak.check_headers(Some("\"a\""), None, 9), Ok(()));
        assert_eq!(weak.check_headers(Some("W/\"a\""), None, 8), Err("length was 9, is 8".into()));
        assert!(weak.check_headers(Some("W/\"b\""), None, 9).is_err());

        let dated = Validator::LastModified { date: "d".into(), len: 9 };
        assert_eq!(dated.check_headers(Some("\"new\""), Some("d"), 9), Ok(()));
        assert_eq!(dated.check_headers(None, Some("e"), 9), Err("Last-Modified was \"d\", is \"e\"".into()));
        assert!(dated.check_headers(None, Some("d"), 8).is_err());
        assert!(dated.check_headers(None, None, 9).is_err());

        let bare = Validator::LengthOnly { len: 9 };
        assert_eq!(bare.check_headers(Some("\"a\""), Some("d"), 9), Ok(()));
        assert!(bare.check_headers(None, None, 8).is_err());
    }
}
