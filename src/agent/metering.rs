//! Every counter of the agent under its public name, and the balance at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::capture::{CaptureStats, Queue, SocketStats};
use crate::control;
use crate::ctnetlink::Reason;
use crate::flow::{GapCause, Precision};
use crate::pipeline::PipelineStats;
use crate::sink::{Outcome, SinkReport, SinkStats};
use crate::spool::{Spool, WhenFull};
use crate::telemetry::metrics::{self, Metrics, Sheet};

/// What there is to look at in a running agent.
#[derive(Clone)]
pub(super) struct Meters {
    pub netns: String,
    pub capture: Arc<CaptureStats>,
    pub queue: Arc<Queue>,
    pub pipeline: Arc<PipelineStats>,
    pub spool: Arc<Spool>,
}

fn of(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

impl Meters {
    pub(super) fn export(self, metrics: &Metrics) {
        metrics.register("agent", move |sheet| {
            self.capture(sheet);
            self.table(sheet);
            self.pipeline(sheet);
            self.spool(sheet);
        });
    }

    fn capture(&self, sheet: &mut Sheet) {
        let (netns, stats) = (self.netns.as_str(), &self.capture);
        for (socket, of_socket) in [("destroy", &stats.destroys), ("events", &stats.events)] {
            self.socket(sheet, socket, of_socket);
        }
        sheet.add(&metrics::CAPTURE_ROUNDS, &[netns], of(&stats.rounds));
        sheet.add(&metrics::SOCKET_RETRIES, &[netns], stats.retries());
        sheet.add(&metrics::RELIABLE, &[netns], stats.reliable_active.load(Relaxed).into());
        sheet.add(&metrics::VALVE_OPENS, &[netns], of(&stats.valve_opens));
        sheet.add(&metrics::GUARD_STARTS, &[netns], of(&stats.guard_starts));
        sheet.add(&metrics::QUEUE_BYTES, &[], self.queue.bytes() as u64);
    }

    fn socket(&self, sheet: &mut Sheet, socket: &str, stats: &SocketStats) {
        let labels = [self.netns.as_str(), socket];
        sheet.add(&metrics::BYTES_RECEIVED, &[self.netns.as_str()], of(&stats.bytes));
        sheet.add(&metrics::SOCKET_DROPS, &labels, of(&stats.drops));
        sheet.add(&metrics::SOCKET_TRUNCATED, &labels, of(&stats.truncated));
        sheet.add(&metrics::RECEIVE_QUEUE, &labels, of(&stats.queue_bytes));
        sheet.add(&metrics::RECEIVE_BUFFER, &labels, of(&stats.queue_limit));
    }

    /// The table itself, read when someone asks. A setting that can't be read is left out.
    fn table(&self, sheet: &mut Sheet) {
        if let Ok(Some(entries)) = control::setting("nf_conntrack_count") {
            sheet.add(&metrics::ENTRIES, &[self.netns.as_str()], entries);
        }
        if let Ok(Some(limit)) = control::setting("nf_conntrack_max") {
            sheet.add(&metrics::ENTRIES_LIMIT, &[], limit);
        }
    }

    fn pipeline(&self, sheet: &mut Sheet) {
        let (netns, stats) = (self.netns.as_str(), &self.pipeline);
        for (name, counter) in [
            ("new", &stats.new),
            ("update", &stats.update),
            ("destroy", &stats.destroy),
            ("snapshot", &stats.snapshot),
            ("expect", &stats.expectations),
        ] {
            sheet.add(&metrics::EVENTS_RECEIVED, &[netns, name], of(counter));
        }
        sheet.add(&metrics::FILTERED, &[], of(&stats.filtered));
        for (counter, reason) in stats.malformed.iter().zip(Reason::ALL) {
            if of(counter) > 0 {
                sheet.add(&metrics::MALFORMED, &[reason.name()], of(counter));
            }
        }
        sheet.add(&metrics::UNKNOWN_ATTRIBUTES, &[], of(&stats.unknown_attributes));
        sheet.add(&metrics::UNKNOWN_MESSAGES, &[], of(&stats.unknown_messages));
        sheet.add(&metrics::FORGOTTEN, &[], of(&stats.forgotten));
        for cause in GapCause::ALL {
            self.gaps(sheet, cause);
        }
    }

    fn gaps(&self, sheet: &mut Sheet, cause: GapCause) {
        let counts = &self.pipeline.gaps[cause as usize];
        if of(&counts.records) == 0 {
            return;
        }
        sheet.add(&metrics::GAP_RECORDS, &[cause.name()], of(&counts.records));
        for precision in Precision::ALL {
            let events = of(&counts.events[precision as usize]);
            if events > 0 {
                sheet.add(&metrics::GAP_EVENTS, &[cause.name(), precision.name()], events);
            }
        }
    }

    fn spool(&self, sheet: &mut Sheet) {
        let tally = self.spool.tally();
        sheet.add(&metrics::APPENDED, &[], tally.appended);
        sheet.add(&metrics::DROPPED, &["oldest"], tally.dropped_oldest);
        sheet.add(&metrics::DROPPED, &["newest"], tally.dropped_newest);
        if tally.gaps > 0 {
            sheet.add(&metrics::GAP_RECORDS, &[GapCause::SpoolFull.name()], tally.gaps);
        }
        sheet.add(&metrics::SPOOL_BYTES, &[], self.spool.bytes() as u64);
        sheet.add(&metrics::SPOOL_LIMIT, &[], self.spool.config().max_size as u64);
        for (sink, pending, lapped) in self.spool.pending() {
            sheet.add(&metrics::SINK_PENDING, &[&sink], pending);
            sheet.add(&metrics::SINK_LAPPED, &[&sink], lapped);
        }
    }
}

/// The counters of one sink; they stay when the sink goes, as a counter must not fall.
pub(super) fn export_sink(metrics: &Metrics, name: &str, stats: Arc<SinkStats>) {
    let sink = name.to_owned();
    metrics.register(&format!("sink {name}"), move |sheet| {
        sheet.add(&metrics::SINK_ACKED, &[&sink], stats.records_acked.get());
        sheet.add(&metrics::SINK_BYTES, &[&sink], stats.bytes.get());
        sheet.add(&metrics::SINK_ERRORS, &[&sink, "deliver"], stats.errors.get());
        sheet.add(&metrics::SINK_ERRORS, &[&sink, "rotate"], stats.rotate_errors.get());
        sheet.add(&metrics::SINK_ERRORS, &[&sink, "archive"], stats.archive_errors.get());
        sheet.add(&metrics::SINK_ROTATIONS, &[&sink], stats.rotated.get());
        sheet.add(&metrics::SINK_REOPENED, &[&sink], stats.reopened.get());
        sheet.add(&metrics::SINK_BUSY, &[&sink], stats.busy.get());
        sheet.add(&metrics::SINK_TORN, &[&sink], stats.torn_bytes.get());
        sheet.add(&metrics::SINK_COMPRESSED, &[&sink], stats.compressed.get());
        sheet.add(&metrics::SINK_REMOVED, &[&sink], stats.removed.get());
    });
}

/// What does not add up after a drain, in words for the log. Two equations: what came in was
/// appended, and what was appended was delivered, to every sink.
pub(super) fn balance(
    pipeline: &PipelineStats,
    spool: &Spool,
    reports: &[SinkReport],
) -> Vec<String> {
    let tally = spool.tally();
    // With `drop_newest` giving records up is what was asked for.
    let given_up = match spool.config().when_full {
        WhenFull::DropNewest => 0,
        WhenFull::Block | WhenFull::DropOldest => tally.dropped_newest,
    };
    let mut wrong = Vec::new();
    let made = pipeline.expected_records() + tally.gaps;
    let lost = of(&pipeline.lost_at_stop);
    let kept = tally.appended + tally.dropped_newest;
    if made != kept + lost {
        wrong
            .push(format!("{made} records were made, but {kept} kept and {lost} lost at the stop"));
    }
    if lost > 0 {
        wrong.push(format!("{lost} records were lost because the spool was closed"));
    }
    if given_up > 0 {
        wrong.push(format!(
            "{given_up} records were given up, because the sinks were too slow for the stop; a gap \
             record says so"
        ));
    }
    for report in reports {
        wrong.extend(undelivered(report));
    }
    wrong
}

fn undelivered(report: &SinkReport) -> Option<String> {
    let name = &report.name;
    match &report.outcome {
        Outcome::Drained | Outcome::Gone(_) => None,
        Outcome::Fatal(why) => Some(format!("sink {name} failed: {why}")),
        Outcome::Deadline | Outcome::Stuck => Some(format!(
            "{} records were not delivered to sink {name} in time; a spool in memory ends with the agent",
            report.pending
        )),
    }
}
