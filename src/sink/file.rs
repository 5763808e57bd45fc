//! Files of lines, rotated by size and time.
//!
//! Promises: every file, at every moment that the agent can be killed at and lives on, consists of
//! whole lines (a torn one left by a kill or a power cut is removed at the next opening); a full disk,
//! a folder that is gone, a file that was moved or removed delay lines and lose none; a rotated
//! file never overwrites another; no other sink or agent writes to the file at the same time, where
//! the file system has flock(2): the second waits. Never syncs (the kernel writes back in its own
//! time), never makes a folder, never cuts what is not the torn end of a line.
//!
//! The file is opened with `O_APPEND`, mode 0640. A write that fails half-way leaves part of a line:
//! `ftruncate` takes it off again, which works on a full disk too.
//!
//! A file that grows fast has its next blocks reserved by `fallocate` beyond its end. On ext4 a line
//! of 600 bytes in chunks of 256 KiB then costs 66 ns of CPU instead of 111. (By the chunk's size,
//! on a busier machine: 16 KiB 251 ns, 64 KiB 159, 256 KiB 134, 4 MiB 131.) What is left of the
//! reserved room is given back when the file is let go.

mod archive;
mod compress;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use archive::{Archive, Stamp};
use compress::Archiver;
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::retry::{Complaint, Say};
use super::{Chunk, Sink, SinkError, SinkStats};

/// How often it is asked whether the path still leads to the open file: stat costs about 1 µs, and
/// moving a file away loses nothing meanwhile. (A file *removed* is noticed after each write.)
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// After a rotation that failed, the file grows on for this long.
const ROTATE_AGAIN: Duration = Duration::from_secs(10);
/// A longer end without `\n` is no line of ours, so the file isn't either.
const MAX_TORN: u64 = 1 << 20;
/// Read at a time when looking for the last `\n`.
const TAIL_BLOCK: u64 = 64 * 1024;
/// Reserved at a time, and written before the first time, so that small logs reserve nothing. 4, 16
/// and 64 MiB cost the same.
const RESERVE: u64 = 8 << 20;
/// How often a file that is removed under one delivery is opened anew at once.
const MAX_REMOVED: usize = 3;

/// How rotated files are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compress {
    #[default]
    None,
    Gzip,
    Zstd,
}

impl Compress {
    pub const ALL: &[Compress] = &[Compress::None, Compress::Gzip, Compress::Zstd];

    pub fn name(self) -> &'static str {
        match self {
            Compress::None => "none",
            Compress::Gzip => "gzip",
            Compress::Zstd => "zstd",
        }
    }

    fn ending(self) -> Option<&'static str> {
        match self {
            Compress::None => None,
            Compress::Gzip => Some(".gz"),
            Compress::Zstd => Some(".zst"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    pub path: PathBuf,
    /// A file is rotated before a line would make it longer than this.
    pub rotate_size: Option<u64>,
    /// A file is rotated at each multiple of this since 1970, UTC: `1h` at the full hour.
    pub rotate_every: Option<Duration>,
    /// How many rotated files are kept; `None` keeps all.
    pub keep: Option<usize>,
    pub compress: Compress,
}

/// What the sink needs of the world outside, narrow enough that tests can make it fail.
trait World: Send + std::fmt::Debug {
    fn open(&mut self, path: &Path) -> io::Result<Box<dyn LogFile>>;
    fn now(&self) -> SystemTime;
}

trait LogFile: Send + std::fmt::Debug {
    /// write(2): may take only part.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// ftruncate(2).
    fn cut(&mut self, size: u64) -> io::Result<()>;
    /// fallocate(2) with `FALLOC_FL_KEEP_SIZE`.
    fn reserve(&mut self, from: u64, len: u64) -> io::Result<()>;
    fn look(&self) -> io::Result<Look>;
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

/// fstat(2).
#[derive(Clone, Copy, Debug)]
struct Look {
    id: (u64, u64),
    size: u64,
    /// Room that it takes on the disk.
    room: u64,
    /// 0 when it was removed.
    links: u64,
    modified: SystemTime,
    regular: bool,
}

#[derive(Debug)]
struct RealWorld;

impl World for RealWorld {
    fn open(&mut self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        for _ in 0..MAX_REMOVED {
            let file =
                OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)?;
            if lock(&file)? && !is_at(&file, path)? {
                // Its writer rotated it and let it go, between our open and our lock.
                continue;
            }
            return Ok(Box::new(file));
        }
        Err(io::Error::other("it is moved again and again"))
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// Takes the file for us alone, as long as it is open: appends of two writers don't mix, but the one
/// that cuts its torn line off would cut the other's lines. Whether there are locks at all.
fn lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Err(io::Error::other("another sink or process writes to it")),
        // NFS without a lock daemon, for example: then nothing is promised.
        Err(error) => {
            tracing::debug!(%error, "flock");
            Ok(false)
        }
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::metadata(path) {
        Ok(meta) => Ok((meta.dev(), meta.ino()) == (own.dev(), own.ino())),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

impl LogFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(self, bytes)
    }

    fn cut(&mut self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }

    fn reserve(&mut self, from: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(self, FallocateFlags::KEEP_SIZE, from, len)?)
    }

    fn look(&self) -> io::Result<Look> {
        let meta = self.metadata()?;
        Ok(Look {
            id: (meta.dev(), meta.ino()),
            size: meta.size(),
            // st_blocks counts 512 bytes whatever the file system's block is.
            room: meta.blocks() * 512,
            links: meta.nlink(),
            modified: meta.modified()?,
            regular: meta.is_file(),
        })
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, at)
    }
}

