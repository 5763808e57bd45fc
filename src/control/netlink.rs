//! One NETLINK_NETFILTER socket and its rounds of question and answer, over netlink-proto.
//!
//! Promises: every round ends, with its answers or with an error, because each wait has a limit;
//! the errno of `NLMSG_ERROR` and of `NLMSG_DONE` reaches the caller; at most one datagram (32 KiB
//! in a dump) is in memory that the caller has not taken. Never decodes an attribute.
//!
//! netlink-proto hands answers on through unbounded channels, and its `Connection` reads until the
//! socket is empty, which in a dump is the whole table: the kernel makes the next part when the
//! last one is read. Spawned, as its documents say, it piles up as much as the consumer is slow: a
//! dump of 1,000,000 entries (192 MB of messages) to a consumer that slept 5 ms after every 500 made
//! the process 256 MiB larger. So it is not spawned: the caller's own task polls it, only when
//! every answer so far was taken, and the socket below gives it one datagram a time. The same dump
//! with a sleep after every 128 KiB then cost 288 KiB (`a_slow_consumer_of_a_large_dump_costs_no_memory`
//! in tests/integration/control.rs).

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BufMut;
use futures_util::Stream;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP_INTR, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_proto::{
    Connection, ConnectionHandle, NetlinkCodec, ReplyExpectation, from_socket_with_codec,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, Socket, SocketAddr, TokioSocket};

use super::Error;
use crate::ctnetlink::uapi::netlink::NLMSG_HDRLEN;

/// The kernel answers while it is asked, in microseconds, and makes each 32 KiB of a dump in less
/// than 1 ms: a silence of this length is no load, it is a fault.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A whole netlink message, header included, as it is on the wire. Its length is at least
/// [`NLMSG_HDRLEN`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Raw(Vec<u8>);

impl Raw {
    /// `message` has a netlink header; its sequence number is set when it is sent.
    pub(super) fn new(message: Vec<u8>) -> Self {
        assert!(message.len() >= NLMSG_HDRLEN, "a netlink message has a header");
        Raw(message)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.0[at], self.0[at + 1]])
    }

    pub(super) fn kind(&self) -> u16 {
        self.u16_at(4)
    }

    fn flags(&self) -> u16 {
        self.u16_at(6)
    }

    /// Asks for an acknowledgement as well. ctnetlink sets NLM_F_MULTI in its single answers too
    /// (ctnetlink_fill_info, ctnetlink_stat_ct_fill_info), after which netlink-proto waits for a
    /// DONE that never comes: the acknowledgement ends the round.
    pub(super) fn acknowledged(mut self) -> Self {
        let flags = self.flags() | NLM_F_ACK;
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self
    }

    fn into_message(self) -> NetlinkMessage<Raw> {
        let mut header = NetlinkHeader::default();
        header.flags = self.flags();
        // The rest of the header is filled in by netlink-proto.
        NetlinkMessage::new(header, NetlinkPayload::InnerMessage(self))
    }
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind()
    }

    fn buffer_len(&self) -> usize {
        self.0.len() - NLMSG_HDRLEN
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0[NLMSG_HDRLEN..]);
    }
}

/// Never fails: netlink-proto only logs what it cannot decode, and the request would never end.
impl NetlinkDeserializable for Raw {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        let length = NLMSG_HDRLEN + payload.len();
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&header.message_type.to_ne_bytes());
        message.extend_from_slice(&header.flags.to_ne_bytes());
        message.extend_from_slice(&header.sequence_number.to_ne_bytes());
        message.extend_from_slice(&header.port_number.to_ne_bytes());
        message.extend_from_slice(payload);
        Ok(Raw(message))
    }
}

/// What the socket notes for the link, past netlink-proto, which keeps none of it.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// One datagram may be read.
    allowed: Cell<bool>,
    /// A datagram was longer than the buffer it was read into.
    truncated: Cell<bool>,
    /// Why reading or sending failed; netlink-proto only logs it.
    failure: RefCell<Option<io::Error>>,
}

impl Notes {
    pub(super) fn may_read(&self) -> bool {
        self.allowed.get()
    }

    pub(super) fn has_read(&self) {
        self.allowed.set(false);
    }

