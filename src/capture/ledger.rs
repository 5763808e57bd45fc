//! What the drops of the DESTROY socket mean: attempts that the kernel repeats, or losses.
//!
//! Promises: every drop that was counted while reliable mode was off lies in exactly one gap; a gap
//! says `exact` only when no drop could have been taken for the other sort. Does no I/O, has no
//! clock.

use super::reader::Looked;
use crate::flow::{Gap, GapCause, GapKinds, Precision};

/// The drop counter around the switching of reliable mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) before: u32,
    pub(super) after: u32,
    /// How many drops counted in `before` may yet be dealt with as the new mode says. netlink_overrun
    /// counts first, and NETLINK_F_BROADCAST_SEND_ERROR is looked at after it; so, when the counter
    /// was moving, one for each CPU.
    pub(super) in_flight: u32,
}

impl Reading {
    fn is_sharp(self) -> bool {
        self.before == self.after && self.in_flight == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Drops are attempts.
    Reliable,
    /// Drops are losses.
    BestEffort,
}

#[derive(Debug)]
pub(super) struct Ledger {
    mode: Mode,
    cause: GapCause,
    /// The losses up to this reading, and up to this time, are told.
    told: u32,
    since: u64,
    /// Added to the next count, which is a bound only, because the mode's beginning was blurred.
    blur: Option<u32>,
}

impl Ledger {
    /// Begins with reliable mode off.
    pub(super) fn new(drops: u32, at: u64) -> Self {
        Ledger {
            mode: Mode::BestEffort,
            cause: GapCause::Overrun,
            told: drops,
            since: at,
            blur: None,
        }
    }

    pub(super) fn is_reliable(&self) -> bool {
        self.mode == Mode::Reliable
    }

    /// Reliable mode went off; what is lost from now on is lost for `cause`.
    pub(super) fn released(&mut self, reading: Reading, cause: GapCause, at: Looked) {
        if self.mode == Mode::BestEffort {
            return;
        }
        self.mode = Mode::BestEffort;
        self.cause = cause;
        self.told = reading.before;
        self.since = at.from;
        self.blur = (!reading.is_sharp()).then_some(reading.in_flight);
    }

    /// Time has passed; the counter stands at `drops`.
    #[must_use]
    pub(super) fn progressed(&mut self, drops: u32, at: Looked) -> Option<Gap> {
        if self.mode == Mode::Reliable {
            return None;
        }
        let lost = drops.wrapping_sub(self.told);
        self.told = drops;
        let since = std::mem::replace(&mut self.since, at.from);
        let blur = self.blur.take();
        self.gap(u64::from(lost) + u64::from(blur.unwrap_or(0)), blur.is_none(), since, at.to)
    }

    /// After a wait the counter stands at `drops`. When nothing was lost meanwhile, the next gap
    /// begins now.
    pub(super) fn woke(&mut self, drops: u32, at: Looked) {
        if self.mode == Mode::BestEffort && drops == self.told && self.blur.is_none() {
            self.since = at.from;
        }
    }

    /// Reliable mode went on.
    #[must_use]
    pub(super) fn armed(&mut self, reading: Reading, at: Looked) -> Option<Gap> {
        if self.mode == Mode::Reliable {
            return None;
        }
        let lost = reading.after.wrapping_sub(self.told);
        let blur = self.blur.take();
        let exact = blur.is_none() && reading.is_sharp();
        let gap =
            self.gap(u64::from(lost) + u64::from(blur.unwrap_or(0)), exact, self.since, at.to);
        self.mode = Mode::Reliable;
        self.told = reading.after;
        self.since = at.from;
        gap
    }

    /// The flag in the kernel is what counts: when it is not as the books say, it was switched at
    /// some time since the last entry in them, and every drop since may be a loss.
    pub(super) fn reconcile(&mut self, reliable: bool) {
        if reliable == self.is_reliable() {
            return;
        }
        if self.mode == Mode::Reliable {
            self.mode = Mode::BestEffort;
            self.cause = GapCause::Valve;
        }
        self.blur.get_or_insert(0);
    }

