//! Measures ways of reading the two event sockets against the floor, on the same storm: the
//! figures that say how the capture thread should read.
//!
//! On 6.18 and two cores, 500,000 flows, medians of five, µs of CPU an event: the floor 1.76; a
//! non-blocking `recv` and 2 ms of sleep 0.98, 5 ms 1.08, 10 ms 1.16; `recvmmsg` and 2 ms 0.94 to
//! 0.97 with slots of 4 KiB or 512 bytes. All delivered everything. So: 2 ms, and `recvmmsg` is
//! not worth its code.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Result;
use super::floor::{self, Seen, Stop};
use super::generator::{Flows, Generator};
use super::netns::Netns;
use super::sys::{self, GROUP_DESTROY, GROUP_NEW, NetlinkSocket, Slots};

/// Nothing for this long means that the storm has been read.
const QUIET: Duration = Duration::from_millis(200);
/// As the capture thread has it: one large buffer, filled message after message.
const PACK: usize = 256 * 1024;
const LONGEST: usize = 8192;

/// A way of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Blocking `recv` of one message a call, both groups on one socket.
    Floor,
    /// Non-blocking `recv` of one message a call into a large buffer, then a sleep.
    Recv { sleep_ms: u64 },
    /// `recvmmsg` into slots, then a sleep.
    Mmsg { count: usize, slot: usize, spill: usize, sleep_ms: u64 },
}

pub(crate) const WAYS: &[Way] = &[
    Way::Floor,
    Way::Recv { sleep_ms: 2 },
    Way::Recv { sleep_ms: 5 },
    Way::Recv { sleep_ms: 10 },
    Way::Mmsg { count: 64, slot: 4096, spill: 0, sleep_ms: 2 },
    Way::Mmsg { count: 64, slot: 512, spill: 4096, sleep_ms: 2 },
    Way::Mmsg { count: 256, slot: 512, spill: 4096, sleep_ms: 2 },
    Way::Mmsg { count: 64, slot: 512, spill: 4096, sleep_ms: 5 },
    Way::Mmsg { count: 64, slot: 512, spill: 4096, sleep_ms: 10 },
];

/// One storm read one way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) seen: Seen,
    pub(crate) create_rate: f64,
    pub(crate) flush_rate: f64,
}

/// Creates and flushes `flows` flows in a namespace of its own while a thread reads them `way`.
pub(crate) fn measure(way: Way, flows: u32, buffer: usize, threads: usize) -> Result<Sample> {
    let netns = Netns::new("probe")?;
    netns.conntrack_settings(1, true, true)?;
    let mut generator = Generator::with(&netns, threads, super::generator::BATCH)?;
    let groups: &[&[i32]] = match way {
        Way::Floor => &[&[GROUP_NEW, GROUP_DESTROY]],
        Way::Recv { .. } | Way::Mmsg { .. } => &[&[GROUP_DESTROY], &[GROUP_NEW]],
    };
    let (sockets, waker) = netns.run(|| {
        let sockets: std::io::Result<Vec<_>> =
            groups.iter().map(|groups| NetlinkSocket::listen(groups, buffer)).collect();
        Result::Ok((sockets?, NetlinkSocket::open()?))
    })?;
    let stop = Stop::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let before = sys::thread_usage()?;
            let mut seen = match way {
                Way::Floor => floor::read(&sockets[0], &stop, None)?,
                Way::Recv { sleep_ms } => {
                    let mut buffer = vec![0; PACK];
                    read_sleeping(&sockets, &stop, sleep_ms, |socket, seen| {
                        drain_recv(socket, &mut buffer, seen)
                    })?
                }
                Way::Mmsg { count, slot, spill, sleep_ms } => {
                    let mut slots = Slots::new(count, slot, spill);
                    read_sleeping(&sockets, &stop, sleep_ms, |socket, seen| {
                        drain_mmsg(socket, &mut slots, seen)
                    })?
                }
            };
            seen.usage = sys::thread_usage()?;
            seen.usage.cpu -= before.cpu;
            Result::Ok(seen)
        });
        let created = generator.insert(&Flows::default(), 0..flows)?;
        if created.done != u64::from(flows) {
            return Err(format!("the kernel refused flows: {:?}", created.refused).into());
        }
        let flushed = generator.flush()?;
        stop.when_quiet(QUIET, &waker, sockets[0].port_id()?)?;
        let seen = reader.join().expect("the reader does not panic")?;
        Ok(Sample {
            seen,
            create_rate: created.rate(),
            flush_rate: f64::from(flows) / flushed.as_secs_f64(),
        })
    })
}

fn read_sleeping(
    sockets: &[NetlinkSocket],
    stop: &Stop,
    sleep_ms: u64,
    mut drain: impl FnMut(&NetlinkSocket, &mut Seen) -> Result<()>,
) -> Result<Seen> {
    let mut seen = Seen::default();
    while !stopped(&stop.stop) {
        for socket in sockets {
            drain(socket, &mut seen)?;
        }
        stop.events.store(seen.events(), Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(sleep_ms));
    }
    for socket in sockets {
        seen.drops += u64::from(socket.drops()?);
    }
    Ok(seen)
}

fn stopped(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

/// Message after message into one buffer, from its start again when it is full.
fn drain_recv(socket: &NetlinkSocket, buffer: &mut [u8], seen: &mut Seen) -> Result<()> {
    let mut at = 0;
    loop {
        if buffer.len() - at < LONGEST {
            at = 0;
        }
        match socket.receive(&mut buffer[at..], libc::MSG_DONTWAIT) {
            Ok(length) => {
                seen.count(&buffer[at..at + length]);
                at += length;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn drain_mmsg(socket: &NetlinkSocket, slots: &mut Slots, seen: &mut Seen) -> Result<()> {
    loop {
        match slots.receive(socket) {
            Ok(count) => {
                for index in 0..count {
                    seen.count(slots.start(index));
                }
                if count < slots.len() {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
