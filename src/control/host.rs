//! The state of conntrack in the network namespace of the calling thread: settings, privilege,
//! kernel support, and whether anything makes the kernel track flows here.
//!
//! Promises: makes no traffic but one UDP datagram to itself over loopback for each IP version, and
//! removes the entry that it made. Never changes a setting. What the facts mean is said in
//! [`findings`](super::findings).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use super::Error;
use super::conntrack::{Control, Flow, NO_CTNETLINK, message_type};
use super::message::Writer;
use super::netlink::{Answer, Link, Paced};
use crate::ctnetlink::messages;
use crate::ctnetlink::uapi::family::{AF_INET, AF_INET6};
use crate::ctnetlink::uapi::netlink::NLM_F_DUMP;

/// Settings of this namespace; `/proc/sys/net` shows that of the thread which opens it.
const SETTINGS: &str = "/proc/sys/net/netfilter/";

const IPPROTO_UDP: u8 = 17;

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
        Err(error) => return (access_of(&error), None),
    };
    match control.stats().await {
        Ok(_) => (Access::Granted, Some(control)),
        Err(error) => (access_of(&error), None),
    }
}

fn access_of(error: &Error) -> Access {
    match error {
        Error::Denied { .. } => Access::Denied,
        Error::Missing { what, .. } if *what == NO_CTNETLINK => Access::NoCtnetlink,
        Error::Missing { .. } => Access::NoNetfilter,
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
    // The kernel makes and confirms the entry inside of send: nothing to wait for.
    let (sockets, flow) = match talk_to_self(loopback) {
        Ok(talk) => talk,
        Err(error) => return Ok(Tracked::Unknown(format!("loopback {}: {error}", loopback.ip()))),
    };
    let found = control.lookup(flow).await?.is_some();
    // Kept until here, so that nobody else's flow can have these ports.
    drop(sockets);
    if found {
        // Otherwise it would end 30 s from now in the records of whoever listens by then.
        control.delete(flow).await?;
        return Ok(Tracked::Yes);
    }
    Ok(Tracked::No)
}

fn talk_to_self(loopback: SocketAddr) -> io::Result<([UdpSocket; 2], Flow)> {
    let (from, to) = (UdpSocket::bind(loopback)?, UdpSocket::bind(loopback)?);
    let flow = Flow { proto: IPPROTO_UDP, src: from.local_addr()?, dst: to.local_addr()? };
    from.send_to(&[], flow.dst)?;
    Ok(([from, to], flow))
}

/// `linux/netfilter/nfnetlink_hook.h`.
const NFNL_SUBSYS_HOOK: u8 = 12;
const NFNL_MSG_HOOK_GET: u8 = 0;
const NFNLA_HOOK_HOOKNUM: u16 = 1;
const NFNLA_HOOK_FUNCTION_NAME: u16 = 4;
/// `enum nf_inet_hooks`: conntrack looks at packets here (and at NF_INET_LOCAL_OUT) first.
const NF_INET_PRE_ROUTING: u32 = 0;

/// Whether conntrack's own function (`ipv4_conntrack_in`, `ipv6_conntrack_in`) stands in the packet
/// path, as nfnetlink_hook (Linux 5.14) tells; `None` where the kernel does not tell.
async fn hooked<S: Paced>(link: &mut Link<S>, family: u8) -> Result<Option<bool>, Error> {
    let kind = message_type(NFNL_SUBSYS_HOOK, NFNL_MSG_HOOK_GET);
    let mut request = Writer::new(kind, NLM_F_DUMP, family, 0);
    request.put_be32(NFNLA_HOOK_HOOKNUM, NF_INET_PRE_ROUTING);
    let mut round = link.ask("listing netfilter hooks", request.finish())?;
    let (mut found, mut nameless, mut refused) = (false, false, false);
    while let Some(answer) = round.next().await? {
        match answer {
            Answer::Message(raw) => match hook_function(raw.bytes()) {
                Some(name) => found |= name.windows(9).any(|part| part == b"conntrack"),
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
            return Some(attribute.payload);
        }
    }
    None
}
