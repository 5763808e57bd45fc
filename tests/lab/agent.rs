//! Runs the agent (or another listener) inside a namespace and looks after it: configuration in a
//! folder of its own, readiness by the service manager's protocol, signals, an end within a
//! time-out, and what the process cost.
//!
//! A process started here never outlives its value: drop kills it and waits for it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::Result;
use super::netns::Netns;
use super::sys::{self, Usage};

/// How often a waiting loop looks.
const POLL: Duration = Duration::from_millis(5);

/// Where standard output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// To a file, for [`AgentProcess::stdout`].
    Kept,
    /// To the standard output of this process.
    Shown,
}

/// A started process and its folder.
#[derive(Debug)]
pub(crate) struct AgentProcess {
    child: Child,
    notify: UnixDatagram,
    notified: Vec<String>,
    ended: Option<Ended>,
    peak_rss_kib: u64,
    // Last, so that the folder goes after everything that uses it.
    dir: TempDir,
}

/// How a process ended, and what it and its children had used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) usage: Usage,
}

impl AgentProcess {
    /// `PROGRAM run --config FILE` inside `netns`. In `config`, `{dir}` stands for the folder.
    pub(crate) fn start(netns: &Netns, program: &Path, config: &str, out: Output) -> Result<Self> {
        Self::start_with(netns, out, |dir| {
            let file = dir.join("conntrail.toml");
            fs::write(&file, config.replace("{dir}", &dir.display().to_string()))?;
            let mut command = Command::new(program);
            command.arg("run").arg("--config").arg(file);
            Ok(command)
        })
    }

    /// Any program inside `netns`; `command` is told the folder.
    pub(crate) fn start_with(
        netns: &Netns,
        out: Output,
        command: impl FnOnce(&Path) -> Result<Command>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("conntrail-lab-").tempdir()?;
        let notify_path = dir.path().join("notify");
        let notify = UnixDatagram::bind(&notify_path)?;
        notify.set_nonblocking(true)?;
        let mut command = command(dir.path())?;
        command.env("NOTIFY_SOCKET", notify_path).stdin(Stdio::null());
        if out == Output::Kept {
            command.stdout(File::create(dir.path().join("stdout"))?);
        }
        command.stderr(File::create(dir.path().join("stderr"))?);
        let child = netns.spawn(&mut command)?;
        Ok(Self { child, notify, notified: Vec::new(), ended: None, peak_rss_kib: 0, dir })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Leaves the folder where it is, for people to read.
    pub(crate) fn keep_dir(&mut self) {
        self.dir.disable_cleanup(true);
    }

    /// Waits for `READY=1`.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait_notified("READY=1", limit)
    }

