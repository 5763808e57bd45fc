//! Control against the running kernel, in namespaces of its own.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use conntrail::capture::{Item, RawBatch, queue};
use conntrail::control::{
    Code, Control, Error, Facts, Family, Incomplete, Tracked, enable_tracking, findings, setting,
    snapshot,
};
use conntrail::ctnetlink::{CpuStats, Event, Tally, Tuple, TupleParts, decode_conn, messages};

use crate::lab::Result;
use crate::lab::generator::{Flows, Generator, UDP};
use crate::lab::limit::HostLimit;
use crate::lab::need;
use crate::lab::netns::Netns;

/// Tells the `child` below what to do.
const ROLE: &str = "CONNTRAIL_TEST_ROLE";

/// False, and says so, where the test cannot run; a failure where CONNTRAIL_REQUIRE_ALL=1.
fn possible(test: &str, programs: &[&str]) -> bool {
    let mut missing: Vec<&str> = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root");
    }
    for program in ["ip"].iter().chain(programs) {
        if Command::new(program).arg("--version").output().is_err() {
            missing.push(program);
        }
    }
    if !missing.is_empty() {
        need::skip(&format!("{test} needs {missing:?}"));
    }
    missing.is_empty()
}

/// Runs async work on a thread inside the namespace.
fn inside<T: Send>(netns: &Netns, work: impl AsyncFnOnce() -> T + Send) -> T {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime needs nothing but file descriptors").block_on(work())
    })
}

fn filled(role: &str, flows: u32) -> Result<(HostLimit, Netns, Generator)> {
    let limit = HostLimit::at_least(u64::from(flows) + 10_000)?;
    let netns = Netns::new(role)?;
    let mut generator = Generator::new(&netns)?;
    let report = generator.insert(&Flows::default(), 0..flows)?;
    assert_eq!(report.done, u64::from(flows), "{:?}", report.refused);
    Ok((limit, netns, generator))
}

#[test]
fn a_dump_gives_every_entry_once_and_says_that_it_is_complete() -> Result<()> {
    const FLOWS: u32 = 50_000;
    if !possible("dump", &[]) {
        return Ok(());
    }
    let (_limit, netns, mut generator) = filled("dump", FLOWS)?;
    generator.insert(&Flows { ipv6: true, ..Flows::default() }, 0..100)?;

    let (seen, both, v6) = inside(&netns, async || {
        let mut control = Control::connect()?;
        let mut seen = HashSet::new();
        let mut tally = Tally::default();
        let both = control
            .dump_conntrack(Family::Both, async |batch: RawBatch| {
                for message in batch.iter().flat_map(messages) {
                    let mut event = Event::default();
                    decode_conn(&message.unwrap(), &mut event, &mut tally).unwrap();
                    seen.insert((event.conn.orig.src(), event.conn.orig.src_port));
                }
                Some(RawBatch::default())
            })
            .await?;
        let v6 = control.dump_conntrack(Family::Ipv6, async |batch| Some(batch)).await?;
        Ok::<_, Error>((seen, both, v6))
    })?;

    assert!(both.complete(), "{:?}", both.why);
    assert_eq!(both.entries, u64::from(FLOWS) + 100);
    assert_eq!(seen.len(), FLOWS as usize + 100);
    for index in 0..FLOWS {
        let flow = Flows::default().flow(index);
        assert!(seen.contains(&(flow.src.ip, flow.src.port)), "flow {index} is missing");
    }
    assert!(v6.complete());
    assert_eq!(v6.entries, 100);
    Ok(())
}

