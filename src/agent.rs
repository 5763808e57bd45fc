//! Wiring only: builds the steps of the way, starts them from the right to the left, and hangs them
//! up from the left to the right.
//!
//! Start: sinks, pipeline, sockets, capture, READY, snapshot. Stop: capture, queue, spool, sinks,
//! each for a bounded time, so that an agent whose sink hangs ends all the same.

mod events;
mod host;
pub(crate) mod identity;
mod metering;
mod reload;
mod sinks;
mod snapshot;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::capture::{
    Capture, CaptureConfig, CaptureError, CaptureHandle, Events, Item, KernelFilter, Program,
    Sender, ValveConfig, queue,
};
use crate::config::{Config, EventKinds};
use crate::control::{Error as ControlError, Tracking, push, setting};
use crate::flow::{AgentAction, Gap};
use crate::pipeline::{Decoder, Filter, Pipeline, PipelineStats, now};
use crate::spool::{Spool, SpoolClosed};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::notify::Notifier;
use crate::telemetry::signals::{Request, Signals};

use events::EventsSwitch;
use metering::Meters;
use sinks::{Left, Sinks};

/// Raw batches that wait for the pipeline: some 60,000 events, a third of a second of the fastest
/// storm measured.
const QUEUE_BYTES: usize = 16 << 20;

/// How long a stop may take in all; a service manager's patience is longer.
const STOP_WITHIN: Duration = Duration::from_secs(8);

/// How long sinks that stand still hold up a stop, before what has no room in the spool is given up,
/// with a gap record.
const STILL: Duration = Duration::from_secs(2);

/// How long sinks that go on, but slowly, may hold it up: the rest of the time is for what the spool
/// holds by then.
const HURRY_AFTER: Duration = Duration::from_secs(5);

/// What the service manager shows.
const RECORDING: &str = "recording";

/// How often threads that end are looked at while stopping.
const LOOK: Duration = Duration::from_millis(5);

/// Where the configuration came from and what the command line says beside it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The file that a reload reads; `None` when there is none.
    pub config_path: Option<PathBuf>,
    /// The name of the namespace that the process was moved to.
    pub netns: Option<String>,
    /// For someone who looks on (`events`): no records of the agent's own, no counters at the end.
    pub viewer: bool,
}

/// Why the agent did not run, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The host lacks something without which there are no records.
    #[error("{message}")]
    Host { message: String, exit: u8 },
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
    /// It ran, and something broke: the log says what.
    #[error("{0}")]
    Broken(String),
}

impl AgentError {
    fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> AgentError {
        move |source| AgentError::Io { what, source }
    }
}

/// Runs the agent until a signal or a failure ends it. Blocks.
pub fn run(config: Config, options: Options) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::io("cannot start the control runtime"))?;
    let result = runtime.block_on(async {
        let mut agent = Agent::start(config, options).await?;
        let end = agent.serve().await;
        agent.stop(end).await
    });
    // Dropping it would wait for the task that joins the sinks, and a second signal must not wait.
    runtime.shutdown_background();
    result
}

/// Why serving ended.
#[derive(Debug)]
enum End {
    /// Somebody asked for it.
    Asked,
    /// The last sink was stdout and nobody reads it any more, as after `| head`: a quiet end.
    NoReader,
    Broken(String),
}

struct Agent {
    config: Config,
    options: Options,
    signals: Signals,
    notifier: Notifier,
    metrics: Metrics,
    tracking: Option<Tracking>,
    spool: Arc<Spool>,
    sinks: Sinks,
    stats: Arc<PipelineStats>,
    pipeline: JoinHandle<Result<(), SpoolClosed>>,
    capture: CaptureHandle,
    out: Sender,
    events: EventsSwitch,
    /// Gaps that found the queue full.
    unsaid: Vec<Gap>,
    /// When the dump at start began that is under way.
    dumping: Option<u64>,
}

