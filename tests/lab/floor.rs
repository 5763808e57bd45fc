//! The floor that the agent is measured against: the simplest reader there is. One socket joined
//! to NEW and DESTROY, a blocking `recv` of one message a call, and the message is thrown away.
//!
//! It decodes nothing but the message's type and keeps nothing. It has no receive time-out: that
//! would arm a timer at each wait and make the floor dearer than it is. A second thread, asleep
//! nearly always, wakes it at the end by a message of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use serde_json::json;

use super::Result;
use super::message::{self, Header, IPCTNL_MSG_CT_DELETE, IPCTNL_MSG_CT_NEW, NLMSG_NOOP};
use super::sys::{self, GROUP_DESTROY, GROUP_NEW, NetlinkSocket, Usage};

/// Larger than any event; only its first bytes are looked at.
const BUFFER: usize = 8192;

/// What a reader saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) new: u64,
    pub(crate) destroy: u64,
    pub(crate) drops: u64,
    pub(crate) usage: Usage,
}

impl Seen {
    pub(crate) fn events(&self) -> u64 {
        self.new + self.destroy
    }

    pub(crate) fn cpu_us_per_event(&self) -> f64 {
        self.usage.cpu.as_secs_f64() * 1e6 / self.events().max(1) as f64
    }

    /// Counts one received message by its type; false for anything but an event.
    pub(crate) fn count(&mut self, message: &[u8]) -> bool {
        match Header::parse(message).map(|header| header.kind) {
            Some(IPCTNL_MSG_CT_NEW) => self.new += 1,
            Some(IPCTNL_MSG_CT_DELETE) => self.destroy += 1,
            _ => return false,
        }
        true
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        json!({
            "events": self.events(),
            "new": self.new,
            "destroy": self.destroy,
            "drops": self.drops,
            "cpu_us_per_event": self.cpu_us_per_event(),
            "peak_rss_kib": self.usage.peak_rss_kib,
        })
    }
}

/// Ends a blocking reader: the reader looks at `stop` when a message that is no event wakes it.
#[derive(Debug)]
pub(crate) struct Stop {
    pub(crate) events: AtomicU64,
    pub(crate) stop: AtomicBool,
}

impl Stop {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { events: AtomicU64::new(0), stop: AtomicBool::new(false) })
    }

    /// Waits until no event came for `quiet`, then wakes the socket `port` for the last time.
    /// `waker` must be in the same namespace.
    pub(crate) fn when_quiet(
        &self,
        quiet: Duration,
        waker: &NetlinkSocket,
        port: u32,
    ) -> Result<()> {
        let mut before = self.events.load(Ordering::Relaxed);
        loop {
            std::thread::sleep(quiet);
            let now = self.events.load(Ordering::Relaxed);
            if now == before {
                break;
            }
            before = now;
        }
        self.stop.store(true, Ordering::Relaxed);
        Ok(waker.send_to(port, &message::noop())?)
    }
}

/// Reads and discards until `expect` events came, or until it is stopped. The caller adds usage.
pub(crate) fn read(socket: &NetlinkSocket, stop: &Stop, expect: Option<u64>) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = socket.receive(&mut buffer, 0)?;
        if seen.count(&buffer[..length]) {
            let events = seen.events();
            stop.events.store(events, Ordering::Relaxed);
            if expect == Some(events) {
                break;
            }
            continue;
        }
        let kind = Header::parse(&buffer[..length]).map(|header| header.kind);
        if kind != Some(NLMSG_NOOP) {
            return Err(format!("the kernel sent a message of type {kind:?}").into());
        }
        if stop.stop.load(Ordering::Relaxed) {
            break;
        }
    }
    seen.drops = u64::from(socket.drops()?);
    Ok(seen)
}

/// `lab floor`: reads until SIGTERM and then `quiet` without an event, or until `expect` events.
/// The process's whole usage counts, as it does for the agent.
pub(crate) fn run(buffer: usize, quiet: Duration, expect: Option<u64>) -> Result<Seen> {
    let mut terminate = SigSet::empty();
    terminate.add(Signal::SIGTERM);
    // Before the second thread starts, so that both have it blocked and only `wait` takes it.
    terminate.thread_block()?;

    let socket = NetlinkSocket::listen(&[GROUP_NEW, GROUP_DESTROY], buffer)?;
    let waker = NetlinkSocket::open()?;
    let port = socket.port_id()?;
    let stop = Stop::new();
    let theirs = Arc::clone(&stop);
    std::thread::spawn(move || {
        let ended = terminate.wait().map_err(Into::into);
        ended
            .and_then(|_| theirs.when_quiet(quiet, &waker, port))
            .expect("the reader can be woken");
    });
    sd_notify::notify(&[sd_notify::NotifyState::Ready])?;
    let mut seen = read(&socket, &stop, expect)?;
    seen.usage = sys::process_usage()?;
    Ok(seen)
}
