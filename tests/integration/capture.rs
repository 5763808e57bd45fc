//! Capture on real conntrack events.
#![allow(clippy::unwrap_used)] // Tests may, and so may what they share.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use conntrail::capture::{
    Capture, CaptureConfig, CaptureHandle, Events, Item, KernelFilter, Receiver, ValveConfig, queue,
};
use conntrail::flow::{Gap, GapCause, GapKinds, Precision};

use crate::lab::generator::{Flows, Generator};
use crate::lab::limit::HostLimit;
use crate::lab::need;
use crate::lab::netns::Netns;
use crate::lab::sys::{GROUP_DESTROY, NetlinkSocket};

const QUEUE: usize = 256 << 20;

/// False, with a word about it, where the tests can't run.
fn can_run(test: &str) -> bool {
    let problem = if !nix::unistd::geteuid().is_root() {
        "needs root"
    } else if !std::path::Path::new("/proc/sys/net/netfilter/nf_conntrack_max").exists() {
        "needs nf_conntrack"
    } else {
        return true;
    };
    need::skip(&format!("{test} {problem}"));
    false
}

fn config(events: Events, receive_buffer: usize) -> CaptureConfig {
    CaptureConfig {
        events,
        reliable: false,
        receive_buffer,
        filter: None,
        valve: ValveConfig::default(),
        guard_program: Some(PathBuf::from(env!("CARGO_BIN_EXE_conntrail"))),
    }
}

fn reliable(events: Events, receive_buffer: usize) -> CaptureConfig {
    CaptureConfig { reliable: true, ..config(events, receive_buffer) }
}

struct Live {
    netns: Netns,
    generator: Generator,
    handle: CaptureHandle,
    rx: Receiver,
}

impl Live {
    fn start(config: CaptureConfig, queue_bytes: usize) -> Self {
        let netns = Netns::new("capture").unwrap();
        netns.enable_tracking().unwrap();
        let generator = Generator::new(&netns).unwrap();
        let wants_guard = config.reliable;
        let (tx, rx) = queue(queue_bytes);
        let handle = netns.run(|| Capture::new(config).unwrap().start(tx).unwrap());
        let live = Live { netns, generator, handle, rx };
        if wants_guard {
            live.wait_until("reliable mode is on", || {
                live.handle.stats().reliable_active.load(Ordering::Relaxed)
            });
        }
        live
    }

    fn wait_until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < end, "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops capture and gives everything that it handed on.
    fn finish(self) -> Seen {
        self.handle.stop();
        let mut seen = Seen::default();
        while let Ok(item) = self.rx.pop(Duration::from_secs(20)) {
            let item = item.expect("capture ends");
            if let Some(batch) = seen.take(item) {
                self.rx.recycle(batch);
            }
        }
        self.handle.join().unwrap();
        seen
    }
}

/// What was handed on, told apart by the few bytes that the tests need.
#[derive(Default)]
struct Seen {
    /// Kind and flow of each event, in order.
    events: Vec<(Kind, u32)>,
    gaps: Vec<Gap>,
    valve: Vec<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    New,
    Update,
    Destroy,
}

impl Seen {
    fn take(&mut self, item: Item) -> Option<conntrail::capture::RawBatch> {
        match item {
            Item::Events(batch) => {
                self.events.extend(batch.iter().map(event));
                Some(batch)
            }
            Item::Gap(gap) => {
                self.gaps.push(gap);
                None
            }
            Item::Valve(change) => {
                self.valve.push(change.open);
                None
            }
            other => panic!("capture handed on {other:?}"),
        }
    }

    fn count(&self, kind: Kind) -> u64 {
        self.events.iter().filter(|(k, _)| *k == kind).count() as u64
    }

    fn lost(&self, kinds: GapKinds) -> u64 {
        self.gaps.iter().filter(|gap| gap.kinds == kinds).filter_map(|gap| gap.events).sum()
    }

    fn assert_no_destroy_before_its_new(&self) {
        let mut destroyed = HashSet::new();
        for (kind, flow) in &self.events {
            match kind {
                Kind::Destroy => assert!(destroyed.insert(flow), "{flow} ended twice"),
                _ => assert!(!destroyed.contains(flow), "{kind:?} of {flow} after its destroy"),
            }
        }
    }
}

