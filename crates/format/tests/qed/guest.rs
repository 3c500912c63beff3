//! A small guest: sectors with numbers in them, moved through a mapper as the engine above would, and a model of what each
//! sector may hold after a power loss.

use std::sync::Arc;

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_format::{
    CommitMode, Driver, Durability, FormatError, Mapper, Mapping, Room, WritableMapper,
    driver::{BackingRef, CheckReport, CreateSpec, Pin, driver},
};
use readonce_storage::{ReadAt, SimFile, Storage, TokioRuntime};

pub const SECTOR: u64 = 512;

pub fn qed() -> &'static dyn Driver {
    driver("qed").unwrap()
}

/// Sizes of an image under test.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub cluster_size: u64,
    pub table_size: u64,
    pub size: u64,
    pub backing: bool,
}

/// 4 KiB clusters and tables of one cluster: an L2 table maps 2 MiB, so that three tables are in play.
pub const SMALL: Shape = Shape { cluster_size: 4096, table_size: 1, size: (5 << 20) + 1536, backing: true };

pub fn spec(shape: &Shape) -> CreateSpec {
    CreateSpec {
        size: shape.size,
        backing: shape.backing.then(|| BackingRef { name: "backing.raw".into(), format: Some("raw".into()) }),
        options: vec![
            ("cluster_size".into(), Some(shape.cluster_size.to_string())),
            ("table_size".into(), Some(shape.table_size.to_string())),
        ],
        pin: shape.backing.then(|| Pin { validator: b"etag".to_vec(), len: shape.size }),
        data_file: None,
    }
}

pub async fn create(shape: &Shape) -> Arc<SimFile> {
    let file = Arc::new(SimFile::new());
    let storage: Arc<dyn Storage> = file.clone();
    qed().create(&storage, None, &spec(shape)).await.unwrap();
    file
}

/// What a sector of the backing holds.
pub fn backing_tag(shape: &Shape, sector: u64) -> u32 {
    if shape.backing { 0xb000_0000 + u32::try_from(sector).unwrap() } else { 0 }
}

pub fn sector_of(tag: u32) -> Vec<u8> {
    tag.to_le_bytes().repeat(128)
}

pub fn backing_bytes(shape: &Shape) -> Vec<u8> {
    (0..shape.size / SECTOR).flat_map(|sector| sector_of(backing_tag(shape, sector))).collect()
}

/// The number in a sector; every part of the sector must be of one write.
pub fn tag_of(sector: &[u8]) -> u32 {
    let tag = u32::from_le_bytes(sector[..4].try_into().unwrap());
    assert!(sector.chunks(4).all(|part| part == tag.to_le_bytes()), "a sector is torn");
    tag
}

/// What each sector may hold after a power loss; the last is what it holds now.
#[derive(Clone)]
pub struct Model {
    pub shape: Shape,
    pub allowed: Vec<Vec<u32>>,
}

impl Model {
    pub fn new(shape: Shape) -> Self {
        let allowed = (0..shape.size / SECTOR).map(|sector| vec![backing_tag(&shape, sector)]).collect();
        Self { shape, allowed }
    }

    pub fn write(&mut self, sector: u64, tag: u32) {
        self.allowed[sector as usize].push(tag);
    }

    pub fn now(&self, sector: u64) -> u32 {
        *self.allowed[sector as usize].last().unwrap()
    }

    pub fn flushed(&mut self) {
        for tags in &mut self.allowed {
            tags.drain(..tags.len() - 1);
        }
    }

    /// What was read becomes what is there.
    pub fn settle(&mut self, found: &[u32]) {
        for (tags, found) in self.allowed.iter_mut().zip(found) {
            *tags = vec![*found];
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        (0..self.shape.size / SECTOR).flat_map(|sector| sector_of(self.now(sector))).collect()
    }
}

/// A guest on an image that is open for writing.
pub struct Guest {
    pub file: Arc<dyn Storage>,
    pub mapper: Arc<dyn WritableMapper>,
    pub model: Model,
    pub next_tag: u32,
}

#[derive(Debug)]
pub enum Op {
    Write { sector: u64, sectors: u64 },
    Zero { cluster: u64, clusters: u64 },
    Fill { cluster: u64, clusters: u64 },
    Drop { cluster: u64, clusters: u64 },
    Linked,
    Durable,
    Settle,
}

pub fn random_op(rng: &mut SmallRng, shape: &Shape) -> Op {
    let sectors = shape.size / SECTOR;
    let clusters = shape.size.div_ceil(shape.cluster_size);
    // Neighbourhoods, so that operations meet; the middle one lies across two L2 tables of the small shape.
    let home = [0, 508.min(clusters - 1), clusters.saturating_sub(9)][rng.random_range(0..3)];
    let cluster = (home + rng.random_range(0..9)).min(clusters - 1);
    let len = rng.random_range(1..=6).min(clusters - cluster);
    match rng.random_range(0..100) {
        0..30 => {
            let per_cluster = shape.cluster_size / SECTOR;
            let sector = (cluster * per_cluster + rng.random_range(0..per_cluster)).min(sectors - 1);
            Op::Write { sector, sectors: rng.random_range(1..=20).min(sectors - sector) }
        }
        30..40 => Op::Zero { cluster, clusters: len },
        40..75 => Op::Fill { cluster, clusters: len },
        75..80 => Op::Drop { cluster, clusters: len },
        80..90 => Op::Linked,
        90..98 => Op::Durable,
        _ => Op::Settle,
    }
}

impl Guest {
    pub async fn open(file: Arc<dyn Storage>, model: Model) -> Result<Self, FormatError> {
        let mapper = qed().open_writable(file.clone(), None, TokioRuntime::current()).await?;
        Ok(Self { file, mapper, model, next_tag: 1 })
    }

