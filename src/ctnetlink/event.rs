//! What a ctnetlink message says, in host byte order and of fixed size.
//!
//! Everything here is plain data behind a presence mask: a value whose bit is not set was not in the
//! message and means nothing, so that an unknown never becomes a made-up 0. Nothing is interpreted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bitflags::bitflags;

/// Which message it was. UPDATE shares `IPCTNL_MSG_CT_NEW` with NEW; `NLM_F_CREATE` tells them apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// `IPCTNL_MSG_CT_NEW` with `NLM_F_CREATE`: a flow was confirmed.
    #[default]
    New,
    /// `IPCTNL_MSG_CT_NEW` without it: a flow changed.
    Update,
    /// `IPCTNL_MSG_CT_DELETE`.
    Destroy,
    /// `IPCTNL_MSG_CT_NEW` with `NLM_F_MULTI`: an entry of a dump, or the answer to a single GET.
    Entry,
}

bitflags! {
    /// Which attributes (`enum ctattr_type`) of a conntrack message were present and understood.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Attrs: u64 {
        const TUPLE_ORIG = 1 << 0;
        const TUPLE_REPLY = 1 << 1;
        const STATUS = 1 << 2;
        const TIMEOUT = 1 << 3;
        const MARK = 1 << 4;
        /// `CTA_COUNTERS_ORIG`, with 64-bit or old 32-bit counters.
        const COUNTERS_ORIG = 1 << 5;
        const COUNTERS_REPLY = 1 << 6;
        const ID = 1 << 7;
        const USE = 1 << 8;
        const ZONE = 1 << 9;
        const START = 1 << 10;
        const STOP = 1 << 11;
        /// `CTA_TIMESTAMP_EVENT`.
        const EVENT_TIME = 1 << 12;
        const TCP_STATE = 1 << 13;
        const TCP_WSCALE_ORIG = 1 << 14;
        const TCP_WSCALE_REPLY = 1 << 15;
        const TCP_FLAGS_ORIG = 1 << 16;
        const TCP_FLAGS_REPLY = 1 << 17;
        const SCTP_STATE = 1 << 18;
        const SCTP_VTAG_ORIG = 1 << 19;
        const SCTP_VTAG_REPLY = 1 << 20;
        const DCCP_STATE = 1 << 21;
        const DCCP_ROLE = 1 << 22;
        const DCCP_HANDSHAKE_SEQ = 1 << 23;
        const LABELS = 1 << 24;
        const HELPER = 1 << 25;
        const SECCTX = 1 << 26;
        const MASTER = 1 << 27;
        const SEQ_ADJ_ORIG = 1 << 28;
        const SEQ_ADJ_REPLY = 1 << 29;
        const SYNPROXY = 1 << 30;

        /// What lives in [`Extra`], which few flows have.
        const EXTRA = Self::SCTP_VTAG_ORIG.bits() | Self::SCTP_VTAG_REPLY.bits()
            | Self::DCCP_ROLE.bits() | Self::DCCP_HANDSHAKE_SEQ.bits()
            | Self::LABELS.bits() | Self::MASTER.bits()
            | Self::SEQ_ADJ_ORIG.bits() | Self::SEQ_ADJ_REPLY.bits() | Self::SYNPROXY.bits();
    }

    /// Which parts of a tuple (`enum ctattr_tuple` and below) were present.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct TupleParts: u8 {
        const SRC = 1 << 0;
        const DST = 1 << 1;
        const PROTO = 1 << 2;
        /// `CTA_PROTO_SRC_PORT`: TCP, UDP, UDP-Lite, SCTP, DCCP; for GRE it is the key.
        const SRC_PORT = 1 << 3;
        const DST_PORT = 1 << 4;
        /// `CTA_PROTO_ICMP_*` or `CTA_PROTO_ICMPV6_*`: id, type and code.
        const ICMP = 1 << 5;
        /// `CTA_TUPLE_ZONE`: the zone of one direction only.
        const ZONE = 1 << 6;
    }

    /// Which attributes (`enum ctattr_expect`) of an expectation were present.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ExpectAttrs: u32 {
        const MASTER = 1 << 0;
        const TUPLE = 1 << 1;
        const MASK = 1 << 2;
        const TIMEOUT = 1 << 3;
        const ID = 1 << 4;
        const HELPER = 1 << 5;
        const ZONE = 1 << 6;
        const FLAGS = 1 << 7;
        const CLASS = 1 << 8;
        const NAT_DIR = 1 << 9;
        const NAT_TUPLE = 1 << 10;
        const FUNCTION = 1 << 11;
    }
}

/// One direction of a flow (`struct nf_conntrack_tuple`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// IPv4 uses the first four bytes, the rest is 0.
    pub src_bytes: [u8; 16],
    pub dst_bytes: [u8; 16],
    pub parts: TupleParts,
    /// Which of `CTA_IP_V4_*` and `CTA_IP_V6_*` it was.
    pub v6: bool,
    /// IANA protocol number.
    pub proto: u8,
    pub icmp_type: u8,
    pub icmp_code: u8,
    pub icmp_id: u16,
    pub src_port: u16,
    pub dst_port: u16,
    pub zone: u16,
}

impl Tuple {
    pub fn src(&self) -> IpAddr {
        address(&self.src_bytes, self.v6)
    }

    pub fn dst(&self) -> IpAddr {
        address(&self.dst_bytes, self.v6)
    }

    pub fn has(&self, parts: TupleParts) -> bool {
        self.parts.contains(parts)
    }
}

fn address(bytes: &[u8; 16], v6: bool) -> IpAddr {
    if v6 {
        return IpAddr::V6(Ipv6Addr::from(*bytes));
    }
    IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
}

/// `CTA_COUNTERS_*`: IP-level packets and bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub packets: u64,
    pub bytes: u64,
}

