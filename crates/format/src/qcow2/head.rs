//! Head: the bytes of the first cluster, made from what it is to say.
//!
//! - In the usual form our record comes first among the extensions, so that its mark shares the first sector with the fields
//!   wherever the header is as short as today's.
//! - In the *far* form everything behind the record's fixed part lies further on, and the bytes in between belong to the
//!   record's extension, where they mean nothing. So a rewrite never has to overwrite what the first sector points to.
//!
//! Not here: the order in which these bytes are written (`change`).

use bytes::Bytes;

use super::{
    extensions::{self, KIND_BACKING_FORMAT, KIND_RECORD, PREFIX_BYTES},
    header::{
        AUTOCLEAR_ONLY_READONCE, Fields, HEADER_BYTES_COMPRESSION, HEADER_BYTES_V2, Header,
        STORED_NAME_BYTES_MAX,
    },
    layout::SECTOR_BYTES,
    record::{FIXED_BYTES, Record, WHOLE_NAME_BYTES_MAX},
};
use crate::{
    FormatError,
    driver::{BackingRef, Pin},
    number::{bytes, index, round_up},
};

/// What a head is to say.
#[derive(Debug, Clone)]
pub(super) struct Head {
    /// The fields; where the backing name lies is set when the bytes are made.
    pub(super) fields: Fields,
    /// The header's own bytes, with fields that readonce does not know.
    pub(super) header: Vec<u8>,
    /// All but ours, in order.
    pub(super) extensions: Vec<(u32, Bytes)>,
    /// Ours, if there is to be one.
    pub(super) record: Option<Record>,
    /// The backing name as the header stores it.
    pub(super) stored_name: Option<String>,
}

impl Head {
    /// A new head without extensions.
    pub(super) fn new(mut fields: Fields) -> Self {
        let len = if fields.version == 2 { HEADER_BYTES_V2 } else { HEADER_BYTES_COMPRESSION };
        fields.header_length = u32::try_from(len).expect("112 at most");
        let header = vec![0; index(len)];
        Self { fields, header, extensions: Vec::new(), record: None, stored_name: None }
    }

    /// What a header says.
    pub(super) fn of(header: &Header) -> Self {
        let others = header.extensions.iter().filter(|extension| extension.kind != KIND_RECORD);
        Self {
            fields: header.fields,
            header: header.header_bytes().to_vec(),
            extensions: others.map(|extension| (extension.kind, extension.data.clone())).collect(),
            record: header.has_mark().then(|| header.record.clone()),
            stored_name: header.stored_name.clone(),
        }
    }

    /// Sets or takes off the backing; a pin goes along only if given.
    ///
    /// # Errors
    /// `Invalid` for names that cannot be stored.
    pub(super) fn set_backing(
        &mut self,
        backing: Option<&BackingRef>,
        pin: Option<&Pin>,
    ) -> Result<(), FormatError> {
        let old = self.record.take().unwrap_or_default();
        self.extensions.retain(|&(kind, _)| kind != KIND_BACKING_FORMAT);
        let mut record = Record { pin: pin.cloned(), whole_name: None, ..old };
        self.stored_name = None;
        if let Some(backing) = backing {
            let stored = stored_name(&backing.name)?;
            if stored != backing.name {
                record.whole_name = Some(backing.name.clone());
            }
            self.stored_name = Some(stored.to_owned());
            if let Some(format) = &backing.format {
                let format = Bytes::copy_from_slice(format.as_bytes());
                self.extensions.insert(0, (KIND_BACKING_FORMAT, format));
            }
        } else if pin.is_some() {
            return Err(FormatError::Invalid("a version can be pinned only with a backing file".into()));
        } else {
            // Without a backing there is nothing to copy.
            record.copy_on_read = false;
        }
        self.fields.autoclear_features &= !AUTOCLEAR_ONLY_READONCE;
        if pin.is_some() && self.fields.version != 2 {
            self.fields.autoclear_features |= AUTOCLEAR_ONLY_READONCE;
        }
        self.record = Some(record);
        Ok(())
    }