    pub async fn new(shape: &Shape) -> (Arc<SimFile>, Self) {
        let file = create(shape).await;
        let guest = Self::open(file.clone(), Model::new(*shape)).await.unwrap();
        (file, guest)
    }

    fn old_bytes(&self, cluster: u64) -> Vec<u8> {
        let Shape { cluster_size, size, .. } = self.model.shape;
        let mut bytes = Vec::new();
        for sector in cluster * cluster_size / SECTOR..(cluster + 1) * cluster_size / SECTOR {
            bytes.extend(if sector * SECTOR < size {
                sector_of(self.model.now(sector))
            } else {
                vec![0; 512]
            });
        }
        bytes
    }

    pub async fn mapping(&self, offset: u64) -> Result<Mapping, FormatError> {
        Ok(self.mapper.lookup(offset, 1).await?.mapping)
    }

    /// Writes sectors: in place, or as whole clusters of their own.
    pub async fn write(&mut self, sector: u64, sectors: u64) -> Result<(), FormatError> {
        let cluster_size = self.model.shape.cluster_size;
        let mut at = sector;
        while at < sector + sectors {
            let cluster = at * SECTOR / cluster_size;
            let end = ((cluster + 1) * cluster_size / SECTOR).min(sector + sectors);
            let tag = self.next_tag;
            self.next_tag += 1;
            let data: Vec<u8> = (at..end).flat_map(|_| sector_of(tag)).collect();
            match self.mapping(at * SECTOR).await? {
                Mapping::Data(offset) => {
                    // From here on, even where the write fails, the disk may hold it.
                    let before: Vec<u32> = (at..end).map(|sector| self.model.now(sector)).collect();
                    (at..end).for_each(|sector| self.model.write(sector, tag));
                    if let Err(error) = self.file.write(offset, data.into()).await {
                        (at..end).zip(before).for_each(|(sector, tag)| self.model.write(sector, tag));
                        return Err(error.into());
                    }
                }
                Mapping::Shared(_) | Mapping::Compressed(_) => panic!("QED has neither"),
                Mapping::Absent | Mapping::Zero => {
                    let room = self.mapper.prepare(cluster * cluster_size, cluster_size, Room::Data).await?;
                    let mut whole = self.old_bytes(cluster);
                    let start = ((at * SECTOR) % cluster_size) as usize;
                    whole[start..start + data.len()].copy_from_slice(&data);
                    self.file.write(room.at.unwrap(), whole.into()).await?;
                    assert_eq!(room.commit(CommitMode::Overwrite), cluster_size);
                    (at..end).for_each(|sector| self.model.write(sector, tag));
                }
            }
            at = end;
        }
        Ok(())
    }

    pub async fn zero(&mut self, cluster: u64, clusters: u64) -> Result<(), FormatError> {
        let Shape { cluster_size, size, .. } = self.model.shape;
        for cluster in cluster..cluster + clusters {
            let guest = cluster * cluster_size;
            let sectors = guest / SECTOR..((guest + cluster_size) / SECTOR).min(size / SECTOR);
            match self.mapping(guest).await? {
                Mapping::Data(offset) => {
                    let before: Vec<u32> = sectors.clone().map(|sector| self.model.now(sector)).collect();
                    sectors.clone().for_each(|sector| self.model.write(sector, 0));
                    let zeros = Bytes::from(vec![0; cluster_size as usize]);
                    if let Err(error) = self.file.write(offset, zeros).await {
                        sectors.zip(before).for_each(|(sector, tag)| self.model.write(sector, tag));
                        return Err(error.into());
                    }
                }
                Mapping::Shared(_) | Mapping::Compressed(_) => panic!("QED has neither"),
                Mapping::Absent | Mapping::Zero => {
                    let room = self.mapper.prepare(guest, cluster_size, Room::Zero).await?;
                    room.commit(CommitMode::Overwrite);
                    sectors.for_each(|sector| self.model.write(sector, 0));
                }
            }
        }
        Ok(())
    }

