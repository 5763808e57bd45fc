//! What a sink has done, counted: written by its thread, read by whoever shows counters.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter that only goes up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        // Nothing is ordered by a counter.
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one sink. They outlive a reload that changes the sink's settings.
#[derive(Debug, Default)]
pub struct SinkStats {
    /// Records acknowledged in the spool.
    pub records_acked: Counter,
    /// Bytes of the lines that the sink took.
    pub bytes: Counter,
    /// Chunks handed to the sink whole.
    pub chunks: Counter,
    /// Deliveries that failed; each is tried again unless it was fatal.
    pub errors: Counter,
    /// Times that the reader took nothing for a while.
    pub busy: Counter,
    /// Files closed and opened again: on request, or because they were moved or removed.
    pub reopened: Counter,
    /// Files rotated.
    pub rotated: Counter,
    /// Rotations that failed; the file grows on.
    pub rotate_errors: Counter,
    /// Bytes of torn lines cut off a file: after a write that failed half-way, or found at opening.
    pub torn_bytes: Counter,
    /// Rotated files compressed.
    pub compressed: Counter,
    /// Compressions and removals of rotated files that failed.
    pub archive_errors: Counter,
    /// Rotated files removed because there were more than `keep`.
    pub removed: Counter,
}
