//! Shape: what kind of image a run is about, drawn from its seed.
//!
//! Not here: what happens to it (`plan`), how it is made (`world`).

use crate::remote;

use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};

/// Which formats are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Formats {
    /// Both.
    All,
    /// QED alone.
    Qed,
    /// qcow2 alone.
    Qcow2,
}

/// The image that is written, and what lies behind it.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The image that the guests write.
    pub top: Layout,
    /// A local image between it and the origin.
    pub middle: Option<Middle>,
    /// What the origin serves.
    pub remote: Remote,
    /// Bytes that the guests see at first.
    pub size: u64,
    /// Bytes that the remote image shows.
    pub backing_len: u64,
    /// Bytes of a cell of the model.
    pub cell: u64,
}

/// A format and how its images are made.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Driver name.
    pub format: &'static str,
    /// As after `-o`.
    pub options: Vec<(&'static str, String)>,
    /// Bytes.
    pub cluster_size: u64,
    /// Its data is in a file of its own.
    pub data_file: bool,
    /// Internal snapshots can be made.
    pub snapshots: bool,
    /// Some of its clusters are compressed from the start.
    pub packed: bool,
    /// After a crash its refcounts are wrong until it is opened for writing.
    pub lazy: bool,
}

/// A local image below the top.
#[derive(Debug, Clone)]
pub struct Middle {
    /// Its format.
    pub layout: Layout,
    /// It is filled by what is read through it.
    pub fills: bool,
}

/// The format of what the origin serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remote {
    /// Bytes as they are.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// A qcow2 image of compressed clusters.
    Compressed,
}

impl Shape {
    /// Draws one.
    pub fn draw(rng: &mut SmallRng, formats: Formats) -> Self {
        let top = Layout::draw(rng, formats);
        let cluster_size = top.cluster_size;
        let cell = match rng.random_range(0..16) {
            0 => 8,
            1..3 => 64,
            _ => 512,
        };
        // A cell is an entry of the model: small ones only where there are few.
        let bytes_max = cell * 6000;
        let clusters = rng.random_range(1..40);
        let size =
            (cluster_size * clusters).min(bytes_max).next_multiple_of(512) + 512 * rng.random_range(0..8);
        let backing_len = rng.random_range(1..=size * 5 / 4 / 512) * 512;
        let middle = (rng.random_range(0..6) == 0).then(|| Middle {
            layout: Layout { data_file: false, packed: false, ..Layout::draw(rng, Formats::All) },
            fills: rng.random(),
        });
        let remote = match rng.random_range(0..6) {
            0 => Remote::Qcow2,
            1 => Remote::Compressed,
            _ => Remote::Raw,
        };
        Self { top, middle, remote, size, backing_len, cell }
    }
}

impl Layout {
    /// Draws one.
    pub fn draw(rng: &mut SmallRng, formats: Formats) -> Self {
        let qed = match formats {
            Formats::Qed => true,
            Formats::Qcow2 => false,
            Formats::All => rng.random_range(0..3) == 0,
        };
        if qed { Self::draw_qed(rng) } else { Self::draw_qcow2(rng) }
    }

    /// More snapshots than refcounts can count are refused.
    pub fn snapshots_max(&self) -> usize {
        let bits = self.options.iter().find(|(name, _)| *name == "refcount_bits");
        match bits.map(|(_, bits)| bits.as_str()) {
            Some("2") => 2,
            _ => 14,
        }
    }

    fn draw_qed(rng: &mut SmallRng) -> Self {
        let cluster_size = *[4096, 4096, 8192, 65536].choose(rng).expect("there are some");
        let table_size = *[1, 1, 2, 4].choose(rng).expect("there are some");
        Self {
            format: "qed",
            options: vec![("table_size", format!("{table_size}"))],
            cluster_size,
            data_file: false,
            snapshots: false,
            packed: false,
            lazy: false,
        }
    }

    fn draw_qcow2(rng: &mut SmallRng) -> Self {
        let mut layout = Self {
            format: "qcow2",
            options: Vec::new(),
            cluster_size: *[512, 2048, 4096, 4096, 8192, 16384, 65536].choose(rng).expect("there are some"),
            data_file: false,
            snapshots: true,
            packed: false,
            lazy: false,
        };
        if rng.random_range(0..3) == 0 {
            layout.packed = rng.random_range(0..3) == 0;
            if layout.packed {
                layout.cluster_size = remote::CLUSTER as u64;
            }
            return layout;
        }
        if rng.random_range(0..5) == 0 {
            layout.options.push(("compat", "0.10".into()));
            return layout;
        }
        if rng.random_range(0..3) == 0 {
            layout.cluster_size = layout.cluster_size.max(16384);
            layout.options.push(("extended_l2", "on".into()));
        }
        if rng.random_range(0..3) == 0 {
            let bits = 1 << rng.random_range(0..7);
            layout.snapshots = bits > 1;
            layout.options.push(("refcount_bits", format!("{bits}")));
        }
        if rng.random_range(0..4) == 0 {
            layout.lazy = true;
            layout.options.push(("lazy_refcounts", "on".into()));
        }
        if rng.random_range(0..6) == 0 {
            layout.data_file = true;
            layout.snapshots = false;
        }
        layout
    }
}
