//! The agent's log: `tracing` to stderr, as text for people or one JSON object a line.
//!
//! Records never go here, and nothing is logged for an event. What can happen again and again is
//! logged through [`Recurring`].

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::{LogFormat, LogLevel, TelemetrySettings};

/// Overrides `[telemetry] log`, with tracing's directives: `debug`, `conntrail::sink=trace`.
pub const ENV: &str = "CONNTRAIL_LOG";

/// Counters are printed because someone asked; only `log = "off"` silences them.
pub const COUNTERS_TARGET: &str = "conntrail::counters";

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{ENV}: {0}")]
    Environment(String),
    #[error("the log is set up already")]
    Twice,
}

/// Starts logging, once a process. `settings` come from the configuration, `CONNTRAIL_LOG` wins.
pub fn start(settings: TelemetrySettings) -> Result<(), LogError> {
    let directives = match std::env::var(ENV) {
        Ok(directives) if !directives.trim().is_empty() => Some(directives),
        Ok(_) | Err(std::env::VarError::NotPresent) => None,
        Err(error) => return Err(LogError::Environment(error.to_string())),
    };
    let filter = filter(settings.log, directives.as_deref())?;
    // The journal dates each line itself.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match settings.log_format {
        LogFormat::Json => {
            let json = tracing_subscriber::fmt::layer().json().flatten_event(true);
            json.with_current_span(false).with_span_list(false).with_writer(io::stderr).boxed()
        }
        LogFormat::Text => {
            let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            let text = tracing_subscriber::fmt::layer()
                .with_ansi(colours)
                .with_target(false)
                .with_writer(io::stderr);
            if journal { text.without_time().boxed() } else { text.boxed() }
        }
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init()
        .map_err(|_| LogError::Twice)
}

fn filter(level: LogLevel, directives: Option<&str>) -> Result<EnvFilter, LogError> {
    let builder = EnvFilter::builder();
    if let Some(directives) = directives {
        // A bare word that is no level would be taken for a target, and silence all others.
        let bare =
            directives.split(',').map(str::trim).filter(|word| !word.contains(['=', ':', '[']));
        for word in bare {
            word.parse::<LevelFilter>()
                .map_err(|_| LogError::Environment(format!("`{word}` is no level")))?;
        }
        return builder.parse(directives).map_err(|error| LogError::Environment(error.to_string()));
    }
    let filter = builder.with_default_directive(level_filter(level).into()).parse_lossy("");
    if level == LogLevel::Off {
        return Ok(filter);
    }
    let counters: Directive =
        format!("{COUNTERS_TARGET}=info").parse().expect("a target and a level make a directive");
    Ok(filter.add_directive(counters))
}

fn level_filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// When to log what happens again and again: the first time at once, then at most once an interval
/// with how often it happened meanwhile. Policy only: the caller has the clock and does the logging.
///
/// ```
/// # use conntrail::telemetry::Recurring;
/// # use std::time::Instant;
/// let mut trouble = Recurring::default();
/// if let Some(more) = trouble.happened(Instant::now()) {
///     tracing::warn!(more, "the disk is full");
/// }
/// ```
#[derive(Debug)]
pub struct Recurring {
    interval: Duration,
    said: Option<Instant>,
    unsaid: u64,
}

impl Recurring {
    /// Twice a minute: seen soon enough, and some 3,000 lines a day at worst.
    pub const INTERVAL: Duration = Duration::from_secs(30);

    pub fn new(interval: Duration) -> Self {
        Recurring { interval, said: None, unsaid: 0 }
    }

    /// It happened. `Some(n)`: log it now; it happened `n` times more since it was last logged.
    pub fn happened(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|said| now.saturating_duration_since(said) < self.interval) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }

    /// It is over: what was not logged yet, and the next time counts as the first.
    pub fn over(&mut self) -> u64 {
        self.said = None;
        std::mem::take(&mut self.unsaid)
    }
}

impl Default for Recurring {
    fn default() -> Self {
        Self::new(Self::INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_word_that_is_no_level_is_refused_and_does_not_silence_the_log() {
        assert!(filter(LogLevel::Info, Some("loud")).is_err());
        assert!(filter(LogLevel::Info, Some("info,foo")).is_err());
        assert!(filter(LogLevel::Info, Some("debug,conntrail::sink=trace")).is_ok());
    }

    #[test]
    fn the_first_is_said_at_once_then_a_count_each_interval() {
        let start = Instant::now();
        let mut trouble = Recurring::default();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(trouble.happened(start), Some(0));
        for second in 1..30 {
            assert_eq!(trouble.happened(at(second)), None);
        }
        assert_eq!(trouble.happened(at(30)), Some(29));
        assert_eq!(trouble.happened(at(31)), None);
        assert_eq!(trouble.over(), 1);
        assert_eq!(trouble.happened(at(32)), Some(0));
    }

    #[test]
    fn a_clock_that_stands_still_says_it_once() {
        let now = Instant::now();
        let mut trouble = Recurring::default();
        let said = (0..1000).filter(|_| trouble.happened(now).is_some()).count();
        assert_eq!(said, 1);
    }

    #[test]
    fn counters_pass_every_level_but_off() {
        for (name, level) in LogLevel::ALL {
            let text = filter(*level, None).unwrap().to_string();
            assert_eq!(text.contains(COUNTERS_TARGET), *level != LogLevel::Off, "{name}: {text}");
        }
    }

    #[test]
    fn a_wrong_environment_is_an_error() {
        assert!(filter(LogLevel::Info, Some("conntrail=loud")).is_err());
        assert!(filter(LogLevel::Info, Some("conntrail::sink=trace,warn")).is_ok());
    }
}
