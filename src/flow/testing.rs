//! Records for tests: any that could be, and a few by name.

use proptest::prelude::*;

use crate::capture::ValveChange;
use crate::ctnetlink::{
    Attrs, Conn, Counters, DccpInfo, ExpectAttrs, Extra, SeqAdj, Synproxy, TcpInfo, Tuple,
    TupleParts,
};

use super::{
    AgentAction, AgentNote, Body, Expectation, Flow, FlowEvent, Gap, GapCause, GapKinds, Identity,
    Precision, Rare, Record,
};

pub(crate) fn identity() -> Identity {
    Identity { agent: "gw1".to_owned(), epoch: 1_795_000_000_000, netns: "4026531840".to_owned() }
}

/// 10.0.0.5:51234 → 198.51.100.7:443, masqueraded to 203.0.113.9:61022, ended.
pub(crate) fn masqueraded() -> Record {
    let ip = |a: [u8; 4]| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&a);
        bytes
    };
    let parts = TupleParts::SRC
        | TupleParts::DST
        | TupleParts::PROTO
        | TupleParts::SRC_PORT
        | TupleParts::DST_PORT;
    let tuple = Tuple { parts, proto: 6, ..Tuple::default() };
    let conn = Conn {
        present: Attrs::TUPLE_ORIG
            | Attrs::TUPLE_REPLY
            | Attrs::STATUS
            | Attrs::COUNTERS_ORIG
            | Attrs::COUNTERS_REPLY
            | Attrs::ID
            | Attrs::START
            | Attrs::STOP
            | Attrs::EVENT_TIME
            | Attrs::TCP_STATE,
        orig: Tuple {
            src_bytes: ip([10, 0, 0, 5]),
            dst_bytes: ip([198, 51, 100, 7]),
            src_port: 51234,
            dst_port: 443,
            ..tuple
        },
        reply: Tuple {
            src_bytes: ip([198, 51, 100, 7]),
            dst_bytes: ip([203, 0, 113, 9]),
            src_port: 443,
            dst_port: 61022,
            ..tuple
        },
        orig_counters: Counters { packets: 12, bytes: 1834 },
        reply_counters: Counters { packets: 10, bytes: 90210 },
        start: 1_795_000_000_000_000_001,
        stop: 1_795_000_012_345_678_901,
        event_time: 1_795_000_012_345_679_000,
        status: 0x19e,
        id: 3_141_592_653,
        tcp: TcpInfo { state: 7, ..TcpInfo::default() },
        ..Conn::default()
    };
    let flow = Flow {
        event: FlowEvent::Destroy,
        overtaken: false,
        flow_id: 0x0123_4567_89ab_cdef,
        conn,
        rare: None,
    };
    Record { ts: conn.event_time, body: Body::Flow(flow) }
}

pub(crate) fn any_tuple() -> impl Strategy<Value = Tuple> {
    (any::<([u8; 16], [u8; 16])>(), any::<(u8, bool)>(), any::<([u16; 4], [u8; 2])>(), protocol())
        .prop_map(|((src, dst), (parts, v6), (numbers, icmp), proto)| Tuple {
            src_bytes: src,
            dst_bytes: dst,
            parts: TupleParts::from_bits_truncate(parts),
            v6,
            proto,
            icmp_type: icmp[0],
            icmp_code: icmp[1],
            icmp_id: numbers[0],
            src_port: numbers[1],
            dst_port: numbers[2],
            zone: numbers[3],
        })
}

fn protocol() -> impl Strategy<Value = u8> {
    prop_oneof![proptest::sample::select(vec![1, 6, 17, 33, 47, 58, 132, 136]), any::<u8>()]
}

pub(crate) fn any_conn() -> impl Strategy<Value = Conn> {
    (
        any_tuple(),
        any_tuple(),
        any::<(u64, [u64; 7])>(),
        any::<([u32; 5], u16, [u8; 5], [u16; 2])>(),
    )
        .prop_map(|(orig, reply, (present, long), (words, zone, bytes, flags))| Conn {
            present: Attrs::from_bits_truncate(present),
            orig,
            reply,
            orig_counters: Counters { packets: long[0], bytes: long[1] },
            reply_counters: Counters { packets: long[2], bytes: long[3] },
            start: long[4],
            stop: long[5],
            event_time: long[6],
            status: words[0],
            timeout: words[1],
            mark: words[2],
            id: words[3],
            use_count: words[4],
            zone,
            tcp: TcpInfo {
                state: bytes[0],
                wscale_orig: bytes[1],
                wscale_reply: bytes[2],
                flags_orig: flags[0],
                flags_reply: flags[1],
            },
            sctp_state: bytes[3],
            dccp_state: bytes[4],
        })
}

