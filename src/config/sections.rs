//! The sections of the file, one function each. The keys of each stand in one visible list.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::flow::FieldSet;
use crate::flow::fields::FIELDS;
use crate::format::FormatKind;
use crate::pipeline::Filter;
use crate::sink::{Compress, FileConfig};
use crate::spool::WhenFull;

use super::reader::{Reader, Section, Value};
use super::resolved::{
    CaptureSettings, Config, EventKinds, FieldChoice, LogFormat, LogLevel, MAX_SPOOL_SIZE,
    MIN_SPOOL_SIZE, Method, SinkSettings, SinkTarget,
};
use super::resolved::{
    MAX_KEEP, MAX_ROTATE_EVERY, MAX_ROTATE_SIZE, MIN_ROTATE_EVERY, MIN_ROTATE_SIZE, default_file,
};
use super::values::{self, Refused};

const AGENT: &[&str] = &["name"];
const CAPTURE: &[&str] = &["events", "method", "reliable", "receive_buffer", "enable_tracking"];
const FILTER: &[&str] = &["nat_only", "protocols", "networks", "ports", "marks", "zones"];
const FLOWS: &[&str] = &["snapshot"];
const SPOOL: &[&str] = &["mode", "max_size", "when_full"];
/// What every sink has.
const SINK: &[&str] = &["name", "type", "format", "fields"];
const FILE: &[&str] = &["path", "rotate_size", "rotate_every", "keep", "compress"];
const TELEMETRY: &[&str] = &["log", "log_format"];

const TOP: &[&str] = &["agent", "capture", "filter", "flows", "spool", "sink", "telemetry"];

/// Where each key lives, to say so when it stands elsewhere.
const OWNERS: &[(&str, &[&str])] = &[
    ("[agent]", AGENT),
    ("[capture]", CAPTURE),
    ("[filter]", FILTER),
    ("[flows]", FLOWS),
    ("[spool]", SPOOL),
    ("[[sink]]", SINK),
    ("[[sink]] of type \"file\"", FILE),
    ("[telemetry]", TELEMETRY),
];

/// The kinds of sink and the keys that only they have. A new sink is a row here.
const SINK_TYPES: &[(&str, &[&str])] = &[("stdout", &[]), ("file", FILE)];

const FIELD_SETS: &[(&str, FieldChoice)] = &[
    ("full", FieldChoice::Full),
    ("audit", FieldChoice::Audit),
    ("accounting", FieldChoice::Accounting),
];

/// Longer than any host's name (`HOST_NAME_MAX` is 64) and any sensible label.
const MAX_NAME: usize = 255;

/// Reads the whole document. `sound` says that its syntax was: then what is missing is missing.
pub(super) fn read(reader: &mut Reader, document: &DeTable<'_>, sound: bool) -> Config {
    let mut config = Config::default();
    let top = Section { title: "the file's top level", table: document };
    reader.unknown_keys(top, TOP, owner);
    if let Some(section) = section(reader, document, "agent", "[agent]") {
        agent(reader, section, &mut config);
    }
    if let Some(section) = section(reader, document, "capture", "[capture]") {
        config.capture = capture(reader, section);
    }
    if let Some(section) = section(reader, document, "filter", "[filter]") {
        config.filter = filter(reader, section);
    }
    if let Some(section) = section(reader, document, "flows", "[flows]") {
        reader.unknown_keys(section, FLOWS, owner);
        config.snapshot = reader.boolean(section, "snapshot", config.snapshot);
    }
    if let Some(section) = section(reader, document, "spool", "[spool]") {
        spool(reader, section, &mut config);
    }
    if let Some(section) = section(reader, document, "telemetry", "[telemetry]") {
        reader.unknown_keys(section, TELEMETRY, owner);
        config.telemetry.log = reader.choice(section, "log", LogLevel::ALL, LogLevel::default());
        config.telemetry.log_format =
            reader.choice(section, "log_format", LogFormat::ALL, LogFormat::default());
    }
    sinks(reader, document, sound, &mut config);
    config
}

fn owner(key: &str) -> Option<&'static str> {
    OWNERS.iter().find(|(_, keys)| keys.contains(&key)).map(|(title, _)| *title)
}

/// A table of the top level; anything else of that name is reported.
fn section<'t>(
    reader: &mut Reader,
    document: &'t DeTable<'t>,
    key: &str,
    title: &'t str,
) -> Option<Section<'t>> {
    let value = document.get(key)?;
    match value.get_ref() {
        DeValue::Table(table) => Some(Section { title, table }),
        DeValue::Array(_) => {
            let help = format!("there is one {title}: single brackets");
            reader.problem(value.span(), format!("{key} is a section, not a list"), help);
            None
        }
        _ => {
            let message = format!("{key} is a section, not a value");
            reader.problem(value.span(), message, format!("open it with {title}"));
            None
        }
    }
}

