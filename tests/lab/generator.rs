//! Synthetic load: puts flows into a namespace's conntrack table through ctnetlink, hundreds of
//! thousands a second, and takes them out again. The kernel makes the same NEW and DESTROY events
//! for them as for real traffic.
//!
//! Flow number i is a pure function of i, so a test can say what each record must hold. What the
//! kernel refused is counted by errno, never assumed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::Result;
use super::message::*;
use super::netns::Netns;
use super::sys::NetlinkSocket;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// Messages in one send. Creations a second on 6.18 without a listener (`lab storm --batch`): 16
/// gave 263,000 to 347,000, 64 to 1,024 all 360,000 to 382,000, 256 the most by a hair.
pub(crate) const BATCH: u32 = 256;
/// 256 messages of about 200 bytes, charged by the buffer's real size, with much to spare.
const SEND_BUFFER: i32 = 4 << 20;
/// A refusal costs less than 1 KiB of it, so a whole batch of them fits many times over.
const RECEIVE_BUFFER: usize = 8 << 20;
/// A flush of a full table takes a second or two; a kernel that is silent for longer is broken.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Flows number themselves in 24 bits of the source address.
const MOST_FLOWS: u32 = 1 << 24;
/// SEEN_REPLY, ASSURED, CONFIRMED. ASSURED keeps the kernel from evicting a flow early when the
/// table is full: it refuses the new one instead, and says so.
const STATUS: u32 = 0b1110;
/// `TCP_CONNTRACK_ESTABLISHED`.
const ESTABLISHED: u8 = 3;

/// Which translation a generated flow has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nat {
    Source,
    Destination,
}

/// What all flows of a storm have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flows {
    /// 6 or 17.
    pub(crate) proto: u8,
    pub(crate) ipv6: bool,
    pub(crate) nat: Option<Nat>,
    pub(crate) mark: Option<u32>,
    /// Needs a rule with `ct label` in the namespace, as `enable_tracking` makes it.
    pub(crate) labels: Option<[u8; 16]>,
    pub(crate) timeout_s: u32,
}

impl Default for Flows {
    fn default() -> Self {
        // UDP, because it is what a NAT gateway sees most; an hour, so that none expires.
        Self { proto: UDP, ipv6: false, nat: None, mark: None, labels: None, timeout_s: 3600 }
    }
}

/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    pub(crate) ip: IpAddr,
    pub(crate) port: u16,
}

/// What the generator knows of one flow: its original tuple, and the translated source or
/// destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) proto: u8,
    pub(crate) src: Endpoint,
    pub(crate) dst: Endpoint,
    pub(crate) nat_src: Option<Endpoint>,
    pub(crate) nat_dst: Option<Endpoint>,
}

impl Flows {
    /// Flow number `index`, below 2^24.
    pub(crate) fn flow(&self, index: u32) -> Flow {
        assert!(index < MOST_FLOWS, "flow {index} has no address");
        // Ports only spread the hash; the source address alone is unique.
        let port = 1024 + (index % 60_000) as u16;
        let src = Endpoint { ip: self.address(0x0a00_0000 + index), port };
        let dst = Endpoint { ip: self.address(0xc612_0001), port: 443 };
        // 100.64.0.0/10 holds 2^22 addresses; two bits more go into the port.
        let nat_src = Endpoint {
            ip: self.address(0x6440_0000 + (index & 0x3f_ffff)),
            port: 1024 + (index >> 22) as u16,
        };
        let nat_dst = Endpoint { ip: self.address(0xc0a8_0000 + (index & 0xffff)), port: 8443 };
        Flow {
            proto: self.proto,
            src,
            dst,
            nat_src: (self.nat == Some(Nat::Source)).then_some(nat_src),
            nat_dst: (self.nat == Some(Nat::Destination)).then_some(nat_dst),
        }
    }

    fn address(&self, v4: u32) -> IpAddr {
        if !self.ipv6 {
            return Ipv4Addr::from_bits(v4).into();
        }
        // 2001:db8::/32, with the IPv4 address at the end.
        Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(v4)).into()
    }
}

/// What one run of inserts or deletes came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) asked: u64,
    /// Those that the kernel took.
    pub(crate) done: u64,
    /// Those that it refused, by errno.
    pub(crate) refused: BTreeMap<i32, u64>,
    pub(crate) elapsed: Duration,
}

impl Report {
    pub(crate) fn rate(&self) -> f64 {
        self.done as f64 / self.elapsed.as_secs_f64()
    }

