//! The agent is stopped while flows end: the kernel keeps their DESTROYs, and gives them up, counted,
//! before the table is full.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::scan::{Scan, Tail, index_of};
use super::{
    Counters, PATIENCE, TO_FILE, can_run, end_well, signal, start, storm_turn, tracking_netns,
    wait_until,
};
use crate::lab::agent::AgentProcess;
use crate::lab::generator::{Flows, Generator, Report};
use crate::lab::limit::HostLimit;
use crate::lab::netns::Netns;

/// How long the agent stands still at least.
const STOPPED: Duration = Duration::from_secs(10);

/// The kernel charges 1,280 bytes an event and lets the queue grow to twice the buffer: some 6,500.
const SMALL_BUFFER: &str = "[capture]\nreceive_buffer = \"4MiB\"\n";

#[test]
fn a_stopped_agent_gets_every_end_later() {
    const FLOWS: u32 = 300_000;
    if !can_run("a stopped agent", &["nft", "ip"]) {
        return;
    }
    let _turn = storm_turn();
    // So far away that the valve stays shut.
    let _limit = HostLimit::at_least(2 * u64::from(FLOWS)).expect("the limit");
    let netns = tracking_netns("stall");
    let flows = Flows::default();
    let mut process = start(&netns, &format!("{SMALL_BUFFER}{TO_FILE}"));
    let mut generator = Generator::new(&netns).expect("a socket");
    assert_eq!(generator.insert(&flows, 0..FLOWS).expect("creations").done, u64::from(FLOWS));

    signal(&mut process, Signal::SIGSTOP);
    let stopped = Instant::now();
    generator.flush().expect("a flush");
    // Those that fit the queue have gone; the rest waits for us and counts still.
    let retained = netns.conntrack_count().expect("a count");
    assert!(retained > u64::from(FLOWS) / 2, "only {retained} wait");
    std::thread::sleep(STOPPED.saturating_sub(stopped.elapsed()));
    assert_eq!(netns.conntrack_count().expect("a count"), retained, "some went without us");
    signal(&mut process, Signal::SIGCONT);
    let resumed = Instant::now();
    let mut tail = Tail::new(&process.path("flows.json"), "\"event\":\"destroy\"");
    tail.wait_for(u64::from(FLOWS), PATIENCE);
    let took = resumed.elapsed();

    let counters = end_well(&mut process);
    let scan = Scan::of(&process.path("flows.json"), &flows, FLOWS);
    assert_eq!(scan.destroys(), u64::from(FLOWS));
    assert_eq!(scan.lost("destroy"), (0, true), "{:?}", scan.others);
    let (lost, exact) = scan.lost("new");
    assert!(exact && scan.news() + lost == u64::from(FLOWS), "{} and {lost}", scan.news());
    assert_eq!(scan.notes(), ["started", "stopped"]);
    counters.balance(2);
    println!(
        "{retained} of {FLOWS} ends waited in the kernel for {STOPPED:?}; all recorded {:.1} s \
         after; {lost} new lost before",
        took.as_secs_f64()
    );
}

#[test]
fn the_valve_opens_before_a_creation_fails_and_what_it_cost_is_recorded() {
    const LIMIT: u32 = 100_000;
    const ENDED: u32 = 80_000;
    /// More than there is room for beside those that wait.
    const LATER: u32 = 60_000;
    const LAST: u32 = 1_000;
    if !can_run("the valve", &["nft", "ip", "conntrack"]) {
        return;
    }
    let _turn = storm_turn();
    let _limit = HostLimit::exactly(LIMIT.into()).expect("the limit");
    let netns = tracking_netns("valve");
    let flows = Flows::default();
    let mut process = start(&netns, &format!("{SMALL_BUFFER}{TO_FILE}"));
    let mut generator = Generator::new(&netns).expect("a socket");
    let before = refusals(&netns);

    let mut created = paced(&mut generator, &flows, 0..ENDED);
    signal(&mut process, Signal::SIGSTOP);
    let stopped = Instant::now();
    generator.flush().expect("a flush");
    let retained = netns.conntrack_count().expect("a count");
    assert!(retained > u64::from(ENDED) / 2, "only {retained} wait");
    // At once: by itself the kernel tries again what it retains only a second after the first failure,
    // in which a busy table would fill. The guard makes it try.
    created += paced(&mut generator, &flows, ENDED..ENDED + LATER);
    assert_eq!(created, u64::from(ENDED + LATER));
    assert_eq!(refusals(&netns), before, "conntrack -S counts refused creations");
    generator.flush().expect("a flush");
    std::thread::sleep(STOPPED.saturating_sub(stopped.elapsed()));

    signal(&mut process, Signal::SIGCONT);
    wait_until("the valve closes", || has_note(&process, "valve_closed"));
    created += paced(&mut generator, &flows, ENDED + LATER..ENDED + LATER + LAST);
    generator.flush().expect("a flush");
    wait_until("the last ends", || {
        let text = std::fs::read_to_string(process.path("flows.json")).expect("a file");
        // The flows that came last stand last, and of each its end behind its beginning.
        let tail = text.lines().rev().take(2 * LAST as usize);
        tail.filter(|line| line.contains("\"event\":\"destroy\""))
            .filter_map(index_of)
            .filter(|index| *index >= ENDED + LATER)
            .count()
            == LAST as usize
    });
    let counters = end_well(&mut process);
    let scan = Scan::of(&process.path("flows.json"), &flows, ENDED + LATER + LAST);
    check(&scan, &counters, created, LIMIT.into());
    for index in ENDED + LATER..ENDED + LATER + LAST {
        assert!(scan.destroy[index as usize] > 0, "flow {index} ended after the valve had closed");
    }
}

