//! Handshake: the greeting and the options, up to the transmission phase.
//!
//! - An option's reply has at most `OPTION_REPLY_MAX` bytes of data, and an option at most `OPTION_REPLIES_MAX` replies.

use std::{net::SocketAddr, path::Path};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{ConnectOptions, Headers, NbdClient, NbdError, be32, be64, option, option_reply};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

/// Bytes of the data of one option's reply, at most; and how many replies there may be before the last.
const OPTION_REPLY_MAX: u32 = 64 << 10;
const OPTION_REPLIES_MAX: usize = 1024;

/// A byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection whose options are still being haggled over.
pub struct Handshake {
    stream: Box<dyn Stream>,
}

impl Handshake {
    /// Connects, checks the server's greeting, and answers it.
    pub async fn unix(path: impl AsRef<Path>) -> Result<Self, NbdError> {
        Self::start(Box::new(UnixStream::connect(path).await?)).await
    }

    /// Connects, checks the server's greeting, and answers it.
    pub async fn tcp(address: SocketAddr) -> Result<Self, NbdError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Self::start(Box::new(stream)).await
    }

    /// Checks the greeting of a server that is connected already, and answers it.
    pub async fn start(mut stream: Box<dyn Stream>) -> Result<Self, NbdError> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" || greeting[17] & 1 == 0 {
            return Err(NbdError::Protocol(format!("greeting {greeting:x?}")));
        }
        // Fixed newstyle, no zeroes.
        stream.write_all(&3_u32.to_be_bytes()).await?;
        Ok(Self { stream })
    }

    /// Sends an option and gives the replies to it, the last one included.
    pub async fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, NbdError> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&(data.len() as u32).to_be_bytes());
        message.extend_from_slice(data);
        self.stream.write_all(&message).await?;
        let mut replies = Vec::new();
        loop {
            if self.stream.read_u64().await? != 0x0003_e889_0455_65a9 {
                return Err(NbdError::Protocol("option reply magic".into()));
            }
            let of = self.stream.read_u32().await?;
            if of != option {
                return Err(NbdError::Protocol(format!("a reply to option {of}, not {option}")));
            }
            let kind = self.stream.read_u32().await?;
            let len = self.stream.read_u32().await?;
            if len > OPTION_REPLY_MAX || replies.len() >= OPTION_REPLIES_MAX {
                return Err(NbdError::Protocol(format!(
                    "{len} bytes in reply {} to option {of}",
                    replies.len()
                )));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).await?;
            replies.push((kind, data));
            if kind == option_reply::ACK || kind >> 31 == 1 {
                return Ok(replies);
            }
        }
    }

    /// The stream, to do with as one likes.
    pub fn into_stream(self) -> Box<dyn Stream> {
        self.stream
    }

    /// Haggles as `options` say and enters the transmission phase.
    pub async fn go(mut self, options: &ConnectOptions) -> Result<NbdClient, NbdError> {
        let mut headers = Headers::Simple;
        for (wanted, option) in
            [(Headers::Extended, option::EXTENDED_HEADERS), (Headers::Structured, option::STRUCTURED_REPLY)]
        {
            if headers == Headers::Simple && wanted <= options.headers {
                let replies = self.option(option, &[]).await?;
                if replies[0].0 == option_reply::ACK {
                    headers = wanted;
                }
            }
        }
        let mut contexts = Vec::new();
        if headers > Headers::Simple && !options.contexts.is_empty() {
            let queries: Vec<&str> = options.contexts.iter().map(String::as_str).collect();
            for (kind, data) in
                self.option(option::SET_META_CONTEXT, &meta_query(&options.export, &queries)).await?
            {
                if kind == option_reply::META_CONTEXT {
                    let (id, name) = data
                        .split_at_checked(4)
                        .ok_or_else(|| NbdError::Protocol("a context's number".into()))?;
                    contexts.push((be32(id), String::from_utf8_lossy(name).into_owned()));
                }
            }
        }
        // NBD_INFO_BLOCK_SIZE is asked for: a server may insist that a client knows its limits.
        let replies = self.option(option::GO, &go_data(&options.export, &[3])).await?;
        let (mut size, mut flags) = (None, 0);
        for (kind, data) in &replies {
            if *kind == option_reply::INFO && data.starts_with(&[0, 0]) && data.len() == 12 {
                size = Some(be64(&data[2..10]));
                flags = u16::from_be_bytes([data[10], data[11]]);
            } else if kind >> 31 == 1 {
                return Err(NbdError::Server {
                    errno: *kind,
                    text: String::from_utf8_lossy(data).into_owned(),
                });
            }
        }
        let size = size.ok_or_else(|| NbdError::Protocol("no NBD_INFO_EXPORT".into()))?;
        Ok(NbdClient::start(self.stream, size, flags, headers, contexts))
    }
}

/// The data of NBD_OPT_GO and NBD_OPT_INFO.
pub fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
pub fn meta_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}
