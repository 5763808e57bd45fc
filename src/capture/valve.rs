//! When reliable mode is released and when it is armed again.
//!
//! Entries whose DESTROY did not fit wait in the kernel and count towards `nf_conntrack_max`. If they
//! filled the table, the host would refuse new connections because of us. So the valve opens, which
//! frees them and loses their DESTROYs, before that; it closes when the table is well below its
//! limit again and there is room for what comes.
//!
//! States: *armed* (closed, reliable) and *open* (best effort). Does no I/O, has no clock.

use std::time::Duration;

/// Creations a second that a host may at most see: four times what was measured on two cores
/// without a listener (450,000).
const CREATIONS_PER_SECOND: u64 = 2_000_000;

/// More than the kernel charges for an event (1,280 measured), so that the time until the queue is
/// full is guessed too short rather than too long.
const LARGE_TRUESIZE: u64 = 2048;

/// Retained entries are tried again a second after the first failure (`HZ` in
/// nf_conntrack_ecache_work), then every 10 ms (`ECACHE_RETRY_JIFFIES`), and each try that fails moves
/// the drop counter: no movement for longer than that means that none waits.
const RETRY_MEMORY: Duration = Duration::from_millis(1500);

/// Between looks: not longer, so that a wrong guess is seen soon; not shorter, because a look costs
/// some microseconds and 2 ms are 4,000 entries at most.
pub(super) const LONGEST_LOOK: Duration = Duration::from_millis(250);
pub(super) const SHORTEST_LOOK: Duration = Duration::from_millis(2);

/// The thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValveConfig {
    /// Opens when the table is filled to this percentage of its limit and entries wait for us.
    pub open_percent: u8,
    /// Closes when it is filled to less than this percentage.
    pub close_percent: u8,
    /// Stays open at least this long, so that it does not flutter.
    pub dwell: Duration,
}

impl Default for ValveConfig {
    /// 10 % of the default limit, 262,144, is 13 ms of creations at the highest rate assumed: time for
    /// a look, and for the kernel to free what waits, which the next DESTROY of any flow sets off.
    fn default() -> Self {
        ValveConfig { open_percent: 90, close_percent: 70, dwell: Duration::from_secs(1) }
    }
}

/// What was seen at one look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Observation {
    /// Monotonic.
    pub(super) now: Duration,
    /// `nf_conntrack_count`
    pub(super) entries: u64,
    /// `nf_conntrack_max`; 0 is unlimited.
    pub(super) limit: u64,
    /// `SK_MEMINFO_RMEM_ALLOC`, `SK_MEMINFO_RCVBUF`, `SK_MEMINFO_DROPS` of the reliable socket.
    pub(super) queued: u32,
    pub(super) queue_limit: u32,
    pub(super) drops: u32,
}

impl Observation {
    fn filled_to(&self, percent: u8) -> bool {
        self.limit > 0 && self.entries * 100 >= self.limit * u64::from(percent)
    }

    fn queue_room(&self) -> u64 {
        u64::from(self.queue_limit).saturating_sub(u64::from(self.queued))
    }

    fn queue_is_full(&self) -> bool {
        self.queue_room() < 2 * LARGE_TRUESIZE
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Keep,
    Open,
    Arm,
}

#[derive(Debug)]
pub(super) struct Valve {
    config: ValveConfig,
    state: State,
    drops: Option<u32>,
    /// When the drop counter last moved.
    moved: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not armed yet: nothing can be waiting for us.
    Starting,
    Armed,
    Open {
        since: Duration,
    },
}

impl Valve {
    pub(super) fn new(config: ValveConfig) -> Self {
        Valve { config, state: State::Starting, drops: None, moved: None }
    }

