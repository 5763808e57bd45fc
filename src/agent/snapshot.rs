//! The dump at start: subscribe first, then dump, so that no flow falls between.

use std::time::Duration;

use crate::capture::{Closed, Item, RawBatch, Sender};
use crate::control::{Control, DumpEnd, Error, Family};
use crate::pipeline::now;

/// How long the dump waits when the queue is full before it looks again. The kernel waits with it.
const FULL: Duration = Duration::from_millis(2);

/// A dump that was cut off or interrupted is tried again, since a second one is usually whole.
const ATTEMPTS: u32 = 3;

/// Dumps the table into the queue and then says there how it ended. Call it when the sockets have
/// joined their groups: live events that come meanwhile mark what they overtake.
pub(super) async fn take(out: Sender) {
    let from = now();
    let mut complete = false;
    for attempt in 1..=ATTEMPTS {
        match dump(&out).await {
            Ok(end) => match end.why {
                None => {
                    tracing::info!(entries = end.entries, "the table at start is recorded");
                    complete = true;
                }
                Some(why) => tracing::warn!(
                    entries = end.entries, attempt, %why,
                    "the dump of the table may lack entries"
                ),
            },
            Err(error) => tracing::warn!(%error, attempt, "the table could not be dumped"),
        }
        if complete {
            break;
        }
    }
    // Closed means that the agent is stopping: nobody waits for the end of the dump.
    let _ = put(&out, Item::SnapshotEnd { complete, from, at: now() }).await;
}

async fn dump(out: &Sender) -> Result<DumpEnd, Error> {
    let mut control = Control::connect()?;
    control
        .dump_conntrack(Family::Both, async |mut batch: RawBatch| {
            batch.arrived = now();
            put(out, Item::Snapshot(batch)).await.ok().map(|()| out.spare())
        })
        .await
}

/// Puts an item into the queue, waiting for room without blocking the runtime.
pub(super) async fn put(out: &Sender, item: Item) -> Result<(), Closed> {
    let mut waiting = item;
    while let Some(item) = out.try_push(waiting)? {
        waiting = item;
        tokio::time::sleep(FULL).await;
    }
    Ok(())
}
