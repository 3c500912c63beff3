//! Images that are broken, by accident or on purpose: an error that names field, value and limit; never a panic, a hang or a large
//! allocation.

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use readonce_format::{
    FormatError,
    driver::{BackingRef, HeaderChange, Pin, Repair},
};
use readonce_storage::{ReadAt, SimFile, Storage};

use crate::support::{Folder, block_on, create, describe, ok, qcow2, spec};

/// Images by both programs, with all that a header can hold.
fn healthy() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let folder = Folder::new();
        folder.qemu_create("image", "cluster_size=4k", true, "2M").unwrap();
        let path = folder.text("image");
        ok("qemu-img", &["bitmap", "--add", &path, "bitmap"]);
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 70000", "-c", "write -c -P 2 1M 4k", &path]);
        ok("qemu-img", &["snapshot", "-c", "snapshot", &path]);
        let by_qemu = folder.load("image").contents();

        let mut ours =
            spec("copy_on_read,extended_l2=on,cluster_size=16k,preallocation=metadata", true, 1 << 20);
        ours.pin = Some(Pin { validator: b"etag".to_vec(), len: 4711 });
        let url = format!("http://host/{}?{}", "n".repeat(20), "t".repeat(1200));
        ours.backing = Some(BackingRef { name: url, format: Some("raw".into()) });
        let ours = create(&ours).unwrap().contents();
        vec![by_qemu, ours]
    })
}

