//! Flags shared by the commands that open a chain, and what they come to.
//!
//! Credentials and signatures come from the environment (or a file it names); they are bound to what the user named, never
//! to a name that only an image holds.

use std::{sync::Arc, time::Duration};

use readonce_disk::chain::{ChainOptions, CopyOnRead, Locks, OnChange};
use readonce_origin::{AllowBacking, Credentials, Locator, OriginOptions};
use readonce_words::{drive::Drive, options};

use crate::{failure::Failure, look, report};

/// Flags about asking origins.
#[derive(Debug, Clone, clap::Args)]
pub struct OriginArgs {
    /// A freshly signed URL, taken instead of the stored name of the same place
    #[arg(long, env = "READONCE_URL", hide_env_values = true, value_name = "URL")]
    pub url: Vec<String>,
    /// How long a passing failure of an origin is tried again before a read fails; at open, 10 s at most (500ms, 30s, 10m, 1h)
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = options::time)]
    pub retry_for: Duration,
}

impl OriginArgs {
    /// The options for a chain whose top, or whose backing, the user typed as `named`.
    pub fn options(&self, named: &[&Locator]) -> Result<OriginOptions, Failure> {
        let mut url_override = Vec::new();
        for url in self.url.iter().filter(|url| !url.is_empty()) {
            let locator =
                Locator::parse(url, None).map_err(|error| Failure::new(format!("--url: {error}")))?;
            url_override.push(locator);
        }
        let urls: Vec<_> = named
            .iter()
            .copied()
            .chain(&url_override)
            .filter_map(|locator| match locator {
                Locator::Http(url) => Some(url.clone()),
                Locator::File(_) => None,
            })
            .collect();
        let from_environment = std::env::var("READONCE_URL").ok();
        if self.url.iter().eq(&from_environment) {
            named.iter().try_for_each(|locator| refuse_password(locator))?;
        } else {
            named.iter().copied().chain(&url_override).try_for_each(refuse_password)?;
        }
        let mut credentials =
            Credentials::from_environment(urls.first()).map_err(|error| Failure::new(error.to_string()))?;
        for url in &urls {
            credentials.add_user_of(url);
        }
        // What the user typed has what signs it; the name of the same place in an image has not.
        url_override
            .extend(named.iter().copied().filter(|locator| matches!(locator, Locator::Http(_))).cloned());
        let defaults = OriginOptions::default();
        Ok(OriginOptions {
            retry_for: self.retry_for,
            // A person waits for this one.
            probe_for: defaults.probe_for.min(self.retry_for),
            credentials: Arc::new(credentials),
            url_override,
            ..defaults
        })
    }
}

impl OriginArgs {
    /// For a second look at what is open already.
    pub const NONE: Self = Self { url: Vec::new(), retry_for: Duration::ZERO };

    /// Warns of a URL that was given for nothing: none of `places`, which is what is known of a chain, is its place.
    pub fn warn_of_unused(&self, places: &[Locator]) {
        // In the environment it may be meant for other images.
        let from_environment = std::env::var("READONCE_URL").ok();
        let flags = self.url.iter().filter(|url| !url.is_empty() && Some(*url) != from_environment.as_ref());
        for url in flags {
            if let Ok(url) = Locator::parse(url, None)
                && !places.iter().any(|place| place.same_place(&url))
            {
                report::warn(format!("--url {}: no image here is known to name this place", url.printable()));
            }
        }
    }
}

/// A command line is seen by every user of the machine.
fn refuse_password(locator: &Locator) -> Result<(), Failure> {
    match locator {
        Locator::Http(url) if url.password().is_some() || !url.username().is_empty() => {
            Err(Failure::new(format!(
                "{}: a user or password is not taken from the command line: give READONCE_HTTP_USER and READONCE_HTTP_PASSWORD, \
             or the whole URL in READONCE_URL",
                locator.printable()
            )))
        }
        _ => Ok(()),
    }
}

/// Flags about what an image may name.
#[derive(Debug, Clone, clap::Args)]
pub struct PolicyArgs {
    /// What an image read over HTTP may name beyond its own host: a URL or absolute path, * for any characters
    #[arg(long, value_name = "PATTERN")]
    pub allow_backing: Vec<String>,
    /// Open nothing behind IMAGE
    #[arg(long)]
    pub no_backing_files: bool,
}

impl PolicyArgs {
    /// As the chain takes it.
    pub fn allow(&self) -> AllowBacking {
        AllowBacking::new(self.allow_backing.iter().cloned())
    }
}

