//! What went through the pipeline. Added to once a batch, read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::BatchTally;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct PipelineStats {
    pub new: AtomicU64,
    pub update: AtomicU64,
    pub destroy: AtomicU64,
    pub snapshot: AtomicU64,
    pub expectations: AtomicU64,
    pub filtered: AtomicU64,
    pub gaps: AtomicU64,
    pub notes: AtomicU64,
    pub malformed: AtomicU64,
    pub unknown_attributes: AtomicU64,
    pub unknown_messages: AtomicU64,
    /// Records made but not appended, because the spool had been closed.
    pub lost_at_stop: AtomicU64,
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
            (&self.gaps, tally.gaps),
            (&self.notes, tally.notes),
            (&self.malformed, tally.codec.refused_total()),
            (&self.unknown_attributes, tally.codec.unknown_attributes),
            (&self.unknown_messages, tally.codec.unknown_messages),
        ];
        for (counter, count) in counts {
            if count > 0 {
                counter.fetch_add(count, Relaxed);
            }
        }
        *tally = BatchTally::default();
    }

    pub(super) fn lost_at_stop(&self, records: u64) {
        self.lost_at_stop.fetch_add(records, Relaxed);
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
            + of(&self.gaps)
            + of(&self.notes)
            - of(&self.filtered)
    }
}
