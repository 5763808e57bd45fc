//! The same live flows through conntrack(8) and through our decoder: each event is written the way
//! conntrack writes it, from our decode alone, and must be the same text, field by field.
//!
//! Needs root, `conntrack`, `nft` and `ip`; says what is missing and passes, or fails when
//! CONNTRAIL_REQUIRE_ALL=1.

use std::fmt::Write;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use conntrail::ctnetlink::uapi::family::AF_UNSPEC;
use conntrail::ctnetlink::uapi::status::{
    IPS_ASSURED, IPS_HW_OFFLOAD, IPS_OFFLOAD, IPS_SEEN_REPLY,
};
use conntrail::ctnetlink::{
    Attrs, Class, Counters, Event, Kind, Message, Tally, Tuple, TupleParts, decode_conn, messages,
    names, request,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use super::bed::{self, Bed};
use crate::lab::Result;
use crate::lab::need;

/// conntrack prints its own clock when it reads an event; the kernel's time is a little before.
const READ_WITHIN: Duration = Duration::from_secs(5);

#[test]
fn live_events_are_what_conntrack_prints() -> Result<()> {
    if let Some(missing) = missing() {
        return skip(&missing);
    }
    let bed = Bed::new()?;
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("events");
    let mut child = bed.router.spawn(
        Command::new("conntrack")
            .args(["-E", "-o", "id,timestamp"])
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(Stdio::null()),
    )?;
    let result = compare_events(&bed, &output);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
    child.wait()?;
    result
}

fn compare_events(bed: &Bed, output: &Path) -> Result<()> {
    wait_for_listener(bed)?;
    let socket = bed.listen()?;
    traffic(bed)?;
    let mut datagrams = bed::collect(&socket)?;
    compare_dump(bed)?;
    bed.flush()?;
    datagrams.extend(bed::collect(&socket)?);
    assert_eq!(socket.drops()?, 0);

    let mut ours = Vec::new();
    for_each_conn(&datagrams, |message, event| ours.push((line(message, event), event.conn)));
    let theirs = wait_for_lines(output, ours.len())?;
    assert!(ours.len() > 60, "only {} events", ours.len());
    // Two listeners may see events of two CPUs in different order; what is said is the same.
    let mut theirs: Vec<(String, Duration)> = theirs.iter().map(|text| split(text)).collect();
    ours.sort_by(|a, b| a.0.cmp(&b.0));
    theirs.sort();
    let texts = |lines: &[(String, Duration)]| lines.iter().map(|line| line.0.clone()).collect();
    let (expected, seen): (Vec<String>, Vec<String>) =
        (texts(&theirs), ours.iter().map(|line| line.0.clone()).collect());
    for (seen, expected) in seen.iter().zip(&expected) {
        assert_eq!(seen, expected);
    }
    assert_eq!(seen.len(), expected.len());
    for ((text, conn), (_, read)) in ours.iter().zip(&theirs) {
        assert!(conn.has(Attrs::EVENT_TIME), "{text}");
        let event = Duration::from_nanos(conn.event_time);
        assert!(event <= *read && *read - event < READ_WITHIN, "{text}: {event:?}, {read:?}");
    }
    println!("{} events, each as conntrack -E prints it", ours.len());
    Ok(())
}

/// All that the little network can do, and protocols that only conntrack -I can make here.
fn traffic(bed: &Bed) -> Result<()> {
    bed.tcp(false, 5000)?;
    bed.tcp(false, 8080)?;
    bed.tcp(true, 5000)?;
    for port in [5000, 5001, 5005, 5006, 5009] {
        bed.udp(false, port, true)?;
    }
    bed.udp(false, 5007, false)?;
    bed.udp(true, 5000, true)?;
    bed.ping(false)?;
    bed.ping(true)?;
    bed.ftp_data(&bed.ftp()?)?;
    let ends = "-s 10.0.0.2 -d 203.0.113.2";
    for arguments in [
        format!(
            "-I -p sctp {ends} --sport 1 --dport 2 --state COOKIE_WAIT --orig-vtag 1 --reply-vtag 2 -t 60"
        ),
        format!("-I -p gre {ends} --srckey 0x11 --dstkey 0x2233 -t 60"),
        format!("-I -p 89 {ends} -t 60 -m 7 -w 3"),
        "-I -p udplite -s 2001:db8:1::2 -d 2001:db8:2::2 --sport 1 --dport 65535 -t 60".to_owned(),
    ] {
        bed.conntrack(&arguments)?;
    }
    Ok(())
}

/// The table as `conntrack -L -o xml,id` writes it. What moves with time is compared with room for
/// the moment between the two dumps.
fn compare_dump(bed: &Bed) -> Result<()> {
    let datagrams = bed.ask(&request::dump_conns(AF_UNSPEC, 1), false)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let theirs = bed.conntrack("-L -o xml,id")?;
    let mut ours = Vec::new();
    for_each_conn(&datagrams, |_, event| ours.push(timeless(&xml(event, now))));
    let mut theirs: Vec<_> =
        theirs.lines().filter(|line| line.starts_with("<flow")).map(timeless).collect();
    ours.sort();
    theirs.sort();
    assert!(ours.len() >= 15, "only {} entries", ours.len());
    assert_eq!(ours.len(), theirs.len());
    for ((ours, our_times), (theirs, their_times)) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
        assert_eq!(our_times.len(), 2, "{ours}");
        for (our_time, their_time) in our_times.iter().zip(their_times) {
            assert!(our_time.abs_diff(*their_time) <= 2, "{ours}: {our_times:?} {their_times:?}");
        }
    }
    println!("{} entries, each as conntrack -L -o xml,id prints it", ours.len());
    Ok(())
}

