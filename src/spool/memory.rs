//! The log in memory: for those who need no promise beyond the process, and the part of the disk
//! spool that serves sinks that keep up.
//!
//! Batches stay until every cursor has acknowledged them. `bytes` counts what is kept against
//! `max_size`; one batch always fits, or a batch larger than the bound would wait for ever.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::flow::{Batch, Body, Gap, GapCause, GapKinds, Precision, Record};

/// Empty record buffers kept for use again: fresh ones cost a page fault every 4 KiB.
const MAX_SPARE: usize = 8;

/// What to do with new records when the spool is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// Wait: the queue fills, then the kernel keeps what it can.
    #[default]
    Block,
    /// Give up the oldest batches, for every sink that has not had them yet.
    DropOldest,
    /// Give up the new records, before they get numbers.
    DropNewest,
}

impl WhenFull {
    pub const ALL: &[WhenFull] = &[WhenFull::Block, WhenFull::DropOldest, WhenFull::DropNewest];

    pub fn name(self) -> &'static str {
        match self {
            WhenFull::Block => "block",
            WhenFull::DropOldest => "drop_oldest",
            WhenFull::DropNewest => "drop_newest",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpoolConfig {
    pub max_size: usize,
    pub when_full: WhenFull,
}

/// Nothing more can be appended: the agent is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the spool is closed")]
pub struct SpoolClosed;

/// How many records went which way, for the balance at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolTally {
    /// Numbered records, the spool's own gap records included.
    pub appended: u64,
    /// Numbered records given up by `drop_oldest`.
    pub dropped_oldest: u64,
    /// Records given up by `drop_newest`; these have no numbers.
    pub dropped_newest: u64,
    /// Gap records that the spool made itself.
    pub gaps: u64,
}

#[derive(Debug)]
struct Kept {
    batch: Arc<Batch>,
    weight: usize,
}

#[derive(Debug, Default)]
struct Position {
    /// The next number to read.
    read: u64,
    /// The number after the last acknowledged one.
    acked: u64,
    /// Numbered records lost to this cursor by `drop_oldest`.
    lapped: u64,
}

#[derive(Debug, Default)]
struct State {
    log: VecDeque<Kept>,
    bytes: usize,
    next_seq: u64,
    cursors: BTreeMap<String, Position>,
    spare: Vec<Vec<Record>>,
    /// What `drop_newest` gave up since the last batch that fitted.
    refused: Option<Gap>,
    closed: bool,
    /// No append waits any more.
    hurry: bool,
    tally: SpoolTally,
}

/// The log. Shared by the pipeline, which appends, and the sinks' cursors.
#[derive(Debug)]
pub struct Spool {
    state: Mutex<State>,
    appended: Condvar,
    acknowledged: Condvar,
    config: SpoolConfig,
}

/// What a cursor found.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    Batch(Arc<Batch>),
    /// Nothing came in time.
    Idle,
    /// Everything was read, and nothing more will come.
    End,
}

/// One sink's place in the log.
#[derive(Debug)]
pub struct Cursor {
    spool: Arc<Spool>,
    name: String,
}

impl Spool {
    pub fn new(config: SpoolConfig) -> Arc<Self> {
        // Sequences start at 1, so that 0 can mean "before the first".
        let state = State { next_seq: 1, ..State::default() };
        Arc::new(Spool {
            state: Mutex::new(state),
            appended: Condvar::new(),
            acknowledged: Condvar::new(),
            config,
        })
    }

