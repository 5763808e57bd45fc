//! What the pipeline remembers of flows between their events. Bounded: what is forgotten is counted
//! by [`RareMemory::forgotten`], and no record is lost by it, only decoration.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use crate::ctnetlink::Attrs;
use crate::flow::Rare;

/// Flows with rare attributes in one generation, of which there are two. Some 400 bytes each, so
/// that both together stay below 16 MiB.
const GENERATION: usize = 16 * 1024;

/// Flows with live events during a snapshot; 16 MiB. A dump of 40,000 entries takes 180 ms
/// (kernel.md), in which a storm makes some 50,000 events.
const MAX_LIVE: usize = 1 << 20;

/// A `flow_id` is a hash already.
#[derive(Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type ByFlow<T> = HashMap<u64, T, BuildHasherDefault<Identity>>;

/// The rare attributes of a flow, and which they are.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Remembered {
    pub present: Attrs,
    pub rare: Box<Rare>,
}

impl Remembered {
    /// Takes from `earlier` what this one does not have.
    fn complete(&mut self, earlier: Remembered) {
        let missing = earlier.present - self.present;
        let old = *earlier.rare;
        if missing.contains(Attrs::HELPER) {
            self.rare.helper = old.helper;
        }
        if missing.contains(Attrs::SECCTX) {
            self.rare.secctx = old.secctx;
        }
        let (extra, old) = (&mut self.rare.extra, old.extra);
        if missing.contains(Attrs::LABELS) {
            extra.labels = old.labels;
        }
        if missing.contains(Attrs::MASTER) {
            extra.master = old.master;
        }
        if missing.contains(Attrs::SCTP_VTAG_ORIG) {
            extra.sctp_vtag_orig = old.sctp_vtag_orig;
        }
        if missing.contains(Attrs::SCTP_VTAG_REPLY) {
            extra.sctp_vtag_reply = old.sctp_vtag_reply;
        }
        if missing.contains(Attrs::DCCP_ROLE) {
            extra.dccp.role = old.dccp.role;
        }
        if missing.contains(Attrs::DCCP_HANDSHAKE_SEQ) {
            extra.dccp.handshake_seq = old.dccp.handshake_seq;
        }
        if missing.contains(Attrs::SEQ_ADJ_ORIG) {
            extra.seq_adj_orig = old.seq_adj_orig;
        }
        if missing.contains(Attrs::SEQ_ADJ_REPLY) {
            extra.seq_adj_reply = old.seq_adj_reply;
        }
        if missing.contains(Attrs::SYNPROXY) {
            extra.synproxy = old.synproxy;
        }
        self.present |= earlier.present;
    }
}

/// Rare attributes by flow, in two generations: when the young one is full it becomes the old one,
/// and the old one is forgotten. Flows whose DESTROY was lost go that way too.
#[derive(Debug, Default)]
pub(super) struct RareMemory {
    young: ByFlow<Remembered>,
    old: ByFlow<Remembered>,
    pub forgotten: u64,
}

impl RareMemory {
    pub(super) fn is_empty(&self) -> bool {
        self.young.is_empty() && self.old.is_empty()
    }

    /// All that is known of the flow, `fresh` included, which is remembered.
    pub(super) fn merge(&mut self, flow_id: u64, fresh: Option<Remembered>) -> Option<Remembered> {
        let known = self.take(flow_id, fresh)?;
        if self.young.len() >= GENERATION {
            self.forgotten += self.old.len() as u64;
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(flow_id, known.clone());
        Some(known)
    }

    /// All that is known of the flow, which ends.
    pub(super) fn take(&mut self, flow_id: u64, fresh: Option<Remembered>) -> Option<Remembered> {
        let earlier = self.young.remove(&flow_id).or_else(|| self.old.remove(&flow_id));
        match (fresh, earlier) {
            (Some(mut fresh), Some(earlier)) => {
                fresh.complete(earlier);
                Some(fresh)
            }
            (fresh, earlier) => fresh.or(earlier),
        }
    }
}

/// Flows with a live event during a snapshot.
#[derive(Debug, Default)]
pub(super) struct LiveFlows {
    seen: HashSet<u64, BuildHasherDefault<Identity>>,
    full: bool,
}

impl LiveFlows {
    pub(super) fn insert(&mut self, flow_id: u64) {
        if self.seen.len() >= MAX_LIVE {
            self.full = true;
            return;
        }
        self.seen.insert(flow_id);
    }

    /// Whether the flow may have been seen: when it is not known any more, the entry is called
    /// overtaken, because a doubtful "this is the truth" is the worse of the two.
    pub(super) fn has(&self, flow_id: u64) -> bool {
        self.full || self.seen.contains(&flow_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(attr: Attrs, change: impl FnOnce(&mut Rare)) -> Remembered {
        let mut rare = Box::<Rare>::default();
        change(&mut rare);
        Remembered { present: attr, rare }
    }

    #[test]
    fn a_destroy_gets_what_the_flows_earlier_events_said() {
        let mut memory = RareMemory::default();
        memory.merge(1, Some(with(Attrs::HELPER, |rare| rare.helper = "ftp".into())));
        memory.merge(1, Some(with(Attrs::LABELS, |rare| rare.extra.labels[0] = 2)));
        let known = memory.take(1, None).unwrap();
        assert_eq!(known.present, Attrs::HELPER | Attrs::LABELS);
        assert_eq!((&*known.rare.helper, known.rare.extra.labels[0]), ("ftp", 2));
        assert!(memory.is_empty());
    }

    #[test]
    fn a_later_value_replaces_an_earlier_one() {
        let mut memory = RareMemory::default();
        memory.merge(1, Some(with(Attrs::LABELS, |rare| rare.extra.labels[0] = 1)));
        let known = memory.merge(1, Some(with(Attrs::LABELS, |rare| rare.extra.labels[0] = 2)));
        assert_eq!(known.unwrap().rare.extra.labels[0], 2);
    }

    #[test]
    fn memory_is_bounded_and_says_how_much_it_forgot() {
        let mut memory = RareMemory::default();
        for flow in 0..3 * GENERATION as u64 {
            memory.merge(flow, Some(with(Attrs::HELPER, |rare| rare.helper = "sip".into())));
        }
        assert!(memory.young.len() + memory.old.len() <= 2 * GENERATION);
        assert_eq!(memory.forgotten, GENERATION as u64);
        assert!(memory.take(3 * GENERATION as u64 - 1, None).is_some());
        assert!(memory.take(0, None).is_none());
    }

    #[test]
    fn a_flow_that_is_still_touched_is_not_forgotten() {
        let mut memory = RareMemory::default();
        let label = || Some(with(Attrs::LABELS, |_| {}));
        for flow in 1..4 * GENERATION as u64 {
            memory.merge(flow, label());
            memory.merge(0, label());
        }
        assert!(memory.take(0, None).is_some());
    }
}
