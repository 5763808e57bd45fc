//! Switches conntrack on in the network namespace of the calling thread, and off again.
//!
//! Promises: touches no packet and no rule of others; what it made is gone when the guard is
//! dropped. The table goes also after kill -9, because it has NFT_TABLE_F_OWNER: the kernel removes
//! it when our socket closes. Settings that it changed stay after a kill -9: the kernel does not
//! give a setting an owner.
//!
//! The table has one chain without a hook and in it one rule that loads `ct state`: nft_ct's init
//! calls nf_ct_netns_get, which switches tracking on for IPv4 and IPv6, and as no packet ever comes
//! to the chain, it costs nothing beyond tracking itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Error;
use super::conntrack::Control;
use super::host::setting_path;
use super::netlink::Raw;
use crate::ctnetlink::request::{Header, Writer, message_type};
use crate::ctnetlink::uapi::family::{AF_UNSPEC, NFPROTO_INET};
use crate::ctnetlink::uapi::netlink::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST,
};
use crate::ctnetlink::uapi::nfnetlink::{
    NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_SUBSYS_NFTABLES,
};

/// `linux/netfilter/nf_tables.h`: what is needed of it.
mod nft {
    pub(super) const NFT_MSG_NEWTABLE: u8 = 0;
    pub(super) const NFT_MSG_NEWCHAIN: u8 = 3;
    pub(super) const NFT_MSG_NEWRULE: u8 = 6;

    pub(super) const NFTA_TABLE_NAME: u16 = 1;
    pub(super) const NFTA_TABLE_FLAGS: u16 = 2;
    pub(super) const NFT_TABLE_F_OWNER: u32 = 2;

    pub(super) const NFTA_CHAIN_TABLE: u16 = 1;
    pub(super) const NFTA_CHAIN_NAME: u16 = 3;

    pub(super) const NFTA_RULE_TABLE: u16 = 1;
    pub(super) const NFTA_RULE_CHAIN: u16 = 2;
    pub(super) const NFTA_RULE_EXPRESSIONS: u16 = 4;
    pub(super) const NFTA_LIST_ELEM: u16 = 1;
    pub(super) const NFTA_EXPR_NAME: u16 = 1;
    pub(super) const NFTA_EXPR_DATA: u16 = 2;

    pub(super) const NFTA_CT_DREG: u16 = 1;
    pub(super) const NFTA_CT_KEY: u16 = 2;
    pub(super) const NFT_REG_1: u32 = 1;
    pub(super) const NFT_CT_STATE: u32 = 0;
}

const DOING: &str = "switching tracking on";

const NO_OWNER: &str = "nf_tables with NFT_TABLE_F_OWNER (Linux 5.12 and later), which \
    enable_tracking needs; do it by hand instead: nft 'table inet track { chain on { ct state new; }; }'";

const NO_NFT_CT: &str = "nf_tables' ct expression (nft_ct), which enable_tracking needs; do it by \
    hand instead: iptables -t raw -A PREROUTING -m conntrack --ctstate NEW, and ip6tables the same";

/// What records need to carry all that they can. `nf_conntrack_events` 2 (automatic) becomes 1: a
/// flow born while we are not listening shall end with an event too.
const SETTINGS: [&str; 3] = ["nf_conntrack_acct", "nf_conntrack_timestamp", "nf_conntrack_events"];

/// Tracking is on while this lives.
#[derive(Debug)]
pub struct Tracking {
    table: String,
    /// Owns the table. Taken out by [`Tracking::undo`] and drop only.
    owner: Option<Control>,
    changed: Vec<Changed>,
    unchanged: Vec<Error>,
}

/// Switches tracking on, and accounting, timestamps and events where they are off. A setting that
/// cannot be written (the read-only /proc/sys of a container) stops nothing: tracking is what was
/// asked for, [`Tracking::unchanged`] says it, and [`findings`](super::findings()) what it means.
pub async fn enable_tracking() -> Result<Tracking, Error> {
    let mut tracking =
        Tracking { table: table_name(), owner: None, changed: Vec::new(), unchanged: Vec::new() };
    let mut owner = Control::connect()?;
    // The table first: it is what makes the kernel load the modules that bring the settings.
    install(&mut owner, &tracking.table).await?;
    tracking.owner = Some(owner);
    for name in SETTINGS {
        match switch_on(name) {
            Ok(changed) => tracking.changed.extend(changed),
            Err(error) => tracking.unchanged.push(error),
        }
    }
    Ok(tracking)
}

impl Tracking {
    /// The nf_tables table, of family inet.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// The settings that were changed, with their values before.
    pub fn changed(&self) -> impl Iterator<Item = (&'static str, u8)> {
        self.changed.iter().map(|changed| (changed.name, changed.before))
    }

    /// Why settings could not be changed.
    pub fn unchanged(&self) -> &[Error] {
        &self.unchanged
    }

    /// Takes everything back and says what did not work; drop can only log it.
    pub fn undo(mut self) -> Result<(), Error> {
        self.take_back()
    }

