//! Images with tables: a good one is made, damaged, and then all is done with it that can be done with an image.
//!
//! Promises that are tried beside "no panic, no hang, memory within a bound":
//! - Reading and checking write nothing.
//! - A repair of everything leaves nothing to repair, and a second check agrees with its report.
//! - What could be read, and was what the guest wrote, can be read after a repair, of all or of leaks alone; but where one cluster is an
//!   L1 table and an L2 table of it.
//! - An image without corruption has none after guest writes, a clean close, a change of its header or of its snapshots; and
//!   holds what it held.

mod damage;
mod guest;
mod make;

use std::sync::Arc;

use readonce_format::{
    CommitMode, Driver, Durability, Geometry,
    driver::{BackingRef, CheckReport, HeaderChange, Pin, Repair, SnapshotChange, driver},
};
use readonce_storage::{Rt, SimFile};
use readonce_testkit::tables::Format;

pub(crate) use guest::read_units;
use guest::{Unit, pattern, unit_len};
use make::{Files, Made, file_of, make};

use crate::{draw::Draw, exec};

/// Bytes that a file in memory may take after anything that was done with it.
pub(crate) const MEMORY_MAX: u64 = 64 << 20;
/// Units that are compared.
const UNITS_MAX: u64 = 2048;

/// The target for QED.
pub fn qed(data: &[u8]) {
    run(Format::Qed, data);
}

/// The target for qcow2.
pub fn qcow2(data: &[u8]) {
    run(Format::Qcow2, data);
}

fn run(format: Format, data: &[u8]) {
    let driver = driver(if format == Format::Qed { "qed" } else { "qcow2" }).expect("we have it");
    let data = data.to_vec();
    exec::run(|rt| async move {
        let mut draw = Draw::new(&data);
        // First, so that the corpus has every one of them with the same image.
        let deed = draw.below(6);
        let mut made = make(format, driver, &mut draw, &rt).await;
        let grow = damage::damage(format, &mut made, &mut draw);
        // What is a table of both levels is mended as one of neither, and costs what it names.
        let keeps = format == Format::Qed || !damage::l1_is_l2(&mut made);
        let case = Case { format, driver, rt: &rt, made: &made, grow, keeps };
        let seen = case.read().await;
        tell!(
            "deed {deed}, file of {} and {grow}; check: {:?}, opens: {}",
            made.file.len(),
            seen.check,
            seen.can_open
        );
        match deed {
            0 | 1 => case.repair(&seen, &mut draw).await,
            2 => case.free_leaks(&seen).await,
            3 | 4 => case.write(&seen, &mut draw).await,
            _ => case.change(&seen, &mut draw).await,
        }
    });
}

/// Checks an image that has no corruption.
async fn check_clean(driver: &dyn Driver, files: &Files, what: &str) -> CheckReport {
    let report = driver.check(&files.reader()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
    report
}

struct Case<'a> {
    format: Format,
    driver: &'static dyn Driver,
    rt: &'a Rt,
    made: &'a Made,
    /// Bytes of a hole behind the file's.
    grow: u64,
    /// Whether a repair keeps what can be read.
    keeps: bool,
}

/// What the damaged image shows.
struct Seen {
    check: Result<CheckReport, String>,
    /// Units that hold what the guest wrote, `None` elsewhere.
    good: Vec<Option<Unit>>,
    can_open: bool,
}

impl Seen {
    fn is_sound(&self) -> bool {
        self.check.as_ref().is_ok_and(|report| report.corruptions == 0 && report.check_errors == 0)
            && self.can_open
    }
}

