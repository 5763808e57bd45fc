use clap::Args;
use serde_json::json;

use crate::control::Control;

use super::output::{fail, print};
use super::{Exit, NetnsArgs, OutputArgs, OutputFormat, ask};

/// Count the connections that there are now, as conntrack -C does
///
/// The entries of this network namespace's table. With `-o json` also the limit, which is one for
/// the whole host (nf_conntrack_max).
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  sudo conntrail count
      One number
  sudo conntrail count -o json
      {\"entries\":…,\"limit\":…}")]
pub(super) struct CountArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    netns: NetnsArgs,
}

pub(super) fn count(args: &CountArgs) -> Exit {
    if let Err(exit) = args.netns.enter() {
        return exit;
    }
    let stats = match ask(async { Control::connect()?.stats().await }) {
        Ok(stats) => stats,
        Err(exit) => return exit,
    };
    let Some(entries) = stats.entries else {
        return fail(
            Exit::KernelSupport,
            &"the kernel's answer has no count (CTA_STATS_GLOBAL_ENTRIES)",
        );
    };
    match (args.output.output, stats.max_entries) {
        (OutputFormat::Text, _) => print(format!("{entries}\n")),
        (OutputFormat::Json, Some(limit)) => {
            print(format!("{}\n", json!({ "entries": entries, "limit": limit })))
        }
        // Kernels before 4.18 do not say: absent, not a made-up number.
        (OutputFormat::Json, None) => print(format!("{}\n", json!({ "entries": entries }))),
    }
}
