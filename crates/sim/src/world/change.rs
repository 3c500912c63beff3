//! Changes of the closed images, as commands make them.

use std::sync::Arc;

use readonce_format::{
    FormatError,
    driver::{HeaderChange, Repair, SnapshotChange},
};
use readonce_storage::Storage;

use super::{Disks, World};

/// A change of the closed images.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// The top grows to so many bytes.
    Size(u64),
    /// The remote backing gets its nth name.
    Name(usize),
    /// The top is repaired: all of it, or its leaks.
    Repair(Repair),
    /// What the top says of copy-on-read.
    CopyOnRead(bool),
    /// The top's snapshots change.
    Snapshot(SnapshotChange),
}

impl World {
    /// Changes the closed images.
    ///
    /// # Errors
    /// Of the format.
    pub async fn change(&self, disks: &Disks, wanted: &Wanted) -> Result<(), FormatError> {
        let file: Arc<dyn Storage> = disks.top.clone();
        let driver = self.shape.top.driver();
        match wanted {
            Wanted::Size(size) => {
                self.mend_if_dirty(&file).await?;
                driver.change(&file, &HeaderChange::Size(*size)).await
            }
            Wanted::Name(name) => {
                let change = HeaderChange::Backing(self.backing_ref(*name), Some(self.pin()));
                match (&self.shape.middle, &disks.middle) {
                    (Some(middle), Some(file)) => {
                        let file: Arc<dyn Storage> = file.clone();
                        middle.layout.driver().change(&file, &change).await
                    }
                    _ => driver.change(&file, &change).await,
                }
            }
            Wanted::CopyOnRead(on) => driver.change(&file, &HeaderChange::CopyOnRead(*on)).await,
            Wanted::Repair(repair) => {
                let report = driver.repair(&file, *repair).await?;
                match report.check_errors + report.corruptions {
                    0 => Ok(()),
                    // Leaks alone are freed where nothing else is wrong: the refcounts of a crash may be.
                    _ if *repair == Repair::Leaks => Ok(()),
                    _ => Err(FormatError::Io(std::io::Error::other(format!("after a repair: {report:?}")))),
                }
            }
            Wanted::Snapshot(change) => {
                self.mend_if_dirty(&file).await?;
                driver.snapshot(&file, change).await
            }
        }
    }

    /// What is refused on an image with a dirty mark is done after a repair.
    async fn mend_if_dirty(&self, file: &Arc<dyn Storage>) -> Result<(), FormatError> {
        if self.shape.top.describe(file).await?.dirty {
            self.shape.top.driver().repair(file, Repair::All).await?;
        }
        Ok(())
    }
}
