//! A real folder; only writes, cuts and the clock can be made to fail or jump.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A write that takes this many bytes at most.
    Short(usize),
    /// The disk is full.
    Full,
    /// The next cut fails.
    NoCut,
}

/// Shared between a test and the files of its sink.
#[derive(Clone, Debug, Default)]
struct Script {
    faults: Arc<Mutex<VecDeque<Fault>>>,
    /// Seconds since 1970.
    clock: Arc<AtomicI64>,
}

impl World for Script {
    fn open(&mut self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        let file = RealWorld.open(path)?;
        Ok(Box::new(Scripted { file, script: self.clone() }))
    }

    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.clock.load(Ordering::Relaxed) as u64)
    }
}

#[derive(Debug)]
struct Scripted {
    file: Box<dyn LogFile>,
    script: Script,
}

impl LogFile for Scripted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fault = self.script.faults.lock().unwrap().pop_front();
        match fault.unwrap_or(Fault::None) {
            Fault::Short(count) => self.file.write(&bytes[..count.clamp(1, bytes.len())]),
            Fault::Full => Err(ErrorKind::StorageFull.into()),
            Fault::None | Fault::NoCut => self.file.write(bytes),
        }
    }

    fn cut(&mut self, size: u64) -> io::Result<()> {
        let mut faults = self.script.faults.lock().unwrap();
        if faults.front() == Some(&Fault::NoCut) {
            faults.pop_front();
            return Err(io::Error::other("no cut"));
        }
        self.file.cut(size)
    }

    fn reserve(&mut self, from: u64, len: u64) -> io::Result<()> {
        self.file.reserve(from, len)
    }

    fn look(&self) -> io::Result<Look> {
        self.file.look()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_at(buffer, at)
    }
}

struct Bench {
    dir: tempfile::TempDir,
    config: FileConfig,
    script: Script,
    stats: Arc<SinkStats>,
}

impl Bench {
    fn new(change: impl FnOnce(&mut FileConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = FileConfig {
            path: dir.path().join("f.json"),
            rotate_size: None,
            rotate_every: None,
            keep: None,
            compress: Compress::None,
        };
        change(&mut config);
        let script = Script::default();
        script.clock.store(1_795_362_055, Ordering::Relaxed);
        Bench { dir, config, script, stats: Arc::default() }
    }

    fn sink(&self) -> FileSink {
        let world = Box::new(self.script.clone());
        FileSink::in_world(self.config.clone(), self.stats.clone(), world)
    }

    fn fail(&self, faults: &[Fault]) {
        self.script.faults.lock().unwrap().extend(faults);
    }

    fn advance(&self, seconds: i64) {
        self.script.clock.fetch_add(seconds, Ordering::Relaxed);
    }

    fn path(&self) -> &Path {
        &self.config.path
    }

    /// The rotated files, oldest first.
    fn rotated(&self) -> Vec<PathBuf> {
        let listing = Archive::of(self.path()).list().unwrap();
        listing.rotated.into_values().flatten().collect()
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }

    /// All rotated files, unpacked, and the current one.
    fn all_text(&self) -> String {
        let mut all: String = self.rotated().iter().map(|path| unpack(path)).collect();
        all += &self.text();
        all
    }
}

fn unpack(path: &Path) -> String {
    let (mut text, file) = (String::new(), File::open(path).unwrap());
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("gz") => flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap(),
        Some("zst") => zstd::Decoder::new(file).unwrap().read_to_string(&mut text).unwrap(),
        _ => (&file).read_to_string(&mut text).unwrap(),
    };
    text
}

/// Lines `<number>,xxx…` of these lengths, numbered from `first`.
fn chunk(first: usize, lengths: &[usize]) -> Chunk {
    let mut chunk = Chunk::default();
    for (index, &len) in lengths.iter().enumerate() {
        let number = format!("{},", first + index);
        let fill = len.saturating_sub(number.len() + 1);
        chunk.bytes.extend_from_slice(number.as_bytes());
        chunk.bytes.resize(chunk.bytes.len() + fill, b'x');
        chunk.bytes.push(b'\n');
        chunk.ends.push(chunk.bytes.len());
    }
    chunk
}

fn text(chunk: &Chunk) -> &str {
    std::str::from_utf8(&chunk.bytes).unwrap()
}

