//! qcow2: QEMU's format, versions 2 and 3, from its published specification.
//!
//! - `header`, `extensions`, `record`, `layout`: what lies where in the file, and which values are valid.
//! - `entry`, `slice`, `l1`, `tables`: the tables in memory; `reader`: an image open for reading.
//! - `writer`: an image open for writing; `commit`: how an entry changes, `links`: what is linked in memory and not yet on disk,
//!   `space`, `refs` and `refcount_table`: clusters and their refcounts, `flush`: how it all gets to the disk, `mark`: the header meanwhile,
//!   `known`: what is no place for data, `reclaim`: what a crash left.
//! - `refcount`, `snapshots`: refcounts and snapshots as the file stores them; `scan` with `judge`, `counts`, `chunks` and `bitmaps`, `check`: what refers to clusters, and
//!   whether the refcounts say the same; `repair` with `mend`, `overlaps`, `recount` and `flags`: making it right; `snapshot`:
//!   internal snapshots made, applied and deleted.
//! - `describe`: what an image says of itself. `head`, `create`: a new image; `change`, `grow`: a changed header.

mod bitmaps;
mod change;
mod check;
mod chunks;
mod commit;
mod counts;
mod create;
mod describe;
mod entry;
mod extensions;
mod flags;
mod flush;
mod grow;
mod head;
mod header;
mod holes;
mod judge;
mod known;
mod l1;
mod layout;
mod links;
mod mark;
mod mend;
mod overlaps;
mod reader;
mod reclaim;
mod record;
mod recount;
mod refcount;
mod refcount_table;
mod refs;
mod repair;
mod scan;
mod slice;
mod snapshot;
mod snapshots;
mod space;
mod tables;
mod writer;

use std::sync::Arc;

use readonce_storage::{BoxFuture, ReadAt, Rt, Storage, Synced};

use self::{reader::Reader, writer::Writer};
use crate::{
    Driver, FormatError, Mapper, WritableMapper,
    driver::{CheckReport, CreateSpec, Description, HeaderChange, OptionSpec, Repair, SnapshotChange},
    finding::Tell,
};

/// The qcow2 format.
pub struct Qcow2;

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn probe(&self, head: &[u8]) -> bool {
        // Version 1 is another format.
        head.strip_prefix(&header::MAGIC).is_some_and(|rest| !rest.starts_with(&[0, 0, 0, 1]))
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        create::OPTIONS
    }

    fn create<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        data: Option<&'a Arc<dyn Storage>>,
        spec: &'a CreateSpec,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(create::create(file, data, spec))
    }

    fn describe<'a>(&self, file: &'a Arc<dyn ReadAt>) -> BoxFuture<'a, Result<Description, FormatError>> {
        Box::pin(describe::describe(file.as_ref()))
    }

    fn open(&self, file: Arc<dyn ReadAt>) -> BoxFuture<'static, Result<Arc<dyn Mapper>, FormatError>> {
        Box::pin(async move {
            let mapper: Arc<dyn Mapper> = Arc::new(Reader::open(file).await?);
            Ok(mapper)
        })
    }

    fn open_writable(
        &self,
        file: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        rt: Rt,
    ) -> BoxFuture<'static, Result<Arc<dyn WritableMapper>, FormatError>> {
        Box::pin(async move {
            let (file, data) = (Synced::over(file), data.map(Synced::over));
            let mapper: Arc<dyn WritableMapper> = Arc::new(Writer::open(file, data, rt).await?);
            Ok(mapper)
        })
    }

    fn mends_itself(&self) -> bool {
        // Refcounts that were to be written late are counted anew; all else is in order whenever the power fails.
        true
    }

    fn check_telling<'a>(
        &self,
        file: &'a Arc<dyn ReadAt>,
        tell: Tell<'a>,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>> {
        Box::pin(check::check(file, tell))
    }

    fn repair_telling<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        repair: Repair,
        tell: Tell<'a>,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>> {
        Box::pin(repair::repair(file, repair, tell))
    }

    fn change<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        change: &'a HeaderChange,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(change::change(file, change))
    }

    fn snapshot<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        change: &'a SnapshotChange,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(snapshot::change(file, change))
    }
}
