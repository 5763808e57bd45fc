//! What the host lacks, said by the real program: with which code it ends, and what it says once.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::flows::udp;
use super::{
    PATIENCE, PROGRAM, STOP_LIMIT, TO_FILE, can_run, end_well, finish, of_event, start,
    tracking_netns, wait_until,
};
use crate::lab::agent::{self, AgentProcess};
use crate::lab::limit::HostLimit;
use crate::lab::netns::Netns;

/// Runs a program of `words` to its end, in a namespace of its own.
fn ends(netns: &Netns, words: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env_remove("CONNTRAIL_LOG").stdin(Stdio::null());
    let Output { status, stderr, .. } = netns.run(|| command.output()).expect("it starts");
    (status.code(), String::from_utf8(stderr).expect("text"))
}

#[test]
fn a_command_line_or_configuration_that_is_wrong_ends_it_before_anything_is_opened() {
    if !can_run("wrong input", &["ip"]) {
        return;
    }
    let netns = Netns::new("wrong").expect("a namespace");
    let (code, said) = ends(&netns, &[PROGRAM, "run", "--fast"]);
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("--fast"), "{said}");

    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("c.toml");
    let out = dir.path().join("flows.json");
    let text = format!(
        "[capture]\nevents = [\"birth\"]\n[spool]\nmax_size = \"all\"\n[filter]\nports = [70000]\n\
         [[sink]]\ntype = \"file\"\npath = {out:?}\ncolour = \"red\"\n"
    );
    fs::write(&path, text).expect("written");
    let (code, said) = ends(&netns, &[PROGRAM, "run", "--config", &path.display().to_string()]);
    assert_eq!(code, Some(78), "{said}");
    for (line, word) in [(2, "birth"), (4, "all"), (6, "70000"), (10, "colour")] {
        let place = format!("{}:{line}:", path.display());
        let found = said.lines().any(|said| said.starts_with(&place) && said.contains(word));
        assert!(found, "line {line}, {word}: {said}");
    }
    assert!(said.contains("4 errors in"), "{said}");
    assert!(!out.exists());
}

#[test]
fn without_privilege_it_says_which_one_and_ends_with_77() {
    if !can_run("missing privilege", &["ip", "setpriv"]) {
        return;
    }
    let netns = Netns::new("weak").expect("a namespace");
    // Still root by name: it is the capability that counts.
    let drop = ["--bounding-set=-net_admin", "--inh-caps=-net_admin"];
    let (code, said) = ends(&netns, &["setpriv", drop[0], drop[1], "--", PROGRAM, "run"]);
    assert_eq!(code, Some(77), "{said}");
    assert!(said.contains("CAP_NET_ADMIN") && said.contains("Mend it: "), "{said}");
    assert_eq!(said.matches("CAP_NET_ADMIN in the user namespace").count(), 1, "once: {said}");
}

#[test]
fn without_nfnetlink_it_says_what_to_load_and_ends_with_69() {
    if !can_run("a kernel without nfnetlink", &["ip", "strace"]) {
        return;
    }
    let netns = Netns::new("bare").expect("a namespace");
    let strace = |inject: &str| {
        // What is traced goes nowhere.
        let words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject, PROGRAM, "run"];
        ends(&netns, &words)
    };
    // What socket(2) says where AF_NETLINK has no NETLINK_NETFILTER.
    let (code, said) = strace("inject=socket:error=EPROTONOSUPPORT");
    assert_eq!(code, Some(69), "{said}");
    assert!(said.contains("nfnetlink") && said.contains("modprobe nfnetlink"), "{said}");
}

