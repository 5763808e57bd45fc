//! The codec turned round: writes events as the kernel does, and makes any event that can be.
//!
//! It writes with the library's attribute writer, whose bytes the kernel accepts as requests, and
//! orders and nests attributes by the kernel's source.

use conntrail::ctnetlink::request::{Header, Writer, message_type, write_tuple};
use conntrail::ctnetlink::uapi::conntrack::{
    counters as cnt, cta, exp_msg, expect as exp, expect_nat, help, msg, protoinfo as info, secctx,
    seqadj, synproxy, tstamp,
};
use conntrail::ctnetlink::uapi::netlink::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_MULTI};
use conntrail::ctnetlink::uapi::nfnetlink::{NFNL_SUBSYS_CTNETLINK, NFNL_SUBSYS_CTNETLINK_EXP};
use conntrail::ctnetlink::{
    Attrs, Conn, Counters, DccpInfo, Event, Expect, ExpectAttrs, Extra, Kind, SeqAdj, Synproxy,
    TcpInfo, Tuple, TupleParts,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// An event with its strings, which a borrowed one cannot own.
#[derive(Clone, Debug)]
pub(super) struct Owned {
    pub(super) event: Event<'static>,
    pub(super) helper: Vec<u8>,
    pub(super) secctx: Vec<u8>,
}

impl Owned {
    pub(super) fn event(&self) -> Event<'_> {
        Event { helper: &self.helper, secctx: &self.secctx, ..self.event.clone() }
    }
}

pub(super) fn encode_event(event: &Event<'_>) -> Vec<u8> {
    let (command, flags) = match event.kind {
        Kind::New => (msg::IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL),
        Kind::Update => (msg::IPCTNL_MSG_CT_NEW, 0),
        Kind::Destroy => (msg::IPCTNL_MSG_CT_DELETE, 0),
        Kind::Entry => (msg::IPCTNL_MSG_CT_NEW, NLM_F_MULTI),
    };
    let mut writer = Writer::new();
    writer.message(Header {
        message_type: message_type(NFNL_SUBSYS_CTNETLINK, command),
        flags,
        seq: 0,
        family: if event.conn.orig.v6 { 10 } else { 2 },
        res_id: 0,
    });
    write_conn(&mut writer, event);
    writer.finish()
}

