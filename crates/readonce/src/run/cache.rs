//! The images that `readonce run URL` keeps in the user's cache folder: one for each URL and version of its file.
//!
//! - A name is `FILE-<URL>-<version>.FORMAT`, the middle two hashed. It only finds an image: that it belongs to the URL, and to the
//!   version, is in the image.
//! - A changed file is a new image, and a warning that names the old one.
//! - With the origin away, the newest image of the URL is used.
//! - One process uses an image at a time: a lock file beside it, held for as long as that lives.

use std::{
    fs::{DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use readonce_disk::chain::{ChainOptions, Looked, look_at_backing};
use readonce_origin::{FetchError, Locator, OriginOptions, Reach};
use readonce_storage::runtime::TokioRuntime;
use rustix::fs::{FlockOperation, flock};

use crate::{failure::Failure, look};

/// Letters of the file's own name in an image's name.
const NAME_LETTERS_MAX: usize = 40;

/// How long an origin is asked when there is an image that can be used without it.
const PROBE_WITH_IMAGE: Duration = Duration::from_secs(3);

/// The image for a URL.
pub struct Found {
    /// Its path; it may not exist yet if there is an origin.
    pub image: PathBuf,
    /// What is there now, if an image of it is still to be made.
    pub looked: Option<Looked>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Formats of images, which their names end with.
const FORMATS: [&str; 2] = ["qcow2", "qed"];

/// The format of an image of the cache.
pub fn format(image: &Path) -> &'static str {
    let ending = image.extension().and_then(|ending| ending.to_str());
    FORMATS.into_iter().find(|format| ending == Some(format)).unwrap_or("qcow2")
}

/// Looks for the image of `place` as it is now; one that is not there yet is to have that format.
pub async fn find(
    place: &Locator,
    format: &str,
    backing_format: Option<&str>,
    options: &ChainOptions,
) -> Result<Found, Failure> {
    let folder = folder()?;
    let prefix = prefix(place);
    let known = images(&folder, &prefix);
    let mut asked = OriginOptions { reach: Reach::Required, expect: None, ..options.origin.clone() };
    if !known.is_empty() {
        asked.probe_for = asked.probe_for.min(PROBE_WITH_IMAGE);
    }
    let rt = TokioRuntime::current();
    let image = |version: &[u8], len: u64, format: &str| {
        let version = hash([version, &len.to_le_bytes()].concat());
        folder.join(format!("{prefix}{version}.{format}"))
    };
    let known_as = |version: &[u8], len| {
        FORMATS.into_iter().map(|format| image(version, len, format)).find(|image| known.contains(image))
    };
    let asked = ChainOptions { origin: asked, ..options.clone() };
    match readonce_origin::open(place, &asked.origin, &rt).await {
        Ok(origin) => {
            let mut warnings: Vec<String> =
                origin.notes().iter().map(|note| format!("{}: {note}", place.printable())).collect();
            // An image that pins more than this version has another name: then the file itself must be asked what.
            if let Some(image) = known_as(&origin.validator(), origin.len()) {
                return Ok(Found { image, looked: None, warnings });
            }
            let looked = look_at_backing(place, backing_format, &origin, None, &asked, &rt)
                .await
                .map_err(|error| look::cannot_open(&place.printable(), error))?;
            let (version, len) = (&looked.pin.validator, looked.pin.len);
            if let Some(image) = known_as(version, len) {
                return Ok(Found { image, looked: None, warnings });
            }
            if let Some(old) = known.last() {
                warnings.push(format!(
                    "{place} changed: a new image is begun; that of the old version is still in {}",
                    old.display()
                ));
            }
            Ok(Found { image: image(version, len, format), looked: Some(looked), warnings })
        }
        Err(error @ FetchError::Away { .. }) => match known.last() {
            Some(image) => Ok(Found {
                image: image.clone(),
                looked: None,
                warnings: vec![format!(
                    "{error}; what was read before is used, the rest fails until it is back"
                )],
            }),
            None => Err(look::cannot_open(&place.printable(), error)),
        },
        Err(error) => Err(look::cannot_open(&place.printable(), error)),
    }
}

/// `$XDG_CACHE_HOME/readonce`, made if it is not there. Its images may hold what credentials were needed for: mode 0700.
fn folder() -> Result<PathBuf, Failure> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base =
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache"))).ok_or_else(
            || Failure::new("There is no cache folder: set HOME or XDG_CACHE_HOME, or give --image FILE"),
        )?;
    let folder = base.join("readonce");
    DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|error| {
        Failure::new(format!(
            "Could not make the folder '{}': {}",
            folder.display(),
            look::without_number(&error)
        ))
    })?;
    Ok(folder)
}

/// How the names of all images of a place begin.
fn prefix(place: &Locator) -> String {
    let name = place.stored_name();
    let path = name.split(['?', '#']).next().unwrap_or_default();
    let file: String = path
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|letter| letter.is_ascii_alphanumeric() || "._-".contains(*letter))
        .take(NAME_LETTERS_MAX)
        .collect();
    format!("{}-{}-", file.trim_start_matches('.'), hash(name.into_bytes()))
}

/// The images there are, the newest last.
fn images(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut images: Vec<_> = entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let ending = name.to_str().and_then(|name| name.strip_prefix(prefix)?.split_once('.'));
            ending.is_some_and(|(_, format)| FORMATS.contains(&format))
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    images.sort();
    images.into_iter().map(|(_, path)| path).collect()
}

/// FNV-1a of 64 bits, in hexadecimal. Not a secret, and two names that meet are told apart by what the image holds.
fn hash(bytes: Vec<u8>) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// One process's claim to an image of the cache.
pub struct Claim {
    _lock: File,
}

impl Claim {
    /// Claims it, or says who has it.
    pub fn take(image: &Path, place: &Locator) -> Result<Self, Failure> {
        let path = image.with_extension("lock");
        let failed = |error: std::io::Error| {
            Failure::new(format!("Could not lock '{}': {}", path.display(), look::without_number(&error)))
        };
        let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::new(format!(
                "another `readonce run` uses {place} now, and its image in the cache has one user at a time: wait for it to end, or \
                 give this one an image of its own with --image FILE"
            ))),
            Err(error) => Err(failed(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix_of(url: &str) -> String {
        prefix(&Locator::parse(url, None).expect("a URL"))
    }

    #[test]
    fn an_image_is_found_by_the_place_not_by_the_signature() {
        let plain = prefix_of("https://host/a/disk.raw");
        assert!(plain.starts_with("disk.raw-"), "{plain}");
        assert_eq!(prefix_of("https://host/a/disk.raw?X-Amz-Signature=1"), plain);
        assert_ne!(prefix_of("https://host/b/disk.raw"), plain);
        assert_ne!(prefix_of("https://host/a/disk.raw?version=2"), plain);
    }

    #[test]
    fn a_name_cannot_leave_the_folder() {
        assert!(!prefix_of("https://host/..").contains('/'));
        assert!(!prefix_of("https://host/%2e%2e%2fx").contains('/'));
    }
}