#[test]
fn a_snapshot_waits_for_a_full_queue_and_ends_with_its_end() -> Result<()> {
    const FLOWS: u32 = 20_000;
    if !possible("snapshot", &[]) {
        return Ok(());
    }
    let (_limit, netns, _generator) = filled("snapshot", FLOWS)?;
    // Room for a batch or two, some 15 times less than the dump. A batch weighs what its buffer holds,
    // which may be twice its bytes, and one alone may weigh more than the bound.
    let bound = conntrail::control::DUMP_BATCH * 3;
    let (sender, receiver) = queue(bound);
    let gauge = sender.queue();
    let (entries, complete, fullest) = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut entries, mut complete, mut fullest) = (0, None, 0);
            while let Ok(item) = receiver.pop(Duration::from_secs(10)) {
                assert_eq!(complete, None, "nothing comes after the end");
                fullest = fullest.max(gauge.bytes());
                match item {
                    Some(Item::Snapshot(batch)) => {
                        entries += batch.iter().count();
                        receiver.recycle(batch);
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    Some(Item::SnapshotEnd { complete: whole, .. }) => complete = Some(whole),
                    other => panic!("{other:?}"),
                }
            }
            (entries, complete, fullest)
        });
        let end = inside(&netns, async move || {
            let mut control = Control::connect()?;
            snapshot(&mut control, &sender).await
        });
        let end = end.expect("the namespace can be dumped");
        assert!(end.complete() && end.entries == u64::from(FLOWS), "{end:?}");
        reader.join().expect("the reader does not panic")
    });
    assert_eq!((entries, complete), (FLOWS as usize, Some(true)));
    assert!(fullest <= bound, "{fullest}");
    Ok(())
}

#[test]
fn a_snapshot_stops_when_nobody_takes_it() -> Result<()> {
    if !possible("closed snapshot", &[]) {
        return Ok(());
    }
    let (_limit, netns, _generator) = filled("closed", 2000)?;
    let (sender, receiver) = queue(1 << 20);
    drop(receiver);
    let end = inside(&netns, async move || {
        let mut control = Control::connect()?;
        snapshot(&mut control, &sender).await
    })?;
    assert!(matches!(end.why, Some(Incomplete::Stopped)), "{end:?}");
    assert!(end.entries < 2000, "{end:?}");
    Ok(())
}

/// Run it alone: it measures the whole process.
#[test]
#[ignore = "measures memory and takes a minute"]
fn a_slow_consumer_of_a_large_dump_costs_no_memory() -> Result<()> {
    const FLOWS: u32 = 1_000_000;
    if !possible("slow consumer", &[]) {
        return Ok(());
    }
    let (_limit, netns, _generator) = filled("slow", FLOWS)?;
    let before = status("VmHWM")?;
    let begun = Instant::now();
    let mut bytes = 0;
    let end = inside(&netns, async || {
        let mut control = Control::connect()?;
        control
            .dump_conntrack(Family::Both, async |mut batch: RawBatch| {
                bytes += batch.bytes.len();
                tokio::time::sleep(Duration::from_millis(5)).await;
                batch.clear();
                Some(batch)
            })
            .await
    })?;
    let grown = status("VmHWM")? - before;
    println!(
        "{} entries, {bytes} bytes in {:?}: the peak of memory grew by {grown} KiB",
        end.entries,
        begun.elapsed()
    );
    assert!(end.complete(), "{:?}", end.why);
    assert_eq!(end.entries, u64::from(FLOWS));
    assert!(grown < 4096, "{grown} KiB");
    Ok(())
}

/// A line of `/proc/self/status`, in KiB.
fn status(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find(|line| line.starts_with(name)).ok_or("no such line")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse()?)
}

#[test]
fn counts_and_statistics_equal_those_of_conntrack() -> Result<()> {
    if !possible("statistics", &["conntrack"]) {
        return Ok(());
    }
    let (_limit, netns, mut generator) = filled("stats", 1234)?;
    // insert_failed stays 0 for these, found counts each refusal's lookup; either way both agree.
    generator.insert(&Flows::default(), 0..10)?;
    let (stats, cpus, expect) = inside(&netns, async || {
        let mut control = Control::connect()?;
        let cpus = control.stats_cpu().await?;
        Ok::<_, Error>((control.stats().await?, cpus, control.expect_stats_cpu().await?))
    })?;

    assert_eq!(stats.entries, Some(1234));
    let count = netns.output(Command::new("conntrack").arg("-C"))?;
    assert_eq!(count.trim(), "1234");
    let max = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")?;
    assert_eq!(stats.max_entries, Some(max.trim().parse()?));

    let theirs = conntrack_statistics(&netns.output(Command::new("conntrack").arg("-S"))?);
    assert!(!theirs.is_empty());
    assert_eq!(cpus.len(), theirs.len());
    for ours in cpus {
        let theirs = &theirs[&u32::from(ours.cpu)];
        assert!(theirs.len() >= 8, "{theirs:?}");
        for (name, value) in theirs {
            assert_eq!(counter(&ours, name), Some(*value), "cpu {}: {name}", ours.cpu);
        }
    }
    // /proc/net/stat/nf_conntrack has one line a CPU as well.
    assert_eq!(expect.len(), theirs.len());
    assert!(expect.iter().all(|cpu| cpu.new == Some(0) && cpu.create == Some(0)));
    Ok(())
}

