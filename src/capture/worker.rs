//! The capture thread at work: rounds of reading, naps between them, the valve's guard, the end.
//!
//! Promises: when it was told to stop, everything that waits is read and losses are told before it
//! ends, in bounded time; while no guard runs, reliable mode is off and that is recorded. Wakes once a
//! second while nothing happens.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::guard::{self, Event, Guard, Report, Table};
use super::ledger::Ledger;
use super::reader::{Looked, Reader, Round, RoundError, now};
use super::socket::{self, Memory, Socket};
use super::stats::{self, CaptureStats};
use super::thread::{Shared, Sockets};
use super::{CaptureError, Closed, Item, Sender, ValveChange, ValveConfig};
use crate::flow::{Gap, GapCause, GapKinds, Precision};

/// Between rounds that gave something. 500,000 flows created and flushed, CPU of the reader an event:
/// blocking recv 1.67 µs; recv until empty, then 2 ms: 0.74; 5 ms: 0.93; 10 ms: 0.94 (the buffers fall
/// out of the cache). recvmmsg with naps of 2 ms: 0.76 to 0.98, so the plain call stays.
const NAP: Duration = Duration::from_millis(2);

/// The longest wait for events. A burst may overrun a small buffer before we wake, and then the gap
/// begins at the last look: so it is never longer than this. A look takes some ten system calls.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// Waits before the guard is started again: the first, and the longest.
const GUARD_RETRY: Duration = Duration::from_millis(100);
const GUARD_RETRY_MAX: Duration = Duration::from_secs(30);

/// So long after the last drop entries may still be retained: hundreds of thousands take seconds to
/// come, without a drop where we keep up.
const RETAINED: Duration = Duration::from_secs(10);

/// Entries that have not been tried for so long are not retained for us: the kernel waits
/// a second (`HZ`) after the first failure, and 10 ms after the following ones.
const NOT_OURS: Duration = Duration::from_millis(1200);

/// The end waits for retained entries no longer than this: that second, and 300,000 of them.
const LINGER: Duration = Duration::from_secs(4);

/// Between looks at the kernel's list meanwhile.
const LINGER_NAP: Duration = Duration::from_millis(10);

/// Starts the guard, and starts it again.
#[derive(Debug)]
pub(super) struct GuardKeeper {
    program: Option<PathBuf>,
    config: ValveConfig,
    /// The netlink port of its own requests.
    port: u32,
    running: Option<Guard>,
    started: Instant,
    /// When the next start is due, while none runs.
    due: Instant,
    pause: Duration,
}

