//! The field table: every field of every record, once.
//!
//! One row says a field's name, type, unit, source, meaning, the selections that hold it, and how to
//! read it from a record. The JSON, the schema, the documentation and field selection all come from
//! here, so adding a field is adding a row. A row whose expression gives `None` leaves the field
//! out: nothing unknown is ever written.
//!
//! The table is a macro so that the walk over a record's fields is one straight piece of code for
//! each format: as an array of functions it cost an indirect call for each of some fifty fields.

use crate::capture::ValveChange;
use crate::ctnetlink::uapi::ipproto::IPPROTO_GRE;
use crate::ctnetlink::uapi::status::{IPS_DST_NAT, IPS_SRC_NAT};
use crate::ctnetlink::{Attrs, Conn, ExpectAttrs, Extra, Tuple, TupleParts, names};

use super::community_id::CommunityId;
use super::{AgentNote, Body, Expectation, Flow, Gap, GapKinds, Rare, View};

/// Version of the record's shape: raised when a field changes its meaning, not when one is added.
pub const SCHEMA: u32 = 1;

/// What a field's value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// Unsigned, up to 64 bits.
    Uint,
    Int,
    /// RFC 3339, UTC, nanoseconds.
    Time,
    Ip,
    Text,
    /// Sixteen hexadecimal digits.
    Hash,
    Flag,
    /// A list of words.
    Words,
    /// A list of numbers.
    Numbers,
}

/// A row as a format sees it.
#[derive(Debug)]
pub struct Field {
    pub name: &'static str,
    /// `,"name":`, ready for JSON.
    pub json_key: &'static str,
    pub ty: FieldType,
    /// Empty where there is none.
    pub unit: &'static str,
    /// Netlink attribute or rule that it comes from.
    pub source: &'static str,
    pub doc: &'static str,
    sets: u8,
}

