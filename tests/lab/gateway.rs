//! A NAT gateway with a client network inside and a server outside, and real traffic through it.
//!
//! ```text
//! client 10.77.0.2 ── 10.77.0.1 gateway 203.0.113.1 ── 203.0.113.2 server
//!        fd77:c::2    fd77:c::1         fd77:5::1       fd77:5::2
//! ```
//!
//! The gateway masquerades IPv4 and translates IPv6 sources, forwards 203.0.113.4 (fd77:5::4) to
//! the client, leads 198.18.0.9 (fd77:9::9) to the server, and only routes to 203.0.113.3
//! (fd77:5::3) and to .64 to .79. It has no traffic of its own, so its conntrack table holds the
//! driven flows and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Result;
use super::generator::{Endpoint, Generator, UDP};
use super::netns::{End, Netns};
use super::sys;
use super::traffic::*;

/// Conversations at the same time. More than this did not go faster on two cores.
const DRIVERS: usize = 4;
/// Acceptors of each namespace.
const ACCEPTORS: usize = 4;
/// An answer in the lab takes microseconds; one that is later than this is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How often a waiting server looks whether it should end.
const STOP_POLL: Duration = Duration::from_millis(100);
const TCP_ANSWER: [u8; 500] = [b'a'; 500];
/// TCP's last packets, and replies by raw socket, have passed the gateway after this.
const SETTLE: Duration = Duration::from_millis(200);

/// The three namespaces and the servers in them.
#[derive(Debug)]
pub(crate) struct Gateway {
    stop: Arc<AtomicBool>,
    servers: Vec<JoinHandle<()>>,
    pub(crate) client: Netns,
    pub(crate) gateway: Netns,
    pub(crate) server: Netns,
}

