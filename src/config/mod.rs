//! The configuration: from TOML as written to a checked [`Config`].
//!
//! Promises: all that is wrong with a file is said at once, each with its line, what is allowed and
//! what was probably meant; a [`Config`] is complete and can be compared with another. Reads one
//! file and the host's name, and opens, creates or binds nothing else.
//!
//! The way of a file: `reader` walks the parsed TOML and collects problems, `sections` knows the
//! keys, `values` the notations, `resolved` the result and its defaults, `write` the way back.

mod problem;
mod reader;
mod resolved;
mod sections;
mod values;
mod write;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::ops::{Range, RangeInclusive};
use std::path::Path;

use toml::de::DeTable;

pub use problem::{ConfigError, Located};
pub use resolved::{
    CaptureSettings, Config, DEFAULT_SPOOL_SIZE, EventKinds, FieldChoice, LogFormat, LogLevel,
    MAX_SPOOL_SIZE, MIN_SPOOL_SIZE, Method, SinkSettings, SinkTarget, TelemetrySettings,
};

use problem::{Problem, line_of};
use reader::Reader;

/// Read when no file is named, where it exists.
pub const DEFAULT_PATH: &str = "/etc/conntrail/conntrail.toml";

/// No sensible configuration is larger; a wrong path (a log, a device) is.
const MAX_FILE: u64 = 1 << 20;

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let unreadable = |reason: String| ConfigError::Unreadable { name: name.clone(), reason };
        let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| unreadable(error.to_string()))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(unreadable("larger than 1 MiB: this is no configuration".to_owned()));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
            unreadable(format!("line {line} is not UTF-8 text"))
        })?;
        Self::from_str(&text, &name)
    }

    /// Checks `text`; `name` is what errors call it.
    pub fn from_str(text: &str, name: &str) -> Result<Self, ConfigError> {
        let (document, errors) = DeTable::parse_recoverable(text);
        let mut reader = Reader::default();
        let config = sections::read(&mut reader, document.get_ref(), errors.is_empty());
        let mut problems = reader.problems;
        // What the parser put in place of a line that it could not read is not the user's doing.
        let broken: Vec<_> = errors
            .iter()
            .flat_map(|error| lines_of(text, error.span().unwrap_or_default()))
            .collect();
        problems.retain(|problem| !broken.contains(&line_of(text, problem.span.start)));
        problems.extend(errors.iter().map(|error| Problem {
            span: error.span().unwrap_or_default(),
            message: error.message().to_owned(),
            help: None,
        }));
        if problems.is_empty() {
            return Ok(config);
        }
        Err(ConfigError::invalid(name, text, problems))
    }

    /// What runs when there is no file: JSON to stdout, everything else at its default.
    pub fn default_stdout() -> Self {
        Self::default()
    }

    /// The effective configuration as TOML, defaults included.
    pub fn describe(&self) -> String {
        write::write(self)
    }
}

/// The lines that a span touches.
fn lines_of(text: &str, span: Range<usize>) -> RangeInclusive<usize> {
    // A span may end behind its line's end, which is not yet the next line.
    line_of(text, span.start)..=line_of(text, span.end.saturating_sub(1).max(span.start))
}