/// Takes a record's fields, one call each, in the table's order.
pub trait Visitor {
    fn uint(&mut self, field: &'static Field, value: u64);
    fn int(&mut self, field: &'static Field, value: i64);
    fn time(&mut self, field: &'static Field, nanoseconds: u64);
    fn ip(&mut self, field: &'static Field, value: &Ip);
    /// Any text; the format escapes it.
    fn text(&mut self, field: &'static Field, value: &str);
    /// A word that needs no escaping in any format: letters, digits and `_+/=:.-`.
    fn word(&mut self, field: &'static Field, value: &[u8]);
    fn hash(&mut self, field: &'static Field, value: u64);
    fn flag(&mut self, field: &'static Field, value: bool);
    /// The names of the bits that are set in `bits`. The same bits of a field have the same names.
    fn words(
        &mut self,
        field: &'static Field,
        bits: u32,
        names: impl Iterator<Item = &'static str>,
    );
    fn numbers(&mut self, field: &'static Field, value: &mut dyn Iterator<Item = u64>);
}

/// Always in the record, whatever is selected: without them a line could not be told from another.
pub const ALWAYS: u8 = 1;
/// RFC 6888: who had which address and port, and no destination (REQ-12).
pub const AUDIT: u8 = 2;
/// How much went from where to where.
pub const ACCOUNTING: u8 = 4;

/// An address without `IpAddr`'s tag and copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    pub bytes: [u8; 16],
    pub v6: bool,
}

struct Time(u64);
struct Hash(u64);
struct Word<'a>(&'a str);
struct Status(u32);
struct Labels<'a>(&'a Extra);
struct Kinds(GapKinds);

trait Value {
    const TYPE: FieldType;
    fn visit(self, field: &'static Field, visitor: &mut impl Visitor);
}

macro_rules! value {
    ($($type:ty, $ty:ident, |$value:ident, $field:ident, $visitor:ident| $visit:expr;)*) => {$(
        impl Value for $type {
            const TYPE: FieldType = FieldType::$ty;
            #[inline(always)]
            fn visit(self, $field: &'static Field, $visitor: &mut impl Visitor) {
                let $value = self;
                $visit
            }
        }
    )*};
}

value! {
    u8, Uint, |value, field, visitor| visitor.uint(field, value.into());
    u16, Uint, |value, field, visitor| visitor.uint(field, value.into());
    u32, Uint, |value, field, visitor| visitor.uint(field, value.into());
    u64, Uint, |value, field, visitor| visitor.uint(field, value);
    i32, Int, |value, field, visitor| visitor.int(field, value.into());
    bool, Flag, |value, field, visitor| visitor.flag(field, value);
    Time, Time, |value, field, visitor| visitor.time(field, value.0);
    Ip, Ip, |value, field, visitor| visitor.ip(field, &value);
    &str, Text, |value, field, visitor| visitor.text(field, value);
    Word<'_>, Text, |value, field, visitor| visitor.word(field, value.0.as_bytes());
    CommunityId, Text, |value, field, visitor| visitor.word(field, value.as_bytes());
    Hash, Hash, |value, field, visitor| visitor.hash(field, value.0);
    Status, Words, |value, field, visitor| visitor.words(field, value.0, names::status_names(value.0));
    Labels<'_>, Numbers, |value, field, visitor| visitor.numbers(field, &mut label_numbers(value.0));
    Kinds, Words, |value, field, visitor| visitor.words(field, value.0.bits().into(), gap_kinds(value.0));
}

macro_rules! table {
    (@sets) => { 0 };
    (@sets $($set:ident)+) => { $($set)|+ };
    ($($group:ident($subject:ident: $of:ty) {$(
        $name:ident: $type:ty, $unit:literal, $source:literal, [$($set:ident)*], $doc:literal => $get:expr;
    )*})*) => {
        #[allow(non_camel_case_types, clippy::enum_variant_names)]
        #[derive(Clone, Copy)]
        enum Id { $($($name,)*)* }

        /// All rows, in the order in which a record shows them.
        pub static FIELDS: &[Field] = &[$($(
            Field {
                name: stringify!($name),
                json_key: concat!(",\"", stringify!($name), "\":"),
                ty: <$type as Value>::TYPE,
                unit: $unit,
                source: $source,
                doc: $doc,
                sets: table!(@sets $($set)*),
            },
        )*)*];

        $(
            #[inline(always)]
            fn $group($subject: $of, selected: FieldSet, visitor: &mut impl Visitor) {
                $(
                    if selected.has(Id::$name as usize)
                        && let Some(value) = $get
                    {
                        let value: $type = value;
                        value.visit(&FIELDS[Id::$name as usize], visitor);
                    }
                )*
            }
        )*
    };
}

table! {
    head(view: &View<'_>) {
        schema: u32, "", "", [ALWAYS], "Version of the record's shape." => Some(SCHEMA);
        event: Word<'_>, "", "message type, NLM_F_CREATE", [ALWAYS],
            "What the record is: new, update, destroy, snapshot, expect_new, expect_destroy, gap or agent."
            => Some(Word(view.record.event_name()));
        ts: Time, "", "CTA_TIMESTAMP_EVENT, else CTA_TIMESTAMP_STOP of a destroy, else arrival", [ALWAYS], "When it happened." => Some(Time(view.record.ts));
        agent: &str, "", "[agent] name", [ALWAYS], "Who recorded it." => Some(view.identity.agent.as_str());
        epoch: u64, "", "", [ALWAYS], "Names one run of the agent; later runs have higher ones." => Some(view.identity.epoch);
        seq: u64, "", "", [ALWAYS],
            "Place in the run, without holes: (agent, epoch, seq) names a record for ever." => Some(view.seq);
        netns: &str, "", "/proc/self/ns/net", [ALWAYS],
            "Network namespace: its name, or its inode number where it has none." => Some(view.identity.netns.as_str());
    }
    flow_key(flow: &Flow) {
        flow_id: Hash, "", "boot, namespace, CTA_ZONE, CTA_ID, CTA_TUPLE_ORIG", [AUDIT ACCOUNTING],
            "The same in all records of a flow. The kernel may use one again later: (flow_id, start) is unique."
            => flow.conn.has(Attrs::ID).then_some(Hash(flow.flow_id));
        overtaken: bool, "", "", [AUDIT ACCOUNTING],
            "On a snapshot: a live event of the same flow has a lower seq, so this one may be out of date." => flow.overtaken.then_some(true);
        ct_id: u32, "", "CTA_ID", [AUDIT ACCOUNTING], "The kernel's identifier of the entry."
            => flow.conn.has(Attrs::ID).then_some(flow.conn.id);
    }
    subject(of: &Subject<'_>) {
        zone: u16, "", "CTA_ZONE", [AUDIT ACCOUNTING], "Conntrack zone, when not 0." => of.zone;
        zone_orig: u16, "", "CTA_TUPLE_ORIG / CTA_TUPLE_ZONE", [AUDIT ACCOUNTING],
            "Zone of the original direction only." => of.tuple.has(TupleParts::ZONE).then_some(of.tuple.zone);
        family: Word<'_>, "", "CTA_IP_V4_SRC or CTA_IP_V6_SRC", [AUDIT ACCOUNTING], "ipv4 or ipv6."
            => of.tuple.has(TupleParts::SRC).then_some(Word(if of.tuple.v6 { "ipv6" } else { "ipv4" }));
        proto: u8, "", "CTA_PROTO_NUM", [AUDIT ACCOUNTING], "IANA protocol number."
            => of.tuple.has(TupleParts::PROTO).then_some(of.tuple.proto);
        proto_name: Word<'_>, "", "CTA_PROTO_NUM", [AUDIT ACCOUNTING], "Its name, where it is known."
            => of.protocol_name().map(Word);
        src_ip: Ip, "", "CTA_TUPLE_ORIG / CTA_IP_*_SRC", [AUDIT ACCOUNTING], "Who opened the flow, before translation."
            => src_ip(of.tuple);
        src_port: u16, "", "CTA_PROTO_SRC_PORT", [AUDIT ACCOUNTING], "TCP, UDP, UDP-Lite, SCTP, DCCP." => src_port(of.tuple);
        dst_ip: Ip, "", "CTA_TUPLE_ORIG / CTA_IP_*_DST", [ACCOUNTING], "Whom it asked for, before translation."
            => dst_ip(of.tuple);
        dst_port: u16, "", "CTA_PROTO_DST_PORT", [ACCOUNTING], "TCP, UDP, UDP-Lite, SCTP, DCCP." => dst_port(of.tuple);
        icmp_type: u8, "", "CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMPV6_TYPE", [AUDIT ACCOUNTING], "Of the first packet."
            => of.icmp().map(|tuple| tuple.icmp_type);
        icmp_code: u8, "", "CTA_PROTO_ICMP_CODE, CTA_PROTO_ICMPV6_CODE", [AUDIT ACCOUNTING], "Of the first packet."
            => of.icmp().map(|tuple| tuple.icmp_code);
        icmp_id: u16, "", "CTA_PROTO_ICMP_ID, CTA_PROTO_ICMPV6_ID", [AUDIT ACCOUNTING], "Echo identifier."
            => of.icmp().map(|tuple| tuple.icmp_id);
        gre_key_src: u16, "", "CTA_PROTO_SRC_PORT", [AUDIT ACCOUNTING], "GRE key of the original direction's sender."
            => gre_src(of.tuple);
        gre_key_dst: u16, "", "CTA_PROTO_DST_PORT", [ACCOUNTING], "GRE key of its receiver." => gre_dst(of.tuple);
    }
    translation(nat: &Translation<'_>) {
        nat: Word<'_>, "", "IPS_SRC_NAT, IPS_DST_NAT of CTA_STATUS", [AUDIT ACCOUNTING],
            "Which side was translated: snat, dnat or both." => Some(Word(nat.name()));
        nat_src_ip: Ip, "", "CTA_TUPLE_REPLY / CTA_IP_*_DST", [AUDIT ACCOUNTING], "The source's translated address."
            => nat.source().and_then(dst_ip);
        nat_src_port: u16, "", "CTA_TUPLE_REPLY / CTA_PROTO_DST_PORT", [AUDIT ACCOUNTING], "The source's translated port."
            => nat.source().and_then(dst_port);
        nat_icmp_id: u16, "", "CTA_TUPLE_REPLY / CTA_PROTO_ICMP*_ID", [AUDIT ACCOUNTING], "The translated echo identifier."
            => nat.source().and_then(icmp).map(|tuple| tuple.icmp_id);
        nat_gre_key_src: u16, "", "CTA_TUPLE_REPLY / CTA_PROTO_DST_PORT", [AUDIT ACCOUNTING], "The source's translated GRE key."
            => nat.source().and_then(gre_dst);
        nat_dst_ip: Ip, "", "CTA_TUPLE_REPLY / CTA_IP_*_SRC", [ACCOUNTING], "The destination's translated address."
            => nat.destination().and_then(src_ip);
        nat_dst_port: u16, "", "CTA_TUPLE_REPLY / CTA_PROTO_SRC_PORT", [ACCOUNTING], "The destination's translated port."
            => nat.destination().and_then(src_port);
        nat_gre_key_dst: u16, "", "CTA_TUPLE_REPLY / CTA_PROTO_SRC_PORT", [ACCOUNTING], "The destination's translated GRE key."
            => nat.destination().and_then(gre_src);
    }
    counters(conn: &Conn) {
        orig_packets: u64, "packets", "CTA_COUNTERS_ORIG", [ACCOUNTING], "From source to destination."
            => conn.has(Attrs::COUNTERS_ORIG).then_some(conn.orig_counters.packets);
        orig_bytes: u64, "bytes", "CTA_COUNTERS_ORIG", [ACCOUNTING], "IP-level, from source to destination."
            => conn.has(Attrs::COUNTERS_ORIG).then_some(conn.orig_counters.bytes);
        reply_packets: u64, "packets", "CTA_COUNTERS_REPLY", [ACCOUNTING], "From destination to source."
            => conn.has(Attrs::COUNTERS_REPLY).then_some(conn.reply_counters.packets);
        reply_bytes: u64, "bytes", "CTA_COUNTERS_REPLY", [ACCOUNTING], "IP-level, from destination to source."
            => conn.has(Attrs::COUNTERS_REPLY).then_some(conn.reply_counters.bytes);
        start: Time, "", "CTA_TIMESTAMP_START", [AUDIT ACCOUNTING], "When the kernel made the entry."
            => conn.has(Attrs::START).then_some(Time(conn.start));
        end: Time, "", "CTA_TIMESTAMP_STOP", [AUDIT ACCOUNTING],
            "When the entry went, idle time-out included; not when the last packet passed."
            => conn.has(Attrs::STOP).then_some(Time(conn.stop));
        duration_ns: u64, "ns", "CTA_TIMESTAMP", [AUDIT ACCOUNTING], "end - start."
            => (conn.has(Attrs::START | Attrs::STOP) && conn.stop >= conn.start).then(|| conn.stop - conn.start);
    }
    state(flow: &Flow) {
        tcp_state: Word<'_>, "", "CTA_PROTOINFO_TCP_STATE", [ACCOUNTING], "enum tcp_conntrack, as conntrack(8) writes it."
            => flow.conn.has(Attrs::TCP_STATE).then(|| names::tcp_state(flow.conn.tcp.state)).flatten().map(Word);
        tcp_wscale_orig: u8, "", "CTA_PROTOINFO_TCP_WSCALE_ORIGINAL", [], "Window scale of the original direction."
            => flow.conn.has(Attrs::TCP_WSCALE_ORIG).then_some(flow.conn.tcp.wscale_orig);
        tcp_wscale_reply: u8, "", "CTA_PROTOINFO_TCP_WSCALE_REPLY", [], "Window scale of the reply direction."
            => flow.conn.has(Attrs::TCP_WSCALE_REPLY).then_some(flow.conn.tcp.wscale_reply);
        tcp_flags_orig: u8, "", "CTA_PROTOINFO_TCP_FLAGS_ORIGINAL", [], "IP_CT_TCP_FLAG_* of the original direction."
            => flow.conn.has(Attrs::TCP_FLAGS_ORIG).then_some((flow.conn.tcp.flags_orig >> 8) as u8);
        tcp_flags_reply: u8, "", "CTA_PROTOINFO_TCP_FLAGS_REPLY", [], "IP_CT_TCP_FLAG_* of the reply direction."
            => flow.conn.has(Attrs::TCP_FLAGS_REPLY).then_some((flow.conn.tcp.flags_reply >> 8) as u8);
        sctp_state: Word<'_>, "", "CTA_PROTOINFO_SCTP_STATE", [ACCOUNTING], "enum sctp_conntrack, as conntrack(8) writes it."
            => flow.conn.has(Attrs::SCTP_STATE).then(|| names::sctp_state(flow.conn.sctp_state)).flatten().map(Word);
        dccp_state: Word<'_>, "", "CTA_PROTOINFO_DCCP_STATE", [ACCOUNTING], "enum ct_dccp_states, as conntrack(8) writes it."
            => flow.conn.has(Attrs::DCCP_STATE).then(|| names::dccp_state(flow.conn.dccp_state)).flatten().map(Word);
        timeout_s: u32, "s", "CTA_TIMEOUT", [], "Time left until the entry goes if nothing more is seen."
            => flow.conn.has(Attrs::TIMEOUT).then_some(flow.conn.timeout);
        status: Status, "", "CTA_STATUS", [], "enum ip_conntrack_status: the bits that are set."
            => flow.conn.has(Attrs::STATUS).then_some(Status(flow.conn.status));
        mark: u32, "", "CTA_MARK", [AUDIT ACCOUNTING], "Connection mark." => flow.conn.has(Attrs::MARK).then_some(flow.conn.mark);
        use_count: u32, "", "CTA_USE", [], "References to the entry." => flow.conn.has(Attrs::USE).then_some(flow.conn.use_count);
        zone_reply: u16, "", "CTA_TUPLE_REPLY / CTA_TUPLE_ZONE", [AUDIT ACCOUNTING], "Zone of the reply direction only."
            => flow.conn.reply.has(TupleParts::ZONE).then_some(flow.conn.reply.zone);
    }
    rare(of: &RareOf<'_>) {
        labels: Labels<'_>, "", "CTA_LABELS", [], "Numbers of the connection labels that are set."
            => of.conn.has(Attrs::LABELS).then_some(Labels(&of.rare.extra));
        secctx: &str, "", "CTA_SECCTX_NAME", [], "Security context." => of.conn.has(Attrs::SECCTX).then_some(&*of.rare.secctx);
        master_proto: u8, "", "CTA_TUPLE_MASTER / CTA_PROTO_NUM", [], "Protocol of the flow that this one was expected by."
            => of.master().map(|tuple| tuple.proto);
        master_src_ip: Ip, "", "CTA_TUPLE_MASTER / CTA_IP_*_SRC", [], "Its source." => of.master().and_then(src_ip);
        master_src_port: u16, "", "CTA_TUPLE_MASTER / CTA_PROTO_SRC_PORT", [], "Its source port." => of.master().and_then(src_port);
        master_dst_ip: Ip, "", "CTA_TUPLE_MASTER / CTA_IP_*_DST", [], "Its destination." => of.master().and_then(dst_ip);
        master_dst_port: u16, "", "CTA_TUPLE_MASTER / CTA_PROTO_DST_PORT", [], "Its destination port."
            => of.master().and_then(dst_port);
        sctp_vtag_orig: u32, "", "CTA_PROTOINFO_SCTP_VTAG_ORIGINAL", [], "Verification tag of the original direction."
            => of.conn.has(Attrs::SCTP_VTAG_ORIG).then_some(of.rare.extra.sctp_vtag_orig);
        sctp_vtag_reply: u32, "", "CTA_PROTOINFO_SCTP_VTAG_REPLY", [], "Verification tag of the reply direction."
            => of.conn.has(Attrs::SCTP_VTAG_REPLY).then_some(of.rare.extra.sctp_vtag_reply);
        dccp_role: u8, "", "CTA_PROTOINFO_DCCP_ROLE", [], "enum ct_dccp_roles: 0 the original direction is the client."
            => of.conn.has(Attrs::DCCP_ROLE).then_some(of.rare.extra.dccp.role);
        dccp_handshake_seq: u64, "", "CTA_PROTOINFO_DCCP_HANDSHAKE_SEQ", [], "Sequence number of the handshake."
            => of.conn.has(Attrs::DCCP_HANDSHAKE_SEQ).then_some(of.rare.extra.dccp.handshake_seq);
        seqadj_orig_pos: u32, "", "CTA_SEQADJ_CORRECTION_POS", [], "Sequence adjustment, original direction: from where."
            => of.conn.has(Attrs::SEQ_ADJ_ORIG).then_some(of.rare.extra.seq_adj_orig.correction_pos);
        seqadj_orig_before: i32, "bytes", "CTA_SEQADJ_OFFSET_BEFORE", [], "Offset before that position."
            => of.conn.has(Attrs::SEQ_ADJ_ORIG).then_some(of.rare.extra.seq_adj_orig.offset_before);
        seqadj_orig_after: i32, "bytes", "CTA_SEQADJ_OFFSET_AFTER", [], "Offset after it."
            => of.conn.has(Attrs::SEQ_ADJ_ORIG).then_some(of.rare.extra.seq_adj_orig.offset_after);
        seqadj_reply_pos: u32, "", "CTA_SEQADJ_CORRECTION_POS", [], "Sequence adjustment, reply direction: from where."
            => of.conn.has(Attrs::SEQ_ADJ_REPLY).then_some(of.rare.extra.seq_adj_reply.correction_pos);
        seqadj_reply_before: i32, "bytes", "CTA_SEQADJ_OFFSET_BEFORE", [], "Offset before that position."
            => of.conn.has(Attrs::SEQ_ADJ_REPLY).then_some(of.rare.extra.seq_adj_reply.offset_before);
        seqadj_reply_after: i32, "bytes", "CTA_SEQADJ_OFFSET_AFTER", [], "Offset after it."
            => of.conn.has(Attrs::SEQ_ADJ_REPLY).then_some(of.rare.extra.seq_adj_reply.offset_after);
        synproxy_isn: u32, "", "CTA_SYNPROXY_ISN", [], "Initial sequence number."
            => of.conn.has(Attrs::SYNPROXY).then_some(of.rare.extra.synproxy.isn);
        synproxy_its: u32, "", "CTA_SYNPROXY_ITS", [], "Initial time stamp."
            => of.conn.has(Attrs::SYNPROXY).then_some(of.rare.extra.synproxy.its);
        synproxy_tsoff: u32, "", "CTA_SYNPROXY_TSOFF", [], "Time stamp offset."
            => of.conn.has(Attrs::SYNPROXY).then_some(of.rare.extra.synproxy.tsoff);
    }
    helper_name(name: &str) {
        helper: &str, "", "CTA_HELP_NAME, CTA_EXPECT_HELP_NAME", [], "Connection tracking helper."
            => (!name.is_empty()).then_some(name);
    }
    ids(flow: &Flow) {
        community_id: CommunityId, "", "CTA_TUPLE_ORIG", [ACCOUNTING], "Community ID v1, seed 0, before translation."
            => CommunityId::of(&flow.conn.orig);
        community_id_nat: CommunityId, "", "CTA_TUPLE_REPLY, inverted", [ACCOUNTING],
            "Community ID v1 after translation, where the flow was translated."
            => flow.translation().and_then(|nat| CommunityId::of(&nat.outside()));
    }
    expectation(expect: &Expectation) {
        expect_id: u32, "", "CTA_EXPECT_ID", [], "The kernel's identifier of the expectation."
            => expect.present.contains(ExpectAttrs::ID).then_some(expect.id);
        expect_timeout_s: u32, "s", "CTA_EXPECT_TIMEOUT", [], "Time left."
            => expect.present.contains(ExpectAttrs::TIMEOUT).then_some(expect.timeout);
        expect_flags: u32, "", "CTA_EXPECT_FLAGS", [], "NF_CT_EXPECT_*: 1 permanent, 2 inactive, 4 user space."
            => expect.present.contains(ExpectAttrs::FLAGS).then_some(expect.flags);
        expect_class: u32, "", "CTA_EXPECT_CLASS", [], "The helper's class."
            => expect.present.contains(ExpectAttrs::CLASS).then_some(expect.class);
        expect_function: &str, "", "CTA_EXPECT_FN", [], "The helper's function."
            => expect.present.contains(ExpectAttrs::FUNCTION).then_some(&*expect.function);
        expect_mask_src_ip: Ip, "", "CTA_EXPECT_MASK / CTA_IP_*_SRC", [], "Which bits of the source must match."
            => src_ip(&expect.mask);
        expect_mask_dst_ip: Ip, "", "CTA_EXPECT_MASK / CTA_IP_*_DST", [], "Which bits of the destination must match."
            => dst_ip(&expect.mask);
        expect_mask_src_port: u16, "", "CTA_EXPECT_MASK / CTA_PROTO_SRC_PORT", [], "Which bits of the source port must match."
            => src_port(&expect.mask);
        expect_mask_dst_port: u16, "", "CTA_EXPECT_MASK / CTA_PROTO_DST_PORT", [], "Which bits of the destination port must match."
            => dst_port(&expect.mask);
        expect_nat_dir: u32, "", "CTA_EXPECT_NAT_DIR", [], "Direction that the translation applies to: 0 original, 1 reply."
            => expect.present.contains(ExpectAttrs::NAT_DIR).then_some(expect.nat_dir);
        expect_nat_ip: Ip, "", "CTA_EXPECT_NAT_TUPLE / CTA_IP_*_SRC", [], "Address that it will be translated to."
            => src_ip(&expect.nat_tuple);
        expect_nat_port: u16, "", "CTA_EXPECT_NAT_TUPLE / CTA_PROTO_SRC_PORT", [], "Port that it will be translated to."
            => src_port(&expect.nat_tuple);
        expect_master_proto: u8, "", "CTA_EXPECT_MASTER / CTA_PROTO_NUM", [], "Protocol of the flow that expects it."
            => expect.present.contains(ExpectAttrs::MASTER).then_some(expect.master.proto);
        expect_master_src_ip: Ip, "", "CTA_EXPECT_MASTER / CTA_IP_*_SRC", [], "Its source." => src_ip(&expect.master);
        expect_master_src_port: u16, "", "CTA_EXPECT_MASTER / CTA_PROTO_SRC_PORT", [], "Its source port." => src_port(&expect.master);
        expect_master_dst_ip: Ip, "", "CTA_EXPECT_MASTER / CTA_IP_*_DST", [], "Its destination." => dst_ip(&expect.master);
        expect_master_dst_port: u16, "", "CTA_EXPECT_MASTER / CTA_PROTO_DST_PORT", [], "Its destination port."
            => dst_port(&expect.master);
    }
    gap(gap: &Gap) {
        gap_cause: Word<'_>, "", "", [ALWAYS],
            "Why records are missing: overrun, valve, truncated, malformed, snapshot_incomplete, spool_full or events_off."
            => Some(Word(gap.cause.name()));
        gap_events: u64, "events", "sk_drops and own counts", [ALWAYS], "How many are missing; not to be summed over gaps with gap_seq_from." => gap.events;
        gap_precision: Word<'_>, "", "", [ALWAYS], "How gap_events is to be read: exact, at_least, at_most or unknown."
            => Some(Word(gap.precision.name()));
        gap_kinds: Kinds, "", "", [ALWAYS], "Which kinds of record the missing ones may have been." => Some(Kinds(gap.kinds));
        gap_from: Time, "", "", [ALWAYS], "Nothing was missing before." => Some(Time(gap.from));
        gap_to: Time, "", "", [ALWAYS], "All that is missing was missing by then." => Some(Time(gap.to));
        gap_seq_from: u64, "", "", [ALWAYS], "First numbered record that was given up; a sink that has these numbers lost nothing." => gap.seqs.map(|seqs| seqs.0);
        gap_seq_to: u64, "", "", [ALWAYS], "Last numbered record that was given up." => gap.seqs.map(|seqs| seqs.1);
    }
    agent_note(note: &AgentNote) {
        agent_action: Word<'_>, "", "", [ALWAYS], "started, stopped, reloaded, valve_opened or valve_closed."
            => Some(Word(note.action.name()));
        agent_version: Word<'_>, "", "", [ALWAYS], "The agent's version." => Some(Word(note.version));
        valve_entries: u64, "entries", "nf_conntrack_count", [ALWAYS], "Entries in the table when the valve moved."
            => note.valve.and_then(|valve: ValveChange| valve.entries);
        valve_limit: u64, "entries", "nf_conntrack_max", [ALWAYS], "The table's limit."
            => note.valve.and_then(|valve: ValveChange| valve.limit);
    }
}

/// Shows `visitor` the fields of a record that it has and that are selected.
#[inline]
pub fn visit(view: &View<'_>, selected: FieldSet, visitor: &mut impl Visitor) {
    head(view, selected, visitor);
    match &view.record.body {
        Body::Flow(flow) => visit_flow(flow, selected, visitor),
        Body::Expectation(expect) => {
            let present = |attr| expect.present.contains(attr);
            let zone = present(ExpectAttrs::ZONE).then_some(expect.zone);
            subject(&Subject { tuple: &expect.tuple, zone }, selected, visitor);
            helper_name(&expect.helper, selected, visitor);
            expectation(expect, selected, visitor);
        }
        Body::Gap(of) => gap(of, selected, visitor),
        Body::Agent(note) => agent_note(note, selected, visitor),
    }
}

#[inline]
fn visit_flow(flow: &Flow, selected: FieldSet, visitor: &mut impl Visitor) {
    let conn = &flow.conn;
    flow_key(flow, selected, visitor);
    let zone = conn.has(Attrs::ZONE).then_some(conn.zone);
    subject(&Subject { tuple: &conn.orig, zone }, selected, visitor);
    if let Some(nat) = flow.translation() {
        translation(&nat, selected, visitor);
    }
    counters(conn, selected, visitor);
    state(flow, selected, visitor);
    if let Some(of) = &flow.rare {
        rare(&RareOf { conn, rare: of }, selected, visitor);
        helper_name(&of.helper, selected, visitor);
    }
    ids(flow, selected, visitor);
}

/// What flows and expectations have in common.
struct Subject<'a> {
    tuple: &'a Tuple,
    zone: Option<u16>,
}

impl<'a> Subject<'a> {
    fn icmp(&self) -> Option<&'a Tuple> {
        icmp(self.tuple)
    }

    fn protocol_name(&self) -> Option<&'static str> {
        self.tuple
            .has(TupleParts::PROTO)
            .then(|| names::protocol(self.tuple.proto))
            .filter(|name| *name != "unknown")
    }
}

struct RareOf<'a> {
    conn: &'a Conn,
    rare: &'a Rare,
}

impl<'a> RareOf<'a> {
    fn master(&self) -> Option<&'a Tuple> {
        self.conn.has(Attrs::MASTER).then_some(&self.rare.extra.master)
    }
}

/// How a flow was translated.
#[derive(Clone, Copy, Debug)]
pub struct Translation<'a> {
    orig: &'a Tuple,
    reply: &'a Tuple,
    pub snat: bool,
    pub dnat: bool,
}

impl Flow {
    /// `None` when the flow was not translated.
    #[inline]
    pub fn translation(&self) -> Option<Translation<'_>> {
        let conn = &self.conn;
        // SRC_NAT_DONE and DST_NAT_DONE are set without a translation too.
        let translated = conn.status & (IPS_SRC_NAT | IPS_DST_NAT) != 0;
        if !translated || !conn.has(Attrs::STATUS | Attrs::TUPLE_ORIG | Attrs::TUPLE_REPLY) {
            return None;
        }
        Some(Translation {
            orig: &conn.orig,
            reply: &conn.reply,
            snat: conn.status & IPS_SRC_NAT != 0,
            dnat: conn.status & IPS_DST_NAT != 0,
        })
    }
}