impl Gateway {
    pub(crate) fn new() -> Result<Self> {
        let (client, gateway, server) =
            (Netns::new("client")?, Netns::new("gateway")?, Netns::new("server")?);
        let mut lab = Self { stop: Arc::default(), servers: Vec::new(), client, gateway, server };
        lab.wire()?;
        lab.gateway.conntrack_settings(1, true, true)?;
        // A late packet of a flow that was removed must not make a new entry.
        lab.gateway.sysctl("netfilter/nf_conntrack_tcp_loose", "0")?;
        // conntrack takes every UDP-Lite packet for one with a wrong checksum (6.18: of two sent
        // between two kernels, the socket took both and conntrack none), unless it does not look.
        lab.gateway.sysctl("netfilter/nf_conntrack_checksum", "0")?;
        // Its 3 s could end before the last of many flows has been driven.
        lab.gateway.sysctl("netfilter/nf_conntrack_sctp_timeout_cookie_wait", "60")?;
        lab.gateway.nft(&gateway_rules())?;
        for end in [&lab.client, &lab.server] {
            end.nft(&format!(
                "table inet conntrail_lab {{
                    chain drops {{
                        type filter hook input priority filter; policy accept;
                        tcp dport {DROPPED_PORT} drop
                    }}
                }}"
            ))?;
        }
        lab.serve()?;
        Ok(lab)
    }

    /// Flows end by themselves a second after their last packet, long-lived ones excepted.
    pub(crate) fn short_timeouts(&self) -> Result<()> {
        for name in [
            "generic_timeout",
            "gre_timeout",
            "gre_timeout_stream",
            "icmp_timeout",
            "icmpv6_timeout",
            "sctp_timeout_cookie_wait",
            "tcp_timeout_close",
            "tcp_timeout_syn_sent",
            "tcp_timeout_time_wait",
            "udp_timeout",
            "udp_timeout_stream",
        ] {
            self.gateway.sysctl(&format!("netfilter/nf_conntrack_{name}"), "1")?;
        }
        Ok(())
    }

    /// Plans and drives `count` flows; gives what each record must say. The entries stay in the
    /// table; [`Gateway::flush`] ends them.
    pub(crate) fn mixed(&self, count: usize) -> Result<Vec<Planned>> {
        let flows = plan(count);
        self.drive(&flows, Duration::ZERO)?;
        Ok(flows)
    }

    /// Ends all flows: the kernel sends a DESTROY with counters for each.
    pub(crate) fn flush(&self) -> Result<()> {
        Generator::new(&self.gateway)?.flush().map(drop)
    }

    /// Waits until every flow has reached its time-out; an error when some have not by `limit`.
    /// The kernel's own collector may take a minute, but a dump removes what has expired.
    pub(crate) fn wait_for_ends(&self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        let mut generator = Generator::new(&self.gateway)?;
        loop {
            generator.dump()?;
            let left = self.gateway.conntrack_count()?;
            if left == 0 {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("{left} flows have not ended within {limit:?}").into());
            }
            std::thread::sleep(Duration::from_millis(250));
        }
    }

    /// Drives flows over a few threads, each flow followed by a pause of `pace` in its thread.
    /// When it returns, the last packet of the last flow has passed the gateway.
    pub(crate) fn drive(&self, flows: &[Planned], pace: Duration) -> Result<()> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let drivers: Vec<_> = (0..DRIVERS)
                .map(|_| {
                    scope.spawn(|| {
                        while let Some(flow) = flows.get(next.fetch_add(1, Ordering::Relaxed)) {
                            self.converse(flow).map_err(|error| format!("{flow:?}: {error}"))?;
                            std::thread::sleep(pace);
                        }
                        Result::Ok(())
                    })
                })
                .collect();
            drivers
                .into_iter()
                .try_for_each(|driver| driver.join().expect("a driver does not panic"))
        })?;
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// One whole flow.
    fn converse(&self, flow: &Planned) -> Result<()> {
        let near = if flow.path == Path::Dnat { &self.server } else { &self.client };
        match flow.kind {
            Kind::Sctp | Kind::Gre | Kind::Experiment => self.exchange_raw(flow),
            _ => near.run(|| match flow.kind {
                Kind::TcpClose | Kind::TcpReset => web(flow),
                Kind::TcpRefused | Kind::TcpUnanswered => knock(flow),
                Kind::Ping => ping(flow),
                _ => datagram(flow),
            }),
        }
    }

    /// A packet from one end and, once it has arrived, one back from the other end, which is
    /// played here too.
    fn exchange_raw(&self, flow: &Planned) -> Result<()> {
        let (near, far) = match flow.path {
            Path::Dnat => (&self.server, &self.client),
            _ => (&self.client, &self.server),
        };
        let seen_src = flow.nat_src.unwrap_or(flow.src);
        let real_dst = flow.nat_dst.unwrap_or(flow.dst);
        // Both before the first packet: with no socket for the protocol the kernel would answer
        // that it is unreachable.
        let caller = near.run(|| raw_socket(flow.proto, flow.src.ip))?;
        let answerer = far.run(|| raw_socket(flow.proto, real_dst.ip))?;
        let (request, answer) = match flow.kind {
            Kind::Sctp => {
                let tag = u32::from(flow.src.port) + 1;
                (
                    sctp_init(1, flow.src.port, flow.dst.port, 0, tag),
                    sctp_init(2, real_dst.port, seen_src.port, tag, tag + 1),
                )
            }
            // Version 0, no options, the rest of the payload is IPv4 in name only.
            Kind::Gre => (gre(flow.payload), gre(flow.payload)),
            _ => (vec![b'x'; flow.payload], vec![b'x'; flow.payload]),
        };
        caller.send_to(&request, SocketAddr::new(flow.dst.ip, 0))?;
        await_packet(&answerer, seen_src)?;
        answerer.send_to(&answer, SocketAddr::new(seen_src.ip, 0))?;
        await_packet(&caller, flow.dst)
    }

    fn wire(&self) -> Result<()> {
        let (v4, v6) = (Addresses::of(false), Addresses::of(true));
        let end = |netns, interface, a, b| match (a, b) {
            (IpAddr::V4(v4), IpAddr::V6(v6)) => End { netns, interface, v4, v6 },
            _ => unreachable!("the first is IPv4, the second IPv6"),
        };
        Netns::connect(
            &end(&self.client, "uplink", v4.client, v6.client),
            &end(&self.gateway, "inside", v4.gateway_inside, v6.gateway_inside),
        )?;
        Netns::connect(
            &end(&self.gateway, "outside", v4.gateway_outside, v6.gateway_outside),
            &end(&self.server, "uplink", v4.server, v6.server),
        )?;
        for addresses in [v4, v6] {
            let (family, bits) = if addresses.client.is_ipv4() { ("-4", 24) } else { ("-6", 64) };
            let add = |netns: &Netns, interface: &str, ip: IpAddr| {
                let nodad = if ip.is_ipv6() { "nodad" } else { "" };
                netns.ip(&format!("{family} address add {ip}/{bits} dev {interface} {nodad}"))
            };
            add(&self.gateway, "outside", addresses.forwarding)?;
            add(&self.server, "uplink", addresses.server_plain)?;
            for number in 0..SPARE_ADDRESSES {
                for path in [Path::Plain, Path::Snat, Path::Dnat] {
                    let ipv6 = addresses.client.is_ipv6();
                    add(&self.server, "uplink", Addresses::spare(ipv6, path, number))?;
                }
            }
            let route = |netns: &Netns, via: IpAddr| {
                netns.ip(&format!("{family} route add default via {via}"))
            };
            route(&self.client, addresses.gateway_inside)?;
            route(&self.server, addresses.gateway_outside)?;
        }
        self.gateway.sysctl("ipv4/ip_forward", "1")?;
        self.gateway.sysctl("ipv6/conf/all/forwarding", "1")
    }

    fn serve(&mut self) -> Result<()> {
        for (netns, outside) in [(&self.client, false), (&self.server, true)] {
            let listener = Arc::new(netns.run(|| TcpListener::bind(("::", WEB_PORT)))?);
            // Also bounds `accept`.
            sys::set_receive_timeout(&*listener, STOP_POLL)?;
            for _ in 0..ACCEPTORS {
                let (listener, stop) = (Arc::clone(&listener), Arc::clone(&self.stop));
                self.servers.push(std::thread::spawn(move || serve_web(&listener, &stop)));
            }
            for ipv6 in [false, true] {
                let addresses = Addresses::of(ipv6);
                // One socket an address: a wildcard socket would answer from the first one.
                let mut own = vec![addresses.client];
                if outside {
                    own = vec![addresses.server, addresses.server_plain];
                }
                for (ip, proto) in own.iter().flat_map(|ip| [(*ip, UDP), (*ip, UDPLITE)]) {
                    let bind = |port| {
                        let at = SocketAddr::new(ip, port);
                        sys::bound_socket(libc::SOCK_DGRAM, proto, at).map(UdpSocket::from)
                    };
                    let (echo, silent) =
                        netns.run(|| std::io::Result::Ok((bind(DNS_PORT)?, bind(SILENT_PORT)?)))?;
                    echo.set_read_timeout(Some(STOP_POLL))?;
                    let stop = Arc::clone(&self.stop);
                    self.servers.push(std::thread::spawn(move || {
                        // Open, or the kernel would answer that the port is unreachable.
                        let _silent = silent;
                        serve_datagrams(&echo, &stop);
                    }));
                }
            }
        }
        Ok(())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // An open socket keeps its namespace alive, so the servers end first.
        self.stop.store(true, Ordering::Relaxed);
        for server in self.servers.drain(..) {
            if server.join().is_err() {
                eprintln!("a server of the lab has panicked");
            }
        }
    }
}

