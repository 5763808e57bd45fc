//! Who records, where, and in which run.

use std::io;
use std::os::unix::fs::MetadataExt;

use crate::flow::{FlowIds, Identity};
use crate::pipeline::now;

const NETNS: &str = "/proc/thread-self/ns/net";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The identity of this run and the flow ids of this boot and namespace. `netns` is the name that
/// the user gave the namespace; without one it goes by its inode number, which lsns(8) shows.
pub(crate) fn of_this_run(agent: &str, netns: Option<&str>) -> io::Result<(Identity, FlowIds)> {
    let inode = std::fs::metadata(NETNS)?.ino();
    let boot_id = std::fs::read_to_string(BOOT_ID)?;
    let identity = Identity {
        agent: agent.to_owned(),
        epoch: epoch(),
        netns: netns.map_or_else(|| inode.to_string(), str::to_owned),
    };
    Ok((identity, FlowIds::new(boot_id.trim(), inode)))
}

/// Milliseconds since 1970 at the start: higher for later runs as long as the clock is not set back
/// between two of them, and exact in JSON's numbers. A spool on disk will keep the last one.
fn epoch() -> u64 {
    now() / 1_000_000
}
