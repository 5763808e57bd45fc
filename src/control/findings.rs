//! What the state of a host means for records: facts in, sentences and commands out.
//!
//! Pure: no I/O. Promises one finding for each thing that a host lacks, in plain words, with the
//! command that mends it and how to keep it.

use std::fmt;

use super::host::{Access, Facts, Tracked};

/// The table is nearly full at this share: new connections may soon be refused.
const NEARLY_FULL_PERCENT: u64 = 90;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Records are as they should be, but something is worth knowing.
    Notice,
    /// Records will be missing or lack fields.
    Warning,
    /// No records at all.
    Fatal,
}

/// Which finding, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    NotPrivileged,
    NoNetfilter,
    NoCtnetlink,
    NoEvents,
    AccessFailed,
    TrackingOff,
    TrackingOnlyIpv4,
    TrackingOnlyIpv6,
    TrackingUnknown,
    EventsOff,
    EventsAutomatic,
    AcctOff,
    TimestampOff,
    TimestampMissing,
    TableNearlyFull,
}

impl Code {
    pub fn name(self) -> &'static str {
        match self {
            Code::NotPrivileged => "not_privileged",
            Code::NoNetfilter => "no_netfilter",
            Code::NoCtnetlink => "no_ctnetlink",
            Code::NoEvents => "no_events",
            Code::AccessFailed => "access_failed",
            Code::TrackingOff => "tracking_off",
            Code::TrackingOnlyIpv4 => "tracking_only_ipv4",
            Code::TrackingOnlyIpv6 => "tracking_only_ipv6",
            Code::TrackingUnknown => "tracking_unknown",
            Code::EventsOff => "events_off",
            Code::EventsAutomatic => "events_automatic",
            Code::AcctOff => "acct_off",
            Code::TimestampOff => "timestamp_off",
            Code::TimestampMissing => "timestamp_missing",
            Code::TableNearlyFull => "table_nearly_full",
        }
    }

    /// The exit code of a program that cannot go on because of it (`sysexits.h`).
    pub fn exit_code(self) -> Option<u8> {
        match self {
            Code::NotPrivileged => Some(77),
            Code::NoNetfilter | Code::NoCtnetlink | Code::NoEvents => Some(69),
            Code::AccessFailed => Some(1),
            _ => None,
        }
    }
}

/// How to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// The exact command, for root's shell.
    pub command: String,
    /// What keeps it so after a reboot, or instead of the command.
    pub keep: Option<String>,
}

/// One thing that the host lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub code: Code,
    /// A plain sentence.
    pub message: String,
    pub remedy: Option<Remedy>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let Some(remedy) = &self.remedy else { return Ok(()) };
        write!(f, " Mend it: {}", remedy.command)?;
        match &remedy.keep {
            Some(keep) => write!(f, " (to keep it: {keep})"),
            None => Ok(()),
        }
    }
}

/// What `facts` mean, the worst first.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    match access(&facts.access) {
        // Without access the rest is unknown: a host without privilege is not a host without
        // tracking.
        Some(fatal) => found.push(fatal),
        None if facts.limit.is_some() && facts.events.is_none() => found.push(no_events()),
        None => {
            found.extend(tracking(&facts.tracked_v4, &facts.tracked_v6, facts.entries));
            found.extend(events(facts));
        }
    }
    found.extend(settings(facts));
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found
}

fn access(access: &Access) -> Option<Finding> {
    let (code, message, remedy) = match access {
        Access::Granted => return None,
        Access::Denied => (
            Code::NotPrivileged,
            "This process may not ask the kernel about conntrack: it needs CAP_NET_ADMIN in the \
             user namespace that owns this network namespace."
                .to_owned(),
            Remedy {
                command: "sudo conntrail run".to_owned(),
                keep: Some("AmbientCapabilities=CAP_NET_ADMIN in the systemd unit".to_owned()),
            },
        ),
        Access::NoNetfilter => (
            Code::NoNetfilter,
            "This kernel has no netfilter netlink (nfnetlink), or this process may not use \
             netlink sockets (systemd's RestrictAddressFamilies needs AF_NETLINK)."
                .to_owned(),
            load("nfnetlink"),
        ),
        Access::NoCtnetlink => (
            Code::NoCtnetlink,
            "This kernel does not tell about conntrack over netlink: nf_conntrack_netlink is not \
             loaded."
                .to_owned(),
            load("nf_conntrack_netlink"),
        ),
        Access::Failed(why) => {
            return Some(Finding {
                severity: Severity::Fatal,
                code: Code::AccessFailed,
                message: format!("The kernel could not be asked about conntrack: {why}."),
                remedy: None,
            });
        }
    };
    Some(Finding { severity: Severity::Fatal, code, message, remedy: Some(remedy) })
}