fn check(scan: &Scan, counters: &Counters, ended: u64, limit: u64) {
    assert_eq!(scan.notes(), ["started", "valve_opened", "valve_closed", "stopped"]);
    let valve: Vec<&Value> =
        scan.others.iter().filter(|record| record.get("valve_limit").is_some()).collect();
    assert_eq!(valve.len(), 2, "{valve:?}");
    for record in &valve {
        assert_eq!(record["valve_limit"], limit, "{record}");
    }
    let entries = |record: &Value| record["valve_entries"].as_u64().expect("a number");
    assert!(entries(valve[0]) >= limit * 90 / 100 && entries(valve[0]) < limit, "{}", valve[0]);
    assert!(entries(valve[1]) < limit * 70 / 100, "{}", valve[1]);
    let causes = scan.others.iter().filter(|record| record["event"] == "gap").filter(|gap| {
        gap["gap_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "destroy"))
    });
    let mut by_cause: BTreeMap<&str, u64> = BTreeMap::new();
    for gap in causes {
        *by_cause.entry(gap["gap_cause"].as_str().expect("a cause")).or_default() += 1;
    }
    assert_eq!(by_cause.keys().copied().collect::<Vec<_>>(), ["valve"], "{:?}", scan.others);

    let (lost, exact) = scan.lost("destroy");
    let recorded = scan.destroys();
    assert!(lost > 0 && recorded < ended, "the valve cost nothing: {recorded} of {ended}");
    // A bound where the kernel's drop counter moved while the valve was: it names more then,
    // never less.
    if exact {
        assert_eq!(recorded + lost, ended, "the gap says exact");
    } else {
        assert!(recorded + lost >= ended, "{recorded} and at most {lost} of {ended}");
        let blur = 2 * std::thread::available_parallelism().expect("CPUs").get() as u64 + 1000;
        assert!(recorded + lost <= ended + blur, "{recorded} and at most {lost} of {ended}");
    }
    let (news_lost, news_exact) = scan.lost("new");
    assert!(news_exact && scan.news() + news_lost == ended, "{} and {news_lost}", scan.news());
    counters.balance(4);
    assert_eq!(counters.sum("valve_opens_total"), 1);
    println!(
        "valve: opened at {}, closed at {} of {limit}; {recorded} of {ended} ends recorded, \
         {lost} in gap records that say {}",
        entries(valve[0]),
        entries(valve[1]),
        if exact { "exact" } else { "at_most" }
    );
}

/// Some 50,000 a second, so that the guard has 200 ms between its mark and the limit: what this host
/// gives a process that is woken, not what the kernel can do, would decide otherwise.
fn paced(generator: &mut Generator, flows: &Flows, range: std::ops::Range<u32>) -> u64 {
    let mut done = 0;
    for from in range.clone().step_by(500) {
        let report: Report =
            generator.insert(flows, from..(from + 500).min(range.end)).expect("creations");
        assert!(report.refused.is_empty(), "refused after {done}: {:?}", report.refused);
        done += report.done;
        std::thread::sleep(Duration::from_millis(10));
    }
    done
}

/// `insert_failed` and `drop` of `conntrack -S`, all CPUs.
fn refusals(netns: &Netns) -> u64 {
    let text = netns.output(Command::new("conntrack").arg("-S")).expect("conntrack -S");
    let words = text.split_whitespace().filter_map(|word| word.split_once('='));
    let counted = words.filter(|(name, _)| matches!(*name, "insert_failed" | "drop"));
    counted.map(|(_, value)| value.parse::<u64>().expect("a number")).sum()
}

fn has_note(process: &AgentProcess, action: &str) -> bool {
    super::has_record(process, &format!("\"agent_action\":\"{action}\""))
}
