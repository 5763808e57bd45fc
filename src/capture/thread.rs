//! The capture thread: rounds of reading, naps between them, the valve's guard, the end.
//!
//! Promises: [`Capture::new`] opens and joins, so that what can go wrong goes wrong before the
//! service calls itself ready; nothing is read before [`Capture::start`]. After
//! [`CaptureHandle::stop`] everything that waits is read, and losses told, before the thread ends.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bitflags::bitflags;

use super::filter::Program;
use super::guard::{self, Event, Guard, Report, Table};
use super::ledger::Ledger;
use super::reader::{Reader, Round, RoundError, Side, now};
use super::socket::{self, Group, Memory, Socket, Wake};
use super::stats::{self, CaptureStats};
use super::{CaptureError, Item, Sender, ValveChange, ValveConfig};
use crate::flow::{Gap, GapCause, GapKinds, Precision};

/// Between rounds that gave something. 500,000 flows created and flushed, CPU of the reader an event:
/// blocking recv 1.67 µs; recv until empty, then 2 ms: 0.74; 5 ms: 0.93; 10 ms: 0.94 (the buffers fall
/// out of the cache). recvmmsg with naps of 2 ms: 0.76 to 0.98, so the plain call stays.
const NAP: Duration = Duration::from_millis(2);

/// Waits before the guard is started again: the first, and the longest.
const GUARD_RETRY: Duration = Duration::from_millis(100);
const GUARD_RETRY_MAX: Duration = Duration::from_secs(30);

/// So long after the last drop entries may still be retained: hundreds of thousands take seconds to
/// come, without a drop where we keep up.
const RETAINED: Duration = Duration::from_secs(10);

/// Retained entries that have not been tried for so long are not retained for us: the kernel waits
/// a second (`HZ`) after the first failure, and 10 ms after the following ones.
const NOT_OURS: Duration = Duration::from_millis(1200);

/// The end waits for retained entries no longer than this: that second, and 300,000 of them.
const LINGER: Duration = Duration::from_secs(4);

/// Between looks at the kernel's list meanwhile.
const LINGER_NAP: Duration = Duration::from_millis(10);

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
    reliable: bool,
    valve: ValveConfig,
    guard_program: Option<PathBuf>,
    reader: Reader<Arc<Socket>>,
    ledger: Ledger,
    buffer: ReceiveBuffer,
    stats: Arc<CaptureStats>,
    wake: Wake,
}

#[derive(Clone, Debug)]
struct Sockets {
    destroys: Option<Arc<Socket>>,
    events: Option<Arc<Socket>>,
    event_groups: Vec<Group>,
}

impl Sockets {
    /// Ends the flow of events: what is queued then is finite.
    fn leave(&self) -> std::io::Result<()> {
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

    /// False when nothing filters in the kernel now.
    fn set_filter(&self, program: Option<&Program>) -> Result<bool, CaptureError> {
        for socket in [&self.destroys, &self.events].into_iter().flatten() {
            let Err(error) = socket.set_filter(program) else { continue };
            // Programs count against net.core.optmem_max, the old one and the new one together.
            if socket.set_filter(None).and_then(|()| socket.set_filter(program)).is_err() {
                tracing::warn!(
                    %error,
                    "the kernel does not take the socket filter; filtering in user space alone \
                     (net.core.optmem_max may be too small)"
                );
                self.detach()?;
                return Ok(false);
            }
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
        }
        Ok(())
    }
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
        let sockets = Sockets { destroys, events, event_groups: groups(wants) };
        sockets.set_filter(config.filter.as_ref())?;
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
            reader: Reader::new(destroys, events, stats.clone()),
            reliable: config.reliable && sockets.destroys.is_some(),
            sockets,
            valve: config.valve,
            guard_program: config.guard_program,
            ledger: Ledger::new(drops, now()),
            buffer,
            stats,
            wake: Wake::new().map_err(|e| CaptureError::of("cannot make an eventfd", e))?,
        })
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
            guard: self.reliable.then(|| GuardKeeper::new(self.guard_program, self.valve)),
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
struct Shared {
    sockets: Sockets,
    stop: AtomicBool,
    wake: Wake,
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

