//! Raw batches to numbered records: decode, remember, select, append.
//!
//! Runs on a thread of its own and owns all its state. Every event that comes in is counted once:
//! as a record, as filtered, or inside a gap record. Never waits for anything but the queue (for
//! work) and the spool (for room).

mod memory;
mod select;
mod stats;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::capture::{Item, RawBatch, Receiver, ValveChange};
use crate::ctnetlink::{
    Attrs, Class, Event, Expect, Kind, Malformed, Message, SeqAdj, Synproxy, decode_conn,
    decode_expect, messages,
};
use crate::flow::{
    AgentAction, AgentNote, Body, Expectation, Flow, FlowEvent, FlowIds, Gap, GapCause, GapKinds,
    Precision, Rare, Record,
};
use crate::spool::{Spool, SpoolClosed};

use memory::{LiveFlows, RareMemory};
pub use select::Filter;
use stats::BatchTally;
pub use stats::{GapStats, PipelineStats};

/// How often an idle pipeline looks whether it should go on; the queue wakes it for work.
const IDLE: Duration = Duration::from_secs(60);

/// Everything that turns batches into records.
#[derive(Debug)]
pub struct Pipeline {
    receiver: Receiver,
    spool: Arc<Spool>,
    stats: Arc<PipelineStats>,
    decoder: Decoder,
}

impl Pipeline {
    pub fn new(
        receiver: Receiver,
        spool: Arc<Spool>,
        stats: Arc<PipelineStats>,
        decoder: Decoder,
    ) -> Self {
        Pipeline { receiver, spool, stats, decoder }
    }

    /// Works until the queue is closed and empty. An error means that the spool was closed first:
    /// the rest of the queue has no records.
    pub fn run(mut self) -> Result<(), SpoolClosed> {
        let mut records = Vec::new();
        loop {
            let item = match self.receiver.pop(IDLE) {
                Ok(Some(item)) => item,
                Ok(None) => continue,
                Err(_) => return Ok(()),
            };
            self.decoder.item(&item, &mut records);
            if let Item::Events(batch) | Item::Snapshot(batch) = item {
                self.receiver.recycle(batch);
            }
            self.stats.add(&mut self.decoder.tally);
            for gap in self.decoder.gaps.drain(..) {
                self.stats.gap(&gap);
            }
            let made = records.len() as u64;
            let appended = self.spool.append(&mut records, now());
            if appended.is_err() {
                self.stats.lost_at_stop.fetch_add(made, Relaxed);
            }
            appended?;
        }
    }
}

/// Nanoseconds since the epoch; 0 on a host whose clock stands before it.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// The part without threads: items to records.
#[derive(Debug)]
pub struct Decoder {
    ids: FlowIds,
    filter: Filter,
    /// The socket filter does all that the filter asks for.
    whole_in_kernel: bool,
    rare: RareMemory,
    /// Flows with a live event since the subscription, while the snapshot is under way.
    live: Option<LiveFlows>,
    tally: BatchTally,
    /// Gaps of the last item, to be counted.
    gaps: Vec<Gap>,
}

impl Decoder {
    /// `in_kernel` says that the socket filter does all of `filter`; `snapshot`, that the entries of a
    /// dump will come, and then an [`Item::SnapshotEnd`].
    pub fn new(ids: FlowIds, filter: Filter, in_kernel: bool, snapshot: bool) -> Self {
        Decoder {
            ids,
            filter,
            whole_in_kernel: in_kernel,
            rare: RareMemory::default(),
            live: snapshot.then(LiveFlows::default),
            tally: BatchTally::default(),
            gaps: Vec::new(),
        }
    }

    /// Appends the records that `item` makes.
    pub fn item(&mut self, item: &Item, records: &mut Vec<Record>) {
        match item {
            Item::Events(batch) => self.batch(batch, records),
            Item::Snapshot(batch) => self.batch(batch, records),
            Item::SnapshotEnd { complete, from, at } => {
                self.live = None;
                if !complete {
                    self.gap(snapshot_gap(*from, *at), records);
                }
            }
            Item::Gap(gap) => self.lost_in_kernel(*gap, records),
            Item::Valve(change) => self.valve(*change, records),
            Item::Note { action, at } => self.note(*action, *at, None, records),
            Item::Filter { filter, in_kernel } => {
                self.filter = (**filter).clone();
                self.whole_in_kernel = *in_kernel;
            }
        }
    }