/// The file that is written to.
#[derive(Debug)]
struct Open {
    file: Box<dyn LogFile>,
    id: (u64, u64),
    size: u64,
    /// Bytes of a torn line at its end that could not be cut off yet.
    torn: u64,
    /// Which multiple of `rotate_every` it belongs to.
    period: u128,
    /// Up to where room is or will be reserved; `None` where the file system can't.
    reserved: Option<u64>,
}

impl Open {
    /// Reserves room once the file has grown up to what was reserved before.
    fn reserve(&mut self, limit: Option<u64>) {
        if self.reserved.is_none_or(|to| self.size < to) {
            return;
        }
        let to = limit.unwrap_or(u64::MAX).min(self.size + RESERVE);
        if to <= self.size {
            return;
        }
        // Only a saving: no support for it, or no room, is no error. Writes say what matters.
        let result = self.file.reserve(self.size, to - self.size);
        self.reserved = result.ok().map(|()| to);
    }

    /// Gives back what was reserved and not used.
    fn give_back(&mut self) {
        let Ok(look) = self.file.look() else { return };
        if look.room < look.size + RESERVE / 16 {
            return;
        }
        if let Err(error) = self.file.cut(look.size) {
            tracing::debug!(%error, "giving back reserved room failed");
        }
    }
}

/// The sink that writes to a file.
#[derive(Debug)]
pub struct FileSink {
    config: FileConfig,
    stats: Arc<SinkStats>,
    world: Box<dyn World>,
    open: Option<Open>,
    archive: Archive,
    /// Looks after rotated files; there from the first opening on, when there is rotation.
    archiver: Option<Archiver>,
    /// The newest rotated file's.
    newest: Option<Stamp>,
    checked: Instant,
    no_rotation_before: Option<Instant>,
    rotate_complaint: Complaint,
    moved_complaint: Complaint,
}

impl FileSink {
    /// Opens nothing yet.
    pub fn new(config: FileConfig, stats: Arc<SinkStats>) -> Self {
        Self::in_world(config, stats, Box::new(RealWorld))
    }

    fn in_world(config: FileConfig, stats: Arc<SinkStats>, world: Box<dyn World>) -> Self {
        FileSink {
            archive: Archive::of(&config.path),
            config,
            stats,
            world,
            open: None,
            archiver: None,
            newest: None,
            checked: Instant::now(),
            no_rotation_before: None,
            rotate_complaint: Complaint::default(),
            moved_complaint: Complaint::default(),
        }
    }

    /// Makes a file ready to take a line of `first_line` bytes.
    fn ready(&mut self, first_line: u64) -> Result<(), SinkError> {
        if self.open.is_some() && self.checked.elapsed() >= CHECK_EVERY {
            self.check_place();
        }
        loop {
            if self.open.is_none() {
                self.open = Some(self.open_file()?);
                self.checked = Instant::now();
            }
            self.mend().map_err(|error| self.retry("cutting a torn line off", &error))?;
            if !self.is_rotation_due(first_line) || !self.rotate() {
                return Ok(());
            }
        }
    }

