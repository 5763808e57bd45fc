//! Sinks: a driver for all, and one file for each kind.
//!
//! The driver owns retry, back-off, batching, counters and the cursor; a sink only opens and
//! delivers. Each sink has a thread of its own, so that a slow one delays no other. A record is
//! acknowledged only after the sink has taken its whole line. Nothing here syncs a write to disk:
//! what the kernel has taken counts as delivered.

mod driver;
mod file;
mod retry;
mod stats;
mod stdout;

use std::ops::Range;

pub use driver::{Outcome, SinkHandle, SinkParts, SinkReport, start};
pub use file::{Compress, FileConfig, FileSink};
pub use stats::{Counter, SinkStats};
pub use stdout::StdoutSink;

/// Formatted records on their way out.
#[derive(Debug, Default)]
pub struct Chunk {
    pub bytes: Vec<u8>,
    /// Where each record's line ends in `bytes`.
    pub ends: Vec<usize>,
}

impl Chunk {
    /// How many records it has.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of the records in `range`.
    pub fn lines(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[self.start(range.start)..self.start(range.end)]
    }

    /// Where the line of the record `index` starts.
    pub fn start(&self, index: usize) -> usize {
        index.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// How many records, counted from the beginning, end within the first `bytes`.
    pub fn whole_within(&self, bytes: usize) -> usize {
        self.ends.partition_point(|&end| end <= bytes)
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }
}

/// Why a delivery stopped, by what the driver does about it.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// It may go later; the driver tries again, for ever.
    #[error("{0}")]
    Retry(String),
    /// The reader takes nothing just now, which is no error. The sink may have given out part of a
    /// line: the driver calls again with the same chunk and the same sink.
    #[error("the reader takes nothing")]
    Busy,
    /// The reader went away (stdout closed), which is its right: the sink ends quietly.
    #[error("{0}")]
    Gone(String),
    /// It will never go: the sink can't be used at all.
    #[error("{0}")]
    Fatal(String),
}

/// Something that takes lines.
pub trait Sink: Send + std::fmt::Debug {
    /// Takes the records `from..` of `chunk`. Gives how many of `chunk`'s records, counted from its
    /// beginning, are now delivered as whole lines; with an error, how many were before it.
    /// Blocks for a second at most where it can help it.
    fn deliver(&mut self, chunk: &Chunk, from: usize) -> (usize, Result<(), SinkError>);

    /// SIGHUP: close what has a name; the next `idle` or `deliver` opens it again.
    fn reopen(&mut self);

    /// Called at start, after `reopen`, and about once a second when there is nothing to deliver:
    /// opening, rotation by time, files moved away.
    fn idle(&mut self) -> Result<(), SinkError>;

    /// No more records will come: make what was delivered last.
    fn close(&mut self) -> Result<(), SinkError>;
}
