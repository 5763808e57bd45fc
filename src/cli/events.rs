use clap::{Args, ValueEnum};

use crate::agent::Options;
use crate::config::{CaptureSettings, Config, EventKinds, LogLevel, SinkSettings};
use crate::format::FormatKind;

use super::run::start;
use super::{Exit, NetnsArgs, OutputArgs, OutputFormat};

/// Show events as they come, as conntrack -E does
///
/// For a look at what happens: it keeps nothing, and reads best effort, so that a stopped terminal
/// costs the kernel nothing. What was lost meanwhile is shown as a gap with its count. For records
/// that are to be kept use `conntrail run`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  sudo conntrail events
      All events of connections, in conntrack's columns
  sudo conntrail events -e new,destroy -o json
      Begin and end of each, as JSON
  sudo conntrail events -e expect --netns blue
      Expectations (of FTP, SIP and the like) in network namespace blue")]
pub(super) struct EventsArgs {
    /// Which events
    #[arg(
        short,
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "KINDS",
        default_value = "new,update,destroy"
    )]
    events: Vec<Kind>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    netns: NetnsArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A connection was made
    New,
    /// A connection changed
    Update,
    /// A connection ended
    Destroy,
    /// An expectation was made or ended
    Expect,
}

pub(super) fn events(args: EventsArgs) -> Exit {
    if let Err(exit) = args.netns.enter() {
        return exit;
    }
    let config = config(&args);
    start(config, Options { config_path: None, netns: args.netns.netns, viewer: true })
}

fn config(args: &EventsArgs) -> Config {
    let mut config = Config::default_stdout();
    let has = |kind| args.events.contains(&kind);
    config.capture = CaptureSettings {
        events: EventKinds {
            new: has(Kind::New),
            update: has(Kind::Update),
            destroy: has(Kind::Destroy),
            expect: has(Kind::Expect),
        },
        // Someone who looks on must not make the kernel keep entries.
        reliable: false,
        ..config.capture
    };
    config.snapshot = false;
    config.telemetry.log = LogLevel::Warn;
    let format = match args.output.output {
        OutputFormat::Text => FormatKind::Conntrack,
        OutputFormat::Json => FormatKind::Json,
    };
    config.sinks = vec![SinkSettings { format, ..SinkSettings::stdout() }];
    config
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: EventsArgs,
    }

    fn config_of(args: &[&str]) -> Config {
        config(&Only::parse_from(std::iter::once(&"events").chain(args)).args)
    }

    #[test]
    fn a_viewer_sees_all_events_in_columns_and_holds_nothing_back() {
        let config = config_of(&[]);
        assert_eq!(config.capture.events.names().collect::<Vec<_>>(), ["new", "update", "destroy"]);
        assert!(!config.capture.reliable && !config.snapshot);
        assert_eq!(config.sinks[0].format, FormatKind::Conntrack);
    }

    #[test]
    fn kinds_and_format_can_be_chosen() {
        let config = config_of(&["-e", "expect,new", "-o", "json"]);
        assert_eq!(config.capture.events.names().collect::<Vec<_>>(), ["new", "expect"]);
        assert_eq!(config.sinks[0].format, FormatKind::Json);
    }
}
