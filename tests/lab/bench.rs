//! `make bench`: one storm, read by the floor, the agent, and, where installed, `conntrack -E`
//! and ulogd2. What it cost, what arrived, and how it compares with the floor.
//!
//! Each reader is a process of its own in a namespace of its own, and its whole processor time
//! counts, its children's included. Runs are interleaved, so that a busy moment of the host does
//! not hit one reader alone. The floor is `lab floor`: this works from the lab's program only.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Result;
use super::agent::{AgentProcess, Output};
use super::generator::{Flows, Generator};
use super::limit::HostLimit;
use super::netns::Netns;
use super::records;

const READY_LIMIT: Duration = Duration::from_secs(10);
/// A reader that lags may need this long for what it has got.
const DRAIN_LIMIT: Duration = Duration::from_secs(120);
/// An output that has not grown for this long is complete.
const QUIET: Duration = Duration::from_millis(1000);
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Every reader is given the same receive buffer, in MiB. `conntrack` up to at least 1.4.7 sets it
/// on its command socket and reads events from another one, so it loses most of a storm.
const RECEIVE_MIB: u64 = 64;
const SPOOL_MIB: u64 = 64;
/// What the agent may need besides the buffers that are configured.
const AGENT_MIB: u64 = 64;
const MAX_COST: f64 = 1.0;

/// Files are neither rotated nor compressed: the other readers do neither.
const CONFIG: &str = r#"
[agent]
name = "bench"

[capture]
events = ["new", "destroy"]
receive_buffer = "{receive}MiB"

[flows]
snapshot = false

[spool]
mode = "memory"
max_size = "{spool}MiB"

[[sink]]
name = "flows"
type = "file"
format = "json"
path = "{dir}/out"
rotate_size = "100GiB"
rotate_every = "24h"
compress = "none"
"#;

const ULOGD: &str = r#"
[global]
logfile="{dir}/ulogd.log"
loglevel=5
plugin="{plugins}/ulogd_inpflow_NFCT.so"
plugin="{plugins}/ulogd_output_JSON.so"
stack=ct:NFCT,json:JSON
[ct]
hash_enable=0
event_mask=0x00000005
netlink_socket_buffer_size={bytes}
netlink_socket_buffer_maxsize={more}
[json]
sync=0
file="{dir}/out"
"#;

/// Where distributions put ulogd2's plugins.
const PLUGIN_FOLDERS: &[&str] = &["/usr/lib/*/ulogd", "/usr/lib/ulogd", "/usr/lib64/ulogd"];

/// Who reads.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reader {
    Floor,
    Agent(PathBuf),
    Conntrack,
    Ulogd { plugins: PathBuf },
}

/// What one run came to.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    cpu_us: f64,
    new: u64,
    destroy: u64,
    /// Lost by the reader's own account; none when it keeps none.
    lost: Option<u64>,
    peak_rss_kib: u64,
    create_rate: f64,
}

/// What is asked of the benchmark.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) agent: PathBuf,
    pub(crate) flows: u32,
    pub(crate) runs: usize,
    pub(crate) json: Option<PathBuf>,
}

/// Runs the benchmark; true when the agent keeps its promises.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let _limit = HostLimit::at_least(u64::from(options.flows) + 100_000)?;
    let readers = readers(&options.agent)?;
    let mut samples = vec![Vec::new(); readers.len()];
    for round in 1..=options.runs {
        for (reader, taken) in readers.iter().zip(&mut samples) {
            eprintln!("run {round} of {}: {}", options.runs, reader.name());
            let sample = reader
                .run(options.flows)
                .map_err(|error| format!("{}, run {round}: {error}", reader.name()))?;
            taken.push(sample);
        }
    }
    let rows: Vec<Row> =
        readers.iter().zip(&samples).map(|(reader, taken)| Row::of(reader, taken)).collect();
    let floor = rows[0].cpu_us;
    println!("{} flows created, then flushed; medians of {}\n", options.flows, options.runs);
    println!("reader        µs CPU/event  × floor  delivered      lost   peak RSS     new/s");
    for row in &rows {
        row.print(floor, options.flows);
    }
    let faults = rows[1].faults(floor, &samples[1], options.flows);
    for fault in &faults {
        println!("\nFAILED: the agent {fault}");
    }
    if let Some(path) = &options.json {
        let readers: BTreeMap<_, _> =
            rows.iter().map(|row| (row.name, row.json(floor, options.flows))).collect();
        let all = json!({
            "flows": options.flows,
            "runs": options.runs,
            "readers": readers,
            "passed": faults.is_empty(),
        });
        fs::write(path, format!("{all}\n"))?;
    }
    Ok(faults.is_empty())
}

