//! A small valid image, made through the driver: drawn options, several sessions, power losses, snapshots, compressed clusters.
//!
//! - What comes out is clean and holds what the model says: made images are a test of the driver before anything is damaged.
//! - A power loss comes after a durable flush only, so that the model stays certain.

use std::{sync::Arc, time::Duration};

use readonce_format::{
    CommitMode, Driver, Durability, Mapping, Room,
    codec::Codec,
    driver::{BackingRef, CreateSpec, Pin, SnapshotChange},
};
use readonce_storage::{ReadAt, Rt, SimFile, Storage};

use super::{
    Format, check_clean,
    guest::{Guest, Unit, pattern, read_units, unit_len},
};
use crate::{codec::compress, draw::Draw};

/// An image and what it holds.
pub(crate) struct Made {
    pub(crate) file: Vec<u8>,
    /// Bytes of a hole behind them.
    pub(crate) tail: u64,
    /// Where the data lies, if not in the file.
    pub(crate) data: Option<Vec<u8>>,
    /// What a reader finds.
    pub(crate) units: Vec<Unit>,
    /// Bytes.
    pub(crate) cluster_size: u64,
    pub(crate) fill_unit: u64,
    pub(crate) size: u64,
    pub(crate) has_backing: bool,
}

/// Data lies in the file, or in one of its own.
pub(crate) struct Files {
    pub(crate) file: Arc<SimFile>,
    pub(crate) data: Option<Arc<SimFile>>,
}

impl Files {
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        self.file.clone()
    }

    pub(crate) fn reader(&self) -> Arc<dyn ReadAt> {
        self.file.clone()
    }

    pub(crate) fn data_storage(&self) -> Option<Arc<dyn Storage>> {
        self.data.clone().map(|data| data as Arc<dyn Storage>)
    }

    pub(crate) fn data_reader(&self) -> Arc<dyn ReadAt> {
        self.data.clone().unwrap_or_else(|| self.file.clone())
    }

    /// Opens for writing.
    pub(crate) async fn guest(
        &self,
        driver: &dyn Driver,
        rt: &Rt,
    ) -> Result<Guest, readonce_format::FormatError> {
        let mapper = driver.open_writable(self.storage(), self.data_storage(), rt.clone()).await?;
        let data = self.data_storage().unwrap_or_else(|| self.storage());
        Ok(Guest { mapper, file: self.storage(), data })
    }
}

/// Bytes of the longest table that is made: one of zeros may lie behind everything else.
const TABLE_BYTES_MAX: usize = 16 * 16384;

/// A file of these bytes and a hole.
pub(crate) async fn file_of(bytes: &[u8], hole: u64) -> Arc<SimFile> {
    let file = Arc::new(SimFile::from_bytes(bytes));
    if hole > 0 {
        let len = (bytes.len() as u64).saturating_add(hole).min(i64::MAX as u64);
        file.set_len(len).await.expect("a file can be so long");
        file.sync().await.expect("no fault is set");
    }
    file
}

struct Plan {
    spec: CreateSpec,
    codec: Codec,
    extended: bool,
    cluster: u64,
}

