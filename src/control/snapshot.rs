//! The table at start, into the queue behind what capture has already put there.
//!
//! Promises: the last item is always [`Item::SnapshotEnd`], which says whether the snapshot is
//! whole, unless the queue is closed; waits while the queue is full, and the kernel's dump waits
//! with it. Subscribe first: then a flow that begins or ends meanwhile is in the events.

use std::time::Duration;

use super::Error;
use super::conntrack::{Control, DumpEnd, Family};
use crate::capture::{Closed, Item, RawBatch, Sender};
use crate::pipeline::now;

/// How long to wait before a full queue is tried again. It has no signal for async tasks; a batch
/// is 0.5 ms of the pipeline's work, and a dump has no hurry.
const RETRY: Duration = Duration::from_millis(2);

/// Dumps the table into `queue`. Both IP versions, as capture listens to both.
pub async fn snapshot(control: &mut Control, queue: &Sender) -> Result<DumpEnd, Error> {
    let from = now();
    let taken = async |mut batch: RawBatch| {
        batch.arrived = now();
        push(queue, Item::Snapshot(batch)).await.ok().map(|()| queue.spare())
    };
    let end = control.dump_conntrack(Family::Both, taken).await;
    let complete = end.as_ref().is_ok_and(DumpEnd::complete);
    // A closed queue means that the agent stops: nobody is left to be told.
    let _ = push(queue, Item::SnapshotEnd { complete, from, at: now() }).await;
    end
}

/// Puts an item into the queue, waiting for room without blocking the runtime.
pub async fn push(queue: &Sender, mut item: Item) -> Result<(), Closed> {
    while let Some(refused) = queue.try_push(item)? {
        item = refused;
        tokio::time::sleep(RETRY).await;
    }
    Ok(())
}
