//! Counters and gauges: everything that moves has one.
//!
//! Those who count keep plain atomics of their own; a *source* reads them when someone asks. So
//! counting costs an addition, and nothing here is locked on the way of an event. The names stand in
//! one visible list, and a source can add to no other.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tracing::info;

use super::logs::COUNTERS_TARGET;

/// Stands before every name.
const PREFIX: &str = "conntrail";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises; its name gets `_total`.
    Counter,
    Gauge,
}

/// A name and what it means.
#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// Every sample has these, in this order.
    pub labels: &'static [&'static str],
}

macro_rules! metrics {
    ($($id:ident $kind:ident $name:literal [$($label:literal)*] $help:literal)*) => {
        $(
            #[doc = $help]
            pub static $id: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                help: $help,
                labels: &[$($label),*],
            };
        )*

        /// Every metric there is.
        pub static ALL: &[&Metric] = &[$(&$id),*];
    };
}

metrics! {
    BUILD_INFO Gauge "build_info" ["version"] "1, with the version"
    EVENTS_RECEIVED Counter "events_received" ["netns" "type"] "Events taken from the kernel"
    BYTES_RECEIVED Counter "bytes_received" ["netns"] "Bytes of events taken from the kernel"
    SOCKET_DROPS Counter "netlink_socket_drops" ["netns" "socket"]
        "Events that the kernel counted as dropped (SK_MEMINFO_DROPS)"
    SOCKET_TRUNCATED Counter "netlink_messages_truncated" ["netns" "socket"]
        "Messages too long for the buffer: lost, and in gap records"
    CAPTURE_ROUNDS Counter "capture_rounds" ["netns"] "Times that the sockets were read until empty"
    SOCKET_RETRIES Counter "netlink_socket_retries" ["netns"]
        "Drops on the reliable socket, which the kernel delivers again"
    RECEIVE_QUEUE Gauge "netlink_receive_queue_bytes" ["netns" "socket"]
        "Receive memory in use (SK_MEMINFO_RMEM_ALLOC)"
    RECEIVE_BUFFER Gauge "netlink_receive_buffer_bytes" ["netns" "socket"]
        "Receive memory allowed (SK_MEMINFO_RCVBUF)"
    ENTRIES Gauge "conntrack_entries" ["netns"] "Entries of the table (nf_conntrack_count)"
    ENTRIES_LIMIT Gauge "conntrack_entries_limit" [] "nf_conntrack_max, of the whole host"
    RELIABLE Gauge "reliable_mode_active" ["netns"] "1 while the kernel keeps what we could not take"
    VALVE_OPENS Counter "valve_opens" ["netns"]
        "Times that reliable mode was given up so that the table does not fill"
    GUARD_STARTS Counter "valve_guard_starts" ["netns"]
        "Times that the valve's process was started: more than once means that it ended"
    QUEUE_BYTES Gauge "queue_bytes" [] "Raw events between capture and pipeline"
    MALFORMED Counter "messages_malformed" ["reason"] "Messages that were refused"
    UNKNOWN_ATTRIBUTES Counter "attributes_unknown" [] "Attributes that were skipped"
    UNKNOWN_MESSAGES Counter "messages_unknown" [] "Messages that were skipped"
    FORGOTTEN Counter "flows_forgotten" []
        "Flows whose helper, labels, secctx or master were forgotten before their end"
    FILTERED Counter "events_filtered" [] "Events that the filter does not want"
    GAP_RECORDS Counter "gap_records" ["cause"] "Gap records"
    GAP_EVENTS Counter "gap_events" ["cause" "precision"] "Events that gap records stand for"
    APPENDED Counter "records_appended" [] "Records given a number"
    DROPPED Counter "records_dropped" ["reason"] "Records given up by the full spool"
    SPOOL_BYTES Gauge "spool_bytes" [] "What the spool holds"
    SPOOL_LIMIT Gauge "spool_limit_bytes" [] "What the spool may hold"
    SINK_ACKED Counter "sink_records_acked" ["sink"] "Records delivered"
    SINK_BYTES Counter "sink_bytes_written" ["sink"] "Bytes delivered"
    SINK_PENDING Gauge "sink_records_pending" ["sink"] "Records not yet delivered"
    SINK_LAPPED Counter "sink_records_lapped" ["sink"]
        "Records that the full spool gave up before the sink had them"
    SINK_ERRORS Counter "sink_errors" ["sink" "class"] "Deliveries that failed"
    SINK_ROTATIONS Counter "sink_rotations" ["sink"] "Files begun anew"
    SINK_REOPENED Counter "sink_reopened" ["sink"] "Files closed and opened again"
    SINK_BUSY Counter "sink_busy" ["sink"] "Times that the reader took nothing for a while"
    SINK_TORN Counter "sink_torn_bytes" ["sink"] "Bytes of torn lines cut off files"
    SINK_COMPRESSED Counter "sink_files_compressed" ["sink"] "Rotated files compressed"
    SINK_REMOVED Counter "sink_files_removed" ["sink"]
        "Rotated files removed because there were more than `keep`"
    RELOADS Counter "configuration_reloads" ["result"] "Configurations read again"
}

/// What a source writes into.
#[derive(Debug, Default)]
pub struct Sheet {
    /// By name; then by the labels' values.
    families: BTreeMap<&'static str, (&'static Metric, BTreeMap<Vec<String>, u64>)>,
}

