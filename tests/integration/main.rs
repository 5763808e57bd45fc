//! One program for all integration tests: each further one would link everything again.

mod codec;
#[path = "../lab/mod.rs"]
mod lab;
