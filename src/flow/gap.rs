//! What is missing, said as exactly as it is known.

use bitflags::bitflags;

/// Why records are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GapCause {
    /// A receive buffer was full and the kernel dropped events (`sk_drops`).
    Overrun,
    /// Reliable mode was released to keep the table from filling.
    Valve,
    /// A datagram was longer than what a buffer could take (`MSG_TRUNC`).
    Truncated,
    /// A message could not be understood.
    Malformed,
    /// The dump at start was cut off or interrupted.
    SnapshotIncomplete,
    /// The spool was full and its policy gave records up.
    SpoolFull,
    /// `nf_conntrack_events` was 0: the kernel made no events for flows that began meanwhile.
    EventsOff,
}

impl GapCause {
    pub const ALL: [GapCause; 7] = [
        GapCause::Overrun,
        GapCause::Valve,
        GapCause::Truncated,
        GapCause::Malformed,
        GapCause::SnapshotIncomplete,
        GapCause::SpoolFull,
        GapCause::EventsOff,
    ];

    pub fn name(self) -> &'static str {
        match self {
            GapCause::Overrun => "overrun",
            GapCause::Valve => "valve",
            GapCause::Truncated => "truncated",
            GapCause::Malformed => "malformed",
            GapCause::SnapshotIncomplete => "snapshot_incomplete",
            GapCause::SpoolFull => "spool_full",
            GapCause::EventsOff => "events_off",
        }
    }
}

/// How far a gap's count can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Precision {
    Exact,
    AtLeast,
    AtMost,
    Unknown,
}

impl Precision {
    pub const ALL: [Precision; 4] =
        [Precision::Exact, Precision::AtLeast, Precision::AtMost, Precision::Unknown];

    pub fn name(self) -> &'static str {
        match self {
            Precision::Exact => "exact",
            Precision::AtLeast => "at_least",
            Precision::AtMost => "at_most",
            Precision::Unknown => "unknown",
        }
    }
}

impl Precision {
    /// Of the sum of two counts.
    pub fn and(self, other: Precision) -> Precision {
        match (self, other) {
            (a, b) if a == b => a,
            (Precision::Exact, other) | (other, Precision::Exact) => other,
            _ => Precision::Unknown,
        }
    }
}

bitflags! {
    /// Which kinds of record the missing ones may have been.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct GapKinds: u8 {
        const NEW = 1 << 0;
        const UPDATE = 1 << 1;
        const DESTROY = 1 << 2;
        const EXPECT_NEW = 1 << 3;
        const EXPECT_DESTROY = 1 << 4;
        const SNAPSHOT = 1 << 5;
    }
}

/// A gap: the events named here have no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub cause: GapCause,
    /// How many; `None` with [`Precision::Unknown`].
    pub events: Option<u64>,
    pub precision: Precision,
    pub kinds: GapKinds,
    /// Between which times, nanoseconds since the epoch.
    pub from: u64,
    pub to: u64,
    /// The numbered records that were given up, first and last, where they had numbers.
    pub seqs: Option<(u64, u64)>,
}
