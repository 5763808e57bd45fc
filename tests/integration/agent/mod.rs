//! The agent end to end: the real program, real events, and what it wrote.
//!
//! Every run is held against the balance of its own counters ([`Counters::balance`]) and against the
//! shape that each run's records have ([`check_shape`]). Flows are made by the lab, which shares no
//! code with the agent. Waits have generous bounds and end as soon as what they wait for is there:
//! nothing is decided by how fast this host is.

// What was measured on the way is worth reading, with `--nocapture`.
#![allow(clippy::print_stdout)]

mod filter;
mod flows;
mod host;
mod life;
mod scan;
mod snapshot;
mod stall;
mod storm;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::agent::{AgentProcess, Output};
use crate::lab::gateway::Gateway;
use crate::lab::need;
use crate::lab::netns::Netns;
use crate::lab::records;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conntrail");

/// For whatever takes moments on an idle host.
const PATIENCE: Duration = Duration::from_secs(60);
/// The agent promises 8 s; a busy host gets more, but not so much that a hang would pass.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// One file of JSON and nothing else; not rotated, so that what is read is read in order.
const TO_FILE: &str = r#"
[[sink]]
name = "flows"
type = "file"
path = "{dir}/flows.json"
rotate_size = "off"
rotate_every = "off"
"#;

/// False, with a word about it, where a test cannot run; a failure where everything has to be there.
fn can_run(test: &str, programs: &[&str]) -> bool {
    let lacks = |program: &&&str| {
        let mut which = Command::new("which");
        let found = which.arg(program).stdout(Stdio::null()).stderr(Stdio::null()).status();
        !found.is_ok_and(|status| status.success())
    };
    let problem = if !nix::unistd::geteuid().is_root() {
        "needs root".to_owned()
    } else if !Path::new("/proc/sys/net/netfilter/nf_conntrack_max").exists() {
        "needs nf_conntrack".to_owned()
    } else if let Some(program) = programs.iter().find(lacks) {
        format!("needs {program}")
    } else {
        return true;
    };
    need::skip(&format!("{test} {problem}"));
    false
}

/// Held by tests that make hundreds of thousands of events: two at a time on two cores would only
/// measure each other. Take it before a `HostLimit`, or two tests could wait for each other.
fn storm_turn() -> Flock<File> {
    let path = std::env::temp_dir().join("conntrail-lab-storm.lock");
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).open(path).expect("a file");
    Flock::lock(file, FlockArg::LockExclusive).expect("a lock")
}

/// A namespace that tracks, with all that events can carry.
fn tracking_netns(role: &str) -> Netns {
    let netns = Netns::new(role).expect("a namespace");
    netns.enable_tracking().expect("a rule");
    netns.conntrack_settings(1, true, true).expect("settings");
    netns
}

/// `conntrail run` with that configuration, ready, and with the table at start recorded: what begins
/// from here on is in no snapshot.
fn start(netns: &Netns, config: &str) -> AgentProcess {
    let mut process = AgentProcess::start(netns, Path::new(PROGRAM), config, Output::Kept)
        .expect("the agent starts");
    process.wait_ready(PATIENCE).expect("ready");
    wait_for_snapshot(&process);
    process
}

fn wait_for_snapshot(process: &AgentProcess) {
    wait_until("the table at start is recorded", || {
        process.stderr().is_ok_and(|log| log.contains("the table at start is recorded"))
    });
}

/// `conntrail run` without a configuration, ready: JSON to stdout. None where the host has one.
fn start_bare(netns: &Netns) -> Option<AgentProcess> {
    if Path::new("/etc/conntrail/conntrail.toml").exists() {
        need::skip("this host has a configuration in /etc/conntrail");
        return None;
    }
    let mut process = AgentProcess::start_with(netns, Output::Kept, |_| {
        let mut command = Command::new(PROGRAM);
        command.arg("run").env_remove("CONNTRAIL_LOG");
        Ok(command)
    })
    .expect("the agent starts");
    process.wait_ready(PATIENCE).expect("ready");
    wait_for_snapshot(&process);
    Some(process)
}

/// Lets nothing through any more: else a packet that is sent again a second later, by an end that
/// has not heard of the flush, makes a flow that nobody planned.
fn close_gateway(lab: &Gateway) {
    lab.gateway
        .nft(
            "table inet conntrail_closed {
                chain door { type filter hook prerouting priority -400; policy drop; }
            }",
        )
        .expect("a rule");
}