/// `cpu=0  found=1 invalid=0 …`, by CPU and name.
fn conntrack_statistics(text: &str) -> HashMap<u32, HashMap<String, u32>> {
    let mut cpus = HashMap::new();
    for line in text.lines() {
        let mut values: HashMap<String, u32> = line
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.parse().expect("all values are numbers")))
            .collect();
        let cpu = values.remove("cpu").expect("each line names its CPU");
        cpus.insert(cpu, values);
    }
    cpus
}

fn counter(stats: &CpuStats, name: &str) -> Option<u32> {
    match name {
        "found" => stats.found,
        "invalid" => stats.invalid,
        "insert" => stats.insert,
        "insert_failed" => stats.insert_failed,
        "drop" => stats.drop,
        "early_drop" => stats.early_drop,
        "error" => stats.error,
        "search_restart" => stats.search_restart,
        "clash_resolve" => stats.clash_resolve,
        "chaintoolong" | "chain_toolong" => stats.chain_toolong,
        other => panic!("conntrack -S knows {other}, we do not"),
    }
}

#[test]
fn one_entry_can_be_looked_up() -> Result<()> {
    if !possible("lookup", &[]) {
        return Ok(());
    }
    let (_limit, netns, _generator) = filled("lookup", 3)?;
    let tuple_of = |index| {
        let flow = Flows::default().flow(index);
        let mut tuple = Tuple {
            parts: TupleParts::SRC
                | TupleParts::DST
                | TupleParts::PROTO
                | TupleParts::SRC_PORT
                | TupleParts::DST_PORT,
            proto: UDP,
            src_port: flow.src.port,
            dst_port: flow.dst.port,
            ..Tuple::default()
        };
        for (bytes, ip) in
            [(&mut tuple.src_bytes, flow.src.ip), (&mut tuple.dst_bytes, flow.dst.ip)]
        {
            let std::net::IpAddr::V4(ip) = ip else { panic!("IPv4 was asked for") };
            bytes[..4].copy_from_slice(&ip.octets());
        }
        tuple
    };
    let (there, not_there) = inside(&netns, async || {
        let mut control = Control::connect()?;
        let there = control.lookup(&tuple_of(2), 0).await?;
        Ok::<_, Error>((there, control.lookup(&tuple_of(3), 0).await?))
    })?;
    let there = there.expect("flow 2 was made");
    let mut event = Event::default();
    let message = messages(&there).next().unwrap()?;
    decode_conn(&message, &mut event, &mut Tally::default())?;
    assert_eq!(event.conn.orig, tuple_of(2));
    assert_eq!(not_there, None);
    Ok(())
}

fn codes(netns: &Netns) -> Result<Vec<Code>> {
    let facts = inside(netns, Facts::read)?;
    Ok(findings(&facts).iter().map(|finding| finding.code).collect())
}

#[test]
fn what_a_namespace_lacks_is_found() -> Result<()> {
    if !possible("findings", &["nft", "sysctl"]) {
        return Ok(());
    }
    let netns = Netns::new("findings")?;
    netns.conntrack_settings(2, false, false)?;
    assert_eq!(
        codes(&netns)?,
        [Code::TrackingOff, Code::AcctOff, Code::TimestampOff],
        "a fresh namespace"
    );

    // Each remedy is the command that mends it.
    for finding in findings(&inside(&netns, Facts::read)?) {
        let remedy = finding.remedy.ok_or("no remedy")?;
        netns.output(Command::new("sh").args(["-c", &remedy.command]))?;
    }
    assert_eq!(codes(&netns)?, [], "all mended");
    assert_eq!(netns.conntrack_count()?, 0, "the probe left nothing behind");

    netns.conntrack_settings(0, true, true)?;
    assert_eq!(codes(&netns)?, [Code::EventsOff]);
    netns.output(Command::new("sysctl").args(["-w", "net.netfilter.nf_conntrack_events=1"]))?;

    netns.conntrack_settings(2, true, true)?;
    Generator::new(&netns)?.insert(&Flows::default(), 0..5)?;
    assert_eq!(codes(&netns)?, [Code::EventsAutomatic]);
    let facts = inside(&netns, Facts::read)?;
    assert_eq!((facts.entries, &facts.tracked_v4), (Some(5), &Tracked::Yes));
    assert_eq!(facts.tracked_v6, Tracked::Yes);
    netns.conntrack_settings(1, true, true)?;

    netns.nft("delete table inet track")?;
    netns.nft("table ip track { chain on { ct state new; }; }")?;
    assert_eq!(codes(&netns)?, [Code::TrackingOnlyIpv4]);

    // Tracking, but not of what the probe sends: the entries tell.
    netns.nft(
        "table inet skip { chain out { type filter hook output priority raw; oif lo notrack; }; }",
    )?;
    assert_eq!(codes(&netns)?, []);
    Ok(())
}