    fn merge(&mut self, other: Self) {
        self.asked += other.asked;
        self.done += other.done;
        for (errno, count) in other.refused {
            *self.refused.entry(errno).or_default() += count;
        }
    }
}

/// Sockets inside one namespace, through which flows are made and removed.
#[derive(Debug)]
pub(crate) struct Generator {
    sockets: Vec<Worker>,
    batch: u32,
}

impl Generator {
    /// One socket, batches of [`BATCH`].
    pub(crate) fn new(netns: &Netns) -> Result<Self> {
        Self::with(netns, 1, BATCH)
    }

    /// `threads` sockets, each used by a thread of its own; `batch` messages a send.
    pub(crate) fn with(netns: &Netns, threads: usize, batch: u32) -> Result<Self> {
        assert!(threads > 0 && batch > 0, "a generator that can do nothing");
        let sockets = netns.run(|| (0..threads).map(|_| Worker::open()).collect::<Result<_>>())?;
        Ok(Self { sockets, batch })
    }

    /// Makes the flows numbered `range`, as fast as the kernel goes.
    pub(crate) fn insert(&mut self, flows: &Flows, range: Range<u32>) -> Result<Report> {
        self.each(
            range,
            |batch, sequence, index, family| {
                let flow = flows.flow(index);
                let flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL;
                batch.message(IPCTNL_MSG_CT_NEW, flags, sequence, family, |out| {
                    put_flow(out, flows, &flow);
                });
            },
            flows,
        )
    }

    /// Removes the flows numbered `range` one by one.
    pub(crate) fn delete(&mut self, flows: &Flows, range: Range<u32>) -> Result<Report> {
        self.each(
            range,
            |batch, sequence, index, family| {
                let flow = flows.flow(index);
                batch.message(IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST, sequence, family, |out| {
                    put_tuple(out, CTA_TUPLE_ORIG, flow.proto, flow.src, flow.dst);
                });
            },
            flows,
        )
    }

    /// Removes every entry of the namespace (`IPCTNL_MSG_CT_DELETE` without a tuple).
    pub(crate) fn flush(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        let worker = &mut self.sockets[0];
        worker.batch.clear();
        worker.sequence += 1;
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        worker.batch.message(IPCTNL_MSG_CT_DELETE, flags, worker.sequence, 0, |_| {});
        let refused = worker.exchange()?;
        if let Some(errno) = refused.keys().next() {
            return Err(format!("flush: errno {errno}").into());
        }
        Ok(begun.elapsed())
    }

    /// Lists the whole table and throws the list away; gives its length. While it lists, the
    /// kernel removes entries whose time is over.
    pub(crate) fn dump(&mut self) -> Result<u64> {
        self.dump_each(|_| {})
    }

    /// Lists the whole table: calls `entry` with each message, header included.
    pub(crate) fn dump_each(&mut self, mut entry: impl FnMut(&[u8])) -> Result<u64> {
        let Worker { socket, batch, sequence, answer } = &mut self.sockets[0];
        batch.clear();
        *sequence += 1;
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        batch.message(IPCTNL_MSG_CT_GET, flags, *sequence, 0, |_| {});
        socket.send_to(0, batch.bytes())?;
        let mut entries = 0;
        loop {
            let length = socket.receive(answer, 0)?;
            for message in messages(&answer[..length]) {
                match Header::parse(message).map(|header| header.kind) {
                    Some(IPCTNL_MSG_CT_NEW) => {
                        entry(message);
                        entries += 1;
                    }
                    Some(NLMSG_DONE) => return Ok(entries),
                    kind => return Err(format!("a dump with a message of type {kind:?}").into()),
                }
            }
        }
    }

    fn each(
        &mut self,
        range: Range<u32>,
        message: impl Fn(&mut Batch, u32, u32, u8) + Sync,
        flows: &Flows,
    ) -> Result<Report> {
        let size = self.batch;
        let share = range.len().div_ceil(self.sockets.len()) as u32;
        let family = if flows.ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
        let begun = Instant::now();
        let mut total = Report::default();
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..)
                .zip(&mut self.sockets)
                .map(|(number, worker)| {
                    let from = (range.start + number * share).min(range.end);
                    let part = from..(from + share).min(range.end);
                    let message = &message;
                    scope.spawn(move || {
                        worker.run(part, size, |batch, sequence, index| {
                            message(batch, sequence, index, family);
                        })
                    })
                })
                .collect();
            for thread in running {
                total.merge(thread.join().expect("a worker does not panic")?);
            }
            Result::Ok(())
        })?;
        total.elapsed = begun.elapsed();
        Ok(total)
    }
}

