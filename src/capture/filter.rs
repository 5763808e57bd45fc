//! The filter by protocol and network as a classic BPF program, run by the kernel on each event
//! before it is queued (`sk_filter` in `do_one_broadcast`).
//!
//! Promises: the program drops an event only when the flow's own attributes say that the filter
//! excludes it, in the same sense as the filter in user space. Everything else passes: expectations,
//! other messages, and events in which an attribute is missing or has an unexpected length. Pure: no
//! I/O; attaching is the socket's business.
//!
//! Shape of a program:
//!
//! ```text
//! not an event of the conntrack subsystem           -> pass
//! protocol of the original tuple not in the list    -> drop
//! family is IPv4 / IPv6, else                       -> pass
//!   M[0..4] = where the four addresses are (either missing -> pass)
//!   any of them in an excluded network              -> drop
//!   no network to include, or any of them in one    -> pass
//!                                                   -> drop
//! ```
//!
//! An attribute is found by `SKF_AD_NLATTR` (A: where to begin, X: its type; A becomes its offset, or
//! 0) and `SKF_AD_NLATTR_NEST` (A: the nest).

use std::collections::HashMap;
use std::fmt;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use libc::sock_filter;

/// `enum ctattr_type`, `ctattr_tuple`, `ctattr_ip`, `ctattr_l4proto` in
/// linux/netfilter/nfnetlink_conntrack.h.
const CTA_TUPLE_ORIG: u32 = 1;
const CTA_TUPLE_REPLY: u32 = 2;
const CTA_TUPLE_IP: u32 = 1;
const CTA_TUPLE_PROTO: u32 = 2;
const CTA_IP_V4_SRC: u32 = 1;
const CTA_IP_V4_DST: u32 = 2;
const CTA_IP_V6_SRC: u32 = 3;
const CTA_IP_V6_DST: u32 = 4;
const CTA_PROTO_NUM: u32 = 1;

/// nlmsghdr and nfgenmsg; the first attribute follows.
const HEADERS: u32 = 20;
/// `nlmsg_type`, a u16 in host order: the message in its low byte, the subsystem in its high one.
const MESSAGE: u32 = if cfg!(target_endian = "little") { 4 } else { 5 };
const SUBSYSTEM: u32 = if cfg!(target_endian = "little") { 5 } else { 4 };
const IPCTNL_MSG_CT_NEW: u32 = 0;
const IPCTNL_MSG_CT_DELETE: u32 = 2;
/// `nfgen_family`
const FAMILY: u32 = 16;
/// `nlmsg_pid` of the nlmsghdr.
const NLMSG_PID: u32 = 12;
/// nlattr: u16 length, u16 type.
const ATTRIBUTE_HEADER: u32 = 4;

/// What the kernel may drop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelFilter {
    /// IP protocol numbers that pass; all when empty.
    pub protocols: Vec<u8>,
    /// A flow passes when one of its four addresses (source and destination of the original and of
    /// the reply tuple) is in one of these; every flow when empty.
    pub include: Vec<IpNet>,
    /// And none of the four is in one of these.
    pub exclude: Vec<IpNet>,
}

/// A program that the kernel takes.
#[derive(Clone)]
pub struct Program(Vec<sock_filter>);

impl Program {
    pub(super) fn instructions(&self) -> &[sock_filter] {
        &self.0
    }

    /// `program`, or a program that lets everything pass, behind the dropping of events that requests
    /// from the netlink port `portid` cause. Three instructions: `nlmsg_pid` stands at a fixed place.
    pub(super) fn without_port(portid: u32, program: Option<&Program>) -> Program {
        let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        let give = (libc::BPF_RET | libc::BPF_K) as u16;
        // BPF loads in network order what netlink writes in the host's.
        let as_loaded = u32::from_be_bytes(portid.to_ne_bytes());
        let mut all = vec![
            sock_filter { code: load, jt: 0, jf: 0, k: NLMSG_PID },
            sock_filter { code: equal, jt: 0, jf: 1, k: as_loaded },
            sock_filter { code: give, jt: 0, jf: 0, k: 0 },
        ];
        match program {
            Some(program) => all.extend_from_slice(&program.0),
            None => all.push(sock_filter { code: give, jt: 0, jf: 0, k: u32::MAX }),
        }
        Program(all)
    }

