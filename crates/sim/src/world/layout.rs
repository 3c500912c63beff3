//! An image by itself: how one of a layout is made, and what it then says of itself.

use std::sync::Arc;

use readonce_format::{
    Driver, FormatError,
    driver::{BackingRef, CreateSpec, Description, Detail, Pin, driver},
};
use readonce_storage::{ReadAt, Storage};

use crate::{places, remote::Packing, shape::Layout};

impl Layout {
    /// Its driver.
    pub fn driver(&self) -> &'static dyn Driver {
        driver(self.format).expect("a known format")
    }

    /// Version 2 of qcow2 cannot say that only we wrote.
    pub(super) fn is_pinned_for_good(&self) -> bool {
        !self.is_version_2()
    }

    /// qcow2 of the old kind: without a dirty bit.
    pub fn is_version_2(&self) -> bool {
        self.option("compat").is_some()
    }

    /// What an image says of itself is what it was made with.
    ///
    /// # Panics
    /// Where it is not.
    pub fn is_described(&self, description: &Description) {
        assert_eq!((description.format, description.cluster_size), (self.format, Some(self.cluster_size)));
        assert_eq!(description.data_file.is_some(), self.data_file);
        let raw = description.data_file.as_ref().is_some_and(|data| data.raw);
        assert_eq!(raw, self.option("data_file_raw").is_some());
        if self.format != "qcow2" {
            return;
        }
        let zstd = self.packed == Packing::Zstd || self.option("compression_type").is_some();
        let bits = self.option("refcount_bits").map_or(16, |bits| bits.parse().expect("a number"));
        let flag = |name| Detail::Flag(self.option(name).is_some());
        let mut wanted = vec![
            ("compat", Detail::Text(if self.is_version_2() { "0.10" } else { "1.1" }.into())),
            ("compression-type", Detail::Text(if zstd { "zstd" } else { "zlib" }.into())),
            ("refcount-bits", Detail::Number(bits)),
        ];
        if !self.is_version_2() {
            wanted.push(("lazy-refcounts", flag("lazy_refcounts")));
            wanted.push(("extended-l2", flag("extended_l2")));
            wanted.push(("corrupt", Detail::Flag(false)));
        }
        for fact in wanted {
            assert!(description.details.contains(&fact), "{fact:?}: {:?}", description.details);
        }
    }

    /// What the image in `file` says of itself.
    ///
    /// # Errors
    /// Of the format.
    pub async fn describe(&self, file: &Arc<dyn Storage>) -> Result<Description, FormatError> {
        let readable: Arc<dyn ReadAt> = file.clone();
        self.driver().describe(&readable).await
    }

    pub(super) async fn create(
        &self,
        file: &Arc<dyn Storage>,
        data: Option<&Arc<dyn Storage>>,
        size: u64,
        (backing, pin): (Option<BackingRef>, Option<Pin>),
    ) {
        let mut options: Vec<_> =
            self.options.iter().map(|(name, value)| ((*name).to_owned(), Some(value.clone()))).collect();
        // There is nothing to copy.
        options.retain(|(name, _)| name != "copy_on_read" || backing.is_some());
        if self.format != "raw" {
            options.push(("cluster_size".into(), Some(self.cluster_size.to_string())));
        }
        let data_file = data.map(|_| places::DATA.to_owned());
        let spec = CreateSpec { size, backing, options, pin, data_file };
        self.driver().create(file, data, &spec).await.expect("the image is made");
    }
}
