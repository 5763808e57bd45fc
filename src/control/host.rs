//! The state of conntrack in the network namespace of the calling thread: settings, privilege,
//! kernel support, and whether anything makes the kernel track flows here.
//!
//! Promises: makes no traffic but one UDP datagram to itself over loopback for each IP version, and
//! removes the entry that it made. Never changes a setting. What the facts mean is said in
//! [`findings`](super::findings()).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::Error;
use super::conntrack::Control;
use super::netlink::{Answer, Link, Paced, Raw};
use crate::ctnetlink::request::{Header, Writer, message_type};
use crate::ctnetlink::uapi::family::{AF_INET, AF_INET6};
use crate::ctnetlink::uapi::ipproto::IPPROTO_UDP;
use crate::ctnetlink::uapi::netlink::{NLM_F_DUMP, NLM_F_REQUEST};
use crate::ctnetlink::{Tuple, TupleParts, messages};

/// Settings of this namespace; `/proc/sys/net` shows that of the thread which opens it.
const SETTINGS: &str = "/proc/sys/net/netfilter/";

/// A datagram over loopback takes microseconds; this blocks the caller only where it is dropped.
const ARRIVAL_LIMIT: Duration = Duration::from_millis(200);

/// May this process ask, and does the kernel answer?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    Granted,
    /// No CAP_NET_ADMIN in the user namespace that owns the network namespace: nfnetlink_rcv
    /// itself said so, which no reading of capability masks can.
    Denied,
    /// No NETLINK_NETFILTER socket can be opened.
    NoNetfilter,
    /// Nobody answers for NFNL_SUBSYS_CTNETLINK.
    NoCtnetlink,
    /// Something else.
    Failed(String),
}

/// Does the kernel track flows of one IP version here?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracked {
    Yes,
    No,
    /// Why it could not be tried.
    Unknown(String),
}

/// What was found. A setting is `None` when this kernel does not have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub access: Access,
    /// `nf_conntrack_events`: 0 off, 1 on, 2 automatic.
    pub events: Option<u64>,
    /// `nf_conntrack_acct`.
    pub acct: Option<u64>,
    /// `nf_conntrack_timestamp`.
    pub timestamp: Option<u64>,
    /// `nf_conntrack_max`, of the whole host.
    pub limit: Option<u64>,
    /// `nf_conntrack_count`, of this namespace.
    pub entries: Option<u64>,
    pub tracked_v4: Tracked,
    pub tracked_v6: Tracked,
}

impl Facts {
    /// Reads everything. Do it before subscribing to events: the probe's flow would show in them.
    /// Blocks for up to 0.4 s where loopback drops packets.
    pub async fn read() -> Result<Self, Error> {
        let unasked = || Tracked::Unknown("the kernel could not be asked".to_owned());
        let (access, control) = access().await;
        // After `access`, which makes the kernel load the modules that bring the settings.
        let mut facts = Facts {
            access,
            events: setting("nf_conntrack_events")?,
            acct: setting("nf_conntrack_acct")?,
            timestamp: setting("nf_conntrack_timestamp")?,
            limit: setting("nf_conntrack_max")?,
            entries: setting("nf_conntrack_count")?,
            tracked_v4: unasked(),
            tracked_v6: unasked(),
        };
        if let Some(mut control) = control {
            facts.tracked_v4 = tracked(&mut control, Ipv4Addr::LOCALHOST.into()).await?;
            facts.tracked_v6 = tracked(&mut control, Ipv6Addr::LOCALHOST.into()).await?;
        }
        Ok(facts)
    }
}

