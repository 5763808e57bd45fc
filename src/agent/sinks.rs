//! The sinks of the configuration: started, followed through reloads, drained.
//!
//! Promises: a sink that a reload renames, or removes and puts back before it has ended, is kept with
//! its place in the log: no record goes to its target twice, and none is left out. One that is
//! removed delivers what there is for a bounded time, which a stop waits for too. Counters of a name
//! never fall.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

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
    retiring: Vec<Retiring>,
    /// By name; kept when the sink goes.
    stats: HashMap<String, Arc<SinkStats>>,
    spool: Arc<Spool>,
    identity: Arc<Identity>,
    metrics: Metrics,
    report: mpsc::UnboundedSender<SinkReport>,
    reports: mpsc::UnboundedReceiver<SinkReport>,
}

/// One that the configuration no longer has, on its last records.
struct Retiring {
    settings: SinkSettings,
    handle: SinkHandle,
    deadline: Instant,
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
            retiring: Vec::new(),
            stats: HashMap::new(),
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
        self.retiring.retain(|retiring| retiring.handle.id() != report.id);
        let mut gone = self.running.extract_if(.., |(_, handle)| handle.id() == report.id);
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
        let running = self.running.iter().map(|(_, handle)| handle);
        for handle in running.chain(self.retiring.iter().map(|retiring| &retiring.handle)) {
            handle.reopen();
        }
    }

    /// Makes the running sinks those of `settings`. One that did not change is reopened, one that
    /// changed goes on at its place in the log. A new one takes over one that goes, or is still
    /// going, when that has its name or else its target: two writers would tear each other's lines.
    pub(super) fn apply(&mut self, settings: &[SinkSettings]) {
        for retiring in &self.retiring {
            retiring.handle.reopen();
        }
        let is_gone = |old: &SinkSettings| settings.iter().all(|new| new.name != old.name);
        let mut gone: Vec<_> = self.running.extract_if(.., |(old, _)| is_gone(old)).collect();
        for new in settings {
            if let Err(error) = self.follow(new, &mut gone) {
                tracing::error!(sink = new.name, %error, "the sink could not be changed");
            }
        }
        for (old, handle) in gone {
            tracing::info!(sink = old.name, "sink removed");
            let deadline = Instant::now() + RETIRE_WITHIN;
            handle.retire(deadline);
            self.retiring.push(Retiring { settings: old, handle, deadline });
        }
    }

    fn follow(
        &mut self,
        new: &SinkSettings,
        gone: &mut Vec<(SinkSettings, SinkHandle)>,
    ) -> std::io::Result<()> {
        let stats = self.stats(&new.name);
        if let Some((old, handle)) = self.running.iter_mut().find(|(old, _)| old.name == new.name) {
            if old == new {
                handle.reopen();
            } else if handle.replace(parts(new, stats)?).is_ok() {
                tracing::info!(sink = new.name, "sink changed");
                *old = new.clone();
            }
            // Else it has just ended: its report comes, as if a moment later.
            return Ok(());
        }
        let Some((old, mut handle)) = self.take_over(new, gone) else {
            tracing::info!(sink = new.name, "sink added");
            return self.add(new);
        };
        if handle.replace(parts(new, stats)?).is_err() {
            // It was too late to keep it: it has delivered all it had, or its time was over.
            tracing::info!(sink = new.name, "sink added");
            return self.add(new);
        }
        if old.name == new.name {
            tracing::info!(sink = new.name, "sink put back");
        } else {
            tracing::info!(sink = new.name, before = old.name, "sink renamed");
        }
        self.running.push((new.clone(), handle));
        Ok(())
    }

    /// The sink that goes and that `new` is to go on with.
    fn take_over(
        &mut self,
        new: &SinkSettings,
        gone: &mut Vec<(SinkSettings, SinkHandle)>,
    ) -> Option<(SinkSettings, SinkHandle)> {
        let same_name = |old: &SinkSettings| old.name == new.name;
        if let Some(at) = self.retiring.iter().position(|old| same_name(&old.settings)) {
            let Retiring { settings, handle, .. } = self.retiring.remove(at);
            return Some((settings, handle));
        }
        if let Some(at) = gone.iter().position(|(old, _)| same_target(old, new)) {
            return Some(gone.remove(at));
        }
        let at = self.retiring.iter().position(|old| same_target(&old.settings, new))?;
        let Retiring { settings, handle, .. } = self.retiring.remove(at);
        Some((settings, handle))
    }

    /// The counters of that name, which are exported from its first use on.
    fn stats(&mut self, name: &str) -> Arc<SinkStats> {
        if let Some(stats) = self.stats.get(name) {
            return stats.clone();
        }
        let stats = Arc::new(SinkStats::default());
        metering::export_sink(&self.metrics, name, stats.clone());
        self.stats.insert(name.to_owned(), stats.clone());
        stats
    }

    fn add(&mut self, settings: &SinkSettings) -> std::io::Result<()> {
        let parts = parts(settings, self.stats(&settings.name))?;
        let report = self.report.clone();
        let cursor = self.spool.cursor(&settings.name);
        let handle = start(cursor, parts, self.identity.clone(), move |ended| {
            // Nobody listens while the agent stops; then `stop` has the reports.
            let _ = report.send(ended.clone());
        })?;
        self.running.push((settings.clone(), handle));
        Ok(())
    }

    /// Drains all sinks until `deadline`, also those that go. The spool must have been closed.
    pub(super) async fn stop(self, deadline: Instant) -> Result<Vec<SinkReport>, String> {
        for (_, handle) in &self.running {
            handle.stop(deadline);
        }
        let mut handles: Vec<_> = self.running.into_iter().map(|(_, handle)| handle).collect();
        for Retiring { handle, deadline: until, .. } in self.retiring {
            handle.retire(until.min(deadline));
            handles.push(handle);
        }
        // No spawn_blocking: the end of the runtime waits for those, and a second signal must not.
        let (done, joined) = oneshot::channel();
        let thread = std::thread::Builder::new().name("joiner".into()).spawn(move || {
            let until = deadline + GRACE;
            let left = || until.saturating_duration_since(Instant::now());
            let reports: Vec<_> = handles.into_iter().map(|handle| handle.join(left())).collect();
            // Nobody waits any more after a second signal.
            let _ = done.send(reports);
        });
        thread.map_err(|error| format!("no thread to wait for the sinks: {error}"))?;
        Ok(joined.await.expect("joining does not panic"))
    }
}

fn same_target(old: &SinkSettings, new: &SinkSettings) -> bool {
    match (&old.target, &new.target) {
        (SinkTarget::Stdout, SinkTarget::Stdout) => true,
        (SinkTarget::File(old), SinkTarget::File(new)) => old.path == new.path,
        (SinkTarget::Stdout, SinkTarget::File(_)) | (SinkTarget::File(_), SinkTarget::Stdout) => {
            false
        }
    }
}

fn parts(settings: &SinkSettings, stats: Arc<SinkStats>) -> std::io::Result<SinkParts> {
    let sink: Box<dyn Sink> = match &settings.target {
        SinkTarget::Stdout => Box::new(StdoutSink::new()?),
        SinkTarget::File(file) => Box::new(FileSink::new(file.clone(), stats.clone())),
    };
    let format = settings.format.build(fields(&settings.fields));
    Ok(SinkParts { name: settings.name.clone(), sink, format, stats })
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
