//! The codec of ctnetlink: bytes to events and requests to bytes. Pure: no I/O, no clock, no
//! allocation for an event.

mod event;

pub use event::{
    Attrs, Conn, Counters, DccpInfo, Event, Expect, ExpectAttrs, Extra, Kind, SeqAdj, Synproxy,
    TcpInfo, Tuple, TupleParts,
};
