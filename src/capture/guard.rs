//! The valve's process: it works the valve also while the agent is stopped, stuck or swapped out.
//!
//! `conntrail valve-guard OPEN% CLOSE% DWELL_MS PORT`, started by capture, with the reliable socket as
//! standard input and a pipe to the agent as standard output. It looks at the table and the socket
//! ([`super::valve`] says when and what follows), switches `NETLINK_BROADCAST_ERROR`, and reports
//! each change through the pipe as one [`Report`].
//!
//! Promises: it is gone as soon as the agent is, so that the socket does not stay open behind it; it
//! never arms reliable mode while an earlier report could not be written, because a loss that nobody
//! hears of would be unsaid. Never reads events.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::ctnetlink::request::{Header, Writer, message_type, write_tuple};
use crate::ctnetlink::uapi::conntrack::{cta, msg};
use crate::ctnetlink::uapi::{family, ipproto, netlink, nfnetlink};
use crate::ctnetlink::{Tuple, TupleParts};

use super::ledger::Reading;
use super::reader::{Looked, now};
use super::socket::{self, Socket};
use super::valve::{Action, Observation, Valve, ValveConfig};

/// The hidden subcommand.
pub const GUARD_COMMAND: &str = "valve-guard";

const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// While it is open the losses so far are reported this often.
const PROGRESS: Duration = Duration::from_secs(1);

/// How long the drop counter must stand still before it is taken for settled: netlink_overrun counts
/// and then looks at the flag, some nanoseconds later.
const SETTLE: Duration = Duration::from_micros(20);
const SETTLE_TRIES: u32 = 5;

/// What a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Reliable mode is on.
    Armed,
    /// Reliable mode is off.
    Opened,
    /// It is still off.
    Progress,
}

/// One message of the guard, [`Report::SIZE`] bytes in host order: written whole, because that is
/// less than `PIPE_BUF`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) event: Event,
    pub(super) reading: Reading,
    pub(super) at: Looked,
    pub(super) entries: u64,
    pub(super) limit: u64,
}

impl Report {
    pub(super) const SIZE: usize = 48;

    fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let event: u32 = match self.event {
            Event::Armed => 1,
            Event::Opened => 2,
            Event::Progress => 3,
        };
        for (i, word) in [event, self.reading.before, self.reading.after, self.reading.in_flight]
            .iter()
            .enumerate()
        {
            bytes[i * 4..][..4].copy_from_slice(&word.to_ne_bytes());
        }
        for (i, word) in [self.at.from, self.at.to, self.entries, self.limit].iter().enumerate() {
            bytes[16 + i * 8..][..8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// `None` when it is not one of ours.
    fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let short = |i: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[i * 4..][..4]);
            u32::from_ne_bytes(word)
        };
        let long = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[16 + i * 8..][..8]);
            u64::from_ne_bytes(word)
        };
        let event = match short(0) {
            1 => Event::Armed,
            2 => Event::Opened,
            3 => Event::Progress,
            _ => return None,
        };
        let reading = Reading { before: short(1), after: short(2), in_flight: short(3) };
        Some(Report {
            event,
            reading,
            at: Looked { from: long(0), to: long(1) },
            entries: long(2),
            limit: long(3),
        })
    }
}

/// Switches reliable mode and reads the drop counter around it.
pub(super) fn switch(socket: &Socket, reliable: bool) -> io::Result<Reading> {
    let mut before = socket.memory()?.drops;
    let mut settled = false;
    for _ in 0..SETTLE_TRIES {
        std::thread::sleep(SETTLE);
        let again = socket.memory()?.drops;
        settled = again == before;
        before = again;
        if settled {
            break;
        }
    }
    socket.set_reliable(reliable)?;
    let after = socket.memory()?.drops;
    Ok(Reading { before, after, in_flight: if settled { 0 } else { socket::cpus() } })
}

/// The table of this network namespace, kept open.
#[derive(Debug)]
pub(super) struct Table {
    count: File,
    limit: File,
}

impl Table {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Table { count: File::open(COUNT)?, limit: File::open(LIMIT)? })
    }

    /// `nf_conntrack_count` and `nf_conntrack_max`.
    pub(super) fn read(&self) -> io::Result<(u64, u64)> {
        Ok((read_number(&self.count)?, read_number(&self.limit)?))
    }
}

fn read_number(file: &File) -> io::Result<u64> {
    let mut text = [0; 24];
    let len = file.read_at(&mut text, 0)?;
    std::str::from_utf8(&text[..len])
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The guard as the agent sees it. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
    pipe: ChildStdout,
}

