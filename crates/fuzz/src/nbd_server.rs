//! A client of the NBD server: haggling and requests, right or not, over a Unix socket.
//!
//! - The device checks that what the server asks of it lies inside it; that what is written is what the client sent; reads show a
//!   fixed pattern.
//! - A client that keeps to the protocol gets exactly one answer to each request, whole, with the right bytes.
//! - Any other client loses its connection at most: the server ends in time.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use readonce_disk::{BlockDevice, DeviceError, StatusExtent, ZeroMode};
use readonce_export::nbd::{Listener, PAYLOAD_LEN_MAX, Server, ServerOptions};
use readonce_storage::BoxFuture;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::draw::Draw;

const SIZE: u64 = 1 << 20;
const NAME: &str = "disk";

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const GO: u32 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Headers {
    Simple,
    Structured,
    Extended,
}

fn content(offset: u64, len: usize) -> Vec<u8> {
    let byte = |at: u64| (offset.wrapping_add(at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    (0..).take(len).map(byte).collect()
}

/// A disk of a fixed content.
struct Device {
    instant: bool,
    read_only: bool,
    /// Whether the client sends nothing but the pattern.
    strict: bool,
    /// Every so many requests fail; 0: none.
    fails: u64,
}

impl Device {
    fn check(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        assert!(len > 0 && offset.checked_add(len).is_some_and(|end| end <= SIZE), "{len} bytes at {offset}");
        if self.fails > 0 && offset.is_multiple_of(self.fails) {
            return Err(DeviceError::Io("as drawn".repeat(300)));
        }
        Ok(())
    }

    fn take(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        assert!(!self.read_only, "a write to a read-only device");
        assert!(!self.strict || data == content(offset, data.len()), "other bytes than the client sent");
        self.check(offset, data.len() as u64)
    }
}

impl BlockDevice for Device {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), DeviceError>> {
        buf.fill(0xee);
        self.instant.then(|| {
            self.check(offset, buf.len() as u64)?;
            buf.copy_from_slice(&content(offset, buf.len()));
            Ok(())
        })
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, DeviceError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.check(offset, len as u64)?;
            Ok(content(offset, len).into())
        })
    }
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<Result<(), DeviceError>> {
        self.instant.then(|| self.take(offset, data))
    }
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.take(offset, &data)
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            assert!(!self.read_only);
            self.check(offset, len)?;
            if mode.only_if_fast && !offset.is_multiple_of(4096) { Err(DeviceError::NotFast) } else { Ok(()) }
        })
    }
    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            assert!(!self.read_only);
            self.check(offset, len)
        })
    }
    fn flush(&self) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async { Ok(()) })
    }
    fn cache(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { self.check(offset, len) })
    }
    fn status(
        &self,
        offset: u64,
        len: u64,
        count_max: usize,
    ) -> BoxFuture<'_, Result<Vec<StatusExtent>, DeviceError>> {
        Box::pin(async move {
            self.check(offset, len)?;
            let mut extents = Vec::new();
            let (mut at, end) = (offset, offset + len);
            while at < end && extents.len() < count_max {
                let until = (at / 4096 * 4096 + 4096).min(end);
                let odd = at / 4096 % 2 == 1;
                extents.push(StatusExtent { len: until - at, zero: odd, hole: odd, depth: u32::from(!odd) });
                at = until;
            }
            Ok(extents)
        })
    }
}

/// What the client sends.
struct Script {
    bytes: Vec<u8>,
    /// Whether all of it is right, as far as framing goes.
    strict: bool,
    headers: Headers,
    /// Requests by cookie: command, offset, bytes.
    requests: BTreeMap<u64, (u16, u64, u64)>,
    disconnects: bool,
}

fn option(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(b"IHAVEOPT");
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
}

/// Data of an option, with lengths that are right or nearly so.
fn option_data(kind: u32, draw: &mut Draw<'_>) -> Vec<u8> {
    let text = |draw: &mut Draw<'_>| match draw.below(4) {
        0 => Vec::new(),
        1 => draw.bytes(64).to_vec(),
        2 => vec![b'x'; draw.index(5000)],
        _ => draw
            .of(&[NAME, "base:allocation", "qemu:allocation-depth", "base:", "qemu:", "qemu:dirty-bitmap:x"])
            .as_bytes()
            .to_vec(),
    };
    let string = |draw: &mut Draw<'_>, data: &mut Vec<u8>| {
        let text = text(draw);
        let len = if draw.once_in(12) { draw.number() as u32 } else { text.len() as u32 };
        data.extend(len.to_be_bytes());
        data.extend(text);
    };
    let mut data = Vec::new();
    match kind {
        6 | GO => {
            string(draw, &mut data);
            let infos = draw.below(5) as u16;
            let count = if draw.once_in(12) { draw.number() as u16 } else { infos };
            data.extend(count.to_be_bytes());
            (0..infos).for_each(|_| data.extend([0, draw.byte() % 6]));
        }
        9 | 10 => {
            string(draw, &mut data);
            let queries = draw.below(4) as u32;
            let count = if draw.once_in(12) { draw.number() as u32 } else { queries };
            data.extend(count.to_be_bytes());
            (0..queries).for_each(|_| string(draw, &mut data));
        }
        _ => data.extend(draw.bytes(40)),
    }
    data
}

