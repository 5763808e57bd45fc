//! The record: what a flow, a gap or the agent itself looks like to those who read it.
//!
//! Pure: no I/O, no clock.

pub mod community_id;
pub mod fields;
mod gap;
mod id;
mod record;
pub mod schema;
#[cfg(test)]
pub(crate) mod testing;

pub use community_id::CommunityId;
pub use fields::FieldSet;
pub use gap::{Gap, GapCause, GapKinds, Precision};
pub use id::FlowIds;
pub use record::{
    AgentAction, AgentNote, Batch, Body, Expectation, Flow, FlowEvent, Identity, Rare, Record, View,
};
