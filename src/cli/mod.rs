//! The command line: arguments here, one file a command, exit codes in `exit`.
//!
//! Arguments are only read and checked here; what acts is the command. Prints to stdout only through
//! `output`, where a reader that went away is a quiet end.

mod check;
mod completions;
mod count;
mod events;
mod exit;
mod list;
mod man;
mod netns;
mod output;
mod run;
mod schema;
mod stats;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::control;

pub use exit::Exit;

/// Ships Linux conntrack events as structured records; none goes missing unsaid
///
/// The kernel knows every connection that it routes, translates or serves: both ends, the translated
/// address, packets and bytes, start and end. conntrail subscribes to these events over ctnetlink and
/// writes each as one structured record to files or stdout. What the kernel could not deliver is
/// counted and stands in the output as a gap record.
#[derive(Debug, Parser)]
#[command(name = "conntrail", version, arg_required_else_help = true, max_term_width = 100)]
#[command(disable_help_subcommand = true)]
#[command(after_long_help = "\
Examples:
  sudo conntrail run
      Every connection as it comes and goes, as JSON
  sudo conntrail events
      The same for people, in conntrack's columns
  sudo conntrail list -f ipv4
      The connections that there are now
  conntrail check --config conntrail.toml
      All that is wrong with a configuration")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Check(check::CheckArgs),
    Events(events::EventsArgs),
    List(list::ListArgs),
    Count(count::CountArgs),
    Stats(stats::StatsArgs),
    Schema(schema::SchemaArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

/// For people or for programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// For people
    #[default]
    Text,
    /// For programs: one JSON object a line
    Json,
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

#[derive(Debug, Args)]
struct NetnsArgs {
    /// Work in this network namespace
    ///
    /// A name as `ip netns` knows it (in /run/netns), or the path of a namespace file, such as
    /// /proc/1234/ns/net. Needs CAP_SYS_ADMIN.
    #[arg(long, value_name = "NAME")]
    netns: Option<String>,
}

/// Reads the command line and does what it says.
pub fn main() -> Exit {
    run_with(std::env::args_os())
}

fn run_with(args: impl IntoIterator<Item = OsString>) -> Exit {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Without a terminal to print to there is nobody to tell.
            let _ = error.print();
            return if asked { Exit::Success } else { Exit::Usage };
        }
    };
    match cli.command {
        Command::Run(args) => run::run(args),
        Command::Check(args) => check::check(&args),
        Command::Events(args) => events::events(args),
        Command::List(args) => list::list(&args),
        Command::Count(args) => count::count(&args),
        Command::Stats(args) => stats::stats(&args),
        Command::Schema(args) => schema::schema(&args),
        Command::Completions(args) => completions::completions(&args),
        Command::Man(args) => man::man(&args),
    }
}

/// The commands as clap knows them, for the manual and completions.
fn command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
}

/// Asks the kernel something on a runtime of its own.
fn ask<T>(question: impl Future<Output = Result<T, control::Error>>) -> Result<T, Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = match runtime {
        Ok(runtime) => runtime.block_on(question),
        Err(error) => return Err(output::fail(Exit::Failure, &error)),
    };
    answer.map_err(|error| output::fail(Exit::of_control(&error), &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_long_help_with_an_example() {
        let command = command();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let name = sub.get_name();
            assert!(sub.get_long_about().is_some(), "{name} has no long description");
            let after = sub.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.starts_with("Examples:\n"), "{name} shows no example");
            for argument in sub.get_arguments() {
                assert!(argument.get_help().is_some(), "{name} {argument:?} is not explained");
            }
        }
    }

    #[test]
    fn examples_are_valid_command_lines() {
        let all = command();
        let mut seen = 0;
        for command in std::iter::once(&all).chain(all.get_subcommands()) {
            let text = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            for line in text.lines().filter_map(|line| line.strip_prefix("  ")) {
                if line.starts_with(' ') {
                    continue;
                }
                let line = line.split(['|', '>']).next().unwrap();
                let words = line.split_whitespace().skip_while(|word| *word == "sudo");
                if let Err(error) = Cli::try_parse_from(words) {
                    panic!("{line}: {error}");
                }
                seen += 1;
            }
        }
        assert!(seen >= 8, "{seen} examples");
    }
}