impl Guard {
    /// Starts `program`, this very program by default, in the caller's network namespace.
    pub(super) fn start(
        program: Option<&Path>,
        socket: OwnedFd,
        config: &ValveConfig,
        port: u32,
    ) -> io::Result<Self> {
        // Not current_exe(): the file may have been replaced by an upgrade.
        let mut child = Command::new(program.unwrap_or(Path::new("/proc/self/exe")))
            .arg(GUARD_COMMAND)
            .args([
                config.open_percent.to_string(),
                config.close_percent.to_string(),
                config.dwell.as_millis().to_string(),
                port.to_string(),
            ])
            .stdin(Stdio::from(socket))
            .stdout(Stdio::piped())
            .current_dir("/")
            // A Ctrl-C or a SIGSTOP for the agent's process group must not reach it.
            .process_group(0)
            .spawn()?;
        let pipe = child.stdout.take().expect("stdout was piped just above");
        let guard = Guard { child, pipe };
        socket::set_nonblocking(guard.pipe.as_fd())?;
        Ok(guard)
    }

    pub(super) fn pipe(&self) -> &ChildStdout {
        &self.pipe
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next report, `Ok(None)` when there is none now, `Err(UnexpectedEof)` when the guard is
    /// gone and everything was read.
    pub(super) fn next_report(&mut self) -> io::Result<Option<Report>> {
        let mut bytes = [0; Report::SIZE];
        match self.pipe.read(&mut bytes) {
            Ok(Report::SIZE) => match Report::decode(&bytes) {
                Some(report) => Ok(Some(report)),
                None => Err(io::ErrorKind::InvalidData.into()),
            },
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            // Reports are written whole, and the pipe holds nothing else.
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ends the process; afterwards nobody but the caller switches reliable mode, and
    /// [`Guard::next_report`] gives what was still in the pipe. Gives what it had failed of, if it
    /// was gone already.
    pub(super) fn end(&mut self) -> Option<io::Error> {
        // An error means that it is gone already.
        let _ = self.child.kill();
        let code = self.child.wait().ok()?.code()?;
        (code != 0).then(|| io::Error::from_raw_os_error(code))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// The process. `args` are those behind [`GUARD_COMMAND`]. It writes nothing to stderr, which may be
/// a log of JSON lines: its exit code is the errno of what failed, and the agent logs it.
pub fn guard_main(args: impl Iterator<Item = OsString>) -> ExitCode {
    socket::ignore_stop_signals();
    match parse(args).ok_or_else(|| errno(libc::EINVAL)).and_then(watch) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(exit_code(&error)),
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Linux' numbers end at 133, so each fits; EPROTO stands for what has none.
fn exit_code(error: &io::Error) -> u8 {
    error.raw_os_error().and_then(|number| u8::try_from(number).ok()).unwrap_or(libc::EPROTO as u8)
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Option<(ValveConfig, u32)> {
    let mut number = || args.next()?.to_str()?.parse::<u64>().ok();
    let config = ValveConfig {
        open_percent: u8::try_from(number()?).ok()?,
        close_percent: u8::try_from(number()?).ok()?,
        dwell: Duration::from_millis(number()?),
    };
    Some((config, u32::try_from(number()?).ok()?))
}

/// Makes the kernel try at once again to deliver what it retains. By itself it does so a second after
/// the first failure (`HZ` in nf_conntrack_ecache_work), in which a busy table can fill; a DESTROY that
/// gets through makes it go on at once (`NFCT_ECACHE_DESTROY_SENT`). So the guard makes a flow of its
/// own and ends it: loopback, in the last zone, where it meets no other. The agent's sockets do not see
/// it ([`Program::without_port`](super::Program)); other listeners do.
fn wake_kernel(port: u32) -> io::Result<()> {
    const ZONE: u16 = u16::MAX;
    const DISCARD: u16 = 9;
    let mut there = Tuple {
        parts: TupleParts::SRC
            | TupleParts::DST
            | TupleParts::PROTO
            | TupleParts::SRC_PORT
            | TupleParts::DST_PORT,
        proto: ipproto::IPPROTO_UDP,
        src_port: DISCARD,
        dst_port: DISCARD + 1,
        ..Tuple::default()
    };
    there.src_bytes[..4].copy_from_slice(&[127, 0, 0, 1]);
    there.dst_bytes = there.src_bytes;
    let back = Tuple { src_port: there.dst_port, dst_port: there.src_port, ..there };
    let header = |command, flags| Header {
        message_type: message_type(nfnetlink::NFNL_SUBSYS_CTNETLINK, command),
        flags: netlink::NLM_F_REQUEST | flags,
        seq: 0,
        family: family::AF_INET,
        res_id: 0,
    };
    let mut requests = Writer::new();
    requests.message(header(msg::IPCTNL_MSG_CT_NEW, netlink::NLM_F_CREATE | netlink::NLM_F_EXCL));
    write_tuple(&mut requests, cta::CTA_TUPLE_ORIG, &there);
    write_tuple(&mut requests, cta::CTA_TUPLE_REPLY, &back);
    requests.be32(cta::CTA_TIMEOUT, 1).be16(cta::CTA_ZONE, ZONE);
    requests.message(header(msg::IPCTNL_MSG_CT_DELETE, 0));
    write_tuple(&mut requests, cta::CTA_TUPLE_ORIG, &there);
    requests.be16(cta::CTA_ZONE, ZONE);
    // Errors come as answers, which nobody reads: without this the kernel tries later.
    Socket::open_at(port)?.ask(&requests.finish())
}

fn watch((config, port): (ValveConfig, u32)) -> io::Result<()> {
    let socket = Socket::from_fd(socket::inherited(0)?);
    // Closed by the end of the process and not before: at the pipe's end the agent kills us, and
    // then there would be no exit code.
    let mut pipe = ManuallyDrop::new(File::from(socket::inherited(1)?));
    socket::set_nonblocking(pipe.as_fd())?;
    let table = Table::open()?;
    socket::raise_priority();

    let started = Instant::now();
    let mut valve = Valve::new(config);
    let mut reported = Duration::ZERO;
    let mut told = 0;
    // A change that the full pipe did not take.
    let mut unsent: Option<Report> = None;
    loop {
        let (entries, limit) = table.read()?;
        let from = now();
        let memory = socket.memory()?;
        let seen = Observation {
            now: started.elapsed(),
            entries,
            limit,
            queued: memory.queued,
            queue_limit: memory.limit,
            drops: memory.drops,
        };
        if let Some(report) = unsent.take() {
            // Open, and it stays so until the agent can hear of it.
            unsent = send(&mut pipe, report)?;
        } else {
            let event = match valve.look(&seen) {
                Action::Open => Some(Event::Opened),
                Action::Arm => Some(Event::Armed),
                Action::Keep if valve.is_open() && seen.now - reported >= PROGRESS => {
                    reported = seen.now;
                    (seen.drops != told).then_some(Event::Progress)
                }
                Action::Keep => None,
            };
            let reading = match event {
                Some(Event::Opened) => {
                    let reading = switch(&socket, false)?;
                    // Without it the kernel comes to it later: no reason to end.
                    let _ = wake_kernel(port);
                    reading
                }
                Some(Event::Armed) => switch(&socket, true)?,
                Some(Event::Progress) | None => {
                    Reading { before: seen.drops, after: seen.drops, in_flight: 0 }
                }
            };
            if let Some(event) = event {
                told = reading.after;
                let at = Looked { from, to: now() };
                let report = Report { event, reading, at, entries, limit };
                match (send(&mut pipe, report)?, event) {
                    (None, _) | (Some(_), Event::Progress) => {}
                    (Some(report), Event::Opened) => unsent = Some(report),
                    // Nobody would hear: end instead, with reliable mode off; the agent counts on.
                    (Some(_), Event::Armed) => {
                        socket.set_reliable(false)?;
                        return Err(errno(libc::EWOULDBLOCK));
                    }
                }
            }
        }
        if socket::reader_gone(pipe.as_fd(), valve.next_look(&seen))? {
            return Ok(());
        }
    }
}

/// Gives the report back when the pipe is full.
fn send(pipe: &mut File, report: Report) -> io::Result<Option<Report>> {
    match pipe.write(&report.encode()) {
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(report)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let report = Report {
            event: Event::Opened,
            reading: Reading { before: 1, after: 2, in_flight: 3 },
            at: Looked { from: 4, to: 5 },
            entries: 6,
            limit: 7,
        };
        assert_eq!(Report::decode(&report.encode()), Some(report));
        assert_eq!(Report::decode(&[0; Report::SIZE]), None);
    }

    #[test]
    fn what_a_guard_failed_of_is_its_exit_code() {
        let exit_codes = [(errno(libc::ENOENT), 2), (io::ErrorKind::InvalidData.into(), 71)];
        for (error, code) in exit_codes {
            assert_eq!(exit_code(&error), code);
        }
        // It ends with 1, EPERM, whatever it is given.
        let (socket, _other) = UnixDatagram::pair().unwrap();
        let program = Some(Path::new("/bin/false"));
        let mut guard = Guard::start(program, socket.into(), &ValveConfig::default(), 0).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        let gone = loop {
            match guard.next_report() {
                Ok(report) => assert_eq!(report, None),
                Err(error) => break error,
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(guard.end().unwrap().raw_os_error(), Some(1));
    }
}
