use std::collections::VecDeque;

use super::*;
use crate::ctnetlink::Conn;
use crate::flow::{Body, Flow, FlowEvent, Record};
use crate::spool::{Spool, SpoolConfig, WhenFull};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the next deliveries do; after these, all goes.
#[derive(Debug)]
enum Step {
    /// Takes so many records, then fails.
    Retry(usize),
    Busy(usize),
    Fatal,
    Panic,
    /// Waits for a word of the test, then does the next step.
    Gate(mpsc::Receiver<()>),
}

#[derive(Debug, Default)]
struct Seen {
    lines: Vec<String>,
    deliveries: usize,
    reopened: usize,
    idled: usize,
    closed: usize,
}

#[derive(Debug, Default)]
struct Mock {
    steps: VecDeque<Step>,
    idle_fails: bool,
    seen: Arc<Mutex<Seen>>,
}

impl Sink for Mock {
    fn deliver(&mut self, chunk: &Chunk, from: usize) -> (usize, Result<(), SinkError>) {
        self.seen.lock().unwrap().deliveries += 1;
        let mut step = self.steps.pop_front();
        if let Some(Step::Gate(gate)) = &step {
            gate.recv_timeout(PATIENCE).unwrap();
            step = self.steps.pop_front();
        }
        let (to, result) = match step {
            Some(Step::Gate(_)) => panic!("one gate leads to another"),
            None => (chunk.len(), Ok(())),
            Some(Step::Retry(count)) => {
                ((from + count).min(chunk.len()), Err(SinkError::Retry("no luck".to_owned())))
            }
            Some(Step::Busy(count)) => ((from + count).min(chunk.len()), Err(SinkError::Busy)),
            Some(Step::Fatal) => (from, Err(SinkError::Fatal("gone".to_owned()))),
            Some(Step::Panic) => panic!("a bug"),
        };
        let text = std::str::from_utf8(chunk.lines(from..to)).unwrap();
        self.seen.lock().unwrap().lines.extend(text.lines().map(str::to_owned));
        (to, result)
    }

    fn reopen(&mut self) {
        self.seen.lock().unwrap().reopened += 1;
    }

    fn idle(&mut self) -> Result<(), SinkError> {
        self.seen.lock().unwrap().idled += 1;
        if self.idle_fails { Err(SinkError::Gone("reader gone".to_owned())) } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), SinkError> {
        self.seen.lock().unwrap().closed += 1;
        Ok(())
    }
}