fn gateway_rules() -> String {
    let (v4, v6) = (Addresses::of(false), Addresses::of(true));
    let rules = |ip: &str, a: Addresses| {
        let to = |address: IpAddr, port: u16| match address {
            IpAddr::V4(v4) => format!("{v4}:{port}"),
            IpAddr::V6(v6) => format!("[{v6}]:{port}"),
        };
        let (forwarding, client) = (a.forwarding, a.client);
        format!(
            "{ip} daddr {forwarding} tcp dport {FORWARDED_WEB_PORT} dnat {ip} to {}
             {ip} daddr {forwarding} udp dport {FORWARDED_DNS_PORT} dnat {ip} to {}
             {ip} daddr {forwarding} dnat {ip} to {client}
             {ip} daddr {} dnat {ip} to {}",
            to(client, WEB_PORT),
            to(client, DNS_PORT),
            a.virtual_server,
            a.server
        )
    };
    let plain = |ip: &str, ipv6: bool| {
        format!(
            "{ip} daddr {} accept
             {ip} daddr {}-{} accept",
            Addresses::of(ipv6).server_plain,
            Addresses::spare(ipv6, Path::Plain, 0),
            Addresses::spare(ipv6, Path::Plain, SPARE_ADDRESSES - 1)
        )
    };
    format!(
        "table inet conntrail_lab {{
            chain pre {{
                type nat hook prerouting priority dstnat; policy accept;
                {}
                {}
            }}
            chain post {{
                type nat hook postrouting priority srcnat; policy accept;
                iifname != \"inside\" accept
                {}
                {}
                meta nfproto ipv4 masquerade
                snat ip6 to {}
            }}
        }}",
        rules("ip", v4),
        rules("ip6", v6),
        plain("ip", false),
        plain("ip6", true),
        v6.gateway_outside
    )
}

fn socket_address(end: Endpoint) -> SocketAddr {
    SocketAddr::new(end.ip, end.port)
}

fn tcp_socket(flow: &Planned, kind: i32) -> Result<OwnedFd> {
    Ok(sys::bound_socket(libc::SOCK_STREAM | kind, flow.proto, socket_address(flow.src))?)
}

