//! Drives one sink: reads batches at its cursor, formats, delivers, retries, acknowledges.
//!
//! Promises: records go out in order, each acknowledged after the sink took its line and not
//! before; an error is tried again for ever, with a growing wait that commands interrupt; a sink
//! that can never work gives its place up loudly. Never delays another sink, holds at most one chunk
//! of formatted lines, and logs a recurring error at a bounded rate.

use std::hash::{BuildHasher, RandomState};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::flow::{Batch, Identity, View};
use crate::format::Format;
use crate::spool::{Cursor, Next, Waker};

use super::retry::{Backoff, Complaint, Say};
use super::{Chunk, Sink, SinkError, SinkStats};

/// A chunk is handed out when it has this much: large enough that the cost of a write is spread over
/// hundreds of records, small enough to stay in a core's second-level cache between formatting and
/// writing (file.rs has figures).
const CHUNK: usize = 256 * 1024;

/// How often a sink with nothing to do looks after itself.
const TICK: Duration = Duration::from_secs(1);

/// What makes lines and what takes them, under which name.
#[derive(Debug)]
pub struct SinkParts {
    pub name: String,
    pub sink: Box<dyn Sink>,
    pub format: Box<dyn Format>,
    pub stats: Arc<SinkStats>,
}

/// How a sink's thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything that there was is delivered.
    Drained,
    /// The time was over first; the cursor stays where it is.
    Deadline,
    /// The reader went away: nobody lacks the records that are left; its cursor is forgotten.
    Gone(String),
    /// The sink can't take records any more; its cursor is forgotten.
    Fatal(String),
    /// The thread did not end in time, for example in a write to a hung file system.
    Stuck,
}

/// What became of the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkReport {
    /// Of its [`SinkHandle`]: names may be used again.
    pub id: u64,
    pub name: String,
    pub outcome: Outcome,
    /// Records acknowledged.
    pub acked: u64,
    /// Records not delivered.
    pub pending: u64,
    /// Records that the spool gave up before this sink had them.
    pub lapped: u64,
}

/// A running sink. Dropping it leaves the thread to itself.
#[derive(Debug)]
pub struct SinkHandle {
    id: u64,
    name: String,
    shared: Arc<Shared>,
    waker: Waker,
    stats: Arc<SinkStats>,
    ended: mpsc::Receiver<SinkReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// The spool is closed and everything is read.
    End,
    /// Everything that is there now is read; then the cursor is forgotten.
    Empty,
}

#[derive(Debug, Default)]
struct Commands {
    reopen: bool,
    replace: Option<SinkParts>,
    stop: Option<(Until, Instant)>,
    /// The thread ends: it obeys no more.
    over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    commands: Mutex<Commands>,
    changed: Condvar,
    /// There are commands: saves the lock for every chunk.
    any: AtomicBool,
}

/// Starts the thread of a sink. `on_end` runs on it, once, whatever ended it: an agent whose stdout
/// was closed ends itself there.
pub fn start(
    cursor: Cursor,
    parts: SinkParts,
    identity: Arc<Identity>,
    on_end: impl FnOnce(&SinkReport) + Send + 'static,
) -> std::io::Result<SinkHandle> {
    let (name, stats) = (parts.name.clone(), parts.stats.clone());
    let (id, waker) = (cursor.id(), cursor.waker());
    let shared = Arc::new(Shared::default());
    let (report_to, ended) = mpsc::channel();
    let mut driver = Driver {
        cursor,
        parts,
        identity,
        shared: shared.clone(),
        stop: None,
        batch: None,
        chunk: Chunk::default(),
        seqs: Vec::new(),
        done: 0,
        backoff: Backoff::new(RandomState::new().hash_one(&name)),
        complaint: Complaint::default(),
        delivery_failed: false,
    };
    // The kernel shows 15 bytes of a thread's name.
    let thread = thread::Builder::new().name(format!("sink-{name:.10}"));
    let spawned = thread.spawn(move || {
        // A panic in a format or a sink is a bug; the agent still has to learn that the sink is gone.
        let outcome = match std::panic::catch_unwind(AssertUnwindSafe(|| driver.run())) {
            Ok(outcome) => {
                driver.close_sink();
                outcome
            }
            Err(_) => Outcome::Fatal("the sink's thread panicked".to_owned()),
        };
        // Whatever ended it: it can't be kept any more.
        driver.shared.lock().over = true;
        let report = driver.finish(outcome);
        on_end(&report);
        // Nobody may be waiting for it.
        let _ = report_to.send(report);
    });
    if let Err(error) = spawned {
        // Without a thread it would hold up the spool for ever.
        waker.forget();
        return Err(error);
    }
    Ok(SinkHandle { id, name, shared, waker, stats, ended })
}

