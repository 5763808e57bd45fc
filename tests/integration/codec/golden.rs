//! Captured datagrams decode to what was seen to be right. The snapshots stand beside them.

use conntrail::ctnetlink::{Tally, messages};

use super::corpus::{corpus, folder};
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
