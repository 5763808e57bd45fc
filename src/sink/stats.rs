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

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one sink. They outlive a reload that changes the sink's settings.
        #[derive(Debug, Default)]
        pub struct SinkStats {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl SinkStats {
            /// Every counter with its name, in the order of the struct.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

stats! {
    /// Records acknowledged in the spool.
    records_acked,
    /// Bytes of the lines that the sink took.
    bytes,
    /// Chunks handed to the sink whole.
    chunks,
    /// Deliveries that failed; each is tried again unless it was fatal.
    errors,
    /// Times that the reader took nothing for a while.
    busy,
    /// Files closed and opened again: on request, or because they were moved or removed.
    reopened,
    /// Files rotated.
    rotated,
    /// Rotations that failed; the file grows on.
    rotate_errors,
    /// Bytes of torn lines cut off a file: after a write that failed half-way, or found at opening.
    torn_bytes,
    /// Rotated files compressed.
    compressed,
    /// Compressions and removals of rotated files that failed.
    archive_errors,
    /// Rotated files removed because there were more than `keep`.
    removed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_listed_by_its_name() {
        let stats = SinkStats::default();
        stats.records_acked.add(2);
        stats.removed.add(3);
        let all = stats.all();
        assert_eq!(all.first(), Some(&("records_acked", 2)));
        assert_eq!(all.last(), Some(&("removed", 3)));
        assert_eq!(size_of::<SinkStats>(), all.len() * size_of::<Counter>());
    }
}
