//! Questions about the conntrack table: dump, counts, per-CPU statistics, one entry.
//!
//! Promises: a dump says whether it is complete and why not. Never changes the table but for
//! [`Control::delete`], and never asks `IPCTNL_MSG_CT_GET_CTRZERO`, which zeroes the counters for
//! everyone.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Error;
use super::message::Writer;
use super::netlink::{Answer, KernelSocket, Link, Marks, Paced, Raw, Round};
use crate::capture::RawBatch;
use crate::ctnetlink::uapi::conntrack::{cta, exp_msg, ip, l4proto, msg, tuple};
use crate::ctnetlink::uapi::family::{AF_INET, AF_INET6, AF_UNSPEC};
use crate::ctnetlink::uapi::netlink::NLM_F_ACK;
use crate::ctnetlink::uapi::netlink::NLM_F_DUMP;
use crate::ctnetlink::uapi::nfnetlink::{NFNL_SUBSYS_CTNETLINK, NFNL_SUBSYS_CTNETLINK_EXP};
use crate::ctnetlink::{
    CpuStats, ExpectStats, Malformed, Message, Stats, Tally, decode_expect_stats, decode_stats,
    decode_stats_cpu, messages,
};

/// A dump is handed on in batches of this size: about 500 entries, so that a queue of a few MiB
/// holds many, and large enough that handing on costs nothing beside the kernel's work.
pub const DUMP_BATCH: usize = 128 * 1024;

pub(super) const NO_CTNETLINK: &str = "conntrack over netlink (nf_conntrack_netlink)";

/// Which entries a dump gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    #[default]
    Both,
    Ipv4,
    Ipv6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Family::Both => AF_UNSPEC,
            Family::Ipv4 => AF_INET,
            Family::Ipv6 => AF_INET6,
        }
    }
}

/// How a dump ended.
#[derive(Debug)]
pub struct DumpEnd {
    /// Messages handed on.
    pub entries: u64,
    /// Why it may lack entries; `None` when the kernel says that these are all.
    pub why: Option<Incomplete>,
}

impl DumpEnd {
    pub fn complete(&self) -> bool {
        self.why.is_none()
    }
}

/// Why a dump may lack entries.
#[derive(Debug, thiserror::Error)]
pub enum Incomplete {
    #[error("the consumer stopped it")]
    Stopped,
    #[error("the table changed in a way that may skip or repeat entries (NLM_F_DUMP_INTR)")]
    Interrupted,
    #[error("the kernel could not queue a part of it (ENOBUFS)")]
    Overrun,
    #[error("a part of it was longer than the buffer")]
    Truncated,
    /// An errno in `NLMSG_DONE`, a time-out, or a broken socket after it had begun.
    #[error(transparent)]
    Failed(Error),
}

impl Incomplete {
    fn of(marks: Marks) -> Option<Self> {
        if marks.overrun {
            return Some(Incomplete::Overrun);
        }
        if marks.truncated {
            return Some(Incomplete::Truncated);
        }
        marks.interrupted.then_some(Incomplete::Interrupted)
    }
}

/// A connection to the kernel's netfilter, in the network namespace where it was made.
///
/// It asks one thing at a time. After [`Error::TimedOut`] or [`Error::Gone`], or when a call was
/// cancelled or a dump stopped, it is spent and every further call gives [`Error::Gone`]: a late
/// answer could be taken for the next question's. Connecting again costs a few microseconds.
#[derive(Debug)]
pub struct Control {
    link: Link<KernelSocket>,
}

impl Control {
    /// Opens a socket in the network namespace of the calling thread. Needs a tokio runtime with
    /// I/O and time.
    pub fn connect() -> Result<Self, Error> {
        Ok(Self { link: Link::open()? })
    }

    pub(super) fn link(&mut self) -> &mut Link<KernelSocket> {
        &mut self.link
    }

