//! The bounded queue of raw batches between capture and the pipeline.
//!
//! Bounded by bytes, not by items, because a batch is anything from one event to a whole buffer.
//! Producers wait when it is full: that is the agent's back-pressure on the kernel. Used buffers go
//! back to the producers, because fresh ones cost a page fault every 4 KiB.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::socket::BATCH_BYTES;
use super::{Item, RawBatch};

/// What an item weighs besides its buffers: its place in the queue, which grows by doubling, and what
/// an allocator adds to two buffers.
const SMALL_ITEM: usize = 2 * size_of::<Item>() + 32;

/// Buffers that are worth keeping: those of the reader. Smaller ones would have to grow, larger ones
/// would never become smaller.
const WORTH_KEEPING: std::ops::RangeInclusive<usize> = BATCH_BYTES..=2 * BATCH_BYTES;

/// Spare buffers kept, so 8 MiB at most; more than these are in use at a time only when the queue fills.
const MAX_SPARE: usize = 16;

/// The other side is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue is closed")]
pub struct Closed;

#[derive(Debug)]
struct State {
    items: VecDeque<Item>,
    spare: Vec<RawBatch>,
    bytes: usize,
    senders: usize,
    receiver: bool,
}

/// The shared part; also tells how full it is.
#[derive(Debug)]
pub struct Queue {
    state: Mutex<State>,
    not_empty: Condvar,
    not_full: Condvar,
    max_bytes: usize,
}

