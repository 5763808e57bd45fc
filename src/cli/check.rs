use std::fmt::Write;

use clap::Args;

use crate::control::{Facts, findings};

use super::output::{complain, fail, print};
use super::run::ConfigArgs;
use super::{Exit, ask};

/// Check the configuration and the host, and start nothing
///
/// Prints every error of the configuration with its line, what is allowed and what was probably
/// meant. A correct one is printed as it takes effect, with all defaults, as a file that can be used
/// itself; below it, as comments, stands what this host lacks and the command that mends it.
///
/// The exit code speaks of the configuration only: 0 when it is right, 78 when it is not.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  conntrail check
      Check /etc/conntrail/conntrail.toml, or the defaults where there is none
  conntrail check --config gw1.toml
      Check gw1.toml
  conntrail check --config gw1.toml > full.toml
      Write it with all defaults")]
pub(super) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn check(args: &CheckArgs) -> Exit {
    let found = match args.config.read() {
        Ok(found) => found,
        Err(exit) => return exit,
    };
    let mut text = match &found.path {
        Some(path) => format!("# {} is correct. In effect:\n\n", path.display()),
        None => "# There is no configuration file: these are the defaults.\n\n".to_owned(),
    };
    text += &found.config.describe();
    text += "\n";
    match ask(Facts::read()) {
        Ok(facts) => put_findings(&mut text, &facts, found.config.capture.enable_tracking),
        // It is said already, and the configuration is right all the same.
        Err(_) => complain("conntrail: the host could not be checked"),
    }
    print(text)
}

fn put_findings(text: &mut String, facts: &Facts, enable_tracking: bool) {
    let found = findings(facts);
    if found.is_empty() {
        *text += "# This host lacks nothing.\n";
        return;
    }
    *text += match enable_tracking {
        true => {
            "# What this host lacks; enable_tracking mends tracking, acct, timestamp and events while \
             the agent runs:\n"
        }
        false => "# What this host lacks:\n",
    };
    for finding in found {
        if let Err(error) = writeln!(text, "# - {finding}") {
            fail(Exit::Failure, &error);
        }
    }
}
