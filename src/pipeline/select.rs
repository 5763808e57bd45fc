//! `[filter]`: which flows are shipped. Pure.
//!
//! Every given condition must hold. An *end* is an address or port of the flow before or after its
//! translation: of both tuples. The kernel's filter (`capture/filter.rs`) has the same meaning for
//! what it can express.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use crate::ctnetlink::uapi::ipproto::IPPROTO_GRE;
use crate::ctnetlink::uapi::status::{IPS_DST_NAT, IPS_SRC_NAT};
use crate::ctnetlink::{Attrs, Conn, Expect, ExpectAttrs, Tuple, TupleParts};

/// `IPS_NAT_MASK` of the kernel.
const IPS_NAT_MASK: u32 = IPS_SRC_NAT | IPS_DST_NAT;

/// The conditions; an empty list is no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only flows whose source or destination was translated.
    pub nat_only: bool,
    pub protocols: Vec<u8>,
    /// One end must be inside one of these ...
    pub include: Vec<IpNet>,
    /// ... and none inside one of these.
    pub exclude: Vec<IpNet>,
    /// One end's port must be in one of these.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Value and mask: `mark & mask == value`.
    pub marks: Vec<(u32, u32)>,
    pub zones: Vec<u16>,
}

impl Filter {
    #[inline]
    pub fn passes(&self, conn: &Conn) -> bool {
        if self.nat_only && !(conn.has(Attrs::STATUS) && conn.status & IPS_NAT_MASK != 0) {
            return false;
        }
        self.marks_pass(conn)
            && self.zones_pass(conn)
            && self.tuples_pass(&[&conn.orig, &conn.reply])
    }

    /// Whether a socket filter by protocol and network is all of it.
    pub fn fits_the_kernel(&self) -> bool {
        let Filter { nat_only, protocols: _, include: _, exclude: _, ports, marks, zones } = self;
        !nat_only && ports.is_empty() && marks.is_empty() && zones.is_empty()
    }

    /// An expectation has no status and no mark yet: these conditions do not concern it.
    pub fn passes_expectation(&self, expect: &Expect<'_>) -> bool {
        let zone = if expect.present.contains(ExpectAttrs::ZONE) { expect.zone } else { 0 };
        (self.zones.is_empty() || self.zones.contains(&zone)) && self.tuples_pass(&[&expect.tuple])
    }

    fn tuples_pass(&self, tuples: &[&Tuple]) -> bool {
        self.protocols_pass(tuples[0]) && self.networks_pass(tuples) && self.ports_pass(tuples)
    }

    fn protocols_pass(&self, tuple: &Tuple) -> bool {
        self.protocols.is_empty() || self.protocols.contains(&tuple.proto)
    }

    fn networks_pass(&self, tuples: &[&Tuple]) -> bool {
        if self.include.is_empty() && self.exclude.is_empty() {
            return true;
        }
        let mut inside = self.include.is_empty();
        for end in tuples.iter().flat_map(|tuple| ends(tuple)) {
            if self.exclude.iter().any(|network| network.contains(&end)) {
                return false;
            }
            inside = inside || self.include.iter().any(|network| network.contains(&end));
        }
        inside
    }

    fn ports_pass(&self, tuples: &[&Tuple]) -> bool {
        let given = |port: u16| self.ports.iter().any(|range| range.contains(&port));
        self.ports.is_empty()
            || tuples
                .iter()
                .filter(|tuple| tuple.has(TupleParts::SRC_PORT | TupleParts::DST_PORT))
                // A GRE key is no port, though it stands in its attribute.
                .filter(|tuple| tuple.proto != IPPROTO_GRE)
                .any(|tuple| given(tuple.src_port) || given(tuple.dst_port))
    }

    fn marks_pass(&self, conn: &Conn) -> bool {
        // A mark of 0 is left out of events.
        let mark = if conn.has(Attrs::MARK) { conn.mark } else { 0 };
        self.marks.is_empty() || self.marks.iter().any(|(value, mask)| mark & mask == value & mask)
    }

