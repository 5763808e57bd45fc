//! Names of the numbers that the kernel gives, as the kernel calls them.
//!
//! Only tables. A number without a name gives `None` (or "unknown" for protocols, conntrack's own
//! word), never an error: kernels grow.

use super::uapi::{ipproto, status};

/// `enum tcp_conntrack`, as in `/proc/net/nf_conntrack`.
pub const TCP_STATES: [&str; 10] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    // TCP_CONNTRACK_LISTEN in old headers, whose number it took.
    "SYN_SENT2",
];

/// `enum sctp_conntrack`.
pub const SCTP_STATES: [&str; 10] = [
    "NONE",
    "CLOSED",
    "COOKIE_WAIT",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT",
    "HEARTBEAT_SENT",
    "HEARTBEAT_ACKED",
];

/// `enum ct_dccp_states`.
pub const DCCP_STATES: [&str; 10] = [
    "NONE", "REQUEST", "RESPOND", "PARTOPEN", "OPEN", "CLOSEREQ", "CLOSING", "TIMEWAIT", "IGNORE",
    "INVALID",
];

/// `enum ip_conntrack_status`, lowest bit first.
pub const STATUS_BITS: [(u32, &str); 16] = [
    (status::IPS_EXPECTED, "expected"),
    (status::IPS_SEEN_REPLY, "seen_reply"),
    (status::IPS_ASSURED, "assured"),
    (status::IPS_CONFIRMED, "confirmed"),
    (status::IPS_SRC_NAT, "src_nat"),
    (status::IPS_DST_NAT, "dst_nat"),
    (status::IPS_SEQ_ADJUST, "seq_adjust"),
    (status::IPS_SRC_NAT_DONE, "src_nat_done"),
    (status::IPS_DST_NAT_DONE, "dst_nat_done"),
    (status::IPS_DYING, "dying"),
    (status::IPS_FIXED_TIMEOUT, "fixed_timeout"),
    (status::IPS_TEMPLATE, "template"),
    (status::IPS_UNTRACKED, "untracked"),
    (status::IPS_HELPER, "helper"),
    (status::IPS_OFFLOAD, "offload"),
    (status::IPS_HW_OFFLOAD, "hw_offload"),
];

pub fn tcp_state(state: u8) -> Option<&'static str> {
    TCP_STATES.get(usize::from(state)).copied()
}

pub fn sctp_state(state: u8) -> Option<&'static str> {
    SCTP_STATES.get(usize::from(state)).copied()
}

pub fn dccp_state(state: u8) -> Option<&'static str> {
    DCCP_STATES.get(usize::from(state)).copied()
}

/// The names of the bits that are set, lowest first. Bits without a name are left out.
pub fn status_names(status: u32) -> impl Iterator<Item = &'static str> {
    STATUS_BITS.iter().filter(move |(bit, _)| status & bit != 0).map(|&(_, name)| name)
}

/// The name of an IANA protocol number, "unknown" for those that have none here. Ours: more than
/// [`conntrack_protocol`] has.
pub fn protocol(number: u8) -> &'static str {
    match number {
        ipproto::IPPROTO_ICMP => "icmp",
        ipproto::IPPROTO_IGMP => "igmp",
        ipproto::IPPROTO_IPIP => "ipip",
        ipproto::IPPROTO_TCP => "tcp",
        ipproto::IPPROTO_UDP => "udp",
        ipproto::IPPROTO_DCCP => "dccp",
        ipproto::IPPROTO_IPV6 => "ipv6",
        ipproto::IPPROTO_GRE => "gre",
        ipproto::IPPROTO_ESP => "esp",
        ipproto::IPPROTO_AH => "ah",
        ipproto::IPPROTO_ICMPV6 => "icmpv6",
        ipproto::IPPROTO_OSPF => "ospf",
        ipproto::IPPROTO_PIM => "pim",
        ipproto::IPPROTO_VRRP => "vrrp",
        ipproto::IPPROTO_L2TP => "l2tp",
        ipproto::IPPROTO_SCTP => "sctp",
        ipproto::IPPROTO_UDPLITE => "udplite",
        _ => "unknown",
    }
}

/// The name that conntrack(8) prints: it knows the eight protocols that the kernel tracks on their
/// own, and calls all others "unknown" (seen with 1.4.7 for each of the 255).
pub fn conntrack_protocol(number: u8) -> &'static str {
    match number {
        ipproto::IPPROTO_ICMP
        | ipproto::IPPROTO_TCP
        | ipproto::IPPROTO_UDP
        | ipproto::IPPROTO_DCCP
        | ipproto::IPPROTO_GRE
        | ipproto::IPPROTO_ICMPV6
        | ipproto::IPPROTO_SCTP
        | ipproto::IPPROTO_UDPLITE => protocol(number),
        _ => "unknown",
    }
}

/// The protocols that [`protocol`] has a name for.
pub fn protocols() -> impl Iterator<Item = (&'static str, u8)> + Clone {
    let named = (0..=u8::MAX).map(|number| (protocol(number), number));
    named.filter(|(name, _)| *name != "unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_numbers_of_their_enums() {
        assert_eq!(tcp_state(3), Some("ESTABLISHED"));
        assert_eq!(tcp_state(9), Some("SYN_SENT2"));
        assert_eq!(tcp_state(10), None);
        assert_eq!(sctp_state(4), Some("ESTABLISHED"));
        assert_eq!(dccp_state(4), Some("OPEN"));
        assert_eq!(dccp_state(255), None);
    }

    #[test]
    fn status_bits_are_named_once_and_in_order() {
        for (place, (bit, _)) in STATUS_BITS.iter().enumerate() {
            assert_eq!(*bit, 1 << place);
        }
        let names: Vec<_> = status_names(0x1000_019e).collect();
        let expected =
            ["seen_reply", "assured", "confirmed", "src_nat", "src_nat_done", "dst_nat_done"];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_named_protocol_is_found_by_its_name() {
        let mut named = 0;
        for number in 0..=u8::MAX {
            if protocol(number) != "unknown" {
                assert!(protocols().any(|known| known == (protocol(number), number)));
                named += 1;
            }
        }
        assert_eq!(named, 17);
        assert!(protocols().all(|(name, _)| name != "unknown"));
    }

    #[test]
    fn conntrack_knows_eight_protocols() {
        let known = (0..=u8::MAX).filter(|&number| conntrack_protocol(number) != "unknown");
        assert_eq!(known.collect::<Vec<_>>(), [1, 6, 17, 33, 47, 58, 132, 136]);
    }
}