    fn take_back(&mut self) -> Result<(), Error> {
        // Closing the socket removes the table: nft_rcv_nl_event, before close() returns.
        self.owner = None;
        let mut first_error = Ok(());
        for changed in self.changed.drain(..) {
            first_error = first_error.and(changed.restore());
        }
        first_error
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        if let Err(error) = self.take_back() {
            tracing::warn!(%error, "a setting was not restored");
        }
    }
}

/// A setting that we changed. Its file stays open: it belongs to the namespace where it was opened,
/// whichever thread restores it.
#[derive(Debug)]
struct Changed {
    name: &'static str,
    file: File,
    before: u8,
}

/// The value of a setting that is on.
const ON: u8 = b'1';

/// Sets it to 1 unless it is 1 already or this kernel does not have it.
fn switch_on(name: &'static str) -> Result<Option<Changed>, Error> {
    let path = setting_path(name);
    let failed = |source| Error::Setting { path: path.clone(), source };
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let before = read_digit(&file).map_err(failed)?;
    if before == ON {
        return Ok(None);
    }
    file.write_all_at(&[ON], 0).map_err(failed)?;
    Ok(Some(Changed { name, file, before: before - b'0' }))
}

impl Changed {
    /// Unless somebody else has set it since: then it is theirs.
    fn restore(self) -> Result<(), Error> {
        let done = read_digit(&self.file).and_then(|now| {
            if now == ON { self.file.write_all_at(&[b'0' + self.before], 0) } else { Ok(()) }
        });
        done.map_err(|source| Error::Setting { path: setting_path(self.name), source })
    }
}

/// All of [`SETTINGS`] have one digit.
fn read_digit(file: &File) -> io::Result<u8> {
    let mut digit = [0];
    file.read_exact_at(&mut digit, 0)?;
    if digit[0].is_ascii_digit() { Ok(digit[0]) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Unique, because the agent of another container may share this network namespace and have the
/// same pid in its own pid namespace.
fn table_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("conntrail_{}_{:x}", std::process::id(), now.as_nanos() as u64 & 0xffff_ffff)
}

async fn install(owner: &mut Control, table: &str) -> Result<(), Error> {
    let begin = marker(NFNL_MSG_BATCH_BEGIN);
    let end = marker(NFNL_MSG_BATCH_END);
    let requests = vec![new_table(table), new_chain(table), new_rule(table)];
    let round = owner.link().ask_batch(DOING, begin, requests, end)?;
    round.acknowledged().await.map_err(|error| match error {
        // Kernels before 5.12 say EINVAL, and EOPNOTSUPP is also what one without nf_tables says.
        Error::Missing { source, .. } => Error::Missing { doing: DOING, what: NO_OWNER, source },
        Error::Refused { source, .. } => match source.raw_os_error() {
            Some(libc::EINVAL) => Error::Missing { doing: DOING, what: NO_OWNER, source },
            Some(libc::ENOENT) => Error::Missing { doing: DOING, what: NO_NFT_CT, source },
            _ => Error::Refused { doing: DOING, source },
        },
        other => other,
    })
}

fn marker(message_type: u16) -> Raw {
    let mut writer = Writer::new();
    writer.message(Header {
        message_type,
        flags: NLM_F_REQUEST,
        seq: 0,
        family: AF_UNSPEC,
        res_id: NFNL_SUBSYS_NFTABLES.into(),
    });
    Raw::new(writer.finish())
}

/// Each message of a batch goes to netlink-proto on its own, which gives it its number.
fn request(command: u8, flags: u16, attributes: impl FnOnce(&mut Writer)) -> Raw {
    let mut writer = Writer::new();
    writer.message(Header {
        message_type: message_type(NFNL_SUBSYS_NFTABLES, command),
        flags: NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | flags,
        seq: 0,
        family: NFPROTO_INET,
        res_id: 0,
    });
    attributes(&mut writer);
    Raw::new(writer.finish())
}

const CHAIN: &[u8] = b"on";

fn new_table(table: &str) -> Raw {
    request(nft::NFT_MSG_NEWTABLE, NLM_F_EXCL, |w| {
        w.text(nft::NFTA_TABLE_NAME, table.as_bytes());
        w.be32(nft::NFTA_TABLE_FLAGS, nft::NFT_TABLE_F_OWNER);
    })
}

fn new_chain(table: &str) -> Raw {
    request(nft::NFT_MSG_NEWCHAIN, 0, |w| {
        w.text(nft::NFTA_CHAIN_TABLE, table.as_bytes());
        w.text(nft::NFTA_CHAIN_NAME, CHAIN);
    })
}

fn new_rule(table: &str) -> Raw {
    request(nft::NFT_MSG_NEWRULE, NLM_F_APPEND, |w| {
        w.text(nft::NFTA_RULE_TABLE, table.as_bytes());
        w.text(nft::NFTA_RULE_CHAIN, CHAIN);
        w.nest(nft::NFTA_RULE_EXPRESSIONS, |w| {
            w.nest(nft::NFTA_LIST_ELEM, |w| {
                w.text(nft::NFTA_EXPR_NAME, b"ct");
                w.nest(nft::NFTA_EXPR_DATA, |w| {
                    w.be32(nft::NFTA_CT_DREG, nft::NFT_REG_1);
                    w.be32(nft::NFTA_CT_KEY, nft::NFT_CT_STATE);
                });
            });
        });
    })
}