fn write_conn(writer: &mut Writer, event: &Event<'_>) {
    let (conn, extra) = (&event.conn, &event.extra);
    let has = |attrs: Attrs| conn.has(attrs);
    if has(Attrs::TUPLE_ORIG) {
        write_tuple(writer, cta::CTA_TUPLE_ORIG, &conn.orig);
    }
    if has(Attrs::TUPLE_REPLY) {
        write_tuple(writer, cta::CTA_TUPLE_REPLY, &conn.reply);
    }
    let words = [
        (Attrs::ID, cta::CTA_ID, conn.id),
        (Attrs::STATUS, cta::CTA_STATUS, conn.status),
        (Attrs::TIMEOUT, cta::CTA_TIMEOUT, conn.timeout),
        (Attrs::MARK, cta::CTA_MARK, conn.mark),
        (Attrs::USE, cta::CTA_USE, conn.use_count),
    ];
    for (attr, kind, value) in words {
        if has(attr) {
            writer.be32(kind, value);
        }
    }
    if has(Attrs::ZONE) {
        writer.be16(cta::CTA_ZONE, conn.zone);
    }
    for (attr, kind, counters) in [
        (Attrs::COUNTERS_ORIG, cta::CTA_COUNTERS_ORIG, &conn.orig_counters),
        (Attrs::COUNTERS_REPLY, cta::CTA_COUNTERS_REPLY, &conn.reply_counters),
    ] {
        if has(attr) {
            writer.nest(kind, |writer| {
                writer.be64(cnt::CTA_COUNTERS_PACKETS, counters.packets);
                writer.be64(cnt::CTA_COUNTERS_BYTES, counters.bytes);
            });
        }
    }
    if conn.present.intersects(Attrs::START | Attrs::STOP) {
        writer.nest(cta::CTA_TIMESTAMP, |writer| {
            if has(Attrs::START) {
                writer.be64(tstamp::CTA_TIMESTAMP_START, conn.start);
            }
            if has(Attrs::STOP) {
                writer.be64(tstamp::CTA_TIMESTAMP_STOP, conn.stop);
            }
        });
    }
    if has(Attrs::EVENT_TIME) {
        writer.be64(cta::CTA_TIMESTAMP_EVENT, conn.event_time);
    }
    write_protoinfo(writer, conn, extra);
    if has(Attrs::HELPER) {
        writer.nest(cta::CTA_HELP, |writer| {
            writer.text(help::CTA_HELP_NAME, event.helper);
        });
    }
    if has(Attrs::LABELS) {
        writer.bytes(cta::CTA_LABELS, &extra.labels);
    }
    if has(Attrs::SECCTX) {
        writer.nest(cta::CTA_SECCTX, |writer| {
            writer.text(secctx::CTA_SECCTX_NAME, event.secctx);
        });
    }
    if has(Attrs::MASTER) {
        write_tuple(writer, cta::CTA_TUPLE_MASTER, &extra.master);
    }
    for (attr, kind, adj) in [
        (Attrs::SEQ_ADJ_ORIG, cta::CTA_SEQ_ADJ_ORIG, &extra.seq_adj_orig),
        (Attrs::SEQ_ADJ_REPLY, cta::CTA_SEQ_ADJ_REPLY, &extra.seq_adj_reply),
    ] {
        if has(attr) {
            writer.nest(kind, |writer| {
                writer.be32(seqadj::CTA_SEQADJ_CORRECTION_POS, adj.correction_pos);
                writer.be32(seqadj::CTA_SEQADJ_OFFSET_BEFORE, adj.offset_before as u32);
                writer.be32(seqadj::CTA_SEQADJ_OFFSET_AFTER, adj.offset_after as u32);
            });
        }
    }
    if has(Attrs::SYNPROXY) {
        writer.nest(cta::CTA_SYNPROXY, |writer| {
            writer.be32(synproxy::CTA_SYNPROXY_ISN, extra.synproxy.isn);
            writer.be32(synproxy::CTA_SYNPROXY_ITS, extra.synproxy.its);
            writer.be32(synproxy::CTA_SYNPROXY_TSOFF, extra.synproxy.tsoff);
        });
    }
}

const TCP: Attrs = Attrs::TCP_STATE
    .union(Attrs::TCP_WSCALE_ORIG)
    .union(Attrs::TCP_WSCALE_REPLY)
    .union(Attrs::TCP_FLAGS_ORIG)
    .union(Attrs::TCP_FLAGS_REPLY);
const SCTP: Attrs = Attrs::SCTP_STATE.union(Attrs::SCTP_VTAG_ORIG).union(Attrs::SCTP_VTAG_REPLY);
const DCCP: Attrs = Attrs::DCCP_STATE.union(Attrs::DCCP_ROLE).union(Attrs::DCCP_HANDSHAKE_SEQ);

fn write_protoinfo(writer: &mut Writer, conn: &Conn, extra: &Extra) {
    if !conn.present.intersects(TCP | SCTP | DCCP) {
        return;
    }
    writer.nest(cta::CTA_PROTOINFO, |writer| {
        if conn.present.intersects(TCP) {
            writer.nest(info::CTA_PROTOINFO_TCP, |writer| write_tcp(writer, conn));
        }
        if conn.present.intersects(DCCP) {
            writer.nest(info::CTA_PROTOINFO_DCCP, |writer| write_dccp(writer, conn, extra));
        }
        if conn.present.intersects(SCTP) {
            writer.nest(info::CTA_PROTOINFO_SCTP, |writer| write_sctp(writer, conn, extra));
        }
    });
}