#[test]
fn loopback_that_is_down_is_said_and_not_taken_for_idle() -> Result<()> {
    if !possible("loopback down", &[]) {
        return Ok(());
    }
    let netns = Netns::new("down")?;
    netns.conntrack_settings(1, true, true)?;
    netns.ip("link set lo down")?;
    assert_eq!(codes(&netns)?, [Code::TrackingUnknown]);
    Ok(())
}

#[test]
fn a_table_that_is_nearly_full_is_found() -> Result<()> {
    if !possible("nearly full", &["nft"]) {
        return Ok(());
    }
    let netns = Netns::new("full")?;
    netns.conntrack_settings(1, true, true)?;
    netns.nft("table inet track { chain on { ct state new; }; }")?;
    let mut generator = Generator::new(&netns)?;
    let limit = HostLimit::exactly(1000)?;
    generator.insert(&Flows::default(), 0..950)?;
    let found = codes(&netns);
    drop(limit);
    assert_eq!(found?, [Code::TableNearlyFull]);
    Ok(())
}

#[test]
fn without_privilege_the_finding_is_that_and_its_exit_code_is_77() -> Result<()> {
    if !possible("privilege", &["setpriv"]) {
        return Ok(());
    }
    let netns = Netns::new("privilege")?;
    netns.conntrack_settings(1, true, true)?;
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"]);
    let output = netns.output(child(&mut command, "facts")?)?;
    assert!(output.contains("found not_privileged exit Some(77)"), "{output}");
    assert_eq!(output.matches("found ").count(), 1, "{output}");
    Ok(())
}

/// Sends one datagram over loopback and gives the entry's count before and after.
fn loopback_makes_an_entry(netns: &Netns, loopback: &str) -> Result<bool> {
    let before = netns.conntrack_count()?;
    netns.run(|| {
        let (from, to) = (UdpSocket::bind((loopback, 0))?, UdpSocket::bind((loopback, 0))?);
        from.send_to(b"x", to.local_addr()?)
    })?;
    Ok(netns.conntrack_count()? > before)
}

fn our_tables(netns: &Netns) -> Result<usize> {
    Ok(netns.output(Command::new("nft").args(["list", "tables"]))?.matches("conntrail_").count())
}

fn settings(netns: &Netns) -> Result<[Option<u64>; 3]> {
    netns.run(|| {
        Ok([
            setting("nf_conntrack_events")?,
            setting("nf_conntrack_acct")?,
            setting("nf_conntrack_timestamp")?,
        ])
    })
}

#[test]
fn tracking_is_on_while_the_guard_lives_and_leaves_nothing_behind() -> Result<()> {
    if !possible("tracking", &["nft"]) {
        return Ok(());
    }
    let netns = Netns::new("tracking")?;
    netns.conntrack_settings(2, false, true)?;
    assert!(!loopback_makes_an_entry(&netns, "127.0.0.1")?);

    for explicit in [true, false] {
        // On a thread of its own, because drop happens outside of the namespace.
        let tracking = inside(&netns, enable_tracking)?;
        assert_eq!(settings(&netns)?, [Some(1), Some(1), Some(1)]);
        let changed: Vec<_> = tracking.changed().collect();
        assert_eq!(changed, [("nf_conntrack_acct", 0), ("nf_conntrack_events", 2)]);
        let listed = netns.output(Command::new("nft").args(["list", "ruleset"]))?;
        assert!(listed.contains(tracking.table()) && listed.contains("flags owner"), "{listed}");
        assert!(loopback_makes_an_entry(&netns, "127.0.0.1")?);
        assert!(loopback_makes_an_entry(&netns, "::1")?);
        if explicit {
            tracking.undo()?;
        } else {
            drop(tracking);
        }
        assert_eq!(settings(&netns)?, [Some(2), Some(0), Some(1)]);
        assert_eq!(our_tables(&netns)?, 0);
        assert!(!loopback_makes_an_entry(&netns, "127.0.0.1")?);
        assert!(!loopback_makes_an_entry(&netns, "::1")?);
    }
    Ok(())
}