fn load(module: &str) -> Remedy {
    Remedy {
        command: format!("modprobe {module}"),
        keep: Some(format!("echo {module} >> /etc/modules-load.d/conntrail.conf")),
    }
}

fn no_events() -> Finding {
    Finding {
        severity: Severity::Fatal,
        code: Code::NoEvents,
        message: "This kernel was built without conntrack events (CONFIG_NF_CONNTRACK_EVENTS)."
            .to_owned(),
        remedy: None,
    }
}

/// Entries in the table prove that something tracks, or did until a moment ago, even where the
/// probe over loopback failed: rules often exempt loopback (`notrack`) or give it a zone.
fn tracking(v4: &Tracked, v6: &Tracked, entries: Option<u64>) -> Option<Finding> {
    let finding = |severity, code, message: &str, remedy| {
        Some(Finding { severity, code, message: message.to_owned(), remedy })
    };
    match (v4, v6) {
        (Tracked::Yes, Tracked::Yes | Tracked::Unknown(_)) => None,
        (Tracked::Unknown(_), Tracked::Yes) => None,
        (Tracked::Yes, Tracked::No) => finding(
            Severity::Notice,
            Code::TrackingOnlyIpv4,
            "Only IPv4 seems to be tracked here: an IPv6 flow over loopback is not.",
            Some(switch_on()),
        ),
        (Tracked::No, Tracked::Yes) => finding(
            Severity::Notice,
            Code::TrackingOnlyIpv6,
            "Only IPv6 seems to be tracked here: an IPv4 flow over loopback is not.",
            Some(switch_on()),
        ),
        _ if entries.is_some_and(|entries| entries > 0) => None,
        (Tracked::Unknown(why), _) | (_, Tracked::Unknown(why))
            if *v4 != Tracked::No && *v6 != Tracked::No =>
        {
            finding(
                Severity::Notice,
                Code::TrackingUnknown,
                &format!(
                    "Whether anything uses conntrack in this network namespace could not be \
                     tried: {why}. The table is empty."
                ),
                Some(switch_on()),
            )
        }
        _ => finding(
            Severity::Warning,
            Code::TrackingOff,
            "Nothing seems to use conntrack in this network namespace: a flow over loopback is not \
             tracked and the table is empty. Without a rule that needs it, the kernel tracks no \
             flow and there will be no records.",
            Some(switch_on()),
        ),
    }
}

/// A chain without a hook is enough: the rule alone makes the kernel track.
fn switch_on() -> Remedy {
    Remedy {
        command: "nft 'table inet track { chain on { ct state new; }; }'".to_owned(),
        keep: Some(
            "enable_tracking = true under [capture] in conntrail.toml, which does it while the \
             agent runs; or the same table in /etc/nftables.conf"
                .to_owned(),
        ),
    }
}

fn events(facts: &Facts) -> Option<Finding> {
    match (facts.events?, facts.entries) {
        (0, _) => Some(Finding {
            severity: Severity::Fatal,
            code: Code::EventsOff,
            message: "Conntrack events are switched off (nf_conntrack_events = 0): no flow is \
                      reported, and nothing counts what is missed."
                .to_owned(),
            remedy: Some(set("nf_conntrack_events", "1")),
        }),
        (2, Some(entries)) if entries > 0 => Some(Finding {
            severity: Severity::Warning,
            code: Code::EventsAutomatic,
            message: format!(
                "nf_conntrack_events is 2 (automatic): flows that began while nobody listened \
                 end without an event. {entries} flows are older than this agent."
            ),
            remedy: Some(set("nf_conntrack_events", "1")),
        }),
        _ => None,
    }
}