/// Request, answer, then close or reset.
fn web(flow: &Planned) -> Result<()> {
    let socket = tcp_socket(flow, 0)?;
    sys::set_receive_timeout(&socket, ANSWER_LIMIT)?;
    sys::connect(&socket, socket_address(flow.dst))?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(&vec![b'q'; flow.payload])?;
    stream.read_exact(&mut TCP_ANSWER.clone())?;
    if flow.kind == Kind::TcpReset {
        // A close with nothing to linger for is a reset.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        return Ok(sys::set_option(&stream, libc::SOL_SOCKET, libc::SO_LINGER, &linger)?);
    }
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err("more than the answer".into()),
    }
}

/// A SYN that is reset, or not answered at all.
fn knock(flow: &Planned) -> Result<()> {
    let (kind, expected) = match flow.kind {
        Kind::TcpRefused => (0, libc::ECONNREFUSED),
        // Not waited for: the socket is closed before it would send a second SYN.
        _ => (libc::SOCK_NONBLOCK, libc::EINPROGRESS),
    };
    match sys::connect(&tcp_socket(flow, kind)?, socket_address(flow.dst)) {
        Err(error) if error.raw_os_error() == Some(expected) => Ok(()),
        other => Err(format!("connect gave {other:?}").into()),
    }
}

/// UDP and UDP-Lite.
fn datagram(flow: &Planned) -> Result<()> {
    let socket = sys::bound_socket(libc::SOCK_DGRAM, flow.proto, socket_address(flow.src))?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    socket.send_to(&vec![b'q'; flow.payload], socket_address(flow.dst))?;
    if flow.kind == Kind::UdpSilent {
        return Ok(());
    }
    let (length, from) = socket.recv_from(&mut [0; 2048])?;
    if length != flow.payload || from != socket_address(flow.dst) {
        return Err(format!("{length} bytes from {from}").into());
    }
    Ok(())
}

