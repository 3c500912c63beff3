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
    let shapes = [
        SMALL,
        Shape { version: 2, cluster_bits: 16, ..SMALL },
        Shape { cluster_bits: 9, refcount_bits: 1, backing: false, ..SMALL },
        Shape { lazy: true, cluster_bits: 16, ..SMALL },
        Shape { data: DataIn::File, ..SMALL },
    ];
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
