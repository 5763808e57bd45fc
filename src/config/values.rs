//! Values as people write them: sizes, durations, networks, ports, marks, protocols.
//!
//! Pure functions from text to value and back. Each error says what is allowed.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;

use crate::ctnetlink::names;

/// Why a value was refused, and what would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) why: String,
    pub(super) help: String,
}

fn refuse<T>(why: impl Into<String>, help: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { why: why.into(), help: help.into() })
}

const SIZE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

const SIZE_HELP: &str = "write a size as \"64MiB\", \"1GB\" or a number of bytes";

/// `64MiB`, `64 MiB`, `1GB`, `4096`.
pub(super) fn parse_size(text: &str) -> Result<u64, Refused> {
    let (digits, unit) = split_number(text.trim());
    if digits.is_empty() {
        return refuse(format!("`{text}` is not a size"), SIZE_HELP);
    }
    let unit = unit.trim_start();
    let factor = if unit.is_empty() {
        1
    } else if let Some((_, factor)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) {
        *factor
    } else {
        let close = SIZE_UNITS.iter().find(|(name, _)| {
            name.eq_ignore_ascii_case(unit)
                || (name.ends_with("iB") && name[..1].eq_ignore_ascii_case(unit))
        });
        let help = match close {
            Some((name, _)) => format!("did you mean \"{digits}{name}\"?"),
            None => SIZE_HELP.to_owned(),
        };
        return refuse(format!("`{unit}` is not a unit of size"), help);
    };
    match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)) {
        Some(size) => Ok(size),
        None => refuse(format!("`{text}` is too large"), SIZE_HELP),
    }
}

/// The shortest exact way to write a size.
pub(super) fn format_size(size: u64) -> String {
    let exact = ["TiB", "GiB", "MiB", "KiB"].iter().find_map(|unit| {
        let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| name == unit)?;
        (size != 0 && size.is_multiple_of(*factor)).then(|| format!("{}{unit}", size / factor))
    });
    exact.unwrap_or_else(|| format!("{size}B"))
}

const TIME_UNITS: &[(&str, u64)] =
    &[("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

const TIME_HELP: &str =
    "write a duration as \"500ms\", \"30s\", \"5m\", \"1h\", \"1h30m\" or \"7d\"";

/// `500ms`, `30s`, `1h30m`, `7d`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, Refused> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return refuse("a duration is empty", TIME_HELP);
    }
    let mut total = 0_u64;
    while !rest.is_empty() {
        let (digits, after) = split_number(rest);
        if digits.is_empty() {
            return refuse(format!("`{text}` is not a duration"), TIME_HELP);
        }
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let Some((_, factor)) = TIME_UNITS.iter().find(|(name, _)| *name == unit.trim()) else {
            let why = if unit.trim().is_empty() {
                format!("`{text}` has no unit of time")
            } else {
                format!("`{}` is not a unit of time", unit.trim())
            };
            return refuse(why, TIME_HELP);
        };
        let part = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
        let Some(sum) = part.and_then(|part| total.checked_add(part)) else {
            return refuse(format!("`{text}` is too long"), TIME_HELP);
        };
        total = sum;
        rest = next;
    }
    Ok(Duration::from_millis(total))
}

/// The largest unit that is exact.
pub(super) fn format_duration(duration: Duration) -> String {
    let millis = duration.as_millis() as u64;
    let exact = TIME_UNITS.iter().find(|(_, factor)| millis != 0 && millis.is_multiple_of(*factor));
    match exact {
        Some((unit, factor)) => format!("{}{unit}", millis / factor),
        None => format!("{millis}ms"),
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

/// A network and whether it excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) net: IpNet,
    pub(super) exclude: bool,
}

const NETWORK_HELP: &str = "write a network as \"10.0.0.0/8\", \"fd00::/8\" or \"192.0.2.1\", with \"!\" before it to exclude";

/// `10.0.0.0/8`, `192.0.2.1`, `!fd00::/8`.
pub(super) fn parse_network(text: &str) -> Result<Network, Refused> {
    let (exclude, address) = match text.trim().strip_prefix('!') {
        Some(rest) => (true, rest.trim_start()),
        None => (false, text.trim()),
    };
    let net = match address.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => match address.parse::<IpAddr>() {
            Ok(ip) => IpNet::from(ip),
            Err(_) => return refuse(format!("`{text}` is not a network"), NETWORK_HELP),
        },
    };
    if net.trunc() != net {
        let mark = if exclude { "!" } else { "" };
        return refuse(
            format!("`{text}` has bits set outside its prefix"),
            format!("did you mean \"{mark}{}\" or \"{mark}{}\"?", net.trunc(), net.addr()),
        );
    }
    Ok(Network { net, exclude })
}