    /// Dumps the table in batches of about [`DUMP_BATCH`] bytes. `take` gets each full batch and
    /// gives the next empty one, or `None` to stop; while it waits, the kernel waits.
    ///
    /// An error means that nothing was handed on. What ends a dump later is in [`DumpEnd`].
    pub async fn dump_conntrack<F>(&mut self, family: Family, take: F) -> Result<DumpEnd, Error>
    where
        F: AsyncFnMut(RawBatch) -> Option<RawBatch>,
    {
        let request = ct(msg::IPCTNL_MSG_CT_GET, NLM_F_DUMP, family.number()).finish();
        dump(self.link.ask("dumping the conntrack table", request)?, take).await
    }

    /// The counters of each CPU.
    pub async fn stats_cpu(&mut self) -> Result<Vec<CpuStats>, Error> {
        let request = ct(msg::IPCTNL_MSG_CT_GET_STATS_CPU, NLM_F_DUMP, AF_UNSPEC).finish();
        let round = self.link.ask("reading conntrack statistics", request)?;
        collect(round, decode_stats_cpu).await
    }

    /// The expectation counters of each CPU.
    pub async fn expect_stats_cpu(&mut self) -> Result<Vec<ExpectStats>, Error> {
        let request = Writer::new(
            message_type(NFNL_SUBSYS_CTNETLINK_EXP, exp_msg::IPCTNL_MSG_EXP_GET_STATS_CPU),
            NLM_F_DUMP,
            AF_UNSPEC,
            0,
        );
        let round = self.link.ask("reading expectation statistics", request.finish())?;
        collect(round, decode_expect_stats).await
    }

    /// Entries in this namespace's table and the limit. The first question to ask: its errors say
    /// whether this process may ask at all ([`Error::Denied`]) and whether the kernel has
    /// nf_conntrack_netlink ([`Error::Missing`]).
    pub async fn stats(&mut self) -> Result<Stats, Error> {
        let doing = "counting conntrack entries";
        let request = ct(msg::IPCTNL_MSG_CT_GET_STATS, 0, AF_UNSPEC).finish();
        let raw = self.link.ask(doing, request)?.one().await.map_err(no_subsystem)?;
        decode(doing, &raw, decode_stats)
    }

