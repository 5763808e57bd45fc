//! Capture from outside: what is configured, opening, starting, stopping.
//!
//! Promises: [`Capture::new`] opens and joins, so that what can go wrong goes wrong before the
//! service calls itself ready; nothing is read before [`Capture::start`]. After
//! [`CaptureHandle::stop`] everything that waits is read, and losses told, before the thread ends.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use bitflags::bitflags;

use super::filter::Program;
use super::ledger::Ledger;
use super::reader::{Reader, Side, now};
use super::socket::{Group, Socket, Wake};
use super::stats::CaptureStats;
use super::worker::{GuardKeeper, Moving, Worker};
use super::{CaptureError, Sender, ValveConfig};
use crate::flow::GapKinds;

bitflags! {
    /// Which events are wanted.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Events: u8 {
        const NEW = 1 << 0;
        const UPDATE = 1 << 1;
        const DESTROY = 1 << 2;
        /// NEW and DESTROY of expectations.
        const EXPECT = 1 << 3;
    }
}

#[derive(Clone, Debug)]
pub struct CaptureConfig {
    pub events: Events,
    /// The kernel keeps DESTROYs that it could not deliver; needs the valve's guard.
    pub reliable: bool,
    /// Of each socket, as for `SO_RCVBUF`: the kernel lets the queue grow to twice that, and charges
    /// about 1,280 bytes an event.
    pub receive_buffer: usize,
    pub filter: Option<Program>,
    pub valve: ValveConfig,
    /// The guard's program; this very one when `None`. For tests, whose own program is no conntrail.
    pub guard_program: Option<PathBuf>,
}

/// What a socket's receive buffer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveBuffer {
    pub asked: usize,
    pub got: usize,
}

impl ReceiveBuffer {
    /// The kernel gave less: raise `net.core.rmem_max`, or give CAP_NET_ADMIN in the initial user
    /// namespace.
    pub fn is_capped(&self) -> bool {
        self.got < self.asked
    }
}

/// Open sockets; events queue up in them, and nobody reads yet.
#[derive(Debug)]
pub struct Capture {
    sockets: Sockets,
    filtered: bool,
    valve: ValveConfig,
    guard_program: Option<PathBuf>,
    reader: Reader<Arc<Socket>>,
    ledger: Ledger,
    buffer: ReceiveBuffer,
    stats: Arc<CaptureStats>,
    wake: Wake,
}

#[derive(Clone, Debug)]
pub(super) struct Sockets {
    pub(super) destroys: Option<Arc<Socket>>,
    pub(super) events: Option<Arc<Socket>>,
    event_groups: Vec<Group>,
    /// The netlink port of the guard's own requests.
    guard: Option<u32>,
}

impl Sockets {
    #[cfg(test)]
    pub(super) fn of_events(socket: Arc<Socket>) -> Self {
        Sockets { destroys: None, events: Some(socket), event_groups: Vec::new(), guard: None }
    }

    /// Ends the flow of events: what is queued then is finite.
    pub(super) fn leave(&self) -> std::io::Result<()> {
        if let Some(socket) = &self.destroys {
            socket.leave(Group::Destroy)?;
        }
        if let Some(socket) = &self.events {
            for group in &self.event_groups {
                socket.leave(*group)?;
            }
        }
        Ok(())
    }

    /// False when the kernel does nothing of the filter now.
    fn set_filter(&self, program: Option<&Program>) -> Result<bool, CaptureError> {
        let whole = self.with_own(program);
        for socket in [&self.destroys, &self.events].into_iter().flatten() {
            let Err(error) = socket.set_filter(whole.as_ref()) else { continue };
            // Programs count against net.core.optmem_max, the old one and the new one together.
            if socket.set_filter(None).and_then(|()| socket.set_filter(whole.as_ref())).is_ok() {
                continue;
            }
            if program.is_some() {
                tracing::warn!(
                    %error,
                    "the kernel does not take the socket filter; filtering in user space alone \
                     (net.core.optmem_max may be too small)"
                );
            }
            self.detach()?;
            return Ok(false);
        }
        Ok(program.is_some())
    }

