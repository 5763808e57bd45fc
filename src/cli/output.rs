//! Printing: results to stdout, errors to stderr.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use super::Exit;

/// Prints all of `bytes`. A reader that went away (`| head`) is a quiet end.
pub(super) fn print(bytes: impl AsRef<[u8]>) -> Exit {
    let mut out = io::stdout().lock();
    finish(out.write_all(bytes.as_ref()).and_then(|()| out.flush()))
}

/// What the end of printing means.
pub(super) fn finish(written: io::Result<()>) -> Exit {
    match written {
        Ok(()) => Exit::Success,
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Exit::Success,
        Err(error) => fail(Exit::Failure, &format!("stdout: {error}")),
    }
}

/// Says why, and gives the exit code back.
pub(super) fn fail(exit: Exit, why: &dyn Display) -> Exit {
    complain(&format!("conntrail: {why}"));
    exit
}

/// A line for the person at the terminal.
pub(super) fn complain(line: &str) {
    // Without stderr there is nobody to tell.
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_went_away_is_a_quiet_end() {
        assert_eq!(finish(Err(ErrorKind::BrokenPipe.into())), Exit::Success);
        assert_eq!(finish(Err(ErrorKind::StorageFull.into())), Exit::Failure);
        assert_eq!(finish(Ok(())), Exit::Success);
    }
}