    /// Numbers `records` and puts them at the end, waiting for room if the policy says so.
    /// On return `records` is empty, with a buffer to fill again. `now` dates gap records.
    pub fn append(&self, records: &mut Vec<Record>, now: u64) -> Result<(), SpoolClosed> {
        if records.is_empty() {
            return Ok(());
        }
        let weight = records.iter().map(Record::weight).sum::<usize>();
        let mut state = self.lock();
        if self.config.when_full == WhenFull::Block {
            while !state.closed && !state.hurry && self.is_full_for(&state, weight) {
                state = self.acknowledged.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if state.closed || (state.hurry && self.is_full_for(&state, weight)) {
            return Err(SpoolClosed);
        }
        if self.config.when_full == WhenFull::DropNewest && self.is_full_for(&state, weight) {
            state.refuse(records, now);
            return Ok(());
        }
        if let Some(gap) = self.make_room(&mut state, weight, now).or_else(|| state.refused.take())
        {
            state.tally.gaps += 1;
            records.insert(0, Record { ts: now, body: Body::Gap(gap) });
        }
        let weight = weight + size_of::<Record>();
        let mut next = state.spare.pop().unwrap_or_default();
        std::mem::swap(&mut next, records);
        state.put(next, weight);
        drop(state);
        self.appended.notify_all();
        Ok(())
    }

    /// No more appends: what `drop_newest` still owes is said, and cursors end after the last
    /// record.
    pub fn close(&self, now: u64) {
        let mut state = self.lock();
        if let Some(gap) = state.refused.take() {
            state.tally.gaps += 1;
            state.put(vec![Record { ts: now, body: Body::Gap(gap) }], size_of::<Record>());
        }
        state.closed = true;
        drop(state);
        self.appended.notify_all();
        self.acknowledged.notify_all();
    }

    /// An append that would have to wait fails from now on: the time to stop has come.
    pub fn hurry(&self) {
        self.lock().hurry = true;
        self.acknowledged.notify_all();
    }

    /// A cursor at the oldest record that the spool has, or where the cursor of this name was left.
    pub fn cursor(self: &Arc<Self>, name: &str) -> Cursor {
        let mut state = self.lock();
        let oldest = state.oldest_seq();
        let position = state.cursors.entry(name.to_owned()).or_insert(Position {
            read: oldest,
            acked: oldest,
            lapped: 0,
        });
        position.read = position.acked;
        drop(state);
        Cursor { spool: self.clone(), name: name.to_owned() }
    }

    /// Forgets a cursor whose sink is gone for good; what only it waited for is freed.
    pub fn forget(&self, name: &str) {
        let mut state = self.lock();
        state.cursors.remove(name);
        state.free_acknowledged();
        drop(state);
        self.acknowledged.notify_all();
    }

    pub fn tally(&self) -> SpoolTally {
        self.lock().tally
    }

    /// Bytes kept now.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Per cursor: records that it has not acknowledged, and records that it lost to `drop_oldest`.
    pub fn pending(&self) -> Vec<(String, u64, u64)> {
        let state = self.lock();
        state
            .cursors
            .iter()
            .map(|(name, at)| (name.clone(), state.next_seq - at.acked, at.lapped))
            .collect()
    }

    fn is_full_for(&self, state: &State, weight: usize) -> bool {
        !state.log.is_empty() && state.bytes + weight > self.config.max_size
    }

    fn make_room(&self, state: &mut State, weight: usize, now: u64) -> Option<Gap> {
        let mut gap: Option<Gap> = None;
        while self.is_full_for(state, weight) {
            let Some(kept) = state.log.pop_front() else { break };
            state.bytes -= kept.weight;
            let (first, end) = (kept.batch.base_seq, kept.batch.end_seq());
            state.tally.dropped_oldest += end - first;
            for position in state.cursors.values_mut() {
                position.lapped += end.saturating_sub(position.acked.max(first));
                position.acked = position.acked.max(end);
                position.read = position.read.max(end);
            }
            let given_up = gap_of(&kept.batch.records, now, Some((first, end - 1)));
            gap = Some(match gap {
                Some(earlier) => join(earlier, given_up),
                None => given_up,
            });
        }
        gap
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic half-way through a change runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn put(&mut self, records: Vec<Record>, weight: usize) {
        let count = records.len() as u64;
        let batch = Arc::new(Batch { base_seq: self.next_seq, records });
        self.next_seq += count;
        self.tally.appended += count;
        self.bytes += weight;
        self.log.push_back(Kept { batch, weight });
        if self.cursors.is_empty() {
            self.free_acknowledged();
        }
    }

    fn refuse(&mut self, records: &mut Vec<Record>, now: u64) {
        self.tally.dropped_newest += records.len() as u64;
        let gap = gap_of(records, now, None);
        self.refused = Some(match self.refused.take() {
            Some(earlier) => join(earlier, gap),
            None => gap,
        });
        records.clear();
    }

    fn oldest_seq(&self) -> u64 {
        self.log.front().map_or(self.next_seq, |kept| kept.batch.base_seq)
    }

    fn free_acknowledged(&mut self) {
        let acked = self.cursors.values().map(|at| at.acked).min().unwrap_or(self.next_seq);
        while self.log.front().is_some_and(|kept| kept.batch.end_seq() <= acked) {
            let Some(kept) = self.log.pop_front() else { break };
            self.bytes -= kept.weight;
            if self.spare.len() < MAX_SPARE
                && let Ok(mut batch) = Arc::try_unwrap(kept.batch)
            {
                batch.records.clear();
                self.spare.push(batch.records);
            }
        }
    }

    fn batch_at(&self, seq: u64) -> Option<Arc<Batch>> {
        let after = self.log.partition_point(|kept| kept.batch.base_seq <= seq);
        let kept = self.log.get(after.checked_sub(1)?)?;
        (seq < kept.batch.end_seq()).then(|| kept.batch.clone())
    }
}

impl Cursor {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next batch after the last one read, waiting up to `timeout`. A batch is given whole; after
    /// [`rewind`](Self::rewind) its first records may have been acknowledged before.
    pub fn next(&mut self, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        let mut state = self.spool.lock();
        loop {
            let Some(position) = state.cursors.get(&self.name) else { return Next::End };
            if let Some(batch) = state.batch_at(position.read) {
                if let Some(position) = state.cursors.get_mut(&self.name) {
                    position.read = batch.end_seq();
                }
                return Next::Batch(batch);
            }
            if state.closed {
                return Next::End;
            }
            let now = Instant::now();
            if now >= deadline {
                return Next::Idle;
            }
            let wait = self.spool.appended.wait_timeout(state, deadline - now);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Everything before `end_seq` has been delivered and will not be asked for again.
    /// Give the batch back first: its buffer is used again only when nobody else holds it.
    pub fn ack(&mut self, end_seq: u64) {
        let mut state = self.spool.lock();
        if let Some(position) = state.cursors.get_mut(&self.name) {
            position.acked = position.acked.max(end_seq);
            position.read = position.read.max(position.acked);
        }
        state.free_acknowledged();
        drop(state);
        self.spool.acknowledged.notify_all();
    }

    /// Reads again from the first record that is not acknowledged.
    pub fn rewind(&mut self) {
        if let Some(position) = self.spool.lock().cursors.get_mut(&self.name) {
            position.read = position.acked;
        }
    }

    /// The number after the last acknowledged record.
    pub fn acked(&self) -> u64 {
        self.spool.lock().cursors.get(&self.name).map_or(0, |position| position.acked)
    }
}

fn gap_of(records: &[Record], now: u64, seqs: Option<(u64, u64)>) -> Gap {
    // A gap record given up passes what it said on to the new one.
    let exact = records.iter().all(|record| record.missing().is_some());
    Gap {
        cause: GapCause::SpoolFull,
        events: Some(records.iter().filter_map(Record::missing).sum()),
        precision: if exact { Precision::Exact } else { Precision::AtLeast },
        kinds: records.iter().map(Record::gap_kind).fold(GapKinds::empty(), |a, b| a | b),
        from: records.iter().map(|record| record.ts).min().unwrap_or(now),
        to: records.iter().map(|record| record.ts).max().unwrap_or(now),
        seqs,
    }
}

fn join(earlier: Gap, later: Gap) -> Gap {
    Gap {
        events: Some(earlier.events.unwrap_or(0) + later.events.unwrap_or(0)),
        precision: if earlier.precision == later.precision {
            later.precision
        } else {
            Precision::AtLeast
        },
        kinds: earlier.kinds | later.kinds,
        from: earlier.from.min(later.from),
        to: earlier.to.max(later.to),
        seqs: match (earlier.seqs, later.seqs) {
            (Some((first, _)), Some((_, last))) => Some((first, last)),
            (seqs, None) | (None, seqs) => seqs,
        },
        ..earlier
    }
}
