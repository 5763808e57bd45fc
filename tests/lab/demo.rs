//! `make demo`: a NAT gateway, the agent inside it, real traffic, and a table of what was seen.
//!
//! It is also a test: it fails unless each driven flow has its `new` and its `destroy`, and every
//! field that the plan knows is right in both.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::Result;
use super::agent::{AgentProcess, Output};
use super::gateway::Gateway;
use super::limit::HostLimit;
use super::records;
use super::traffic::{self, Key, Planned};

/// Each kind of flow in both families and on all paths comes up within this many.
const FLOWS: usize = 200;
/// So slow that a person can watch: four threads, so 25 flows a second and eight seconds in all.
const PACE: Duration = Duration::from_millis(160);
const READY_LIMIT: Duration = Duration::from_secs(5);
/// A second after its last packet a flow ends; the kernel needs a moment to notice.
const END_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(5);

const CONFIG: &str = r#"
[agent]
name = "demo-gateway"

[capture]
events = ["new", "destroy"]
receive_buffer = "16MiB"

[spool]
mode = "memory"

[[sink]]
name = "flows"
type = "file"
format = "json"
path = "{dir}/flows.json"
compress = "none"

[[sink]]
name = "screen"
type = "stdout"
format = "conntrack"
"#;

const INTRODUCTION: &str = "\
The agent runs on a NAT gateway, in a network namespace of its own. Flows of all kinds go through it
now; the kernel tells of each when it begins ([NEW]) and when it ends ([DESTROY], with its counters).
First pair of addresses: the packet that began it. Second pair: the reply that is expected; where that
comes from, or goes to, another address, the gateway translates.
";

/// One line of the table.
#[derive(Debug, Default)]
struct Line {
    new: u64,
    destroy: u64,
    /// Of `destroy`, in the order of [`NAT`].
    nat: [u64; NAT.len()],
    sent: u64,
    received: u64,
}

/// The translations that a record may name; a record that names none is the first.
const NAT: [&str; 4] = ["none", "snat", "dnat", "both"];

/// Runs the demo; true when every flow was seen as it was driven.
pub(crate) fn run(agent: &Path) -> Result<bool> {
    let _limit = HostLimit::at_least(10_000)?;
    let lab = Gateway::new()?;
    lab.short_timeouts()?;
    println!("{INTRODUCTION}");
    let mut process = AgentProcess::start(&lab.gateway, agent, CONFIG, Output::Shown)?;
    process.wait_ready(READY_LIMIT)?;

    let flows = traffic::plan(FLOWS);
    lab.drive(&flows, PACE)?;
    lab.wait_for_ends(END_LIMIT)?;
    let ended = process.terminate(STOP_LIMIT)?;
    if !ended.status.success() {
        return Err(format!("the agent: {}: {}", ended.status, process.stderr()?).into());
    }

    let file = process.path("flows.json");
    let records = records::read(&file)?;
    process.keep_dir();
    print_table(&records);
    let text = fs::read_to_string(&file)?;
    if let Some((line, _)) = text.lines().zip(&records).find(|(_, record)| is_example(record)) {
        println!("\nOne of the records, a line of JSON each:\n{line}");
    }
    let faults = compare(&flows, &records);
    println!();
    for fault in faults.iter().take(20) {
        println!("WRONG  {fault}");
    }
    if faults.is_empty() {
        println!("Each of the {FLOWS} flows has its new and its destroy, as it was driven.");
    } else {
        println!("{} faults in {FLOWS} flows.", faults.len());
    }
    println!("All records: {}", file.display());
    Ok(faults.is_empty())
}

/// What most people come for: who was behind the gateway's address.
fn is_example(record: &Value) -> bool {
    record["event"] == "destroy"
        && record["proto_name"] == "tcp"
        && record["nat"] == "snat"
        && record["reply_packets"].as_u64() > Some(1)
}

fn print_table(records: &[Value]) {
    let mut lines: BTreeMap<(String, String), Line> = BTreeMap::new();
    let mut others: BTreeMap<&str, u64> = BTreeMap::new();
    for record in records {
        let text = |name: &str| record.get(name).and_then(Value::as_str);
        let event = text("event").unwrap_or("no event");
        if traffic::key_of(record).is_none() {
            *others.entry(event).or_default() += 1;
            continue;
        }
        let proto = text("proto_name").map_or_else(|| record["proto"].to_string(), str::to_owned);
        let line = lines.entry((proto, text("family").unwrap_or("?").to_owned())).or_default();
        let number = |name: &str| record.get(name).and_then(Value::as_u64).unwrap_or(0);
        match event {
            "new" => line.new += 1,
            "destroy" => {
                line.destroy += 1;
                let nat = text("nat").unwrap_or(NAT[0]);
                if let Some(column) = NAT.iter().position(|name| *name == nat) {
                    line.nat[column] += 1;
                }
                line.sent += number("orig_bytes");
                line.received += number("reply_bytes");
            }
            other => *others.entry(other).or_default() += 1,
        }
    }
    println!("\n                               ------- translated -------");
    println!(
        "protocol  family  new  destroy     no  source  dest.  both  bytes sent  bytes received"
    );
    let mut total = Line::default();
    for ((proto, family), line) in &lines {
        print_line(proto, family, line);
        total.new += line.new;
        total.destroy += line.destroy;
        total.sent += line.sent;
        total.received += line.received;
        for (sum, count) in total.nat.iter_mut().zip(line.nat) {
            *sum += count;
        }
    }
    print_line("all", "", &total);
    for (event, count) in others {
        println!("besides: {count} records of kind {event}");
    }
}

fn print_line(proto: &str, family: &str, line: &Line) {
    let Line { new, destroy, nat: [none, snat, dnat, both], sent, received } = line;
    println!(
        "{proto:<8}  {family:<6}  {new:>3}  {destroy:>7}  {none:>5}  {snat:>6}  {dnat:>5}  {both:>4}  \
         {sent:>10}  {received:>14}"
    );
}

/// What is missing, doubled or different, for a person to read.
pub(crate) fn compare(flows: &[Planned], records: &[Value]) -> Vec<String> {
    let mut found: HashMap<(Key, &str), Vec<&Value>> = HashMap::new();
    for record in records {
        if let (Some(key), Some(event)) = (traffic::key_of(record), record["event"].as_str()) {
            found.entry((key, event)).or_default().push(record);
        }
    }
    let mut faults = Vec::new();
    for flow in flows {
        for event in ["new", "destroy"] {
            match found.remove(&(flow.key(), event)).as_deref() {
                Some([record]) => {
                    let wrong = flow.differences(record);
                    if !wrong.is_empty() {
                        faults.push(format!("{event}: {} in {record}", wrong.join("; ")));
                    }
                }
                Some(several) => faults.push(format!("{} {event} of {flow:?}", several.len())),
                None => faults.push(format!("no {event} of {flow:?}")),
            }
        }
    }
    let strange = found.into_iter().filter(|((_, event), _)| matches!(*event, "new" | "destroy"));
    faults
        .extend(strange.map(|((key, event), _)| format!("{event} of a flow not driven: {key:?}")));
    faults
}
