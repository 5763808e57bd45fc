use std::process::ExitCode;

fn main() -> ExitCode {
    conntrail::cli::main().into()
}