    fn batch(&mut self, batch: &RawBatch, records: &mut Vec<Record>) {
        records.reserve(batch.datagrams.len());
        let mut refused = Refused::default();
        let mut event = Event::default();
        for datagram in batch.iter() {
            for message in messages(datagram) {
                match message {
                    Ok(message) => {
                        self.message(&message, &mut event, batch.arrived, records, &mut refused);
                    }
                    Err(malformed) => {
                        self.tally.codec.refuse(&malformed);
                        refused.rest_of_datagram(&malformed);
                    }
                }
            }
        }
        if let Some(gap) = refused.gap(batch.arrived) {
            self.gap(gap, records);
        }
    }

    #[inline]
    fn message<'a>(
        &mut self,
        message: &Message<'a>,
        event: &mut Event<'a>,
        arrived: u64,
        records: &mut Vec<Record>,
        refused: &mut Refused,
    ) {
        match message.class() {
            Class::Conn(kind) => match decode_conn(message, event, &mut self.tally.codec) {
                Ok(()) => self.flow(event, arrived, records),
                Err(malformed) => refused.event(kind_of_gap(kind), &malformed),
            },
            Class::Expect { destroyed } => match decode_expect(message, &mut self.tally.codec) {
                Ok(expect) => self.expectation(&expect, arrived, records),
                Err(malformed) => {
                    let kind =
                        if destroyed { GapKinds::EXPECT_DESTROY } else { GapKinds::EXPECT_NEW };
                    refused.event(kind, &malformed);
                }
            },
            Class::Done | Class::Noop => {}
            _ => self.tally.codec.unknown_messages += 1,
        }
    }

    #[inline]
    fn flow(&mut self, event: &Event<'_>, arrived: u64, records: &mut Vec<Record>) {
        let conn = &event.conn;
        self.tally.decoded[event.kind as usize] += 1;
        let flow_id = self.ids.of(conn);
        let overtaken = self.overtaken(event.kind, flow_id);
        // Remembered before it is selected: a flow may pass the filter only at its end.
        let rare = self.rare(event, flow_id);
        if !self.filter.passes(conn) {
            self.tally.filtered += 1;
            return;
        }
        let mut conn = *conn;
        let known = rare.as_ref().map_or(Attrs::empty(), |rare| rare.present);
        conn.present = (conn.present - RARE) | known;
        let flow = Flow {
            event: event_of(event.kind),
            overtaken,
            flow_id,
            conn,
            rare: rare.map(|remembered| remembered.rare),
        };
        records.push(Record { ts: timestamp(event, arrived), body: Body::Flow(flow) });
    }

    fn overtaken(&mut self, kind: Kind, flow_id: u64) -> bool {
        let Some(live) = &mut self.live else { return false };
        if kind == Kind::Entry {
            return live.has(flow_id);
        }
        live.insert(flow_id);
        false
    }

    /// What few flows have: from this event, or from an earlier one of the same flow, because
    /// DESTROY carries no helper, labels, secctx or master.
    #[inline]
    fn rare(&mut self, event: &Event<'_>, flow_id: u64) -> Option<memory::Remembered> {
        let said = rare_attributes(event);
        if said.is_empty() && self.rare.is_empty() {
            return None;
        }
        let fresh = (!said.is_empty()).then(|| remembered(event, said));
        if event.kind == Kind::Destroy {
            return self.rare.take(flow_id, fresh);
        }
        let known = self.rare.merge(flow_id, fresh);
        self.tally.forgotten += std::mem::take(&mut self.rare.forgotten);
        known
    }

    fn expectation(&mut self, expect: &Expect<'_>, arrived: u64, records: &mut Vec<Record>) {
        self.tally.expectations += 1;
        if !self.filter.passes_expectation(expect) {
            self.tally.filtered += 1;
            return;
        }
        let body = Body::Expectation(Box::new(Expectation {
            destroyed: expect.destroyed,
            present: expect.present,
            master: expect.master,
            tuple: expect.tuple,
            mask: expect.mask,
            nat_tuple: expect.nat_tuple,
            timeout: expect.timeout,
            id: expect.id,
            flags: expect.flags,
            class: expect.class,
            nat_dir: expect.nat_dir,
            zone: expect.zone,
            helper: text(expect.helper),
            function: text(expect.function),
        }));
        records.push(Record { ts: arrived, body });
    }

    /// The kernel counts what it drops, but not what we would have filtered of it.
    fn lost_in_kernel(&mut self, gap: Gap, records: &mut Vec<Record>) {
        let filters_here = !self.whole_in_kernel && self.filter != Filter::default();
        let whose = if filters_here { Precision::AtMost } else { Precision::Exact };
        self.gap(Gap { precision: gap.precision.and(whose), ..gap }, records);
    }

    fn gap(&mut self, gap: Gap, records: &mut Vec<Record>) {
        self.gaps.push(gap);
        records.push(Record { ts: gap.to, body: Body::Gap(gap) });
    }

    fn valve(&mut self, change: ValveChange, records: &mut Vec<Record>) {
        let action = if change.open { AgentAction::ValveOpened } else { AgentAction::ValveClosed };
        self.note(action, change.at, Some(change), records);
    }

    fn note(
        &mut self,
        action: AgentAction,
        at: u64,
        valve: Option<ValveChange>,
        records: &mut Vec<Record>,
    ) {
        self.tally.notes += 1;
        let version = env!("CARGO_PKG_VERSION");
        let body = Body::Agent(Box::new(AgentNote { action, version, valve }));
        records.push(Record { ts: at, body });
    }
}

