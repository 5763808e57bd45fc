//! 500,000 flows come and go as fast as the kernel can: every end has a record, every loss a count.

use std::time::{Duration, Instant};

use super::scan::{Scan, Tail};
use super::{Counters, PATIENCE, TO_FILE, can_run, end_well, start, storm_turn, tracking_netns};
use crate::lab::generator::{Flows, Generator};
use crate::lab::limit::HostLimit;

const FLOWS: u32 = 500_000;

#[test]
fn a_storm_has_every_end_and_every_loss_is_counted() {
    if !can_run("a storm", &["nft", "ip"]) {
        return;
    }
    let _turn = storm_turn();
    let _limit = HostLimit::at_least(u64::from(FLOWS) + 100_000).expect("the limit");
    let netns = tracking_netns("storm");
    let flows = Flows::default();
    let mut process = start(&netns, TO_FILE);
    let mut generator = Generator::new(&netns).expect("a socket");

    let created = generator.insert(&flows, 0..FLOWS).expect("creations");
    assert_eq!((created.done, created.refused.len()), (u64::from(FLOWS), 0));
    let flushed = generator.flush().expect("a flush");
    let begun = Instant::now();
    let mut tail = Tail::new(&process.path("flows.json"), "\"event\":\"destroy\"");
    tail.wait_for(u64::from(FLOWS), PATIENCE);
    let drained = begun.elapsed();
    let counters = end_well(&mut process);
    let ended = process.wait(Duration::ZERO).expect("it has ended");

    let read = Instant::now();
    let scan = Scan::of(&process.path("flows.json"), &flows, FLOWS);
    check(&scan, &counters, FLOWS);
    let (lost, _) = scan.lost("new");
    println!(
        "{FLOWS} flows: created {:.0}/s, flushed {:.0}/s, recorded {:.1} s later; {} new, {lost} \
         lost, {} destroys; {:.2} µs CPU an event, {} KiB; read in {:.1} s",
        created.rate(),
        f64::from(FLOWS) / flushed.as_secs_f64(),
        drained.as_secs_f64(),
        scan.news(),
        scan.destroys(),
        ended.usage.cpu.as_secs_f64() * 1e6 / f64::from(2 * FLOWS),
        ended.usage.peak_rss_kib,
        read.elapsed().as_secs_f64()
    );
}

/// In a storm all flows have come before the first goes. Here each goes at once, so that both its
/// events are under way together, on two sockets, all the time.
#[test]
fn a_flow_that_goes_at_once_still_comes_before_it_goes() {
    const FLOWS: u32 = 100_000;
    const AT_A_TIME: usize = 64;
    if !can_run("short lives", &["nft", "ip"]) {
        return;
    }
    let _turn = storm_turn();
    let _limit = HostLimit::at_least(u64::from(2 * FLOWS)).expect("the limit");
    let netns = tracking_netns("brief");
    let flows = Flows::default();
    let mut process = start(&netns, TO_FILE);
    let mut generator = Generator::new(&netns).expect("a socket");
    for from in (0..FLOWS).step_by(AT_A_TIME) {
        let portion = from..(from + AT_A_TIME as u32).min(FLOWS);
        let size = portion.len() as u64;
        assert_eq!(generator.insert(&flows, portion.clone()).expect("creations").done, size);
        assert_eq!(generator.delete(&flows, portion).expect("deletions").done, size);
    }
    let mut tail = Tail::new(&process.path("flows.json"), "\"event\":\"destroy\"");
    tail.wait_for(u64::from(FLOWS), PATIENCE);
    let counters = end_well(&mut process);
    // Panics on a `new` behind its `destroy`.
    let scan = Scan::of(&process.path("flows.json"), &flows, FLOWS);
    check(&scan, &counters, FLOWS);
}

/// Some 200 events fit: whatever this host's pace is, most of a storm's beginnings are lost.
#[test]
fn a_tiny_buffer_loses_beginnings_each_counted_and_no_end() {
    const FLOWS: u32 = 100_000;
    if !can_run("a tiny buffer", &["nft", "ip"]) {
        return;
    }
    let _turn = storm_turn();
    let _limit = HostLimit::at_least(u64::from(2 * FLOWS)).expect("the limit");
    let netns = tracking_netns("tiny");
    let flows = Flows::default();
    let config = format!("[capture]\nreceive_buffer = \"128KiB\"\n{TO_FILE}");
    let mut process = start(&netns, &config);
    let mut generator = Generator::new(&netns).expect("a socket");
    assert_eq!(generator.insert(&flows, 0..FLOWS).expect("creations").done, u64::from(FLOWS));
    generator.flush().expect("a flush");
    let mut tail = Tail::new(&process.path("flows.json"), "\"event\":\"destroy\"");
    tail.wait_for(u64::from(FLOWS), PATIENCE);
    let counters = end_well(&mut process);
    let scan = Scan::of(&process.path("flows.json"), &flows, FLOWS);
    check(&scan, &counters, FLOWS);
    let (lost, _) = scan.lost("new");
    assert!(lost > 0, "a buffer of 200 events held 100,000");
    println!("{FLOWS} flows: {} new, {lost} lost, {} destroys", scan.news(), scan.destroys());
}

fn check(scan: &Scan, counters: &Counters, flows: u32) {
    assert_eq!(scan.lost("destroy"), (0, true), "{:?}", scan.others);
    assert_eq!(scan.destroys(), u64::from(flows));
    let (lost, exact) = scan.lost("new");
    assert!(exact, "{:?}", scan.others);
    assert_eq!(scan.news() + lost, u64::from(flows));
    assert_eq!(scan.notes(), ["started", "stopped"]);
    counters.balance(scan.notes().len() as u64);
    assert_eq!(counters.get("records_appended_total"), scan.records);
    // The same losses by the kernel's own counter.
    let drops = counters.0.iter().find(|(name, _)| {
        name.starts_with("netlink_socket_drops_total") && name.contains("socket=\"events\"")
    });
    assert_eq!(drops.map(|(_, drops)| *drops), Some(lost));
}