/// Flags of the commands that use a chain: `serve`, `run`, `io`.
#[derive(Debug, Clone, clap::Args)]
pub struct UseArgs {
    /// Format of IMAGE (qed, qcow2, raw); told from its first bytes where absent, but never guessed to be raw for writing
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub format: Option<String>,
    /// The guest may not write; fills still go into the image
    #[arg(short = 'r', long)]
    pub read_only: bool,
    /// Whether what is read from the backing is kept in IMAGE; auto is what the image says
    #[arg(long, value_name = "on|off|auto", default_value = "auto", value_parser = copy_on_read)]
    pub copy_on_read: CopyOnRead,
    /// What to do when the backing is not the version that the image began with
    #[arg(long, value_name = "refuse|offline|repin", default_value = "refuse", value_parser = on_change)]
    pub on_change: OnChange,
    /// `--drive`, as the review of 2011 proposed it.
    #[arg(
        help = "In place of the arguments above and IMAGE: file=NAME[,format=FMT][,cor=on|off][,readonly=on|off][,media=disk|cdrom][,if=...]",
        long,
        value_name = "OPTIONS"
    )]
    pub drive: Option<String>,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    pub origin: OriginArgs,
}

fn copy_on_read(text: &str) -> Result<CopyOnRead, String> {
    match text {
        "on" => Ok(CopyOnRead::On),
        "off" => Ok(CopyOnRead::Off),
        "auto" => Ok(CopyOnRead::Auto),
        _ => Err("expected on, off or auto".into()),
    }
}

fn on_change(text: &str) -> Result<OnChange, String> {
    match text {
        "refuse" => Ok(OnChange::Refuse),
        "offline" => Ok(OnChange::Offline),
        "repin" => Ok(OnChange::Repin),
        _ => Err("expected refuse, offline or repin".into()),
    }
}

impl UseArgs {
    /// Takes the image's name from `--drive`, or gives `image` back. What contradicts a flag is refused.
    pub fn take_drive(&mut self, command: &str, image: Option<String>) -> Result<String, Failure> {
        let Some(drive) = self.drive.take() else {
            return image.ok_or_else(|| Failure::usage(command, "Expecting one image file name"));
        };
        let Drive { file, format, copy_on_read, read_only } = Drive::parse(&drive)?;
        if image.is_some() && file.is_some() {
            return Err(Failure::usage(command, "--drive file= and an image file name exclude each other"));
        }
        let refused = |drive: &str, flag: &str| {
            Err(Failure::usage(command, format!("--drive {drive} and {flag} contradict each other")))
        };
        match (&self.format, &format) {
            (Some(flag), Some(drive)) if flag != drive => {
                return refused(&format!("format={drive}"), &format!("-f {flag}"));
            }
            _ => self.format = format.or(self.format.take()),
        }
        match (self.read_only, read_only) {
            (true, Some(false)) => return refused("readonly=off", "-r"),
            _ => self.read_only |= read_only.unwrap_or_default(),
        }
        match (self.copy_on_read, copy_on_read) {
            (CopyOnRead::Off, Some(true)) => return refused("cor=on", "--copy-on-read=off"),
            (CopyOnRead::On, Some(false)) => return refused("cor=off", "--copy-on-read=on"),
            (_, Some(true)) => self.copy_on_read = CopyOnRead::On,
            (_, Some(false)) => self.copy_on_read = CopyOnRead::Off,
            (_, None) => {}
        }
        image.or(file).ok_or_else(|| Failure::new("--drive: Parameter 'file' is missing"))
    }

    /// Warns of a `--url` that the chain whose top is `image` does not need.
    pub async fn warn_of_unused(&self, image: &str, format: Option<&str>) {
        if !self.origin.url.is_empty() {
            self.origin.warn_of_unused(&look::places(image, format).await);
        }
    }

    /// The options to open a chain with, whose top is `image`.
    pub fn chain_options(&self, image: &str) -> Result<ChainOptions, Failure> {
        let named = Locator::parse(image, None)
            .map_err(|error| Failure::new(format!("Could not open '{image}': {error}")))?;
        Ok(ChainOptions {
            format: self.format.clone(),
            read_only: self.read_only,
            copy_on_read: self.copy_on_read,
            on_change: self.on_change,
            allow_backing: self.policy.allow(),
            no_backing_files: self.policy.no_backing_files,
            origin: self.origin.options(&[&named])?,
            locks: Locks::Take,
            ..ChainOptions::default()
        })
    }
}
