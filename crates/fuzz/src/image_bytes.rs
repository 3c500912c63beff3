//! Raw bytes as an image's file, to every driver.

use std::sync::Arc;

use readonce_format::{Driver, driver};
use readonce_storage::{ReadAt, SimFile};

use crate::{
    draw::Draw,
    exec,
    image::{MEMORY_MAX, read_units},
};

/// Bytes of the longest file.
const FILE_MAX: usize = 64 << 10;

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let magic: &[u8] = draw.of(&[b"".as_slice(), b"QED\0", b"QFI\xfb\0\0\0\x02", b"QFI\xfb\0\0\0\x03"]);
    // Tables and whole clusters lie behind what is drawn.
    let behind = draw.of(&[0, 512, 8192, FILE_MAX]);
    let mut bytes = [magic, draw.rest()].concat();
    bytes.resize(bytes.len().max(behind).min(FILE_MAX), 0);
    driver::unsupported_format(&bytes);
    for format in driver::drivers() {
        any_driver(*format, &bytes);
    }
}

fn any_driver(format: &'static dyn Driver, bytes: &[u8]) {
    let file = Arc::new(SimFile::from_bytes(bytes));
    let reader: Arc<dyn ReadAt> = file.clone();
    let known = format.probe(&bytes[..bytes.len().min(512)]);
    let at_work = Arc::clone(&file);
    exec::run(|_| async move {
        let described = format.describe(&reader).await;
        if let (Ok(described), false) = (&described, format.name() == "raw") {
            assert!(known, "{} describes what it does not probe", described.format);
        }
        let _ = format.check(&reader).await;
        if let Ok(mapper) = format.open(reader.clone()).await {
            if let Ok(described) = described {
                let rounded = |size: u64| size.next_multiple_of(512);
                assert_eq!(rounded(mapper.geometry().size), rounded(described.virtual_size));
            }
            read_units(&*mapper, &reader, &reader, 64, u64::MAX).await;
        }
        assert_eq!(at_work.unsynced_count(), 0, "reading writes nothing");
    });
    assert!(file.resident_bytes() < MEMORY_MAX);
}