fn retry_of(result: (usize, Result<(), SinkError>)) -> (usize, String) {
    match result {
        (done, Err(SinkError::Retry(error))) => (done, error),
        other => panic!("expected a Retry, got {other:?}"),
    }
}

/// Delivers all, as the driver would.
fn deliver(sink: &mut FileSink, chunk: &Chunk) {
    let mut done = 0;
    for _ in 0..1000 {
        let (now, result) = sink.deliver(chunk, done);
        assert!(now >= done);
        done = now;
        if result.is_ok() {
            assert_eq!(done, chunk.len());
            return;
        }
    }
    panic!("never delivered");
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_chunk_is_one_write_to_a_file_that_only_the_group_may_read() {
    let bench = Bench::new(|_| {});
    let mut sink = bench.sink();
    assert!(!bench.path().exists(), "construction is inert");
    let lines = chunk(0, &[10, 20, 30]);
    // A second write would take the fault.
    bench.fail(&[Fault::None, Fault::Full]);
    assert_eq!(sink.deliver(&lines, 0).0, 3);
    assert_eq!(bench.text(), text(&lines));
    let mode = fs::metadata(bench.path()).unwrap().mode() & 0o777;
    assert_eq!(mode & !0o640, 0, "{mode:o}");
    assert_eq!(mode & 0o600, 0o600, "{mode:o}");
}

#[test]
fn a_full_disk_leaves_whole_lines_only_and_the_rest_comes_when_there_is_room() {
    let bench = Bench::new(|_| {});
    let mut sink = bench.sink();
    let lines = chunk(0, &[10, 10, 10, 10]);
    bench.fail(&[Fault::Short(25), Fault::Full]);
    let (done, error) = retry_of(sink.deliver(&lines, 0));
    assert_eq!(done, 2);
    assert!(error.contains("f.json"), "{error}");
    assert_eq!(bench.text(), text(&lines)[..20]);
    assert_eq!(bench.stats.torn_bytes.get(), 5);
    sink.deliver(&lines, done).1.unwrap();
    assert_eq!(bench.text(), text(&lines));
}

#[test]
fn a_torn_line_that_could_not_be_cut_off_is_cut_off_before_the_next_write() {
    let bench = Bench::new(|_| {});
    let mut sink = bench.sink();
    let lines = chunk(0, &[10, 10]);
    bench.fail(&[Fault::Short(15), Fault::Full, Fault::NoCut]);
    assert_eq!(retry_of(sink.deliver(&lines, 0)).0, 1);
    assert_eq!(bench.text().len(), 15);
    sink.deliver(&lines, 1).1.unwrap();
    assert_eq!(bench.text(), text(&lines));
}

#[test]
fn a_torn_line_of_an_earlier_run_is_removed_at_opening_however_long_it_is() {
    for tail in [0, 1, 100, TAIL_BLOCK as usize - 3, TAIL_BLOCK as usize, 300_000] {
        let bench = Bench::new(|_| {});
        let mut before = "whole\n".to_owned();
        before.extend(std::iter::repeat_n('t', tail));
        fs::write(bench.path(), &before).unwrap();
        let mut sink = bench.sink();
        sink.idle().unwrap();
        assert_eq!(bench.text(), "whole\n");
        assert_eq!(bench.stats.torn_bytes.get(), tail as u64);
    }
    let bench = Bench::new(|_| {});
    fs::write(bench.path(), "only torn").unwrap();
    bench.sink().idle().unwrap();
    assert_eq!(bench.text(), "");
}

#[test]
fn a_file_that_is_none_of_ours_is_not_cut() {
    let bench = Bench::new(|_| {});
    fs::write(bench.path(), vec![b'b'; 3 << 20]).unwrap();
    let (done, error) = retry_of(bench.sink().deliver(&chunk(0, &[10]), 0));
    assert_eq!(done, 0);
    assert!(error.contains("not our file"), "{error}");
    assert_eq!(fs::metadata(bench.path()).unwrap().len(), 3 << 20);

    // Zeros are what a power cut leaves.
    let mut zeros = b"whole\n".to_vec();
    zeros.resize(3 << 20, 0);
    fs::write(bench.path(), zeros).unwrap();
    bench.sink().idle().unwrap();
    assert_eq!(bench.text(), "whole\n");

    fs::remove_file(bench.path()).unwrap();
    fs::create_dir(bench.path()).unwrap();
    assert!(matches!(bench.sink().idle(), Err(SinkError::Retry(_))));
}

#[test]
fn lines_written_while_the_file_is_removed_are_written_again_to_a_new_one() {
    let bench = Bench::new(|_| {});
    let mut sink = bench.sink();
    sink.deliver(&chunk(0, &[10]), 0).1.unwrap();
    fs::remove_file(bench.path()).unwrap();
    let lines = chunk(1, &[10, 10]);
    sink.deliver(&lines, 0).1.unwrap();
    assert_eq!(bench.text(), text(&lines));
    assert_eq!(bench.stats.reopened.get(), 1);
}

#[test]
fn a_file_that_was_moved_is_left_at_the_next_look_and_no_line_is_lost() {
    let bench = Bench::new(|_| {});
    let mut sink = bench.sink();
    let moved = bench.dir.path().join("moved");
    deliver(&mut sink, &chunk(0, &[10]));
    fs::rename(bench.path(), &moved).unwrap();
    deliver(&mut sink, &chunk(1, &[10]));
    sink.idle().unwrap();
    deliver(&mut sink, &chunk(2, &[10]));
    assert_eq!(fs::read_to_string(&moved).unwrap(), text(&chunk(0, &[10, 10])));
    assert_eq!(bench.text(), text(&chunk(2, &[10])));

    // The same by a look in the middle of work.
    fs::rename(bench.path(), &moved).unwrap();
    sink.checked -= CHECK_EVERY;
    deliver(&mut sink, &chunk(3, &[10]));
    assert_eq!(bench.text(), text(&chunk(3, &[10])));
}

#[test]
fn a_folder_that_is_gone_is_waited_for() {
    let bench = Bench::new(|config| {
        let dir = config.path.parent().unwrap().join("sub");
        config.path = dir.join("f.json");
    });
    let dir = bench.path().parent().unwrap();
    let mut sink = bench.sink();
    let lines = chunk(0, &[10]);
    let (done, error) = retry_of(sink.deliver(&lines, 0));
    assert!(done == 0 && error.contains("No such file"), "{error}");
    fs::create_dir(dir).unwrap();
    deliver(&mut sink, &lines);
    fs::remove_dir_all(dir).unwrap();
    assert_eq!(retry_of(sink.deliver(&lines, 0)).0, 0);
    assert!(sink.idle().is_err());
    fs::create_dir(dir).unwrap();
    deliver(&mut sink, &lines);
    assert_eq!(bench.text(), text(&lines));
}

#[test]
fn room_reserved_for_a_file_that_grows_fast_is_given_back_even_after_a_kill() {
    let bench = Bench::new(|_| {});
    let unused = || {
        let meta = fs::metadata(bench.path()).unwrap();
        (meta.blocks() * 512).saturating_sub(meta.len())
    };
    let lines = chunk(0, &[1000; 1049]);
    for end in ["close", "kill"] {
        let mut sink = bench.sink();
        for _ in 0..9 {
            deliver(&mut sink, &lines);
        }
        // Where the file system can't (ext4 and tmpfs can), nothing is reserved.
        let can = sink.open.as_ref().unwrap().reserved.is_some();
        assert_eq!(unused() > RESERVE / 2, can);
        if end == "close" {
            sink.close().unwrap();
        } else {
            drop(sink);
            bench.sink().idle().unwrap();
        }
        assert!(unused() < RESERVE / 16, "{end}: {}", unused());
    }
    assert!(bench.text() == text(&lines).repeat(18));
}

#[test]
fn a_file_that_another_writes_to_is_waited_for_and_neither_cuts_the_others_lines() {
    let dir = tempfile::tempdir().unwrap();
    let config = FileConfig {
        path: dir.path().join("f"),
        rotate_size: None,
        rotate_every: None,
        keep: None,
        compress: Compress::None,
    };
    let mut first = FileSink::new(config.clone(), Arc::default());
    let mut second = FileSink::new(config.clone(), Arc::default());
    deliver(&mut first, &chunk(0, &[10]));
    let (done, error) = retry_of(second.deliver(&chunk(1, &[10]), 0));
    assert!(done == 0 && error.contains("another sink or process writes to it"), "{error}");
    // Moved away by others, the path leads to another file, which is free.
    let moved = dir.path().join("f.1");
    fs::rename(&config.path, &moved).unwrap();
    deliver(&mut second, &chunk(1, &[10]));
    first.reopen();
    let (_, error) = retry_of(first.deliver(&chunk(2, &[10]), 0));
    assert!(error.contains("another"), "{error}");
    second.close().unwrap();
    deliver(&mut first, &chunk(2, &[10]));
    let texts = [chunk(0, &[10]), chunk(1, &[10]), chunk(2, &[10])].map(|it| text(&it).to_owned());
    assert_eq!(fs::read_to_string(&moved).unwrap(), texts[0]);
    assert_eq!(fs::read_to_string(&config.path).unwrap(), texts[1..].concat());
}

#[test]
fn reopen_follows_a_rename_at_once() {
    let bench = Bench::new(|_| {});
    let mut sink = bench.sink();
    deliver(&mut sink, &chunk(0, &[10]));
    fs::rename(bench.path(), bench.dir.path().join("moved")).unwrap();
    sink.reopen();
    sink.idle().unwrap();
    assert_eq!(bench.text(), "");
}

#[test]
fn a_file_cut_to_nothing_by_others_is_written_on_from_its_new_end() {
    let bench = Bench::new(|config| config.rotate_size = Some(50));
    let mut sink = bench.sink();
    deliver(&mut sink, &chunk(0, &[40]));
    File::options().write(true).open(bench.path()).unwrap().set_len(0).unwrap();
    sink.checked -= CHECK_EVERY;
    deliver(&mut sink, &chunk(1, &[40]));
    assert_eq!(bench.text(), text(&chunk(1, &[40])));
    assert_eq!(bench.rotated().len(), 0, "its size is known anew");
}

#[test]
fn rotation_by_size_comes_before_the_line_that_would_be_too_much() {
    let bench = Bench::new(|config| config.rotate_size = Some(25));
    let mut sink = bench.sink();
    let lines = chunk(0, &[10, 10, 10, 5, 10, 60, 10]);
    deliver(&mut sink, &lines);
    let sizes: Vec<_> =
        bench.rotated().iter().map(|path| fs::metadata(path).unwrap().len()).collect();
    assert_eq!(sizes, [20, 25, 60], "longer only where one line is");
    assert_eq!(bench.all_text(), text(&lines));
    assert_eq!(bench.stats.rotated.get(), 3);
}

#[test]
fn rotation_by_time_comes_at_the_full_multiple_with_or_without_records_and_for_an_old_file() {
    let bench = Bench::new(|config| config.rotate_every = Some(Duration::from_secs(3600)));
    // 15:40:55.
    let mut sink = bench.sink();
    deliver(&mut sink, &chunk(0, &[10]));
    bench.advance(19 * 60);
    deliver(&mut sink, &chunk(1, &[10]));
    assert_eq!(bench.rotated().len(), 0);
    bench.advance(10);
    sink.idle().unwrap();
    let rotated = bench.rotated();
    let name = rotated[0].file_name().unwrap().to_str().unwrap();
    assert_eq!(name, "f.json.20261122T160005.000000Z");
    assert_eq!(bench.text(), "");
    bench.advance(7200);
    deliver(&mut sink, &chunk(2, &[10]));
    assert_eq!(bench.rotated().len(), 1, "an empty file is not rotated");
    drop(sink);
    let file = File::options().append(true).open(bench.path()).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::from_secs(1_795_000_000)).unwrap();
    deliver(&mut bench.sink(), &chunk(3, &[10]));
    assert_eq!(bench.rotated().len(), 2, "the last run's file is of another hour");
    assert_eq!(bench.all_text(), text(&chunk(0, &[10; 4])));
}

