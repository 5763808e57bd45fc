//! Signals as requests: SIGTERM and SIGINT stop, the second one at once; SIGHUP reloads; SIGUSR1
//! prints the counters.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What someone asks of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Drain in bounded time and end.
    Stop,
    /// End now; what is left is given up.
    StopNow,
    /// Reopen files, read the configuration again.
    Reload,
    PrintCounters,
}

/// Within this time the same signal to stop is the one before it once more: timeout(1) signals its child and
/// then the whole process group, and so does a terminal together with a wrapper that passes it on.
/// Nobody presses Ctrl-C twice that fast.
const SAME_STOP: Duration = Duration::from_millis(200);

/// The stream of requests. From its making on no signal of these ends the process by itself.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    stop_asked: Option<(SignalKind, Instant)>,
}

impl Signals {
    /// Needs a tokio runtime with I/O.
    pub fn new() -> io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            stop_asked: None,
        })
    }

    /// The next request. Dropping the future loses none.
    pub async fn next(&mut self) -> Request {
        loop {
            // Those that stop come first: a flood of others must not keep the agent alive.
            let request = tokio::select! {
                biased;
                _ = self.terminate.recv() => self.stop(SignalKind::terminate(), Instant::now()),
                _ = self.interrupt.recv() => self.stop(SignalKind::interrupt(), Instant::now()),
                _ = self.hangup.recv() => Some(Request::Reload),
                _ = self.user1.recv() => Some(Request::PrintCounters),
            };
            if let Some(request) = request {
                return request;
            }
        }
    }

    fn stop(&mut self, kind: SignalKind, now: Instant) -> Option<Request> {
        match self.stop_asked {
            None => {
                self.stop_asked = Some((kind, now));
                Some(Request::Stop)
            }
            Some((same, asked))
                if same == kind && now.saturating_duration_since(asked) < SAME_STOP =>
            {
                None
            }
            Some(_) => Some(Request::StopNow),
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal::*, raise};

    use super::*;

    /// One test for all: signals are the whole process's.
    #[test]
    fn each_signal_is_its_request_and_the_second_stop_is_at_once() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut signals = Signals::new().unwrap();
            for (sent, request) in [
                (SIGHUP, Request::Reload),
                (SIGUSR1, Request::PrintCounters),
                (SIGTERM, Request::Stop),
            ] {
                raise(sent).unwrap();
                assert_eq!(signals.next().await, request, "{sent}");
            }
            // The same stop once more, as timeout(1) sends it, is no second one.
            raise(SIGTERM).unwrap();
            let again = tokio::time::timeout(Duration::from_millis(50), signals.next()).await;
            assert!(again.is_err(), "{again:?}");
            tokio::time::sleep(SAME_STOP).await;
            for (sent, request) in
                [(SIGHUP, Request::Reload), (SIGINT, Request::StopNow), (SIGTERM, Request::StopNow)]
            {
                raise(sent).unwrap();
                assert_eq!(signals.next().await, request, "{sent}");
            }
        });
    }
}
