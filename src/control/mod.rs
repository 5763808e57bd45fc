//! Asks the kernel what is not told: dumps, statistics, the state of a network namespace; and
//! switches tracking on where that is wanted.
mod error;
mod netlink;
pub use error::Error;
