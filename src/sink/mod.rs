//! Sinks: a driver for all, and one file for each kind.
//!
//! The driver owns retry, back-off, batching, counters and the cursor; a sink only opens and
//! delivers. Each sink has a thread of its own, so that a slow one delays no other.

use std::ops::Range;

/// Formatted records on their way out.
#[derive(Debug, Default)]
pub struct Chunk {
    pub bytes: Vec<u8>,
    /// Where each record's line ends in `bytes`.
    pub ends: Vec<usize>,
}

impl Chunk {
    /// The bytes of the records in `range`.
    pub fn lines(&self, range: Range<usize>) -> &[u8] {
        let start = range.start.checked_sub(1).map_or(0, |before| self.ends[before]);
        let end = range.end.checked_sub(1).map_or(0, |last| self.ends[last]);
        &self.bytes[start..end]
    }
}

/// Why a delivery stopped.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// It may go later; the driver tries again, for ever.
    #[error("{0}")]
    Retry(String),
    /// It will never go: the reader is gone (stdout closed) or the sink can't be used at all.
    #[error("{0}")]
    Fatal(String),
}

/// Something that takes lines.
pub trait Sink: Send + std::fmt::Debug {
    /// Takes the records `from..` of `chunk`. Gives how many of `chunk`'s records, counted from its
    /// beginning, are now delivered as whole lines; with an error, how many were before it.
    fn deliver(&mut self, chunk: &Chunk, from: usize) -> (usize, Result<(), SinkError>);

    /// SIGHUP: close and open again what has a name.
    fn reopen(&mut self);

    /// Called about once a second when there is nothing to deliver: rotation by time, files moved
    /// away.
    fn idle(&mut self);

    /// No more records will come: make what was delivered last.
    fn close(&mut self) -> Result<(), SinkError>;
}