fn plan(format: Format, draw: &mut Draw<'_>) -> Plan {
    let mut options: Vec<(String, Option<String>)> = Vec::new();
    let mut set = |name: &str, value: &str| options.push((name.into(), Some(value.into())));
    let mut codec = Codec::Deflate;
    let mut extended = false;
    let mut external = false;
    let cluster: u64;
    if format == Format::Qed {
        cluster = draw.of(&[4096, 4096, 8192, 16384]);
        set("table_size", draw.of(&["1", "1", "2", "4", "16"]));
    } else {
        let version = draw.of(&["v3", "v3", "v2"]);
        extended = version == "v3" && draw.once_in(4);
        cluster = if extended { 16384 } else { draw.of(&[512, 512, 1024, 4096]) };
        set("compat", version);
        if version == "v3" {
            set("refcount_bits", draw.of(&["16", "1", "2", "4", "8", "32", "64"]));
            set("lazy_refcounts", draw.of(&["off", "on"]));
            set("extended_l2", if extended { "on" } else { "off" });
            if draw.once_in(3) {
                codec = Codec::Zstd;
                set("compression_type", "zstd");
            }
            external = draw.once_in(8);
            if external && draw.once_in(2) {
                set("data_file_raw", "on");
            }
        }
    }
    set("cluster_size", &cluster.to_string());
    let raw_data = options.iter().any(|(name, _)| name == "data_file_raw");
    let backing = (!raw_data && !draw.once_in(3)).then(|| BackingRef {
        name: "b".repeat(1 + draw.index(60)),
        format: draw
            .of(&[Some("raw"), None, Some("qcow2")])
            .filter(|name| format == Format::Qcow2 || *name == "raw")
            .map(Into::into),
    });
    if format == Format::Qcow2 && (backing.is_none() || extended) && draw.once_in(4) {
        options.push(("preallocation".into(), Some("metadata".into())));
    }
    if backing.is_some() {
        options.push(("copy_on_read".into(), Some(draw.of(&["off", "on"]).into())));
    }
    let pin = (backing.is_some() && draw.once_in(2))
        .then(|| Pin { validator: b"\x01\x01\"etag\"".to_vec(), len: 4711 });
    // An L2 table of qcow2's smallest clusters maps 32 KiB; one of QED's 2 MiB.
    let clusters = draw.of(&[8, 70, 150, 600]);
    let size = clusters * cluster + draw.below(8) * 512;
    let data_file = external.then(|| "data".to_owned());
    Plan { spec: CreateSpec { size, backing, options, pin, data_file }, codec, extended, cluster }
}

/// Makes an image.
pub(crate) async fn make(format: Format, driver: &dyn Driver, draw: &mut Draw<'_>, rt: &Rt) -> Made {
    let plan = plan(format, draw);
    tell!("{:?}", plan.spec);
    let data = plan.spec.data_file.as_ref().map(|_| Arc::new(SimFile::new()));
    let mut files = Files { file: Arc::new(SimFile::new()), data };
    driver
        .create(&files.storage(), files.data_storage().as_ref(), &plan.spec)
        .await
        .unwrap_or_else(|error| panic!("{:?}: {error}", plan.spec));
    let lazy = plan.spec.options.contains(&("lazy_refcounts".into(), Some("on".into())));
    let has_backing = plan.spec.backing.is_some();
    let mut world = World {
        driver,
        rt,
        has_backing,
        lazy,
        reclaimed: true,
        lost_power: false,
        tag: 0,
        units: Vec::new(),
        snapshots: Vec::new(),
    };
    let mapper = driver.open(files.reader()).await.expect("it was just made");
    let geometry = mapper.geometry();
    world.units = read_units(&*mapper, &files.reader(), &files.data_reader(), u64::MAX, u64::MAX).await;
    world.units.iter_mut().for_each(|unit| *unit = unit.seen(has_backing));
    drop(mapper);
    for _ in 0..1 + draw.below(3) {
        let closed = world.session(&mut files, draw).await;
        if closed && plan.spec.data_file.is_none() && format == Format::Qcow2 {
            world.snapshots(&files, draw).await;
        }
        world.check(&files, closed).await;
    }
    let mut bytes = files.file.contents();
    // What was set aside for data and not used is a hole; megabytes of it.
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let kept = (used + TABLE_BYTES_MAX).next_multiple_of(plan.cluster as usize);
    let tail = bytes.len().saturating_sub(kept);
    bytes.truncate(bytes.len() - tail);
    let tail = tail as u64;
    if format == Format::Qcow2 && plan.spec.data_file.is_none() && draw.once_in(2) {
        pack(&mut bytes, &plan, draw);
        files.file = file_of(&bytes, tail).await;
        world.check(&files, false).await;
    }
    Made {
        file: bytes,
        tail,
        data: files.data.map(|data| data.contents()),
        units: world.units,
        cluster_size: geometry.cluster_size,
        fill_unit: geometry.fill_unit,
        size: geometry.size,
        has_backing,
    }
}

