//! Real traffic: a first run as a new user tries it, and every field of 10,000 mixed flows against
//! the generator, `conntrack -E` and `conntrack -L`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{
    TO_FILE, can_run, check_shape, close_gateway, end_well, finish, of_event, start, start_bare,
    tracking_netns, wait_until,
};
use crate::lab::demo;
use crate::lab::gateway::Gateway;
use crate::lab::generator::Generator;
use crate::lab::limit::HostLimit;
use crate::lab::netns::Netns;
use crate::lab::traffic::{self, Planned};

#[test]
fn a_first_run_prints_each_connection_as_it_comes_and_goes() {
    if !can_run("a first run", &["nft", "ip"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = tracking_netns("first");
    let Some(mut process) = start_bare(&netns) else { return };
    let mut made = Vec::new();
    for host in ["127.0.0.1", "::1"] {
        made.push(("tcp", tcp(&netns, host)));
        made.push(("udp", udp(&netns, host)));
    }
    Generator::new(&netns).expect("a socket").flush().expect("a flush");
    let seen = |event: &str| {
        let text = process.stdout().expect("a file");
        text.matches(&format!("\"event\":\"{event}\"")).count()
    };
    wait_until("each has come and gone", || seen("new") >= 4 && seen("destroy") >= 4);
    let counters = end_well(&mut process);
    let text = process.stdout().expect("a file");
    let records: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    check_shape(&records);
    counters.balance(of_event(&records, "agent").count() as u64);
    for (proto, port) in made {
        for event in ["new", "destroy"] {
            let found = of_event(&records, event)
                .filter(|record| record["proto_name"] == proto && record["src_port"] == port)
                .count();
            assert_eq!(found, 1, "{event} of {proto} from {port} in {text}");
        }
    }
    assert_eq!(records.len(), 2 + 2 * 4, "nothing else: {text}");
    let log = process.stderr().expect("a log");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "all was well, yet: {log}");
}

#[test]
fn where_conntrack_is_idle_the_command_that_it_says_is_what_makes_it_work() {
    if !can_run("an idle namespace", &["nft", "ip", "sh"]) {
        return;
    }
    let _limit = HostLimit::at_least(10_000).expect("the limit");
    let netns = Netns::new("idle").expect("a namespace");
    netns.conntrack_settings(1, true, true).expect("settings");
    let Some(mut process) = start_bare(&netns) else { return };
    let log = process.stderr().expect("a log");
    let said = "Nothing seems to use conntrack in this network namespace";
    let line = log.lines().find(|line| line.contains(said)).unwrap_or_else(|| panic!("{log}"));
    let command = line.split_once("Mend it: ").expect("a command").1;
    let command = command.split_once(" (to keep it: ").map_or(command, |(command, _)| command);

    udp(&netns, "127.0.0.1");
    netns.output(Command::new("sh").args(["-c", command])).expect("the command works");
    let port = udp(&netns, "127.0.0.1");
    let needle = format!("\"src_port\":{port},");
    wait_until("a record", || process.stdout().is_ok_and(|text| text.contains(&needle)));
    let counters = end_well(&mut process);
    let text = process.stdout().expect("a file");
    let records: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    check_shape(&records);
    counters.balance(2);
    assert_eq!(of_event(&records, "new").count(), 1, "only the flow after the command: {text}");
    assert_eq!(process.stderr().expect("a log").matches(said).count(), 1, "once is enough");
}

#[test]
fn ten_thousand_mixed_flows_differ_in_no_field() {
    const FLOWS: usize = 10_000;
    if !can_run("10,000 mixed flows", &["nft", "ip", "conntrack"]) {
        return;
    }
    let _limit = HostLimit::at_least(50_000).expect("the limit");
    let lab = Gateway::new().expect("a gateway");
    long_timeouts(&lab);
    mark_flows(&lab);
    let process = start(&lab.gateway, TO_FILE);
    let folder = tempfile::tempdir().expect("a folder");
    let eyes = Eyes::open(&lab.gateway, &folder.path().join("events"));

    let flows = lab.mixed(FLOWS).expect("traffic");
    let table = ["ipv4", "ipv6"].map(|family| {
        let mut list = Command::new("conntrack");
        lab.gateway.output(list.args(["-L", "-o", "xml,id", "-f", family])).expect("conntrack -L")
    });
    close_gateway(&lab);
    end_in_portions(&lab, &eyes);
    wait_until("all records", || super::has_lines(&process, "\"event\":\"destroy\"", FLOWS));
    wait_until("all that conntrack saw", || eyes.count("[DESTROY]") == FLOWS);
    let lines = eyes.close();
    let records = finish(process);

    let faults = demo::compare(&flows, &records);
    assert!(faults.is_empty(), "{} faults: {:#?}", faults.len(), &faults[..faults.len().min(5)]);
    assert_eq!(records.len(), 2 + 2 * FLOWS, "and nothing else");
    same_as_events(&records, &lines);
    let listed = same_as_table(&records, &table);
    let refused = flows.iter().filter(|flow| flow.kind == traffic::Kind::TcpRefused).count();
    assert_eq!(listed, FLOWS - refused, "of the table");
    check_derived(&flows, &records);
    println!(
        "{FLOWS} flows: {} records equal the plan, {} conntrack -E, {listed} entries conntrack -L",
        records.len() - 2,
        lines.len()
    );
}

/// So that none ends before it is looked at, however slow this host is.
fn long_timeouts(lab: &Gateway) {
    for name in [
        "generic_timeout",
        "gre_timeout",
        "gre_timeout_stream",
        "icmp_timeout",
        "icmpv6_timeout",
        "sctp_timeout_cookie_wait",
        "tcp_timeout_close",
        "tcp_timeout_syn_sent",
        "tcp_timeout_time_wait",
        "udp_timeout",
        "udp_timeout_stream",
    ] {
        let name = format!("netfilter/nf_conntrack_{name}");
        lab.gateway.sysctl(&name, "600").expect("a setting");
    }
}

/// Marks of the flows: 1 to this.
const PORTIONS: usize = 125;

/// Each flow gets a mark with its first packet, in turn.
fn mark_flows(lab: &Gateway) {
    let rule = format!("ct mark 0 ct mark set numgen inc mod {PORTIONS} offset 1");
    lab.gateway
        .nft(&format!(
            "table inet conntrail_marks {{
                chain pre {{ type filter hook prerouting priority mangle; policy accept; {rule}; }}
            }}"
        ))
        .expect("a rule");
}