/// An echo request, and its answer from the other kernel.
fn ping(flow: &Planned) -> Result<()> {
    let (kind, code, id) = flow.icmp.ok_or("a ping without an id")?;
    let socket = raw_socket(flow.proto, flow.src.ip)?;
    let mut packet = vec![kind, code, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend([0, 1]);
    packet.resize(8 + flow.payload, b'p');
    if flow.proto == ICMP {
        // For ICMPv6 the kernel does it.
        let sum = internet_checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send_to(&packet, SocketAddr::new(flow.dst.ip, 0))?;
    // A raw socket sees what all the others get, too.
    let (header, answer) = if flow.proto == ICMP { (20, 0) } else { (0, 129) };
    let mut buffer = [0; 2048];
    loop {
        let length = socket.recv(&mut buffer)?;
        let got = &buffer[header..length];
        if got[0] == answer && got[4..6] == id.to_be_bytes() {
            return Ok(());
        }
    }
}

fn raw_socket(proto: u8, ip: IpAddr) -> Result<UdpSocket> {
    let socket = sys::bound_socket(libc::SOCK_RAW, proto, SocketAddr::new(ip, 0))?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    Ok(socket)
}

/// Waits for a packet from that end. Of SCTP the source port tells flows apart; others have one
/// pair of addresses each.
fn await_packet(socket: &UdpSocket, from: Endpoint) -> Result<()> {
    let mut buffer = [0; 2048];
    loop {
        let (length, sender) = socket.recv_from(&mut buffer)?;
        let header = if sender.is_ipv4() { 20 } else { 0 };
        let port = &buffer[header..length][..2];
        if sender.ip() == from.ip && (from.port == 0 || port == from.port.to_be_bytes()) {
            return Ok(());
        }
    }
}

/// An SCTP packet with one chunk, INIT (1) or INIT-ACK (2), without options (RFC 9260, 3.3.2).
fn sctp_init(chunk: u8, src_port: u16, dst_port: u16, tag: u32, own_tag: u32) -> Vec<u8> {
    let mut packet = Vec::with_capacity(SCTP_BYTES);
    packet.extend(src_port.to_be_bytes());
    packet.extend(dst_port.to_be_bytes());
    packet.extend(tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([chunk, 0, 0, 20]);
    packet.extend(own_tag.to_be_bytes());
    packet.extend(65_536_u32.to_be_bytes());
    packet.extend([0, 1, 0, 1]);
    packet.extend(1_u32.to_be_bytes());
    // conntrack may refuse a packet whose sum is wrong. It goes lowest byte first.
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

fn gre(length: usize) -> Vec<u8> {
    let mut packet = vec![0, 0, 0x08, 0x00];
    packet.resize(length, b'g');
    packet
}

fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// CRC-32C (Castagnoli), bit by bit: 32 bytes a flow need no table.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn serve_web(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // An error is the time-out, or a client that has gone already.
        if let Ok((stream, _)) = listener.accept() {
            // The driver notices whatever goes wrong; a reset is what some flows are for.
            let _ = answer_web(stream);
        }
    }
}

fn answer_web(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut buffer = [0; 2048];
    if stream.read(&mut buffer)? == 0 {
        return Ok(());
    }
    stream.write_all(&TCP_ANSWER)?;
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

fn serve_datagrams(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                if let Err(error) = socket.send_to(&buffer[..length], from) {
                    eprintln!("no answer to {from}: {error}");
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => eprintln!("a server of the lab: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::Command;

    use super::*;
    use crate::lab::limit::HostLimit;
    use crate::lab::need;

    /// What `conntrack -L` prints of a flow, without state, time-out and mark.
    fn listed(flow: &Planned) -> String {
        let (src, dst) = (flow.src, flow.dst);
        let (back_src, back_dst) = (flow.nat_dst.unwrap_or(dst), flow.nat_src.unwrap_or(src));
        let tuple = |src: Endpoint, dst: Endpoint, reply: bool| {
            let rest = match (flow.icmp, flow.proto) {
                (Some((8, code, id)), _) if reply => format!(" type=0 code={code} id={id}"),
                (Some((128, code, id)), _) if reply => format!(" type=129 code={code} id={id}"),
                (Some((kind, code, id)), _) => format!(" type={kind} code={code} id={id}"),
                (None, GRE) => " srckey=0x0 dstkey=0x0".to_owned(),
                (None, EXPERIMENT) => String::new(),
                (None, _) => format!(" sport={} dport={}", src.port, dst.port),
            };
            format!("src={} dst={}{rest}", src.ip, dst.ip)
        };
        let count = |count: Count| format!("packets={} bytes={}", count.packets, count.bytes);
        let (there, back) = (tuple(src, dst, false), tuple(back_src, back_dst, true));
        match flow.counts {
            Some((original, reply)) => {
                format!("{} {there} {} {back} {}", flow.proto, count(original), count(reply))
            }
            None => {
                format!("{} {} {there} {back}", flow.proto, flow.tcp_state.unwrap_or("").to_owned())
            }
        }
    }

    /// The same of a line of `conntrack -L`.
    fn normalised(line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let tcp = words[1] == "6";
        let wanted = |word: &&&str| {
            let (name, _) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "src" | "dst" | "sport" | "dport" | "type" | "code" | "id" | "srckey"
                | "dstkey" => true,
                "packets" | "bytes" => !tcp,
                _ => tcp && !word.contains(['=', '[']) && word.parse::<u32>().is_err(),
            }
        };
        let rest: Vec<&str> = words[2..].iter().filter(wanted).copied().collect();
        format!("{} {}", words[1], rest.join(" "))
    }

    #[test]
    fn every_driven_flow_stands_in_the_table_as_planned_and_nothing_else() {
        if need::lacks_root() {
            return;
        }
        let _limit = HostLimit::at_least(10_000).expect("the limit");
        let lab = Gateway::new().expect("a gateway");
        let driven = lab.mixed(2000).expect("traffic");
        let mut table = BTreeSet::new();
        for family in ["ipv4", "ipv6"] {
            let mut list = Command::new("conntrack");
            let text = lab.gateway.output(list.args(["-L", "-f", family])).expect("conntrack -L");
            table.extend(text.lines().map(normalised));
        }
        // A flow whose only answer was a reset has been removed at once.
        let stay = driven.iter().filter(|flow| flow.kind != Kind::TcpRefused);
        let plan: BTreeSet<String> = stay.map(listed).collect();
        let missing: Vec<_> = plan.difference(&table).collect();
        let extra: Vec<_> = table.difference(&plan).collect();
        assert!(missing.is_empty() && extra.is_empty(), "missing {missing:#?}, extra {extra:#?}");
        assert!(plan.len() > 1900, "{} flows", plan.len());
    }

    #[test]
    fn flows_end_by_themselves_when_time_outs_are_short() {
        if need::lacks_root() {
            return;
        }
        let _limit = HostLimit::at_least(10_000).expect("the limit");
        let lab = Gateway::new().expect("a gateway");
        lab.short_timeouts().expect("sysctls");
        lab.mixed(100).expect("traffic");
        lab.wait_for_ends(Duration::from_secs(10)).expect("all ended");
    }

    #[test]
    fn crc32c_gives_the_published_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
