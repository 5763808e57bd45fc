//! What holds for any event and any bytes.

use conntrail::ctnetlink::{
    Attrs, Class, Event, Expect, ExpectAttrs, Tally, decode_conn, decode_expect, messages,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::corpus::corpus;
use super::encode::{any_event, any_tuple, encode_event, encode_expect};
use super::mutations::decode_everything;

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_event_survives_the_way_to_bytes_and_back(first in any_event(), second in any_event()) {
        let (mut event, mut tally) = (Event::default(), Tally::default());
        let datagrams = [encode_event(&first.event()), encode_event(&second.event())];
        // Into the same event one after the other: nothing of the first may show in the second.
        for (bytes, owned) in datagrams.iter().zip([&first, &second]) {
            let message = messages(bytes).next().unwrap().unwrap();
            decode_conn(&message, &mut event, &mut tally).unwrap();
            prop_assert_eq!(&event, &owned.event());
        }
        prop_assert_eq!(tally, Tally::default());
    }

    #[test]
    fn any_expectation_survives_the_way_to_bytes_and_back(
        destroyed: bool,
        bits: u32,
        tuples in [any_tuple(), any_tuple(), any_tuple(), any_tuple()],
        words: [u32; 5],
        zone: u16,
        helper in vec(1..=u8::MAX, 0..20),
        function in vec(1..=u8::MAX, 0..20),
    ) {
        let present = ExpectAttrs::from_bits_truncate(bits);
        let when = |attr, word| if present.contains(attr) { word } else { 0 };
        let tuple = |attr, index: usize| {
            if present.contains(attr) { tuples[index] } else { Default::default() }
        };
        let text = |attr, words| if present.contains(attr) { words } else { &[][..] };
        let expect = Expect {
            destroyed,
            present,
            master: tuple(ExpectAttrs::MASTER, 0),
            tuple: tuple(ExpectAttrs::TUPLE, 1),
            mask: tuple(ExpectAttrs::MASK, 2),
            nat_tuple: tuple(ExpectAttrs::NAT_TUPLE, 3),
            timeout: when(ExpectAttrs::TIMEOUT, words[0]),
            id: when(ExpectAttrs::ID, words[1]),
            flags: when(ExpectAttrs::FLAGS, words[2]),
            class: when(ExpectAttrs::CLASS, words[3]),
            nat_dir: when(ExpectAttrs::NAT_DIR, words[4]),
            zone: if present.contains(ExpectAttrs::ZONE) { zone } else { 0 },
            helper: text(ExpectAttrs::HELPER, &helper),
            function: text(ExpectAttrs::FUNCTION, &function),
        };
        let bytes = encode_expect(&expect);
        let mut tally = Tally::default();
        let message = messages(&bytes).next().unwrap().unwrap();
        prop_assert_eq!(decode_expect(&message, &mut tally).unwrap(), expect);
        prop_assert_eq!(tally, Tally::default());
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..600)) {
        decode_everything(&bytes, &mut Tally::default());
    }

    /// Random attributes behind a sound header get further than random bytes.
    #[test]
    fn random_attributes_never_panic(subsystem in 1..=2u8, command in 0..=7u8, body in vec(any::<u8>(), 0..300)) {
        let mut bytes = (20 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend([command, subsystem, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        bytes.extend(&body);
        decode_everything(&bytes, &mut Tally::default());
    }
}

/// A datagram that is shorter than it says is never taken for whole, wherever it was cut: the walk
/// gives the messages before the cut and one refusal.
#[test]
fn a_datagram_cut_at_any_byte_is_refused() {
    let mut cuts = 0;
    for (name, datagrams) in corpus() {
        for datagram in &datagrams {
            let whole = ends(datagram);
            for length in 1..datagram.len() {
                let cut = &datagram[..length];
                decode_everything(cut, &mut Tally::default());
                let refused = messages(cut).any(|message| message.is_err());
                assert_eq!(refused, !whole.contains(&length), "{name} cut at {length}");
                cuts += 1;
            }
        }
    }
    assert!(cuts > 10_000, "{cuts}");
}

/// Where each message of a datagram ends.
fn ends(datagram: &[u8]) -> Vec<usize> {
    let mut at = 0;
    let mut ends = Vec::new();
    while at < datagram.len() {
        at += u32::from_ne_bytes(datagram[at..at + 4].try_into().unwrap()) as usize;
        ends.push(at);
    }
    ends
}

/// The same with the header's length mended, so that the cut is found in the attributes: either it
/// fell between two of them, or the message is refused whole.
#[test]
fn a_message_cut_at_any_byte_is_refused_or_ends_at_an_attribute() {
    let (mut refused, mut shorter) = (0, 0);
    for (name, datagrams) in corpus() {
        for datagram in &datagrams {
            let first = messages(datagram).next().unwrap().unwrap();
            if !matches!(first.class(), Class::Conn(_)) {
                continue;
            }
            let mut event = Event::default();
            decode_conn(&first, &mut event, &mut Tally::default()).unwrap();
            let full = event.conn.present;
            for length in 20..ends(datagram)[0] {
                let mut cut = datagram[..length].to_vec();
                cut[..4].copy_from_slice(&(length as u32).to_ne_bytes());
                let message = messages(&cut).next().unwrap().unwrap();
                let (mut event, mut tally) = (Event::default(), Tally::default());
                match decode_conn(&message, &mut event, &mut tally) {
                    Ok(()) => {
                        assert!(
                            full.contains(event.conn.present) && event.conn.present != full
                                || length + 4 > ends(datagram)[0],
                            "{name} cut at {length}"
                        );
                        shorter += 1;
                    }
                    Err(_) => {
                        assert_eq!(event.conn.present, Attrs::empty());
                        assert_eq!(tally.refused_total(), 1);
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 5_000 && shorter > 500, "{refused} refused, {shorter} shorter");
}

#[test]
fn any_single_flipped_bit_is_survived() {
    let mut flips = 0;
    for (_, datagrams) in corpus() {
        for datagram in &datagrams {
            let mut flipped = datagram.clone();
            for bit in 0..datagram.len() * 8 {
                flipped[bit / 8] ^= 1 << (bit % 8);
                decode_everything(&flipped, &mut Tally::default());
                flipped[bit / 8] ^= 1 << (bit % 8);
                flips += 1;
            }
        }
    }
    assert!(flips > 100_000, "{flips}");
}