    /// Waits for the end of the thread, and gives why it ended when that was not asked for.
    pub fn join(self) -> Result<(), CaptureError> {
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
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

/// Starts the guard, and starts it again.
#[derive(Debug)]
struct GuardKeeper {
    program: Option<PathBuf>,
    config: ValveConfig,
    running: Option<Guard>,
    started: Instant,
    /// When the next start is due, while none runs.
    due: Instant,
    pause: Duration,
}

impl GuardKeeper {
    fn new(program: Option<PathBuf>, config: ValveConfig) -> Self {
        let now = Instant::now();
        GuardKeeper { program, config, running: None, started: now, due: now, pause: GUARD_RETRY }
    }

    /// Puts the next start off, each time twice as long, unless the last one worked for a while.
    fn put_off(&mut self) {
        if self.running.take().is_some() && self.started.elapsed() > GUARD_RETRY_MAX {
            self.pause = GUARD_RETRY;
        }
        self.due = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(GUARD_RETRY_MAX);
    }
}

#[derive(Debug)]
struct Worker {
    sockets: Sockets,
    reader: Reader<Arc<Socket>>,
    ledger: Ledger,
    guard: Option<GuardKeeper>,
    /// Reliable mode was on once; before that its absence is no change.
    announced: bool,
    stats: Arc<CaptureStats>,
    shared: Arc<Shared>,
    out: Sender,
    moving: Moving,
}

/// Whether the drop counter of the DESTROY socket moves: then the kernel may retain entries.
#[derive(Debug, Default)]
struct Moving {
    drops: Option<u32>,
    at: Option<Instant>,
}

impl Moving {
    fn see(&mut self, memory: Memory) {
        if self.drops.replace(memory.drops).is_some_and(|drops| drops != memory.drops) {
            self.at = Some(Instant::now());
        }
    }
}

impl Worker {
    fn run(mut self) -> Result<(), CaptureError> {
        match self.rounds_until_stopped().and_then(|()| self.finish()) {
            Ok(()) => Ok(()),
            // The pipeline is gone: it knows why.
            Err(RoundError::Closed) => Ok(()),
            Err(RoundError::Io(source)) => {
                Err(CaptureError::Fatal { what: "cannot read conntrack events", source })
            }
        }
    }

    fn rounds_until_stopped(&mut self) -> Result<(), RoundError> {
        loop {
            self.tend_guard()?;
            let round = self.round()?;
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            if round.more {
                continue;
            }
            if round.datagrams > 0 {
                std::thread::sleep(NAP);
            } else {
                self.wait_for_events()?;
            }
        }
    }

    fn round(&mut self) -> Result<Round, RoundError> {
        let round = self.reader.round(&self.out)?;
        if let Some(memory) = round.destroys {
            self.moving.see(memory);
            // With a guard it is the guard that says how far the losses go, because only it knows
            // when it switched.
            if self.guard.as_ref().is_none_or(|guard| guard.running.is_none()) {
                let gap = self.ledger.progressed(memory.drops, now());
                self.tell(gap)?;
            }
        }
        Ok(round)
    }

    /// For ever when nothing happens: an idle agent is not woken. No loss can go unseen meanwhile,
    /// because nothing is dropped from an empty queue.
    fn wait_for_events(&self) -> Result<(), RoundError> {
        let keeper = self.guard.as_ref();
        let running = keeper.and_then(|keeper| keeper.running.as_ref());
        let timeout = match (keeper, running) {
            (Some(keeper), None) => Some(keeper.due.saturating_duration_since(Instant::now())),
            _ => None,
        };
        socket::wait(
            [
                self.sockets.destroys.as_ref().map(|socket| socket.as_fd()),
                self.sockets.events.as_ref().map(|socket| socket.as_fd()),
                Some(self.shared.wake.as_fd()),
                running.map(|guard| guard.pipe().as_fd()),
            ],
            timeout,
        )?;
        Ok(())
    }

    /// Reads the guard's reports; starts it when there is none.
    fn tend_guard(&mut self) -> Result<(), RoundError> {
        let (Some(keeper), Some(socket)) = (&mut self.guard, &self.sockets.destroys) else {
            return Ok(());
        };
        if keeper.running.is_none() {
            if Instant::now() < keeper.due {
                return Ok(());
            }
            let started = socket
                .duplicate()
                .and_then(|fd| Guard::start(keeper.program.as_deref(), fd, &keeper.config));
            match started {
                Ok(guard) => {
                    tracing::debug!(pid = guard.id(), "valve guard started");
                    keeper.running = Some(guard);
                    keeper.started = Instant::now();
                    stats::add(&self.stats.guard_starts, 1);
                }
                Err(error) => {
                    tracing::warn!(
                        %error, retry_in = ?keeper.pause,
                        "cannot start the valve guard; reliable mode stays off"
                    );
                    keeper.put_off();
                    return Ok(());
                }
            }
        }
        self.read_reports()
    }

    fn read_reports(&mut self) -> Result<(), RoundError> {
        loop {
            let Some(guard) = self.guard.as_mut().and_then(|keeper| keeper.running.as_mut()) else {
                return Ok(());
            };
            match guard.next_report() {
                Ok(Some(report)) => self.follow(report)?,
                Ok(None) => return Ok(()),
                Err(error) => return self.lose_guard(&error),
            }
        }
    }

    /// Does in the books what the guard did in the kernel.
    fn follow(&mut self, report: Report) -> Result<(), RoundError> {
        match report.event {
            Event::Armed => {
                let gap = self.ledger.armed(report.reading, report.at);
                self.tell(gap)?;
                self.stats.reliable_active.store(true, Ordering::Relaxed);
                if self.announced {
                    tracing::info!(report.entries, report.limit, "valve closed: reliable again");
                    self.announce(false, &report)?;
                }
                self.announced = true;
            }
            Event::Opened => {
                tracing::warn!(
                    report.entries,
                    report.limit,
                    "valve opened: the table fills while DESTROYs wait for us; they are lost and counted"
                );
                self.ledger.released(report.reading, GapCause::Valve, report.at);
                self.announce(true, &report)?;
            }
            Event::Progress => {
                let gap = self.ledger.progressed(report.reading.after, report.at);
                self.tell(gap)?;
            }
        }
        Ok(())
    }

    /// Without a guard reliable mode is off: traffic comes first.
    fn lose_guard(&mut self, error: &std::io::Error) -> Result<(), RoundError> {
        let Some(keeper) = &mut self.guard else { return Ok(()) };
        if let Some(guard) = &mut keeper.running {
            guard.end();
        }
        tracing::warn!(%error, retry_in = ?keeper.pause, "valve guard gone; reliable mode is off");
        keeper.put_off();
        self.take_over()
    }

    /// Switches reliable mode off in place of a guard that is gone, whatever state it left behind.
    fn take_over(&mut self) -> Result<(), RoundError> {
        let was_reliable = self.ledger.is_reliable();
        self.reconcile()?;
        let Some(socket) = &self.sockets.destroys else { return Ok(()) };
        let reading = guard::switch(socket, false)?;
        let at = now();
        self.ledger.released(reading, GapCause::Valve, at);
        if was_reliable {
            let (entries, limit) = Table::open().and_then(|table| table.read())?;
            self.announce(true, &Report { event: Event::Opened, reading, at, entries, limit })?;
        }
        Ok(())
    }

    /// Corrects the books when the guard died between switching and reporting.
    fn reconcile(&mut self) -> Result<(), RoundError> {
        if let Some(socket) = &self.sockets.destroys {
            self.ledger.reconcile(socket.is_reliable()?);
        }
        Ok(())
    }

    fn announce(&mut self, open: bool, report: &Report) -> Result<(), RoundError> {
        self.stats.reliable_active.store(!open, Ordering::Relaxed);
        if open {
            stats::add(&self.stats.valve_opens, 1);
        }
        self.out.push(Item::Valve(ValveChange {
            open,
            at: report.at,
            entries: report.entries,
            limit: report.limit,
        }))?;
        Ok(())
    }

    fn tell(&mut self, gap: Option<Gap>) -> Result<(), RoundError> {
        if let Some(gap) = gap {
            stats::add(&self.stats.destroys_lost, gap.events.unwrap_or(0));
            self.out.push(Item::Gap(gap))?;
        }
        Ok(())
    }

    /// Reads what waits, also in the kernel's own list, and tells the last losses.
    fn finish(&mut self) -> Result<(), RoundError> {
        let since = now();
        let mut retained = self.linger()?;
        if let Some(mut guard) = self.guard.as_mut().and_then(|keeper| keeper.running.take()) {
            guard.end();
            while let Ok(Some(report)) = guard.next_report() {
                self.follow(report)?;
            }
        }
        self.guard = None;
        self.reconcile()?;
        if let (true, Some(socket)) = (self.ledger.is_reliable(), &self.sockets.destroys) {
            let reading = guard::switch(socket, false)?;
            // Retained since we last looked.
            retained |= self.moving.drops.is_some_and(|drops| drops != reading.before);
            self.ledger.released(reading, GapCause::Overrun, now());
        }
        if retained {
            self.tell_retained(since)?;
        }
        self.stats.reliable_active.store(false, Ordering::Relaxed);
        // However fast events come, here is the end of them, and everything before it is read.
        self.sockets.leave()?;
        while self.reader.round(&self.out)?.more {}
        let Some(socket) = self.sockets.destroys.clone() else { return Ok(()) };
        let drops = socket.memory()?.drops;
        let gap = self.ledger.progressed(drops, now());
        self.tell(gap)
    }

    /// Waits for what the kernel retained, in bounded time. True when some may still be: with the
    /// socket closed the kernel forgets them, and nothing counts them.
    fn linger(&mut self) -> Result<bool, RoundError> {
        let end = Instant::now() + LINGER;
        loop {
            self.read_reports()?;
            let round = self.round()?;
            if round.more {
                if Instant::now() >= end {
                    return Ok(self.may_be_retained(&round));
                }
                continue;
            }
            if !self.may_be_retained(&round) || !socket::any_dying()? {
                return Ok(false);
            }
            if Instant::now() >= end {
                return Ok(true);
            }
            std::thread::sleep(LINGER_NAP);
        }
    }

    fn may_be_retained(&self, round: &Round) -> bool {
        let Some(since) = self.moving.at.map(|at| at.elapsed()) else { return false };
        self.ledger.is_reliable() && since < RETAINED && (since < NOT_OURS || round.datagrams > 0)
    }

    fn tell_retained(&mut self, since: u64) -> Result<(), RoundError> {
        self.out.push(Item::Gap(Gap {
            cause: GapCause::Overrun,
            events: None,
            precision: Precision::Unknown,
            kinds: GapKinds::DESTROY,
            from: since,
            to: now(),
            seqs: None,
        }))?;
        Ok(())
    }
}
