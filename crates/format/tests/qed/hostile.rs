//! Images that are broken, by accident or on purpose: an error, never a panic, a hang or a large allocation.

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use readonce_format::{FormatError, driver::Repair};
use readonce_storage::{ReadAt, SimFile, Storage, TokioRuntime};

use crate::guest::{Guest, SMALL, Shape, block_on, qed, random_op, rng};

const SHAPE: Shape = Shape { table_size: 2, size: 3 << 20, ..SMALL };

fn healthy() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        block_on(async {
            let (file, mut guest) = Guest::new(&SHAPE).await;
            let mut rng = rng(3);
            for _ in 0..40 {
                let op = random_op(&mut rng, &SHAPE);
                guest.run(&op).await.unwrap();
            }
            guest.mapper.close().await.unwrap();
            file.contents()
        })
    })
}

/// Does with the image whatever can be done with one.
async fn use_it(bytes: &[u8]) {
    let file = Arc::new(SimFile::from_bytes(bytes));
    let reader: Arc<dyn ReadAt> = file.clone();
    let storage: Arc<dyn Storage> = file.clone();
    let _ = qed().describe(&reader).await;
    let checked = qed().check(&reader).await;
    if let Ok(mapper) = qed().open(reader.clone()).await {
        let size = mapper.geometry().size;
        for step in 0..64 {
            let offset = (size / 64).saturating_mul(step);
            let _ = mapper.lookup_now(offset, u64::MAX);
            if let Ok(extent) = mapper.lookup(offset, u64::MAX).await {
                assert!(extent.len > 0 && extent.len <= size - offset);
            }
        }
    }
    if let Ok(mapper) = qed().open_writable(storage.clone(), None, TokioRuntime::current()).await {
        let _ = mapper.reclaim().await;
        for cluster in [0, 1, 7, 300, 511, 700] {
            let offset = cluster * mapper.geometry().cluster_size;
            let _ = mapper.prepare(offset, mapper.geometry().cluster_size, readonce_format::Room::Data).await;
        }
        let _ = mapper.close().await;
    }
    assert!(file.resident_bytes() < 64 << 20);

    let file = Arc::new(SimFile::from_bytes(bytes));
    let storage: Arc<dyn Storage> = file.clone();
    let reader: Arc<dyn ReadAt> = file.clone();
    let repaired = qed().repair(&storage, Repair::All).await;
    if checked.is_ok() {
        let repaired = repaired.unwrap();
        assert_eq!(repaired.check_errors, 0, "{repaired:?}");
        // Copies of what two entries name may double the file, and no more: only then is anything left. The last copy that
        // did not fit is a table of at most 16 clusters.
        let table_bytes = 16 * header_cluster_bytes(bytes);
        let is_doubled = file.len() + table_bytes >= 2 * bytes.len() as u64;
        assert!(repaired.corruptions == 0 || is_doubled, "{} bytes: {repaired:?}", file.len());
        let again = qed().check(&reader).await.unwrap();
        assert_eq!((again.corruptions, again.leaks), (repaired.corruptions, repaired.leaks));
    }
    assert!(file.resident_bytes() < 64 << 20);
}

/// Bytes of a cluster, as the header says.
fn header_cluster_bytes(image: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes(image[4..8].try_into().unwrap()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_anywhere(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let mut bytes = healthy().to_vec();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        block_on(use_it(&bytes));
    }

    #[test]
    fn mutated_header(edits in prop::collection::vec((4..64_usize, any::<u8>()), 1..4)) {
        let mut bytes = healthy().to_vec();
        for (at, value) in edits {
            bytes[at] = value;
        }
        block_on(use_it(&bytes));
    }

    #[test]
    fn mutated_tables(edits in prop::collection::vec((0..3_usize, 0..1024_usize, 0..400_u64), 1..12)) {
        let mut bytes = healthy().to_vec();
        let l1 = 4096;
        let tables: Vec<usize> = bytes[l1..l1 + 64]
            .chunks(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()) as usize)
            .filter(|&table| table != 0)
            .collect();
        for (table, entry, cluster) in edits {
            let at = match table {
                0 => l1 + entry % 8 * 8,
                _ => tables[table % tables.len()] + entry * 8,
            };
            bytes[at..at + 8].copy_from_slice(&(cluster * 4096).to_le_bytes());
        }
        block_on(use_it(&bytes));
    }

    #[test]
    fn cut_short(len in any::<prop::sample::Index>()) {
        let bytes = healthy();
        block_on(use_it(&bytes[..len.index(bytes.len())]));
    }
}