    /// The usual form: from the start of the file to the end of the backing name.
    ///
    /// # Errors
    /// `Invalid` where it does not fit into the first cluster.
    pub(super) fn bytes(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = self.header.clone();
        if let Some(record) = &self.record {
            let (fixed, payload) = record.encode(self.name(), FIXED_BYTES)?;
            extensions::put(&mut out, KIND_RECORD, &[fixed, payload].concat());
        }
        self.put_rest(&mut out)?;
        Ok(out)
    }

    /// The far form, whose rest lies at `far` (a multiple of the sector, behind the first one) or later. `None` where the first
    /// sector cannot hold the beginning, or the first cluster the rest.
    ///
    /// # Errors
    /// `Invalid` where the record cannot be stored.
    pub(super) fn far_bytes(&self, far: u64) -> Result<Option<Vec<u8>>, FormatError> {
        let mut out = self.header.clone();
        let data_at = bytes(out.len()) + PREFIX_BYTES;
        if data_at + FIXED_BYTES > SECTOR_BYTES || far < SECTOR_BYTES {
            return Ok(None);
        }
        let record = self.record.clone().unwrap_or_default();
        let (fixed, payload) = record.encode(self.name(), far - data_at)?;
        let mut data = fixed.to_vec();
        data.resize(index(far - data_at), 0);
        data.extend_from_slice(&payload);
        extensions::put(&mut out, KIND_RECORD, &data);
        Ok(self.put_rest(&mut out).is_ok().then_some(out))
    }

    fn put_rest(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        for (kind, data) in &self.extensions {
            extensions::put(out, *kind, data);
        }
        extensions::put_end(out);
        let mut fields = self.fields;
        (fields.backing_file_offset, fields.backing_file_size) = match &self.stored_name {
            Some(name) => (bytes(out.len()), u32::try_from(name.len()).expect("at most 1023")),
            None => (0, 0),
        };
        out.extend_from_slice(self.name().as_bytes());
        fields.put(out);
        let cluster_size = 1u64 << fields.cluster_bits;
        if bytes(out.len()) > cluster_size {
            return Err(FormatError::Invalid(format!(
                "the header, its extensions and the backing file name need {} bytes, they have one cluster, {cluster_size} \
                 bytes",
                out.len()
            )));
        }
        Ok(())
    }

    fn name(&self) -> &str {
        self.stored_name.as_deref().unwrap_or_default()
    }
}

/// The name that a header stores for a backing: the whole one, or where that is too long a URL's without its query, which names
/// at least the same object; where that is too long as well its beginning, which leads QEMU nowhere.
fn stored_name(name: &str) -> Result<&str, FormatError> {
    if name.is_empty() || name.contains('\0') {
        return Err(FormatError::Invalid(
            "the backing file name must not be empty or hold a zero byte".into(),
        ));
    }
    if bytes(name.len()) <= STORED_NAME_BYTES_MAX {
        return Ok(name);
    }
    if !name.contains("://") || bytes(name.len()) > WHOLE_NAME_BYTES_MAX {
        return Err(FormatError::Invalid(format!(
            "the backing file name is {} bytes long, at most {STORED_NAME_BYTES_MAX} fit, or {WHOLE_NAME_BYTES_MAX} of a URL",
            name.len()
        )));
    }
    let shorter = name.split(['?', '#']).next().unwrap_or_default();
    let end = shorter.floor_char_boundary(index(STORED_NAME_BYTES_MAX));
    Ok(shorter.get(..end).unwrap_or(shorter))
}

/// `len` rounded up to whole sectors.
pub(super) fn sectors(len: u64) -> u64 {
    round_up(len, SECTOR_BYTES).expect("inside of the first cluster")
}
