//! A server of the NBD client that tests, demo and benchmarks use: haggling and replies, right or not, over a pipe in memory.
//!
//! - A server that keeps to the protocol is understood: each request gets its reply, with the right bytes.
//! - Any other server makes requests fail at most: none waits for ever once the server has gone.

use readonce_testkit::nbd_client::{
    ConnectOptions, Handshake, Headers, NbdClient, NbdError, RawRequest, Reply, command, option_reply,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::oneshot,
};

use crate::draw::Draw;

const SIZE: u64 = 1 << 20;
/// The number of the one context.
const CONTEXT: u32 = 7;

/// What the client asks for, in this order: the cookies count from 1.
fn requests(draw: &mut Draw<'_>) -> Vec<RawRequest> {
    let one = |draw: &mut Draw<'_>| RawRequest {
        flags: 0,
        command: draw.of(&[
            command::READ,
            command::READ,
            command::BLOCK_STATUS,
            command::WRITE,
            command::FLUSH,
        ]),
        offset: draw.below(SIZE / 2),
        len: 1 + draw.below(5000),
        payload: Vec::new(),
    };
    (0..1 + draw.below(5)).map(|_| one(draw)).collect()
}

fn content(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// What the server says.
struct Script {
    bytes: Vec<u8>,
    /// Of these, what is said before the client asks for anything.
    haggling: usize,
    headers: Headers,
    /// All of it is right.
    right: bool,
}

impl Script {
    fn put(&mut self, parts: &[&[u8]]) {
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
    }

    fn option(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.put(&[&0x0003_e889_0455_65a9_u64.to_be_bytes(), &option.to_be_bytes(), &kind.to_be_bytes()]);
        self.put(&[&(data.len() as u32).to_be_bytes(), data]);
    }

    fn haggle(&mut self, draw: &mut Draw<'_>) {
        self.put(&[b"NBDMAGICIHAVEOPT", &[0, 3]]);
        let reply = |agreed: bool| if agreed { option_reply::ACK } else { option_reply::ERR_UNSUP };
        self.option(11, reply(self.headers == Headers::Extended), b"");
        if self.headers != Headers::Extended {
            self.option(8, reply(self.headers == Headers::Structured), b"");
        }
        if self.headers != Headers::Simple {
            let context = [&CONTEXT.to_be_bytes()[..], b"base:allocation"].concat();
            self.option(10, option_reply::META_CONTEXT, &context);
            self.option(10, option_reply::ACK, b"");
        }
        if draw.once_in(2) {
            // A block size, which the client asked for and does not heed.
            self.option(7, option_reply::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
        }
        let info = [&[0, 0][..], &SIZE.to_be_bytes(), &[0xff, 0xff]].concat();
        self.option(7, option_reply::INFO, &info);
        self.option(7, option_reply::ACK, b"");
    }

    fn chunk(&mut self, last: bool, kind: u16, cookie: u64, offset: u64, payload: &[u8]) {
        let flags = u16::from(last).to_be_bytes();
        let (kind, cookie, len) = (kind.to_be_bytes(), cookie.to_be_bytes(), payload.len() as u64);
        if self.headers == Headers::Extended {
            self.put(&[&0x6e8a_278c_u32.to_be_bytes(), &flags, &kind, &cookie, &offset.to_be_bytes()]);
            self.put(&[&len.to_be_bytes(), payload]);
        } else {
            self.put(&[&0x668e_33ef_u32.to_be_bytes(), &flags, &kind, &cookie, &(len as u32).to_be_bytes()]);
            self.put(&[payload]);
        }
    }

    /// The right answer to a request.
    fn answer(&mut self, cookie: u64, request: &RawRequest, draw: &mut Draw<'_>) {
        let (offset, len) = (request.offset, request.len);
        if self.headers == Headers::Simple {
            self.put(&[&0x6744_6698_u32.to_be_bytes(), &[0; 4], &cookie.to_be_bytes()]);
            if request.command == command::READ {
                self.put(&[&content(offset, len)]);
            }
            return;
        }
        match request.command {
            command::READ => {
                let mut at = offset;
                let end = offset + len;
                while at < end {
                    let until = if draw.once_in(2) { end } else { at + 1 + draw.below(end - at) };
                    let data = [&at.to_be_bytes()[..], &content(at, until - at)].concat();
                    self.chunk(until == end, 1, cookie, offset, &data);
                    at = until;
                }
            }
            command::BLOCK_STATUS if self.headers == Headers::Extended => {
                let status =
                    [&CONTEXT.to_be_bytes()[..], &[0, 0, 0, 1], &len.to_be_bytes(), &3_u64.to_be_bytes()];
                self.chunk(true, 6, cookie, offset, &status.concat());
            }
            command::BLOCK_STATUS => {
                let status = [CONTEXT.to_be_bytes(), (len as u32).to_be_bytes(), 3_u32.to_be_bytes()];
                self.chunk(true, 5, cookie, offset, &status.concat());
            }
            _ => self.chunk(true, 0, cookie, offset, b""),
        }
    }

    /// A wrong or odd chunk.
    fn odd(&mut self, cookie: u64, request: &RawRequest, draw: &mut Draw<'_>) {
        let kind = draw.of(&[0, 1, 2, 3, 5, 6, 0x8001, 0x8002, 0xffff]);
        let number = draw.of(&[0, request.offset, request.offset + 1, u64::MAX, request.len]);
        let payload = match draw.below(4) {
            0 => draw.bytes(60).to_vec(),
            1 => [&number.to_be_bytes()[..], draw.bytes(20)].concat(),
            2 => [&number.to_be_bytes()[..], &(draw.number() as u32).to_be_bytes()].concat(),
            _ => [&5_u32.to_be_bytes()[..], &(draw.byte() as u16).to_be_bytes(), draw.bytes(20)].concat(),
        };
        let offset = draw.of(&[request.offset, 0, u64::MAX]);
        self.chunk(draw.once_in(2), kind, cookie, offset, &payload);
    }
}

fn script(requests: &[RawRequest], draw: &mut Draw<'_>) -> Script {
    let headers = draw.of(&[Headers::Structured, Headers::Simple, Headers::Extended]);
    let mut script = Script { bytes: Vec::new(), haggling: 0, headers, right: draw.once_in(2) };
    script.haggle(draw);
    script.haggling = script.bytes.len();
    let mut order: Vec<usize> = (0..requests.len()).collect();
    while !order.is_empty() {
        let at = order.swap_remove(draw.index(order.len()));
        let cookie = at as u64 + 1;
        if !script.right && draw.once_in(3) {
            script.odd(cookie, &requests[at], draw);
        }
        script.answer(cookie, &requests[at], draw);
    }
    if !script.right {
        for _ in 0..draw.below(4) {
            let at = draw.index(script.bytes.len());
            if at < script.haggling {
                // The client may wait for more of it: then it is to come.
                script.haggling = usize::MAX;
            }
            match draw.below(4) {
                0 => script.bytes.truncate(at),
                1 => {
                    let bytes = draw.bytes(16).to_vec();
                    script.bytes.splice(at..at, bytes);
                }
                _ => script.bytes[at] = draw.byte(),
            }
            if script.bytes.is_empty() {
                break;
            }
        }
    }
    script
}

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let requests = requests(&mut draw);
    let script = script(&requests, &mut draw);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (sent, asked) = oneshot::channel();
        let server = serve(far, &script, asked);
        let client = talk(near, &requests, &script, sent);
        futures_util::join!(server, client);
    });
}

