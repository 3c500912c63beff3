//! Chains: an image, what it names as its backing, and so on down; opened under one policy.
//!
//! - The top may be open for writing or filling; a lower local image too, where it has copy-on-read of its own. Everything
//!   else is read-only.
//! - The direct backing is tried at once, so that a person hears of trouble early; whatever is behind it is opened when it
//!   is first needed. An image that knows its backing's version opens without it: one that is far away is tried behind it.
//! - An image names its backing, but the user's policy decides whether that is opened (I8).
//!
//! Here: what is asked and what is answered. `top` opens an image to be used, `backing` what lies behind one,
//! `files` the files of an image, `versions` what is pinned of them, `layers` a whole chain to be looked at, `places` where all of it
//! is opened.

mod backing;
mod files;
mod layers;
mod places;
mod top;
mod versions;

use std::{sync::Arc, time::Duration};

use readonce_format::{Driver, driver::drivers};
use readonce_origin::{AllowBacking, OriginOptions};
use readonce_storage::{ReadAt, Rt, sync::Mutex};

pub use layers::{Layer, TopOnly, open_layers};
pub use places::{Held, Lockable, Opener, Places};
pub use top::open;
pub use versions::{Looked, look_at_backing};

use crate::{Disk, Image, LayerError};

/// Images of a chain at most, the top included; QEMU's tools give up at about as many.
pub const CHAIN_DEPTH_MAX: usize = 200;
/// Bytes at the start of a file from which its format is told.
const PROBE_BYTES: u64 = 512;

/// `--copy-on-read`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CopyOnRead {
    /// The top fills.
    On,
    /// No image of the chain fills.
    Off,
    /// Each image as it says itself.
    #[default]
    Auto,
}

/// `--on-change`: what to do when the backing is not the pinned version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnChange {
    /// What is not local is an error.
    #[default]
    Refuse,
    /// The backing is never asked.
    Offline,
    /// Pin what is found, if nothing is local yet.
    Repin,
}

/// QEMU's image locks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Locks {
    /// As QEMU takes them.
    #[default]
    Take,
    /// None (`-U`): only to look.
    Share,
}

/// How a chain is opened.
#[derive(Debug, Clone, Default)]
pub struct ChainOptions {
    /// Format of the top; `None`: told from its first bytes, and never guessed to be raw for writing.
    pub format: Option<String>,
    /// The guest may not write. Fills still go into the image.
    pub read_only: bool,
    /// Copy-on-read.
    pub copy_on_read: CopyOnRead,
    /// What a changed backing means.
    pub on_change: OnChange,
    /// What images may name beyond the policy.
    pub allow_backing: AllowBacking,
    /// Nothing behind the top is opened.
    pub no_backing_files: bool,
    /// How origins are asked; `expect` and `reach` are set by the chain itself.
    pub origin: OriginOptions,
    /// Locks.
    pub locks: Locks,
    /// Where files and origins are opened.
    pub places: Places,
}

/// What a person should hear while a chain is used.
#[derive(Debug, Clone)]
pub enum Report {
    /// A file or URL of the chain was opened.
    Opened {
        /// Printable name.
        name: String,
        /// Driver name.
        format: &'static str,
        /// Whether it is written to, be it for fills alone.
        writable: bool,
    },
    /// Something works, but not as the user may think.
    Warning(String),
}

/// Takes reports; called from any task.
pub type Reporter = Arc<dyn Fn(Report) + Send + Sync>;

/// A chain could not be opened. Says which file or URL.
#[derive(Debug, Clone, thiserror::Error)]
#[error("Could not open '{name}': {cause}")]
pub struct OpenError {
    /// Printable name.
    pub name: String,
    /// What is wrong with it.
    pub cause: String,
}

impl OpenError {
    /// An error of the file or URL `name`.
    pub fn new(name: impl Into<String>, cause: impl ToString) -> Self {
        // Some causes come from below with the same words before them.
        let name = name.into();
        let mut cause = cause.to_string();
        for prefix in [format!("{name}: "), format!("Could not open '{name}': ")] {
            if let Some(rest) = cause.strip_prefix(&prefix) {
                cause = rest.to_owned();
            }
        }
        Self { name, cause }
    }
}

impl From<OpenError> for LayerError {
    fn from(error: OpenError) -> Self {
        Self::NoBacking(error.to_string())
    }
}

/// An open chain.
pub struct Chain {
    /// The device to export.
    pub disk: Arc<Disk>,
    shared: Arc<Shared>,
}

/// What the layers of one chain share.
struct Shared {
    options: ChainOptions,
    rt: Rt,
    report: Reporter,
    /// Images open for writing, in the order of opening: top first.
    images: Mutex<Vec<Arc<Image>>>,
    /// Held until the chain ends.
    locks: Mutex<Vec<Held>>,
    /// Origins that were opened, for their counters.
    origins: Mutex<Vec<Arc<dyn readonce_origin::Origin>>>,
    /// The chain is used no more.
    ended: tokio::sync::watch::Sender<bool>,
}

impl Chain {
    /// The images that are open for writing, top first.
    pub fn images(&self) -> Vec<Arc<Image>> {
        self.shared.images.lock().clone()
    }

    /// The origins opened so far.
    pub fn origins(&self) -> Vec<Arc<dyn readonce_origin::Origin>> {
        self.shared.origins.lock().clone()
    }

    /// Ends all use: flushes and closes each image clean, top first. No guest request may be under way.
    ///
    /// # Errors
    /// The first failure; the others are reported as warnings.
    pub async fn close(&self, wait_max: Duration) -> Result<(), LayerError> {
        self.shared.ended.send_replace(true);
        let mut first = Ok(());
        let mut closed_count = 0;
        // What the top's last fetches open while it is closed is closed as well.
        while let Some(image) = { self.shared.images.lock().get(closed_count).cloned() } {
            closed_count += 1;
            let closed = image.close(wait_max).await;
            match (&first, closed) {
                (Ok(()), closed) => first = closed,
                (Err(_), Err(error)) => self.shared.warn(error.to_string()),
                (Err(_), Ok(())) => {}
            }
        }
        self.shared.locks.lock().clear();
        first
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.shared.ended.send_replace(true);
    }
}

impl Shared {
    fn warn_of_what_is_away(&self, error: &LayerError) {
        self.warn(format!("{error}; what is local can be read, the rest cannot"));
    }

    fn warn(&self, text: impl Into<String>) {
        (self.report)(Report::Warning(text.into()));
    }

    fn opened(&self, name: String, format: &'static str, writable: bool) {
        (self.report)(Report::Opened { name, format, writable });
    }
}

/// The driver for a file: by name, or told from its first bytes (`raw` where no format knows them).
///
/// # Errors
/// In words: no driver of that name, a format without a driver, or the bytes cannot be read.
pub async fn driver_of(file: &dyn ReadAt, format: Option<&str>) -> Result<&'static dyn Driver, String> {
    let by_name =
        |name: &str| readonce_format::driver::driver(name).ok_or_else(|| format!("Unknown driver '{name}'"));
    if let Some(name) = format {
        return by_name(name);
    }
    let len = file.len().min(PROBE_BYTES);
    let head = file.read(0, len as usize).await.map_err(|error| error.to_string())?;
    match drivers().iter().find(|driver| driver.probe(&head)) {
        Some(driver) => Ok(*driver),
        None => match readonce_format::driver::unsupported_format(&head) {
            Some(format) => {
                Err(format!("{format} images are not supported; -f raw takes its bytes as they are"))
            }
            None => by_name("raw"),
        },
    }
}
