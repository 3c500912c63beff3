//! Where clients come from: a Unix socket or a TCP port, and the URI that names it.
//!
//! - A Unix socket's file has mode 0600 from the moment it exists.
//! - A socket file that nobody listens on any more is replaced; one in use, and any other file, is refused.
//! - The file is removed with the listener, if it is still ours.

use std::{
    fmt::Write as _,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::net::{TcpListener, UnixListener};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Someone answers on it.
    #[error("{0}: the socket is in use")]
    InUse(PathBuf),
    /// A file that is no socket.
    #[error("{0}: the file exists and is not a socket")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("{0}: {1}")]
    Io(String, io::Error),
}

/// A socket that accepts connections.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket and its file.
    Unix(UnixSocket),
    /// A TCP port.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on a new Unix socket at `path`, mode 0600. Fails if the file is in use or is not a socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn unix(path: impl AsRef<Path>) -> Result<Self, BindError> {
        let path = std::path::absolute(path.as_ref())
            .map_err(|error| BindError::Io(path.as_ref().display().to_string(), error))?;
        let at = |error: io::Error| BindError::Io(path.display().to_string(), error);
        // Two servers that find the same dead socket must not both replace it: looking and binding is one step under
        // a lock of the folder.
        let folder = path.parent().unwrap_or(Path::new("/"));
        let lock =
            rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| at(error.into()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|error| at(error.into()))?;
        remove_if_dead(&path)?;
        let listener = bind_private(&path).map_err(at)?;
        let meta = fs::symlink_metadata(&path).map_err(at)?;
        let listener = UnixListener::from_std(listener).map_err(at)?;
        let identity = (meta.dev(), meta.ino());
        Ok(Self::Unix(UnixSocket { listener, path, identity }))
    }

    /// Listens on a TCP port of `address`, by default of the loopback interface; port 0 is any free one.
    pub async fn tcp(address: Option<IpAddr>, port: u16) -> Result<Self, BindError> {
        let address = SocketAddr::new(address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), port);
        TcpListener::bind(address)
            .await
            .map(Self::Tcp)
            .map_err(|error| BindError::Io(address.to_string(), error))
    }

    /// The NBD URI under which the export `name` is reached.
    pub fn uri(&self, name: &str) -> String {
        match self {
            Listener::Unix(socket) => {
                let path = escape(socket.path.as_os_str().as_bytes());
                format!("nbd+unix:///{}?socket={path}", escape(name.as_bytes()))
            }
            Listener::Tcp(listener) => {
                let address =
                    listener.local_addr().map_or_else(|_| "?".into(), |address| address.to_string());
                format!("nbd://{address}/{}", escape(name.as_bytes()))
            }
        }
    }
}

/// A listening Unix socket; its file goes with it.
#[derive(Debug)]
pub struct UnixSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let is_ours =
            fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn remove_if_dead(path: &Path) -> Result<(), BindError> {
    let at = |error| BindError::Io(path.display().to_string(), error);
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(at),
        // A full backlog answers WouldBlock: someone is there as well.
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(BindError::InUse(path.to_owned())),
        Err(error) => Err(at(error)),
    }
}

/// Linux makes the file with the mode of the unbound socket, less the umask: so there is no moment in which it is wider,
/// and the umask, which belongs to the whole process, is left alone.
fn bind_private(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Percent-encodes what does not stand for itself in a URI's path or query.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}
