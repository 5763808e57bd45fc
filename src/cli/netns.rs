//! The network namespace that a command works in.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

use super::output::fail;
use super::{Exit, NetnsArgs};

/// Where `ip netns add` puts names.
const NAMED: &str = "/run/netns";

impl NetnsArgs {
    /// Enters the namespace that was asked for, if one was. The calling thread and those that it
    /// starts from now on are in it: call it before anything else.
    pub(super) fn enter(&self) -> Result<(), Exit> {
        let Some(name) = &self.netns else { return Ok(()) };
        let path = path_of(name);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let why = format!(
                    "there is no network namespace {name} ({}); `ip netns list` shows those that \
                     have names",
                    path.display()
                );
                fail(Exit::Failure, &why)
            }
            io::ErrorKind::PermissionDenied => denied(name, &error),
            _ => fail(Exit::Failure, &format!("{}: {error}", path.display())),
        })?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
            Errno::EPERM => denied(name, &errno),
            Errno::EINVAL => {
                fail(Exit::Failure, &format!("{} is no network namespace", path.display()))
            }
            _ => fail(Exit::Failure, &format!("{}: {errno}", path.display())),
        })
    }
}

fn denied(name: &str, why: &dyn std::fmt::Display) -> Exit {
    fail(Exit::Privilege, &format!("entering network namespace {name} needs CAP_SYS_ADMIN ({why})"))
}

fn path_of(name: &str) -> PathBuf {
    if name.contains('/') { PathBuf::from(name) } else { Path::new(NAMED).join(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_up_and_a_path_is_taken() {
        assert_eq!(path_of("blue"), Path::new("/run/netns/blue"));
        assert_eq!(path_of("/proc/1/ns/net"), Path::new("/proc/1/ns/net"));
    }
}