fn agent(reader: &mut Reader, section: Section<'_>, config: &mut Config) {
    reader.unknown_keys(section, AGENT, owner);
    let Some((name, span)) = reader.string(section, "name") else { return };
    if name.is_empty() {
        reader.problem(span, "name: is empty", "leave it out for the host's name");
    } else if name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let help = format!("at most {MAX_NAME} bytes, no control characters");
        reader.problem(span, "name: cannot stand in a record", help);
    } else {
        config.agent_name = name.to_owned();
    }
}

fn capture(reader: &mut Reader, section: Section<'_>) -> CaptureSettings {
    let default = CaptureSettings::default();
    reader.unknown_keys(section, CAPTURE, owner);
    CaptureSettings {
        events: events(reader, section),
        method: reader.choice(section, "method", Method::ALL, default.method),
        reliable: reader.boolean(section, "reliable", default.reliable),
        receive_buffer: reader
            .size(
                section,
                "receive_buffer",
                CaptureSettings::MIN_RECEIVE_BUFFER..=CaptureSettings::MAX_RECEIVE_BUFFER,
                "the kernel charges about 1,280 bytes for an event: 64MiB hold some 52,000",
            )
            .map_or(default.receive_buffer, |size| size as usize),
        enable_tracking: reader.boolean(section, "enable_tracking", default.enable_tracking),
    }
}

fn events(reader: &mut Reader, section: Section<'_>) -> EventKinds {
    let Some(list) = reader.list(section, "events", "events") else {
        return EventKinds::default();
    };
    let mut kinds = EventKinds::NONE;
    for value in list {
        let DeValue::String(word) = value.get_ref() else {
            reader.wrong_type(value, "events", "the name of an event in quotes");
            continue;
        };
        match kinds.with(word) {
            Some(more) => kinds = more,
            None => {
                let allowed = EventKinds::NAMES.iter().copied();
                reader.not_allowed(value.span(), "events", word, allowed);
            }
        }
    }
    if list.is_empty() {
        let span = section.key_span("events").unwrap_or_default();
        let help = "without events there is nothing to record: [\"new\", \"destroy\"] is usual";
        reader.problem(span, "events: the list is empty", help);
    }
    kinds
}

fn filter(reader: &mut Reader, section: Section<'_>) -> Filter {
    reader.unknown_keys(section, FILTER, owner);
    let networks =
        reader.parsed_list(section, "networks", "networks in quotes", values::parse_network);
    let (exclude, include): (Vec<_>, Vec<_>) =
        networks.into_iter().partition(|network| network.exclude);
    Filter {
        nat_only: reader.boolean(section, "nat_only", false),
        protocols: reader.parsed_list(
            section,
            "protocols",
            "protocols by name or number",
            values::parse_protocol,
        ),
        include: include.into_iter().map(|network| network.net).collect(),
        exclude: exclude.into_iter().map(|network| network.net).collect(),
        ports: reader.parsed_list(section, "ports", "ports and ranges", values::parse_ports),
        marks: reader.parsed_list(section, "marks", "marks", values::parse_mark),
        zones: reader.parsed_list(section, "zones", "zone numbers", parse_zone),
    }
}

fn parse_zone(text: &str) -> Result<u16, Refused> {
    text.parse().map_err(|_| Refused {
        why: format!("`{text}` is not a zone"),
        help: "zones are numbers from 0 to 65535".to_owned(),
    })
}

fn spool(reader: &mut Reader, section: Section<'_>, config: &mut Config) {
    reader.unknown_keys(section, SPOOL, owner);
    match reader.string(section, "mode") {
        None | Some(("memory", _)) => {}
        Some(("disk", span)) => reader.problem(
            span,
            "mode: `disk` is not there yet",
            "this version keeps records in memory only: use \"memory\"; what is not delivered \
             when the agent dies is lost",
        ),
        Some((other, span)) => reader.not_allowed(span, "mode", other, ["memory"].into_iter()),
    }
    let most = MAX_SPOOL_SIZE.min(usize::MAX as u64);
    let advice = "the spool has to hold a few batches; the default is 64MiB";
    if let Some(size) = reader.size(section, "max_size", MIN_SPOOL_SIZE..=most, advice) {
        config.spool.max_size = size as usize;
    }
    let policies: Vec<_> = WhenFull::ALL.iter().map(|policy| (policy.name(), *policy)).collect();
    config.spool.when_full = reader.choice(section, "when_full", &policies, WhenFull::default());
}

/// What must be used once, and where it was used first.
#[derive(Default)]
struct Taken {
    names: BTreeMap<String, Range<usize>>,
    paths: BTreeMap<PathBuf, String>,
    stdout: Option<String>,
}