    fn open_file(&mut self) -> Result<Open, SinkError> {
        let opened = self.world.open(&self.config.path).map_err(|e| self.retry("opening", &e))?;
        let look = opened.look().map_err(|error| self.retry("looking at", &error))?;
        if !look.regular {
            return Err(self.retry("opening", &io::Error::other("not a regular file")));
        }
        let torn = torn_tail(&*opened, look.size).map_err(|e| self.retry("opening", &e))?;
        if torn > 0 {
            tracing::warn!(
                path = %self.config.path.display(),
                bytes = torn,
                "the file ends in a torn line, which is cut off"
            );
        }
        self.start_archiver();
        // A file of an earlier run belongs to the time of its last line.
        let time = if look.size > torn { look.modified } else { self.world.now() };
        let mut open = Open {
            file: opened,
            id: look.id,
            size: look.size,
            torn,
            period: self.period_of(time),
            reserved: Some(look.size + RESERVE),
        };
        // Of a run that was killed.
        open.give_back();
        Ok(open)
    }

    fn start_archiver(&mut self) {
        let rotates = self.config.rotate_size.is_some() || self.config.rotate_every.is_some();
        if self.archiver.is_some() || !rotates {
            return;
        }
        match self.archive.list() {
            Ok(listing) => self.newest = listing.rotated.keys().next_back().copied(),
            Err(error) => tracing::warn!(
                path = %self.archive.dir().display(), %error, "listing rotated files failed"
            ),
        }
        let FileConfig { keep, compress, .. } = self.config;
        match Archiver::start(self.archive.clone(), keep, compress, self.stats.clone()) {
            Ok(archiver) => {
                // For what the last run left.
                archiver.notify();
                self.archiver = Some(archiver);
            }
            Err(error) => {
                self.stats.archive_errors.add(1);
                tracing::error!(%error, "no thread for rotated files, they stay as they are");
            }
        }
    }

    /// Cuts a torn line off the end.
    fn mend(&mut self) -> io::Result<()> {
        let Some(open) = self.open.as_mut().filter(|open| open.torn > 0) else { return Ok(()) };
        // Asked anew: others may have cut the file (logrotate's copytruncate).
        open.size = open.file.look()?.size.saturating_sub(open.torn);
        open.file.cut(open.size)?;
        self.stats.torn_bytes.add(open.torn);
        open.torn = 0;
        Ok(())
    }

    /// Lets the file go if the path no longer leads to it.
    fn check_place(&mut self) {
        self.checked = Instant::now();
        let Some(open) = &mut self.open else { return };
        match fs::metadata(&self.config.path) {
            Ok(meta) if (meta.dev(), meta.ino()) == open.id => open.size = meta.size(),
            Ok(_) => self.leave("was replaced"),
            Err(error) if is_gone(&error) => self.leave("was moved or removed"),
            // It can't be told: a folder closed to us, for example. The file itself works on.
            Err(_) => {}
        }
    }

    fn leave(&mut self, why: &str) {
        if let Err(error) = self.mend() {
            let path = self.config.path.display();
            tracing::warn!(%path, %error, "cutting a torn line off failed, the file keeps it");
        }
        self.let_go();
        self.stats.reopened.add(1);
        if let Some(Say::Error { unsaid }) = self.moved_complaint.error(Instant::now()) {
            tracing::info!(path = %self.config.path.display(), unsaid, "the file {why}, opening anew");
        }
    }

    fn let_go(&mut self) {
        if let Some(mut open) = self.open.take() {
            open.give_back();
        }
    }

    fn is_rotation_due(&mut self, first_line: u64) -> bool {
        let period = self.period_of(self.world.now());
        let Some(open) = &mut self.open else { return false };
        if open.size == 0 {
            open.period = period;
            return false;
        }
        if self.no_rotation_before.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        // "Another", not "later": a clock set back by a year must not stop rotation for a year.
        let too_old = open.period != period;
        let too_long = self.config.rotate_size.is_some_and(|max| open.size + first_line > max);
        too_old || too_long
    }

    /// Gives the file its rotated name; whether it did.
    fn rotate(&mut self) -> bool {
        // What stands at the path may not be our file any more; then there is nothing to rename.
        self.check_place();
        if self.open.is_none() {
            return true;
        }
        let now = Stamp::of(self.world.now());
        let stamp = self.newest.map_or(now, |newest| now.max(newest.next()));
        match self.archive.rotate(stamp) {
            Ok(stamp) => {
                self.newest = Some(stamp);
                self.let_go();
                self.no_rotation_before = None;
                self.stats.rotated.add(1);
                self.rotate_complaint.success(Instant::now());
                if let Some(archiver) = &self.archiver {
                    archiver.notify();
                }
                true
            }
            Err(error) => {
                self.stats.rotate_errors.add(1);
                self.no_rotation_before = Some(Instant::now() + ROTATE_AGAIN);
                if let Some(Say::Error { unsaid }) = self.rotate_complaint.error(Instant::now()) {
                    let path = self.config.path.display();
                    tracing::warn!(%path, %error, unsaid, "rotation failed, the file grows on");
                }
                false
            }
        }
    }