struct World<'a> {
    driver: &'a dyn Driver,
    rt: &'a Rt,
    has_backing: bool,
    lazy: bool,
    /// Whether nothing is left of a power loss once the image is closed.
    reclaimed: bool,
    lost_power: bool,
    tag: u32,
    units: Vec<Unit>,
    snapshots: Vec<(String, Vec<Unit>)>,
}

impl World<'_> {
    /// Opens for writing, does some things, and closes; or power is lost. Says whether it was closed.
    async fn session(&mut self, files: &mut Files, draw: &mut Draw<'_>) -> bool {
        tell!("session");
        let guest = files.guest(self.driver, self.rt).await.expect("a good image opens");
        if draw.once_in(2) {
            guest.mapper.reclaim().await.expect("a good file");
            // Time passes only when nobody has anything left to do.
            self.rt.sleep(Duration::from_secs(1)).await;
            self.reclaimed = true;
        }
        for _ in 0..draw.below(12) {
            self.operation(&guest, draw).await;
        }
        if draw.once_in(3) {
            tell!("power loss");
            self.reclaimed = false;
            self.lost_power = true;
            guest.mapper.flush(Durability::Durable).await.expect("a good file");
            drop(guest);
            let seed = draw.number();
            files.file = Arc::new(files.file.crash(seed));
            if let Some(data) = &mut files.data {
                *data = Arc::new(data.crash(seed));
            }
            return false;
        }
        guest.mapper.close().await.expect("a good file");
        true
    }

    async fn operation(&mut self, guest: &Guest, draw: &mut Draw<'_>) {
        let geometry = guest.mapper.geometry();
        let count = self.units.len() as u64;
        // Neighbourhoods, so that operations meet.
        let first = (draw.of(&[0, 0, count / 2, count.saturating_sub(20)]) + draw.below(20)).min(count - 1);
        let end = (first + 1 + draw.below(12)).min(count);
        let what = draw.below(8);
        tell!("operation {what} on units {first}..{end}");
        match what {
            0..=3 => {
                self.tag += 1;
                let tag = self.tag;
                let content = |unit, len| pattern(tag, unit, len);
                guest.write(first, end, CommitMode::Overwrite, content).await.expect("a good file");
                for unit in first..end {
                    let mut bytes = pattern(tag, unit, geometry.fill_unit);
                    bytes.truncate(unit_len(&geometry, unit) as usize);
                    self.units[unit as usize] = Unit::read(&bytes);
                }
            }
            4 => {
                let per_cluster = geometry.cluster_size / geometry.fill_unit;
                let (cluster, clusters) = (first / per_cluster, 1 + draw.below(4));
                if guest.zero(cluster, clusters).await.expect("a good file") {
                    let units = cluster * per_cluster..((cluster + clusters) * per_cluster).min(count);
                    units.for_each(|unit| self.units[unit as usize] = Unit::Zero);
                }
            }
            5 => {
                // Given back.
                let at = first * geometry.fill_unit;
                let extent = guest.mapper.lookup(at, geometry.fill_unit).await.expect("a good file");
                if extent.mapping == Mapping::Absent {
                    let _ = guest.mapper.prepare(at, geometry.fill_unit, Room::Data).await;
                }
            }
            6 => {
                let durability = draw.of(&[Durability::Linked, Durability::Durable]);
                guest.mapper.flush(durability).await.expect("a good file");
                guest.reuse();
            }
            _ => guest.mapper.settle().await.expect("a good file"),
        }
    }

    async fn snapshots(&mut self, files: &Files, draw: &mut Draw<'_>) {
        for _ in 0..draw.below(3) {
            let old = (!self.snapshots.is_empty()).then(|| draw.index(self.snapshots.len()));
            let change = match (draw.below(4), old) {
                (1, Some(old)) => SnapshotChange::Apply(self.snapshots[old].0.clone()),
                (2, Some(old)) => SnapshotChange::Delete(self.snapshots[old].0.clone()),
                _ => {
                    self.tag += 1;
                    SnapshotChange::Create { name: format!("s{}", self.tag), date_sec: 1, date_nsec: 2 }
                }
            };
            // Narrow refcounts have no room for another reference.
            let changed = self.driver.snapshot(&files.storage(), &change).await;
            tell!("{change:?}: {changed:?}");
            if changed.is_err() {
                continue;
            }
            match (change, old) {
                (SnapshotChange::Apply(_), Some(old)) => self.units.clone_from(&self.snapshots[old].1),
                (SnapshotChange::Delete(_), Some(old)) => drop(self.snapshots.remove(old)),
                (SnapshotChange::Create { name, .. }, _) => self.snapshots.push((name, self.units.clone())),
                _ => unreachable!("they need an old one"),
            }
        }
    }

    /// The image is what it should be.
    async fn check(&self, files: &Files, closed: bool) {
        let clean = closed && self.reclaimed;
        // With lazy refcounts they are behind until the image is opened for writing.
        let described = self.driver.describe(&files.reader()).await.expect("a good file");
        if !(self.lazy && described.dirty) {
            let report = check_clean(self.driver, files, "a made image").await;
            // Refcounts that are too high beside references are left to a repair.
            assert!(!closed || self.lost_power || report.leaks == 0, "an image that was closed leaks");
        }
        if clean {
            assert!(!described.dirty, "an image that was closed is dirty");
        }
        let mapper = self.driver.open(files.reader()).await.expect("a good file");
        let units = read_units(&*mapper, &files.reader(), &files.data_reader(), u64::MAX, u64::MAX).await;
        if let Some(unit) =
            (0..units.len()).find(|&unit| units[unit].seen(self.has_backing) != self.units[unit])
        {
            panic!("unit {unit} of a made image is {:?}, not {:?}", units[unit], self.units[unit]);
        }
    }
}

