//! Constants of the kernel's ABI under their kernel names, by the uapi header each comes from.
//!
//! Only numbers: nothing is computed here. An enum of the header is a `mod`, so that names stay the
//! kernel's own and still do not collide.

/// `linux/netlink.h`: message types, flags and sizes.
pub mod netlink {
    pub const NLMSG_HDRLEN: usize = 16;
    pub const NLMSG_ALIGNTO: usize = 4;
    pub const NLMSG_NOOP: u16 = 1;
    pub const NLMSG_ERROR: u16 = 2;
    pub const NLMSG_DONE: u16 = 3;
    pub const NLMSG_OVERRUN: u16 = 4;
    /// Types below this are netlink's own and carry no `struct nfgenmsg`.
    pub const NLMSG_MIN_TYPE: u16 = 0x10;

    pub const NLM_F_REQUEST: u16 = 0x01;
    pub const NLM_F_MULTI: u16 = 0x02;
    pub const NLM_F_ACK: u16 = 0x04;
    pub const NLM_F_DUMP_INTR: u16 = 0x10;
    pub const NLM_F_ROOT: u16 = 0x100;
    pub const NLM_F_MATCH: u16 = 0x200;
    pub const NLM_F_DUMP: u16 = NLM_F_ROOT | NLM_F_MATCH;
    pub const NLM_F_EXCL: u16 = 0x200;
    pub const NLM_F_CREATE: u16 = 0x400;
    pub const NLM_F_APPEND: u16 = 0x800;
    /// In an error or DONE: the failed request's payload was left out.
    pub const NLM_F_CAPPED: u16 = 0x100;
    /// In an error or DONE: `enum nlmsgerr_attrs` attributes follow.
    pub const NLM_F_ACK_TLVS: u16 = 0x200;

    /// `enum nlmsgerr_attrs`.
    pub const NLMSGERR_ATTR_MSG: u16 = 1;

    pub const NLA_HDRLEN: usize = 4;
    pub const NLA_F_NESTED: u16 = 1 << 15;
    pub const NLA_F_NET_BYTEORDER: u16 = 1 << 14;
    pub const NLA_TYPE_MASK: u16 = !(NLA_F_NESTED | NLA_F_NET_BYTEORDER);
}

/// `linux/netfilter/nfnetlink.h`.
pub mod nfnetlink {
    pub const NFNETLINK_V0: u8 = 0;
    /// Size of `struct nfgenmsg`.
    pub const NFGENMSG_LEN: usize = 4;

    pub const NFNLGRP_CONNTRACK_NEW: u32 = 1;
    pub const NFNLGRP_CONNTRACK_UPDATE: u32 = 2;
    pub const NFNLGRP_CONNTRACK_DESTROY: u32 = 3;
    pub const NFNLGRP_CONNTRACK_EXP_NEW: u32 = 4;
    pub const NFNLGRP_CONNTRACK_EXP_UPDATE: u32 = 5;
    pub const NFNLGRP_CONNTRACK_EXP_DESTROY: u32 = 6;

    pub const NFNL_SUBSYS_CTNETLINK: u8 = 1;
    pub const NFNL_SUBSYS_CTNETLINK_EXP: u8 = 2;
    pub const NFNL_SUBSYS_NFTABLES: u8 = 10;

    pub const NFNL_MSG_BATCH_BEGIN: u16 = super::netlink::NLMSG_MIN_TYPE;
    pub const NFNL_MSG_BATCH_END: u16 = super::netlink::NLMSG_MIN_TYPE + 1;
}

/// `linux/netfilter.h` and `linux/socket.h`: `nfgenmsg.nfgen_family`.
pub mod family {
    pub const AF_UNSPEC: u8 = 0;
    pub const NFPROTO_INET: u8 = 1;
    pub const AF_INET: u8 = 2;
    pub const AF_INET6: u8 = 10;
}

