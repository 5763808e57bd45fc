//! What one event costs in user space, on datagrams captured from a kernel.
//!
//! Each benchmark works through a thousand messages an iteration; divan's throughput column is
//! messages a second.

#[path = "../tests/integration/codec/corpus.rs"]
mod corpus;

use conntrail::ctnetlink::{Class, Event, Kind, Tally, decode_conn, messages};
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

#[divan::bench(args = [
    ("tcp_v4_snat", Kind::New),
    ("tcp_v4_snat", Kind::Update),
    ("tcp_v4_snat", Kind::Destroy),
    ("tcp_v6", Kind::New),
    ("tcp_v6", Kind::Update),
    ("tcp_v6", Kind::Destroy),
    ("udp_v4", Kind::New),
    ("udp_v4", Kind::Destroy),
])]
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
