//! The decoder on messages made here: what becomes of each, and that none goes uncounted.

use proptest::prelude::*;

use super::*;
use crate::ctnetlink::request::{Header, Writer, message_type, write_tuple};
use crate::ctnetlink::uapi::conntrack::{cta, help, synproxy};
use crate::ctnetlink::{Tuple, TupleParts};
use crate::flow::FieldSet;

const NEW: u8 = 0;
const DELETE: u8 = 2;
const CREATE: u16 = 0x400;
const MULTI: u16 = 0x2;

fn tuple(port: u16) -> Tuple {
    let mut tuple = Tuple {
        parts: TupleParts::SRC
            | TupleParts::DST
            | TupleParts::PROTO
            | TupleParts::SRC_PORT
            | TupleParts::DST_PORT,
        proto: 17,
        src_port: port,
        dst_port: 53,
        ..Tuple::default()
    };
    tuple.src_bytes[..4].copy_from_slice(&[10, 0, 0, 1]);
    tuple.dst_bytes[..4].copy_from_slice(&[10, 0, 0, 2]);
    tuple
}

fn message(command: u8, flags: u16, port: u16, more: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.message(Header {
        message_type: message_type(1, command),
        flags,
        seq: 0,
        family: 2,
        res_id: 0,
    });
    write_tuple(&mut writer, cta::CTA_TUPLE_ORIG, &tuple(port));
    writer.be32(cta::CTA_ID, u32::from(port));
    more(&mut writer);
    writer.finish()
}

fn new(port: u16) -> Vec<u8> {
    message(NEW, CREATE, port, |_| {})
}

fn destroy(port: u16) -> Vec<u8> {
    message(DELETE, 0, port, |_| {})
}

fn entry(port: u16) -> Vec<u8> {
    message(NEW, MULTI, port, |_| {})
}

fn batch(datagrams: &[Vec<u8>]) -> RawBatch {
    let mut batch = RawBatch { arrived: 99, ..RawBatch::default() };
    datagrams.iter().for_each(|datagram| batch.push(datagram));
    batch
}

fn decoder(filter: Filter, snapshot: bool) -> Decoder {
    Decoder::new(FlowIds::new("boot", 1), filter, false, snapshot)
}

fn records(decoder: &mut Decoder, items: &[Item]) -> Vec<Record> {
    let mut records = Vec::new();
    items.iter().for_each(|item| decoder.item(item, &mut records));
    records
}

fn flow(record: &Record) -> &Flow {
    match &record.body {
        Body::Flow(flow) => flow,
        body => panic!("no flow: {body:?}"),
    }
}

fn gap(record: &Record) -> &Gap {
    match &record.body {
        Body::Gap(gap) => gap,
        body => panic!("no gap: {body:?}"),
    }
}

#[test]
fn new_and_destroy_of_a_flow_share_their_flow_id() {
    let mut decoder = decoder(Filter::default(), false);
    let records =
        records(&mut decoder, &[Item::Events(batch(&[new(1), new(2), destroy(1), destroy(2)]))]);
    let ids: Vec<_> = records.iter().map(|record| flow(record).flow_id).collect();
    assert_eq!((ids[0], ids[1]), (ids[2], ids[3]));
    assert_ne!(ids[0], ids[1]);
    assert_eq!(flow(&records[0]).event, FlowEvent::New);
    assert_eq!(flow(&records[3]).event, FlowEvent::Destroy);
}

#[test]
fn a_destroy_carries_the_helper_that_only_the_new_had() {
    let with_helper = message(NEW, CREATE, 1, |writer| {
        writer.nest(cta::CTA_HELP, |nest| {
            nest.text(help::CTA_HELP_NAME, b"ftp");
        });
    });
    let mut decoder = decoder(Filter::default(), false);
    let events = batch(&[with_helper, new(2), destroy(2), destroy(1)]);
    let records = records(&mut decoder, &[Item::Events(events)]);
    assert!(flow(&records[2]).rare.is_none());
    let rare = flow(&records[3]).rare.as_ref().unwrap();
    assert_eq!(&*rare.helper, "ftp");
    assert!(flow(&records[3]).conn.has(Attrs::HELPER));
}

