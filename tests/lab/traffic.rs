//! A plan of real flows through the gateway, and what conntrack must say of each: original tuple,
//! translation, and, where the number of packets is certain, the counters.
//!
//! Pure: no sockets here. [`super::gateway`] drives what is planned here. All flows of a plan
//! differ in their original tuple, so a record belongs to exactly one of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use super::generator::{Endpoint, TCP, UDP};

pub(crate) const ICMP: u8 = 1;
pub(crate) const GRE: u8 = 47;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;
pub(crate) const UDPLITE: u8 = 136;
/// One of the two numbers kept for experiments (RFC 3692): conntrack has no code for it.
pub(crate) const EXPERIMENT: u8 = 253;

/// Answers TCP; UDP port 53 likewise.
pub(crate) const WEB_PORT: u16 = 80;
/// Nothing listens: the kernel resets.
pub(crate) const CLOSED_PORT: u16 = 81;
/// Dropped without an answer.
pub(crate) const DROPPED_PORT: u16 = 82;
pub(crate) const DNS_PORT: u16 = 53;
/// A socket that never answers.
pub(crate) const SILENT_PORT: u16 = 54;
pub(crate) const SCTP_PORT: u16 = 3868;
/// What the gateway forwards to WEB_PORT and DNS_PORT inside.
pub(crate) const FORWARDED_WEB_PORT: u16 = 8080;
pub(crate) const FORWARDED_DNS_PORT: u16 = 5353;

/// Portless protocols tell flows apart by address only, so there are this many addresses for
/// them at the server, and as many flows of each such protocol, family and path at most.
pub(crate) const SPARE_ADDRESSES: u8 = 16;

/// The first source port (and ICMP id) of a plan; flow i has this plus i.
const FIRST_PORT: u16 = 10_000;
/// So that ports do not run out.
pub(crate) const MOST_FLOWS: usize = 50_000;

/// Which way a flow takes through the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Path {
    /// Client to server, routed only.
    Plain,
    /// Client to server, behind the gateway's address.
    Snat,
    /// From outside to the gateway's forwarding address, which leads to the client.
    Dnat,
    /// Client to a virtual address that leads to the server, behind the gateway's address.
    Both,
}

const PATHS: [Path; 4] = [Path::Plain, Path::Snat, Path::Dnat, Path::Both];

/// What happens in a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Connect, request, answer, both sides close.
    TcpClose,
    /// Connect, request, answer, the client resets.
    TcpReset,
    /// The server's kernel resets the SYN.
    TcpRefused,
    /// Nobody answers the SYN.
    TcpUnanswered,
    UdpAnswered,
    UdpSilent,
    UdpLite,
    Ping,
    /// INIT and INIT-ACK.
    Sctp,
    /// One packet each way.
    Gre,
    /// A protocol without any code of its own, one packet each way.
    Experiment,
}

/// A cycle of kinds with about the shares of real traffic. Its length is odd, so that all kinds
/// meet all families and paths.
const KINDS: [Kind; 25] = {
    use Kind::*;
    [
        TcpClose,
        UdpAnswered,
        Ping,
        Sctp,
        TcpReset,
        UdpSilent,
        TcpClose,
        UdpAnswered,
        UdpLite,
        TcpRefused,
        TcpClose,
        Gre,
        UdpAnswered,
        Ping,
        TcpUnanswered,
        TcpClose,
        UdpAnswered,
        Sctp,
        UdpSilent,
        TcpClose,
        Experiment,
        UdpAnswered,
        Ping,
        TcpClose,
        UdpLite,
    ]
};

/// Packets and bytes of one direction, as conntrack counts them: whole IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

/// One planned flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    pub(crate) kind: Kind,
    pub(crate) path: Path,
    pub(crate) proto: u8,
    /// Original tuple. Without ports (ICMP, GRE and others) the ports are 0.
    pub(crate) src: Endpoint,
    pub(crate) dst: Endpoint,
    /// ICMP type, code and id of the original direction.
    pub(crate) icmp: Option<(u8, u8, u16)>,
    /// What the source became; only when translated.
    pub(crate) nat_src: Option<Endpoint>,
    /// What the destination became; only when translated.
    pub(crate) nat_dst: Option<Endpoint>,
    /// Bytes that the flow carries above its transport header.
    pub(crate) payload: usize,
    /// Original and reply direction; absent for TCP, whose number of packets is its own affair.
    pub(crate) counts: Option<(Count, Count)>,
    /// In the DESTROY of a TCP flow that was removed after it had settled.
    pub(crate) tcp_state: Option<&'static str>,
}

