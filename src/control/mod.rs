//! Asks the kernel what is not told: dumps, statistics, the state of a network namespace; and
//! switches tracking on where that is wanted.
//!
//! Promises: every question ends within a time limit; what the kernel's errno means is in the
//! error's type; a dump never holds more than one batch in memory. Never receives events, and is
//! the only place that sees the netlink crates, which break their API often.

mod conntrack;
mod error;
mod findings;
mod host;
mod netlink;
#[cfg(test)]
mod scripted;
mod snapshot;
mod tracking;

pub use conntrack::{Control, DUMP_BATCH, DumpEnd, Family, Incomplete};
pub use error::Error;
pub use findings::{Code, Finding, Remedy, Severity, findings};
pub use host::{Access, Facts, Tracked, setting};
pub use snapshot::{push, snapshot};
pub use tracking::{Tracking, enable_tracking};