const PORT_HELP: &str = "write ports as 443, \"443\" or \"8000-8100\", each from 1 to 65535";

/// `443`, `8000-8100`.
pub(super) fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, Refused> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) else {
        return refuse(format!("`{text}` is not a port or a range of ports"), PORT_HELP);
    };
    if first == 0 {
        return refuse("0 is not a port", PORT_HELP);
    }
    if first > last {
        return refuse(
            format!("the range `{text}` is empty"),
            format!("did you mean \"{last}-{first}\"?"),
        );
    }
    Ok(first..=last)
}

pub(super) fn format_ports(ports: &RangeInclusive<u16>) -> String {
    if ports.start() == ports.end() {
        return ports.start().to_string();
    }
    format!("\"{}-{}\"", ports.start(), ports.end())
}

const MARK_HELP: &str = "write a mark as 16, \"0x10\" or \"0x10/0xff\" (value/mask, 32 bits)";

/// `16`, `0x10`, `0x10/0xff`.
pub(super) fn parse_mark(text: &str) -> Result<(u32, u32), Refused> {
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    let (Some(value), Some(mask)) = (parse_u32(value.trim()), parse_u32(mask.trim())) else {
        return refuse(format!("`{text}` is not a mark"), MARK_HELP);
    };
    if value & !mask != 0 {
        return refuse(
            format!("`{text}` matches no mark: its value has bits that its mask lacks"),
            format!("did you mean \"{:#x}/{:#x}\"?", value & mask, mask),
        );
    }
    Ok((value, mask))
}

fn parse_u32(text: &str) -> Option<u32> {
    // `from_str_radix` takes a sign, which a mark does not have.
    if text.starts_with('+') || text.starts_with("0x+") {
        return None;
    }
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `tcp`, `47`.
pub(super) fn parse_protocol(text: &str) -> Result<u8, Refused> {
    let lower = text.trim().to_ascii_lowercase();
    let name = match lower.as_str() {
        // What /etc/protocols calls it.
        "ipv6-icmp" => "icmpv6",
        other => other,
    };
    if let Some((_, number)) = names::protocols().find(|(known, _)| *known == name) {
        return Ok(number);
    }
    if let Ok(number) = name.parse::<u8>() {
        return Ok(number);
    }
    let names = names::protocols().map(|(name, _)| name);
    let help = match closest(name, names.clone()) {
        Some(close) => format!("did you mean \"{close}\"? A number from 0 to 255 does as well"),
        None => format!("names are {}; else a number from 0 to 255", List(names)),
    };
    refuse(format!("`{text}` is not a protocol"), help)
}

pub(super) fn format_protocol(number: u8) -> String {
    match names::protocol(number) {
        "unknown" => number.to_string(),
        name => format!("\"{name}\""),
    }
}

/// The allowed word nearest to `word`, if one is near enough to have been meant.
pub(super) fn closest<'a>(word: &str, allowed: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    allowed
        .map(|candidate| {
            let distance = strsim::damerau_levenshtein(word, candidate);
            (distance, strsim::jaro_winkler(word, candidate), candidate)
        })
        // One slip finds even a short word (`tpc`); 0.8 finds `recieve_bufer`, and no sink of ours
        // for `kafka`.
        .filter(|(distance, likeness, _)| *distance <= 1 || *likeness >= 0.8)
        .min_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)))
        .map(|(_, _, candidate)| candidate)
}

