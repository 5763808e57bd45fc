//! Tests against this host's kernel, in network namespaces of their own. They need root and say so.
//! One program for all: each further one would link everything again.

#[path = "../lab/mod.rs"]
mod lab;

mod capture;
mod cli;
mod control;