impl Queue {
    /// Bytes queued now.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock, so a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub struct Sender(Arc<Queue>);

#[derive(Debug)]
pub struct Receiver(Arc<Queue>);

/// A queue that holds up to `max_bytes`, or one item of any size.
pub fn queue(max_bytes: usize) -> (Sender, Receiver) {
    let queue = Arc::new(Queue {
        state: Mutex::new(State {
            items: VecDeque::new(),
            spare: Vec::new(),
            bytes: 0,
            senders: 1,
            receiver: true,
        }),
        not_empty: Condvar::new(),
        not_full: Condvar::new(),
        max_bytes,
    });
    (Sender(queue.clone()), Receiver(queue))
}

fn weight(item: &Item) -> usize {
    match item {
        Item::Events(batch) | Item::Snapshot(batch) => SMALL_ITEM + batch.weight(),
        _ => SMALL_ITEM,
    }
}

impl Sender {
    /// Puts `item` at the end, waiting for room.
    pub fn push(&self, item: Item) -> Result<(), Closed> {
        let weight = weight(&item);
        let mut state = self.0.lock();
        while state.receiver && state.bytes > 0 && state.bytes + weight > self.0.max_bytes {
            state = self.0.not_full.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.put(state, item, weight).map_err(|_| Closed)
    }

    /// Like [`push`](Self::push), but gives the item back instead of waiting: for async callers.
    pub fn try_push(&self, item: Item) -> Result<Option<Item>, Closed> {
        let weight = weight(&item);
        let state = self.0.lock();
        if state.receiver && state.bytes > 0 && state.bytes + weight > self.0.max_bytes {
            return Ok(Some(item));
        }
        self.put(state, item, weight).map(|()| None).map_err(|_| Closed)
    }

    /// An empty batch, with a used buffer where there is one.
    pub fn spare(&self) -> RawBatch {
        self.0.lock().spare.pop().unwrap_or_default()
    }

    pub fn queue(&self) -> Arc<Queue> {
        self.0.clone()
    }

    fn put(&self, mut state: MutexGuard<'_, State>, item: Item, weight: usize) -> Result<(), Item> {
        if !state.receiver {
            return Err(item);
        }
        state.bytes += weight;
        state.items.push_back(item);
        drop(state);
        self.0.not_empty.notify_one();
        Ok(())
    }
}

impl Clone for Sender {
    fn clone(&self) -> Self {
        self.0.lock().senders += 1;
        Sender(self.0.clone())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().senders -= 1;
        self.0.not_empty.notify_all();
    }
}

impl Receiver {
    /// The next item; `Ok(None)` when none came in time, `Err` when the queue is empty and every
    /// sender is gone.
    pub fn pop(&self, timeout: Duration) -> Result<Option<Item>, Closed> {
        let deadline = Instant::now() + timeout;
        let mut state = self.0.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                state.bytes -= weight(&item);
                drop(state);
                self.0.not_full.notify_all();
                return Ok(Some(item));
            }
            if state.senders == 0 {
                return Err(Closed);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            state = self
                .0
                .not_empty
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Gives a used batch's buffer back to the senders, where it is worth that.
    pub fn recycle(&self, mut batch: RawBatch) {
        if !WORTH_KEEPING.contains(&batch.bytes.capacity()) {
            return;
        }
        batch.clear();
        let mut state = self.0.lock();
        if state.spare.len() < MAX_SPARE {
            state.spare.push(batch);
        }
    }
}

#[cfg(test)]
impl Receiver {
    /// The memory in use for what is queued, counted anew.
    pub(super) fn memory(&self) -> usize {
        let state = self.0.lock();
        let buffers = state.items.iter().map(|item| match item {
            Item::Events(batch) | Item::Snapshot(batch) => {
                batch.bytes.capacity() + batch.datagrams.capacity() * size_of::<(u32, u32)>()
            }
            _ => 0,
        });
        buffers.sum::<usize>() + state.items.capacity() * size_of::<Item>()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.receiver = false;
        state.items.clear();
        state.bytes = 0;
        drop(state);
        self.0.not_full.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(bytes: usize) -> Item {
        let mut batch = RawBatch::default();
        batch.push(&vec![0; bytes]);
        Item::Events(batch)
    }

    #[test]
    fn an_item_larger_than_the_bound_passes_when_the_queue_is_empty() {
        let (tx, rx) = queue(10);
        tx.push(events(1000)).unwrap();
        assert!(matches!(rx.pop(Duration::ZERO), Ok(Some(Item::Events(_)))));
        assert_eq!(tx.queue().bytes(), 0);
    }

    #[test]
    fn a_full_queue_makes_the_sender_wait_until_there_is_room() {
        let (tx, rx) = queue(1500);
        tx.push(events(1000)).unwrap();
        assert!(tx.try_push(events(1000)).unwrap().is_some());
        let pusher = std::thread::spawn(move || tx.push(events(1000)));
        assert!(rx.pop(Duration::from_secs(10)).unwrap().is_some());
        assert!(rx.pop(Duration::from_secs(10)).unwrap().is_some());
        pusher.join().unwrap().unwrap();
        assert_eq!(rx.pop(Duration::ZERO).unwrap_err(), Closed);
    }

    #[test]
    fn a_receiver_that_goes_away_frees_a_waiting_sender() {
        let (tx, rx) = queue(10);
        tx.push(events(100)).unwrap();
        let pusher = std::thread::spawn(move || tx.push(events(100)));
        drop(rx);
        assert_eq!(pusher.join().unwrap(), Err(Closed));
    }

    #[test]
    fn what_was_queued_is_still_given_after_the_last_sender_went() {
        let (tx, rx) = queue(1000);
        let second = tx.clone();
        drop(tx);
        second.push(events(4)).unwrap();
        drop(second);
        assert!(matches!(rx.pop(Duration::ZERO), Ok(Some(_))));
        assert_eq!(rx.pop(Duration::ZERO).unwrap_err(), Closed);
    }

    #[test]
    fn only_buffers_of_the_readers_size_are_kept_and_not_too_many() {
        let (tx, rx) = queue(1 << 20);
        for bytes in [1000, 2 * BATCH_BYTES + 4] {
            rx.recycle(RawBatch { bytes: Vec::with_capacity(bytes), ..RawBatch::default() });
            assert_eq!(tx.spare().bytes.capacity(), 0, "{bytes}");
        }
        for _ in 0..2 * MAX_SPARE {
            rx.recycle(RawBatch { bytes: Vec::with_capacity(BATCH_BYTES), ..RawBatch::default() });
        }
        let kept = (0..2 * MAX_SPARE).filter(|_| tx.spare().bytes.capacity() > 0).count();
        assert_eq!(kept, MAX_SPARE);
    }

    #[test]
    fn a_used_buffer_is_used_again() {
        let (tx, rx) = queue(1 << 20);
        tx.push(events(BATCH_BYTES)).unwrap();
        let Ok(Some(Item::Events(batch))) = rx.pop(Duration::ZERO) else { panic!("no batch") };
        let capacity = batch.bytes.capacity();
        rx.recycle(batch);
        let spare = tx.spare();
        assert!(spare.bytes.is_empty() && spare.datagrams.is_empty());
        assert_eq!(spare.bytes.capacity(), capacity);
    }
}