    /// A filter that is no longer wanted must not stay: it would drop what is wanted now.
    fn detach(&self) -> Result<(), CaptureError> {
        for socket in [&self.destroys, &self.events].into_iter().flatten() {
            socket.set_filter(None).map_err(|source| CaptureError::Fatal {
                what: "cannot remove the socket filter",
                source,
            })?;
            // Without it the guard's own flow is recorded: no reason to fail.
            if let Some(own) = self.with_own(None) {
                let _ = socket.set_filter(Some(&own));
            }
        }
        Ok(())
    }

    /// The flow that the guard makes to wake the kernel ([`super::guard`]) is nobody's.
    fn with_own(&self, program: Option<&Program>) -> Option<Program> {
        match self.guard {
            Some(port) => Some(Program::without_port(port, program)),
            None => program.cloned(),
        }
    }
}

/// A netlink port that is no process id, which the kernel gives by itself.
fn guard_port() -> u32 {
    0x4000_0000 | std::process::id()
}

impl Capture {
    /// Opens the sockets in the network namespace of the calling thread.
    pub fn new(config: CaptureConfig) -> Result<Self, CaptureError> {
        let wants = config.events;
        let destroys = wants.contains(Events::DESTROY).then(open).transpose()?.map(Arc::new);
        let events = wants
            .intersects(Events::NEW | Events::UPDATE | Events::EXPECT)
            .then(open)
            .transpose()?
            .map(Arc::new);
        let guard = (config.reliable && destroys.is_some()).then(guard_port);
        let sockets = Sockets { destroys, events, event_groups: groups(wants), guard };
        let filtered = sockets.set_filter(config.filter.as_ref())?;
        let buffer = set_buffers(&sockets, config.receive_buffer)?;
        let failed = |e| CaptureError::of("cannot read SO_MEMINFO", e);
        let side = |socket: &Option<Arc<Socket>>, kinds| {
            socket.clone().map(|socket| Side::new(socket, kinds)).transpose().map_err(failed)
        };
        // Before the first event, so that the first drop is counted.
        let destroys = side(&sockets.destroys, GapKinds::DESTROY)?;
        let events = side(&sockets.events, gap_kinds(wants))?;
        let drops = destroys.as_ref().map_or(0, Side::drops);
        // DESTROY first: a flow that comes and goes while we join then has an end without a
        // beginning, as older flows have, and not a beginning without an end.
        if let Some(socket) = &sockets.destroys {
            join(socket, &[Group::Destroy])?;
        }
        if let Some(socket) = &sockets.events {
            join(socket, &sockets.event_groups)?;
        }
        let stats = Arc::<CaptureStats>::default();
        Ok(Capture {
            filtered,
            reader: Reader::new(destroys, events, stats.clone()),
            sockets,
            valve: config.valve,
            guard_program: config.guard_program,
            ledger: Ledger::new(drops, now()),
            buffer,
            stats,
            wake: Wake::new().map_err(|e| CaptureError::of("cannot make an eventfd", e))?,
        })
    }

    /// Whether the kernel took the filter.
    pub fn filters_in_kernel(&self) -> bool {
        self.filtered
    }

    /// The receive buffer that each socket got.
    pub fn receive_buffer(&self) -> ReceiveBuffer {
        self.buffer
    }

    pub fn stats(&self) -> Arc<CaptureStats> {
        self.stats.clone()
    }

    /// Starts the thread. It, and the guard that it starts, run in the network namespace of the
    /// calling thread, which must be the one of [`Capture::new`].
    pub fn start(self, out: Sender) -> Result<CaptureHandle, CaptureError> {
        let shared = Arc::new(Shared {
            sockets: self.sockets.clone(),
            stop: AtomicBool::new(false),
            wake: self.wake,
        });
        let worker = Worker {
            guard: self
                .sockets
                .guard
                .map(|port| GuardKeeper::new(self.guard_program, self.valve, port)),
            sockets: self.sockets,
            reader: self.reader,
            ledger: self.ledger,
            announced: false,
            stats: self.stats.clone(),
            shared: shared.clone(),
            out,
            moving: Moving::default(),
        };
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || worker.run())
            .map_err(|e| CaptureError::Fatal { what: "cannot start a thread", source: e })?;
        Ok(CaptureHandle { shared, stats: self.stats, thread })
    }
}

