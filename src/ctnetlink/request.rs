//! Writes netlink messages: an attribute writer, and the requests that ctnetlink answers.
//!
//! Promises: what it returns is whole and aligned, each length field right. Never sends anything;
//! never knows what an answer looks like (that is `decode`).

use super::event::{Tuple, TupleParts};
use super::uapi::conntrack::{cta, exp_msg, ip, l4proto, msg, tuple as tuple_attr};
use super::uapi::family::{AF_INET, AF_INET6, AF_UNSPEC};
use super::uapi::ipproto::IPPROTO_ICMPV6;
use super::uapi::netlink::{
    NLA_F_NESTED, NLA_HDRLEN, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ALIGNTO,
};
use super::uapi::nfnetlink::{NFNETLINK_V0, NFNL_SUBSYS_CTNETLINK, NFNL_SUBSYS_CTNETLINK_EXP};

/// The headers of a message that is to be written.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// `nlmsg_type`: see [`message_type`].
    pub message_type: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`: the answer carries it.
    pub seq: u32,
    /// `nfgen_family`.
    pub family: u8,
    /// `nfgenmsg.res_id`, in host order; network order on the wire.
    pub res_id: u16,
}

/// `nlmsg_type` of an nfnetlink message: the subsystem and its command.
pub const fn message_type(subsystem: u8, command: u8) -> u16 {
    (subsystem as u16) << 8 | command as u16
}

/// Writes messages one after the other into one buffer, as an nfnetlink batch needs them.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    /// Where the message begins that is being written; none has begun while `bytes` is empty.
    message: usize,
}

impl Writer {
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Ends the message before and begins the next. Attributes come after.
    pub fn message(&mut self, header: Header) -> &mut Writer {
        self.close();
        self.message = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&header.message_type.to_ne_bytes());
        self.bytes.extend_from_slice(&header.flags.to_ne_bytes());
        self.bytes.extend_from_slice(&header.seq.to_ne_bytes());
        // nlmsg_pid: the kernel knows who sends.
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[header.family, NFNETLINK_V0]);
        self.bytes.extend_from_slice(&header.res_id.to_be_bytes());
        self
    }

    /// An attribute with these bytes.
    ///
    /// # Panics
    /// When the payload is longer than an attribute can be (64 KiB).
    pub fn bytes(&mut self, kind: u16, payload: &[u8]) -> &mut Writer {
        let length = u16::try_from(NLA_HDRLEN + payload.len())
            .expect("what we write is shorter than nla_len can say");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.pad();
        self
    }

    pub fn u8(&mut self, kind: u16, value: u8) -> &mut Writer {
        self.bytes(kind, &[value])
    }

    pub fn be16(&mut self, kind: u16, value: u16) -> &mut Writer {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn be32(&mut self, kind: u16, value: u32) -> &mut Writer {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn be64(&mut self, kind: u16, value: u64) -> &mut Writer {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A string with its final NUL.
    pub fn text(&mut self, kind: u16, value: &[u8]) -> &mut Writer {
        let mut payload = value.to_vec();
        payload.push(0);
        self.bytes(kind, &payload)
    }

    /// A nest (NLA_F_NESTED) around what `inside` writes.
    ///
    /// # Panics
    /// When what is inside is longer than an attribute can be (64 KiB).
    pub fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Writer)) -> &mut Writer {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        inside(self);
        let length = u16::try_from(self.bytes.len() - start)
            .expect("what we write is shorter than nla_len can say");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// All messages.
    pub fn finish(mut self) -> Vec<u8> {
        self.close();
        self.bytes
    }

    fn close(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        let length = u32::try_from(self.bytes.len() - self.message)
            .expect("what we write is shorter than nlmsg_len can say");
        self.bytes[self.message..self.message + 4].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(NLMSG_ALIGNTO), 0);
    }
}

fn bare(subsystem: u8, command: u8, flags: u16, family: u8, seq: u32) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.message(Header {
        message_type: message_type(subsystem, command),
        flags: NLM_F_REQUEST | flags,
        seq,
        family,
        res_id: 0,
    });
    writer.finish()
}

/// Asks for the whole table; `family` is AF_INET, AF_INET6 or AF_UNSPEC for both.
pub fn dump_conns(family: u8, seq: u32) -> Vec<u8> {
    bare(NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET, NLM_F_DUMP, family, seq)
}

/// Asks for the entries whose DESTROY event could not be delivered yet and waits.
pub fn dump_dying(seq: u32) -> Vec<u8> {
    bare(NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET_DYING, NLM_F_DUMP, AF_UNSPEC, seq)
}

/// Asks for the counters of each CPU, one message each.
pub fn dump_stats_cpu(seq: u32) -> Vec<u8> {
    bare(NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET_STATS_CPU, NLM_F_DUMP, AF_UNSPEC, seq)
}

/// Asks how many entries there are and may be. One message answers; there is no DONE.
pub fn get_stats(seq: u32) -> Vec<u8> {
    bare(NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET_STATS, 0, AF_UNSPEC, seq)
}

/// Asks for all expectations.
pub fn dump_expects(family: u8, seq: u32) -> Vec<u8> {
    bare(NFNL_SUBSYS_CTNETLINK_EXP, exp_msg::IPCTNL_MSG_EXP_GET, NLM_F_DUMP, family, seq)
}

/// Asks for the expectation counters of each CPU, one message each.
pub fn dump_expect_stats_cpu(seq: u32) -> Vec<u8> {
    bare(
        NFNL_SUBSYS_CTNETLINK_EXP,
        exp_msg::IPCTNL_MSG_EXP_GET_STATS_CPU,
        NLM_F_DUMP,
        AF_UNSPEC,
        seq,
    )
}

/// Asks for the entry with this original tuple (in `zone`, where not 0). The answer is the entry and
/// an ack, or an error ENOENT.
pub fn get_conn(orig: &Tuple, zone: u16, seq: u32) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.message(Header {
        message_type: message_type(NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET),
        flags: NLM_F_REQUEST | NLM_F_ACK,
        seq,
        family: if orig.v6 { AF_INET6 } else { AF_INET },
        res_id: 0,
    });
    write_tuple(&mut writer, cta::CTA_TUPLE_ORIG, orig);
    if zone != 0 {
        writer.be16(cta::CTA_ZONE, zone);
    }
    writer.finish()
}

/// Writes a tuple's present parts as the nest `kind`, in the kernel's order.
pub fn write_tuple(writer: &mut Writer, kind: u16, tuple: &Tuple) {
    writer.nest(kind, |writer| {
        if tuple.parts.intersects(TupleParts::SRC | TupleParts::DST) {
            writer.nest(tuple_attr::CTA_TUPLE_IP, |writer| write_addresses(writer, tuple));
        }
        let l4 = TupleParts::PROTO | TupleParts::SRC_PORT | TupleParts::DST_PORT | TupleParts::ICMP;
        if tuple.parts.intersects(l4) {
            writer.nest(tuple_attr::CTA_TUPLE_PROTO, |writer| write_l4proto(writer, tuple));
        }
        if tuple.has(TupleParts::ZONE) {
            writer.be16(tuple_attr::CTA_TUPLE_ZONE, tuple.zone);
        }
    });
}

fn write_addresses(writer: &mut Writer, tuple: &Tuple) {
    let (src, dst, length) = if tuple.v6 {
        (ip::CTA_IP_V6_SRC, ip::CTA_IP_V6_DST, 16)
    } else {
        (ip::CTA_IP_V4_SRC, ip::CTA_IP_V4_DST, 4)
    };
    if tuple.has(TupleParts::SRC) {
        writer.bytes(src, &tuple.src_bytes[..length]);
    }
    if tuple.has(TupleParts::DST) {
        writer.bytes(dst, &tuple.dst_bytes[..length]);
    }
}

fn write_l4proto(writer: &mut Writer, tuple: &Tuple) {
    if tuple.has(TupleParts::PROTO) {
        writer.u8(l4proto::CTA_PROTO_NUM, tuple.proto);
    }
    if tuple.has(TupleParts::SRC_PORT) {
        writer.be16(l4proto::CTA_PROTO_SRC_PORT, tuple.src_port);
    }
    if tuple.has(TupleParts::DST_PORT) {
        writer.be16(l4proto::CTA_PROTO_DST_PORT, tuple.dst_port);
    }
    if !tuple.has(TupleParts::ICMP) {
        return;
    }
    let (id, kind, code) = if tuple.proto == IPPROTO_ICMPV6 {
        (
            l4proto::CTA_PROTO_ICMPV6_ID,
            l4proto::CTA_PROTO_ICMPV6_TYPE,
            l4proto::CTA_PROTO_ICMPV6_CODE,
        )
    } else {
        (l4proto::CTA_PROTO_ICMP_ID, l4proto::CTA_PROTO_ICMP_TYPE, l4proto::CTA_PROTO_ICMP_CODE)
    };
    writer.be16(id, tuple.icmp_id).u8(kind, tuple.icmp_type).u8(code, tuple.icmp_code);
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Class, messages};
    use super::*;
    use crate::ctnetlink::uapi::nfnetlink::{NFNL_MSG_BATCH_BEGIN, NFNL_SUBSYS_NFTABLES};

    #[test]
    fn a_request_without_attributes_is_twenty_bytes_of_headers() {
        let bytes = dump_conns(AF_UNSPEC, 7);
        assert_eq!(bytes.len(), 20);
        let message = messages(&bytes).next().unwrap().unwrap();
        assert_eq!(message.message_type, 0x0101);
        assert_eq!(message.flags, NLM_F_REQUEST | NLM_F_DUMP);
        assert_eq!((message.seq, message.portid, message.family), (7, 0, AF_UNSPEC));
    }

    #[test]
    fn each_request_has_its_own_type() {
        let types = [
            (dump_conns(AF_UNSPEC, 0), 0x0101),
            (dump_stats_cpu(0), 0x0104),
            (get_stats(0), 0x0105),
            (dump_dying(0), 0x0106),
            (dump_expects(AF_UNSPEC, 0), 0x0201),
            (dump_expect_stats_cpu(0), 0x0203),
        ];
        for (bytes, expected) in types {
            assert_eq!(messages(&bytes).next().unwrap().unwrap().message_type, expected);
        }
    }

    #[test]
    fn lengths_of_nests_and_messages_are_right() {
        let tuple = Tuple {
            parts: TupleParts::SRC | TupleParts::DST | TupleParts::PROTO,
            proto: 6,
            ..Tuple::default()
        };
        let bytes = get_conn(&tuple, 9, 1);
        let message = messages(&bytes).next().unwrap().unwrap();
        let mut attributes = message.attributes();
        let nest = attributes.advance().unwrap().unwrap();
        assert_eq!(nest.kind, cta::CTA_TUPLE_ORIG);
        let mut inner = nest.nested();
        assert_eq!(inner.advance().unwrap().unwrap().payload.len(), 16);
        assert_eq!(inner.advance().unwrap().unwrap().payload, [5, 0, 1, 0, 6, 0, 0, 0]);
        assert!(inner.advance().unwrap().is_none());
        assert_eq!(attributes.advance().unwrap().unwrap().be16(), Ok(9));
        assert!(attributes.advance().unwrap().is_none());
    }

    #[test]
    fn messages_of_a_batch_follow_each_other() {
        let header = |message_type, res_id| Header {
            message_type,
            flags: NLM_F_REQUEST,
            seq: 1,
            family: 0,
            res_id,
        };
        let mut writer = Writer::new();
        writer.message(header(NFNL_MSG_BATCH_BEGIN, NFNL_SUBSYS_NFTABLES.into()));
        writer.message(header(message_type(NFNL_SUBSYS_NFTABLES, 0), 0)).text(1, b"ct");
        let bytes = writer.finish();
        let all: Vec<_> = messages(&bytes).map(Result::unwrap).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].res_id, all[0].payload.len()), (10, 0));
        assert_eq!(all[1].class(), Class::Unknown);
        assert_eq!(all[1].attributes().advance().unwrap().unwrap().text(), b"ct");
    }
}
