//! imago, an implementation that shares no code with QEMU, as a second reader. It knows neither subclusters nor zstd.

use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, file::File, qcow2::Qcow2};

use crate::{
    guest::{DataIn, Files, Guest, Model, SMALL, Shape, block_on, create, random_op, rng},
    qemu::Folder,
};

/// Random operations of ours, then imago reads what the model says.
fn run(seed: u64, folder: &Folder, files: Files, model: Model) {
    let context = format!("{:?}", model.shape);
    block_on(async {
        let mut rng = rng(seed);
        let mut guest = Guest::open(files, model).await.unwrap();
        for _ in 0..80 {
            let op = random_op(&mut rng, &guest.model.shape);
            guest.run(&op).await.unwrap();
        }
        guest.mapper.close().await.unwrap();
        folder.save(&guest.files);
        let image = Qcow2::<File>::builder_path(folder.image());
        let image = image.open(PermissiveImplicitOpenGate::default()).await.unwrap();
        let image = FormatAccess::new(image);
        let mut found = vec![0_u8; guest.model.shape.size as usize];
        assert_eq!(image.size(), guest.model.shape.size);
        image.read(&mut found[..], 0).await.unwrap();
        assert!(found == guest.model.bytes(), "{context}");
    });
}

#[test]
fn imago_reads_what_readonce_wrote() {
    let mut shapes = Vec::new();
    for cluster_bits in [9, 12, 16, 21] {
        let small = Shape { cluster_bits, ..SMALL };
        shapes.push(Shape { version: 2, ..small });
        // Of large clusters there are few, whatever they are counted with.
        let widths: &[u32] = if cluster_bits == 21 { &[16] } else { &[1, 16, 64] };
        for &refcount_bits in widths {
            let with = Shape { refcount_bits, ..small };
            shapes.extend([
                with,
                Shape { lazy: true, backing: false, ..with },
                Shape { data: DataIn::File, ..with },
                Shape { data: DataIn::RawFile, backing: false, ..with },
            ]);
        }
    }
    for (seed, shape) in (0..).zip(shapes) {
        run(seed, &Folder::new(shape), block_on(create(&shape)), Model::new(shape));
    }
}

#[test]
fn imago_reads_compressed_clusters_beside_those_that_readonce_wrote() {
    let folder = Folder::new(SMALL);
    folder.convert("cluster_size=4096");
    folder.ok("qemu-img", &["snapshot", "-c", "one", "image.qcow2"]);
    let mut model = Model::new(SMALL);
    model.shape.backing = false;
    run(9, &folder, folder.load(), model);
}
