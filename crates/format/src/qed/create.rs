//! Create: options, limits and the bytes of a new image.
//!
//! - Everything is checked before the file is emptied.
//! - A refusal that QEMU has too is in QEMU's words.
//!
//! Not here: rounding up a size to what a backing has. The caller knows the backing.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use readonce_storage::Storage;
use zerocopy::IntoBytes;

use super::{
    header::{
        AUTOCLEAR_ONLY_READONCE, BACKING_NAME_BYTES_MAX, COMPAT_COPY_ON_READ, COMPAT_PIN,
        FEATURE_BACKING_FILE, FEATURE_BACKING_NO_PROBE, Fields, HEADER_BYTES, MAGIC,
    },
    layout::{CLUSTER_SIZE_MAX, CLUSTER_SIZE_MIN, ENTRY_BYTES, SECTOR_BYTES, TABLE_SIZE_MAX, image_size_max},
    record,
};
use crate::{
    FormatError,
    driver::{CreateSpec, OptionSpec},
    number::{bytes, index, round_up},
    options,
};

pub(super) const OPTIONS: &[OptionSpec] = &[
    OptionSpec { name: "cluster_size", help: "Cluster size (in bytes)" },
    OptionSpec { name: "table_size", help: "L1/L2 table size (in clusters)" },
    OptionSpec {
        name: "copy_on_read",
        help: "Copy what is read from the backing file into the image (on/off)",
    },
];

const CLUSTER_SIZE_DEFAULT: u64 = 64 << 10;
const TABLE_SIZE_DEFAULT: u64 = 4;

/// The options, checked.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    cluster_size: u64,
    table_size: u64,
    copy_on_read: bool,
}

impl Options {
    fn parse(options: &[(String, Option<String>)]) -> Result<Self, FormatError> {
        let mut parsed =
            Self { cluster_size: CLUSTER_SIZE_DEFAULT, table_size: TABLE_SIZE_DEFAULT, copy_on_read: false };
        for (name, value) in options {
            let value = value.as_deref();
            match name.as_str() {
                "cluster_size" => parsed.cluster_size = options::size(name, value)?,
                "table_size" => parsed.table_size = options::size(name, value)?,
                "copy_on_read" => parsed.copy_on_read = options::switch(name, value)?,
                _ => return Err(FormatError::Invalid(format!("Invalid parameter '{name}'"))),
            }
        }
        if !parsed.cluster_size.is_power_of_two()
            || !(CLUSTER_SIZE_MIN..=CLUSTER_SIZE_MAX).contains(&parsed.cluster_size)
        {
            return Err(FormatError::Invalid(format!(
                "QED cluster size must be within range [{CLUSTER_SIZE_MIN}, {CLUSTER_SIZE_MAX}] and power of 2"
            )));
        }
        if !parsed.table_size.is_power_of_two() || parsed.table_size > TABLE_SIZE_MAX {
            return Err(FormatError::Invalid(format!(
                "QED table size must be within range [1, {TABLE_SIZE_MAX}] and power of 2"
            )));
        }
        Ok(parsed)
    }
}

/// QEMU takes a table of one cluster for an offset that overflows, and counts the bytes of the largest guest in 64 bits: where
/// they need more, no size is small enough.
pub(super) fn refused_by_qemu(spec: &CreateSpec) -> Option<&'static str> {
    let Options { cluster_size, table_size, .. } = Options::parse(&spec.options).ok()?;
    match size_max_in_qemu(cluster_size, table_size) {
        None => Some("QED image size is invalid"),
        Some(_) if table_size == 1 => Some("QED table offset is invalid"),
        Some(_) => None,
    }
}

fn size_max_in_qemu(cluster_size: u64, table_size: u64) -> Option<u64> {
    let entries = table_size.checked_mul(cluster_size)? / ENTRY_BYTES;
    entries.checked_mul(cluster_size)?.checked_mul(entries)
}

/// What a new image's head holds.
struct Plan {
    fields: Fields,
    name: Bytes,
    record: Bytes,
    header_bytes: u64,
    file_bytes: u64,
}

