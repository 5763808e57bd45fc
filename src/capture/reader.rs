//! One round of reading: both sockets, in the order that keeps a flow's events in order.
//!
//! Promises: what a round reads from the NEW socket is handed on before what it read from the
//! DESTROY socket, and everything that waited on the NEW socket when the reading of DESTROYs ended
//! is among it. So a flow's NEW and UPDATEs, which the kernel queued before its DESTROY, always come
//! first (two CPUs that confirm and delete one flow in the same instant may make the kernel queue its
//! DESTROY first; that cannot be seen from here). A round ends, however fast events come, and holds a bounded number of bytes back.
//!
//! Never decodes; never waits but for room in the queue.

use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::socket::{BATCH_BYTES, Fill, Memory, Socket};
use super::stats::{self, CaptureStats, SocketStats};
use super::{Closed, Item, RawBatch, Sender};
use crate::flow::{Gap, GapCause, GapKinds, Precision};

/// DESTROYs held back while the other socket is read: 2 MiB, 8,000 of them, more than a round of
/// 2 ms gives (500 at 250,000 a second), and little enough when a backlog is worked off.
const HELD_BATCHES: usize = 8;

/// The least that the kernel charges for a queued event (`skb->truesize`): sk_buff and the head
/// buffer with skb_shared_info in it, both in whole cache lines. On 64 bit that is at least 256 + 512
/// since kmalloc has no size between 384 and 512 for the head; since Linux 6.3 the head comes from
/// the 704-byte skbuff_small_head cache; 1,280 was measured. 512 leaves room for kernels with smaller
/// structures (32 bit), and being too low only makes a round longer, never the order wrong.
const LEAST_TRUESIZE: u32 = 512;

/// A queue of datagrams; the kernel's, or a made-up one in tests.
pub(super) trait Source {
    fn fill(&self, batch: &mut RawBatch, max: u64) -> io::Result<Fill>;
    fn memory(&self) -> io::Result<Memory>;
}

impl Source for Arc<Socket> {
    fn fill(&self, batch: &mut RawBatch, max: u64) -> io::Result<Fill> {
        Socket::fill(self, batch, max)
    }

    fn memory(&self) -> io::Result<Memory> {
        Socket::memory(self)
    }
}

/// Two moments around a reading of the drop counter. What it shows was dropped before `to`, what it
/// does not show yet after `from`: one moment for both would leave a drop outside its gap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Looked {
    pub(super) from: u64,
    pub(super) to: u64,
}

/// A socket's memory, and when it was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) memory: Memory,
    pub(super) at: Looked,
}

/// One socket and what is known of it.
#[derive(Debug)]
pub(super) struct Side<S> {
    source: S,
    kinds: GapKinds,
    /// Drops that are counted, and where gaps begin.
    drops: u32,
    checked: u64,
    truncated: u64,
    /// What is read from now on was queued after this; and the same for after this round.
    emptied: u64,
    emptied_now: Option<u64>,
}

impl<S: Source> Side<S> {
    pub(super) fn new(source: S, kinds: GapKinds) -> io::Result<Self> {
        let at = now();
        let drops = source.memory()?.drops;
        Ok(Side { source, kinds, drops, checked: at, truncated: 0, emptied: at, emptied_now: None })
    }

    fn look(&self) -> io::Result<Look> {
        let from = now();
        let memory = self.source.memory()?;
        Ok(Look { memory, at: Looked { from, to: now() } })
    }

    pub(super) fn drops(&self) -> u32 {
        self.drops
    }
}

/// Why a round could not be finished.
#[derive(Debug)]
pub(super) enum RoundError {
    /// Nobody takes the batches any more.
    Closed,
    Io(io::Error),
}

impl From<Closed> for RoundError {
    fn from(_: Closed) -> Self {
        RoundError::Closed
    }
}

impl From<io::Error> for RoundError {
    fn from(error: io::Error) -> Self {
        RoundError::Io(error)
    }
}

/// What a round gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Round {
    pub(super) datagrams: u64,
    /// A bound ended it, before a queue was found empty: begin the next one at once.
    pub(super) more: bool,
    /// The DESTROY socket's memory after reading. Its drops are for the caller to explain, because
    /// in reliable mode they are not losses.
    pub(super) destroys: Option<Look>,
}

#[derive(Debug)]
pub(super) struct Reader<S> {
    destroys: Option<Side<S>>,
    events: Option<Side<S>>,
    stats: Arc<CaptureStats>,
    held: Vec<RawBatch>,
    /// An empty buffer kept from the last time that nothing came.
    spare: Option<RawBatch>,
}

