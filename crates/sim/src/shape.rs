//! Shape: what kind of image a run is about, drawn from its seed.
//!
//! Not here: what happens to it (`plan`), how it is made (`world`).

use rand::{Rng, rngs::SmallRng, seq::IndexedRandom};

use crate::remote::{self, Packing};

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

impl Formats {
    /// Whether this driver is among them.
    pub fn has(self, format: &str) -> bool {
        match self {
            Self::All => true,
            Self::Qed => format == "qed",
            Self::Qcow2 => format == "qcow2",
        }
    }
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
    /// The top is made without a pin: it gets one when it is first opened.
    pub pinned_late: bool,
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
    /// How some of its clusters are held from the start; plain: it begins with none.
    pub packed: Packing,
    /// It cannot have a backing.
    pub alone: bool,
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
    /// There is none: what no image here holds is zeros.
    Nothing,
    /// Bytes as they are.
    Raw,
    /// A qcow2 image.
    Qcow2(Packing),
}

/// Of so many shapes, one has large clusters: they cost time.
const BIG_ONE_OF: u32 = 32;
/// Where they begin, bytes.
const BIG_CLUSTER: u64 = 256 << 10;

impl Shape {
    /// Draws one.
    pub fn draw(rng: &mut SmallRng, formats: Formats) -> Self {
        let mut top = Layout::draw(rng, formats);
        let big = rng.random_range(0..BIG_ONE_OF) == 0 && top.packed == Packing::Plain && top.format != "raw";
        if big {
            top.cluster_size = *[BIG_CLUSTER, 1 << 20].choose(rng).expect("there are some");
        }
        let cluster_size = top.cluster_size;
        let cell = match rng.random_range(0..16) {
            0 => 8,
            1..3 => 64,
            _ => 512,
        };
        // A cell is an entry of the model: small ones only where there are few.
        let bytes_max = cell * if big { 16_000 } else { 6000 };
        let clusters = match rng.random_range(0..8) {
            _ if big => rng.random_range(1..12),
            // More than a table maps: one of QED's has 512 entries at least.
            0 => rng.random_range(500..700),
            _ => rng.random_range(1..40),
        };
        let size =
            (cluster_size * clusters).min(bytes_max).next_multiple_of(512) + 512 * rng.random_range(0..8);
        let backing_len = rng.random_range(1..=size * 5 / 4 / 512) * 512;
        let with_middle = rng.random_range(0..6) == 0 && !top.alone;
        let middle = with_middle.then(|| Middle::draw(rng));
        let nothing_behind = middle.as_ref().map_or(top.alone, |middle| middle.layout.alone);
        let remote = match rng.random_range(0..24) {
            _ if nothing_behind => Remote::Nothing,
            0 if middle.is_none() => Remote::Nothing,
            1..5 => Remote::Qcow2(Packing::Plain),
            5..8 => Remote::Qcow2(Packing::Deflate),
            8..10 => Remote::Qcow2(Packing::Zstd),
            _ => Remote::Raw,
        };
        let backing_len = if remote == Remote::Nothing && middle.is_none() { 0 } else { backing_len };
        let pinned_late = rng.random_range(0..6) == 0 && middle.is_none() && remote != Remote::Nothing;
        Self { top, middle, remote, size, backing_len, cell, pinned_late }
    }

    /// Whether its clusters are larger than what is written in one piece.
    pub fn is_big(&self) -> bool {
        self.top.cluster_size >= BIG_CLUSTER
    }

    /// Whether the top has a backing.
    pub fn is_backed(&self) -> bool {
        self.middle.is_some() || self.remote != Remote::Nothing
    }
}

impl Middle {
    fn draw(rng: &mut SmallRng) -> Self {
        let mut layout = match rng.random_range(0..6) {
            0 => Layout::raw(),
            _ => Layout::draw(rng, Formats::All),
        };
        layout.data_file = false;
        layout.packed = Packing::Plain;
        layout.options.retain(|(name, _)| *name != "data_file_raw");
        Self { fills: !layout.alone && rng.random(), layout }
    }
}

impl Layout {
    /// Draws one.
    pub fn draw(rng: &mut SmallRng, formats: Formats) -> Self {
        let qed = match formats {
            Formats::Qed => true,
            Formats::Qcow2 => false,
            Formats::All if rng.random_range(0..24) == 0 => return Self::raw(),
            Formats::All => rng.random_range(0..3) == 0,
        };
        let mut layout = if qed { Self::draw_qed(rng) } else { Self::draw_qcow2(rng) };
        if rng.random_range(0..3) == 0 {
            layout.set("copy_on_read", "on");
        }
        layout
    }

    /// One without options.
    pub fn plain(format: &'static str, cluster_size: u64) -> Self {
        Self {
            format,
            options: Vec::new(),
            cluster_size,
            data_file: false,
            snapshots: format == "qcow2",
            packed: Packing::Plain,
            alone: false,
            lazy: false,
        }
    }

    /// The file is the disk.
    fn raw() -> Self {
        Self { alone: true, ..Self::plain("raw", 4096) }
    }

    /// With one more option.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.lazy |= (name, value) == ("lazy_refcounts", "on");
        self.options.push((name, value.to_owned()));
    }

    /// What was said of an option.
    pub fn option(&self, wanted: &str) -> Option<&str> {
        self.options.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.as_str())
    }

    /// More snapshots than refcounts can count are refused.
    pub fn snapshots_max(&self) -> usize {
        if self.option("refcount_bits") == Some("2") { 2 } else { 14 }
    }

    fn draw_qed(rng: &mut SmallRng) -> Self {
        let mut layout = Self::plain("qed", *[4096, 4096, 8192, 65536].choose(rng).expect("there are some"));
        // qemu-img opens none with tables of one cluster, so that it cannot be asked about them.
        let table_size = [1, 2, 2, 2, 4, 4, 8, 2].choose(rng).expect("there are some");
        layout.set("table_size", &table_size.to_string());
        layout
    }

    fn draw_qcow2(rng: &mut SmallRng) -> Self {
        let sizes = [512, 2048, 4096, 4096, 8192, 16384, 65536];
        let mut layout = Self::plain("qcow2", *sizes.choose(rng).expect("there are some"));
        let mut once_in = |of: u32| rng.random_range(0..of) == 0;
        if once_in(4) {
            if once_in(2) {
                layout.packed = if once_in(2) { Packing::Zstd } else { Packing::Deflate };
                layout.cluster_size = remote::CLUSTER as u64;
            }
            return layout;
        }
        let old = once_in(5);
        let extended = !old && once_in(3);
        if old {
            layout.set("compat", "0.10");
        } else {
            if extended {
                layout.cluster_size = layout.cluster_size.max(16384);
                layout.set("extended_l2", "on");
            }
            if once_in(4) {
                layout.set("lazy_refcounts", "on");
            }
            if once_in(4) {
                layout.set("compression_type", "zstd");
            }
            if once_in(6) {
                layout.data_file = true;
                layout.snapshots = false;
                if once_in(3) {
                    layout.alone = true;
                    layout.set("data_file_raw", "on");
                }
            }
            if once_in(3) {
                let bits = 1 << rng.random_range(0..7);
                layout.snapshots &= bits > 1;
                layout.set("refcount_bits", &bits.to_string());
            }
        }
        if rng.random_range(0..8) == 0 {
            layout.alone |= !extended;
            layout
                .set("preallocation", ["metadata", "metadata", "falloc", "full"].choose(rng).expect("some"));
        }
        layout
    }
}