impl GuardKeeper {
    pub(super) fn new(program: Option<PathBuf>, config: ValveConfig, port: u32) -> Self {
        let now = Instant::now();
        GuardKeeper {
            program,
            config,
            port,
            running: None,
            started: now,
            due: now,
            pause: GUARD_RETRY,
        }
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
pub(super) struct Worker {
    pub(super) sockets: Sockets,
    pub(super) reader: Reader<Arc<Socket>>,
    pub(super) ledger: Ledger,
    pub(super) guard: Option<GuardKeeper>,
    /// Reliable mode was on once; before that its absence is no change.
    pub(super) announced: bool,
    pub(super) stats: Arc<CaptureStats>,
    pub(super) shared: Arc<Shared>,
    pub(super) out: Sender,
    pub(super) moving: Moving,
}

/// Whether the drop counter of the DESTROY socket moves: then the kernel may retain entries.
#[derive(Debug, Default)]
pub(super) struct Moving {
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
    /// Runs until it is told to stop, or nobody takes the batches any more.
    pub(super) fn run(mut self) -> Result<(), CaptureError> {
        match self.rounds_until_stopped().and_then(|()| self.finish()) {
            Ok(()) => Ok(()),
            // The pipeline is gone, and knows why: nobody is left to tell a gap to.
            Err(RoundError::Closed) => self.reader.count_last_drops().map_err(unreadable),
            Err(RoundError::Io(source)) => {
                // A second error adds nothing to the first, and where nobody takes the gap any more
                // the pipeline knows why.
                let _ = self.give_up();
                Err(unreadable(source))
            }
        }
    }

    /// What the sockets hold is not read any more: how much that is, nobody knows.
    fn give_up(&mut self) -> Result<(), RoundError> {
        self.reader.hand_on_held(&self.out)?;
        let (kinds, from) = self.reader.unread();
        self.tell_unknown(kinds, from)?;
        self.end_guard()?;
        self.reader.count_last_drops()?;
        self.tell_last_losses()
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
        if let Some(look) = round.destroys {
            self.moving.see(look.memory);
            // With a guard it is the guard that says how far the losses go, because only it knows
            // when it switched.
            if self.guard.as_ref().is_none_or(|guard| guard.running.is_none()) {
                let gap = self.ledger.progressed(look.memory.drops, look.at);
                self.tell(gap)?;
            }
        }
        Ok(round)
    }

    /// No loss can go unseen meanwhile: what is dropped is dropped behind something to be read.
    fn wait_for_events(&mut self) -> Result<(), RoundError> {
        let keeper = self.guard.as_ref();
        let running = keeper.and_then(|keeper| keeper.running.as_ref());
        let timeout = match (keeper, running) {
            (Some(keeper), None) => keeper.due.saturating_duration_since(Instant::now()),
            _ => IDLE_LOOK,
        };
        socket::wait(
            [
                self.sockets.destroys.as_ref().map(|socket| socket.as_fd()),
                self.sockets.events.as_ref().map(|socket| socket.as_fd()),
                Some(self.shared.wake.as_fd()),
                running.map(|guard| guard.pipe().as_fd()),
            ],
            Some(timeout.min(IDLE_LOOK)),
        )?;
        if let Some(look) = self.reader.woke()? {
            self.ledger.woke(look.memory.drops, look.at);
        }
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
            let started = socket.duplicate().and_then(|fd| {
                Guard::start(keeper.program.as_deref(), fd, &keeper.config, keeper.port)
            });
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
                    self.announce(false, report.at.to, Some((report.entries, report.limit)))?;
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
                self.announce(true, report.at.to, Some((report.entries, report.limit)))?;
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
        // What it says itself comes before the end of its pipe.
        let cause = keeper.running.as_mut().and_then(Guard::end);
        let error = cause.as_ref().unwrap_or(error);
        tracing::warn!(%error, retry_in = ?keeper.pause, "valve guard gone; reliable mode is off");
        keeper.put_off();
        self.take_over()
    }

    /// Switches reliable mode off in place of a guard that is gone, whatever state it left behind.
    fn take_over(&mut self) -> Result<(), RoundError> {
        let was_reliable = self.ledger.is_reliable();
        self.reconcile()?;
        let Some(socket) = &self.sockets.destroys else { return Ok(()) };
        let from = now();
        let reading = guard::switch(socket, false)?;
        let at = Looked { from, to: now() };
        self.ledger.released(reading, GapCause::Valve, at);
        if was_reliable {
            let table = Table::open().and_then(|table| table.read());
            if let Err(error) = &table {
                tracing::warn!(%error, "cannot read nf_conntrack_count");
            }
            self.announce(true, at.to, table.ok())?;
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

    /// `table`: its entries and their limit, where they are known.
    fn announce(
        &mut self,
        open: bool,
        at: u64,
        table: Option<(u64, u64)>,
    ) -> Result<(), RoundError> {
        self.stats.reliable_active.store(!open, Ordering::Relaxed);
        if open {
            stats::add(&self.stats.valve_opens, 1);
        }
        self.out.push(Item::Valve(ValveChange {
            open,
            at,
            entries: table.map(|(entries, _)| entries),
            limit: table.map(|(_, limit)| limit),
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
        self.end_guard()?;
        if let (true, Some(socket)) = (self.ledger.is_reliable(), &self.sockets.destroys) {
            let from = now();
            let reading = guard::switch(socket, false)?;
            // Retained since we last looked.
            retained |= self.moving.drops.is_some_and(|drops| drops != reading.before);
            self.ledger.released(reading, GapCause::Overrun, Looked { from, to: now() });
        }
        if retained {
            self.tell_unknown(GapKinds::DESTROY, since)?;
        }
        self.stats.reliable_active.store(false, Ordering::Relaxed);
        // However fast events come, here is the end of them, and everything before it is read.
        self.sockets.leave()?;
        while self.reader.round(&self.out)?.more {}
        self.tell_last_losses()
    }

    /// From here on nobody but us switches reliable mode.
    fn end_guard(&mut self) -> Result<(), RoundError> {
        if let Some(mut guard) = self.guard.as_mut().and_then(|keeper| keeper.running.take()) {
            let _ = guard.end();
            while let Ok(Some(report)) = guard.next_report() {
                self.follow(report)?;
            }
        }
        self.guard = None;
        self.reconcile()
    }

    fn tell_last_losses(&mut self) -> Result<(), RoundError> {
        let Some(socket) = self.sockets.destroys.clone() else { return Ok(()) };
        let from = now();
        let drops = socket.memory()?.drops;
        let gap = self.ledger.progressed(drops, Looked { from, to: now() });
        self.tell(gap)
    }

    /// Waits for what the kernel retained, in bounded time. True when some may still be: with the
    /// socket closed the kernel forgets them, and nothing counts them.
    fn linger(&mut self) -> Result<bool, RoundError> {
        let end = Instant::now() + LINGER;
        let mut blind = false;
        loop {
            self.read_reports()?;
            let round = self.round()?;
            if round.more {
                if Instant::now() >= end {
                    return Ok(self.may_be_retained(&round));
                }
                continue;
            }
            let may_be = self.may_be_retained(&round);
            if !may_be || Instant::now() >= end {
                return Ok(may_be);
            }
            if round.datagrams > 0 {
                // They may be coming just now, as fast as a small buffer lets them.
                std::thread::sleep(NAP);
            } else {
                match socket::any_dying() {
                    Ok(true) => {}
                    Ok(false) => return Ok(false),
                    // There may be some, then: wait as long as for those that we know of.
                    Err(error) if !blind => {
                        tracing::warn!(%error, "cannot ask the kernel for undelivered DESTROYs");
                        blind = true;
                    }
                    Err(_) => {}
                }
                std::thread::sleep(LINGER_NAP);
            }
        }
    }

    fn may_be_retained(&self, round: &Round) -> bool {
        let Some(since) = self.moving.at.map(|at| at.elapsed()) else { return false };
        self.ledger.is_reliable() && since < RETAINED && (since < NOT_OURS || round.datagrams > 0)
    }

    fn tell_unknown(&self, kinds: GapKinds, since: u64) -> Result<(), Closed> {
        self.out.push(Item::Gap(Gap {
            cause: GapCause::Overrun,
            events: None,
            precision: Precision::Unknown,
            kinds,
            from: since,
            to: now(),
            seqs: None,
        }))
    }
}

fn unreadable(source: std::io::Error) -> CaptureError {
    CaptureError::Fatal { what: "cannot read conntrack events", source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::capture::queue;
    use crate::capture::reader::Side;
    use crate::capture::socket::Wake;

    #[test]
    fn a_socket_that_cannot_be_read_any_more_is_said_to_have_lost_what_it_held() {
        // The other end goes without having read: ECONNRESET.
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"x").unwrap();
        let socket = Arc::new(Socket::from_fd(ours.into()));
        let stats = Arc::<CaptureStats>::default();
        let since = now();
        let events = Side::new(socket.clone(), GapKinds::NEW).unwrap();
        drop(theirs);
        let sockets = Sockets::of_events(socket);
        let (out, rx) = queue(1 << 20);
        let worker = Worker {
            guard: None,
            reader: Reader::new(None, Some(events), stats.clone()),
            ledger: Ledger::new(0, since),
            announced: false,
            stats,
            shared: Arc::new(Shared {
                sockets: sockets.clone(),
                stop: AtomicBool::new(false),
                wake: Wake::new().unwrap(),
            }),
            sockets,
            out,
            moving: Moving::default(),
        };
        let error = worker.run().unwrap_err();
        assert!(matches!(error, CaptureError::Fatal { .. }), "{error:?}");
        let Ok(Some(Item::Gap(gap))) = rx.pop(Duration::ZERO) else { panic!("no gap") };
        assert_eq!((gap.kinds, gap.precision), (GapKinds::NEW, Precision::Unknown));
        assert!(gap.from >= since && gap.from <= gap.to);
    }
}