impl Sheet {
    /// Adds to the sample with these labels: two sources may share one.
    pub fn add(&mut self, metric: &'static Metric, labels: &[&str], value: u64) {
        assert_eq!(labels.len(), metric.labels.len(), "labels of {}", metric.name);
        let (_, samples) =
            self.families.entry(metric.name).or_insert_with(|| (metric, BTreeMap::new()));
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        let sample: &mut u64 = samples.entry(labels).or_default();
        *sample = sample.saturating_add(value);
    }
}

type Source = Box<dyn Fn(&mut Sheet) + Send + Sync>;

/// The sources, asked anew each time.
#[derive(Clone, Default)]
struct Sources(Arc<Mutex<BTreeMap<String, Source>>>);

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(sources.keys()).finish()
    }
}

/// The registry. Cloning gives another handle to the same.
#[derive(Clone, Debug)]
pub struct Metrics {
    sources: Sources,
    registry: Arc<Registry>,
}

impl Metrics {
    pub fn new() -> Self {
        let sources = Sources::default();
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(sources.clone()));
        let metrics = Metrics { sources, registry: Arc::new(registry) };
        metrics.register("build", |sheet| {
            sheet.add(&BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1);
        });
        metrics
    }

    /// Has `source` asked from now on, in place of an earlier one of that name: a reload brings new
    /// sinks. A counter must not fall when its source is replaced, so new stats go on from the old.
    pub fn register(&self, name: &str, source: impl Fn(&mut Sheet) + Send + Sync + 'static) {
        let mut sources = self.sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.insert(name.to_owned(), Box::new(source));
    }

    /// All of it in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("a String takes whatever is written to it");
        text
    }

    /// One sample a line, without comments.
    pub fn lines(&self) -> Vec<String> {
        let text = self.render();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    /// Writes every sample to the log: at the end and on SIGUSR1.
    pub fn print(&self) {
        for line in self.lines() {
            info!(target: COUNTERS_TARGET, "{line}");
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut sheet = Sheet::default();
        for source in self.0.lock().unwrap_or_else(PoisonError::into_inner).values() {
            source(&mut sheet);
        }
        for (metric, samples) in sheet.families.values() {
            match metric.kind {
                Kind::Counter => put(&mut encoder, metric, samples, ConstCounter::new)?,
                Kind::Gauge => put(&mut encoder, metric, samples, |value| {
                    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
                })?,
            }
        }
        Ok(())
    }
}

fn put<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    metric: &Metric,
    samples: &BTreeMap<Vec<String>, u64>,
    made: impl Fn(u64) -> M,
) -> Result<(), fmt::Error> {
    let kind = made(0).metric_type();
    let mut family: MetricEncoder<'_> =
        encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
    for (values, value) in samples {
        let labels: Vec<(&str, &str)> =
            metric.labels.iter().copied().zip(values.iter().map(String::as_str)).collect();
        if labels.is_empty() {
            // encode_family writes `{}` for no labels.
            made(*value).encode(family)?;
            return Ok(());
        }
        made(*value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn names_are_used_once_and_say_what_they_mean() {
        let mut names: Vec<_> = ALL.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            assert!(!metric.help.is_empty() && !metric.help.ends_with('.'), "{}", metric.name);
            assert!(!metric.name.ends_with("_total"), "{}", metric.name);
        }
    }

    #[test]
    fn sources_are_read_when_asked() {
        let metrics = Metrics::new();
        let received = Arc::new(AtomicU64::new(0));
        let counter = received.clone();
        metrics.register("capture", move |sheet| {
            let count = counter.load(Ordering::Relaxed);
            sheet.add(&EVENTS_RECEIVED, &["self", "new"], count);
            sheet.add(&APPENDED, &[], 7);
        });
        received.store(41, Ordering::Relaxed);
        let line = "conntrail_events_received_total{netns=\"self\",type=\"new\"} 41";
        assert!(metrics.lines().iter().any(|found| found == line));
        received.fetch_add(1, Ordering::Relaxed);
        let text = metrics.render();
        assert!(text.contains("type=\"new\"} 42\n"), "{text}");
        assert!(text.contains("\nconntrail_records_appended_total 7\n"), "{text}");
        assert!(text.contains("# TYPE conntrail_records_appended counter\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn two_sinks_make_one_family() {
        let metrics = Metrics::new();
        for sink in ["a", "b"] {
            metrics.register(sink, move |sheet| sheet.add(&SINK_PENDING, &[sink], 1));
        }
        let text = metrics.render();
        assert_eq!(text.matches("# TYPE conntrail_sink_records_pending gauge").count(), 1);
        assert_eq!(text.matches("conntrail_sink_records_pending{sink=").count(), 2);
    }

    #[test]
    fn a_source_is_replaced_by_its_name() {
        let metrics = Metrics::new();
        metrics.register("spool", |sheet| sheet.add(&SPOOL_BYTES, &[], 1));
        metrics.register("spool", |sheet| sheet.add(&SPOOL_BYTES, &[], 2));
        assert!(metrics.lines().contains(&"conntrail_spool_bytes 2".to_owned()));
    }

    #[test]
    fn the_largest_count_is_written_whole() {
        let metrics = Metrics::new();
        metrics.register("x", |sheet| {
            sheet.add(&APPENDED, &[], u64::MAX);
            sheet.add(&APPENDED, &[], 1);
            sheet.add(&SPOOL_BYTES, &[], u64::MAX);
        });
        let lines = metrics.lines();
        assert!(lines.contains(&format!("conntrail_records_appended_total {}", u64::MAX)));
        assert!(lines.contains(&format!("conntrail_spool_bytes {}", i64::MAX)));
    }

    #[test]
    fn lines_have_no_comments() {
        let lines = Metrics::new().lines();
        assert_eq!(
            lines,
            [format!("conntrail_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))]
        );
    }
}