    /// How many instructions it has.
    #[allow(clippy::len_without_is_empty)] // A program is never empty.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({} instructions)", self.len())
    }
}

impl KernelFilter {
    /// `None` when there is nothing to drop, or more than a program can hold (`BPF_MAXINSNS`, some
    /// 250 IPv4 networks): then user space filters alone.
    pub fn compile(&self) -> Option<Program> {
        if self.protocols.is_empty() && self.include.is_empty() && self.exclude.is_empty() {
            return None;
        }
        let mut asm = Assembler::default();
        asm.events_only();
        if !self.protocols.is_empty() {
            asm.protocols(&self.protocols);
        }
        if !self.include.is_empty() || !self.exclude.is_empty() {
            let (include4, include6) = by_family(&self.include);
            let (exclude4, exclude6) = by_family(&self.exclude);
            let v4 = asm.label();
            let v6 = asm.label();
            asm.load(libc::BPF_B | libc::BPF_ABS, FAMILY);
            asm.jump_if(libc::BPF_JEQ, libc::AF_INET as u32, v4);
            asm.jump_if(libc::BPF_JEQ, libc::AF_INET6 as u32, v6);
            asm.jump(Label::PASS);
            asm.place(v4);
            let included = !self.include.is_empty();
            asm.networks(&exclude4, &include4, included, [CTA_IP_V4_SRC, CTA_IP_V4_DST], 4);
            asm.place(v6);
            asm.networks(&exclude6, &include6, included, [CTA_IP_V6_SRC, CTA_IP_V6_DST], 16);
        } else {
            asm.jump(Label::PASS);
        }
        asm.finish()
    }
}

/// A network as the words to compare: mask and value.
type Words = Vec<(u32, u32)>;

fn by_family(networks: &[IpNet]) -> (Vec<Words>, Vec<Words>) {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for network in networks {
        match network {
            IpNet::V4(network) => v4.push(words4(network)),
            IpNet::V6(network) => v6.push(words6(network)),
        }
    }
    (v4, v6)
}

fn words4(network: &Ipv4Net) -> Words {
    let mask = network.netmask().to_bits();
    if mask == 0 { Vec::new() } else { vec![(mask, network.network().to_bits())] }
}

