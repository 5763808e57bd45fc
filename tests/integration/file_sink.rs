//! The file sink behind its driver, on a file system small enough to fill.

// clippy.toml's allowance for tests does not reach a test's helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use conntrail::ctnetlink::Conn;
use conntrail::flow::{Body, Flow, FlowEvent, Identity, Record, View};
use conntrail::format::Format;
use conntrail::sink::{
    self, Chunk, Compress, FileConfig, FileSink, Outcome, Sink, SinkHandle, SinkParts, SinkStats,
};
use conntrail::spool::{Spool, SpoolConfig, WhenFull};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a line.
const LINE: usize = 600;

/// A tmpfs of one MiB, gone with the value.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Nothing without root, unless all is required.
    fn new() -> Option<Self> {
        if crate::lab::need::lacks_root() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
        Some(SmallDisk(dir))
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("flows.json")
    }

    /// Takes all the room but `left` bytes.
    fn fill(&self, left: usize) -> PathBuf {
        let path = self.0.path().join("filler");
        fs::write(&path, vec![0; (1 << 20) - left]).unwrap();
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // DETACH: also when a panic leaves a file open.
        if let Err(error) = unmount(self.0.path(), UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {error}", self.0.path().display());
        }
    }
}

/// The number of the record and as much else as makes a line of 600 bytes.
#[derive(Debug)]
struct Numbered;

impl Format for Numbered {
    fn line(&mut self, view: View<'_>, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(format!("{},", view.seq).as_bytes());
        out.resize(start + LINE - 1, b'x');
        out.push(b'\n');
    }
}

struct Running {
    spool: Arc<Spool>,
    handle: SinkHandle,
}

fn run(config: FileConfig) -> Running {
    let spool = Spool::new(SpoolConfig { max_size: 256 << 20, when_full: WhenFull::Block });
    let identity = Identity { agent: "test".into(), epoch: 1, netns: "self".into() };
    let stats = Arc::<SinkStats>::default();
    let sink = FileSink::new(config, stats.clone());
    let (name, format) = ("file".to_owned(), Box::new(Numbered));
    let parts = SinkParts { name, sink: Box::new(sink), format, stats };
    let handle = sink::start(spool.cursor("file"), parts, Arc::new(identity), |_| {}).unwrap();
    Running { spool, handle }
}

fn plain(path: &Path) -> FileConfig {
    FileConfig {
        path: path.to_owned(),
        rotate_size: None,
        rotate_every: None,
        keep: None,
        compress: Compress::None,
    }
}

impl Running {
    fn append(&self, records: usize) {
        let flow = Flow {
            event: FlowEvent::Destroy,
            overtaken: false,
            flow_id: 0,
            conn: Conn::default(),
            rare: None,
        };
        let record = Record { ts: 0, body: Body::Flow(flow) };
        for _ in 0..records / 50 {
            self.spool.append(&mut vec![record.clone(); 50], 0).unwrap();
        }
    }

    fn wait(&self, what: &str, holds: impl Fn(&SinkStats) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self.handle.stats()) {
            assert!(Instant::now() < deadline, "never: {what}: {:?}", self.handle.stats());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn drain(self, records: u64) {
        self.spool.close(0);
        self.handle.stop(Instant::now() + PATIENCE);
        let report = self.handle.join(PATIENCE);
        assert_eq!((report.outcome, report.acked, report.pending), (Outcome::Drained, records, 0));
    }
}

/// The numbers of the lines of these files, each of which has whole lines only.
fn numbers(files: impl IntoIterator<Item = PathBuf>) -> Vec<u64> {
    let mut numbers = Vec::new();
    for path in files {
        let (mut text, file) = (String::new(), File::open(&path).unwrap());
        if path.extension().is_some_and(|ending| ending == "zst") {
            zstd::Decoder::new(file).unwrap().read_to_string(&mut text).unwrap();
        } else {
            (&file).read_to_string(&mut text).unwrap();
        }
        for line in text.split_inclusive('\n') {
            assert!(line.len() == LINE && line.ends_with('\n'), "torn in {}", path.display());
            numbers.push(line.split(',').next().unwrap().parse().unwrap());
        }
    }
    numbers
}

fn rotated(path: &Path) -> Vec<PathBuf> {
    let prefix = format!("{}.2", path.file_name().unwrap().to_str().unwrap());
    let entries = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries
        .filter(|entry| entry.file_name().to_str().unwrap().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

#[test]
fn a_full_disk_tears_no_line_and_loses_none_once_there_is_room() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.file();
    // Room for some lines, and for no whole number of pages of them.
    let filler = disk.fill(200_000);
    let running = run(plain(&path));
    running.append(1000);
    // The wait after the third error leaves time to look without meeting the fourth attempt.
    running.wait("the disk is full", |stats| stats.errors.get() >= 3);
    let before = numbers([path.clone()]);
    assert!((1..999).contains(&before.len()), "{}", before.len());
    let pending = running.spool.pending()[0].1;
    assert_eq!(pending, 1000 - before.len() as u64, "only whole lines are acknowledged");
    assert!(running.handle.stats().torn_bytes.get() > 0, "a line was torn and mended");

    fs::remove_file(filler).unwrap();
    running.wait("all are out", |stats| stats.records_acked.get() == 1000);
    running.drain(1000);
    assert_eq!(numbers([path]), (1..=1000).collect::<Vec<_>>());
}

#[test]
fn an_agent_that_ends_on_a_full_disk_leaves_whole_lines() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.file();
    disk.fill(100_000);
    let running = run(plain(&path));
    running.append(1000);
    running.wait("the disk is full", |stats| stats.errors.get() >= 1);
    running.spool.close(0);
    running.handle.stop(Instant::now() + Duration::from_millis(100));
    let report = running.handle.join(PATIENCE);
    assert_eq!(report.outcome, Outcome::Deadline);
    let there = numbers([path]).len() as u64;
    assert_eq!((report.acked, report.pending), (there, 1000 - there));
}

#[test]
fn removing_the_log_of_a_full_disk_frees_it_and_the_rest_comes() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.file();
    let running = run(plain(&path));
    running.append(2500);
    running.wait("the disk is full", |stats| stats.errors.get() >= 3);
    let first = numbers([path.clone()]);
    fs::remove_file(&path).unwrap();
    running.wait("all are out", |stats| stats.records_acked.get() == 2500);
    running.drain(2500);
    let mut all = first;
    all.extend(numbers([path]));
    assert_eq!(all, (1..=2500).collect::<Vec<_>>());
}

