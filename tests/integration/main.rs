//! One program for all integration tests: each further one would link everything again.
//!
//! They work on this host's kernel, in network namespaces of their own. Without root, or a program
//! that they need, they say what they skipped; with CONNTRAIL_REQUIRE_ALL=1 they fail instead.

// Some say what they measured; the harness shows it with --nocapture. clippy.toml allows it in a test
// itself, not in a function that tests share.
#![allow(clippy::print_stdout)]

#[path = "../lab/mod.rs"]
mod lab;

mod agent;
mod capture;
mod cli;
mod codec;
mod control;
mod file_sink;