impl SinkHandle {
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn stats(&self) -> &Arc<SinkStats> {
        &self.stats
    }

    /// Closes the sink's file and opens it again.
    pub fn reopen(&self) {
        self.command(|commands| commands.reopen = true);
    }

    /// Goes on with another sink, format or name at the first record that is not acknowledged. One
    /// that retires is kept; when it is too late for that, the parts come back.
    pub fn replace(&mut self, parts: SinkParts) -> Result<(), SinkParts> {
        let (name, stats) = (parts.name.clone(), parts.stats.clone());
        {
            let mut commands = self.shared.lock();
            if commands.over {
                return Err(parts);
            }
            commands.replace = Some(parts);
            commands.stop = None;
            self.shared.any.store(true, Ordering::Release);
        }
        (self.name, self.stats) = (name, stats);
        self.wake();
        Ok(())
    }

    /// Delivers until the spool's end (close it first, or nothing ends before the deadline), then
    /// ends. A second call may bring the deadline forward.
    pub fn stop(&self, deadline: Instant) {
        self.command(|commands| commands.stop = Some((Until::End, deadline)));
    }

    /// For a sink that the configuration no longer has: delivers what is there, ends, and gives up
    /// its place in the spool.
    pub fn retire(&self, deadline: Instant) {
        self.command(|commands| commands.stop = Some((Until::Empty, deadline)));
    }

