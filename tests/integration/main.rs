//! One program for all integration tests: each further one would link everything again.

mod control;
#[path = "../lab/mod.rs"]
mod lab;
