//! Raw: the file is the disk.
//!
//! - Guest offset and file offset are the same; every unit is `Data`, so nothing is ever absent, prepared or linked.
//! - A file whose length is no multiple of 512 is rounded up; the bytes past its end are [`Mapping::Zero`].
//!
//! Not here: a check, a backing, a header. Raw has none of them.

use std::sync::Arc;

use readonce_storage::{BoxFuture, ReadAt, Rt, Storage, Synced};

use crate::{
    Abilities, Driver, Durability, Extent, FormatError, Geometry, Mapper, Mapping, Reservation, Room,
    Unlinked, WritableMapper,
    driver::{CheckReport, CreateSpec, Description, HeaderChange, OptionSpec, Repair},
    finding::Tell,
    number::round_up,
};

/// Bytes of the smallest piece that a guest addresses.
const SECTOR: u64 = 512;

/// The raw format.
pub struct Raw;

/// A raw file that is open.
struct RawMapper<F: ?Sized> {
    file: Arc<F>,
    /// Bytes of the file when it was opened.
    file_len: u64,
    /// `file_len` rounded up to whole sectors.
    size: u64,
}

fn size_of(file_len: u64) -> Result<u64, FormatError> {
    round_up(file_len, SECTOR).ok_or_else(|| {
        FormatError::corrupt("file length", file_len, "must leave room to be rounded up to 512 bytes")
    })
}

impl<F: ReadAt + ?Sized> RawMapper<F> {
    fn open(file: Arc<F>) -> Result<Self, FormatError> {
        let file_len = file.len();
        let size = size_of(file_len)?;
        Ok(Self { file, file_len, size })
    }

    fn extent(&self, offset: u64, len_max: u64) -> Result<Extent, FormatError> {
        let (mapping, end) = if offset < self.file_len {
            (Mapping::Data(offset), self.file_len)
        } else {
            (Mapping::Zero, self.size)
        };
        match end.checked_sub(offset) {
            Some(left) if left > 0 => Ok(Extent { mapping, len: left.min(len_max).max(1) }),
            _ => Err(FormatError::Invalid(format!(
                "offset {offset} lies past the end of the image, {} bytes",
                self.size
            ))),
        }
    }
}

impl<F: ReadAt + ?Sized> Mapper for RawMapper<F> {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size, cluster_size: SECTOR, fill_unit: SECTOR }
    }

    fn lookup_now(&self, offset: u64, len_max: u64) -> Option<Result<Extent, FormatError>> {
        Some(self.extent(offset, len_max))
    }

    fn lookup(&self, offset: u64, len_max: u64) -> BoxFuture<'_, Result<Extent, FormatError>> {
        Box::pin(async move { self.extent(offset, len_max) })
    }
}

impl WritableMapper for RawMapper<dyn Storage> {
    fn abilities(&self) -> Abilities {
        Abilities { zero: false, unlink: false }
    }

    fn prepare(&self, _: u64, _: u64, _: Room) -> BoxFuture<'_, Result<Reservation, FormatError>> {
        Box::pin(async {
            Err(FormatError::Unsupported("a raw image has no room to set aside: all of it is data".into()))
        })
    }

    fn flush(&self, durability: Durability) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async move {
            match durability {
                Durability::Linked => Ok(()),
                Durability::Durable => Ok(self.file.sync().await?),
            }
        })
    }

    fn unlinked_bytes(&self) -> u64 {
        0
    }

    fn take_unlinked(&self) -> Option<Unlinked> {
        None
    }

    fn settle(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async { Ok(()) })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        self.flush(Durability::Durable)
    }

    fn reclaim(&self) -> BoxFuture<'_, Result<(), FormatError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn probe(&self, _: &[u8]) -> bool {
        false
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    fn create<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        _: Option<&'a Arc<dyn Storage>>,
        spec: &'a CreateSpec,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(async move {
            if let Some((name, _)) = spec.options.first() {
                return Err(FormatError::Invalid(format!("Invalid parameter '{name}'")));
            }
            if spec.backing.is_some() {
                return Err(FormatError::Invalid("Backing file not supported for file format 'raw'".into()));
            }
            let size = round_up(spec.size, SECTOR)
                .ok_or_else(|| FormatError::Invalid("Invalid image size specified".into()))?;
            file.set_len(0).await?;
            file.set_len(size).await?;
            Ok(file.sync().await?)
        })
    }

    fn describe<'a>(&self, file: &'a Arc<dyn ReadAt>) -> BoxFuture<'a, Result<Description, FormatError>> {
        Box::pin(async move {
            Ok(Description {
                format: "raw",
                virtual_size: size_of(file.len())?,
                cluster_size: None,
                backing: None,
                copy_on_read: false,
                pin: None,
                only_readonce_wrote: None,
                dirty: false,
                in_use: false,
                header_bytes_max: 0,
                data_file: None,
                details: Vec::new(),
                snapshots: Vec::new(),
            })
        })
    }

    fn open(&self, file: Arc<dyn ReadAt>) -> BoxFuture<'static, Result<Arc<dyn Mapper>, FormatError>> {
        Box::pin(async move {
            let mapper: Arc<dyn Mapper> = Arc::new(RawMapper::open(file)?);
            Ok(mapper)
        })
    }

    fn open_writable(
        &self,
        file: Arc<dyn Storage>,
        _: Option<Arc<dyn Storage>>,
        _: Rt,
    ) -> BoxFuture<'static, Result<Arc<dyn WritableMapper>, FormatError>> {
        Box::pin(async move {
            let mapper: Arc<dyn WritableMapper> = Arc::new(RawMapper::open(Synced::over(file))?);
            Ok(mapper)
        })
    }

    fn check_telling<'a>(
        &self,
        _: &'a Arc<dyn ReadAt>,
        _: Tell<'a>,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>> {
        Box::pin(async { Err(no_check()) })
    }

    fn repair_telling<'a>(
        &self,
        _: &'a Arc<dyn Storage>,
        _: Repair,
        _: Tell<'a>,
    ) -> BoxFuture<'a, Result<CheckReport, FormatError>> {
        Box::pin(async { Err(no_check()) })
    }

    fn change<'a>(
        &self,
        file: &'a Arc<dyn Storage>,
        change: &'a HeaderChange,
    ) -> BoxFuture<'a, Result<(), FormatError>> {
        Box::pin(async move {
            match change {
                HeaderChange::Size(size) => {
                    size_of(*size)
                        .map_err(|_| FormatError::Invalid("Invalid image size specified".into()))?;
                    if *size < file.len() {
                        return Err(FormatError::Unsupported(
                            "Shrinking images is currently not supported".into(),
                        ));
                    }
                    // To the byte, as qemu-img: the guest sees whole sectors all the same.
                    file.set_len(*size).await?;
                    Ok(file.sync().await?)
                }
                HeaderChange::CopyOnRead(_) => Err(FormatError::Unsupported(
                    "Format driver 'raw' does not support option amendment".into(),
                )),
                HeaderChange::Backing(..) | HeaderChange::Pin(_) => {
                    Err(FormatError::Unsupported("A raw image has no backing file".into()))
                }
            }
        })
    }
}

/// In qemu-img's words; its exit code for this is 63.
fn no_check() -> FormatError {
    FormatError::Unsupported("This image format does not support checks".into())
}