    /// Waits until the process has sent the line `state` to its service manager.
    pub(crate) fn wait_notified(&mut self, state: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            // First: one that said it and ended at once has said it.
            let ended = self.poll()?;
            if self.has_notified(state)? {
                return Ok(());
            }
            if ended || Instant::now() > until {
                return Err(self.complaint(&format!("no {state} within {limit:?}")));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether it has sent that line so far.
    pub(crate) fn has_notified(&mut self, state: &str) -> Result<bool> {
        Ok(self.notified()?.iter().any(|line| line == state))
    }

    /// Each line that it has sent so far.
    pub(crate) fn notified(&mut self) -> Result<&[String]> {
        let mut buffer = [0; 4096];
        loop {
            match self.notify.recv(&mut buffer) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    self.notified.extend(text.lines().map(str::to_owned));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(&self.notified)
    }

    /// Signals the process; an error when it has ended.
    pub(crate) fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.poll()? {
            return Err(self.complaint(&format!("no process to send {signal} to")));
        }
        Ok(kill(self.nix_pid(), signal)?)
    }

    /// Waits for the end; an error when it does not come within `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<Ended> {
        let until = Instant::now() + limit;
        while !self.poll()? {
            if Instant::now() > until {
                return Err(self.complaint(&format!("still running after {limit:?}")));
            }
            std::thread::sleep(POLL);
        }
        Ok(self.ended.expect("poll has just seen the end"))
    }

    /// SIGTERM, and the end.
    pub(crate) fn terminate(&mut self, limit: Duration) -> Result<Ended> {
        self.signal(Signal::SIGTERM)?;
        self.wait(limit)
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        self.poll()
    }

    pub(crate) fn stdout(&self) -> Result<String> {
        Ok(fs::read_to_string(self.path("stdout"))?)
    }

    pub(crate) fn stderr(&self) -> Result<String> {
        Ok(fs::read_to_string(self.path("stderr"))?)
    }

    /// User and system time so far, of a process that still runs: `/proc/PID/stat`. Its own only.
    pub(crate) fn cpu_so_far(&self) -> Result<Duration> {
        sys::cpu_of(self.pid())
    }

    /// Looks for the end, and at the memory while it has not come. `VmHWM` and not `wait4`'s
    /// `ru_maxrss`: that one starts with what the parent had when it made the child.
    fn poll(&mut self) -> Result<bool> {
        if self.ended.is_some() {
            return Ok(true);
        }
        self.peak_rss_kib = self.peak_rss_kib.max(peak_rss_kib(self.pid()));
        if let Some((status, mut usage)) = sys::wait4_nohang(self.pid())? {
            usage.peak_rss_kib = self.peak_rss_kib;
            self.ended = Some(Ended { status, usage });
        }
        Ok(self.ended.is_some())
    }

    fn nix_pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn complaint(&self, what: &str) -> super::Error {
        let state = match self.ended {
            Some(ended) => format!("ended with {}", ended.status),
            None => "running".to_owned(),
        };
        let stderr = self.stderr().unwrap_or_else(|error| error.to_string());
        format!("process {} ({state}): {what}; it said: {}", self.pid(), stderr.trim()).into()
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        if !matches!(self.poll(), Ok(true)) {
            // Our child that nobody has waited for: the pid is still its own. A failure means
            // that there is nothing left to kill.
            let _ = kill(self.nix_pid(), Signal::SIGKILL);
            let _ = self.wait(Duration::from_secs(5));
        }
    }
}

/// `VmHWM`; 0 once the process has let go of its memory.
fn peak_rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::need;

    fn shell(netns: &Netns, script: &str) -> AgentProcess {
        AgentProcess::start_with(netns, Output::Kept, |_| {
            let mut command = Command::new("sh");
            command.arg("-c").arg(script);
            Ok(command)
        })
        .expect("sh starts")
    }

    #[test]
    fn one_that_ends_before_it_is_ready_is_an_error_with_its_words() {
        if need::lacks_root() {
            return;
        }
        let netns = Netns::new("agent").expect("a namespace");
        let mut process = shell(&netns, "echo no privilege >&2; exit 77");
        let error = process.wait_ready(Duration::from_secs(5)).expect_err("it never was ready");
        assert!(error.to_string().contains("no privilege"), "{error}");
        assert_eq!(process.wait(Duration::ZERO).expect("it has ended").status.code(), Some(77));
    }

    #[test]
    fn it_runs_inside_takes_signals_and_its_cost_includes_its_children() {
        if need::lacks_root() {
            return;
        }
        let netns = Netns::new("agent").expect("a namespace");
        let work = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        let script =
            format!("readlink /proc/self/ns/net; sh -c '{work}'; echo done; exec sleep 60");
        let mut process = shell(&netns, &script);
        let until = Instant::now() + Duration::from_secs(20);
        while !process.stdout().expect("a file").contains("done") {
            assert!(Instant::now() < until, "the work is never done");
            std::thread::sleep(POLL);
        }
        let inside = netns.run(|| fs::read_link("/proc/thread-self/ns/net")).expect("a link");
        assert!(process.stdout().expect("a file").contains(&*inside.to_string_lossy()));
        let ended = process.terminate(Duration::from_secs(5)).expect("an end");
        assert_eq!(ended.status.code(), None);
        // The counting child needs far more than two shells that only start.
        assert!(ended.usage.cpu > Duration::from_millis(20), "{ended:?}");
        assert!(ended.usage.peak_rss_kib > 100, "{ended:?}");
        assert!(process.signal(Signal::SIGTERM).is_err());
    }

    #[test]
    fn drop_ends_it() {
        if need::lacks_root() {
            return;
        }
        let netns = Netns::new("agent").expect("a namespace");
        let process = shell(&netns, "exec sleep 60");
        let (pid, dir) = (process.pid(), process.dir().to_owned());
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert!(!dir.exists());
    }
}