    fn zones_pass(&self, conn: &Conn) -> bool {
        if self.zones.is_empty() {
            return true;
        }
        let one_way = [&conn.orig, &conn.reply]
            .map(|tuple| tuple.has(TupleParts::ZONE).then_some(tuple.zone));
        // Zone 0 is the default one, and left out.
        let both_ways = match (conn.has(Attrs::ZONE), one_way) {
            (true, _) => Some(conn.zone),
            (false, [None, None]) => Some(0),
            (false, _) => None,
        };
        let mut zones = one_way.into_iter().chain([both_ways]).flatten();
        zones.any(|zone| self.zones.contains(&zone))
    }
}

fn ends(tuple: &Tuple) -> impl Iterator<Item = IpAddr> {
    let src = tuple.has(TupleParts::SRC).then(|| tuple.src());
    let dst = tuple.has(TupleParts::DST).then(|| tuple.dst());
    [src, dst].into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Body;
    use crate::flow::testing::masqueraded;

    /// 10.0.0.5:51234 → 198.51.100.7:443, masqueraded to 203.0.113.9:61022.
    fn conn() -> Conn {
        match masqueraded().body {
            Body::Flow(flow) => flow.conn,
            body => panic!("no flow: {body:?}"),
        }
    }

    fn networks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|network| network.parse().unwrap()).collect()
    }

    #[test]
    fn no_condition_lets_everything_pass() {
        assert!(Filter::default().passes(&conn()));
        assert!(Filter::default().passes(&Conn::default()));
    }

    #[test]
    fn nat_only_wants_a_translation_and_not_the_done_bits() {
        let filter = Filter { nat_only: true, ..Filter::default() };
        assert!(filter.passes(&conn()));
        assert!(!filter.passes(&Conn { status: 1 << 7 | 1 << 8, ..conn() }));
    }

    #[test]
    fn an_end_is_any_address_before_or_after_translation() {
        for network in ["10.0.0.0/8", "198.51.100.0/24", "203.0.113.9/32"] {
            let include = Filter { include: networks(&[network]), ..Filter::default() };
            assert!(include.passes(&conn()), "{network}");
            let exclude = Filter { exclude: networks(&[network]), ..Filter::default() };
            assert!(!exclude.passes(&conn()), "!{network}");
        }
        let other = Filter { include: networks(&["10.1.0.0/16", "::/0"]), ..Filter::default() };
        assert!(!other.passes(&conn()));
    }

    #[test]
    fn an_exclusion_is_stronger_than_an_inclusion() {
        let filter = Filter {
            include: networks(&["10.0.0.0/8"]),
            exclude: networks(&["198.51.100.7/32"]),
            ..Filter::default()
        };
        assert!(!filter.passes(&conn()));
    }

    #[test]
    fn ports_match_either_end_before_or_after_translation_but_no_gre_key() {
        let port = |port| Filter { ports: vec![port..=port], ..Filter::default() };
        assert!([51234, 443, 61022].iter().all(|&number| port(number).passes(&conn())));
        assert!(!port(80).passes(&conn()));
        let mut gre = conn();
        gre.orig.proto = IPPROTO_GRE;
        gre.reply.proto = IPPROTO_GRE;
        assert!(!port(443).passes(&gre));
    }

    #[test]
    fn a_mark_that_is_left_out_is_0() {
        let filter = Filter { marks: vec![(0, 0xff)], ..Filter::default() };
        assert!(filter.passes(&conn()));
        let marked = Conn { mark: 0x101, present: conn().present | Attrs::MARK, ..conn() };
        assert!(!filter.passes(&marked));
        assert!(Filter { marks: vec![(1, 0xff)], ..Filter::default() }.passes(&marked));
    }

    #[test]
    fn a_zone_that_is_left_out_is_0_and_one_way_zones_count() {
        let zone = |zone| Filter { zones: vec![zone], ..Filter::default() };
        assert!(zone(0).passes(&conn()) && !zone(7).passes(&conn()));
        let mut one_way = conn();
        one_way.orig.zone = 7;
        one_way.orig.parts |= TupleParts::ZONE;
        assert!(zone(7).passes(&one_way) && !zone(0).passes(&one_way));
    }
}
