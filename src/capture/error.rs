//! What can go wrong while capturing, by what the caller does about it.

use std::io;

/// Each variant is one way to go on; `what` says what was tried, in words for the log.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The process may not listen: say which capability it needs, exit 77.
    #[error("{what}: {source} (needs CAP_NET_ADMIN in this network namespace)")]
    Privilege { what: &'static str, source: io::Error },
    /// The kernel cannot do it: say which module is missing, exit 69.
    #[error("{what}: {source} (the kernel lacks nfnetlink or nf_conntrack_netlink)")]
    Unsupported { what: &'static str, source: io::Error },
    /// Nothing that a user can mend by a capability or a module: exit 1.
    #[error("{what}: {source}")]
    Fatal { what: &'static str, source: io::Error },
}

impl CaptureError {
    /// Sorts the error of a system call by what it means for a netlink socket.
    pub(super) fn of(what: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => CaptureError::Privilege { what, source },
            // No nfnetlink: EPROTONOSUPPORT. An unknown option or group: ENOPROTOOPT, EINVAL.
            Some(
                libc::EPROTONOSUPPORT
                | libc::EAFNOSUPPORT
                | libc::ENOPROTOOPT
                | libc::EINVAL
                | libc::EOPNOTSUPP,
            ) => CaptureError::Unsupported { what, source },
            _ => CaptureError::Fatal { what, source },
        }
    }
}
