use std::path::{Path, PathBuf};

use clap::Args;

use crate::agent::{self, Options};
use crate::config::{Config, ConfigError, DEFAULT_PATH, LogLevel};
use crate::telemetry::logs;

use super::output::{complain, fail};
use super::{Exit, NetnsArgs};

/// Run the agent: every event as a record, until it is told to stop
///
/// Subscribes to conntrack's events, dumps what is there already, and delivers each as one record to
/// the sinks of the configuration. Without a configuration: JSON to stdout.
///
/// SIGTERM and SIGINT drain what is under way and end; the second one ends at once. SIGHUP opens
/// files anew and reads the configuration again: filters and sinks change without a gap, the rest
/// needs a restart, and a broken file changes nothing. SIGUSR1 prints the counters.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  sudo conntrail run
      JSON to stdout, or what /etc/conntrail/conntrail.toml says
  sudo conntrail run --config gw1.toml
      What gw1.toml says
  sudo conntrail run --netns blue
      The connections of network namespace blue")]
pub(super) struct RunArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    netns: NetnsArgs,
}

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// The configuration file
    ///
    /// Without it /etc/conntrail/conntrail.toml is read where it exists.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// A configuration and the file that it came from.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) config: Config,
    pub(super) path: Option<PathBuf>,
}

impl ConfigArgs {
    /// Reads the file named, else the default one, else takes what runs without.
    pub(super) fn read(&self) -> Result<Found, Exit> {
        let default = Path::new(DEFAULT_PATH);
        let path = match &self.config {
            Some(path) => path,
            // A file that is there and can't be looked at is an error, not an absence.
            None if matches!(default.try_exists(), Ok(false)) => {
                return Ok(Found { config: Config::default_stdout(), path: None });
            }
            None => default,
        };
        match Config::load(path) {
            Ok(config) => Ok(Found { config, path: Some(absolute(path)) }),
            Err(error) => Err(refuse(&error)),
        }
    }
}

/// Prints all that is wrong.
fn refuse(error: &ConfigError) -> Exit {
    complain(&error.to_string());
    Exit::Config
}

/// So that a reload finds it from wherever the process stands then.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

pub(super) fn run(args: RunArgs) -> Exit {
    let found = match args.config.read() {
        Ok(found) => found,
        Err(exit) => return exit,
    };
    if let Err(exit) = args.netns.enter() {
        return exit;
    }
    let options = Options { config_path: found.path, netns: args.netns.netns, viewer: false };
    start(found.config, options)
}

/// Logs from here on, and runs.
pub(super) fn start(config: Config, options: Options) -> Exit {
    let telemetry = config.telemetry;
    if let Err(error) = logs::start(telemetry) {
        return fail(Exit::Usage, &error);
    }
    let Err(error) = agent::run(config, options) else { return Exit::Success };
    let exit = Exit::of_agent(&error);
    if telemetry.log == LogLevel::Off {
        return fail(exit, &error);
    }
    tracing::error!("{error}");
    exit
}
