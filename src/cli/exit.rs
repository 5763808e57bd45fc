//! Exit codes: `sysexits.h` where it has one.

use std::process::ExitCode;

use crate::agent::AgentError;
use crate::capture::CaptureError;
use crate::control::Error as ControlError;

/// How the program ended, for the shell and for the service manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Success = 0,
    Failure = 1,
    /// EX_USAGE: the command line.
    Usage = 64,
    /// EX_UNAVAILABLE: the kernel lacks what is needed.
    KernelSupport = 69,
    /// EX_NOPERM: CAP_NET_ADMIN is missing.
    Privilege = 77,
    /// EX_CONFIG: the configuration.
    Config = 78,
}

impl Exit {
    /// For the manual, in the order of the numbers.
    pub const MEANINGS: &[(Exit, &str)] = &[
        (Exit::Success, "All went well."),
        (Exit::Failure, "Something went wrong; the log says what."),
        (Exit::Usage, "The command line is wrong."),
        (
            Exit::KernelSupport,
            "The kernel lacks support that is needed, such as nf_conntrack_netlink.",
        ),
        (Exit::Privilege, "CAP_NET_ADMIN is missing: run it as root."),
        (Exit::Config, "The configuration is wrong; all its errors were printed."),
    ];

    pub fn code(self) -> u8 {
        self as u8
    }

    pub(super) fn of_agent(error: &AgentError) -> Self {
        match error {
            AgentError::Host { exit, .. } => Self::MEANINGS
                .iter()
                .map(|(known, _)| *known)
                .find(|known| known.code() == *exit)
                .unwrap_or(Exit::Failure),
            AgentError::Capture(CaptureError::Privilege { .. }) => Exit::Privilege,
            AgentError::Capture(CaptureError::Unsupported { .. }) => Exit::KernelSupport,
            AgentError::Control(error) => Self::of_control(error),
            _ => Exit::Failure,
        }
    }

    pub(super) fn of_control(error: &ControlError) -> Self {
        match error {
            ControlError::Denied { .. } => Exit::Privilege,
            ControlError::Missing { .. } => Exit::KernelSupport,
            _ => Exit::Failure,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn each_cause_has_its_code() {
        let source = || io::Error::from_raw_os_error(1);
        let host = |exit| AgentError::Host { message: String::new(), exit };
        for (error, code) in [
            (host(77), 77),
            (host(69), 69),
            (host(3), 1),
            (CaptureError::Privilege { what: "", source: source() }.into(), 77),
            (CaptureError::Unsupported { what: "", source: source() }.into(), 69),
            (CaptureError::Fatal { what: "", source: source() }.into(), 1),
            (ControlError::Denied { doing: "", source: source() }.into(), 77),
            (ControlError::Missing { doing: "", what: "", source: source() }.into(), 69),
            (ControlError::Refused { doing: "", source: source() }.into(), 1),
            (AgentError::Broken(String::new()), 1),
        ] {
            assert_eq!(Exit::of_agent(&error).code(), code, "{error:?}");
        }
    }
}