/// What tells the flows of a plan apart: their original tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) proto: u8,
    pub(crate) src: Endpoint,
    pub(crate) dst: Endpoint,
    pub(crate) icmp_id: u16,
}

/// The addresses of the gateway lab, one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub(crate) client: IpAddr,
    pub(crate) gateway_inside: IpAddr,
    pub(crate) gateway_outside: IpAddr,
    /// Of the gateway, outside: whatever comes to it is forwarded to the client.
    pub(crate) forwarding: IpAddr,
    pub(crate) server: IpAddr,
    /// Of the server, and exempt from translation.
    pub(crate) server_plain: IpAddr,
    /// Of nobody; translated to the server.
    pub(crate) virtual_server: IpAddr,
}

impl Addresses {
    pub(crate) fn of(ipv6: bool) -> Self {
        let inside = |host: u16| address(ipv6, Ipv4Addr::new(10, 77, 0, 0), 0xc, host);
        let outside = |host: u16| address(ipv6, Ipv4Addr::new(203, 0, 113, 0), 0x5, host);
        Self {
            client: inside(2),
            gateway_inside: inside(1),
            gateway_outside: outside(1),
            forwarding: outside(4),
            server: outside(2),
            server_plain: outside(3),
            virtual_server: address(ipv6, Ipv4Addr::new(198, 18, 0, 0), 0x9, 9),
        }
    }

    /// Address `number` of those that the server keeps for portless flows of that path. Not one
    /// for two paths: a DNAT flow's reply tuple would be an SNAT flow's original one.
    pub(crate) fn spare(ipv6: bool, path: Path, number: u8) -> IpAddr {
        let first = match path {
            Path::Snat | Path::Both => 16,
            Path::Plain => 64,
            Path::Dnat => 96,
        };
        address(ipv6, Ipv4Addr::new(203, 0, 113, 0), 0x5, first + u16::from(number))
    }
}

fn address(ipv6: bool, v4: Ipv4Addr, subnet: u16, host: u16) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0xfd77, subnet, 0, 0, 0, 0, 0, host).into()
    } else {
        Ipv4Addr::from_bits(v4.to_bits() + u32::from(host)).into()
    }
}

/// `count` distinct flows of all kinds, families and paths.
pub(crate) fn plan(count: usize) -> Vec<Planned> {
    assert!(count <= MOST_FLOWS, "{count} flows need more ports than there are");
    let mut spares = std::collections::HashMap::new();
    (0..count)
        .map(|index| {
            let ipv6 = index % 2 == 1;
            let path = PATHS[index / 2 % PATHS.len()];
            let mut kind = KINDS[index % KINDS.len()];
            let mut spare = 0;
            if matches!(kind, Kind::Gre | Kind::Experiment) {
                // Two such flows behind one address would be one flow to the kernel.
                let used: &mut u8 = spares.entry((kind, path, ipv6)).or_default();
                if path == Path::Both || *used == SPARE_ADDRESSES {
                    kind = Kind::UdpAnswered;
                } else {
                    spare = *used;
                    *used += 1;
                }
            }
            planned(kind, path, ipv6, FIRST_PORT + index as u16, spare)
        })
        .collect()
}

fn planned(kind: Kind, path: Path, ipv6: bool, port: u16, spare: u8) -> Planned {
    let proto = protocol(kind, ipv6);
    let portless = matches!(kind, Kind::Ping | Kind::Gre | Kind::Experiment);
    let payload = match kind {
        Kind::Sctp => SCTP_BYTES,
        _ => 20 + usize::from(port) % 400,
    };
    let mut flow = Planned {
        kind,
        path,
        proto,
        src: Endpoint {
            ip: source(kind, path, ipv6, spare),
            port: if portless { 0 } else { port },
        },
        dst: destination(kind, path, ipv6, spare),
        icmp: (kind == Kind::Ping).then_some((if ipv6 { 128 } else { 8 }, 0, port)),
        nat_src: None,
        nat_dst: None,
        payload,
        counts: counts(kind, ipv6, payload),
        tcp_state: match kind {
            Kind::TcpClose => Some("TIME_WAIT"),
            Kind::TcpReset | Kind::TcpRefused => Some("CLOSE"),
            Kind::TcpUnanswered => Some("SYN_SENT"),
            _ => None,
        },
    };
    let addresses = Addresses::of(ipv6);
    if matches!(path, Path::Snat | Path::Both) {
        // Every source port of a plan is used once, so the kernel has no reason to change it.
        flow.nat_src = Some(Endpoint { ip: addresses.gateway_outside, port: flow.src.port });
    }
    flow.nat_dst = match path {
        Path::Plain | Path::Snat => None,
        Path::Dnat => Some(Endpoint { ip: addresses.client, port: inside_port(flow.dst.port) }),
        Path::Both => Some(Endpoint { ip: addresses.server, port: flow.dst.port }),
    };
    flow
}