/// A setting of `net.netfilter`; `None` when this kernel does not have it.
pub fn setting(name: &str) -> Result<Option<u64>, Error> {
    let path = setting_path(name);
    let failed = |source| Error::Setting { path: path.clone(), source };
    match fs::read_to_string(&path) {
        Ok(text) => {
            let number = text.trim().parse();
            number.map(Some).map_err(|error| failed(io::Error::other(error)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

pub(super) fn setting_path(name: &str) -> String {
    format!("{SETTINGS}{name}")
}

async fn access() -> (Access, Option<Control>) {
    let mut control = match Control::connect() {
        Ok(control) => control,
        Err(error) => return (refused(&error, Access::NoNetfilter), None),
    };
    match control.stats().await {
        Ok(_) => (Access::Granted, Some(control)),
        Err(error) => (refused(&error, Access::NoCtnetlink), None),
    }
}

fn refused(error: &Error, missing: Access) -> Access {
    match error {
        Error::Denied { .. } => Access::Denied,
        Error::Missing { .. } => missing,
        other => Access::Failed(other.to_string()),
    }
}

async fn tracked(control: &mut Control, loopback: IpAddr) -> Result<Tracked, Error> {
    let family = if loopback.is_ipv6() { AF_INET6 } else { AF_INET };
    match hooked(control.link(), family).await? {
        Some(true) => Ok(Tracked::Yes),
        Some(false) => Ok(Tracked::No),
        None => probe(control, SocketAddr::new(loopback, 0)).await,
    }
}

/// Sends one datagram to itself and looks for the entry that it made: a sure sign, and no packet
/// leaves the host. The opposite is no proof, because rules may exempt loopback.
async fn probe(control: &mut Control, loopback: SocketAddr) -> Result<Tracked, Error> {
    let (sockets, flow) = match talk_to_self(loopback) {
        Ok(talk) => talk,
        Err(error) => return Ok(Tracked::Unknown(format!("loopback {}: {error}", loopback.ip()))),
    };
    let found = control.lookup(&flow, 0).await?.is_some();
    // Kept until here, so that nobody else's flow can have these ports.
    drop(sockets);
    if found {
        // Otherwise it would end 30 s from now in the records of whoever listens by then.
        control.delete(&flow).await?;
        return Ok(Tracked::Yes);
    }
    Ok(Tracked::No)
}

fn talk_to_self(loopback: SocketAddr) -> io::Result<([UdpSocket; 2], Tuple)> {
    let (from, to) = (UdpSocket::bind(loopback)?, UdpSocket::bind(loopback)?);
    let (src, dst) = (from.local_addr()?, to.local_addr()?);
    from.send_to(&[], dst)?;
    // Once it has arrived, its entry is confirmed. Waiting for it also tells a namespace that does
    // not track from one where it is dropped: with lo down, sending to 127.0.0.1 still succeeds.
    to.set_read_timeout(Some(ARRIVAL_LIMIT))?;
    to.recv_from(&mut []).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::other("a datagram sent to it did not arrive"),
        _ => error,
    })?;
    Ok(([from, to], udp_tuple(src, dst)))
}

fn udp_tuple(src: SocketAddr, dst: SocketAddr) -> Tuple {
    Tuple {
        src_bytes: address_bytes(src),
        dst_bytes: address_bytes(dst),
        parts: TupleParts::SRC
            | TupleParts::DST
            | TupleParts::PROTO
            | TupleParts::SRC_PORT
            | TupleParts::DST_PORT,
        v6: src.is_ipv6(),
        proto: IPPROTO_UDP,
        src_port: src.port(),
        dst_port: dst.port(),
        ..Tuple::default()
    }
}

fn address_bytes(address: SocketAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    match address {
        SocketAddr::V4(address) => bytes[..4].copy_from_slice(&address.ip().octets()),
        SocketAddr::V6(address) => bytes.copy_from_slice(&address.ip().octets()),
    }
    bytes
}

/// `linux/netfilter/nfnetlink_hook.h`.
const NFNL_SUBSYS_HOOK: u8 = 12;
const NFNL_MSG_HOOK_GET: u8 = 0;
const NFNLA_HOOK_HOOKNUM: u16 = 1;
const NFNLA_HOOK_FUNCTION_NAME: u16 = 4;
/// `enum nf_inet_hooks`: conntrack looks at packets here (and at NF_INET_LOCAL_OUT) first.
const NF_INET_PRE_ROUTING: u32 = 0;

/// Conntrack's own functions at NF_INET_PRE_ROUTING. `ipv4_conntrack_defrag` is not among them: it
/// comes with TPROXY and socket rules too, and tracks nothing.
const CONNTRACK_IN: [&[u8]; 2] = [b"ipv4_conntrack_in", b"ipv6_conntrack_in"];

/// Whether conntrack's own function stands in the packet path, as nfnetlink_hook (Linux 5.14) tells; `None` where the kernel does not tell.
async fn hooked<S: Paced>(link: &mut Link<S>, family: u8) -> Result<Option<bool>, Error> {
    let mut request = Writer::new();
    request.message(Header {
        message_type: message_type(NFNL_SUBSYS_HOOK, NFNL_MSG_HOOK_GET),
        flags: NLM_F_REQUEST | NLM_F_DUMP,
        seq: 0,
        family,
        res_id: 0,
    });
    request.be32(NFNLA_HOOK_HOOKNUM, NF_INET_PRE_ROUTING);
    let mut round = link.ask("listing netfilter hooks", Raw::new(request.finish()))?;
    let (mut found, mut nameless, mut refused) = (false, false, false);
    while let Some(answer) = round.next().await? {
        match answer {
            Answer::Message(raw) => match hook_function(raw.bytes()) {
                Some(name) => found |= CONNTRACK_IN.contains(&name),
                // A kernel without CONFIG_KALLSYMS gives no names.
                None => nameless = true,
            },
            Answer::Ack | Answer::Done(0) => {}
            // Built without it (as most are where nothing needs it): the probe will tell.
            Answer::Refused(_) | Answer::Done(_) => refused = true,
        }
    }
    if found {
        return Ok(Some(true));
    }
    Ok(if nameless || refused { None } else { Some(false) })
}

fn hook_function(message: &[u8]) -> Option<&[u8]> {
    let mut attributes = messages(message).next()?.ok()?.attributes();
    while let Some(attribute) = attributes.advance().ok()? {
        if attribute.kind == NFNLA_HOOK_FUNCTION_NAME {
            return Some(attribute.text());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{self, Script, done, message, refusal};
    use super::*;
    use crate::ctnetlink::uapi::netlink::NLM_F_MULTI;

    /// One hook as nfnl_hook_dump_one writes it, of this function.
    fn hook(function: Option<&[u8]>) -> io::Result<Vec<u8>> {
        let mut writer = Writer::new();
        writer.message(Header { message_type: 0, flags: 0, seq: 0, family: 2, res_id: 0 });
        writer.be32(2, 100);
        if let Some(function) = function {
            writer.text(NFNLA_HOOK_FUNCTION_NAME, function);
        }
        Ok(message(0x0c00, NLM_F_MULTI, 1, &writer.finish()[16..]))
    }

    #[test]
    fn conntracks_own_hook_is_a_proof_both_ways() {
        let table: Vec<(&str, Script, Option<bool>)> = vec![
            ("none", vec![done(0)], Some(false)),
            ("another's", vec![hook(Some(b"nft_do_chain_inet")), done(0)], Some(false)),
            (
                "its own",
                vec![
                    hook(Some(b"ipv4_conntrack_defrag")),
                    hook(Some(b"ipv4_conntrack_in")),
                    done(0),
                ],
                Some(true),
            ),
            // nf_defrag_ipv4 comes with TPROXY and sockets' rules as well.
            (
                "only defragmentation",
                vec![hook(Some(b"ipv4_conntrack_defrag")), done(0)],
                Some(false),
            ),
            ("no names", vec![hook(None), done(0)], None),
            ("no nfnetlink_hook", vec![refusal(libc::EINVAL, 1)], None),
            ("cut off", vec![hook(Some(b"nft_do_chain_inet")), done(libc::EIO)], None),
        ];
        for (case, steps, expected) in table {
            let (mut link, _) = scripted::link(steps);
            let found = scripted::run(hooked(&mut link, AF_INET)).unwrap();
            assert_eq!(found, expected, "{case}");
        }
    }
}
