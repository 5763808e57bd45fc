//! Two other decoders of the same bytes, where they are right.
//!
//! netlink-bindings knows all attributes of a conntrack message; not compared are CTA_TIMESTAMP, which
//! it takes for a number, and the old 32-bit counters, which it reads in host order.
//! netlink-packet-netfilter knows tuples without ICMP and zone, status, time-out, mark and TCP.

use std::net::IpAddr;

use conntrail::ctnetlink::{
    Attrs, Class, Conn, Event, Extra, Message, Tally, Tuple, TupleParts, decode_conn, messages,
};
use netlink_bindings::conntrack as nb;
use netlink_packet_core::ParseableParametrized;
use netlink_packet_netfilter::conntrack as np;
use proptest::prelude::*;

use super::corpus::corpus;
use super::encode::{any_event, encode_event};

#[test]
fn captured_messages_read_the_same_in_netlink_bindings() {
    let mut compared = 0;
    for_each_captured(|name, message| {
        assert_eq!(ours_for_bindings(message), by_bindings(message), "{name}");
        compared += 1;
    });
    assert!(compared > 50, "{compared}");
}

#[test]
fn captured_messages_read_the_same_in_netlink_packet_netfilter() {
    let mut compared = 0;
    for_each_captured(|name, message| {
        assert_eq!(ours_for_packet(message), by_packet(message), "{name}");
        compared += 1;
    });
    assert!(compared > 50, "{compared}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_message_reads_the_same_in_both(owned in any_event()) {
        let bytes = encode_event(&owned.event());
        let message = messages(&bytes).next().unwrap().unwrap();
        prop_assert_eq!(ours_for_bindings(&message), by_bindings(&message));
        prop_assert_eq!(ours_for_packet(&message), by_packet(&message));
    }
}

fn for_each_captured(mut check: impl FnMut(&str, &Message<'_>)) {
    for (name, datagrams) in corpus() {
        for message in datagrams.iter().flat_map(|datagram| messages(datagram)) {
            let message = message.unwrap();
            if matches!(message.class(), Class::Conn(_)) {
                check(&name, &message);
            }
        }
    }
}

fn decode<'a>(message: &Message<'a>) -> Event<'a> {
    let mut event = Event::default();
    decode_conn(message, &mut event, &mut Tally::default()).unwrap();
    event
}

/// What the decoders are compared by: an event without its kind, which they do not tell.
type Facts<'a> = (Conn, Extra, &'a [u8], &'a [u8]);

fn ours_for_bindings<'a>(message: &Message<'a>) -> Facts<'a> {
    let mut event = decode(message);
    event.conn.present.remove(Attrs::START | Attrs::STOP);
    (event.conn.start, event.conn.stop) = (0, 0);
    (event.conn, event.extra, event.helper, event.secctx)
}

