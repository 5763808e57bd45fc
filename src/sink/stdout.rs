//! Standard output: whole chunks, one write each.
//!
//! Promises: whole lines, in order; a reader that is slow, or that made the pipe non-blocking, is
//! waited for, a reader that is gone ends the sink. A reader that takes nothing never holds the
//! thread for longer than [`PATIENCE`], so that the agent can stop. Never buffers a line, and never
//! changes the flags of a descriptor that other programs share.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::net::SendFlags;

use super::{Chunk, Sink, SinkError};

/// How long one delivery waits for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_millis(250);

/// How bytes are handed over without being caught in a write that a reader never ends.
#[derive(Debug)]
enum Way {
    /// Files, and whatever else can't be had otherwise.
    Write(OwnedFd),
    /// Pipes and terminals, opened anew: `O_NONBLOCK` belongs to the open file description, and on
    /// the one that we were given it would change a shell's terminal under its feet.
    OwnDescription(File),
    /// Sockets, journald's for example: `MSG_DONTWAIT` does it a call.
    Send(OwnedFd),
}

/// The sink that writes to standard output.
#[derive(Debug)]
pub struct StdoutSink {
    way: Way,
    /// How many bytes of the first record not delivered are out.
    torn: usize,
}

impl StdoutSink {
    pub fn new() -> io::Result<Self> {
        Self::to(io::stdout().as_fd())
    }

    fn to(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let kind = File::from(fd.try_clone_to_owned()?).metadata()?.file_type();
        let way = if kind.is_socket() {
            Way::Send(fd.try_clone_to_owned()?)
        } else if kind.is_fifo() || kind.is_char_device() {
            open_anew(fd).map_or_else(
                // Not ours to open: it was opened by another user, or /proc is missing.
                |_| fd.try_clone_to_owned().map(Way::Write),
                |file| Ok(Way::OwnDescription(file)),
            )?
        } else {
            Way::Write(fd.try_clone_to_owned()?)
        };
        Ok(StdoutSink { way, torn: 0 })
    }
}

impl StdoutSink {
    fn is_hung_up(&self) -> bool {
        // An error of poll says nothing about the reader; the next write will.
        self.way.wait(Duration::ZERO).unwrap_or(false)
    }
}

fn closed() -> SinkError {
    SinkError::Gone("standard output was closed".to_owned())
}

fn open_anew(fd: BorrowedFd<'_>) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

impl Way {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(match self {
            Way::Write(fd) => rustix::io::write(fd, bytes)?,
            Way::OwnDescription(file) => rustix::io::write(file, bytes)?,
            Way::Send(fd) => {
                rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?
            }
        })
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Way::Write(fd) | Way::Send(fd) => fd.as_fd(),
            Way::OwnDescription(file) => file.as_fd(),
        }
    }

    /// Waits until something can be written or the reader is gone; says whether it is gone.
    fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let timeout =
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::OUT)];
        poll(&mut fds, Some(&timeout))?;
        Ok(fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP))
    }
}

