//! Tests of the raw driver from outside.
#![allow(clippy::disallowed_methods, reason = "tests run on the real runtime")]

use std::sync::Arc;

use readonce_format::{
    Driver, Durability, Extent, FormatError, Mapping, Room,
    driver::{BackingRef, CreateSpec, HeaderChange, Repair, driver},
};
use readonce_storage::{ReadAt, SimFile, Storage, TokioRuntime};

fn raw() -> &'static dyn Driver {
    driver("raw").unwrap()
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

#[test]
fn every_byte_is_where_it_is() {
    block_on(async {
        let file: Arc<dyn ReadAt> = Arc::new(SimFile::from_bytes(&[1; 1300]));
        let mapper = raw().open(file.clone()).await.unwrap();
        assert_eq!(mapper.geometry().size, 1536);
        let check = |offset, len_max, mapping, len| {
            assert_eq!(mapper.lookup_now(offset, len_max).unwrap().unwrap(), Extent { mapping, len });
        };
        check(0, u64::MAX, Mapping::Data(0), 1300);
        check(1000, 10, Mapping::Data(1000), 10);
        check(1299, 10, Mapping::Data(1299), 1);
        check(1300, u64::MAX, Mapping::Zero, 236);
        assert!(matches!(mapper.lookup(1536, 1).await, Err(FormatError::Invalid(_))));
        assert_eq!(raw().describe(&file).await.unwrap().virtual_size, 1536);
    });
}

#[test]
fn flush_is_sync() {
    block_on(async {
        let file = Arc::new(SimFile::from_bytes(&[0; 4096]));
        let mapper = raw().open_writable(file.clone(), None, TokioRuntime::current()).await.unwrap();
        mapper.flush(Durability::Linked).await.unwrap();
        assert_eq!(file.sync_count(), 0);
        mapper.flush(Durability::Durable).await.unwrap();
        assert_eq!(file.sync_count(), 1);
        assert!(mapper.prepare(0, 512, Room::Data).await.is_err());
        mapper.close().await.unwrap();
        assert_eq!(file.sync_count(), 2);
    });
}

#[test]
fn create_and_refusals() {
    block_on(async {
        let sim = Arc::new(SimFile::from_bytes(&[9; 100]));
        let file: Arc<dyn Storage> = sim.clone();
        let spec = CreateSpec { size: 1000, ..CreateSpec::default() };
        raw().create(&file, None, &spec).await.unwrap();
        assert_eq!(sim.contents(), vec![0; 1024]);
        let with_option = CreateSpec { options: vec![("bogus".into(), None)], ..spec.clone() };
        assert_eq!(
            raw().create(&file, None, &with_option).await.unwrap_err().to_string(),
            "Invalid parameter 'bogus'"
        );
        let with_backing =
            CreateSpec { backing: Some(BackingRef { name: "b".into(), format: None }), ..spec };
        assert_eq!(
            raw().create(&file, None, &with_backing).await.unwrap_err().to_string(),
            "Backing file not supported for file format 'raw'"
        );
        let reader: Arc<dyn ReadAt> = sim.clone();
        let words = "This image format does not support checks";
        assert_eq!(raw().check(&reader).await.unwrap_err().to_string(), words);
        assert_eq!(raw().repair(&file, Repair::All).await.unwrap_err().to_string(), words);
        raw().change(&file, &HeaderChange::Size(2000)).await.unwrap();
        assert_eq!(sim.len(), 2000);
        assert!(raw().change(&file, &HeaderChange::Size(100)).await.is_err());
        assert_eq!(sim.len(), 2000);
        assert!(!raw().probe(&[0; 512]));
    });
}