/// Haggles, answers once all was asked, whatever it hears, and goes.
async fn serve(stream: DuplexStream, script: &Script, asked: oneshot::Receiver<()>) {
    let (mut from, mut to) = tokio::io::split(stream);
    let is_damaged = script.haggling > script.bytes.len();
    let (haggling, replies) = script.bytes.split_at(script.haggling.min(script.bytes.len()));
    let say = async move {
        // The client may have gone.
        let _ = to.write_all(haggling).await;
        if !is_damaged {
            let _ = asked.await;
        }
        let _ = to.write_all(replies).await;
        let _ = to.shutdown().await;
    };
    let hear = async move {
        let mut heard = [0; 4096];
        while from.read(&mut heard).await.is_ok_and(|len| len > 0) {}
    };
    futures_util::join!(say, hear);
}

async fn talk(stream: DuplexStream, requests: &[RawRequest], script: &Script, sent: oneshot::Sender<()>) {
    let options = ConnectOptions { contexts: vec!["base:allocation".into()], ..ConnectOptions::default() };
    let client = match connect(stream, &options).await {
        Ok(client) => client,
        Err(error) => {
            assert!(!script.right, "a good server is refused: {error}");
            return;
        }
    };
    let mut replies = Vec::new();
    for request in requests {
        replies.push(client.send(request.clone()).await);
    }
    drop(sent);
    for (request, reply) in requests.iter().zip(replies) {
        let reply = match reply {
            Ok(reply) => reply.await.unwrap_or_else(|_| Err(NbdError::Closed("dropped".into()))),
            Err(error) => Err(error),
        };
        check(request, reply, script);
    }
    let error = client.ended().await;
    tell!("the connection ended: {error}");
}

async fn connect(stream: DuplexStream, options: &ConnectOptions) -> Result<NbdClient, NbdError> {
    Handshake::start(Box::new(stream)).await?.go(options).await
}

fn check(request: &RawRequest, reply: Result<Reply, NbdError>, script: &Script) {
    tell!("{request:?}: {:?}", reply.as_ref().map(|reply| reply.data.len()));
    match reply {
        Ok(reply) => {
            let len = if request.command == command::READ { request.len } else { 0 };
            assert_eq!(reply.data.len() as u64, len, "a reply that is whole has all that was asked for");
            if script.right && request.command == command::READ {
                assert!(reply.data == content(request.offset, request.len), "other bytes than the server's");
            }
            if script.right && request.command == command::BLOCK_STATUS && script.headers != Headers::Simple {
                assert_eq!(reply.status, [(CONTEXT, vec![(request.len, 3)])]);
            }
        }
        Err(error) => assert!(!script.right, "a good reply is refused: {error}"),
    }
}
