//! Signals as requests: SIGTERM and SIGINT stop, the second one at once; SIGHUP reloads; SIGUSR1
//! prints the counters.

use std::io;

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

/// The stream of requests. From its making on no signal of these ends the process by itself.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    stopping: bool,
}

impl Signals {
    /// Needs a tokio runtime with I/O.
    pub fn new() -> io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            stopping: false,
        })
    }

    /// The next request. Dropping the future loses none.
    pub async fn next(&mut self) -> Request {
        // Those that stop come first: a flood of others must not keep the agent alive.
        tokio::select! {
            biased;
            _ = self.terminate.recv() => self.stop(),
            _ = self.interrupt.recv() => self.stop(),
            _ = self.hangup.recv() => Request::Reload,
            _ = self.user1.recv() => Request::PrintCounters,
        }
    }

    fn stop(&mut self) -> Request {
        if std::mem::replace(&mut self.stopping, true) {
            return Request::StopNow;
        }
        Request::Stop
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
                (SIGHUP, Request::Reload),
                (SIGINT, Request::StopNow),
                (SIGTERM, Request::StopNow),
            ] {
                raise(sent).unwrap();
                assert_eq!(signals.next().await, request, "{sent}");
            }
        });
    }
}
