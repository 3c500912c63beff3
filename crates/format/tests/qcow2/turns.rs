//! Images that readonce and QEMU write in turn, over a grid of kinds of images.

use rand::{Rng, rngs::SmallRng};

use crate::{
    guest::{DataIn, Guest, Model, SECTOR, SMALL, Shape, UNITS, block_on, check, create, random_op, rng},
    qemu::Folder,
};

fn shapes() -> Vec<Shape> {
    let plain = Shape { size: (3 << 20) + 1536, ..SMALL };
    let mut shapes = Vec::new();
    for backing in [true, false] {
        for cluster_bits in [9, 12, 16] {
            shapes.push(Shape { cluster_bits, backing, ..plain });
            shapes.push(Shape { cluster_bits, backing, version: 2, ..plain });
        }
        shapes.push(Shape { cluster_bits: 21, backing, size: (9 << 20) + 512, ..plain });
        for refcount_bits in [1, 2, 8, 64] {
            shapes.push(Shape { refcount_bits, cluster_bits: 9, backing, ..plain });
        }
        shapes.push(Shape { lazy: true, backing, ..plain });
        shapes.push(Shape { backing, ..UNITS });
        shapes.push(Shape { backing, cluster_bits: 17, ..UNITS });
        shapes.push(Shape { backing, data: DataIn::File, ..plain });
        shapes.push(Shape { backing, data: DataIn::File, ..UNITS });
    }
    shapes.push(Shape { backing: false, data: DataIn::RawFile, ..plain });
    shapes
}

/// Commands for qemu-io, and what they make of the model.
fn commands(rng: &mut SmallRng, model: &mut Model) -> Vec<String> {
    let shape = model.shape;
    let mut commands = Vec::new();
    for _ in 0..10 {
        let sector = rng.random_range(0..shape.size / SECTOR - 1);
        let sectors = rng.random_range(1..200).min(shape.size / SECTOR - sector);
        let range = sector..sector + sectors;
        if rng.random_bool(0.3) {
            let unmap = ["", "-u "][rng.random_range(0..2)];
            commands.push(format!("write -z {unmap}{} {}", sector * SECTOR, sectors * SECTOR));
            range.for_each(|sector| model.write(sector, 0));
        } else {
            let byte = rng.random_range(1..=255_u8);
            commands.push(format!("write -P {byte} {} {}", sector * SECTOR, sectors * SECTOR));
            range.for_each(|sector| model.write(sector, u32::from_le_bytes([byte; 4])));
        }
    }
    model.flushed();
    commands
}

/// Our operations, then a clean close.
fn ours(folder: &Folder, rng: &mut SmallRng, model: &mut Model, round: u32, context: &str) {
    let files = folder.load();
    block_on(async {
        let mut guest = Guest::open(files.clone(), model.clone()).await.unwrap();
        guest.next_tag = 1000 * (round + 1);
        guest.check_reads().await;
        for _ in 0..40 {
            let op = random_op(rng, &guest.model.shape);
            guest.run(&op).await.unwrap_or_else(|error| panic!("{context}: {op:?}: {error}"));
        }
        guest.check_reads().await;
        guest.mapper.close().await.unwrap();
        let report = check(&files.image).await;
        assert_eq!((report.check_errors, report.corruptions, report.leaks), (0, 0, 0), "{context}");
        *model = guest.model;
        model.flushed();
    });
    folder.save(&files);
    folder.is_clean(context);
    folder.reads(model, context);
}

#[test]
fn both_in_turn() {
    for (seed, shape) in (0..).zip(shapes()) {
        let folder = Folder::new(shape);
        let mut rng = rng(seed);
        let mut model = Model::new(shape);
        folder.save(&block_on(create(&shape)));
        for round in 0..2 {
            let context = format!("{shape:?} round {round}");
            ours(&folder, &mut rng, &mut model, round, &context);
            folder.qemu_io(&commands(&mut rng, &mut model));
            folder.reads(&model, &context);
        }
    }
}

#[test]
fn compressed_and_snapshots() {
    for (seed, (cluster_bits, extended_l2, compression)) in (0..).zip([
        (9, false, "zlib"),
        (12, false, "zstd"),
        (16, false, "zlib"),
        (14, true, "zstd"),
        (16, true, "zlib"),
    ]) {
        // The bytes of the backing, in the image itself.
        let full = Shape { cluster_bits, extended_l2, size: (1 << 20) + 1536, ..SMALL };
        let folder = Folder::new(full);
        let mut rng = rng(seed);
        let mut model = Model::new(full);
        let mut options = format!("cluster_size={},compression_type={compression}", full.cluster_size());
        if extended_l2 {
            options.push_str(",extended_l2=on");
        }
        folder.convert(&options);
        // Nothing lies behind it; what is not there is zeros.
        model.shape.backing = false;
        for round in 0..4 {
            let context = format!("{cluster_bits} {extended_l2} {compression} round {round}");
            ours(&folder, &mut rng, &mut model, round, &context);
            let kept = model.clone();
            folder.ok("qemu-img", &["snapshot", "-c", &format!("s{round}"), "image.qcow2"]);
            ours(&folder, &mut rng, &mut model, round + 10, &context);
            folder.qemu_io(&commands(&mut rng, &mut model));
            folder.reads(&model, &context);
            // What the snapshot holds was not touched.
            folder.ok("qemu-img", &["snapshot", "-a", &format!("s{round}"), "image.qcow2"]);
            folder.reads(&kept, &context);
            model = kept;
            if round % 2 == 1 {
                folder.ok("qemu-img", &["snapshot", "-d", &format!("s{round}"), "image.qcow2"]);
            }
            folder.is_clean(&context);
        }
    }
}