/// Sets a field of the header and says what opening answers.
fn with_field(offset: usize, value: &[u8]) -> String {
    let mut bytes = healthy().to_vec();
    bytes[offset..offset + value.len()].copy_from_slice(value);
    let reader: Arc<dyn ReadAt> = Arc::new(SimFile::from_bytes(&bytes));
    match block_on(qed().describe(&reader)) {
        Ok(_) => "fine".into(),
        Err(error @ (FormatError::Corrupt { .. } | FormatError::Unsupported(_))) => error.to_string(),
        Err(error) => panic!("{error:?}"),
    }
}

#[test]
fn errors_name_field_value_and_limit() {
    let file_len = healthy().len();
    for (offset, value, expect) in [
        (0, &b"QFI\xfb"[..], "magic is QFI\\xfb, must be QED\\x00".to_owned()),
        (
            4,
            &5000_u32.to_le_bytes(),
            "cluster_size is 5000, must be a power of 2 within [4096, 67108864]".into(),
        ),
        (
            4,
            &2048_u32.to_le_bytes(),
            "cluster_size is 2048, must be a power of 2 within [4096, 67108864]".into(),
        ),
        (8, &0_u32.to_le_bytes(), "table_size is 0, must be a power of 2 within [1, 16]".into()),
        (8, &32_u32.to_le_bytes(), "table_size is 32, must be a power of 2 within [1, 16]".into()),
        (12, &0_u32.to_le_bytes(), "header_size is 0, must be at least 1 cluster".into()),
        (
            12,
            &u32::MAX.to_le_bytes(),
            format!("header_size is 4294967295, must lie inside the file, {} clusters", file_len / 4096),
        ),
        (16, &9_u64.to_le_bytes(), "features has unknown incompatible bits 0x8, known are 0x7".into()),
        (
            40,
            &0_u64.to_le_bytes(),
            format!(
                "l1_table_offset is 0, must be a multiple of 4096, at least 4096, and 8192 bytes before the last \
                 whole cluster's end at {file_len}"
            ),
        ),
        (
            48,
            &513_u64.to_le_bytes(),
            "image_size is 513, must be a multiple of 512 and at most 4294967296".into(),
        ),
        (
            48,
            &(1_u64 << 33).to_le_bytes(),
            "image_size is 8589934592, must be a multiple of 512 and at most 4294967296".into(),
        ),
        (60, &4096_u32.to_le_bytes(), "backing_filename_size is 4096, must be at most 4095".into()),
        (
            56,
            &4090_u32.to_le_bytes(),
            "backing_filename_offset is 4090, must be at least 64 and end inside the header area, 4096 bytes"
                .into(),
        ),
        (64, b"\xff", "backing_filename is \\xffacking.raw, must be UTF-8 without zero bytes".into()),
        (24, &u64::MAX.to_le_bytes(), "fine".into()),
        (32, &u64::MAX.to_le_bytes(), "fine".into()),
        (48, &0_u64.to_le_bytes(), "fine".into()),
    ] {
        assert_eq!(with_field(offset, value), expect);
    }
}

#[test]
fn a_write_never_goes_into_a_table() {
    let healthy = healthy();
    block_on(async {
        for target in ["l1", "l2", "header"] {
            let mut bytes = healthy.to_vec();
            let table = u64::from_le_bytes(bytes[4096..4104].try_into().unwrap());
            let evil = match target {
                "l1" => 4096,
                "l2" => table,
                _ => 0x0fff_0000_0000_1000,
            };
            bytes[table as usize..][..8].copy_from_slice(&u64::to_le_bytes(evil));
            let file: Arc<dyn Storage> = Arc::new(SimFile::from_bytes(&bytes));
            let mapper = qed().open_writable(file, None, TokioRuntime::current()).await.unwrap();
            let error = mapper.lookup(0, 512).await.unwrap_err();
            assert!(matches!(error, FormatError::Corrupt { .. }), "{target}: {error}");
            let error = mapper.prepare(0, 4096, readonce_format::Room::Data).await;
            assert!(matches!(error, Err(FormatError::Corrupt { .. })), "{target}");
        }
    });
}