impl<S: Source> Reader<S> {
    pub(super) fn new(
        destroys: Option<Side<S>>,
        events: Option<Side<S>>,
        stats: Arc<CaptureStats>,
    ) -> Self {
        Reader { destroys, events, stats, held: Vec::with_capacity(HELD_BATCHES), spare: None }
    }

    /// Reads both sockets once and hands everything on, with what was lost behind it.
    pub(super) fn round(&mut self, out: &Sender) -> Result<Round, RoundError> {
        let mut round = Round::default();
        self.hold_destroys(out, &mut round)?;
        let newest = self.hand_on_events(out, &mut round)?;
        for mut batch in self.held.drain(..) {
            // Never before the events that it follows, also when someone sets the clock back.
            batch.arrived = now().max(newest);
            out.push(Item::Events(batch))?;
        }
        self.check_losses(out, &mut round)?;
        stats::add(&self.stats.rounds, 1);
        Ok(round)
    }

    /// To be called after a wait, before the next round: where nothing was dropped meanwhile, a
    /// gap begins now and not at the last round, which may lie days back. Gives the DESTROY socket.
    pub(super) fn woke(&mut self) -> io::Result<Option<Look>> {
        if let Some(side) = &mut self.events {
            side.woke()?;
        }
        self.destroys.as_mut().map(Side::woke).transpose()
    }

    /// What a round that failed has read and not handed on.
    pub(super) fn hand_on_held(&mut self, out: &Sender) -> Result<(), Closed> {
        for mut batch in self.held.drain(..) {
            batch.arrived = now();
            out.push(Item::Events(batch))?;
        }
        Ok(())
    }

    /// Counts the drops that no round has seen, when no gap can be told any more.
    pub(super) fn count_last_drops(&mut self) -> io::Result<()> {
        let sides =
            [(&mut self.destroys, &self.stats.destroys), (&mut self.events, &self.stats.events)];
        for (side, stats) in sides {
            if let Some(side) = side {
                side.count_drops(stats)?;
            }
        }
        Ok(())
    }

    /// What the sockets may hold, and since when nobody knows what was dropped.
    pub(super) fn unread(&self) -> (GapKinds, u64) {
        let sides = || [&self.destroys, &self.events].into_iter().flatten();
        let kinds = sides().fold(GapKinds::empty(), |kinds, side| kinds | side.kinds);
        let since = sides().map(|side| side.checked.min(side.emptied)).min();
        (kinds, since.unwrap_or_else(now))
    }

    fn hold_destroys(&mut self, out: &Sender, round: &mut Round) -> Result<(), RoundError> {
        let Some(side) = &mut self.destroys else { return Ok(()) };
        let began = now();
        while self.held.len() < HELD_BATCHES {
            let mut batch = take_buffer(&mut self.spare, out);
            let fill = side.source.fill(&mut batch, u64::MAX)?;
            side.was_read(fill, began);
            count(&self.stats.destroys, fill);
            round.datagrams += fill.datagrams;
            if fill.datagrams > 0 {
                self.held.push(fitting(batch, &mut self.spare));
            } else {
                self.spare = Some(batch);
            }
            if fill.empty {
                return Ok(());
            }
        }
        round.more = true;
        Ok(())
    }

    /// Gives the arrival time of the last batch handed on.
    fn hand_on_events(&mut self, out: &Sender, round: &mut Round) -> Result<u64, RoundError> {
        let Some(side) = &mut self.events else { return Ok(0) };
        // The order hangs on this: what is queued now was charged before it was queued
        // (netlink_broadcast_deliver), so there can't be more datagrams waiting than this. Reading
        // that many is enough, and is an end also when new ones come faster than we read.
        // At least one is tried for, because only that clears an error of the socket, for which
        // poll would wake us for ever.
        let mut left = u64::from(side.source.memory()?.queued.div_ceil(LEAST_TRUESIZE).max(1));
        let mut newest = 0;
        let began = now();
        while left > 0 {
            let mut batch = take_buffer(&mut self.spare, out);
            let fill = side.source.fill(&mut batch, left)?;
            side.was_read(fill, began);
            count(&self.stats.events, fill);
            round.datagrams += fill.datagrams;
            left -= (fill.datagrams + fill.truncated).min(left);
            if fill.datagrams > 0 {
                let mut batch = fitting(batch, &mut self.spare);
                // After reading: an event must not arrive before it happened.
                batch.arrived = now();
                newest = batch.arrived;
                out.push(Item::Events(batch))?;
            } else {
                self.spare = Some(batch);
            }
            if fill.empty {
                return Ok(newest);
            }
        }
        // Only when the bound ended it. Going on at once because something has come since makes
        // rounds of a few events each: 6,000 to 24,000 for a million events instead of 2,000, at no
        // gain that stood out of the noise (0.9 to 1.2 µs an event on a busy machine, both).
        round.more = true;
        Ok(newest)
    }