/// Length of an INIT or INIT-ACK without options, common header included.
pub(crate) const SCTP_BYTES: usize = 32;

fn protocol(kind: Kind, ipv6: bool) -> u8 {
    match kind {
        Kind::TcpClose | Kind::TcpReset | Kind::TcpRefused | Kind::TcpUnanswered => TCP,
        Kind::UdpAnswered | Kind::UdpSilent => UDP,
        Kind::UdpLite => UDPLITE,
        Kind::Ping if ipv6 => ICMPV6,
        Kind::Ping => ICMP,
        Kind::Sctp => SCTP,
        Kind::Gre => GRE,
        Kind::Experiment => EXPERIMENT,
    }
}

fn source(kind: Kind, path: Path, ipv6: bool, spare: u8) -> IpAddr {
    match (path, kind) {
        (Path::Dnat, Kind::Gre | Kind::Experiment) => Addresses::spare(ipv6, path, spare),
        (Path::Dnat, _) => Addresses::of(ipv6).server,
        _ => Addresses::of(ipv6).client,
    }
}

fn destination(kind: Kind, path: Path, ipv6: bool, spare: u8) -> Endpoint {
    let addresses = Addresses::of(ipv6);
    let ip = match (path, kind) {
        (Path::Dnat, _) => addresses.forwarding,
        (Path::Both, _) => addresses.virtual_server,
        (_, Kind::Gre | Kind::Experiment) => Addresses::spare(ipv6, path, spare),
        (Path::Plain, _) => addresses.server_plain,
        (Path::Snat, _) => addresses.server,
    };
    let forwarded = path == Path::Dnat;
    let port = match kind {
        Kind::TcpClose | Kind::TcpReset if forwarded => FORWARDED_WEB_PORT,
        Kind::TcpClose | Kind::TcpReset => WEB_PORT,
        Kind::TcpRefused => CLOSED_PORT,
        Kind::TcpUnanswered => DROPPED_PORT,
        Kind::UdpAnswered if forwarded => FORWARDED_DNS_PORT,
        Kind::UdpAnswered | Kind::UdpLite => DNS_PORT,
        Kind::UdpSilent => SILENT_PORT,
        Kind::Sctp => SCTP_PORT,
        Kind::Ping | Kind::Gre | Kind::Experiment => 0,
    };
    Endpoint { ip, port }
}

fn inside_port(port: u16) -> u16 {
    match port {
        FORWARDED_WEB_PORT => WEB_PORT,
        FORWARDED_DNS_PORT => DNS_PORT,
        other => other,
    }
}

fn counts(kind: Kind, ipv6: bool, payload: usize) -> Option<(Count, Count)> {
    let header = match kind {
        Kind::UdpAnswered | Kind::UdpSilent | Kind::UdpLite | Kind::Ping => 8,
        // Its payload counts from the common header on; GRE's four bytes are in the payload.
        Kind::Sctp | Kind::Gre | Kind::Experiment => 0,
        Kind::TcpClose | Kind::TcpReset | Kind::TcpRefused | Kind::TcpUnanswered => return None,
    };
    let ip = if ipv6 { 40 } else { 20 };
    let one = Count { packets: 1, bytes: (ip + header + payload) as u64 };
    Some((one, if kind == Kind::UdpSilent { Count::default() } else { one }))
}

impl Planned {
    pub(crate) fn ipv6(&self) -> bool {
        self.src.ip.is_ipv6()
    }