/// Ends all flows, some 80 at a time: `conntrack -E` holds 166 events and loses the rest. (Its -b
/// works on another socket, seen with 1.4.7.)
fn end_in_portions(lab: &Gateway, eyes: &Eyes) {
    let mut left = lab.gateway.conntrack_count().expect("a count");
    for (mark, family) in (1..=PORTIONS).flat_map(|mark| [(mark, "ipv4"), (mark, "ipv6")]) {
        let seen = eyes.count("[DESTROY]");
        let mark = mark.to_string();
        let mut delete = Command::new("conntrack");
        // It fails where there is none with that mark; what is left tells.
        let _ = lab.gateway.output(delete.args(["-D", "-f", family, "-m", &mark]));
        let now = lab.gateway.conntrack_count().expect("a count");
        wait_until("conntrack -E keeps up", || {
            eyes.count("[DESTROY]") as u64 == seen as u64 + left - now
        });
        left = now;
    }
    assert_eq!(left, 0, "flows without a mark");
}

/// `conntrack -E`, which looks on.
struct Eyes {
    child: Child,
    output: std::path::PathBuf,
}

impl Eyes {
    fn open(netns: &Netns, output: &Path) -> Self {
        let child = netns
            .spawn(
                Command::new("nice")
                    // First in line, because its buffer is so small.
                    .args(["-n", "-15", "conntrack", "-E", "-e", "NEW,DESTROY"])
                    .args(["-o", "id,timestamp"])
                    .stdin(Stdio::null())
                    .stdout(File::create(output).expect("a file"))
                    .stderr(Stdio::null()),
            )
            .expect("conntrack -E");
        let eyes = Eyes { child, output: output.to_owned() };
        // The agent has a socket for each of the two groups, conntrack one for both.
        wait_until("conntrack listens", || {
            let table = netns.run(|| fs::read_to_string("/proc/thread-self/net/netlink"));
            table.expect("a table").lines().any(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                let groups = u32::from_str_radix(columns[3], 16).unwrap_or(0);
                columns[1] == "12" && groups & 5 == 5
            })
        });
        eyes
    }

    fn count(&self, word: &str) -> usize {
        fs::read_to_string(&self.output).expect("a file").matches(word).count()
    }

    /// Ends it. Each line without its stamp, and without who caused the event.
    fn close(mut self) -> Vec<String> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).expect("it runs");
        self.child.wait().expect("an end");
        let text = fs::read_to_string(&self.output).expect("a file");
        let lines = text.lines().map(|line| {
            let (_, rest) = line.split_once(']').expect("a stamp");
            let words = rest.split_whitespace();
            let words: Vec<&str> = words.take_while(|word| *word != "[USERSPACE]").collect();
            words.join(" ")
        });
        lines.collect()
    }
}

