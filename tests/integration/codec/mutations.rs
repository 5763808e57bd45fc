//! Mutated messages, many of them, without a fuzzer: nothing may panic, and nothing may be left in
//! an event of a refused message.
//!
//! A short run is part of the tests. The long one, once and in release mode:
//!
//! `CONNTRAIL_MUTATIONS=100000000 cargo test --release --test integration codec::mutations -- --nocapture`

use std::time::Instant;

use conntrail::ctnetlink::{
    Attrs, Class, Event, Message, Tally, decode_conn, decode_expect, decode_expect_stats,
    decode_stats, decode_stats_cpu, messages,
};

use super::corpus::corpus;

/// Some seconds in a debug build.
const SHORT_RUN: u64 = 200_000;

/// Puts a datagram through everything that reads one.
pub(super) fn decode_everything(datagram: &[u8], tally: &mut Tally) {
    let mut event = Event::default();
    for message in messages(datagram) {
        match message {
            Ok(message) => decode_message(&message, &mut event, tally),
            Err(malformed) => tally.refuse(&malformed),
        }
    }
}

fn decode_message<'a>(message: &Message<'a>, event: &mut Event<'a>, tally: &mut Tally) {
    match message.class() {
        Class::Conn(_) => {
            if decode_conn(message, event, tally).is_err() {
                assert_eq!(event.conn.present, Attrs::empty());
            }
        }
        Class::Expect { .. } => drop(std::hint::black_box(decode_expect(message, tally))),
        Class::StatsCpu => drop(std::hint::black_box(decode_stats_cpu(message, tally))),
        Class::Stats => drop(std::hint::black_box(decode_stats(message, tally))),
        Class::ExpectStatsCpu => drop(std::hint::black_box(decode_expect_stats(message, tally))),
        Class::Done | Class::Error => {
            if let Err(malformed) = message.outcome() {
                tally.refuse(&malformed);
            }
        }
        Class::Noop | Class::Overrun => {}
        Class::Unknown => tally.unknown_messages += 1,
    }
}

#[test]
fn mutated_messages_never_panic() {
    let count = match std::env::var("CONNTRAIL_MUTATIONS") {
        Ok(text) => text.parse().expect("CONNTRAIL_MUTATIONS is a number"),
        Err(_) => SHORT_RUN,
    };
    let seeds: Vec<Vec<u8>> = corpus().into_iter().flat_map(|(_, datagrams)| datagrams).collect();
    assert!(seeds.len() > 50, "{}", seeds.len());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut tally = Tally::default();
    let mut datagram = Vec::new();
    let begun = Instant::now();
    for _ in 0..count {
        mutate(&mut datagram, &seeds, &mut random);
        decode_everything(&datagram, &mut tally);
    }
    let took = begun.elapsed();
    println!(
        "{count} mutated messages in {took:.1?}: {} refused, {} unknown attributes, {} unknown messages",
        tally.refused_total(),
        tally.unknown_attributes,
        tally.unknown_messages
    );
    // Mutations that never got past the headers, or never broke anything, would prove nothing.
    assert!(tally.refused_total() > count / 10 && tally.refused_total() < count);
    assert!(tally.unknown_attributes > count / 100);
}

/// One seed, damaged in one to four places.
fn mutate(out: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let seed = &seeds[random.below(seeds.len())];
    out.clear();
    out.extend_from_slice(seed);
    for _ in 0..=random.below(4) {
        damage(out, seeds, random);
    }
}

fn damage(out: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    if out.is_empty() {
        return;
    }
    let at = random.below(out.len());
    match random.below(8) {
        0 => out[at] ^= 1 << random.below(8),
        1 => out[at] = random.next() as u8,
        // Numbers at the edges, where lengths go wrong.
        2 => out[at] = [0, 1, 3, 4, 5, 0x7f, 0x80, 0xff][random.below(8)],
        // A length or type field of an attribute: every attribute begins at a multiple of 4.
        3 => out[at & !3] = random.next() as u8,
        4 => out[at & !3] = out[at & !3].wrapping_add([1, 4, 8, 0xff, 0xfc, 0xf8][random.below(6)]),
        // Cut, and let the header agree, so that the attributes are reached.
        5 => {
            out.truncate(at);
            mend_length(out);
        }
        // Words taken out or put in from another message.
        6 => {
            let end = (at + 4 * random.below(4)).min(out.len());
            out.drain(at..end);
            mend_length(out);
        }
        _ => {
            let donor = &seeds[random.below(seeds.len())];
            let from = random.below(donor.len()) & !3;
            let end = (from + 4 * random.below(12)).min(donor.len());
            let at = at & !3;
            out.splice(at..at, donor[from..end].iter().copied());
            mend_length(out);
        }
    }
}

fn mend_length(out: &mut [u8]) {
    let length = out.len() as u32;
    if let Some(field) = out.first_chunk_mut::<4>() {
        *field = length.to_ne_bytes();
    }
}

/// xorshift64*: the same run each time, and no time spent on it.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}