    pub(super) fn keep<T>(&self, done: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &done {
            let copy = match error.raw_os_error() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new(error.kind(), error.to_string()),
            };
            *self.failure.borrow_mut() = Some(copy);
        }
        done
    }
}

/// A socket that reads one datagram for each permission. A trait, so that tests can play a kernel
/// that is silent, broken or interrupted.
pub(super) trait Paced: AsyncSocket {
    fn notes(&self) -> &Notes;
}

/// The socket to the kernel.
pub(super) struct KernelSocket {
    socket: TokioSocket,
    notes: Notes,
}

impl Paced for KernelSocket {
    fn notes(&self) -> &Notes {
        &self.notes
    }
}

impl AsyncSocket for KernelSocket {
    fn socket_ref(&self) -> &Socket {
        self.socket.socket_ref()
    }

    fn socket_mut(&mut self) -> &mut Socket {
        self.socket.socket_mut()
    }

    fn new(protocol: isize) -> io::Result<Self> {
        Ok(Self { socket: TokioSocket::new(protocol)?, notes: Notes::default() })
    }

    fn poll_send(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_send(cx, buf).map(|sent| self.notes.keep(sent))
    }

    fn poll_send_to(
        &self,
        cx: &mut Context<'_>,
        buf: &[u8],
        addr: &SocketAddr,
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_send_to(cx, buf, addr).map(|sent| self.notes.keep(sent))
    }

    fn poll_recv<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<()>> {
        self.poll_recv_from(cx, buf).map_ok(drop)
    }

    fn poll_recv_from<B: BufMut>(
        &self,
        cx: &mut Context<'_>,
        buf: &mut B,
    ) -> Poll<io::Result<SocketAddr>> {
        if !self.notes.may_read() {
            // Nobody is woken by this: the link polls again when it has given a new permission.
            return Poll::Pending;
        }
        let (room, before) = (buf.chunk_mut().len(), buf.remaining_mut());
        let read = ready!(self.socket.poll_recv_from(cx, buf));
        self.notes.has_read();
        // netlink-sys drops MSG_TRUNC. A datagram that fills the whole buffer was longer: the
        // buffer has 64 KiB and the kernel makes 32 KiB at most.
        let full = read.is_ok() && before - buf.remaining_mut() >= room;
        self.notes.truncated.set(self.notes.truncated.get() || full);
        Poll::Ready(self.notes.keep(read))
    }

    fn poll_recv_from_full(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Vec<u8>, SocketAddr)>> {
        // As much as netlink-proto itself reserves.
        let mut buf = Vec::with_capacity(64 * 1024);
        self.poll_recv_from(cx, &mut buf).map_ok(|from| (buf, from))
    }
}

type Messages = Pin<Box<dyn Stream<Item = NetlinkMessage<Raw>> + Send>>;
type Unasked = Pin<Box<dyn Stream<Item = (NetlinkMessage<Raw>, SocketAddr)> + Send>>;

/// The connection: one round at a time.
pub(super) struct Link<S: Paced = KernelSocket> {
    connection: Connection<Raw, S, NetlinkCodec>,
    handle: ConnectionHandle<Raw>,
    /// Messages that answer no question: the errors of batch markers, and overruns.
    unasked: Unasked,
    /// A round has begun and not ended. Left set by a round that was given up, whose late answers
    /// could be taken for those of the next one.
    busy: bool,
    limit: Duration,
}

/// One step of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Message(Raw),
    /// `NLMSG_ERROR` with errno 0.
    Ack,
    /// `NLMSG_ERROR`.
    Refused(i32),
    /// `NLMSG_DONE`, with the errno that ended the dump or 0.
    Done(i32),
}

/// Why a round ends before its answer does.
enum Stop {
    Socket(io::Error),
    /// An error that answers no question is that of a batch's marker: it stands for the whole
    /// batch, whose messages get no answer of their own.
    Batch(i32),
}

/// What happened to a round beside its answers. Once set, stays set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// `NLM_F_DUMP_INTR`: the table changed in a way that may skip or repeat entries.
    pub(super) interrupted: bool,
    /// ENOBUFS: the kernel could not queue an answer.
    pub(super) overrun: bool,
    /// A datagram did not fit.
    pub(super) truncated: bool,
}