/// The message's kind, and the flow's number, which the generator puts into the source address.
fn event(datagram: &[u8]) -> (Kind, u32) {
    const NLM_F_CREATE: u16 = 0x400;
    let u16_at = |at: usize| u16::from_ne_bytes([datagram[at], datagram[at + 1]]);
    let length = u32::from_ne_bytes(datagram[..4].try_into().unwrap());
    assert_eq!(length as usize, datagram.len(), "one whole message a datagram");
    let kind = match (u16_at(4), u16_at(6) & NLM_F_CREATE) {
        (0x100, NLM_F_CREATE) => Kind::New,
        (0x100, _) => Kind::Update,
        (0x102, _) => Kind::Destroy,
        (other, _) => panic!("message type {other:#x}"),
    };
    // Headers 20, CTA_TUPLE_ORIG 4, CTA_TUPLE_IP 4, CTA_IP_V4_SRC 4.
    let source: [u8; 4] = datagram[32..36].try_into().unwrap();
    (kind, u32::from_be_bytes(source) & 0x00ff_ffff)
}

#[test]
fn every_event_is_handed_on_and_new_comes_before_destroy() {
    if !can_run("every_event_is_handed_on_and_new_comes_before_destroy") {
        return;
    }
    const FLOWS: u32 = 60_000;
    const STEP: u32 = 500;
    let _limit = HostLimit::at_least(400_000).unwrap();
    let mut live = Live::start(reliable(Events::NEW | Events::DESTROY, 32 << 20), QUEUE);
    // Flows that live for a moment only: as many as possible end while their NEW is still queued.
    for from in (0..FLOWS).step_by(STEP as usize) {
        let flows = Flows::default();
        assert_eq!(live.generator.insert(&flows, from..from + STEP).unwrap().done, u64::from(STEP));
        live.generator.delete(&flows, from..from + STEP).unwrap();
    }
    let seen = live.finish();
    assert_eq!(seen.count(Kind::New), u64::from(FLOWS));
    assert_eq!(seen.count(Kind::Destroy), u64::from(FLOWS));
    assert_eq!(seen.gaps, []);
    seen.assert_no_destroy_before_its_new();
}

#[test]
fn with_a_tiny_buffer_what_is_received_and_what_is_said_to_be_lost_is_what_was_sent() {
    if !can_run("with_a_tiny_buffer") {
        return;
    }
    const FLOWS: u32 = 100_000;
    let _limit = HostLimit::at_least(400_000).unwrap();
    let mut live = Live::start(config(Events::NEW | Events::DESTROY, 16 << 10), QUEUE);
    // Idle first: that time must not lie in the gap, however soon the buffer is full.
    std::thread::sleep(Duration::from_millis(2500));
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let a_look_before = since_epoch - Duration::from_millis(1500);
    assert_eq!(live.generator.insert(&Flows::default(), 0..FLOWS).unwrap().done, u64::from(FLOWS));
    live.generator.flush().unwrap();
    let seen = live.finish();
    let (lost_new, lost_destroy) = (seen.lost(GapKinds::NEW), seen.lost(GapKinds::DESTROY));
    assert!(lost_new > 0 && lost_destroy > 0, "the buffer was never full");
    assert_eq!(seen.count(Kind::New) + lost_new, u64::from(FLOWS));
    assert_eq!(seen.count(Kind::Destroy) + lost_destroy, u64::from(FLOWS));
    for gap in &seen.gaps {
        assert_eq!((gap.cause, gap.precision), (GapCause::Overrun, Precision::Exact));
        assert!(gap.from <= gap.to);
        assert!(u128::from(gap.from) >= a_look_before.as_nanos(), "idle time lies in a gap");
    }
    seen.assert_no_destroy_before_its_new();
}

#[test]
fn a_reader_that_stalls_loses_no_destroy_in_reliable_mode() {
    if !can_run("a_reader_that_stalls_loses_no_destroy_in_reliable_mode") {
        return;
    }
    const FLOWS: u32 = 60_000;
    let _limit = HostLimit::at_least(400_000).unwrap();
    // A queue that is full at once: capture waits for us and reads no more.
    let mut live = Live::start(reliable(Events::DESTROY, 256 << 10), 64 << 10);
    live.generator.insert(&Flows::default(), 0..FLOWS).unwrap();
    live.generator.flush().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(live.netns.conntrack_count().unwrap() > u64::from(FLOWS) / 2, "nothing was retained");
    let stats = live.handle.stats();
    let seen = live.finish();
    assert_eq!(seen.gaps, []);
    assert_eq!(seen.count(Kind::Destroy), u64::from(FLOWS));
    assert_eq!(seen.events.iter().collect::<HashSet<_>>().len(), FLOWS as usize);
    assert!(stats.retries() > 0);
    assert_eq!(stats.destroys_lost.load(Ordering::Relaxed), 0);
}

