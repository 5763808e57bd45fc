//! From messages to events, expectations and statistics.
//!
//! Promises: one pass, no allocation, never a panic; attributes not known here are skipped and
//! counted; a message with a malformed one is refused whole, with the reason, and leaves no presence
//! bit behind. Where an attribute comes twice the later one counts, as in the kernel's nla_parse.
//! Never interprets a value.

use super::event::{
    Attrs, Conn, Counters, CpuStats, Event, Expect, ExpectAttrs, ExpectStats, Extra, SeqAdj, Stats,
    Synproxy, Tuple, TupleParts,
};
use super::uapi::conntrack::{
    counters, cta, expect, expect_nat, help, ip, l4proto, protoinfo, secctx, seqadj, stats_cpu,
    stats_exp, stats_global, synproxy, tstamp, tuple,
};
use super::wire::{Attribute, Class, Malformed, Message, Reason, Tally};

/// Decodes a conntrack event or entry into `event`, which may hold an earlier one: nothing of that is
/// visible afterwards. A refusal is counted in `tally` and leaves `event` empty.
#[inline]
pub fn decode_conn<'a>(
    message: &Message<'a>,
    event: &mut Event<'a>,
    tally: &mut Tally,
) -> Result<(), Malformed> {
    event.reset();
    let Class::Conn(kind) = message.class() else {
        return Err(wrong_type(message, tally));
    };
    event.kind = kind;
    match conn_attributes(message, event, tally) {
        Ok(present) => {
            event.conn.present = present;
            Ok(())
        }
        Err(malformed) => {
            event.reset();
            tally.refuse(&malformed);
            Err(malformed)
        }
    }
}

#[cold]
fn wrong_type(message: &Message<'_>, tally: &mut Tally) -> Malformed {
    let malformed = Malformed { reason: Reason::WrongType, offset: message.offset };
    tally.refuse(&malformed);
    malformed
}

#[inline]
fn conn_attributes<'a>(
    message: &Message<'a>,
    event: &mut Event<'a>,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let Event { conn, extra, helper, secctx, .. } = event;
    let mut present = Attrs::empty();
    let mut attributes = message.attributes();
    while let Some(attribute) = attributes.advance()? {
        present |= match attribute.kind {
            cta::CTA_TUPLE_ORIG => {
                decode_tuple(&attribute, &mut conn.orig, tally)?;
                Attrs::TUPLE_ORIG
            }
            cta::CTA_TUPLE_REPLY => {
                decode_tuple(&attribute, &mut conn.reply, tally)?;
                Attrs::TUPLE_REPLY
            }
            cta::CTA_STATUS => {
                conn.status = attribute.be32()?;
                Attrs::STATUS
            }
            cta::CTA_PROTOINFO => decode_protoinfo(&attribute, conn, extra, tally)?,
            cta::CTA_TIMEOUT => {
                conn.timeout = attribute.be32()?;
                Attrs::TIMEOUT
            }
            cta::CTA_MARK => {
                conn.mark = attribute.be32()?;
                Attrs::MARK
            }
            cta::CTA_COUNTERS_ORIG => {
                decode_counters(&attribute, &mut conn.orig_counters, Attrs::COUNTERS_ORIG, tally)?
            }
            cta::CTA_COUNTERS_REPLY => {
                decode_counters(&attribute, &mut conn.reply_counters, Attrs::COUNTERS_REPLY, tally)?
            }
            cta::CTA_USE => {
                conn.use_count = attribute.be32()?;
                Attrs::USE
            }
            cta::CTA_ID => {
                conn.id = attribute.be32()?;
                Attrs::ID
            }
            cta::CTA_ZONE => {
                conn.zone = attribute.be16()?;
                Attrs::ZONE
            }
            cta::CTA_TIMESTAMP => decode_timestamp(&attribute, conn, tally)?,
            cta::CTA_TIMESTAMP_EVENT => {
                conn.event_time = attribute.be64()?;
                Attrs::EVENT_TIME
            }
            cta::CTA_LABELS => decode_labels(&attribute, &mut extra.labels)?,
            cta::CTA_HELP => decode_help(&attribute, helper, tally)?,
            cta::CTA_SECCTX => decode_secctx(&attribute, secctx, tally)?,
            cta::CTA_TUPLE_MASTER => {
                decode_tuple(&attribute, &mut extra.master, tally)?;
                Attrs::MASTER
            }
            cta::CTA_SEQ_ADJ_ORIG => {
                decode_seqadj(&attribute, &mut extra.seq_adj_orig, Attrs::SEQ_ADJ_ORIG, tally)?
            }
            cta::CTA_SEQ_ADJ_REPLY => {
                decode_seqadj(&attribute, &mut extra.seq_adj_reply, Attrs::SEQ_ADJ_REPLY, tally)?
            }
            cta::CTA_SYNPROXY => decode_synproxy(&attribute, &mut extra.synproxy, tally)?,
            // CTA_SECMARK is obsolete (CTA_SECCTX says it in words); the others stand only in
            // requests to the kernel. Known, so not counted, and nothing to keep.
            cta::CTA_SECMARK
            | cta::CTA_NAT_SRC
            | cta::CTA_NAT_DST
            | cta::CTA_MARK_MASK
            | cta::CTA_LABELS_MASK
            | cta::CTA_FILTER
            | cta::CTA_STATUS_MASK => Attrs::empty(),
            _ => {
                tally.unknown_attributes += 1;
                Attrs::empty()
            }
        };
    }
    Ok(present)
}