fn open() -> Result<Socket, CaptureError> {
    let socket =
        Socket::open().map_err(|e| CaptureError::of("cannot open a netfilter socket", e))?;
    socket
        .drop_only_what_does_not_fit()
        .map_err(|e| CaptureError::of("cannot set NETLINK_NO_ENOBUFS", e))?;
    Ok(socket)
}

fn set_buffers(sockets: &Sockets, asked: usize) -> Result<ReceiveBuffer, CaptureError> {
    let mut got = usize::MAX;
    for socket in [&sockets.destroys, &sockets.events].into_iter().flatten() {
        let size = socket
            .set_receive_buffer(asked)
            .map_err(|e| CaptureError::of("cannot set the receive buffer", e))?;
        got = got.min(size);
    }
    Ok(ReceiveBuffer { asked, got })
}

fn join(socket: &Socket, groups: &[Group]) -> Result<(), CaptureError> {
    for group in groups {
        socket.join(*group).map_err(|e| CaptureError::of("cannot join a conntrack group", e))?;
    }
    Ok(())
}

fn groups(wanted: Events) -> Vec<Group> {
    let mut groups = Vec::new();
    for (events, joined) in [
        (Events::NEW, &[Group::New][..]),
        (Events::UPDATE, &[Group::Update]),
        (Events::EXPECT, &[Group::ExpectNew, Group::ExpectDestroy]),
    ] {
        if wanted.contains(events) {
            groups.extend_from_slice(joined);
        }
    }
    groups
}

/// What a drop on the socket of everything but DESTROY may have been.
fn gap_kinds(wanted: Events) -> GapKinds {
    let mut kinds = GapKinds::empty();
    kinds.set(GapKinds::NEW, wanted.contains(Events::NEW));
    kinds.set(GapKinds::UPDATE, wanted.contains(Events::UPDATE));
    let expect = wanted.contains(Events::EXPECT);
    kinds.set(GapKinds::EXPECT_NEW | GapKinds::EXPECT_DESTROY, expect);
    kinds
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) sockets: Sockets,
    pub(super) stop: AtomicBool,
    pub(super) wake: Wake,
}

/// The running thread. Dropping the handle does not stop it.
#[derive(Debug)]
pub struct CaptureHandle {
    shared: Arc<Shared>,
    stats: Arc<CaptureStats>,
    thread: JoinHandle<Result<(), CaptureError>>,
}

impl CaptureHandle {
    /// Asks the thread to read what waits and to end.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.raise();
    }

    /// Waits for the end of the thread, and gives why it ended when that was not asked for. A panic
    /// is an error too: what was handed on before it can still be delivered.
    pub fn join(self) -> Result<(), CaptureError> {
        match self.thread.join() {
            Ok(result) => result,
            // The panic's own words are on stderr already.
            Err(panic) => Err(CaptureError::Fatal {
                what: "the capture thread panicked",
                source: std::io::Error::other(words(&*panic)),
            }),
        }
    }

    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Replaces the filter in the kernel. False when none is there now, because none was given or
    /// the kernel did not take it: user space filters in any case. The old one never stays.
    pub fn set_filter(&self, program: Option<&Program>) -> Result<bool, CaptureError> {
        self.shared.sockets.set_filter(program)
    }

    pub fn stats(&self) -> Arc<CaptureStats> {
        self.stats.clone()
    }
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_thread_is_an_error() {
        let sockets =
            Sockets { destroys: None, events: None, event_groups: Vec::new(), guard: None };
        let handle = CaptureHandle {
            shared: Arc::new(Shared {
                sockets,
                stop: AtomicBool::new(false),
                wake: Wake::new().unwrap(),
            }),
            stats: Arc::default(),
            thread: std::thread::spawn(|| panic!("a bug, number {}", 7)),
        };
        let error = handle.join().unwrap_err();
        assert_eq!(error.to_string(), "the capture thread panicked: a bug, number 7");
    }
}