fn plan(spec: &CreateSpec) -> Result<Plan, FormatError> {
    let options = Options::parse(&spec.options)?;
    let (cluster_size, table_size) = (options.cluster_size, options.table_size);
    let size_max = image_size_max(cluster_size, table_size);
    let image_size = round_up(spec.size, SECTOR_BYTES).filter(|&size| size <= size_max).ok_or_else(|| {
        FormatError::Invalid(format!(
            "QED image size must be a non-zero multiple of cluster size and less than {size_max} bytes"
        ))
    })?;

    let (mut features, mut compat, mut autoclear) = (0, 0, 0);
    let mut name = Bytes::new();
    let mut record = Bytes::new();
    if let Some(backing) = &spec.backing {
        name = Bytes::copy_from_slice(backing.name.as_bytes());
        check_name(&backing.name)?;
        features |= FEATURE_BACKING_FILE;
        if backing.format.as_deref() == Some("raw") {
            features |= FEATURE_BACKING_NO_PROBE;
        }
        if let Some(pin) = &spec.pin {
            record = record::encode(pin, &backing.name)?;
            compat |= COMPAT_PIN;
            autoclear |= AUTOCLEAR_ONLY_READONCE;
        }
        if options.copy_on_read {
            compat |= COMPAT_COPY_ON_READ;
        }
    } else if options.copy_on_read {
        return Err(copy_on_read_needs_backing());
    } else if spec.pin.is_some() {
        return Err(FormatError::Invalid("a version can be pinned only with a backing file".into()));
    }

    // The specification lets the header area have several clusters; QEMU opens such images.
    let header_size = (HEADER_BYTES + bytes(name.len()) + bytes(record.len())).div_ceil(cluster_size);
    let header_bytes = header_size * cluster_size;
    let narrow = |value: u64| u32::try_from(value).expect("checked against its limit above");
    let file_bytes = header_bytes + table_size * cluster_size;
    let mut fields = Fields {
        magic: MAGIC,
        cluster_size: narrow(cluster_size).into(),
        table_size: narrow(table_size).into(),
        header_size: narrow(header_size).into(),
        features: features.into(),
        compat_features: compat.into(),
        autoclear_features: autoclear.into(),
        l1_table_offset: header_bytes.into(),
        image_size: image_size.into(),
        backing_filename_offset: if name.is_empty() { 0 } else { narrow(HEADER_BYTES) }.into(),
        backing_filename_size: narrow(bytes(name.len())).into(),
    };
    fields.set_clean_end(Some(file_bytes));
    Ok(Plan { fields, name, record, header_bytes, file_bytes })
}

/// The rules for a name that is to be stored.
pub(super) fn check_name(name: &str) -> Result<(), FormatError> {
    let len = bytes(name.len());
    if name.is_empty() || name.contains('\0') {
        return Err(FormatError::Invalid(
            "the backing file name must not be empty or hold a zero byte".into(),
        ));
    }
    if len > BACKING_NAME_BYTES_MAX {
        return Err(FormatError::Invalid(format!(
            "the backing file name is {len} bytes long, at most {BACKING_NAME_BYTES_MAX} fit"
        )));
    }
    Ok(())
}

/// In the words of the patch of 2011.
pub(super) fn copy_on_read_needs_backing() -> FormatError {
    FormatError::Invalid("QED only supports Copy-on-Read with a backing file".into())
}

/// Makes the image, durable when this returns.
pub(super) async fn create(file: &Arc<dyn Storage>, spec: &CreateSpec) -> Result<(), FormatError> {
    let plan = plan(spec)?;
    file.set_len(0).await?;
    // The L1 table is a run of zeros: what follows the header area when the file has its length.
    file.set_len(plan.file_bytes).await?;
    if !plan.record.is_empty() {
        file.write(plan.header_bytes - bytes(plan.record.len()), plan.record).await?;
    }
    let mut head = BytesMut::with_capacity(index(HEADER_BYTES) + plan.name.len());
    head.put_slice(plan.fields.as_bytes());
    head.put_slice(&plan.name);
    file.write(0, head.freeze()).await?;
    Ok(file.sync().await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: &[(&str, Option<&str>)], expect: Result<(u64, u64, bool), &str>) {
        let options: Vec<_> =
            options.iter().map(|(name, value)| (name.to_string(), value.map(str::to_owned))).collect();
        match (Options::parse(&options), expect) {
            (Ok(found), Ok(expect)) => {
                assert_eq!((found.cluster_size, found.table_size, found.copy_on_read), expect);
            }
            (Err(error), Err(expect)) => assert_eq!(error.to_string(), expect),
            (found, expect) => panic!("{found:?} is not {expect:?}"),
        }
    }

    #[test]
    fn options_are_those_of_qemu_img() {
        check(&[], Ok((65536, 4, false)));
        check(&[("copy_on_read", None)], Ok((65536, 4, true)));
        check(&[("copy_on_read", Some("on")), ("copy_on_read", Some("off"))], Ok((65536, 4, false)));
        check(&[("cluster_size", Some("4k")), ("table_size", Some("16"))], Ok((4096, 16, false)));
        check(&[("cluster_size", Some("64M"))], Ok((64 << 20, 4, false)));
        check(&[("cluster_size", Some("0x10000"))], Ok((65536, 4, false)));
    }

    #[test]
    fn refusals_are_those_of_qemu_img() {
        let range = "QED cluster size must be within range [4096, 67108864] and power of 2";
        for wrong in ["2k", "1000", "128M", "0"] {
            check(&[("cluster_size", Some(wrong))], Err(range));
        }
        let range = "QED table size must be within range [1, 16] and power of 2";
        for wrong in ["0", "3", "32"] {
            check(&[("table_size", Some(wrong))], Err(range));
        }
        let number = "Parameter 'table_size' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or \
                      E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.";
        for wrong in [Some(""), Some("abc"), Some("64z"), Some("2.5"), Some("k"), None] {
            check(&[("table_size", wrong)], Err(number));
        }
        for wrong in ["-1", "99999999999999999999", "16E"] {
            let expect = format!("Value '{wrong}' is out of range for parameter 'table_size'");
            check(&[("table_size", Some(wrong))], Err(&expect));
        }
        check(&[("copy_on_read", Some("maybe"))], Err("Parameter 'copy_on_read' expects 'on' or 'off'"));
        check(&[("bogus", Some("1"))], Err("Invalid parameter 'bogus'"));
    }
}
