//! The record: what a flow, a gap or the agent itself looks like to those who read it.
//!
//! Pure: no I/O, no clock.

mod gap;
mod record;

pub use gap::{Gap, GapCause, GapKinds, Precision};
pub use record::{
    AgentAction, AgentNote, Batch, Body, Expectation, Flow, FlowEvent, Identity, Rare, Record, View,
};