#[test]
fn a_clock_that_jumps_either_way_rotates_once_and_retention_still_keeps_the_newest() {
    let bench = Bench::new(|config| {
        config.rotate_every = Some(Duration::from_secs(3600));
        config.keep = Some(2);
    });
    let mut sink = bench.sink();
    for (number, jump) in [0, 86_400, -86_400, 0, -864_000, 0, 3600].into_iter().enumerate() {
        bench.advance(jump);
        deliver(&mut sink, &chunk(number, &[10]));
    }
    assert_eq!(bench.stats.rotated.get(), 4);
    sink.close().unwrap();
    assert_eq!(bench.all_text(), text(&chunk(2, &[10; 5])), "the oldest two files are gone");
}

#[test]
fn a_rotation_that_fails_lets_the_file_grow() {
    let bench = Bench::new(|config| config.rotate_size = Some(25));
    let mut sink = bench.sink();
    deliver(&mut sink, &chunk(0, &[20]));
    let stamp = Stamp::of(bench.script.now());
    let mut taken = stamp;
    for _ in 0..100 {
        fs::create_dir(Archive::of(bench.path()).rotated(taken)).unwrap();
        taken = taken.next();
    }
    deliver(&mut sink, &chunk(1, &[20, 20]));
    assert_eq!(bench.text(), text(&chunk(0, &[20; 3])));
    assert_eq!((bench.stats.rotate_errors.get(), bench.stats.rotated.get()), (1, 0));
    bench.advance(1);
    sink.no_rotation_before = Some(Instant::now());
    deliver(&mut sink, &chunk(3, &[20]));
    assert_eq!(bench.text(), text(&chunk(3, &[20])));
}