impl Agent {
    async fn start(config: Config, options: Options) -> Result<Self, AgentError> {
        // First, so that a signal during the start is not the default action's.
        let signals = Signals::new().map_err(AgentError::io("cannot catch signals"))?;
        let tracking = host::prepare(&config.capture).await?;
        let (identity, ids) =
            identity::of_this_run(&config.agent_name, options.netns.as_deref())
                .map_err(AgentError::io("cannot tell which namespace and boot this is"))?;

        let netns = identity.netns.clone();
        let metrics = Metrics::new();
        let spool = Spool::new(config.spool);
        let sinks = Sinks::start(&config.sinks, &spool, Arc::new(identity), &metrics)?;
        // Subscribed before anything can fail slowly: from here on the kernel keeps events for us.
        let capture = Capture::new(capture_config(&config))?;
        host::advise_on_buffer(capture.receive_buffer());

        let events = EventsSwitch::new(config.capture.events, now());
        let (out, receiver) = queue(QUEUE_BYTES);
        let stats = Arc::new(PipelineStats::default());
        let in_kernel = capture.filters_in_kernel() && config.filter.fits_the_kernel();
        let decoder = Decoder::new(ids, config.filter.clone(), in_kernel, config.snapshot);
        let pipeline = Pipeline::new(receiver, spool.clone(), stats.clone(), decoder);
        let pipeline = std::thread::Builder::new()
            .name("pipeline".into())
            .spawn(move || pipeline.run())
            .map_err(AgentError::io("cannot start the pipeline's thread"))?;
        if !options.viewer {
            let started = Item::Note { action: AgentAction::Started, at: now() };
            out.push(started).map_err(|closed| AgentError::Broken(closed.to_string()))?;
        }
        let capture = capture.start(out.clone())?;
        let meters = Meters {
            netns,
            capture: capture.stats(),
            queue: out.queue(),
            pipeline: stats.clone(),
            spool: spool.clone(),
        };
        meters.export(&metrics);
        Ok(Agent {
            config,
            options,
            signals,
            notifier: Notifier::new(),
            metrics,
            tracking,
            spool,
            sinks,
            stats,
            pipeline,
            capture,
            out,
            events,
            unsaid: Vec::new(),
            dumping: None,
        })
    }

    async fn serve(&mut self) -> End {
        self.notifier.ready(RECORDING);
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            events = self.config.capture.events.names().collect::<Vec<_>>().join(","),
            "recording"
        );
        let (wanted, out) = (self.config.snapshot, self.out.clone());
        let mut snapshot = std::pin::pin!(async move {
            if wanted {
                snapshot::take(out).await;
            }
        });
        self.dumping = wanted.then(now);
        let mut look = tokio::time::interval(Duration::from_secs(1));
        loop {
            let request = tokio::select! {
                request = self.signals.next() => request,
                () = &mut snapshot, if self.dumping.is_some() => {
                    self.dumping = None;
                    continue;
                }
                report = self.sinks.ended() => match self.sinks.without(&report) {
                    Left::Others => continue,
                    Left::NoReader => return End::NoReader,
                    Left::None => {
                        return End::Broken(format!("the last sink, {}, is gone", report.name));
                    }
                },
                _ = look.tick() => {
                    if let Some(what) = self.broken() {
                        return End::Broken(what);
                    }
                    self.look_at_events();
                    continue;
                }
            };
            match request {
                Request::Stop | Request::StopNow => return End::Asked,
                Request::PrintCounters => self.metrics.print(),
                Request::Reload => {
                    self.notifier.reloading();
                    self.reload().await;
                    self.notifier.ready(RECORDING);
                }
            }
        }
    }

    fn look_at_events(&mut self) {
        // What can't be read is not known to be off.
        let value = setting("nf_conntrack_events").ok().flatten();
        let gap = self.events.look(value, now());
        if gap.is_some() && self.events.went_off() {
            tracing::warn!(
                "nf_conntrack_events is 0: flows that begin now make no events, and a gap record says \
                 so. Mend it: sysctl -w net.netfilter.nf_conntrack_events=1"
            );
        }
        self.unsaid.extend(gap);
        // A queue that is full just now gets them at a later look, or at the end; one that is closed
        // never, and its end is seen elsewhere.
        let full = |gap: &mut Gap| matches!(self.out.try_push(Item::Gap(*gap)), Ok(None));
        self.unsaid.extract_if(.., full).for_each(drop);
    }

    /// A thread that ended by itself ends the agent: half an agent would look alive.
    fn broken(&self) -> Option<String> {
        if self.capture.is_finished() {
            return Some("the capture thread ended".to_owned());
        }
        self.pipeline.is_finished().then(|| "the pipeline's thread ended".to_owned())
    }

    async fn stop(mut self, end: End) -> Result<(), AgentError> {
        self.notifier.stopping();
        let why = match &end {
            End::Asked => "asked to".to_owned(),
            End::NoReader => "nobody reads stdout any more".to_owned(),
            End::Broken(what) => what.clone(),
        };
        tracing::info!(why, "stopping");
        let mut signals = self.signals;
        let tracking = self.tracking.take();
        let drain = Drain {
            capture: self.capture,
            pipeline: self.pipeline,
            out: self.out,
            spool: self.spool,
            sinks: self.sinks,
            stats: self.stats,
            metrics: self.metrics,
            viewer: self.options.viewer,
            dumping: self.dumping,
            events: self.events,
            unsaid: self.unsaid,
        };
        let drained = tokio::select! {
            drained = drain.run() => drained,
            () = second(&mut signals) => {
                Err("stopped at once, on the second signal: records may be lost".to_owned())
            }
        };
        if let Some(Err(error)) = tracking.map(Tracking::undo) {
            tracing::warn!(%error, "tracking could not be switched off again");
        }
        match (end, drained) {
            (_, Err(lost)) => Err(AgentError::Broken(lost)),
            (End::Broken(what), Ok(())) => Err(AgentError::Broken(what)),
            (End::Asked | End::NoReader, Ok(())) => Ok(()),
        }
    }
}

