//! Records: what the spool keeps and the formats write. Not formatted, so that a format can change
//! while records wait.

use crate::capture::ValveChange;
use crate::ctnetlink::{Conn, ExpectAttrs, Extra, Tuple};

use super::{Gap, GapKinds, Precision};

/// One record. Its sequence number is its batch's first plus its place in the batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Nanoseconds since the epoch: the kernel's event time where it gives one, else arrival.
    pub ts: u64,
    pub body: Body,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    Flow(Flow),
    Expectation(Box<Expectation>),
    Gap(Gap),
    Agent(Box<AgentNote>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FlowEvent {
    New,
    Update,
    Destroy,
    /// An entry of the dump at start.
    Snapshot,
}

/// A conntrack entry at one moment of its life.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    pub event: FlowEvent,
    /// A snapshot that a live event of the same flow has overtaken: the truth stands earlier in
    /// the sequence.
    pub overtaken: bool,
    pub flow_id: u64,
    pub conn: Conn,
    /// Few flows have any of it.
    pub rare: Option<Box<Rare>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rare {
    pub extra: Extra,
    pub helper: Box<str>,
    pub secctx: Box<str>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expectation {
    pub destroyed: bool,
    pub present: ExpectAttrs,
    pub master: Tuple,
    pub tuple: Tuple,
    pub mask: Tuple,
    pub nat_tuple: Tuple,
    pub timeout: u32,
    pub id: u32,
    pub flags: u32,
    pub class: u32,
    pub nat_dir: u32,
    pub zone: u16,
    pub helper: Box<str>,
    pub function: Box<str>,
}

/// What the agent says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentNote {
    pub action: AgentAction,
    pub version: &'static str,
    pub valve: Option<ValveChange>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AgentAction {
    Started,
    Stopped,
    Reloaded,
    ValveOpened,
    ValveClosed,
}

impl AgentAction {
    pub fn name(self) -> &'static str {
        match self {
            AgentAction::Started => "started",
            AgentAction::Stopped => "stopped",
            AgentAction::Reloaded => "reloaded",
            AgentAction::ValveOpened => "valve_opened",
            AgentAction::ValveClosed => "valve_closed",
        }
    }
}

/// What is the same for every record of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub agent: String,
    /// Names this run: (`agent`, `epoch`, `seq`) names a record for ever.
    pub epoch: u64,
    /// The namespace's name where it has one, else its inode number.
    pub netns: String,
}

/// A record with all that a reader may ask of it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub identity: &'a Identity,
    pub seq: u64,
    pub record: &'a Record,
}

/// Consecutively numbered records.
#[derive(Debug, Default, PartialEq)]
pub struct Batch {
    pub base_seq: u64,
    pub records: Vec<Record>,
}

impl Batch {
    /// The number after its last record's.
    pub fn end_seq(&self) -> u64 {
        self.base_seq + self.records.len() as u64
    }

    pub fn views<'a>(&'a self, identity: &'a Identity) -> impl Iterator<Item = View<'a>> {
        self.records.iter().enumerate().map(move |(index, record)| View {
            identity,
            seq: self.base_seq + index as u64,
            record,
        })
    }
}

impl Record {
    pub fn event_name(&self) -> &'static str {
        match &self.body {
            Body::Flow(flow) => match flow.event {
                FlowEvent::New => "new",
                FlowEvent::Update => "update",
                FlowEvent::Destroy => "destroy",
                FlowEvent::Snapshot => "snapshot",
            },
            Body::Expectation(expect) if expect.destroyed => "expect_destroy",
            Body::Expectation(_) => "expect_new",
            Body::Gap(_) => "gap",
            Body::Agent(_) => "agent",
        }
    }

    /// How a gap that swallowed this record names it; nothing for records that are no events.
    pub fn gap_kind(&self) -> GapKinds {
        match &self.body {
            Body::Flow(flow) => match flow.event {
                FlowEvent::New => GapKinds::NEW,
                FlowEvent::Update => GapKinds::UPDATE,
                FlowEvent::Destroy => GapKinds::DESTROY,
                FlowEvent::Snapshot => GapKinds::SNAPSHOT,
            },
            Body::Expectation(expect) if expect.destroyed => GapKinds::EXPECT_DESTROY,
            Body::Expectation(_) => GapKinds::EXPECT_NEW,
            Body::Gap(gap) => gap.kinds,
            Body::Agent(_) => GapKinds::empty(),
        }
    }

    /// How many events are missing when this record is, and how exact that is: one, or as many as a
    /// gap record stands for.
    pub fn missing(&self) -> (u64, Precision) {
        match &self.body {
            Body::Flow(_) | Body::Expectation(_) => (1, Precision::Exact),
            Body::Agent(_) => (0, Precision::Exact),
            Body::Gap(gap) => (gap.events.unwrap_or(0), gap.precision),
        }
    }

    /// What it weighs in memory.
    pub fn weight(&self) -> usize {
        size_of::<Record>()
            + match &self.body {
                Body::Flow(flow) => flow
                    .rare
                    .as_ref()
                    .map_or(0, |rare| size_of::<Rare>() + rare.helper.len() + rare.secctx.len()),
                Body::Expectation(expect) => {
                    size_of::<Expectation>() + expect.helper.len() + expect.function.len()
                }
                Body::Agent(_) => size_of::<AgentNote>(),
                Body::Gap(_) => 0,
            }
    }
}
