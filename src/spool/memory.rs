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
    /// Records given up by `drop_newest` or at the stop; these have no numbers.
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
    name: String,
    /// The next number to read.
    read: u64,
    /// The number after the last acknowledged one.
    acked: u64,
    /// Numbered records lost to this cursor by `drop_oldest`.
    lapped: u64,
    /// [`Waker::wake`] was called and [`Cursor::next`] has not said so yet.
    woken: bool,
}

#[derive(Debug, Default)]
struct State {
    log: VecDeque<Kept>,
    bytes: usize,
    next_seq: u64,
    /// By their ids.
    cursors: BTreeMap<u64, Position>,
    next_cursor: u64,
    spare: Vec<Vec<Record>>,
    /// What was given up since the last batch that fitted.
    refused: Option<Gap>,
    /// What the agent said of itself meanwhile: a few records, which are never given up.
    notes: Vec<Record>,
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

/// One sink's place in the log. Its name is for people: two cursors may share one, as when a sink that
/// ends is not gone yet and another takes its name.
#[derive(Debug)]
pub struct Cursor {
    spool: Arc<Spool>,
    id: u64,
}

/// Wakes a cursor that waits in [`Cursor::next`], from another thread.
#[derive(Clone, Debug)]
pub struct Waker {
    spool: Arc<Spool>,
    id: u64,
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
        // With one more for the gap record that may have to stand before them.
        let weight = records.iter().map(Record::weight).sum::<usize>() + size_of::<Record>();
        let mut state = self.lock();
        if self.config.when_full == WhenFull::Block {
            while !state.closed && !state.hurry && self.is_full_for(&state, weight) {
                state = self.acknowledged.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if state.closed {
            return Err(SpoolClosed);
        }
        if self.config.when_full != WhenFull::DropOldest && self.is_full_for(&state, weight) {
            state.refuse(records);
            return Ok(());
        }
        if let Some(gap) = self.make_room(&mut state, weight) {
            state.refused = Some(gap);
        }
        records.splice(..0, state.owed(now));
        let mut next = state.spare.pop().unwrap_or_default();
        std::mem::swap(&mut next, records);
        state.put(next, weight);
        drop(state);
        self.appended.notify_all();
        Ok(())
    }

    /// No more appends: what was given up and not said yet is said, past the bound, and cursors end
    /// after the last record.
    pub fn close(&self, now: u64) {
        let mut state = self.lock();
        let owed = state.owed(now);
        if !owed.is_empty() {
            let weight = owed.iter().map(Record::weight).sum();
            state.put(owed, weight);
        }
        state.closed = true;
        drop(state);
        self.appended.notify_all();
        self.acknowledged.notify_all();
    }

    /// No append waits from now on, because the time to stop has come: what does not fit is given up as
    /// `drop_newest` does it, and a gap record says so.
    pub fn hurry(&self) {
        self.lock().hurry = true;
        self.acknowledged.notify_all();
    }

    /// A new cursor, at the oldest record that the spool has.
    pub fn cursor(self: &Arc<Self>, name: &str) -> Cursor {
        let mut state = self.lock();
        let oldest = state.oldest_seq();
        let id = state.next_cursor;
        state.next_cursor += 1;
        let position =
            Position { name: name.to_owned(), read: oldest, acked: oldest, ..Position::default() };
        state.cursors.insert(id, position);
        drop(state);
        Cursor { spool: self.clone(), id }
    }

    fn forget(&self, id: u64) {
        let mut state = self.lock();
        state.cursors.remove(&id);
        state.free_acknowledged();
        drop(state);
        self.acknowledged.notify_all();
        // It may wait in `next`.
        self.appended.notify_all();
    }

    pub fn config(&self) -> SpoolConfig {
        self.config
    }

    /// Rises whenever a sink has taken records.
    pub fn progress(&self) -> u64 {
        self.lock().cursors.values().map(|at| at.acked).sum()
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
            .values()
            .map(|at| (at.name.clone(), state.next_seq - at.acked, at.lapped))
            .collect()
    }

    fn is_full_for(&self, state: &State, weight: usize) -> bool {
        !state.log.is_empty() && state.bytes + weight > self.config.max_size
    }

    fn make_room(&self, state: &mut State, weight: usize) -> Option<Gap> {
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
            let given_up = gap_of(&kept.batch.records, Some((first, end - 1)));
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

    fn refuse(&mut self, records: &mut Vec<Record>) {
        self.notes.extend(records.extract_if(.., |record| matches!(record.body, Body::Agent(_))));
        if records.is_empty() {
            return;
        }
        self.tally.dropped_newest += records.len() as u64;
        let gap = gap_of(records, None);
        self.refused = Some(match self.refused.take() {
            Some(earlier) => join(earlier, gap),
            None => gap,
        });
        records.clear();
    }

    /// What stands before the next record: the gap of what was given up, then the agent's notes.
    fn owed(&mut self, now: u64) -> Vec<Record> {
        let gap = self.refused.take().map(|gap| Record { ts: now, body: Body::Gap(gap) });
        self.tally.gaps += u64::from(gap.is_some());
        gap.into_iter().chain(self.notes.drain(..)).collect()
    }

    fn pending(&self, id: u64) -> (u64, u64) {
        self.cursors.get(&id).map_or((0, 0), |at| (self.next_seq - at.acked, at.lapped))
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
    /// No other cursor of this spool has or had it.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn rename(&mut self, name: &str) {
        if let Some(position) = self.spool.lock().cursors.get_mut(&self.id) {
            position.name = name.to_owned();
        }
    }

    /// The next batch after the last one read, waiting up to `timeout`, or until [`Waker::wake`]. A
    /// batch is given whole; after [`rewind`](Self::rewind) its first records may have been
    /// acknowledged before.
    pub fn next(&mut self, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        let mut state = self.spool.lock();
        loop {
            let Some(position) = state.cursors.get(&self.id) else { return Next::End };
            if let Some(batch) = state.batch_at(position.read) {
                if let Some(position) = state.cursors.get_mut(&self.id) {
                    position.read = batch.end_seq();
                }
                return Next::Batch(batch);
            }
            if state.closed {
                return Next::End;
            }
            if let Some(position) = state.cursors.get_mut(&self.id)
                && std::mem::take(&mut position.woken)
            {
                return Next::Idle;
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
    ///
    /// Gives how many records this acknowledged anew. Those that `drop_oldest` gave up while they
    /// were on their way are counted as lapped already, so that every record is counted once.
    pub fn ack(&mut self, end_seq: u64) -> u64 {
        let mut state = self.spool.lock();
        let end_seq = end_seq.min(state.next_seq);
        let mut anew = 0;
        if let Some(position) = state.cursors.get_mut(&self.id) {
            anew = end_seq.saturating_sub(position.acked);
            position.acked += anew;
            position.read = position.read.max(position.acked);
        }
        state.free_acknowledged();
        drop(state);
        self.spool.acknowledged.notify_all();
        anew
    }

    /// Reads again from the first record that is not acknowledged.
    pub fn rewind(&mut self) {
        if let Some(position) = self.spool.lock().cursors.get_mut(&self.id) {
            position.read = position.acked;
        }
    }

    pub fn waker(&self) -> Waker {
        Waker { spool: self.spool.clone(), id: self.id }
    }

    /// Records that this cursor has not acknowledged, and records that it lost to `drop_oldest`.
    pub fn pending(&self) -> (u64, u64) {
        self.spool.lock().pending(self.id)
    }

    /// Its sink is gone for good; what only it waited for is freed.
    pub fn forget(self) {
        self.spool.forget(self.id);
    }

    /// The number after the last acknowledged record.
    pub fn acked(&self) -> u64 {
        self.spool.lock().cursors.get(&self.id).map_or(0, |position| position.acked)
    }
}

impl Waker {
    /// Makes the cursor's present or next wait end at once with [`Next::Idle`]; a batch that is there
    /// comes first.
    pub fn wake(&self) {
        if let Some(position) = self.spool.lock().cursors.get_mut(&self.id) {
            position.woken = true;
        }
        self.spool.appended.notify_all();
    }

    /// [`Cursor::pending`] of the cursor.
    pub fn pending(&self) -> (u64, u64) {
        self.spool.lock().pending(self.id)
    }

    /// [`Cursor::forget`] of the cursor.
    pub fn forget(&self) {
        self.spool.forget(self.id);
    }
}

fn gap_of(records: &[Record], seqs: Option<(u64, u64)>) -> Gap {
    // A gap record given up passes what it said on to the new one: its times, and its numbers, or a
    // sink that had neither would see a hole that no gap record covers. The numbers become one range,
    // which may then hold numbers that this sink has seen; the range in between two gaps is gone too.
    // Numbered records are given up for the sinks that have not had them yet: one that has had some
    // misses fewer, and knows by the numbers how many.
    let whose = if seqs.is_some() { Precision::AtMost } else { Precision::Exact };
    let missing = records.iter().map(Record::missing);
    let (events, precision) = missing.fold((0, whose), |(events, precision), (more, exact)| {
        (events + more, precision.and(exact))
    });
    let earlier_gaps = records.iter().filter_map(|record| match &record.body {
        Body::Gap(gap) => Some(gap),
        _ => None,
    });
    let (mut from, mut to, mut seqs) = (u64::MAX, 0, seqs);
    for gap in earlier_gaps {
        from = from.min(gap.from);
        to = to.max(gap.to);
        if let (Some((first, last)), Some((gap_first, _))) = (seqs, gap.seqs) {
            seqs = Some((first.min(gap_first), last));
        }
    }
    Gap {
        cause: GapCause::SpoolFull,
        events: Some(events),
        precision,
        kinds: records.iter().map(Record::gap_kind).fold(GapKinds::empty(), |a, b| a | b),
        from: records.iter().map(|record| record.ts).fold(from, u64::min),
        to: records.iter().map(|record| record.ts).fold(to, u64::max),
        seqs,
    }
}

fn join(earlier: Gap, later: Gap) -> Gap {
    Gap {
        events: Some(earlier.events.unwrap_or(0) + later.events.unwrap_or(0)),
        precision: earlier.precision.and(later.precision),
        kinds: earlier.kinds | later.kinds,
        from: earlier.from.min(later.from),
        to: earlier.to.max(later.to),
        seqs: match (earlier.seqs, later.seqs) {
            // The later one may reach further back, by a gap record that it gave up.
            (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
            (seqs, None) | (None, seqs) => seqs,
        },
        ..earlier
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ctnetlink::Conn;
    use crate::flow::{AgentAction, AgentNote, Flow, FlowEvent};

    const RECORD: usize = size_of::<Record>();

    /// `count` records; `ts` and `flow_id` go up from `first`.
    fn flows(first: u64, count: usize) -> Vec<Record> {
        (first..first + count as u64)
            .map(|id| Record {
                ts: id,
                body: Body::Flow(Flow {
                    event: FlowEvent::Destroy,
                    overtaken: false,
                    flow_id: id,
                    conn: Conn::default(),
                    rare: None,
                }),
            })
            .collect()
    }

    fn spool(records: usize, when_full: WhenFull) -> Arc<Spool> {
        Spool::new(SpoolConfig { max_size: records * RECORD, when_full })
    }

    fn batch(next: Next) -> Arc<Batch> {
        match next {
            Next::Batch(batch) => batch,
            other => panic!("expected a batch, got {other:?}"),
        }
    }

    fn gap(record: &Record) -> Gap {
        match record.body {
            Body::Gap(gap) => gap,
            ref other => panic!("expected a gap, got {other:?}"),
        }
    }

    #[test]
    fn records_are_numbered_from_one_without_holes_and_each_cursor_sees_them_in_order() {
        let spool = spool(100, WhenFull::Block);
        let (mut a, mut b) = (spool.cursor("a"), spool.cursor("b"));
        spool.append(&mut flows(0, 3), 0).unwrap();
        spool.append(&mut flows(3, 2), 0).unwrap();
        for cursor in [&mut a, &mut b] {
            let (first, second) =
                (batch(cursor.next(Duration::ZERO)), batch(cursor.next(Duration::ZERO)));
            assert_eq!((first.base_seq, first.end_seq()), (1, 4));
            assert_eq!((second.base_seq, second.end_seq()), (4, 6));
            assert_eq!(second.records, flows(3, 2));
            assert_eq!(cursor.next(Duration::ZERO), Next::Idle);
        }
        assert_eq!(spool.pending(), [("a".to_owned(), 5, 0), ("b".to_owned(), 5, 0)]);
        assert_eq!(a.ack(6), 5);
        assert_eq!(a.ack(6), 0, "the same again is not new");
        assert!(spool.bytes() > 0, "b still needs them");
        assert_eq!(b.ack(6), 5);
        assert_eq!(spool.bytes(), 0);
    }

    #[test]
    fn block_waits_for_an_acknowledgement_and_hurry_ends_the_wait_with_a_gap_record() {
        let spool = spool(4, WhenFull::Block);
        let mut cursor = spool.cursor("a");
        spool.append(&mut flows(0, 3), 0).unwrap();
        let appender = std::thread::spawn({
            let spool = spool.clone();
            move || spool.append(&mut flows(3, 3), 0)
        });
        let first = batch(cursor.next(Duration::ZERO));
        assert_eq!(
            cursor.next(Duration::from_millis(30)),
            Next::Idle,
            "nothing got past the bound"
        );
        let end = first.end_seq();
        drop(first);
        cursor.ack(end);
        appender.join().unwrap().unwrap();
        assert_eq!(batch(cursor.next(Duration::from_secs(10))).base_seq, 4);

        let waiting = std::thread::spawn({
            let spool = spool.clone();
            move || {
                let mut records = flows(6, 3);
                records.push(note());
                (spool.append(&mut records, 0), records.len())
            }
        });
        spool.hurry();
        assert_eq!(waiting.join().unwrap(), (Ok(()), 0));
        spool.close(9);
        // Past the bound, and the agent's own words are never given up.
        let last = batch(cursor.next(Duration::ZERO));
        assert_eq!(last.records.len(), 2);
        let Body::Gap(gap) = &last.records[0].body else { panic!("{last:?}") };
        assert_eq!((gap.events, gap.precision, gap.seqs), (Some(3), Precision::Exact, None));
        assert_eq!(last.records[1], note());
        let tally = SpoolTally { appended: 8, dropped_newest: 3, gaps: 1, ..SpoolTally::default() };
        assert_eq!(spool.tally(), tally);
    }

    fn note() -> Record {
        let note = AgentNote { action: AgentAction::Stopped, version: "1", valve: None };
        Record { ts: 8, body: Body::Agent(Box::new(note)) }
    }

    #[test]
    fn hurry_changes_nothing_for_the_policies_that_never_wait() {
        for policy in [WhenFull::DropOldest, WhenFull::DropNewest] {
            let spool = spool(4, policy);
            let _cursor = spool.cursor("a");
            spool.hurry();
            spool.append(&mut flows(0, 3), 0).unwrap();
            spool.append(&mut flows(3, 3), 0).unwrap();
        }
    }

    #[test]
    fn a_batch_larger_than_the_bound_passes_when_the_log_is_empty() {
        for &policy in WhenFull::ALL {
            let spool = spool(1, policy);
            let mut cursor = spool.cursor("a");
            spool.append(&mut flows(0, 50), 0).unwrap();
            assert_eq!(batch(cursor.next(Duration::ZERO)).records.len(), 50);
        }
    }

    #[test]
    fn drop_oldest_gives_up_the_oldest_and_says_which_numbers() {
        let spool = spool(8, WhenFull::DropOldest);
        let mut cursor = spool.cursor("a");
        spool.append(&mut flows(10, 3), 0).unwrap();
        spool.append(&mut flows(20, 3), 0).unwrap();
        spool.append(&mut flows(30, 3), 99).unwrap();
        let second = batch(cursor.next(Duration::ZERO));
        assert_eq!((second.base_seq, second.records.len()), (4, 3), "1 to 3 are gone");
        let third = batch(cursor.next(Duration::ZERO));
        assert_eq!((third.base_seq, third.records.len()), (7, 4));
        let expected = Gap {
            cause: GapCause::SpoolFull,
            events: Some(3),
            precision: Precision::AtMost,
            kinds: GapKinds::DESTROY,
            from: 10,
            to: 12,
            seqs: Some((1, 3)),
        };
        assert_eq!(gap(&third.records[0]), expected);
        assert_eq!(cursor.ack(11), 7, "ten numbers, three of them lapped");
        assert_eq!(cursor.pending(), (0, 3));
        let tally = SpoolTally { appended: 10, dropped_oldest: 3, gaps: 1, dropped_newest: 0 };
        assert_eq!(spool.tally(), tally);
    }

    #[test]
    fn a_gap_record_that_is_given_up_passes_its_numbers_times_and_count_on() {
        let spool = spool(4, WhenFull::DropOldest);
        let mut cursor = spool.cursor("a");
        for first in [10, 20, 30] {
            spool.append(&mut flows(first, 3), 1000).unwrap();
        }
        let last = batch(cursor.next(Duration::ZERO));
        let gap = gap(&last.records[0]);
        assert_eq!(gap.seqs, Some((1, last.base_seq - 1)));
        assert_eq!((gap.events, gap.precision), (Some(6), Precision::AtMost));
        assert_eq!((gap.from, gap.to), (10, 1000), "to: when the first gap record was made");
    }

    #[test]
    fn drop_newest_refuses_without_numbers_and_says_how_many_at_the_next_chance() {
        let spool = spool(4, WhenFull::DropNewest);
        let mut cursor = spool.cursor("a");
        spool.append(&mut flows(10, 3), 0).unwrap();
        let mut refused = flows(20, 3);
        spool.append(&mut refused, 0).unwrap();
        assert!(refused.is_empty());
        spool.append(&mut flows(30, 2), 0).unwrap();
        cursor.next(Duration::ZERO);
        cursor.ack(4);
        spool.append(&mut flows(40, 1), 50).unwrap();
        let after = batch(cursor.next(Duration::ZERO));
        assert_eq!((after.base_seq, after.records.len()), (4, 2));
        let gap = gap(&after.records[0]);
        assert_eq!((gap.events, gap.seqs, gap.from, gap.to), (Some(5), None, 20, 31));
        assert_eq!(spool.tally().dropped_newest, 5);
    }

    #[test]
    fn close_says_what_drop_newest_still_owes_then_cursors_end_and_appends_fail() {
        let spool = spool(4, WhenFull::DropNewest);
        let mut cursor = spool.cursor("a");
        spool.append(&mut flows(0, 3), 0).unwrap();
        spool.append(&mut flows(3, 3), 0).unwrap();
        spool.close(7);
        assert_eq!(batch(cursor.next(Duration::ZERO)).records.len(), 3);
        assert_eq!(gap(&batch(cursor.next(Duration::ZERO)).records[0]).events, Some(3));
        assert_eq!(cursor.next(Duration::from_secs(10)), Next::End);
        assert_eq!(spool.append(&mut flows(9, 1), 0), Err(SpoolClosed));
        assert_eq!(spool.tally().appended, 4);
    }

    #[test]
    fn close_ends_a_waiting_cursor() {
        let spool = spool(4, WhenFull::Block);
        let mut cursor = spool.cursor("a");
        let waiting = std::thread::spawn(move || cursor.next(Duration::from_secs(60)));
        spool.close(0);
        assert_eq!(waiting.join().unwrap(), Next::End);
    }

    #[test]
    fn wake_ends_a_wait_once_even_when_it_came_before() {
        let spool = spool(4, WhenFull::Block);
        let mut cursor = spool.cursor("a");
        let started = Instant::now();
        cursor.waker().wake();
        assert_eq!(cursor.next(Duration::from_secs(60)), Next::Idle);
        assert!(started.elapsed() < Duration::from_secs(30));
        let again = Instant::now();
        assert_eq!(cursor.next(Duration::from_millis(30)), Next::Idle);
        assert!(again.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn rewind_gives_again_what_was_not_acknowledged_batches_whole() {
        let spool = spool(100, WhenFull::Block);
        let mut cursor = spool.cursor("a");
        spool.append(&mut flows(0, 3), 0).unwrap();
        spool.append(&mut flows(3, 3), 0).unwrap();
        cursor.next(Duration::ZERO);
        cursor.next(Duration::ZERO);
        cursor.ack(3);
        cursor.rewind();
        assert_eq!(batch(cursor.next(Duration::ZERO)).base_seq, 1, "2 was acknowledged, 3 was not");
        assert_eq!(batch(cursor.next(Duration::ZERO)).base_seq, 4);
    }

    #[test]
    fn forgetting_a_cursor_frees_what_only_it_waited_for_and_ends_it() {
        let spool = spool(4, WhenFull::Block);
        let (mut a, mut b) = (spool.cursor("a"), spool.cursor("b"));
        spool.append(&mut flows(0, 3), 0).unwrap();
        a.next(Duration::ZERO);
        a.ack(4);
        assert!(spool.bytes() > 0);
        b.waker().forget();
        assert_eq!(spool.bytes(), 0);
        assert_eq!(b.next(Duration::from_secs(60)), Next::End);
        assert_eq!(b.ack(4), 0);
        assert_eq!(a.acked(), 4);
    }

    #[test]
    fn cursors_that_share_a_name_have_places_of_their_own() {
        let spool = spool(100, WhenFull::Block);
        let (mut old, mut new) = (spool.cursor("a"), spool.cursor("a"));
        spool.append(&mut flows(0, 3), 0).unwrap();
        old.next(Duration::ZERO);
        old.ack(4);
        let both = [("a".to_owned(), 0, 0), ("a".to_owned(), 3, 0)];
        assert_eq!(spool.pending(), both);
        old.forget();
        new.rename("b");
        assert_eq!(spool.pending(), [("b".to_owned(), 3, 0)]);
        assert_eq!(batch(new.next(Duration::ZERO)).base_seq, 1, "it does not end with the other");
    }

    #[test]
    fn a_new_cursor_starts_at_the_oldest_record_that_is_kept() {
        let spool = spool(100, WhenFull::Block);
        let mut a = spool.cursor("a");
        for first in [0, 2, 4] {
            spool.append(&mut flows(first, 2), 0).unwrap();
        }
        a.next(Duration::ZERO);
        a.ack(3);
        assert_eq!(batch(spool.cursor("late").next(Duration::ZERO)).base_seq, 3);
    }

    #[test]
    fn a_used_buffer_comes_back_to_the_pipeline() {
        let spool = spool(1000, WhenFull::Block);
        let mut cursor = spool.cursor("a");
        let mut records = flows(0, 500);
        spool.append(&mut records, 0).unwrap();
        let given = batch(cursor.next(Duration::ZERO));
        drop(given);
        cursor.ack(501);
        records = flows(0, 1);
        spool.append(&mut records, 0).unwrap();
        assert!(records.is_empty() && records.capacity() >= 500);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Append(usize),
        Read(usize),
        Ack(usize),
        Rewind(usize),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            3 => (1usize..6).prop_map(Op::Append),
            3 => (0usize..2).prop_map(Op::Read),
            2 => (0usize..2).prop_map(Op::Ack),
            1 => (0usize..2).prop_map(Op::Rewind),
        ];
        proptest::collection::vec(op, 1..80)
    }

    /// What one cursor has seen.
    #[derive(Default)]
    struct Seen {
        seqs: std::collections::BTreeSet<u64>,
        ids: Vec<u64>,
        covered: Vec<(u64, u64)>,
        unnumbered: u64,
        gap_events: u64,
        read_to: u64,
        acked: u64,
    }

    impl Seen {
        fn batch(&mut self, batch: &Batch) {
            self.read_to = batch.end_seq();
            for (index, record) in batch.records.iter().enumerate() {
                if !self.seqs.insert(batch.base_seq + index as u64) {
                    continue;
                }
                match &record.body {
                    Body::Flow(flow) => self.ids.push(flow.flow_id),
                    Body::Gap(gap) => {
                        let whose = gap.seqs.map_or(Precision::Exact, |_| Precision::AtMost);
                        assert_eq!(gap.precision, whose);
                        self.gap_events += gap.events.unwrap();
                        match gap.seqs {
                            Some(seqs) => self.covered.push(seqs),
                            None => self.unnumbered += gap.events.unwrap(),
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    proptest! {
        /// Numbers have no hole; each cursor, however it reads, acknowledges and rewinds, sees each
        /// number or a gap record that covers it; the tally adds up.
        #[test]
        fn every_number_is_seen_by_every_cursor_or_lies_in_a_gap(
            ops in ops(),
            policy in proptest::sample::select(WhenFull::ALL),
            bound in 1usize..20,
        ) {
            let spool = spool(bound, policy);
            let mut cursors = [spool.cursor("a"), spool.cursor("b")];
            let mut lazy = spool.cursor("lazy");
            if policy != WhenFull::DropOldest {
                // With the others, one that never reads would fill the spool for good.
                lazy.waker().forget();
            }
            // So that `block` refuses where it would wait.
            spool.hurry();
            let mut seen = [Seen::default(), Seen::default()];
            let (mut made, mut taken) = (0u64, 0u64);
            for op in ops {
                match op {
                    Op::Append(count) => {
                        let mut records = flows(made, count);
                        made += count as u64;
                        spool.append(&mut records, made).unwrap();
                        prop_assert!(records.is_empty());
                        taken += count as u64;
                    }
                    Op::Read(who) => {
                        if let Next::Batch(batch) = cursors[who].next(Duration::ZERO) {
                            seen[who].batch(&batch);
                        }
                    }
                    Op::Ack(who) => {
                        let to = seen[who].read_to;
                        seen[who].acked += cursors[who].ack(to);
                    }
                    Op::Rewind(who) => cursors[who].rewind(),
                }
                let one_batch = 7;
                prop_assert!(spool.bytes() <= bound.max(one_batch) * RECORD);
            }
            spool.close(made);
            let tally = spool.tally();
            prop_assert_eq!(tally.appended, taken - tally.dropped_newest + tally.gaps);
            for (cursor, seen) in cursors.iter_mut().zip(&mut seen) {
                while let Next::Batch(batch) = cursor.next(Duration::ZERO) {
                    seen.batch(&batch);
                }
                seen.acked += cursor.ack(tally.appended + 1);
                let (pending, lapped) = cursor.pending();
                prop_assert_eq!(pending, 0);
                prop_assert_eq!(seen.acked + lapped, tally.appended);
                for seq in 1..=tally.appended {
                    let covered = seen.covered.iter().any(|&(a, b)| (a..=b).contains(&seq));
                    prop_assert!(seen.seqs.contains(&seq) || covered, "{} is nowhere", seq);
                }
                prop_assert!(seen.ids.is_sorted());
                prop_assert_eq!(seen.unnumbered, tally.dropped_newest);
            }
            if policy == WhenFull::DropOldest {
                let mut seen = Seen::default();
                while let Next::Batch(batch) = lazy.next(Duration::ZERO) {
                    seen.batch(&batch);
                }
                prop_assert_eq!(seen.ids.len() as u64 + seen.gap_events, taken, "counts are exact");
                lazy.ack(tally.appended + 1);
            }
            prop_assert_eq!(spool.bytes(), 0);
        }
    }
}