    /// The entry of this original tuple in the default zone, as `decode_conn` reads it.
    pub async fn lookup(&mut self, flow: Flow) -> Result<Option<Vec<u8>>, Error> {
        let request = flow.request(msg::IPCTNL_MSG_CT_GET, 0);
        match self.link.ask("looking up a conntrack entry", request)?.one().await {
            Ok(raw) => Ok(Some(raw.bytes().to_vec())),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the entry of this original tuple in the default zone; false when there is none.
    pub async fn delete(&mut self, flow: Flow) -> Result<bool, Error> {
        let request = flow.request(msg::IPCTNL_MSG_CT_DELETE, NLM_F_ACK);
        match self.link.ask("deleting a conntrack entry", request)?.acknowledged().await {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Original tuple of a flow with ports. Both ends are of the same family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub proto: u8,
    pub src: SocketAddr,
    pub dst: SocketAddr,
}

impl Flow {
    fn request(self, command: u8, flags: u16) -> Raw {
        let family = if self.src.is_ipv6() { AF_INET6 } else { AF_INET };
        let mut request = ct(command, flags, family);
        request.nest(cta::CTA_TUPLE_ORIG, |w| {
            w.nest(tuple::CTA_TUPLE_IP, |w| {
                put_address(w, ip::CTA_IP_V4_SRC, ip::CTA_IP_V6_SRC, self.src);
                put_address(w, ip::CTA_IP_V4_DST, ip::CTA_IP_V6_DST, self.dst);
            });
            w.nest(tuple::CTA_TUPLE_PROTO, |w| {
                w.put(l4proto::CTA_PROTO_NUM, &[self.proto]);
                w.put(l4proto::CTA_PROTO_SRC_PORT, &self.src.port().to_be_bytes());
                w.put(l4proto::CTA_PROTO_DST_PORT, &self.dst.port().to_be_bytes());
            });
        });
        request.finish()
    }
}

fn put_address(out: &mut Writer, v4: u16, v6: u16, address: SocketAddr) {
    match address {
        SocketAddr::V4(address) => out.put(v4, &address.ip().octets()),
        SocketAddr::V6(address) => out.put(v6, &address.ip().octets()),
    }
}

pub(super) fn message_type(subsystem: u8, command: u8) -> u16 {
    u16::from(subsystem) << 8 | u16::from(command)
}

fn ct(command: u8, flags: u16, family: u8) -> Writer {
    Writer::new(message_type(NFNL_SUBSYS_CTNETLINK, command), flags, family, 0)
}

/// nfnetlink_rcv_msg answers EINVAL when nobody registered the subsystem, also after it tried to
/// load the module; a request without attributes has nothing else that could be invalid.
fn no_subsystem(error: Error) -> Error {
    match error {
        Error::Refused { doing, source } if source.raw_os_error() == Some(libc::EINVAL) => {
            Error::Missing { doing, what: NO_CTNETLINK, source }
        }
        Error::Missing { doing, source, .. } => {
            Error::Missing { doing, what: NO_CTNETLINK, source }
        }
        other => other,
    }
}

async fn dump<S: Paced, F>(mut round: Round<'_, S>, mut take: F) -> Result<DumpEnd, Error>
where
    F: AsyncFnMut(RawBatch) -> Option<RawBatch>,
{
    let mut batch = RawBatch::default();
    let mut entries = 0;
    let mut taken = 0;
    let failed = loop {
        match round.next().await {
            Ok(Some(Answer::Message(raw))) => {
                batch.push(raw.bytes());
                entries += 1;
            }
            Ok(Some(Answer::Done(0) | Answer::Ack)) => {}
            // An error message instead of a first entry: the dump was refused, not cut off.
            Ok(Some(Answer::Refused(errno))) if entries == 0 => {
                round.drain().await?;
                return Err(no_subsystem(Error::refused(round.doing(), errno)));
            }
            Ok(Some(Answer::Refused(errno) | Answer::Done(errno))) => {
                let error = Error::refused(round.doing(), errno);
                // If this fails, the connection is spent, and its next user is told so.
                let _ = round.drain().await;
                break Some(error);
            }
            Ok(None) => break None,
            Err(error) if entries == 0 => return Err(error),
            Err(error) => break Some(error),
        }
        if batch.bytes.len() >= DUMP_BATCH {
            taken = entries;
            let Some(empty) = take(stamped(batch)).await else {
                return Ok(DumpEnd { entries, why: Some(Incomplete::Stopped) });
            };
            batch = empty;
        }
    };
    if entries > taken {
        // Stopping now, when nothing more is to come, stops nothing.
        take(stamped(batch)).await;
    }
    let why = failed.map(Incomplete::Failed).or_else(|| Incomplete::of(round.marks()));
    Ok(DumpEnd { entries, why })
}

fn stamped(mut batch: RawBatch) -> RawBatch {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    batch.arrived = now.as_nanos() as u64;
    batch
}

/// Every message of a small dump, decoded. All or nothing.
async fn collect<S: Paced, T>(
    mut round: Round<'_, S>,
    read: fn(&Message<'_>, &mut Tally) -> Result<T, Malformed>,
) -> Result<Vec<T>, Error> {
    let doing = round.doing();
    let mut all = Vec::new();
    let mut first_error = None;
    while let Some(answer) = round.next().await? {
        let wrong = match answer {
            Answer::Message(raw) => decode(doing, &raw, read).map(|one| all.push(one)).err(),
            Answer::Ack | Answer::Done(0) => None,
            Answer::Refused(errno) | Answer::Done(errno) => {
                Some(no_subsystem(Error::refused(doing, errno)))
            }
        };
        first_error = first_error.or(wrong);
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok(all),
    }
}

fn decode<T>(
    doing: &'static str,
    raw: &Raw,
    read: fn(&Message<'_>, &mut Tally) -> Result<T, Malformed>,
) -> Result<T, Error> {
    let message = messages(raw.bytes()).next();
    let message = message.ok_or(Error::Malformed { doing, why: "it is empty" })?;
    message
        .and_then(|message| read(&message, &mut Tally::default()))
        .map_err(|malformed| Error::Malformed { doing, why: malformed.reason.name() })
}
