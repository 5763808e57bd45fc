//! What can go wrong when the kernel is asked, sorted by what the caller does about it.

use std::io;
use std::time::Duration;

/// Why the kernel gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `EPERM` or `EACCES`: CAP_NET_ADMIN is missing in the user namespace that owns this network
    /// namespace. Exit code 77.
    #[error("{doing}: not permitted; this needs CAP_NET_ADMIN ({source})")]
    Denied { doing: &'static str, source: io::Error },
    /// The kernel lacks it, or may not load it. Exit code 69.
    #[error("{doing}: this kernel lacks {what} ({source})")]
    Missing { doing: &'static str, what: &'static str, source: io::Error },
    /// Any other errno in `NLMSG_ERROR`.
    #[error("{doing}: the kernel refused: {source}")]
    Refused { doing: &'static str, source: io::Error },
    /// No answer in time. The connection is spent: connect again.
    #[error("{doing}: no answer from the kernel in {} s", after.as_secs_f32())]
    TimedOut { doing: &'static str, after: Duration },
    /// The socket failed, or an earlier round did not end. The connection is spent: connect again.
    #[error("{doing}: the netlink connection is gone ({source})")]
    Gone { doing: &'static str, source: io::Error },
    /// An answer that is not what the protocol says.
    #[error("{doing}: the kernel's answer makes no sense: {why}")]
    Malformed { doing: &'static str, why: &'static str },
    /// A setting could not be read or written.
    #[error("{path}: {source}")]
    Setting { path: String, source: io::Error },
}

impl Error {
    /// Sorts an errno that means the same whatever was asked.
    pub(super) fn refused(doing: &'static str, errno: i32) -> Self {
        let source = io::Error::from_raw_os_error(errno);
        match errno {
            libc::EPERM | libc::EACCES => Error::Denied { doing, source },
            // EPROTONOSUPPORT: no such netlink protocol. EAFNOSUPPORT: no netlink sockets for us,
            // as under systemd's RestrictAddressFamilies. EOPNOTSUPP: no such nfnetlink subsystem
            // or a flag that is not known.
            libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP => {
                Error::Missing { doing, what: "support for it", source }
            }
            _ => Error::Refused { doing, source },
        }
    }

    /// The errno behind it, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Denied { source, .. }
            | Error::Missing { source, .. }
            | Error::Refused { source, .. }
            | Error::Gone { source, .. }
            | Error::Setting { source, .. } => source.raw_os_error(),
            Error::TimedOut { .. } | Error::Malformed { .. } => None,
        }
    }
}
