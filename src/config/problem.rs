//! What is wrong with a configuration, shown where it stands.
//!
//! Every problem of a file is kept, in the order of its lines. The text shown comes from a file that
//! anyone may have written, so control characters never reach the terminal.

use std::fmt;
use std::ops::Range;

/// A line is cut around the caret to this many characters, so that it fits a screen.
const SHOWN: usize = 100;

/// One thing wrong, at a place in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// Bytes of the text.
    pub(super) span: Range<usize>,
    pub(super) message: String,
    pub(super) help: Option<String>,
}

/// A problem with its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub message: String,
    /// What is allowed, or what was probably meant.
    pub help: Option<String>,
    text: String,
    caret: String,
}

/// Why there is no configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read at all.
    #[error("{name}: {reason}")]
    Unreadable { name: String, reason: String },
    /// All that is wrong with it.
    #[error("{}", Report { name, problems })]
    Invalid { name: String, problems: Vec<Located> },
}

impl ConfigError {
    pub(super) fn invalid(name: &str, text: &str, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| (problem.span.start, problem.span.end));
        problems.dedup();
        let problems = problems.into_iter().map(|problem| locate(text, problem)).collect();
        ConfigError::Invalid { name: name.to_owned(), problems }
    }

    /// What is wrong, line by line; nothing for a file that could not be read.
    pub fn problems(&self) -> &[Located] {
        match self {
            ConfigError::Unreadable { .. } => &[],
            ConfigError::Invalid { problems, .. } => problems,
        }
    }
}

struct Report<'a> {
    name: &'a str,
    problems: &'a [Located],
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.problems.last().map_or(1, |last| last.line.to_string().len());
        for problem in self.problems {
            let Located { line, column, message, help, text, caret } = problem;
            writeln!(f, "{}:{line}:{column}: {message}", self.name)?;
            writeln!(f, "{line:>width$} | {text}")?;
            writeln!(f, "{:>width$} | {caret}", "")?;
            if let Some(help) = help {
                writeln!(f, "{:>width$} = {help}", "")?;
            }
        }
        let count = self.problems.len();
        write!(f, "{count} {} in {}", if count == 1 { "error" } else { "errors" }, self.name)
    }
}

/// The line number, from 1, of a byte offset.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The nearest place at or before `offset` where the text can be cut.
fn boundary(text: &str, offset: usize) -> usize {
    let mut at = offset.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn locate(text: &str, problem: Problem) -> Located {
    let start = boundary(text, problem.span.start);
    let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
    let line_end = text[start..].find('\n').map_or(text.len(), |length| start + length);
    let end = boundary(text, problem.span.end.clamp(start, line_end));
    let before = text[line_start..start].chars().count();
    // Something to look at even where the span is empty, as at the end of a line.
    let marked = text[start..end.min(line_end)].chars().count().max(1);
    let line = text[line_start..line_end].trim_end_matches('\r');
    let skipped = before.saturating_sub(SHOWN / 2);
    let skipped = if line.chars().count() <= SHOWN { 0 } else { skipped };
    let shown: String = line.chars().skip(skipped).take(SHOWN).map(printable).collect();
    let caret_at = before - skipped;
    Located {
        line: line_of(text, start),
        column: before + 1,
        message: problem.message.chars().map(printable).collect(),
        help: problem.help.map(|help| help.chars().map(printable).collect()),
        caret: " ".repeat(caret_at) + &"^".repeat(marked.min(SHOWN - caret_at.min(SHOWN - 1))),
        text: shown,
    }
}

/// A tab would move the caret, and anything else could steer the terminal.
fn printable(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn located(text: &str, span: Range<usize>) -> Located {
        locate(text, Problem { span, message: "wrong".to_owned(), help: None })
    }

    #[test]
    fn line_and_column_count_from_one_in_characters() {
        let at = located("a = 1\nnäme = 2\n", 6..11);
        assert_eq!((at.line, at.column), (2, 1));
        assert_eq!((at.text.as_str(), at.caret.as_str()), ("näme = 2", "^^^^"));
        let at = located("näme = 2", 8..9);
        assert_eq!((at.line, at.column, at.caret.as_str()), (1, 8, "       ^"));
    }

    #[test]
    fn a_span_over_lines_marks_the_first() {
        assert_eq!(located("[[\n]]", 0..5).caret, "^^");
    }

    #[test]
    fn the_end_of_the_text_has_a_place() {
        assert_eq!(located("", 0..0).caret, "^");
        let at = located("a\n", 2..2);
        assert_eq!((at.line, at.column), (2, 1));
        assert_eq!(located("a", 40..50).line, 1);
    }

    #[test]
    fn a_long_line_is_cut_around_the_caret() {
        let text = format!("{} = 1", "x".repeat(500));
        let at = located(&text, 503..504);
        assert_eq!(at.column, 504);
        assert_eq!(at.text.chars().nth(at.caret.chars().count() - 1), Some('1'));
        assert!(at.text.chars().count() <= SHOWN);
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        let at = located("\x1b[2Jx = 1\r", 0..1);
        assert_eq!(at.text, "\u{fffd}[2Jx = 1");
    }
}