/// `ctnetlink_dump_tuples`. Starts from nothing, so that a tuple can be compared and hashed whole.
#[inline]
fn decode_tuple(nest: &Attribute<'_>, out: &mut Tuple, tally: &mut Tally) -> Result<(), Malformed> {
    let mut tuple = Tuple::default();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            tuple::CTA_TUPLE_IP => decode_ip(&attribute, &mut tuple, tally)?,
            tuple::CTA_TUPLE_PROTO => decode_l4proto(&attribute, &mut tuple, tally)?,
            tuple::CTA_TUPLE_ZONE => {
                tuple.zone = attribute.be16()?;
                tuple.parts |= TupleParts::ZONE;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    *out = tuple;
    Ok(())
}

#[inline]
fn decode_ip(nest: &Attribute<'_>, tuple: &mut Tuple, tally: &mut Tally) -> Result<(), Malformed> {
    let mut families = 0u8;
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            ip::CTA_IP_V4_SRC => {
                tuple.src_bytes[..4].copy_from_slice(&attribute.array::<4>()?);
                tuple.parts |= TupleParts::SRC;
                families |= 1;
            }
            ip::CTA_IP_V4_DST => {
                tuple.dst_bytes[..4].copy_from_slice(&attribute.array::<4>()?);
                tuple.parts |= TupleParts::DST;
                families |= 1;
            }
            ip::CTA_IP_V6_SRC => {
                tuple.src_bytes = attribute.array()?;
                tuple.parts |= TupleParts::SRC;
                families |= 2;
            }
            ip::CTA_IP_V6_DST => {
                tuple.dst_bytes = attribute.array()?;
                tuple.parts |= TupleParts::DST;
                families |= 2;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    if families == 3 {
        return Err(nest.malformed(Reason::MixedFamilies));
    }
    tuple.v6 = families == 2;
    Ok(())
}

#[inline]
fn decode_l4proto(
    nest: &Attribute<'_>,
    tuple: &mut Tuple,
    tally: &mut Tally,
) -> Result<(), Malformed> {
    // The three parts of ICMP share a presence bit: only together do they say something.
    let mut icmp = 0u8;
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            l4proto::CTA_PROTO_NUM => {
                tuple.proto = attribute.u8()?;
                tuple.parts |= TupleParts::PROTO;
            }
            l4proto::CTA_PROTO_SRC_PORT => {
                tuple.src_port = attribute.be16()?;
                tuple.parts |= TupleParts::SRC_PORT;
            }
            l4proto::CTA_PROTO_DST_PORT => {
                tuple.dst_port = attribute.be16()?;
                tuple.parts |= TupleParts::DST_PORT;
            }
            l4proto::CTA_PROTO_ICMP_ID | l4proto::CTA_PROTO_ICMPV6_ID => {
                tuple.icmp_id = attribute.be16()?;
                icmp |= 1;
            }
            l4proto::CTA_PROTO_ICMP_TYPE | l4proto::CTA_PROTO_ICMPV6_TYPE => {
                tuple.icmp_type = attribute.u8()?;
                icmp |= 2;
            }
            l4proto::CTA_PROTO_ICMP_CODE | l4proto::CTA_PROTO_ICMPV6_CODE => {
                tuple.icmp_code = attribute.u8()?;
                icmp |= 4;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    if icmp == 7 {
        tuple.parts |= TupleParts::ICMP;
    }
    Ok(())
}

/// `dump_counters`. The 32-bit ones are of very old kernels; none sends both widths.
#[inline]
fn decode_counters(
    nest: &Attribute<'_>,
    out: &mut Counters,
    bit: Attrs,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut seen = 0u8;
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            counters::CTA_COUNTERS_PACKETS => {
                out.packets = attribute.be64()?;
                seen |= 1;
            }
            counters::CTA_COUNTERS_BYTES => {
                out.bytes = attribute.be64()?;
                seen |= 2;
            }
            counters::CTA_COUNTERS32_PACKETS => {
                out.packets = attribute.be32()?.into();
                seen |= 1;
            }
            counters::CTA_COUNTERS32_BYTES => {
                out.bytes = attribute.be32()?.into();
                seen |= 2;
            }
            counters::CTA_COUNTERS_PAD => {}
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(both_or_nothing(seen == 3, bit))
}

/// Half of a pair is not shown: its other half would be a made-up 0.
fn both_or_nothing(whole: bool, bit: Attrs) -> Attrs {
    if whole { bit } else { Attrs::empty() }
}

#[inline]
fn decode_timestamp(
    nest: &Attribute<'_>,
    conn: &mut Conn,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            tstamp::CTA_TIMESTAMP_START => {
                conn.start = attribute.be64()?;
                present |= Attrs::START;
            }
            tstamp::CTA_TIMESTAMP_STOP => {
                conn.stop = attribute.be64()?;
                present |= Attrs::STOP;
            }
            tstamp::CTA_TIMESTAMP_PAD => {}
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

#[inline]
fn decode_protoinfo(
    nest: &Attribute<'_>,
    conn: &mut Conn,
    extra: &mut Extra,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            protoinfo::CTA_PROTOINFO_TCP => present |= decode_tcp(&attribute, conn, tally)?,
            protoinfo::CTA_PROTOINFO_DCCP => {
                present |= decode_dccp(&attribute, conn, extra, tally)?;
            }
            protoinfo::CTA_PROTOINFO_SCTP => {
                present |= decode_sctp(&attribute, conn, extra, tally)?;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

/// `tcp_to_nlattr`. DESTROY carries the state only.
#[inline]
fn decode_tcp(
    nest: &Attribute<'_>,
    conn: &mut Conn,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            protoinfo::CTA_PROTOINFO_TCP_STATE => {
                conn.tcp.state = attribute.u8()?;
                present |= Attrs::TCP_STATE;
            }
            protoinfo::CTA_PROTOINFO_TCP_WSCALE_ORIGINAL => {
                conn.tcp.wscale_orig = attribute.u8()?;
                present |= Attrs::TCP_WSCALE_ORIG;
            }
            protoinfo::CTA_PROTOINFO_TCP_WSCALE_REPLY => {
                conn.tcp.wscale_reply = attribute.u8()?;
                present |= Attrs::TCP_WSCALE_REPLY;
            }
            // struct nf_ct_tcp_flags is two bytes, not a number: the first one becomes the high one.
            protoinfo::CTA_PROTOINFO_TCP_FLAGS_ORIGINAL => {
                conn.tcp.flags_orig = attribute.be16()?;
                present |= Attrs::TCP_FLAGS_ORIG;
            }
            protoinfo::CTA_PROTOINFO_TCP_FLAGS_REPLY => {
                conn.tcp.flags_reply = attribute.be16()?;
                present |= Attrs::TCP_FLAGS_REPLY;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

/// `dccp_to_nlattr`. Newer kernels track DCCP no more; older ones send it.
fn decode_dccp(
    nest: &Attribute<'_>,
    conn: &mut Conn,
    extra: &mut Extra,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            protoinfo::CTA_PROTOINFO_DCCP_STATE => {
                conn.dccp_state = attribute.u8()?;
                present |= Attrs::DCCP_STATE;
            }
            protoinfo::CTA_PROTOINFO_DCCP_ROLE => {
                extra.dccp.role = attribute.u8()?;
                present |= Attrs::DCCP_ROLE;
            }
            protoinfo::CTA_PROTOINFO_DCCP_HANDSHAKE_SEQ => {
                extra.dccp.handshake_seq = attribute.be64()?;
                present |= Attrs::DCCP_HANDSHAKE_SEQ;
            }
            protoinfo::CTA_PROTOINFO_DCCP_PAD => {}
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

/// `sctp_to_nlattr`.
fn decode_sctp(
    nest: &Attribute<'_>,
    conn: &mut Conn,
    extra: &mut Extra,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            protoinfo::CTA_PROTOINFO_SCTP_STATE => {
                conn.sctp_state = attribute.u8()?;
                present |= Attrs::SCTP_STATE;
            }
            protoinfo::CTA_PROTOINFO_SCTP_VTAG_ORIGINAL => {
                extra.sctp_vtag_orig = attribute.be32()?;
                present |= Attrs::SCTP_VTAG_ORIG;
            }
            protoinfo::CTA_PROTOINFO_SCTP_VTAG_REPLY => {
                extra.sctp_vtag_reply = attribute.be32()?;
                present |= Attrs::SCTP_VTAG_REPLY;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

/// Older kernels sent only as many words as the rule set used (`struct nf_conn_labels`): what is
/// short is the low end, and the rest is 0.
fn decode_labels(attribute: &Attribute<'_>, out: &mut [u8; 16]) -> Result<Attrs, Malformed> {
    let length = attribute.payload.len();
    if length == 0 || length > out.len() || !length.is_multiple_of(4) {
        return Err(attribute.malformed(Reason::PayloadLength));
    }
    *out = [0; 16];
    out[..length].copy_from_slice(attribute.payload);
    Ok(Attrs::LABELS)
}

fn decode_help<'a>(
    nest: &Attribute<'a>,
    out: &mut &'a [u8],
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            help::CTA_HELP_NAME => {
                *out = attribute.text();
                present |= Attrs::HELPER;
            }
            // What a helper remembers of its flow: only it can read that.
            help::CTA_HELP_INFO => {}
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

fn decode_secctx<'a>(
    nest: &Attribute<'a>,
    out: &mut &'a [u8],
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut present = Attrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            secctx::CTA_SECCTX_NAME => {
                *out = attribute.text();
                present |= Attrs::SECCTX;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

fn decode_seqadj(
    nest: &Attribute<'_>,
    out: &mut SeqAdj,
    bit: Attrs,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut seen = 0u8;
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            seqadj::CTA_SEQADJ_CORRECTION_POS => {
                out.correction_pos = attribute.be32()?;
                seen |= 1;
            }
            seqadj::CTA_SEQADJ_OFFSET_BEFORE => {
                out.offset_before = attribute.be32()? as i32;
                seen |= 2;
            }
            seqadj::CTA_SEQADJ_OFFSET_AFTER => {
                out.offset_after = attribute.be32()? as i32;
                seen |= 4;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(both_or_nothing(seen == 7, bit))
}

fn decode_synproxy(
    nest: &Attribute<'_>,
    out: &mut Synproxy,
    tally: &mut Tally,
) -> Result<Attrs, Malformed> {
    let mut seen = 0u8;
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            synproxy::CTA_SYNPROXY_ISN => {
                out.isn = attribute.be32()?;
                seen |= 1;
            }
            synproxy::CTA_SYNPROXY_ITS => {
                out.its = attribute.be32()?;
                seen |= 2;
            }
            synproxy::CTA_SYNPROXY_TSOFF => {
                out.tsoff = attribute.be32()?;
                seen |= 4;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(both_or_nothing(seen == 7, Attrs::SYNPROXY))
}

/// Decodes an expectation event or entry. A refusal is counted in `tally`.
pub fn decode_expect<'a>(
    message: &Message<'a>,
    tally: &mut Tally,
) -> Result<Expect<'a>, Malformed> {
    let Class::Expect { destroyed } = message.class() else {
        return Err(wrong_type(message, tally));
    };
    expect_attributes(message, destroyed, tally).inspect_err(|malformed| tally.refuse(malformed))
}

fn expect_attributes<'a>(
    message: &Message<'a>,
    destroyed: bool,
    tally: &mut Tally,
) -> Result<Expect<'a>, Malformed> {
    let mut out = Expect { destroyed, ..Expect::default() };
    let mut present = ExpectAttrs::empty();
    let mut attributes = message.attributes();
    while let Some(attribute) = attributes.advance()? {
        present |= match attribute.kind {
            expect::CTA_EXPECT_MASTER => {
                decode_tuple(&attribute, &mut out.master, tally)?;
                ExpectAttrs::MASTER
            }
            expect::CTA_EXPECT_TUPLE => {
                decode_tuple(&attribute, &mut out.tuple, tally)?;
                ExpectAttrs::TUPLE
            }
            expect::CTA_EXPECT_MASK => {
                decode_tuple(&attribute, &mut out.mask, tally)?;
                ExpectAttrs::MASK
            }
            expect::CTA_EXPECT_TIMEOUT => {
                out.timeout = attribute.be32()?;
                ExpectAttrs::TIMEOUT
            }
            expect::CTA_EXPECT_ID => {
                out.id = attribute.be32()?;
                ExpectAttrs::ID
            }
            expect::CTA_EXPECT_HELP_NAME => {
                out.helper = attribute.text();
                ExpectAttrs::HELPER
            }
            expect::CTA_EXPECT_ZONE => {
                out.zone = attribute.be16()?;
                ExpectAttrs::ZONE
            }
            expect::CTA_EXPECT_FLAGS => {
                out.flags = attribute.be32()?;
                ExpectAttrs::FLAGS
            }
            expect::CTA_EXPECT_CLASS => {
                out.class = attribute.be32()?;
                ExpectAttrs::CLASS
            }
            expect::CTA_EXPECT_NAT => decode_expect_nat(&attribute, &mut out, tally)?,
            expect::CTA_EXPECT_FN => {
                out.function = attribute.text();
                ExpectAttrs::FUNCTION
            }
            _ => {
                tally.unknown_attributes += 1;
                ExpectAttrs::empty()
            }
        };
    }
    out.present = present;
    Ok(out)
}

fn decode_expect_nat(
    nest: &Attribute<'_>,
    out: &mut Expect<'_>,
    tally: &mut Tally,
) -> Result<ExpectAttrs, Malformed> {
    let mut present = ExpectAttrs::empty();
    let mut attributes = nest.nested();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            expect_nat::CTA_EXPECT_NAT_DIR => {
                out.nat_dir = attribute.be32()?;
                present |= ExpectAttrs::NAT_DIR;
            }
            expect_nat::CTA_EXPECT_NAT_TUPLE => {
                decode_tuple(&attribute, &mut out.nat_tuple, tally)?;
                present |= ExpectAttrs::NAT_TUPLE;
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(present)
}

/// Decodes one CPU's counters. Each is `None` when this kernel does not give it: the list has
/// changed over the years.
pub fn decode_stats_cpu(message: &Message<'_>, tally: &mut Tally) -> Result<CpuStats, Malformed> {
    if message.class() != Class::StatsCpu {
        return Err(wrong_type(message, tally));
    }
    stats_cpu_attributes(message, tally).inspect_err(|malformed| tally.refuse(malformed))
}

fn stats_cpu_attributes(message: &Message<'_>, tally: &mut Tally) -> Result<CpuStats, Malformed> {
    let mut out = CpuStats { cpu: message.res_id, ..CpuStats::default() };
    let mut attributes = message.attributes();
    while let Some(attribute) = attributes.advance()? {
        let counter = match attribute.kind {
            stats_cpu::CTA_STATS_SEARCHED => &mut out.searched,
            stats_cpu::CTA_STATS_FOUND => &mut out.found,
            stats_cpu::CTA_STATS_NEW => &mut out.new,
            stats_cpu::CTA_STATS_INVALID => &mut out.invalid,
            stats_cpu::CTA_STATS_IGNORE => &mut out.ignore,
            stats_cpu::CTA_STATS_DELETE => &mut out.delete,
            stats_cpu::CTA_STATS_DELETE_LIST => &mut out.delete_list,
            stats_cpu::CTA_STATS_INSERT => &mut out.insert,
            stats_cpu::CTA_STATS_INSERT_FAILED => &mut out.insert_failed,
            stats_cpu::CTA_STATS_DROP => &mut out.drop,
            stats_cpu::CTA_STATS_EARLY_DROP => &mut out.early_drop,
            stats_cpu::CTA_STATS_ERROR => &mut out.error,
            stats_cpu::CTA_STATS_SEARCH_RESTART => &mut out.search_restart,
            stats_cpu::CTA_STATS_CLASH_RESOLVE => &mut out.clash_resolve,
            stats_cpu::CTA_STATS_CHAIN_TOOLONG => &mut out.chain_toolong,
            _ => {
                tally.unknown_attributes += 1;
                continue;
            }
        };
        *counter = Some(attribute.be32()?);
    }
    Ok(out)
}

/// Decodes how many entries the table has and may have (`nf_conntrack_max`; since 4.19).
pub fn decode_stats(message: &Message<'_>, tally: &mut Tally) -> Result<Stats, Malformed> {
    if message.class() != Class::Stats {
        return Err(wrong_type(message, tally));
    }
    stats_attributes(message, tally).inspect_err(|malformed| tally.refuse(malformed))
}

fn stats_attributes(message: &Message<'_>, tally: &mut Tally) -> Result<Stats, Malformed> {
    let mut out = Stats::default();
    let mut attributes = message.attributes();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            stats_global::CTA_STATS_GLOBAL_ENTRIES => out.entries = Some(attribute.be32()?),
            stats_global::CTA_STATS_GLOBAL_MAX_ENTRIES => {
                out.max_entries = Some(attribute.be32()?);
            }
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(out)
}

/// Decodes one CPU's expectation counters.
pub fn decode_expect_stats(
    message: &Message<'_>,
    tally: &mut Tally,
) -> Result<ExpectStats, Malformed> {
    if message.class() != Class::ExpectStatsCpu {
        return Err(wrong_type(message, tally));
    }
    expect_stats_attributes(message, tally).inspect_err(|malformed| tally.refuse(malformed))
}

fn expect_stats_attributes(
    message: &Message<'_>,
    tally: &mut Tally,
) -> Result<ExpectStats, Malformed> {
    let mut out = ExpectStats { cpu: message.res_id, ..ExpectStats::default() };
    let mut attributes = message.attributes();
    while let Some(attribute) = attributes.advance()? {
        match attribute.kind {
            stats_exp::CTA_STATS_EXP_NEW => out.new = Some(attribute.be32()?),
            stats_exp::CTA_STATS_EXP_CREATE => out.create = Some(attribute.be32()?),
            stats_exp::CTA_STATS_EXP_DELETE => out.delete = Some(attribute.be32()?),
            _ => tally.unknown_attributes += 1,
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::event::Kind;
    use super::super::request::{Header, Writer, message_type, write_tuple};
    use super::super::uapi::conntrack::msg;
    use super::super::uapi::netlink::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_MULTI};
    use super::super::uapi::nfnetlink::NFNL_SUBSYS_CTNETLINK;
    use super::super::wire::messages;
    use super::*;

    fn datagram(command: u8, flags: u16, write: impl FnOnce(&mut Writer)) -> Vec<u8> {
        let mut writer = Writer::new();
        let message_type = message_type(NFNL_SUBSYS_CTNETLINK, command);
        writer.message(Header { message_type, flags, seq: 0, family: 2, res_id: 0 });
        write(&mut writer);
        writer.finish()
    }

    fn one(bytes: &[u8]) -> Message<'_> {
        messages(bytes).next().unwrap().unwrap()
    }

    fn decode(bytes: &[u8]) -> (Result<(), Malformed>, Event<'_>, Tally) {
        let (mut event, mut tally) = (Event::default(), Tally::default());
        let result = decode_conn(&one(bytes), &mut event, &mut tally);
        (result, event, tally)
    }

    fn kind_of(command: u8, flags: u16) -> Kind {
        let bytes = datagram(command, flags, |_| {});
        let (result, event, _) = decode(&bytes);
        result.unwrap();
        event.kind
    }

    #[test]
    fn type_and_flags_say_the_kind() {
        assert_eq!(kind_of(msg::IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL), Kind::New);
        assert_eq!(kind_of(msg::IPCTNL_MSG_CT_NEW, 0), Kind::Update);
        assert_eq!(kind_of(msg::IPCTNL_MSG_CT_DELETE, 0), Kind::Destroy);
        assert_eq!(kind_of(msg::IPCTNL_MSG_CT_NEW, NLM_F_MULTI), Kind::Entry);
    }

    #[test]
    fn nothing_of_an_earlier_event_stays() {
        let full = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
            let tuple = Tuple {
                src_bytes: [9; 16],
                v6: true,
                parts: TupleParts::SRC | TupleParts::SRC_PORT,
                src_port: 7,
                ..Tuple::default()
            };
            write_tuple(writer, cta::CTA_TUPLE_ORIG, &tuple);
            write_tuple(writer, cta::CTA_TUPLE_MASTER, &tuple);
            writer.be32(cta::CTA_MARK, 5).bytes(cta::CTA_LABELS, &[1; 16]);
            writer.nest(cta::CTA_HELP, |writer| {
                writer.text(help::CTA_HELP_NAME, b"ftp");
            });
        });
        let empty = datagram(msg::IPCTNL_MSG_CT_DELETE, 0, |_| {});
        let (mut event, mut tally) = (Event::default(), Tally::default());
        decode_conn(&one(&full), &mut event, &mut tally).unwrap();
        assert_eq!(event.helper, b"ftp");
        decode_conn(&one(&empty), &mut event, &mut tally).unwrap();
        assert_eq!(event, Event { kind: Kind::Destroy, ..Event::default() });
    }

    #[test]
    fn unknown_attributes_are_skipped_and_counted_at_every_depth() {
        let bytes = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
            writer.bytes(999, b"whatever").be32(cta::CTA_ID, 77);
            writer.nest(cta::CTA_TUPLE_ORIG, |writer| {
                writer.u8(99, 1).nest(tuple::CTA_TUPLE_PROTO, |writer| {
                    writer.u8(99, 1).u8(l4proto::CTA_PROTO_NUM, 17);
                });
            });
        });
        let (result, event, tally) = decode(&bytes);
        result.unwrap();
        assert_eq!((event.conn.id, event.conn.orig.proto), (77, 17));
        assert_eq!(tally.unknown_attributes, 3);
        assert_eq!(tally.refused_total(), 0);
    }

    #[test]
    fn a_wrong_length_refuses_the_message_with_reason_and_place() {
        let bytes = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
            writer.be32(cta::CTA_STATUS, 1).be16(cta::CTA_ID, 1);
        });
        let (result, event, tally) = decode(&bytes);
        // 20 bytes of headers, 8 of CTA_STATUS, 4 of the bad one's own header.
        let expected = Malformed { reason: Reason::PayloadLength, offset: 32 };
        assert_eq!(result, Err(expected));
        assert_eq!(event.conn.present, Attrs::empty());
        assert_eq!(tally.refused(Reason::PayloadLength), 1);
        assert_eq!(expected.to_string(), "malformed netlink message: payload_length at byte 32");
    }

    #[test]
    fn an_attribute_longer_than_its_nest_is_cut() {
        let mut bytes = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
            writer.nest(cta::CTA_COUNTERS_ORIG, |writer| {
                writer.be64(counters::CTA_COUNTERS_PACKETS, 1);
            });
        });
        bytes[24] = 13;
        assert_eq!(decode(&bytes).0, Err(Malformed { reason: Reason::AttributeCut, offset: 24 }));
        bytes[24] = 3;
        assert_eq!(
            decode(&bytes).0,
            Err(Malformed { reason: Reason::AttributeLength, offset: 24 })
        );
    }

    #[test]
    fn old_32_bit_counters_are_read() {
        let bytes = datagram(msg::IPCTNL_MSG_CT_DELETE, 0, |writer| {
            writer.nest(cta::CTA_COUNTERS_REPLY, |writer| {
                writer.be32(counters::CTA_COUNTERS32_PACKETS, 3);
                writer.be32(counters::CTA_COUNTERS32_BYTES, u32::MAX);
            });
        });
        let (_, event, _) = decode(&bytes);
        assert_eq!(event.conn.present, Attrs::COUNTERS_REPLY);
        let expected = Counters { packets: 3, bytes: u64::from(u32::MAX) };
        assert_eq!(event.conn.reply_counters, expected);
    }

    #[test]
    fn half_of_a_pair_is_not_present() {
        let bytes = datagram(msg::IPCTNL_MSG_CT_DELETE, 0, |writer| {
            writer.nest(cta::CTA_COUNTERS_ORIG, |writer| {
                writer.be64(counters::CTA_COUNTERS_PACKETS, 3);
            });
            writer.nest(cta::CTA_SEQ_ADJ_ORIG, |writer| {
                writer.be32(seqadj::CTA_SEQADJ_CORRECTION_POS, 3);
            });
            writer.nest(cta::CTA_SYNPROXY, |writer| {
                writer.be32(synproxy::CTA_SYNPROXY_ISN, 3);
            });
        });
        assert_eq!(decode(&bytes).1.conn.present, Attrs::empty());
    }

    #[test]
    fn labels_shorter_than_128_bits_are_the_low_ones() {
        let mut payload = [0u8; 8];
        payload[..8].copy_from_slice(&(1u64 << 33 | 1).to_ne_bytes());
        let bytes = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
            writer.bytes(cta::CTA_LABELS, &payload);
        });
        let (_, event, _) = decode(&bytes);
        assert_eq!(event.conn.present, Attrs::LABELS);
        let set: Vec<u8> = (0..=255).filter(|&label| event.extra.has_label(label)).collect();
        assert_eq!(set, [0, 33]);
        for length in [0, 3, 20] {
            let bytes = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
                writer.bytes(cta::CTA_LABELS, &[0; 20][..length]);
            });
            assert_eq!(decode(&bytes).0.unwrap_err().reason, Reason::PayloadLength);
        }
    }

    #[test]
    fn a_tuple_of_two_families_is_refused() {
        let bytes = datagram(msg::IPCTNL_MSG_CT_NEW, 0, |writer| {
            writer.nest(cta::CTA_TUPLE_ORIG, |writer| {
                writer.nest(tuple::CTA_TUPLE_IP, |writer| {
                    writer.bytes(ip::CTA_IP_V4_SRC, &[1; 4]);
                    writer.bytes(ip::CTA_IP_V6_DST, &[1; 16]);
                });
            });
        });
        assert_eq!(decode(&bytes).0.unwrap_err().reason, Reason::MixedFamilies);
    }

    #[test]
    fn a_message_of_another_type_is_refused_by_every_decoder() {
        let bytes = datagram(msg::IPCTNL_MSG_CT_GET_DYING, 0, |_| {});
        let message = one(&bytes);
        assert_eq!(message.class(), Class::Unknown);
        let (mut event, mut tally) = (Event::default(), Tally::default());
        assert!(decode_conn(&message, &mut event, &mut tally).is_err());
        assert!(decode_expect(&message, &mut tally).is_err());
        assert!(decode_stats_cpu(&message, &mut tally).is_err());
        assert!(decode_stats(&message, &mut tally).is_err());
        assert!(decode_expect_stats(&message, &mut tally).is_err());
        assert_eq!(tally.refused(Reason::WrongType), 5);
    }
}
