//! The system calls that std does not wrap: netlink sockets, resource usage, wait4.
//!
//! All `unsafe` of the lab is here. Nothing here decides anything.

#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// `NETLINK_NETFILTER` of `linux/netlink.h`.
const NETLINK_NETFILTER: i32 = 12;
/// Index of the drop counter in what `SO_MEMINFO` gives (`linux/sock_diag.h`).
const SK_MEMINFO_DROPS: usize = 8;
const SK_MEMINFO_VARS: usize = 9;

/// `NFNLGRP_CONNTRACK_*` of `linux/netfilter/nfnetlink_compat.h`.
pub(crate) const GROUP_NEW: i32 = 1;
pub(crate) const GROUP_UPDATE: i32 = 2;
pub(crate) const GROUP_DESTROY: i32 = 3;

/// A bound `NETLINK_NETFILTER` socket of the calling thread's network namespace.
#[derive(Debug)]
pub(crate) struct NetlinkSocket {
    fd: OwnedFd,
}

impl NetlinkSocket {
    pub(crate) fn open() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked before it is owned.
        let raw = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_NETFILTER)
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` is a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let address = netlink_address(0);
        // SAFETY: `address` is a valid sockaddr_nl of the length given.
        check(unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as u32,
            )
        })?;
        Ok(Self { fd })
    }

    /// A socket that listens to `groups`, with a receive buffer of `buffer` bytes.
    pub(crate) fn listen(groups: &[i32], buffer: usize) -> io::Result<Self> {
        let socket = Self::open()?;
        socket.set_receive_buffer(buffer)?;
        socket.set_netlink(libc::NETLINK_NO_ENOBUFS, 1)?;
        for &group in groups {
            socket.set_netlink(libc::NETLINK_ADD_MEMBERSHIP, group)?;
        }
        Ok(socket)
    }

    /// The number by which netlink addresses this socket.
    pub(crate) fn port_id(&self) -> io::Result<u32> {
        let mut address = netlink_address(0);
        let mut length = size_of::<libc::sockaddr_nl>() as u32;
        // SAFETY: both pointers are valid for the length given.
        check(unsafe {
            libc::getsockname(self.fd.as_raw_fd(), (&raw mut address).cast(), &raw mut length)
        })?;
        Ok(address.nl_pid)
    }

    pub(crate) fn set_netlink(&self, option: i32, value: i32) -> io::Result<()> {
        set_option(&self.fd, libc::SOL_NETLINK, option, &value)
    }

    /// Exceeds `rmem_max`, which `SO_RCVBUF` does not. The kernel doubles what it is given.
    pub(crate) fn set_receive_buffer(&self, bytes: usize) -> io::Result<()> {
        let half = i32::try_from(bytes / 2).map_err(io::Error::other)?;
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &half)
    }

    pub(crate) fn set_send_buffer(&self, bytes: i32) -> io::Result<()> {
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes)
    }

    pub(crate) fn set_receive_timeout(&self, limit: Duration) -> io::Result<()> {
        set_receive_timeout(&self.fd, limit)
    }

    /// How many messages found no room in this socket, exactly: `SO_MEMINFO`.
    pub(crate) fn drops(&self) -> io::Result<u32> {
        let mut values = [0_u32; SK_MEMINFO_VARS];
        let mut length = size_of::<[u32; SK_MEMINFO_VARS]>() as u32;
        // SAFETY: `values` is as long as `length` says.
        check(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                values.as_mut_ptr().cast(),
                &raw mut length,
            )
        })?;
        Ok(values[SK_MEMINFO_DROPS])
    }

    /// Sends to the kernel (`port` 0) or to the socket with that port id.
    pub(crate) fn send_to(&self, port: u32, message: &[u8]) -> io::Result<()> {
        let address = netlink_address(port);
        // SAFETY: buffer and address are valid for the lengths given.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as u32,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// One message. With `MSG_DONTWAIT` in `flags`, an empty queue is `WouldBlock`.
    pub(crate) fn receive(&self, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
        receive(&self.fd, buffer, flags)
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Room for many messages of one `recvmmsg`, allocated once.
#[derive(Debug)]
pub(crate) struct Slots {
    // `headers` points into `vectors`, which points into `memory`; none of the three ever moves
    // its heap memory again, because they are private and never grow.
    memory: Vec<u8>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl Slots {
    /// `count` slots of `size` bytes; with `spill`, each has a second piece of that many bytes
    /// far from the first ones, for the rare message that is longer than `size`.
    pub(crate) fn new(count: usize, size: usize, spill: usize) -> Self {
        let mut memory = vec![0_u8; count * (size + spill)];
        let base = memory.as_mut_ptr();
        let pieces = if spill == 0 { 1 } else { 2 };
        let mut vectors = Vec::with_capacity(count * pieces);
        for slot in 0..count {
            vectors.push(libc::iovec {
                iov_base: base.wrapping_add(slot * size).cast(),
                iov_len: size,
            });
            if spill > 0 {
                vectors.push(libc::iovec {
                    iov_base: base.wrapping_add(count * size + slot * spill).cast(),
                    iov_len: spill,
                });
            }
        }
        let mut headers = Vec::with_capacity(count);
        for slot in 0..count {
            // SAFETY: all zero is a valid mmsghdr.
            let mut header: libc::mmsghdr = unsafe { zeroed() };
            header.msg_hdr.msg_iov = vectors.as_mut_ptr().wrapping_add(slot * pieces);
            header.msg_hdr.msg_iovlen = pieces;
            headers.push(header);
        }
        Self { memory, vectors, headers }
    }

    /// Fills slots until all are full or the queue is empty; gives how many it filled.
    pub(crate) fn receive(&mut self, socket: &NetlinkSocket) -> io::Result<usize> {
        // SAFETY: `headers` describes memory that this struct owns; see the field's comment.
        let got = unsafe {
            libc::recvmmsg(
                socket.fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got as usize) }
    }

    pub(crate) fn len(&self) -> usize {
        self.headers.len()
    }

    /// The first piece of a slot.
    pub(crate) fn start(&self, slot: usize) -> &[u8] {
        let size = self.vectors[0].iov_len;
        &self.memory[slot * size..(slot + 1) * size]
    }
}

/// Processor time and memory, from `getrusage` or `wait4`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    pub(crate) peak_rss_kib: u64,
}

/// What the whole process has used.
pub(crate) fn process_usage() -> io::Result<Usage> {
    usage(libc::RUSAGE_SELF)
}

/// What the calling thread has used.
pub(crate) fn thread_usage() -> io::Result<Usage> {
    usage(libc::RUSAGE_THREAD)
}

fn usage(who: i32) -> io::Result<Usage> {
    // SAFETY: all zero is a valid rusage.
    let mut raw: libc::rusage = unsafe { zeroed() };
    // SAFETY: `raw` is valid for writing.
    check(unsafe { libc::getrusage(who, &raw mut raw) })?;
    Ok(from_rusage(&raw))
}

fn from_rusage(raw: &libc::rusage) -> Usage {
    let time = |value: libc::timeval| {
        Duration::new(value.tv_sec.unsigned_abs(), value.tv_usec.unsigned_abs() as u32 * 1000)
    };
    Usage {
        cpu: time(raw.ru_utime) + time(raw.ru_stime),
        peak_rss_kib: raw.ru_maxrss.unsigned_abs(),
    }
}

/// Reaps the child `pid` when it has ended: how, and what it and its children used.
pub(crate) fn wait4_nohang(pid: u32) -> io::Result<Option<(ExitStatus, Usage)>> {
    let mut status = 0;
    // SAFETY: all zero is a valid rusage.
    let mut raw: libc::rusage = unsafe { zeroed() };
    // SAFETY: both pointers are valid for writing.
    let got =
        unsafe { libc::wait4(pid.cast_signed(), &raw mut status, libc::WNOHANG, &raw mut raw) };
    check(got)?;
    Ok((got > 0).then(|| (ExitStatus::from_raw(status), from_rusage(&raw))))
}

/// User and system time of a running process, from `/proc/PID/stat`.
pub(crate) fn cpu_of(pid: u32) -> super::Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, in brackets, may hold spaces; `utime` is the 12th after it.
    let (_, rest) = text.rsplit_once(')').ok_or("/proc/PID/stat without a name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // SAFETY: no pointers.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// A socket bound to `local`; port 0 for any, and for raw sockets. Give it to `TcpStream` or
/// `UdpSocket`: those serve raw and UDP-Lite sockets too.
pub(crate) fn bound_socket(kind: i32, proto: u8, local: SocketAddr) -> io::Result<OwnedFd> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers; the result is checked before it is owned.
    let raw = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, i32::from(proto)) };
    check(raw)?;
    // SAFETY: `raw` is a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &1_i32)?;
    with_address(local, |address, length| {
        // SAFETY: `with_address` gives a valid address of that length.
        check(unsafe { libc::bind(fd.as_raw_fd(), address, length) })
    })?;
    Ok(fd)
}

pub(crate) fn connect(fd: &OwnedFd, remote: SocketAddr) -> io::Result<()> {
    with_address(remote, |address, length| {
        // SAFETY: `with_address` gives a valid address of that length.
        check(unsafe { libc::connect(fd.as_raw_fd(), address, length) })
    })
}

fn with_address<T>(address: SocketAddr, work: impl FnOnce(*const libc::sockaddr, u32) -> T) -> T {
    match address {
        SocketAddr::V4(v4) => {
            // SAFETY: all zero is a valid sockaddr_in.
            let mut raw: libc::sockaddr_in = unsafe { zeroed() };
            raw.sin_family = libc::AF_INET as u16;
            raw.sin_port = v4.port().to_be();
            raw.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            work((&raw const raw).cast(), size_of::<libc::sockaddr_in>() as u32)
        }
        SocketAddr::V6(v6) => {
            // SAFETY: all zero is a valid sockaddr_in6.
            let mut raw: libc::sockaddr_in6 = unsafe { zeroed() };
            raw.sin6_family = libc::AF_INET6 as u16;
            raw.sin6_port = v6.port().to_be();
            raw.sin6_addr.s6_addr = v6.ip().octets();
            work((&raw const raw).cast(), size_of::<libc::sockaddr_in6>() as u32)
        }
    }
}

/// Receives from any socket.
pub(crate) fn receive(fd: &impl AsRawFd, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
    // SAFETY: `buffer` is valid for its length.
    let got =
        unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got as usize) }
}

pub(crate) fn set_receive_timeout(fd: &impl AsRawFd, limit: Duration) -> io::Result<()> {
    let value =
        libc::timeval { tv_sec: limit.as_secs() as i64, tv_usec: i64::from(limit.subsec_micros()) };
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &value)
}

/// Sets an option whose value is the plain struct or integer `T`.
pub(crate) fn set_option<T: Copy>(
    fd: &impl AsRawFd,
    level: i32,
    option: i32,
    value: &T,
) -> io::Result<()> {
    // SAFETY: `value` is valid for the size given.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const *value).cast(),
            size_of::<T>() as u32,
        )
    })
}

fn netlink_address(port: u32) -> libc::sockaddr_nl {
    // SAFETY: all zero is a valid sockaddr_nl.
    let mut address: libc::sockaddr_nl = unsafe { zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_pid = port;
    address
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