fn any_rare() -> impl Strategy<Value = Rare> {
    let numbers = any::<([u8; 16], [u32; 7], [i32; 4], u8, u64)>();
    (any_tuple(), numbers, any::<(String, String)>()).prop_map(
        |(master, (labels, words, offsets, role, handshake_seq), (helper, secctx))| {
            let adjust = |at: usize| SeqAdj {
                correction_pos: words[2 + at],
                offset_before: offsets[2 * at],
                offset_after: offsets[2 * at + 1],
            };
            let extra = Extra {
                master,
                labels,
                sctp_vtag_orig: words[0],
                sctp_vtag_reply: words[1],
                dccp: DccpInfo { role, handshake_seq },
                seq_adj_orig: adjust(0),
                seq_adj_reply: adjust(1),
                synproxy: Synproxy { isn: words[4], its: words[5], tsoff: words[6] },
            };
            Rare { extra, helper: helper.into(), secctx: secctx.into() }
        },
    )
}

fn any_flow() -> impl Strategy<Value = Body> {
    let events = vec![FlowEvent::New, FlowEvent::Update, FlowEvent::Destroy, FlowEvent::Snapshot];
    let rare = proptest::option::of(any_rare());
    (proptest::sample::select(events), any::<(bool, u64)>(), any_conn(), rare).prop_map(
        |(event, (overtaken, flow_id), conn, rare)| {
            Body::Flow(Flow { event, overtaken, flow_id, conn, rare: rare.map(Box::new) })
        },
    )
}

fn any_expectation() -> impl Strategy<Value = Body> {
    let tuples = (any_tuple(), any_tuple(), any_tuple(), any_tuple());
    (tuples, any::<(bool, u32, [u32; 5], u16)>(), any::<(String, String)>()).prop_map(
        |((master, tuple, mask, nat_tuple), (destroyed, present, words, zone), names)| {
            Body::Expectation(Box::new(Expectation {
                destroyed,
                present: ExpectAttrs::from_bits_truncate(present),
                master,
                tuple,
                mask,
                nat_tuple,
                timeout: words[0],
                id: words[1],
                flags: words[2],
                class: words[3],
                nat_dir: words[4],
                zone,
                helper: names.0.into(),
                function: names.1.into(),
            }))
        },
    )
}

pub(crate) fn any_gap() -> impl Strategy<Value = Gap> {
    let seqs = any::<Option<(u64, u64)>>();
    let what = (
        proptest::sample::select(GapCause::ALL.to_vec()),
        proptest::sample::select(Precision::ALL.to_vec()),
    );
    (what, any::<(Option<u64>, u8, u64, u64)>(), seqs).prop_map(
        |((cause, precision), (events, kinds, from, to), seqs)| Gap {
            cause,
            events,
            precision,
            kinds: GapKinds::from_bits_truncate(kinds),
            from,
            to,
            seqs,
        },
    )
}

fn any_note() -> impl Strategy<Value = Body> {
    let actions = vec![
        AgentAction::Started,
        AgentAction::Stopped,
        AgentAction::Reloaded,
        AgentAction::ValveOpened,
        AgentAction::ValveClosed,
    ];
    (proptest::sample::select(actions), any::<Option<(bool, u64, u64, u64)>>()).prop_map(
        |(action, valve)| {
            let valve = valve.map(|(open, at, entries, limit)| ValveChange {
                open,
                at,
                entries: Some(entries),
                limit: Some(limit),
            });
            Body::Agent(Box::new(AgentNote { action, version: "1.2.3", valve }))
        },
    )
}

pub(crate) fn any_record() -> impl Strategy<Value = Record> {
    let body = prop_oneof![
        4 => any_flow(),
        1 => any_expectation(),
        1 => any_gap().prop_map(Body::Gap),
        1 => any_note(),
    ];
    (any::<u64>(), body).prop_map(|(ts, body)| Record { ts, body })
}