fn sinks(reader: &mut Reader, document: &DeTable<'_>, sound: bool, config: &mut Config) {
    let Some(value) = document.get("sink") else { return };
    let DeValue::Array(list) = value.get_ref() else {
        let help = "write [[sink]], with two brackets: there can be several";
        reader.problem(value.span(), "sink is a list of sections", help);
        return;
    };
    let mut taken = Taken::default();
    let mut read = Vec::new();
    for value in list.iter() {
        let DeValue::Table(table) = value.get_ref() else {
            reader.problem(value.span(), "a sink is a section", "open it with [[sink]]");
            continue;
        };
        read.extend(sink(reader, table, value, sound, &mut taken));
    }
    // `sink = []` asks for none, which is no way to run.
    if list.is_empty() {
        let help = "leave it out for JSON to stdout";
        reader.problem(value.span(), "sink: the list is empty", help);
    }
    config.sinks = read;
}

fn sink(
    reader: &mut Reader,
    table: &DeTable<'_>,
    at: &Value<'_>,
    sound: bool,
    taken: &mut Taken,
) -> Option<SinkSettings> {
    let section = Section { title: "[[sink]]", table };
    let Some((kind, own)) = sink_type(reader, section, at, sound) else {
        // Which keys are right depends on the type: only those that no sink has can be told.
        let any: Vec<_> = SINK.iter().chain(FILE).copied().collect();
        reader.unknown_keys(section, &any, owner);
        return None;
    };
    let title = format!("[[sink]] of type \"{kind}\"");
    let section = Section { title: &title, table };
    let known: Vec<_> = SINK.iter().chain(own).copied().collect();
    reader.unknown_keys(section, &known, owner);
    let name = sink_name(reader, section, kind, at, taken);
    let kinds: Vec<_> = FormatKind::ALL.iter().map(|format| (format.name(), *format)).collect();
    let format = reader.choice(section, "format", &kinds, FormatKind::default());
    let fields = fields(reader, section, format);
    let target = match kind {
        "file" => SinkTarget::File(file(reader, section, at, sound, &name, taken)?),
        _ => {
            if let Some(first) = taken.stdout.replace(name.clone()) {
                let message = format!("sink \"{name}\" writes to stdout, as \"{first}\" does");
                reader.problem(at.span(), message, "one sink can have stdout");
            }
            SinkTarget::Stdout
        }
    };
    Some(SinkSettings { name, format, fields, target })
}

fn sink_type(
    reader: &mut Reader,
    section: Section<'_>,
    at: &Value<'_>,
    sound: bool,
) -> Option<(&'static str, &'static [&'static str])> {
    let names = SINK_TYPES.iter().map(|(name, _)| *name);
    if section.get("type").is_none() {
        if sound {
            let help = format!("allowed: {}", values::List(names));
            reader.problem(at.span(), "the sink has no type", help);
        }
        return None;
    }
    let (word, span) = reader.string(section, "type")?;
    let found = SINK_TYPES.iter().find(|(name, _)| *name == word).copied();
    if found.is_none() {
        reader.not_allowed(span, "type", word, names);
    }
    found
}

/// The name, which is the type's where none is given. It labels counters and the sink's cursor.
fn sink_name(
    reader: &mut Reader,
    section: Section<'_>,
    kind: &str,
    at: &Value<'_>,
    taken: &mut Taken,
) -> String {
    let (name, span) = reader.string(section, "name").unwrap_or((kind, at.span()));
    let usable = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(usable) {
        let help = "1 to 64 letters, digits, `-`, `_` or `.`";
        reader.problem(span.clone(), format!("name: `{name}` cannot name a sink"), help);
    } else if taken.names.contains_key(name) {
        let help = "each sink needs a name of its own";
        reader.problem(span.clone(), format!("there is a sink \"{name}\" already"), help);
    }
    taken.names.insert(name.to_owned(), span);
    name.to_owned()
}

fn fields(reader: &mut Reader, section: Section<'_>, format: FormatKind) -> FieldChoice {
    let Some(value) = section.get("fields") else { return FieldChoice::default() };
    if format == FormatKind::Conntrack {
        let span = section.key_span("fields").unwrap_or_default();
        let help = "leave it out, or use format = \"json\"";
        reader.problem(span, "fields: the conntrack format has columns of its own", help);
        return FieldChoice::default();
    }
    match value.get_ref() {
        DeValue::String(word) => {
            if let Some((_, set)) = FIELD_SETS.iter().find(|(name, _)| name == word) {
                return set.clone();
            }
            reader.not_allowed(value.span(), "fields", word, FIELD_SETS.iter().map(|(n, _)| *n));
            FieldChoice::default()
        }
        DeValue::Array(list) => field_list(reader, section, list),
        _ => {
            reader.wrong_type(value, "fields", "\"full\", \"audit\", \"accounting\" or a list");
            FieldChoice::default()
        }
    }
}

fn field_list(reader: &mut Reader, section: Section<'_>, list: &[Value<'_>]) -> FieldChoice {
    let mut names: Vec<String> = Vec::new();
    for value in list {
        let DeValue::String(name) = value.get_ref() else {
            reader.wrong_type(value, "fields", "the name of a field in quotes");
            continue;
        };
        if let Err(refused) = check_field(name) {
            reader.problem(value.span(), format!("fields: {}", refused.why), refused.help);
        } else if names.iter().any(|known| known == name) {
            let message = format!("fields: `{name}` is there twice");
            reader.problem(value.span(), message, "name each field once");
        } else {
            names.push(name.to_string());
        }
    }
    if list.is_empty() {
        let span = section.key_span("fields").unwrap_or_default();
        reader.problem(span, "fields: the list is empty", "leave it out for all fields");
    }
    FieldChoice::List(names)
}