/// Does with the image whatever can be done with one.
fn use_it(bytes: &[u8]) {
    block_on(async {
        let file = Arc::new(SimFile::from_bytes(bytes));
        let reader: Arc<dyn ReadAt> = file.clone();
        let described = qcow2().describe(&reader).await;
        match qcow2().open(reader.clone()).await {
            Err(error) => assert!(described.is_err(), "{error}"),
            Ok(mapper) => {
                let size = mapper.geometry().size;
                for step in 0..64 {
                    let offset = size / 64 * step;
                    if size == 0 {
                        break;
                    }
                    let _ = mapper.lookup_now(offset, u64::MAX);
                    if let Ok(extent) = mapper.lookup(offset, size - offset).await {
                        assert!(extent.len > 0 && extent.len <= size - offset);
                    }
                }
            }
        }
        for change in [
            HeaderChange::CopyOnRead(true),
            HeaderChange::Backing(
                Some(BackingRef { name: "b".repeat(600), format: Some("raw".into()) }),
                None,
            ),
            HeaderChange::Backing(None, None),
            HeaderChange::Size(1 << 30),
        ] {
            let storage: Arc<dyn Storage> = file.clone();
            let changed = qcow2().change(&storage, &change).await.is_ok();
            // Growth writes refcounts, which may lie where other tables are.
            if changed && described.is_ok() && !matches!(change, HeaderChange::Size(_)) {
                qcow2().describe(&reader).await.unwrap();
            }
        }
        assert!(file.resident_bytes() < 64 << 20);

        let file = Arc::new(SimFile::from_bytes(bytes));
        let (reader, storage): (Arc<dyn ReadAt>, Arc<dyn Storage>) = (file.clone(), file.clone());
        let _ = qcow2().check(&reader).await;
        let _ = qcow2().repair(&storage, Repair::All).await;
        assert!(file.resident_bytes() < 64 << 20);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_headers(
        image in 0..2usize,
        edits in prop::collection::vec((0..1024usize, any::<u8>()), 1..6),
    ) {
        let mut bytes = healthy()[image].clone();
        for (at, value) in edits {
            bytes[at] = value;
        }
        use_it(&bytes);
    }

    #[test]
    fn fields_of_any_value(image in 0..2usize, field in 0..26usize, value in prop_oneof![
        any::<u32>(), 0..16u32, any::<u32>().prop_map(|value| value << 12), Just(u32::MAX),
    ]) {
        let mut bytes = healthy()[image].clone();
        bytes[field * 4..field * 4 + 4].copy_from_slice(&value.to_be_bytes());
        use_it(&bytes);
    }

    #[test]
    fn mutated_anywhere(
        image in 0..2usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let mut bytes = healthy()[image].clone();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        use_it(&bytes);
    }

    #[test]
    fn cut_short(image in 0..2usize, len in any::<prop::sample::Index>()) {
        let bytes = &healthy()[image];
        use_it(&bytes[..len.index(bytes.len())]);
        use_it(&bytes[..len.index(1024)]);
    }
}

/// An image with one field of the header changed.
fn with(at: usize, value: &[u8]) -> Result<(), FormatError> {
    let mut bytes = healthy()[0].clone();
    bytes[at..at + value.len()].copy_from_slice(value);
    describe(&Arc::new(SimFile::from_bytes(&bytes))).map(|_| ())
}

#[test]
fn every_field_is_checked() {
    let u32 = |value: u32| value.to_be_bytes().to_vec();
    let u64 = |value: u64| value.to_be_bytes().to_vec();
    // Size, crypt_method and l1_size are 0.
    let no_guest = |l1_table_offset: u64| [vec![0; 16], u64(l1_table_offset)].concat();
    for (at, value, expect) in [
        (0, b"QED\0".to_vec(), r"magic is QED\x00, must be QFI\xfb"),
        (4, u32(1), "Unsupported qcow2 version 1"),
        (4, u32(4), "Unsupported qcow2 version 4"),
        (
            8,
            u64(8),
            "backing_file_offset is 8, must lie behind the header, 112 bytes, in the first cluster, 4096 bytes",
        ),
        (
            8,
            u64(1 << 40),
            "backing_file_offset is 1099511627776, must lie behind the header, 112 bytes, in the first cluster, 4096 bytes",
        ),
        (8, u64(4090), "backing_file_size is 11, must be at most 6"),
        (16, u32(1024), "backing_file_size is 1024, must be at most 1023"),
        (20, u32(8), "cluster_bits is 8, must be within [9, 21]"),
        (20, u32(22), "cluster_bits is 22, must be within [9, 21]"),
        (24, u64(u64::MAX), "size is 18446744073709551615, must be at most 8796093022208"),
        (
            24,
            u64(4 << 20),
            "l1_size is 1, must be at least 2, for a guest of 4194304 bytes, and at most 4194304",
        ),
        (32, u32(1), "AES encryption of qcow2 images is not supported"),
        (32, u32(2), "LUKS encryption of qcow2 images is not supported"),
        (32, u32(3), "crypt_method is 3, must be 0 (none), 1 (AES) or 2 (LUKS)"),
        (36, u32(0), "l1_size is 0, must be at least 1, for a guest of 2097152 bytes, and at most 4194304"),
        (
            36,
            u32(4_194_305),
            "l1_size is 4194305, must be at least 1, for a guest of 2097152 bytes, and at most 4194304",
        ),
        (
            40,
            u64(0),
            "l1_table_offset is 0, must not be 0, and its 8 bytes must lie inside the file, LEN bytes",
        ),
        (
            40,
            u64(4097),
            "l1_table_offset is 4097, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (
            40,
            u64(u64::MAX - 4095),
            "l1_table_offset is 18446744073709547520, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (
            40,
            u64(1 << 40),
            "l1_table_offset is 1099511627776, must not be 0, and its 8 bytes must lie inside the file, LEN bytes",
        ),
        // A guest of no bytes has no L1 table, and its place is held to the rule all the same: QEMU opens no such image.
        (
            24,
            no_guest(1 << 63),
            "l1_table_offset is 9223372036854775808, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (
            24,
            no_guest(512),
            "l1_table_offset is 512, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (
            48,
            u64(1),
            "refcount_table_offset is 1, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (
            48,
            u64(1 << 63),
            "refcount_table_offset is 9223372036854775808, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (56, u32(2049), "refcount_table_clusters is 2049, must be at most 2048"),
        (60, u32(65537), "nb_snapshots is 65537, must be at most 65536"),
        (64, u64(0), "snapshots_offset is 0, must not be 0"),
        (
            64,
            u64(77),
            "snapshots_offset is 77, must be a multiple of 4096, and the table must end below 2^63",
        ),
        (
            72,
            u64(8),
            "incompatible_features is 0x8, must have bit 3 set exactly where compression_type, which is 0, is not 0",
        ),
        (72, u64(16), "cluster_bits is 12, must be at least 14 with extended L2 entries"),
        (72, u64(4), "'data-file' is required for this image"),
        (72, u64(1 << 40 | 1), "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000"),
        (96, u32(7), "refcount_order is 7, must be at most 6"),
        (100, u32(96), "header_length is 96, must be a multiple of 8 within [104, 4096]"),
        (100, u32(108), "header_length is 108, must be a multiple of 8 within [104, 4096]"),
        (100, u32(8192), "header_length is 8192, must be a multiple of 8 within [104, 4096]"),
        (
            104,
            vec![1],
            "incompatible_features is 0x0, must have bit 3 set exactly where compression_type, which is 1, is not 0",
        ),
        (104, vec![2], "unknown compression_type 2, known are 0 (zlib) and 1 (zstd)"),
        (
            116,
            u32(u32::MAX),
            "length of the header extension 0xe2792aca at 112 is 4294967295, must be at most 48",
        ),
        // The end of the chain is held to what an extension is: QEMU opens no such image. Without it, an image that nobody else can
        // open was filled for hours.
        (164, u32(1), "length of the header extension 0x00000000 at 160 is 1, must be at most 0"),
    ] {
        let expect = expect.replace("LEN", &healthy()[0].len().to_string());
        match with(at, &value) {
            Ok(()) => panic!("byte {at} as {value:?} is taken, but {expect}"),
            Err(error) => assert_eq!(error.to_string(), expect, "byte {at}"),
        }
    }
}

#[test]
fn unknown_features_are_named_by_the_image() {
    let mut bytes = healthy()[1].clone();
    let table = bytes.windows(9).position(|bytes| bytes == b"dirty bit").unwrap() - 2;
    bytes[table + 1] = 63;
    bytes[table + 2..table + 11].copy_from_slice(b"time\x1bwarp");
    bytes[72] = 0x80;
    bytes[73] = 0x01;
    let error = describe(&Arc::new(SimFile::from_bytes(&bytes))).unwrap_err();
    assert_eq!(
        error.to_string(),
        r"Unsupported qcow2 feature(s): time\x1bwarp, Unknown incompatible feature: 1000000000000"
    );
}

#[test]
fn tables_that_take_gigabytes_are_refused_or_read_in_pieces() {
    // 4 Mi entries of the L1 table, in a file that ends long before.
    assert!(
        with(36, &(4u32 << 20).to_be_bytes()).unwrap_err().to_string().contains("must lie inside the file")
    );
    // And in one that does not: the table is a hole.
    let mut bytes = healthy()[0].clone();
    bytes[36..40].copy_from_slice(&(4u32 << 20).to_be_bytes());
    bytes[24..32].copy_from_slice(&(8u64 << 40).to_be_bytes());
    let at = bytes.len().next_multiple_of(4096) as u64;
    bytes[40..48].copy_from_slice(&at.to_be_bytes());
    let file = Arc::new(SimFile::from_bytes(&bytes));
    let storage: Arc<dyn Storage> = file.clone();
    block_on(storage.set_len(at + (32 << 20))).unwrap();
    let reader: Arc<dyn ReadAt> = file.clone();
    let mapper = block_on(qcow2().open(reader)).unwrap();
    let extent = block_on(mapper.lookup((8 << 40) - 4096, 4096)).unwrap();
    assert_eq!((extent.mapping, extent.len), (readonce_format::Mapping::Absent, 4096));
    block_on(mapper.lookup(0, 1 << 40)).unwrap();
}