fn write_tcp(writer: &mut Writer, conn: &Conn) {
    for (attr, kind, value) in [
        (Attrs::TCP_STATE, info::CTA_PROTOINFO_TCP_STATE, conn.tcp.state),
        (Attrs::TCP_WSCALE_ORIG, info::CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, conn.tcp.wscale_orig),
        (Attrs::TCP_WSCALE_REPLY, info::CTA_PROTOINFO_TCP_WSCALE_REPLY, conn.tcp.wscale_reply),
    ] {
        if conn.has(attr) {
            writer.u8(kind, value);
        }
    }
    for (attr, kind, value) in [
        (Attrs::TCP_FLAGS_ORIG, info::CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, conn.tcp.flags_orig),
        (Attrs::TCP_FLAGS_REPLY, info::CTA_PROTOINFO_TCP_FLAGS_REPLY, conn.tcp.flags_reply),
    ] {
        if conn.has(attr) {
            writer.be16(kind, value);
        }
    }
}

fn write_dccp(writer: &mut Writer, conn: &Conn, extra: &Extra) {
    if conn.has(Attrs::DCCP_STATE) {
        writer.u8(info::CTA_PROTOINFO_DCCP_STATE, conn.dccp_state);
    }
    if conn.has(Attrs::DCCP_ROLE) {
        writer.u8(info::CTA_PROTOINFO_DCCP_ROLE, extra.dccp.role);
    }
    if conn.has(Attrs::DCCP_HANDSHAKE_SEQ) {
        writer.be64(info::CTA_PROTOINFO_DCCP_HANDSHAKE_SEQ, extra.dccp.handshake_seq);
    }
}

fn write_sctp(writer: &mut Writer, conn: &Conn, extra: &Extra) {
    if conn.has(Attrs::SCTP_STATE) {
        writer.u8(info::CTA_PROTOINFO_SCTP_STATE, conn.sctp_state);
    }
    if conn.has(Attrs::SCTP_VTAG_ORIG) {
        writer.be32(info::CTA_PROTOINFO_SCTP_VTAG_ORIGINAL, extra.sctp_vtag_orig);
    }
    if conn.has(Attrs::SCTP_VTAG_REPLY) {
        writer.be32(info::CTA_PROTOINFO_SCTP_VTAG_REPLY, extra.sctp_vtag_reply);
    }
}

pub(super) fn encode_expect(expect: &Expect<'_>) -> Vec<u8> {
    let command =
        if expect.destroyed { exp_msg::IPCTNL_MSG_EXP_DELETE } else { exp_msg::IPCTNL_MSG_EXP_NEW };
    let mut writer = Writer::new();
    let message_type = message_type(NFNL_SUBSYS_CTNETLINK_EXP, command);
    writer.message(Header { message_type, flags: 0, seq: 0, family: 2, res_id: 0 });
    let has = |attrs: ExpectAttrs| expect.present.contains(attrs);
    for (attr, kind, tuple) in [
        (ExpectAttrs::MASTER, exp::CTA_EXPECT_MASTER, &expect.master),
        (ExpectAttrs::TUPLE, exp::CTA_EXPECT_TUPLE, &expect.tuple),
        (ExpectAttrs::MASK, exp::CTA_EXPECT_MASK, &expect.mask),
    ] {
        if has(attr) {
            write_tuple(&mut writer, kind, tuple);
        }
    }
    for (attr, kind, value) in [
        (ExpectAttrs::TIMEOUT, exp::CTA_EXPECT_TIMEOUT, expect.timeout),
        (ExpectAttrs::ID, exp::CTA_EXPECT_ID, expect.id),
        (ExpectAttrs::FLAGS, exp::CTA_EXPECT_FLAGS, expect.flags),
        (ExpectAttrs::CLASS, exp::CTA_EXPECT_CLASS, expect.class),
    ] {
        if has(attr) {
            writer.be32(kind, value);
        }
    }
    if has(ExpectAttrs::ZONE) {
        writer.be16(exp::CTA_EXPECT_ZONE, expect.zone);
    }
    if has(ExpectAttrs::HELPER) {
        writer.text(exp::CTA_EXPECT_HELP_NAME, expect.helper);
    }
    if has(ExpectAttrs::FUNCTION) {
        writer.text(exp::CTA_EXPECT_FN, expect.function);
    }
    if expect.present.intersects(ExpectAttrs::NAT_DIR | ExpectAttrs::NAT_TUPLE) {
        writer.nest(exp::CTA_EXPECT_NAT, |writer| {
            if has(ExpectAttrs::NAT_DIR) {
                writer.be32(expect_nat::CTA_EXPECT_NAT_DIR, expect.nat_dir);
            }
            if has(ExpectAttrs::NAT_TUPLE) {
                write_tuple(writer, expect_nat::CTA_EXPECT_NAT_TUPLE, &expect.nat_tuple);
            }
        });
    }
    writer.finish()
}