    fn period_of(&self, time: SystemTime) -> u128 {
        let Some(every) = self.config.rotate_every.filter(|every| !every.is_zero()) else {
            return 0;
        };
        time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() / every.as_nanos()
    }

    /// Writes as many records as belong into one file: how many of the chunk are delivered then.
    fn deliver_part(&mut self, chunk: &Chunk, from: usize) -> Result<usize, (usize, SinkError)> {
        let start = chunk.start(from);
        let first_line = (chunk.ends[from] - start) as u64;
        self.ready(first_line).map_err(|error| (from, error))?;
        let open = self.open.as_mut().expect("ready leaves a file open");
        let to = match self.config.rotate_size {
            // A rotation that failed must not make a write of every line.
            Some(max) if self.no_rotation_before.is_none() => {
                let room = max.saturating_sub(open.size).try_into().unwrap_or(usize::MAX);
                chunk.whole_within(start.saturating_add(room)).max(from + 1)
            }
            _ => chunk.len(),
        };
        open.reserve(self.config.rotate_size);
        let (written, result) = write_all(&mut *open.file, chunk.lines(from..to));
        let whole = chunk.whole_within(start + written).max(from);
        open.size += written as u64;
        open.torn = (start + written - chunk.start(whole)) as u64;
        // Removed while it was written to: what was written is lost with it. One fstat a chunk.
        if open.file.look().is_ok_and(|look| look.links == 0) {
            open.torn = 0;
            self.leave("was removed");
            return Ok(from);
        }
        // One that fails is tried again before the next write.
        let mended = self.mend();
        match result.and(mended) {
            Ok(()) => Ok(whole),
            Err(error) => Err((whole, self.retry("writing", &error))),
        }
    }

    fn retry(&self, doing: &str, error: &io::Error) -> SinkError {
        SinkError::Retry(format!("{doing} {}: {error}", self.config.path.display()))
    }
}

impl Sink for FileSink {
    fn deliver(&mut self, chunk: &Chunk, from: usize) -> (usize, Result<(), SinkError>) {
        let (mut done, mut removed) = (from, 0);
        while done < chunk.len() {
            match self.deliver_part(chunk, done) {
                Ok(now) if now == done => removed += 1,
                Ok(now) => done = now,
                Err((now, error)) => return (now, Err(error)),
            }
            if removed > MAX_REMOVED {
                let error = io::Error::other("it is removed again and again");
                return (done, Err(self.retry("writing", &error)));
            }
        }
        (done, Ok(()))
    }

    fn reopen(&mut self) {
        if let Err(error) = self.mend() {
            let path = self.config.path.display();
            tracing::warn!(%path, %error, "cutting a torn line off failed");
        }
        self.let_go();
    }

    fn idle(&mut self) -> Result<(), SinkError> {
        self.check_place();
        self.ready(0)
    }

    fn close(&mut self) -> Result<(), SinkError> {
        let mended = self.mend().map_err(|e| self.retry("cutting a torn line off", &e));
        // Before the file is let go: the next that takes it has an archiver too.
        if let Some(archiver) = self.archiver.take() {
            archiver.close();
        }
        self.let_go();
        mended
    }
}

/// Writes until all is written or an error comes: how much was, and the error.
fn write_all(file: &mut dyn LogFile, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(ErrorKind::WriteZero.into())),
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// How many bytes follow the last `\n`.
fn torn_tail(file: &dyn LogFile, size: u64) -> io::Result<u64> {
    let mut block = vec![0; TAIL_BLOCK as usize];
    let (mut end, mut only_zeros) = (size, true);
    while end > 0 {
        let start = end.saturating_sub(TAIL_BLOCK);
        let block = &mut block[..(end - start) as usize];
        file.read_at(block, start)?;
        if let Some(at) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(size - start - at as u64 - 1);
        }
        // A power cut may leave any length of zeros: the size was written, the data was not.
        only_zeros &= block.iter().all(|&byte| byte == 0);
        if size - start > MAX_TORN && !only_zeros {
            return Err(io::Error::other("more than 1 MiB at its end is no line: not our file"));
        }
        end = start;
    }
    Ok(size)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests;