fn settings(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    if facts.acct == Some(0) {
        found.push(Finding {
            severity: Severity::Warning,
            code: Code::AcctOff,
            message: "Accounting is off (nf_conntrack_acct = 0): records carry no packets and \
                      bytes. It works for flows that begin after it is on."
                .to_owned(),
            remedy: Some(set("nf_conntrack_acct", "1")),
        });
    }
    match facts.timestamp {
        Some(0) => found.push(Finding {
            severity: Severity::Warning,
            code: Code::TimestampOff,
            message: "Timestamps are off (nf_conntrack_timestamp = 0): records carry no start \
                      and end. It works for flows that begin after it is on."
                .to_owned(),
            remedy: Some(set("nf_conntrack_timestamp", "1")),
        }),
        // The other settings exist, so this one is missing from the kernel's build.
        None if facts.limit.is_some() && facts.acct.is_some() => found.push(Finding {
            severity: Severity::Notice,
            code: Code::TimestampMissing,
            message: "This kernel was built without conntrack timestamps \
                      (CONFIG_NF_CONNTRACK_TIMESTAMP): records carry no start and end."
                .to_owned(),
            remedy: None,
        }),
        _ => {}
    }
    found.extend(nearly_full(facts));
    found
}

fn nearly_full(facts: &Facts) -> Option<Finding> {
    let (entries, limit) = (facts.entries?, facts.limit?);
    // nf_conntrack_max = 0 is no limit.
    if limit == 0 || entries * 100 < limit * NEARLY_FULL_PERCENT {
        return None;
    }
    Some(Finding {
        severity: Severity::Warning,
        code: Code::TableNearlyFull,
        message: format!(
            "The conntrack table is nearly full: {entries} of {limit} entries. When it is full, \
             the kernel drops new connections; and this agent must give up reliable delivery \
             before that. The limit can be set in the initial network namespace only."
        ),
        remedy: Some(set("nf_conntrack_max", &(limit * 2).to_string())),
    })
}