impl Link {
    /// A socket in the network namespace of the calling thread. Needs a tokio runtime with I/O
    /// and time.
    pub(super) fn open() -> Result<Self, Error> {
        let doing = "opening a netlink socket";
        let socket =
            KernelSocket::new(NETLINK_NETFILTER).map_err(|error| match error.raw_os_error() {
                Some(errno) => match Error::refused(doing, errno) {
                    Error::Missing { doing, source, .. } => {
                        Error::Missing { doing, what: "NETLINK_NETFILTER (nfnetlink)", source }
                    }
                    other => other,
                },
                None => Error::Gone { doing, source: error },
            })?;
        Ok(Self::over(socket))
    }
}

impl<S: Paced> Link<S> {
    pub(super) fn over(socket: S) -> Self {
        let (mut connection, handle, unasked) = from_socket_with_codec(socket);
        // Otherwise the errno inside NLMSG_DONE is dropped and a failed dump looks complete.
        connection.set_forward_done(true);
        connection.set_forward_ack(true);
        let unasked = Box::pin(unasked);
        Self { connection, handle, unasked, busy: false, limit: ANSWER_LIMIT }
    }

    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Asks; `doing` is for error messages.
    pub(super) fn ask(&mut self, doing: &'static str, request: Raw) -> Result<Round<'_, S>, Error> {
        self.begin(doing)?;
        let messages = self
            .handle
            .request(request.into_message(), SocketAddr::new(0, 0))
            .map_err(|error| gone(doing, error))?;
        Ok(self.round(doing, Box::pin(messages)))
    }

    /// Sends an nf_tables batch in one datagram: `begin` and `end` are its markers, which kernels
    /// before 6.10 never acknowledge; each of `requests` must ask for an acknowledgement.
    pub(super) fn ask_batch(
        &mut self,
        doing: &'static str,
        begin: Raw,
        requests: Vec<Raw>,
        end: Raw,
    ) -> Result<Round<'_, S>, Error> {
        self.begin(doing)?;
        let marker = |raw: Raw| (raw.into_message(), ReplyExpectation::NotExpected);
        let mut messages = vec![marker(begin)];
        for request in requests {
            messages.push((request.into_message(), ReplyExpectation::Expected));
        }
        messages.push(marker(end));
        let messages = self
            .handle
            .request_batch_with_expectation(messages, SocketAddr::new(0, 0))
            .map_err(|error| gone(doing, error))?;
        Ok(self.round(doing, Box::pin(messages)))
    }

    fn begin(&mut self, doing: &'static str) -> Result<(), Error> {
        if std::mem::replace(&mut self.busy, true) {
            return Err(gone(doing, "an earlier round was given up"));
        }
        Ok(())
    }

    fn round(&mut self, doing: &'static str, messages: Messages) -> Round<'_, S> {
        Round { link: self, doing, messages, marks: Marks::default() }
    }

    /// The next message of `messages`, or `None` at their end. Reads from the socket only when
    /// nothing is left to take.
    fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
        messages: &mut Messages,
        marks: &mut Marks,
    ) -> Poll<Result<Option<NetlinkMessage<Raw>>, Stop>> {
        loop {
            if let Poll::Ready(message) = messages.as_mut().poll_next(cx) {
                return Poll::Ready(Ok(message));
            }
            while let Poll::Ready(Some((message, _))) = self.unasked.as_mut().poll_next(cx) {
                match message.payload {
                    NetlinkPayload::Overrun(_) => marks.overrun = true,
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Poll::Ready(Err(Stop::Batch(error.raw_code().saturating_neg())));
                    }
                    _ => {}
                }
            }
            self.notes().allowed.set(true);
            let ended = Pin::new(&mut self.connection).poll(cx).is_ready();
            let read = !self.notes().allowed.replace(false);
            marks.truncated |= self.notes().truncated.get();
            if ended {
                let failure = self.notes().failure.take();
                let closed = || io::Error::from(io::ErrorKind::ConnectionAborted);
                return Poll::Ready(Err(Stop::Socket(failure.unwrap_or_else(closed))));
            }
            if !read {
                return Poll::Pending;
            }
        }
    }

    fn notes(&mut self) -> &Notes {
        self.connection.socket_mut().notes()
    }
}