#[test]
fn only_the_newest_rotated_files_are_kept_and_nothing_else_is_touched() {
    let bench = Bench::new(|config| {
        config.rotate_size = Some(10);
        config.keep = Some(3);
    });
    let foreign = bench.dir.path().join("f.json.1");
    fs::write(&foreign, "foreign").unwrap();
    let mut sink = bench.sink();
    deliver(&mut sink, &chunk(0, &[10; 9]));
    wait_until("five are removed", || bench.stats.removed.get() == 5);
    sink.close().unwrap();
    assert_eq!(bench.all_text(), text(&chunk(5, &[10; 4])));
    assert_eq!(fs::read(&foreign).unwrap(), b"foreign");
}

#[test]
fn gzip_and_zstd_hold_the_same_bytes_and_the_original_is_gone() {
    for (compress, ending) in [(Compress::Gzip, "gz"), (Compress::Zstd, "zst")] {
        let bench = Bench::new(|config| {
            config.rotate_size = Some(1000);
            config.compress = compress;
        });
        let mut sink = bench.sink();
        deliver(&mut sink, &chunk(0, &[300; 10]));
        wait_until("all are compressed", || bench.stats.compressed.get() == 3);
        sink.close().unwrap();
        assert_eq!(bench.all_text(), text(&chunk(0, &[300; 10])));
        assert_eq!(bench.rotated().len(), 3);
        for path in bench.rotated() {
            assert_eq!(path.extension().unwrap(), ending);
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o137, 0, "as closed as the log");
        }
    }
}