impl Case<'_> {
    /// The damaged image, anew.
    async fn files(&self) -> Files {
        let file = file_of(&self.made.file, self.grow).await;
        let data = self.made.data.as_ref().map(|data| Arc::new(SimFile::from_bytes(data)));
        Files { file, data }
    }

    async fn read(&self) -> Seen {
        let files = self.files().await;
        let described = self.driver.describe(&files.reader()).await;
        let check = self.driver.check(&files.reader()).await.map_err(|error| error.to_string());
        let units = self.units(&files).await;
        // Not the other way round: the snapshots are read to describe it.
        assert!(units.is_some() || described.is_err(), "it is described and cannot be opened");
        assert_eq!(files.file.unsynced_count(), 0, "reading writes nothing");
        let good = units.iter().flatten().zip(&self.made.units);
        let good = good.map(|(found, wrote)| (self.keeps && found == wrote).then_some(*wrote)).collect();
        Seen { check, good, can_open: units.is_some() }
    }

    /// What the units hold; `None`: it cannot be opened. Empty where sizes are not those that were made.
    async fn units(&self, files: &Files) -> Option<Vec<Unit>> {
        let mapper = self.driver.open(files.reader()).await.ok()?;
        let geometry = mapper.geometry();
        let mut units =
            read_units(&*mapper, &files.reader(), &files.data_reader(), UNITS_MAX, self.made.size).await;
        units.iter_mut().for_each(|unit| *unit = unit.seen(self.made.has_backing));
        let same =
            (geometry.cluster_size, geometry.fill_unit) == (self.made.cluster_size, self.made.fill_unit);
        Some(if same { units } else { Vec::new() })
    }

    /// Nothing that was good is lost.
    async fn is_kept(&self, files: &Files, good: &[Option<Unit>], what: &str) {
        let units = self.units(files).await.unwrap_or_else(|| panic!("{what}: it cannot be opened"));
        for (unit, (found, expected)) in units.iter().zip(good).enumerate() {
            if let Some(expected) = expected {
                assert_eq!(found, expected, "{what}: unit {unit} was good");
            }
        }
    }

    async fn repair(&self, seen: &Seen, draw: &mut Draw<'_>) {
        let files = self.files().await;
        let repaired = self.driver.repair(&files.storage(), Repair::All).await;
        assert!(files.file.resident_bytes() < MEMORY_MAX);
        let Ok(before) = &seen.check else { return };
        let report = repaired
            .unwrap_or_else(|error| panic!("what can be checked cannot be repaired: {error}; {before:?}"));
        if before.check_errors > 0 {
            return;
        }
        // Copies of what is used twice may double the file (with qcow2, or take 1 MiB); then the rest stays.
        let len = self.made.file.len() as u64 + self.grow;
        let copies = if self.format == Format::Qed { len } else { len.max(1 << 20) };
        if report.corruptions > 0 && files.reader().len().saturating_sub(len) > copies / 8 {
            return;
        }
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{before:?} became {report:?}");
        let again = check_clean(self.driver, &files, "a second check").await;
        assert_eq!(again.leaks, report.leaks, "a second check disagrees");
        let mut good = seen.good.clone();
        if seen.can_open {
            self.is_kept(&files, &good, "repaired").await;
        }
        // And it can be used.
        self.use_it(&files, &mut good, draw, true).await;
        check_clean(self.driver, &files, "repaired and written").await;
        self.is_kept(&files, &good, "repaired and written").await;
    }

    async fn free_leaks(&self, seen: &Seen) {
        let files = self.files().await;
        let freed = self.driver.repair(&files.storage(), Repair::Leaks).await;
        assert!(files.file.resident_bytes() < MEMORY_MAX);
        let (Ok(before), Ok(freed)) = (&seen.check, freed) else { return };
        let again = self.driver.check(&files.reader()).await.expect("it could be checked before");
        assert!(again.corruptions <= before.corruptions, "{before:?} became {again:?}");
        assert_eq!((again.corruptions, again.leaks), (freed.corruptions, freed.leaks));
        if seen.can_open {
            self.is_kept(&files, &seen.good, "leaks freed").await;
        }
    }

    async fn write(&self, seen: &Seen, draw: &mut Draw<'_>) {
        let files = self.files().await;
        let mut good = seen.good.clone();
        self.use_it(&files, &mut good, draw, seen.is_sound()).await;
        assert!(files.file.resident_bytes() < MEMORY_MAX);
        if seen.is_sound() {
            check_clean(self.driver, &files, "written").await;
            self.is_kept(&files, &good, "written").await;
        }
    }

    /// A guest's session. With `sound` all of it must go well, but for what cannot be (no room for a refcount, a broken stream).
    async fn use_it(&self, files: &Files, good: &mut [Option<Unit>], draw: &mut Draw<'_>, sound: bool) {
        let guest = match files.guest(self.driver, self.rt).await {
            Ok(guest) => guest,
            Err(error) => {
                assert!(!sound || good.is_empty() || files.data.is_none(), "{error}");
                return;
            }
        };
        let geometry = guest.mapper.geometry();
        // Damage may have made the guest longer.
        let compared = Geometry { size: geometry.size.min(self.made.size), ..geometry };
        if draw.once_in(2) {
            let _ = guest.mapper.reclaim().await;
        }
        let count = geometry.size.div_ceil(geometry.fill_unit);
        // Huge units are not written: the time would be the test's own.
        let writes = if geometry.fill_unit <= 64 << 10 && count > 0 { draw.below(6) } else { 0 };
        let mut forget = |units: std::ops::Range<u64>| {
            units.for_each(|unit| {
                if let Some(good) = good.get_mut(unit as usize) {
                    *good = None
                }
            })
        };
        let mut wrote = Vec::new();
        for write in 0..writes {
            let first =
                (draw.of(&[0, 0, count / 2, count.saturating_sub(9)]) + draw.below(20)).min(count - 1);
            let end = (first + 1 + draw.below(8)).min(count);
            let tag = 0xf000_0000 + write as u32;
            let per_cluster = geometry.cluster_size / geometry.fill_unit;
            // A failed write may have been done in part; a copy moves whole clusters.
            forget(first..end);
            wrote.retain(|(unit, _)| !(first..end).contains(unit));
            let what = draw.below(4);
            tell!("write {what} to units {first}..{end}");
            match what {
                0 => {
                    let cluster = first / per_cluster;
                    let units = cluster * per_cluster..((cluster + 1) * per_cluster).min(count);
                    forget(units.clone());
                    wrote.retain(|(unit, _)| !units.contains(unit));
                    if guest.zero(cluster, 1).await.is_ok_and(|done| done) {
                        wrote.extend(units.map(|unit| (unit, Unit::Zero)));
                    }
                }
                _ => {
                    let content = |unit, len| pattern(tag, unit, len);
                    if guest.write(first, end, CommitMode::Overwrite, content).await.is_ok() {
                        for unit in first..end.min(compared.size.div_ceil(geometry.fill_unit)) {
                            let mut bytes = pattern(tag, unit, geometry.fill_unit);
                            bytes.truncate(unit_len(&compared, unit) as usize);
                            wrote.push((unit, Unit::read(&bytes)));
                        }
                    }
                }
            }
            if draw.once_in(2) {
                let _ = guest.mapper.flush(draw.of(&[Durability::Linked, Durability::Durable])).await;
                guest.reuse();
            }
        }
        let _ = guest.mapper.settle().await;
        let closed = guest.mapper.close().await;
        if let (true, Err(error)) = (sound, closed) {
            panic!("a sound image cannot be closed: {error}");
        }
        for (unit, held) in wrote {
            if let Some(good) = good.get_mut(unit as usize) {
                *good = Some(held);
            }
        }
    }

    async fn change(&self, seen: &Seen, draw: &mut Draw<'_>) {
        let files = self.files().await;
        for _ in 0..1 + draw.below(3) {
            let done = match draw.below(8) {
                0 => self.header(&files, HeaderChange::CopyOnRead(draw.once_in(2))).await,
                1 => {
                    let format = draw.of(&[Some("raw"), None]).map(Into::into);
                    let backing = BackingRef { name: "n".repeat(1 + draw.index(1200)), format };
                    let pin = Pin { validator: b"v".repeat(1 + draw.index(1024)), len: draw.number() };
                    let pin = draw.once_in(2).then_some(pin);
                    self.header(&files, HeaderChange::Backing(Some(backing), pin)).await
                }
                2 => self.header(&files, HeaderChange::Backing(None, None)).await,
                3 => {
                    let pin = Pin { validator: b"v".repeat(1 + draw.index(1024)), len: draw.number() };
                    self.header(&files, HeaderChange::Pin(pin)).await
                }
                4 => {
                    let more = 512 * draw.of(&[1, 8, 200, 1 << 20]);
                    let size = self
                        .driver
                        .describe(&files.reader())
                        .await
                        .map_or(0, |described| described.virtual_size);
                    let size = if draw.once_in(4) { draw.number() } else { size.saturating_add(more) };
                    self.header(&files, HeaderChange::Size(size)).await
                }
                _ if self.format == Format::Qed => false,
                5 => {
                    let change = SnapshotChange::Create { name: "new".into(), date_sec: 3, date_nsec: 4 };
                    self.driver.snapshot(&files.storage(), &change).await.is_ok()
                }
                6 => {
                    self.driver.snapshot(&files.storage(), &SnapshotChange::Delete("1".into())).await.is_ok()
                }
                _ => {
                    let applied =
                        self.driver.snapshot(&files.storage(), &SnapshotChange::Apply("1".into())).await;
                    if applied.is_ok() {
                        if seen.is_sound() {
                            check_clean(self.driver, &files, "a snapshot was applied").await;
                        }
                        // What it shows now is another story.
                        return;
                    }
                    false
                }
            };
            if !done && !seen.is_sound() {
                continue;
            }
            if seen.is_sound() {
                check_clean(self.driver, &files, "changed").await;
                self.is_kept(&files, &seen.good, "changed").await;
            }
        }
        assert!(files.file.resident_bytes() < MEMORY_MAX);
    }

    async fn header(&self, files: &Files, change: HeaderChange) -> bool {
        self.driver.change(&files.storage(), &change).await.is_ok()
    }
}
