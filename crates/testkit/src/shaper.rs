//! Shaper: a TCP proxy that behaves like a link of some rate and round-trip time.
//!
//! - The rate is shared by all connections, each direction for itself, in the order of arrival, 16 KiB at a time.
//! - Half the round trip passes on each way, and a new connection pays one round trip for its handshake.
//! - Memory is bounded: at most [`WINDOW_BYTES`] of each connection and direction, and the link holds no more than
//!   [`QUEUE`] of its rate back.
//! - Time is a virtual clock that says when the link is free. Where a sender has bytes all the time, a timer that fires late lets
//!   the link catch up, so the rate is exact although timers are not.
//!
//! Not here: loss, jitter, slow start. Every byte arrives, in order.

#![allow(clippy::disallowed_methods, reason = "a link is made of real time")]

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, Semaphore, mpsc},
    time::Instant,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Bytes under way for one connection in one direction: 1 Gbit/s at 100 ms.
pub const WINDOW_BYTES: usize = 16 * 1024 * 1024;

/// How much of its rate the link takes in ahead of time, as a router's queue does. Longer than a timer is ever late on a
/// machine that is not overloaded.
pub const QUEUE: Duration = Duration::from_millis(10);

/// Bytes that one connection sends before the next has its turn.
const TURN_BYTES: usize = 16 * 1024;

/// How far behind the link may be and still catch up, where the sender had bytes for it all the time.
const CATCH_UP_MAX: Duration = Duration::from_millis(200);

/// Timers fire up to a millisecond late, half on average: a piece is let go so much early.
const TIMER_LATENESS: Duration = Duration::from_micros(500);

/// What a link is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkSpec {
    /// Bits a second in each direction, over all connections. 0: as fast as it goes.
    pub bits_per_second: u64,
    /// From a byte sent to its answer, besides what the rate takes.
    pub round_trip: Duration,
}

impl LinkSpec {
    /// A link of so many Mbit/s and milliseconds of round trip.
    pub const fn new(megabits_per_second: u64, round_trip_ms: u64) -> Self {
        Self {
            bits_per_second: megabits_per_second * 1_000_000,
            round_trip: Duration::from_millis(round_trip_ms),
        }
    }
}

/// A running link in front of a TCP server. Dropped, it cuts its connections.
pub struct Link {
    addr: SocketAddr,
    counters: Arc<Counters>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Counters {
    down_bytes: AtomicU64,
    up_bytes: AtomicU64,
    connections: AtomicU64,
}

impl Link {
    /// Puts a link before the server at `target`, on a free port of the loopback.
    ///
    /// # Errors
    /// No port can be bound.
    pub async fn start(target: SocketAddr, spec: LinkSpec) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?;
        let counters = Arc::new(Counters::default());
        let stop = CancellationToken::new();
        tokio::spawn(accept(listener, target, spec, counters.clone(), stop.clone()));
        Ok(Self { addr, counters, _stop: stop.drop_guard() })
    }

    /// Where to connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Bytes that came from the server and left the link.
    pub fn down_bytes(&self) -> u64 {
        self.counters.down_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that went to the server.
    pub fn up_bytes(&self) -> u64 {
        self.counters.up_bytes.load(Ordering::Relaxed)
    }

    /// Connections that were made.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Ordering::Relaxed)
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    spec: LinkSpec,
    counters: Arc<Counters>,
    stop: CancellationToken,
) {
    let down = Arc::new(Line::new(spec));
    let up = Arc::new(Line::new(spec));
    loop {
        let client = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => client,
                // No file descriptor left, or a client that is gone already.
                Err(_) => { tokio::time::sleep(Duration::from_millis(10)).await; continue }
            },
        };
        counters.connections.fetch_add(1, Ordering::Relaxed);
        let (down, up, counters, stop) = (down.clone(), up.clone(), counters.clone(), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = carry(client, target, spec, &down, &up, &counters) => {}
            }
        });
    }
}