#[test]
fn a_setting_that_somebody_else_has_changed_is_left_to_them() -> Result<()> {
    if !possible("foreign setting", &[]) {
        return Ok(());
    }
    let netns = Netns::new("foreign")?;
    netns.conntrack_settings(2, false, false)?;
    let tracking = inside(&netns, enable_tracking)?;
    netns.sysctl("netfilter/nf_conntrack_events", "0")?;
    tracking.undo()?;
    assert_eq!(settings(&netns)?, [Some(0), Some(0), Some(0)]);
    Ok(())
}

#[test]
fn a_killed_agent_leaves_no_table_behind() -> Result<()> {
    if !possible("kill", &["nft"]) {
        return Ok(());
    }
    let netns = Netns::new("kill")?;
    let mut this = Command::new(std::env::current_exe()?);
    let mut running = netns.spawn(child(&mut this, "track")?.stdout(Stdio::piped()))?;
    let output = running.stdout.take().ok_or("no output")?;
    let mut lines = BufReader::new(output).lines();
    let ready = lines.by_ref().find(|line| line.as_ref().is_ok_and(|line| line.contains("ready")));
    let tables = our_tables(&netns);
    let tracked = loopback_makes_an_entry(&netns, "127.0.0.1");
    // SIGKILL.
    running.kill()?;
    running.wait()?;
    assert!(ready.is_some(), "the child did not say that it was ready");
    assert_eq!(tables?, 1);
    assert!(tracked?);
    assert_eq!(our_tables(&netns)?, 0);
    assert!(!loopback_makes_an_entry(&netns, "127.0.0.1")?);
    Ok(())
}

#[test]
fn settings_that_cannot_be_written_do_not_keep_tracking_off() -> Result<()> {
    if !possible("read-only settings", &["unshare", "nft"]) {
        return Ok(());
    }
    let netns = Netns::new("readonly")?;
    netns.conntrack_settings(2, false, false)?;
    // As a container has it.
    let script = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && \
                  exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]);
    let output = netns.output(child(&mut command, "track and end")?)?;
    assert!(output.contains("ready"), "{output}");
    assert_eq!(output.matches("unchanged ").count(), 3, "{output}");
    assert!(output.contains("nf_conntrack_acct: Read-only file system"), "{output}");
    assert_eq!(our_tables(&netns)?, 0);
    assert_eq!(settings(&netns)?, [Some(2), Some(0), Some(0)]);
    Ok(())
}

/// This test program again, as another process with a role. `command` is what starts it.
fn child<'a>(command: &'a mut Command, role: &str) -> Result<&'a mut Command> {
    let this = std::env::current_exe()?;
    if command.get_program() != this.as_os_str() {
        command.arg(this);
    }
    Ok(command.args(["--exact", "control::role", "--ignored", "--nocapture"]).env(ROLE, role))
}

#[test]
#[ignore = "the other process of the tests above"]
fn role() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match std::env::var(ROLE).as_deref() {
        Ok("facts") => {
            let facts = runtime.block_on(Facts::read()).unwrap();
            for finding in findings(&facts) {
                println!("found {} exit {:?}", finding.code.name(), finding.code.exit_code());
            }
        }
        Ok("track" | "track and end") => {
            let tracking = runtime.block_on(enable_tracking()).unwrap();
            for error in tracking.unchanged() {
                println!("unchanged {error}");
            }
            println!("ready");
            if std::env::var(ROLE).as_deref() == Ok("track") {
                // The parent kills it; without one it ends by itself.
                std::thread::sleep(Duration::from_secs(20));
            }
        }
        _ => println!("nothing to do"),
    }
}
