//! Tidies up after rotation, on a thread of its own with low priority: compresses rotated files and
//! removes the oldest beyond `keep`.
//!
//! Works from what it finds in the folder, so that what a crash left is finished by the same code.
//! Promises: a rotated file is removed only after its compressed copy is synced under its final
//! name, or because it is one of the oldest beyond `keep`; a failure leaves it as it is. Never
//! touches the file that is written to, and delays the end of the agent by [`CLOSE_WAIT`] at most.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::super::SinkStats;
use super::super::retry::{Complaint, Say};
use super::Compress;
use super::archive::Archive;

/// How long the end waits for a compression that runs: enough for a gigabyte with zstd on an idle
/// host; what takes longer is begun again at the next start.
pub(super) const CLOSE_WAIT: Duration = Duration::from_secs(2);
/// How long an aborted compression may take to notice: it looks at every block.
const ABORT_WAIT: Duration = Duration::from_millis(200);
/// Read at a time.
const BLOCK: usize = 128 * 1024;
/// On 68 MB of our JSON level 1 took 0.10 s of CPU to 11.0 MB, level 3 (zstd's default) 0.34 s to
/// 12.1 MB, and gzip 1.29 s to 12.2 MB.
const ZSTD_LEVEL: i32 = 1;

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    closing: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    abort: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Two flags: nothing half-written after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closing(&self) -> bool {
        self.lock().closing
    }
}

/// The thread's handle.
#[derive(Debug)]
pub(super) struct Archiver {
    shared: Arc<Shared>,
    ended: mpsc::Receiver<()>,
}

impl Archiver {
    pub(super) fn start(
        archive: Archive,
        keep: Option<usize>,
        compress: Compress,
        stats: Arc<SinkStats>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (end, ended) = mpsc::channel();
        let worker = Worker {
            archive,
            keep,
            compress,
            stats,
            shared: shared.clone(),
            complaint: Complaint::default(),
        };
        thread::Builder::new().name("archiver".to_owned()).spawn(move || {
            worker.run();
            // Only its being dropped matters, also when `run` panics.
            drop(end);
        })?;
        Ok(Archiver { shared, ended })
    }

    /// There may be something to do.
    pub(super) fn notify(&self) {
        self.shared.lock().wanted = true;
        self.shared.changed.notify_all();
    }

    /// Ends the thread after the file that it is at, or without it when that takes too long.
    pub(super) fn close(self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if self.ended.recv_timeout(CLOSE_WAIT) != Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
        self.shared.abort.store(true, Ordering::Relaxed);
        if self.ended.recv_timeout(ABORT_WAIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("a compression hangs and is left to itself");
        }
    }
}

impl Drop for Archiver {
    /// Without [`close`](Self::close) (its sink panicked) the thread still ends, unwaited for.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.abort.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
    }
}

#[derive(Debug)]
struct Worker {
    archive: Archive,
    keep: Option<usize>,
    compress: Compress,
    stats: Arc<SinkStats>,
    shared: Arc<Shared>,
    complaint: Complaint,
}

impl Worker {
    fn run(mut self) {
        // On Linux this is the thread's own niceness. Without it compression is only less polite.
        if let Err(error) = rustix::process::nice(10) {
            tracing::debug!(%error, "nice");
        }
        while self.wait() {
            self.tidy();
        }
    }

    /// Waits for something to do; false at the end.
    fn wait(&self) -> bool {
        let mut state = self.shared.lock();
        while !state.wanted && !state.closing {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // The last rotation is still looked at: retention is quick, and tidy stops by itself.
        std::mem::take(&mut state.wanted)
    }

    fn tidy(&mut self) {
        let mut failed = HashSet::new();
        loop {
            let listing = match self.archive.list() {
                Ok(listing) => listing,
                Err(error) => {
                    let dir = self.archive.dir().to_owned();
                    return self.complain(&dir, "listing", &error);
                }
            };
            for path in &listing.unfinished {
                self.remove(path);
            }
            let mut rotated: Vec<_> = listing.rotated.into_iter().collect();
            if let Some(keep) = self.keep
                && rotated.len() > keep
            {
                for (_, forms) in rotated.drain(..rotated.len() - keep) {
                    for path in &forms {
                        self.remove(path);
                    }
                    self.stats.removed.add(1);
                }
            }
            if self.shared.is_closing() {
                return;
            }
            let Some(ending) = self.compress.ending() else { return };
            let next = rotated.into_iter().find_map(|(stamp, forms)| {
                let plain = self.archive.rotated(stamp);
                (forms.contains(&plain) && !failed.contains(&plain)).then_some(plain)
            });
            let Some(plain) = next else { return };
            match self.compress_file(&plain, ending) {
                Ok(true) => {
                    self.stats.compressed.add(1);
                    self.complaint.success(Instant::now());
                }
                Ok(false) => {}
                Err(error) => {
                    self.complain(&plain, "compressing", &error);
                    failed.insert(plain);
                }
            }
        }
    }

    /// False when it was told to end, or when the file is gone.
    fn compress_file(&mut self, plain: &Path, ending: &str) -> io::Result<bool> {
        let source = match File::open(plain) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            source => source?,
        };
        let target = with_ending(plain, ending);
        let unfinished = with_ending(&target, ".tmp");
        let result = self.write_compressed(source, &unfinished);
        if !matches!(result, Ok(true)) {
            // Its room may be what the log itself needs.
            self.remove(&unfinished);
            return result;
        }
        // A complete copy may be there, of a crash just before the removal; this one is as good.
        fs::rename(&unfinished, &target)?;
        File::open(self.archive.dir())?.sync_all()?;
        self.remove(plain);
        Ok(true)
    }

    fn write_compressed(&self, mut source: File, to: &Path) -> io::Result<bool> {
        let meta = source.metadata()?;
        let target = OpenOptions::new().write(true).create_new(true).mode(0o640).open(to)?;
        let complete = match self.compress {
            Compress::Zstd => {
                let mut encoder = zstd::Encoder::new(&target, ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                let complete = self.copy(&mut source, &mut encoder)?;
                encoder.finish()?;
                complete
            }
            Compress::Gzip => {
                let mut encoder =
                    flate2::write::GzEncoder::new(&target, flate2::Compression::default());
                let complete = self.copy(&mut source, &mut encoder)?;
                encoder.finish()?;
                complete
            }
            Compress::None => self.copy(&mut source, &mut &target)?,
        };
        if complete {
            target.set_permissions(fs::Permissions::from_mode(meta.mode() & 0o7777))?;
            target.set_times(fs::FileTimes::new().set_modified(meta.modified()?))?;
            target.sync_all()?;
        }
        Ok(complete)
    }

    fn copy(&self, from: &mut File, to: &mut impl Write) -> io::Result<bool> {
        let mut block = vec![0; BLOCK];
        while !self.shared.abort.load(Ordering::Relaxed) {
            match from.read(&mut block) {
                Ok(0) => return Ok(true),
                Ok(count) => to.write_all(&block[..count])?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn remove(&mut self, path: &Path) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                self.complain(path, "removing", &error);
            }
            _ => {}
        }
    }

    fn complain(&mut self, path: &Path, doing: &str, error: &io::Error) {
        self.stats.archive_errors.add(1);
        if let Some(Say::Error { unsaid }) = self.complaint.error(Instant::now()) {
            let path = path.display();
            tracing::warn!(%path, %error, unsaid, "{doing} rotated files failed");
        }
    }
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}