/// Words with commas between.
#[derive(Debug)]
pub(super) struct List<I>(pub(super) I);

impl<'a, I: Iterator<Item = &'a str> + Clone> fmt::Display for List<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, word) in self.0.clone().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            f.write_str(word)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_unit() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("64 MiB", 64 << 20),
            ("1GB", 1_000_000_000),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn a_size_without_sense_is_refused_with_advice() {
        for (text, help) in [
            ("", SIZE_HELP),
            ("MiB", SIZE_HELP),
            ("-1", SIZE_HELP),
            ("1.5GiB", SIZE_HELP),
            ("64mib", "did you mean \"64MiB\"?"),
            ("64M", "did you mean \"64MiB\"?"),
            ("99999999999999999999", SIZE_HELP),
            ("99999999TiB", SIZE_HELP),
        ] {
            assert_eq!(parse_size(text).unwrap_err().help, help, "{text}");
        }
    }

    #[test]
    fn durations_are_read() {
        for (text, millis) in
            [("500ms", 500), ("30s", 30_000), ("1h30m", 5_400_000), ("7d", 604_800_000), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "10", "h", "1y", "1h30", "-1s", "1.5h", "99999999999999999d"] {
            assert_eq!(parse_duration(text).unwrap_err().help, TIME_HELP, "{text}");
        }
    }

    #[test]
    fn networks_are_read() {
        let network = parse_network("!10.0.0.0/8").unwrap();
        assert!(network.exclude);
        assert_eq!(network.net.to_string(), "10.0.0.0/8");
        assert_eq!(parse_network("2001:db8::1").unwrap().net.to_string(), "2001:db8::1/128");
        for text in ["", "!", "10.0.0.0/33", "10.0.0", "host", "10.0.0.0/8 "] {
            let trimmed_is_fine = text.ends_with(' ');
            assert_eq!(parse_network(text).is_ok(), trimmed_is_fine, "{text}");
        }
    }

    #[test]
    fn host_bits_in_a_network_are_refused_with_both_meanings() {
        let refused = parse_network("!10.1.2.3/8").unwrap_err();
        assert_eq!(refused.help, "did you mean \"!10.0.0.0/8\" or \"!10.1.2.3\"?");
    }

    #[test]
    fn ports_are_read() {
        assert_eq!(parse_ports("443"), Ok(443..=443));
        assert_eq!(parse_ports("8000-8100"), Ok(8000..=8100));
        assert_eq!(parse_ports("9-8").unwrap_err().help, "did you mean \"8-9\"?");
        for text in ["", "0", "65536", "http", "-", "1-", "1-2-3"] {
            assert!(parse_ports(text).is_err(), "{text}");
        }
    }

    #[test]
    fn marks_are_read() {
        assert_eq!(parse_mark("16"), Ok((16, u32::MAX)));
        assert_eq!(parse_mark("0x10/0xff"), Ok((0x10, 0xff)));
        assert_eq!(parse_mark("0/0"), Ok((0, 0)));
        assert!(parse_mark("0x100/0xff").unwrap_err().why.contains("matches no mark"));
        for text in ["", "0x", "4294967296", "-1", "+1", "0x+1", "1/", "/1", "1/2/3"] {
            assert!(parse_mark(text).is_err(), "{text}");
        }
    }

    #[test]
    fn protocols_are_read_by_name_and_number() {
        for (text, number) in [("tcp", 6), ("UDP", 17), ("47", 47), ("ipv6-icmp", 58), ("255", 255)]
        {
            assert_eq!(parse_protocol(text), Ok(number), "{text}");
        }
        assert!(parse_protocol("tpc").unwrap_err().help.starts_with("did you mean \"tcp\"?"));
        assert!(parse_protocol("256").is_err());
    }

    #[test]
    fn what_is_written_is_read_back() {
        for size in [0, 1, 1023, 1024, 1 << 20, 3 << 30, 1 << 40, u64::MAX] {
            assert_eq!(parse_size(&format_size(size)), Ok(size));
        }
        for millis in [0, 1, 1_500, 60_000, 5_400_000, 86_400_000] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }
}