/// As many words as the prefix reaches into.
fn words6(network: &Ipv6Net) -> Words {
    let (mask, value) = (network.netmask().to_bits(), network.network().to_bits());
    [96, 64, 32, 0]
        .into_iter()
        .map(|shift| ((mask >> shift) as u32, (value >> shift) as u32))
        .take_while(|(mask, _)| *mask != 0)
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Label(u32);

impl Label {
    const PASS: Label = Label(0);
    const DROP: Label = Label(1);
}

/// Puts instructions one after the other; jumps go forward to labels.
///
/// A conditional jump reaches 255 instructions, an unconditional one any distance. So each condition
/// only skips the unconditional jump behind it: one instruction more, and no program that can't be
/// expressed.
#[derive(Debug, Default)]
struct Assembler {
    code: Vec<sock_filter>,
    jumps: Vec<(usize, Label)>,
    places: HashMap<Label, usize>,
    labels: u32,
}

impl Assembler {
    fn label(&mut self) -> Label {
        self.labels += 1;
        Label(Label::DROP.0 + self.labels)
    }

    fn place(&mut self, label: Label) {
        self.places.insert(label, self.code.len());
    }

    fn emit(&mut self, code: u32, k: u32) {
        self.code.push(sock_filter { code: code as u16, jt: 0, jf: 0, k });
    }

    /// A = packet or memory.
    fn load(&mut self, how: u32, k: u32) {
        self.emit(libc::BPF_LD | how, k);
    }

    fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.emit(libc::BPF_JMP | libc::BPF_JA, 0);
    }

    fn jump_if(&mut self, condition: u32, k: u32, to: Label) {
        self.emit(libc::BPF_JMP | condition | libc::BPF_K, k);
        self.skip_next_unless(true);
        self.jump(to);
    }

    fn jump_unless(&mut self, condition: u32, k: u32, to: Label) {
        self.emit(libc::BPF_JMP | condition | libc::BPF_K, k);
        self.skip_next_unless(false);
        self.jump(to);
    }

    fn skip_next_unless(&mut self, wanted: bool) {
        let last = self.code.last_mut().expect("a condition was emitted just before");
        if wanted {
            last.jf = 1;
        } else {
            last.jt = 1;
        }
    }

    /// A = offset of the attribute `kind`, searched by `how` from A; passes when there is none.
    fn find(&mut self, how: i32, kind: u32) {
        self.emit(libc::BPF_LDX | libc::BPF_W | libc::BPF_IMM, kind);
        self.load(libc::BPF_W | libc::BPF_ABS, (libc::SKF_AD_OFF + how) as u32);
        self.jump_if(libc::BPF_JEQ, 0, Label::PASS);
    }

    /// A and X = offset of `tuple` → `part` → `kind`, whose payload has `len` bytes.
    fn find_in_tuple(&mut self, tuple: u32, part: u32, kind: u32, len: u32) {
        self.load(libc::BPF_IMM, HEADERS);
        self.find(libc::SKF_AD_NLATTR, tuple);
        self.find(libc::SKF_AD_NLATTR_NEST, part);
        self.find(libc::SKF_AD_NLATTR_NEST, kind);
        self.emit(libc::BPF_MISC | libc::BPF_TAX, 0);
        // A load beyond the end would drop the event, so the length is looked at first. It is a u16
        // in host order, and loads are in network order.
        self.load(libc::BPF_H | libc::BPF_IND, 0);
        let stored = ((ATTRIBUTE_HEADER + len) as u16).to_be();
        self.jump_unless(libc::BPF_JEQ, u32::from(stored), Label::PASS);
    }

    fn events_only(&mut self) {
        self.load(libc::BPF_W | libc::BPF_LEN, 0);
        self.jump_unless(libc::BPF_JGE, HEADERS, Label::PASS);
        self.load(libc::BPF_B | libc::BPF_ABS, SUBSYSTEM);
        self.jump_unless(libc::BPF_JEQ, libc::NFNL_SUBSYS_CTNETLINK as u32, Label::PASS);
        let event = self.label();
        self.load(libc::BPF_B | libc::BPF_ABS, MESSAGE);
        self.jump_if(libc::BPF_JEQ, IPCTNL_MSG_CT_NEW, event);
        self.jump_unless(libc::BPF_JEQ, IPCTNL_MSG_CT_DELETE, Label::PASS);
        self.place(event);
    }

    fn protocols(&mut self, protocols: &[u8]) {
        let listed = self.label();
        self.find_in_tuple(CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_PROTO_NUM, 1);
        self.load(libc::BPF_B | libc::BPF_IND, ATTRIBUTE_HEADER);
        for protocol in protocols {
            self.jump_if(libc::BPF_JEQ, u32::from(*protocol), listed);
        }
        self.jump(Label::DROP);
        self.place(listed);
    }

    fn networks(
        &mut self,
        exclude: &[Words],
        include: &[Words],
        any_include: bool,
        kinds: [u32; 2],
        len: u32,
    ) {
        if exclude.is_empty() && !any_include {
            return self.jump(Label::PASS);
        }
        let mut address = 0;
        for tuple in [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY] {
            for kind in kinds {
                self.find_in_tuple(tuple, CTA_TUPLE_IP, kind, len);
                self.emit(libc::BPF_STX, address);
                address += 1;
            }
        }
        self.jump_if_inside(exclude, address, Label::DROP);
        if any_include {
            self.jump_if_inside(include, address, Label::PASS);
            self.jump(Label::DROP);
        } else {
            self.jump(Label::PASS);
        }
    }

    fn jump_if_inside(&mut self, networks: &[Words], addresses: u32, to: Label) {
        if networks.is_empty() {
            return;
        }
        for address in 0..addresses {
            self.emit(libc::BPF_LDX | libc::BPF_W | libc::BPF_MEM, address);
            for network in networks {
                let Some((last, before)) = network.split_last() else {
                    // All of the family.
                    self.jump(to);
                    continue;
                };
                let next = self.label();
                for (word, &(mask, value)) in (0..).zip(before) {
                    self.load_masked(word, mask);
                    self.jump_unless(libc::BPF_JEQ, value, next);
                }
                self.load_masked(before.len() as u32, last.0);
                self.jump_if(libc::BPF_JEQ, last.1, to);
                self.place(next);
            }
        }
    }

    /// A = word `word` of the payload of the attribute at X, masked.
    fn load_masked(&mut self, word: u32, mask: u32) {
        self.load(libc::BPF_W | libc::BPF_IND, ATTRIBUTE_HEADER + 4 * word);
        if mask != u32::MAX {
            self.emit(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask);
        }
    }

    fn finish(mut self) -> Option<Program> {
        self.place(Label::PASS);
        self.emit(libc::BPF_RET | libc::BPF_K, u32::MAX);
        self.place(Label::DROP);
        self.emit(libc::BPF_RET | libc::BPF_K, 0);
        if self.code.len() > libc::BPF_MAXINSNS as usize {
            return None;
        }
        for (at, label) in self.jumps {
            let to = self.places[&label];
            // All jumps are forward: the kernel takes no others.
            self.code[at].k = u32::try_from(to.checked_sub(at + 1)?).ok()?;
        }
        Some(Program(self.code))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use proptest::prelude::*;

    use super::*;
    use crate::capture::socket::attach_filter;

    /// A conntrack message as far as the filter looks at it.
    #[derive(Clone, Debug)]
    struct Message {
        subsystem: u8,
        kind: u8,
        family: u8,
        protocol: Option<u8>,
        /// Source and destination of the original tuple, then of the reply tuple.
        addresses: [Option<IpAddr>; 4],
        /// What comes before the tuples, so that offsets differ.
        padding: usize,
    }

    fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&(payload.len() as u16 + 4).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn nest(kind: u32, parts: &[Vec<u8>]) -> Vec<u8> {
        const NLA_F_NESTED: u16 = 0x8000;
        attribute(kind as u16 | NLA_F_NESTED, &parts.concat())
    }

    fn tuple(kind: u32, addresses: &[Option<IpAddr>], protocol: Option<u8>) -> Vec<u8> {
        let mut ip = Vec::new();
        for (address, (v4, v6)) in
            addresses.iter().zip([(CTA_IP_V4_SRC, CTA_IP_V6_SRC), (CTA_IP_V4_DST, CTA_IP_V6_DST)])
        {
            match address {
                Some(IpAddr::V4(address)) => ip.push(attribute(v4 as u16, &address.octets())),
                Some(IpAddr::V6(address)) => ip.push(attribute(v6 as u16, &address.octets())),
                None => {}
            }
        }
        let number = protocol.map(|number| attribute(CTA_PROTO_NUM as u16, &[number]));
        let proto = [number.into_iter().flatten().collect(), attribute(2, &[0, 80])];
        nest(kind, &[nest(CTA_TUPLE_IP, &ip), nest(CTA_TUPLE_PROTO, &proto)])
    }

    impl Message {
        fn encode(&self) -> Vec<u8> {
            let mut bytes = vec![0; 4];
            let kind = u16::from(self.subsystem) << 8 | u16::from(self.kind);
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(&[0; 10]);
            bytes.extend_from_slice(&[self.family, 0, 0, 0]);
            if self.padding > 0 {
                bytes.extend(attribute(30, &vec![1; self.padding]));
            }
            bytes.extend(tuple(CTA_TUPLE_ORIG, &self.addresses[..2], self.protocol));
            bytes.extend(tuple(CTA_TUPLE_REPLY, &self.addresses[2..], self.protocol));
            bytes.extend(attribute(12, &[0, 0, 0, 1]));
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            bytes
        }
    }

    /// The filter in plain words.
    fn passes(filter: &KernelFilter, message: &Message) -> bool {
        let event = message.subsystem == 1 && [0, 2].contains(&message.kind);
        if !event {
            return true;
        }
        if !filter.protocols.is_empty() {
            match message.protocol {
                None => return true,
                Some(protocol) if !filter.protocols.contains(&protocol) => return false,
                Some(_) => {}
            }
        }
        let of_family = |address: &Option<IpAddr>| {
            address.filter(|a| {
                a.is_ipv4() == (message.family == 2) && [2, 10].contains(&message.family)
            })
        };
        let addresses: Vec<IpAddr> = message.addresses.iter().filter_map(of_family).collect();
        if addresses.len() < 4 {
            return true;
        }
        let inside = |networks: &[IpNet]| {
            networks.iter().any(|network| addresses.iter().any(|a| network.contains(a)))
        };
        !inside(&filter.exclude) && (filter.include.is_empty() || inside(&filter.include))
    }

    struct Pair(UnixDatagram, UnixDatagram);

    impl Pair {
        fn new(program: &Program) -> Self {
            let (tx, rx) = UnixDatagram::pair().unwrap();
            rx.set_nonblocking(true).unwrap();
            attach_filter(rx.as_fd(), Some(program)).unwrap();
            Pair(tx, rx)
        }

        /// Whether the kernel keeps it, whole.
        fn keeps(&self, bytes: &[u8]) -> bool {
            self.0.send(bytes).unwrap();
            let mut buffer = [0; 4096];
            match self.1.recv(&mut buffer) {
                Ok(len) => {
                    assert_eq!(&buffer[..len], bytes);
                    true
                }
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                    false
                }
            }
        }
    }

    fn v4(text: &str) -> Option<IpAddr> {
        Some(text.parse::<IpAddr>().unwrap())
    }

    fn tcp(addresses: [&str; 4]) -> Message {
        let addresses = addresses.map(v4);
        let family = if addresses[0].unwrap().is_ipv4() { 2 } else { 10 };
        Message { subsystem: 1, kind: 0, family, protocol: Some(6), addresses, padding: 0 }
    }

    fn filter(protocols: &[u8], include: &[&str], exclude: &[&str]) -> KernelFilter {
        let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        KernelFilter {
            protocols: protocols.to_vec(),
            include: networks(include),
            exclude: networks(exclude),
        }
    }

    #[test]
    fn a_filter_that_excludes_nothing_needs_no_program() {
        assert!(KernelFilter::default().compile().is_none());
    }

    #[test]
    fn the_network_may_hold_any_of_the_four_addresses() {
        let pair = Pair::new(&filter(&[], &["203.0.113.0/24"], &[]).compile().unwrap());
        let snat = ["10.0.0.1", "192.0.2.1", "192.0.2.1", "203.0.113.7"];
        assert!(pair.keeps(&tcp(snat).encode()));
        assert!(pair.keeps(&tcp(["203.0.113.255", "1.1.1.1", "1.1.1.1", "2.2.2.2"]).encode()));
        assert!(!pair.keeps(&tcp(["203.0.114.0", "1.1.1.1", "1.1.1.1", "2.2.2.2"]).encode()));
    }

    #[test]
    fn an_excluded_network_wins() {
        let pair = Pair::new(&filter(&[], &["10.0.0.0/8"], &["10.9.0.0/16"]).compile().unwrap());
        assert!(pair.keeps(&tcp(["10.1.0.1", "1.1.1.1", "1.1.1.1", "2.2.2.2"]).encode()));
        assert!(!pair.keeps(&tcp(["10.1.0.1", "10.9.0.1", "1.1.1.1", "2.2.2.2"]).encode()));
    }

    #[test]
    fn networks_of_one_family_include_nothing_of_the_other() {
        let pair = Pair::new(&filter(&[], &["2001:db8::/33"], &[]).compile().unwrap());
        assert!(!pair.keeps(&tcp(["10.1.0.1", "1.1.1.1", "1.1.1.1", "2.2.2.2"]).encode()));
        assert!(pair.keeps(&tcp(["::1", "::2", "2001:db8:7fff::1", "::1"]).encode()));
        assert!(!pair.keeps(&tcp(["::1", "::2", "2001:db8:8000::1", "::1"]).encode()));
    }

    #[test]
    fn expectations_and_cut_messages_pass() {
        let pair = Pair::new(&filter(&[17], &["10.0.0.0/8"], &[]).compile().unwrap());
        let message = tcp(["1.0.0.1", "1.1.1.1", "1.1.1.1", "2.2.2.2"]);
        assert!(!pair.keeps(&message.encode()));
        assert!(pair.keeps(&Message { subsystem: 2, ..message.clone() }.encode()));
        assert!(pair.keeps(&Message { kind: 1, ..message.clone() }.encode()));
        let whole = message.encode();
        // Everything up to the protocol's attribute: 20 of headers, 4 of the tuple's, 4 + 16 of the
        // addresses', 4 + 5 of the protocol's.
        for len in 1..20 + 4 + 20 + 4 + 5 {
            assert!(pair.keeps(&whole[..len]), "cut after {len} bytes");
        }
    }

    #[test]
    fn more_than_the_kernel_takes_is_left_to_user_space() {
        let networks = |count: u32| KernelFilter {
            include: (0..count)
                .map(|i| IpNet::V4(Ipv4Net::new(Ipv4Addr::from_bits(i << 12), 20).unwrap()))
                .collect(),
            ..KernelFilter::default()
        };
        let program = networks(200).compile().unwrap();
        assert!(program.len() > 3000);
        let pair = Pair::new(&program);
        // 200 networks of 4,096 addresses each.
        assert!(pair.keeps(&tcp(["0.12.127.255", "9.1.1.1", "9.1.1.1", "9.2.2.2"]).encode()));
        assert!(!pair.keeps(&tcp(["0.12.128.0", "9.1.1.1", "9.1.1.1", "9.2.2.2"]).encode()));
        assert!(networks(300).compile().is_none());
    }

    /// Addresses from a small range, so that networks are hit.
    fn address4() -> impl Strategy<Value = IpAddr> {
        (0u32..4, 0u32..4, any::<u8>()).prop_map(|(a, b, c)| {
            IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 | a << 16 | b << 8 | u32::from(c)))
        })
    }

    fn address6() -> impl Strategy<Value = IpAddr> {
        proptest::array::uniform4(0u32..3).prop_map(|words| {
            let bits = words.iter().fold(0u128, |bits, word| bits << 32 | u128::from(*word));
            IpAddr::V6(Ipv6Addr::from_bits(bits))
        })
    }

    fn network() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (address4(), prop_oneof![8u8..=32, Just(0)])
                .prop_map(|(address, len)| IpNet::new(address, len).unwrap()),
            (address6(), prop_oneof![0u8..=128, 28u8..36, Just(128)])
                .prop_map(|(address, len)| IpNet::new(address, len).unwrap()),
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        let addresses = prop_oneof![
            proptest::array::uniform4(address4().prop_map(Some)),
            proptest::array::uniform4(address6().prop_map(Some)),
            proptest::array::uniform4(proptest::option::of(address4())),
            proptest::array::uniform4(proptest::option::of(address6())),
        ];
        let protocol = prop_oneof![9 => (0u8..20).prop_map(Some), 1 => Just(None)];
        let kind =
            prop_oneof![8 => Just((1, 0)), 8 => Just((1, 2)), 1 => Just((2, 0)), 1 => Just((1, 1))];
        (kind, protocol, addresses, 0usize..40, proptest::option::weighted(0.1, any::<u8>()))
            .prop_map(|((subsystem, kind), protocol, addresses, padding, family)| {
                let v6 = addresses.iter().flatten().any(IpAddr::is_ipv6);
                let family = family.unwrap_or(if v6 { 10 } else { 2 });
                Message { subsystem, kind, family, protocol, addresses, padding }
            })
    }

    proptest! {
        #[test]
        fn the_kernel_keeps_what_the_filter_says(
            protocols in proptest::collection::vec(0u8..20, 0..6),
            include in proptest::collection::vec(network(), 0..5),
            exclude in proptest::collection::vec(network(), 0..3),
            messages in proptest::collection::vec(message(), 1..40),
        ) {
            let filter = KernelFilter { protocols, include, exclude };
            let Some(program) = filter.compile() else {
                prop_assert_eq!(filter, KernelFilter::default());
                return Ok(());
            };
            let pair = Pair::new(&program);
            for message in messages {
                prop_assert_eq!(
                    pair.keeps(&message.encode()), passes(&filter, &message), "{:?}", message);
            }
        }
    }
}