/// Compresses some clusters where they lie, as QEMU's tools could have written them.
fn pack(bytes: &mut [u8], plan: &Plan, draw: &mut Draw<'_>) {
    const COPIED: u64 = 1 << 63;
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let l1 = word(bytes, 40) as usize;
    let entry_bytes = if plan.extended { 16 } else { 8 };
    let cluster = plan.cluster as usize;
    let tables = (word(bytes, 32) & 0xffff_ffff) as usize;
    for index in 0..tables.min(4) {
        let table = word(bytes, l1 + 8 * index);
        if table & COPIED == 0 {
            continue;
        }
        let table = (table & OFFSET) as usize;
        if table + cluster > bytes.len() {
            // It names nothing, and was cut off with the hole that it lies in.
            continue;
        }
        for at in (table..table + cluster).step_by(entry_bytes).take(64) {
            let entry = word(bytes, at);
            let offset = (entry & OFFSET) as usize;
            // Data of its own, all of it, and no zero flag.
            let whole = entry & 1 == 0 && (!plan.extended || word(bytes, at + 8) == 0xffff_ffff);
            if entry & COPIED == 0
                || offset == 0
                || !whole
                || offset + cluster > bytes.len()
                || !draw.once_in(2)
            {
                continue;
            }
            let stream = compress(plan.codec, &bytes[offset..offset + cluster]);
            let skip = draw.of(&[0, 0, 1, 77]);
            if skip + stream.len() > cluster {
                continue;
            }
            bytes[offset + skip..][..stream.len()].copy_from_slice(&stream);
            let sectors = ((skip + stream.len()).div_ceil(512) - 1) as u64;
            let shift = 62 - (plan.cluster.ilog2() - 8);
            let packed = 1 << 62 | sectors << shift | (offset + skip) as u64;
            tell!("compressed: entry at {at:#x} is {packed:#x}");
            bytes[at..at + 8].copy_from_slice(&packed.to_be_bytes());
            if plan.extended {
                bytes[at + 8..at + 16].fill(0);
            }
        }
    }
}
