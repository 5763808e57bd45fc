//! Words to the service manager (sd_notify): ready, reloading, stopping, and how it goes.
//!
//! Does nothing without `NOTIFY_SOCKET`. A manager that cannot be reached is logged once and changes
//! nothing: the agent's work is more than its status.

use sd_notify::NotifyState;
use tracing::warn;

/// Says each word at most once for each change; made once a process.
#[derive(Debug, Default)]
pub struct Notifier {
    failed: bool,
    status: String,
}

impl Notifier {
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything runs: `READY=1`, also at the end of a reload.
    pub fn ready(&mut self, status: &str) {
        self.status = one_line(status);
        let status = self.status.clone();
        self.say(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }

    /// `STATUS=`, shown by `systemctl status`; the same again is not sent.
    pub fn status(&mut self, status: &str) {
        let status = one_line(status);
        if status == self.status {
            return;
        }
        self.say(&[NotifyState::Status(&status)]);
        self.status = status;
    }

    /// `RELOADING=1` with `MONOTONIC_USEC`, which Type=notify-reload wants in the same message.
    /// [`Notifier::ready`] must follow, also when the reload failed.
    pub fn reloading(&mut self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.say(&[NotifyState::Reloading, now]),
            Err(error) => self.complain(&error),
        }
    }

    /// `STOPPING=1`.
    pub fn stopping(&mut self) {
        self.say(&[NotifyState::Stopping, NotifyState::Status("writing what is left")]);
    }

    fn say(&mut self, words: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(words) {
            self.complain(&error);
        }
    }

    fn complain(&mut self, error: &std::io::Error) {
        if !self.failed {
            self.failed = true;
            warn!(%error, "the service manager cannot be told how it goes (NOTIFY_SOCKET)");
        }
    }
}

/// A newline would begin another assignment.
fn one_line(status: &str) -> String {
    status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    const TEST: &str = "telemetry::notify::tests::each_change_is_said_in_one_message";

    /// The environment of this process cannot be changed safely, so the test runs itself again as a
    /// child with a socket.
    #[test]
    fn each_change_is_said_in_one_message() {
        const CHILD: &str = "CONNTRAIL_TEST_NOTIFY_CHILD";
        if std::env::var_os(CHILD).is_some() {
            let mut notifier = Notifier::new();
            notifier.ready("2 sinks");
            notifier.status("2 sinks");
            notifier.status("busy\nREADY=0");
            notifier.reloading();
            notifier.stopping();
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args([TEST, "--exact"])
            .env(CHILD, "1")
            .env("NOTIFY_SOCKET", &path)
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        let read = || {
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(read(), "READY=1\nSTATUS=2 sinks\n");
        assert_eq!(read(), "STATUS=busy READY=0\n");
        let reloading = read();
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(since.trim_end().parse::<u64>().unwrap() > 0);
        assert_eq!(read(), "STOPPING=1\nSTATUS=writing what is left\n");
    }

    #[test]
    fn without_a_service_manager_nothing_happens() {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            let mut notifier = Notifier::new();
            notifier.ready("");
            notifier.reloading();
            notifier.stopping();
            assert!(!notifier.failed);
        }
    }
}
