//! QEMU's tools as the second implementation: images made by either are used by the other.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use rand::{Rng, seq::IndexedRandom};
use readonce_format::driver::{BackingRef, CreateSpec, HeaderChange, Repair};
use readonce_storage::{ReadAt, SimFile, Storage};

use crate::guest::{
    Guest, Model, SECTOR, SMALL, Shape, backing_bytes, block_on, check, create, qed, random_op, read_all,
    rng, sector_of,
};

fn tool(name: &str, args: &[&str]) -> Output {
    Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{name} cannot be run ({error}): install the package qemu-utils"))
}

fn ok(name: &str, args: &[&str]) -> String {
    let output = tool(name, args);
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?}: {text}");
    text
}

/// A folder with an image and its backing in it.
struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new(shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        if shape.backing {
            std::fs::write(folder.path().join("backing.raw"), backing_bytes(&shape)).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("image.qed")
    }

    fn save(&self, file: &SimFile) {
        std::fs::write(self.image(), file.contents()).unwrap();
    }

    fn load(&self) -> Arc<SimFile> {
        Arc::new(SimFile::from_bytes(&std::fs::read(self.image()).unwrap()))
    }

    /// qemu-img finds the image clean and reads the model's bytes.
    fn accepts(&self, model: &Model, context: &str) {
        let image = self.image();
        let output = tool("qemu-img", &["check", "-f", "qed", text(&image)]);
        assert!(output.status.success(), "{context}: {output:?}");
        let plain = self.path("plain.raw");
        std::fs::write(&plain, model.bytes()).unwrap();
        let args = ["compare", "-f", "qed", "-F", "raw", text(&image), text(&plain)];
        let output = tool("qemu-img", &args);
        assert!(output.status.success(), "{context}: {output:?}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    // A table of one cluster is legal, but QEMU's driver cannot open it.
    for (cluster_size, table_size) in
        [(4096, 2), (4096, 16), (16384, 4), (65536, 4), (65536, 2), (1 << 20, 2)]
    {
        for backing in [true, false] {
            shapes.push(Shape { cluster_size, table_size, size: (9 << 20) + 1536, backing });
        }
    }
    shapes
}

#[test]
fn random_operations_of_both_on_one_image() {
    for (seed, shape) in (0..).zip(shapes()) {
        let folder = Folder::new(shape);
        let mut rng = rng(seed);
        let mut model = Model::new(shape);
        folder.save(&block_on(create(&shape)));
        folder.accepts(&model, "just made");
        for round in 0..3 {
            let context = format!("{shape:?} round {round}");
            let file = folder.load();
            block_on(async {
                let mut guest = Guest::open(file.clone(), model.clone()).await.unwrap();
                guest.next_tag = 1000 * (round + 1);
                guest.check_reads().await;
                for _ in 0..40 {
                    let op = random_op(&mut rng, &shape);
                    guest.run(&op).await.unwrap();
                }
                guest.mapper.close().await.unwrap();
                let report = check(&file).await;
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{context}");
                model = guest.model;
                model.flushed();
            });
            folder.save(&file);
            folder.accepts(&model, &context);

            let mut commands = Vec::new();
            for _ in 0..12 {
                let mut sector = rng.random_range(0..shape.size / SECTOR - 200);
                let mut sectors = rng.random_range(1..200);
                if shape.backing {
                    // QEMU 10.0.2 fills the rest of a zero cluster from the backing when it writes a part of it, so that
                    // zeros that the guest wrote are lost. Whole clusters keep clear of that.
                    let whole = shape.cluster_size / SECTOR;
                    let last = shape.size / shape.cluster_size * whole;
                    let end = ((sector + sectors).next_multiple_of(whole)).min(last);
                    sector -= sector % whole;
                    sectors = end - sector;
                }
                if rng.random_bool(0.3) {
                    commands.push(format!("write -z {} {}", sector * SECTOR, sectors * SECTOR));
                    (sector..sector + sectors).for_each(|sector| model.write(sector, 0));
                } else {
                    let byte: u8 = *[0x11, 0x22, 0x33].choose(&mut rng).unwrap();
                    commands.push(format!("write -P {byte} {} {}", sector * SECTOR, sectors * SECTOR));
                    let tag = u32::from_le_bytes([byte; 4]);
                    (sector..sector + sectors).for_each(|sector| model.write(sector, tag));
                }
            }
            let image = folder.image();
            let mut args = vec!["-f", "qed"];
            commands.iter().for_each(|command| args.extend(["-c", command.as_str()]));
            args.push(text(&image));
            let said = ok("qemu-io", &args);
            assert!(!said.contains("failed"), "{context}: {said}");
            model.flushed();
            folder.accepts(&model, &format!("{context}, after {commands:?}"));
        }
        let file = folder.load();
        block_on(async {
            let mapper = qed().open(file.clone()).await.unwrap();
            let found = read_all(mapper.as_ref(), file.as_ref(), &shape).await.unwrap();
            assert!((0..).zip(found).all(|(sector, tag)| tag == model.now(sector)), "{shape:?}");
        });
    }
}

#[test]
fn check_counts_as_qemu_img_counts() {
    for (seed, shape) in (100..).zip(shapes()) {
        let folder = Folder::new(shape);
        let mut rng = rng(seed);
        let file = block_on(async {
            let (file, mut guest) = Guest::new(&shape).await;
            for _ in 0..60 {
                let op = random_op(&mut rng, &shape);
                guest.run(&op).await.unwrap();
            }
            guest.mapper.close().await.unwrap();
            file
        });
        // Entries are broken in the last L2 table's first sectors, in ways that both name alike.
        let mut bytes = file.contents();
        let table =
            u64::from_le_bytes(bytes[shape.cluster_size as usize..][..8].try_into().unwrap()) as usize;
        for entry in 0..24 {
            let at = table + entry * 8;
            let broken: u64 = match rng.random_range(0..8) {
                0 => 2,
                1 => 1 << 40,
                2 => shape.cluster_size * 7 + 512,
                3 => 0,
                4 if shape.cluster_size > 4096 => shape.cluster_size * 7 + 4096,
                _ => continue,
            };
            bytes[at..at + 8].copy_from_slice(&broken.to_le_bytes());
        }
        bytes.resize(bytes.len() + shape.cluster_size as usize * 3, 0);
        let file = Arc::new(SimFile::from_bytes(&bytes));
        folder.save(&file);

        let image = folder.image();
        let output = tool("qemu-img", &["check", "-f", "qed", "--output=json", text(&image)]);
        let json = String::from_utf8(output.stdout).unwrap();
        let number = |name: &str| -> u64 {
            let Some((_, rest)) = json.split_once(&format!("\"{name}\": ")) else { return 0 };
            rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
        };
        let report = block_on(check(&file));
        let ours = [
            report.corruptions,
            report.leaks,
            report.total_clusters,
            report.allocated_clusters,
            report.fragmented_clusters,
        ];
        let names = ["corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters"];
        assert_eq!(ours, names.map(number), "{shape:?} {names:?}");
        assert!(report.corruptions > 0 && report.leaks > 0, "{shape:?}: the test breaks too little");

        let storage: Arc<dyn Storage> = file.clone();
        let repaired = block_on(qed().repair(&storage, Repair::All)).unwrap();
        assert_eq!((repaired.corruptions, repaired.leaks), (0, 0), "{shape:?}");
        assert_eq!(repaired.corruptions_fixed, report.corruptions, "{shape:?}");
        folder.save(&file);
        ok("qemu-img", &["check", "-f", "qed", text(&image)]);
    }
}

#[test]
fn what_qemu_img_says_of_our_image() {
    let folder = Folder::new(SMALL);
    block_on(async {
        for (name, cluster_size) in [("b".repeat(4095), 4096_u64), ("backing.raw".to_owned(), 65536)] {
            let file = Arc::new(SimFile::new());
            let storage: Arc<dyn Storage> = file.clone();
            let mut spec = CreateSpec {
                size: 1000,
                backing: Some(BackingRef { name: name.clone(), format: Some("raw".into()) }),
                options: vec![
                    ("copy_on_read".into(), None),
                    ("cluster_size".into(), Some(cluster_size.to_string())),
                ],
                pin: Some(readonce_format::driver::Pin { validator: vec![7; 1024], len: 999 }),
                data_file: None,
            };
            qed().create(&storage, None, &spec).await.unwrap();
            folder.save(&file);
            let info = ok("qemu-img", &["info", "-f", "qed", text(&folder.image())]);
            assert!(info.contains("1 KiB (1024 bytes)"), "{info}");
            assert!(info.contains(&format!("backing file: {name}")), "{info}");
            assert!(info.contains("backing file format: raw"), "{info}");

            let reader: Arc<dyn ReadAt> = file.clone();
            let ours = qed().describe(&reader).await.unwrap();
            assert_eq!(ours.pin, spec.pin);
            assert_eq!(ours.backing, spec.backing);
            assert!(ours.copy_on_read && ours.only_readonce_wrote == Some(true) && !ours.dirty);

            // What QEMU writes takes away the word that only readonce wrote, and nothing else.
            if name == "backing.raw" {
                ok("qemu-io", &["-f", "qed", "-c", "write -P 1 0 512", text(&folder.image())]);
                let reader: Arc<dyn ReadAt> = folder.load();
                let ours = qed().describe(&reader).await.unwrap();
                assert!(ours.copy_on_read && ours.only_readonce_wrote == Some(false));
                assert_eq!(ours.pin, spec.pin);
                spec.size = 0;
                qed().create(&storage, None, &spec).await.unwrap();
                folder.save(&file);
                ok("qemu-img", &["check", "-f", "qed", text(&folder.image())]);
            }
        }
    });
}

#[test]
fn images_of_qemu_img_are_described() {
    let folder = Folder::new(SMALL);
    let image = folder.image();
    let create = |args: &[&str]| {
        let mut all = vec!["create", "-f", "qed"];
        all.extend(args);
        ok("qemu-img", &all);
        let reader: Arc<dyn ReadAt> = folder.load();
        block_on(qed().describe(&reader)).unwrap()
    };
    let plain = create(&[text(&image), "1G"]);
    assert_eq!((plain.virtual_size, plain.cluster_size), (1 << 30, Some(65536)));
    assert!(plain.backing.is_none() && plain.pin.is_none() && !plain.copy_on_read && !plain.dirty);

    let raw = create(&["-b", "backing.raw", "-F", "raw", "-o", "cluster_size=4k", text(&image), "1M"]);
    assert_eq!(raw.backing, Some(BackingRef { name: "backing.raw".into(), format: Some("raw".into()) }));
    let other = create(&["-u", "-b", "base.qed", "-F", "qed", text(&image), "1M"]);
    assert_eq!(other.backing, Some(BackingRef { name: "base.qed".into(), format: None }));
    // QEMU makes a table of one cluster, and cannot open it.
    let one = create(&["-o", "table_size=1", text(&image), "64M"]);
    assert_eq!(one.virtual_size, 64 << 20);
    let largest = create(&["-o", "cluster_size=1M,table_size=1", text(&image), "1T"]);
    assert_eq!(largest.cluster_size, Some(1 << 20));
}

#[test]
fn changes_are_seen_by_qemu_img() {
    let folder = Folder::new(SMALL);
    let image = folder.image();
    ok("qemu-img", &["create", "-f", "qed", "-b", "backing.raw", "-F", "raw", text(&image), "6M"]);
    let file = folder.load();
    let storage: Arc<dyn Storage> = file.clone();
    let reader: Arc<dyn ReadAt> = file.clone();
    let pin = readonce_format::driver::Pin { validator: b"\"abc\"".to_vec(), len: 77 };
    block_on(async {
        let change = async |change: HeaderChange| qed().change(&storage, &change).await;
        change(HeaderChange::CopyOnRead(true)).await.unwrap();
        change(HeaderChange::Size(7 << 20)).await.unwrap();
        change(HeaderChange::Pin(pin.clone())).await.unwrap();
        let said = qed().describe(&reader).await.unwrap();
        assert!(said.copy_on_read && said.only_readonce_wrote == Some(true));
        assert_eq!((said.virtual_size, &said.pin), (7 << 20, &Some(pin.clone())));
        let free = 65536 - 64 - 11 - 40 - 5;
        assert_eq!(said.header_bytes_max, free);

        let shrink = change(HeaderChange::Size(1 << 20)).await.unwrap_err();
        assert_eq!(shrink.to_string(), "Shrinking images is currently not supported");

        // Names that lie in the first sector, behind it, behind the old one, and again in front.
        for len in [20, 3000, 4095, 500, 448, 4] {
            let name = "n".repeat(len);
            let backing = BackingRef { name: name.clone(), format: None };
            let kept = (len % 2 == 0).then(|| pin.clone());
            change(HeaderChange::Backing(Some(backing.clone()), kept.clone())).await.unwrap();
            let said = qed().describe(&reader).await.unwrap();
            assert_eq!((said.backing, said.pin), (Some(backing.clone()), kept));
            let other = readonce_format::driver::Pin { validator: vec![1; 600], len: 5 };
            change(HeaderChange::Pin(other.clone())).await.unwrap();
            let said = qed().describe(&reader).await.unwrap();
            assert_eq!((said.backing, said.pin), (Some(backing), Some(other)));
            folder.save(&file);
            let info = ok("qemu-img", &["info", "-f", "qed", text(&image)]);
            assert!(info.contains(&format!("backing file: {name}")), "{info}");
        }
        let long = BackingRef { name: "n".repeat(4096), format: None };
        let refused = change(HeaderChange::Backing(Some(long), None)).await.unwrap_err();
        assert!(refused.to_string().contains("at most 4095"), "{refused}");

        change(HeaderChange::Backing(None, None)).await.unwrap();
        let refused = change(HeaderChange::CopyOnRead(true)).await.unwrap_err();
        assert_eq!(refused.to_string(), "QED only supports Copy-on-Read with a backing file");
    });
    folder.save(&file);
    ok("qemu-img", &["check", "-f", "qed", text(&image)]);
    ok("qemu-img", &["rebase", "-u", "-b", "backing.raw", "-F", "raw", text(&image)]);
}

#[test]
fn a_name_that_does_not_fit_is_refused_and_changes_nothing() {
    let folder = Folder::new(SMALL);
    let image = folder.image();
    ok("qemu-img", &["create", "-f", "qed", "-o", "cluster_size=4k", text(&image), "1M"]);
    let file = folder.load();
    let storage: Arc<dyn Storage> = file.clone();
    let before = file.contents();
    let backing = BackingRef { name: "n".repeat(4090), format: None };
    let error = block_on(qed().change(&storage, &HeaderChange::Backing(Some(backing), None))).unwrap_err();
    assert!(error.to_string().contains("need 4154 bytes, this image's header area has 4096"), "{error}");
    assert_eq!(file.contents(), before);
}

#[test]
fn a_renamed_backing_has_no_pin() {
    let folder = Folder::new(SMALL);
    let file = block_on(create(&SMALL));
    folder.save(&file);
    // What another program may do: the name changes under the record.
    let mut bytes = file.contents();
    bytes[64] = b'x';
    let reader: Arc<dyn ReadAt> = Arc::new(SimFile::from_bytes(&bytes));
    let said = block_on(qed().describe(&reader)).unwrap();
    assert_eq!(said.backing.unwrap().name, "xacking.raw");
    assert_eq!(said.pin, None);
}

#[test]
fn a_dirty_image_of_qemu_is_closed_clean() {
    let shape = Shape { backing: false, table_size: 2, ..SMALL };
    let folder = Folder::new(shape);
    let image = folder.image();
    ok("qemu-img", &["create", "-f", "qed", "-o", "cluster_size=4k,table_size=2", text(&image), "5244416"]);
    // qemu-io that is aborted leaves the mark and unlinked clusters.
    let _ = tool("qemu-io", &["-f", "qed", "-c", "write -P 7 0 64k", "-c", "abort", text(&image)]);
    let file = folder.load();
    let reader: Arc<dyn ReadAt> = file.clone();
    block_on(async {
        assert!(qed().describe(&reader).await.unwrap().dirty);
        let guest = Guest::open(file.clone(), Model::new(shape)).await.unwrap();
        guest.mapper.close().await.unwrap();
        assert!(!qed().describe(&reader).await.unwrap().dirty);
        let mapper = qed().open(reader.clone()).await.unwrap();
        let found = read_all(mapper.as_ref(), file.as_ref(), &shape).await.unwrap();
        assert!(found[..128].iter().all(|&tag| sector_of(tag)[0] == 7));
    });
    folder.save(&file);
    ok("qemu-img", &["check", "-f", "qed", text(&image)]);
}

#[test]
fn a_file_of_this_machine() {
    let shape = Shape { cluster_size: 65536, table_size: 4, size: (40 << 20) + 512, backing: true };
    let folder = Folder::new(shape);
    block_on(async {
        let mode = readonce_storage::OpenMode::CreateNew;
        let file: Arc<dyn Storage> =
            Arc::new(readonce_storage::LocalFile::open(folder.image(), mode).unwrap());
        qed().create(&file, None, &crate::guest::spec(&shape)).await.unwrap();
        let mut rng = rng(77);
        let mut model = Model::new(shape);
        for round in 0..3 {
            let mut guest = Guest::open(file.clone(), model.clone()).await.unwrap();
            guest.next_tag = 1000 * (round + 1);
            for _ in 0..60 {
                let op = random_op(&mut rng, &shape);
                guest.run(&op).await.unwrap();
            }
            guest.check_reads().await;
            guest.mapper.close().await.unwrap();
            model = guest.model;
            model.flushed();
            folder.accepts(&model, "a local file");
        }
    });
}

#[test]
fn qemu_takes_over_after_a_power_loss() {
    for seed in 0..12 {
        let shape = Shape { table_size: 2, backing: seed % 2 == 0, ..SMALL };
        let folder = Folder::new(shape);
        let mut rng = rng(seed);
        let crashed = block_on(async {
            let (file, mut guest) = Guest::new(&shape).await;
            for _ in 0..30 {
                let op = random_op(&mut rng, &shape);
                guest.run(&op).await.unwrap();
            }
            file.crash(seed)
        });
        folder.save(&crashed);
        let image = folder.image();
        let output = tool("qemu-img", &["check", "-f", "qed", text(&image)]);
        assert!(matches!(output.status.code(), Some(0 | 3)), "seed {seed}: {output:?}");
        // Opening for writing makes QEMU check and take the mark off.
        ok("qemu-io", &["-f", "qed", "-c", "write -P 5 2M 64k", text(&image)]);
        let file = folder.load();
        let reader: Arc<dyn ReadAt> = file.clone();
        assert!(!block_on(qed().describe(&reader)).unwrap().dirty, "seed {seed}");
        let storage: Arc<dyn Storage> = file.clone();
        let report = block_on(qed().repair(&storage, Repair::Leaks)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "seed {seed}");
        folder.save(&file);
        ok("qemu-img", &["check", "-f", "qed", text(&image)]);
        ok("qemu-io", &["-f", "qed", "-c", "read -P 5 2M 64k", text(&image)]);
    }
}
