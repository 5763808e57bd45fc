//! Flows that are older than the agent, and flows that come and go while it starts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use super::{TO_FILE, can_run, finish, of_event, start, tracking_netns, wait_until};
use crate::lab::generator::{Flows, Generator};
use crate::lab::limit::HostLimit;

/// There before the agent. The first half is deleted while it starts, the rest stays until the end.
const OLD: u32 = 40_000;
/// Where the flows that begin meanwhile are numbered from.
const YOUNG: u32 = 1_000_000;
/// Begun, and deleted, at a time.
const STEP: u32 = 50;

/// What the records say of one flow, by their numbers.
#[derive(Debug, Default)]
struct Story {
    new: Option<u64>,
    destroy: Option<u64>,
    /// Its number, and whether it says `overtaken`.
    snapshots: Vec<(u64, bool)>,
}

#[test]
fn nothing_falls_between_the_subscription_and_the_dump() {
    if !can_run("a snapshot", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(600_000).expect("the limit");
    let netns = tracking_netns("snapshot");
    let flows = Flows::default();
    let mut generator = Generator::new(&netns).expect("a socket");
    assert_eq!(generator.insert(&flows, 0..OLD).expect("flows").done, u64::from(OLD));

    let stop = AtomicBool::new(false);
    let (process, begun) = std::thread::scope(|scope| {
        let churn = scope.spawn(|| {
            let mut generator = Generator::new(&netns).expect("a socket");
            churn(&mut generator, &flows, &stop)
        });
        let process = start(&netns, TO_FILE);
        stop.store(true, Ordering::Relaxed);
        (process, churn.join().expect("it does not panic"))
    });
    generator.flush().expect("a flush");
    let last = flows.flow(OLD - 1).src.ip;
    wait_until("the last end", || {
        let text = std::fs::read_to_string(process.path("flows.json")).expect("a file");
        text.lines().any(|line| {
            line.contains("\"event\":\"destroy\"")
                && line.contains(&format!("\"src_ip\":\"{last}\""))
        })
    });
    let records = finish(process);
    assert_eq!(of_event(&records, "gap").count(), 0, "nothing was lost");
    check(&stories(&records), begun, of_event(&records, "snapshot").count());
}

/// Deletes half of the old flows and begins young ones, in turn and in the order of their numbers,
/// until `stop`; each second portion of the young ones is deleted at once. Gives how many have begun.
fn churn(generator: &mut Generator, flows: &Flows, stop: &AtomicBool) -> u32 {
    let (mut deleted, mut begun) = (0, 0);
    while !stop.load(Ordering::Relaxed) && begun < 200_000 {
        if deleted < OLD / 2 {
            generator.delete(flows, deleted..deleted + STEP).expect("deletions");
            deleted += STEP;
        }
        let portion = YOUNG + begun..YOUNG + begun + STEP;
        assert_eq!(generator.insert(flows, portion.clone()).expect("flows").done, u64::from(STEP));
        if !(begun / STEP).is_multiple_of(2) {
            generator.delete(flows, portion).expect("deletions");
        }
        begun += STEP;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    begun
}

fn stories(records: &[Value]) -> HashMap<u32, Story> {
    let mut stories: HashMap<u32, Story> = HashMap::new();
    for record in records.iter().filter(|record| record["event"] != "agent") {
        let src: std::net::Ipv4Addr =
            record["src_ip"].as_str().expect("an address").parse().expect("an address");
        let story = stories.entry(src.to_bits() - 0x0a00_0000).or_default();
        let seq = record["seq"].as_u64().expect("a number");
        let before = match record["event"].as_str() {
            Some("new") => story.new.replace(seq),
            Some("destroy") => story.destroy.replace(seq),
            Some("snapshot") => {
                story.snapshots.push((seq, record["overtaken"] == true));
                None
            }
            other => panic!("{other:?} was not asked for"),
        };
        assert_eq!(before, None, "twice: {record}");
    }
    stories
}

fn check(stories: &HashMap<u32, Story>, begun: u32, snapshots: usize) {
    let none = Story::default();
    let of = |index: u32| stories.get(&index).unwrap_or(&none);
    for (index, story) in stories {
        for (seq, overtaken) in &story.snapshots {
            let earlier = [story.new, story.destroy].into_iter().flatten().any(|live| live < *seq);
            assert_eq!(*overtaken, earlier, "flow {index}: {story:?}");
        }
        if let (Some(new), Some(destroy)) = (story.new, story.destroy) {
            assert!(new < destroy, "flow {index}: {story:?}");
        }
    }
    // Those that stayed: there at the start, gone at the end, and never begun.
    for index in OLD / 2..OLD {
        let story = of(index);
        assert!(matches!(story.snapshots[..], [(_, false)]), "flow {index}: {story:?}");
        assert!(story.new.is_none() && story.destroy.is_some(), "flow {index}: {story:?}");
    }
    // The old ones that were deleted have an end from some flow on: those before had gone when the
    // agent subscribed, and nothing knows of them.
    let unseen = (0..OLD / 2).take_while(|index| of(*index).destroy.is_none()).count() as u32;
    for index in 0..OLD / 2 {
        let story = of(index);
        assert_eq!(story.destroy.is_some(), index >= unseen, "flow {index}: {story:?}");
        assert!(index >= unseen || story.snapshots.is_empty(), "flow {index}: {story:?}");
    }
    // The young ones have a beginning from some flow on. DESTROY is subscribed to before NEW, so
    // that one that comes and goes between has an end only.
    let first = (0..begun).find(|young| of(YOUNG + young).new.is_some());
    let first = first.expect("flows began after the subscription");
    for young in 0..begun {
        let story = of(YOUNG + young);
        assert_eq!(story.new.is_some(), young >= first, "flow {young}: {story:?}");
        let stayed = (young / STEP).is_multiple_of(2);
        if young >= first || stayed {
            assert!(story.destroy.is_some(), "flow {young}: {story:?}");
        }
        if stayed {
            let born = story.new.is_some() || !story.snapshots.is_empty();
            assert!(born, "flow {young} was there all the time: {story:?}");
        }
    }
    let overtaken = stories.values().flat_map(|story| &story.snapshots).filter(|(_, over)| *over);
    println!(
        "{snapshots} snapshots, {} of them overtaken; {unseen} old flows had gone and {first} young \
         ones had begun before the subscription, {begun} young ones in all",
        overtaken.count()
    );
}
