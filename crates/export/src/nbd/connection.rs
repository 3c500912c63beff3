//! One client in the transmission phase.
//!
//! - One task. It reads many requests at once, tries each inline, and sends many replies at once; data already local
//!   goes from the device into the place right behind its reply's header, and nothing is allocated on the way.
//! - What cannot be done inline becomes a task (`job`). At most `IN_FLIGHT_MAX` of them and `IN_FLIGHT_BYTES_MAX`, data not yet
//!   sent included; beyond that, and while all connections together hold what they may (`pool`), nothing is read from the socket, so
//!   the client feels it.
//! - A client that goes away while nothing is read from it is missed within `LOOK_EVERY`.
//! - Requests are taken in order, replies go out as they come. A batch is bounded, so completions get out in between.
//! - An error answers its request. Only broken framing ends the connection.
//!
//! Not here: the handshake, and which requests are refused (`request`).

#![allow(clippy::disallowed_methods, reason = "an export stands outside the engine: real time")]

use std::{
    future::{Future, poll_fn},
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use readonce_disk::BlockDevice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::AbortHandle,
    time::{Instant, Sleep},
};
use tokio_util::task::TaskTracker;

use super::{
    contexts::Contexts,
    errno::Errno,
    inbox::Inbox,
    job::{Completion, Job, Mailbox, Outcome, Ticket},
    outbox::Outbox,
    pool::{Held, OWN_BYTES_MAX, Pool},
    request::{Command, Refusal, Terms, check, status_payload, status_range},
    status::Query,
    wire::{Done, Headers, PAYLOAD_LEN_MAX, Request},
};

/// Requests of one connection that wait at the same time.
const IN_FLIGHT_MAX: usize = 128;
/// Bytes of payload of one connection that are held at the same time: two of the longest requests.
const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// Bytes up to which a request is tried inline: longer ones would keep the other connections of the thread waiting.
const INLINE_LEN_MAX: usize = 1 << 20;
/// Requests that are taken before completions are looked at and replies are sent.
const BATCH_REQUESTS_MAX: usize = 64;
/// Bytes of payload of a refused request that are read and thrown away; with more, the connection ends.
const DISCARD_LEN_MAX: u64 = 64 << 20;
/// Failures of one client that are told, each once while it repeats itself.
const TOLD_MAX: u32 = 32;
/// How often a client that nothing is read from, and nothing is sent to, is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Bytes of payload of a block status request: more than all contexts need.
const STATUS_PAYLOAD_LEN_MAX: u64 = 8 + 4 * 64;

