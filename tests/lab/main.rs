//! The lab as a program: storms, the benchmark's floor, and what `make demo` and `make bench` run.

#![allow(clippy::print_stdout)] // A program for people at a terminal.

#[path = "mod.rs"]
mod lab;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};

use lab::bench::{self, Options};
use lab::gateway::Gateway;
use lab::generator::{BATCH, Flows, Generator};
use lab::limit::HostLimit;
use lab::netns::{self, Netns};
use lab::probe::{self, Sample, WAYS};
use lab::{demo, floor};

/// Network namespaces, load and measures for conntrail. Needs root.
#[derive(Debug, Parser)]
#[command(name = "lab")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates flows as fast as the kernel goes in a namespace of its own, and flushes them.
    Storm {
        #[arg(long, default_value_t = 500_000)]
        flows: u32,
        #[arg(long, default_value_t = BATCH)]
        batch: u32,
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
    /// Reads NEW and DESTROY events of this namespace, one a call, and throws them away.
    Floor {
        /// Receive buffer in MiB.
        #[arg(long, default_value_t = 64)]
        buffer: usize,
        /// After SIGTERM, ends when no event came for so many milliseconds.
        #[arg(long, default_value_t = 300)]
        quiet: u64,
        /// Ends after so many events.
        #[arg(long)]
        expect: Option<u64>,
    },
    /// Drives flows of all kinds through a NAT gateway; prints what each record must say.
    Traffic {
        #[arg(long, default_value_t = 1000)]
        flows: usize,
    },
    /// Shows the agent on a NAT gateway with real traffic, and checks what it wrote.
    Demo {
        /// The conntrail program.
        #[arg(long)]
        agent: PathBuf,
    },
    /// Measures the agent against the floor and against what else is installed.
    Bench {
        /// The conntrail program.
        #[arg(long)]
        agent: PathBuf,
        #[arg(long, default_value_t = 500_000)]
        flows: u32,
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
        runs: u16,
        /// Also writes the result to this file, as one line of JSON.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Removes the namespaces of lab programs that were killed.
    Clean,
    /// Compares ways of reading events, all on the same storm.
    Probe {
        #[arg(long, default_value_t = 500_000)]
        flows: u32,
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
        runs: u16,
        #[arg(long, default_value_t = 64)]
        buffer: usize,
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> lab::Result<ExitCode> {
    match command {
        Command::Storm { flows, batch, threads } => storm(flows, batch, threads),
        Command::Floor { buffer, quiet, expect } => {
            let seen = floor::run(buffer << 20, Duration::from_millis(quiet), expect)?;
            println!("{}", seen.json());
            Ok(ExitCode::SUCCESS)
        }
        Command::Traffic { flows } => traffic(flows),
        Command::Clean => {
            for name in netns::remove_abandoned()? {
                println!("removed {name}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo { agent } => Ok(code(demo::run(&agent)?)),
        Command::Bench { agent, flows, runs, json } => {
            Ok(code(bench::run(&Options { agent, flows, runs: runs.into(), json })?))
        }
        Command::Probe { flows, runs, buffer, threads } => {
            compare(flows, runs.into(), buffer << 20, threads)
        }
    }
}

fn code(passed: bool) -> ExitCode {
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn storm(flows: u32, batch: u32, threads: usize) -> lab::Result<ExitCode> {
    let _limit = HostLimit::at_least(u64::from(flows) + 100_000)?;
    let netns = Netns::new("storm")?;
    netns.conntrack_settings(1, true, true)?;
    let mut generator = Generator::with(&netns, threads, batch)?;
    let created = generator.insert(&Flows::default(), 0..flows)?;
    let count = netns.conntrack_count()?;
    let flushed = generator.flush()?;
    println!(
        "created {} of {} in {:.3} s, {:.0}/s; table {count}; refused {:?}; flushed in {:.3} s, \
         {:.0}/s",
        created.done,
        created.asked,
        created.elapsed.as_secs_f64(),
        created.rate(),
        created.refused,
        flushed.as_secs_f64(),
        count as f64 / flushed.as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

fn traffic(flows: usize) -> lab::Result<ExitCode> {
    let lab = Gateway::new()?;
    let begun = Instant::now();
    let driven = lab.mixed(flows)?;
    let took = begun.elapsed();
    let count = lab.gateway.conntrack_count()?;
    for flow in &driven {
        println!("{flow:?}");
    }
    eprintln!("{flows} flows in {:.2} s, table {count}", took.as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

fn compare(flows: u32, runs: usize, buffer: usize, threads: usize) -> lab::Result<ExitCode> {
    let _limit = HostLimit::at_least(u64::from(flows) + 100_000)?;
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); WAYS.len()];
    // Interleaved, so that a busy moment of the host does not hit one way alone.
    for _ in 0..runs {
        for (way, taken) in WAYS.iter().zip(&mut samples) {
            taken.push(probe::measure(*way, flows, buffer, threads)?);
        }
    }
    let floor = median(&samples[0], |sample| sample.seen.cpu_us_per_event());
    println!("µs CPU/event  × floor  delivered     new/s  destroy/s  way");
    for (way, taken) in WAYS.iter().zip(&samples) {
        let cost = median(taken, |sample| sample.seen.cpu_us_per_event());
        println!(
            "{cost:>12.3}  {:>7.2}  {:>8.3}%  {:>8.0}  {:>9.0}  {way:?}",
            cost / floor,
            median(taken, |sample| sample.seen.events() as f64 / f64::from(flows) * 50.0),
            median(taken, |sample| sample.create_rate),
            median(taken, |sample| sample.flush_rate),
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn median(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