fn by_bindings<'a>(message: &Message<'a>) -> Facts<'a> {
    let (mut conn, mut extra) = (Conn::default(), Extra::default());
    let (mut helper, mut secctx): (&[u8], &[u8]) = (&[], &[]);
    for attribute in nb::ConntrackAttrs::new(message.payload) {
        use nb::ConntrackAttrs as A;
        let part = match attribute.unwrap() {
            A::TupleOrig(nest) => {
                conn.orig = tuple_by_bindings(nest);
                Attrs::TUPLE_ORIG
            }
            A::TupleReply(nest) => {
                conn.reply = tuple_by_bindings(nest);
                Attrs::TUPLE_REPLY
            }
            A::TupleMaster(nest) => {
                extra.master = tuple_by_bindings(nest);
                Attrs::MASTER
            }
            A::Status(value) => {
                conn.status = value;
                Attrs::STATUS
            }
            A::Timeout(value) => {
                conn.timeout = value;
                Attrs::TIMEOUT
            }
            A::Mark(value) => {
                conn.mark = value;
                Attrs::MARK
            }
            A::Use(value) => {
                conn.use_count = value;
                Attrs::USE
            }
            A::Id(value) => {
                conn.id = value;
                Attrs::ID
            }
            A::Zone(value) => {
                conn.zone = value;
                Attrs::ZONE
            }
            A::TimestampEvent(value) => {
                conn.event_time = value;
                Attrs::EVENT_TIME
            }
            A::CountersOrig(nest) => {
                conn.orig_counters.packets = nest.get_packets().unwrap();
                conn.orig_counters.bytes = nest.get_bytes().unwrap();
                Attrs::COUNTERS_ORIG
            }
            A::CountersReply(nest) => {
                conn.reply_counters.packets = nest.get_packets().unwrap();
                conn.reply_counters.bytes = nest.get_bytes().unwrap();
                Attrs::COUNTERS_REPLY
            }
            A::Labels(bytes) => {
                extra.labels.copy_from_slice(bytes);
                Attrs::LABELS
            }
            A::Help(nest) => {
                helper = nest.get_help_name().unwrap().to_bytes();
                Attrs::HELPER
            }
            A::Secctx(nest) => {
                secctx = nest.get_secctx_name().unwrap().to_bytes();
                Attrs::SECCTX
            }
            A::SeqAdjOrig(nest) => {
                extra.seq_adj_orig = seqadj_by_bindings(&nest);
                Attrs::SEQ_ADJ_ORIG
            }
            A::SeqAdjReply(nest) => {
                extra.seq_adj_reply = seqadj_by_bindings(&nest);
                Attrs::SEQ_ADJ_REPLY
            }
            A::Synproxy(nest) => {
                extra.synproxy.isn = nest.get_isn().unwrap();
                extra.synproxy.its = nest.get_its().unwrap();
                extra.synproxy.tsoff = nest.get_tsoff().unwrap();
                Attrs::SYNPROXY
            }
            A::Protoinfo(nest) => protoinfo_by_bindings(nest, &mut conn, &mut extra),
            // A nest that it takes for a number.
            A::Timestamp(_) => Attrs::empty(),
            _ => panic!("an attribute that no message carries"),
        };
        conn.present |= part;
    }
    (conn, extra, helper, secctx)
}

fn seqadj_by_bindings(nest: &nb::IterableSeqadjAttrs<'_>) -> conntrail::ctnetlink::SeqAdj {
    conntrail::ctnetlink::SeqAdj {
        correction_pos: nest.get_correction_pos().unwrap(),
        offset_before: nest.get_offset_before().unwrap() as i32,
        offset_after: nest.get_offset_after().unwrap() as i32,
    }
}

fn protoinfo_by_bindings(
    nest: nb::IterableProtoinfoAttrs<'_>,
    conn: &mut Conn,
    extra: &mut Extra,
) -> Attrs {
    let mut present = Attrs::empty();
    if let Ok(tcp) = nest.get_protoinfo_tcp() {
        for attribute in tcp {
            use nb::ProtoinfoTcpAttrs as A;
            present |= match attribute.unwrap() {
                A::TcpState(value) => {
                    conn.tcp.state = value;
                    Attrs::TCP_STATE
                }
                A::TcpWscaleOriginal(value) => {
                    conn.tcp.wscale_orig = value;
                    Attrs::TCP_WSCALE_ORIG
                }
                A::TcpWscaleReply(value) => {
                    conn.tcp.wscale_reply = value;
                    Attrs::TCP_WSCALE_REPLY
                }
                A::TcpFlagsOriginal(value) => {
                    conn.tcp.flags_orig = u16::from_be_bytes([value.flags, value.mask]);
                    Attrs::TCP_FLAGS_ORIG
                }
                A::TcpFlagsReply(value) => {
                    conn.tcp.flags_reply = u16::from_be_bytes([value.flags, value.mask]);
                    Attrs::TCP_FLAGS_REPLY
                }
            };
        }
    }
    if let Ok(dccp) = nest.get_protoinfo_dccp() {
        for attribute in dccp {
            use nb::ProtoinfoDccpAttrs as A;
            present |= match attribute.unwrap() {
                A::DccpState(value) => {
                    conn.dccp_state = value;
                    Attrs::DCCP_STATE
                }
                A::DccpRole(value) => {
                    extra.dccp.role = value;
                    Attrs::DCCP_ROLE
                }
                A::DccpHandshakeSeq(value) => {
                    extra.dccp.handshake_seq = value;
                    Attrs::DCCP_HANDSHAKE_SEQ
                }
                A::DccpPad(_) => Attrs::empty(),
            };
        }
    }
    if let Ok(sctp) = nest.get_protoinfo_sctp() {
        for attribute in sctp {
            use nb::ProtoinfoSctpAttrs as A;
            present |= match attribute.unwrap() {
                A::SctpState(value) => {
                    conn.sctp_state = value;
                    Attrs::SCTP_STATE
                }
                A::VtagOriginal(value) => {
                    extra.sctp_vtag_orig = value;
                    Attrs::SCTP_VTAG_ORIG
                }
                A::VtagReply(value) => {
                    extra.sctp_vtag_reply = value;
                    Attrs::SCTP_VTAG_REPLY
                }
            };
        }
    }
    present
}