fn for_each_conn(datagrams: &[Vec<u8>], mut work: impl FnMut(&Message<'_>, &Event<'_>)) {
    let mut tally = Tally::default();
    for message in datagrams.iter().flat_map(|datagram| messages(datagram)) {
        let message = message.unwrap();
        if let Class::Conn(_) = message.class() {
            let mut event = Event::default();
            decode_conn(&message, &mut event, &mut tally).unwrap();
            work(&message, &event);
        }
    }
    assert_eq!(tally, Tally::default());
}

/// An event as `conntrack -E -o id` prints it, with single spaces and without who caused it.
fn line(message: &Message<'_>, event: &Event<'_>) -> String {
    let conn = &event.conn;
    let mut out = String::from(match event.kind {
        Kind::New => "[NEW]",
        Kind::Update => "[UPDATE]",
        Kind::Destroy => "[DESTROY]",
        Kind::Entry => "entry",
    });
    write!(out, " {} {}", names::conntrack_protocol(conn.orig.proto), conn.orig.proto).unwrap();
    let mut put = |attr: Attrs, text: String| {
        if conn.has(attr) {
            write!(out, " {text}").unwrap();
        }
    };
    put(Attrs::TIMEOUT, conn.timeout.to_string());
    put(Attrs::TCP_STATE, names::tcp_state(conn.tcp.state).unwrap().to_owned());
    put(Attrs::SCTP_STATE, names::sctp_state(conn.sctp_state).unwrap().to_owned());
    put(Attrs::TUPLE_ORIG, tuple(&conn.orig, "zone-orig"));
    put(Attrs::COUNTERS_ORIG, counters(&conn.orig_counters));
    if conn.status & IPS_SEEN_REPLY == 0 {
        put(Attrs::STATUS, "[UNREPLIED]".to_owned());
    }
    put(Attrs::TUPLE_REPLY, tuple(&conn.reply, "zone-reply"));
    put(Attrs::COUNTERS_REPLY, counters(&conn.reply_counters));
    if conn.status & IPS_HW_OFFLOAD != 0 {
        put(Attrs::STATUS, "[HW_OFFLOAD]".to_owned());
    } else if conn.status & IPS_OFFLOAD != 0 {
        put(Attrs::STATUS, "[OFFLOAD]".to_owned());
    } else if conn.status & IPS_ASSURED != 0 {
        put(Attrs::STATUS, "[ASSURED]".to_owned());
    }
    put(Attrs::MARK, format!("mark={}", conn.mark));
    put(Attrs::ZONE, format!("zone={}", conn.zone));
    // conntrack takes whole seconds first and the difference then.
    let lasted = (conn.stop / 1_000_000_000).wrapping_sub(conn.start / 1_000_000_000);
    put(Attrs::START | Attrs::STOP, format!("delta-time={lasted}"));
    put(Attrs::USE, format!("use={}", conn.use_count));
    put(Attrs::HELPER, format!("helper={}", String::from_utf8_lossy(event.helper)));
    put(Attrs::ID, format!("id={}", conn.id));
    if message.portid != 0 {
        write!(out, " [USERSPACE] portid={}", message.portid).unwrap();
    }
    out
}

