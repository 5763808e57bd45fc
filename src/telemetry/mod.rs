//! What the agent says about itself: logs, counters, words to the service manager; and what it is
//! told by signals.
//!
//! Never stands in the way of a record: nothing here is called for an event, and what cannot be said
//! is not retried.

pub mod logs;
pub mod metrics;
pub mod notify;
pub mod signals;

pub use logs::Recurring;
pub use metrics::Metrics;
pub use notify::Notifier;
pub use signals::{Request, Signals};