#[derive(Debug)]
struct Plain(&'static str);

impl Format for Plain {
    fn line(&mut self, view: View<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{}{}\n", self.0, view.seq).as_bytes());
    }
}

fn records(count: usize) -> Vec<Record> {
    let flow = Flow {
        event: FlowEvent::New,
        overtaken: false,
        flow_id: 0,
        conn: Conn::default(),
        rare: None,
    };
    vec![Record { ts: 0, body: Body::Flow(flow) }; count]
}

fn numbers(range: std::ops::RangeInclusive<u64>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

fn parts(sink: Mock, before: &'static str) -> SinkParts {
    SinkParts {
        name: "s".to_owned(),
        sink: Box::new(sink),
        format: Box::new(Plain(before)),
        stats: Arc::default(),
    }
}

struct Bench {
    spool: Arc<Spool>,
    seen: Arc<Mutex<Seen>>,
    handle: SinkHandle,
    ended: mpsc::Receiver<Outcome>,
}

impl Bench {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self::with(Mock { steps: steps.into_iter().collect(), ..Mock::default() })
    }

    fn with(mock: Mock) -> Self {
        let config = SpoolConfig { max_size: 64 << 20, when_full: WhenFull::Block };
        let spool = Spool::new(config);
        let identity = Arc::new(Identity { agent: "a".into(), epoch: 1, netns: "self".into() });
        let seen = mock.seen.clone();
        let parts = parts(mock, "");
        let (end, ended) = mpsc::channel();
        let on_end = move |report: &SinkReport| end.send(report.outcome.clone()).unwrap();
        let handle = start(spool.cursor("s"), parts, identity, on_end).unwrap();
        Bench { spool, seen, handle, ended }
    }

    fn append(&self, count: usize) {
        self.spool.append(&mut records(count), 0).unwrap();
    }

    fn wait(&self, what: &str, holds: impl Fn(&Seen) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(&self.seen.lock().unwrap()) {
            assert!(Instant::now() < deadline, "never: {what}: {:?}", self.seen);
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn drain(self) -> SinkReport {
        self.spool.close(0);
        self.handle.stop(Instant::now() + PATIENCE);
        self.handle.join(PATIENCE)
    }

    fn lines(&self) -> Vec<String> {
        self.seen.lock().unwrap().lines.clone()
    }
}

#[test]
fn every_record_goes_out_once_in_order_through_errors_and_partial_deliveries() {
    let bench = Bench::new([Step::Retry(0), Step::Retry(3), Step::Busy(2), Step::Retry(0)]);
    let (seen, stats) = (bench.seen.clone(), bench.handle.stats().clone());
    for count in [1, 4, 7] {
        bench.append(count);
    }
    let report = bench.drain();
    assert_eq!(seen.lock().unwrap().lines, numbers(1..=12));
    assert_eq!(seen.lock().unwrap().closed, 1);
    let expected = SinkReport {
        id: 0,
        name: "s".to_owned(),
        outcome: Outcome::Drained,
        acked: 12,
        pending: 0,
        lapped: 0,
    };
    assert_eq!(report, expected);
    assert_eq!((stats.errors.get(), stats.busy.get()), (3, 1));
    assert_eq!(stats.bytes.get(), numbers(1..=12).concat().len() as u64 + 12);
}

#[test]
fn small_batches_that_are_ready_go_out_in_one_chunk() {
    let (open, gate) = mpsc::channel();
    let bench = Bench::new([Step::Gate(gate)]);
    bench.append(1);
    bench.wait("it is at the first", |seen| seen.deliveries == 1);
    for _ in 0..500 {
        bench.append(2);
    }
    open.send(()).unwrap();
    bench.wait("all", |seen| seen.lines.len() == 1001);
    assert_eq!(bench.seen.lock().unwrap().deliveries, 2);
    assert_eq!(bench.drain().acked, 1001);
}

#[test]
fn a_large_batch_goes_out_in_several_chunks() {
    #[derive(Debug)]
    struct Long;
    impl Format for Long {
        fn line(&mut self, _: View<'_>, out: &mut Vec<u8>) {
            out.resize(out.len() + 999, b'x');
            out.push(b'\n');
        }
    }
    let mut bench = Bench::new([]);
    let sink = Mock { seen: bench.seen.clone(), ..Mock::default() };
    bench.handle.replace(SinkParts { format: Box::new(Long), ..parts(sink, "") }).unwrap();
    bench.wait("the old sink is closed", |seen| seen.closed == 1);
    bench.append(1000);
    bench.wait("all", |seen| seen.lines.len() == 1000);
    assert_eq!(bench.seen.lock().unwrap().deliveries, 1_000_000usize.div_ceil(263_000));
    assert_eq!(bench.drain().acked, 1000);
}

#[test]
fn a_fatal_error_gives_the_place_up_and_says_so_at_once() {
    let bench = Bench::new([Step::Fatal]);
    bench.append(5);
    assert_eq!(bench.ended.recv_timeout(PATIENCE), Ok(Outcome::Fatal("gone".to_owned())));
    assert_eq!(bench.spool.pending(), [], "what only it waited for is free");
    assert_eq!(bench.spool.bytes(), 0);
    let report = bench.handle.join(PATIENCE);
    assert_eq!((report.acked, report.pending), (0, 5));
}

#[test]
fn a_reader_that_is_gone_is_noticed_without_a_record() {
    let bench = Bench::with(Mock { idle_fails: true, ..Mock::default() });
    assert_eq!(bench.ended.recv_timeout(PATIENCE), Ok(Outcome::Gone("reader gone".to_owned())));
}

#[test]
fn a_panic_in_a_sink_is_reported_as_its_end() {
    let bench = Bench::new([Step::Panic]);
    bench.append(1);
    let outcome = bench.ended.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(&outcome, Outcome::Fatal(why) if why.contains("panicked")), "{outcome:?}");
}

#[test]
fn the_deadline_ends_a_sink_that_fails_and_its_records_stay() {
    let bench = Bench::new((0..1000).map(|_| Step::Retry(0)));
    let spool = bench.spool.clone();
    bench.append(5);
    bench.wait("an attempt", |seen| seen.deliveries > 0);
    spool.close(0);
    let started = Instant::now();
    bench.handle.stop(started + Duration::from_millis(300));
    let report = bench.handle.join(PATIENCE);
    assert_eq!((report.outcome, report.acked, report.pending), (Outcome::Deadline, 0, 5));
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(spool.pending(), [("s".to_owned(), 5, 0)]);
}

#[test]
fn the_deadline_ends_an_idle_sink_whose_spool_is_still_open() {
    let bench = Bench::new([]);
    let started = Instant::now();
    bench.handle.stop(started + Duration::from_millis(100));
    assert_eq!(bench.handle.join(PATIENCE).outcome, Outcome::Drained);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_thread_that_hangs_is_left_behind_with_its_numbers() {
    let (_open, gate) = mpsc::channel();
    let bench = Bench::new([Step::Gate(gate)]);
    bench.append(5);
    bench.wait("it hangs", |seen| seen.deliveries == 1);
    bench.handle.stop(Instant::now());
    let report = bench.handle.join(Duration::from_millis(50));
    assert_eq!((report.outcome, report.acked, report.pending), (Outcome::Stuck, 0, 5));
}

#[test]
fn retiring_delivers_what_is_there_and_forgets_the_place() {
    let bench = Bench::new([]);
    bench.append(5);
    let (spool, seen) = (bench.spool.clone(), bench.seen.clone());
    bench.handle.retire(Instant::now() + PATIENCE);
    assert_eq!(bench.handle.join(PATIENCE).outcome, Outcome::Drained);
    assert_eq!(seen.lock().unwrap().lines, numbers(1..=5));
    assert_eq!(spool.pending(), []);
}

#[test]
fn reopen_reaches_a_sink_that_waits_and_one_that_backs_off() {
    let bench = Bench::new([Step::Retry(0), Step::Retry(0), Step::Retry(0), Step::Retry(0)]);
    bench.handle.reopen();
    bench.wait("reopened while idle", |seen| seen.reopened == 1);
    bench.append(1);
    bench.wait("the fourth failure", |seen| seen.deliveries == 4);
    let asked = Instant::now();
    bench.handle.reopen();
    bench.wait("delivered", |seen| seen.lines == ["1"]);
    assert!(asked.elapsed() < Duration::from_millis(500), "the fourth wait is 600 ms and more");
    assert_eq!(bench.handle.stats().reopened.get(), 2);
}

#[test]
fn replacing_goes_on_at_the_first_record_that_was_not_taken_in_the_new_format() {
    let mut bench = Bench::new([Step::Retry(2), Step::Retry(0), Step::Retry(0), Step::Retry(0)]);
    bench.append(5);
    bench.wait("two of five", |seen| seen.lines.len() == 2 && seen.deliveries > 1);
    let sink = Mock { seen: bench.seen.clone(), ..Mock::default() };
    let stats = bench.handle.stats().clone();
    bench.handle.replace(SinkParts { stats, ..parts(sink, "new ") }).unwrap();
    bench.wait("all", |seen| seen.lines.len() == 5);
    assert_eq!(bench.lines(), ["1", "2", "new 3", "new 4", "new 5"]);
    assert_eq!(bench.seen.lock().unwrap().closed, 1);
    assert_eq!(bench.drain().acked, 5);
}

#[test]
fn a_sink_in_the_middle_of_a_line_finishes_it_before_it_is_replaced() {
    let (open, gate) = mpsc::channel();
    let mut bench = Bench::new([Step::Busy(1), Step::Gate(gate), Step::Busy(0)]);
    bench.append(3);
    bench.wait("in the middle", |seen| seen.deliveries == 2);
    let sink = Mock { seen: bench.seen.clone(), ..Mock::default() };
    let stats = bench.handle.stats().clone();
    bench.handle.replace(SinkParts { stats, ..parts(sink, "new ") }).unwrap();
    open.send(()).unwrap();
    bench.append(1);
    bench.wait("all", |seen| seen.lines.len() == 4);
    let lines = bench.lines();
    assert_eq!(lines[..3], ["1", "2", "3"]);
    bench.wait("replaced", |seen| seen.closed == 1);
    assert_eq!(bench.drain().acked, 4);
}

#[test]
fn a_sink_with_nothing_to_do_looks_after_itself_about_once_a_second() {
    let bench = Bench::new([]);
    thread::sleep(Duration::from_millis(2500));
    let idled = bench.seen.lock().unwrap().idled;
    assert!((2..=4).contains(&idled), "{idled}");
}

#[test]
fn one_that_retires_is_kept_with_its_place_under_a_new_name() {
    let (open, gate) = mpsc::channel();
    let mut bench = Bench::new([Step::Gate(gate), Step::Retry(2)]);
    bench.append(5);
    bench.wait("it is at the first", |seen| seen.deliveries == 1);
    bench.handle.retire(Instant::now() + PATIENCE);
    let sink = Mock { seen: bench.seen.clone(), ..Mock::default() };
    bench.handle.replace(SinkParts { name: "t".to_owned(), ..parts(sink, "new ") }).unwrap();
    open.send(()).unwrap();
    bench.wait("all", |seen| seen.lines.len() == 5);
    bench.append(1);
    bench.wait("it goes on", |seen| seen.lines.len() == 6);
    assert_eq!(bench.lines(), ["1", "2", "new 3", "new 4", "new 5", "new 6"]);
    assert_eq!(bench.spool.pending(), [("t".to_owned(), 0, 0)]);
    assert_eq!(bench.handle.stats().records_acked.get(), 4, "each name counts its own");
    let report = bench.drain();
    assert_eq!((report.name.as_str(), report.outcome), ("t", Outcome::Drained));
}

#[test]
fn one_that_has_retired_gives_the_parts_back_and_another_of_its_name_is_not_disturbed() {
    let mut bench = Bench::new([]);
    bench.append(5);
    let mut other = bench.spool.cursor("s");
    bench.handle.retire(Instant::now() + PATIENCE);
    assert_eq!(bench.ended.recv_timeout(PATIENCE), Ok(Outcome::Drained));
    let refused = bench.handle.replace(parts(Mock::default(), "")).unwrap_err();
    assert_eq!(refused.name, "s");
    assert!(matches!(other.next(Duration::ZERO), Next::Batch(batch) if batch.base_seq == 1));
}

#[test]
fn only_a_delivery_answers_a_failed_delivery() {
    let bench = Bench::new([]);
    let sink = Mock { steps: [Step::Retry(0)].into(), ..Mock::default() };
    let mut driver = Driver {
        cursor: bench.spool.cursor("d"),
        parts: parts(sink, ""),
        identity: Arc::new(Identity { agent: "a".into(), epoch: 1, netns: "self".into() }),
        shared: Arc::default(),
        stop: None,
        batch: None,
        chunk: Chunk::default(),
        seqs: Vec::new(),
        done: 0,
        backoff: Backoff::new(1),
        complaint: Complaint::default(),
        delivery_failed: false,
    };
    bench.append(1);
    assert!(matches!(driver.gather(), Gathered::Chunk));
    // A command is there: the delivery fails once and comes back to obey, which looks after the
    // sink, with success.
    let mut commands = driver.shared.lock();
    (commands.reopen, commands.stop) = (true, Some((Until::End, Instant::now())));
    driver.shared.any.store(true, Ordering::Release);
    drop(commands);
    assert!(driver.deliver().is_ok());
    assert_eq!((driver.done, driver.parts.stats.reopened.get()), (0, 1));
    assert!(driver.complaint.is_open(), "nothing has been delivered yet");
    driver.stop = None;
    driver.shared.lock().stop = None;
    assert!(driver.deliver().is_ok());
    assert_eq!(driver.done, 1);
    assert!(!driver.complaint.is_open(), "and now it has");
}
