//! What went through the pipeline. Added to once a batch, read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::ctnetlink::{Reason, Tally};
use crate::flow::{Gap, GapCause, Precision};

/// Counters since the start.
#[derive(Debug, Default)]
pub struct PipelineStats {
    pub new: AtomicU64,
    pub update: AtomicU64,
    pub destroy: AtomicU64,
    pub snapshot: AtomicU64,
    pub expectations: AtomicU64,
    pub filtered: AtomicU64,
    pub notes: AtomicU64,
    /// By [`Reason`].
    pub malformed: [AtomicU64; Reason::ALL.len()],
    pub unknown_attributes: AtomicU64,
    pub unknown_messages: AtomicU64,
    /// Flows whose rare attributes were forgotten before their end.
    pub forgotten: AtomicU64,
    /// Records made but not appended, because the spool had been closed.
    pub lost_at_stop: AtomicU64,
    /// By [`GapCause`].
    pub gaps: [GapStats; GapCause::ALL.len()],
}

/// Gap records of one cause.
#[derive(Debug, Default)]
pub struct GapStats {
    pub records: AtomicU64,
    /// By [`Precision`].
    pub events: [AtomicU64; Precision::ALL.len()],
}

/// Counts of one item.
#[derive(Debug, Default)]
pub(super) struct BatchTally {
    /// By `ctnetlink::Kind`.
    pub decoded: [u64; 4],
    pub expectations: u64,
    pub filtered: u64,
    pub notes: u64,
    pub forgotten: u64,
    pub codec: Tally,
}

impl PipelineStats {
    /// Adds a batch's counts and starts them again.
    pub(super) fn add(&self, tally: &mut BatchTally) {
        let [new, update, destroy, snapshot] = tally.decoded;
        let counts = [
            (&self.new, new),
            (&self.update, update),
            (&self.destroy, destroy),
            (&self.snapshot, snapshot),
            (&self.expectations, tally.expectations),
            (&self.filtered, tally.filtered),
            (&self.notes, tally.notes),
            (&self.unknown_attributes, tally.codec.unknown_attributes),
            (&self.unknown_messages, tally.codec.unknown_messages),
            (&self.forgotten, tally.forgotten),
        ];
        for (counter, count) in counts {
            if count > 0 {
                counter.fetch_add(count, Relaxed);
            }
        }
        if tally.codec.refused_total() > 0 {
            for (counter, reason) in self.malformed.iter().zip(Reason::ALL) {
                counter.fetch_add(tally.codec.refused(reason), Relaxed);
            }
        }
        *tally = BatchTally::default();
    }

    /// Gaps are rare: counted one by one.
    pub(super) fn gap(&self, gap: &Gap) {
        let of_cause = &self.gaps[gap.cause as usize];
        of_cause.records.fetch_add(1, Relaxed);
        of_cause.events[gap.precision as usize].fetch_add(gap.events.unwrap_or(0), Relaxed);
    }

    /// Records that should have been handed to the spool: every event decoded and not filtered,
    /// every gap and every note.
    pub fn expected_records(&self) -> u64 {
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        of(&self.new)
            + of(&self.update)
            + of(&self.destroy)
            + of(&self.snapshot)
            + of(&self.expectations)
            + self.gaps.iter().map(|gaps| of(&gaps.records)).sum::<u64>()
            + of(&self.notes)
            - of(&self.filtered)
    }
}
