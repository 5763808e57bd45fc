//! `nf_conntrack_events` while the agent runs: with 0 the kernel makes no events at all, and no counter
//! moves. So it is looked at once a second, and the time without events becomes a gap.

use crate::config::EventKinds;
use crate::flow::{Gap, GapCause, GapKinds, Precision};

/// What was seen of the setting. Pure: whoever looks brings value and time.
#[derive(Debug)]
pub(super) struct EventsSwitch {
    kinds: GapKinds,
    /// When it was last seen on, or the start.
    on: u64,
    off: bool,
    /// It was on at some time of this run: what is off from the start is a finding about the host.
    seen_on: bool,
}

impl EventsSwitch {
    pub(super) fn new(wanted: EventKinds, now: u64) -> Self {
        let mut kinds = GapKinds::empty();
        kinds.set(GapKinds::NEW, wanted.new);
        kinds.set(GapKinds::UPDATE, wanted.update);
        kinds.set(GapKinds::DESTROY, wanted.destroy);
        kinds.set(GapKinds::EXPECT_NEW | GapKinds::EXPECT_DESTROY, wanted.expect);
        EventsSwitch { kinds, on: now, off: false, seen_on: false }
    }

    /// The gap to tell now: one when it is found off, so that a reader learns of it at once, and one
    /// for the whole time when it is on again. `value` is `None` when the setting can't be read.
    pub(super) fn look(&mut self, value: Option<u64>, now: u64) -> Option<Gap> {
        let off = value == Some(0);
        let gap = (off != self.off).then(|| self.gap(now));
        self.off = off;
        if !off {
            self.on = now;
            self.seen_on = true;
        }
        gap
    }

    /// Whether somebody switched them off while we run.
    pub(super) fn went_off(&self) -> bool {
        self.off && self.seen_on
    }

    /// What is still to be told at the end.
    pub(super) fn end(&self, now: u64) -> Option<Gap> {
        self.off.then(|| self.gap(now))
    }

    fn gap(&self, now: u64) -> Gap {
        Gap {
            cause: GapCause::EventsOff,
            events: None,
            precision: Precision::Unknown,
            kinds: self.kinds,
            from: self.on,
            to: now,
            seqs: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switch() -> EventsSwitch {
        EventsSwitch::new(EventKinds::default(), 10)
    }

    #[test]
    fn a_setting_that_stays_on_says_nothing() {
        let mut switch = switch();
        assert!([Some(1), Some(2), None].iter().all(|value| switch.look(*value, 20).is_none()));
        assert_eq!(switch.end(30), None);
    }

    #[test]
    fn the_time_without_events_is_told_when_it_begins_and_when_it_ends() {
        let mut switch = switch();
        switch.look(Some(1), 20);
        let begun = switch.look(Some(0), 30).unwrap();
        assert_eq!((begun.cause, begun.from, begun.to), (GapCause::EventsOff, 20, 30));
        assert_eq!(begun.kinds, GapKinds::NEW | GapKinds::DESTROY);
        assert_eq!(switch.look(Some(0), 40), None);
        let over = switch.look(Some(1), 50).unwrap();
        assert_eq!((over.from, over.to), (20, 50));
        assert_eq!(switch.look(Some(1), 60), None);
    }

    #[test]
    fn a_stop_while_it_is_off_tells_the_rest() {
        let mut switch = switch();
        assert_eq!(switch.look(Some(0), 10).unwrap().from, 10);
        assert!(!switch.went_off(), "the host's findings have said so");
        assert_eq!(switch.end(99).unwrap().to, 99);
    }
}
