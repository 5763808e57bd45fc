//! A small network for real traffic: a client, a router that translates and tracks, a server.
//!
//! All in namespaces of its own; a few packets for each scenario.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use conntrail::ctnetlink::{Class, messages};

use crate::lab::Result;
use crate::lab::netns::{End, Netns};
use crate::lab::sys::NetlinkSocket;

pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const ROUTER_INSIDE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const ROUTER_OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
const ROUTER_INSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
const ROUTER_OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
const SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);

/// Nothing more comes when the kernel was silent for so long: packets cross a veth in microseconds.
pub(super) const QUIET: Duration = Duration::from_millis(400);
/// A packet that does not arrive shall fail the scenario, not hang it.
const PATIENCE: Duration = Duration::from_secs(3);

pub(super) struct Bed {
    pub(super) client: Netns,
    pub(super) router: Netns,
    pub(super) server: Netns,
}

impl Bed {
    pub(super) fn new() -> Result<Bed> {
        let bed = Bed {
            client: Netns::new("client")?,
            router: Netns::new("router")?,
            server: Netns::new("server")?,
        };
        let end = |netns, interface, v4, v6| End { netns, interface, v4, v6 };
        Netns::connect(
            &end(&bed.client, "uplink", CLIENT, CLIENT6),
            &end(&bed.router, "inside", ROUTER_INSIDE, ROUTER_INSIDE6),
        )?;
        Netns::connect(
            &end(&bed.server, "uplink", SERVER, SERVER6),
            &end(&bed.router, "outside", ROUTER_OUTSIDE, ROUTER_OUTSIDE6),
        )?;
        bed.client.default_route(ROUTER_INSIDE, ROUTER_INSIDE6)?;
        bed.server.default_route(ROUTER_OUTSIDE, ROUTER_OUTSIDE6)?;
        bed.router.sysctl("ipv4/ip_forward", "1")?;
        bed.router.sysctl("ipv6/conf/all/forwarding", "1")?;
        bed.router.conntrack_settings(1, true, true)?;
        bed.router.nft(&ruleset())?;
        Ok(bed)
    }

    /// A socket in the router that hears all events of conntrack entries and expectations.
    pub(super) fn listen(&self) -> Result<NetlinkSocket> {
        let socket = self.router.run(|| NetlinkSocket::listen(&[1, 2, 3, 4, 5, 6], 8 << 20))?;
        socket.set_receive_timeout(QUIET)?;
        Ok(socket)
    }

    /// Sends a request in the router and gives all that answers it, DONE or error included.
    pub(super) fn ask(&self, request: &[u8], single: bool) -> Result<Vec<Vec<u8>>> {
        let socket = self.router.run(NetlinkSocket::open)?;
        socket.set_receive_timeout(PATIENCE)?;
        socket.send_to(0, request)?;
        let mut answers = Vec::new();
        loop {
            let datagram = receive(&socket)?.ok_or("the kernel did not answer")?;
            let end = messages(&datagram)
                .any(|message| matches!(message.unwrap().class(), Class::Done | Class::Error));
            answers.push(datagram);
            if end || single {
                return Ok(answers);
            }
        }
    }

    pub(super) fn flush(&self) -> Result<()> {
        self.conntrack("-F").map(drop)
    }

    /// `conntrack` in the router, with the words of `arguments`.
    pub(super) fn conntrack(&self, arguments: &str) -> Result<String> {
        self.router.output(Command::new("conntrack").args(arguments.split_whitespace()))
    }

    /// A TCP connection with a word each way, closed by the client. `port` is the client's target.
    pub(super) fn tcp(&self, v6: bool, port: u16) -> Result<()> {
        // The rule set sends port 8080 to port 80.
        let listening = if port == 8080 { 80 } else { port };
        let to: IpAddr = if v6 {
            SERVER6.into()
        } else if port == 8080 {
            ROUTER_INSIDE.into()
        } else {
            SERVER.into()
        };
        let (mut ours, mut theirs) = self.connect(SocketAddr::new(to, port), listening)?;
        say(&mut ours, &mut theirs, b"GET / HTTP/1.0\r\n\r\n")?;
        say(&mut theirs, &mut ours, b"HTTP/1.0 204 No Content\r\n\r\n")?;
        ours.shutdown(std::net::Shutdown::Both)?;
        std::thread::sleep(Duration::from_millis(20));
        theirs.shutdown(std::net::Shutdown::Both)?;
        Ok(())
    }