fn tuple_by_bindings(nest: nb::IterableTupleAttrs<'_>) -> Tuple {
    let mut tuple = Tuple::default();
    if let Ok(zone) = nest.get_tuple_zone() {
        tuple.zone = zone;
        tuple.parts |= TupleParts::ZONE;
    }
    for attribute in nest.get_tuple_ip().into_iter().flatten() {
        use nb::TupleIpAttrs as A;
        match attribute.unwrap() {
            A::IpV4Src(address) => set_src(&mut tuple, address.into()),
            A::IpV4Dst(address) => set_dst(&mut tuple, address.into()),
            A::IpV6Src(address) => set_src(&mut tuple, address.into()),
            A::IpV6Dst(address) => set_dst(&mut tuple, address.into()),
        }
    }
    for attribute in nest.get_tuple_proto().into_iter().flatten() {
        use nb::TupleProtoAttrs as A;
        let part = match attribute.unwrap() {
            A::ProtoNum(value) => {
                tuple.proto = value;
                TupleParts::PROTO
            }
            A::ProtoSrcPort(value) => {
                tuple.src_port = value;
                TupleParts::SRC_PORT
            }
            A::ProtoDstPort(value) => {
                tuple.dst_port = value;
                TupleParts::DST_PORT
            }
            A::ProtoIcmpId(value) | A::ProtoIcmpv6Id(value) => {
                tuple.icmp_id = value;
                TupleParts::ICMP
            }
            A::ProtoIcmpType(value) | A::ProtoIcmpv6Type(value) => {
                tuple.icmp_type = value;
                TupleParts::ICMP
            }
            A::ProtoIcmpCode(value) | A::ProtoIcmpv6Code(value) => {
                tuple.icmp_code = value;
                TupleParts::ICMP
            }
        };
        tuple.parts |= part;
    }
    tuple
}

fn set_src(tuple: &mut Tuple, address: IpAddr) {
    set(&mut tuple.src_bytes, &mut tuple.v6, address);
    tuple.parts |= TupleParts::SRC;
}

fn set_dst(tuple: &mut Tuple, address: IpAddr) {
    set(&mut tuple.dst_bytes, &mut tuple.v6, address);
    tuple.parts |= TupleParts::DST;
}

fn set(bytes: &mut [u8; 16], v6: &mut bool, address: IpAddr) {
    match address {
        IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => *bytes = address.octets(),
    }
    *v6 = address.is_ipv6();
}

/// Our decode, less what netlink-packet-netfilter does not know.
fn ours_for_packet(message: &Message<'_>) -> Conn {
    let ours = decode(message).conn;
    let known = Attrs::TUPLE_ORIG
        | Attrs::TUPLE_REPLY
        | Attrs::STATUS
        | Attrs::TIMEOUT
        | Attrs::MARK
        | Attrs::TCP_STATE
        | Attrs::TCP_WSCALE_ORIG
        | Attrs::TCP_WSCALE_REPLY
        | Attrs::TCP_FLAGS_ORIG
        | Attrs::TCP_FLAGS_REPLY;
    Conn {
        present: ours.present & known,
        orig: without_icmp_and_zone(ours.orig),
        reply: without_icmp_and_zone(ours.reply),
        status: ours.status,
        timeout: ours.timeout,
        mark: ours.mark,
        tcp: ours.tcp,
        ..Conn::default()
    }
}

