//! What lies behind an image in a test: the origin itself, or a chain of qcow2 images that shows the same bytes.

use std::{path::Path, process::Command, sync::Arc};

use bytes::Bytes;
use readonce_disk::{Base, BaseFiles, Indexed, Source, pieces::Pieces};
use readonce_format::driver::driver;
use readonce_storage::{ReadAt, Rt};

use super::{
    origin::{SECTOR, SimOrigin, backing_stamp, sector},
    world::raw_over,
};

/// What lies behind.
#[derive(Debug, Clone)]
pub enum Below {
    /// The origin's bytes as they are.
    Raw,
    /// A qcow2 image with a snapshot that shows something else, over a compressed one; both far away.
    Chain {
        /// The upper one's file.
        upper: Bytes,
        /// The compressed one's file.
        compressed: Bytes,
    },
}

impl Below {
    /// A chain of `len` bytes, whole sectors.
    pub fn chain(len: u64, codec: &str, cluster_size: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = folder.path();
        let bytes: Vec<u8> = (0..len / SECTOR).flat_map(|at| sector(backing_stamp(at))).collect();
        let middle = bytes.len() / 1024 * 512;
        std::fs::write(at.join("plain.raw"), &bytes).expect("room");
        std::fs::write(at.join("end.raw"), &bytes[middle..]).expect("room");
        let cluster_size = format!("cluster_size={cluster_size}");
        let option = format!("compression_type={codec},{cluster_size}");
        run(
            at,
            "qemu-img",
            &["convert", "-c", "-O", "qcow2", "-o", &option, "-f", "raw", "plain.raw", "compressed"],
        );
        let over =
            ["create", "-q", "-f", "qcow2", "-o", &cluster_size, "-b", "compressed", "-F", "qcow2", "upper"];
        run(at, "qemu-img", &over);
        // Twice: what the snapshot shows, and what counts.
        let len = bytes.len() - middle;
        let other = format!("write -P 0x5a {middle} {len}");
        let counts = format!("write -s end.raw {middle} {len}");
        run(at, "qemu-io", &["-f", "qcow2", "-c", &other, "upper"]);
        run(at, "qemu-img", &["snapshot", "-c", "other", "upper"]);
        run(at, "qemu-io", &["-f", "qcow2", "-c", &counts, "upper"]);
        let file = |name: &str| Bytes::from(std::fs::read(at.join(name)).expect("made"));
        Self::Chain { upper: file("upper"), compressed: file("compressed") }
    }

    /// It as a source, and the origins that it is asked of.
    pub async fn open(
        &self,
        len: u64,
        rt: &Rt,
        delay_ms_max: u64,
        fail_of_256: u16,
    ) -> (Arc<dyn Source>, Vec<Arc<SimOrigin>>) {
        let (source, origins) = match self {
            Self::Raw => {
                let origin = SimOrigin::new(len, rt.clone(), delay_ms_max);
                (raw_over(origin.clone()).await, vec![origin])
            }
            Self::Chain { upper, compressed } => {
                let (upper, compressed) = [upper, compressed]
                    .map(|image| SimOrigin::of_image(image.clone(), rt.clone(), delay_ms_max))
                    .into();
                let base = qcow2_over(compressed.clone(), None, rt).await;
                let source = Indexed::new(qcow2_over(upper.clone(), Some(base), rt).await);
                (source as Arc<dyn Source>, vec![upper, compressed])
            }
        };
        for origin in &origins {
            *origin.fail_of_256.lock() = fail_of_256;
        }
        (source, origins)
    }
}

async fn qcow2_over(origin: Arc<SimOrigin>, backing: Option<Arc<dyn Source>>, rt: &Rt) -> Arc<dyn Source> {
    let pieces = Pieces::new(origin, rt.clone());
    let own: Arc<dyn ReadAt> = pieces.clone();
    let mapper = driver("qcow2").expect("known").open(own.clone()).await.expect("it opens");
    Arc::new(Base::new(mapper, BaseFiles { own, data: pieces }, backing, rt))
}

fn run(folder: &Path, tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).current_dir(folder).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{tool}: {error} (Debian: apt install qemu-utils)"));
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&said));
}
