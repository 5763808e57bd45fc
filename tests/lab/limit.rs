//! `nf_conntrack_max`, borrowed: it is one number for the whole host, so tests in several threads
//! and processes agree on it through locks, and the last one puts it back.
//!
//! Whoever makes entries holds this, else somebody's low limit refuses them.
//! Those that only need room share the lock; one that needs a low limit has it alone. A process
//! that was killed leaves the original value in the lock file, and the next user restores it.
//! Must be called in the initial network namespace: elsewhere the kernel lets nobody write it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

use super::Result;

const NF_CONNTRACK_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// Holds `nf_conntrack_max`; restores it on drop when nobody else holds it.
#[derive(Debug)]
pub(crate) struct HostLimit {
    /// Taken out on drop only.
    lock: Option<Flock<File>>,
}

impl HostLimit {
    /// The limit is `entries` or more until this is dropped. Waits for one who has it alone.
    pub(crate) fn at_least(entries: u64) -> Result<Self> {
        let mut lock = lock("use", FlockArg::LockShared)?;
        // Several may share: they take turns here.
        let _turn = self::lock("turn", FlockArg::LockExclusive)?;
        remember(&mut lock)?;
        if read_limit()? < entries {
            write_limit(entries)?;
        }
        Ok(Self { lock: Some(lock) })
    }

    /// The limit is exactly `entries` until this is dropped. Waits for everybody else.
    pub(crate) fn exactly(entries: u64) -> Result<Self> {
        let mut lock = lock("use", FlockArg::LockExclusive)?;
        remember(&mut lock)?;
        write_limit(entries)?;
        Ok(Self { lock: Some(lock) })
    }
}

impl Drop for HostLimit {
    fn drop(&mut self) {
        let lock = self.lock.take().expect("only drop takes it");
        if let Err(error) = give_back(lock) {
            eprintln!("nf_conntrack_max was not restored: {error}");
        }
    }
}

/// Restores the original when we are the last one. flock lets go of the shared lock before it
/// tries for the exclusive one, so of several who leave at once, one gets it.
fn give_back(lock: Flock<File>) -> Result<()> {
    let _turn = self::lock("turn", FlockArg::LockExclusive)?;
    if lock.relock(FlockArg::LockExclusiveNonblock).is_err() {
        return Ok(());
    }
    let mut file: &File = &lock;
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    write_limit(text.trim().parse()?)?;
    file.set_len(0)?;
    Ok(())
}

/// Writes the original limit into the lock file, unless one stands there already.
fn remember(lock: &mut Flock<File>) -> Result<()> {
    let mut file: &File = lock;
    if file.metadata()?.len() == 0 {
        file.rewind()?;
        write!(file, "{}", read_limit()?)?;
    }
    Ok(())
}

fn lock(name: &str, kind: FlockArg) -> Result<Flock<File>> {
    let path: PathBuf = std::env::temp_dir().join(format!("conntrail-lab-limit-{name}.lock"));
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    Flock::lock(file, kind).map_err(|(_, error)| format!("{}: {error}", path.display()).into())
}

fn read_limit() -> Result<u64> {
    Ok(fs::read_to_string(NF_CONNTRACK_MAX)?.trim().parse()?)
}

fn write_limit(entries: u64) -> Result<()> {
    fs::write(NF_CONNTRACK_MAX, entries.to_string())
        .map_err(|error| format!("{NF_CONNTRACK_MAX} = {entries}: {error}").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::need;

    #[test]
    fn the_limit_is_raised_and_put_back() {
        if need::lacks_root() {
            return;
        }
        let original = {
            // Alone, so that no other test's value is taken for the original.
            let _alone = HostLimit::exactly(12_345).expect("the limit");
            assert_eq!(read_limit().expect("the limit"), 12_345);
            fs::read_to_string(std::env::temp_dir().join("conntrail-lab-limit-use.lock"))
                .expect("the lock file")
                .parse::<u64>()
                .expect("a number")
        };
        let first = HostLimit::at_least(original + 10).expect("the limit");
        let second = HostLimit::at_least(original + 5).expect("the limit");
        drop(first);
        assert!(read_limit().expect("the limit") >= original + 10);
        drop(second);
    }
}
