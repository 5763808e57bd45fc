//! Any datagram through everything that decodes one: nothing may panic.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --bin seeds && cargo +nightly fuzz run decode`
//!
//! The first writes the captured datagrams of tests/golden to fuzz/corpus/decode as seeds.

#![no_main]

use conntrail::ctnetlink::{
    Attrs, Class, Event, Tally, decode_conn, decode_expect, decode_expect_stats, decode_stats,
    decode_stats_cpu, messages,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|datagram: &[u8]| {
    let (mut event, mut tally) = (Event::default(), Tally::default());
    for message in messages(datagram).flatten() {
        match message.class() {
            Class::Conn(_) => {
                if decode_conn(&message, &mut event, &mut tally).is_err() {
                    assert_eq!(event.conn.present, Attrs::empty());
                }
            }
            Class::Expect { .. } => drop(decode_expect(&message, &mut tally)),
            Class::StatsCpu => drop(decode_stats_cpu(&message, &mut tally)),
            Class::Stats => drop(decode_stats(&message, &mut tally)),
            Class::ExpectStatsCpu => drop(decode_expect_stats(&message, &mut tally)),
            Class::Done | Class::Error => drop(message.outcome()),
            Class::Noop | Class::Overrun | Class::Unknown => {}
        }
    }
});
