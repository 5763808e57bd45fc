use std::fmt::Write;

use clap::Args;
use serde_json::{Map, Value};

use crate::control::Control;
use crate::ctnetlink::{CpuStats, ExpectStats};

use super::output::print;
use super::{Exit, NetnsArgs, OutputArgs, OutputFormat, ask};

/// Show conntrack's counters of each CPU, as conntrack -S does
///
/// Worth a look: `drop` and `early_drop` (connections refused or given up because the table was
/// full), `insert_failed` (often two packets that raced to make one connection), `invalid` (packets
/// that fit no connection). The kernel's counters have 32 bits and wrap. Counters that this kernel
/// does not have are left out.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  sudo conntrail stats
      A table with a column for each counter
  sudo conntrail stats -o json
      One object for each CPU")]
pub(super) struct StatsArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    netns: NetnsArgs,
}

/// A counter of one CPU with its name in the kernel.
type Counter = (&'static str, fn(&CpuStats) -> Option<u32>);

/// In the order of `enum ctattr_stats_cpu`.
const COUNTERS: &[Counter] = &[
    ("searched", |cpu| cpu.searched),
    ("found", |cpu| cpu.found),
    ("new", |cpu| cpu.new),
    ("invalid", |cpu| cpu.invalid),
    ("ignore", |cpu| cpu.ignore),
    ("delete", |cpu| cpu.delete),
    ("insert", |cpu| cpu.insert),
    ("insert_failed", |cpu| cpu.insert_failed),
    ("drop", |cpu| cpu.drop),
    ("early_drop", |cpu| cpu.early_drop),
    ("error", |cpu| cpu.error),
    ("search_restart", |cpu| cpu.search_restart),
    ("clash_resolve", |cpu| cpu.clash_resolve),
    ("chain_toolong", |cpu| cpu.chain_toolong),
];

type ExpectCounter = (&'static str, fn(&ExpectStats) -> Option<u32>);

const EXPECT_COUNTERS: &[ExpectCounter] = &[
    ("expect_new", |cpu| cpu.new),
    ("expect_create", |cpu| cpu.create),
    ("expect_delete", |cpu| cpu.delete),
];

pub(super) fn stats(args: &StatsArgs) -> Exit {
    if let Err(exit) = args.netns.enter() {
        return exit;
    }
    let asked = ask(async {
        let mut control = Control::connect()?;
        Ok((control.stats_cpu().await?, control.expect_stats_cpu().await?))
    });
    let (cpus, expects) = match asked {
        Ok(answers) => answers,
        Err(exit) => return exit,
    };
    let rows = rows(&cpus, &expects);
    match args.output.output {
        OutputFormat::Text => print(table(&rows)),
        OutputFormat::Json => print(lines(&rows)),
    }
}

/// One CPU's counters; those that the kernel did not send are not there.
#[derive(Debug, PartialEq)]
struct Row {
    cpu: u16,
    counters: Vec<(&'static str, u32)>,
}

fn rows(cpus: &[CpuStats], expects: &[ExpectStats]) -> Vec<Row> {
    let mut rows: Vec<Row> = cpus
        .iter()
        .map(|cpu| {
            let own = COUNTERS.iter().filter_map(|(name, of)| Some((*name, of(cpu)?)));
            let expect = expects.iter().find(|expect| expect.cpu == cpu.cpu);
            let more = expect.into_iter().flat_map(|expect| {
                EXPECT_COUNTERS.iter().filter_map(|(name, of)| Some((*name, of(expect)?)))
            });
            Row { cpu: cpu.cpu, counters: own.chain(more).collect() }
        })
        .collect();
    rows.sort_by_key(|row| row.cpu);
    rows
}

fn lines(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let mut object = Map::new();
        object.insert("cpu".to_owned(), Value::from(row.cpu));
        for (name, value) in &row.counters {
            object.insert((*name).to_owned(), Value::from(*value));
        }
        text += &Value::Object(object).to_string();
        text.push('\n');
    }
    text
}

/// A row for each counter and a column for each CPU would be wide on large hosts, so CPUs go down.
fn table(rows: &[Row]) -> String {
    let names = COUNTERS.iter().map(|(name, _)| *name);
    let names = names.chain(EXPECT_COUNTERS.iter().map(|(name, _)| *name));
    let shown: Vec<&str> = names
        .filter(|name| rows.iter().any(|row| row.counters.iter().any(|(known, _)| known == name)))
        .collect();
    let value = |row: &Row, name: &str| {
        row.counters.iter().find(|(known, _)| *known == name).map(|(_, value)| u64::from(*value))
    };
    let mut columns: Vec<Vec<String>> = vec![
        std::iter::once("cpu".to_owned())
            .chain(rows.iter().map(|row| row.cpu.to_string()))
            .chain(["all".to_owned()])
            .collect(),
    ];
    for name in shown {
        let total: u64 = rows.iter().filter_map(|row| value(row, name)).sum();
        let cells = rows
            .iter()
            .map(|row| value(row, name).map_or_else(|| "-".to_owned(), |value| value.to_string()));
        columns.push(
            std::iter::once(name.to_owned()).chain(cells).chain([total.to_string()]).collect(),
        );
    }
    let mut text = String::new();
    for line in 0..rows.len() + 2 {
        for (index, column) in columns.iter().enumerate() {
            let width = column.iter().map(String::len).max().unwrap_or_default();
            let space = if index == 0 { "" } else { "  " };
            write!(text, "{space}{:>width$}", column[line])
                .expect("a String takes whatever is written to it");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_cpus() -> Vec<Row> {
        let one = CpuStats { cpu: 1, found: Some(5), drop: Some(u32::MAX), ..Default::default() };
        let zero = CpuStats { cpu: 0, found: Some(12), drop: Some(1), ..Default::default() };
        let expect = ExpectStats { cpu: 1, new: Some(3), ..Default::default() };
        rows(&[one, zero], &[expect])
    }

    #[test]
    fn people_see_a_table_with_sums() {
        assert_eq!(
            table(&two_cpus()),
            "cpu  found        drop  expect_new\n\
             \x20 0     12           1           -\n\
             \x20 1      5  4294967295           3\n\
             all     17  4294967296           3\n"
        );
    }

    #[test]
    fn programs_get_an_object_for_each_cpu_without_made_up_values() {
        assert_eq!(
            lines(&two_cpus()),
            "{\"cpu\":0,\"drop\":1,\"found\":12}\n\
             {\"cpu\":1,\"drop\":4294967295,\"expect_new\":3,\"found\":5}\n"
        );
    }
}
