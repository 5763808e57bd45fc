//! When to try again and what to say about it. Policy only: no clock, no sleep, no log.

use std::time::{Duration, Instant};

/// The first wait: long enough that a failing disk costs no CPU, short enough to go unnoticed.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait: how long a sink stays behind at most after its trouble is over.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// At most one line of each sort in this time for an error that comes again and again.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// Waits that double from 100 ms to 10 s.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    jitter: u64,
}

impl Backoff {
    /// `seed` spreads the waits of many agents that lost the same peer at the same time.
    pub(super) fn new(seed: u64) -> Self {
        Backoff { next: FIRST_WAIT, jitter: seed | 1 }
    }

    /// The next wait: the doubled time, less up to a quarter.
    pub(super) fn wait(&mut self) -> Duration {
        let base = self.next;
        self.next = (self.next * 2).min(LONGEST_WAIT);
        // xorshift64: any spread will do.
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        base - base / 4 * (self.jitter % 1000) as u32 / 1000
    }

    pub(super) fn reset(&mut self) {
        self.next = FIRST_WAIT;
    }
}

/// What should be logged.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Say {
    /// An error, and how many like it went unsaid since the last line.
    Error { unsaid: u64 },
    /// It works again after so many errors in this time.
    Works { errors: u64, lasted: Duration },
}

/// Bounds what is logged about an error that recurs: the first at once, then at most one line in
/// 30 s, and a line when it works again; also when it comes and goes many times a second.
#[derive(Debug, Default)]
pub(super) struct Complaint {
    /// When the first error that no "works again" has answered yet came.
    since: Option<Instant>,
    errors: u64,
    unsaid: u64,
    said_error: Option<Instant>,
    said_works: Option<Instant>,
}

impl Complaint {
    pub(super) fn error(&mut self, now: Instant) -> Option<Say> {
        self.since.get_or_insert(now);
        self.errors += 1;
        if !is_due(self.said_error, now) {
            self.unsaid += 1;
            return None;
        }
        self.said_error = Some(now);
        Some(Say::Error { unsaid: std::mem::take(&mut self.unsaid) })
    }

    /// An error has not been answered yet.
    #[cfg(test)]
    pub(super) fn is_open(&self) -> bool {
        self.since.is_some()
    }

    /// To be called after each success; says that it works at the first that is due.
    pub(super) fn success(&mut self, now: Instant) -> Option<Say> {
        let since = self.since?;
        if !is_due(self.said_works, now) {
            return None;
        }
        self.said_works = Some(now);
        self.since = None;
        self.unsaid = 0;
        Some(Say::Works { errors: std::mem::take(&mut self.errors), lasted: now - since })
    }
}

fn is_due(said: Option<Instant>, now: Instant) -> bool {
    said.is_none_or(|at| now.saturating_duration_since(at) >= SAY_EVERY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_from_a_tenth_of_a_second_to_ten_seconds_less_a_quarter_at_most() {
        let mut backoff = Backoff::new(42);
        for millis in [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000] {
            let (wait, full) = (backoff.wait(), Duration::from_millis(millis));
            assert!(wait <= full && wait >= full * 3 / 4, "{wait:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.wait() <= FIRST_WAIT);
    }

    #[test]
    fn waits_differ_from_agent_to_agent() {
        let waits: std::collections::HashSet<_> =
            (0..100).map(|seed| Backoff::new(seed * 7919).wait()).collect();
        assert!(waits.len() > 20, "{}", waits.len());
    }

    #[test]
    fn a_recurring_error_is_said_at_once_then_summed_up_every_half_minute() {
        let mut complaint = Complaint::default();
        let start = Instant::now();
        let mut said = Vec::new();
        for second in 0..=60 {
            if let Some(say) = complaint.error(start + Duration::from_secs(second)) {
                said.push((second, say));
            }
        }
        assert_eq!(
            said,
            [
                (0, Say::Error { unsaid: 0 }),
                (30, Say::Error { unsaid: 29 }),
                (60, Say::Error { unsaid: 29 })
            ]
        );
        let works = complaint.success(start + Duration::from_secs(61));
        assert_eq!(works, Some(Say::Works { errors: 61, lasted: Duration::from_secs(61) }));
        assert_eq!(complaint.success(start + Duration::from_secs(62)), None);
    }

    #[test]
    fn an_error_that_comes_and_goes_many_times_a_second_is_bounded_too() {
        let mut complaint = Complaint::default();
        let start = Instant::now();
        let mut said = 0;
        for tick in 0..6000 {
            let now = start + Duration::from_millis(tick * 10);
            said += usize::from(complaint.error(now).is_some());
            said += usize::from(complaint.success(now).is_some());
        }
        assert_eq!(said, 4, "a pair at the beginning and one after 30 s");
        let end = start + Duration::from_secs(90);
        assert!(matches!(complaint.success(end), Some(Say::Works { .. })), "and the last word");
    }
}
