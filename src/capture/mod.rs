//! Receives conntrack events and hands them on as raw batches, with what was lost in its place
//! between them.
//!
//! Promises: a flow's NEW and UPDATEs are handed on before its DESTROY; every event that the kernel
//! counted as dropped lies in a [`Gap`]. Never decodes, logs or syncs for an event.

mod item;
mod queue;

pub use item::{Item, RawBatch, ValveChange};
pub use queue::{Closed, Queue, Receiver, Sender, queue};
