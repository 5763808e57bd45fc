//! What a test needs of the machine: without it the test says so and does nothing, and where
//! CONNTRAIL_REQUIRE_ALL=1 it fails.

use std::io::Write;

/// Says that the calling test cannot work here.
pub(crate) fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let required = std::env::var_os("CONNTRAIL_REQUIRE_ALL").is_some_and(|all| all == "1");
    assert!(!required, "{test}: {why}, and CONNTRAIL_REQUIRE_ALL=1");
    // Not eprintln!: the harness catches what a test prints, and shows it of failed tests only.
    writeln!(std::io::stderr(), "skipped {test}: {why}").expect("standard error is open");
}

/// True, and said, without root.
pub(crate) fn lacks_root() -> bool {
    let lacking = !nix::unistd::geteuid().is_root();
    if lacking {
        skip("it needs root");
    }
    lacking
}
