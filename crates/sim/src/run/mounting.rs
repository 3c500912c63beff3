//! Mounting: the chain opened with options drawn without sense, over an origin that may hold another version.
//!
//! - What can be read is right, whatever was asked for; the rest is an error (I6).
//! - Whoever looks at the layers sees what the images were made with. In the end nobody holds a lock.
//! - All of it is done to copies.
//!
//! Not here: sessions of guests (`run`), what a format may refuse (`asking`).

use std::sync::Arc;

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use readonce_disk::{
    BlockDevice,
    chain::{ChainOptions, CopyOnRead, Locks, OnChange, TopOnly, open_layers},
};

use super::{CLOSE_WAIT, Run};
use readonce_testkit::exec::Exec;

use crate::{
    places::{Holders, TOP},
    plan::OriginFault,
    server::Server,
    shape::{Remote, Shape},
    stamp,
    world::{Disks, World},
};

/// Cells that are read at once, at most.
const CELLS_MAX: usize = 64;

impl Run {
    /// Opens copies of the images anyhow.
    pub(super) fn mount_anyhow(&mut self) {
        let mut rng = SmallRng::seed_from_u64(self.rng.random());
        let exec = Exec::new(rng.random());
        let (world, inner) = (Arc::clone(&self.world), Arc::clone(&exec));
        let disks = self.disks.map(|file| file.crash_with(|_| true));
        let stamps = self.shared.lock().model.stamps();
        exec.run(async move {
            let server = world.server(inner.rt(), 5);
            let holders = Arc::new(Holders::default());
            let options = options(&world.shape, &mut rng);
            let places = world.places(&disks, &server, &holders);
            look(&world.shape, &ChainOptions { places, ..options.clone() }, &inner).await;
            assert!(holders.are_gone(), "whoever looked gave back all locks: {holders:?}");
            // Who repins takes what is there for what it is.
            let may_change = options.on_change != OnChange::Repin && !world.shape.pinned_late;
            if may_change && rng.random_range(0..3) == 0 {
                server.arm([(rng.random_range(0..4), OriginFault::Changed(u64::MAX >> 1))]);
            }
            read(&world, &disks, &inner, &server, options, &stamps).await;
        });
        exec.power_off();
    }
}

/// Any options.
fn options(shape: &Shape, rng: &mut SmallRng) -> ChainOptions {
    let formats = [Some(shape.top.format), Some(shape.top.format), None, Some("raw"), Some("nothing")];
    // As raw bytes it could be anything.
    let format =
        formats.choose(rng).expect("some").filter(|name| *name != "raw" || shape.top.format == "raw");
    ChainOptions {
        format: format.map(Into::into),
        read_only: rng.random(),
        copy_on_read: *[CopyOnRead::On, CopyOnRead::Off, CopyOnRead::Auto].choose(rng).expect("some"),
        on_change: *[OnChange::Refuse, OnChange::Offline, OnChange::Repin].choose(rng).expect("some"),
        no_backing_files: rng.random_range(0..6) == 0,
        locks: if rng.random_range(0..4) == 0 { Locks::Share } else { Locks::Take },
        ..ChainOptions::default()
    }
}

/// What `info` and `map` do.
async fn look(shape: &Shape, options: &ChainOptions, exec: &Arc<Exec>) {
    let Ok(layers) = open_layers(TOP, options, TopOnly::No, &exec.rt()).await else {
        let refused = options.format.as_deref() != Some(shape.top.format) || options.no_backing_files;
        assert!(refused, "all is there, and the layers cannot be looked at");
        return;
    };
    let backed = usize::from(shape.middle.is_some()) + usize::from(shape.remote != Remote::Nothing);
    assert_eq!(layers.len(), if options.no_backing_files { 1 } else { 1 + backed });
    for (layer, layout) in
        layers.iter().zip([Some(&shape.top), shape.middle.as_ref().map(|middle| &middle.layout)])
    {
        let Some(layout) = layout else { continue };
        if layout.format != "raw" {
            layout.is_described(&layer.description);
        }
        assert_eq!(layer.mapper.geometry().size, layer.description.virtual_size);
        layer.pin().expect("each layer has a version");
    }
}

/// Reads all of it; closes what is open for writing.
async fn read(
    world: &Arc<World>,
    disks: &Disks,
    exec: &Arc<Exec>,
    server: &Arc<Server>,
    options: ChainOptions,
    stamps: &[u64],
) {
    let told = format!("{options:?}");
    let read_only = options.read_only;
    let Ok(mounted) = world.mount(disks, exec, server, options).await else { return };
    let disk = Arc::clone(&mounted.chain.disk);
    let cell = world.shape.cell;
    assert_eq!((disk.size(), disk.read_only()), (stamps.len() as u64 * cell, read_only), "{told}");
    for (number, stamps) in stamps.chunks(CELLS_MAX).enumerate() {
        let (first, len) = (number * CELLS_MAX, stamps.len() * cell as usize);
        let Ok(bytes) = disk.read(first as u64 * cell, len).await else { continue };
        for ((at, stamp), bytes) in (first..).zip(stamps).zip(bytes.chunks_exact(cell as usize)) {
            assert_eq!(stamp::of_bytes(bytes), Some(*stamp), "cell {at}, {told}");
        }
    }
    mounted.chain.close(CLOSE_WAIT).await.expect("the disks are well");
    assert!(mounted.holders.are_gone(), "closing gives back all locks: {:?}", mounted.holders);
}
