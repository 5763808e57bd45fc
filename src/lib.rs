//! conntrail ships Linux conntrack events as structured records.
//!
//! The modules stand in the order of the data: `capture` receives, `ctnetlink` decodes, `flow` says
//! what a record is, `pipeline` turns one into the other, `spool` keeps and fans out, `format` writes
//! bytes, `sink` delivers them. `control` asks the kernel what is not told; `agent` wires it all.

pub mod agent;
pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
pub mod ctnetlink;
pub mod flow;
pub mod format;
pub mod pipeline;
pub mod sink;
pub mod spool;
pub mod telemetry;
