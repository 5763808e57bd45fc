//! The netfilter netlink socket, and the few other system calls that capture needs.
//!
//! Promises: each function is safe to call with any arguments, and says in its `SAFETY` comment why
//! the system call behind it is. Never decides anything: no policy, no retries but EINTR.
#![allow(unsafe_code)] // Netlink options, recv into spare capacity, poll: std has none of them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::RawBatch;
use super::filter::Program;

/// Room that must be free in a buffer before a datagram is read into it. ctnetlink events are about
/// 260 bytes; the longest that the kernel can make (labels, helper, a full security context) stay
/// under 8 KiB. What is longer all the same is noticed (`MSG_TRUNC`) and counted.
pub(super) const DATAGRAM_ROOM: usize = 16 * 1024;

/// A batch's buffer: some 900 events. Larger ones leave the L2 cache before the pipeline reads them,
/// smaller ones cost more queue operations.
pub(super) const BATCH_BYTES: usize = 256 * 1024;

/// The multicast groups, `enum nfnetlink_groups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Group {
    /// `NFNLGRP_CONNTRACK_NEW`
    New = 1,
    /// `NFNLGRP_CONNTRACK_UPDATE`
    Update = 2,
    /// `NFNLGRP_CONNTRACK_DESTROY`
    Destroy = 3,
    /// `NFNLGRP_CONNTRACK_EXP_NEW`
    ExpectNew = 4,
    // 5, NFNLGRP_CONNTRACK_EXP_UPDATE, exists but ctnetlink_expect_event never sends to it.
    /// `NFNLGRP_CONNTRACK_EXP_DESTROY`
    ExpectDestroy = 6,
}

/// A reading of `SO_MEMINFO`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// `SK_MEMINFO_RMEM_ALLOC`: the true size of everything queued.
    pub(super) queued: u32,
    /// `SK_MEMINFO_RCVBUF`: what it may grow to.
    pub(super) limit: u32,
    /// `SK_MEMINFO_DROPS`: events that did not fit, ever; wraps.
    pub(super) drops: u32,
}

/// What one call of [`Socket::fill`] read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fill {
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
    /// Read, but too long for the buffer and therefore not in the batch.
    pub(super) truncated: u64,
    /// The queue was found empty. Otherwise the batch is full or the limit was reached.
    pub(super) empty: bool,
}