/// Waits until `done`.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// SIGTERM, an end with 0, and what all runs have in common: shape and balance. Gives the records of
/// `flows.json`.
fn finish(mut process: AgentProcess) -> Vec<Value> {
    let counters = end_well(&mut process);
    let records = records::read(&process.path("flows.json")).expect("whole lines of JSON");
    check_shape(&records);
    let notes = of_event(&records, "agent").count() as u64;
    counters.balance(notes);
    assert_eq!(counters.get("sink_records_acked_total{sink=\"flows\"}"), records.len() as u64);
    records
}

/// SIGTERM and an end with 0; the counters that were printed last.
fn end_well(process: &mut AgentProcess) -> Counters {
    let ended = process.terminate(STOP_LIMIT).expect("an end");
    let log = process.stderr().expect("a log");
    assert!(ended.status.success(), "{}: {log}", ended.status);
    Counters::of_log(&log)
}

/// Numbered from 1 without a hole, the agent's start first and its stop last, all of one run.
fn check_shape(records: &[Value]) {
    assert!(records.len() >= 2, "{records:?}");
    for (record, number) in records.iter().zip(1_u64..) {
        assert_eq!(record["seq"], number, "{record}");
        assert_eq!(record["epoch"], records[0]["epoch"]);
        assert_eq!(record["agent"], records[0]["agent"]);
        assert_eq!(record["netns"], records[0]["netns"]);
    }
    let action = |record: &Value| record["agent_action"].as_str().map(str::to_owned);
    assert_eq!(action(&records[0]).as_deref(), Some("started"), "{}", records[0]);
    let last = records.last().expect("there are some");
    assert_eq!(action(last).as_deref(), Some("stopped"), "{last}");
}

fn of_event<'a>(records: &'a [Value], event: &'static str) -> impl Iterator<Item = &'a Value> {
    records.iter().filter(move |record| record["event"] == event)
}

fn has_record(process: &AgentProcess, needle: &str) -> bool {
    std::fs::read_to_string(process.path("flows.json")).is_ok_and(|text| text.contains(needle))
}

/// Whether the file has that many lines with `needle` in them, or more.
fn has_lines(process: &AgentProcess, needle: &str, count: usize) -> bool {
    let text = std::fs::read_to_string(process.path("flows.json"));
    text.is_ok_and(|text| text.matches(needle).count() >= count)
}

fn signal(process: &mut AgentProcess, signal: Signal) {
    process.signal(signal).expect("it runs");
}

/// Samples of the counters, by name and labels, without the prefix.
#[derive(Debug)]
struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// The last value of each that the log has.
    fn of_log(log: &str) -> Self {
        let mut samples = BTreeMap::new();
        for line in log.lines() {
            let Some((_, sample)) = line.split_once(" conntrail_") else { continue };
            let (name, value) = sample.rsplit_once(' ').expect("a name and a value");
            samples.insert(name.to_owned(), value.parse().expect("a number"));
        }
        assert!(!samples.is_empty(), "no counters in the log: {log}");
        Counters(samples)
    }

    fn get(&self, name: &str) -> u64 {
        *self.0.get(name).unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }

    /// All labels together.
    fn sum(&self, name: &str) -> u64 {
        let of = |key: &str| key.split('{').next() == Some(name);
        self.0.iter().filter(|(key, _)| of(key)).map(|(_, value)| value).sum()
    }

    /// The two equations, for sinks that were there from the start to the end: what came in was
    /// appended, and what was appended is accounted for by each sink. `notes` are the records that
    /// the agent made of itself.
    fn balance(&self, notes: u64) {
        let appended = self.get("records_appended_total");
        let received = self.sum("events_received_total");
        let (gaps, filtered) = (self.sum("gap_records_total"), self.get("events_filtered_total"));
        assert_eq!(received + notes + gaps - filtered, appended, "{self:#?}");
        assert_eq!(self.sum("records_dropped_total"), 0, "{self:#?}");
        let acked = "sink_records_acked_total";
        let sinks: Vec<_> =
            self.0.keys().filter_map(|name| name.strip_prefix(acked)).map(str::to_owned).collect();
        assert!(!sinks.is_empty(), "{self:#?}");
        for sink in sinks {
            let of = |name: &str| self.get(&format!("{name}{sink}"));
            let accounted = of(acked)
                + of_or_none(self, "sink_records_pending", &sink)
                + of_or_none(self, "sink_records_lapped_total", &sink);
            assert_eq!(accounted, appended, "{sink}: {self:#?}");
        }
    }
}

/// A cursor that has ended has no samples any more: nothing pends there.
fn of_or_none(counters: &Counters, name: &str, sink: &str) -> u64 {
    counters.0.get(&format!("{name}{sink}")).copied().unwrap_or(0)
}
