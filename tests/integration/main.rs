//! Tests against this host's kernel, in network namespaces of their own. They need root and say so.

#[path = "../lab/mod.rs"]
mod lab;

mod capture;
