//! The paths that a server may open after it has started: of its chain, and of the system.
//!
//! - The chain is walked as it will be opened, but only along local files, and by reading their headers alone. What cannot be read
//!   ends the walk; who opens it later tells why.
//! - Nothing that came over the network names a local path (I8), so behind a URL only what `--allow-backing` names is local.
//!
//! Not here: whether an image may name what it names; the chain decides that when it opens.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use readonce_disk::chain::{CHAIN_DEPTH_MAX, driver_of};
use readonce_format::driver::Description;
use readonce_origin::Locator;
use readonce_storage::{LocalFile, ReadAt, local::OpenMode};

use super::May;

/// A path, and what may be done there. Of a folder, it is said of all that is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// As given.
    pub path: PathBuf,
    /// What for.
    pub may: May,
}

impl Place {
    /// It.
    pub fn new(path: impl Into<PathBuf>, may: May) -> Self {
        Self { path: path.into(), may }
    }
}

/// What names are looked up in, and the certificates that servers are known by. Folders where files are replaced as a whole.
const LOOKED_UP: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls",
    "/etc/pki/ca-trust",
    "/etc/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/run/systemd/resolve",
    "/run/NetworkManager",
    "/run/resolvconf",
    "/run/connman",
    // The C library loads what nsswitch.conf names.
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/nix/store",
    // How much memory is left for writes, of the machine and of the groups of this process.
    "/proc/vmstat",
    "/proc/self/cgroup",
    "/sys/fs/cgroup",
];
/// Variables that name certificates, or a file of ours.
const VARIABLES: &[&str] =
    &["SSL_CERT_FILE", "SSL_CERT_DIR", readonce_origin::credentials::HEADERS_FILE_VARIABLE];

/// What every server needs of the system, to read.
pub fn of_system() -> Vec<Place> {
    let mut places: Vec<Place> = LOOKED_UP.iter().map(|path| Place::new(*path, May::Read)).collect();
    // resolv.conf is replaced as the network changes, and its successor is another file. To an ordinary user /etc keeps its secrets
    // by itself; to root it does not.
    if !rustix::process::geteuid().is_root() {
        places.push(Place::new("/etc", May::Read));
    }
    let named = VARIABLES.iter().filter_map(std::env::var_os).filter(|value| !value.is_empty());
    places.extend(named.map(|path| Place::new(path, May::Read)));
    places.extend([Place::new("/dev/null", May::Write), Place::new("/dev/urandom", May::Read)]);
    places
}

/// The local files of the chain whose top is `image`, and what `allowed`, the patterns of `--allow-backing`, lets an image that
/// came over the network name.
pub async fn of_chain(image: &str, format: Option<&str>, allowed: &[String]) -> Vec<Place> {
    let mut places: Vec<Place> = allowed.iter().filter_map(|pattern| before_star(pattern)).collect();
    let mut next = Locator::parse(image, None).ok().map(|top| (top, format.map(str::to_owned)));
    for depth in 0..CHAIN_DEPTH_MAX {
        let Some((locator, format)) = next.take() else { break };
        let Locator::File(path) = &locator else { break };
        let description = describe(path, format.as_deref()).await;
        // The user named the top to be used. What is below is written only to fill it.
        let is_filled = |it: &Description| it.copy_on_read && it.backing.is_some();
        let may = match depth == 0 || description.as_ref().is_some_and(is_filled) {
            true => May::Write,
            false => May::Read,
        };
        places.push(Place::new(path, may));
        let Some(description) = description else { break };
        if let Some(data) = &description.data_file
            && let Ok(Locator::File(path)) = Locator::parse(&data.name, Some(&locator))
        {
            places.push(Place::new(path, may));
        }
        next = description
            .backing
            .and_then(|backing| Some((Locator::parse(&backing.name, Some(&locator)).ok()?, backing.format)));
    }
    places
}

/// The ring belongs to the process, and its thread would stay outside: it is not used here.
async fn describe(path: &Path, format: Option<&str>) -> Option<Description> {
    let file: Arc<dyn ReadAt> = Arc::new(LocalFile::open_without_ring(path, OpenMode::Read).ok()?);
    driver_of(&*file, format).await.ok()?.describe(&file).await.ok()
}

/// Where the paths that match a pattern lie.
fn before_star(pattern: &str) -> Option<Place> {
    if !pattern.starts_with(['/', '*']) {
        return None;
    }
    let Some(star) = pattern.find('*') else { return Some(Place::new(pattern, May::Write)) };
    let folder_end = pattern[..star].rfind('/').unwrap_or(0);
    Some(Place::new(if folder_end == 0 { "/" } else { &pattern[..folder_end] }, May::Write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_a_file_or_the_folder_of_all_that_match() {
        let place = |pattern| before_star(pattern).map(|place| place.path.display().to_string());
        assert_eq!(place("/srv/base.img"), Some("/srv/base.img".to_owned()));
        assert_eq!(place("/srv/a*/base.img"), Some("/srv".to_owned()));
        assert_eq!(place("/a*"), Some("/".to_owned()));
        assert_eq!(place("*"), Some("/".to_owned()));
        assert_eq!(place("https://host/*"), None);
    }
}