    /// A copy-on-read fill of a run; returns the bytes linked.
    pub async fn fill(&mut self, cluster: u64, clusters: u64) -> Result<u64, FormatError> {
        let Shape { cluster_size, size, .. } = self.model.shape;
        let mut linked = 0;
        let (mut at, end) = (cluster * cluster_size, (cluster + clusters) * cluster_size);
        while at < end {
            let room = self.mapper.prepare(at, end - at, Room::Data).await?;
            at += room.len;
            let mut bytes = Vec::new();
            for sector in room.guest / SECTOR..(room.guest + room.len) / SECTOR {
                let inside = sector * SECTOR < size;
                bytes.extend(if inside {
                    sector_of(backing_tag(&self.model.shape, sector))
                } else {
                    vec![0; 512]
                });
            }
            self.file.write(room.at.unwrap(), bytes.into()).await?;
            linked += room.commit(CommitMode::IfAbsent);
        }
        Ok(linked)
    }

    pub async fn flush(&mut self) -> Result<(), FormatError> {
        self.mapper.flush(Durability::Durable).await?;
        self.model.flushed();
        Ok(())
    }

    pub async fn run(&mut self, op: &Op) -> Result<(), FormatError> {
        match *op {
            Op::Write { sector, sectors } => self.write(sector, sectors).await,
            Op::Zero { cluster, clusters } => self.zero(cluster, clusters).await,
            Op::Fill { cluster, clusters } => self.fill(cluster, clusters).await.map(drop),
            Op::Drop { cluster, clusters } => {
                let cluster_size = self.model.shape.cluster_size;
                let (at, len) = (cluster * cluster_size, clusters * cluster_size);
                let room = self.mapper.prepare(at, len, Room::Data).await?;
                // Written and given up: these bytes must never be seen.
                let junk = Bytes::from(vec![0xee; room.len as usize]);
                self.file.write(room.at.unwrap(), junk).await?;
                Ok(())
            }
            Op::Linked => self.mapper.flush(Durability::Linked).await,
            Op::Durable => self.flush().await,
            Op::Settle => {
                self.mapper.settle().await?;
                self.model.flushed();
                Ok(())
            }
        }
    }

    pub async fn check_reads(&self) {
        let found = read_all(self.mapper.as_ref(), self.file.as_ref(), &self.model.shape).await.unwrap();
        for (sector, found) in (0..).zip(found) {
            assert_eq!(found, self.model.now(sector), "sector {sector}");
        }
    }
}

/// The number in each sector, through any mapper.
pub async fn read_all<M: Mapper + ?Sized, F: ReadAt + ?Sized>(
    mapper: &M,
    file: &F,
    shape: &Shape,
) -> Result<Vec<u32>, FormatError> {
    let mut tags = Vec::new();
    let mut offset = 0;
    while offset < shape.size {
        let extent = match mapper.lookup_now(offset, shape.size - offset) {
            Some(extent) => extent?,
            None => mapper.lookup(offset, shape.size - offset).await?,
        };
        assert!(extent.len >= 1 && extent.len <= shape.size - offset);
        let sectors = offset / SECTOR..(offset + extent.len) / SECTOR;
        match extent.mapping {
            Mapping::Absent => tags.extend(sectors.map(|sector| backing_tag(shape, sector))),
            Mapping::Zero => tags.extend(sectors.map(|_| 0)),
            Mapping::Shared(_) | Mapping::Compressed(_) => panic!("QED has neither"),
            Mapping::Data(at) => {
                let bytes = file.read(at, extent.len as usize).await?;
                tags.extend(bytes.chunks(512).map(tag_of));
            }
        }
        offset += extent.len;
    }
    Ok(tags)
}

pub async fn check(file: &Arc<SimFile>) -> CheckReport {
    let reader: Arc<dyn ReadAt> = file.clone();
    qed().check(&reader).await.unwrap()
}

/// Broken entries and leaks.
pub async fn wrong(file: &Arc<SimFile>) -> (u64, u64) {
    let report = check(file).await;
    (report.corruptions + report.check_errors, report.leaks)
}

pub fn rng(seed: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed)
}

/// Runs `test` on a runtime of one thread.
pub fn block_on<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}
