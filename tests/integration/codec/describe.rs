//! A message in words: one line with what is present, for snapshots and for people.

use std::fmt::Write;

use conntrail::ctnetlink::{
    Attrs, Class, Counters, Event, Expect, ExpectAttrs, Message, SeqAdj, Tally, Tuple, TupleParts,
    decode_conn, decode_expect, decode_expect_stats, decode_stats, decode_stats_cpu, names,
};

pub(super) fn describe(message: &Message<'_>, tally: &mut Tally) -> String {
    match message.class() {
        Class::Conn(_) => {
            let mut event = Event::default();
            match decode_conn(message, &mut event, tally) {
                Ok(()) => describe_event(&event),
                Err(malformed) => malformed.to_string(),
            }
        }
        Class::Expect { .. } => match decode_expect(message, tally) {
            Ok(expect) => describe_expect(&expect),
            Err(malformed) => malformed.to_string(),
        },
        Class::StatsCpu => format!("{:?}", decode_stats_cpu(message, tally)),
        Class::Stats => format!("{:?}", decode_stats(message, tally)),
        Class::ExpectStatsCpu => format!("{:?}", decode_expect_stats(message, tally)),
        class @ (Class::Done | Class::Error) => match message.outcome() {
            Ok(outcome) => {
                let text = outcome.text.map(String::from_utf8_lossy);
                format!("{class:?} errno={} text={text:?}", outcome.errno)
            }
            Err(malformed) => malformed.to_string(),
        },
        class @ (Class::Noop | Class::Overrun | Class::Unknown) => {
            tally.unknown_messages += u64::from(class == Class::Unknown);
            format!("{class:?} type={:#x}", message.message_type)
        }
    }
}

fn describe_event(event: &Event<'_>) -> String {
    let (conn, extra) = (&event.conn, &event.extra);
    let mut out = format!("{:?}", event.kind);
    let mut put = |attr: Attrs, name: &str, value: &dyn std::fmt::Display| {
        if conn.has(attr) {
            write!(out, " {name}={value}").unwrap();
        }
    };
    put(Attrs::TUPLE_ORIG, "orig", &tuple(&conn.orig));
    put(Attrs::TUPLE_REPLY, "reply", &tuple(&conn.reply));
    put(Attrs::ID, "id", &format!("{:#010x}", conn.id));
    put(Attrs::ZONE, "zone", &conn.zone);
    put(Attrs::STATUS, "status", &names::status_names(conn.status).collect::<Vec<_>>().join("|"));
    put(Attrs::TIMEOUT, "timeout", &conn.timeout);
    put(Attrs::MARK, "mark", &format!("{:#x}", conn.mark));
    put(Attrs::USE, "use", &conn.use_count);
    put(Attrs::COUNTERS_ORIG, "counted", &counters(&conn.orig_counters));
    put(Attrs::COUNTERS_REPLY, "counted-back", &counters(&conn.reply_counters));
    put(Attrs::START, "start", &conn.start);
    put(Attrs::STOP, "stop", &conn.stop);
    put(Attrs::EVENT_TIME, "event-time", &conn.event_time);
    put(Attrs::TCP_STATE, "tcp", &names::tcp_state(conn.tcp.state).unwrap_or("?"));
    put(Attrs::TCP_WSCALE_ORIG, "wscale", &conn.tcp.wscale_orig);
    put(Attrs::TCP_WSCALE_REPLY, "wscale-back", &conn.tcp.wscale_reply);
    put(Attrs::TCP_FLAGS_ORIG, "flags", &format!("{:#06x}", conn.tcp.flags_orig));
    put(Attrs::TCP_FLAGS_REPLY, "flags-back", &format!("{:#06x}", conn.tcp.flags_reply));
    put(Attrs::SCTP_STATE, "sctp", &names::sctp_state(conn.sctp_state).unwrap_or("?"));
    put(Attrs::SCTP_VTAG_ORIG, "vtag", &extra.sctp_vtag_orig);
    put(Attrs::SCTP_VTAG_REPLY, "vtag-back", &extra.sctp_vtag_reply);
    put(Attrs::DCCP_STATE, "dccp", &names::dccp_state(conn.dccp_state).unwrap_or("?"));
    put(Attrs::DCCP_ROLE, "role", &extra.dccp.role);
    put(Attrs::DCCP_HANDSHAKE_SEQ, "handshake", &extra.dccp.handshake_seq);
    let labels: Vec<u8> = (0..128).filter(|&label| extra.has_label(label)).collect();
    put(Attrs::LABELS, "labels", &format!("{labels:?}"));
    put(Attrs::HELPER, "helper", &String::from_utf8_lossy(event.helper));
    put(Attrs::SECCTX, "secctx", &String::from_utf8_lossy(event.secctx));
    put(Attrs::MASTER, "master", &tuple(&extra.master));
    put(Attrs::SEQ_ADJ_ORIG, "seqadj", &seqadj(&extra.seq_adj_orig));
    put(Attrs::SEQ_ADJ_REPLY, "seqadj-back", &seqadj(&extra.seq_adj_reply));
    let synproxy = &extra.synproxy;
    let words = format!("{}/{}/{}", synproxy.isn, synproxy.its, synproxy.tsoff);
    put(Attrs::SYNPROXY, "synproxy", &words);
    out
}