#[test]
fn the_kernel_drops_what_the_filter_excludes_and_takes_another_filter() {
    if !can_run("the_kernel_drops_what_the_filter_excludes_and_takes_another_filter") {
        return;
    }
    let _limit = HostLimit::at_least(400_000).unwrap();
    let of_first_256 =
        KernelFilter { include: vec!["10.0.0.0/24".parse().unwrap()], ..KernelFilter::default() };
    let udp = KernelFilter { protocols: vec![17], ..KernelFilter::default() };
    let mut live = Live::start(
        CaptureConfig {
            filter: of_first_256.compile(),
            ..config(Events::NEW | Events::DESTROY, 8 << 20)
        },
        QUEUE,
    );
    live.generator.insert(&Flows::default(), 0..1000).unwrap();
    live.wait_until("256 datagrams", || {
        live.handle.stats().events.datagrams.load(Ordering::Relaxed) == 256
    });
    assert!(live.handle.set_filter(udp.compile().as_ref()).unwrap());
    let tcp = Flows { proto: 6, ..Flows::default() };
    live.generator.insert(&tcp, 1000..1100).unwrap();
    live.generator.insert(&Flows::default(), 2000..2010).unwrap();
    live.wait_until("10 more", || {
        live.handle.stats().events.datagrams.load(Ordering::Relaxed) == 266
    });
    assert!(!live.handle.set_filter(None).unwrap());
    live.generator.insert(&tcp, 3000..3005).unwrap();
    let seen = live.finish();
    let flows: Vec<u32> = seen.events.iter().map(|(_, flow)| *flow).collect();
    let wanted: Vec<u32> = (0..256).chain(2000..2010).chain(3000..3005).collect();
    assert_eq!(flows, wanted);
    assert_eq!(seen.gaps, []);
}

#[test]
fn only_the_wanted_groups_are_joined() {
    if !can_run("only_the_wanted_groups_are_joined") {
        return;
    }
    let _limit = HostLimit::at_least(400_000).unwrap();
    let mut kinds = HashMap::new();
    for events in [Events::NEW, Events::DESTROY] {
        let mut live = Live::start(config(events, 8 << 20), QUEUE);
        live.generator.insert(&Flows::default(), 0..100).unwrap();
        live.generator.flush().unwrap();
        let seen = live.finish();
        for (kind, _) in seen.events {
            *kinds.entry((events.bits(), kind)).or_insert(0) += 1;
        }
    }
    let wanted = HashMap::from([
        ((Events::NEW.bits(), Kind::New), 100),
        ((Events::DESTROY.bits(), Kind::Destroy), 100),
    ]);
    assert_eq!(kinds, wanted);
}

#[test]
fn stopping_ends_although_events_keep_coming() {
    if !can_run("stopping_ends_although_events_keep_coming") {
        return;
    }
    let _limit = HostLimit::at_least(400_000).unwrap();
    // So small that entries are retained all the time.
    let live = Live::start(reliable(Events::NEW | Events::DESTROY, 16 << 10), QUEUE);
    let mut generator = Generator::new(&live.netns).unwrap();
    let end = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Bounded also when the other side panics.
            for from in (0..2_000_000).step_by(1000).take_while(|_| !end.load(Ordering::Relaxed)) {
                generator.insert(&Flows::default(), from..from + 1000).unwrap();
                generator.delete(&Flows::default(), from..from + 1000).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(500));
        let stopped = Instant::now();
        let seen = live.finish();
        end.store(true, Ordering::Relaxed);
        // 4 s by design; on a busy machine what was read has to be taken as well.
        assert!(stopped.elapsed() < Duration::from_secs(15), "{:?}", stopped.elapsed());
        seen
    });
    assert!(seen.count(Kind::Destroy) > 0 && seen.lost(GapKinds::NEW) > 0);
    // What is retained when it has to end can't be counted, and is said once to be unknown; if the
    // kernel's list was empty for a moment, that was the end and nothing is unknown.
    let unknown: Vec<_> =
        seen.gaps.iter().filter(|gap| gap.precision == Precision::Unknown).collect();
    assert!(unknown.len() <= 1 && unknown.iter().all(|gap| gap.kinds == GapKinds::DESTROY));
}