/// The floor, the agent, and what is installed besides.
fn readers(agent: &Path) -> Result<Vec<Reader>> {
    // Said before the first run, and not after minutes.
    if !agent.is_file() {
        return Err(format!("{}: no such program", agent.display()).into());
    }
    let mut readers = vec![Reader::Floor, Reader::Agent(fs::canonicalize(agent)?)];
    if installed("conntrack") {
        readers.push(Reader::Conntrack);
    } else {
        println!("conntrack is not installed: left out");
    }
    match ulogd_plugins()?.filter(|_| installed("ulogd")) {
        Some(plugins) => readers.push(Reader::Ulogd { plugins }),
        None => println!("ulogd2 with NFCT and JSON is not installed: left out"),
    }
    Ok(readers)
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The folder that holds both plugins that are needed.
fn ulogd_plugins() -> Result<Option<PathBuf>> {
    let mut folders = Vec::new();
    for pattern in PLUGIN_FOLDERS {
        match pattern.split_once('*') {
            None => folders.push(PathBuf::from(pattern)),
            Some((before, after)) => {
                for entry in fs::read_dir(before)? {
                    folders.push(entry?.path().join(after.trim_start_matches('/')));
                }
            }
        }
    }
    let complete = |folder: &PathBuf| {
        ["ulogd_inpflow_NFCT.so", "ulogd_output_JSON.so"]
            .iter()
            .all(|plugin| folder.join(plugin).is_file())
    };
    Ok(folders.into_iter().find(complete))
}

impl Reader {
    fn name(&self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Agent(_) => "conntrail",
            Self::Conntrack => "conntrack -E",
            Self::Ulogd { .. } => "ulogd2 JSON",
        }
    }

    fn run(&self, flows: u32) -> Result<Sample> {
        let netns = Netns::new("bench")?;
        netns.conntrack_settings(1, true, true)?;
        // The agent looks whether anything uses conntrack here.
        netns.enable_tracking()?;
        let mut generator = Generator::new(&netns)?;
        let mut process = AgentProcess::start_with(&netns, Output::Kept, |dir| self.command(dir))?;
        self.wait_listening(&netns, &mut process)?;

        let created = generator.insert(&Flows::default(), 0..flows)?;
        if created.done != u64::from(flows) {
            return Err(format!("the kernel refused flows: {:?}", created.refused).into());
        }
        generator.flush()?;
        if *self != Self::Floor {
            wait_quiet(&self.output(&process))?;
        }
        let ended = process.terminate(STOP_LIMIT)?;
        let mut sample = self.count(&process)?;
        sample.cpu_us = ended.usage.cpu.as_secs_f64() * 1e6;
        sample.peak_rss_kib = ended.usage.peak_rss_kib;
        sample.create_rate = created.rate();
        Ok(sample)
    }

    fn command(&self, dir: &Path) -> Result<Command> {
        let here = dir.display().to_string();
        let bytes = (RECEIVE_MIB << 20).to_string();
        match self {
            Self::Floor => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["floor", "--buffer", &RECEIVE_MIB.to_string()]);
                Ok(command)
            }
            Self::Agent(program) => {
                let config = CONFIG
                    .replace("{dir}", &here)
                    .replace("{receive}", &RECEIVE_MIB.to_string())
                    .replace("{spool}", &SPOOL_MIB.to_string());
                let file = dir.join("conntrail.toml");
                fs::write(&file, config)?;
                let mut command = Command::new(program);
                command.arg("run").arg("--config").arg(file);
                Ok(command)
            }
            Self::Conntrack => {
                let mut command = Command::new("conntrack");
                command.args(["-E", "-e", "NEW,DESTROY", "-o", "id,timestamp", "-b", &bytes]);
                Ok(command)
            }
            Self::Ulogd { plugins } => {
                let config = ULOGD
                    .replace("{dir}", &here)
                    .replace("{plugins}", &plugins.display().to_string())
                    .replace("{bytes}", &bytes)
                    // ulogd refuses a size that is not below its maximum.
                    .replace("{more}", &((RECEIVE_MIB << 20) + 1).to_string());
                let file = dir.join("ulogd.conf");
                fs::write(&file, config)?;
                let mut command = Command::new("ulogd");
                command.arg("-c").arg(file);
                Ok(command)
            }
        }
    }

    /// Ready by its own word, or, for those that say nothing, when its socket has joined groups:
    /// the namespace has no other listener.
    fn wait_listening(&self, netns: &Netns, process: &mut AgentProcess) -> Result<()> {
        if matches!(self, Self::Floor | Self::Agent(_)) {
            return process.wait_ready(READY_LIMIT);
        }
        let until = Instant::now() + READY_LIMIT;
        loop {
            let table = netns.run(|| fs::read_to_string("/proc/thread-self/net/netlink"))?;
            if table.lines().any(joined) {
                return Ok(());
            }
            if process.has_ended()? || Instant::now() > until {
                return Err(format!("does not listen: {}", process.stderr()?.trim()).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn output(&self, process: &AgentProcess) -> PathBuf {
        process.path(if *self == Self::Conntrack { "stdout" } else { "out" })
    }

    fn count(&self, process: &AgentProcess) -> Result<Sample> {
        let mut sample = Sample::default();
        match self {
            Self::Floor => {
                let said: Value = serde_json::from_str(&process.stdout()?)?;
                let number = |name: &str| said[name].as_u64().ok_or("the floor says all numbers");
                sample.new = number("new")?;
                sample.destroy = number("destroy")?;
                sample.lost = Some(number("drops")?);
            }
            Self::Agent(_) => {
                let mut lost = 0;
                records::each_line(&self.output(process), |line| {
                    // A million lines: only the few gap records are parsed whole.
                    if line.contains(r#""event":"new""#) {
                        sample.new += 1;
                    } else if line.contains(r#""event":"destroy""#) {
                        sample.destroy += 1;
                    } else if line.contains(r#""event":"gap""#) {
                        let record: Value = serde_json::from_str(line)?;
                        lost += record["gap_events"].as_u64().unwrap_or(0);
                    }
                    Ok(())
                })?;
                sample.lost = Some(lost);
            }
            Self::Conntrack | Self::Ulogd { .. } => {
                let (new, destroy) = match self {
                    Self::Conntrack => ("[NEW]", "[DESTROY]"),
                    _ => (r#""ct.event": 1"#, r#""ct.event": 4"#),
                };
                records::each_line(&self.output(process), |line| {
                    sample.new += u64::from(line.contains(new));
                    sample.destroy += u64::from(line.contains(destroy));
                    Ok(())
                })?;
            }
        }
        Ok(sample)
    }
}

/// A line of `/proc/net/netlink` about a netfilter socket that has joined a group.
fn joined(line: &str) -> bool {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let groups = fields.get(3).and_then(|groups| u32::from_str_radix(groups, 16).ok());
    fields.get(1) == Some(&"12") && groups.is_some_and(|groups| groups != 0)
}

/// Waits until the output has not grown for a while.
fn wait_quiet(output: &Path) -> Result<()> {
    let until = Instant::now() + DRAIN_LIMIT;
    let (mut size, mut since) = (0, Instant::now());
    while since.elapsed() < QUIET {
        std::thread::sleep(Duration::from_millis(50));
        let now: u64 = records::files(output)?
            .iter()
            .map(|file| fs::metadata(file).map(|data| data.len()))
            .sum::<std::io::Result<u64>>()?;
        if now != size {
            (size, since) = (now, Instant::now());
        }
        if Instant::now() > until {
            return Err(format!("{} still grows after {DRAIN_LIMIT:?}", output.display()).into());
        }
    }
    Ok(())
}

/// The medians of a reader's runs.
#[derive(Debug)]
struct Row {
    name: &'static str,
    /// For an event delivered; the share delivered stands beside it.
    cpu_us: f64,
    delivered: f64,
    lost: Option<f64>,
    peak_rss_mib: f64,
    create_rate: f64,
}

impl Row {
    fn of(reader: &Reader, samples: &[Sample]) -> Self {
        let median = |value: &dyn Fn(&Sample) -> f64| {
            let mut values: Vec<f64> = samples.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let lost = samples.iter().all(|sample| sample.lost.is_some());
        Self {
            name: reader.name(),
            cpu_us: median(&|sample| sample.cpu_us / (sample.new + sample.destroy).max(1) as f64),
            delivered: median(&|sample| (sample.new + sample.destroy) as f64),
            lost: lost.then(|| median(&|sample| sample.lost.unwrap_or(0) as f64)),
            peak_rss_mib: median(&|sample| sample.peak_rss_kib as f64 / 1024.0),
            create_rate: median(&|sample| sample.create_rate),
        }
    }

    fn share(&self, flows: u32) -> f64 {
        self.delivered / (2.0 * f64::from(flows))
    }

    fn print(&self, floor: f64, flows: u32) {
        println!(
            "{:<12}  {:>12.3}  {:>7.2}  {:>8.3}%  {:>8}  {:>5.1} MiB  {:>8.0}",
            self.name,
            self.cpu_us,
            self.cpu_us / floor,
            self.share(flows) * 100.0,
            self.lost.map_or("not said".to_owned(), |lost| format!("{lost:.0}")),
            self.peak_rss_mib,
            self.create_rate
        );
    }

    fn json(&self, floor: f64, flows: u32) -> Value {
        json!({
            "cpu_us_per_event": self.cpu_us,
            "ratio_to_floor": self.cpu_us / floor,
            "delivered_share": self.share(flows),
            "lost": self.lost,
            "peak_rss_mib": self.peak_rss_mib,
            "create_rate": self.create_rate,
        })
    }

    /// What the agent promised and did not keep. Delivery and memory of every run, not medians.
    fn faults(&self, floor: f64, samples: &[Sample], flows: u32) -> Vec<String> {
        let mut faults = Vec::new();
        let ratio = self.cpu_us / floor;
        if ratio > MAX_COST {
            faults.push(format!("costs {ratio:.2} times the floor, more than {MAX_COST:.1}"));
        }
        let flows = u64::from(flows);
        for sample in samples.iter().filter(|sample| (sample.new, sample.destroy) != (flows, flows))
        {
            let (new, destroy, lost) = (sample.new, sample.destroy, sample.lost.unwrap_or(0));
            faults.push(format!(
                "delivered {new} new and {destroy} destroy of {flows} each, and says {lost} lost"
            ));
        }
        let peak = samples.iter().map(|sample| sample.peak_rss_kib).max().unwrap_or(0) / 1024;
        // The receive buffers are the kernel's and no part of the process.
        if peak > AGENT_MIB + SPOOL_MIB {
            faults.push(format!(
                "needed {peak} MiB: {AGENT_MIB} and {SPOOL_MIB} for its spool are allowed"
            ));
        }
        faults
    }
}
