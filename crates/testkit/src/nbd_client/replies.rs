//! Replies: what the server answers to requests, taken apart and handed to who waits for it.
//!
//! - A chunk has at most what its request can need, and no byte of a read comes twice.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, ReadHalf};

use super::{Headers, NbdError, Stream, Waiter, Waiting, be32, be64, command, command_flag};

/// Bytes of a chunk beside the data that was asked for, at most: extents, and the words of an error.
const CHUNK_EXTRA_MAX: u64 = 1 << 20;

/// Takes what comes on one connection.
pub(super) struct Receiver {
    pub(super) reader: ReadHalf<Box<dyn Stream>>,
    pub(super) headers: Headers,
    pub(super) waiting: Arc<Mutex<Waiting>>,
}

impl Receiver {
    /// Takes one simple reply or one chunk.
    pub(super) async fn receive(&mut self) -> Result<(), NbdError> {
        match (self.reader.read_u32().await?, self.headers) {
            (0x6744_6698, Headers::Simple | Headers::Structured) => self.simple().await,
            (0x668e_33ef, Headers::Structured) | (0x6e8a_278c, Headers::Extended) => self.chunk().await,
            (magic, headers) => Err(NbdError::Protocol(format!("reply magic {magic:#x} with {headers:?}"))),
        }
    }

    async fn simple(&mut self) -> Result<(), NbdError> {
        let errno = self.reader.read_u32().await?;
        let mut waiter = self.waiter().await?.1;
        if errno != 0 {
            waiter.error = Some(NbdError::Server { errno, text: String::new() });
        } else if waiter.request.command == command::READ {
            if self.headers != Headers::Simple {
                return Err(NbdError::Protocol("a simple reply to a read".into()));
            }
            waiter.reply.data.resize(waiter.request.len as usize, 0);
            self.reader.read_exact(&mut waiter.reply.data).await?;
            waiter.covered.push((0, waiter.reply.data.len()));
            waiter.reply.chunks = 1;
        }
        end(waiter)
    }

    /// The request that a reply is for, taken out of the table. Reads the cookie.
    async fn waiter(&mut self) -> Result<(u64, Waiter), NbdError> {
        let cookie = self.reader.read_u64().await?;
        let waiter = self.waiting.lock().requests.remove(&cookie);
        Ok((cookie, waiter.ok_or_else(|| NbdError::Protocol(format!("unknown cookie {cookie}")))?))
    }

    async fn chunk(&mut self) -> Result<(), NbdError> {
        let flags = self.reader.read_u16().await?;
        let kind = self.reader.read_u16().await?;
        let (cookie, mut waiter) = self.waiter().await?;
        let len = if self.headers == Headers::Extended {
            let offset = self.reader.read_u64().await?;
            if offset != waiter.request.offset {
                return Err(NbdError::Protocol(format!("a reply's offset {offset}")));
            }
            self.reader.read_u64().await?
        } else {
            u64::from(self.reader.read_u32().await?)
        };
        let data_len = if waiter.request.command == command::READ { waiter.request.len } else { 0 };
        if len > data_len.saturating_add(CHUNK_EXTRA_MAX) {
            return Err(NbdError::Protocol(format!("a chunk of {len} bytes for {:?}", waiter.request)));
        }
        let mut payload = vec![0; len as usize];
        self.reader.read_exact(&mut payload).await?;
        take_chunk(&mut waiter, kind, &payload, self.headers).ok_or_else(|| {
            NbdError::Protocol(format!("chunk {kind} of {len} bytes for {:?}", waiter.request))
        })?;
        if flags & 1 != 0 {
            return end(waiter);
        }
        if kind == 0 {
            return Err(NbdError::Protocol("NBD_REPLY_TYPE_NONE is not the last chunk".into()));
        }
        self.waiting.lock().requests.insert(cookie, waiter);
        Ok(())
    }
}

/// `None` if the chunk is not what the protocol allows here.
fn take_chunk(waiter: &mut Waiter, kind: u16, payload: &[u8], headers: Headers) -> Option<()> {
    let is_read = waiter.request.command == command::READ;
    match kind {
        0 => payload.is_empty().then_some(()),
        1 | 2 if is_read => {
            let at = be64(payload.get(..8)?);
            let data = if kind == 1 {
                payload.get(8..).filter(|data| !data.is_empty())?.to_vec()
            } else {
                let hole = u64::from(be32(payload.get(8..12)?));
                vec![0; usize::try_from(hole).ok().filter(|_| hole <= waiter.request.len)?]
            };
            let from = usize::try_from(at.checked_sub(waiter.request.offset)?).ok()?;
            let until = from.checked_add(data.len())?;
            let is_inside = until as u64 <= waiter.request.len;
            let is_new = waiter.covered.iter().all(|&(start, end)| until <= start || end <= from);
            let may_split = waiter.request.flags & command_flag::DF == 0 || waiter.reply.chunks == 0;
            if !is_inside || !is_new || !may_split {
                return None;
            }
            waiter.reply.data.resize(waiter.reply.data.len().max(until), 0);
            waiter.reply.data[from..until].copy_from_slice(&data);
            waiter.covered.push((from, until));
            waiter.reply.chunks += 1;
            Some(())
        }
        5 | 6 if waiter.request.command == command::BLOCK_STATUS => {
            let is_extended = headers == Headers::Extended;
            if (kind == 6) != is_extended {
                return None;
            }
            let id = be32(payload.get(..4)?);
            let extents: Vec<(u64, u64)> = if is_extended {
                let extents = payload.get(8..)?;
                if extents.len() as u64 != u64::from(be32(&payload[4..8])) * 16 {
                    return None;
                }
                extents.chunks(16).map(|extent| (be64(&extent[..8]), be64(&extent[8..]))).collect()
            } else {
                let extents = payload.get(4..).filter(|extents| extents.len() % 8 == 0)?;
                extents
                    .chunks(8)
                    .map(|extent| (u64::from(be32(&extent[..4])), u64::from(be32(&extent[4..]))))
                    .collect()
            };
            let is_new = waiter.reply.status.iter().all(|(other, _)| *other != id);
            if extents.is_empty() || extents.iter().any(|extent| extent.0 == 0) || !is_new {
                return None;
            }
            if waiter.request.flags & command_flag::REQ_ONE != 0 && extents.len() != 1 {
                return None;
            }
            waiter.reply.status.push((id, extents));
            Some(())
        }
        _ if kind >> 15 == 1 => {
            let errno = be32(payload.get(..4)?);
            let text_len = usize::from(u16::from_be_bytes([*payload.get(4)?, *payload.get(5)?]));
            let text = String::from_utf8(payload.get(6..)?.get(..text_len)?.to_vec()).ok()?;
            waiter.error = Some(NbdError::Server { errno, text });
            (errno != 0).then_some(())
        }
        _ => None,
    }
}

fn end(waiter: Waiter) -> Result<(), NbdError> {
    let covered: usize = waiter.covered.iter().map(|(from, until)| until - from).sum();
    let is_whole = waiter.request.command != command::READ || covered as u64 == waiter.request.len;
    let result = match waiter.error {
        Some(error) => Err(error),
        None if !is_whole => return Err(NbdError::Protocol("a read ended before all data came".into())),
        None => Ok(waiter.reply),
    };
    // A caller that went away does not want it.
    let _ = waiter.sender.send(result);
    Ok(())
}