/// A bound `NETLINK_NETFILTER` socket.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// Opens and binds; joins no group yet, so that options can be set before the first event.
    pub(super) fn open() -> io::Result<Self> {
        Self::open_at(0)
    }

    /// As [`open`](Self::open), at a port of one's own; 0 lets the kernel choose.
    pub(super) fn open_at(portid: u32) -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked before it is owned.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::NETLINK_NETFILTER,
            )
        };
        check(fd)?;
        // SAFETY: a fresh descriptor that nothing else owns.
        let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: all-zero bytes are a valid sockaddr_nl without groups.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_pid = portid;
        // SAFETY: `address` lives through the call and its true size is given.
        check(unsafe {
            libc::bind(
                fd,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        })?;
        Ok(socket)
    }

    /// Sends a request to the kernel, which has worked on it before this returns.
    pub(super) fn ask(&self, request: &[u8]) -> io::Result<()> {
        // SAFETY: `request` is readable for its whole length. A netlink socket that is not connected
        // sends to the kernel.
        let sent = unsafe { libc::send(self.fd(), request.as_ptr().cast(), request.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Socket(fd)
    }

    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    pub(super) fn join(&self, group: Group) -> io::Result<()> {
        set_option(self.fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group as i32)
    }

    /// Nothing more comes from this group; what is queued stays.
    pub(super) fn leave(&self, group: Group) -> io::Result<()> {
        set_option(self.fd(), libc::SOL_NETLINK, libc::NETLINK_DROP_MEMBERSHIP, group as i32)
    }

    /// Sets the receive buffer, beyond `net.core.rmem_max` where allowed, and gives what was got.
    /// In the terms of `SO_RCVBUF`: the kernel accounts twice that.
    pub(super) fn set_receive_buffer(&self, bytes: usize) -> io::Result<usize> {
        let asked = i32::try_from(bytes).unwrap_or(i32::MAX).min(i32::MAX / 2);
        // Without CAP_NET_ADMIN in the initial user namespace: EPERM, so in containers too.
        if set_option(self.fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, asked).is_err() {
            set_option(self.fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, asked)?;
        }
        let got = get_option(self.fd(), libc::SOL_SOCKET, libc::SO_RCVBUF)?;
        Ok(usize::try_from(got).unwrap_or(0) / 2)
    }

    /// `NETLINK_NO_ENOBUFS`: an overrun drops what does not fit and nothing else.
    pub(super) fn drop_only_what_does_not_fit(&self) -> io::Result<()> {
        set_option(self.fd(), libc::SOL_NETLINK, libc::NETLINK_NO_ENOBUFS, 1)
    }

    /// `NETLINK_BROADCAST_ERROR`: the sender learns that an event did not fit, so that conntrack
    /// keeps the entry of a DESTROY and tries again.
    pub(super) fn set_reliable(&self, on: bool) -> io::Result<()> {
        set_option(self.fd(), libc::SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR, i32::from(on))
    }

    pub(super) fn is_reliable(&self) -> io::Result<bool> {
        get_option(self.fd(), libc::SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR).map(|on| on != 0)
    }

    /// Attaches the filter in place of the one before, or removes it.
    pub(super) fn set_filter(&self, program: Option<&Program>) -> io::Result<()> {
        attach_filter(self.0.as_fd(), program)
    }

    pub(super) fn memory(&self) -> io::Result<Memory> {
        // SK_MEMINFO_VARS of them since Linux 4.12, in this order.
        const RMEM_ALLOC: usize = 0;
        const RCVBUF: usize = 1;
        const DROPS: usize = 8;
        let mut values = [0u32; 9];
        let mut len = size_of_val(&values) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes into `values`, and any bytes are valid u32.
        check(unsafe {
            libc::getsockopt(
                self.fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                values.as_mut_ptr().cast(),
                &raw mut len,
            )
        })?;
        if (len as usize) < size_of_val(&values) {
            return Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
        }
        Ok(Memory { queued: values[RMEM_ALLOC], limit: values[RCVBUF], drops: values[DROPS] })
    }

    /// Reads up to `max` datagrams to the end of `batch`, until the queue is empty or less than
    /// [`DATAGRAM_ROOM`] is left in the buffer. Never waits, never grows the buffer.
    pub(super) fn fill(&self, batch: &mut RawBatch, max: u64) -> io::Result<Fill> {
        let mut fill = Fill::default();
        while fill.datagrams + fill.truncated < max {
            let start = batch.bytes.len();
            let spare = batch.bytes.spare_capacity_mut();
            if spare.len() < DATAGRAM_ROOM {
                return Ok(fill);
            }
            // 3 bytes less, so that the padding below fits.
            let room = spare.len() - 3;
            // SAFETY: `spare` is writable memory of more than `room` bytes; recv only writes.
            let got = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    spare.as_mut_ptr().cast(),
                    room,
                    libc::MSG_DONTWAIT | libc::MSG_TRUNC,
                )
            };
            let Ok(len) = usize::try_from(got) else {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EAGAIN) => {
                        fill.empty = true;
                        return Ok(fill);
                    }
                    // ENOBUFS: an event was lost and is in the drop counter already.
                    Some(libc::EINTR | libc::ENOBUFS) => continue,
                    _ => return Err(error),
                }
            };
            if len > room {
                fill.truncated += 1;
                continue;
            }
            let padded = len.next_multiple_of(4);
            for byte in &mut spare[len..padded] {
                byte.write(0);
            }
            // SAFETY: recv wrote `len` bytes behind `start`, the loop the rest up to `padded`, and
            // both lie within the capacity.
            unsafe { batch.bytes.set_len(start + padded) };
            batch.datagrams.push((start as u32, len as u32));
            fill.datagrams += 1;
            fill.bytes += len as u64;
        }
        Ok(fill)
    }

    fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether entries of this network namespace may wait for their DESTROY to be delivered
