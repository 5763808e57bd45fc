//! What capture counts. Written by the capture thread alone, read by anyone at any time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counters of one socket.
#[derive(Debug, Default)]
pub struct SocketStats {
    /// Datagrams read; ctnetlink puts one event in each.
    pub datagrams: AtomicU64,
    pub bytes: AtomicU64,
    /// Events that did not fit (`sk_drops`). On a reliable socket these are attempts that the kernel
    /// repeats, see [`CaptureStats::retries`].
    pub drops: AtomicU64,
    /// Datagrams too long for the buffer.
    pub truncated: AtomicU64,
    /// Receive memory in use after the last round.
    pub queue_bytes: AtomicU64,
    /// What the kernel lets it grow to: twice the configured size.
    pub queue_limit: AtomicU64,
}

#[derive(Debug, Default)]
pub struct CaptureStats {
    /// The socket of DESTROY.
    pub destroys: SocketStats,
    /// The socket of NEW, UPDATE and expectations.
    pub events: SocketStats,
    pub rounds: AtomicU64,
    pub valve_opens: AtomicU64,
    /// DESTROYs lost while reliable mode was off, as far as gap records tell them.
    pub destroys_lost: AtomicU64,
    pub guard_starts: AtomicU64,
    /// The kernel keeps DESTROYs that did not fit.
    pub reliable_active: AtomicBool,
}

impl CaptureStats {
    /// Attempts to deliver a DESTROY that the kernel repeated: not losses.
    pub fn retries(&self) -> u64 {
        get(&self.destroys.drops).saturating_sub(get(&self.destroys_lost))
    }
}

pub(super) fn add(counter: &AtomicU64, value: u64) {
    // One writer: a plain store would do, but an add costs nothing at this rate.
    counter.fetch_add(value, Ordering::Relaxed);
}

pub(super) fn set(counter: &AtomicU64, value: u64) {
    counter.store(value, Ordering::Relaxed);
}

pub(super) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
