//! A lean NBD client for benchmarks: what it measures is the server.
//!
//! - One thread, one blocking socket, simple replies. Requests that are due go out in one `write`; replies are parsed from large
//!   reads, and the payload of a read is thrown away unseen. The depth is constant (closed loop).
//! - It speaks to any server: `qemu-nbd` for the comparison as well.
//! - Times are taken once per batch of replies, so that the clock costs little.
//!
//! Not here: checking data. Any failed request ends the run.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{go_data, option};

/// Bytes of one read of replies.
const READ_LEN: usize = 256 << 10;

/// Where the server is.
#[derive(Debug, Clone)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read,
    /// Write.
    Write,
}

/// Where the requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere in the span, aligned to the size.
    Random,
    /// One after the other, round and round.
    Sequential,
}

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// After this time.
    Time(Duration),
    /// After so many requests.
    Count(u64),
}

/// A load of equal requests.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Read or write.
    pub op: Op,
    /// Bytes of each request.
    pub size: u32,
    /// Requests in flight.
    pub depth: usize,
    /// Where they go.
    pub pattern: Pattern,
    /// Bytes from the start of the export that are used; at least one request's.
    pub span: u64,
    /// When to stop.
    pub until: Until,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Requests answered.
    pub ops: u64,
    /// Bytes read or written.
    pub bytes: u64,
    /// From the first request to the last reply.
    pub seconds: f64,
    /// Half of the requests were answered within this; accurate to 1/16.
    pub p50: Duration,
    /// 99 of 100.
    pub p99: Duration,
    /// 999 of 1000.
    pub p999: Duration,
}

impl Figures {
    /// Requests per second.
    pub fn ops_per_second(&self) -> f64 {
        self.ops as f64 / self.seconds
    }

    /// MiB per second.
    pub fn mib_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds / f64::from(1 << 20)
    }
}

/// Puts `workload` on the export `name` at `address`.
pub fn run(address: &Address, name: &str, workload: &Workload) -> io::Result<Figures> {
    match address {
        Address::Unix(path) => Run::new(UnixStream::connect(path)?, name, workload)?.run(),
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            Run::new(stream, name, workload)?.run()
        }
    }
}

struct Run<'a, S> {
    stream: S,
    workload: &'a Workload,
    /// Bytes of a request, payload included.
    request_len: usize,
    /// `depth` requests, one after the other; the payload stays.
    out: Vec<u8>,
    /// Requests in `out` that are due.
    due: usize,
    issued: u64,
    answered: u64,
    /// When each of the requests in flight was sent, by cookie.
    sent: Vec<Instant>,
    next: u64,
    start: Instant,
    latencies: Histogram,
}

impl<'a, S: Read + Write> Run<'a, S> {
    fn new(mut stream: S, name: &str, workload: &'a Workload) -> io::Result<Self> {
        let size = handshake(&mut stream, name)?;
        if workload.size == 0 || workload.depth == 0 || workload.span.min(size) < u64::from(workload.size) {
            return Err(io::Error::other("the workload does not fit the export"));
        }
        let payload_len = if workload.op == Op::Write { workload.size as usize } else { 0 };
        let request_len = 28 + payload_len;
        let mut out: Vec<u8> =
            (0..request_len * workload.depth).map(|at| (at * 7 + at / 251) as u8).collect();
        for request in out.chunks_mut(request_len) {
            request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
            request[4..6].copy_from_slice(&[0, 0]);
            request[6..8].copy_from_slice(&u16::from(workload.op == Op::Write).to_be_bytes());
            request[24..28].copy_from_slice(&workload.size.to_be_bytes());
        }
        Ok(Self {
            stream,
            workload,
            request_len,
            out,
            due: 0,
            issued: 0,
            answered: 0,
            sent: vec![Instant::now(); workload.depth],
            next: 0x9e37_79b9_7f4a_7c15,
            start: Instant::now(),
            latencies: Histogram::default(),
        })
    }