fn tuple(tuple: &Tuple, zone: &str) -> String {
    let mut out = format!("src={} dst={}", tuple.src(), tuple.dst());
    if tuple.has(TupleParts::SRC_PORT) {
        let (src, dst) = (tuple.src_port, tuple.dst_port);
        match names::conntrack_protocol(tuple.proto) {
            "gre" => write!(out, " srckey={src:#x} dstkey={dst:#x}").unwrap(),
            _ => write!(out, " sport={src} dport={dst}").unwrap(),
        }
    }
    if tuple.has(TupleParts::ICMP) {
        let Tuple { icmp_type, icmp_code, icmp_id, .. } = tuple;
        write!(out, " type={icmp_type} code={icmp_code} id={icmp_id}").unwrap();
    }
    if tuple.has(TupleParts::ZONE) {
        write!(out, " {zone}={}", tuple.zone).unwrap();
    }
    out
}

fn counters(counters: &Counters) -> String {
    format!("packets={} bytes={}", counters.packets, counters.bytes)
}

/// A line of `conntrack -E -o id,timestamp`: its text in our form, and when it was read.
fn split(text: &str) -> (String, Duration) {
    let (stamp, rest) = text.strip_prefix('[').unwrap().split_once(']').unwrap();
    let (seconds, micros) = stamp.split_once('.').unwrap();
    let read = Duration::from_secs(seconds.trim().parse().unwrap())
        + Duration::from_micros(micros.parse().unwrap());
    // Which program it was is found out by conntrack itself, not told by the kernel.
    let words: Vec<&str> =
        rest.split_whitespace().filter(|word| !word.starts_with("progname=")).collect();
    (words.join(" "), read)
}

/// An entry as `conntrack -L -o xml,id` prints it.
fn xml(event: &Event<'_>, now: Duration) -> String {
    let conn = &event.conn;
    let mut out = String::from("<flow>");
    let directions = [
        ("original", &conn.orig, Attrs::COUNTERS_ORIG, &conn.orig_counters),
        ("reply", &conn.reply, Attrs::COUNTERS_REPLY, &conn.reply_counters),
    ];
    for (direction, tuple, attr, counters) in directions {
        write!(out, "<meta direction=\"{direction}\">{}", xml_tuple(tuple)).unwrap();
        if conn.has(attr) {
            let Counters { packets, bytes } = counters;
            write!(out, "<counters><packets>{packets}</packets><bytes>{bytes}</bytes></counters>")
                .unwrap();
        }
        out.push_str("</meta>");
    }
    out.push_str("<meta direction=\"independent\">");
    let mut put = |attr: Attrs, tag: &str, value: &dyn std::fmt::Display| {
        if conn.has(attr) {
            write!(out, "<{tag}>{value}</{tag}>").unwrap();
        }
    };
    put(Attrs::TCP_STATE, "state", &names::tcp_state(conn.tcp.state).unwrap());
    put(Attrs::SCTP_STATE, "state", &"");
    put(Attrs::TIMEOUT, "timeout", &conn.timeout);
    put(Attrs::MARK, "mark", &conn.mark);
    put(Attrs::ZONE, "zone", &conn.zone);
    put(Attrs::USE, "use", &conn.use_count);
    put(Attrs::ID, "id", &conn.id);
    if conn.status & IPS_ASSURED != 0 {
        out.push_str("<assured/>");
    }
    if conn.status & IPS_SEEN_REPLY == 0 {
        out.push_str("<unreplied/>");
    }
    if conn.has(Attrs::START) {
        let age = (now - Duration::from_nanos(conn.start)).as_secs();
        write!(out, "<deltatime>{age}</deltatime>").unwrap();
    }
    out.push_str("</meta>");
    if conn.has(Attrs::HELPER) {
        write!(out, "<helper>{}</helper>", String::from_utf8_lossy(event.helper)).unwrap();
    }
    out.push_str("</flow>");
    out
}