#[test]
fn retention_keeps_a_log_within_a_disk_that_is_too_small_for_all_of_it() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.file();
    let running = run(FileConfig { rotate_size: Some(120_000), keep: Some(2), ..plain(&path) });
    // Three times the disk, at the rate of somebody who waits for retention now and then.
    for round in 1..=10 {
        running.append(500);
        running.wait("a round", |stats| stats.records_acked.get() == round * 500);
    }
    running.drain(5000);
    let files = rotated(&path);
    assert_eq!(files.len(), 2);
    let kept = numbers(files.into_iter().chain([path]));
    assert_eq!(kept, (5001 - kept.len() as u64..=5000).collect::<Vec<_>>());
}

#[test]
fn a_compression_without_room_leaves_the_file_and_nothing_half_done() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.file();
    // Less room than the copy needs.
    let noise = noise(300_000);
    let plain_name = disk.0.path().join("flows.json.20200101T000000.000000Z");
    fs::write(&plain_name, &noise).unwrap();
    disk.fill(300_000 + 100_000);
    let config =
        FileConfig { rotate_size: Some(1 << 30), compress: Compress::Zstd, ..plain(&path) };
    let running = run(config);
    running.wait("it failed", |stats| stats.archive_errors.get() >= 1);
    running.append(50);
    running.drain(50);
    assert_eq!(fs::read(&plain_name).unwrap(), noise);
    assert_eq!(rotated(&path), [plain_name]);
}

/// Bytes that no compressor makes smaller.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(len)
    .collect()
}

#[test]
fn a_file_moved_away_again_and_again_under_load_loses_no_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows.json");
    let running = run(plain(&path));
    let mut files = Vec::new();
    for round in 0..5 {
        running.append(5000);
        running.wait("the file is there", |_| path.exists());
        let moved = dir.path().join(format!("moved{round}"));
        fs::rename(&path, &moved).unwrap();
        files.push(moved);
        if round % 2 == 0 {
            running.handle.reopen();
        }
    }
    running.append(5000);
    running.wait("all are out", |stats| stats.records_acked.get() == 30_000);
    running.drain(30_000);
    files.push(path);
    files.retain(|file| file.exists());
    assert_eq!(numbers(files), (1..=30_000).collect::<Vec<_>>());
}

#[test]
fn a_folder_moved_away_and_made_again_loses_no_line() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, moved) = (dir.path().join("log"), dir.path().join("moved"));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("flows.json");
    let running = run(plain(&path));
    running.append(1000);
    running.wait("the first are out", |stats| stats.records_acked.get() == 1000);
    fs::rename(&folder, &moved).unwrap();
    running.wait("it is noticed", |stats| stats.reopened.get() >= 1);
    running.append(1000);
    running.wait("opening fails", |stats| stats.errors.get() >= 1);
    fs::create_dir(&folder).unwrap();
    running.wait("all are out", |stats| stats.records_acked.get() == 2000);
    running.drain(2000);
    let all = numbers([moved.join("flows.json"), path]);
    assert_eq!(all, (1..=2000).collect::<Vec<_>>());
}

#[test]
fn rotation_and_compression_under_load_keep_every_line_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows.json");
    let config = FileConfig {
        rotate_size: Some(1_000_000),
        rotate_every: Some(Duration::from_secs(1)),
        compress: Compress::Zstd,
        ..plain(&path)
    };
    let running = run(config);
    running.append(20_000);
    running.wait("all are out", |stats| stats.records_acked.get() == 20_000);
    running.wait("all are compressed", |stats| stats.compressed.get() == stats.rotated.get());
    let rotations = running.handle.stats().rotated.get();
    running.drain(20_000);
    assert!(rotations >= 12, "{rotations}");
    let files = rotated(&path);
    assert_eq!(files.len() as u64, rotations);
    assert_eq!(numbers(files.into_iter().chain([path])), (1..=20_000).collect::<Vec<_>>());
}

