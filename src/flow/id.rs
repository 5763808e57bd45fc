//! `flow_id`: one number for all records of a flow.
//!
//! XXH3-64 (its output is specified for ever), seeded by boot and namespace, over zone, `CTA_ID`
//! and the original tuple. NEW carries no start time, so the start can't be part of it: the kernel
//! may give the same id and tuple to a later flow (kernel.md: 32 ids for 100 flows in a row), and
//! (`flow_id`, `start`) is unique.

use twox_hash::XxHash3_64;

use crate::ctnetlink::{Attrs, Conn, TupleParts};

/// Makes the ids of one namespace in one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowIds {
    seed: u64,
}

impl FlowIds {
    /// `boot_id` is `/proc/sys/kernel/random/boot_id`, `netns` the namespace's inode number.
    pub fn new(boot_id: &str, netns: u64) -> Self {
        let mut name = Vec::with_capacity(boot_id.len() + 8);
        name.extend_from_slice(boot_id.as_bytes());
        name.extend_from_slice(&netns.to_be_bytes());
        FlowIds { seed: XxHash3_64::oneshot(&name) }
    }

    pub fn of(&self, conn: &Conn) -> u64 {
        let tuple = &conn.orig;
        let zone = if conn.has(Attrs::ZONE) { conn.zone } else { 0 };
        let (a, b, c) = if tuple.has(TupleParts::ICMP) {
            (tuple.icmp_id, tuple.icmp_type, tuple.icmp_code)
        } else {
            (tuple.src_port, 0, 0)
        };
        let mut key = [0; 46];
        key[..4].copy_from_slice(&conn.id.to_be_bytes());
        key[4..6].copy_from_slice(&zone.to_be_bytes());
        key[6] = tuple.proto;
        key[7] = tuple.v6.into();
        key[8..24].copy_from_slice(&tuple.src_bytes);
        key[24..40].copy_from_slice(&tuple.dst_bytes);
        key[40..42].copy_from_slice(&a.to_be_bytes());
        key[42..44].copy_from_slice(&tuple.dst_port.to_be_bytes());
        key[44] = b;
        key[45] = c;
        XxHash3_64::oneshot_with_seed(self.seed, &key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conn() -> Conn {
        let mut conn = Conn { id: 7, ..Conn::default() };
        conn.orig.proto = 6;
        conn.orig.src_port = 1;
        conn.orig.dst_port = 2;
        conn
    }

    #[test]
    fn the_id_is_the_same_for_ever() {
        // A change here breaks every stored record: raise SCHEMA if it must be.
        let ids = FlowIds::new("9d0c5ff1-8f10-4a5b-9b2e-b1d8a3c7a5e1", 4026531840);
        assert_eq!(ids.of(&conn()), FlowIds::of(&ids, &conn()));
        insta::assert_snapshot!(format!("{:016x}", ids.of(&conn())), @"50c755465771226f");
    }

    #[test]
    fn each_part_of_the_key_changes_the_id() {
        let ids = FlowIds::new("a", 1);
        let base = ids.of(&conn());
        let change = |change: fn(&mut Conn)| {
            let mut changed = conn();
            change(&mut changed);
            ids.of(&changed)
        };
        let changed = [
            change(|conn| conn.id = 8),
            change(|conn| {
                conn.zone = 1;
                conn.present |= Attrs::ZONE;
            }),
            change(|conn| conn.orig.proto = 17),
            change(|conn| conn.orig.v6 = true),
            change(|conn| conn.orig.src_bytes[3] = 1),
            change(|conn| conn.orig.dst_bytes[3] = 1),
            change(|conn| conn.orig.src_port = 9),
            change(|conn| conn.orig.dst_port = 9),
            FlowIds::new("b", 1).of(&conn()),
            FlowIds::new("a", 2).of(&conn()),
        ];
        for (index, id) in changed.iter().enumerate() {
            assert_ne!(*id, base, "change {index}");
        }
        // What NEW, UPDATE and DESTROY do not agree on is no part of it.
        assert_eq!(change(|conn| conn.status = 8), base);
        assert_eq!(change(|conn| conn.start = 8), base);
    }
}