#[test]
fn what_a_crash_left_is_finished_at_the_next_start() {
    let bench = Bench::new(|config| {
        config.rotate_size = Some(1000);
        config.compress = Compress::Zstd;
    });
    let archive = Archive::of(bench.path());
    let stamp = Stamp::of(bench.script.now());
    let (first, second) = (archive.rotated(stamp), archive.rotated(stamp.next()));
    fs::write(&first, "0,\n").unwrap();
    fs::write(format!("{}.zst.tmp", first.display()), "half").unwrap();
    fs::write(&second, "1,\n").unwrap();
    fs::write(format!("{}.zst", second.display()), "killed just before the removal").unwrap();
    let mut sink = bench.sink();
    sink.idle().unwrap();
    wait_until("both are compressed", || bench.stats.compressed.get() == 2);
    sink.close().unwrap();
    assert_eq!(bench.all_text(), "0,\n1,\n");
    let names = fs::read_dir(bench.dir.path()).unwrap().count();
    assert_eq!(names, 3, "two compressed files and the current one");
}

#[test]
fn a_compression_that_fails_leaves_the_file_and_is_counted() {
    let bench = Bench::new(|config| {
        config.rotate_size = Some(10);
        config.compress = Compress::Gzip;
    });
    let mut sink = bench.sink();
    sink.idle().unwrap();
    // A folder in the place of the first rotated file's temporary copy, which can't be removed.
    let plain = Archive::of(bench.path()).rotated(Stamp::of(bench.script.now()));
    fs::create_dir(format!("{}.gz.tmp", plain.display())).unwrap();
    deliver(&mut sink, &chunk(0, &[10; 3]));
    wait_until("the other one is compressed", || bench.stats.compressed.get() == 1);
    assert!(bench.stats.archive_errors.get() > 0);
    sink.close().unwrap();
    assert_eq!(bench.all_text(), text(&chunk(0, &[10; 3])));
    assert!(plain.exists());
}

