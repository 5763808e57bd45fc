//! Community ID v1 (the Corelight specification): one hash that every tool gives the same flow.
//!
//! `"1:" + base64(sha1(seed ‖ ip ‖ ip ‖ proto ‖ 0 ‖ port ‖ port))`, the smaller (ip, port) first.
//! SHA-1 is called by its block function: the input always fits one block, and the incremental
//! interface cost twice as much.

use sha1::block_api::compress;

use crate::ctnetlink::uapi::ipproto::{
    IPPROTO_ICMP as ICMP, IPPROTO_ICMPV6 as ICMPV6, IPPROTO_SCTP as SCTP, IPPROTO_TCP as TCP,
    IPPROTO_UDP as UDP,
};
use crate::ctnetlink::{Tuple, TupleParts};

/// Length of `"1:"` and the 28 characters of a SHA-1 in base64.
pub const LEN: usize = 30;

/// Initial state of SHA-1 (FIPS 180-4, 5.3.1).
const SHA1_INIT: [u32; 5] = [0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0];

/// An identifier as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommunityId([u8; LEN]);

impl CommunityId {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("base64 is ASCII")
    }

    /// The identifier of a flow by its original tuple; `None` when the tuple has no addresses.
    pub fn of(tuple: &Tuple) -> Option<Self> {
        Self::seeded(0, tuple)
    }

    /// With the seed that all tools of a site must share.
    #[inline]
    pub fn seeded(seed: u16, tuple: &Tuple) -> Option<Self> {
        if !tuple.has(TupleParts::SRC | TupleParts::DST | TupleParts::PROTO) {
            return None;
        }
        // IPv4 addresses are padded with zeros, so that comparing all sixteen bytes is right, and
        // cheaper than comparing slices.
        let (src, dst) =
            (u128::from_be_bytes(tuple.src_bytes), u128::from_be_bytes(tuple.dst_bytes));
        let ports = Ports::of(tuple);
        let swap = match &ports {
            Some(ports) => ports.ordered && (dst, ports.b) < (src, ports.a),
            None => dst < src,
        };
        let (a, b) = if swap {
            (&tuple.dst_bytes, &tuple.src_bytes)
        } else {
            (&tuple.src_bytes, &tuple.dst_bytes)
        };
        let mut block = Block([0; 64]);
        block.put(0, seed.to_be_bytes());
        let end = if tuple.v6 {
            block.put(2, *a);
            block.put(18, *b);
            34
        } else {
            block.put(2, [a[0], a[1], a[2], a[3]]);
            block.put(6, [b[0], b[1], b[2], b[3]]);
            10
        };
        block.put(end, [tuple.proto, 0]);
        let Some(ports) = ports else { return Some(CommunityId(text(&block.sha1(end + 2)))) };
        let (a, b) = if swap { (ports.b, ports.a) } else { (ports.a, ports.b) };
        block.put(end + 2, a.to_be_bytes());
        block.put(end + 4, b.to_be_bytes());
        Some(CommunityId(text(&block.sha1(end + 6))))
    }
}

struct Ports {
    a: u16,
    b: u16,
    /// Whether the two ends may be exchanged; not for one-way ICMP messages.
    ordered: bool,
}

impl Ports {
    fn of(tuple: &Tuple) -> Option<Self> {
        match tuple.proto {
            TCP | UDP | SCTP if tuple.has(TupleParts::SRC_PORT | TupleParts::DST_PORT) => {
                Some(Ports { a: tuple.src_port, b: tuple.dst_port, ordered: true })
            }
            ICMP | ICMPV6 if tuple.has(TupleParts::ICMP) => {
                let counterpart = if tuple.proto == ICMP {
                    icmp_counterpart(tuple.icmp_type)
                } else {
                    icmpv6_counterpart(tuple.icmp_type)
                };
                Some(Ports {
                    a: tuple.icmp_type.into(),
                    b: counterpart.unwrap_or(tuple.icmp_code).into(),
                    ordered: counterpart.is_some(),
                })
            }
            _ => None,
        }
    }
}

fn icmp_counterpart(icmp_type: u8) -> Option<u8> {
    Some(match icmp_type {
        8 => 0,
        0 => 8,
        13 => 14,
        14 => 13,
        15 => 16,
        16 => 15,
        10 => 9,
        9 => 10,
        17 => 18,
        18 => 17,
        _ => return None,
    })
}

fn icmpv6_counterpart(icmp_type: u8) -> Option<u8> {
    Some(match icmp_type {
        128 => 129,
        129 => 128,
        133 => 134,
        134 => 133,
        135 => 136,
        136 => 135,
        130 => 131,
        131 => 130,
        139 => 140,
        140 => 139,
        144 => 145,
        145 => 144,
        _ => return None,
    })
}

