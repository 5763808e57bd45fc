//! Records to bytes, one file a format. No I/O.

use crate::flow::View;

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
}

/// Writes records as lines.
pub trait Format: Send + std::fmt::Debug {
    /// Appends one record as one whole line, its `\n` included.
    fn line(&mut self, view: View<'_>, out: &mut Vec<u8>);
}
