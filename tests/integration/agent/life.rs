//! The life of a run: its stop, also when nobody takes the records; reload; what it leaves behind.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use super::flows::{tcp, udp};
use super::{
    PATIENCE, PROGRAM, STOP_LIMIT, TO_FILE, can_run, check_shape, end_well, finish, has_record,
    of_event, signal, start, tracking_netns, wait_until,
};
use crate::lab::agent::AgentProcess;
use crate::lab::generator::{Flows, Generator};
use crate::lab::limit::HostLimit;
use crate::lab::netns::Netns;
use crate::lab::records;

/// What issue 3 allows for a stop with a sink that takes nothing.
const BOUNDED: Duration = Duration::from_secs(10);

#[test]
fn sigterm_drains_what_is_under_way() {
    const FLOWS: u32 = 20_000;
    if !can_run("a drain", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(50_000).expect("the limit");
    let netns = tracking_netns("drain");
    let mut process = start(&netns, TO_FILE);
    let mut generator = Generator::new(&netns).expect("a socket");
    assert_eq!(
        generator.insert(&Flows::default(), 0..FLOWS).expect("flows").done,
        u64::from(FLOWS)
    );
    generator.flush().expect("a flush");
    // At once: most of it is still in the sockets and the queue.
    signal(&mut process, Signal::SIGTERM);
    process.wait_notified("STOPPING=1", PATIENCE).expect("it says so");
    process.wait(STOP_LIMIT).expect("an end");
    let records = finish_ended(process);
    let (news, ends) = (of_event(&records, "new").count(), of_event(&records, "destroy").count());
    let lost: u64 = of_event(&records, "gap").filter_map(|gap| gap["gap_events"].as_u64()).sum();
    assert_eq!(news as u64 + ends as u64 + lost, u64::from(2 * FLOWS));
    assert_eq!(ends, FLOWS as usize, "the buffer holds them all");
}

/// As [`finish`], of one that has ended.
fn finish_ended(mut process: AgentProcess) -> Vec<Value> {
    let ended = process.wait(Duration::ZERO).expect("it has ended");
    let log = process.stderr().expect("a log");
    assert!(ended.status.success(), "{}: {log}", ended.status);
    let records = records::read(&process.path("flows.json")).expect("whole lines of JSON");
    check_shape(&records);
    super::Counters::of_log(&log).balance(of_event(&records, "agent").count() as u64);
    records
}

#[test]
fn a_sink_whose_folder_is_missing_delays_the_stop_and_the_loss_is_said() {
    if !can_run("a missing folder", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("nowhere");
    let missing = TO_FILE.replace("{dir}/flows.json", "{dir}/missing/flows.json");
    let mut process = start(&netns, &missing);
    ends_unwell(&mut process, &netns);
}

#[test]
fn a_full_disk_delays_the_stop_and_the_loss_is_said() {
    if !can_run("a full disk", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("full");
    let disk = FullDisk::new();
    let path = disk.0.path().join("flows.json");
    let config = TO_FILE.replace("{dir}/flows.json", &path.display().to_string());
    let mut process = start(&netns, &config);
    ends_unwell(&mut process, &netns);
    let text = fs::read_to_string(&path).expect("a file");
    assert!(text.is_empty() || text.ends_with('\n'), "a torn line: {text}");
}

/// With one sink that stands still, a small spool and far more events than it holds: what is given up
/// at the stop is in a gap record, which the sink that works gets, and the agent's last word is there.
#[test]
fn what_a_stop_gives_up_is_in_a_gap_record() {
    const FLOWS: u32 = 100_000;
    if !can_run("a stop under back-pressure", &["nft", "ip"]) {
        return;
    }
    let _turn = super::storm_turn();
    let _limit = HostLimit::at_least(200_000).expect("the limit");
    let netns = tracking_netns("giveup");
    let stuck =
        TO_FILE.replace("flows", "stuck").replace("{dir}/stuck.json", "{dir}/no/stuck.json");
    let config = format!("[spool]\nmax_size = \"1MiB\"\n{TO_FILE}{stuck}");
    let mut process = start(&netns, &config);
    let mut generator = Generator::new(&netns).expect("a socket");
    let made = generator.insert(&Flows::default(), 0..FLOWS).expect("flows").done;
    let ended = process.terminate(STOP_LIMIT).expect("an end");
    let log = process.stderr().expect("a log");
    assert_eq!(ended.status.code(), Some(1), "{log}");
    let records = records::read(&process.path("flows.json")).expect("whole lines of JSON");
    check_shape(&records);
    let told = of_event(&records, "new").count() as u64;
    let given_up: u64 =
        of_event(&records, "gap").filter_map(|gap| gap["gap_events"].as_u64()).sum();
    assert_eq!(told + given_up, made, "{log}");
    assert!(of_event(&records, "gap").any(|gap| gap["gap_cause"] == "spool_full"), "{log}");
    assert!(log.contains("records were given up"), "{log}");
}

#[test]
fn events_switched_off_while_it_runs_are_a_gap_from_then_to_when_they_are_on_again() {
    if !can_run("events off", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("eventsoff");
    let process = start(&netns, TO_FILE);
    let gaps = |count: usize| {
        wait_until("a gap record", || {
            let text = fs::read_to_string(process.path("flows.json")).unwrap_or_default();
            text.matches("\"gap_cause\":\"events_off\"").count() == count
        });
    };
    netns.sysctl("netfilter/nf_conntrack_events", "0").expect("off");
    gaps(1);
    netns.sysctl("netfilter/nf_conntrack_events", "1").expect("on");
    gaps(2);
    let records = finish(process);
    let gaps: Vec<_> = of_event(&records, "gap").collect();
    assert_eq!(gaps[0]["gap_from"], gaps[1]["gap_from"], "both begin when it was last on");
    assert_eq!(gaps[0]["gap_precision"], "unknown");
}

/// Makes a hundred flows, sends SIGTERM, and looks at how it ends. Records: the start, the flows and
/// the stop.
fn ends_unwell(process: &mut AgentProcess, netns: &Netns) {
    const FLOWS: u32 = 100;
    let mut generator = Generator::new(netns).expect("a socket");
    assert_eq!(
        generator.insert(&Flows::default(), 0..FLOWS).expect("flows").done,
        u64::from(FLOWS)
    );
    let asked = Instant::now();
    let ended = process.terminate(STOP_LIMIT).expect("an end");
    let took = asked.elapsed();
    let log = process.stderr().expect("a log");
    assert!(took < BOUNDED, "{took:?}: {log}");
    assert_eq!(ended.status.code(), Some(1), "{log}");
    let counters = super::Counters::of_log(&log);
    counters.balance(2);
    let pending = counters.get("sink_records_pending{sink=\"flows\"}");
    assert_eq!(counters.get("records_appended_total"), u64::from(FLOWS) + 2);
    assert!(pending > 0, "{counters:?}");
    let said = format!("{pending} records were not delivered to sink flows");
    assert!(log.contains(&said), "`{said}` is not in {log}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    if !can_run("a second signal", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("twice");
    let missing = TO_FILE.replace("{dir}/flows.json", "{dir}/missing/flows.json");
    let mut process = start(&netns, &missing);
    udp(&netns, "127.0.0.1");
    signal(&mut process, Signal::SIGTERM);
    process.wait_notified("STOPPING=1", PATIENCE).expect("it says so");
    // By then it waits for the sink, which once held up the end all the same.
    std::thread::sleep(Duration::from_secs(1));
    let asked = Instant::now();
    signal(&mut process, Signal::SIGINT);
    let ended = process.wait(STOP_LIMIT).expect("an end");
    let log = process.stderr().expect("a log");
    // Without the second one it would wait for the sink: 8 s.
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}: {log}", asked.elapsed());
    assert_eq!(ended.status.code(), Some(1), "{log}");
    assert!(log.contains("on the second signal"), "{log}");
}

#[test]
fn a_renamed_file_is_left_at_sighup_and_no_record_falls_between() {
    if !can_run("a reopened file", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("rename");
    let mut process = start(&netns, TO_FILE);
    let (file, moved) = (process.path("flows.json"), process.path("flows.json.1"));
    let mut ports = vec![udp(&netns, "127.0.0.1")];
    wait_until("the first record", || has_record(&process, &format!("\"src_port\":{}", ports[0])));
    fs::rename(&file, &moved).expect("renamed");
    signal(&mut process, Signal::SIGHUP);
    process.wait_notified("RELOADING=1", PATIENCE).expect("it says so");
    let since = process.notified().expect("a socket").iter();
    let since: Vec<u64> =
        since.filter_map(|line| line.strip_prefix("MONOTONIC_USEC=")?.parse().ok()).collect();
    assert!(since.len() == 1 && since[0] > 0, "Type=notify-reload wants one: {since:?}");
    wait_until("ready again", || {
        let said = process.notified().expect("a socket");
        said.iter().filter(|line| *line == "READY=1").count() == 2
    });
    ports.push(udp(&netns, "127.0.0.1"));
    wait_until("the second record", || has_record(&process, &format!("\"src_port\":{}", ports[1])));
    let old = fs::read_to_string(&moved).expect("a file");
    assert!(old.contains(&format!("\"src_port\":{}", ports[0])) && old.ends_with('\n'));
    assert!(!old.contains(&format!("\"src_port\":{}", ports[1])));
    let counters = end_well(&mut process);
    let mut records: Vec<Value> =
        old.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    fs::remove_file(&moved).expect("removed");
    records.extend(records::read(&file).expect("whole lines"));
    check_shape(&records);
    counters.balance(of_event(&records, "agent").count() as u64);
    assert_eq!(of_event(&records, "new").count(), 2);
}

#[test]
fn a_reload_changes_filters_and_sinks_and_a_broken_one_changes_nothing() {
    if !can_run("a reload", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("reload");
    let sink = |name: &str, more: &str| {
        TO_FILE.replace("\"flows\"", &format!("\"{name}\"")).replace("flows.json", name) + more
    };
    let flow = || udp(&netns, "127.0.0.1");
    let mut process = start(&netns, &sink("flows.json", ""));
    let dir = process.dir().to_owned();
    let has = |file: &str, port: u16| {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        // It may be the last field.
        [',', '}'].iter().any(|after| text.contains(&format!("\"src_port\":{port}{after}")))
    };
    let before = flow();
    wait_until("a record under the first configuration", || has("flows.json", before));

    // A filter that drops UDP, and a second sink.
    let only_tcp = "[filter]\nprotocols = [\"tcp\"]\n";
    reload(
        &mut process,
        &(only_tcp.to_owned() + &sink("flows.json", "") + &sink("added.json", "")),
    );
    let filtered = flow();
    let passing = tcp(&netns, "127.0.0.1");
    wait_until("a record in both sinks", || {
        has("flows.json", passing) && has("added.json", passing)
    });
    // A broken one: it stays as it is, and says why.
    reload(&mut process, "[filter]\nprotocols = [\"tpc\"]\n");
    let log = process.stderr().expect("a log");
    assert!(log.contains("`tpc`") && log.contains("old one stays"), "{log}");
    let filtered_too = flow();
    // The filter is off again, the first sink changed, the second goes.
    reload(&mut process, &sink("flows.json", "fields = [\"src_port\"]\n"));
    let after = flow();
    wait_until("a record under the last configuration", || has("flows.json", after));
    for port in [filtered, filtered_too] {
        assert!(!has("flows.json", port) && !has("added.json", port), "{port} was filtered");
    }
    assert!(!has("added.json", after), "the removed sink goes on");

    end_well(&mut process);
    let added = records::read(&dir.join("added.json")).expect("whole lines");
    assert_eq!(of_event(&added, "new").count(), 1, "{added:?}");
    let records = records::read(&dir.join("flows.json")).expect("whole lines");
    check_shape(&records);
    let actions: Vec<_> =
        of_event(&records, "agent").map(|note| note["agent_action"].as_str()).collect();
    let expected = ["started", "reloaded", "reloaded", "stopped"].map(Some);
    assert_eq!(actions, expected, "a broken one is no reload");
    let flow = |port: u16| {
        let mut found = records.iter().filter(|record| record["src_port"] == port);
        found.next().unwrap_or_else(|| panic!("no record of {port}"))
    };
    assert!(flow(before).get("dst_port").is_some(), "all fields: {}", flow(before));
    assert!(flow(after).get("dst_port").is_none(), "one field: {}", flow(after));
    let log = process.stderr().expect("a log");
    for said in ["sink added", "sink removed", "sink changed"] {
        assert_eq!(log.matches(said).count(), 1, "{said} in {log}");
    }
}

#[test]
fn a_sink_that_is_renamed_or_removed_and_put_back_goes_on_without_a_torn_or_a_second_line() {
    if !can_run("sinks of changing names", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("names");
    let sink = |name: &str, file: &str| {
        TO_FILE.replace("\"flows\"", &format!("\"{name}\"")).replace("flows.json", file)
    };
    let kept = sink("kept", "kept.json");
    // It can't deliver, so that it is still on its way out when it is put back.
    let stuck = sink("stuck", "missing/stuck.json");
    let both = format!("{kept}{stuck}{}", sink("before", "flows.json"));
    let mut process = start(&netns, &both);
    let mut ports = vec![udp(&netns, "127.0.0.1")];
    wait_until("a record", || has_record(&process, &format!("\"src_port\":{}", ports[0])));
    for name in ["after", "before", "after"] {
        reload(&mut process, &format!("{kept}{}", sink(name, "flows.json")));
        ports.push(udp(&netns, "127.0.0.1"));
        reload(&mut process, &format!("{kept}{stuck}{}", sink(name, "flows.json")));
        ports.push(udp(&netns, "127.0.0.1"));
    }
    fs::create_dir(process.path("missing")).expect("a folder");
    let last = format!("\"src_port\":{}", ports[ports.len() - 1]);
    let stuck_file = process.path("missing/stuck.json");
    wait_until("the stuck one delivers", || {
        fs::read_to_string(&stuck_file).is_ok_and(|text| text.contains(&last))
    });
    let counters = end_well(&mut process);
    let of = |file: &str| -> Vec<Value> {
        let mut records = records::read(&process.path(file)).expect("whole lines");
        check_shape(&records);
        records.iter_mut().map(Value::take).collect()
    };
    let all = of("kept.json");
    assert_eq!(of_event(&all, "new").count(), ports.len());
    assert_eq!(of("flows.json"), all, "a rename neither repeats nor leaves out");
    assert_eq!(of("missing/stuck.json"), all, "the sink put back went on at its place");
    // Counters of a name go on when the name comes back.
    let acked = |name: &str| counters.get(&format!("sink_records_acked_total{{sink=\"{name}\"}}"));
    assert_eq!(acked("before") + acked("after"), all.len() as u64);
    assert!(acked("before") > 0 && acked("after") > 0);
    let log = process.stderr().expect("a log");
    assert_eq!(log.matches("sink renamed").count(), 3, "{log}");
    assert_eq!(log.matches("sink put back").count(), 3, "{log}");
    assert!(!log.contains("another sink or process"), "{log}");
}

#[test]
fn a_stop_waits_for_a_sink_that_was_just_removed_and_says_what_it_left() {
    if !can_run("a stop after a removal", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("removed");
    let missing = TO_FILE.replace("flows", "gone").replace("{dir}/", "{dir}/missing/");
    let mut process = start(&netns, &format!("{TO_FILE}{missing}"));
    let port = udp(&netns, "127.0.0.1");
    wait_until("the record", || has_record(&process, &format!("\"src_port\":{port}")));
    reload(&mut process, TO_FILE);
    let asked = Instant::now();
    let ended = process.terminate(STOP_LIMIT).expect("an end");
    let log = process.stderr().expect("a log");
    assert!(asked.elapsed() < BOUNDED, "{log}");
    assert_eq!(ended.status.code(), Some(1), "{log}");
    assert!(log.contains("records were not delivered to sink gone"), "{log}");
    records::read(&process.path("flows.json")).expect("whole lines");
}

#[test]
fn sighup_on_a_full_disk_does_not_say_that_the_sink_works_again() {
    if !can_run("SIGHUP on a full disk", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("hup");
    let disk = FullDisk::new();
    let path = disk.0.path().join("flows.json");
    let config = TO_FILE.replace("{dir}/flows.json", &path.display().to_string());
    let mut process = start(&netns, &config);
    let port = udp(&netns, "127.0.0.1");
    let says =
        |process: &AgentProcess, what: &str| process.stderr().is_ok_and(|log| log.contains(what));
    wait_until("it says that it fails", || says(&process, "the sink fails"));
    reload(&mut process, &config);
    // A second SIGHUP: the first is dealt with when it is answered, the sink within a chunk.
    reload(&mut process, &config);
    std::thread::sleep(Duration::from_millis(500));
    assert!(!says(&process, "works again"), "{:?}", process.stderr());
    fs::remove_file(disk.0.path().join("filler")).expect("removed");
    wait_until("it says that it works", || says(&process, "works again"));
    let text = fs::read_to_string(&path).expect("a file");
    assert!(text.contains(&format!("\"src_port\":{port}")), "{text}");
    end_well(&mut process);
}

/// Writes the file and waits until the agent says that it has dealt with it.
fn reload(process: &mut AgentProcess, config: &str) {
    let config = config.replace("{dir}", &process.dir().display().to_string());
    fs::write(process.path("conntrail.toml"), config).expect("written");
    let ready = |process: &mut AgentProcess| {
        let said = process.notified().expect("a socket");
        said.iter().filter(|line| *line == "READY=1").count()
    };
    let before = ready(process);
    signal(process, Signal::SIGHUP);
    wait_until("the end of the reload", || ready(process) > before);
}

#[test]
fn sigusr1_prints_the_counters() {
    if !can_run("the counters", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("usr1");
    let mut process = start(&netns, TO_FILE);
    let port = udp(&netns, "127.0.0.1");
    wait_until("the record", || has_record(&process, &format!("\"src_port\":{port}")));
    let appended = "conntrail_records_appended_total ";
    assert!(!process.stderr().expect("a log").contains(appended));
    signal(&mut process, Signal::SIGUSR1);
    wait_until("counters", || process.stderr().is_ok_and(|log| log.contains(appended)));
    let counters = super::Counters::of_log(&process.stderr().expect("a log"));
    assert_eq!(counters.get("records_appended_total"), 2, "the start and the flow");
    assert_eq!(finish(process).len(), 3);
}

#[test]
fn a_reader_that_closes_stdout_ends_it_quietly() {
    if !can_run("a closed pipe", &["nft", "ip", "sh", "head"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("pipe");
    let dir = tempfile::tempdir().expect("a folder");
    fs::write(dir.path().join("c.toml"), "[[sink]]\ntype = \"stdout\"\n").expect("written");
    // The exit code of the agent, not of head.
    let script = "{ \"$0\" run --config c.toml 2>log; echo $? >code; } | head -n 1 >first";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, PROGRAM]).current_dir(dir.path()).stdin(Stdio::null());
    let mut child = netns.spawn(&mut shell).expect("sh starts");
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    // head has its line with the agent's start. The next write finds the pipe closed.
    wait_until("the end", || {
        if !read("first").is_empty() {
            udp(&netns, "127.0.0.1");
        }
        child.try_wait().expect("a child").is_some()
    });
    assert_eq!(read("code").trim(), "0", "{}", read("log"));
    assert_eq!(read("first").lines().count(), 1);
    let log = read("log");
    assert!(!log.contains("ERROR") && !log.contains("panic"), "{log}");
}

#[test]
fn kill_9_leaves_nothing_behind() {
    if !can_run("kill -9", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = Netns::new("kill").expect("a namespace");
    let config = format!("[capture]\nenable_tracking = true\n{TO_FILE}");
    let mut process = start(&netns, &config);
    udp(&netns, "127.0.0.1");
    wait_until("a record", || has_record(&process, "\"event\":\"new\""));
    assert!(tables(&netns).contains("conntrail_"), "{}", tables(&netns));
    let inode = netns.run(|| fs::metadata("/proc/thread-self/ns/net")).expect("it is there").ino();
    wait_until("the guard runs", || processes_in(inode).len() == 2);

    signal(&mut process, Signal::SIGKILL);
    process.wait(PATIENCE).expect("an end");
    wait_until("the guard goes", || processes_in(inode).is_empty());
    assert_eq!(tables(&netns).trim(), "", "the table went with its owner");
    // A socket that somebody holds would stand here.
    let sockets = netns.run(|| fs::read_to_string("/proc/thread-self/net/netlink")).expect("read");
    let netfilter = sockets.lines().filter(|line| {
        let mut columns = line.split_whitespace().skip(1);
        // Port number 0 is the kernel's own.
        columns.next() == Some("12") && columns.next() != Some("0")
    });
    assert_eq!(netfilter.count(), 0, "{sockets}");
    // What it wrote before is whole.
    records::read(&process.path("flows.json")).expect("whole lines");
}

#[test]
fn enable_tracking_switches_on_and_puts_everything_back() {
    if !can_run("enable_tracking", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = Netns::new("tracking").expect("a namespace");
    netns.conntrack_settings(2, false, false).expect("settings");
    let settings = || {
        ["events", "acct", "timestamp"].map(|name| {
            netns.read_sysctl(&format!("netfilter/nf_conntrack_{name}")).expect("a setting")
        })
    };
    let config = format!("[capture]\nenable_tracking = true\n{TO_FILE}");
    let process = start(&netns, &config);
    assert_eq!(settings(), ["1", "1", "1"]);
    assert!(tables(&netns).contains("conntrail_"), "{}", tables(&netns));
    let port = udp(&netns, "127.0.0.1");
    Generator::new(&netns).expect("a socket").flush().expect("a flush");
    wait_until("its end", || has_record(&process, "\"event\":\"destroy\""));
    let log = process.stderr().expect("a log");
    assert!(!log.contains("WARN"), "what it mends itself is no warning: {log}");
    let records = finish(process);
    let end = of_event(&records, "destroy").next().expect("one");
    assert_eq!(end["src_port"], port);
    assert!(end["orig_packets"] == 1 && end["duration_ns"].is_u64(), "{end}");
    assert_eq!(settings(), ["2", "0", "0"]);
    assert_eq!(tables(&netns).trim(), "");
}

fn tables(netns: &Netns) -> String {
    netns.output(Command::new("nft").args(["list", "tables"])).expect("nft")
}

/// Processes in the network namespace of that inode.
fn processes_in(inode: u64) -> Vec<PathBuf> {
    let own = format!("net:[{inode}]");
    let all = fs::read_dir("/proc").expect("proc").filter_map(|entry| Some(entry.ok()?.path()));
    all.filter(|path| {
        // One that ends meanwhile, and what is no process, has no link.
        fs::read_link(path.join("ns/net")).is_ok_and(|link| link == Path::new(&own))
    })
    .collect()
}

/// A tmpfs without a free page, gone with the value.
struct FullDisk(tempfile::TempDir);

impl FullDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), c"size=64k").expect("a mount");
        let disk = FullDisk(dir);
        fs::write(disk.0.path().join("filler"), vec![0; 64 << 10]).expect("all the room");
        disk
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        // DETACH: also when a panic leaves a file open.
        if let Err(error) = unmount(self.0.path(), UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {error}", self.0.path().display());
        }
    }
}