fn without_icmp_and_zone(mut tuple: Tuple) -> Tuple {
    tuple.parts.remove(TupleParts::ICMP | TupleParts::ZONE);
    Tuple { icmp_type: 0, icmp_code: 0, icmp_id: 0, zone: 0, ..tuple }
}

fn by_packet(message: &Message<'_>) -> Conn {
    let command = message.message_type as u8;
    let parsed = np::ConntrackMessage::parse_with_param(message.payload, command).unwrap();
    let (np::ConntrackMessage::New(attributes) | np::ConntrackMessage::Delete(attributes)) = parsed
    else {
        panic!("neither new nor delete: {parsed:?}");
    };
    let mut conn = Conn::default();
    for attribute in attributes {
        use np::ConntrackAttribute as A;
        let part = match attribute {
            A::CtaTupleOrig(parts) => {
                conn.orig = tuple_by_packet(&parts);
                Attrs::TUPLE_ORIG
            }
            A::CtaTupleReply(parts) => {
                conn.reply = tuple_by_packet(&parts);
                Attrs::TUPLE_REPLY
            }
            A::CtaStatus(status) => {
                conn.status = status.bits();
                Attrs::STATUS
            }
            A::CtaTimeout(value) => {
                conn.timeout = value;
                Attrs::TIMEOUT
            }
            A::CtaMark(value) => {
                conn.mark = value;
                Attrs::MARK
            }
            A::CtaProtoInfo(infos) => tcp_by_packet(&infos, &mut conn),
            _ => Attrs::empty(),
        };
        conn.present |= part;
    }
    conn
}

fn tcp_by_packet(infos: &[np::ProtoInfo], conn: &mut Conn) -> Attrs {
    let mut present = Attrs::empty();
    for info in infos {
        let np::ProtoInfo::TCP(parts) = info else { continue };
        for part in parts {
            use np::ProtoInfoTCP as P;
            present |= match part {
                P::State(value) => {
                    conn.tcp.state = *value;
                    Attrs::TCP_STATE
                }
                P::OriginalWindowScale(value) => {
                    conn.tcp.wscale_orig = *value;
                    Attrs::TCP_WSCALE_ORIG
                }
                P::ReplyWindowScale(value) => {
                    conn.tcp.wscale_reply = *value;
                    Attrs::TCP_WSCALE_REPLY
                }
                P::OriginalFlags(value) => {
                    conn.tcp.flags_orig = u16::from_be_bytes([value.flags, value.mask]);
                    Attrs::TCP_FLAGS_ORIG
                }
                P::ReplyFlags(value) => {
                    conn.tcp.flags_reply = u16::from_be_bytes([value.flags, value.mask]);
                    Attrs::TCP_FLAGS_REPLY
                }
                other => panic!("not known: {other:?}"),
            };
        }
    }
    present
}

fn tuple_by_packet(parts: &[np::Tuple]) -> Tuple {
    let mut tuple = Tuple::default();
    for part in parts {
        match part {
            np::Tuple::Ip(addresses) => {
                for address in addresses {
                    match address {
                        np::IPTuple::SourceAddress(address) => set_src(&mut tuple, *address),
                        np::IPTuple::DestinationAddress(address) => set_dst(&mut tuple, *address),
                        other => panic!("not known: {other:?}"),
                    }
                }
            }
            np::Tuple::Proto(protos) => protos.iter().for_each(|proto| match proto {
                np::ProtoTuple::Protocol(number) => {
                    tuple.proto = (*number).into();
                    tuple.parts |= TupleParts::PROTO;
                }
                np::ProtoTuple::SourcePort(port) => {
                    tuple.src_port = *port;
                    tuple.parts |= TupleParts::SRC_PORT;
                }
                np::ProtoTuple::DestinationPort(port) => {
                    tuple.dst_port = *port;
                    tuple.parts |= TupleParts::DST_PORT;
                }
                // ICMP, which it leaves raw.
                _ => {}
            }),
            // The zone, which it leaves raw.
            _ => {}
        }
    }
    tuple
}
