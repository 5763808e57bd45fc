//! A kernel made of a script, for tests: silent, broken or interrupted as wanted.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BufMut;
use netlink_sys::{AsyncSocket, Socket, SocketAddr};

use super::netlink::{Link, Notes, Paced, Raw};
use crate::ctnetlink::uapi::netlink::{NLM_F_MULTI, NLMSG_DONE, NLMSG_ERROR};

/// Short: tests of silence wait for it.
pub(super) const LIMIT: Duration = Duration::from_millis(100);

/// `IPCTNL_MSG_CT_NEW`.
pub(super) const ENTRY: u16 = 0x0100;

/// What the kernel gives, datagram by datagram.
pub(super) type Script = Vec<io::Result<Vec<u8>>>;

pub(super) struct Scripted {
    steps: Mutex<VecDeque<io::Result<Vec<u8>>>>,
    sent: AtomicUsize,
    read: Arc<AtomicUsize>,
    notes: Notes,
}

/// A link to a kernel that gives these datagrams once it is asked, then is silent; and the count of
/// what was read of them.
pub(super) fn link(steps: Script) -> (Link<Scripted>, Arc<AtomicUsize>) {
    let read = Arc::new(AtomicUsize::new(0));
    let socket = Scripted {
        steps: Mutex::new(steps.into()),
        sent: AtomicUsize::new(0),
        read: read.clone(),
        notes: Notes::default(),
    };
    let mut link = Link::over(socket);
    link.set_limit(LIMIT);
    (link, read)
}

pub(super) fn question() -> Raw {
    Raw::new(message(0x0101, 0x301, 0, &[0; 4]))
}

pub(super) fn message(kind: u16, flags: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&seq.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(payload);
    bytes
}

/// `count` entries of the first question's dump in one datagram.
pub(super) fn entries(count: usize, flags: u16) -> io::Result<Vec<u8>> {
    Ok(message(ENTRY, NLM_F_MULTI | flags, 1, &[2, 0, 0, 0]).repeat(count))
}

pub(super) fn done(errno: i32) -> io::Result<Vec<u8>> {
    Ok(message(NLMSG_DONE, NLM_F_MULTI, 1, &(-errno).to_ne_bytes()))
}

/// `NLMSG_ERROR` to question number `seq`, without the copy of its header.
pub(super) fn refusal(errno: i32, seq: u32) -> io::Result<Vec<u8>> {
    let mut payload = (-errno).to_ne_bytes().to_vec();
    payload.extend_from_slice(&[0; 16]);
    Ok(message(NLMSG_ERROR, 0, seq, &payload))
}

pub(super) fn errno(errno: i32) -> io::Result<Vec<u8>> {
    Err(io::Error::from_raw_os_error(errno))
}

/// Runs an async test as the agent runs its control part.
pub(super) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

impl Paced for Scripted {
    fn notes(&self) -> &Notes {
        &self.notes
    }
}

impl AsyncSocket for Scripted {
    fn socket_ref(&self) -> &Socket {
        unreachable!("a script has no socket")
    }

    fn socket_mut(&mut self) -> &mut Socket {
        unreachable!("a script has no socket")
    }

    fn new(_: isize) -> io::Result<Self> {
        unreachable!("a script is given")
    }

    fn poll_send(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.sent.fetch_add(1, Ordering::Relaxed);
        cx.waker().wake_by_ref();
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_send_to(
        &self,
        cx: &mut Context<'_>,
        buf: &[u8],
        _: &SocketAddr,
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, buf)
    }

    fn poll_recv<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<()>> {
        self.poll_recv_from(cx, buf).map_ok(drop)
    }

    fn poll_recv_from<B: BufMut>(
        &self,
        _: &mut Context<'_>,
        buf: &mut B,
    ) -> Poll<io::Result<SocketAddr>> {
        if !self.notes.may_read() || self.sent.load(Ordering::Relaxed) == 0 {
            return Poll::Pending;
        }
        let Some(step) = self.steps.lock().unwrap().pop_front() else {
            return Poll::Pending;
        };
        self.notes.has_read();
        self.read.fetch_add(1, Ordering::Relaxed);
        let step = step.map(|datagram| buf.put_slice(&datagram));
        Poll::Ready(self.notes.keep(step.map(|()| SocketAddr::new(0, 0))))
    }

    fn poll_recv_from_full(&self, _: &mut Context<'_>) -> Poll<io::Result<(Vec<u8>, SocketAddr)>> {
        unreachable!("netlink-proto does not use it")
    }
}