impl<'a> Translation<'a> {
    pub fn name(&self) -> &'static str {
        match (self.snat, self.dnat) {
            (true, true) => "both",
            (true, false) => "snat",
            (false, _) => "dnat",
        }
    }

    /// The reply tuple, where the source was translated: its destination is the new source.
    fn source(&self) -> Option<&'a Tuple> {
        self.snat.then_some(self.reply)
    }

    fn destination(&self) -> Option<&'a Tuple> {
        self.dnat.then_some(self.reply)
    }

    /// The original direction as it looks on the other side. The ICMP type and code are the original
    /// ones: the reply's are the counterparts.
    pub fn outside(&self) -> Tuple {
        Tuple {
            src_bytes: self.reply.dst_bytes,
            dst_bytes: self.reply.src_bytes,
            src_port: self.reply.dst_port,
            dst_port: self.reply.src_port,
            icmp_type: self.orig.icmp_type,
            icmp_code: self.orig.icmp_code,
            ..*self.reply
        }
    }
}

fn src_ip(tuple: &Tuple) -> Option<Ip> {
    tuple.has(TupleParts::SRC).then_some(Ip { bytes: tuple.src_bytes, v6: tuple.v6 })
}

fn dst_ip(tuple: &Tuple) -> Option<Ip> {
    tuple.has(TupleParts::DST).then_some(Ip { bytes: tuple.dst_bytes, v6: tuple.v6 })
}