fn script(draw: &mut Draw<'_>) -> Script {
    let headers = draw.of(&[Headers::Structured, Headers::Simple, Headers::Extended]);
    let strict = !draw.once_in(3);
    let mut bytes = Vec::new();
    let flags: u32 = if strict { 3 } else { draw.of(&[3, 1, 0, 2, 7, u32::MAX]) };
    bytes.extend(flags.to_be_bytes());
    if !strict && draw.once_in(4) {
        bytes.extend(draw.rest());
        return Script { bytes, strict, headers, requests: BTreeMap::new(), disconnects: false };
    }
    for _ in 0..draw.below(4) {
        // Those that change or end the haggling come below.
        let kind = draw.of(&[3, 5, 6, 9, 10, 99, 4]);
        let data = option_data(kind, draw);
        option(&mut bytes, kind, &data);
    }
    match headers {
        Headers::Simple => {}
        Headers::Structured => option(&mut bytes, 8, b""),
        Headers::Extended => option(&mut bytes, 11, b""),
    }
    if headers != Headers::Simple && draw.once_in(2) {
        let mut data = (NAME.len() as u32).to_be_bytes().to_vec();
        data.extend(NAME.as_bytes());
        data.extend([0, 0, 0, 2, 0, 0, 0, 15]);
        data.extend(b"base:allocation");
        data.extend([0, 0, 0, 21]);
        data.extend(b"qemu:allocation-depth");
        option(&mut bytes, 10, &data);
    }
    if !strict && draw.once_in(3) {
        let kind = draw.of(&[1, 2, 8, 11, GO, 10]);
        let data = option_data(kind, draw);
        option(&mut bytes, kind, &data);
    }
    let mut go = (NAME.len() as u32).to_be_bytes().to_vec();
    go.extend(NAME.as_bytes());
    go.extend([0, 0]);
    option(&mut bytes, GO, &go);

    let mut script = Script { bytes, strict, headers, requests: BTreeMap::new(), disconnects: false };
    while !draw.is_done() && script.requests.len() < 60 && script.bytes.len() < 4 << 20 {
        if !strict && draw.once_in(8) {
            script.bytes.extend(draw.bytes(100));
        }
        request(&mut script, draw);
    }
    if strict && draw.once_in(2) {
        script.disconnects = true;
        put_request(&mut script, 0, DISC, 0, 0, u64::MAX);
    }
    script
}

fn put_request(script: &mut Script, flags: u16, command: u16, offset: u64, len: u64, cookie: u64) {
    let magic: u32 = if script.headers == Headers::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
    script.bytes.extend(magic.to_be_bytes());
    script.bytes.extend(flags.to_be_bytes());
    script.bytes.extend(command.to_be_bytes());
    script.bytes.extend(cookie.to_be_bytes());
    script.bytes.extend(offset.to_be_bytes());
    match script.headers {
        Headers::Extended => script.bytes.extend(len.to_be_bytes()),
        _ => script.bytes.extend((len as u32).to_be_bytes()),
    }
}

fn request(script: &mut Script, draw: &mut Draw<'_>) {
    let command = draw.of(&[READ, WRITE, READ, WRITE, 3, 4, 5, 6, 7, 7, 8, 9, 77]);
    let mut flags = if draw.once_in(2) { 0 } else { 1 << draw.below(16) };
    let wide = if script.headers == Headers::Extended { u64::MAX } else { u32::MAX.into() };
    let mut len = match draw.below(8) {
        0 => 0,
        1..=4 => draw.below(20_000),
        5 => draw.of(&[4096, SIZE, SIZE + 1, u64::from(PAYLOAD_LEN_MAX) + 1, u32::MAX.into(), u64::MAX]),
        6 => draw.number() & wide,
        _ => 512 * draw.below(64),
    } & wide;
    let offset = match draw.below(8) {
        0..=5 => draw.below(SIZE),
        6 => draw.of(&[SIZE, SIZE - 1, u64::MAX, 1 << 63, 0]),
        _ => draw.number(),
    };
    let cookie = 0x0c00_0000 + script.requests.len() as u64;
    let extended_payload = script.headers == Headers::Extended && flags & 0x20 != 0;
    let mut payload = 0;
    if command == WRITE || extended_payload {
        // A payload has to be sent, so it is short; one that is promised and too long ends the connection.
        if script.strict || !draw.once_in(6) {
            len %= 40_000;
        }
        payload = len.min(60_000);
        if !script.strict && draw.once_in(6) {
            payload = payload.min(draw.below(100));
        }
        if command != WRITE && script.strict {
            flags &= !0x20;
            payload = 0;
        }
    }
    put_request(script, flags, command, offset, len, cookie);
    script.bytes.extend(content(offset, payload as usize));
    if command == DISC {
        script.disconnects = true;
    }
    script.requests.insert(cookie, (command, offset, len));
}

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let device = Device {
        instant: draw.once_in(2),
        read_only: draw.once_in(6),
        fails: draw.of(&[0, 0, 3]),
        strict: false,
    };
    let script = script(&mut draw);
    let device = Device { strict: script.strict, ..device };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let answer = runtime.block_on(talk(device, script.bytes.clone()));
    if script.strict {
        check(&script, &answer);
    }
}