impl Drop for Eyes {
    fn drop(&mut self) {
        // After `close` it is gone and waited for: both do nothing then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each record, written from its JSON as conntrack writes an event, is a line of conntrack's, and
/// each line of conntrack's is a record.
fn same_as_events(records: &[Value], lines: &[String]) {
    let mut theirs: HashMap<&str, i64> = HashMap::new();
    for line in lines {
        *theirs.entry(line).or_default() += 1;
    }
    let mut ours = 0;
    for record in records.iter().filter(|record| record["event"] != "agent") {
        let line = as_event(record);
        match theirs.get_mut(&*line) {
            Some(count) => *count -= 1,
            None => {
                let id = format!("id={}", record["ct_id"]);
                let near: Vec<_> = lines.iter().filter(|line| line.ends_with(&id)).collect();
                panic!("conntrack has no\n{line}\nof {record}\nbut {near:#?}");
            }
        }
        ours += 1;
    }
    let other: Vec<_> = theirs.iter().filter(|(_, count)| **count != 0).take(5).collect();
    assert!(other.is_empty() && ours == lines.len(), "{ours} of {}: {other:#?}", lines.len());
}

fn as_event(record: &Value) -> String {
    let mut words = vec![match record["event"].as_str() {
        Some("new") => "[NEW]".to_owned(),
        Some("destroy") => "[DESTROY]".to_owned(),
        other => panic!("{other:?} was not asked for"),
    }];
    let value = |name: &str| record.get(name).map(plain);
    let mut put = |word: Option<String>| words.extend(word);
    put(value("proto_name").filter(|name| conntrack_knows(name)).or(Some("unknown".to_owned())));
    put(value("proto"));
    put(value("timeout_s"));
    put(value("tcp_state"));
    put(value("sctp_state"));
    let [original, reply] = tuples(record);
    let status =
        |bit: &str| record["status"].as_array().is_some_and(|s| s.iter().any(|b| b == bit));
    let counted = |direction: &str| {
        let packets = value(&format!("{direction}_packets"))?;
        Some(format!("packets={packets} bytes={}", value(&format!("{direction}_bytes"))?))
    };
    put(Some(original));
    put(counted("orig"));
    put((!status("seen_reply")).then(|| "[UNREPLIED]".to_owned()));
    put(Some(reply));
    put(counted("reply"));
    put(status("assured").then(|| "[ASSURED]".to_owned()));
    put(value("mark").map(|mark| format!("mark={mark}")));
    put(value("zone").map(|zone| format!("zone={zone}")));
    // conntrack takes whole seconds first and the difference then.
    if let (Some(start), Some(end)) = (value("start"), value("end")) {
        put(Some(format!("delta-time={}", second(&end) - second(&start))));
    }
    put(value("use_count").map(|count| format!("use={count}")));
    put(value("helper").map(|helper| format!("helper={helper}")));
    put(value("ct_id").map(|id| format!("id={id}")));
    words.join(" ")
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn second(time: &str) -> i64 {
    time.parse::<jiff::Timestamp>().expect("a time").as_second()
}

fn conntrack_knows(name: &str) -> bool {
    ["tcp", "udp", "icmp", "icmpv6", "sctp", "gre", "udplite", "dccp"].contains(&name)
}

/// Both tuples as conntrack writes them. The reply's is the other side of the translation.
fn tuples(record: &Value) -> [String; 2] {
    let value = |name: &str| record.get(name).map(plain);
    let translated = |name: &str| value(&format!("nat_{name}")).or_else(|| value(name));
    let ip = |side: &str| value(&format!("{side}_ip")).expect("an address");
    let nat_ip = |side: &str| translated(&format!("{side}_ip")).expect("an address");
    let ends = |src: String, dst: String| format!("src={src} dst={dst}");
    let mut both = [ends(ip("src"), ip("dst")), ends(nat_ip("dst"), nat_ip("src"))];
    if let (Some(src), Some(dst)) = (value("src_port"), value("dst_port")) {
        both[0] += &format!(" sport={src} dport={dst}");
        let (src, dst) = (translated("dst_port"), translated("src_port"));
        both[1] += &format!(" sport={} dport={}", src.expect("a port"), dst.expect("a port"));
    }
    if let (Some(kind), Some(code), Some(id)) =
        (value("icmp_type"), value("icmp_code"), value("icmp_id"))
    {
        both[0] += &format!(" type={kind} code={code} id={id}");
        let answer = BTreeMap::from([("8", "0"), ("128", "129")])[&*kind];
        let id = translated("icmp_id").expect("an id");
        both[1] += &format!(" type={answer} code={code} id={id}");
    }
    if let (Some(src), Some(dst)) = (value("gre_key_src"), value("gre_key_dst")) {
        let key = |text: &str| text.parse::<u16>().expect("a key");
        both[0] += &format!(" srckey={:#x} dstkey={:#x}", key(&src), key(&dst));
        both[1] += &format!(" srckey={:#x} dstkey={:#x}", key(&dst), key(&src));
    }
    both
}

/// Each entry of the table is what its flow's `destroy` says: the last packet had passed before.
/// Gives their number.
fn same_as_table(records: &[Value], table: &[String]) -> usize {
    let by_id: HashMap<u64, &Value> = of_event(records, "destroy")
        .map(|record| (record["ct_id"].as_u64().expect("an id"), record))
        .collect();
    let entries = table.iter().flat_map(|xml| xml.lines()).filter(|line| line.starts_with("<flow"));
    let mut compared = 0;
    for entry in entries {
        let id = element(entry, "id").and_then(|id| id.parse().ok()).expect("an id");
        let record = by_id.get(&id).unwrap_or_else(|| panic!("no destroy of {entry}"));
        let want = of_entry(entry);
        for (name, want) in &want {
            let got = match *name {
                "reply" => Some(tuples(record)[1].clone()),
                "assured" | "unreplied" => {
                    let bit = if *name == "assured" { "assured" } else { "seen_reply" };
                    let set = record["status"].as_array().expect("status").iter().any(|b| b == bit);
                    Some((set == (*name == "assured")).to_string())
                }
                _ => record.get(*name).map(plain),
            };
            // A mark of 0 is left out of events.
            let got = got.or((*name == "mark").then(|| "0".to_owned()));
            assert_eq!(got.as_ref(), want.as_ref(), "{name} of {record}\nis not that of {entry}");
        }
        assert!(want.len() >= 12, "{want:?}");
        compared += 1;
    }
    compared
}

/// An entry of `conntrack -L -o xml,id` under our names. It leaves out ICMP's id.
fn of_entry(entry: &str) -> Vec<(&'static str, Option<String>)> {
    let (original, rest) = entry.split_once("<meta direction=\"reply\">").expect("two directions");
    let (reply, independent) =
        rest.split_once("<meta direction=\"independent\">").expect("and what has none");
    let of = |text: &str, tag: &str| element(text, tag).map(str::to_owned);
    let number = |text: &str| {
        let (_, rest) = text.split_once("<layer4 protonum=\"").expect("a protocol");
        rest.split('"').next().map(str::to_owned)
    };
    let mut fields = vec![
        ("src_ip", of(original, "src")),
        ("dst_ip", of(original, "dst")),
        ("src_port", of(original, "sport")),
        ("dst_port", of(original, "dport")),
        ("proto", number(original)),
        ("orig_packets", of(original, "packets")),
        ("orig_bytes", of(original, "bytes")),
        ("reply_packets", of(reply, "packets")),
        ("reply_bytes", of(reply, "bytes")),
        ("mark", of(independent, "mark")),
        ("zone", of(independent, "zone")),
        ("assured", Some(independent.contains("<assured/>").to_string())),
        ("unreplied", Some(independent.contains("<unreplied/>").to_string())),
    ];
    if number(original).as_deref() == Some("6") {
        fields.push(("tcp_state", of(independent, "state")));
    }
    if let (Some(sport), Some(dport)) = (of(reply, "sport"), of(reply, "dport")) {
        let (src, dst) = (of(reply, "src").expect("src"), of(reply, "dst").expect("dst"));
        let tuple = format!("src={src} dst={dst} sport={sport} dport={dport}");
        fields.push(("reply", Some(tuple)));
    }
    fields
}

fn element<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{tag}>"))?;
    rest.split_once('<').map(|(value, _)| value)
}

/// What no other program says: ids, times, Community IDs.
fn check_derived(flows: &[Planned], records: &[Value]) {
    let mut flow_ids: HashMap<traffic::Key, (&Value, &Value)> = HashMap::new();
    let mut all = HashSet::new();
    let time = |record: &Value, name: &str| {
        let text = record[name].as_str().unwrap_or_else(|| panic!("no {name}: {record}"));
        text.parse::<jiff::Timestamp>().expect("a time")
    };
    for record in of_event(records, "new") {
        let key = traffic::key_of(record).expect("a flow");
        flow_ids.insert(key, (&record["flow_id"], &record["ts"]));
        assert!(all.insert(record["flow_id"].as_str().expect("an id")), "twice: {record}");
    }
    for record in of_event(records, "destroy") {
        let (flow_id, came) = flow_ids[&traffic::key_of(record).expect("a flow")];
        assert_eq!(record["flow_id"], *flow_id);
        let (begin, end) = (time(record, "start"), time(record, "end"));
        let lasted = end.as_nanosecond() - begin.as_nanosecond();
        assert!(lasted >= 0 && record["duration_ns"] == lasted as u64, "{record}");
        let came: jiff::Timestamp = came.as_str().expect("a time").parse().expect("a time");
        // The time of NEW is that of the first packet's arrival, a moment before the entry's start;
        // that of DESTROY is taken after the stop.
        assert!(came <= end && end <= time(record, "ts"), "{came}: {record}");
        assert!(record["community_id"].is_string(), "{record}");
        assert_eq!(record["community_id_nat"].is_string(), record["nat"].is_string(), "{record}");
    }
    assert_eq!(all.len(), flows.len());
}

/// Source port of a connection over loopback, with a word each way.
pub(super) fn tcp(netns: &Netns, host: &str) -> u16 {
    let (listener, mut ours) = netns.run(|| {
        let listener = TcpListener::bind((host, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        (listener, TcpStream::connect(address).expect("a connection"))
    });
    let (mut theirs, _) = listener.accept().expect("a connection");
    ours.write_all(b"ask").expect("room");
    theirs.read_exact(&mut [0; 3]).expect("a word");
    theirs.write_all(b"yes").expect("room");
    ours.read_exact(&mut [0; 3]).expect("a word");
    ours.local_addr().expect("an address").port()
}

/// Source port of a datagram over loopback that nobody answers.
pub(super) fn udp(netns: &Netns, host: &str) -> u16 {
    let (theirs, ours) = netns.run(|| {
        let bind = || UdpSocket::bind((host, 0)).expect("a port");
        (bind(), bind())
    });
    theirs.set_read_timeout(Some(Duration::from_secs(10))).expect("a time-out");
    ours.send_to(b"ask", theirs.local_addr().expect("an address")).expect("sent");
    theirs.recv_from(&mut [0; 8]).expect("it arrives");
    ours.local_addr().expect("an address").port()
}