#[test]
fn settings_that_are_off_are_said_once_each_with_the_command_that_works() {
    if !can_run("settings", &["ip", "nft", "sysctl", "conntrack"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("settings");
    netns.conntrack_settings(0, false, false).expect("settings");
    let mut process = start(&netns, TO_FILE);
    let log = process.stderr().expect("a log");
    let commands: Vec<String> = ["events", "acct", "timestamp"]
        .map(|name| {
            let command = format!("sysctl -w net.netfilter.nf_conntrack_{name}=1");
            assert_eq!(log.matches(&format!("Mend it: {command}")).count(), 1, "{name}: {log}");
            assert_eq!(log.matches(&format!("(nf_conntrack_{name} = 0)")).count(), 1, "{log}");
            command
        })
        .into();
    // It goes on: records come as soon as there are events, with what is on by then.
    udp(&netns, "127.0.0.1");
    for command in &commands {
        netns.output(Command::new("sh").args(["-c", command])).expect("the command works");
    }
    let port = udp(&netns, "127.0.0.1");
    netns.output(Command::new("conntrack").arg("-F")).expect("a flush");
    wait_until("its end", || super::has_lines(&process, "\"event\":\"destroy\"", 1));
    let counters = end_well(&mut process);
    let records = crate::lab::records::read(&process.path("flows.json")).expect("whole lines");
    counters.balance(2);
    let end = of_event(&records, "destroy").find(|end| end["src_port"] == port).expect("one");
    assert!(end["orig_bytes"].is_u64() && end["start"].is_string(), "{end}");
    assert_eq!(of_event(&records, "new").count(), 1, "the first one had no events: {records:?}");
}

/// Flows that began while nobody listened end without an event, unless events are on for good.
#[test]
fn flows_that_are_older_than_automatic_events_are_said() {
    if !can_run("automatic events", &["ip", "nft"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("auto");
    netns.conntrack_settings(2, true, true).expect("settings");
    udp(&netns, "127.0.0.1");
    let process = start(&netns, TO_FILE);
    let log = process.stderr().expect("a log");
    let said = "nf_conntrack_events is 2 (automatic)";
    assert_eq!(log.matches(said).count(), 1, "{log}");
    assert!(log.contains("1 flows are older than this agent"), "{log}");
    assert!(log.contains("Mend it: sysctl -w net.netfilter.nf_conntrack_events=1"), "{log}");
    let records = finish(process);
    assert_eq!(of_event(&records, "snapshot").count(), 1, "it is recorded as it is: {records:?}");
}

#[test]
fn a_host_that_lacks_nothing_is_not_told_anything() {
    if !can_run("a host that lacks nothing", &["ip", "nft"]) {
        return;
    }
    let netns = tracking_netns("well");
    let process = start(&netns, TO_FILE);
    let log = process.stderr().expect("a log");
    assert!(!log.contains("Mend it") && !log.contains("WARN"), "{log}");
    assert_eq!(finish(process).len(), 2);
}

/// In a user namespace of its own it has CAP_NET_ADMIN over its network namespace, but
/// SO_RCVBUFFORCE asks for the initial one's.
#[test]
fn a_receive_buffer_that_was_capped_is_said_with_advice() {
    if !can_run("a capped buffer", &["unshare", "ip", "nft"]) {
        return;
    }
    let probe = Command::new("unshare").args(["-Urn", "true"]).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("skipped: a capped buffer needs user namespaces");
        return;
    }
    let netns = Netns::new("user").expect("a namespace");
    let mut process = AgentProcess::start_with(&netns, agent::Output::Kept, |dir| {
        let config = TO_FILE.replace("{dir}", &dir.display().to_string());
        fs::write(dir.join("c.toml"), config)?;
        let mut command = Command::new("unshare");
        let script = "ip link set lo up && \
                      nft 'table inet t { chain on { ct state new; }; }' && \
                      exec \"$0\" run --config \"$1\"";
        command.args(["-Urn", "sh", "-c", script, PROGRAM]).arg(dir.join("c.toml"));
        Ok(command)
    })
    .expect("unshare starts");
    process.wait_ready(PATIENCE).expect("ready");
    let max = fs::read_to_string("/proc/sys/net/core/rmem_max").expect("a setting");
    let max: u64 = max.trim().parse().expect("a number");
    let log = process.stderr().expect("a log");
    if max >= 64 << 20 {
        assert!(!log.contains("receive buffer"), "nothing is capped here: {log}");
    } else {
        let said = "the kernel gave a receive buffer of";
        assert_eq!(log.matches(said).count(), 1, "{log}");
        assert!(log.contains(&format!("{said} {max} bytes instead of 67108864")), "{log}");
        assert!(log.contains("sysctl -w net.core.rmem_max=67108864"), "{log}");
    }
    let ended = process.terminate(STOP_LIMIT).expect("an end");
    assert!(ended.status.success(), "{}", process.stderr().expect("a log"));
    assert!(Path::new(&process.path("flows.json")).exists());
}
