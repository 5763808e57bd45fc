//! Captured datagrams decode to what was seen to be right. The snapshots stand beside them.

use conntrail::ctnetlink::{Attrs, Event, Kind, Tally, decode_conn, messages};

use super::corpus::{corpus, folder, read};
use super::describe::describe;

#[test]
fn captured_datagrams_decode_to_their_snapshots() {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(folder());
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    let _guard = settings.bind_to_scope();
    for (name, datagrams) in corpus() {
        let mut tally = Tally::default();
        let mut lines = Vec::new();
        for datagram in &datagrams {
            for message in messages(datagram) {
                lines.push(describe(&message.unwrap(), &mut tally));
            }
        }
        assert_eq!(tally, Tally::default(), "{name} has something that is not understood");
        insta::assert_snapshot!(name, lines.join("\n"));
    }
}

/// The sender chose the tag: its source port + 1. It stands in the packet in network order, and the
/// kernel keeps and sends it so; conntrack(8) -I hands over host order, which proves nothing.
#[test]
fn sctp_verification_tags_are_the_packets_own() {
    let mut compared = 0;
    for datagram in read("sctp_packets") {
        for message in messages(&datagram) {
            let message = message.unwrap();
            let mut event = Event::default();
            decode_conn(&message, &mut event, &mut Tally::default()).unwrap();
            if event.kind == Kind::New {
                let tag = u32::from(event.conn.orig.src_port) + 1;
                assert!(event.conn.has(Attrs::SCTP_VTAG_REPLY));
                assert_eq!(event.extra.sctp_vtag_reply, tag);
                compared += 1;
            }
        }
    }
    assert!(compared >= 4, "{compared}");
}
