//! The codec of ctnetlink: bytes to events and requests to bytes. Pure: no I/O, no clock, no
//! allocation for an event.
//!
//! A datagram goes through [`messages`]; [`Message::class`] says which `decode_*` reads each one.
//! What is not known is skipped and counted in a [`Tally`]; what is malformed is refused with a
//! [`Malformed`].

mod decode;
mod event;
pub mod names;
pub mod request;
pub mod uapi;
mod wire;

pub use decode::{decode_conn, decode_expect, decode_expect_stats, decode_stats, decode_stats_cpu};
pub use event::{
    Attrs, Conn, Counters, CpuStats, DccpInfo, Event, Expect, ExpectAttrs, ExpectStats, Extra,
    Kind, SeqAdj, Stats, Synproxy, TcpInfo, Tuple, TupleParts,
};
pub use wire::{
    Attribute, Attributes, Class, Malformed, Message, Messages, Outcome, Reason, Tally, messages,
};