    fn gap(&self, lost: u64, exact: bool, from: u64, to: u64) -> Option<Gap> {
        (lost > 0).then_some(Gap {
            cause: self.cause,
            events: Some(lost),
            precision: if exact { Precision::Exact } else { Precision::AtMost },
            kinds: GapKinds::DESTROY,
            from,
            to,
            seqs: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(time: u64) -> Looked {
        Looked { from: time, to: time }
    }

    #[test]
    fn a_gap_covers_the_drop_however_slowly_the_counter_was_read() {
        let mut ledger = Ledger::new(0, 0);
        assert_eq!(ledger.progressed(0, Looked { from: 10, to: 15 }), None);
        let gap = ledger.progressed(1, Looked { from: 20, to: 25 }).unwrap();
        assert_eq!((gap.from, gap.to), (10, 25));
        let gap = ledger.progressed(2, Looked { from: 30, to: 35 }).unwrap();
        assert_eq!((gap.from, gap.to), (20, 35));
    }

    #[test]
    fn idle_time_lies_in_no_gap_unless_something_was_lost_in_it() {
        let mut ledger = Ledger::new(0, 0);
        ledger.woke(0, at(800));
        ledger.woke(1, at(900));
        let gap = ledger.progressed(1, at(901)).unwrap();
        assert_eq!((gap.from, gap.to), (800, 901));
    }

    fn sharp(drops: u32) -> Reading {
        Reading { before: drops, after: drops, in_flight: 0 }
    }

    #[test]
    fn before_reliable_mode_is_first_on_a_drop_is_an_overrun() {
        let mut ledger = Ledger::new(10, 1);
        let gap = ledger.progressed(15, at(2)).unwrap();
        assert_eq!((gap.cause, gap.events), (GapCause::Overrun, Some(5)));
        assert_eq!((gap.precision, gap.from, gap.to), (Precision::Exact, 1, 2));
        assert_eq!(ledger.progressed(15, at(3)), None);
    }

    #[test]
    fn drops_in_reliable_mode_are_no_losses() {
        let mut ledger = Ledger::new(0, 0);
        assert_eq!(ledger.armed(sharp(0), at(1)), None);
        assert_eq!(ledger.progressed(1000, at(2)), None);
        ledger.released(sharp(1000), GapCause::Valve, at(3));
        assert_eq!(ledger.progressed(1000, at(4)), None);
        let gap = ledger.armed(sharp(1400), at(5)).unwrap();
        assert_eq!((gap.cause, gap.events), (GapCause::Valve, Some(400)));
        assert_eq!((gap.precision, gap.from, gap.to), (Precision::Exact, 4, 5));
    }

    #[test]
    fn drops_while_the_mode_was_switched_make_the_count_a_bound() {
        let mut ledger = Ledger::new(0, 0);
        assert_eq!(ledger.armed(sharp(0), at(0)), None);
        let blurred = Reading { before: 100, after: 103, in_flight: 2 };
        ledger.released(blurred, GapCause::Valve, at(1));
        let gap = ledger.progressed(110, at(2)).unwrap();
        assert_eq!((gap.events, gap.precision), (Some(12), Precision::AtMost));
        let gap = ledger.progressed(120, at(3)).unwrap();
        assert_eq!((gap.events, gap.precision), (Some(10), Precision::Exact));
        let gap = ledger.armed(Reading { before: 120, after: 121, in_flight: 0 }, at(4)).unwrap();
        assert_eq!((gap.events, gap.precision), (Some(1), Precision::AtMost));
    }

    #[test]
    fn the_counter_may_wrap() {
        let mut ledger = Ledger::new(u32::MAX - 1, 0);
        assert_eq!(ledger.progressed(2, at(1)).unwrap().events, Some(4));
    }

    #[test]
    fn a_switch_that_nobody_reported_makes_every_drop_since_a_possible_loss() {
        let mut ledger = Ledger::new(0, 0);
        assert_eq!(ledger.armed(sharp(100), at(5)).unwrap().events, Some(100));
        ledger.reconcile(true);
        assert_eq!(ledger.progressed(150, at(6)), None);
        ledger.reconcile(false);
        let gap = ledger.progressed(170, at(7)).unwrap();
        assert_eq!((gap.events, gap.precision), (Some(70), Precision::AtMost));
        assert_eq!((gap.cause, gap.from, gap.to), (GapCause::Valve, 5, 7));
        ledger.reconcile(true);
        let gap = ledger.progressed(180, at(8)).unwrap();
        assert_eq!((gap.events, gap.precision), (Some(10), Precision::AtMost));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// Drops happen, then the ledger looks.
        Look(u16),
        /// The mode changes; drops happen before the flag is changed and after it, both between the
        /// two readings.
        Switch(u8, u8),
    }

    proptest! {
        /// Against the truth: losses are what was dropped with the flag off. The sum of the gaps is
        /// never less, and equal when every gap says so.
        #[test]
        fn the_gaps_never_say_less_than_was_lost(
            first in any::<u32>(),
            steps in proptest::collection::vec(
                prop_oneof![
                    any::<u16>().prop_map(Step::Look),
                    (0u8..3, 0u8..3).prop_map(|(a, b)| Step::Switch(a, b)),
                ],
                0..40,
            ),
        ) {
            let (mut drops, mut reliable, mut lost) = (first, false, 0u64);
            let mut ledger = Ledger::new(drops, 0);
            let (mut told, mut exact) = (0, true);
            let mut tell = |gap: Option<Gap>| {
                if let Some(gap) = gap {
                    told += gap.events.unwrap();
                    exact &= gap.precision == Precision::Exact;
                }
            };
            for (at, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Look(n) => {
                        drops = drops.wrapping_add(u32::from(n));
                        lost += if reliable { 0 } else { u64::from(n) };
                        tell(ledger.progressed(drops, self::at(at as u64)));
                    }
                    Step::Switch(a, b) => {
                        let before = drops;
                        lost += if reliable { u64::from(b) } else { u64::from(a) };
                        drops = drops.wrapping_add(u32::from(a) + u32::from(b));
                        let reading = Reading { before, after: drops, in_flight: 0 };
                        reliable = !reliable;
                        if reliable {
                            tell(ledger.armed(reading, self::at(at as u64)));
                        } else {
                            ledger.released(reading, GapCause::Valve, self::at(at as u64));
                        }
                    }
                }
            }
            tell(ledger.progressed(drops, at(1000)));
            prop_assert!(told >= lost);
            prop_assert!(!exact || told == lost, "told {told}, lost {lost}");
        }
    }
}
