//! `make demo`: a NAT gateway, the agent inside it, real traffic, and a table of what was seen.
//!
//! It is also a test: it fails unless each driven flow has its `new` and its `destroy`, and every
//! field that the plan knows is right in both.

use std::collections::{BTreeMap, HashMap};
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
/// So slow that a person can watch: four threads, so about 130 flows a second.
const PACE: Duration = Duration::from_millis(30);
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

/// One line of the table.
#[derive(Debug, Default)]
struct Line {
    new: u64,
    destroy: u64,
    sent: u64,
    received: u64,
}

/// Runs the demo; true when every flow was seen as it was driven.
pub(crate) fn run(agent: &Path) -> Result<bool> {
    let _limit = HostLimit::at_least(10_000)?;
    let lab = Gateway::new()?;
    lab.short_timeouts()?;
    println!("Starting the agent on a NAT gateway in a namespace of its own.\n");
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
    let faults = compare(&flows, &records);
    for fault in faults.iter().take(20) {
        println!("WRONG  {fault}");
    }
    if faults.is_empty() {
        println!("\nEach of the {FLOWS} flows has its new and its destroy, as it was driven.");
    } else {
        println!("\n{} faults in {FLOWS} flows.", faults.len());
    }
    println!("All records: {}", file.display());
    Ok(faults.is_empty())
}

fn print_table(records: &[Value]) {
    let mut lines: BTreeMap<(String, String, String), Line> = BTreeMap::new();
    let mut others: BTreeMap<&str, u64> = BTreeMap::new();
    for record in records {
        let text = |name: &str| record.get(name).and_then(Value::as_str);
        let event = text("event").unwrap_or("no event");
        if traffic::key_of(record).is_none() {
            *others.entry(event).or_default() += 1;
            continue;
        }
        let proto = text("proto_name").map_or_else(|| record["proto"].to_string(), str::to_owned);
        let family = text("family").unwrap_or("?").to_owned();
        let nat = text("nat").unwrap_or("none").to_owned();
        let line = lines.entry((proto, family, nat)).or_default();
        let number = |name: &str| record.get(name).and_then(Value::as_u64).unwrap_or(0);
        match event {
            "new" => line.new += 1,
            "destroy" => {
                line.destroy += 1;
                line.sent += number("orig_bytes");
                line.received += number("reply_bytes");
            }
            other => *others.entry(other).or_default() += 1,
        }
    }
    println!("\nprotocol    family  nat      new  destroy  bytes sent  bytes received");
    let mut total = Line::default();
    for ((proto, family, nat), line) in &lines {
        print_line(proto, family, nat, line);
        total.new += line.new;
        total.destroy += line.destroy;
        total.sent += line.sent;
        total.received += line.received;
    }
    print_line("all", "", "", &total);
    for (event, count) in others {
        println!("{event:<10}  {count} records");
    }
}

fn print_line(proto: &str, family: &str, nat: &str, line: &Line) {
    let Line { new, destroy, sent, received } = line;
    println!(
        "{proto:<10}  {family:<6}  {nat:<5}  {new:>5}  {destroy:>7}  {sent:>10}  {received:>14}"
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
