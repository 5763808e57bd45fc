//! The only fan-out and the only owner of back-pressure: one log of records, one sequence, a cursor
//! a sink.
//!
//! Promises: records get consecutive numbers in the order of `append`; each cursor sees each record
//! once, in order, until it is acknowledged, or a gap record that says which numbers it will not
//! see. Never formats, and never drops without a gap record.

mod memory;

pub use memory::{Cursor, Next, Spool, SpoolClosed, SpoolConfig, SpoolTally, Waker, WhenFull};