#[test]
fn a_synproxy_extension_that_is_not_in_use_is_not_told() {
    let inserted = message(NEW, CREATE, 1, |writer| {
        writer.nest(cta::CTA_SYNPROXY, |nest| {
            for attribute in [synproxy::CTA_SYNPROXY_ISN, synproxy::CTA_SYNPROXY_ITS] {
                nest.be32(attribute, 0);
            }
            nest.be32(synproxy::CTA_SYNPROXY_TSOFF, 0);
        });
    });
    let mut decoder = decoder(Filter::default(), false);
    let records = records(&mut decoder, &[Item::Events(batch(&[inserted]))]);
    assert!(flow(&records[0]).rare.is_none());
    assert!(!flow(&records[0]).conn.has(Attrs::SYNPROXY));
    assert!(decoder.rare.is_empty());
}

#[test]
fn a_snapshot_entry_that_a_live_event_came_before_is_marked_overtaken() {
    let mut decoder = decoder(Filter::default(), true);
    let items = [
        Item::Events(batch(&[destroy(1)])),
        Item::Snapshot(batch(&[entry(1), entry(2)])),
        Item::SnapshotEnd { complete: true, from: 1, at: 2 },
    ];
    let records = records(&mut decoder, &items);
    let overtaken: Vec<_> = records.iter().map(|record| flow(record).overtaken).collect();
    assert_eq!(overtaken, [false, true, false]);
    assert_eq!(flow(&records[1]).event, FlowEvent::Snapshot);
}

#[test]
fn an_incomplete_snapshot_leaves_a_gap_record_of_its_time() {
    let mut decoder = decoder(Filter::default(), true);
    let records = records(&mut decoder, &[Item::SnapshotEnd { complete: false, from: 1, at: 2 }]);
    let gap = gap(&records[0]);
    assert_eq!((gap.cause, gap.from, gap.to), (GapCause::SnapshotIncomplete, 1, 2));
    assert_eq!((gap.events, gap.precision), (None, Precision::Unknown));
}

#[test]
fn a_message_that_is_refused_is_in_a_gap_record_behind_its_batch() {
    // A CTA_ID of two bytes.
    let broken = message(DELETE, 0, 1, |writer| {
        writer.bytes(cta::CTA_ID, &[0, 1]);
    });
    let mut decoder = decoder(Filter::default(), false);
    let events = batch(&[new(1), broken.clone(), broken, destroy(2)]);
    let records = records(&mut decoder, &[Item::Events(events)]);
    assert_eq!(records.len(), 3);
    let gap = gap(&records[2]);
    assert_eq!((gap.cause, gap.events), (GapCause::Malformed, Some(2)));
    assert_eq!((gap.precision, gap.kinds), (Precision::Exact, GapKinds::DESTROY));
}

#[test]
fn a_datagram_that_cannot_be_walked_is_at_least_one_event() {
    let mut cut = new(1);
    cut.truncate(cut.len() - 4);
    let mut decoder = decoder(Filter::default(), false);
    let records = records(&mut decoder, &[Item::Events(batch(&[cut, new(2)]))]);
    assert_eq!(flow(&records[0]).conn.id, 2);
    let gap = gap(&records[1]);
    assert_eq!((gap.events, gap.precision), (Some(1), Precision::AtLeast));
}

#[test]
fn a_filter_in_the_queue_is_in_force_from_its_place_on() {
    let mut decoder = decoder(Filter::default(), false);
    let tcp_only = Arc::new(Filter { protocols: vec![6], ..Filter::default() });
    let items = [
        Item::Events(batch(&[new(1)])),
        Item::Filter { filter: tcp_only, in_kernel: false },
        Item::Note { action: AgentAction::Reloaded, at: 5 },
        Item::Events(batch(&[new(2)])),
    ];
    let records = records(&mut decoder, &items);
    let events: Vec<_> = records.iter().map(Record::event_name).collect();
    assert_eq!(events, ["new", "agent"]);
    assert_eq!(decoder.tally.filtered, 1);
}

