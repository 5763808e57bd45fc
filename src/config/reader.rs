//! A small typed reader over the parsed TOML that keeps every problem and goes on.
//!
//! serde stops at the first error, and `deny_unknown_fields` hides the rest behind it. Here each
//! value that cannot be used is reported and its default stands in, so that one pass finds all.
//! A stand-in never runs: with any problem there is no configuration.

use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::problem::Problem;
use super::values::{self, List, Refused, closest};

pub(super) type Value<'t> = Spanned<DeValue<'t>>;

/// A table with its name for messages: `[capture]`, `sink "flows"`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section<'t> {
    pub(super) title: &'t str,
    pub(super) table: &'t DeTable<'t>,
}

impl<'t> Section<'t> {
    pub(super) fn get(self, key: &str) -> Option<&'t Value<'t>> {
        self.table.get(key)
    }

    /// Where the key itself stands.
    pub(super) fn key_span(self, key: &str) -> Option<Range<usize>> {
        self.table.get_key_value(key).map(|(key, _)| key.span())
    }
}

/// Collects problems.
#[derive(Debug, Default)]
pub(super) struct Reader {
    pub(super) problems: Vec<Problem>,
}

impl Reader {
    pub(super) fn problem(
        &mut self,
        span: Range<usize>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let help = help.into();
        let help = (!help.is_empty()).then_some(help);
        self.problems.push(Problem { span, message: message.into(), help });
    }

    fn refused(&mut self, span: Range<usize>, key: &str, refused: Refused) {
        self.problem(span, format!("{key}: {}", refused.why), refused.help);
    }

    /// Keeps the value, or says why not.
    fn keep<T>(&mut self, span: Range<usize>, key: &str, read: Result<T, Refused>) -> Option<T> {
        match read {
            Ok(value) => Some(value),
            Err(refused) => {
                self.refused(span, key, refused);
                None
            }
        }
    }

    pub(super) fn wrong_type(&mut self, value: &Value<'_>, key: &str, wanted: &str) {
        let found = match value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a float",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.problem(value.span(), format!("{key}: found {found}, not {wanted}"), "");
    }

    pub(super) fn boolean(&mut self, section: Section<'_>, key: &str, default: bool) -> bool {
        let Some(value) = section.get(key) else { return default };
        match value.get_ref() {
            DeValue::Boolean(boolean) => *boolean,
            _ => {
                self.wrong_type(value, key, "true or false (without quotes)");
                default
            }
        }
    }

