//! The sinks of the configuration: started, followed through reloads, drained.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::config::{FieldChoice, SinkSettings, SinkTarget};
use crate::flow::{FieldSet, Identity};
use crate::sink::{
    FileSink, Sink, SinkHandle, SinkParts, SinkReport, SinkStats, StdoutSink, start,
};
use crate::spool::Spool;
use crate::telemetry::metrics::Metrics;

use super::{AgentError, metering};

/// How long a sink that the configuration no longer has may still deliver.
const RETIRE_WITHIN: Duration = Duration::from_secs(30);

/// How much longer than its deadline a sink's thread is waited for.
const GRACE: Duration = Duration::from_millis(500);

/// What is left when a sink ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    Others,
    /// No other, and the reader of stdout went away.
    NoReader,
    None,
}

pub(super) struct Sinks {
    running: Vec<(SinkSettings, SinkHandle)>,
    spool: Arc<Spool>,
    identity: Arc<Identity>,
    metrics: Metrics,
    report: mpsc::UnboundedSender<SinkReport>,
    reports: mpsc::UnboundedReceiver<SinkReport>,
}

impl Sinks {
    pub(super) fn start(
        settings: &[SinkSettings],
        spool: &Arc<Spool>,
        identity: Arc<Identity>,
        metrics: &Metrics,
    ) -> Result<Self, AgentError> {
        let (report, reports) = mpsc::unbounded_channel();
        let mut sinks = Sinks {
            running: Vec::new(),
            spool: spool.clone(),
            identity,
            metrics: metrics.clone(),
            report,
            reports,
        };
        for settings in settings {
            sinks.add(settings).map_err(AgentError::io("cannot start a sink"))?;
        }
        Ok(sinks)
    }

    /// A sink that ended by itself.
    pub(super) async fn ended(&mut self) -> SinkReport {
        self.reports.recv().await.expect("a sender lives beside the receiver")
    }

    /// Goes on without a sink that ended.
    pub(super) fn without(&mut self, report: &SinkReport) -> Left {
        let mut gone = self.running.extract_if(.., |(settings, _)| settings.name == report.name);
        let target = gone.next().map(|(settings, _)| settings.target);
        drop(gone);
        match target {
            // One that was retired is not among the running ones any more.
            None => Left::Others,
            Some(_) if !self.running.is_empty() => Left::Others,
            Some(SinkTarget::Stdout) => Left::NoReader,
            Some(SinkTarget::File(_)) => Left::None,
        }
    }

    pub(super) fn reopen(&self) {
        for (_, handle) in &self.running {
            handle.reopen();
        }
    }

    /// Makes the running sinks those of `settings`. One that did not change is reopened, one that
    /// changed goes on at its place in the log.
    pub(super) fn apply(&mut self, settings: &[SinkSettings]) {
        let gone =
            self.running.extract_if(.., |(old, _)| settings.iter().all(|new| new.name != old.name));
        for (old, handle) in gone {
            tracing::info!(sink = old.name, "sink removed");
            handle.retire(Instant::now() + RETIRE_WITHIN);
        }
        for new in settings {
            if let Err(error) = self.follow(new) {
                tracing::error!(sink = new.name, %error, "the sink could not be changed");
            }
        }
    }

    fn follow(&mut self, new: &SinkSettings) -> std::io::Result<()> {
        match self.running.iter_mut().find(|(old, _)| old.name == new.name) {
            None => {
                tracing::info!(sink = new.name, "sink added");
                self.add(new)
            }
            Some((old, handle)) if old == new => {
                handle.reopen();
                Ok(())
            }
            Some((old, handle)) => {
                handle.replace(parts(new, handle.stats())?);
                tracing::info!(sink = new.name, "sink changed");
                *old = new.clone();
                Ok(())
            }
        }
    }

    fn add(&mut self, settings: &SinkSettings) -> std::io::Result<()> {
        let stats = Arc::new(SinkStats::default());
        metering::export_sink(&self.metrics, &settings.name, stats.clone());
        let parts = parts(settings, &stats)?;
        let report = self.report.clone();
        let handle = start(
            self.spool.cursor(&settings.name),
            parts,
            self.identity.clone(),
            stats,
            move |ended| {
                // Nobody listens while the agent stops; then `stop` has the reports.
                let _ = report.send(ended.clone());
            },
        )?;
        self.running.push((settings.clone(), handle));
        Ok(())
    }

    /// Drains all sinks until `deadline`. The spool must have been closed.
    pub(super) async fn stop(self, deadline: Instant) -> Vec<SinkReport> {
        for (_, handle) in &self.running {
            handle.stop(deadline);
        }
        let handles: Vec<_> = self.running.into_iter().map(|(_, handle)| handle).collect();
        let joined = tokio::task::spawn_blocking(move || {
            let until = deadline + GRACE;
            let left = || until.saturating_duration_since(Instant::now());
            handles.into_iter().map(|handle| handle.join(left())).collect()
        });
        joined.await.expect("joining does not panic")
    }
}

fn parts(settings: &SinkSettings, stats: &Arc<SinkStats>) -> std::io::Result<SinkParts> {
    let sink: Box<dyn Sink> = match &settings.target {
        SinkTarget::Stdout => Box::new(StdoutSink::new()?),
        SinkTarget::File(file) => Box::new(FileSink::new(file.clone(), stats.clone())),
    };
    Ok(SinkParts { sink, format: settings.format.build(fields(&settings.fields)) })
}

fn fields(choice: &FieldChoice) -> FieldSet {
    match choice {
        FieldChoice::Full => FieldSet::FULL,
        FieldChoice::Audit => FieldSet::audit(),
        FieldChoice::Accounting => FieldSet::accounting(),
        FieldChoice::List(names) => FieldSet::list(names.iter().map(String::as_str))
            .expect("the configuration refuses names that no field has"),
    }
}
