//! The images that readonce makes without being asked how: `run`'s, and the demo's.
//!
//! A qcow2 image has clusters of 128 KiB in subclusters of 4 KiB: a small read keeps, and a small write needs, no more of the
//! backing than itself, while the tables stay as small as those of large clusters.

use std::{path::Path, sync::Arc};

use readonce_format::{
    Driver,
    driver::{CreateSpec, driver},
};
use readonce_storage::{LocalFile, Storage, local::OpenMode};

use crate::failure::Failure;

/// Options of a new qcow2 image.
const QCOW2_OPTIONS: [(&str, &str); 2] = [("cluster_size", "131072"), ("extended_l2", "on")];

/// A format that keeps what is read of a backing.
#[derive(Clone, Copy)]
pub struct Keeper {
    driver: &'static dyn Driver,
}

impl Keeper {
    /// The format of that name; qcow2 without one.
    pub fn named(format: Option<&str>) -> Result<Self, Failure> {
        let name = format.unwrap_or("qcow2");
        let driver = driver(name).ok_or_else(|| Failure::new(format!("Unknown driver '{name}'")))?;
        if !driver.create_options().iter().any(|option| option.name == "copy_on_read") {
            return Err(Failure::new(format!(
                "Format driver '{name}' cannot keep what is read: -f qcow2 or -f qed can (-F is the format of what lies behind)"
            )));
        }
        Ok(Self { driver })
    }

    /// The driver.
    pub fn driver(self) -> &'static dyn Driver {
        self.driver
    }

    /// As in `-f`, and what its files are called behind the dot.
    pub fn name(self) -> &'static str {
        self.driver.name()
    }

    /// Makes a new image at `place`; what cannot be finished is not left behind. The options of `spec` are added to those that
    /// such an image has.
    pub async fn create(self, place: &Path, mut spec: CreateSpec) -> Result<(), Failure> {
        if self.name() == "qcow2" {
            let own = QCOW2_OPTIONS.map(|(name, value)| (name.to_owned(), Some(value.to_owned())));
            spec.options.extend(own);
        }
        let failed = |cause: String| Failure::new(format!("Could not create '{}': {cause}", place.display()));
        let file = LocalFile::open(place, OpenMode::CreateNew).map_err(|error| failed(error.to_string()))?;
        let file: Arc<dyn Storage> = Arc::new(file);
        let created = self.driver.create(&file, None, &spec).await;
        if created.is_err() {
            let _ = std::fs::remove_file(place);
        }
        created.map_err(|error| failed(error.to_string()))
    }
}