/// Sends the bytes, ends the sending side, and reads to the end.
async fn talk(device: Device, bytes: Vec<u8>) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder for the socket");
    let socket = folder.path().join("s");
    let options = ServerOptions { export_name: NAME.into(), ..ServerOptions::default() };
    let server = Server::new(Arc::new(device), options).expect("the name is short");
    let listener = Listener::unix(&socket).expect("nobody else is there");
    let serving = server.clone();
    let accept = async move { serving.serve(listener).await };
    let client = async {
        let stream = UnixStream::connect(&socket).await.expect("the server listens");
        let (mut from, mut to) = stream.into_split();
        let send = async move {
            // The server may close before all was sent.
            let _ = to.write_all(&bytes).await;
            let _ = to.shutdown().await;
            to
        };
        let mut answer = Vec::new();
        let receive = async {
            let _ = from.read_to_end(&mut answer).await;
        };
        futures_util::join!(send, receive);
        server.shutdown().await.expect("nothing is left to do");
        assert_eq!(server.connections(), 0);
        answer
    };
    let ((), answer) = futures_util::join!(accept, client);
    answer
}

/// Reads big-endian numbers; panics where the answer ends inside one.
struct Answer<'a>(&'a [u8]);

impl<'a> Answer<'a> {
    fn take(&mut self, len: u64) -> &'a [u8] {
        let len = usize::try_from(len).expect("short");
        assert!(len <= self.0.len(), "an answer is cut off: {len} bytes promised, {} came", self.0.len());
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        head
    }
    fn number(&mut self, len: u64) -> u64 {
        self.take(len).iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

/// Checks all that the server sent to a client that kept to the protocol.
fn check(script: &Script, answer: &[u8]) {
    let mut answer = Answer(answer);
    assert_eq!(answer.take(16), b"NBDMAGICIHAVEOPT");
    assert_eq!(answer.number(2) & 1, 1);
    loop {
        assert_eq!(answer.number(8), 0x0003_e889_0455_65a9, "the magic of an option's reply");
        let (kind, reply, len) = (answer.number(4), answer.number(4), answer.number(4));
        answer.take(len);
        if u64::from(GO) == kind && reply == 1 {
            break;
        }
        assert!(u64::from(GO) != kind || reply < 1 << 31, "the export is refused: {reply:#x}");
    }
    let mut left = script.requests.clone();
    while !answer.0.is_empty() {
        let magic = answer.number(4);
        match magic {
            0x6744_6698 => {
                let (error, cookie) = (answer.number(4), answer.number(8));
                let (command, offset, len) =
                    left.remove(&cookie).expect("an answer to a request that is open");
                assert_ne!(script.headers, Headers::Extended);
                if command == READ && error == 0 {
                    assert_eq!(script.headers, Headers::Simple);
                    assert!(
                        answer.take(len) == content(offset, len as usize),
                        "other bytes than the device's"
                    );
                }
            }
            0x668e_33ef | 0x6e8a_278c => {
                assert_eq!(magic == 0x6e8a_278c, script.headers == Headers::Extended);
                assert_ne!(script.headers, Headers::Simple);
                let (flags, kind, cookie) = (answer.number(2), answer.number(2), answer.number(8));
                let (command, offset, len) = *left.get(&cookie).expect("an answer to a request that is open");
                let payload_len = if magic == 0x6e8a_278c {
                    assert_eq!(answer.number(8), offset, "the offset is the request's");
                    answer.number(8)
                } else {
                    answer.number(4)
                };
                let mut payload = Answer(answer.take(payload_len));
                if kind == 1 {
                    assert_eq!(command, READ);
                    let at = payload.number(8);
                    let data = payload.0;
                    assert!(at >= offset && at + data.len() as u64 <= offset + len);
                    assert!(data == content(at, data.len()), "other bytes than the device's");
                }
                if flags & 1 == 1 {
                    left.remove(&cookie);
                }
            }
            _ => panic!("no reply begins with {magic:#x}"),
        }
    }
    assert!(left.is_empty(), "{} of {} requests have no answer: {left:?}", left.len(), script.requests.len());
}