#[test]
fn a_count_of_the_kernels_is_a_bound_where_we_filter_more_than_it() {
    let lost = Gap {
        cause: GapCause::Overrun,
        events: Some(9),
        precision: Precision::Exact,
        kinds: GapKinds::NEW,
        from: 1,
        to: 2,
        seqs: None,
    };
    let precision = |filter: Filter, in_kernel| {
        let mut decoder = Decoder::new(FlowIds::new("boot", 1), filter, in_kernel, false);
        gap(&records(&mut decoder, &[Item::Gap(lost)])[0]).precision
    };
    let tcp = || Filter { protocols: vec![6], ..Filter::default() };
    assert_eq!(precision(Filter::default(), false), Precision::Exact);
    assert_eq!(precision(tcp(), true), Precision::Exact);
    assert_eq!(precision(tcp(), false), Precision::AtMost);
}

#[test]
fn the_kernels_time_comes_before_the_time_of_arrival() {
    let timed = |kind| {
        let conn = crate::ctnetlink::Conn { stop: 7, event_time: 8, ..Default::default() };
        Event { kind, conn, ..Event::default() }
    };
    let mut event = timed(Kind::Destroy);
    assert_eq!(timestamp(&event, 99), 99);
    event.conn.present = Attrs::STOP;
    assert_eq!(timestamp(&event, 99), 7);
    event.conn.present |= Attrs::EVENT_TIME;
    assert_eq!(timestamp(&event, 99), 8);
    let mut event = timed(Kind::New);
    event.conn.present = Attrs::STOP;
    assert_eq!(timestamp(&event, 99), 99);
}

proptest! {
    /// Whatever comes in: each datagram ends as records, as filtered, as part of a gap or as a
    /// counted unknown, and the public counters say as many records as there are.
    #[test]
    fn nothing_that_comes_in_goes_uncounted(
        datagrams in proptest::collection::vec((any::<u8>(), any::<u16>(), any::<(u16, u8)>(), any::<bool>()), 0..40),
        only_tcp: bool,
    ) {
        let mut made = Vec::new();
        for (kind, port, (at, bits), broken) in datagrams {
            let mut datagram = [new, destroy, entry][usize::from(kind % 3)](port);
            if broken {
                let at = usize::from(at) % datagram.len();
                datagram[at] ^= bits;
            }
            made.push(datagram);
        }
        let protocols = if only_tcp { vec![6] } else { vec![] };
        let mut decoder = decoder(Filter { protocols, ..Filter::default() }, false);
        let mut out = Vec::new();
        decoder.item(&Item::Events(batch(&made)), &mut out);

        let stats = PipelineStats::default();
        let unknown = decoder.tally.codec.unknown_messages;
        let refused = decoder.tally.codec.refused_total();
        let decoded = decoder.tally.decoded.iter().sum::<u64>() + decoder.tally.expectations;
        stats.add(&mut decoder.tally);
        decoder.gaps.drain(..).for_each(|gap| stats.gap(&gap));
        prop_assert_eq!(stats.expected_records(), out.len() as u64);
        let told: u64 = out.iter().filter(|record| record.event_name() == "gap")
            .map(|record| gap(record).events.unwrap()).sum();
        prop_assert_eq!(told, refused);
        // A changed message type may make a datagram one of netlink's own, which carry no event.
        prop_assert!(decoded + refused + unknown <= made.len() as u64 + refused);
        for record in &out {
            let identity = crate::flow::testing::identity();
            let mut line = Vec::new();
            crate::format::FormatKind::Json.build(FieldSet::FULL).line(
                crate::flow::View { identity: &identity, seq: 1, record }, &mut line);
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&line).is_ok());
        }
    }
}
