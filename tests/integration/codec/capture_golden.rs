//! Makes the golden corpus anew from the running kernel. Root, by hand:
//!
//! `cargo test --test integration capture_golden -- --ignored`
//!
//! then `cargo insta review`, or `INSTA_UPDATE=always`, and read the snapshots.

use std::fmt::Write;
use std::fs;
use std::time::Duration;

use conntrail::ctnetlink::uapi::family::AF_UNSPEC;
use conntrail::ctnetlink::{Tuple, TupleParts, request};

use super::bed::{self, Bed, CLIENT};
use super::corpus::folder;
use crate::lab::Result;
use crate::lab::gateway::Gateway;
use crate::lab::sys::NetlinkSocket;
use crate::lab::traffic::{Kind, Planned};

#[test]
#[ignore = "writes tests/golden: only by hand, as root"]
fn capture_golden_datagrams() -> Result<()> {
    let bed = Bed::new()?;
    scenario(&bed, "tcp_v4_snat", "a TCP connection, masqueraded", || bed.tcp(false, 5000))?;
    scenario(
        &bed,
        "tcp_v4_dnat_snat",
        "a TCP connection to the router's port 8080, translated at both ends",
        || bed.tcp(false, 8080),
    )?;
    scenario(&bed, "tcp_v6", "a TCP connection over IPv6", || bed.tcp(true, 5000))?;
    scenario(&bed, "udp_v4", "a datagram and its answer, not translated", || {
        bed.udp(false, 5001, true)
    })?;
    scenario(&bed, "udp_v4_snat", "a datagram and its answer, masqueraded", || {
        bed.udp(false, 5000, true)
    })?;
    scenario(&bed, "udp_v6", "a datagram and its answer over IPv6", || bed.udp(true, 5000, true))?;
    scenario(&bed, "udp_unanswered", "a datagram without an answer", || {
        bed.udp(false, 5001, false)
    })?;
    scenario(&bed, "udp_mark", "nft: ct mark set 0x0102032a", || bed.udp(false, 5005, true))?;
    scenario(&bed, "udp_labels", "nft: ct label set, labels 5 and 97", || {
        bed.udp(false, 5006, true)
    })?;
    scenario(&bed, "udp_zone", "nft: ct zone set 7", || bed.udp(false, 5007, false))?;
    scenario(&bed, "udp_zone_of_one_direction", "nft: ct original zone set 9", || {
        bed.udp(false, 5009, true)
    })?;
    scenario(&bed, "icmp_snat", "an echo request and its reply, masqueraded", || bed.ping(false))?;
    scenario(&bed, "icmpv6", "an echo request and its reply over IPv6", || bed.ping(true))?;
    scenario(
        &bed,
        "ftp_expectation",
        "nft ct helper ftp: a PORT command rewritten by NAT, and the data connection",
        || bed.ftp_data(&bed.ftp()?),
    )?;
    // No SCTP sockets and no GRE tunnels in the kernel at hand: conntrack(8) makes the entries; the
    // events are the kernel's all the same. It hands the verification tags over in host order, where
    // the kernel keeps them as packets carry them: so 0x12345678 comes back as 0x78563412.
    scenario(&bed, "gre_inserted", "conntrack -I -p gre, with keys", || {
        bed.conntrack("-I -p gre -s 10.0.0.2 -d 203.0.113.2 --srckey 0x11 --dstkey 0x2233 -t 60")
            .map(drop)
    })?;
    scenario(&bed, "sctp_inserted", "conntrack -I -p sctp, then -U to another state", || {
        let tuple = "-p sctp -s 10.0.0.2 -d 203.0.113.2 --sport 3868 --dport 3869";
        bed.conntrack(&format!(
            "-I {tuple} --state COOKIE_WAIT --orig-vtag 305419896 --reply-vtag 2596069104 -t 60"
        ))?;
        bed.conntrack(&format!("-U {tuple} --state ESTABLISHED -m 7")).map(drop)
    })?;
    scenario(&bed, "udplite_v6_inserted", "conntrack -I -p udplite over IPv6", || {
        bed.conntrack(
            "-I -p udplite -s 2001:db8:1::2 -d 2001:db8:2::2 --sport 1 --dport 65535 -t 60",
        )
        .map(drop)
    })?;
    scenario(&bed, "protocol_without_ports_inserted", "conntrack -I -p 89 (OSPF)", || {
        bed.conntrack("-I -p 89 -s 10.0.0.2 -d 203.0.113.2 -t 60").map(drop)
    })?;
    answers(&bed)
}