#[test]
fn tables_that_overlap_are_not_opened_for_writing() {
    let healthy = healthy();
    block_on(async {
        for shift in [0, 4096] {
            let mut bytes = healthy.to_vec();
            let table = u64::from_le_bytes(bytes[4096..4104].try_into().unwrap());
            bytes[4096 + 7 * 8..][..8].copy_from_slice(&(table + shift).to_le_bytes());
            // The guest's size does not use entry 7.
            bytes[48..56].copy_from_slice(&(32_u64 << 20).to_le_bytes());
            let file: Arc<dyn Storage> = Arc::new(SimFile::from_bytes(&bytes));
            let error = qed().open_writable(file, None, TokioRuntime::current()).await.err().unwrap();
            assert!(error.to_string().contains("must not share a cluster"), "{error}");
        }
    });
}

#[test]
fn a_huge_empty_file_costs_nothing() {
    let healthy = healthy();
    block_on(async {
        let file = Arc::new(SimFile::from_bytes(healthy));
        file.set_len(1 << 45).await.unwrap();
        let reader: Arc<dyn ReadAt> = file.clone();
        let error = qed().check(&reader).await.unwrap_err();
        assert!(error.to_string().contains("at most 4294967296 can be checked"), "{error}");
        assert!(qed().open(reader).await.is_ok());
    });
}

#[test]
fn an_entry_past_the_end_stays_wrong_when_the_file_grows() {
    let healthy = healthy();
    block_on(async {
        let mut bytes = healthy.to_vec();
        let table = u64::from_le_bytes(bytes[4096..4104].try_into().unwrap()) as usize;
        // Cluster 600 lies in another slice than those that are written; cluster 30 in the same.
        for cluster in [600, 30] {
            let past = (bytes.len() + 4096) as u64;
            bytes[table + cluster * 8..][..8].copy_from_slice(&past.to_le_bytes());
        }
        let file: Arc<dyn Storage> = Arc::new(SimFile::from_bytes(&bytes));
        let mapper = qed().open_writable(file.clone(), None, TokioRuntime::current()).await.unwrap();
        for _ in 0..2 {
            for cluster in 40..60 {
                let room = mapper.prepare(cluster * 4096, 4096, readonce_format::Room::Data).await.unwrap();
                room.commit(readonce_format::CommitMode::IfAbsent);
            }
            mapper.flush(readonce_format::Durability::Durable).await.unwrap();
            assert!(file.len() > bytes.len() as u64 + 8192);
            for cluster in [600, 30] {
                let error = mapper.lookup(cluster * 4096, 512).await.unwrap_err();
                assert!(matches!(error, FormatError::Corrupt { .. }), "{cluster}: {error}");
            }
        }
    });
}

#[test]
fn an_entry_past_the_end_stays_wrong_when_its_slice_is_read_again() {
    let shape = Shape { cluster_size: 4096, table_size: 16, size: 128 << 30, backing: false };
    block_on(async {
        let file = crate::guest::create(&shape).await;
        let open = || qed().open_writable(file.clone(), None, TokioRuntime::current());
        let link = async |mapper: &dyn readonce_format::WritableMapper, cluster: u64| {
            let room = mapper.prepare(cluster * 4096, 4096, readonce_format::Room::Data).await.unwrap();
            room.commit(readonce_format::CommitMode::IfAbsent);
            mapper.flush(readonce_format::Durability::Durable).await.unwrap();
        };
        let mapper = open().await.unwrap();
        link(mapper.as_ref(), 0).await;
        mapper.close().await.unwrap();
        let table = file.read(4096, 8).await.unwrap();
        let table = u64::from_le_bytes(table[..].try_into().unwrap());
        // Where the next cluster will be allocated.
        let past = file.len();
        file.write(table + 30 * 8, past.to_le_bytes().to_vec().into()).await.unwrap();

        let mapper = open().await.unwrap();
        link(mapper.as_ref(), 40).await;
        // Slices that share their place in the cache with the first drive it out.
        for other in 1..12 {
            link(mapper.as_ref(), other * 2048 * 512).await;
        }
        let reads = file.op_count();
        let error = mapper.lookup(30 * 4096, 512).await.unwrap_err();
        assert!(matches!(error, FormatError::Corrupt { .. }), "{error}");
        assert_eq!(file.op_count() - reads, 1, "the slice was read again");
        assert!(matches!(
            mapper.lookup(40 * 4096, 1).await.unwrap().mapping,
            readonce_format::Mapping::Data(_)
        ));
    });
}