/// `linux/netfilter/nfnetlink_conntrack.h`.
pub mod conntrack {
    /// `enum cntl_msg_types`: what a message of `NFNL_SUBSYS_CTNETLINK` is.
    pub mod msg {
        pub const IPCTNL_MSG_CT_NEW: u8 = 0;
        pub const IPCTNL_MSG_CT_GET: u8 = 1;
        pub const IPCTNL_MSG_CT_DELETE: u8 = 2;
        pub const IPCTNL_MSG_CT_GET_CTRZERO: u8 = 3;
        pub const IPCTNL_MSG_CT_GET_STATS_CPU: u8 = 4;
        pub const IPCTNL_MSG_CT_GET_STATS: u8 = 5;
        pub const IPCTNL_MSG_CT_GET_DYING: u8 = 6;
        pub const IPCTNL_MSG_CT_GET_UNCONFIRMED: u8 = 7;
    }

    /// `enum ctnl_exp_msg_types`: what a message of `NFNL_SUBSYS_CTNETLINK_EXP` is.
    pub mod exp_msg {
        pub const IPCTNL_MSG_EXP_NEW: u8 = 0;
        pub const IPCTNL_MSG_EXP_GET: u8 = 1;
        pub const IPCTNL_MSG_EXP_DELETE: u8 = 2;
        pub const IPCTNL_MSG_EXP_GET_STATS_CPU: u8 = 3;
    }

    /// `enum ctattr_type`.
    pub mod cta {
        pub const CTA_TUPLE_ORIG: u16 = 1;
        pub const CTA_TUPLE_REPLY: u16 = 2;
        pub const CTA_STATUS: u16 = 3;
        pub const CTA_PROTOINFO: u16 = 4;
        pub const CTA_HELP: u16 = 5;
        pub const CTA_NAT_SRC: u16 = 6;
        pub const CTA_TIMEOUT: u16 = 7;
        pub const CTA_MARK: u16 = 8;
        pub const CTA_COUNTERS_ORIG: u16 = 9;
        pub const CTA_COUNTERS_REPLY: u16 = 10;
        pub const CTA_USE: u16 = 11;
        pub const CTA_ID: u16 = 12;
        pub const CTA_NAT_DST: u16 = 13;
        pub const CTA_TUPLE_MASTER: u16 = 14;
        pub const CTA_SEQ_ADJ_ORIG: u16 = 15;
        pub const CTA_SEQ_ADJ_REPLY: u16 = 16;
        pub const CTA_SECMARK: u16 = 17;
        pub const CTA_ZONE: u16 = 18;
        pub const CTA_SECCTX: u16 = 19;
        pub const CTA_TIMESTAMP: u16 = 20;
        pub const CTA_MARK_MASK: u16 = 21;
        pub const CTA_LABELS: u16 = 22;
        pub const CTA_LABELS_MASK: u16 = 23;
        pub const CTA_SYNPROXY: u16 = 24;
        pub const CTA_FILTER: u16 = 25;
        pub const CTA_STATUS_MASK: u16 = 26;
        pub const CTA_TIMESTAMP_EVENT: u16 = 27;
    }

    /// `enum ctattr_tuple`.
    pub mod tuple {
        pub const CTA_TUPLE_IP: u16 = 1;
        pub const CTA_TUPLE_PROTO: u16 = 2;
        pub const CTA_TUPLE_ZONE: u16 = 3;
    }

    /// `enum ctattr_ip`.
    pub mod ip {
        pub const CTA_IP_V4_SRC: u16 = 1;
        pub const CTA_IP_V4_DST: u16 = 2;
        pub const CTA_IP_V6_SRC: u16 = 3;
        pub const CTA_IP_V6_DST: u16 = 4;
    }

    /// `enum ctattr_l4proto`.
    pub mod l4proto {
        pub const CTA_PROTO_NUM: u16 = 1;
        pub const CTA_PROTO_SRC_PORT: u16 = 2;
        pub const CTA_PROTO_DST_PORT: u16 = 3;
        pub const CTA_PROTO_ICMP_ID: u16 = 4;
        pub const CTA_PROTO_ICMP_TYPE: u16 = 5;
        pub const CTA_PROTO_ICMP_CODE: u16 = 6;
        pub const CTA_PROTO_ICMPV6_ID: u16 = 7;
        pub const CTA_PROTO_ICMPV6_TYPE: u16 = 8;
        pub const CTA_PROTO_ICMPV6_CODE: u16 = 9;
    }

