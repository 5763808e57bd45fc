//! The dump at start: subscribe first, then dump, so that no flow falls between.

use crate::capture::{Item, Sender};
use crate::control::{Control, push, snapshot};
use crate::pipeline::now;

/// Dumps the table into the queue and then says there how it ended. Call it when the sockets have
/// joined their groups: live events that come meanwhile mark what they overtake.
pub(super) async fn take(out: Sender) {
    let from = now();
    let mut control = match Control::connect() {
        Ok(control) => control,
        Err(error) => {
            tracing::warn!(%error, "the table at start could not be dumped");
            // Closed means that the agent is stopping.
            let _ = push(&out, Item::SnapshotEnd { complete: false, from, at: now() }).await;
            return;
        }
    };
    match snapshot(&mut control, &out).await {
        Ok(end) => match end.why {
            None => tracing::info!(entries = end.entries, "the table at start is recorded"),
            Some(why) => tracing::warn!(
                entries = end.entries, %why,
                "the record of the table at start may lack entries, and a gap record says so"
            ),
        },
        Err(error) => tracing::warn!(%error, "the table at start could not be dumped"),
    }
}
