//! The lab: network namespaces, synthetic load and real traffic, and the measures taken on them.
//!
//! It promises to be an independent oracle: it builds and reads netlink messages by its own few
//! lines and never uses the library's codec, so that a mistake there cannot agree with itself
//! here. Traffic goes only to loopback and to addresses inside namespaces that it made; each
//! namespace, table and changed limit is put back on drop, also after a panic.
//!
//! Used three ways: as a module by the integration tests, as the program `lab`, and through that
//! program by `make demo` and `make bench`.

// Each of the two programs that include this module uses another part of it.
#![allow(dead_code)]
// `demo` and `bench` talk to people at a terminal.
#![allow(clippy::print_stdout)]

pub(crate) mod agent;
pub(crate) mod bench;
pub(crate) mod demo;
pub(crate) mod floor;
pub(crate) mod gateway;
pub(crate) mod generator;
pub(crate) mod limit;
pub(crate) mod message;
pub(crate) mod need;
pub(crate) mod netns;
pub(crate) mod probe;
pub(crate) mod records;
pub(crate) mod sys;
pub(crate) mod traffic;

/// What went wrong, for a person to read: the lab has no caller that would tell errors apart.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Error>;