const _: () = assert!(IN_FLIGHT_BYTES_MAX >= 2 * PAYLOAD_LEN_MAX as usize);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the client closed the connection")]
    Closed,
    #[error("the server ends")]
    Stopped,
    #[error("the client took too long to receive its last replies")]
    TooSlow,
    #[error("the client broke the protocol: {0}")]
    Broken(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What the handshake agreed on, and what the server gives.
pub(super) struct Setup {
    pub device: Arc<dyn BlockDevice>,
    /// For the log.
    pub device_name: String,
    pub headers: Headers,
    pub contexts: Contexts,
    pub mailbox: Arc<Mailbox>,
    /// What all connections share.
    pub pool: Arc<Pool>,
    /// Where tasks are started.
    pub tasks: TaskTracker,
    /// How long an ending connection waits for its requests and its client.
    pub drain_timeout: Duration,
}

pub(super) struct Connection<S> {
    stream: S,
    inbox: Inbox,
    outbox: Outbox,
    setup: Setup,
    jobs: Jobs,
    /// Room of the pool for the request that is taken next.
    next: Held,
    /// Payload that is thrown away, and the refusal that answers it then.
    discard: Option<Discard>,
    /// Nothing more is read; why.
    closing: Option<End>,
    drain: Option<Pin<Box<Sleep>>>,
    /// Until the client is looked for again.
    look: Option<Pin<Box<Sleep>>>,
    scratch: Vec<Completion>,
    /// Whether it stood back once for its tasks, and now goes on.
    gathering: bool,
    /// Failures told so far, and the last of them.
    told: (u32, String),
}

struct Discard {
    left: u64,
    request: Request,
    refusal: Refusal,
}

/// What taking one request came to.
enum Step {
    /// It was answered or became a task.
    Taken,
    /// More bytes are needed: so many in one run.
    Need(usize),
    /// Replies must be sent first.
    OutboxFull,
    /// Tasks must end first, or data be sent, before so many bytes more may be held.
    InFlightFull(usize),
    Close(End),
}

impl<S: AsyncRead + AsyncWrite + AsFd + Unpin> Connection<S> {
    pub fn new(stream: S, inbox: Inbox, setup: Setup) -> Self {
        Self {
            stream,
            inbox,
            outbox: Outbox::default(),
            setup,
            jobs: Jobs::default(),
            next: Held::default(),
            discard: None,
            closing: None,
            drain: None,
            look: None,
            scratch: Vec::new(),
            gathering: false,
            told: (0, String::new()),
        }
    }

    /// Serves the client until one side ends it.
    pub async fn run(mut self) -> End {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        // Where one task has ended others are about to: they run first, and their replies leave in one go.
        self.gathering = !self.gathering && self.jobs.count > 1 && self.setup.mailbox.has_completions();
        if self.gathering {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            self.collect();
            let step = if self.closing.is_none() { self.take_batch() } else { Step::OutboxFull };
            let is_sent = match self.outbox.poll_send(cx, &mut self.stream) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
                Poll::Pending => false,
            };
            let mut is_reading = false;
            let full = if let Step::InFlightFull(len) = step { Some(len) } else { None };
            match step {
                Step::Taken => continue,
                _ if self.closing.is_some() => {}
                Step::OutboxFull if is_sent => continue,
                Step::InFlightFull(len) if self.has_room(len) => continue,
                Step::OutboxFull | Step::InFlightFull(_) => {}
                Step::Close(end) => self.closing = Some(end),
                Step::Need(_) if self.setup.mailbox.is_stopping() => self.closing = Some(End::Stopped),
                Step::Need(want) => match self.inbox.poll_fill(cx, &mut self.stream, want) {
                    Poll::Ready(Ok(0)) => {
                        self.client_gone();
                    }
                    Poll::Ready(Ok(_)) => continue,
                    Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
                    Poll::Pending => is_reading = true,
                },
            }
            if full.is_some() && self.poll_look(cx).is_ready() {
                self.client_gone();
            }
            if let Poll::Ready(end) = self.poll_drain(cx) {
                return Poll::Ready(end);
            }
            // Registered first, looked at after: what comes in between wakes us.
            self.setup.mailbox.waker.register(cx.waker());
            let is_stop_new = is_reading && self.setup.mailbox.is_stopping();
            let is_room_new = self.closing.is_none() && full.is_some_and(|len| self.has_room(len));
            if !self.setup.mailbox.has_completions() && !is_stop_new && !is_room_new {
                return Poll::Pending;
            }
        }
    }

    fn client_gone(&mut self) {
        // Nobody waits for them any more; an origin that is away would hold them for long.
        self.jobs.abort();
        self.closing = Some(End::Closed);
    }

    /// Ready once the client is seen to have closed the connection. For a connection that is not read, so that the end of its
    /// stream, which may lie behind many requests, is not met.
    fn poll_look(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let look = self.look.get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK_EVERY)));
        while look.as_mut().poll(cx).is_ready() {
            let mut stream = [PollFd::new(&self.stream, PollFlags::RDHUP)];
            if poll(&mut stream, Some(&Timespec::default())).is_ok_and(|found| found > 0) {
                return Poll::Ready(());
            }
            look.as_mut().reset(Instant::now() + LOOK_EVERY);
        }
        Poll::Pending
    }

    /// Where nothing more is read: ready once every request is answered, or after too long.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.closing.is_none() {
            return Poll::Pending;
        }
        if self.jobs.count == 0 && self.outbox.is_empty() {
            return Poll::Ready(self.closing.take().expect("looked at above"));
        }
        let timeout = self.setup.drain_timeout;
        let drain = self.drain.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        drain.as_mut().poll(cx).map(|()| End::TooSlow)
    }

    /// Puts the replies of ended tasks into the outbox.
    fn collect(&mut self) {
        if !self.setup.mailbox.has_completions() {
            return;
        }
        let mut completions = std::mem::take(&mut self.scratch);
        self.setup.mailbox.collect(&mut completions);
        for completion in completions.drain(..) {
            self.jobs.end(&completion);
            let Completion { cookie, offset, len, held, outcome, .. } = completion;
            match outcome {
                Outcome::Done => self.done(cookie, offset, Done::Other),
                Outcome::Data(data) => {
                    let len = u32::try_from(data.len()).expect("a read is at most PAYLOAD_LEN_MAX");
                    self.outbox.push(self.setup.headers.data_header(cookie, offset, len).bytes());
                    self.outbox.push_shared(data, held);
                }
                Outcome::Chunks(chunks) => self.outbox.push_shared(chunks, held),
                Outcome::Failed { errno, text } => self.fail(cookie, offset, len, errno, &text),
                Outcome::Abandoned => {
                    self.send_error(cookie, offset, Errno::Io, "the request was abandoned");
                }
            }
        }
        self.scratch = completions;
    }

    fn take_batch(&mut self) -> Step {
        for _ in 0..BATCH_REQUESTS_MAX {
            if self.outbox.is_full() {
                return Step::OutboxFull;
            }
            match self.take_one() {
                Step::Taken => {}
                other => return other,
            }
        }
        Step::Taken
    }

    #[inline]
    fn take_one(&mut self) -> Step {
        if self.discard.is_some() {
            return self.take_discard();
        }
        let headers = self.setup.headers;
        let header_len = headers.request_len();
        let request = match headers.parse(self.inbox.filled()) {
            Ok(Some(request)) => request,
            Ok(None) => return Step::Need(header_len),
            Err(bad) => return Step::Close(End::Broken(format!("request magic {:#x}", bad.0))),
        };
        let terms = Terms {
            headers,
            size: self.setup.device.size(),
            read_only: self.setup.device.read_only(),
            contexts: self.setup.contexts,
        };
        let command = if self.setup.mailbox.is_stopping() {
            Err(Refusal { errno: Errno::Shutdown, text: "the server ends".into() })
        } else {
            check(&request, &terms)
        };
        match command {
            Ok(Command::Read) => self.take_read(&request),
            Ok(Command::Write { fua }) => self.take_write(&request, fua),
            Ok(Command::BlockStatus { one, contexts }) => self.take_status(request, &terms, one, contexts),
            Ok(Command::Flush) => self.take_job(&request, Job::Flush),
            Ok(Command::Trim { fua }) => {
                self.take_job(&request, Job::Trim { offset: request.offset, len: request.len, fua })
            }
            Ok(Command::Cache) => {
                self.take_job(&request, Job::Cache { offset: request.offset, len: request.len })
            }
            Ok(Command::WriteZeroes { mode, fua }) => self
                .take_job(&request, Job::WriteZeroes { offset: request.offset, len: request.len, mode, fua }),
            Ok(Command::Nothing) => {
                self.inbox.consume(header_len);
                let kind =
                    if request.command == super::wire::command::READ { Done::Read } else { Done::Other };
                self.done(request.cookie, request.offset, kind);
                Step::Taken
            }
            Ok(Command::Disconnect) => Step::Close(End::Disconnected),
            Err(refusal) => self.refuse(request, refusal),
        }
    }

    #[inline]
    fn take_read(&mut self, request: &Request) -> Step {
        let headers = self.setup.headers;
        let len = usize::try_from(request.len).expect("check bounds a read by PAYLOAD_LEN_MAX");
        if len <= INLINE_LEN_MAX {
            let head_len = headers.data_header_len();
            let room = self.outbox.room(head_len + len);
            let (head, body) = room.split_at_mut(head_len);
            match self.setup.device.read_now(request.offset, body) {
                Some(Ok(())) => {
                    let len_wire = u32::try_from(len).expect("len <= INLINE_LEN_MAX");
                    let header = headers.data_header(request.cookie, request.offset, len_wire);
                    head.copy_from_slice(header.bytes());
                    self.outbox.commit(head_len + len);
                    self.inbox.consume(headers.request_len());
                    return Step::Taken;
                }
                Some(Err(error)) => {
                    self.inbox.consume(headers.request_len());
                    return self.answer(request, Outcome::failed(&error));
                }
                None => {}
            }
        }
        if !self.has_room(len) {
            return Step::InFlightFull(len);
        }
        self.inbox.consume(headers.request_len());
        self.start(request, Job::Read { offset: request.offset, len }, len)
    }

    fn take_write(&mut self, request: &Request, fua: bool) -> Step {
        let header_len = self.setup.headers.request_len();
        let len = usize::try_from(request.len).expect("check bounds a write by PAYLOAD_LEN_MAX");
        // Room is looked for before the payload is received: it is what takes the memory.
        let is_inline = len <= INLINE_LEN_MAX;
        if (fua || !is_inline) && !self.has_room(len) {
            return Step::InFlightFull(len);
        }
        let Some(data) = self.inbox.filled().get(header_len..header_len + len) else {
            return Step::Need(header_len + len);
        };
        if is_inline {
            match self.setup.device.write_now(request.offset, data) {
                Some(Ok(())) => {
                    self.next = Held::default();
                    self.inbox.consume(header_len + len);
                    if fua {
                        return self.start(request, Job::Flush, 0);
                    }
                    return self.answer(request, Outcome::Done);
                }
                Some(Err(error)) => {
                    self.next = Held::default();
                    self.inbox.consume(header_len + len);
                    return self.answer(request, Outcome::failed(&error));
                }
                None => {}
            }
            if !self.has_room(len) {
                return Step::InFlightFull(len);
            }
        }
        self.inbox.consume(header_len);
        let data = self.inbox.take(len);
        self.start(request, Job::Write { offset: request.offset, data, fua }, len)
    }

    fn take_status(
        &mut self,
        mut request: Request,
        terms: &Terms,
        one: bool,
        mut contexts: Contexts,
    ) -> Step {
        let header_len = terms.headers.request_len();
        let payload_len = request.payload_len(terms.headers);
        if payload_len > STATUS_PAYLOAD_LEN_MAX {
            let text = format!("a block status payload of {payload_len} bytes");
            return self.refuse(request, Refusal { errno: Errno::Invalid, text });
        }
        let total = header_len + usize::try_from(payload_len).expect("bounded above");
        let Some(payload) = self.inbox.filled().get(header_len..total) else { return Step::Need(total) };
        // A request may announce a payload and have none: its length is then no range.
        let parsed = if payload_len > 0 {
            status_payload(payload, contexts).and_then(|(len, limited)| {
                request.len = len;
                contexts = limited;
                status_range(&request, terms)
            })
        } else {
            status_range(&request, terms)
        };
        if let Err(Refusal { errno, text }) = parsed {
            self.inbox.consume(total);
            return self.answer(&request, Outcome::Failed { errno, text });
        }
        let Request { cookie, offset, len, .. } = request;
        let query = Query { headers: terms.headers, cookie, offset, len, one, contexts };
        let charge = query.reply_len_max();
        if !self.has_room(charge) {
            return Step::InFlightFull(charge);
        }
        self.inbox.consume(total);
        self.start(&request, Job::BlockStatus(query), charge)
    }

    /// A request without payload in either direction.
    fn take_job(&mut self, request: &Request, job: Job) -> Step {
        if !self.has_room(0) {
            return Step::InFlightFull(0);
        }
        self.inbox.consume(self.setup.headers.request_len());
        self.start(request, job, 0)
    }

    fn take_discard(&mut self) -> Step {
        let filled_len = self.inbox.filled().len();
        let Some(discard) = &mut self.discard else { return Step::Taken };
        let count = usize::try_from(discard.left).map_or(filled_len, |left| left.min(filled_len));
        self.inbox.consume(count);
        discard.left -= count as u64;
        if discard.left > 0 {
            return Step::Need(0);
        }
        let Discard { request, refusal, .. } = self.discard.take().expect("matched above");
        self.answer(&request, Outcome::Failed { errno: refusal.errno, text: refusal.text })
    }

    /// Answers with `refusal`, once the payload is out of the way.
    fn refuse(&mut self, request: Request, refusal: Refusal) -> Step {
        let left = request.payload_len(self.setup.headers);
        if left > DISCARD_LEN_MAX {
            return Step::Close(End::Broken(format!("a payload of {left} bytes: {}", refusal.text)));
        }
        self.inbox.consume(self.setup.headers.request_len());
        self.discard = Some(Discard { left, request, refusal });
        Step::Taken
    }

    fn answer(&mut self, request: &Request, outcome: Outcome) -> Step {
        match outcome {
            Outcome::Failed { errno, text } => {
                self.fail(request.cookie, request.offset, request.len, errno, &text);
            }
            _ => self.done(request.cookie, request.offset, Done::Other),
        }
        Step::Taken
    }

    #[inline]
    fn done(&mut self, cookie: u64, offset: u64, kind: Done) {
        self.outbox.push(self.setup.headers.done(cookie, offset, kind).bytes());
    }

    fn fail(&mut self, cookie: u64, offset: u64, len: u64, errno: Errno, text: &str) {
        tracing::debug!(cookie, offset, len, ?errno, text, "request failed");
        // The client's user is told a number alone. A client that fails on purpose is to fill no log.
        let is_ours = matches!(errno, Errno::Io | Errno::NoSpace);
        if is_ours && self.told.0 < TOLD_MAX && self.told.1 != text {
            self.told = (self.told.0 + 1, text.to_owned());
            match errno {
                // The system's words alone: they name no file.
                Errno::NoSpace => {
                    tracing::error!("{}: {len} bytes at offset {offset}: {text}", self.setup.device_name);
                }
                _ => tracing::error!("{text}"),
            }
        }
        self.send_error(cookie, offset, errno, text);
    }

    fn send_error(&mut self, cookie: u64, offset: u64, errno: Errno, text: &str) {
        let outbox = &mut self.outbox;
        self.setup.headers.error(cookie, offset, errno.number(), text, &mut |bytes| outbox.push(bytes));
    }

    /// Whether one more task with `len` bytes of payload may start: then room for it is taken. A connection that holds nothing may
    /// start any, once the others leave room.
    fn has_room(&mut self, len: usize) -> bool {
        let held = self.jobs.charge + self.outbox.shared_len();
        if self.jobs.count >= IN_FLIGHT_MAX || (held > 0 && held + len > IN_FLIGHT_BYTES_MAX) {
            return false;
        }
        let want = if held + len <= OWN_BYTES_MAX { 0 } else { len };
        if self.next.len() >= want {
            return true;
        }
        self.next = Held::default();
        match self.setup.pool.take(want, &self.setup.mailbox) {
            Some(room) => self.next = room,
            None => return false,
        }
        true
    }

    fn start(&mut self, request: &Request, job: Job, charge: usize) -> Step {
        let slot = self.jobs.begin(charge);
        let ticket = Ticket {
            mailbox: self.setup.mailbox.clone(),
            cookie: request.cookie,
            offset: request.offset,
            len: request.len,
            slot,
            charge,
            held: std::mem::take(&mut self.next),
            is_open: true,
        };
        let may_abort = job.changes_nothing();
        let task = self.setup.tasks.spawn(job.run(self.setup.device.clone(), ticket));
        if may_abort {
            self.jobs.set_abort(slot, task.abort_handle());
        }
        Step::Taken
    }
}

/// The tasks of a connection.
#[derive(Default)]
struct Jobs {
    /// How to abort the ones that change nothing.
    slots: Vec<Option<AbortHandle>>,
    free: Vec<usize>,
    count: usize,
    /// Bytes of payload that they hold.
    charge: usize,
}

impl Jobs {
    fn begin(&mut self, charge: usize) -> usize {
        self.count += 1;
        self.charge += charge;
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        })
    }

    fn set_abort(&mut self, slot: usize, abort: AbortHandle) {
        *self.slots.get_mut(slot).expect("begin made the slot") = Some(abort);
    }

    fn end(&mut self, completion: &Completion) {
        self.count -= 1;
        self.charge -= completion.charge;
        *self.slots.get_mut(completion.slot).expect("begin made the slot") = None;
        self.free.push(completion.slot);
    }

    /// Aborts those that change nothing.
    fn abort(&self) {
        for abort in self.slots.iter().flatten() {
            abort.abort();
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.abort();
    }
}