    /// Waits for the thread's end, `timeout` at most.
    pub fn join(self, timeout: Duration) -> SinkReport {
        match self.ended.recv_timeout(timeout) {
            Ok(report) => report,
            // Disconnected: on_end panicked.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let (pending, lapped) = self.waker.pending();
                SinkReport {
                    id: self.id,
                    name: self.name,
                    outcome: Outcome::Stuck,
                    acked: self.stats.records_acked.get(),
                    pending,
                    lapped,
                }
            }
        }
    }

    fn command(&self, change: impl FnOnce(&mut Commands)) {
        {
            let mut commands = self.shared.lock();
            change(&mut commands);
            self.shared.any.store(true, Ordering::Release);
        }
        self.wake();
    }

    fn wake(&self) {
        self.shared.changed.notify_all();
        self.waker.wake();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Commands> {
        // Commands are single values: a poisoned lock guards nothing half-written.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps, but not past a command.
    fn sleep(&self, wait: Duration) {
        let deadline = Instant::now() + wait;
        let mut commands = self.lock();
        while !self.any.load(Ordering::Acquire) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.changed.wait_timeout(commands, left);
            commands = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

struct Driver {
    cursor: Cursor,
    parts: SinkParts,
    identity: Arc<Identity>,
    shared: Arc<Shared>,
    stop: Option<(Until, Instant)>,
    /// A batch of which the records from this index on are not formatted yet.
    batch: Option<(Arc<Batch>, usize)>,
    chunk: Chunk,
    /// The number of each record in `chunk`.
    seqs: Vec<u64>,
    /// How many records of `chunk` are delivered.
    done: usize,
    backoff: Backoff,
    complaint: Complaint,
    /// The last delivery failed: only another one can tell whether the trouble is over, as a file
    /// on a full disk can be opened.
    delivery_failed: bool,
}

impl Driver {
    fn run(&mut self) -> Outcome {
        self.work().unwrap_or_else(|end| match end {
            GivenUp::Gone(error) => Outcome::Gone(error),
            GivenUp::Fatal(error) => Outcome::Fatal(error),
        })
    }

    fn work(&mut self) -> Result<Outcome, GivenUp> {
        self.look_after_sink()?;
        loop {
            self.obey(true)?;
            if self.is_late() {
                if self.may_end() {
                    return Ok(Outcome::Deadline);
                }
                continue;
            }
            if self.done == self.chunk.len() {
                match self.gather() {
                    Gathered::Chunk => {}
                    Gathered::Nothing if !self.is_retiring() => {
                        self.look_after_sink()?;
                        continue;
                    }
                    Gathered::Nothing if self.may_end() => return Ok(Outcome::Drained),
                    Gathered::Nothing => continue,
                    Gathered::End => return Ok(Outcome::Drained),
                }
            }
            self.deliver()?;
        }
    }

    /// Whether the order to stop still stands. If it does, none can be given any more.
    fn may_end(&self) -> bool {
        let mut commands = self.shared.lock();
        commands.over = commands.stop == self.stop;
        commands.over
    }

    /// Fills the chunk from as many batches as are ready, waiting for the first only.
    fn gather(&mut self) -> Gathered {
        self.chunk.clear();
        self.seqs.clear();
        self.done = 0;
        loop {
            if let Some((batch, from)) = self.batch.take()
                && let Some(rest) = self.format(&batch, from)
            {
                self.batch = Some((batch, rest));
                return Gathered::Chunk;
            }
            let wait = if self.chunk.is_empty() { self.patience() } else { Duration::ZERO };
            match self.cursor.next(wait) {
                Next::Batch(batch) => {
                    // After a rewind the first ones may be delivered already.
                    let known = self.cursor_start().saturating_sub(batch.base_seq) as usize;
                    self.batch = Some((batch, known));
                }
                _ if !self.chunk.is_empty() => return Gathered::Chunk,
                Next::Idle => return Gathered::Nothing,
                Next::End => return Gathered::End,
            }
        }
    }

    /// Formats records of `batch` until the chunk is full; gives the first that did not fit.
    fn format(&mut self, batch: &Batch, from: usize) -> Option<usize> {
        for (index, record) in batch.records.iter().enumerate().skip(from) {
            if self.chunk.bytes.len() >= CHUNK {
                return Some(index);
            }
            let seq = batch.base_seq + index as u64;
            let view = View { identity: &self.identity, seq, record };
            self.parts.format.line(view, &mut self.chunk.bytes);
            self.chunk.ends.push(self.chunk.bytes.len());
            self.seqs.push(seq);
        }
        None
    }

    /// Hands the chunk out until all of it is taken, a command came or the time to stop.
    fn deliver(&mut self) -> Result<(), GivenUp> {
        while self.done < self.chunk.len() {
            let (done, result) = self.parts.sink.deliver(&self.chunk, self.done);
            self.acknowledge(done);
            let may_replace = !matches!(result, Err(SinkError::Busy));
            match result {
                Ok(()) => {
                    self.delivery_failed = false;
                    self.succeeded();
                }
                Err(SinkError::Retry(error)) => {
                    self.delivery_failed = true;
                    self.parts.stats.errors.add(1);
                    self.complain(&error);
                    let wait = self.backoff.wait();
                    self.shared.sleep(self.until_stop(wait));
                }
                Err(SinkError::Busy) => self.parts.stats.busy.add(1),
                Err(SinkError::Gone(why)) => return Err(GivenUp::Gone(why)),
                Err(SinkError::Fatal(error)) => {
                    self.parts.stats.errors.add(1);
                    return Err(GivenUp::Fatal(error));
                }
            }
            // In the middle of a line the same sink must go on.
            self.obey(may_replace)?;
            if self.is_late() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn acknowledge(&mut self, done: usize) {
        if done <= self.done {
            return;
        }
        let bytes = self.chunk.start(done) - self.chunk.start(self.done);
        self.parts.stats.bytes.add(bytes as u64);
        self.done = done;
        self.backoff.reset();
        self.parts.stats.records_acked.add(self.cursor.ack(self.seqs[done - 1] + 1));
        if done == self.chunk.len() {
            self.parts.stats.chunks.add(1);
        }
    }

    /// Carries out what was asked for meanwhile.
    fn obey(&mut self, may_replace: bool) -> Result<(), GivenUp> {
        if !self.shared.any.load(Ordering::Acquire) {
            return Ok(());
        }
        let (reopen, replace) = {
            let mut commands = self.shared.lock();
            self.stop = commands.stop;
            let replace = if may_replace { commands.replace.take() } else { None };
            // One that has to wait is found again at the next call.
            self.shared.any.store(commands.replace.is_some(), Ordering::Release);
            (std::mem::take(&mut commands.reopen), replace)
        };
        if let Some(parts) = replace {
            self.replace(parts);
        } else if reopen {
            self.parts.sink.reopen();
            self.parts.stats.reopened.add(1);
        } else {
            return Ok(());
        }
        self.look_after_sink()
    }

    fn replace(&mut self, parts: SinkParts) {
        self.close_sink();
        self.cursor.rename(&parts.name);
        self.parts = parts;
        // What was formatted for the old sink is formatted again.
        self.cursor.rewind();
        self.batch = None;
        self.chunk.clear();
        self.seqs.clear();
        self.done = 0;
        self.backoff.reset();
    }

    fn look_after_sink(&mut self) -> Result<(), GivenUp> {
        match self.parts.sink.idle() {
            Ok(()) if self.delivery_failed => {}
            Ok(()) => self.succeeded(),
            Err(SinkError::Busy) => {}
            Err(SinkError::Retry(error)) => self.complain(&error),
            Err(SinkError::Gone(why)) => return Err(GivenUp::Gone(why)),
            Err(SinkError::Fatal(error)) => return Err(GivenUp::Fatal(error)),
        }
        Ok(())
    }

    fn close_sink(&mut self) {
        if let Err(error) = self.parts.sink.close() {
            self.parts.stats.errors.add(1);
            tracing::error!(sink = self.parts.name, %error, "closing the sink failed");
        }
    }

    fn finish(self, mut outcome: Outcome) -> SinkReport {
        let (pending, lapped) = self.cursor.pending();
        if outcome == Outcome::Deadline && pending == 0 {
            outcome = Outcome::Drained;
        }
        let report = SinkReport {
            id: self.cursor.id(),
            name: self.parts.name.clone(),
            outcome,
            acked: self.parts.stats.records_acked.get(),
            pending,
            lapped,
        };
        let retired = self.is_retiring();
        match &report.outcome {
            Outcome::Gone(why) => {
                tracing::info!(sink = report.name, "the sink ends: {why}");
                self.cursor.forget();
            }
            Outcome::Fatal(error) => {
                tracing::error!(
                    sink = report.name,
                    not_delivered = report.pending,
                    "the sink is given up, it gets no more records: {error}"
                );
                self.cursor.forget();
            }
            Outcome::Drained if retired => self.cursor.forget(),
            Outcome::Deadline => {
                tracing::warn!(
                    sink = report.name,
                    not_delivered = report.pending,
                    "the time to stop is over, records are left"
                );
                if retired {
                    self.cursor.forget();
                }
            }
            Outcome::Drained | Outcome::Stuck => {}
        }
        report
    }

    fn succeeded(&mut self) {
        if let Some(Say::Works { errors, lasted }) = self.complaint.success(Instant::now()) {
            tracing::info!(
                sink = self.parts.name,
                errors,
                lasted_s = lasted.as_secs_f32(),
                "the sink works again"
            );
        }
    }

    fn complain(&mut self, error: &str) {
        if let Some(Say::Error { unsaid }) = self.complaint.error(Instant::now()) {
            tracing::warn!(
                sink = self.parts.name,
                pending = self.cursor.pending().0,
                unsaid,
                "the sink fails, its records wait: {error}"
            );
        }
    }

    fn cursor_start(&self) -> u64 {
        self.cursor.acked()
    }

    fn is_retiring(&self) -> bool {
        matches!(self.stop, Some((Until::Empty, _)))
    }

    fn is_late(&self) -> bool {
        self.stop.is_some_and(|(_, deadline)| Instant::now() >= deadline)
    }

    /// How long to wait for records.
    fn patience(&self) -> Duration {
        if self.is_retiring() {
            return Duration::ZERO;
        }
        self.until_stop(TICK)
    }

    fn until_stop(&self, wait: Duration) -> Duration {
        match self.stop {
            Some((_, deadline)) => wait.min(deadline.saturating_duration_since(Instant::now())),
            None => wait,
        }
    }
}

/// Why the sink can't go on.
enum GivenUp {
    Gone(String),
    Fatal(String),
}

enum Gathered {
    Chunk,
    Nothing,
    End,
}

#[cfg(test)]
mod tests;