    /// `enum ctattr_protoinfo` and the three enums below it.
    pub mod protoinfo {
        pub const CTA_PROTOINFO_TCP: u16 = 1;
        pub const CTA_PROTOINFO_DCCP: u16 = 2;
        pub const CTA_PROTOINFO_SCTP: u16 = 3;

        pub const CTA_PROTOINFO_TCP_STATE: u16 = 1;
        pub const CTA_PROTOINFO_TCP_WSCALE_ORIGINAL: u16 = 2;
        pub const CTA_PROTOINFO_TCP_WSCALE_REPLY: u16 = 3;
        pub const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
        pub const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;

        pub const CTA_PROTOINFO_DCCP_STATE: u16 = 1;
        pub const CTA_PROTOINFO_DCCP_ROLE: u16 = 2;
        pub const CTA_PROTOINFO_DCCP_HANDSHAKE_SEQ: u16 = 3;
        pub const CTA_PROTOINFO_DCCP_PAD: u16 = 4;

        pub const CTA_PROTOINFO_SCTP_STATE: u16 = 1;
        pub const CTA_PROTOINFO_SCTP_VTAG_ORIGINAL: u16 = 2;
        pub const CTA_PROTOINFO_SCTP_VTAG_REPLY: u16 = 3;
    }

    /// `enum ctattr_counters`.
    pub mod counters {
        pub const CTA_COUNTERS_PACKETS: u16 = 1;
        pub const CTA_COUNTERS_BYTES: u16 = 2;
        pub const CTA_COUNTERS32_PACKETS: u16 = 3;
        pub const CTA_COUNTERS32_BYTES: u16 = 4;
        pub const CTA_COUNTERS_PAD: u16 = 5;
    }

    /// `enum ctattr_tstamp`.
    pub mod tstamp {
        pub const CTA_TIMESTAMP_START: u16 = 1;
        pub const CTA_TIMESTAMP_STOP: u16 = 2;
        pub const CTA_TIMESTAMP_PAD: u16 = 3;
    }

    /// `enum ctattr_seqadj`.
    pub mod seqadj {
        pub const CTA_SEQADJ_CORRECTION_POS: u16 = 1;
        pub const CTA_SEQADJ_OFFSET_BEFORE: u16 = 2;
        pub const CTA_SEQADJ_OFFSET_AFTER: u16 = 3;
    }

    /// `enum ctattr_synproxy`.
    pub mod synproxy {
        pub const CTA_SYNPROXY_ISN: u16 = 1;
        pub const CTA_SYNPROXY_ITS: u16 = 2;
        pub const CTA_SYNPROXY_TSOFF: u16 = 3;
    }

    /// `enum ctattr_help`.
    pub mod help {
        pub const CTA_HELP_NAME: u16 = 1;
        pub const CTA_HELP_INFO: u16 = 2;
    }

    /// `enum ctattr_secctx`.
    pub mod secctx {
        pub const CTA_SECCTX_NAME: u16 = 1;
    }

    /// `enum ctattr_expect`.
    pub mod expect {
        pub const CTA_EXPECT_MASTER: u16 = 1;
        pub const CTA_EXPECT_TUPLE: u16 = 2;
        pub const CTA_EXPECT_MASK: u16 = 3;
        pub const CTA_EXPECT_TIMEOUT: u16 = 4;
        pub const CTA_EXPECT_ID: u16 = 5;
        pub const CTA_EXPECT_HELP_NAME: u16 = 6;
        pub const CTA_EXPECT_ZONE: u16 = 7;
        pub const CTA_EXPECT_FLAGS: u16 = 8;
        pub const CTA_EXPECT_CLASS: u16 = 9;
        pub const CTA_EXPECT_NAT: u16 = 10;
        pub const CTA_EXPECT_FN: u16 = 11;
    }

    /// `enum ctattr_expect_nat`.
    pub mod expect_nat {
        pub const CTA_EXPECT_NAT_DIR: u16 = 1;
        pub const CTA_EXPECT_NAT_TUPLE: u16 = 2;
    }