async fn carry(
    client: TcpStream,
    target: SocketAddr,
    spec: LinkSpec,
    down: &Line,
    up: &Line,
    counters: &Counters,
) {
    let opened = Instant::now() + spec.round_trip;
    // The first byte of the client leaves once the handshake is over, that of the server once it has heard of it.
    let first_up = opened + spec.round_trip / 2;
    let first_down = opened + spec.round_trip;
    let Ok(server) = TcpStream::connect(target).await else { return };
    if client.set_nodelay(true).is_err() || server.set_nodelay(true).is_err() {
        return;
    }
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let upward = one_way(client_read, server_write, up, first_up, &counters.up_bytes);
    let downward = one_way(server_read, client_write, down, first_down, &counters.down_bytes);
    // An error on either way cuts both, as a reset does; an end is passed on by itself.
    let _ = tokio::try_join!(upward, downward);
}

/// One direction of the link, shared by all connections.
struct Line {
    spec: LinkSpec,
    /// When all that was taken in will have left. The lock is fair: connections take turns.
    free_at: Mutex<Instant>,
}

impl Line {
    fn new(spec: LinkSpec) -> Self {
        Self { spec, free_at: Mutex::new(Instant::now()) }
    }

    /// Takes `len` bytes in as soon as there is room; returns when they arrive at the other end.
    async fn send(&self, len: usize, supply: Supply) -> Instant {
        let one_way = self.spec.round_trip / 2;
        if self.spec.bits_per_second == 0 {
            return Instant::now() + one_way;
        }
        let ready = Instant::now();
        let mut free_at = self.free_at.lock().await;
        if *free_at > Instant::now() + QUEUE {
            tokio::time::sleep_until(*free_at - QUEUE).await;
        }
        let begins = match supply {
            Supply::Fresh => ready,
            Supply::Backlog => ready - CATCH_UP_MAX,
        };
        let nanos = len as u128 * 8 * 1_000_000_000 / u128::from(self.spec.bits_per_second);
        *free_at = (*free_at).max(begins) + Duration::from_nanos(nanos as u64);
        *free_at + one_way
    }
}

/// Since when bytes have been waiting for the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Supply {
    /// They came just now.
    Fresh,
    /// They lay there all the time: a real link would have gone on sending while our timer, or our turn on the processor, was late.
    Backlog,
}

async fn one_way(
    from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    line: &Line,
    not_before: Instant,
    count: &AtomicU64,
) -> io::Result<()> {
    let window = Arc::new(Semaphore::new(WINDOW_BYTES));
    let (sender, mut under_way) = mpsc::unbounded_channel::<(Instant, Bytes)>();
    let taking = async {
        let mut buf = BytesMut::new();
        loop {
            buf.reserve(TURN_BYTES);
            let mut supply = Supply::Backlog;
            let len = loop {
                match from.try_read_buf(&mut (&mut buf).limit(TURN_BYTES)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        supply = Supply::Fresh;
                        from.readable().await?;
                    }
                    done => break done?,
                }
            };
            if len == 0 {
                // The end takes its time too. Dropping the sender ends the other half after it.
                let arrives = line.send(0, Supply::Fresh).await.max(not_before);
                let _ = sender.send((arrives, Bytes::new()));
                drop(sender);
                return io::Result::Ok(());
            }
            // The channel has no bound of its own: the window is.
            let room = match window.try_acquire_many(len as u32) {
                Ok(room) => room,
                Err(_) => {
                    // The receiver held the sender up, and the link was free.
                    supply = Supply::Fresh;
                    window.acquire_many(len as u32).await.expect("the window is never closed")
                }
            };
            room.forget();
            let arrives = line.send(len, supply).await.max(not_before);
            if sender.send((arrives, buf.split().freeze())).is_err() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    };
    let giving = async {
        while let Some((arrives, bytes)) = under_way.recv().await {
            if arrives > Instant::now() + TIMER_LATENESS {
                tokio::time::sleep_until(arrives - TIMER_LATENESS).await;
            }
            // Before the write: who has the last byte must find it counted.
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            to.write_all(&bytes).await?;
            window.add_permits(bytes.len());
        }
        to.shutdown().await
    };
    tokio::try_join!(taking, giving).map(|_| ())
}