/// A socket with its buffers.
#[derive(Debug)]
struct Worker {
    socket: NetlinkSocket,
    batch: Batch,
    sequence: u32,
    answer: Vec<u8>,
}

impl Worker {
    fn open() -> Result<Self> {
        let socket = NetlinkSocket::open()?;
        socket.set_send_buffer(SEND_BUFFER)?;
        socket.set_receive_buffer(RECEIVE_BUFFER)?;
        socket.set_receive_timeout(ANSWER_LIMIT)?;
        // Refusals without a copy of what was refused.
        socket.set_netlink(libc::NETLINK_CAP_ACK, 1)?;
        Ok(Self { socket, batch: Batch::default(), sequence: 0, answer: vec![0; 32_768] })
    }

    fn run(
        &mut self,
        range: Range<u32>,
        size: u32,
        message: impl Fn(&mut Batch, u32, u32),
    ) -> Result<Report> {
        let mut report = Report { asked: range.len() as u64, ..Report::default() };
        let mut next = range.start;
        while next < range.end {
            let end = (next + size).min(range.end);
            self.batch.clear();
            for index in next..end {
                self.sequence = self.sequence.wrapping_add(1);
                message(&mut self.batch, self.sequence, index);
            }
            self.batch.add_flags_to_last(NLM_F_ACK);
            let refused = self.exchange()?;
            report.done += u64::from(end - next) - refused.values().sum::<u64>();
            for (errno, count) in refused {
                *report.refused.entry(errno).or_default() += count;
            }
            next = end;
        }
        Ok(report)
    }

    /// Sends the batch and reads answers up to that of its last message, the only one that asked
    /// for an acknowledgement. Gives the refusals by errno.
    fn exchange(&mut self) -> Result<BTreeMap<i32, u64>> {
        let mut refused = BTreeMap::new();
        self.socket.send_to(0, self.batch.bytes())?;
        loop {
            let length = self.socket.receive(&mut self.answer, 0)?;
            let answer = &self.answer[..length];
            let header = Header::parse(answer).ok_or("an answer without a header")?;
            if header.kind != NLMSG_ERROR {
                return Err(format!("an answer of type {}", header.kind).into());
            }
            match errno(answer).ok_or("an answer without an errno")? {
                0 => {}
                errno => *refused.entry(errno).or_default() += 1,
            }
            if header.sequence == self.sequence {
                return Ok(refused);
            }
        }
    }
}

fn put_flow(out: &mut Attributes<'_>, flows: &Flows, flow: &Flow) {
    put_tuple(out, CTA_TUPLE_ORIG, flow.proto, flow.src, flow.dst);
    // The kernel derives the translated reply from the NAT attributes itself.
    put_tuple(out, CTA_TUPLE_REPLY, flow.proto, flow.dst, flow.src);
    out.put(CTA_TIMEOUT, &flows.timeout_s.to_be_bytes());
    out.put(CTA_STATUS, &STATUS.to_be_bytes());
    if flow.proto == TCP {
        out.nest(CTA_PROTOINFO, |out| {
            out.nest(CTA_PROTOINFO_TCP, |out| out.put(CTA_PROTOINFO_TCP_STATE, &[ESTABLISHED]));
        });
    }
    if let Some(mark) = flows.mark {
        out.put(CTA_MARK, &mark.to_be_bytes());
    }
    if let Some(labels) = flows.labels {
        out.put(CTA_LABELS, &labels);
    }
    if let Some(to) = flow.nat_src {
        put_nat(out, CTA_NAT_SRC, to);
    }
    if let Some(to) = flow.nat_dst {
        put_nat(out, CTA_NAT_DST, to);
    }
}

fn put_tuple(out: &mut Attributes<'_>, kind: u16, proto: u8, src: Endpoint, dst: Endpoint) {
    out.nest(kind, |out| {
        out.nest(CTA_TUPLE_IP, |out| {
            put_address(out, CTA_IP_V4_SRC, CTA_IP_V6_SRC, src.ip);
            put_address(out, CTA_IP_V4_DST, CTA_IP_V6_DST, dst.ip);
        });
        out.nest(CTA_TUPLE_PROTO, |out| {
            out.put(CTA_PROTO_NUM, &[proto]);
            out.put(CTA_PROTO_SRC_PORT, &src.port.to_be_bytes());
            out.put(CTA_PROTO_DST_PORT, &dst.port.to_be_bytes());
        });
    });
}