/// Guards that run in this namespace.
fn guards(netns: &Netns) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt;
    let namespace = std::fs::metadata(format!("/run/netns/{}", netns.name())).unwrap().ino();
    let mut guards = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let Ok(pid) = entry.unwrap().file_name().to_string_lossy().parse::<i32>() else { continue };
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let inode = std::fs::metadata(format!("/proc/{pid}/ns/net")).map(|meta| meta.ino());
        if command.windows(11).any(|part| part == b"valve-guard") && inode.ok() == Some(namespace) {
            guards.push(pid);
        }
    }
    guards
}

#[test]
fn the_valve_opens_before_the_table_is_full_and_closes_again() {
    if !can_run("the_valve_opens_before_the_table_is_full_and_closes_again") {
        return;
    }
    const LIMIT: u32 = 40_000;
    const FLOWS: u32 = LIMIT * 95 / 100;
    const MORE: u32 = 10_000;
    let _limit = HostLimit::exactly(u64::from(LIMIT)).unwrap();
    let mut live = Live::start(reliable(Events::DESTROY, 64 << 10), 16 << 10);
    live.generator.insert(&Flows::default(), 0..FLOWS).unwrap();
    // Nobody reads: the entries stay in the table, until the valve opens.
    live.generator.flush().unwrap();
    live.wait_until("the table is free again", || live.netns.conntrack_count().unwrap() < 1000);
    let report = live.generator.insert(&Flows::default(), FLOWS..FLOWS + MORE).unwrap();
    assert_eq!((report.done, report.refused.len()), (u64::from(MORE), 0));
    // Reading goes on: there is room again, and the valve closes.
    let mut seen = Seen::default();
    let stats = live.handle.stats();
    live.wait_until("the valve is closed", || {
        while let Some(item) = live.rx.pop(Duration::from_millis(1)).unwrap() {
            seen.take(item);
        }
        seen.valve.last() == Some(&false)
    });
    assert!(stats.reliable_active.load(Ordering::Relaxed));
    assert_eq!(stats.valve_opens.load(Ordering::Relaxed), 1);
    live.generator.flush().unwrap();
    let rest = live.finish();
    assert_eq!(seen.valve, [true, false]);
    assert!(rest.valve.is_empty());
    assert_eq!(rest.gaps, []);
    let received = seen.count(Kind::Destroy) + rest.count(Kind::Destroy);
    let lost = seen.lost(GapKinds::DESTROY);
    let sent = u64::from(FLOWS + MORE);
    assert!(lost > 0 && seen.gaps.iter().all(|gap| gap.cause == GapCause::Valve));
    if seen.gaps.iter().all(|gap| gap.precision == Precision::Exact) {
        assert_eq!(received + lost, sent);
    } else {
        // Drops while it was switched: a few, at most one look's worth.
        assert!((sent..sent + 1000).contains(&(received + lost)), "{received} + {lost}");
    }
}

#[test]
fn a_guard_that_is_killed_is_recorded_and_replaced() {
    if !can_run("a_guard_that_is_killed_is_recorded_and_replaced") {
        return;
    }
    let _limit = HostLimit::at_least(400_000).unwrap();
    let live = Live::start(reliable(Events::DESTROY, 8 << 20), QUEUE);
    let first = guards(&live.netns);
    assert_eq!(first.len(), 1);
    kill(first[0]);
    let stats = live.handle.stats();
    live.wait_until("another guard is at work", || {
        stats.guard_starts.load(Ordering::Relaxed) == 2
            && stats.reliable_active.load(Ordering::Relaxed)
    });
    let second = guards(&live.netns);
    assert!(second.len() == 1 && second != first, "{first:?} {second:?}");
    let seen = live.finish();
    assert_eq!(seen.valve, [true, false]);
    assert_eq!(seen.gaps, []);
    assert!(!std::path::Path::new(&format!("/proc/{}", second[0])).exists());
}

