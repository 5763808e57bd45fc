//! What travels from capture and control to the pipeline.

use std::sync::Arc;

use crate::flow::{AgentAction, Gap};
use crate::pipeline::Filter;

/// Netlink datagrams as they came, one after the other in one buffer.
#[derive(Clone, Debug, Default)]
pub struct RawBatch {
    /// The datagrams, each padded to `NLMSG_ALIGNTO`, so that the next one starts aligned.
    pub bytes: Vec<u8>,
    /// Start and length in `bytes` of each datagram.
    pub datagrams: Vec<(u32, u32)>,
    /// When they were handed on: nanoseconds since the epoch, one clock reading for the batch.
    pub arrived: u64,
}

impl RawBatch {
    /// Appends a copy of one datagram.
    pub fn push(&mut self, datagram: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(datagram);
        self.bytes.resize(start + datagram.len().next_multiple_of(4), 0);
        self.datagrams.push((start as u32, datagram.len() as u32));
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.datagrams.iter().map(|&(start, len)| &self.bytes[start as usize..][..len as usize])
    }

    /// What the batch weighs against the queue's bound: the memory that it holds, used or not.
    pub fn weight(&self) -> usize {
        self.bytes.capacity() + self.datagrams.capacity() * size_of::<(u32, u32)>()
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.datagrams.clear();
    }
}

/// The valve (DESIGN.md section 2) opened or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValveChange {
    pub open: bool,
    pub at: u64,
    /// `nf_conntrack_count` and the limit when it was decided, where they could be read.
    pub entries: Option<u64>,
    pub limit: Option<u64>,
}

/// One step of the way from the kernel to the pipeline, in order.
#[derive(Debug)]
pub enum Item {
    /// Live events.
    Events(RawBatch),
    /// Entries of the dump made at start.
    Snapshot(RawBatch),
    /// The dump is over; `complete` is false when it was cut off or interrupted.
    SnapshotEnd {
        complete: bool,
        from: u64,
        at: u64,
    },
    Gap(Gap),
    Valve(ValveChange),
    /// The agent says something of itself.
    Note {
        action: AgentAction,
        at: u64,
    },
    /// From here on other flows are shipped: in the queue, so that a reload has a place in the
    /// sequence. `in_kernel`: the socket filter does all of it.
    Filter {
        filter: Arc<Filter>,
        in_kernel: bool,
    },
}