impl Sink for StdoutSink {
    fn deliver(&mut self, chunk: &Chunk, from: usize) -> (usize, Result<(), SinkError>) {
        let give_up = Instant::now() + PATIENCE;
        let mut at = chunk.start(from) + self.torn;
        let result = loop {
            if at == chunk.bytes.len() {
                break Ok(());
            }
            let error = match self.way.write(&chunk.bytes[at..]) {
                // A write of some bytes never gives 0; should it, waiting is right.
                Ok(0) => ErrorKind::WouldBlock.into(),
                Ok(count) => {
                    at += count;
                    continue;
                }
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => {
                    let left = give_up.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break Err(SinkError::Busy);
                    }
                    match self.way.wait(left) {
                        Err(error) if error.kind() != ErrorKind::Interrupted => {
                            break Err(SinkError::Retry(format!("poll of stdout: {error}")));
                        }
                        _ => {}
                    }
                }
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => break Err(closed()),
                // EIO of a terminal: it hung up.
                _ if self.is_hung_up() => break Err(closed()),
                _ => break Err(SinkError::Retry(format!("writing to standard output: {error}"))),
            }
        };
        let done = chunk.whole_within(at);
        self.torn = at - chunk.start(done);
        (done, result)
    }

    fn reopen(&mut self) {}

    /// Notices a reader that is gone without waiting for the next record to find out.
    fn idle(&mut self) -> Result<(), SinkError> {
        if self.is_hung_up() { Err(closed()) } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// `count` lines of about `len` bytes, each different.
    fn chunk(count: usize, len: usize) -> Chunk {
        let mut chunk = Chunk::default();
        for index in 0..count {
            chunk.bytes.extend_from_slice(format!("{index:0>len$}\n").as_bytes());
            chunk.ends.push(chunk.bytes.len());
        }
        chunk
    }

    /// Delivers all of it however often it takes; gives how often the reader was busy.
    fn deliver_all(sink: &mut StdoutSink, chunk: &Chunk) -> usize {
        let (mut done, mut busy) = (0, 0);
        while done < chunk.len() {
            let (now, result) = sink.deliver(chunk, done);
            assert!(now >= done);
            done = now;
            match result {
                Ok(()) => assert_eq!(done, chunk.len()),
                Err(SinkError::Busy) => busy += 1,
                Err(error) => panic!("{error}"),
            }
        }
        busy
    }

    fn slow_reader(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE * 2);
            let mut all = Vec::new();
            from.read_to_end(&mut all).unwrap();
            all
        })
    }

    #[test]
    fn a_reader_of_a_pipe_that_takes_nothing_is_reported_busy_and_gets_every_byte_in_the_end() {
        let (reader, writer) = io::pipe().unwrap();
        let mut sink = StdoutSink::to(writer.as_fd()).unwrap();
        assert!(matches!(sink.way, Way::OwnDescription(_)));
        sink.idle().unwrap();
        let reader = slow_reader(reader);
        let chunk = chunk(3000, 333);
        assert!(deliver_all(&mut sink, &chunk) >= 1);
        let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK), "the given descriptor is as it was");
        drop((sink, writer));
        assert_eq!(reader.join().unwrap(), chunk.bytes);
    }

    #[test]
    fn a_busy_socket_too() {
        let (reader, writer) = UnixStream::pair().unwrap();
        let mut sink = StdoutSink::to(writer.as_fd()).unwrap();
        assert!(matches!(sink.way, Way::Send(_)));
        let reader = slow_reader(reader);
        let chunk = chunk(3000, 333);
        assert!(deliver_all(&mut sink, &chunk) >= 1);
        drop((sink, writer));
        assert_eq!(reader.join().unwrap(), chunk.bytes);
    }

    #[test]
    fn a_descriptor_that_is_not_ours_to_open_but_non_blocking_is_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        rustix::fs::fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let mut sink =
            StdoutSink { way: Way::Write(writer.as_fd().try_clone_to_owned().unwrap()), torn: 0 };
        let reader = slow_reader(reader);
        let chunk = chunk(3000, 333);
        assert!(deliver_all(&mut sink, &chunk) >= 1);
        drop((sink, writer));
        assert_eq!(reader.join().unwrap(), chunk.bytes);
    }

    #[test]
    fn a_file_shares_its_offset_with_the_one_that_gave_it() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"before\n").unwrap();
        let mut sink = StdoutSink::to(file.as_fd()).unwrap();
        assert!(matches!(sink.way, Way::Write(_)));
        assert_eq!(deliver_all(&mut sink, &chunk(2, 3)), 0);
        io::Write::write_all(&mut file, b"after\n").unwrap();
        let mut all = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut all).unwrap();
        assert_eq!(all, "before\n000\n001\nafter\n");
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_sink() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut pipe = StdoutSink::to(writer.as_fd()).unwrap();
        let (reader, writer) = UnixStream::pair().unwrap();
        drop(reader);
        let mut socket = StdoutSink::to(writer.as_fd()).unwrap();
        for sink in [&mut pipe, &mut socket] {
            assert!(matches!(sink.idle(), Err(SinkError::Gone(_))), "noticed without a record");
            let (done, result) = sink.deliver(&chunk(3, 10), 0);
            assert_eq!(done, 0);
            assert!(matches!(result, Err(SinkError::Gone(_))), "{result:?}");
        }
    }
}
