use clap::Args;
use clap_complete::Shell;

use super::output::print;
use super::{Exit, command};

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(long_about = "\
Print completions for a shell

Write them to where the shell looks for them; then Tab completes commands and options.")]
#[command(after_long_help = "\
Examples:
  conntrail completions bash > /etc/bash_completion.d/conntrail
  conntrail completions zsh > /usr/share/zsh/site-functions/_conntrail
  conntrail completions fish > /usr/share/fish/vendor_completions.d/conntrail.fish")]
pub(super) struct CompletionsArgs {
    /// For which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs) -> Exit {
    // Into memory first: clap_complete panics when stdout closes under it.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "conntrail", &mut script);
    print(script)
}
