//! Questions about the conntrack table: dump, counts, per-CPU statistics, one entry.
//!
//! Promises: a dump says whether it is complete and why not. Never changes the table but for
//! [`Control::delete`], and never asks `IPCTNL_MSG_CT_GET_CTRZERO`, which zeroes the counters for
//! everyone.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Error;
use super::netlink::{Answer, KernelSocket, Link, Marks, Paced, Raw, Round};
use crate::capture::RawBatch;
use crate::ctnetlink::request::{self, Header, Writer, message_type, write_tuple};
use crate::ctnetlink::uapi::conntrack::{cta, msg};
use crate::ctnetlink::uapi::family::{AF_INET, AF_INET6, AF_UNSPEC};
use crate::ctnetlink::uapi::netlink::{NLM_F_ACK, NLM_F_REQUEST};
use crate::ctnetlink::uapi::nfnetlink::NFNL_SUBSYS_CTNETLINK;
use crate::ctnetlink::{
    CpuStats, ExpectStats, Malformed, Message, Stats, Tally, Tuple, decode_expect_stats,
    decode_stats, decode_stats_cpu, messages,
};

/// A dump is handed on in batches of this size: 400 to 700 entries, so that a queue of a few MiB
/// holds many, and large enough that handing on costs nothing beside the kernel's work.
pub const DUMP_BATCH: usize = 128 * 1024;