impl<S: Paced> std::fmt::Debug for Link<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("busy", &self.busy).finish_non_exhaustive()
    }
}

fn gone(doing: &'static str, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Gone { doing, source: io::Error::other(why) }
}

/// A question that was asked. Read it to its end: a link whose round was dropped before is spent.
pub(super) struct Round<'a, S: Paced> {
    link: &'a mut Link<S>,
    doing: &'static str,
    messages: Messages,
    marks: Marks,
}

impl<S: Paced> Round<'_, S> {
    pub(super) fn marks(&self) -> Marks {
        self.marks
    }

    /// The next step of the answer; `None` when it is over.
    pub(super) async fn next(&mut self) -> Result<Option<Answer>, Error> {
        let (doing, after) = (self.doing, self.link.limit);
        let (link, messages, marks) = (&mut *self.link, &mut self.messages, &mut self.marks);
        let step = poll_fn(|cx| link.poll_message(cx, messages, marks));
        let message = tokio::time::timeout(after, step)
            .await
            .map_err(|_| Error::TimedOut { doing, after })?
            .map_err(|stop| match stop {
                Stop::Socket(source) => Error::Gone { doing, source },
                Stop::Batch(errno) => Error::refused(doing, errno),
            })?;
        let Some(message) = message else {
            self.link.busy = false;
            return Ok(None);
        };
        self.marks.interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(raw) => Ok(Some(Answer::Message(raw))),
            NetlinkPayload::Done(done) => Ok(Some(Answer::Done(done.code.saturating_neg().max(0)))),
            NetlinkPayload::Error(error) => Ok(Some(match error.raw_code().saturating_neg() {
                0 => Answer::Ack,
                errno => Answer::Refused(errno),
            })),
            _ => Err(Error::Malformed { doing, why: "a message that answers nothing" }),
        }
    }

    pub(super) fn doing(&self) -> &'static str {
        self.doing
    }

    /// Reads the rest of the answer, so that the link can be used again.
    pub(super) async fn drain(&mut self) -> Result<(), Error> {
        while self.next().await?.is_some() {}
        Ok(())
    }

    /// Reads the answer to its end and gives its only message. A refusal is an error.
    pub(super) async fn one(self) -> Result<Raw, Error> {
        let doing = self.doing;
        self.last().await?.ok_or(Error::Malformed { doing, why: "it is empty" })
    }

    /// Reads the answer of a request that asked for an acknowledgement.
    pub(super) async fn acknowledged(self) -> Result<(), Error> {
        self.last().await.map(drop)
    }

    async fn last(mut self) -> Result<Option<Raw>, Error> {
        let mut message = None;
        let mut refused = None;
        while let Some(answer) = self.next().await? {
            match answer {
                Answer::Message(raw) => message = Some(raw),
                Answer::Ack | Answer::Done(0) => {}
                // The first refusal is the cause; those after it may be its consequences.
                Answer::Refused(errno) | Answer::Done(errno) => {
                    refused = refused.or(Some(Error::refused(self.doing, errno)));
                }
            }
        }
        refused.map_or(Ok(message), Err)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::Ordering;

    use super::super::scripted::{self, ENTRY, done, entries, errno, message, question, refusal};
    use super::*;
    use crate::ctnetlink::uapi::netlink::{NLM_F_REQUEST, NLMSG_NOOP};

    #[test]
    fn a_silent_kernel_ends_in_a_time_out_and_the_connection_is_spent() {
        scripted::run(async {
            let (mut link, _) = scripted::link(vec![]);
            let error = link.ask("asking", question()).unwrap().one().await.unwrap_err();
            assert!(matches!(error, Error::TimedOut { after: scripted::LIMIT, .. }), "{error}");
            let error = link.ask("asking again", question()).err().unwrap();
            assert!(matches!(error, Error::Gone { .. }), "{error}");
        });
    }

    /// netlink_rcv_skb skips NLMSG_NOOP and acknowledges it only when asked to: the one question
    /// that a real kernel does not answer.
    #[test]
    fn a_question_that_the_kernel_does_not_answer_ends_in_a_time_out() {
        if !nix::unistd::geteuid().is_root() {
            // nfnetlink_rcv answers EPERM to everything.
            let required = std::env::var_os("CONNTRAIL_REQUIRE_ALL").is_some_and(|v| v == "1");
            assert!(!required, "this test needs root");
            // Past the harness, which catches eprintln!.
            writeln!(std::io::stderr(), "skipped: it needs root").unwrap();
            return;
        }
        scripted::run(async {
            let mut link = Link::open().unwrap();
            link.set_limit(scripted::LIMIT);
            let noop = Raw::new(message(NLMSG_NOOP, NLM_F_REQUEST, 0, &[0; 4]));
            let error = link.ask("asking", noop).unwrap().one().await.unwrap_err();
            assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        });
    }

    #[test]
    fn a_datagram_that_cannot_be_walked_does_not_hang() {
        scripted::run(async {
            let mut broken = entries(1, 0).unwrap();
            broken[..4].copy_from_slice(&1000_u32.to_ne_bytes());
            let (mut link, _) = scripted::link(vec![Ok(broken)]);
            let error = link.ask("asking", question()).unwrap().one().await.unwrap_err();
            assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        });
    }

    #[test]
    fn a_message_without_meaning_reaches_the_caller_as_it_is() {
        scripted::run(async {
            let odd = message(ENTRY, 0, 1, &[7]);
            let (mut link, _) = scripted::link(vec![Ok(odd.clone())]);
            let raw = link.ask("asking", question()).unwrap().one().await.unwrap();
            assert_eq!(raw.bytes(), odd);
        });
    }

    #[test]
    fn no_datagram_is_read_before_the_last_one_was_taken() {
        scripted::run(async {
            let mut steps: Vec<_> = (0..50).map(|_| entries(3, 0)).collect();
            steps.push(done(0));
            let (mut link, read) = scripted::link(steps);
            let mut round = link.ask("asking", question()).unwrap();
            for taken in 0..150 {
                assert!(matches!(round.next().await, Ok(Some(Answer::Message(_)))));
                assert_eq!(read.load(Ordering::Relaxed), taken / 3 + 1);
            }
            assert_eq!(round.next().await.unwrap(), Some(Answer::Done(0)));
            assert_eq!(round.next().await.unwrap(), None);
        });
    }

    #[test]
    fn a_link_is_used_again_after_a_round_that_ended() {
        scripted::run(async {
            let (mut link, _) =
                scripted::link(vec![refusal(libc::ENOENT, 1), refusal(libc::EBUSY, 2)]);
            let first = link.ask("asking", question()).unwrap().one().await.unwrap_err();
            let second = link.ask("asking", question()).unwrap().one().await.unwrap_err();
            assert_eq!((first.errno(), second.errno()), (Some(libc::ENOENT), Some(libc::EBUSY)));
        });
    }

    #[test]
    fn an_error_of_a_batch_marker_ends_the_batch() {
        scripted::run(async {
            // Number 1 is the marker: it is all that answers when nf_tables is not there.
            let (mut link, _) = scripted::link(vec![refusal(libc::EOPNOTSUPP, 1)]);
            let round = link.ask_batch("installing", question(), vec![question()], question());
            let error = round.unwrap().acknowledged().await.unwrap_err();
            assert!(matches!(error, Error::Missing { .. }), "{error}");
        });
    }

    #[test]
    fn the_first_refusal_in_a_batch_is_the_cause() {
        scripted::run(async {
            let steps = vec![refusal(0, 2), refusal(libc::EINVAL, 3), refusal(libc::ENOENT, 4)];
            let (mut link, _) = scripted::link(steps);
            let requests = vec![question(), question(), question()];
            let round = link.ask_batch("installing", question(), requests, question());
            let error = round.unwrap().acknowledged().await.unwrap_err();
            assert_eq!(error.errno(), Some(libc::EINVAL), "{error}");
        });
    }

    #[test]
    fn a_connection_can_be_moved_to_another_thread() {
        fn is_send<T: Send>() {}
        is_send::<Link>();
    }

    #[test]
    fn a_socket_that_breaks_says_why() {
        scripted::run(async {
            let (mut link, _) = scripted::link(vec![errno(libc::EIO)]);
            let error = link.ask("asking", question()).unwrap().one().await.unwrap_err();
            assert!(matches!(error, Error::Gone { .. }), "{error}");
            assert_eq!(error.errno(), Some(libc::EIO));
        });
    }
}
