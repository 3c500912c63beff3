//! What becomes of an image when a guest meets what cannot be there.

use std::{fs, path::Path};

use crate::common::{folder, qemu_img, readonce};

/// A qcow2 image whose first cluster holds data, and the byte offset of its L2 table.
fn image(at: &Path, format: &str) -> u64 {
    readonce(at, &["create", "-q", "-f", format, "w.img", "1M"]).ok();
    readonce(at, &["io", "-c", "write -P 1 0 128k", "w.img"]).ok();
    let bytes = fs::read(at.join("w.img")).expect("the image");
    let word = |at: u64| <[u8; 8]>::try_from(&bytes[at as usize..at as usize + 8]).expect("8 bytes");
    match format {
        "qcow2" => u64::from_be_bytes(word(u64::from_be_bytes(word(40)))) & 0x00ff_ffff_ffff_fe00,
        _ => u64::from_le_bytes(word(u64::from_le_bytes(word(40)))),
    }
}

/// Puts an L2 entry there.
fn overwrite(at: &Path, offset: u64, entry: [u8; 8]) {
    let mut bytes = fs::read(at.join("w.img")).expect("the image");
    bytes[offset as usize..offset as usize + 8].copy_from_slice(&entry);
    fs::write(at.join("w.img"), bytes).expect("room");
}

/// An offset that is no multiple of the cluster size; a compressed cluster past the end of the file; a reserved bit.
const WRONG: [u64; 3] = [0x8000_0000_0005_0200, 0x4000_0001_0000_0000, 0x8000_0000_0005_0002];

fn is_marked(at: &Path) -> bool {
    let told = qemu_img(at, &["info", "w.img"]).ok().out;
    assert!(told.contains("corrupt: "), "{told}");
    told.contains("corrupt: true")
}

/// Unmarked, the next guest would go on to write into an image whose tables are known to be wrong, and nobody would be told.
#[test]
fn a_guest_that_meets_a_corrupt_entry_marks_the_image() {
    for command in ["write 0 4k", "write -z 0 4k", "discard 0 64k", "read 0 4k"] {
        for wrong in WRONG {
            let at = folder();
            let table = image(at.path(), "qcow2");
            overwrite(at.path(), table, wrong.to_be_bytes());
            // What only looks changes nothing.
            let looked = readonce(at.path(), &["io", "-r", "-c", "read 0 4k", "w.img"]);
            looked.fails(1, "the image is corrupt");
            assert!(!is_marked(at.path()), "{command} {wrong:#x}");
            let met = readonce(at.path(), &["io", "-c", command, "-c", "read -P 1 64k 64k", "w.img"]);
            assert!(met.out.contains("read 65536/65536"), "what is right is read: {met:?}");
            met.fails(1, "the image is corrupt");
            assert!(is_marked(at.path()), "{command} {wrong:#x}");
            let refused = readonce(at.path(), &["io", "-c", "write 512k 4k", "w.img"]);
            refused.fails(1, "w.img is marked corrupt: it is served read-only");
            readonce(at.path(), &["io", "-r", "-c", "read -P 1 64k 64k", "w.img"]).ok();
            readonce(at.path(), &["check", "-q", "-r", "all", "w.img"]);
            assert!(!is_marked(at.path()), "{command} {wrong:#x}");
            readonce(at.path(), &["io", "-c", "write 0 128k", "w.img"]).ok();
        }
    }
}

/// QED has no mark for this. The one that it has, "to be checked", would have QEMU clear the entry at its next open: the backing would
/// show through where data was.
#[test]
fn a_corrupt_entry_of_qed_is_refused_and_kept() {
    let at = folder();
    let table = image(at.path(), "qed");
    overwrite(at.path(), table, 0x5_0200_u64.to_le_bytes());
    let before = fs::read(at.path().join("w.img")).expect("the image");
    for command in ["write 0 4k", "write -z 0 4k", "read 0 4k"] {
        let met = readonce(at.path(), &["io", "-c", command, "-c", "read -P 1 64k 64k", "w.img"]);
        assert!(met.out.contains("read 65536/65536"), "{met:?}");
        met.fails(1, "the image is corrupt");
        assert!(fs::read(at.path().join("w.img")).expect("the image") == before, "{command}");
    }
}