/// One SHA-1 block. The longest input is 40 bytes (IPv6 with ports), and 55 would fit.
struct Block([u8; 64]);

impl Block {
    #[inline(always)]
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&bytes);
    }

    #[inline(always)]
    fn sha1(mut self, len: usize) -> [u8; 20] {
        self.0[len] = 0x80;
        self.0[56..].copy_from_slice(&(len as u64 * 8).to_be_bytes());
        let mut state = SHA1_INIT;
        compress(&mut state, &[self.0]);
        let mut digest = [0; 20];
        for (out, word) in digest.chunks_exact_mut(4).zip(state) {
            out.copy_from_slice(&word.to_be_bytes());
        }
        digest
    }
}

/// Base64 into a fixed array: an allocation for each record would cost more than the hash.
#[inline(always)]
fn text(digest: &[u8; 20]) -> [u8; LEN] {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = [b'='; LEN];
    out[..2].copy_from_slice(b"1:");
    // Twenty bytes are six groups of three and one of two, whose last character stays `=`.
    let mut padded = [0; 21];
    padded[..20].copy_from_slice(digest);
    for group in 0..7 {
        let [a, b, c] = [padded[3 * group], padded[3 * group + 1], padded[3 * group + 2]];
        let bits = u32::from(a) << 16 | u32::from(b) << 8 | u32::from(c);
        let at = 2 + 4 * group;
        out[at] = ALPHABET[(bits >> 18) as usize & 63];
        out[at + 1] = ALPHABET[(bits >> 12) as usize & 63];
        out[at + 2] = ALPHABET[(bits >> 6) as usize & 63];
        if group < 6 {
            out[at + 3] = ALPHABET[bits as usize & 63];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn tuple(src: &str, dst: &str, proto: u8, a: u16, b: u16) -> Tuple {
        let mut tuple = Tuple { proto, ..Tuple::default() };
        tuple.parts = TupleParts::SRC | TupleParts::DST | TupleParts::PROTO;
        for (text, bytes) in [(src, &mut tuple.src_bytes), (dst, &mut tuple.dst_bytes)] {
            match text.parse::<IpAddr>().unwrap() {
                IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
                IpAddr::V6(ip) => {
                    bytes.copy_from_slice(&ip.octets());
                    tuple.v6 = true;
                }
            }
        }
        if matches!(proto, ICMP | ICMPV6) {
            tuple.parts |= TupleParts::ICMP;
            (tuple.icmp_type, tuple.icmp_code) = (a as u8, b as u8);
        } else if matches!(proto, TCP | UDP | SCTP) {
            tuple.parts |= TupleParts::SRC_PORT | TupleParts::DST_PORT;
            (tuple.src_port, tuple.dst_port) = (a, b);
        }
        tuple
    }

    /// Vectors of the specification's baseline (`baseline/baseline_deflt.json` and
    /// `baseline_seed1.json` of corelight/community-id-spec).
    #[test]
    fn published_vectors_pass() {
        let vectors: &[(u16, &str, &str, u8, u16, u16, &str)] = &[
            (
                0,
                "fe80::200:86ff:fe05:80da",
                "fe80::260:97ff:fe07:69ea",
                ICMPV6,
                135,
                0,
                "1:dGHyGvjMfljg6Bppwm3bg0LO8TY=",
            ),
            (
                0,
                "fe80::260:97ff:fe07:69ea",
                "fe80::200:86ff:fe05:80da",
                ICMPV6,
                136,
                0,
                "1:dGHyGvjMfljg6Bppwm3bg0LO8TY=",
            ),
            (
                0,
                "3ffe:501:1800:2345::2",
                "3ffe:507:0:1:200:86ff:fe05:80da",
                ICMPV6,
                3,
                0,
                "1:2ObVBgIn28oZvibYZhZMBgh7WdQ=",
            ),
            (
                0,
                "3ffe:501:410:0:2c0:dfff:fe47:33e",
                "3ffe:507:0:1:200:86ff:fe05:80da",
                ICMPV6,
                1,
                4,
                "1:hLZd0XGWojozrvxqE0dWB1iM6R0=",
            ),
            (
                0,
                "3ffe:507:0:1:200:86ff:fe05:80da",
                "3ffe:501:0:1001::2",
                ICMPV6,
                128,
                0,
                "1:+TW+HtLHvV1xnGhV1lv7XoJrqQg=",
            ),
            (
                0,
                "fe80::200:86ff:fe05:80da",
                "ff02::2",
                ICMPV6,
                133,
                0,
                "1:hO+sN4H+MG5MY/8hIrXPqc4ZQz0=",
            ),
            (0, "192.168.0.89", "192.168.0.1", ICMP, 8, 0, "1:X0snYXpgwiv9TZtqg64sgzUn6Dk="),
            (0, "192.168.0.1", "192.168.0.89", ICMP, 0, 0, "1:X0snYXpgwiv9TZtqg64sgzUn6Dk="),
            (0, "10.0.0.1", "10.0.0.2", ICMP, 11, 0, "1:YHxtAirCG//0OzkcVAukqKQN9xM="),
            (
                0,
                "2001:470:e5bf:dead:4957:2174:e82c:4887",
                "2607:f8b0:400c:c03::1a",
                TCP,
                63943,
                25,
                "1:/qFaeAR+gFe1KYjMzVDsMv+wgU4=",
            ),
            (0, "192.168.170.8", "192.168.170.56", SCTP, 7, 7, "1:MP2EtRCAUIZvTw6MxJHLV7N7JDs="),
            (0, "192.168.170.56", "192.168.170.8", SCTP, 7, 7, "1:MP2EtRCAUIZvTw6MxJHLV7N7JDs="),
            (
                0,
                "128.232.110.120",
                "66.35.250.204",
                TCP,
                34855,
                80,
                "1:LQU9qZlK+B5F3KDmev6m5PMibrg=",
            ),
            (
                0,
                "66.35.250.204",
                "128.232.110.120",
                TCP,
                80,
                34855,
                "1:LQU9qZlK+B5F3KDmev6m5PMibrg=",
            ),
            (0, "192.168.1.52", "8.8.8.8", UDP, 54585, 53, "1:d/FP5EW3wiY1vCndhwleRRKHowQ="),
            (0, "10.1.12.1", "10.1.12.2", 46, 0, 0, "1:KHlLkgoJW7ifUTyTSgyVfkFHzKw="),
            (
                1,
                "fe80::200:86ff:fe05:80da",
                "fe80::260:97ff:fe07:69ea",
                ICMPV6,
                135,
                0,
                "1:kHa1FhMYIT6Ym2Vm2AOtoOARDzY=",
            ),
            (1, "192.168.0.89", "192.168.0.1", ICMP, 8, 0, "1:03g6IloqVBdcZlPyX8r0hgoE7kA="),
            (
                1,
                "128.232.110.120",
                "66.35.250.204",
                TCP,
                34855,
                80,
                "1:3V71V58M3Ksw/yuFALMcW0LAHvc=",
            ),
            (1, "10.1.12.1", "10.1.12.2", 46, 0, 0, "1:rYir8gphR31noO9iDRQmF/BteEI="),
            // The example flow of this project's documents, inside and outside.
            (0, "10.0.0.5", "198.51.100.7", TCP, 51234, 443, "1:pzB/0nzqMNGberl29Q/tEOutQSI="),
            (0, "203.0.113.9", "198.51.100.7", TCP, 61022, 443, "1:LbIYMbHULDiuf4B+1WXN3yOx4jk="),
        ];
        for &(seed, src, dst, proto, a, b, expected) in vectors {
            let tuple = tuple(src, dst, proto, a, b);
            let id = CommunityId::seeded(seed, &tuple).unwrap();
            assert_eq!(id.as_str(), expected, "{src} {dst} {proto} {a} {b} seed {seed}");
        }
    }

    #[test]
    fn a_tuple_without_addresses_has_no_identifier() {
        assert_eq!(CommunityId::of(&Tuple::default()), None);
    }

    proptest::proptest! {
        /// The crate `community-id` as an oracle, for every protocol that it knows.
        #[test]
        fn agrees_with_the_reference_crate(
            v6: bool, src: [u8; 16], dst: [u8; 16], a: u16, b: u16, seed: u16,
            proto in proptest::sample::select(vec![TCP, UDP, SCTP, ICMP, ICMPV6, 47, 50]),
        ) {
            proptest::prop_assume!(!(proto == ICMP && v6 || proto == ICMPV6 && !v6));
            let ip = |bytes: [u8; 16]| if v6 {
                IpAddr::from(bytes)
            } else {
                IpAddr::from(*bytes.first_chunk::<4>().unwrap())
            };
            let (src, dst) = (ip(src), ip(dst));
            let icmp = matches!(proto, ICMP | ICMPV6);
            let (a, b) = if icmp { (a & 0xff, b & 0xff) } else { (a, b) };
            let portless = !icmp && !matches!(proto, TCP | UDP | SCTP);
            let (pa, pb) = if portless { (None, None) } else { (Some(a), Some(b)) };
            let reference = community_id::calculate_community_id(
                seed, src, dst, pa, pb, proto, Default::default(),
            );
            let ours = CommunityId::seeded(seed, &tuple(&src.to_string(), &dst.to_string(), proto, a, b));
            if let Ok(reference) = reference {
                proptest::prop_assert_eq!(ours.map(|id| id.as_str().to_owned()), Some(reference));
            }
        }
    }
}