/// Any tuple that can be: what is absent is 0, as the decoder leaves it.
pub(super) fn any_tuple() -> impl Strategy<Value = Tuple> {
    let parts = any::<u8>().prop_map(TupleParts::from_bits_truncate);
    let addresses = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<bool>());
    (parts, addresses, any::<[u8; 3]>(), any::<[u16; 4]>()).prop_map(
        |(parts, (src, dst, v6), [proto, icmp_type, icmp_code], [a, b, c, d])| {
            let mut tuple = Tuple { parts, ..Tuple::default() };
            let length = if v6 { 16 } else { 4 };
            if tuple.has(TupleParts::SRC) {
                tuple.src_bytes[..length].copy_from_slice(&src[..length]);
            }
            if tuple.has(TupleParts::DST) {
                tuple.dst_bytes[..length].copy_from_slice(&dst[..length]);
            }
            tuple.v6 = v6 && parts.intersects(TupleParts::SRC | TupleParts::DST);
            if tuple.has(TupleParts::PROTO) {
                tuple.proto = proto;
            }
            if tuple.has(TupleParts::SRC_PORT) {
                tuple.src_port = a;
            }
            if tuple.has(TupleParts::DST_PORT) {
                tuple.dst_port = b;
            }
            if tuple.has(TupleParts::ICMP) {
                (tuple.icmp_type, tuple.icmp_code, tuple.icmp_id) = (icmp_type, icmp_code, c);
            }
            if tuple.has(TupleParts::ZONE) {
                tuple.zone = d;
            }
            tuple
        },
    )
}

/// A string such as the kernel sends: no NUL inside.
fn any_text() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=u8::MAX, 0..40)
}

/// Any event that can be, every attribute there or not by itself.
pub(super) fn any_event() -> impl Strategy<Value = Owned> {
    let kind =
        prop_oneof![Just(Kind::New), Just(Kind::Update), Just(Kind::Destroy), Just(Kind::Entry)];
    // Bits at even odds, and now and then all of them.
    let present = prop_oneof![
        4 => any::<u64>().prop_map(Attrs::from_bits_truncate),
        1 => Just(Attrs::all()),
    ];
    let tuples = (any_tuple(), any_tuple(), any_tuple());
    let numbers = (any::<[u64; 8]>(), any::<[u32; 16]>(), any::<[u8; 8]>(), any::<[u16; 3]>());
    (kind, present, tuples, numbers, any::<[u8; 16]>(), any_text(), any_text()).prop_map(
        |(
            kind,
            present,
            (orig, reply, master),
            (long, word, byte, short),
            labels,
            helper,
            secctx,
        )| {
            let conn = Conn {
                present,
                orig,
                reply,
                orig_counters: Counters { packets: long[0], bytes: long[1] },
                reply_counters: Counters { packets: long[2], bytes: long[3] },
                start: long[4],
                stop: long[5],
                event_time: long[6],
                status: word[0],
                timeout: word[1],
                mark: word[2],
                id: word[3],
                use_count: word[4],
                zone: short[0],
                tcp: TcpInfo {
                    state: byte[0],
                    wscale_orig: byte[1],
                    wscale_reply: byte[2],
                    flags_orig: short[1],
                    flags_reply: short[2],
                },
                sctp_state: byte[3],
                dccp_state: byte[4],
            };
            let adj = |at: usize| SeqAdj {
                correction_pos: word[at],
                offset_before: word[at + 1] as i32,
                offset_after: word[at + 2] as i32,
            };
            let extra = Extra {
                master,
                labels,
                sctp_vtag_orig: word[5],
                sctp_vtag_reply: word[6],
                dccp: DccpInfo { role: byte[5], handshake_seq: long[7] },
                seq_adj_orig: adj(7),
                seq_adj_reply: adj(10),
                synproxy: Synproxy { isn: word[13], its: word[14], tsoff: word[15] },
            };
            let event = Event { kind, conn, extra, helper: &[], secctx: &[] };
            absent_is_zero(Owned { event, helper, secctx })
        },
    )
}