    /// `enum ctattr_stats_cpu`.
    pub mod stats_cpu {
        pub const CTA_STATS_SEARCHED: u16 = 1;
        pub const CTA_STATS_FOUND: u16 = 2;
        pub const CTA_STATS_NEW: u16 = 3;
        pub const CTA_STATS_INVALID: u16 = 4;
        pub const CTA_STATS_IGNORE: u16 = 5;
        pub const CTA_STATS_DELETE: u16 = 6;
        pub const CTA_STATS_DELETE_LIST: u16 = 7;
        pub const CTA_STATS_INSERT: u16 = 8;
        pub const CTA_STATS_INSERT_FAILED: u16 = 9;
        pub const CTA_STATS_DROP: u16 = 10;
        pub const CTA_STATS_EARLY_DROP: u16 = 11;
        pub const CTA_STATS_ERROR: u16 = 12;
        pub const CTA_STATS_SEARCH_RESTART: u16 = 13;
        pub const CTA_STATS_CLASH_RESOLVE: u16 = 14;
        pub const CTA_STATS_CHAIN_TOOLONG: u16 = 15;
    }

    /// `enum ctattr_stats_global`.
    pub mod stats_global {
        pub const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
        pub const CTA_STATS_GLOBAL_MAX_ENTRIES: u16 = 2;
    }

    /// `enum ctattr_expect_stats`.
    pub mod stats_exp {
        pub const CTA_STATS_EXP_NEW: u16 = 1;
        pub const CTA_STATS_EXP_CREATE: u16 = 2;
        pub const CTA_STATS_EXP_DELETE: u16 = 3;
    }
}

/// `enum ip_conntrack_status` of `linux/netfilter/nf_conntrack_common.h`.
pub mod status {
    pub const IPS_EXPECTED: u32 = 1 << 0;
    pub const IPS_SEEN_REPLY: u32 = 1 << 1;
    pub const IPS_ASSURED: u32 = 1 << 2;
    pub const IPS_CONFIRMED: u32 = 1 << 3;
    pub const IPS_SRC_NAT: u32 = 1 << 4;
    pub const IPS_DST_NAT: u32 = 1 << 5;
    pub const IPS_SEQ_ADJUST: u32 = 1 << 6;
    pub const IPS_SRC_NAT_DONE: u32 = 1 << 7;
    pub const IPS_DST_NAT_DONE: u32 = 1 << 8;
    pub const IPS_DYING: u32 = 1 << 9;
    pub const IPS_FIXED_TIMEOUT: u32 = 1 << 10;
    pub const IPS_TEMPLATE: u32 = 1 << 11;
    pub const IPS_UNTRACKED: u32 = 1 << 12;
    pub const IPS_HELPER: u32 = 1 << 13;
    pub const IPS_OFFLOAD: u32 = 1 << 14;
    pub const IPS_HW_OFFLOAD: u32 = 1 << 15;
}

/// `linux/in.h`: IANA protocol numbers that conntrack treats on their own.
pub mod ipproto {
    pub const IPPROTO_ICMP: u8 = 1;
    pub const IPPROTO_IGMP: u8 = 2;
    pub const IPPROTO_IPIP: u8 = 4;
    pub const IPPROTO_TCP: u8 = 6;
    pub const IPPROTO_UDP: u8 = 17;
    pub const IPPROTO_DCCP: u8 = 33;
    pub const IPPROTO_IPV6: u8 = 41;
    pub const IPPROTO_GRE: u8 = 47;
    pub const IPPROTO_ESP: u8 = 50;
    pub const IPPROTO_AH: u8 = 51;
    pub const IPPROTO_ICMPV6: u8 = 58;
    pub const IPPROTO_OSPF: u8 = 89;
    pub const IPPROTO_PIM: u8 = 103;
    pub const IPPROTO_VRRP: u8 = 112;
    pub const IPPROTO_L2TP: u8 = 115;
    pub const IPPROTO_SCTP: u8 = 132;
    pub const IPPROTO_UDPLITE: u8 = 136;
}
