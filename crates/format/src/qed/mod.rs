//! QED: QEMU's enhanced disk format, from its published specification.
//!
//! - `header`, `record`, `layout`: what lies where in the file, and which values are valid.
//! - `slice`, `tables`: the tables in memory; `reader`: an image open for reading.
//! - `writer`: an image open for writing; `links`: what is linked in memory and not yet on disk,
//!   `flush`: how it gets there, `mark`: NEED_CHECK, `reclaim`: what a crash left.
//! - `create`, `change`: a new image, a changed header. `scan`, `check`, `repair` with `move_l1`: an image as a whole.
//!
//! Extensions that the specification leaves room for, and that QEMU keeps or clears by the rules for unknown bits: compat bit
//! 0x01, copy-on-read is the image's default; compat bit 0x02 or 0x04 with autoclear bit 0x01, a pin (`record`).

mod change;
mod check;
mod create;
mod flush;
mod header;
mod layout;
mod links;
mod mark;
mod move_l1;
mod reader;
mod reclaim;
mod record;
mod repair;
mod scan;
mod slice;
mod tables;
mod writer;

use std::sync::Arc;

use readonce_storage::{BoxFuture, ReadAt, Rt, Storage, Synced};

use self::{header::Header, reader::Reader, writer::Writer};
use crate::{
    Driver, FormatError, Mapper, WritableMapper,
    driver::{CheckReport, CreateSpec, Description, HeaderChange, OptionSpec, Repair},
    finding::Tell,
};

/// The QED format.
pub struct Qed;

impl Driver for Qed {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn probe(&self, head: &[u8]) -> bool {
        head.starts_with(&header::MAGIC)
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        create::OPTIONS
    }

    fn create<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        _: Option<&'a Arc<dyn Storage>>,
        spec: &'a CreateSpec,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(create::create(file, spec))
    }

    fn refused_by_qemu(&self, spec: &CreateSpec) -> Option<&'static str> {
        create::refused_by_qemu(spec)
    }

    fn describe<'a>(&self, file: &'a Arc<dyn ReadAt>) -> BoxFuture<'a, Result<Description, FormatError>> {
        Box::pin(async move { Ok(Header::read(file.as_ref()).await?.describe()) })
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
        _: Option<Arc<dyn Storage>>,
        rt: Rt,
    ) -> BoxFuture<'static, Result<Arc<dyn WritableMapper>, FormatError>> {
        Box::pin(async move {
            let mapper: Arc<dyn WritableMapper> = Arc::new(Writer::open(Synced::over(file), rt).await?);
            Ok(mapper)
        })
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
}
