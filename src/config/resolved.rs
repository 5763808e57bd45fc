//! The configuration as the agent uses it: complete, checked, comparable.
//!
//! An `Option` here means "switched off", never "not given". The defaults are in one place each:
//! the `Default` of the struct they belong to.

use std::path::PathBuf;
use std::time::Duration;

use crate::format::FormatKind;
use crate::pipeline::Filter;
use crate::sink::{Compress, FileConfig};
use crate::spool::{SpoolConfig, WhenFull};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// Everything the agent has to know. Reload compares two of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Stands in every record as `agent`.
    pub agent_name: String,
    pub capture: CaptureSettings,
    pub filter: Filter,
    /// Dump the table at start.
    pub snapshot: bool,
    pub spool: SpoolConfig,
    /// At least one; names, file paths and stdout are each used once.
    pub sinks: Vec<SinkSettings>,
    pub telemetry: TelemetrySettings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureSettings {
    pub events: EventKinds,
    pub method: Method,
    /// `NETLINK_BROADCAST_ERROR` on the DESTROY socket.
    pub reliable: bool,
    /// Bytes asked for with `SO_RCVBUFFORCE`, for each socket.
    pub receive_buffer: usize,
    /// Install a rule that makes this namespace use conntrack, and remove it at the end.
    pub enable_tracking: bool,
}

/// Which events are subscribed to. At least one is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventKinds {
    pub new: bool,
    pub update: bool,
    pub destroy: bool,
    pub expect: bool,
}

/// How events are taken from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// The cheapest that works here.
    #[default]
    Auto,
    /// Plain netlink sockets.
    Socket,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SinkSettings {
    pub name: String,
    pub format: FormatKind,
    pub fields: FieldChoice,
    pub target: SinkTarget,
}

/// Which fields the records of a sink have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum FieldChoice {
    #[default]
    Full,
    Audit,
    Accounting,
    /// Names of fields. What names a record and what tells a loss is always in it.
    List(Vec<String>),
}

#[derive(Clone, Debug, PartialEq)]
pub enum SinkTarget {
    Stdout,
    File(FileConfig),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TelemetrySettings {
    pub log: LogLevel,
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl Default for CaptureSettings {
    fn default() -> Self {
        CaptureSettings {
            events: EventKinds::default(),
            method: Method::default(),
            reliable: true,
            // An event is charged with about 1,280 bytes: some 52,000 events, a quarter of a second
            // of the fastest storm measured.
            receive_buffer: (64 * MIB) as usize,
            enable_tracking: false,
        }
    }
}

impl CaptureSettings {
    /// Some fifty events; less than that overflows between two rounds of reading.
    pub const MIN_RECEIVE_BUFFER: u64 = 64 * KIB;
    /// The kernel takes at most `INT_MAX / 2` and doubles it.
    pub const MAX_RECEIVE_BUFFER: u64 = 1023 * MIB;
}

impl Default for EventKinds {
    fn default() -> Self {
        EventKinds { new: true, update: false, destroy: true, expect: false }
    }
}

impl EventKinds {
    pub const NONE: EventKinds =
        EventKinds { new: false, update: false, destroy: false, expect: false };
    pub const NAMES: &[&str] = &["new", "update", "destroy", "expect"];

    /// Adds the kind of this name; `None` if there is none.
    pub fn with(mut self, name: &str) -> Option<Self> {
        match name {
            "new" => self.new = true,
            "update" => self.update = true,
            "destroy" => self.destroy = true,
            "expect" => self.expect = true,
            _ => return None,
        }
        Some(self)
    }

    /// The names of what is set, in the order of [`EventKinds::NAMES`].
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let set = [self.new, self.update, self.destroy, self.expect];
        Self::NAMES.iter().zip(set).filter(|(_, set)| *set).map(|(name, _)| *name)
    }
}

impl Method {
    pub const ALL: &[(&str, Method)] = &[("auto", Method::Auto), ("socket", Method::Socket)];
}

impl LogLevel {
    pub const ALL: &[(&str, LogLevel)] = &[
        ("off", LogLevel::Off),
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];

    pub fn name(self) -> &'static str {
        name_of(Self::ALL, self)
    }
}

impl LogFormat {
    pub const ALL: &[(&str, LogFormat)] = &[("text", LogFormat::Text), ("json", LogFormat::Json)];
}

impl SinkSettings {
    /// JSON to stdout, whole records: what runs when nothing is configured.
    pub fn stdout() -> Self {
        SinkSettings {
            name: "stdout".to_owned(),
            format: FormatKind::Json,
            fields: FieldChoice::Full,
            target: SinkTarget::Stdout,
        }
    }
}

/// Smaller than a page, and a file would hold a handful of records.
pub(super) const MIN_ROTATE_SIZE: u64 = 4 * KIB;
pub(super) const MAX_ROTATE_SIZE: u64 = 1024 * GIB;
pub(super) const MIN_ROTATE_EVERY: Duration = Duration::from_secs(1);
pub(super) const MAX_ROTATE_EVERY: Duration = Duration::from_secs(366 * 24 * 3600);
/// More than a directory listing bears.
pub(super) const MAX_KEEP: u64 = 1_000_000;

/// What a file sink does when it is given only a path.
pub(super) fn default_file(path: PathBuf) -> FileConfig {
    FileConfig {
        path,
        rotate_size: Some(256 * MIB),
        rotate_every: Some(Duration::from_secs(3600)),
        keep: Some(48),
        compress: Compress::Zstd,
    }
}

/// Bounds of `[spool] max_size`. The default holds some 200,000 records.
pub const DEFAULT_SPOOL_SIZE: u64 = 64 * MIB;
/// A few batches: less, and the pipeline and the sinks take turns waiting for each other.
pub const MIN_SPOOL_SIZE: u64 = MIB;
pub const MAX_SPOOL_SIZE: u64 = 1024 * GIB;

impl Default for Config {
    /// The file without a key in it.
    fn default() -> Self {
        Config {
            agent_name: host_name(),
            capture: CaptureSettings::default(),
            filter: Filter::default(),
            snapshot: true,
            spool: SpoolConfig {
                max_size: DEFAULT_SPOOL_SIZE as usize,
                when_full: WhenFull::default(),
            },
            sinks: vec![SinkSettings::stdout()],
            telemetry: TelemetrySettings::default(),
        }
    }
}

/// The name that stands beside `value` in a table of names.
pub(super) fn name_of<T: PartialEq>(all: &[(&'static str, T)], value: T) -> &'static str {
    all.iter()
        .find(|(_, other)| *other == value)
        .map(|(name, _)| *name)
        .expect("each variant stands in its table of names")
}

/// `uname -n`. A host without a name gives records that cannot be told from another's, so it gets
/// one that is visibly not chosen.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() || name == "(none)" {
        return "localhost".to_owned();
    }
    name.to_owned()
}