fn src_port(tuple: &Tuple) -> Option<u16> {
    (tuple.has(TupleParts::SRC_PORT) && tuple.proto != IPPROTO_GRE).then_some(tuple.src_port)
}

fn dst_port(tuple: &Tuple) -> Option<u16> {
    (tuple.has(TupleParts::DST_PORT) && tuple.proto != IPPROTO_GRE).then_some(tuple.dst_port)
}

fn gre_src(tuple: &Tuple) -> Option<u16> {
    (tuple.has(TupleParts::SRC_PORT) && tuple.proto == IPPROTO_GRE).then_some(tuple.src_port)
}

fn gre_dst(tuple: &Tuple) -> Option<u16> {
    (tuple.has(TupleParts::DST_PORT) && tuple.proto == IPPROTO_GRE).then_some(tuple.dst_port)
}

fn icmp(tuple: &Tuple) -> Option<&Tuple> {
    tuple.has(TupleParts::ICMP).then_some(tuple)
}

fn label_numbers(extra: &Extra) -> impl Iterator<Item = u64> {
    (0..128).filter(|label| extra.has_label(*label)).map(u64::from)
}

fn gap_kinds(kinds: GapKinds) -> impl Iterator<Item = &'static str> {
    const NAMES: [(GapKinds, &str); 6] = [
        (GapKinds::NEW, "new"),
        (GapKinds::UPDATE, "update"),
        (GapKinds::DESTROY, "destroy"),
        (GapKinds::EXPECT_NEW, "expect_new"),
        (GapKinds::EXPECT_DESTROY, "expect_destroy"),
        (GapKinds::SNAPSHOT, "snapshot"),
    ];
    NAMES.into_iter().filter(move |(kind, _)| kinds.contains(*kind)).map(|(_, name)| name)
}