/// (`IPCTNL_MSG_CT_GET_DYING`; since Linux 6.0 the list holds nothing else).
pub(super) fn any_dying() -> io::Result<bool> {
    const GET_DYING: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | 6;
    const LENGTH: u32 = 20;
    let socket = Socket::open()?;
    let mut request = [0u8; LENGTH as usize];
    request[..4].copy_from_slice(&LENGTH.to_ne_bytes());
    request[4..6].copy_from_slice(&GET_DYING.to_ne_bytes());
    request[6..8].copy_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    socket.ask(&request)?;
    // The kernel has answered with the first part of the dump before send returns.
    let mut answer =
        RawBatch { bytes: Vec::with_capacity(2 * DATAGRAM_ROOM), ..RawBatch::default() };
    socket.fill(&mut answer, 1)?;
    let kind = answer.bytes.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    // Entries, or an error, which says nothing about entries.
    Ok(kind != Some(libc::NLMSG_DONE as u16))
}

/// `SO_ATTACH_FILTER` or `SO_DETACH_FILTER` on any socket (tests use a pair of UNIX sockets).
pub(super) fn attach_filter(fd: BorrowedFd<'_>, program: Option<&Program>) -> io::Result<()> {
    let Some(program) = program else {
        return match set_option(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0) {
            // None was attached.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        };
    };
    let instructions = program.instructions();
    let fprog = libc::sock_fprog {
        // The compiler gives no program over BPF_MAXINSNS, 4096.
        len: instructions.len() as u16,
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: `fprog` points at `len` instructions that live through the call; the kernel copies
    // and verifies them, and does not write to them.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const fprog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })
}

/// A flag that another thread raises and that `poll` sees.
#[derive(Debug)]
pub(super) struct Wake(OwnedFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked before it is owned.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        check(fd)?;
        // SAFETY: a fresh descriptor that nothing else owns.
        Ok(Wake(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Raises the flag for good.
    pub(super) fn raise(&self) {
        let one = 1u64;
        // SAFETY: eight bytes are read from `one`. The only failure is EAGAIN when the counter is
        // at its end, and then the flag is up anyway.
        let _ = unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of `fds` is readable, hung up or in error, and says which; for ever without a
/// time limit. An error condition of the descriptor counts as ready.
pub(super) fn wait<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd {
        // poll ignores negative descriptors.
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    poll(&mut polled, timeout)?;
    Ok(polled.map(|fd| fd.revents != 0))
}

/// Waits until the reader of a pipe is gone; false when it is still there after `timeout`.
pub(super) fn reader_gone(pipe: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    // With no events asked for, poll reports POLLERR only: "the read end has been closed".
    let mut polled = [libc::pollfd { fd: pipe.as_raw_fd(), events: 0, revents: 0 }];
    poll(&mut polled, Some(timeout))?;
    Ok(polled[0].revents != 0)
}

fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let millis = timeout.map_or(-1, |timeout| {
        i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    // SAFETY: the pointer and the length are those of the slice; poll writes `revents` only.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
    match check(result) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        other => other,
    }
}

pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// Takes a descriptor that the parent process handed over under this number.
pub(super) fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; EBADF when it is not open.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: it is open, and by the contract of the guard's command line it is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ignores the signals by which people and service managers stop a group of processes.
pub(super) fn ignore_stop_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE] {
        // SAFETY: SIG_IGN installs no handler, and these signals exist.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// CPUs that are online.
pub(super) fn cpus() -> u32 {
    // SAFETY: no pointers; -1 when it is not known.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    u32::try_from(cpus).unwrap_or(1)
}

/// Asks to run before others; without the privilege it stays as it is.
pub(super) fn raise_priority() {
    // SAFETY: no pointers; a failure changes nothing.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -10) };
}

fn set_option(fd: i32, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: `value` lives through the call and its true size is given.
    check(unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    })
}

fn get_option(fd: i32, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`; any bytes are a valid i32.
    check(unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut len) })?;
    Ok(value)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