    fn check_losses(&mut self, out: &Sender, round: &mut Round) -> Result<(), RoundError> {
        if let Some(side) = &mut self.destroys {
            let (look, _) = side.check(&self.stats.destroys, out)?;
            round.destroys = Some(look);
            side.checked = look.at.from;
        }
        if let Some(side) = &mut self.events {
            let (look, dropped) = side.check(&self.stats.events, out)?;
            if dropped > 0 {
                let gap = side.gap(GapCause::Overrun, dropped, side.checked, look.at.to);
                out.push(Item::Gap(gap))?;
            }
            side.checked = look.at.from;
        }
        Ok(())
    }
}

impl<S: Source> Side<S> {
    fn was_read(&mut self, fill: Fill, began: u64) {
        self.truncated += fill.truncated;
        if fill.empty {
            self.emptied_now = Some(began);
        }
    }

    fn woke(&mut self) -> io::Result<Look> {
        let look = self.look()?;
        if look.memory.drops == self.drops {
            self.checked = look.at.from;
        }
        Ok(look)
    }

    fn count_drops(&mut self, stats: &SocketStats) -> io::Result<(Look, u64)> {
        let look = self.look()?;
        let dropped = u64::from(look.memory.drops.wrapping_sub(self.drops));
        self.drops = look.memory.drops;
        stats::add(&stats.drops, dropped);
        Ok((look, dropped))
    }

    fn check(&mut self, stats: &SocketStats, out: &Sender) -> Result<(Look, u64), RoundError> {
        let (look, dropped) = self.count_drops(stats)?;
        stats::set(&stats.queue_bytes, u64::from(look.memory.queued));
        stats::set(&stats.queue_limit, u64::from(look.memory.limit));
        if self.truncated > 0 {
            let truncated = std::mem::take(&mut self.truncated);
            stats::add(&stats.truncated, truncated);
            let gap = self.gap(GapCause::Truncated, truncated, self.emptied, look.at.to);
            out.push(Item::Gap(gap))?;
        }
        self.emptied = self.emptied_now.take().unwrap_or(self.emptied);
        Ok((look, dropped))
    }

    fn gap(&self, cause: GapCause, events: u64, from: u64, to: u64) -> Gap {
        Gap {
            cause,
            events: Some(events),
            precision: Precision::Exact,
            kinds: self.kinds,
            from,
            to,
            seqs: None,
        }
    }
}

fn count(stats: &SocketStats, fill: Fill) {
    stats::add(&stats.datagrams, fill.datagrams);
    stats::add(&stats.bytes, fill.bytes);
}

/// An empty buffer with room.
fn take_buffer(spare: &mut Option<RawBatch>, out: &Sender) -> RawBatch {
    let mut batch = spare.take().unwrap_or_else(|| out.spare());
    // Nothing when it was used before.
    batch.bytes.reserve_exact(BATCH_BYTES);
    batch
}

/// The batch as it is to be queued. One that is mostly empty is copied, and its buffer kept for the
/// next: with a flow every few milliseconds each batch holds one event, and a queue of whole buffers
/// grew to 9.5 GB.
fn fitting(mut batch: RawBatch, spare: &mut Option<RawBatch>) -> RawBatch {
    if batch.bytes.len() >= BATCH_BYTES / 4 {
        return batch;
    }
    // Cloning a Vec takes what its contents need and no more.
    let small = batch.clone();
    batch.clear();
    *spare = Some(batch);
    small
}