    pub(crate) fn key(&self) -> Key {
        Key {
            proto: self.proto,
            src: self.src,
            dst: self.dst,
            icmp_id: self.icmp.map_or(0, |(_, _, id)| id),
        }
    }

    /// The record's `nat` field.
    pub(crate) fn nat(&self) -> Option<&'static str> {
        match (self.nat_src, self.nat_dst) {
            (None, None) => None,
            (Some(_), None) => Some("snat"),
            (None, Some(_)) => Some("dnat"),
            (Some(_), Some(_)) => Some("both"),
        }
    }

    /// Where a record in native JSON says something else than the plan: `field: got, wanted`.
    /// Counters and TCP state are looked at in `destroy` records only: NEW does not carry them.
    pub(crate) fn differences(&self, record: &Value) -> Vec<String> {
        let mut fields = vec![
            ("proto", Value::from(self.proto)),
            ("family", Value::from(if self.ipv6() { "ipv6" } else { "ipv4" })),
            ("nat", self.nat().map_or(Value::Null, Value::from)),
        ];
        endpoint(&mut fields, "src_ip", "src_port", Some(self.src));
        endpoint(&mut fields, "dst_ip", "dst_port", Some(self.dst));
        endpoint(&mut fields, "nat_src_ip", "nat_src_port", self.nat_src);
        endpoint(&mut fields, "nat_dst_ip", "nat_dst_port", self.nat_dst);
        if let Some((kind, code, id)) = self.icmp {
            fields.extend([
                ("icmp_type", kind.into()),
                ("icmp_code", code.into()),
                ("icmp_id", id.into()),
            ]);
        }
        if record["event"] == "destroy" {
            if let Some((original, reply)) = self.counts {
                fields.extend([
                    ("orig_packets", original.packets.into()),
                    ("orig_bytes", original.bytes.into()),
                    ("reply_packets", reply.packets.into()),
                    ("reply_bytes", reply.bytes.into()),
                ]);
            }
            if let Some(state) = self.tcp_state {
                fields.push(("tcp_state", state.into()));
            }
        }
        let differs =
            |(name, want): &(&str, Value)| record.get(name).unwrap_or(&Value::Null) != want;
        fields
            .iter()
            .filter(|field| differs(field))
            .map(|(name, want)| {
                format!("{name}: {}, wanted {want}", record.get(name).unwrap_or(&Value::Null))
            })
            .collect()
    }
}

/// Address and port; a port of 0 stands for none, and an absent endpoint has neither.
fn endpoint(
    fields: &mut Vec<(&'static str, Value)>,
    ip: &'static str,
    port: &'static str,
    end: Option<Endpoint>,
) {
    fields.push((ip, end.map_or(Value::Null, |end| end.ip.to_string().into())));
    let number = end.map(|end| end.port).filter(|port| *port != 0);
    fields.push((port, number.map_or(Value::Null, Value::from)));
}

/// The key of a record in native JSON; none for what is no flow, as `gap` and `agent`.
pub(crate) fn key_of(record: &Value) -> Option<Key> {
    let number = |name: &str| record.get(name).and_then(Value::as_u64).unwrap_or(0) as u16;
    let ip = |name: &str| record.get(name)?.as_str()?.parse().ok();
    Some(Key {
        proto: record.get("proto")?.as_u64()? as u8,
        src: Endpoint { ip: ip("src_ip")?, port: number("src_port") },
        dst: Endpoint { ip: ip("dst_ip")?, port: number("dst_port") },
        icmp_id: number("icmp_id"),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_plan_has_distinct_flows_of_all_sorts() {
        let plan = plan(10_000);
        let keys: HashSet<Key> = plan.iter().map(Planned::key).collect();
        assert_eq!(keys.len(), plan.len());
        let sorts: HashSet<_> = plan.iter().map(|f| (f.kind, f.path, f.ipv6())).collect();
        // 11 kinds, 4 paths, 2 families, without the portless ones behind two translations.
        assert_eq!(sorts.len(), 11 * 4 * 2 - 2 * 2);
        // What the server sees must be distinct as well, or the kernel would change ports.
        let seen: HashSet<_> = plan
            .iter()
            .map(|f| (f.proto, f.nat_src.unwrap_or(f.src), f.nat_dst.unwrap_or(f.dst), f.icmp))
            .collect();
        assert_eq!(seen.len(), plan.len());
    }
}