fn set(name: &str, value: &str) -> Remedy {
    Remedy {
        command: format!("sysctl -w net.netfilter.{name}={value}"),
        // systemd-sysctl runs once, early: what a module brings later stays at its default.
        keep: Some(format!(
            "echo 'net.netfilter.{name} = {value}' >> /etc/sysctl.d/60-conntrail.conf, and \
             nf_conntrack in /etc/modules-load.d/conntrail.conf, so that the setting exists when \
             it is applied at boot"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host where all is well.
    fn well() -> Facts {
        Facts {
            access: Access::Granted,
            events: Some(1),
            acct: Some(1),
            timestamp: Some(1),
            limit: Some(1000),
            entries: Some(10),
            tracked_v4: Tracked::Yes,
            tracked_v6: Tracked::Yes,
        }
    }

    fn unknown() -> Tracked {
        Tracked::Unknown("lo is down".to_owned())
    }

    #[test]
    fn each_lack_has_its_finding_and_nothing_else_is_said() {
        use Code::*;
        let bare = |access| Facts {
            access,
            events: None,
            acct: None,
            timestamp: None,
            limit: None,
            entries: None,
            tracked_v4: unknown(),
            tracked_v6: unknown(),
        };
        let idle = || Facts {
            entries: Some(0),
            tracked_v4: Tracked::No,
            tracked_v6: Tracked::No,
            ..well()
        };
        let table: Vec<(&str, Facts, Vec<Code>)> = vec![
            ("all is well", well(), vec![]),
            ("no privilege", bare(Access::Denied), vec![NotPrivileged]),
            (
                "no privilege, acct off",
                Facts { access: Access::Denied, acct: Some(0), ..well() },
                vec![NotPrivileged, AcctOff],
            ),
            ("no nfnetlink", bare(Access::NoNetfilter), vec![NoNetfilter]),
            ("no ctnetlink", bare(Access::NoCtnetlink), vec![NoCtnetlink]),
            ("broken", bare(Access::Failed("why".into())), vec![AccessFailed]),
            ("no CONFIG_NF_CONNTRACK_EVENTS", Facts { events: None, ..well() }, vec![NoEvents]),
            ("idle", idle(), vec![TrackingOff]),
            ("idle, IPv6 not there", Facts { tracked_v6: unknown(), ..idle() }, vec![TrackingOff]),
            ("idle, IPv4 not there", Facts { tracked_v4: unknown(), ..idle() }, vec![TrackingOff]),
            ("loopback exempt", Facts { entries: Some(3), ..idle() }, vec![]),
            (
                "lo down, table empty",
                Facts { tracked_v4: unknown(), tracked_v6: unknown(), ..idle() },
                vec![TrackingUnknown],
            ),
            (
                "lo down, entries there",
                Facts { tracked_v4: unknown(), tracked_v6: unknown(), ..well() },
                vec![],
            ),
            ("IPv4 only", Facts { tracked_v6: Tracked::No, ..well() }, vec![TrackingOnlyIpv4]),
            ("IPv6 only", Facts { tracked_v4: Tracked::No, ..well() }, vec![TrackingOnlyIpv6]),
            ("no IPv6 on this host", Facts { tracked_v6: unknown(), ..well() }, vec![]),
            ("events off", Facts { events: Some(0), ..well() }, vec![EventsOff]),
            (
                "events automatic, older flows",
                Facts { events: Some(2), ..well() },
                vec![EventsAutomatic],
            ),
            (
                "events automatic, no older flows",
                Facts { events: Some(2), entries: Some(0), ..well() },
                vec![],
            ),
            ("acct off", Facts { acct: Some(0), ..well() }, vec![AcctOff]),
            ("timestamp off", Facts { timestamp: Some(0), ..well() }, vec![TimestampOff]),
            (
                "no CONFIG_NF_CONNTRACK_TIMESTAMP",
                Facts { timestamp: None, ..well() },
                vec![TimestampMissing],
            ),
            ("not quite full", Facts { entries: Some(899), ..well() }, vec![]),
            ("nearly full", Facts { entries: Some(900), ..well() }, vec![TableNearlyFull]),
            ("no limit", Facts { limit: Some(0), ..well() }, vec![]),
            (
                "defaults of a fresh host",
                Facts { events: Some(2), acct: Some(0), timestamp: Some(0), ..idle() },
                vec![TrackingOff, AcctOff, TimestampOff],
            ),
            (
                "the worst first",
                Facts { events: Some(0), acct: Some(0), tracked_v6: Tracked::No, ..well() },
                vec![EventsOff, AcctOff, TrackingOnlyIpv4],
            ),
        ];
        for (case, facts, expected) in table {
            let found = findings(&facts);
            let codes: Vec<Code> = found.iter().map(|finding| finding.code).collect();
            assert_eq!(codes, expected, "{case}");
            for finding in &found {
                assert!(finding.message.ends_with('.'), "{case}: {finding}");
            }
        }
    }

    #[test]
    fn a_remedy_is_the_exact_command() {
        let remedy = |facts: &Facts| findings(facts)[0].remedy.clone().unwrap().command;
        assert_eq!(
            remedy(&Facts { acct: Some(0), ..well() }),
            "sysctl -w net.netfilter.nf_conntrack_acct=1"
        );
        assert_eq!(
            remedy(&Facts { entries: Some(990), ..well() }),
            "sysctl -w net.netfilter.nf_conntrack_max=2000"
        );
        assert_eq!(
            remedy(&Facts { access: Access::NoCtnetlink, ..well() }),
            "modprobe nf_conntrack_netlink"
        );
    }

    #[test]
    fn only_what_ends_a_program_has_an_exit_code() {
        let table = [
            (Code::NotPrivileged, Some(77)),
            (Code::NoCtnetlink, Some(69)),
            (Code::NoNetfilter, Some(69)),
            (Code::NoEvents, Some(69)),
            (Code::TrackingOff, None),
            (Code::EventsOff, None),
        ];
        for (code, expected) in table {
            assert_eq!(code.exit_code(), expected, "{}", code.name());
        }
    }
}