/// The one place that knows which fields there are.
fn check_field(name: &str) -> Result<(), Refused> {
    if FieldSet::list([name]).is_ok() {
        return Ok(());
    }
    let names = FIELDS.iter().map(|field| field.name);
    let help = match values::closest(name, names.clone()) {
        Some(close) => format!("did you mean \"{close}\"?"),
        None => format!("fields are {}", values::List(names)),
    };
    Err(Refused { why: format!("`{name}` is not a field"), help })
}

fn file(
    reader: &mut Reader,
    section: Section<'_>,
    at: &Value<'_>,
    sound: bool,
    name: &str,
    taken: &mut Taken,
) -> Option<FileConfig> {
    let path = path(reader, section, at, sound, name, taken);
    // Read on without a path: its other keys may be wrong as well.
    let default = default_file(path.clone().unwrap_or_default());
    let compressions: Vec<_> = Compress::ALL.iter().map(|way| (way.name(), *way)).collect();
    let settings = FileConfig {
        rotate_size: or_word(section, "rotate_size", "off", |section, key| {
            let bounds = MIN_ROTATE_SIZE..=MAX_ROTATE_SIZE;
            let advice = "a size of some MiB is usual, \"off\" does not rotate by size";
            reader.size(section, key, bounds, advice).or(default.rotate_size)
        }),
        rotate_every: or_word(section, "rotate_every", "off", |section, key| {
            let bounds = MIN_ROTATE_EVERY..=MAX_ROTATE_EVERY;
            reader.duration(section, key, bounds).or(default.rotate_every)
        }),
        keep: or_word(section, "keep", "all", |section, key| {
            keep(reader, section, key).or(default.keep)
        }),
        compress: reader.choice(section, "compress", &compressions, default.compress),
        path: default.path,
    };
    path.map(|_| settings)
}

/// `None` where the key says `word`, else what `read` finds.
fn or_word<'t, T>(
    section: Section<'t>,
    key: &str,
    word: &str,
    read: impl FnOnce(Section<'t>, &str) -> Option<T>,
) -> Option<T> {
    let said = section.get(key).and_then(|value| value.get_ref().as_str());
    if said == Some(word) { None } else { read(section, key) }
}

fn keep(reader: &mut Reader, section: Section<'_>, key: &str) -> Option<usize> {
    let value = section.get(key)?;
    let help = "a number of rotated files from 1, or \"all\"";
    if !matches!(value.get_ref(), DeValue::Integer(_)) {
        reader.wrong_type(value, key, help);
        return None;
    }
    let count = reader.integer(value, key, MAX_KEEP)?;
    if count == 0 {
        reader.problem(value.span(), "keep: 0 would delete each file as it is rotated", help);
        return None;
    }
    Some(count as usize)
}

fn path(
    reader: &mut Reader,
    section: Section<'_>,
    at: &Value<'_>,
    sound: bool,
    name: &str,
    taken: &mut Taken,
) -> Option<PathBuf> {
    if section.get("path").is_none() {
        if sound {
            let help = "say where to write: path = \"/var/log/conntrail/flows.json\"";
            reader.problem(at.span(), format!("sink \"{name}\" has no path"), help);
        }
        return None;
    }
    let (text, span) = reader.string(section, "path")?;
    if text.is_empty() || text.contains('\0') || text.ends_with('/') {
        let help = "a file is needed, such as \"/var/log/conntrail/flows.json\"";
        reader.problem(span, format!("path: `{text}` is not a file's path"), help);
        return None;
    }
    if let Some(other) = taken.paths.insert(plain_path(Path::new(text)), name.to_owned()) {
        let help = "two writers of one file would mix their lines: give each its own";
        reader.problem(span, format!("path: sink \"{other}\" writes to `{text}` already"), help);
    }
    Some(PathBuf::from(text))
}

/// Without `.` and doubled slashes, so that two ways to write one path are found. Links are not
/// followed: the file may not be there yet.
fn plain_path(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}