fn xml_tuple(tuple: &Tuple) -> String {
    let (number, name) = if tuple.v6 { (10, "ipv6") } else { (2, "ipv4") };
    let mut out = format!(
        "<layer3 protonum=\"{number}\" protoname=\"{name}\"><src>{}</src><dst>{}</dst></layer3>",
        tuple.src(),
        tuple.dst()
    );
    let protocol = names::conntrack_protocol(tuple.proto);
    write!(out, "<layer4 protonum=\"{}\" protoname=\"{protocol}\">", tuple.proto).unwrap();
    if tuple.has(TupleParts::SRC_PORT) {
        let (src, dst) = (tuple.src_port, tuple.dst_port);
        match protocol {
            "gre" => write!(out, "<srckey>{src:#x}</srckey><dstkey>{dst:#x}</dstkey>").unwrap(),
            _ => write!(out, "<sport>{src}</sport><dport>{dst}</dport>").unwrap(),
        }
    }
    out.push_str("</layer4>");
    if tuple.has(TupleParts::ZONE) {
        write!(out, "<zone>{}</zone>", tuple.zone).unwrap();
    }
    out
}

/// The text without its time-out and age, and those two. The state of an SCTP entry is emptied:
/// conntrack 1.4.7's XML takes it for a TCP state (its plain output, compared above, does not).
fn timeless(text: &str) -> (String, Vec<u64>) {
    let (text, timeout) = empty(text, "timeout");
    let (mut text, age) = empty(&text, "deltatime");
    if text.contains("protoname=\"sctp\"") {
        text = empty(&text, "state").0;
    }
    (text, [timeout, age].into_iter().flatten().filter_map(|time| time.parse().ok()).collect())
}

/// Empties the first element `tag`; what stood in it.
fn empty(text: &str, tag: &str) -> (String, Option<String>) {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let Some((before, rest)) = text.split_once(&open) else { return (text.to_owned(), None) };
    let (inside, after) = rest.split_once(&close).unwrap();
    (format!("{before}{open}{close}{after}"), Some(inside.to_owned()))
}

/// Waits until conntrack's socket is in the groups 1 to 3: events before that it would not see.
fn wait_for_listener(bed: &Bed) -> Result<()> {
    let limit = Instant::now() + Duration::from_secs(10);
    while Instant::now() < limit {
        let table = bed.router.run(|| std::fs::read_to_string("/proc/thread-self/net/netlink"))?;
        let listening = table.lines().any(|line| {
            let mut columns = line.split_whitespace().skip(1);
            let protocol = columns.next();
            let groups = columns.nth(1).and_then(|text| u32::from_str_radix(text, 16).ok());
            protocol == Some("12") && groups.is_some_and(|groups| groups & 7 == 7)
        });
        if listening {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err("conntrack -E did not begin to listen".into())
}

fn wait_for_lines(path: &Path, count: usize) -> Result<Vec<String>> {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        let text = std::fs::read_to_string(path)?;
        if text.lines().count() >= count || Instant::now() > limit {
            return Ok(text.lines().map(str::to_owned).collect());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn missing() -> Option<String> {
    if !geteuid().is_root() {
        return Some("root".to_owned());
    }
    for program in ["conntrack", "nft", "ip"] {
        let found = Command::new(program)
            .arg(if program == "ip" { "-V" } else { "--version" })
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            return Some(program.to_owned());
        }
    }
    None
}

fn skip(missing: &str) -> Result<()> {
    need::skip(&format!("{missing} is missing"));
    Ok(())
}
