//! A qcow2 image that is open for reading.

use std::sync::Arc;

use readonce_storage::{BoxFuture, ReadAt};

use super::{header::Header, holes::names_holes, tables::Tables};
use crate::{Extent, FormatError, Geometry, Mapper};

pub(super) struct Reader {
    tables: Tables,
    file: Arc<dyn ReadAt>,
    header: Header,
}

impl Reader {
    pub(super) async fn open(file: Arc<dyn ReadAt>) -> Result<Self, FormatError> {
        let header = Header::read(file.as_ref()).await?;
        Ok(Self { tables: Tables::new(file.clone(), &header), file, header })
    }
}

impl Mapper for Reader {
    fn geometry(&self) -> Geometry {
        self.tables.geometry()
    }

    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        self.tables.extent_now(offset, len_max)
    }

    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>> {
        Box::pin(self.tables.extent(offset, len_max))
    }

    fn names_compressed(&self) -> bool {
        self.tables.names_compressed()
    }

    fn room(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<(Option<u64>, u64), FormatError>> {
        Box::pin(self.tables.room(offset, len_max))
    }

    fn names_holes(&self, allocated_bytes: u64) -> BoxFuture<'_, Result<bool, FormatError>> {
        Box::pin(names_holes(self.file.as_ref(), &self.header, allocated_bytes))
    }
}