const NO_CTNETLINK: &str = "conntrack over netlink (nf_conntrack_netlink)";

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
        let request = Raw::new(request::dump_conns(family.number(), 0));
        dump(self.link.ask("dumping the conntrack table", request)?, take).await
    }

    /// The counters of each CPU.
    pub async fn stats_cpu(&mut self) -> Result<Vec<CpuStats>, Error> {
        let request = Raw::new(request::dump_stats_cpu(0));
        let round = self.link.ask("reading conntrack statistics", request)?;
        collect(round, decode_stats_cpu).await
    }

    /// The expectation counters of each CPU.
    pub async fn expect_stats_cpu(&mut self) -> Result<Vec<ExpectStats>, Error> {
        let request = Raw::new(request::dump_expect_stats_cpu(0));
        let round = self.link.ask("reading expectation statistics", request)?;
        collect(round, decode_expect_stats).await
    }

    /// Entries in this namespace's table and the limit. The first question to ask: its errors say
    /// whether this process may ask at all ([`Error::Denied`]) and whether the kernel has
    /// nf_conntrack_netlink ([`Error::Missing`]).
    pub async fn stats(&mut self) -> Result<Stats, Error> {
        let doing = "counting conntrack entries";
        let request = Raw::new(request::get_stats(0)).acknowledged();
        let raw = self.link.ask(doing, request)?.one().await.map_err(no_subsystem)?;
        decode(doing, &raw, decode_stats)
    }

    /// The message of the entry with this original tuple, as `decode_conn` reads it.
    pub async fn lookup(&mut self, orig: &Tuple, zone: u16) -> Result<Option<Vec<u8>>, Error> {
        let request = Raw::new(request::get_conn(orig, zone, 0)).acknowledged();
        match self.link.ask("looking up a conntrack entry", request)?.one().await {
            Ok(raw) => Ok(Some(raw.bytes().to_vec())),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the entry of this original tuple in the default zone; false when there is none.
    pub(super) async fn delete(&mut self, orig: &Tuple) -> Result<bool, Error> {
        let request = Raw::new(delete_conn(orig));
        match self.link.ask("deleting a conntrack entry", request)?.acknowledged().await {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn delete_conn(orig: &Tuple) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.message(Header {
        message_type: message_type(NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_DELETE),
        flags: NLM_F_REQUEST | NLM_F_ACK,
        seq: 0,
        family: if orig.v6 { AF_INET6 } else { AF_INET },
        res_id: 0,
    });
    write_tuple(&mut writer, cta::CTA_TUPLE_ORIG, orig);
    writer.finish()
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

#[cfg(test)]
mod tests {
    use super::super::scripted::{self, Script, done, entries, errno, question, refusal};
    use super::*;
    use crate::ctnetlink::uapi::netlink::NLM_F_DUMP_INTR;

    async fn dump_of(steps: Script) -> (Result<DumpEnd, Error>, usize) {
        let (mut link, _) = scripted::link(steps);
        let mut seen = 0;
        let round = link.ask("dumping", question()).unwrap();
        let end = dump(round, async |mut batch: RawBatch| {
            assert!(batch.arrived > 0);
            seen += batch.datagrams.len();
            batch.clear();
            Some(batch)
        })
        .await;
        (end, seen)
    }

    #[test]
    fn a_dump_says_how_it_ended() {
        let table: Vec<(&str, Script, usize, Option<&str>)> = vec![
            ("empty", vec![done(0)], 0, None),
            ("whole", vec![entries(3, 0), entries(2, 0), done(0)], 5, None),
            ("errno in DONE", vec![entries(3, 0), done(libc::ENOMEM)], 3, Some("refused")),
            ("errno in DONE at once", vec![done(libc::ENOMEM)], 0, Some("refused")),
            ("error after entries", vec![entries(3, 0), refusal(libc::EIO, 1)], 3, Some("refused")),
            (
                "interrupted",
                vec![entries(3, 0), entries(1, NLM_F_DUMP_INTR), done(0)],
                4,
                Some("NLM_F_DUMP_INTR"),
            ),
            (
                "overrun",
                vec![entries(3, 0), errno(libc::ENOBUFS), entries(2, 0), done(0)],
                5,
                Some("ENOBUFS"),
            ),
            ("silence", vec![entries(3, 0)], 3, Some("no answer")),
            ("broken", vec![entries(3, 0), errno(libc::EIO)], 3, Some("gone")),
        ];
        for (case, steps, expected, why) in table {
            let (end, seen) = scripted::run(dump_of(steps));
            let end = end.unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!((end.entries, seen), (expected as u64, expected), "{case}");
            assert_eq!(end.complete(), why.is_none(), "{case}");
            let said = end.why.map(|why| why.to_string()).unwrap_or_default();
            assert!(said.contains(why.unwrap_or_default()), "{case}: {said}");
        }
    }

    #[test]
    fn a_dump_that_never_began_is_an_error() {
        let error = |steps| scripted::run(dump_of(steps)).0.unwrap_err();
        assert!(matches!(error(vec![refusal(libc::EPERM, 1)]), Error::Denied { .. }));
        assert!(matches!(error(vec![refusal(libc::EINVAL, 1)]), Error::Missing { .. }));
        assert!(matches!(error(vec![refusal(libc::EBUSY, 1)]), Error::Refused { .. }));
        assert!(matches!(error(vec![]), Error::TimedOut { .. }));
    }

    #[test]
    fn a_dump_is_handed_on_in_batches() {
        // 20 bytes each: two full batches and a rest.
        let count = DUMP_BATCH / 20 * 5 / 2;
        let mut steps: Vec<_> = (0..count / 100).map(|_| entries(100, 0)).collect();
        steps.push(done(0));
        let (mut link, _) = scripted::link(steps);
        let mut sizes = Vec::new();
        let end = scripted::run(async {
            let round = link.ask("dumping", question()).unwrap();
            dump(round, async |batch: RawBatch| {
                sizes.push(batch.bytes.len());
                Some(RawBatch::default())
            })
            .await
        });
        assert!(end.unwrap().complete());
        assert_eq!(sizes.len(), 3);
        assert!(sizes[..2].iter().all(|&size| (DUMP_BATCH..DUMP_BATCH + 20).contains(&size)));
    }

    #[test]
    fn a_consumer_that_stops_spends_the_connection() {
        let full = DUMP_BATCH / 20 + 1;
        let (mut link, _) = scripted::link(vec![entries(full, 0), entries(1, 0), done(0)]);
        scripted::run(async {
            let round = link.ask("dumping", question()).unwrap();
            let end = dump(round, async |_| None).await.unwrap();
            assert!(matches!(end.why, Some(Incomplete::Stopped)));
            assert!(matches!(link.ask("asking", question()).err(), Some(Error::Gone { .. })));
        });
    }

    #[test]
    fn a_statistic_that_cannot_be_decoded_is_an_error() {
        let (mut link, _) = scripted::link(vec![entries(1, 0), done(0)]);
        let error = scripted::run(async {
            collect(link.ask("counting", question()).unwrap(), decode_stats_cpu).await
        });
        assert!(matches!(error, Err(Error::Malformed { why: "wrong_type", .. })), "{error:?}");
    }

    /// As ctnetlink answers IPCTNL_MSG_CT_GET_STATS: NLM_F_MULTI, and no DONE.
    #[test]
    fn a_single_answer_that_says_multi_ends_with_its_acknowledgement() {
        let (mut link, _) = scripted::link(vec![entries(1, 0), refusal(0, 1)]);
        let raw =
            scripted::run(async { link.ask("asking", question().acknowledged())?.one().await });
        assert_eq!(raw.unwrap().bytes(), entries(1, 0).unwrap());
    }
}
