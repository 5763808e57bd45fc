//! The effective configuration as TOML: complete, and read back equal.

use std::fmt::{self, Display, Write};

use toml::Value;

use crate::format::FormatKind;
use crate::sink::FileConfig;

use super::resolved::{Config, FieldChoice, LogFormat, Method, SinkSettings, SinkTarget, name_of};
use super::values::{format_duration, format_ports, format_protocol, format_size};

/// Writes every key, defaults included.
pub(super) fn write(config: &Config) -> String {
    let mut out = String::new();
    put(&mut out, config).expect("a String takes whatever is written to it");
    out
}

fn put(out: &mut String, config: &Config) -> fmt::Result {
    let Config { agent_name, capture, filter, snapshot, spool, sinks, telemetry } = config;
    writeln!(out, "[agent]\nname = {}\n", quoted(agent_name))?;
    writeln!(out, "[capture]\nevents = {}", list(capture.events.names().map(quoted)))?;
    writeln!(out, "method = \"{}\"", name_of(Method::ALL, capture.method))?;
    writeln!(out, "reliable = {}", capture.reliable)?;
    writeln!(out, "receive_buffer = \"{}\"", format_size(capture.receive_buffer as u64))?;
    writeln!(out, "enable_tracking = {}\n", capture.enable_tracking)?;

    writeln!(out, "[filter]\nnat_only = {}", filter.nat_only)?;
    writeln!(out, "protocols = {}", list(filter.protocols.iter().map(|n| format_protocol(*n))))?;
    let included = filter.include.iter().map(|net| format!("\"{net}\""));
    let excluded = filter.exclude.iter().map(|net| format!("\"!{net}\""));
    writeln!(out, "networks = {}", list(included.chain(excluded)))?;
    writeln!(out, "ports = {}", list(filter.ports.iter().map(format_ports)))?;
    let marks = filter.marks.iter().map(|(value, mask)| format!("\"{value:#x}/{mask:#x}\""));
    writeln!(out, "marks = {}", list(marks))?;
    writeln!(out, "zones = {}\n", list(filter.zones.iter()))?;

    writeln!(out, "[flows]\nsnapshot = {snapshot}\n")?;
    writeln!(out, "[spool]\nmode = \"memory\"")?;
    writeln!(out, "max_size = \"{}\"", format_size(spool.max_size as u64))?;
    writeln!(out, "when_full = \"{}\"\n", spool.when_full.name())?;
    for sink in sinks {
        put_sink(out, sink)?;
    }
    writeln!(out, "[telemetry]\nlog = \"{}\"", telemetry.log.name())?;
    writeln!(out, "log_format = \"{}\"", name_of(LogFormat::ALL, telemetry.log_format))
}

fn put_sink(out: &mut String, sink: &SinkSettings) -> fmt::Result {
    let kind = match sink.target {
        SinkTarget::Stdout => "stdout",
        SinkTarget::File(_) => "file",
    };
    writeln!(out, "[[sink]]\nname = {}\ntype = \"{kind}\"", quoted(&sink.name))?;
    writeln!(out, "format = \"{}\"", sink.format.name())?;
    if sink.format != FormatKind::Conntrack {
        let fields = match &sink.fields {
            FieldChoice::Full => "\"full\"".to_owned(),
            FieldChoice::Audit => "\"audit\"".to_owned(),
            FieldChoice::Accounting => "\"accounting\"".to_owned(),
            FieldChoice::List(names) => list(names.iter().map(|name| quoted(name))),
        };
        writeln!(out, "fields = {fields}")?;
    }
    if let SinkTarget::File(file) = &sink.target {
        put_file(out, file)?;
    }
    writeln!(out)
}

fn put_file(out: &mut String, file: &FileConfig) -> fmt::Result {
    let path = file.path.to_str().expect("a path that came out of a TOML string is UTF-8");
    writeln!(out, "path = {}", quoted(path))?;
    let size = file.rotate_size.map_or("off".to_owned(), format_size);
    writeln!(out, "rotate_size = \"{size}\"")?;
    let every = file.rotate_every.map_or("off".to_owned(), format_duration);
    writeln!(out, "rotate_every = \"{every}\"")?;
    match file.keep {
        Some(count) => writeln!(out, "keep = {count}")?,
        None => writeln!(out, "keep = \"all\"")?,
    }
    writeln!(out, "compress = \"{}\"", file.compress.name())
}

/// A TOML string, escaped as it must be.
fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

fn list(items: impl Iterator<Item = impl Display>) -> String {
    let items: Vec<_> = items.map(|item| item.to_string()).collect();
    format!("[{}]", items.join(", "))
}