/// Which fields a sink wants. What names a record and what tells a loss is always in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldSet(u128);

impl FieldSet {
    pub const FULL: FieldSet = FieldSet(u128::MAX);

    /// RFC 6888's log: no destinations.
    pub fn audit() -> Self {
        Self::of(ALWAYS | AUDIT)
    }

    pub fn accounting() -> Self {
        Self::of(ALWAYS | ACCOUNTING)
    }

    /// The fields named, or the names that no field has.
    pub fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, Vec<&'a str>> {
        let mut set = Self::of(ALWAYS);
        let mut unknown = Vec::new();
        for name in names {
            match FIELDS.iter().position(|field| field.name == name) {
                Some(index) => set.0 |= 1 << index,
                None => unknown.push(name),
            }
        }
        if unknown.is_empty() { Ok(set) } else { Err(unknown) }
    }

    fn of(sets: u8) -> Self {
        let bits = FIELDS.iter().enumerate().filter(|(_, field)| field.sets & sets != 0);
        FieldSet(bits.fold(0, |set, (index, _)| set | 1 << index))
    }

    #[inline(always)]
    fn has(self, index: usize) -> bool {
        self.0 >> index & 1 == 1
    }
}

const _: () = assert!(FIELDS.len() <= 128, "FieldSet has 128 bits");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_one_row_and_says_what_it_means() {
        let mut names: Vec<_> = FIELDS.iter().map(|field| field.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FIELDS.len());
        for field in FIELDS {
            assert!(field.doc.ends_with('.'), "{}: {:?}", field.name, field.doc);
            assert_eq!(field.json_key, format!(",\"{}\":", field.name));
        }
    }

    #[test]
    fn the_audit_selection_has_no_destination() {
        let audit = FieldSet::audit();
        for (index, field) in FIELDS.iter().enumerate() {
            if field.name.contains("dst") || field.name.starts_with("community_id") {
                assert!(!audit.has(index), "{}", field.name);
            }
        }
        assert!(audit.has(Id::nat_src_port as usize));
    }

    #[test]
    fn a_list_keeps_what_names_a_record_and_says_which_names_are_unknown() {
        let set = FieldSet::list(["src_ip"]).unwrap();
        assert!(
            set.has(Id::src_ip as usize)
                && set.has(Id::seq as usize)
                && set.has(Id::gap_events as usize)
        );
        assert!(!set.has(Id::dst_ip as usize));
        assert_eq!(FieldSet::list(["src_ip", "scr_ip", "x"]), Err(vec!["scr_ip", "x"]));
    }
}
