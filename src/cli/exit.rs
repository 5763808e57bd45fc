//! Exit codes: `sysexits.h` where it has one.

use std::process::ExitCode;

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
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}