    /// What to do now; it is taken for done.
    pub(super) fn look(&mut self, seen: &Observation) -> Action {
        if self.drops.replace(seen.drops).is_some_and(|drops| drops != seen.drops) {
            self.moved = Some(seen.now);
        }
        match self.state {
            State::Starting => {
                self.state = State::Armed;
                Action::Arm
            }
            State::Armed if self.must_open(seen) => {
                self.state = State::Open { since: seen.now };
                Action::Open
            }
            State::Open { since } if self.may_close(seen, since) => {
                self.state = State::Armed;
                Action::Arm
            }
            State::Armed | State::Open { .. } => Action::Keep,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// How long nothing can happen that needs a look: entries wait only once the queue is full, and
    /// matter only once the table is filled to the threshold, and both take their time even at the
    /// highest rate.
    pub(super) fn next_look(&self, seen: &Observation) -> Duration {
        if self.state != State::Armed || seen.limit == 0 {
            return LONGEST_LOOK;
        }
        let threshold = seen.limit * u64::from(self.config.open_percent) / 100;
        let room = threshold.saturating_sub(seen.entries);
        let events = room + seen.queue_room() / LARGE_TRUESIZE;
        Duration::from_micros(events * 1_000_000 / CREATIONS_PER_SECOND)
            .clamp(SHORTEST_LOOK, LONGEST_LOOK)
    }

    fn must_open(&self, seen: &Observation) -> bool {
        let retained = seen.queue_is_full()
            || self.moved.is_some_and(|moved| seen.now.saturating_sub(moved) < RETRY_MEMORY);
        retained && seen.filled_to(self.config.open_percent)
    }

    fn may_close(&self, seen: &Observation, since: Duration) -> bool {
        seen.now.saturating_sub(since) >= self.config.dwell
            && !seen.filled_to(self.config.close_percent)
            && seen.queue_room() >= u64::from(seen.queue_limit / 2)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn seen(ms: u32, entries: u64) -> Observation {
        Observation {
            now: MS * ms,
            entries,
            limit: 100_000,
            queued: 0,
            queue_limit: 8 << 20,
            drops: 0,
        }
    }

    fn full(observation: Observation) -> Observation {
        Observation { queued: observation.queue_limit - 100, ..observation }
    }

    fn armed() -> Valve {
        let mut valve = Valve::new(ValveConfig::default());
        assert_eq!(valve.look(&seen(0, 0)), Action::Arm);
        valve
    }

    #[test]
    fn arms_at_the_start_however_full_the_table_is() {
        let mut valve = Valve::new(ValveConfig::default());
        assert_eq!(valve.look(&seen(0, 95_000)), Action::Arm);
        assert_eq!(valve.look(&seen(1, 95_000)), Action::Keep);
    }

    #[test]
    fn a_full_table_alone_does_not_open_it() {
        assert_eq!(armed().look(&seen(1, 100_000)), Action::Keep);
    }

    #[test]
    fn waiting_entries_in_an_empty_table_do_not_open_it() {
        let mut valve = armed();
        let stalled = Observation { drops: 1000, ..full(seen(1, 50_000)) };
        assert_eq!(valve.look(&stalled), Action::Keep);
    }

    #[test]
    fn opens_when_the_table_fills_and_the_queue_is_full() {
        assert_eq!(armed().look(&full(seen(1, 89_999))), Action::Keep);
        assert_eq!(armed().look(&full(seen(1, 90_000))), Action::Open);
    }

    #[test]
    fn opens_when_the_table_fills_while_retries_are_counted() {
        let mut valve = armed();
        let retry = Observation { drops: 1, ..seen(10, 80_000) };
        assert_eq!(valve.look(&retry), Action::Keep);
        assert_eq!(valve.look(&Observation { drops: 1, ..seen(1509, 95_000) }), Action::Open);
    }

    #[test]
    fn retries_long_ago_do_not_open_it() {
        let mut valve = armed();
        assert_eq!(valve.look(&Observation { drops: 1, ..seen(10, 80_000) }), Action::Keep);
        assert_eq!(valve.look(&Observation { drops: 1, ..seen(1510, 95_000) }), Action::Keep);
    }

    #[test]
    fn an_unlimited_table_never_opens_it() {
        let unlimited = Observation { limit: 0, drops: 9, ..full(seen(1, 1 << 40)) };
        let mut valve = armed();
        assert_eq!(valve.look(&unlimited), Action::Keep);
        assert_eq!(valve.next_look(&unlimited), LONGEST_LOOK);
    }

    #[test]
    fn closes_only_after_its_dwell_below_the_mark_and_with_room() {
        let mut valve = armed();
        assert_eq!(valve.look(&full(seen(1, 90_000))), Action::Open);
        assert!(valve.is_open());
        assert_eq!(valve.look(&seen(1000, 10_000)), Action::Keep, "before the dwell");
        assert_eq!(valve.look(&seen(1001, 70_000)), Action::Keep, "table too full");
        assert_eq!(valve.look(&full(seen(1001, 10_000))), Action::Keep, "no room");
        assert_eq!(valve.look(&seen(1001, 69_999)), Action::Arm);
        assert!(!valve.is_open());
    }

    #[test]
    fn looks_more_often_the_nearer_the_limit_is() {
        let valve = armed();
        let far = Observation { limit: 1_000_000, ..seen(1, 0) };
        assert_eq!(valve.next_look(&far), LONGEST_LOOK);
        // 2,000 entries and a queue of 8 MiB, 4,096 events: 3 ms.
        assert!(valve.next_look(&seen(1, 88_000)) < 4 * MS);
        assert_eq!(valve.next_look(&full(seen(1, 89_999))), SHORTEST_LOOK);
    }

    proptest! {
        /// A table and a queue that fill at no more than the assumed rate, looked at when the valve
        /// says: it opens before the table is full.
        #[test]
        fn opens_before_the_table_is_full(
            limit in 65_536u64..4_000_000,
            queue_limit in (1u32 << 18)..(1 << 28),
            first in 0u64..80,
            rates in proptest::collection::vec(0u64..=CREATIONS_PER_SECOND, 1..50),
        ) {
            let mut valve = armed();
            let mut at = Observation {
                now: MS,
                entries: limit * first / 100,
                limit,
                queued: 0,
                queue_limit,
                drops: 0,
            };
            for rate in rates.iter().cycle() {
                let action = valve.look(&at);
                if action == Action::Open {
                    break;
                }
                prop_assert_eq!(action, Action::Keep);
                let next = valve.next_look(&at);
                let events = next.as_micros() as u64 * rate / 1_000_000;
                // Every entry ends at once: it fills the queue first, then it is retained.
                let fits = (at.queue_room() / 1280).min(events);
                at.queued += fits as u32 * 1280;
                at.entries += events - fits;
                at.drops = at.drops.wrapping_add((events - fits) as u32);
                at.now += next + MS / 1000;
                if rates.iter().all(|&rate| rate < 1_000) {
                    return Ok(());
                }
                prop_assert!(at.entries < limit, "full at {:?}", at);
            }
        }

        /// Whatever is seen: it opens and arms in turn, opens only near the limit, and closes only
        /// below its mark.
        #[test]
        fn opens_and_arms_in_turn_and_only_where_it_may(
            looks in proptest::collection::vec(
                (0u32..500, 0u64..120_000, 0u32..(8 << 20), 0u32..3), 1..200),
        ) {
            let mut valve = armed();
            let (mut now, mut drops, mut open) = (0, 0u32, false);
            for (pause, entries, queued, dropped) in looks {
                now += pause;
                drops += dropped;
                let at = Observation { queued, drops, ..seen(now, entries) };
                match valve.look(&at) {
                    Action::Keep => {}
                    Action::Open => {
                        prop_assert!(!open && entries >= 90_000);
                        open = true;
                    }
                    Action::Arm => {
                        prop_assert!(open && entries < 70_000);
                        open = false;
                    }
                }
                prop_assert_eq!(valve.is_open(), open);
                let next = valve.next_look(&at);
                prop_assert!((SHORTEST_LOOK..=LONGEST_LOOK).contains(&next));
            }
        }
    }
}