async fn second(signals: &mut Signals) {
    while !matches!(signals.next().await, Request::Stop | Request::StopNow) {}
}

/// The stop: what is hung up, from the left to the right.
struct Drain {
    capture: CaptureHandle,
    pipeline: JoinHandle<Result<(), SpoolClosed>>,
    out: Sender,
    spool: Arc<Spool>,
    sinks: Sinks,
    stats: Arc<PipelineStats>,
    metrics: Metrics,
    viewer: bool,
    dumping: Option<u64>,
    events: EventsSwitch,
    unsaid: Vec<Gap>,
}

impl Drain {
    async fn run(self) -> Result<(), String> {
        let begun = Instant::now();
        let (hurry, deadline) = (begun + HURRY_AFTER, begun + STOP_WITHIN);
        let mut failures = Vec::new();

        self.capture.stop();
        wait(&self.spool, hurry, || self.capture.is_finished()).await;
        if let Err(error) = self.capture.join() {
            failures.push(format!("capture failed: {error}"));
        }
        let at = now();
        let cut = self.dumping.map(|from| Item::SnapshotEnd { complete: false, from, at });
        let gaps = self.unsaid.into_iter().chain(self.events.end(at)).map(Item::Gap);
        let stopped = Item::Note { action: AgentAction::Stopped, at };
        let words = cut.into_iter().chain(gaps).chain((!self.viewer).then_some(stopped));
        last_words(&self.out, &self.spool, hurry, words).await;
        drop(self.out);
        wait(&self.spool, hurry, || self.pipeline.is_finished()).await;
        match self.pipeline.join() {
            Ok(Ok(())) => {}
            Ok(Err(closed)) => failures.push(closed.to_string()),
            Err(_) => failures.push("the pipeline's thread panicked".to_owned()),
        }
        self.spool.close(now());
        match self.sinks.stop(deadline).await {
            Ok(reports) => {
                failures.extend(metering::balance(&self.stats, &self.spool, &reports));
            }
            Err(error) => failures.push(error),
        }
        if !self.viewer {
            self.metrics.print();
        }
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }
}

/// What stands behind the last event. A full queue is waited for only so long.
async fn last_words(
    out: &Sender,
    spool: &Spool,
    hurry: Instant,
    words: impl Iterator<Item = Item>,
) {
    for item in words {
        // Closed: the pipeline is gone, and its end says why.
        if tokio::time::timeout_at(hurry.into(), push(out, item)).await.is_err() {
            spool.hurry();
        }
    }
}

/// Waits until `ended`. When that takes too long, nothing waits for room in the spool any more: then
/// it ends.
async fn wait(spool: &Spool, hurry: Instant, ended: impl Fn() -> bool) {
    let (mut progress, mut moved) = (spool.progress(), Instant::now());
    while !ended() {
        let (seen, now) = (spool.progress(), Instant::now());
        if seen != progress {
            (progress, moved) = (seen, now);
        }
        if now >= hurry || now.saturating_duration_since(moved) >= STILL {
            spool.hurry();
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn capture_config(config: &Config) -> CaptureConfig {
    CaptureConfig {
        events: wanted(config.capture.events),
        reliable: config.capture.reliable,
        receive_buffer: config.capture.receive_buffer,
        filter: kernel_filter(&config.filter),
        valve: ValveConfig::default(),
        guard_program: None,
    }
}

fn wanted(kinds: EventKinds) -> Events {
    let mut events = Events::empty();
    events.set(Events::NEW, kinds.new);
    events.set(Events::UPDATE, kinds.update);
    events.set(Events::DESTROY, kinds.destroy);
    events.set(Events::EXPECT, kinds.expect);
    events
}

/// What of the filter the kernel can do for us; `None` when it can do nothing.
fn kernel_filter(filter: &Filter) -> Option<Program> {
    let kernel = KernelFilter {
        protocols: filter.protocols.clone(),
        include: filter.include.clone(),
        exclude: filter.exclude.clone(),
    };
    kernel.compile()
}
