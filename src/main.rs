//! The `conntrail` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|command| command == conntrail::capture::GUARD_COMMAND) {
        return conntrail::capture::guard_main(args);
    }
    ExitCode::SUCCESS
}
