//! What one event costs in user space, on datagrams captured from a kernel.
//!
//! Each benchmark works through a thousand messages an iteration; divan's throughput column is
//! messages a second.

#[path = "../tests/integration/codec/corpus.rs"]
mod corpus;

use conntrail::capture::{Item, RawBatch};
use conntrail::ctnetlink::{Class, Event, Kind, Tally, decode_conn, messages};
use conntrail::flow::{Batch, FieldSet, FlowIds, Identity};
use conntrail::format::FormatKind;
use conntrail::pipeline::{Decoder, Filter};
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};

const MESSAGES: usize = 1000;

fn main() {
    divan::main();
}

/// The first message of this kind in a file of the corpus, many times over in one buffer, as capture
/// hands them on.
fn batch(file: &str, kind: Kind) -> (Vec<u8>, usize) {
    let datagrams = corpus::read(file);
    let one = datagrams
        .iter()
        .find(|datagram| {
            messages(datagram)
                .any(|message| message.is_ok_and(|message| message.class() == Class::Conn(kind)))
        })
        .expect("the file has a message of each kind");
    (one.repeat(MESSAGES), one.len())
}

const CASES: [(&str, Kind); 8] = [
    ("tcp_v4_snat", Kind::New),
    ("tcp_v4_snat", Kind::Update),
    ("tcp_v4_snat", Kind::Destroy),
    ("tcp_v6", Kind::New),
    ("tcp_v6", Kind::Update),
    ("tcp_v6", Kind::Destroy),
    ("udp_v4", Kind::New),
    ("udp_v4", Kind::Destroy),
];

#[divan::bench(args = CASES)]
fn decode(bencher: Bencher<'_, '_>, (file, kind): (&str, Kind)) {
    let (bytes, length) = batch(file, kind);
    bencher.counter(ItemsCount::new(MESSAGES)).bench_local(|| {
        let (mut event, mut tally) = (Event::default(), Tally::default());
        for datagram in black_box(&bytes).chunks_exact(length) {
            for message in messages(datagram) {
                let message = message.expect("the corpus is well formed");
                decode_conn(&message, &mut event, &mut tally).expect("the corpus is well formed");
                black_box(&event);
            }
        }
        tally
    });
}

fn raw_batch(file: &str, kind: Kind) -> RawBatch {
    let (bytes, length) = batch(file, kind);
    let mut batch = RawBatch { arrived: 1_795_000_000_000_000_000, ..RawBatch::default() };
    for datagram in bytes.chunks_exact(length) {
        batch.push(datagram);
    }
    batch
}

fn decoder() -> Decoder {
    Decoder::new(
        FlowIds::new("9d0c5ff1-8f10-4a5b-9b2e-b1d8a3c7a5e1", 4_026_531_840),
        Filter::default(),
        false,
        false,
    )
}

/// Decoding and all that makes a record of it: flow_id, filter, memory.
#[divan::bench(args = CASES)]
fn record(bencher: Bencher<'_, '_>, (file, kind): (&str, Kind)) {
    let item = Item::Events(raw_batch(file, kind));
    let (mut decoder, mut records) = (decoder(), Vec::new());
    bencher.counter(ItemsCount::new(MESSAGES)).bench_local(|| {
        records.clear();
        decoder.item(black_box(&item), &mut records);
        records.len()
    });
}

fn formatted(bencher: Bencher<'_, '_>, (file, kind): (&str, Kind), format: FormatKind) {
    let mut records = Vec::new();
    decoder().item(&Item::Events(raw_batch(file, kind)), &mut records);
    let batch = Batch { base_seq: 1, records };
    let identity =
        Identity { agent: "gw1".into(), epoch: 1_795_000_000_000, netns: "4026531840".into() };
    let (mut format, mut out) = (format.build(FieldSet::FULL), Vec::new());
    bencher.counter(ItemsCount::new(MESSAGES)).bench_local(|| {
        out.clear();
        for view in black_box(&batch).views(&identity) {
            format.line(view, &mut out);
        }
        out.len()
    });
}

#[divan::bench(args = CASES)]
fn json(bencher: Bencher<'_, '_>, case: (&str, Kind)) {
    formatted(bencher, case, FormatKind::Json);
}

#[divan::bench(args = CASES)]
fn conntrack(bencher: Bencher<'_, '_>, case: (&str, Kind)) {
    formatted(bencher, case, FormatKind::Conntrack);
}
