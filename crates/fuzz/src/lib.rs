//! Fuzz targets: what is done with bytes that a hostile image, origin or client could send.
//!
//! - A target is a plain function of bytes. It panics where a promise of I8 (or of a driver) is broken, and is done in bounded time.
//!   The same bytes do the same: no clock, no randomness, one thread (`nbd_server` alone uses a real socket).
//! - `fuzz/` hands them to libFuzzer; `tests/replay.rs` runs them over the corpora and seeded random bytes on the stable toolchain.
//! - `draw`: bytes as choices. `exec`: the runtime.
//!
//! Not here: flags (clap's), and profile files, which do not exist yet: `trace` reads what is nearest to one, a recorded boot.

/// Prints what a target makes of its bytes, for a person who looks at a failure: where `FUZZ_TELL` is set.
macro_rules! tell {
    ($($what:tt)*) => {
        if $crate::is_telling() {
            eprintln!($($what)*);
        }
    };
}

pub mod codec;
pub mod draw;
pub mod exec;
pub mod http_answers;
pub mod image;
pub mod image_bytes;
pub mod locator;
pub mod nbd_client;
pub mod nbd_server;
pub mod trace;
pub mod validator;
pub mod words;

/// A target: its name, as the folder of its corpus, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 11] = [
    ("qed_image", image::qed),
    ("qcow2_image", image::qcow2),
    ("image_bytes", image_bytes::run),
    ("codec", codec::run),
    ("nbd_server", nbd_server::run),
    ("http_answers", http_answers::run),
    ("locator", locator::run),
    ("validator", validator::run),
    ("words", words::run),
    ("nbd_client", nbd_client::run),
    ("trace", trace::run),
];

fn is_telling() -> bool {
    static TELLING: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *TELLING.get_or_init(|| std::env::var_os("FUZZ_TELL").is_some())
}
