//! Network namespaces for the lab: made with a name of their own, removed on drop.
//!
//! Never touches an interface, rule or setting outside the namespaces it made.

use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use super::Result;

/// Starts the name of each namespace; the pid follows.
const PREFIX: &str = "conntrail-lab-";

/// Distinguishes the namespaces of one process; the pid distinguishes processes.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A network namespace that lives as long as this value.
#[derive(Debug)]
pub(crate) struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// A new namespace with loopback up. `role` is for people who read `ip netns list`.
    pub(crate) fn new(role: &str) -> Result<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{role}", std::process::id());
        output(Command::new("ip").args(["netns", "add", &name]))?;
        let file = match File::open(format!("/run/netns/{name}")) {
            Ok(file) => file,
            Err(error) => {
                output(Command::new("ip").args(["netns", "del", &name]))?;
                return Err(error.into());
            }
        };
        let netns = Self { name, file };
        // Else a link's own addresses are unusable for a second or two, first packets are sent
        // again, and counters are not what the plan says.
        netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` with the calling thread inside the namespace, and returns to where it was, also
    /// after a panic. Sockets opened there stay in the namespace wherever they are used later.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        let home = File::open("/proc/thread-self/ns/net").expect("a thread has a namespace");
        enter(&self.file);
        let _return = Return { home };
        work()
    }

    /// Starts a program inside the namespace: a child has the namespace of the thread that made
    /// it.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.run(|| command.spawn())
            .map_err(|error| format!("{:?}: {error}", command.get_program()).into())
    }

    /// Runs a program inside the namespace to its end; its standard output, or its complaint.
    pub(crate) fn output(&self, command: &mut Command) -> Result<String> {
        self.run(|| output(command))
    }

    /// `ip` inside the namespace, with the words of `arguments`.
    pub(crate) fn ip(&self, arguments: &str) -> Result<String> {
        self.output(Command::new("ip").args(arguments.split_whitespace()))
    }

    /// Applies a ruleset in nft's language.
    pub(crate) fn nft(&self, ruleset: &str) -> Result<()> {
        self.output(Command::new("nft").arg(ruleset)).map(drop)
    }

    /// Sets `/proc/sys/net/…` of this namespace; `name` as in `netfilter/nf_conntrack_acct`.
    pub(crate) fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        // `/proc/sys/net` shows the namespace of the thread that opens it.
        self.run(|| fs::write(format!("/proc/sys/net/{name}"), value))
            .map_err(|error| format!("net/{name} = {value}: {error}").into())
    }

    pub(crate) fn read_sysctl(&self, name: &str) -> Result<String> {
        let text = self
            .run(|| fs::read_to_string(format!("/proc/sys/net/{name}")))
            .map_err(|error| format!("net/{name}: {error}"))?;
        Ok(text.trim().to_owned())
    }

    /// `nf_conntrack_events`, `_acct` and `_timestamp`: what an event of this namespace carries.
    pub(crate) fn conntrack_settings(&self, events: u8, acct: bool, timestamp: bool) -> Result<()> {
        self.sysctl("netfilter/nf_conntrack_events", &events.to_string())?;
        self.sysctl("netfilter/nf_conntrack_acct", &u8::from(acct).to_string())?;
        self.sysctl("netfilter/nf_conntrack_timestamp", &u8::from(timestamp).to_string())
    }

    /// Number of entries in this namespace's table.
    pub(crate) fn conntrack_count(&self) -> Result<u64> {
        Ok(self.read_sysctl("netfilter/nf_conntrack_count")?.parse()?)
    }

    /// Adds a table with a `ct state` rule, without which the kernel tracks nothing here. The
    /// `ct label` rule makes it allocate room for labels in each entry.
    pub(crate) fn enable_tracking(&self) -> Result<()> {
        self.nft(&format!(
            "table inet conntrail_lab_{} {{
                chain pre {{
                    type filter hook prerouting priority filter; policy accept;
                    ct state new counter
                    ct label 1 counter
                }}
                chain out {{
                    type filter hook output priority filter; policy accept;
                    ct state new counter
                }}
            }}",
            std::process::id()
        ))
    }

    /// Connects two namespaces by a veth pair with a /24 and a /64. No duplicate address
    /// detection: the addresses can be used at once.
    pub(crate) fn connect(left: &End<'_>, right: &End<'_>) -> Result<()> {
        left.netns.ip(&format!(
            "link add name {} type veth peer name {} netns {}",
            left.interface, right.interface, right.netns.name
        ))?;
        for end in [left, right] {
            let End { netns, interface, v4, v6 } = end;
            netns.ip(&format!("address add {v4}/24 dev {interface}"))?;
            netns.ip(&format!("-6 address add {v6}/64 dev {interface} nodad"))?;
            netns.ip(&format!("link set {interface} up"))?;
        }
        Ok(())
    }

    /// Sends everything unknown to these routers.
    pub(crate) fn default_route(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
        self.ip(&format!("route add default via {v4}"))?;
        self.ip(&format!("-6 route add default via {v6}")).map(drop)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A panic here would abort a test that is already unwinding, so complain only.
        if let Err(error) = output(Command::new("ip").args(["netns", "del", &self.name])) {
            eprintln!("namespace {} was not removed: {error}", self.name);
        }
    }
}

/// Removes namespaces of lab programs that were killed before they could do it themselves. Gives
/// their names.
pub(crate) fn remove_abandoned() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir("/run/netns")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            output(Command::new("ip").args(["netns", "del", &name]))?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Takes the thread back to its namespace.
struct Return {
    home: File,
}

impl Drop for Return {
    fn drop(&mut self) {
        enter(&self.home);
    }
}

fn enter(namespace: &File) {
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .expect("a namespace exists while its file is open, and the lab is root");
}

/// One end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End<'a> {
    pub(crate) netns: &'a Netns,
    pub(crate) interface: &'a str,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if !done.status.success() {
        let complaint = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{command:?}: {}: {}", done.status, complaint.trim()).into());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::need;

    #[test]
    fn a_panic_inside_returns_the_thread_and_removes_the_namespace() {
        if need::lacks_root() {
            return;
        }
        let here = || fs::read_link("/proc/thread-self/ns/net").expect("a link");
        let (home, back) = (here(), here());
        let netns = Netns::new("panic").expect("a namespace");
        let path = Path::new("/run/netns").join(netns.name());
        assert!(path.exists());
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            netns.run(|| {
                assert_ne!(here(), home);
                panic!("as a failing test does");
            })
        }));
        assert!(caught.is_err());
        assert!(!path.exists());
        assert_eq!(here(), back);
    }
}