/// What [`Rare`] holds. Synproxy, sequence adjustment and the like come with every event of a flow
/// that has them, but a DESTROY may leave them out as well.
const RARE: Attrs = Attrs::EXTRA.union(Attrs::HELPER).union(Attrs::SECCTX);

/// The rare attributes that say something. Flows that ctnetlink itself inserted carry both extensions
/// whether they are in use or not (`ctnetlink_create_conntrack`), and so all zeros: remembering those
/// took half of the pipeline's time in a storm of inserted flows.
fn rare_attributes(event: &Event<'_>) -> Attrs {
    let mut said = event.conn.present & RARE;
    let extra = &event.extra;
    if said.is_empty() {
        return said;
    }
    said.set(
        Attrs::SYNPROXY,
        said.contains(Attrs::SYNPROXY) && extra.synproxy != Synproxy::default(),
    );
    let adjusts = |attr, adjustment| said.contains(attr) && adjustment != SeqAdj::default();
    let orig = adjusts(Attrs::SEQ_ADJ_ORIG, extra.seq_adj_orig);
    let reply = adjusts(Attrs::SEQ_ADJ_REPLY, extra.seq_adj_reply);
    said.set(Attrs::SEQ_ADJ_ORIG, orig);
    said.set(Attrs::SEQ_ADJ_REPLY, reply);
    said
}

fn remembered(event: &Event<'_>, said: Attrs) -> memory::Remembered {
    memory::Remembered {
        present: said,
        rare: Box::new(Rare {
            extra: event.extra,
            helper: text(event.helper),
            secctx: text(event.secctx),
        }),
    }
}

fn text(bytes: &[u8]) -> Box<str> {
    String::from_utf8_lossy(bytes).into()
}

fn event_of(kind: Kind) -> FlowEvent {
    match kind {
        Kind::New => FlowEvent::New,
        Kind::Update => FlowEvent::Update,
        Kind::Destroy => FlowEvent::Destroy,
        Kind::Entry => FlowEvent::Snapshot,
    }
}

fn kind_of_gap(kind: Kind) -> GapKinds {
    match kind {
        Kind::New => GapKinds::NEW,
        Kind::Update => GapKinds::UPDATE,
        Kind::Destroy => GapKinds::DESTROY,
        Kind::Entry => GapKinds::SNAPSHOT,
    }
}

/// The kernel's time where it gives one. `CTA_TIMESTAMP_EVENT` came late (6.14); before, only a
/// DESTROY has one, its stop.
#[inline]
fn timestamp(event: &Event<'_>, arrived: u64) -> u64 {
    let conn = &event.conn;
    if conn.has(Attrs::EVENT_TIME) {
        return conn.event_time;
    }
    if event.kind == Kind::Destroy && conn.has(Attrs::STOP) {
        return conn.stop;
    }
    arrived
}

fn snapshot_gap(from: u64, to: u64) -> Gap {
    Gap {
        cause: GapCause::SnapshotIncomplete,
        events: None,
        precision: Precision::Unknown,
        kinds: GapKinds::SNAPSHOT,
        from,
        to,
        seqs: None,
    }
}

/// The messages of one batch that could not be understood.
#[derive(Debug, Default)]
struct Refused {
    events: u64,
    kinds: GapKinds,
    /// Whether nobody knows how many messages were behind the broken one.
    at_least: bool,
}

impl Refused {
    #[cold]
    fn event(&mut self, kind: GapKinds, malformed: &Malformed) {
        tracing::debug!(%malformed, "message refused");
        self.events += 1;
        self.kinds |= kind;
    }

    #[cold]
    fn rest_of_datagram(&mut self, malformed: &Malformed) {
        tracing::debug!(%malformed, "datagram refused");
        self.events += 1;
        self.kinds |= GapKinds::all();
        self.at_least = true;
    }

    fn gap(&self, at: u64) -> Option<Gap> {
        (self.events > 0).then_some(Gap {
            cause: GapCause::Malformed,
            events: Some(self.events),
            precision: if self.at_least { Precision::AtLeast } else { Precision::Exact },
            kinds: self.kinds,
            from: at,
            to: at,
            seqs: None,
        })
    }
}
