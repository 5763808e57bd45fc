//! The `conntrail` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before the command line is read: a helper process of capture's own, no command for people.
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|command| command == conntrail::capture::GUARD_COMMAND) {
        return conntrail::capture::guard_main(args);
    }
    conntrail::cli::main().into()
}
