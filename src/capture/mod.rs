//! Receives conntrack events and hands them on as raw batches, with what was lost in its place
//! between them.
//!
//! Promises: a flow's NEW and UPDATEs are handed on before its DESTROY; every event that the kernel
//! counted as dropped lies in a [`Gap`](crate::flow::Gap). Never decodes, logs or syncs for an event.
//!
//! `socket` is the only place that talks to the kernel; `reader` is one round of reading, `worker` the
//! life around it, `thread` starts and stops it. `valve` says when reliable mode is released, `guard`
//! is the process that does it, `ledger` keeps the books of what that lost. `filter` makes the
//! kernel's part of the filter.

mod error;
mod filter;
mod guard;
mod item;
mod ledger;
mod queue;
mod reader;
mod socket;
mod stats;
mod thread;
mod valve;
mod worker;

pub use error::CaptureError;
pub use filter::{KernelFilter, Program};
pub use guard::{GUARD_COMMAND, guard_main};
pub use item::{Item, RawBatch, ValveChange};
pub use queue::{Closed, Queue, Receiver, Sender, queue};
pub use stats::{CaptureStats, SocketStats};
pub use thread::{Capture, CaptureConfig, CaptureHandle, Events, ReceiveBuffer};
pub use valve::ValveConfig;
