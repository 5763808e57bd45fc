use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_mangen::Man;

use crate::config::DEFAULT_PATH;
use crate::telemetry::logs;

use super::output::{fail, print};
use super::{Exit, command};

/// Print the manual, or write a page for each command
#[derive(Debug, Args)]
#[command(long_about = "\
Print the manual, or write a page for each command

Without --out the page conntrail(1) goes to stdout. With it, conntrail.1 and one page for each \
command are written into a folder, which is made if it is missing.")]
#[command(after_long_help = "\
Examples:
  conntrail man | man -l -
      Read it
  conntrail man --out /usr/local/share/man/man1
      Install all pages")]
pub(super) struct ManArgs {
    /// Write all pages into this folder
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn man(args: &ManArgs) -> Exit {
    let command = command();
    let Some(folder) = &args.out else {
        return match page(&command) {
            Ok(page) => print(page),
            Err(error) => fail(Exit::Failure, &error),
        };
    };
    match write_all(&command, folder) {
        Ok(()) => Exit::Success,
        Err(error) => fail(Exit::Failure, &format!("{}: {error}", folder.display())),
    }
}

fn write_all(command: &Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for command in pages(command) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        fs::write(folder.join(format!("{name}.1")), page(command)?)?;
    }
    Ok(())
}

/// The program and its commands, but not those that are for itself.
fn pages(command: &Command) -> impl Iterator<Item = &Command> {
    let subcommands = command.get_subcommands().filter(|command| !command.is_hide_set());
    std::iter::once(command).chain(subcommands)
}

fn page(command: &Command) -> io::Result<Vec<u8>> {
    let version = env!("CARGO_PKG_VERSION");
    // Without the examples, which clap_mangen would put under EXTRA.
    let man = Man::new(command.clone().version(version))
        .source(format!("conntrail {version}"))
        .manual("conntrail");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut out)?;
    }
    let top = command.has_subcommands();
    if top {
        man.render_subcommands_section(&mut out)?;
    }
    if let Some(examples) = command.get_after_long_help() {
        put_examples(&mut out, &examples.to_string())?;
    }
    put_exit_status(&mut out)?;
    if top {
        put_files(&mut out)?;
    }
    put_see_also(&mut out, command, top)?;
    Ok(out)
}

fn put_examples(out: &mut Vec<u8>, text: &str) -> io::Result<()> {
    writeln!(out, ".SH EXAMPLES")?;
    for line in text.lines().skip(1) {
        let trimmed = line.trim_start();
        // Two spaces: a command line. More: what it does.
        if line.starts_with("   ") {
            writeln!(out, "{}", roff(trimmed))?;
        } else {
            writeln!(out, ".TP\n\\fB{}\\fR", roff(trimmed))?;
        }
    }
    Ok(())
}

fn put_exit_status(out: &mut Vec<u8>) -> io::Result<()> {
    writeln!(out, ".SH \"EXIT STATUS\"")?;
    for (exit, meaning) in Exit::MEANINGS {
        writeln!(out, ".TP\n\\fB{}\\fR\n{}", exit.code(), roff(meaning))?;
    }
    Ok(())
}

fn put_files(out: &mut Vec<u8>) -> io::Result<()> {
    let config = roff(DEFAULT_PATH);
    writeln!(
        out,
        ".SH FILES\n.TP\n\\fI{config}\\fR\nRead when no other is named, where it exists."
    )?;
    writeln!(out, ".SH ENVIRONMENT\n.TP\n\\fB{}\\fR", logs::ENV)?;
    let text = "What to log, in place of [telemetry] log: a level, or levels for parts, such as \
                conntrail::sink=debug,warn.";
    writeln!(out, "{}", roff(text))?;
    writeln!(out, ".TP\n\\fBNO_COLOR\\fR\nLog without colours.")
}

fn put_see_also(out: &mut Vec<u8>, command: &Command, top: bool) -> io::Result<()> {
    let own: Vec<String> = if top {
        let names = pages(command).skip(1).filter_map(|command| command.get_display_name());
        names.map(|name| format!("\\fB{}\\fR(1)", roff(name))).collect()
    } else {
        vec!["\\fBconntrail\\fR(1)".to_owned()]
    };
    writeln!(out, ".SH \"SEE ALSO\"\n{}, \\fBconntrack\\fR(8)", own.join(", "))
}

/// Escapes what roff would take for its own.
fn roff(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-").replace('…', "...");
    if escaped.starts_with(['.', '\'']) { format!("\\&{escaped}") } else { escaped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_the_usual_sections() {
        let command = command();
        let names: Vec<_> = pages(&command).map(|page| page.get_name().to_owned()).collect();
        assert!(names.len() >= 9, "{names:?}");
        for command in pages(&command) {
            let text = String::from_utf8(page(command).unwrap()).unwrap();
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES"] {
                assert!(text.contains(&format!(".SH {section}\n")), "{section} of {text}");
            }
            assert!(text.contains(".SH \"EXIT STATUS\"\n"));
        }
    }

    #[test]
    fn text_cannot_become_a_roff_request() {
        assert_eq!(roff(".TP \\fB -x"), "\\&.TP \\efB \\-x");
    }
}