    fn run(mut self) -> io::Result<Figures> {
        self.start = Instant::now();
        for cookie in 0..self.workload.depth {
            self.issue(cookie, self.start);
        }
        self.send()?;
        let mut buf = vec![0; READ_LEN];
        // Bytes at the start of `buf` that are the beginning of a header, and bytes of payload still to come.
        let (mut kept, mut skip) = (0, 0);
        while self.answered < self.issued {
            let count = self.stream.read(&mut buf[kept..])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let now = Instant::now();
            let end = kept + count;
            let mut at = 0;
            loop {
                let step = skip.min(end - at);
                at += step;
                skip -= step;
                if skip > 0 || end - at < 16 {
                    break;
                }
                let header = &buf[at..at + 16];
                if header[..4] != 0x6744_6698_u32.to_be_bytes() || header[4..8] != [0; 4] {
                    return Err(io::Error::other(format!("reply {header:x?}")));
                }
                let cookie = u64::from_be_bytes(header[8..].try_into().expect("eight bytes")) as usize;
                at += 16;
                if self.workload.op == Op::Read {
                    skip = self.workload.size as usize;
                }
                self.answered += 1;
                self.latencies.add(now - self.sent[cookie]);
                self.issue(cookie, now);
            }
            buf.copy_within(at..end, 0);
            kept = end - at;
            self.send()?;
        }
        // The last payload.
        self.stream.read_exact(&mut vec![0; skip])?;
        let seconds = self.start.elapsed().as_secs_f64();
        self.disconnect()?;
        let latencies = &self.latencies;
        Ok(Figures {
            ops: self.answered,
            bytes: self.answered * u64::from(self.workload.size),
            seconds,
            p50: latencies.percentile(0.5),
            p99: latencies.percentile(0.99),
            p999: latencies.percentile(0.999),
        })
    }

    /// Makes one more request due, unless it is time to stop.
    fn issue(&mut self, cookie: usize, now: Instant) {
        let goes_on = match self.workload.until {
            Until::Count(count) => self.issued < count,
            Until::Time(time) => now < self.start + time,
        };
        if !goes_on {
            return;
        }
        let places = self.workload.span / u64::from(self.workload.size);
        let place = match self.workload.pattern {
            Pattern::Random => {
                // xorshift64: the same places in every run.
                self.next ^= self.next << 13;
                self.next ^= self.next >> 7;
                self.next ^= self.next << 17;
                self.next % places
            }
            Pattern::Sequential => self.issued % places,
        };
        let request = &mut self.out[self.due * self.request_len..][..28];
        request[8..16].copy_from_slice(&(cookie as u64).to_be_bytes());
        request[16..24].copy_from_slice(&(place * u64::from(self.workload.size)).to_be_bytes());
        self.sent[cookie] = now;
        self.due += 1;
        self.issued += 1;
    }

    fn send(&mut self) -> io::Result<()> {
        let len = std::mem::take(&mut self.due) * self.request_len;
        if len == 0 { Ok(()) } else { self.stream.write_all(&self.out[..len]) }
    }

    fn disconnect(&mut self) -> io::Result<()> {
        let mut request = [0; 28];
        request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        request[7] = 2;
        self.stream.write_all(&request)
    }
}

/// Enters the transmission phase without asking for anything; gives the export's size.
fn handshake(stream: &mut (impl Read + Write), name: &str) -> io::Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
        return Err(io::Error::other("this is no NBD server"));
    }
    let data = go_data(name, &[]);
    let mut message = 3_u32.to_be_bytes().to_vec();
    message.extend_from_slice(b"IHAVEOPT");
    message.extend_from_slice(&option::GO.to_be_bytes());
    message.extend_from_slice(&(data.len() as u32).to_be_bytes());
    message.extend_from_slice(&data);
    stream.write_all(&message)?;
    let mut size = None;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let kind = u32::from_be_bytes(header[12..16].try_into().expect("four bytes"));
        let mut data = vec![0; u32::from_be_bytes(header[16..].try_into().expect("four bytes")) as usize];
        stream.read_exact(&mut data)?;
        match kind {
            3 if data.len() == 12 && data[..2] == [0, 0] => {
                size = Some(u64::from_be_bytes(data[2..10].try_into().expect("eight bytes")));
            }
            1 => return size.ok_or_else(|| io::Error::other("the server told no size")),
            3 => {}
            _ => return Err(io::Error::other(format!("the server refused the export {name:?}"))),
        }
    }
}

/// Latencies in buckets of 1/16 of a power of two nanoseconds.
struct Histogram {
    counts: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; 64 * 16] }
    }
}

impl Histogram {
    fn add(&mut self, latency: Duration) {
        let nanos = (latency.as_nanos() as u64).max(16);
        let power = nanos.ilog2();
        let part = (nanos >> (power - 4)) & 15;
        self.counts[(power * 16) as usize + part as usize] += 1;
    }

    fn percentile(&self, share: f64) -> Duration {
        let total: u64 = self.counts.iter().sum();
        let mut left = (total as f64 * share) as u64;
        for (at, count) in self.counts.iter().enumerate() {
            if left < *count {
                let (power, part) = (at / 16, at as u64 % 16);
                return Duration::from_nanos((16 + part) << (power - 4));
            }
            left -= count;
        }
        Duration::ZERO
    }
}