fn kill(pid: i32) {
    use nix::sys::signal::{Signal, kill};
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// What the valve and the end of capture are built on.
#[test]
fn the_kernel_retries_after_a_second_and_then_every_ten_milliseconds_one_entry_at_a_time() {
    if !can_run("the_kernel_retries") {
        return;
    }
    const FLOWS: u32 = 5000;
    let _limit = HostLimit::at_least(400_000).unwrap();
    let netns = Netns::new("retries").unwrap();
    netns.enable_tracking().unwrap();
    let listener = netns.run(|| NetlinkSocket::listen(&[GROUP_DESTROY], 32 << 10)).unwrap();
    listener.set_netlink(libc::NETLINK_NO_ENOBUFS, 1).unwrap();
    listener.set_netlink(libc::NETLINK_BROADCAST_ERROR, 1).unwrap();
    let mut generator = Generator::new(&netns).unwrap();
    generator.insert(&Flows::default(), 0..FLOWS).unwrap();
    generator.flush().unwrap();
    let flushed = Instant::now();
    let first = listener.drops().unwrap();
    while listener.drops().unwrap() == first {
        assert!(flushed.elapsed() < Duration::from_secs(5), "never retried");
        std::thread::sleep(Duration::from_millis(1));
    }
    let began = flushed.elapsed();
    assert!((500..1500).contains(&began.as_millis()), "first retry after {began:?}");
    let (before, start) = (listener.drops().unwrap(), Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    let tries = f64::from(listener.drops().unwrap() - before);
    let pause = start.elapsed().as_secs_f64() / tries;
    // A jiffy more or less; each try stops at its first failure, so it counts one.
    assert!((0.008..0.025).contains(&pause), "a try each {pause} s");
    let waiting = netns.conntrack_count().unwrap();
    assert!(waiting > u64::from(FLOWS) * 9 / 10);
    let before = listener.drops().unwrap();
    listener.set_netlink(libc::NETLINK_BROADCAST_ERROR, 0).unwrap();
    let released = Instant::now();
    while netns.conntrack_count().unwrap() > 0 {
        assert!(released.elapsed() < Duration::from_secs(1), "not freed");
    }
    let counted = u64::from(listener.drops().unwrap() - before);
    // One try may have been made before the release.
    assert!((waiting..=waiting + 1).contains(&counted), "{counted} of {waiting} counted");
    eprintln!("first retry {began:?}, then each {pause:.4} s, freed in {:?}", released.elapsed());
}

/// A guard of its own, and the two ends that its agent would have.
struct LoneGuard {
    child: Child,
    reports: ChildStdout,
}

impl LoneGuard {
    fn start(netns: &Netns, stdout: Stdio) -> (Child, NetlinkSocket) {
        let socket = netns.run(|| NetlinkSocket::listen(&[GROUP_DESTROY], 64 << 10)).unwrap();
        socket.set_netlink(libc::NETLINK_NO_ENOBUFS, 1).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_conntrail"));
        command
            .args(["valve-guard", "90", "70", "1000", "0"])
            .stdin(socket.as_fd().try_clone_to_owned().unwrap())
            .stdout(stdout)
            .process_group(0);
        (netns.spawn(&mut command).unwrap(), socket)
    }

    fn new(netns: &Netns) -> (Self, NetlinkSocket) {
        let (mut child, socket) = Self::start(netns, Stdio::piped());
        let reports = child.stdout.take().unwrap();
        (LoneGuard { child, reports }, socket)
    }

    fn report(&mut self) -> u32 {
        let mut report = [0; 48];
        self.reports.read_exact(&mut report).unwrap();
        u32::from_ne_bytes(report[..4].try_into().unwrap())
    }
}

fn wait_for_exit(child: &mut Child) -> std::process::ExitStatus {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the guard does not exit");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_guard_outlives_stop_signals_and_goes_with_its_agent() {
    if !can_run("the_guard_outlives_stop_signals_and_goes_with_its_agent") {
        return;
    }
    use nix::sys::signal::{Signal, kill};
    let netns = Netns::new("guard").unwrap();
    let (mut guard, _socket) = LoneGuard::new(&netns);
    assert_eq!(guard.report(), 1, "armed");
    let pid = nix::unistd::Pid::from_raw(guard.child.id() as i32);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(pid, signal).unwrap();
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(guard.child.try_wait().unwrap().is_none(), "a signal ended it");
    let started = Instant::now();
    drop(guard.reports);
    assert!(wait_for_exit(&mut guard.child).success());
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn a_guard_that_cannot_report_leaves_reliable_mode_off() {
    if !can_run("a_guard_that_cannot_report_leaves_reliable_mode_off") {
        return;
    }
    let netns = Netns::new("guard").unwrap();
    let (_reader, mut writer) = std::io::pipe().unwrap();
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    let (mut child, socket) = LoneGuard::start(&netns, Stdio::from(writer));
    assert_eq!(wait_for_exit(&mut child).code(), Some(libc::EWOULDBLOCK));
    assert!(!is_reliable(&socket));
}

#[allow(unsafe_code)] // getsockopt: std has none.
fn is_reliable(socket: &NetlinkSocket) -> bool {
    let (mut value, mut len) = (7i32, 4u32);
    // SAFETY: at most `len` bytes are written into `value`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_BROADCAST_ERROR,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    assert_eq!(done, 0);
    value != 0
}