fn put_nat(out: &mut Attributes<'_>, kind: u16, to: Endpoint) {
    out.nest(kind, |out| {
        put_address(out, CTA_NAT_V4_MINIP, CTA_NAT_V6_MINIP, to.ip);
        put_address(out, CTA_NAT_V4_MAXIP, CTA_NAT_V6_MAXIP, to.ip);
        out.nest(CTA_NAT_PROTO, |out| {
            out.put(CTA_PROTONAT_PORT_MIN, &to.port.to_be_bytes());
            out.put(CTA_PROTONAT_PORT_MAX, &to.port.to_be_bytes());
        });
    });
}

fn put_address(out: &mut Attributes<'_>, v4: u16, v6: u16, address: IpAddr) {
    match address {
        IpAddr::V4(address) => out.put(v4, &address.octets()),
        IpAddr::V6(address) => out.put(v6, &address.octets()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::lab::limit::HostLimit;
    use crate::lab::need;

    fn list(netns: &Netns, family: &str) -> String {
        netns.output(Command::new("conntrack").args(["-L", "-f", family])).expect("conntrack -L")
    }

    #[test]
    fn what_is_inserted_is_what_conntrack_lists() {
        if need::lacks_root() {
            return;
        }
        let _limit = HostLimit::at_least(10_000).expect("the limit");
        let netns = Netns::new("generator").expect("a namespace");
        netns.enable_tracking().expect("a rule");
        let mut generator = Generator::new(&netns).expect("sockets");
        let source = Flows {
            nat: Some(Nat::Source),
            mark: Some(77),
            labels: Some([0b10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            ..Flows::default()
        };
        let target = Flows { proto: TCP, nat: Some(Nat::Destination), ..Flows::default() };
        let plain6 = Flows { ipv6: true, ..Flows::default() };
        for flows in [&source, &target, &plain6] {
            let report = generator.insert(flows, 0..1).expect("insert");
            assert_eq!((report.done, report.refused.len()), (1, 0));
        }
        let v4 = list(&netns, "ipv4");
        for expected in [
            "src=10.0.0.0 dst=198.18.0.1 sport=1024 dport=443 \
             src=198.18.0.1 dst=100.64.0.0 sport=443 dport=1024 [ASSURED] mark=77",
            "ESTABLISHED src=10.0.0.0 dst=198.18.0.1 sport=1024 dport=443 \
             src=192.168.0.0 dst=10.0.0.0 sport=8443 dport=1024 [ASSURED] mark=0",
        ] {
            assert!(v4.contains(expected), "{expected}\nnot in\n{v4}");
        }
        // The kernel ignores labels that it has no room for, and says nothing.
        let label = [20, 0, CTA_LABELS as u8, 0, 0b10, 0];
        let mut labelled = 0;
        generator
            .dump_each(|entry| labelled += entry.windows(6).filter(|at| *at == label).count())
            .expect("dump");
        assert_eq!(labelled, 1);
        let v6 = list(&netns, "ipv6");
        let expected = "src=2001:db8::a00:0 dst=2001:db8::c612:1 sport=1024 dport=443";
        assert!(v6.contains(expected), "{expected}\nnot in\n{v6}");
    }

    #[test]
    fn refusals_are_counted_and_deletes_take_only_their_own() {
        if need::lacks_root() {
            return;
        }
        let _limit = HostLimit::at_least(10_000).expect("the limit");
        let netns = Netns::new("generator").expect("a namespace");
        let mut generator = Generator::with(&netns, 2, 64).expect("sockets");
        let flows = Flows::default();
        assert_eq!(generator.insert(&flows, 0..1000).expect("insert").done, 1000);
        let again = generator.insert(&flows, 500..1500).expect("insert");
        assert_eq!(again.done, 500);
        assert_eq!(again.refused, BTreeMap::from([(libc::EEXIST, 500)]));
        assert_eq!(generator.delete(&flows, 100..200).expect("delete").done, 100);
        assert_eq!(netns.conntrack_count().expect("count"), 1400);
        assert_eq!(generator.dump().expect("dump"), 1400);
        generator.flush().expect("flush");
        assert_eq!(netns.conntrack_count().expect("count"), 0);
    }

    #[test]
    fn a_low_limit_makes_the_kernel_refuse() {
        if need::lacks_root() {
            return;
        }
        let netns = Netns::new("generator").expect("a namespace");
        let _limit = HostLimit::exactly(500).expect("the limit");
        let mut generator = Generator::new(&netns).expect("sockets");
        let report = generator.insert(&Flows::default(), 0..1000).expect("insert");
        assert_eq!(report.done, 500);
        assert_eq!(report.refused, BTreeMap::from([(libc::ENOMEM, 500)]));
    }
}
