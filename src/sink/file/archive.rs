//! The names of rotated files: `<file>.<time>`, and with `.gz` or `.zst` once compressed.
//!
//! The time is UTC with microseconds and of one length, so that names sort by it. It never goes
//! back: a file rotated after the clock was set back is named one microsecond after the newest,
//! because retention removes by name and must not take the newest for the oldest. Nothing is touched
//! whose name is not exactly of this form.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::fs::{CWD, RenameFlags, renameat_with};

const STAMP_FORMAT: &str = "%Y%m%dT%H%M%S%.6fZ";
const STAMP_LEN: usize = "20261122T154055.123456Z".len();

/// How many names that are taken already are stepped over.
const MAX_TAKEN: usize = 100;

/// When a file was rotated: microseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp(i64);

impl Stamp {
    pub(super) fn of(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Stamp(since.as_micros().try_into().unwrap_or(i64::MAX))
    }

    pub(super) fn next(self) -> Self {
        Stamp(self.0.saturating_add(1))
    }

    fn text(self) -> String {
        // A year after 9999 can't be written with four digits.
        let time = Timestamp::from_microsecond(self.0).unwrap_or(Timestamp::MAX);
        time.strftime(STAMP_FORMAT).to_string()
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() == STAMP_LEN)?;
        let civil = jiff::civil::DateTime::strptime(STAMP_FORMAT, text).ok()?;
        let time = civil.to_zoned(TimeZone::UTC).ok()?.timestamp();
        let stamp = Stamp(time.as_microsecond());
        // strptime is lenient (blanks, signs); names are not.
        (stamp.text() == text).then_some(stamp)
    }
}

/// The forms in which a rotated file exists: more than one only after a crash.
pub(super) type Forms = Vec<PathBuf>;

#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Oldest first.
    pub(super) rotated: BTreeMap<Stamp, Forms>,
    /// Compressions that a crash left half-done.
    pub(super) unfinished: Vec<PathBuf>,
}

/// The naming of one file's rotated files.
#[derive(Clone, Debug)]
pub(super) struct Archive {
    path: PathBuf,
    dir: PathBuf,
    /// The file's name and a dot.
    prefix: OsString,
}

impl Archive {
    pub(super) fn of(path: &Path) -> Self {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        };
        let mut prefix = path.file_name().unwrap_or_default().to_owned();
        prefix.push(".");
        Archive { path: path.to_owned(), dir, prefix }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn rotated(&self, stamp: Stamp) -> PathBuf {
        let mut name = self.prefix.clone();
        name.push(stamp.text());
        self.dir.join(name)
    }

    /// What there is of rotated files.
    pub(super) fn list(&self) -> io::Result<Listing> {
        let mut listing = Listing::default();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((stamp, ending)) = self.parse(&name) else { continue };
            match ending.as_bytes() {
                b"" | b".gz" | b".zst" => {
                    listing.rotated.entry(stamp).or_default().push(entry.path());
                }
                b".gz.tmp" | b".zst.tmp" => listing.unfinished.push(entry.path()),
                _ => {}
            }
        }
        Ok(listing)
    }

    /// Gives the file its rotated name, at `stamp` or the first free one after it.
    pub(super) fn rotate(&self, mut stamp: Stamp) -> io::Result<Stamp> {
        for _ in 0..MAX_TAKEN {
            match rename_new(&self.path, &self.rotated(stamp)) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => stamp = stamp.next(),
                result => return result.map(|()| stamp),
            }
        }
        Err(io::Error::new(ErrorKind::AlreadyExists, "every name for it is taken"))
    }

    fn parse<'a>(&self, name: &'a OsStr) -> Option<(Stamp, &'a OsStr)> {
        let rest = name.as_bytes().strip_prefix(self.prefix.as_bytes())?;
        let (stamp, ending) = rest.split_at_checked(STAMP_LEN)?;
        Some((Stamp::parse(stamp)?, OsStr::from_bytes(ending)))
    }
}

/// Renames, never over another file.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems (NFS) have no RENAME_NOREPLACE; link(2) doesn't replace either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_stamp_is_utc_with_microseconds_and_reads_back() {
        let stamp = Stamp(1_795_362_055_123_456);
        assert_eq!(stamp.text(), "20261122T154055.123456Z");
        assert_eq!(Stamp::parse(stamp.text().as_bytes()), Some(stamp));
        assert_eq!(Stamp(0).text(), "19700101T000000.000000Z");
        assert_eq!(Stamp(i64::MAX).text().len(), STAMP_LEN);
    }

    #[test]
    fn only_names_of_exactly_our_form_are_ours() {
        let dir = tempfile::tempdir().unwrap();
        let ours = [
            "f.json.20261122T154055.123456Z",
            "f.json.20261122T154055.123456Z.zst",
            "f.json.20261122T154056.000000Z.gz",
        ];
        let foreign = [
            "f.json",
            "f.json.1",
            "f.json.20261122",
            "f.json.20261122T154055Z",
            "f.json.20261122T154055.123456Z.bak",
            "f.json.20261122T154055.123456Z.zst.old",
            "f.json.20261322T154055.123456Z",
            "f.json.+0261122T154055.123456Z",
            "g.json.20261122T154055.123456Z",
            "f.jsonx20261122T154055.123456Z",
            "xf.json.20261122T154055.123456Z",
        ];
        let unfinished = "f.json.20261122T154055.123456Z.zst.tmp";
        for name in ours.iter().chain(&foreign).chain([&unfinished]) {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let listing = Archive::of(&dir.path().join("f.json")).list().unwrap();
        let mut found: Vec<_> = listing.rotated.into_values().flatten().collect();
        found.sort();
        assert_eq!(found, ours.map(|name| dir.path().join(name)));
        assert_eq!(listing.unfinished, [dir.path().join(unfinished)]);
    }

    #[test]
    fn a_rotated_name_that_is_taken_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let archive = Archive::of(&path);
        let stamp = Stamp(1_000_000);
        fs::write(archive.rotated(stamp), "older").unwrap();
        fs::write(&path, "newer").unwrap();
        assert_eq!(archive.rotate(stamp).unwrap(), stamp.next());
        assert_eq!(fs::read(archive.rotated(stamp)).unwrap(), b"older");
        assert_eq!(fs::read(archive.rotated(stamp.next())).unwrap(), b"newer");
    }
}