/// Nanoseconds since the epoch.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;
    use crate::capture::{Receiver, queue};

    const TRUESIZE: u32 = 768;

    /// A queue whose producer acts after each datagram that was read.
    #[derive(Clone, Default)]
    struct Fake(Rc<RefCell<State>>);

    #[derive(Default)]
    struct State {
        queued: VecDeque<Vec<u8>>,
        drops: u32,
        /// When the counter was last read, and a pause to be made then.
        looked: u64,
        slow: Duration,
        truncate_next: bool,
        after_read: Option<Box<dyn FnMut()>>,
    }

    impl Fake {
        fn put(&self, name: &str) {
            self.0.borrow_mut().queued.push_back(name.as_bytes().to_vec());
        }

        fn after_read(&self, act: impl FnMut() + 'static) {
            self.0.borrow_mut().after_read = Some(Box::new(act));
        }
    }

    impl Source for Fake {
        fn fill(&self, batch: &mut RawBatch, max: u64) -> io::Result<Fill> {
            let mut fill = Fill::default();
            while fill.datagrams + fill.truncated < max && batch.datagrams.len() < 100 {
                let Some(datagram) = self.0.borrow_mut().queued.pop_front() else {
                    fill.empty = true;
                    return Ok(fill);
                };
                if std::mem::take(&mut self.0.borrow_mut().truncate_next) {
                    fill.truncated += 1;
                } else {
                    batch.push(&datagram);
                    fill.datagrams += 1;
                }
                let act = self.0.borrow_mut().after_read.take();
                if let Some(mut act) = act {
                    act();
                    self.0.borrow_mut().after_read.get_or_insert(act);
                }
            }
            Ok(fill)
        }

        fn memory(&self) -> io::Result<Memory> {
            let mut state = self.0.borrow_mut();
            std::thread::sleep(state.slow);
            state.looked = now();
            Ok(Memory {
                queued: state.queued.len() as u32 * TRUESIZE,
                limit: 1 << 20,
                drops: state.drops,
            })
        }
    }

    fn reader(destroys: &Fake, events: &Fake) -> Reader<Fake> {
        Reader::new(
            Some(Side::new(destroys.clone(), GapKinds::DESTROY).unwrap()),
            Some(Side::new(events.clone(), GapKinds::NEW).unwrap()),
            Arc::default(),
        )
    }

    fn handed_on(rx: &Receiver) -> Vec<Item> {
        std::iter::from_fn(|| rx.pop(Duration::ZERO).unwrap()).collect()
    }

    fn names(items: &[Item]) -> Vec<String> {
        let mut names = Vec::new();
        for item in items {
            if let Item::Events(batch) = item {
                names.extend(batch.iter().map(|name| String::from_utf8(name.to_vec()).unwrap()));
            }
        }
        names
    }

    #[test]
    fn what_the_new_socket_gave_is_handed_on_before_the_destroys() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        destroys.put("destroy 1");
        events.put("new 1");
        let round = reader(&destroys, &events).round(&tx).unwrap();
        assert_eq!(round.datagrams, 2);
        assert!(!round.more);
        assert_eq!(names(&handed_on(&rx)), ["new 1", "destroy 1"]);
    }

    #[test]
    fn a_flow_that_comes_and_goes_while_destroys_are_read_is_not_turned_round() {
        // After each DESTROY that is read, another flow is born and ends.
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 30);
        events.put("new 0");
        destroys.put("destroy 0");
        let mut next = 0;
        let (d, e) = (destroys.clone(), events.clone());
        destroys.after_read(move || {
            next += 1;
            if next < 5000 {
                e.put(&format!("new {next}"));
                d.put(&format!("destroy {next}"));
            }
        });
        let mut reader = reader(&destroys, &events);
        let mut rounds = 1;
        while reader.round(&tx).unwrap().more {
            rounds += 1;
        }
        assert!(rounds > 1, "the bound of held batches was never reached");
        let names = names(&handed_on(&rx));
        assert_eq!(names.len(), 10_000);
        let mut born = std::collections::HashSet::new();
        for name in names {
            match name.split_once(' ').unwrap() {
                ("new", flow) => assert!(born.insert(flow.to_owned())),
                (_, flow) => assert!(born.contains(flow), "destroy {flow} before its new"),
            }
        }
    }

    #[test]
    fn a_round_ends_although_new_events_never_stop() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 30);
        destroys.put("destroy");
        for _ in 0..10 {
            events.put("old");
        }
        let e = events.clone();
        events.after_read(move || e.put("newer"));
        let round = reader(&destroys, &events).round(&tx).unwrap();
        assert!(round.more);
        let names = names(&handed_on(&rx));
        assert_eq!(names.iter().filter(|name| *name == "old").count(), 10);
        assert_eq!(names.last().unwrap(), "destroy");
        assert!(names.len() < 20, "{} read in one round", names.len());
    }

    #[test]
    fn drops_of_the_new_socket_become_an_exact_gap_behind_the_batches() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        // The counter wraps.
        events.0.borrow_mut().drops = u32::MAX - 1;
        let mut reader = reader(&destroys, &events);
        events.put("new");
        events.0.borrow_mut().drops = 3;
        reader.round(&tx).unwrap();
        let items = handed_on(&rx);
        assert!(matches!(items[0], Item::Events(_)));
        let Item::Gap(gap) = items[1] else { panic!("no gap: {items:?}") };
        assert_eq!(gap.cause, GapCause::Overrun);
        assert_eq!((gap.events, gap.precision), (Some(5), Precision::Exact));
        assert_eq!(gap.kinds, GapKinds::NEW);
        assert!(gap.from <= gap.to);
        reader.round(&tx).unwrap();
        assert!(handed_on(&rx).is_empty(), "the same loss was told twice");
    }

    #[test]
    fn a_gap_begins_when_an_idle_reader_woke_and_ends_after_the_drop() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        let mut reader = reader(&destroys, &events);
        reader.round(&tx).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let burst = now();
        reader.woke().unwrap();
        // Dropped at the last moment before the counter is read.
        events.0.borrow_mut().drops = 3;
        events.0.borrow_mut().slow = Duration::from_millis(5);
        reader.round(&tx).unwrap();
        let Item::Gap(gap) = handed_on(&rx)[0] else { panic!("no gap") };
        assert!(gap.from >= burst, "the idle time lies in the gap");
        assert!(gap.to >= events.0.borrow().looked, "the drop lies behind the gap");
    }

    #[test]
    fn what_was_dropped_before_an_idle_reader_woke_lies_in_the_gap() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        let mut reader = reader(&destroys, &events);
        reader.round(&tx).unwrap();
        let dropped = now();
        events.0.borrow_mut().drops = 3;
        std::thread::sleep(Duration::from_millis(2));
        reader.woke().unwrap();
        reader.round(&tx).unwrap();
        let Item::Gap(gap) = handed_on(&rx)[0] else { panic!("no gap") };
        assert!(gap.from <= dropped);
    }

    #[test]
    fn an_event_does_not_arrive_before_it_was_read() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        destroys.put("destroy");
        events.put("new");
        let read = Rc::new(RefCell::new(0));
        for fake in [&destroys, &events] {
            let read = read.clone();
            fake.after_read(move || {
                std::thread::sleep(Duration::from_millis(2));
                *read.borrow_mut() = now();
            });
        }
        reader(&destroys, &events).round(&tx).unwrap();
        let items = handed_on(&rx);
        assert_eq!(items.len(), 2);
        for item in items {
            let Item::Events(batch) = item else { panic!("{item:?}") };
            assert!(batch.arrived >= *read.borrow());
        }
    }

    #[test]
    fn a_queue_of_tiny_batches_takes_no_more_memory_than_its_bound() {
        const BOUND: usize = 1 << 20;
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(BOUND);
        let mut reader = reader(&destroys, &events);
        let mut rounds = 0;
        while tx.queue().bytes() + 4096 < BOUND {
            [&destroys, &events][rounds % 2].put(&"x".repeat(260));
            reader.round(&tx).unwrap();
            rounds += 1;
        }
        assert!(rounds > 1000, "only {rounds} tiny batches fit");
        assert!(rx.memory() <= BOUND, "{} bytes in use", rx.memory());
        let items = handed_on(&rx);
        assert_eq!(names(&items).len(), rounds);
    }

    #[test]
    fn drops_of_the_destroy_socket_are_left_to_the_caller() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        let mut reader = reader(&destroys, &events);
        destroys.0.borrow_mut().drops = 7;
        let round = reader.round(&tx).unwrap();
        assert_eq!(round.destroys.unwrap().memory.drops, 7);
        assert!(handed_on(&rx).is_empty());
    }

    #[test]
    fn a_datagram_that_was_too_long_is_a_gap() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        let mut reader = reader(&destroys, &events);
        destroys.put("long");
        destroys.0.borrow_mut().truncate_next = true;
        reader.round(&tx).unwrap();
        let items = handed_on(&rx);
        let Item::Gap(gap) = items[0] else { panic!("no gap: {items:?}") };
        assert_eq!((gap.cause, gap.events), (GapCause::Truncated, Some(1)));
        assert_eq!(gap.kinds, GapKinds::DESTROY);
    }

    #[test]
    fn destroys_do_not_arrive_before_the_events_that_they_follow() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        destroys.put("destroy");
        events.put("new");
        reader(&destroys, &events).round(&tx).unwrap();
        let arrivals: Vec<u64> = handed_on(&rx)
            .iter()
            .map(|item| match item {
                Item::Events(batch) => batch.arrived,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(arrivals[0] <= arrivals[1]);
    }

    #[test]
    fn a_receiver_that_is_gone_ends_the_round() {
        let (destroys, events) = (Fake::default(), Fake::default());
        let (tx, rx) = queue(1 << 20);
        drop(rx);
        events.put("new");
        let result = reader(&destroys, &events).round(&tx);
        assert!(matches!(result, Err(RoundError::Closed)));
    }
}
