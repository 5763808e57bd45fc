//! Records to bytes, one file a format. No I/O.

mod conntrack;
mod json;
mod time;

use crate::flow::{FieldSet, View};

pub use conntrack::Conntrack;
pub use json::Json;

/// A format as the configuration names it. Adding one is a file here and a row in each `match`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FormatKind {
    #[default]
    Json,
    /// conntrack(8)'s text.
    Conntrack,
}

impl FormatKind {
    pub const ALL: &[FormatKind] = &[FormatKind::Json, FormatKind::Conntrack];

    pub fn name(self) -> &'static str {
        match self {
            FormatKind::Json => "json",
            FormatKind::Conntrack => "conntrack",
        }
    }

    /// A writer of this format with the fields that were selected.
    pub fn build(self, fields: FieldSet) -> Box<dyn Format> {
        match self {
            FormatKind::Json => Box::new(Json::new(fields)),
            // A text for people: its columns are conntrack's, whatever is selected.
            FormatKind::Conntrack => Box::new(Conntrack::default()),
        }
    }
}

/// Writes records as lines.
pub trait Format: Send + std::fmt::Debug {
    /// Appends one record as one whole line, its `\n` included.
    fn line(&mut self, view: View<'_>, out: &mut Vec<u8>);
}
