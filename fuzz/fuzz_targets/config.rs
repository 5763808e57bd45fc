//! Any text is a configuration or a list of errors, and what was read is written and read back equal.

#![no_main]

use conntrail::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Config::from_str(text, "fuzz") {
        Ok(config) => {
            let again = Config::from_str(&config.describe(), "written");
            assert_eq!(again, Ok(config));
        }
        Err(error) => assert!(!error.problems().is_empty() && !error.to_string().is_empty()),
    }
});