const CHILD_FILE: &str = "CONNTRAIL_TEST_CHILD_FILE";

/// The child of the next test.
#[test]
#[ignore = "runs until it is killed"]
fn writes_until_killed() {
    let Some(path) = std::env::var_os(CHILD_FILE) else { return };
    let running = run(plain(Path::new(&path)));
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        running.append(5000);
    }
}

#[test]
fn a_kill_in_the_middle_of_a_write_leaves_nothing_torn_after_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut torn = 0;
    for round in 0..10 {
        let path = dir.path().join(format!("flows{round}"));
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "file_sink::writes_until_killed", "--ignored"])
            .env(CHILD_FILE, &path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        // Rounds differ in how far the child gets.
        while fs::metadata(&path).map_or(0, |meta| meta.len()) < 1_000_000 * (round + 1) {
            assert!(Instant::now() < deadline, "the child does not write");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let stats = Arc::<SinkStats>::default();
        let mut sink = FileSink::new(plain(&path), stats.clone());
        sink.idle().unwrap();
        sink.close().unwrap();
        torn += u64::from(stats.torn_bytes.get() > 0);
        let there = numbers([path]);
        assert_eq!(there, (1..=there.len() as u64).collect::<Vec<_>>());
    }
    // None is possible: the signal is seen only between pages of a write.
    eprintln!("{torn} of 10 kills tore a line");
}

/// What a record costs once it is formatted; run by hand, on a disk:
/// `TMPDIR=… cargo test --release --test integration cost_of -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn cost_of_a_line_of_600_bytes_in_a_file() {
    const LINES: usize = 500_000;
    for kib in [16, 64, 256, 1024, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let mut chunk = Chunk::default();
        while chunk.bytes.len() < kib * 1024 {
            chunk.bytes.resize(chunk.bytes.len() + LINE - 1, b'x');
            chunk.bytes.push(b'\n');
            chunk.ends.push(chunk.bytes.len());
        }
        let mut sink = FileSink::new(plain(&dir.path().join("f")), Arc::default());
        sink.idle().unwrap();
        let (before, mut lines) = (cpu_of_this_thread(), 0);
        while lines < LINES {
            sink.deliver(&chunk, 0).1.unwrap();
            lines += chunk.len();
        }
        let each = (cpu_of_this_thread() - before) / lines as u32;
        println!("chunks of {kib:4} KiB: {each:?} a line");
        assert!(each < Duration::from_micros(1), "{each:?}");
    }
}

/// What the driver costs a record beside format and sink: a format that only fills, no sink.
#[test]
#[ignore = "a measurement"]
fn cost_of_a_record_in_the_driver() {
    #[derive(Debug)]
    struct Fill;
    impl Format for Fill {
        fn line(&mut self, _: View<'_>, out: &mut Vec<u8>) {
            out.extend_from_slice(&[b'x'; LINE]);
        }
    }
    #[derive(Debug)]
    struct Nowhere;
    impl Sink for Nowhere {
        fn deliver(&mut self, chunk: &Chunk, _: usize) -> (usize, Result<(), sink::SinkError>) {
            (chunk.len(), Ok(()))
        }
        fn reopen(&mut self) {}
        fn idle(&mut self) -> Result<(), sink::SinkError> {
            Ok(())
        }
        fn close(&mut self) -> Result<(), sink::SinkError> {
            Ok(())
        }
    }
    let spool = Spool::new(SpoolConfig { max_size: 1 << 30, when_full: WhenFull::Block });
    let cursor = spool.cursor("none");
    let flow = Flow {
        event: FlowEvent::Destroy,
        overtaken: false,
        flow_id: 0,
        conn: Conn::default(),
        rare: None,
    };
    for _ in 0..500 {
        let record = Record { ts: 0, body: Body::Flow(flow.clone()) };
        spool.append(&mut vec![record; 1000], 0).unwrap();
    }
    spool.close(0);
    let identity = Arc::new(Identity { agent: "test".into(), epoch: 1, netns: "self".into() });
    let parts = SinkParts {
        name: "none".to_owned(),
        sink: Box::new(Nowhere),
        format: Box::new(Fill),
        stats: Arc::default(),
    };
    let (send, cost) = std::sync::mpsc::channel();
    // on_end runs on the driver's thread.
    let handle = sink::start(cursor, parts, identity, move |_| {
        send.send(cpu_of_this_thread()).unwrap();
    });
    assert_eq!(handle.unwrap().join(PATIENCE).acked, 500_000);
    println!("{:?} a record", cost.recv().unwrap() / 500_000);
}

/// Nanoseconds on a processor, of `/proc/thread-self/schedstat`.
fn cpu_of_this_thread() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}
