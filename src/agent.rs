//! Wiring. The branch that wires it all replaces this file.

use std::path::PathBuf;

use crate::cli::Exit;
use crate::config::Config;

/// What the command line adds to the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Read again on SIGHUP; `None` when there is no file.
    pub config_path: Option<PathBuf>,
    /// The namespace as it was asked for; the calling thread is in it already.
    pub netns: Option<String>,
    /// For someone who looks on (`events`): no records of the agent's own, no counters at the end.
    pub viewer: bool,
}

/// Runs until a signal, or until its stdout is closed.
pub fn run(_config: Config, _options: Options) -> Exit {
    tracing::error!("the agent is not wired in this branch");
    Exit::Failure
}