/// Real packets of protocols that have no sockets here: the lab's gateway sends them raw.
#[test]
#[ignore = "writes tests/golden: only by hand, as root"]
fn capture_golden_raw_packets() -> Result<()> {
    let gateway = Gateway::new()?;
    let plan = gateway.mixed(2000)?;
    for (name, kind, words) in [
        (
            "sctp_packets",
            Kind::Sctp,
            "SCTP INIT and INIT-ACK; the tag of the first is its source port + 1",
        ),
        ("gre_packets", Kind::Gre, "a GRE packet each way"),
    ] {
        // One of each family and path.
        let mut flows: Vec<Planned> = Vec::new();
        for flow in plan.iter().filter(|flow| flow.kind == kind) {
            if !flows.iter().any(|seen| (seen.ipv6(), seen.path) == (flow.ipv6(), flow.path)) {
                flows.push(*flow);
            }
        }
        gateway.flush()?;
        let socket = gateway.gateway.run(|| NetlinkSocket::listen(&[1, 2, 3, 4, 5, 6], 8 << 20))?;
        socket.set_receive_timeout(bed::QUIET)?;
        gateway.drive(&flows, Duration::ZERO)?;
        let mut datagrams = bed::collect(&socket)?;
        gateway.flush()?;
        datagrams.extend(bed::collect(&socket)?);
        write(name, words, &datagrams)?;
    }
    Ok(())
}

/// What the kernel answers when it is asked.
fn answers(bed: &Bed) -> Result<()> {
    bed.tcp(false, 5000)?;
    bed.udp(true, 5000, true)?;
    bed.ping(false)?;
    bed.udp(false, 5006, true)?;
    let _expecting = bed.ftp()?;
    let entry = "-p tcp -s 10.0.0.2 -d 203.0.113.2 --sport 4000 --dport 22";
    bed.conntrack(&format!("-I {entry} --state ESTABLISHED -u ASSURED,SEEN_REPLY -t 60"))?;
    let ask =
        |name, words, request: Vec<u8>, single| write(name, words, &bed.ask(&request, single)?);
    ask("dump", "IPCTNL_MSG_CT_GET, NLM_F_DUMP", request::dump_conns(AF_UNSPEC, 1), false)?;
    ask(
        "dump_expectations",
        "IPCTNL_MSG_EXP_GET, NLM_F_DUMP",
        request::dump_expects(AF_UNSPEC, 2),
        false,
    )?;
    ask("stats_cpu", "IPCTNL_MSG_CT_GET_STATS_CPU", request::dump_stats_cpu(3), false)?;
    ask("stats", "IPCTNL_MSG_CT_GET_STATS", request::get_stats(4), true)?;
    ask(
        "stats_expectations",
        "IPCTNL_MSG_EXP_GET_STATS_CPU",
        request::dump_expect_stats_cpu(5),
        false,
    )?;
    ask("dump_dying", "IPCTNL_MSG_CT_GET_DYING, nothing waits", request::dump_dying(6), false)?;
    let mut tuple = Tuple {
        parts: TupleParts::SRC
            | TupleParts::DST
            | TupleParts::PROTO
            | TupleParts::SRC_PORT
            | TupleParts::DST_PORT,
        proto: 6,
        src_port: 4000,
        dst_port: 22,
        ..Tuple::default()
    };
    tuple.src_bytes[..4].copy_from_slice(&CLIENT.octets());
    tuple.dst_bytes[..4].copy_from_slice(&[203, 0, 113, 2]);
    ask("get_one", "IPCTNL_MSG_CT_GET of one entry", request::get_conn(&tuple, 0, 7), false)?;
    tuple.dst_port = 23;
    ask(
        "get_none",
        "IPCTNL_MSG_CT_GET of an entry that is not there",
        request::get_conn(&tuple, 0, 8),
        false,
    )
}

/// Captures all events of `traffic` and of the flush after it.
fn scenario(
    bed: &Bed,
    name: &str,
    words: &str,
    traffic: impl FnOnce() -> Result<()>,
) -> Result<()> {
    bed.flush()?;
    let socket = bed.listen()?;
    traffic().map_err(|error| format!("{name}: {error}"))?;
    let mut datagrams = bed::collect(&socket)?;
    bed.flush()?;
    datagrams.extend(bed::collect(&socket)?);
    assert_eq!(socket.drops()?, 0);
    write(name, words, &datagrams)
}

fn write(name: &str, words: &str, datagrams: &[Vec<u8>]) -> Result<()> {
    assert!(!datagrams.is_empty(), "{name}: the kernel said nothing");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut text = format!(
        "# {words}.\n# Captured by the test capture_golden_datagrams on Linux {} (x86_64).\n",
        release.trim().split('-').next().unwrap_or_default()
    );
    for datagram in datagrams {
        for byte in datagram {
            write!(text, "{byte:02x}")?;
        }
        text.push('\n');
    }
    fs::write(folder().join(format!("{name}.hex")), text)?;
    Ok(())
}