#[test]
fn closing_in_the_middle_of_a_long_compression_is_bounded_and_leaves_the_file() {
    let bench = Bench::new(|config| {
        config.rotate_size = Some(1 << 30);
        config.compress = Compress::Gzip;
    });
    // Zeros without blocks: 16 GiB take gzip far longer than the bound.
    let plain = Archive::of(bench.path()).rotated(Stamp::of(bench.script.now()));
    File::create(&plain).unwrap().set_len(16 << 30).unwrap();
    let mut sink = bench.sink();
    sink.idle().unwrap();
    wait_until("it is at work", || Archive::of(bench.path()).list().unwrap().unfinished.len() == 1);
    let started = Instant::now();
    sink.close().unwrap();
    assert!(started.elapsed() < compress::CLOSE_WAIT + Duration::from_secs(3));
    wait_until("its copy is gone", || {
        Archive::of(bench.path()).list().unwrap().unfinished.is_empty()
    });
    assert_eq!(bench.stats.compressed.get(), 0);
    assert_eq!(fs::metadata(&plain).unwrap().len(), 16 << 30);
}

#[derive(Clone, Debug)]
enum Op {
    Deliver(Vec<usize>),
    Reopen,
    Idle,
    Jump(i64),
    MoveAway,
    /// SIGKILL, in the middle of writing a line.
    Kill(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => proptest::collection::vec(1usize..400, 1..30).prop_map(Op::Deliver),
        1 => Just(Op::Reopen),
        1 => Just(Op::Idle),
        2 => (-30i64..60).prop_map(Op::Jump),
        1 => Just(Op::MoveAway),
        1 => (0usize..100).prop_map(Op::Kill),
    ];
    proptest::collection::vec(op, 1..25)
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let fault = prop_oneof![
        4 => Just(Fault::None),
        3 => (1usize..3000).prop_map(Fault::Short),
        2 => Just(Fault::Full),
        1 => Just(Fault::NoCut),
    ];
    proptest::collection::vec(fault, 0..60)
}

proptest! {
    /// Whatever writes do and whenever files turn over: put together, they are what was delivered.
    #[test]
    fn the_files_together_are_what_was_delivered(
        ops in ops(),
        faults in faults(),
        rotate_size in proptest::option::of(50u64..5000),
        rotate_every in proptest::option::of((5u64..60).prop_map(Duration::from_secs)),
    ) {
        let bench = Bench::new(|config| {
            config.rotate_size = rotate_size;
            config.rotate_every = rotate_every;
        });
        bench.fail(&faults);
        let mut sink = bench.sink();
        let (mut lines, mut expected, mut moved) = (0, String::new(), Vec::new());
        for op in ops {
            match op {
                Op::Deliver(lengths) => {
                    let chunk = chunk(lines, &lengths);
                    deliver(&mut sink, &chunk);
                    lines += chunk.len();
                    expected += text(&chunk);
                }
                Op::Reopen => sink.reopen(),
                Op::Idle => drop(sink.idle()),
                Op::Jump(seconds) => bench.advance(seconds),
                Op::MoveAway => {
                    let to = bench.dir.path().join(format!("moved{}", moved.len()));
                    if fs::rename(bench.path(), &to).is_ok() {
                        moved.push(to);
                    }
                }
                Op::Kill(torn) => {
                    sink = bench.sink();
                    if let Ok(mut file) = File::options().append(true).open(bench.path()) {
                        Write::write_all(&mut file, &vec![b't'; torn]).unwrap();
                    }
                    // Before anybody moves it on.
                    while sink.idle().is_err() {}
                }
            }
        }
        // A torn line that could not be cut off before.
        bench.script.faults.lock().unwrap().clear();
        sink.idle().unwrap();
        sink.close().unwrap();
        let mut files = bench.rotated();
        files.extend(moved);
        files.push(bench.path().to_owned());
        let mut texts: Vec<_> =
            files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
        texts.retain(|text| !text.is_empty());
        for text in &texts {
            prop_assert!(text.ends_with('\n'), "torn: {}", text);
            if let Some(max) = rotate_size {
                prop_assert!(text.len() as u64 <= max || text.lines().count() == 1);
            }
        }
        texts.sort_by_key(|text| text.split(',').next().unwrap().parse::<usize>().unwrap());
        prop_assert_eq!(texts.concat(), expected);
    }
}