fn describe_expect(expect: &Expect<'_>) -> String {
    let mut out = String::from(if expect.destroyed { "ExpectDestroy" } else { "ExpectNew" });
    let mut put = |attr: ExpectAttrs, name: &str, value: &dyn std::fmt::Display| {
        if expect.present.contains(attr) {
            write!(out, " {name}={value}").unwrap();
        }
    };
    put(ExpectAttrs::MASTER, "master", &tuple(&expect.master));
    put(ExpectAttrs::TUPLE, "tuple", &tuple(&expect.tuple));
    put(ExpectAttrs::MASK, "mask", &tuple(&expect.mask));
    put(ExpectAttrs::NAT_TUPLE, "nat", &tuple(&expect.nat_tuple));
    put(ExpectAttrs::NAT_DIR, "nat-dir", &expect.nat_dir);
    put(ExpectAttrs::ID, "id", &format!("{:#010x}", expect.id));
    put(ExpectAttrs::TIMEOUT, "timeout", &expect.timeout);
    put(ExpectAttrs::ZONE, "zone", &expect.zone);
    put(ExpectAttrs::FLAGS, "flags", &expect.flags);
    put(ExpectAttrs::CLASS, "class", &expect.class);
    put(ExpectAttrs::HELPER, "helper", &String::from_utf8_lossy(expect.helper));
    put(ExpectAttrs::FUNCTION, "function", &String::from_utf8_lossy(expect.function));
    out
}

fn tuple(tuple: &Tuple) -> String {
    let mut out = String::from("(");
    let mut put = |part: TupleParts, value: String| {
        if tuple.has(part) {
            let space = if out.len() > 1 { " " } else { "" };
            write!(out, "{space}{value}").unwrap();
        }
    };
    put(TupleParts::PROTO, names::protocol(tuple.proto).to_owned());
    put(TupleParts::SRC, tuple.src().to_string());
    put(TupleParts::SRC_PORT, format!("sport={}", tuple.src_port));
    put(TupleParts::DST, format!("> {}", tuple.dst()));
    put(TupleParts::DST_PORT, format!("dport={}", tuple.dst_port));
    let icmp = format!("type={} code={} id={}", tuple.icmp_type, tuple.icmp_code, tuple.icmp_id);
    put(TupleParts::ICMP, icmp);
    put(TupleParts::ZONE, format!("zone={}", tuple.zone));
    out + ")"
}

fn counters(counters: &Counters) -> String {
    format!("{}p/{}b", counters.packets, counters.bytes)
}

fn seqadj(adj: &SeqAdj) -> String {
    format!("{}:{}>{}", adj.correction_pos, adj.offset_before, adj.offset_after)
}