/// `CTA_PROTOINFO_TCP`. A flags word is `struct nf_ct_tcp_flags`: flags in the high byte, mask in the low.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    pub state: u8,
    pub wscale_orig: u8,
    pub wscale_reply: u8,
    pub flags_orig: u16,
    pub flags_reply: u16,
}

/// `CTA_PROTOINFO_DCCP` beside its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DccpInfo {
    pub role: u8,
    pub handshake_seq: u64,
}

/// `CTA_SEQ_ADJ_*` (`struct nf_ct_seqadj`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeqAdj {
    pub correction_pos: u32,
    pub offset_before: i32,
    pub offset_after: i32,
}

/// `CTA_SYNPROXY` (`struct nf_conn_synproxy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synproxy {
    pub isn: u32,
    pub its: u32,
    pub tsoff: u32,
}

/// A conntrack entry as one message describes it. Small on purpose: a record keeps a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conn {
    pub present: Attrs,
    pub orig: Tuple,
    pub reply: Tuple,
    pub orig_counters: Counters,
    pub reply_counters: Counters,
    /// Nanoseconds since the epoch.
    pub start: u64,
    pub stop: u64,
    pub event_time: u64,
    /// `enum ip_conntrack_status`.
    pub status: u32,
    /// Seconds left.
    pub timeout: u32,
    pub mark: u32,
    pub id: u32,
    pub use_count: u32,
    pub zone: u16,
    pub tcp: TcpInfo,
    pub sctp_state: u8,
    pub dccp_state: u8,
}

impl Conn {
    pub fn has(&self, attrs: Attrs) -> bool {
        self.present.contains(attrs)
    }
}

/// The attributes that few flows have, kept apart so that [`Conn`] stays small.
/// Their presence bits are in [`Conn::present`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extra {
    pub master: Tuple,
    /// `CTA_LABELS`: 128 bits as the kernel lays them out, `unsigned long` words in host order. On a
    /// little-endian host label `n` is bit `n % 8` of byte `n / 8`; see [`Extra::has_label`].
    pub labels: [u8; 16],
    pub sctp_vtag_orig: u32,
    pub sctp_vtag_reply: u32,
    pub dccp: DccpInfo,
    pub seq_adj_orig: SeqAdj,
    pub seq_adj_reply: SeqAdj,
    pub synproxy: Synproxy,
}

impl Extra {
    /// Whether connlabel `label` (0 to 127) is set. Means something only with [`Attrs::LABELS`].
    pub fn has_label(&self, label: u8) -> bool {
        const WORD: usize = size_of::<usize>();
        let word = usize::from(label) / (WORD * 8);
        let Some(bytes) = self.labels[..].chunks_exact(WORD).nth(word) else {
            return false;
        };
        let bytes: [u8; WORD] = bytes.try_into().expect("chunks_exact gives whole words");
        // An `unsigned long` of the kernel: the same width as `usize`, unless a 32-bit program runs
        // on a 64-bit kernel, where on big-endian hosts the words of a pair change places.
        usize::from_ne_bytes(bytes) >> (usize::from(label) % (WORD * 8)) & 1 == 1
    }
}

/// One decoded conntrack message. Made once and decoded into again and again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event<'a> {
    pub kind: Kind,
    pub conn: Conn,
    pub extra: Extra,
    /// `CTA_HELP_NAME` without its final NUL.
    pub helper: &'a [u8],
    /// `CTA_SECCTX_NAME` without its final NUL.
    pub secctx: &'a [u8],
}

impl Event<'_> {
    /// Back to nothing. Whole and not only the masks: then what is absent is 0, events can be
    /// compared, and it costs about as much as one attribute.
    #[inline]
    pub(super) fn reset(&mut self) {
        *self = Event::default();
    }
}

/// One decoded expectation message (`IPCTNL_MSG_EXP_NEW` or `IPCTNL_MSG_EXP_DELETE`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expect<'a> {
    pub destroyed: bool,
    pub present: ExpectAttrs,
    pub master: Tuple,
    pub tuple: Tuple,
    pub mask: Tuple,
    pub nat_tuple: Tuple,
    /// Seconds left.
    pub timeout: u32,
    pub id: u32,
    /// `enum ip_conntrack_expect` flags: 1 permanent, 2 inactive, 4 user space.
    pub flags: u32,
    pub class: u32,
    pub nat_dir: u32,
    pub zone: u16,
    pub helper: &'a [u8],
    pub function: &'a [u8],
}

/// `IPCTNL_MSG_CT_GET_STATS_CPU`: `struct ip_conntrack_stat` of one CPU. 32 bits, they wrap.
/// `None`: this kernel does not give it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    pub cpu: u16,
    pub found: Option<u32>,
    pub invalid: Option<u32>,
    pub insert: Option<u32>,
    pub insert_failed: Option<u32>,
    pub drop: Option<u32>,
    pub early_drop: Option<u32>,
    pub error: Option<u32>,
    pub search_restart: Option<u32>,
    pub clash_resolve: Option<u32>,
    pub chain_toolong: Option<u32>,
    // Those that today's kernels no longer send.
    pub searched: Option<u32>,
    pub new: Option<u32>,
    pub ignore: Option<u32>,
    pub delete: Option<u32>,
    pub delete_list: Option<u32>,
}

/// `IPCTNL_MSG_CT_GET_STATS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// `nf_conntrack_count` of the namespace.
    pub entries: Option<u32>,
    /// `nf_conntrack_max` of the host.
    pub max_entries: Option<u32>,
}

/// `IPCTNL_MSG_EXP_GET_STATS_CPU` of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpectStats {
    pub cpu: u16,
    pub new: Option<u32>,
    pub create: Option<u32>,
    pub delete: Option<u32>,
}