    fn connect(&self, to: SocketAddr, listening: u16) -> Result<(TcpStream, TcpStream)> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let listener = self.server.run(|| TcpListener::bind((any, listening)))?;
        let ours = self.client.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        let (theirs, _) = listener.accept()?;
        Ok((ours, theirs))
    }

    /// A datagram to the server, and one back if `answered`.
    pub(super) fn udp(&self, v6: bool, port: u16, answered: bool) -> Result<()> {
        let (any, to): (IpAddr, IpAddr) = if v6 {
            (Ipv6Addr::UNSPECIFIED.into(), SERVER6.into())
        } else {
            (Ipv4Addr::UNSPECIFIED.into(), SERVER.into())
        };
        let theirs = self.server.run(|| UdpSocket::bind((any, port)))?;
        let ours = self.client.run(|| UdpSocket::bind((any, 0)))?;
        theirs.set_read_timeout(Some(PATIENCE))?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = [0; 16];
        ours.send_to(b"ask", (to, port))?;
        let (_, from) = theirs.recv_from(&mut buffer)?;
        if answered {
            theirs.send_to(b"answer", from)?;
            ours.recv_from(&mut buffer)?;
        }
        Ok(())
    }

    pub(super) fn ping(&self, v6: bool) -> Result<()> {
        let to = if v6 { SERVER6.to_string() } else { SERVER.to_string() };
        let arguments = ["-c", "1", "-W", "2", &to];
        self.client.output(Command::new("ping").args(arguments)).map(drop)
    }

    /// An FTP control connection that announced a data connection: the kernel expects it.
    pub(super) fn ftp(&self) -> Result<Ftp> {
        let data = self.client.run(|| TcpListener::bind((CLIENT, 0)))?;
        let port = data.local_addr()?.port();
        let (mut ours, mut theirs) = self.connect(SocketAddr::new(SERVER.into(), 21), 21)?;
        say(&mut theirs, &mut ours, b"220 ready\r\n")?;
        // nf_conntrack_ftp looks for commands only after it has seen a line end in that direction.
        say(&mut ours, &mut theirs, b"USER lab\r\n")?;
        let command = format!("PORT 10,0,0,2,{},{}\r\n", port >> 8, port & 0xff);
        ours.write_all(command.as_bytes())?;
        theirs.set_read_timeout(Some(PATIENCE))?;
        let mut heard = [0; 64];
        let length = theirs.read(&mut heard)?;
        let announced = announced(&heard[..length]).ok_or("no PORT command came through")?;
        Ok(Ftp { data, announced, _control: (ours, theirs) })
    }

    /// Opens the announced data connection, which uses the expectation up.
    pub(super) fn ftp_data(&self, ftp: &Ftp) -> Result<()> {
        let sender = self.server.run(|| TcpStream::connect_timeout(&ftp.announced, PATIENCE))?;
        let (receiver, _) = ftp.data.accept()?;
        drop((sender, receiver));
        Ok(())
    }
}

pub(super) struct Ftp {
    data: TcpListener,
    /// As the server heard it, after NAT.
    announced: SocketAddr,
    _control: (TcpStream, TcpStream),
}

fn say(from: &mut TcpStream, to: &mut TcpStream, words: &[u8]) -> Result<()> {
    to.set_read_timeout(Some(PATIENCE))?;
    from.write_all(words)?;
    to.read_exact(&mut vec![0; words.len()])?;
    Ok(())
}

/// The address in a PORT command, which the router may have rewritten.
fn announced(command: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(command).ok()?.trim().strip_prefix("PORT ")?;
    let parts: Vec<u8> =
        text.split(',').map(str::parse).collect::<std::result::Result<_, _>>().ok()?;
    let &[a, b, c, d, high, low] = &parts[..] else { return None };
    Some((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low])).into())
}

/// The next datagram, `None` when the socket's time-out passed without one.
pub(super) fn receive(socket: &NetlinkSocket) -> Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; 64 << 10];
    match socket.receive(&mut buffer, 0) {
        Ok(length) => {
            buffer.truncate(length);
            Ok(Some(buffer))
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// All datagrams until the kernel is quiet.
pub(super) fn collect(socket: &NetlinkSocket) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    while let Some(datagram) = receive(socket)? {
        all.push(datagram);
    }
    Ok(all)
}

/// What the router does with which port. UDP 5001, 5007 and 5009 are not translated.
fn ruleset() -> String {
    let pid = std::process::id();
    format!(
        "table inet conntrail_codec_{pid} {{
            ct helper ftp {{ type \"ftp\" protocol tcp; }}
            chain raw {{
                type filter hook prerouting priority raw; policy accept;
                udp dport 5007 ct zone set 7
                udp dport 5009 ct original zone set 9
            }}
            chain pre {{
                type filter hook prerouting priority filter; policy accept;
                tcp dport 21 ct helper set \"ftp\"
                udp dport 5005 ct mark set 0x0102032a
                udp dport 5006 ct label set 5 ct label set 97
            }}
            chain to_server {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr {ROUTER_INSIDE} tcp dport 8080 dnat ip to {SERVER}:80
            }}
            chain to_outside {{
                type nat hook postrouting priority srcnat; policy accept;
                udp dport {{ 5001, 5007, 5009 }} accept
                oifname outside ip saddr 10.0.0.0/24 masquerade
            }}
        }}"
    )
}