    /// A string with where it stands.
    pub(super) fn string<'t>(
        &mut self,
        section: Section<'t>,
        key: &str,
    ) -> Option<(&'t str, Range<usize>)> {
        let value = section.get(key)?;
        match value.get_ref() {
            DeValue::String(text) => Some((text, value.span())),
            _ => {
                self.wrong_type(value, key, "a string (in quotes)");
                None
            }
        }
    }

    /// One of a table of names.
    pub(super) fn choice<T: Copy>(
        &mut self,
        section: Section<'_>,
        key: &str,
        all: &[(&str, T)],
        default: T,
    ) -> T {
        let Some((word, span)) = self.string(section, key) else { return default };
        if let Some((_, value)) = all.iter().find(|(name, _)| *name == word) {
            return *value;
        }
        self.not_allowed(span, key, word, all.iter().map(|(name, _)| *name));
        default
    }

    /// Says that a word is none of those allowed.
    pub(super) fn not_allowed<'a>(
        &mut self,
        span: Range<usize>,
        key: &str,
        word: &str,
        allowed: impl Iterator<Item = &'a str> + Clone,
    ) {
        let list = List(allowed.clone());
        let help = match closest(word, allowed) {
            Some(close) => format!("did you mean \"{close}\"? Allowed: {list}"),
            None => format!("allowed: {list}"),
        };
        self.problem(span, format!("{key}: `{word}` is not allowed"), help);
    }

    /// A size within bounds; `advice` says why less makes no sense.
    pub(super) fn size(
        &mut self,
        section: Section<'_>,
        key: &str,
        bounds: RangeInclusive<u64>,
        advice: &str,
    ) -> Option<u64> {
        let value = section.get(key)?;
        let size = match value.get_ref() {
            DeValue::String(text) => self.keep(value.span(), key, values::parse_size(text))?,
            DeValue::Integer(_) => self.integer(value, key, *bounds.end())?,
            _ => {
                self.wrong_type(value, key, "a size such as \"64MiB\" or a number of bytes");
                return None;
            }
        };
        if size < *bounds.start() {
            let least = values::format_size(*bounds.start());
            self.problem(
                value.span(),
                format!("{key}: {} is too small, at least {least}", values::format_size(size)),
                advice,
            );
            return None;
        }
        if size > *bounds.end() {
            let most = values::format_size(*bounds.end());
            let found = values::format_size(size);
            self.problem(value.span(), format!("{key}: {found} is too large, at most {most}"), "");
            return None;
        }
        Some(size)
    }

    pub(super) fn duration(
        &mut self,
        section: Section<'_>,
        key: &str,
        bounds: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        let value = section.get(key)?;
        let DeValue::String(text) = value.get_ref() else {
            self.wrong_type(value, key, "a duration with its unit, such as \"30s\" or \"1h\"");
            return None;
        };
        let duration = self.keep(value.span(), key, values::parse_duration(text))?;
        if !bounds.contains(&duration) {
            let least = values::format_duration(*bounds.start());
            let most = values::format_duration(*bounds.end());
            self.problem(
                value.span(),
                format!("{key}: {text} is out of range"),
                format!("from {least} to {most}"),
            );
            return None;
        }
        Some(duration)
    }

    /// A whole number from 0 to `most`.
    pub(super) fn integer(&mut self, value: &Value<'_>, key: &str, most: u64) -> Option<u64> {
        let DeValue::Integer(integer) = value.get_ref() else {
            self.wrong_type(value, key, "a number");
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok();
        let number = number.filter(|number| *number <= most);
        if number.is_none() {
            let message = format!("{key}: {integer} is out of range");
            self.problem(value.span(), message, format!("from 0 to {most}"));
        }
        number
    }

    /// The items of a list.
    pub(super) fn list<'t>(
        &mut self,
        section: Section<'t>,
        key: &str,
        of: &str,
    ) -> Option<&'t [Value<'t>]> {
        let value = section.get(key)?;
        match value.get_ref() {
            DeValue::Array(list) => Some(items(list)),
            _ => {
                self.wrong_type(value, key, &format!("a list of {of}, in brackets"));
                None
            }
        }
    }

    /// A list whose items are strings, or numbers written without quotes.
    pub(super) fn parsed_list<T>(
        &mut self,
        section: Section<'_>,
        key: &str,
        of: &str,
        parse: impl Fn(&str) -> Result<T, Refused>,
    ) -> Vec<T> {
        let mut parsed = Vec::new();
        for value in self.list(section, key, of).unwrap_or_default() {
            let text = match value.get_ref() {
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(integer) => integer.to_string(),
                _ => {
                    self.wrong_type(value, key, &format!("one of {of}"));
                    continue;
                }
            };
            parsed.extend(self.keep(value.span(), key, parse(&text)));
        }
        parsed
    }

    /// Each key that the section does not know, with the nearest that it does.
    pub(super) fn unknown_keys(
        &mut self,
        section: Section<'_>,
        known: &[&str],
        elsewhere: Elsewhere,
    ) {
        for key in section.table.keys() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let allowed = List(known.iter().copied());
            let help = if let Some(owner) = elsewhere(name) {
                format!("`{name}` belongs into {owner}")
            } else if let Some(close) = closest(name, known.iter().copied()) {
                format!("did you mean `{close}`? Known here: {allowed}")
            } else {
                format!("known here: {allowed}")
            };
            self.problem(key.span(), format!("unknown key `{name}` in {}", section.title), help);
        }
    }
}

/// Which section knows a key, if one does.
pub(super) type Elsewhere = fn(&str) -> Option<&'static str>;

fn items<'t>(array: &'t DeArray<'t>) -> &'t [Value<'t>] {
    array
}