/// Clears what has no presence bit, as the decoder leaves it.
fn absent_is_zero(mut owned: Owned) -> Owned {
    let Event { conn, extra, .. } = &mut owned.event;
    let present = conn.present;
    fn clear<T: Default>(present: Attrs, attr: Attrs, value: &mut T) {
        if !present.contains(attr) {
            *value = T::default();
        }
    }
    clear(present, Attrs::TUPLE_ORIG, &mut conn.orig);
    clear(present, Attrs::TUPLE_REPLY, &mut conn.reply);
    clear(present, Attrs::STATUS, &mut conn.status);
    clear(present, Attrs::TIMEOUT, &mut conn.timeout);
    clear(present, Attrs::MARK, &mut conn.mark);
    clear(present, Attrs::COUNTERS_ORIG, &mut conn.orig_counters);
    clear(present, Attrs::COUNTERS_REPLY, &mut conn.reply_counters);
    clear(present, Attrs::ID, &mut conn.id);
    clear(present, Attrs::USE, &mut conn.use_count);
    clear(present, Attrs::ZONE, &mut conn.zone);
    clear(present, Attrs::START, &mut conn.start);
    clear(present, Attrs::STOP, &mut conn.stop);
    clear(present, Attrs::EVENT_TIME, &mut conn.event_time);
    clear(present, Attrs::TCP_STATE, &mut conn.tcp.state);
    clear(present, Attrs::TCP_WSCALE_ORIG, &mut conn.tcp.wscale_orig);
    clear(present, Attrs::TCP_WSCALE_REPLY, &mut conn.tcp.wscale_reply);
    clear(present, Attrs::TCP_FLAGS_ORIG, &mut conn.tcp.flags_orig);
    clear(present, Attrs::TCP_FLAGS_REPLY, &mut conn.tcp.flags_reply);
    clear(present, Attrs::SCTP_STATE, &mut conn.sctp_state);
    clear(present, Attrs::DCCP_STATE, &mut conn.dccp_state);
    clear(present, Attrs::SCTP_VTAG_ORIG, &mut extra.sctp_vtag_orig);
    clear(present, Attrs::SCTP_VTAG_REPLY, &mut extra.sctp_vtag_reply);
    clear(present, Attrs::DCCP_ROLE, &mut extra.dccp.role);
    clear(present, Attrs::DCCP_HANDSHAKE_SEQ, &mut extra.dccp.handshake_seq);
    clear(present, Attrs::LABELS, &mut extra.labels);
    clear(present, Attrs::MASTER, &mut extra.master);
    clear(present, Attrs::SEQ_ADJ_ORIG, &mut extra.seq_adj_orig);
    clear(present, Attrs::SEQ_ADJ_REPLY, &mut extra.seq_adj_reply);
    clear(present, Attrs::SYNPROXY, &mut extra.synproxy);
    clear(present, Attrs::HELPER, &mut owned.helper);
    clear(present, Attrs::SECCTX, &mut owned.secctx);
    owned
}
